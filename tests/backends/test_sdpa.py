"""torch's own attention as a backend: conformance, padding that is never read, and every path through which training goes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnhub
from attnhub import runtime, testing
from attnhub.backend import Call
from attnhub.backends.sdpa import launcher
from attnhub.layouts import in_order, out_strides
from attnhub.mask import FULL
from attnhub.problem import DeviceInfo


@pytest.mark.parametrize("check", testing.checks("sdpa"), ids=str)
def test_conformance(check: testing.Check) -> None:
    check.run()


def _both(q: Tensor, k: Tensor, v: Tensor, mask: Optional[attnhub.Mask], **kwargs: Any) -> tuple[Tensor, ...]:
    """Outputs and gradients of sdpa, and of the reference, one after the other."""
    found: list[Tensor] = []
    for backend in ("sdpa", "reference"):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attnhub.attention(*leaves, mask, backend=backend, **kwargs)
        assert isinstance(out, Tensor)
        found += [out.detach(), *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))]
    return tuple(found)


# -- padding --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("extra", ["", "causal", "softcap", "bias", "gqa", "decode", "dv"])
def test_padding_is_never_read(extra: str, grad: bool, poison: float) -> None:
    """NaN and Inf behind seqused_k and before leftpad reach neither results nor gradients."""
    heads = 2 if extra == "gqa" else 4
    sq = 1 if extra == "decode" else 6
    q, k, v = torch.randn(2, 4, sq, 16), torch.randn(2, heads, 9, 16), torch.randn(2, heads, 9, 8 if extra == "dv" else 16)
    mask = attnhub.SeqLens(torch.tensor([6, 9])) & attnhub.LeftPad(torch.tensor([0, 4]))
    if extra == "causal":
        mask = mask & attnhub.Causal()
    if extra == "bias":
        mask = mask & attnhub.Bias(torch.randn(1, 1, sq, 9))
    kwargs: dict[str, Any] = {"softcap": 2.0} if extra == "softcap" else {}
    for t in (k, v):
        t[0, :, 6:] = poison
        t[1, :, :4] = poison
    if grad:
        out, dq, dk, dv, want, want_dq, want_dk, want_dv = _both(q, k, v, mask, **kwargs)
        assert not dk[0, :, 6:].any() and not dv[1, :, :4].any()
        for got, right in ((dq, want_dq), (dk, want_dk), (dv, want_dv)):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)
    else:
        out, want = (attnhub.attention(q, k, v, mask, backend=name, **kwargs) for name in ("sdpa", "reference"))  # type: ignore[misc]
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


def test_page_tails_and_unused_pages_are_never_read() -> None:
    pages = torch.full((6, 2, 4, 8), math.nan)
    k, v = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    k_cache, v_cache = pages.clone(), pages.clone()
    for t in range(7):
        k_cache[(5, 2)[t // 4], :, t % 4], v_cache[(5, 2)[t // 4], :, t % 4] = k[0, :, t], v[0, :, t]
    cache = attnhub.KVCache(k_cache, v_cache, torch.tensor([7], dtype=torch.int32), torch.tensor([[5, 2, 77]], dtype=torch.int32))  # the last entry is no page at all
    q = torch.randn(1, 4, 2, 8)
    got = attnhub.attention(q, kv_cache=cache, mask=attnhub.Causal(), backend="sdpa")
    torch.testing.assert_close(got, attnhub.attention(q, k, v, attnhub.Causal(), backend="reference"), atol=1e-5, rtol=1e-5)


def test_gaps_behind_packed_sequences_are_never_read() -> None:
    q, k, v = torch.randn(9, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    k[7:] = v[7:] = math.nan
    out = attnhub.attention(q, k, v, varlen=attnhub.Varlen(torch.tensor([0, 3, 7]), torch.tensor([0, 3, 7]), 4, 4), backend="sdpa")
    assert bool(out.isfinite().all()) and not out[7:].any()


# -- training -------------------------------------------------------------------------------------------------------------------------------


_DENSE = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.5
_DENSE[2] = False
TRAINING: dict[str, tuple[dict[str, Any], Optional[attnhub.Mask], dict[str, Any]]] = {
    "plain": ({}, None, {}),
    "causal": ({}, attnhub.Causal(), {}),
    "causal-longer-k": ({"sk": 14}, attnhub.Causal(), {}),
    "causal-longer-q": ({"sq": 14}, attnhub.Causal(), {}),
    "top-left-longer-k": ({"sk": 14}, attnhub.Causal("top_left"), {}),
    "top-left-longer-q": ({"sq": 14}, attnhub.Causal("top_left"), {}),
    "gqa": ({"kv": 2}, attnhub.Causal(), {}),
    "mqa-decode": ({"kv": 1, "sq": 1}, attnhub.Causal(), {}),
    "gqa-decode-top-left": ({"kv": 2, "sq": 1}, attnhub.Causal("top_left"), {}),
    "narrow-v": ({"dv": 8}, attnhub.Causal(), {}),
    "wide-v-gqa": ({"dv": 24, "kv": 2}, None, {}),
    "bool-mask-with-empty-row": ({}, attnhub.BoolMask(_DENSE), {}),
    "bool-mask-gqa": ({"kv": 2}, attnhub.BoolMask(_DENSE) & attnhub.Causal(), {}),
    "window": ({}, attnhub.Causal() & attnhub.Window(2), {}),
    "seqlens-zero": ({}, attnhub.SeqLens(torch.tensor([0, 5])), {}),
    "alibi": ({}, attnhub.ALiBi(torch.rand(4)), {}),
    "softcap": ({}, attnhub.Causal(), {"softcap": 1.5}),
    "sinks": ({}, attnhub.Causal(), {"sinks": torch.randn(4)}),
    "scale": ({}, attnhub.Causal(), {"softmax_scale": 0.9}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", TRAINING)
def test_training(name: str, dtype: torch.dtype) -> None:
    sizes, mask, kwargs = TRAINING[name]
    sq, sk, kv, dv = sizes.get("sq", 9), sizes.get("sk", 9), sizes.get("kv", 4), sizes.get("dv", 16)
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((2, 4, sq, 16), (2, kv, sk, 16), (2, kv, sk, dv)))
    *got, want, want_dq, want_dk, want_dv = _both(q, k, v, mask, **kwargs)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 4e-2}[dtype]
    for a, b in zip(got, (want, want_dq, want_dk, want_dv)):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["plain", "causal", "gqa", "causal-longer-k", "bool-mask-with-empty-row", "softcap"])
@pytest.mark.parametrize("with_lse_grad", [False, True])
def test_training_with_lse(name: str, with_lse_grad: bool) -> None:
    """lse takes another way through torch, with and without a gradient of its own."""
    sizes, mask, kwargs = TRAINING[name]
    shapes = ((2, 4, 9, 16), (2, sizes.get("kv", 4), sizes.get("sk", 9), 16), (2, sizes.get("kv", 4), sizes.get("sk", 9), 16))
    data = [torch.randn(shape) for shape in shapes]
    found = []
    for backend in ("sdpa", "reference"):
        leaves = [t.clone().requires_grad_() for t in data]
        out, lse = attnhub.attention(*leaves, mask, return_lse=True, backend=backend, **kwargs)
        loss = out.square().sum() + (lse.clamp_min(-50).square().sum() if with_lse_grad else 0)
        found.append([out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("needs", ["q", "k", "v", "kv"])
@pytest.mark.parametrize("mask", [None, attnhub.Causal()], ids=["full", "causal"])
def test_gradients_of_some_inputs_only(mask: Optional[attnhub.Mask], needs: str) -> None:
    inputs = {name: torch.randn(1, 2, 6, 8) for name in "qkv"}
    grads = []
    for backend in ("sdpa", "reference"):
        leaves = {name: t.clone().requires_grad_(name in needs) for name, t in inputs.items()}
        attnhub.attention(**leaves, mask=mask, backend=backend).square().sum().backward()  # type: ignore[union-attr, arg-type]
        grads.append([leaves[name].grad for name in "qkv"])
    for name, a, b in zip("qkv", *grads):
        assert (a is not None) == (name in needs)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_it_runs_the_backward_of_other_forwards(register: Any) -> None:
    """From another backend's (out, lse), by torch's flash backward where it applies and by tiled maths elsewhere."""
    from attnhub.backend import Backend, Plan
    from attnhub.backends.reference import EVERYTHING, FLOATS, ReferencePlan
    from attnhub.capability import Capability, DeviceRange
    from attnhub.problem import Problem

    class ForwardOnly(Backend):
        name = "forward_only"
        capability = Capability((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING)

        def prepare(self, problem: Problem) -> Plan:
            return ReferencePlan()

    register(ForwardOnly())
    for name, (sizes, mask, kwargs) in TRAINING.items():
        sq, sk, kv, dv = sizes.get("sq", 9), sizes.get("sk", 9), sizes.get("kv", 4), sizes.get("dv", 16)
        data = [torch.randn(2, 4, sq, 16), torch.randn(2, kv, sk, 16), torch.randn(2, kv, sk, dv)]
        grads = []
        for backend in ("forward_only", "reference"):
            leaves = [t.clone().requires_grad_() for t in data]
            out = attnhub.attention(*leaves, mask, backend=backend, **kwargs)
            decision = attnhub.last_decision()
            assert decision is not None and decision.chosen == backend and backend in (decision.backward, "forward_only")
            grads.append(torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape)))  # type: ignore[union-attr, arg-type]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


# -- memory and blocks ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["window", "alibi", "softcap", "sinks", "seqlens-zero", "bool-mask"])
def test_blocks_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block is a part of one, and no block sees all rows."""
    from attnhub.backends.sdpa import blocks, launcher

    _, mask, kwargs = TRAINING.get(name, ({}, attnhub.BoolMask(torch.rand(2, 1, 40, 40) < 0.5), {}))
    q, k = torch.randn(2, 4, 40, 16), torch.randn(2, 4, 40, 16)
    whole = _both(q, k, k, mask, **kwargs)
    for module in (blocks, launcher):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 40 * 2 * 4 * 3)
    for a, b in zip(_both(q, k, k, mask, **kwargs), whole):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_result_is_torchs_where_torch_says_the_same() -> None:
    q = torch.randn(2, 3, 33, 16)
    assert torch.equal(attnhub.attention(q, q, q, backend="sdpa"), F.scaled_dot_product_attention(q, q, q))
    assert torch.equal(attnhub.attention(q, q, q, attnhub.Causal(), backend="sdpa"), F.scaled_dot_product_attention(q, q, q, is_causal=True))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("lengths", [(6, 6), (1, 6), (4, 6)], ids=str)
