"""Rows without keys, padding, alignment, windows, empty sizes (cases 1 to 8)."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Bias, BoolMask, Causal, LeftPad, SeqLens, Window
from attnhub.registry import registry


def _keyless_masks(on: Any, sq: int, sk: int) -> dict[str, tuple[attnhub.Mask, Tensor]]:
    """name -> (mask, bool [B, Sq]: rows that have no key)."""
    some = torch.zeros(2, sq, dtype=torch.bool)
    some[0, 1] = some[1, 0] = some[1, sq - 1] = True
    rows = torch.ones(2, 1, sq, sk, dtype=torch.bool).masked_fill(some[:, None, :, None], False).to(on.device)
    added = torch.zeros(2, 1, sq, sk).masked_fill(some[:, None, :, None], -math.inf).to(on.device)
    first = torch.zeros(2, sq, dtype=torch.bool)
    first[0] = True
    top = torch.zeros(2, sq, dtype=torch.bool)
    top[:, : max(0, sq - sk)] = True
    return {
        "bool_mask": (BoolMask(rows), some), "bias": (Bias(added), some), "seqlens": (SeqLens(on.ints(0, sk)), first),
        "leftpad": (LeftPad(on.ints(sk, 0)), first), "causal_bottom_right": (Causal(), top),
    }  # fmt: skip


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("part", ["bool_mask", "bias", "seqlens", "leftpad", "causal_bottom_right"])
@pytest.mark.needs("lse")
def test_01_fully_masked_rows(on: Any, part: str, with_lse: bool) -> None:
    """Output 0, lse -inf, gradients 0; the other rows are untouched."""
    if attnhub.Feature(part) not in registry.get(on.name).capability.features:
        verdict = attnhub.explain(on.zeros(2, 2, 9, 16), on.zeros(2, 2, 5, 16), on.zeros(2, 2, 5, 16), _keyless_masks(on, 9, 5)[part][0], backend=on.name)
        assert f"no_{part}" in str(verdict.verdicts[on.name]) or verdict.chosen is None
        return
    q, k, v = (t.requires_grad_() for t in (on.randn(2, 2, 9, 16), on.randn(2, 2, 5, 16), on.randn(2, 2, 5, 16)))
    mask, keyless = _keyless_masks(on, 9, 5)[part]
    out, lse = on.attention(q, k, v, mask, return_lse=True)
    want, want_lse = on.exact(q, k, v, mask, return_lse=True)
    hidden = keyless[:, None].expand(2, 2, 9)
    assert not out.detach().cpu()[hidden].any() and bool((lse.detach().cpu()[hidden] == -math.inf).all())
    on.close(out.detach(), want)
    torch.testing.assert_close(lse.detach().double(), want_lse, atol=5e-3, rtol=5e-3)
    if not with_lse:
        out = on.attention(q, k, v, mask)
        assert not out.detach().cpu()[hidden].any()
    loss = out.float().square().sum() + (lse[~hidden.to(lse.device)].sum() if with_lse else 0.0)
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    assert not dq.cpu()[hidden].any()
    assert all(bool(g.isfinite().all()) for g in (dq, dk, dv))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("kind", ["seqlens", "leftpad"])
@pytest.mark.needs("seqlens", "leftpad", "lse")
def test_02_poison_in_padding(on: Any, kind: str, poison: float) -> None:
    """What lies behind a sequence's length or before its start reaches neither output, lse nor gradients."""
    q, k, v = on.randn(2, 2, 5, 16), on.randn(2, 2, 21, 16), on.randn(2, 2, 21, 16)
    mask = SeqLens(on.ints(17, 3)) if kind == "seqlens" else LeftPad(on.ints(4, 18))
    want, want_lse = on.exact(q, k, v, mask, return_lse=True)
    for t in (k, v):
        for b, start in enumerate((17, 3) if kind == "seqlens" else (4, 18)):
            (t[b, :, start:] if kind == "seqlens" else t[b, :, :start]).fill_(poison)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = on.attention(*leaves, mask, return_lse=True)
    on.close(out.detach(), want)
    torch.testing.assert_close(lse.detach().double(), want_lse, atol=5e-3, rtol=5e-3)
    for loss in (out.float().sum() + lse.sum(), on.attention(*leaves, mask).float().sum()):
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.needs("bool_mask", "softcap", but=("sdpa",))  # sdpa multiplies hidden values by zero weights: its README says so
def test_02_poison_in_masked_pairs(on: Any, softcap: float, which: str, poison: float) -> None:
    q, k, v = on.randn(1, 2, 5, 16), on.randn(1, 2, 20, 16), on.randn(1, 2, 20, 16)
    seen = torch.ones(5, 20, dtype=torch.bool, device=on.device)
    seen[:4, 7] = False  # the last row attends to the poisoned key
    want = on.exact(q, k, v, BoolMask(seen), softcap=softcap)
    (k if which == "k" else v)[:, :, 7] = poison
    out = on.attention(q, k, v, BoolMask(seen), softcap=softcap)
    on.close(out[:, :, :4], want[:, :, :4])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_02_poison_in_masked_pairs_and_gradients(softcap: float) -> None:
    """The definition selects pairs away in the backward too."""
    q, k, v = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    k[:, :, 3] = v[:, :, 3] = math.nan
    seen = torch.ones(5, 8, dtype=torch.bool)
    seen[:, 3] = False
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attnhub.attention(*leaves, BoolMask(seen), softcap=softcap, backend="reference")
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in (out.detach(), dq, dk, dv))
    assert not dk[:, :, 3].any() and not dv[:, :, 3].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.needs("bias")
