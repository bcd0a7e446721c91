"""Combination of partial results over disjoint sets of keys: the exact softmax merge, in fp32."""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from attnhub.backends.triton.kernels.tile import INF, LN_2, power


@triton.jit(do_not_specialize=["rows", "splits", "tokens_q"])
def combine_kernel(
    partial_out, partial_lse, out, lse, sinks, out_stride_b, out_stride_h, out_stride_s, rows, splits, tokens_q,
    Q_HEADS: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out and lse from partial_out [splits, rows, Dv] and partial_lse [splits, rows], both fp32; rows are [B, Hq, Sq]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_DV)
    row_ok = row < rows
    ok = row_ok[:, None] & (dims[None, :] < V_HEAD_DIM)
    h = row // tokens_q % Q_HEADS
    m = tl.full((BLOCK_R,), -INF, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_DV), tl.float32)
    for split in tl.range(0, splits):
        base = tl.cast(split, tl.int64) * rows
        part = tl.load(partial_lse + base + row, mask=row_ok, other=-INF)
        value = tl.load(partial_out + (base + row)[:, None] * V_HEAD_DIM + dims[None, :], mask=ok, other=0.0)
        m_new = tl.maximum(m, part)
        m_used = tl.where(m_new == -INF, 0.0, m_new)
        shrink = power(m - m_used, True)
        weight = power(part - m_used, True)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + value * weight[:, None]
        m = m_new
    if sinks is not None:
        sink = tl.load(sinks + h, mask=row_ok, other=0.0)
        m_new = tl.maximum(m, sink)
        m_used = tl.where(m_new == -INF, 0.0, m_new)
        shrink = power(m - m_used, True)
        total = total * shrink + power(sink - m_used, True)
        acc = acc * shrink[:, None]
        m = m_new
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    pointers = row // tokens_q // Q_HEADS * out_stride_b + h * out_stride_h + row % tokens_q * out_stride_s
    tl.store(out + pointers[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=ok)
    if lse is not None:
        tl.store(lse + row, tl.where(empty, -INF, m + tl.log2(tl.where(empty, 1.0, total)) * LN_2), mask=row_ok)