@pytest.mark.parametrize("align", ["", "bottom_right", "top_left"])
@pytest.mark.parametrize(("kv_heads", "v_head_dim"), [(4, 16), (2, 16), (4, 8)])
def test_a_repeated_call_is_the_call(kv_heads: int, v_head_dim: int, align: Any, lengths: tuple[int, int], layout: str) -> None:
    shapes = (4, lengths[0], 16), (kv_heads, lengths[1], 16), (kv_heads, lengths[1], v_head_dim)
    q, k, v = (torch.randn(2, *shape) for shape in shapes)
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    mask = attnhub.Causal(align) if align else None
    first = attnhub.attention(q, k, v, mask, backend="sdpa")
    call = Call(q, k, v, mask or FULL, 0.25)
    again = runtime.prepared(call, "sdpa", False).plan.repeat(call)
    # What is more than one call of torch's function has no shorter way.
    short = v_head_dim == 16 and not (kv_heads == 2 and lengths[0] == 1) and not (align == "bottom_right" and lengths == (4, 6))
    assert (again is not None) == short
    for out in (*(attnhub.attention(q, k, v, mask, backend="sdpa") for _ in range(3)), *([again(q, k, v)[0]] if again else ())):  # type: ignore[index]
        assert isinstance(out, Tensor) and torch.equal(out, first) and out.stride() == out_strides(q, v_head_dim)


