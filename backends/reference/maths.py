"""Attention by its definition, forward and backward, over blocks of query rows.

With one block of all rows this is the oracle. `attnhub.backends.sdpa` runs the same lines over small blocks, so that the
scores never take more than a block of memory.

Backward (FlashAttention-2, arXiv 2307.08691, section 2.3.2), per pair with P = exp(s - lse), from any backend's lse::

    dV = (P * keep)^T dO        dP = (dO V^T) * keep        D = rowsum(dO * O) - dlse
    ds = P * (dP - D)           through softcap: ds *= 1 - (s_capped / softcap)^2
    dQ = scale * ds K           dK = scale * ds^T Q         dbias = ds          dsink = -sum_i exp(sink - lse) * D

where ``keep`` is the dropout mask divided by 1 - p.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Optional

import torch
from torch import Tensor

from attnhub import dense
from attnhub.backend import Call, Descale, Gradients, Needs
from attnhub.layouts import empty_out, lse_dtype
from attnhub.philox import keep_mask

NEG_INF = float("-inf")


def forward(
    call: Call, block_rows: Optional[int], dtype: torch.dtype, exact_nan: bool, rounded: Optional[Callable[[Tensor], Tensor]] = None
) -> tuple[Tensor, Optional[Tensor]]:
    """(out, lse). block_rows: None is all rows at once. dtype: of all the maths. exact_nan: also keep NaN and Inf of *masked*
    values out of rows that do not attend to them (padding is always kept out). rounded: what becomes of the weights exp(s - max)
    before they meet v, for those who ask how a kernel's operands would fare; their sum stays as it is."""
    q = call.q
    out = empty_out(q, call.v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=lse_dtype(q.dtype), device=q.device) if call.need_lse else None
    for one, index, q_range, _ in sequences(call):
        if one is None:
            out[:, :, q_range[0] : q_range[1]] = 0
            if lse is not None:
                lse[:, :, q_range[0] : q_range[1]] = _no_key_lse(call)
            continue
        part_out, part_lse = _forward_one(one, index, block_rows, dtype, exact_nan, rounded)
        out[:, :, q_range[0] : q_range[1]] = part_out.to(out.dtype)
        if lse is not None:
            lse[:, :, q_range[0] : q_range[1]] = part_lse
    return out, lse


def backward(
    call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs, block_rows: Optional[int], dtype: torch.dtype
) -> Gradients:
    """Gradients in the inputs' dtypes."""
    totals: dict[str, Optional[Tensor]] = {
        "q": torch.zeros(call.q.shape, dtype=dtype, device=call.q.device),
        "k": torch.zeros(call.k.shape, dtype=dtype, device=call.q.device),
        "v": torch.zeros(call.v.shape, dtype=dtype, device=call.q.device),
        "bias": None if call.mask.bias is None or not needs.bias else torch.zeros(call.mask.bias.shape, dtype=dtype, device=call.q.device),
        "sinks": None if call.sinks is None or not needs.sinks else torch.zeros(call.sinks.shape, dtype=dtype, device=call.q.device),
    }
    for one, index, q_range, k_range in sequences(call):
        rows = slice(*q_range)
        g_lse = None if grad_lse is None else grad_lse[:, :, rows]
        if one is None:
            if totals["sinks"] is not None and g_lse is not None:
                totals["sinks"] += g_lse.to(dtype).sum((0, 2))
            continue
        part = _backward_one(one, index, grad_out[:, :, rows], g_lse, out[:, :, rows], lse[:, :, rows], block_rows, dtype)
        _add_into(totals, part, call, index, q_range, k_range)
    cast = {
        "q": call.q.dtype, "k": call.k.dtype, "v": call.v.dtype, "bias": getattr(call.mask.bias, "dtype", None),
        "sinks": getattr(call.sinks, "dtype", None),
    }  # fmt: skip
    wanted = needs._asdict()
    return Gradients(**{name: total.to(cast[name]) if total is not None and wanted[name] else None for name, total in totals.items()})


