"""Strides, sizes, offsets (cases 9 to 16 and 33)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Bias, Causal


def _same_with_grads(on: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, factor: float = 1.0) -> None:
    """Output and gradients of the given views equal those of dense copies in fp64."""
    want = on.exact(q, k, v, mask)
    on.close(on.attention(q, k, v, mask), want, factor)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    wide = [t.detach().double().contiguous().requires_grad_() for t in (q, k, v)]
    grad = torch.randn(want.shape, device=on.device)
    got = torch.autograd.grad(on.attention(*leaves, mask), leaves, grad.to(on.dtype))
    right = torch.autograd.grad(attnhub.attention(*wide, mask, backend="reference"), wide, grad.to(on.dtype).double())
    for a, b in zip(got, right):
        on.close(a, b, 4 * factor)


@pytest.mark.gpu
@pytest.mark.needs()
def test_09_offsets_beyond_two_to_the_31(on: Any) -> None:
    """The last sequence of K and V that hold more than 2^31 elements each."""
    if on.device != "cuda":
        pytest.skip("the tensors of this case are meant for a GPU's memory")
    free, needed = torch.cuda.mem_get_info()[0] / 1e9, 40 if on.name == "reference" else 15  # in fp32 too
    if free < needed:
        pytest.skip(f"needs {needed} GB of GPU memory, {free:.0f} GB are free")
    dtype = torch.float16
    batch, heads, length, dim = 17, 32, 32768, 128
    k = torch.zeros(batch, heads, length, dim, dtype=dtype, device="cuda")
    assert k.numel() > 2**31
    v = torch.zeros_like(k)
    for t in (k, v):
        t[-1].normal_()
    q = torch.randn(batch, heads, 1, dim, dtype=dtype, device="cuda")
    try:
        out = on.attention(q, k, v)
    except attnhub.NoBackendError as error:
        assert "too_large" in str(error)
        return
    alone = on.attention(q[-1:], k[-1:].clone(), v[-1:].clone())
    torch.testing.assert_close(out[-1:], alone, atol=2e-3, rtol=2e-3)
    assert not out[:-1].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "heads"), [(70000, 1), (1, 70000), (300, 300)])
@pytest.mark.needs()
def test_10_grids_beyond_65535(on: Any, batch: int, heads: int) -> None:
    q = on.randn(batch, heads, 4, 16)
    try:
        out = on.attention(q, q, q, Causal())
    except attnhub.NoBackendError as error:
        assert "too_large" in str(error)
        return
    on.close(out[-1:, -1:], on.exact(*(q[-1:, -1:],) * 3, Causal()))
    on.close(out[:1, :1], on.exact(*(q[:1, :1],) * 3, Causal()))
    assert bool(out.isfinite().all())


@pytest.mark.needs("causal_bottom_right")
def test_10_many_sequences_and_heads(on: Any) -> None:
    """The CPU's share of the same case: more than 2^16 (batch, head) pairs."""
    batch = 40 if on.slow else 33000
    q = on.randn(batch, 2, 2, 4)
    out = on.attention(q, q, q, Causal())
    on.close(out[-3:], on.exact(*(q[-3:],) * 3, Causal()))


LAYOUTS = {
    "bshd": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "sbhd": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "every-second-row": lambda t: torch.stack((t, torch.full_like(t, float("nan"))), 3).flatten(2, 3)[:, :, ::2],
    "head-slice": lambda t: torch.cat((torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))), 1)[:, t.shape[1] : 2 * t.shape[1]],
    "odd-offset": lambda t: torch.cat((t.new_full((1,), float("nan")), t.flatten()))[1:].view(t.shape),
    "row-pad-1": lambda t: torch.nn.functional.pad(t, (0, 1), value=float("nan"))[..., :-1],
    "strided-last": lambda t: torch.stack((t, torch.full_like(t, float("nan"))), -1).flatten(-2)[..., ::2],
    "dhs": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "reversed-batch": lambda t: t.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.needs("causal_bottom_right", "gqa")