def test_03_sum_of_two_smallest_biases(on: Any, dtype: str) -> None:
    """finfo.min + finfo.min is -inf: a hidden pair. A whole row of one finfo.min is an ordinary row and not NaN."""
    half = getattr(torch, dtype)
    q, k, v = (on.randn(1, 2, n, 16, dtype=half) for n in (4, 9, 9))
    low = torch.finfo(half).min
    one, two = torch.zeros(4, 9), torch.zeros(4, 9)
    one[0, 2] = two[0, 2] = low  # both: -inf
    one[1] = low  # the whole row, once
    one[2] = two[2] = low  # the whole row, twice: no key left
    mask = Bias(one.to(half).to(on.device)) & Bias(two.to(half).to(on.device))
    out = on.attention(q, k, v, mask).float()
    assert bool(out.isfinite().all())
    assert not out[:, :, 2].any()
    # -65504 in fp16 leaves the scores some digits in fp32; bf16's smallest number swallows them, and the row is even.
    plain = on.exact(q, k, v)[:, :, 1].float() if half == torch.float16 else v.float().mean(2)
    torch.testing.assert_close(out[:, :, 1], plain, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize(("sq", "sk"), [(1, 40), (5, 40), (40, 5), (33, 64), (17, 16)])
@pytest.mark.needs("causal_bottom_right", "causal_top_left")
def test_04_causal_with_different_lengths(on: Any, sq: int, sk: int, align: Literal["bottom_right", "top_left"]) -> None:
    """Which keys a row sees, read off the output: equal scores, v the identity."""
    q, k = on.zeros(1, 1, sq, 64), on.zeros(1, 1, sk, 64)
    v = torch.eye(sk, 64, dtype=on.dtype, device=on.device)[None, None]
    out = on.attention(q, k, v, Causal(align))[0, 0, :, :sk].cpu()
    for i in range(sq):
        last = i if align == "top_left" else i + sk - sq
        assert (out[i] != 0).nonzero().flatten().tolist() == list(range(min(last, sk - 1) + 1))


@pytest.mark.needs("causal_bottom_right", "lse")
def test_05_more_queries_than_keys(on: Any) -> None:
    """The first Sq - Sk rows stand before the first key."""
    for sq, sk in ((40, 17), (130, 3), (65, 64)):
        q, k, v = (t.requires_grad_() for t in (on.randn(1, 2, sq, 16), on.randn(1, 2, sk, 16), on.randn(1, 2, sk, 16)))
        out, lse = on.attention(q, k, v, Causal(), return_lse=True)
        on.close(out.detach(), on.exact(q, k, v, Causal()))
        assert not out[:, :, : sq - sk].any() and bool((lse[:, :, : sq - sk] == -math.inf).all()) and bool(lse[:, :, sq - sk :].isfinite().all())
        (dq,) = torch.autograd.grad(on.attention(q, k, v, Causal()).float().sum(), q)
        assert not dq[:, :, : sq - sk].any() and bool(dq.isfinite().all())


@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (0, 2), (3, -1), (-1, 1), (15, 16), (16, 0), (31, 31)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.needs("window", "causal_bottom_right")
def test_06_window_ends_are_inclusive(on: Any, left: int, right: int, causal: bool) -> None:
    sq, sk = 37, 48
    q, k = on.zeros(1, 1, sq, 48), on.zeros(1, 1, sk, 48)
    v = torch.eye(sk, dtype=on.dtype, device=on.device)[None, None]
    mask = Window(left, right) & Causal() if causal else Window(left, right)
    out = on.attention(q, k, v, mask)[0, 0].cpu()
    for i in range(sq):
        p = i + sk - sq
        first = 0 if left < 0 else max(0, p - left)
        last = min(sk - 1, p if causal else sk - 1 if right < 0 else p + right)
        if causal and right >= 0:
            last = min(last, p + right)
        assert (out[i] != 0).nonzero().flatten().tolist() == list(range(first, last + 1)), (i, left, right)


@pytest.mark.parametrize("lengths", [(3, 0, 5), (0, 4, 0, 0, 2), (0, 0), (7,), (0, 33)], ids=str)
@pytest.mark.needs("varlen", "causal_bottom_right", "lse")
def test_07_zero_length_sequences(on: Any, lengths: tuple[int, ...]) -> None:
    keys = tuple(n if i % 2 else 2 * n for i, n in enumerate(lengths))
    varlen = attnhub.Varlen.from_lengths(on.ints(*lengths), on.ints(*keys))
    q, k, v = (t.requires_grad_() for t in (on.randn(sum(lengths), 4, 16), on.randn(sum(keys), 2, 16), on.randn(sum(keys), 2, 16)))
    out, lse = on.attention(q, k, v, Causal(), varlen=varlen, return_lse=True)
    assert out.shape == q.shape and lse.shape == (4, sum(lengths))
    a = b = 0
    for n, m in zip(lengths, keys):
        if n:
            part = on.exact(*(t.transpose(0, 1)[None] for t in (q[a : a + n], k[b : b + m], v[b : b + m])), Causal())
            on.close(out[a : a + n].detach(), part[0].transpose(0, 1))
        a, b = a + n, b + m
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


@pytest.mark.needs("varlen", "lse")
def test_07_queries_without_keys_in_a_packed_batch(on: Any) -> None:
    varlen = attnhub.Varlen.from_lengths(on.ints(2, 3, 1), on.ints(4, 0, 5))
    q, k = on.randn(6, 2, 16), on.randn(9, 2, 16)
    out, lse = on.attention(q, k, k, varlen=varlen, return_lse=True)
    assert not out[2:5].any() and bool((lse[:, 2:5] == -math.inf).all()) and bool(lse[:, [0, 1, 5]].isfinite().all())


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("batch", "sq", "sk"), [(2, 3, 0), (2, 0, 5), (0, 3, 5), (0, 0, 0)])
@pytest.mark.needs("lse", "sinks")
def test_08_sizes_of_zero(on: Any, batch: int, sq: int, sk: int, with_sinks: bool) -> None:
    q, k, v = (t.requires_grad_() for t in (on.randn(batch, 4, sq, 16), on.randn(batch, 2, sk, 16), on.randn(batch, 2, sk, 8)))
    sinks = torch.arange(4.0, device=on.device).requires_grad_() if with_sinks else None
    for mask in (None, Causal(), SeqLens(on.ints(*[0] * batch))):
        out, lse = on.attention(q, k, v, mask, sinks=sinks, return_lse=True)
        assert out.shape == (batch, 4, sq, 8) and not out.any() and lse.shape == (batch, 4, sq)
        want = torch.full_like(lse, -math.inf) if sinks is None else torch.arange(4.0, device=on.device)[:, None].expand_as(lse)
        assert torch.equal(lse, want)
        leaves = [q, k, v] if sinks is None else [q, k, v, sinks]
        loss = out.sum() if sinks is None else out.sum() + lse.sum()
        grads = torch.autograd.grad(loss, leaves)
        assert all(g.shape == t.shape for g, t in zip(grads, leaves)) and not any(bool(g.any()) for g in grads[:3])
        if sinks is not None:
            assert torch.equal(grads[3], torch.full_like(sinks, float(batch * sq))), "lse of a row without keys is its sink"
        assert on.attention(q.detach(), k.detach(), v.detach(), mask).shape == (batch, 4, sq, 8)