def sequences(call: Call) -> Iterator[tuple[Optional[Call], int, tuple[int, int], tuple[int, int]]]:
    """A call as dense ones: (call, index of its first sequence, its range of rows in q, its range of keys in k).

    Packed sequences one by one; rows that belong to none, or to a sequence without keys, come with None. Paged K/V is
    gathered. A packed call reads cu_seqlens on the host.
    """
    if call.block_table is not None:
        _check_pages(call)
    if call.varlen is None:
        k, v = (call.k, call.v) if call.block_table is None else (gather_pages(call.k, call.block_table), gather_pages(call.v, call.block_table))
        one = Call(
            call.q, k, v, call.mask, call.softmax_scale, call.softcap, call.sinks, call.dropout_p, call.rng, need_lse=call.need_lse,
            descale=call.descale,
        )  # fmt: skip
        yield one, 0, (0, call.q.shape[2]), (0, k.shape[2])
        return
    if call.block_table is not None:
        yield from _paged_sequences(call, call.varlen.cu_seqlens_q.tolist(), call.block_table)
        return
    starts_q, starts_k = call.varlen.cu_seqlens_q.tolist(), call.varlen.cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        (q0, q1), (k0, k1) = starts_q[n : n + 2], starts_k[n : n + 2]
        if q0 == q1:
            continue
        if k0 == k1:
            yield None, n, (q0, q1), (k0, k1)
            continue
        yield (
            Call(
                call.q[:, :, q0:q1], call.k[:, :, k0:k1], call.v[:, :, k0:k1], dense.select_sequence(call.mask, n, q1 - q0, k1 - k0),
                call.softmax_scale, call.softcap, call.sinks, call.dropout_p, call.rng, need_lse=call.need_lse,
                descale=None if call.descale is None else Descale(*(None if t is None else t[n : n + 1] for t in call.descale)),
            ),
            n, (q0, q1), (k0, k1),
        )  # fmt: skip
    if starts_q[-1] < call.q.shape[2]:
        yield None, len(starts_q) - 1, (starts_q[-1], call.q.shape[2]), (0, 0)


def _paged_sequences(
    call: Call, starts: list[int], block_table: Tensor
) -> Iterator[tuple[Optional[Call], int, tuple[int, int], tuple[int, int]]]:
    """`sequences` of packed queries over pages."""
    for n, (q0, q1) in enumerate(itertools.pairwise(starts)):
        if q0 == q1:
            continue
        k, v = (gather_pages(t, block_table[n : n + 1]) for t in (call.k, call.v))
        one = Call(
            call.q[:, :, q0:q1], k, v, dense.select_sequence(call.mask, n, q1 - q0, k.shape[2]), call.softmax_scale, call.softcap, call.sinks, call.dropout_p,
            call.rng, need_lse=call.need_lse, descale=None if call.descale is None else Descale(*(None if t is None else t[n : n + 1] for t in call.descale)),
        )  # fmt: skip
        yield one, n, (q0, q1), (0, k.shape[2])
    if starts[-1] < call.q.shape[2]:
        yield None, len(starts) - 1, (starts[-1], call.q.shape[2]), (0, 0)


def _check_pages(call: Call) -> None:
    """Raises ValueError where a page that is used is none. On the host alone: elsewhere it would wait for the device."""
    table, used = call.block_table, call.mask.seqused_k
    assert table is not None
    if not table.is_cpu or used is None:
        return
    pages, _, page_size, _ = call.k.shape
    bad = ((table < 0) | (table >= pages)) & (torch.arange(table.shape[1], device=table.device) * page_size < used[:, None])
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"block_table[{row}, {column}] is {int(table[row, column])} (or cache_batch_idx): the cache has pages 0 to {pages - 1}")


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """[pages, Hk, page_size, D] and [B, max_pages] -> [B, Hk, max_pages * page_size, D], a copy."""
    batch, count = block_table.shape
    _, heads, page_size, dim = pages.shape
    # Entries behind a sequence's length may hold anything: they are never attended to, but the gather must not fault.
    safe = block_table.long().clamp(0, pages.shape[0] - 1)
    return pages[safe].permute(0, 2, 1, 3, 4).reshape(batch, heads, count * page_size, dim)


def _no_key_lse(call: Call) -> Tensor | float:
    return NEG_INF if call.sinks is None else call.sinks[None, :, None]