def test_11_non_contiguous_inputs(on: Any, layout: str) -> None:
    if layout in ("odd-offset", "row-pad-1") and on.name == "cuda":
        decision = attnhub.explain(*(LAYOUTS[layout](on.randn(2, 2, 4, 16)) for _ in range(3)), backend="cuda")
        assert decision.chosen == "cuda" or "alignment" in str(decision)
        return
    change = LAYOUTS[layout]
    q, k, v = on.randn(2, 4, 19, 16), on.randn(2, 2, 33, 16), on.randn(2, 2, 33, 16)
    _same_with_grads(on, change(q), change(k), change(v), Causal())
    _same_with_grads(on, q, change(k), v, Causal())
    _same_with_grads(on, change(q)[:, :, :1], change(k), change(v), Causal())


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (2,), (0, 1, 2)], ids=str)
@pytest.mark.needs("causal_bottom_right")
def test_12_expanded_keys_and_values(on: Any, dims: tuple[int, ...]) -> None:
    shape = [1 if d in dims else n for d, n in enumerate((3, 4, 21, 16))]
    k, v = (on.randn(*shape).expand(3, 4, 21, 16) for _ in range(2))
    q = on.randn(3, 4, 9, 16)
    _same_with_grads(on, q, k, v, Causal())
    leaf = on.randn(*shape).requires_grad_()
    on.attention(q, leaf.expand(3, 4, 21, 16), v, Causal()).float().square().sum().backward()
    wide = leaf.detach().double().requires_grad_()
    attnhub.attention(q.double(), wide.expand(3, 4, 21, 16), v.double(), Causal(), backend="reference").square().sum().backward()
    assert leaf.grad is not None and wide.grad is not None and leaf.grad.shape == leaf.shape
    on.close(leaf.grad, wide.grad, 40)


@pytest.mark.parametrize("stride", [0, 7, 2**40])
@pytest.mark.parametrize("shape", [(1, 2, 6, 16), (2, 1, 6, 16), (2, 2, 1, 16), (2, 2, 6, 1), (1, 1, 1, 16), (1, 1, 1, 1)], ids=str)
@pytest.mark.needs("causal_bottom_right")
def test_13_odd_strides_of_dimensions_of_size_one(on: Any, shape: tuple[int, ...], stride: int) -> None:
    """A stride that is never taken must not matter: not to checks, not to alignment, not to 32-bit arithmetic."""
    dense = on.randn(*shape)
    strides = [stride if size == 1 else step for size, step in zip(shape, dense.stride())]
    odd = dense.as_strided(shape, strides)
    on.close(on.attention(odd, odd, odd, Causal()), on.exact(dense, dense, dense, Causal()))
    leaf = odd.detach().requires_grad_()
    (grad,) = torch.autograd.grad(on.attention(leaf, odd, odd, Causal()).float().sum(), leaf)
    assert grad.shape == leaf.shape and bool(grad.isfinite().all())


@pytest.mark.parametrize("how", ["expanded", "transposed", "sliced", "strided-last", "zero-stride-last"])
@pytest.mark.needs("causal_bottom_right")
def test_14_gradients_of_any_strides(on: Any, how: str) -> None:
    q, k, v = (t.requires_grad_() for t in (on.randn(2, 3, 9, 16), on.randn(2, 3, 11, 16), on.randn(2, 3, 11, 16)))
    grad = {
        "expanded": lambda: on.randn(1, 1, 1, 1).expand(2, 3, 9, 16),
        "transposed": lambda: on.randn(2, 9, 3, 16).transpose(1, 2),
        "sliced": lambda: on.randn(2, 3, 9, 40)[..., 3:19],
        "strided-last": lambda: on.randn(2, 3, 9, 32)[..., ::2],
        "zero-stride-last": lambda: on.randn(2, 3, 9, 1).expand(2, 3, 9, 16),
    }[how]()
    got = torch.autograd.grad(on.attention(q, k, v, Causal()), (q, k, v), grad)
    dense = torch.autograd.grad(on.attention(q, k, v, Causal()), (q, k, v), grad.contiguous())
    for a, b in zip(got, dense):
        on.close(a, b)


