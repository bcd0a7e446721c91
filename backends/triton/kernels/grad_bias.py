"""The gradient of a bias: dS, summed over everything that the bias broadcasts over.

One program owns a tile of the gradient and walks through all tiles of pairs that the tile was added to, in a fixed order: no
atomics, results repeat bitwise. Scores are computed once more, as in `kernels.backward`.
"""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, SIM108, PLW2901
from __future__ import annotations

import triton
import triton.language as tl

from attnhub.backends.triton.kernels.backward import RUNTIME
from attnhub.backends.triton.kernels.dropout import kept_by_dropout
from attnhub.backends.triton.kernels.forward import key_block, query_block
from attnhub.backends.triton.kernels.mask import keep_pairs, key_range
from attnhub.backends.triton.kernels.tile import INF, add_bias, dot, head_pointer, load_tile, power, tanh
from attnhub.backends.triton.kernels.tile_map import listed_range, listed_token


@triton.jit(do_not_specialize=RUNTIME)
def grad_bias_kernel(
    q, k, v, grad_out, lse, delta, grad_bias, scale, softmax_scale, softcap,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride_s,
    grad_bias_stride_b, grad_bias_stride_h, grad_bias_stride_q, grad_bias_stride_k,
    cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k, left, right, chunk,
    segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
    bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b,
    rng, drop_below, keep_scale, tile_map, tile_map_stride_b, tile_map_stride_h, tile_count,
    sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_B: tl.constexpr, ONE_H: tl.constexpr, ONE_Q: tl.constexpr, ONE_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
    LEFT_PHASE: tl.constexpr, MASK_ALL: tl.constexpr, MASK_VALUES: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SPARSE_Q: tl.constexpr, SPARSE_K: tl.constexpr,
):  # fmt: skip
    """grad_bias, of the bias' own shape: ONE_B, ONE_H, ONE_Q, ONE_K say which of its dimensions have size 1.

    Grid: the product over b, h, row blocks and key blocks, each 1 where the bias has size 1. It takes what all backward kernels take;
    a bias means NATURAL and MASK_ALL.
    """
    row_blocks = 1 if ONE_Q else tl.cdiv(max_q, BLOCK_M)
    key_blocks = 1 if ONE_K else tl.cdiv(max_k, BLOCK_N)
    bias_heads: tl.constexpr = 1 if ONE_H else Q_HEADS
    pid = tl.program_id(0)
    key_first = pid % key_blocks * BLOCK_N
    row_first = pid // key_blocks % row_blocks * BLOCK_M
    bias_h = pid // key_blocks // row_blocks % bias_heads
    bias_b = pid // key_blocks // row_blocks // bias_heads
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    if REST_D > 0:
        rest_dims = BLOCK_D + tl.arange(0, REST_D)
    if REST_DV > 0:
        rest_v_dims = BLOCK_DV + tl.arange(0, REST_DV)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in tl.range(bias_b, sequences if ONE_B else bias_b + 1):
        first_q, len_q, memory_b = query_block(cu_q, b, max_q, tokens_q, sequences)
        first_k, len_k, _, lowest, memory_bk = key_block(cu_k, seqused_k, leftpad, b, max_k)
        if TOP_LEFT:
            shift = 0
        else:
            shift = len_k - len_q
        prefix_len = 0
        if prefix is not None:
            prefix_len = tl.load(prefix + b)
        for h in tl.range(bias_h, Q_HEADS if ONE_H else bias_h + 1):
            kv_head = h // GROUP
            q_base = head_pointer(q, memory_b, h, first_q, q_stride_b, q_stride_h, q_stride_s)
            do_base = head_pointer(grad_out, memory_b, h, first_q, grad_out_stride_b, grad_out_stride_h, grad_out_stride_s)
            k_base = head_pointer(k, memory_bk, kv_head, first_k, k_stride_b, k_stride_h, k_stride_s)
            v_base = head_pointer(v, memory_bk, kv_head, first_k, v_stride_b, v_stride_h, v_stride_s)
            row_base = (tl.cast(memory_b, tl.int64) * Q_HEADS + h) * tokens_q + first_q
            for row in tl.range(row_first, len_q if ONE_Q else tl.minimum(row_first + 1, len_q), BLOCK_M):
                i = row + rows
                p = i + shift
                row_ok = i < len_q
                q_pointers = q_base + (i.to(tl.int64) * q_stride_s)[:, None]
                do_pointers = do_base + (i.to(tl.int64) * grad_out_stride_s)[:, None]
                q_tile = load_tile(q_pointers + dims[None, :], row_ok, dims < HEAD_DIM, True, BLOCK_D > HEAD_DIM)
                do_tile = load_tile(do_pointers + v_dims[None, :], row_ok, v_dims < V_HEAD_DIM, True, BLOCK_DV > V_HEAD_DIM)
                if REST_D > 0:
                    q_rest = load_tile(q_pointers + rest_dims[None, :], row_ok, rest_dims < HEAD_DIM, True, BLOCK_D + REST_D > HEAD_DIM)
                if REST_DV > 0:
                    do_rest = load_tile(do_pointers + rest_v_dims[None, :], row_ok, rest_v_dims < V_HEAD_DIM, True, BLOCK_DV + REST_DV > V_HEAD_DIM)
                row_lse = tl.load(lse + row_base + i, mask=row_ok, other=INF)
                row_lse = tl.where(row_lse == -INF, INF, row_lse)
                row_delta = tl.load(delta + row_base + i, mask=row_ok, other=0.0)
                position_last = tl.minimum(row + BLOCK_M, len_q) - 1 + shift
                lo, _, _, hi = key_range(
                    row + shift, position_last, len_k, lowest, left, right, chunk, prefix_len, LEFT, RIGHT, CHUNK, CAUSAL and blocks_q is None
                )
                start = tl.maximum(lo, 0) // BLOCK_N * BLOCK_N
                stop = hi
                if not ONE_K:
                    stop = tl.where((key_first < hi) & (key_first >= start), key_first + 1, key_first)
                    start = key_first
                listed = tile_map
                if tile_map is not None:
                    listed += tl.cast(b, tl.int64) * tile_map_stride_b + tl.cast(h, tl.int64) * tile_map_stride_h
                    listed += tl.cast(row // BLOCK_M, tl.int64) * 2 * (tile_count + 1)
                    start, _, _, stop = listed_range(listed, tile_count, start, start, start, stop, BLOCK_N)
                for n in tl.range(start, stop, BLOCK_N if tile_map is None else 1):
                    if tile_map is not None:
                        n = listed_token(listed, n, BLOCK_N, BLOCK_N)
                    j = n + columns
                    column_ok = (j < len_k) & (j >= lowest)
                    k_pointers = k_base + (j.to(tl.int64) * k_stride_s)[:, None]
                    v_pointers = v_base + (j.to(tl.int64) * v_stride_s)[:, None]
                    k_tile = load_tile(k_pointers + dims[None, :], column_ok, dims < HEAD_DIM, True, BLOCK_D > HEAD_DIM)
                    v_tile = load_tile(v_pointers + v_dims[None, :], column_ok, v_dims < V_HEAD_DIM, True, BLOCK_DV > V_HEAD_DIM)
                    s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION, UPCAST)
                    if REST_D > 0:
                        k_rest = load_tile(k_pointers + rest_dims[None, :], column_ok, rest_dims < HEAD_DIM, True, BLOCK_D + REST_D > HEAD_DIM)
                        s = dot(q_rest, tl.trans(k_rest), s, PRECISION, UPCAST)
                    if SOFTCAP:
                        s = softcap * tanh(s * (scale / softcap))
                    else:
                        s = s * scale
                    s = add_bias(
                        s, b, h, i[:, None], j[None, :], p[:, None], len_q, len_k,
                        bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b, True,
                    )  # fmt: skip
                    dp = dot(do_tile, tl.trans(v_tile), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION, UPCAST)
                    if REST_DV > 0:
                        v_rest = load_tile(v_pointers + rest_v_dims[None, :], column_ok, rest_v_dims < V_HEAD_DIM, True, BLOCK_DV + REST_DV > V_HEAD_DIM)
                        dp = dot(do_rest, tl.trans(v_rest), dp, PRECISION, UPCAST)
                    if rng is not None:
                        kept = kept_by_dropout(rng, drop_below, b, h, i[:, None], n, Q_HEADS, BLOCK_N, False)
                        dp = tl.where(kept, dp * keep_scale, 0.0)
                    ds = power(s - row_lse[:, None], True) * (dp - row_delta[:, None])
                    keep = keep_pairs(
                        b, h, i[:, None], j[None, :], p[:, None], len_q, len_k, lowest, left, right, chunk, prefix_len,
                        segments_q, segments_k, segments_q_stride, segments_k_stride,
                        blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
                        bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
                        sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q, SPARSE_Q, SPARSE_K, LEFT, RIGHT, CHUNK, CAUSAL,
                    )  # fmt: skip
                    total += tl.where(keep & (s != -INF), ds, 0.0)

    base = grad_bias + tl.cast(bias_b, tl.int64) * grad_bias_stride_b + tl.cast(bias_h, tl.int64) * grad_bias_stride_h
    i = row_first + rows
    j = key_first + columns
    row_offsets = i.to(tl.int64) * grad_bias_stride_q
    key_offsets = j.to(tl.int64) * grad_bias_stride_k
    dtype: tl.constexpr = grad_bias.dtype.element_ty
    if ONE_Q and ONE_K:
        tl.store(base, tl.sum(tl.sum(total, 1), 0).to(dtype))
    elif ONE_Q:
        tl.store(base + key_offsets, tl.sum(total, 0).to(dtype), mask=j < max_k)
    elif ONE_K:
        tl.store(base + row_offsets, tl.sum(total, 1).to(dtype), mask=i < max_q)
    else:
        tl.store(base + row_offsets[:, None] + key_offsets[None, :], total.to(dtype), mask=(i < max_q)[:, None] & (j < max_k)[None, :])