def _blocks(call: Call, block_rows: Optional[int]) -> Iterator[tuple[int, int]]:
    length = call.q.shape[2]
    step = block_rows or length
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _times_factor(x: Tensor, factor: Optional[Tensor]) -> Tensor:
    """x [B, H, S, D] by factor [B, Hk], one for H // Hk heads."""
    if factor is None:
        return x
    return x * factor.to(x.dtype).repeat_interleave(x.shape[1] // factor.shape[1], 1)[:, :, None, None]


def _clean(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v in the working dtype, zero where a key is padding: what is never read must not matter."""
    k, v = call.k.to(dtype), call.v.to(dtype)
    if call.descale is not None:
        k, v = _times_factor(k, call.descale.k), _times_factor(v, call.descale.v)
    if call.mask.seqused_k is None and call.mask.leftpad is None:
        return k, v
    dense.check_lengths(call.mask, k.shape[2])
    exists = dense.existing_keys(call.mask, k.shape[2], k.device)[:, None, :, None]
    zero = torch.zeros((), dtype=dtype, device=k.device)
    return torch.where(exists, k, zero), torch.where(exists, v, zero)


def _times_keys(rows: Tensor, keys: Tensor) -> Tensor:
    """[B, Hq, R, D] x [B, Hk, Sk, D] -> [B, Hq, R, Sk], the query heads of one K/V head side by side."""
    batch, q_heads, count, dim = rows.shape
    kv_heads = keys.shape[1]
    product = rows.reshape(batch, kv_heads, -1, dim) @ keys.transpose(2, 3)
    return product.view(batch, q_heads, count, keys.shape[2])


def _times_values(weights: Tensor, values: Tensor) -> Tensor:
    """[B, Hq, R, Sk] x [B, Hk, Sk, D] -> [B, Hq, R, D]."""
    batch, q_heads, count, seqlen_k = weights.shape
    product = weights.reshape(batch, values.shape[1], -1, seqlen_k) @ values
    return product.view(batch, q_heads, count, values.shape[3])


def _sum_over_rows(weights: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, R, Sk]^T x [B, Hq, R, D] -> [B, Hk, Sk, D], summed over the query heads of each K/V head."""
    batch, _, _, seqlen_k = weights.shape
    return weights.reshape(batch, kv_heads, -1, seqlen_k).transpose(2, 3) @ rows.reshape(batch, kv_heads, -1, rows.shape[3])


def _scores(call: Call, q: Tensor, k: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(scores with -inf where masked, allowed pairs, soft-capped scores before bias) of a block of rows."""
    batch, q_heads, seqlen_q, _ = call.q.shape
    seqlen_k = k.shape[2]
    scores = _times_keys(q, k) * call.softmax_scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    capped = scores
    bias = dense.added_bias(call.mask, q_heads, seqlen_q, seqlen_k, rows, q.device, q.dtype)
    if bias is not None:
        scores = scores + bias
    allowed = dense.allowed_pairs(call.mask, batch, seqlen_q, seqlen_k, rows, q.device)
    return torch.where(allowed, scores, NEG_INF), allowed, capped


def _keep(call: Call, index: int, rows: tuple[int, int], seqlen_k: int, dtype: torch.dtype) -> Optional[Tensor]:
    if not call.dropout_p:
        return None
    assert call.rng is not None
    kept = keep_mask(call.rng, call.dropout_p, call.q.shape[0], call.q.shape[1], rows, seqlen_k, index)
    return kept.to(dtype) / (1.0 - call.dropout_p)


def _forward_one(
    call: Call, index: int, block_rows: Optional[int], dtype: torch.dtype, exact_nan: bool, rounded: Optional[Callable[[Tensor], Tensor]]
) -> tuple[Tensor, Tensor]:
    k, v = _clean(call, dtype)
    odd = ~torch.isfinite(v) if exact_nan else None
    if odd is not None and not odd.any():
        odd = None
    outs, lses = [], []
    for rows in _blocks(call, block_rows):
        q = _times_factor(call.q[:, :, rows[0] : rows[1]].to(dtype), None if call.descale is None else call.descale.q)
        scores, allowed, _ = _scores(call, q, k, rows)
        top = scores.amax(-1, keepdim=True)
        if call.sinks is not None:
            top = torch.maximum(top, call.sinks.to(dtype).reshape(1, -1, 1, 1))
        top = torch.where(top == NEG_INF, torch.zeros_like(top), top)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        if call.sinks is not None:
            total = total + torch.exp(call.sinks.to(dtype).reshape(1, -1, 1, 1) - top)
        if rounded is not None:
            weights = rounded(weights)
        empty = total == 0
        lses.append(torch.where(empty, NEG_INF, torch.log(total) + top).squeeze(-1))
        probabilities = weights / torch.where(empty, torch.ones_like(total), total)
        keep = _keep(call, index, rows, k.shape[2], dtype)
        if keep is not None:
            probabilities = probabilities * keep
        if odd is None:
            outs.append(_times_values(probabilities, v))
        else:
            # 0 * NaN is NaN: multiply by cleaned values, then give back NaN and Inf to the rows that attend to them.
            clean = _times_values(probabilities, torch.where(odd, torch.zeros_like(v), v))
            attends = allowed.expand_as(probabilities).to(dtype)
            outs.append(torch.where(_times_values(attends, odd.to(dtype)) > 0, _times_values(probabilities, v), clean))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _backward_one(
    call: Call, index: int, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, block_rows: Optional[int], dtype: torch.dtype
) -> dict[str, Optional[Tensor]]:
    k, v = _clean(call, dtype)
    # A non-finite key makes the scores of the rows that attend to it non-finite; to the others it is a zero weight, and must not be 0 * NaN.
    finite_k = torch.where(torch.isfinite(k), k, torch.zeros_like(k))
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    dbias: Optional[list[Tensor]] = [] if call.mask.bias is not None else None
    dsinks = torch.zeros(call.q.shape[1], dtype=dtype, device=k.device) if call.sinks is not None else None
    for rows in _blocks(call, block_rows):
        here = slice(*rows)
        q = call.q[:, :, here].to(dtype)
        d_out = grad_out[:, :, here].to(dtype)
        row_lse = lse[:, :, here, None].to(dtype)
        scores, allowed, capped = _scores(call, q, k, rows)
        # A row without keys has lse -inf (or its sink alone): every score is -inf, and exp(-inf - finite) is the 0 we want.
        probabilities = torch.exp(scores - torch.where(row_lse == NEG_INF, torch.zeros_like(row_lse), row_lse))
        delta = (d_out * out[:, :, here].to(dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - torch.where(row_lse == NEG_INF, torch.zeros_like(row_lse), grad_lse[:, :, here, None].to(dtype))
        d_probabilities = _times_keys(d_out, v)
        keep = _keep(call, index, rows, k.shape[2], dtype)
        if keep is None:
            dv += _sum_over_rows(probabilities, d_out, k.shape[1])
        else:
            dv += _sum_over_rows(probabilities * keep, d_out, k.shape[1])
            d_probabilities = d_probabilities * keep
        d_scores = torch.where(allowed, probabilities * (d_probabilities - delta), 0.0)
        if dbias is not None:
            dbias.append(d_scores)
        if dsinks is not None:
            assert call.sinks is not None
            # A sink of -inf on a row without keys: lse is -inf too, and the sink has no share.
            share = torch.where(row_lse == NEG_INF, 0.0, torch.exp(call.sinks.to(dtype).reshape(1, -1, 1, 1) - row_lse))
            dsinks -= (share * delta).sum((0, 2, 3))
        if call.softcap:
            d_scores = torch.where(allowed, d_scores * (1.0 - (capped / call.softcap) ** 2), 0.0)
        d_scores = d_scores * call.softmax_scale
        dq.append(_times_values(d_scores, finite_k))
        dk += _sum_over_rows(d_scores, q, k.shape[1])
    return {"q": torch.cat(dq, 2), "k": dk, "v": dv, "bias": None if dbias is None else torch.cat(dbias, 2), "sinks": dsinks}


def _add_into(
    totals: dict[str, Optional[Tensor]], part: dict[str, Optional[Tensor]], call: Call, index: int, q_range: tuple[int, int], k_range: tuple[int, int]
) -> None:
    q, k, v, bias, sinks = (totals[name] for name in ("q", "k", "v", "bias", "sinks"))
    assert q is not None and k is not None and v is not None and part["q"] is not None and part["k"] is not None and part["v"] is not None
    q[:, :, slice(*q_range)] += part["q"]
    if call.block_table is None:
        k[:, :, slice(*k_range)] += part["k"]
        v[:, :, slice(*k_range)] += part["v"]
    else:
        for total, grad in ((k, part["k"]), (v, part["v"])):
            _scatter_pages(total, grad, call.block_table if call.varlen is None else call.block_table[index : index + 1])
    if bias is not None and part["bias"] is not None:
        if call.varlen is not None:
            into = bias[index : index + 1] if bias.shape[0] > 1 else bias
            length_q, length_k = part["bias"].shape[2:]
            into = into if into.shape[2] == 1 else into[:, :, :length_q]
            into = into if into.shape[3] == 1 else into[..., :length_k]
            into += part["bias"].sum_to_size(into.shape)
        else:
            bias += part["bias"].sum_to_size(bias.shape)
    if sinks is not None and part["sinks"] is not None:
        sinks += part["sinks"]


def _scatter_pages(total: Tensor, grad: Tensor, block_table: Tensor) -> None:
    batch, count = block_table.shape
    _, heads, page_size, dim = total.shape
    pages = grad.reshape(batch, heads, count, page_size, dim).permute(0, 2, 1, 3, 4).reshape(batch * count, heads, page_size, dim)
    total.index_add_(0, block_table.long().clamp(0, total.shape[0] - 1).flatten(), pages)