@pytest.mark.parametrize("sk", [1, 7, 33, 37])
@pytest.mark.parametrize("shape", ["full", "row", "column", "head"])
@pytest.mark.needs("bias")
def test_15_biases_that_are_not_aligned(on: Any, shape: str, sk: int) -> None:
    sizes = {"full": (2, 4, 9, sk), "row": (1, 1, 1, sk), "column": (2, 1, 9, 1), "head": (1, 4, 1, 1)}[shape]
    q, k, v = on.randn(2, 4, 9, 16), on.randn(2, 4, sk, 16), on.randn(2, 4, sk, 16)
    for bias in (on.randn(*sizes), on.randn(*sizes[:3], sizes[3] + 3)[..., 1 : 1 + sizes[3]], on.randn(*sizes[:2], sizes[3], sizes[2]).transpose(2, 3)):
        on.close(on.attention(q, k, v, Bias(bias)), on.exact(q, k, v, Bias(bias)))
        leaf = bias.detach().requires_grad_()
        out = on.attention(q, k, v, Bias(leaf))
        (grad,) = torch.autograd.grad(out.float().sum(), leaf)
        assert grad.shape == bias.shape and bool(grad.isfinite().all())


@pytest.mark.needs("bias")
def test_16_transposed_bias_under_compile(on: Any) -> None:
    torch._dynamo.reset()
    q, k, v = on.randn(2, 2, 9, 16), on.randn(2, 2, 12, 16), on.randn(2, 2, 12, 16)
    stored = on.randn(2, 2, 12, 9)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(q: Tensor, k: Tensor, v: Tensor, stored: Tensor) -> Any:
        return attnhub.attention(q, k, v, Bias(stored.transpose(-1, -2)), backend=on.name)

    leaf = stored.clone().requires_grad_()
    out = call(q, k, v, leaf)
    on.close(out.detach(), on.exact(q, k, v, Bias(stored.transpose(-1, -2))))
    (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
    wide = stored.double().requires_grad_()
    want = attnhub.attention(q.double(), k.double(), v.double(), Bias(wide.transpose(-1, -2)), backend="reference")
    on.close(grad, torch.autograd.grad(want.square().sum(), wide)[0], 10)


@pytest.mark.parametrize("dims", [(1, 1), (2, 2), (3, 5), (7, 7), (16, 16), (33, 33), (48, 64), (80, 80), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.needs("causal_bottom_right", "dv_differs")
def test_33_head_dims(on: Any, dims: tuple[int, int]) -> None:
    q, k, v = on.randn(1, 2, 18, dims[0]), on.randn(1, 2, 35, dims[0]), on.randn(1, 2, 35, dims[1])
    try:
        out = on.attention(q, k, v, Causal())
    except attnhub.NoBackendError as error:
        assert "head_dim" in str(error) or "alignment" in str(error)
        return
    on.close(out, on.exact(q, k, v, Causal()))


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.needs("causal_bottom_right")
def test_33_lengths(on: Any, length: int) -> None:
    if on.slow and length > 65:
        length = 65
    k, v = on.randn(1, 1, length, 16), on.randn(1, 1, length, 16)
    for q in (on.randn(1, 1, length, 16), on.randn(1, 1, 1, 16)):
        on.close(on.attention(q, k, v, Causal()), on.exact(q, k, v, Causal()))
        on.close(on.attention(q, k, v), on.exact(q, k, v))


@pytest.mark.long
@pytest.mark.parametrize("length", [4095, 4096, 4097])
@pytest.mark.needs("causal_bottom_right")
def test_33_long_lengths(on: Any, length: int) -> None:
    if on.slow:
        pytest.skip("an interpreter takes minutes for this length")
    q, k, v = (on.randn(1, 1, length, 16) for _ in range(3))
    on.close(on.attention(q, k, v, Causal()), on.exact(q, k, v, Causal()))