def _token_major(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout_p: float = 0.0, causal: bool = False, **kwargs: Any) -> Tensor:
    """As torch's flash kernels for GPUs write: the heads of a token side by side."""
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, **kwargs)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [FULL, attnhub.Causal()], ids=["full", "causal"])
def test_an_output_in_torchs_order_is_copied_once(mask: attnhub.Mask, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on each head is a sequence of its own, and what torch writes is in q's order."""
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=grad) for _ in range(3))
    copies, shapes = [], []
    monkeypatch.setattr(launcher, "in_order", lambda out, like: copies.append(1) or in_order(out, like))  # type: ignore[func-returns-value]
    monkeypatch.setattr(launcher, "torch_sdpa", lambda q, *args, **kwargs: shapes.append(tuple(q.shape)) or _token_major(q, *args, **kwargs))  # type: ignore[func-returns-value]
    found = runtime.explain(Call(q, k, v, mask, 0.3), "sdpa", grad, 0).problem
    plan = launcher.plan(dataclasses.replace(found, device=DeviceInfo("cuda", "nvidia", (8, 0), "A100")))
    call = Call(q, k, v, mask, 0.3)
    outs = [plan.forward(call)[0] for _ in range(2)]
    repeat = plan.repeat(call)
    assert repeat is not None
    outs.append(repeat(q, k, v)[0])
    assert copies == [1] and shapes == [(2, 3, 20, 8), (6, 1, 20, 8), (6, 1, 20, 8)]
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=mask is not FULL, scale=0.3)
    for out in outs:
        assert out.stride() == out_strides(q, 8) and torch.equal(out, exact)
        if grad:
            torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True), torch.autograd.grad(exact.sum(), (q, k, v), retain_graph=True))
    # Rows of other lengths apart: heads are no batch there.
    apart = torch.randn(2, 20, 3, 8).transpose(1, 2)
    out = plan.forward(Call(apart, k, v, mask, 0.3))[0]
    assert shapes[-1] == (2, 3, 20, 8) and out.stride() == apart.stride()


def test_training_calls_are_repeated_by_torchs_function_alone() -> None:
    runtime.seen.clear()
    runtime.recent.clear()
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    for _ in range(3):
        out = attnhub.attention(q, k, v, backend="sdpa")
    (seen,) = runtime.seen.values()
    calls = []
    repeat, seen.repeat = seen.repeat, lambda *args: calls.append(args) or repeat(*args)  # type: ignore[func-returns-value,misc]
    again = attnhub.attention(q, k, v, backend="sdpa")
    assert len(calls) == 1 and torch.equal(again, out)
    grads = torch.autograd.grad(again.sum(), (q, k, v))  # type: ignore[union-attr]
    torch.testing.assert_close(grads, torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v)))
    # With lse the gradient is not torch's.
    out, lse = attnhub.attention(q, k, v, backend="sdpa", return_lse=True)
    assert lse.requires_grad and len(calls) == 1
