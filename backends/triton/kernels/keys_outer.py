"""The first FlashAttention schedule (arXiv 2205.14135, algorithm 1), kept to be measured beside `kernels.forward`: nothing chooses it.

The outer loop goes over blocks of keys, the inner one over blocks of query rows, whose output, running maximum and running
sum are read from memory, rescaled and written back for every block of keys. Only batch and heads are parallel.
"""

# Triton compiles this Python: constants are upper case.
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from attnhub.backends.triton.kernels.tile import INF, LOG2_E, dot, head_pointer, load_tile


@triton.jit
def keys_outer_kernel(
    q, k, v, out, running_out, running_max, running_sum, scale, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [B * H, Sq, D] of one head; all tensors are contiguous. The grid is (B * H).

    running_out [B * H, Sq, D] in fp32 (out itself for fp32), running_max and running_sum [B * H, Sq] in fp32 start with any
    values. scale is softmax_scale. CAUSAL needs seqlen_q == seqlen_k.
    """
    head = tl.program_id(0)
    q = head_pointer(q, 0, head, 0, 0, seqlen_q * HEAD_DIM, HEAD_DIM)
    k = head_pointer(k, 0, head, 0, 0, seqlen_k * HEAD_DIM, HEAD_DIM)
    v = head_pointer(v, 0, head, 0, 0, seqlen_k * HEAD_DIM, HEAD_DIM)
    out = head_pointer(out, 0, head, 0, 0, seqlen_q * HEAD_DIM, HEAD_DIM)
    running_out = head_pointer(running_out, 0, head, 0, 0, seqlen_q * HEAD_DIM, HEAD_DIM)
    running_max = head_pointer(running_max, 0, head, 0, 0, seqlen_q, 1)
    running_sum = head_pointer(running_sum, 0, head, 0, 0, seqlen_q, 1)
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    for n in tl.range(0, seqlen_k, BLOCK_N, num_stages=1):
        columns = n + tl.arange(0, BLOCK_N)
        column_ok = columns < seqlen_k
        key_offsets = columns.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
        k_tile = load_tile(k + key_offsets, column_ok, dim_ok, True, BLOCK_D != HEAD_DIM)
        v_tile = load_tile(v + key_offsets, column_ok, dim_ok, True, BLOCK_D != HEAD_DIM)
        first_row = 0
        if CAUSAL:
            first_row = n // BLOCK_M * BLOCK_M
        for start in tl.range(first_row, seqlen_q, BLOCK_M, num_stages=1):
            rows = start + tl.arange(0, BLOCK_M)
            row_ok = rows < seqlen_q
            offsets = rows.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
            ok = row_ok[:, None] & dim_ok[None, :]
            q_tile = load_tile(q + offsets, row_ok, dim_ok, True, BLOCK_D != HEAD_DIM)
            s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION, UPCAST) * (scale * LOG2_E)
            keep = column_ok[None, :]
            if CAUSAL:
                keep = keep & (columns[None, :] <= rows[:, None])
            s = tl.where(keep, s, -INF)
            # Nothing has been written before the first block of keys.
            known = row_ok & (n > 0)
            m = tl.load(running_max + rows, mask=known, other=-INF)
            total = tl.load(running_sum + rows, mask=known, other=0.0)
            before = tl.load(running_out + offsets, mask=ok & (n > 0), other=0.0)
            # The first block of keys holds key 0, which every row meets: the maximum is finite from then on.
            m_new = tl.maximum(m, tl.max(s, 1))
            weights = tl.exp2(s - m_new[:, None])
            kept = total * tl.exp2(m - m_new)
            total_new = kept + tl.sum(weights, 1)
            after = dot(weights.to(v_tile.dtype), v_tile, before * kept[:, None], PRECISION, UPCAST) / total_new[:, None]
            last = n + BLOCK_N >= seqlen_k
            if CAUSAL:
                last = last | (n + BLOCK_N >= start + BLOCK_M)
            if last:
                tl.store(out + offsets, after.to(out.dtype.element_ty), mask=ok)
            else:
                tl.store(running_out + offsets, after, mask=ok)
                tl.store(running_max + rows, m_new, mask=row_ok)
                tl.store(running_sum + rows, total_new, mask=row_ok)
        # What a thread has written others read in the next turn.
        tl.debug_barrier()
