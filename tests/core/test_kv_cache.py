"""K/V caches, contiguous and paged: append, attend, decode; rotary positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Optional

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import attnhub
from attnhub import KVCache, append_kv, apply_rotary
from attnhub.registry import registry

HEADS, DIM = 2, 8
KINDS = ["contiguous", "bshd", "batch_idx", "paged", "paged_bshd", "paged_shuffled"]


def _cache(kind: str, batch: int = 2, length: int = 24, lengths: Optional[list[int]] = None, v_dim: int = DIM) -> KVCache:
    """An empty cache whose unused memory is NaN."""

    def memory(*shape: int) -> Tensor:
        return torch.full(shape, math.nan)

    used = torch.tensor(lengths or [0] * batch, dtype=torch.int32)
    layout: Literal["bhsd", "bshd"] = "bshd" if kind.endswith("bshd") else "bhsd"
    page = 4
    if kind.startswith("paged"):
        count = -(-length // page)
        pages = torch.randperm(batch * count + 3)[: batch * count] if kind == "paged_shuffled" else torch.arange(batch * count)
        table, rows, slots = pages.view(batch, count), batch * count + 3, page
    else:
        table, rows, slots = None, batch + (3 if kind == "batch_idx" else 0), length
    shape = (rows, slots, HEADS) if layout == "bshd" else (rows, HEADS, slots)
    index = torch.tensor([4, 1][:batch]) if kind == "batch_idx" else None
    return KVCache(memory(*shape, DIM), memory(*shape, v_dim), used, table, index, layout)


def _read(cache: KVCache, b: int, t: int) -> tuple[Tensor, Tensor]:
    """Token t of sequence b, [Hk, D] each, by the docstring of `KVCache`."""
    if cache.block_table is not None:
        size = cache.k_cache.shape[1 if cache.layout == "bshd" else 2]
        row, slot = int(cache.block_table[b, t // size]), t % size
    else:
        row, slot = (b if cache.cache_batch_idx is None else int(cache.cache_batch_idx[b])), t
    if cache.layout == "bshd":
        return cache.k_cache[row, slot], cache.v_cache[row, slot]
    return cache.k_cache[row, :, slot], cache.v_cache[row, :, slot]


# -- append --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [1, 5])
def test_append_writes_each_token_where_it_belongs(kind: str, new: int) -> None:
    lengths = [3, 10]
    cache = _cache(kind, lengths=lengths, v_dim=6)
    k, v = torch.randn(2, HEADS, new, DIM), torch.randn(2, HEADS, new, 6)
    append_kv(cache, k, v)
    assert cache.cache_seqlens.tolist() == lengths, "append does not advance"
    for b in range(2):
        for s in range(new):
            key, value = _read(cache, b, lengths[b] + s)
            assert torch.equal(key, k[b, :, s]) and torch.equal(value, v[b, :, s])
    assert int((~cache.k_cache.isnan()).sum()) == 2 * new * HEADS * DIM, "and nothing else is touched"
    assert int((~cache.v_cache.isnan()).sum()) == 2 * new * HEADS * 6


def test_append_casts_to_the_caches_dtype() -> None:
    cache = KVCache.empty(1, HEADS, 4, DIM, dtype=torch.bfloat16)
    k = torch.randn(1, HEADS, 2, DIM)
    append_kv(cache, k, k)
    assert torch.equal(cache.k_cache[:, :, :2], k.bfloat16())


def test_append_nothing() -> None:
    cache = _cache("contiguous")
    append_kv(cache, torch.randn(2, HEADS, 0, DIM), torch.randn(2, HEADS, 0, DIM))
    assert bool(cache.k_cache.isnan().all())


@pytest.mark.parametrize("kind", KINDS)
def test_append_beyond_the_capacity_is_an_error_and_writes_nothing(kind: str) -> None:
    cache = _cache(kind, lengths=[3, 22])
    assert cache.capacity() == 24
    k = torch.randn(2, HEADS, 3, DIM)
    with pytest.raises(ValueError, match=r"append_kv.*capacity of 24; allocate"):
        append_kv(cache, k, k)
    assert bool(cache.k_cache.isnan().all())
    append_kv(cache, k[:, :, :2], k[:, :, :2])


@pytest.mark.parametrize("page", [-1, 99])
def test_append_into_a_page_that_does_not_exist_is_an_error(page: int) -> None:
    cache = KVCache(torch.zeros(2, HEADS, 4, DIM), torch.zeros(2, HEADS, 4, DIM), torch.zeros(2, dtype=torch.int32), torch.tensor([[page], [1]]))
    k = torch.ones(2, HEADS, 1, DIM)
    with pytest.raises((ValueError, IndexError)):
        append_kv(cache, k, k)
    assert not cache.k_cache.any(), "a negative index must not wrap around to the last page"


def test_append_at_a_negative_length_is_an_error() -> None:
    cache = _cache("contiguous", lengths=[-1, 0])
    with pytest.raises((ValueError, IndexError)):
        append_kv(cache, torch.ones(2, HEADS, 1, DIM), torch.ones(2, HEADS, 1, DIM))


@pytest.mark.parametrize(
    ("k", "v", "said"),
    [
        ((2, HEADS, 1, DIM + 1), (2, HEADS, 1, DIM), r"append_kv\(k\).*\(2, 2, 1, 9\).*\[2, 2, S, 8\]"),
        ((2, HEADS, 1, DIM), (2, HEADS + 1, 1, DIM), r"append_kv\(v\)"),
        ((3, HEADS, 1, DIM), (3, HEADS, 1, DIM), r"append_kv\(k\)"),
        ((HEADS, 1, DIM), (HEADS, 1, DIM), r"append_kv\(k\)"),
        ((2, HEADS, 1, DIM), (2, HEADS, 2, DIM), r"1 new tokens and v 2"),
    ],
)
def test_append_of_the_wrong_shape(k: tuple[int, ...], v: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        append_kv(_cache("contiguous"), torch.zeros(k), torch.zeros(v))


# -- attend ---------------------------------------------------------------------------------------------------------------------------


def _dense(q: Tensor, ks: list[Tensor], vs: list[Tensor], mask: Any, **kwargs: Any) -> Tensor:
    """Each sequence alone, without a cache."""
    outs = [attnhub.attention(q[b : b + 1], k[None], v[None], mask, backend="reference", **kwargs) for b, (k, v) in enumerate(zip(ks, vs))]
    return torch.cat(outs)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [1, 4])
def test_attention_over_a_cache(kind: str, new: int, backend: str) -> None:
    lengths = [3, 11]
    cache = _cache(kind, lengths=[0, 0])
    old_k, old_v = torch.randn(2, HEADS, 11, DIM), torch.randn(2, HEADS, 11, DIM)
    append_kv(cache, old_k, old_v)  # what lies behind a sequence's length is stale, and must not matter
    cache.cache_seqlens.copy_(torch.tensor(lengths))
    q, k, v = torch.randn(2, 4, new, DIM), torch.randn(2, HEADS, new, DIM), torch.randn(2, HEADS, new, DIM)
    out = attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=cache, backend=backend)
    ks = [torch.cat((old_k[b, :, : lengths[b]], k[b]), 1) for b in range(2)]
    vs = [torch.cat((old_v[b, :, : lengths[b]], v[b]), 1) for b in range(2)]
    torch.testing.assert_close(out, _dense(q, ks, vs, attnhub.Causal()), atol=1e-5, rtol=1e-5)
    assert cache.cache_seqlens.tolist() == lengths
    cache.advance(new)
    assert cache.cache_seqlens.tolist() == [n + new for n in lengths]
    again = attnhub.attention(q, kv_cache=cache, mask=attnhub.Causal(), backend=backend)
    torch.testing.assert_close(again, out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_loop_is_the_full_prefill(kind: str) -> None:
    steps = 20
    q, k, v = torch.randn(2, 4, steps, DIM), torch.randn(2, HEADS, steps, DIM), torch.randn(2, HEADS, steps, DIM)
    cache = _cache(kind, length=steps)
    outs = []
    for t in range(steps):
        outs.append(attnhub.attention(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], attnhub.Causal(), kv_cache=cache))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(outs, 2), attnhub.attention(q, k, v, attnhub.Causal()), atol=1e-5, rtol=1e-5)


def test_chunked_prefill_is_the_full_prefill() -> None:
    q, k, v = torch.randn(1, 4, 20, DIM), torch.randn(1, HEADS, 20, DIM), torch.randn(1, HEADS, 20, DIM)
    mask = attnhub.Causal() & attnhub.Window(6)
    cache = KVCache.empty(1, HEADS, 32, DIM, page_size=8)
    outs = []
    for a, b in ((0, 7), (7, 8), (8, 17), (17, 20)):
        outs.append(attnhub.attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mask, kv_cache=cache))
        cache.advance(b - a)
    torch.testing.assert_close(torch.cat(outs, 2), attnhub.attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


def test_other_arguments_go_with_a_cache() -> None:
    cache = _cache("paged", lengths=[5, 9])
    cache.k_cache.normal_(), cache.v_cache.normal_()
    q = torch.randn(2, 4, 3, DIM)
    sinks, mask = torch.randn(4), attnhub.Causal() & attnhub.LeftPad(torch.tensor([2, 0]))
    out, lse = attnhub.attention(q, None, None, mask, kv_cache=cache, softcap=3.0, sinks=sinks, softmax_scale=0.2, return_lse=True)
    for b, n in enumerate((5, 9)):
        k, v = (torch.stack(t, 1) for t in zip(*(_read(cache, b, t) for t in range(n))))
        part = attnhub.Causal() & attnhub.LeftPad(torch.tensor([(2, 0)[b]]))
        want = attnhub.attention(q[b : b + 1], k[None], v[None], part, softcap=3.0, sinks=sinks, softmax_scale=0.2, return_lse=True, backend="reference")
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), want, atol=1e-5, rtol=1e-5)


def test_layout_bshd_is_about_the_new_tokens() -> None:
    q, k, v = torch.randn(2, 3, 4, DIM), torch.randn(2, 3, HEADS, DIM), torch.randn(2, 3, HEADS, DIM)
    a, b = _cache("contiguous"), _cache("contiguous")
    out = attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=a, layout="bshd")
    want = attnhub.attention(*(t.transpose(1, 2) for t in (q, k, v)), attnhub.Causal(), kv_cache=b)
    torch.testing.assert_close(out.transpose(1, 2), want)
    assert torch.equal(a.k_cache.nan_to_num(), b.k_cache.nan_to_num())


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_explain_with_a_cache_is_the_decision_and_appends_nothing(layout: Literal["bhsd", "bshd"], kind: str) -> None:
    cache = _cache(kind)
    q, k, v = torch.randn(2, 4, 3, DIM), torch.randn(2, HEADS, 3, DIM), torch.randn(2, HEADS, 3, DIM)
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    told = attnhub.explain(q, k, v, attnhub.Causal(), kv_cache=cache, layout=layout)
    assert bool(cache.k_cache.isnan().all())
    attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=cache, layout=layout)
    done = attnhub.last_decision()
    assert done is not None and (told.problem, told.chosen) == (done.problem, done.chosen)


def test_a_cache_that_holds_more_rows_than_the_batch_needs_an_index() -> None:
    wide = KVCache(torch.zeros(3, HEADS, 8, DIM), torch.zeros(3, HEADS, 8, DIM), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="batch"):
        attnhub.attention(torch.zeros(2, HEADS, 1, DIM), kv_cache=wide)


def test_empty_makes_caches_that_work() -> None:
    for page_size in (0, 1, 5, 16):
        cache = KVCache.empty(2, HEADS, 17, DIM, v_head_dim=4, page_size=page_size)
        assert cache.capacity() >= 17 and cache.v_cache.shape[3] == 4
        k = torch.randn(2, HEADS, 17, DIM)
        out = attnhub.attention(k, k, k[..., :4], attnhub.Causal(), kv_cache=cache)
        torch.testing.assert_close(out, attnhub.attention(k, k, k[..., :4], attnhub.Causal()), atol=1e-5, rtol=1e-5)


def test_the_callers_lengths_are_the_caches_lengths() -> None:
    lengths = torch.zeros(1, dtype=torch.int32)
    KVCache(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), lengths).advance(2)
    assert lengths.tolist() == [2]


def test_caches_are_pytrees() -> None:
    cache = _cache("paged_bshd")
    leaves, spec = pytree.tree_flatten(cache)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.k_cache is cache.k_cache and again.layout == "bshd" and again.cache_batch_idx is None


# -- rotary ----------------------------------------------------------------------------------------------------------------------------


def _angles(positions: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angle.cos(), angle.sin()


def _rotated(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers times exp(i * angle): x [..., D], angles [R]."""
    half = angles.shape[-1]
    out = x.clone().double()
    for d in range(half):
        a, b = (2 * d, 2 * d + 1) if interleaved else (d, d + half)
        turned = torch.complex(x[..., a].double(), x[..., b].double()) * torch.polar(torch.ones(()).double(), angles[d].double())
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [4, 2])
def test_rotary_by_complex_numbers(interleaved: bool, half: int) -> None:
    x = torch.randn(2, 3, 5, DIM)
    cos, sin = _angles(40, half)
    positions = torch.tensor([[0, 1, 2, 3, 4], [30, 31, 32, 33, 34]])
    got = apply_rotary(x, cos, sin, positions, interleaved)
    assert got.dtype == x.dtype and torch.equal(got[..., 2 * half :], x[..., 2 * half :])
    angle = torch.arange(40)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    for b in range(2):
        for s in range(5):
            want = _rotated(x[b, :, s], angle[positions[b, s]], interleaved)
            torch.testing.assert_close(got[b, :, s].double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_append_rotates_at_each_sequences_own_positions(kind: str, interleaved: bool) -> None:
    cache = _cache(kind, lengths=[2, 9])
    cos, sin = _angles(24, 4)
    k = torch.randn(2, HEADS, 3, DIM)
    append_kv(cache, k, k, rotary=(cos, sin), interleaved=interleaved)
    positions = torch.tensor([[2, 3, 4], [9, 10, 11]])
    want = apply_rotary(k, cos, sin, positions, interleaved)
    for b, n in enumerate((2, 9)):
        for s in range(3):
            key, value = _read(cache, b, n + s)
            torch.testing.assert_close(key, want[b, :, s])
            assert torch.equal(value, k[b, :, s]), "v is not rotated"


def test_rotary_is_relative() -> None:
    """q . k after rotation depends on the difference of positions alone."""
    q, k = torch.randn(1, 1, 1, DIM), torch.randn(1, 1, 1, DIM)
    cos, sin = _angles(64, 4)
    dots = [
        (apply_rotary(q, cos, sin, torch.tensor([[p + 5]])) * apply_rotary(k, cos, sin, torch.tensor([[p]]))).sum().item() for p in (0, 7, 50)
    ]  # fmt: skip
    assert max(dots) - min(dots) < 1e-4


def test_rotary_errors() -> None:
    x = torch.zeros(1, 1, 1, DIM)
    for cos, sin in ((torch.zeros(4, 5), torch.zeros(4, 5)), (torch.zeros(4, 2), torch.zeros(4, 3)), (torch.zeros(4), torch.zeros(4))):
        with pytest.raises(ValueError, match=r"rotary cos .*max_positions"):
            apply_rotary(x, cos, sin, torch.zeros(1, 1, dtype=torch.int64))
    cache = _cache("contiguous", lengths=[3, 5])
    with pytest.raises((ValueError, IndexError)):
        append_kv(cache, torch.zeros(2, HEADS, 1, DIM), torch.zeros(2, HEADS, 1, DIM), rotary=_angles(5, 4))


@pytest.mark.parametrize(
    "bad", [{"softcap": -1.0}, {"softmax_scale": float("nan")}, {"sinks": torch.zeros(3)}, {"dropout_p": 1.5}, {"mask": attnhub.LeftPad(torch.zeros(5, dtype=torch.int32))}],
    ids=str,
)  # fmt: skip
def test_a_refused_call_writes_nothing(bad: dict[str, Any]) -> None:
    cache = KVCache.empty(2, 2, 16, 8)
    q = torch.randn(2, 4, 1, 8)
    before = cache.k_cache.clone()
    with pytest.raises(ValueError, match=next(iter(bad)).replace("softmax_scale", "softmax_scale").replace("mask", "leftpad")):
        attnhub.attention(q, q[:, :2], q[:, :2], kv_cache=cache, **bad)
    assert torch.equal(cache.k_cache, before)


# -- packed queries ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpu"])
@pytest.mark.parametrize(
    "mask",
    [None, attnhub.Causal() & attnhub.Window(4), attnhub.ALiBi(torch.tensor([0.1, 0.7, 0.3, 0.9])), attnhub.LeftPad(torch.tensor([1, 2]))],
    ids=["none", "causal window", "alibi", "leftpad"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_queries_over_a_cache(kind: str, mask: Optional[attnhub.Mask], backend: str) -> None:
    """As each sequence alone. Two tokens behind the last sequence give 0, and varlen's own keys are not read."""
    if backend == "cpu" and registry.candidates()["cpu"].probe:
        pytest.skip("the cpu backend is not built")
    lengths = [3, 10]
    cache = _cache(kind, lengths=lengths, v_dim=6)
    empty = attnhub.KVCache(cache.k_cache, cache.v_cache, torch.zeros(2, dtype=torch.int32), cache.block_table, cache.cache_batch_idx, cache.layout)
    append_kv(empty, torch.randn(2, HEADS, 3, DIM), torch.randn(2, HEADS, 3, 6))
    empty.advance(3)
    append_kv(empty, torch.randn(2, HEADS, 7, DIM), torch.randn(2, HEADS, 7, 6))
    q = torch.randn(8, 4, DIM)
    nonsense = torch.tensor([0, 90, 7], dtype=torch.int32)
    for counts in ([4, 2], [0, 6], [6, 0], [1, 1]):
        cu = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        out, lse = attnhub.attention(q, None, None, mask, varlen=attnhub.Varlen(cu, nonsense, max(counts), 5), kv_cache=cache, return_lse=True, backend=backend)
        assert out.shape == (8, 4, 6) and lse.shape == (4, 8)
        assert not out[sum(counts) :].any() and (lse[:, sum(counts) :] == -math.inf).all()
        for b, (first, last) in enumerate([(0, counts[0]), (counts[0], sum(counts))]):
            if first == last:
                continue
            keys, values = (torch.stack([_read(cache, b, t)[i] for t in range(lengths[b])], 1)[None] for i in range(2))
            own = None if mask is None else dataclasses.replace(mask, leftpad=mask.leftpad[b : b + 1]) if mask.leftpad is not None else mask
            want, want_lse = attnhub.attention(q[None, first:last].transpose(1, 2), keys, values, own, return_lse=True, backend="reference")
            torch.testing.assert_close(out[first:last], want[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[:, first:last], want_lse[0], rtol=1e-5, atol=1e-5)


def test_packed_queries_are_explained_compiled_and_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    cache = KVCache.empty(2, HEADS, 24, DIM, page_size=4)
    append_kv(cache, torch.randn(2, HEADS, 9, DIM), torch.randn(2, HEADS, 9, DIM))
    cache.advance(9)
    q, varlen = torch.randn(5, 4, DIM), attnhub.Varlen.from_lengths(torch.tensor([3, 2]))
    decision = attnhub.explain(q, mask=attnhub.Causal(), varlen=varlen, kv_cache=cache)
    assert {attnhub.Feature.VARLEN, attnhub.Feature.PAGED, attnhub.Feature.SEQLENS} <= decision.problem.features
    assert decision.problem.page_size == 4 and decision.problem.seqlen_k == 32 and decision.problem.batch == 2

    def call(q: Tensor) -> Any:
        return attnhub.attention(q, None, None, attnhub.Causal(), varlen=varlen, kv_cache=cache)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q), call(q))
    with FlopCounterMode(display=False) as counter:
        call(q)
    assert counter.get_total_flops() == 2 * 4 * 5 * 24 * (DIM + DIM), "of the table's capacity"


def test_packed_queries_that_do_not_fit() -> None:
    cache, q = KVCache.empty(2, HEADS, 24, DIM), torch.randn(5, 4, DIM)
    varlen = attnhub.Varlen.from_lengths(torch.tensor([4, 1]))
    with pytest.raises(ValueError, match=r"append_kv.*pass no k and v"):
        attnhub.attention(q, torch.randn(5, HEADS, DIM), torch.randn(5, HEADS, DIM), varlen=varlen, kv_cache=cache)
    with pytest.raises(ValueError, match=r"q has batch 3 .* 2 entries"):
        attnhub.attention(q, varlen=attnhub.Varlen.from_lengths(torch.tensor([3, 1, 1])), kv_cache=cache)
    with pytest.raises(ValueError, match="packed tokens"):
        attnhub.attention(q[None], varlen=varlen, kv_cache=cache)
    with pytest.raises(ValueError, match="no gradient"):
        attnhub.attention(q.requires_grad_(), varlen=varlen, kv_cache=cache)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: KVCache([1], torch.zeros(1, 1, 4, 2), torch.zeros(1, dtype=torch.int32)), TypeError, r"k_cache.*got list"),
        (lambda: KVCache(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2).half(), torch.zeros(1, dtype=torch.int32)), ValueError, "one floating dtype"),
        (lambda: KVCache(torch.zeros(1, 1, 4, 2).int(), torch.zeros(1, 1, 4, 2).int(), torch.zeros(1, dtype=torch.int32)), ValueError, "one floating dtype"),
        (lambda: KVCache.empty(0, 1, 4, 2), ValueError, r"batch=0.*at least 1"),
        (lambda: KVCache.empty(1, 1, 4, 2, v_head_dim=0), ValueError, "v_head_dim=0"),
        (lambda: KVCache.empty(1, 1, 4, 2, page_size=True), ValueError, "page_size=True"),
        (lambda: KVCache.empty(1, 1, 4, 2, page_size=-1), ValueError, "page_size=-1"),
        (lambda: KVCache.empty(1, 1, 4, 2).advance(1.5), TypeError, "tokens=1.5"),
        (lambda: attnhub.append_kv(KVCache.empty(1, 1, 4, 2), torch.zeros(1, 1, 1, 2).int(), torch.zeros(1, 1, 1, 2)), ValueError, r"k\).*floating"),
        (lambda: attnhub.append_kv(KVCache.empty(1, 1, 4, 2), torch.zeros(1, 1, 1, 2), None), TypeError, r"v\).*NoneType"),
        (lambda: attnhub.scaled_dot_product_attention(None, None, None), TypeError, r"\(query\).*NoneType"),
        (lambda: attnhub.attention(*(torch.zeros(1, 1, 2, 8) for _ in range(3)), dropout_p=None), (TypeError, ValueError), "dropout_p"),
    ],
)  # fmt: skip
def test_bad_values_are_named(make: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("which", ("k", "v", "k_cache", "v_cache", "cos", "sin"))
def test_appending_what_requires_a_gradient(which: str) -> None:
    """An error while gradients are recorded, which would be lost; and the cache is as it was."""
    cache = KVCache.empty(1, 2, 8, 8)
    tensors = {"k": torch.ones(1, 2, 1, 8), "v": torch.ones(1, 2, 1, 8), "cos": torch.ones(8, 4), "sin": torch.zeros(8, 4)}
    (cache.__dict__ if "cache" in which else tensors)[which].requires_grad_()

    def append() -> None:
        attnhub.append_kv(cache, tensors["k"], tensors["v"], rotary=(tensors["cos"], tensors["sin"]))

    with pytest.raises(ValueError, match=rf"append_kv\((rotary: )?{which}\): it requires a gradient.*torch\.no_grad\(\).*detach\(\)"):
        append()
    assert not cache.k_cache.any() and not cache.v_cache.any()
    with torch.no_grad():
        append()
    assert cache.k_cache.any() and cache.v_cache.any()


def test_a_call_that_appends_to_a_cache_that_requires_a_gradient() -> None:
    cache = KVCache.empty(1, 2, 8, 8)
    cache.v_cache.requires_grad_()
    one = torch.ones(1, 2, 1, 8)
    with pytest.raises(ValueError, match=r"append_kv\(v_cache\): it requires a gradient"):
        attnhub.attention(one, one, one, kv_cache=cache)
    assert not cache.k_cache.any()
