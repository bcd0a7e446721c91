"""Tensors whose pointers lead to nothing: zeros that torch does not store are made real, freed storages are an error, and no kernel sees either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Backend, Call, KVCache, Plan, Problem
from attnhub.backends.reference import EVERYTHING, FLOATS, ReferencePlan
from attnhub.capability import Capability, DeviceRange

BACKENDS = ("cpu", "sdpa", "reference", "looks")
SHAPE = (2, 3, 5, 16)


class Looks(Backend):
    """The reference, for callers whose tensors all have memory."""

    name = "looks"
    capability = Capability((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING, head_dims=(1, 1 << 20, 1), backward_features=EVERYTHING)
    automatic = False

    def prepare(self, problem: Problem) -> Plan:
        plan = ReferencePlan()
        forward, backward = plan.forward, plan.backward
        plan.differentiable = False

        def real(*tensors: Any) -> None:
            assert all(t is None or (t.untyped_storage().data_ptr() and not t._is_zerotensor()) for t in tensors)

        def checked_forward(call: Call) -> Any:
            real(call.q, call.k, call.v, call.sinks, *call.mask.tensors(), *(() if call.varlen is None else (call.varlen.cu_seqlens_q, call.varlen.cu_seqlens_k)))
            return forward(call)

        def checked_backward(call: Call, grad_out: Tensor, grad_lse: Any, *rest: Any) -> Any:
            real(call.q, call.k, call.v, grad_out, grad_lse)
            return backward(call, grad_out, grad_lse, *rest)

        plan.forward, plan.backward = checked_forward, checked_backward  # type: ignore[method-assign]

        def repeat(call: Call) -> Any:
            def again(q: Tensor, k: Tensor, v: Tensor, lengths: Optional[Tensor] = None) -> Any:
                mask = call.mask if lengths is None else attnhub.SeqLens(lengths)
                return checked_forward(Call(q, k, v, mask, call.softmax_scale, need_lse=call.need_lse))

            return again

        plan.repeat = repeat  # type: ignore[method-assign]
        return plan


@pytest.fixture(autouse=True)
def looks(register: Callable[[Backend], Backend]) -> None:
    register(Looks())


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch._efficientzerotensor(shape, dtype=dtype)


def _freed(t: Tensor, offset: int = 0) -> Tensor:
    whole = torch.zeros(t.numel() + offset, dtype=t.dtype)
    view = whole[offset:].view(t.shape)
    whole.untyped_storage().resize_(0)
    return view


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", (0, 1, 2))
@pytest.mark.parametrize("grad", (False, True))
def test_zeros_without_memory_are_zeros(backend: str, which: int, grad: bool) -> None:
    usual = [torch.randn(SHAPE) for _ in range(3)]
    if grad:
        usual[which - 1].requires_grad_()
    there, nowhere = list(usual), list(usual)
    there[which], nowhere[which] = torch.zeros(SHAPE), _zeros(*SHAPE)
    want = attnhub.attention(*there, backend=backend)
    # After calls that are alike as before them.
    for _ in range(3):
        attnhub.attention(*there, backend=backend)
        got = attnhub.attention(*nowhere, backend=backend)
        torch.testing.assert_close(got, want)
    if grad:
        for t in (got, want):
            t.sum().backward()
        assert usual[which - 1].grad is not None and usual[which - 1].grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ("sinks", "bias", "bool", "lengths", "varlen"))
def test_zeros_without_memory_beside_q_k_and_v(backend: str, part: str) -> None:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))

    def call(zeros: Callable[..., Tensor]) -> Any:
        if part == "varlen":
            # Three sequences, of which all are empty.
            varlen = attnhub.Varlen(zeros(4, dtype=torch.int32), zeros(4, dtype=torch.int32), 5, 5)
            return attnhub.attention(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), varlen=varlen, backend=backend)
        if part == "sinks":
            return attnhub.attention(q, k, v, sinks=zeros(3), backend=backend)
        mask = {
            "bias": lambda: attnhub.Bias(zeros(1, 1, 5, 5)),
            "bool": lambda: attnhub.BoolMask(zeros(1, 1, 5, 5, dtype=torch.bool)),
            "lengths": lambda: attnhub.SeqLens(zeros(2, dtype=torch.int32)),
        }[part]()
        return attnhub.attention(q, k, v, mask, backend=backend)

    try:
        want = call(torch.zeros)
    except attnhub.NoBackendError:
        pytest.skip(f"{backend} declares no {part}")
    for _ in range(2):
        torch.testing.assert_close(call(_zeros), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", (0, 1024))
@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_a_freed_storage_is_an_error_that_names_the_argument(backend: str, offset: int, name: str) -> None:
    tensors = {n: torch.randn(SHAPE) for n in "qkv"}
    gone = {**tensors, name: _freed(tensors[name], offset)}
    for _ in range(3):
        with pytest.raises(ValueError, match=rf"{name} of shape .* has no memory"):
            attnhub.attention(**gone, backend=backend)
        attnhub.attention(**tensors, backend=backend)


def test_a_storage_freed_after_calls_that_it_served() -> None:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    for _ in range(3):
        attnhub.attention(q, k, v, backend="looks")
    k.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="k of shape"):
        attnhub.attention(q, k, v, backend="looks")


def test_a_storage_freed_before_the_backward_pass() -> None:
    q, k, v = (torch.randn(SHAPE, requires_grad=n == 0) for n in range(3))
    out = attnhub.attention(q, k, v, backend="looks")
    assert isinstance(out, Tensor)
    k.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="k of shape"):
        out.sum().backward()


def test_a_freed_mask_or_cache_is_an_error() -> None:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    for mask in (attnhub.Bias(_freed(torch.zeros(1, 1, 5, 5), 64)), attnhub.BoolMask(_freed(torch.zeros(1, 1, 5, 5, dtype=torch.bool)))):
        with pytest.raises(ValueError, match=r"mask: a tensor of shape .* has no memory"):
            attnhub.attention(q, k, v, mask, backend="cpu")
    cache = KVCache.empty(2, 3, 16, 16)
    cache.v_cache.untyped_storage().resize_(0)
    for new in ((k, v), (None, None)):
        with pytest.raises(ValueError, match="has no memory"):
            attnhub.attention(q, *new, kv_cache=cache, backend="cpu")
    with pytest.raises(ValueError, match=r"v_cache of shape .* has no memory"):
        attnhub.append_kv(cache, k, v)


@pytest.mark.parametrize("name", ("k_cache", "cache_seqlens"))
def test_a_cache_freed_after_it_was_read(name: str) -> None:
    q, cache = torch.randn(SHAPE), KVCache.empty(2, 3, 16, 16)
    cache.cache_seqlens.fill_(9)
    for _ in range(3):
        attnhub.attention(q, kv_cache=cache, backend="looks")
    getattr(cache, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        attnhub.attention(q, kv_cache=cache, backend="looks")


def test_new_tokens_without_memory() -> None:
    q = torch.randn(SHAPE)
    there, nowhere = (KVCache.empty(2, 3, 16, 16) for _ in range(2))
    for cache in (there, nowhere):
        cache.k_cache.fill_(7)
    want = attnhub.attention(q, torch.zeros(SHAPE), torch.ones(SHAPE), kv_cache=there, backend="cpu")
    got = attnhub.attention(q, _zeros(*SHAPE), torch.ones(SHAPE), kv_cache=nowhere, backend="cpu")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(nowhere.k_cache, there.k_cache)
    with pytest.raises(ValueError, match=r"k of shape .* has no memory"):
        attnhub.append_kv(there, _freed(torch.zeros(SHAPE)), torch.ones(SHAPE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_without_memory(backend: str) -> None:
    q, k, v = (torch.randn(SHAPE, requires_grad=True) for _ in range(3))
    for n in range(3):
        out, lse = attnhub.attention(q, k, v, return_lse=True, backend=backend)
        for grad in torch.autograd.grad((out, lse), (q, k, v), (_zeros(*SHAPE), _zeros(*SHAPE[:3]))):
            assert not grad.any(), n


def test_a_functional_tensor() -> None:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    want = attnhub.attention(q, k, v, backend="cpu")
    got = attnhub.attention(torch._to_functional_tensor(q), k, v, backend="cpu")
    torch.testing.assert_close(torch._from_functional_tensor(got), want)
