"""flash-attn's functions against their documented meaning, written out here in the inputs' own precision."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub.integrations import flash_attn as fa
from attnhub.integrations.flash_attn.probabilities import next_rng

HEADS, DIM = 4, 8
INF = float("inf")
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"causal": True}, "scale": {"softmax_scale": 0.7}, "softcap": {"softcap": 1.5},
    "window": {"window_size": (3, 1)}, "window_left": {"window_size": (2, -1)}, "window_right": {"window_size": (-1, 0)},
    "causal_window": {"causal": True, "window_size": (2, 5)}, "alibi": {"alibi_slopes": 1}, "alibi_batch": {"alibi_slopes": 2, "causal": True},
    "all": {"causal": True, "window_size": [4, -1], "alibi_slopes": 2, "softcap": 3.0, "softmax_scale": 0.4, "deterministic": True},
}  # fmt: skip


def oracle(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window_size: Any = (-1, -1), slopes: Optional[Tensor] = None, softcap: float = 0.0,
    softmax_scale: Optional[float] = None, first: int = 0, kept: Optional[Tensor] = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, weights) of one sequence: q [Sq, Hq, D], k [Sk, Hk, D], v [Sk, Hk, Dv]; keys before ``first`` do not exist."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # What does not exist may hold anything.
    k, v = (torch.cat([torch.zeros_like(t[:first]), t[first:]]) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    j = torch.arange(k.shape[0])[None, :]
    p = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (p - j).abs()
    left, right = window_size
    allowed = (j >= first) & (j <= (p if causal else p + INF)) & (j >= (p - left if left >= 0 else p - INF)) & (j <= (p + right if right >= 0 else p + INF))
    some = allowed.any(1)
    scores = torch.where(allowed, scores, -INF)
    lse = torch.where(some, torch.logsumexp(torch.where(some[:, None], scores, 0.0), -1), -INF)
    weights = torch.where(allowed, torch.exp(torch.where(allowed, scores, 0.0) - torch.where(some, lse, 0.0)[..., None]), 0.0)
    dropped = weights if kept is None else weights * kept / (1 - dropout_p)
    return torch.einsum("hij,jhd->ihd", dropped, v), lse, weights


def arguments(case: str, batch: int, dtype: torch.dtype) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the function gets, and what the oracle gets for each sequence."""
    given = dict(CASES[case])
    ndim = given.pop("alibi_slopes", 0)
    slopes = torch.rand(*((batch, HEADS) if ndim == 2 else (HEADS,)), dtype=torch.float32)
    plain = {key: value for key, value in given.items() if key != "deterministic"}
    own = [{**plain, "slopes": None if not ndim else (slopes[b] if ndim == 2 else slopes).to(dtype)} for b in range(batch)]
    return ({**given, "alibi_slopes": slopes} if ndim else given), own


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    bound = factor * (1e-11 if dtype == torch.float64 else 3e-5)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.to(dtype), theirs.to(dtype), rtol=bound, atol=bound)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def loss(out: Tensor, lse: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return (out * weight).sum() + torch.where(lse > -INF, lse, 0.0).square().sum().to(out.dtype)


# -- without a cache ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", [(7, 7), (3, 9), (9, 4), (1, 5)], ids=str)
@pytest.mark.parametrize("form", ["func", "kvpacked", "qkvpacked"])
@pytest.mark.parametrize("case", CASES)
def test_dense(case: str, form: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Out, lse and all gradients. (9, 4): the first queries of a causal call have no key."""
    batch, (sq, sk) = 2, shape
    if form == "qkvpacked":
        sk = sq
    kv_heads = HEADS if form == "qkvpacked" else 2
    given, own = arguments(case, batch, dtype)
    if form == "qkvpacked":
        inputs = leaves((batch, sq, 3, HEADS, DIM), dtype=dtype)
        q, k, v = inputs[0].unbind(2)
        call: Callable[..., Any] = fa.flash_attn_qkvpacked_func
    elif form == "kvpacked":
        inputs = leaves((batch, sq, HEADS, DIM), (batch, sk, 2, kv_heads, DIM), dtype=dtype)
        q, (k, v) = inputs[0], inputs[1].unbind(2)
        call = fa.flash_attn_kvpacked_func
    else:
        inputs = leaves((batch, sq, HEADS, DIM), (batch, sk, kv_heads, DIM), (batch, sk, kv_heads, DIM), dtype=dtype)
        q, k, v = inputs
        call = fa.flash_attn_func
    out, lse, probs = call(*inputs, **given, return_attn_probs=True)
    assert probs.numel() == 0 and out.is_contiguous()
    found = [oracle(q[b], k[b], v[b], **own[b]) for b in range(batch)]
    want, want_lse = torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])
    close(out, want, dtype)
    close(lse, want_lse, dtype)
    close(call(*inputs, **given), want, dtype)
    for mine, theirs in zip(torch.autograd.grad(loss(out, lse), inputs), torch.autograd.grad(loss(want, want_lse), inputs)):
        close(mine, theirs, dtype, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("form", ["varlen", "varlen_kvpacked", "varlen_qkvpacked"])
@pytest.mark.parametrize("case", CASES)
def test_packed(case: str, form: str, dtype: torch.dtype) -> None:
    """Sequences without queries, without keys and without both, and tokens behind the last sequence."""
    lengths_q, lengths_k = [4, 0, 6, 3, 0], [4, 2, 0, 7, 0]
    if form == "varlen_qkvpacked":
        lengths_k = lengths_q
    batch, kv_heads = len(lengths_q), HEADS if form == "varlen_qkvpacked" else 2
    varlen = attnhub.Varlen.from_lengths(torch.tensor(lengths_q), torch.tensor(lengths_k))
    given, own = arguments(case, batch, dtype)
    tq, tk = sum(lengths_q) + 2, sum(lengths_k) + 2
    both = (varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.max_seqlen_q, varlen.max_seqlen_k)
    if form == "varlen_qkvpacked":
        inputs = leaves((tq, 3, HEADS, DIM), dtype=dtype)
        q, k, v = inputs[0].unbind(1)
        out, lse, _ = fa.flash_attn_varlen_qkvpacked_func(*inputs, varlen.cu_seqlens_q, varlen.max_seqlen_q, **given, return_attn_probs=True)
    elif form == "varlen_kvpacked":
        inputs = leaves((tq, HEADS, DIM), (tk, 2, kv_heads, DIM), dtype=dtype)
        q, (k, v) = inputs[0], inputs[1].unbind(1)
        out, lse, _ = fa.flash_attn_varlen_kvpacked_func(*inputs, *both, **given, return_attn_probs=True)
    else:
        inputs = leaves((tq, HEADS, DIM), (tk, kv_heads, DIM), (tk, kv_heads, DIM), dtype=dtype)
        q, k, v = inputs
        out, lse, _ = fa.flash_attn_varlen_func(*inputs, *both, **given, return_attn_probs=True)
    outs, lses = [], []
    for b, (rows, keys) in enumerate(zip(q.split([*lengths_q, 2])[:-1], zip(k.split([*lengths_k, 2])[:-1], v.split([*lengths_k, 2])[:-1]))):
        one = oracle(rows, *keys, **own[b])
        outs.append(one[0])
        lses.append(one[1])
    want = torch.cat([*outs, torch.zeros(2, HEADS, DIM, dtype=dtype)])
    want_lse = torch.cat([*lses, torch.full((HEADS, 2), -INF, dtype=dtype)], 1)
    close(out, want, dtype)
    close(lse, want_lse, dtype)
    for mine, theirs in zip(torch.autograd.grad(loss(out, lse), inputs), torch.autograd.grad(loss(want, want_lse), inputs)):
        close(mine, theirs, dtype, 10)


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_dropout_and_what_it_dropped(packed: bool, case: str) -> None:
    """S_dmask holds the weights, and the sign says which of them the very same call dropped; gradients go through the others."""
    dtype, p, lengths = torch.float64, 0.4, [30, 0, 24]
    batch = 3 if packed else 2
    given, own = arguments(case, batch, dtype)
    if packed:
        varlen = attnhub.Varlen.from_lengths(torch.tensor(lengths))
        inputs = leaves(*[(54, HEADS, DIM)] * 3, dtype=dtype)
        call = lambda **kw: fa.flash_attn_varlen_func(  # noqa: E731
            *inputs, varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.max_seqlen_q, varlen.max_seqlen_k, p, **given, **kw
        )
        parts = [t.split(lengths) for t in inputs]
    else:
        inputs = leaves(*[(batch, 30, HEADS, DIM)] * 3, dtype=dtype)
        call = lambda **kw: fa.flash_attn_func(*inputs, p, **given, **kw)  # noqa: E731
        parts = [t.unbind(0) for t in inputs]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    out, lse, dmask = call(return_attn_probs=True)
    assert dmask.shape == (batch, HEADS, 30, 30)
    torch.set_rng_state(before)
    assert torch.equal(call(), out), "asking for S_dmask moves the generator as not asking does"
    assert not torch.equal(call(), out)
    wants, lses = [], []
    for b in range(batch):
        n = parts[0][b].shape[0]
        kept = ~torch.signbit(dmask[b, :, :n, :n])
        want, want_lse, weights = oracle(*(part[b] for part in parts), **own[b], kept=kept, dropout_p=p)
        close(dmask[b, :, :n, :n].abs(), weights, torch.float32, 0.01)
        assert n == 0 or 0.5 < float(kept.double().mean()) < 0.7
        wants.append(want)
        lses.append(want_lse)
    want = torch.cat(wants) if packed else torch.stack(wants)
    want_lse = torch.cat(lses, 1) if packed else torch.stack(lses)
    close(out, want, dtype)
    close(lse, want_lse, dtype)
    for mine, theirs in zip(torch.autograd.grad(loss(out, lse), inputs), torch.autograd.grad(loss(want, want_lse), inputs)):
        close(mine, theirs, dtype, 10)


def test_next_rng_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = next_rng(torch.device("cpu")), next_rng(torch.device("cpu"))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", CASES)
def test_packed_queries_over_pages(case: str) -> None:
    """Pages in any order, unused memory NaN, sequences of every kind, tokens behind the last."""
    dtype, page = torch.float64, 4
    lengths_q, lengths_k = [4, 0, 6, 1, 3, 2], [9, 2, 4, 13, 0, 2]
    batch = len(lengths_q)
    given, own = arguments(case, batch, dtype)
    varlen = attnhub.Varlen.from_lengths(torch.tensor(lengths_q), torch.tensor(lengths_k))
    q = torch.randn(sum(lengths_q) + 2, HEADS, DIM, dtype=dtype)
    k, v = (torch.randn(sum(lengths_k), 2, DIM, dtype=dtype).split(lengths_k) for _ in range(2))
    table = torch.randperm(batch * 4 + 3)[: batch * 4].view(batch, 4).int()
    k_pages, v_pages = (torch.full((batch * 4 + 3, page, 2, DIM), float("nan"), dtype=dtype) for _ in range(2))
    for b in range(batch):
        for t in range(lengths_k[b]):
            k_pages[table[b, t // page], t % page], v_pages[table[b, t // page], t % page] = k[b][t], v[b][t]
    both = (varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.max_seqlen_q, varlen.max_seqlen_k)
    out, lse, probs = fa.flash_attn_varlen_func(q, k_pages, v_pages, *both, **given, return_attn_probs=True, block_table=table)
    found = [oracle(rows, k[b], v[b], **own[b]) for b, rows in enumerate(q.split([*lengths_q, 2])[:-1])]
    close(out, torch.cat([*[f[0] for f in found], torch.zeros(2, HEADS, DIM, dtype=dtype)]), dtype)
    close(lse, torch.cat([*[f[1] for f in found], torch.full((HEADS, 2), -INF, dtype=dtype)], 1), dtype)
    assert probs.numel() == 0
    close(fa.flash_attn_varlen_func(q, k_pages, v_pages, *both, **given, block_table=table), out, dtype)


# -- with a cache ------------------------------------------------------------------------------------------------------------------------


def turned(x: Tensor, cos: Tensor, sin: Tensor, position: int, interleaved: bool) -> Tensor:
    """x [H, D] rotated at a position, pair by pair."""
    half = cos.shape[1]
    out = x.clone()
    for d in range(half):
        a, b = (2 * d, 2 * d + 1) if interleaved else (d, d + half)
        out[:, a] = x[:, a] * cos[position, d] - x[:, b] * sin[position, d]
        out[:, b] = x[:, a] * sin[position, d] + x[:, b] * cos[position, d]
    return out


ROTARY = {
    "none": {}, "interleaved": {"causal": True}, "halves": {"causal": True, "rotary_interleaved": False},
    "not_causal": {}, "window": {"window_size": (6, -1), "rotary_interleaved": False},
}  # fmt: skip


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("new", [None, 1, 3])
@pytest.mark.parametrize("kind", ["contiguous", "batch_idx", "leftpad", "batch_idx_leftpad", "paged", "paged_leftpad"])
def test_cache(kind: str, new: Optional[int], rotary: str) -> None:
    """Out, lse, what the cache holds afterwards, and that nothing else of it was touched."""
    if new is None and rotary != "none":
        pytest.skip("rotary goes with new tokens")
    dtype, page, capacity, sq, batch = torch.float64, 4, 16, 3 if new is None else new, 2
    used = [5, 11]
    rows = torch.tensor([3, 1]) if "batch_idx" in kind else None
    pad = [2, 4] if "leftpad" in kind else [0, 0]
    table = torch.randperm(9)[: batch * 4].view(batch, 4).int() if "paged" in kind else None
    shape = (9, page, 2, DIM) if table is not None else (4 if rows is not None else batch, capacity, 2, DIM)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))

    def place(b: int, t: int) -> tuple[int, int]:
        if table is not None:
            return int(table[b, t // page]), t % page
        return (b if rows is None else int(rows[b])), t

    keys, values = (torch.randn(batch, capacity, 2, DIM, dtype=dtype) for _ in range(2))
    for b in range(batch):
        for t in range(pad[b], used[b]):
            k_cache[place(b, t)], v_cache[place(b, t)] = keys[b, t], values[b, t]
    q = torch.randn(batch, sq, HEADS, DIM, dtype=dtype)
    k_new, v_new = (None, None) if new is None else torch.randn(2, batch, new, 2, DIM, dtype=dtype).unbind(0)
    options = dict(ROTARY[rotary])
    interleaved = options.get("rotary_interleaved", True)
    cos = sin = None
    if rotary != "none":
        angles = torch.rand(capacity, 3, dtype=dtype)
        cos, sin = angles.cos(), angles.sin()
        options.update(rotary_cos=cos, rotary_sin=sin)
    before = k_cache.clone(), v_cache.clone()
    out, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k_new, v_new, cache_seqlens=torch.tensor(used, dtype=torch.int32), cache_batch_idx=rows, block_table=table,
        cache_leftpad=torch.tensor(pad) if "leftpad" in kind else None, return_softmax_lse=True, **options,
    )  # fmt: skip
    moves = options.get("causal", False) or "window_size" in options
    touched = torch.ones(shape[:2], dtype=torch.bool)
    for b in range(batch):
        total = used[b] + (new or 0)
        query = q[b].clone()
        for i in range(new or 0):
            assert k_new is not None and v_new is not None
            fresh = k_new[b, i] if cos is None or sin is None else turned(k_new[b, i], cos, sin, used[b] + i, interleaved)
            keys[b, used[b] + i], values[b, used[b] + i] = fresh, v_new[b, i]
            where = place(b, used[b] + i)
            # The rotation is computed in fp32.
            close(k_cache[where], fresh, torch.float32, 0.1)
            assert torch.equal(v_cache[where], v_new[b, i])
            touched[where] = False
        if cos is not None and sin is not None:
            query = torch.stack([turned(q[b, i], cos, sin, used[b] + (i if moves else 0), interleaved) for i in range(sq)])
        own = {key: value for key, value in options.items() if not key.startswith("rotary")}
        want, want_lse, _ = oracle(query, keys[b, :total], values[b, :total], first=pad[b], **own)
        close(out[b], want, torch.float64 if cos is None else torch.float32, 1 if cos is None else 0.1)
        close(lse[b], want_lse, torch.float64 if cos is None else torch.float32, 1 if cos is None else 0.1)
    for cache, old in zip((k_cache, v_cache), before):
        assert torch.equal(cache[touched].nan_to_num(7.0), old[touched].nan_to_num(7.0))


@pytest.mark.parametrize("case", [case for case in CASES if case != "all"])
def test_cache_masks(case: str) -> None:
    dtype = torch.float64
    given, own = arguments(case, 2, dtype)
    q, k, v = torch.randn(2, 3, HEADS, DIM, dtype=dtype), *torch.randn(2, 2, 12, 2, DIM, dtype=dtype).unbind(0)
    for lengths in (8, torch.tensor([8, 8]), torch.tensor([3, 12], dtype=torch.int32), None):
        out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=3, **given)
        each = [12, 12] if lengths is None else [lengths] * 2 if isinstance(lengths, int) else lengths.tolist()
        for b, length in enumerate(each):
            close(out[b], oracle(q[b], k[b, :length], v[b, :length], **own[b])[0], dtype)


def test_a_decode_loop_agrees_with_one_causal_call() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, DIM).unbind(0)
    cache = torch.zeros(2, 16, 4, DIM), torch.zeros(2, 16, 4, DIM)
    steps = [fa.flash_attn_with_kvcache(q[:, t : t + 1], *cache, k[:, t : t + 1], v[:, t : t + 1], cache_seqlens=t, causal=True) for t in range(9)]
    close(torch.cat(steps, 1), fa.flash_attn_func(q, k, v, causal=True), torch.float32)


# -- arguments ---------------------------------------------------------------------------------------------------------------------------


def test_names_order_and_defaults() -> None:
    """As published with flash-attn 2.8."""
    tail = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False"
    cu = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    want = {
        "flash_attn_func": f"q k v {tail}", "flash_attn_qkvpacked_func": f"qkv {tail}", "flash_attn_kvpacked_func": f"q kv {tail}",
        "flash_attn_varlen_func": f"q k v {cu} {tail} block_table=None", "flash_attn_varlen_kvpacked_func": f"q kv {cu} {tail}",
        "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {tail}",
        "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None cache_batch_idx=None cache_leftpad=None "
        "block_table=None softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 "
        "return_softmax_lse=False",
    }  # fmt: skip
    for name, text in want.items():
        parameters = inspect.signature(getattr(fa, name)).parameters.values()
        assert " ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters) == text


def test_packed_inputs_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnhub.integrations.flash_attn import interface

    seen: list[Tensor] = []
    monkeypatch.setattr(interface, "attention", lambda q, k, v, *args, **kwargs: seen.extend((q, k, v)) or q)
    qkv = torch.randn(2, 5, 3, HEADS, DIM)
    fa.flash_attn_qkvpacked_func(qkv)
    fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:])
    assert {t.untyped_storage().data_ptr() for t in seen} == {qkv.untyped_storage().data_ptr()} and len(seen) == 6


def test_deterministic_asks_for_repeatable_backends() -> None:
    q = torch.randn(1, 5, HEADS, DIM, requires_grad=True)
    for deterministic in (True, False):
        fa.flash_attn_func(q, q, q, deterministic=deterministic)
        decision = attnhub.last_decision()
        assert decision is not None and (attnhub.Feature.DETERMINISTIC in decision.problem.features) == deterministic


_Q = torch.zeros(2, 3, HEADS, DIM)
_CU = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: fa.flash_attn_func(_Q, _Q, _Q, window_size=3), r"window_size=3.*\(left, right\)"),
    (lambda: fa.flash_attn_func(_Q, _Q, _Q, dropout_p=1.0), "dropout_p=1.0"),
    (lambda: fa.flash_attn_func(_Q, _Q, _Q, alibi_slopes=torch.zeros(3)), r"ALiBi slopes .*\[4\] or \[2, 4\]"),
    (lambda: fa.flash_attn_func(_Q, _Q[:, :, :3], _Q[:, :, :3]), "multiple"),
    (lambda: fa.flash_attn_qkvpacked_func(_Q), r"qkv has shape .*\[batch, seqlen, 3, heads, head_dim\]"),
    (lambda: fa.flash_attn_varlen_kvpacked_func(_Q[0], _Q[0], _CU, _CU, 3, 3), r"kv has shape .*\[total, 2, heads, head_dim\]"),
    (lambda: fa.flash_attn_varlen_func(_Q, _Q, _Q, _CU, _CU, 3, 3), "packed tokens"),
    (lambda: fa.flash_attn_varlen_func(_Q[0].requires_grad_(), _Q, _Q, _CU, _CU, 3, 3, block_table=_CU[None]), "block_table.*no gradient"),
    (lambda: fa.flash_attn_varlen_func(_Q[0], _Q, _Q, _CU, _CU, 3, 3, 0.5, block_table=_CU[None], return_attn_probs=True), "S_dmask"),
    (lambda: fa.flash_attn_with_kvcache(_Q, _Q, _Q, _Q, None, cache_seqlens=0), "both k and v"),
    (lambda: fa.flash_attn_with_kvcache(_Q, _Q, _Q, _Q, _Q), "cache_seqlens is needed"),
    (lambda: fa.flash_attn_with_kvcache(_Q, _Q, _Q, cache_seqlens=torch.zeros(3)), r"cache_seqlens has shape \(3,\).*\[2\]"),
    (lambda: fa.flash_attn_with_kvcache(_Q, _Q, _Q, rotary_cos=_Q[0, 0], rotary_sin=_Q[0, 0]), "rotary_cos.*pass k and v"),
    (lambda: fa.flash_attn_with_kvcache(_Q, _Q, _Q, _Q, _Q, rotary_cos=_Q[0, 0], cache_seqlens=0), "both rotary_cos and rotary_sin"),
    (lambda: fa.flash_attn_with_kvcache(_Q, _Q, _Q, num_splits=-1), "num_splits=-1"),
    (lambda: fa.flash_attn_with_kvcache(_Q, _Q, _Q, cache_batch_idx=_CU, block_table=_CU[None]), "block_table or cache_batch_idx"),
])  # fmt: skip
def test_errors_name_the_argument(call: Callable[[], Any], words: str) -> None:
    _Q.requires_grad_(False)
    with pytest.raises(ValueError, match=words):
        call()


def test_a_refused_call_writes_nothing() -> None:
    cache = torch.zeros(2, 8, HEADS, DIM)
    new = torch.ones(2, 1, HEADS, DIM)
    angles = torch.zeros(8, 4)
    for bad in ({"alibi_slopes": torch.zeros(3)}, {"softcap": -1.0}, {"cache_leftpad": torch.zeros(3, dtype=torch.int32)}):
        for rotary in ({}, {"rotary_cos": angles, "rotary_sin": angles}):
            with pytest.raises(ValueError):
                fa.flash_attn_with_kvcache(new, cache, cache, new, new, cache_seqlens=2, **bad, **rotary)
    assert not cache.any()


@pytest.mark.parametrize("form", ["func", "varlen", "kvcache"])
def test_compiles_without_breaks(form: str) -> None:
    q = torch.randn(2, 6, HEADS, DIM)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    angles = torch.rand(16, 4)

    def call(x: Tensor, cache: Tensor) -> Tensor:
        if form == "func":
            return fa.flash_attn_func(x, x, x, causal=True, window_size=(2, 0), deterministic=True)  # type: ignore[return-value]
        if form == "varlen":
            x = x.flatten(0, 1)
            return fa.flash_attn_varlen_func(x, x, x, cu, cu, 7, 7, causal=True)  # type: ignore[return-value]
        used = torch.tensor([3, 4], dtype=torch.int32)
        return fa.flash_attn_with_kvcache(x, cache, cache.clone(), x, x, angles, angles, used, causal=True)  # type: ignore[return-value]

    torch._dynamo.reset()
    one, two = torch.zeros(2, 16, HEADS, DIM), torch.zeros(2, 16, HEADS, DIM)
    close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, one), call(q, two), torch.float32)
    assert torch.equal(one, two)


def test_results_are_dense_whatever_the_memory_order() -> None:
    """Callers take `view(B, S, H * D)` of them."""
    q = torch.randn(2, HEADS, 6, DIM).transpose(1, 2)
    for result in (fa.flash_attn_func(q, q, q), fa.flash_attn_func(q, q, q, return_attn_probs=True)[0], fa.flash_attn_with_kvcache(q, q, q)):
        assert isinstance(result, Tensor) and result.is_contiguous()
