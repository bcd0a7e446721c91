"""Inputs, a definition to compare with, and a backend that torch cannot look into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import runtime
from attnhub.capability import Capability, DeviceRange
from attnhub.problem import Feature
from attnhub.registry import registry


@pytest.fixture(autouse=True, scope="session")
def own_inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inductor's cache on disk does not know which fake kernel its code was made with: another version's must not be found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def clean_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def qkv() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """q [batch, heads, length, dim] and k, v [batch, kv_heads, length_k, dim], the same numbers for the same arguments."""

    def make(
        batch: int = 2, heads: int = 4, kv_heads: Optional[int] = None, length: int = 9, length_k: Optional[int] = None, dim: int = 16,
        dtype: torch.dtype = torch.float32, grad: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        random_ = torch.Generator().manual_seed(1000 * length + batch)
        shapes = ((heads, length), (kv_heads or heads, length_k or length), (kv_heads or heads, length_k or length))
        q, k, v = (torch.randn(batch, n, s, dim, generator=random_).to(dtype).requires_grad_(grad) for n, s in shapes)
        return q, k, v

    return make


@pytest.fixture
def gradients() -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of a fixed scalar of an output (or of several) with respect to the inputs that need them."""

    def of(out: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outs = out if isinstance(out, (tuple, list)) else (out,)
        loss = sum((o.float() * torch.linspace(-1, 1, o.numel()).reshape(o.shape)).sum() + o.float().square().sum() for o in outs)
        return torch.autograd.grad(loss, [t for t in inputs if t.requires_grad])

    return of


@pytest.fixture
def same() -> Callable[..., None]:
    """Two nests of tensors agree up to fp32 rounding."""

    def check(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)

    return check


class BlackBoxPlan(attnhub.Plan):
    """The definition behind numpy arrays: no torch operation that autograd or a fake tensor could follow reaches the inputs."""

    def forward(self, call: attnhub.Call) -> tuple[Tensor, Optional[Tensor]]:
        from attnhub.backends.reference import maths

        out, lse = maths.forward(_boxed(call), None, torch.float32, exact_nan=True)
        return out, lse

    def backward(
        self, call: attnhub.Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: attnhub.Needs
    ) -> attnhub.Gradients:
        from attnhub.backends.reference import maths

        grad_out, out, lse = (_copy(t) for t in (grad_out, out, lse))
        return maths.backward(_boxed(call), grad_out, None if grad_lse is None else _copy(grad_lse), out, lse, needs, None, torch.float32)


class BlackBox(attnhub.Backend):
    name = "blackbox"
    automatic = False
    capability = Capability(
        devices=(DeviceRange("cpu", dtypes=frozenset({"float32", "float8_e4m3fn"})),), features=frozenset(Feature), backward_features=frozenset(Feature),
    )  # fmt: skip

    def prepare(self, problem: attnhub.Problem) -> attnhub.Plan:
        return BlackBoxPlan()


def _copy(t: Tensor) -> Tensor:
    # numpy() refuses tensors that need gradients, fake ones, and those of functorch.
    if t.dtype == torch.float8_e4m3fn:
        return _copy(t.view(torch.uint8)).view(t.dtype)
    return torch.from_numpy(t.numpy().copy())


def _boxed(call: attnhub.Call) -> attnhub.Call:
    leaves, structure = torch.utils._pytree.tree_flatten((call.mask, call.varlen))
    mask, varlen = torch.utils._pytree.tree_unflatten([_copy(t) if isinstance(t, Tensor) else t for t in leaves], structure)
    descale = None if call.descale is None else attnhub.Descale(*(None if t is None else _copy(t) for t in call.descale))
    sinks, rng, table = (None if t is None else _copy(t) for t in (call.sinks, call.rng, call.block_table))
    q, k, v = (_copy(t) for t in (call.q, call.k, call.v))
    return attnhub.Call(q, k, v, mask, call.softmax_scale, call.softcap, sinks, call.dropout_p, rng, varlen, table, call.need_lse, descale)


@pytest.fixture
def blackbox() -> Iterator[str]:
    """The name of a backend whose kernels are opaque to torch."""
    registry.register(BlackBox())
    yield "blackbox"
    registry.unregister("blackbox")
    runtime.clear()
