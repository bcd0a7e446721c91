"""The oracle: conformance, finite differences, torch's own attention, and a loop written row by row."""

from __future__ import annotations

import math
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnhub
from attnhub import testing

F64 = torch.float64


@pytest.mark.parametrize("check", testing.checks("reference"), ids=str)
def test_conformance(check: testing.Check) -> None:
    check.run()


# -- row by row -------------------------------------------------------------------------------------------------------------------------


def _row_loop(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Optional[Tensor], scale: float, softcap: float, sinks: Optional[Tensor]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One query at a time in Python floats; allowed and bias are [B, Hq, Sq, Sk]."""
    batch, heads, sq, _ = q.shape
    out, lse = torch.zeros(batch, heads, sq, v.shape[3], dtype=F64), torch.full((batch, heads, sq), -math.inf, dtype=F64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for i in range(sq):
                keys = [j for j in range(k.shape[2]) if allowed[b, h, i, j]]
                scores = []
                for j in keys:
                    s = scale * sum(float(x) * float(y) for x, y in zip(q[b, h, i], k[b, g, j]))
                    if softcap:
                        s = softcap * math.tanh(s / softcap)
                    scores.append(s + (0.0 if bias is None else float(bias[b, h, i, j])))
                total = sum(math.exp(s) for s in scores) + (0.0 if sinks is None else math.exp(float(sinks[h])))
                if total > 0:
                    lse[b, h, i] = math.log(total)
                for j, s in zip(keys, scores):
                    out[b, h, i] += math.exp(s) / total * v[b, g, j]
    return out, lse


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize(("sq", "sk"), [(4, 7), (7, 4), (1, 5)])
def test_against_a_loop_over_rows(sq: int, sk: int, align: Any, with_sinks: bool, softcap: float) -> None:
    q, k, v = torch.randn(2, 4, sq, 3, dtype=F64), torch.randn(2, 2, sk, 3, dtype=F64), torch.randn(2, 2, sk, 5, dtype=F64)
    sinks = torch.randn(4, dtype=F64) if with_sinks else None
    bias, slopes = torch.randn(1, 4, sq, sk, dtype=F64), torch.rand(4)
    mask = attnhub.Causal(align) & attnhub.Window(3, -1, align) & attnhub.SeqLens(torch.tensor([sk, sk - 1])) & attnhub.Bias(bias) & attnhub.ALiBi(slopes, align)
    allowed = torch.zeros(2, 4, sq, sk, dtype=torch.bool)
    added = torch.zeros(2, 4, sq, sk, dtype=F64)
    for b, length in enumerate((sk, sk - 1)):
        for i in range(sq):
            p = i + (length - sq if align == "bottom_right" else 0)
            for j in range(length):
                allowed[b, :, i, j] = p - 3 <= j <= p
                added[b, :, i, j] = bias[0, :, i, j] - slopes.double() * abs(p - j)
    out, lse = attnhub.attention(q, k, v, mask, softmax_scale=0.7, softcap=softcap, sinks=sinks, return_lse=True, backend="reference")
    want_out, want_lse = _row_loop(q, k, v, allowed, added, 0.7, softcap, sinks)
    torch.testing.assert_close(out, want_out, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=1e-10)


# -- torch's attention --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "causal", "bool", "bias"])
def test_against_torch(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 17, 16, dtype=F64).to(dtype).requires_grad_() for _ in range(3))
    dense = torch.rand(17, 17) < 0.7
    dense.fill_diagonal_(True)
    bias = torch.randn(3, 17, 17).to(dtype)
    mask, kwargs = {
        "full": (None, {}), "causal": (attnhub.Causal(), {"is_causal": True}), "bool": (attnhub.BoolMask(dense), {"attn_mask": dense}),
        "bias": (attnhub.Bias(bias), {"attn_mask": bias}),
    }[kind]  # fmt: skip
    got = attnhub.attention(q, k, v, mask, backend="reference")
    want = F.scaled_dot_product_attention(q, k, v, **kwargs)  # type: ignore[arg-type]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    grad = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad)):
        torch.testing.assert_close(a, b, atol=4 * tolerance, rtol=4 * tolerance)


# -- finite differences ---------------------------------------------------------------------------------------------------------------------


def _gradcheck(mask: Optional[attnhub.Mask] = None, *, sq: int = 4, sk: int = 5, bias: Optional[Tensor] = None, sinks: bool = False, packed: bool = False, **kwargs: Any) -> None:
    """Analytic against numerical gradients of (out, lse) with respect to q, k, v, and bias and sinks where there are any."""
    shapes = ((sq, 4, 3), (sk, 2, 3), (sk, 2, 2)) if packed else ((2, 4, sq, 3), (2, 2, sk, 3), (2, 2, sk, 2))
    leaves = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    if bias is not None:
        leaves.append(bias.to(F64).requires_grad_())
    if sinks:
        leaves.append(torch.randn(4, dtype=F64, requires_grad=True))

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)  # the same dropout in every evaluation
        whole = mask
        if bias is not None:
            part = attnhub.Bias(rest[0])
            whole = part if mask is None else mask & part
        out, lse = attnhub.attention(q, k, v, whole, sinks=rest[-1] if sinks else None, return_lse=True, backend="reference", **kwargs)
        return out, torch.where(lse == -math.inf, torch.zeros_like(lse), lse)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=False)


_IDS = torch.tensor([[0, 0, 1, 1, 2], [1, 1, 1, 0, 0]])
MASKS = {
    "full": lambda: None,
    "causal": attnhub.Causal,
    "causal-top-left": lambda: attnhub.Causal("top_left"),
    "window": lambda: attnhub.Window(1, 1),
    "window-top-left": lambda: attnhub.Causal("top_left") & attnhub.Window(1, -1, "top_left"),
    "chunk": lambda: attnhub.Causal() & attnhub.Chunk(2),
    "prefix": lambda: attnhub.Causal() & attnhub.Prefix(torch.tensor([2, 4])),
    "segments": lambda: attnhub.Segments(_IDS[:, :4], _IDS),
    "blocks": lambda: attnhub.Causal() & attnhub.Segments(_IDS[:, :4] - 1, _IDS - 1, widen_causal=True),
    "seqlens": lambda: attnhub.Causal() & attnhub.SeqLens(torch.tensor([2, 5])),
    "seqlens-zero": lambda: attnhub.SeqLens(torch.tensor([0, 3])),
    "leftpad": lambda: attnhub.Causal() & attnhub.LeftPad(torch.tensor([3, 0])),
    "bool-mask": lambda: attnhub.BoolMask(torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()),
    "alibi": lambda: attnhub.ALiBi(torch.rand(4)),
    "alibi-batch": lambda: attnhub.Causal() & attnhub.ALiBi(torch.rand(2, 4)),
    "block-sparse": lambda: attnhub.BlockSparse(torch.tensor([[1, 0], [0, 1]]).bool(), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_gradients_of_every_mask(name: str) -> None:
    _gradcheck(MASKS[name]())


@pytest.mark.parametrize("name", ["full", "causal", "seqlens-zero", "bool-mask"])
@pytest.mark.parametrize("what", ["softcap", "sinks", "dropout", "all"])
def test_gradients_of_softcap_sinks_and_dropout(name: str, what: str) -> None:
    kwargs: dict[str, Any] = {}
    if what in ("softcap", "all"):
        kwargs["softcap"] = 1.2
    if what in ("sinks", "all"):
        kwargs["sinks"] = True
    if what in ("dropout", "all"):
        kwargs["dropout_p"] = 0.4
    _gradcheck(MASKS[name](), **kwargs)


@pytest.mark.parametrize("shape", [(2, 4, 4, 5), (1, 4, 4, 5), (2, 1, 4, 5), (4, 1, 5), (4, 5), (4, 1), (5,)], ids=str)
def test_gradient_of_a_bias_of_every_shape(shape: tuple[int, ...]) -> None:
    _gradcheck(attnhub.Causal(), bias=torch.randn(shape))


def test_gradient_of_a_bias_behind_the_softcap() -> None:
    _gradcheck(None, bias=torch.randn(4, 5), softcap=1.2, sinks=True)


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_of_packed_sequences(mask: str, dropout_p: float) -> None:
    varlen = attnhub.Varlen.from_lengths(torch.tensor([2, 0, 1, 2]), torch.tensor([3, 2, 0, 1]))
    _gradcheck(MASKS[mask](), sq=6, sk=6, packed=True, varlen=varlen, dropout_p=dropout_p, sinks=True)  # the last query belongs to no sequence


def test_gradient_of_a_bias_of_packed_sequences() -> None:
    varlen = attnhub.Varlen.from_lengths(torch.tensor([2, 3]), torch.tensor([3, 2]))
    _gradcheck(None, sq=5, sk=5, packed=True, varlen=varlen, bias=torch.randn(2, 1, 3, 3))
    _gradcheck(None, sq=5, sk=5, packed=True, varlen=varlen, bias=torch.randn(1, 4, 1, 3))


@pytest.mark.parametrize("name", ["full", "causal", "seqlens-zero"])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradient_of_lse_alone(name: str, sinks: bool) -> None:
    leaves = [torch.randn(2, 4, n, 3, dtype=F64, requires_grad=True) for n in (4, 5, 5)]
    extra = [torch.randn(4, dtype=F64, requires_grad=True)] if sinks else []

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        lse = attnhub.attention(q, k, v, MASKS[name](), sinks=rest[0] if rest else None, return_lse=True, backend="reference")[1]
        return torch.where(lse == -math.inf, torch.zeros_like(lse), lse)

    assert torch.autograd.gradcheck(call, (*leaves, *extra))
    dv = torch.autograd.grad(call(*leaves, *extra).sum(), leaves[2], allow_unused=True)[0]
    assert dv is None or not dv.any(), "lse does not depend on v"


# -- corners ------------------------------------------------------------------------------------------------------------------------------


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    """Also in its gradients, and in rows without keys."""
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    sinks = torch.tensor([-math.inf, 0.5], requires_grad=True)
    for mask in (None, attnhub.SeqLens(torch.tensor([0])), attnhub.SeqLens(torch.tensor([2]))):
        out, lse = attnhub.attention(q, k, v, mask, sinks=sinks, return_lse=True, backend="reference")
        plain, plain_lse = attnhub.attention(q, k, v, mask, return_lse=True, backend="reference")
        assert torch.equal(out[:, 0], plain[:, 0]) and torch.equal(lse[:, 0], plain_lse[:, 0])
        grads = torch.autograd.grad([out, lse], [q, k, v, sinks], [torch.ones_like(out), torch.ones_like(lse)])
        assert all(bool(g.isfinite().all()) for g in grads) and grads[3][0] == 0


def test_second_derivatives_are_refused_with_the_fix() -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    (dq,) = torch.autograd.grad(attnhub.attention(q, q, q, backend="reference").pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        dq.sum().backward()


def test_only_what_is_needed_gets_a_gradient() -> None:
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 4)
    attnhub.attention(q, k, v, backend="reference").sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
