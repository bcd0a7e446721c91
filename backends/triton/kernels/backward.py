"""Backward (arXiv 2307.08691, section 3.1.2): row sums first, then dK/dV by blocks of keys and dQ by blocks of queries.

Every gradient element is summed by one program in a fixed order: no atomics, results repeat bitwise. The heads of a group
that share a K/V head are summed inside the dK/dV program. P is recomputed from lse, so out and lse may come from any backend.
"""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, N806, SIM102, SIM108, PLW2901
from __future__ import annotations

import triton
import triton.language as tl

from attnhub.backends.triton.kernels.dropout import kept_by_dropout
from attnhub.backends.triton.kernels.forward import key_block, query_block
from attnhub.backends.triton.kernels.mask import align_range, keep_pairs, key_range, query_range
from attnhub.backends.triton.kernels.tile import (
    CAREFUL,
    INF,
    LOG2_E,
    add_bias,
    any_nonfinite,
    dot,
    dot_kept,
    head_pointer,
    load_tile,
    power,
    store_tile,
    tanh,
)
from attnhub.backends.triton.kernels.tile_map import listed_range, listed_token

RUNTIME = [
    "scale", "softmax_scale", "softcap", "sequences", "max_q", "max_k", "tokens_q", "tokens_k", "left", "right", "chunk", "drop_below", "keep_scale",
    "tile_map_stride_b", "tile_map_stride_h", "tile_count",
]  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens_q"])
def delta_kernel(
    out, grad_out, grad_lse, delta, out_stride_b, out_stride_h, out_stride_s, grad_stride_b, grad_stride_h, grad_stride_s,
    rows, tokens_q, Q_HEADS: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(grad_out * out) - grad_lse, fp32 [B, Hq, Sq]: what each row's dP is measured against."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_DV)
    row_ok = row < rows
    ok = row_ok[:, None] & (dims[None, :] < V_HEAD_DIM)
    b = row // tokens_q // Q_HEADS
    h = row // tokens_q % Q_HEADS
    i = row % tokens_q
    o = tl.load(out + (b * out_stride_b + h * out_stride_h + i * out_stride_s)[:, None] + dims[None, :], mask=ok, other=0.0)
    do = tl.load(grad_out + (b * grad_stride_b + h * grad_stride_h + i * grad_stride_s)[:, None] + dims[None, :], mask=ok, other=0.0)
    value = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        value -= tl.load(grad_lse + row, mask=row_ok, other=0.0)
    tl.store(delta + row, value, mask=row_ok)


@triton.jit(do_not_specialize=RUNTIME)
def grad_kv_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, scale, softmax_scale, softcap,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride_s,
    grad_k_stride_b, grad_k_stride_h, grad_k_stride_s, grad_v_stride_b, grad_v_stride_h, grad_v_stride_s,
    cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k, left, right, chunk,
    segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
    bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b,
    rng, drop_below, keep_scale, tile_map, tile_map_stride_b, tile_map_stride_h, tile_count,
    sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
    LEFT_PHASE: tl.constexpr, MASK_ALL: tl.constexpr, MASK_VALUES: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    SPARSE_Q: tl.constexpr, SPARSE_K: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v of one block of BLOCK_N keys of one K/V head. Grid: sequences (+ 1 if packed) * K/V heads * key blocks."""
    KV_HEADS: tl.constexpr = Q_HEADS // GROUP
    key_blocks = tl.cdiv(max_k, BLOCK_N)
    pid = tl.program_id(0)
    block = pid % key_blocks
    kv_head = pid // key_blocks % KV_HEADS
    b = pid // key_blocks // KV_HEADS
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    if REST_D > 0:
        rest_dims = BLOCK_D + tl.arange(0, REST_D)
    if REST_DV > 0:
        rest_v_dims = BLOCK_DV + tl.arange(0, REST_DV)
    if cu_k is not None:
        if b == sequences:
            # Tokens behind the last sequence belong to none.
            behind = tl.load(cu_k + b)
            for start in tl.range(behind + block * BLOCK_N, tokens_k, key_blocks * BLOCK_N):
                token = start + columns
                k_rows = grad_k + (tl.cast(kv_head, tl.int64) * grad_k_stride_h + token.to(tl.int64) * grad_k_stride_s)[:, None]
                v_rows = grad_v + (tl.cast(kv_head, tl.int64) * grad_v_stride_h + token.to(tl.int64) * grad_v_stride_s)[:, None]
                ok = token < tokens_k
                store_tile(k_rows + dims[None, :], tl.zeros((BLOCK_N, BLOCK_D), tl.float32), ok, dims < HEAD_DIM)
                store_tile(v_rows + v_dims[None, :], tl.zeros((BLOCK_N, BLOCK_DV), tl.float32), ok, v_dims < V_HEAD_DIM)
                if REST_D > 0:
                    store_tile(k_rows + rest_dims[None, :], tl.zeros((BLOCK_N, REST_D), tl.float32), ok, rest_dims < HEAD_DIM)
                if REST_DV > 0:
                    store_tile(v_rows + rest_v_dims[None, :], tl.zeros((BLOCK_N, REST_DV), tl.float32), ok, rest_v_dims < V_HEAD_DIM)
            return
    first_k, len_k, room, lowest, memory_bk = key_block(cu_k, seqused_k, leftpad, b, max_k)
    if block * BLOCK_N >= room:
        return
    first_q, len_q, memory_b = query_block(cu_q, b, max_q, tokens_q, sequences)
    if TOP_LEFT:
        shift = 0
    else:
        shift = len_k - len_q
    prefix_len = 0
    if prefix is not None:
        prefix_len = tl.load(prefix + b)

    j = block * BLOCK_N + columns
    column_ok = (j < len_k) & (j >= lowest)
    k_rows = (first_k + j).to(tl.int64) * k_stride_s
    v_rows = (first_k + j).to(tl.int64) * v_stride_s
    k_base = head_pointer(k, memory_bk, kv_head, 0, k_stride_b, k_stride_h, k_stride_s)
    v_base = head_pointer(v, memory_bk, kv_head, 0, v_stride_b, v_stride_h, v_stride_s)
    k_tile = load_tile(k_base + k_rows[:, None] + dims[None, :], column_ok, dims < HEAD_DIM, True, BLOCK_D > HEAD_DIM)
    v_tile = load_tile(v_base + v_rows[:, None] + v_dims[None, :], column_ok, v_dims < V_HEAD_DIM, True, BLOCK_DV > V_HEAD_DIM)
    if REST_D > 0:
        k_rest = load_tile(k_base + k_rows[:, None] + rest_dims[None, :], column_ok, rest_dims < HEAD_DIM, True, BLOCK_D + REST_D > HEAD_DIM)
    if REST_DV > 0:
        v_rest = load_tile(v_base + v_rows[:, None] + rest_v_dims[None, :], column_ok, rest_v_dims < V_HEAD_DIM, True, BLOCK_DV + REST_DV > V_HEAD_DIM)

    key_first = block * BLOCK_N
    key_last = tl.minimum(key_first + BLOCK_N, len_k) - 1
    lo, full_lo, full_hi, hi = query_range(
        key_first, key_last, len_q, shift, left, right, chunk, prefix_len, LEFT, RIGHT, CHUNK, CAUSAL and blocks_q is None
    )
    # A block that holds no key at all, or padding, has no full tile.
    hi = tl.where((key_first < len_k) & (key_first + BLOCK_N > lowest), hi, 0)
    full_hi = tl.where(key_first >= lowest, full_hi, 0)
    lo, full_lo, full_hi, hi = align_range(lo, full_lo, full_hi, hi, BLOCK_M, MASK_ALL)
    full_hi = tl.maximum(tl.minimum(full_hi, hi // BLOCK_M * BLOCK_M), full_lo)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    if REST_D > 0:
        dk_rest = tl.zeros((BLOCK_N, REST_D), tl.float32)
    if REST_DV > 0:
        dv_rest = tl.zeros((BLOCK_N, REST_DV), tl.float32)
    # A second attempt, with products that keep masked values apart, if a NaN or infinity has shown up in the first.
    for attempt in tl.static_range(0, 2 if MASK_VALUES else 1):
        rows = tl.arange(0, CAREFUL if attempt == 1 else BLOCK_M)
        offset_rows = rows.to(tl.int64) if WIDE else rows
        q_offsets = offset_rows[:, None] * q_stride_s + dims[None, :]
        do_offsets = offset_rows[:, None] * grad_out_stride_s + v_dims[None, :]
        if REST_D > 0:
            q_rest_offsets = offset_rows[:, None] * q_stride_s + rest_dims[None, :]
        if REST_DV > 0:
            do_rest_offsets = offset_rows[:, None] * grad_out_stride_s + rest_v_dims[None, :]
        heads = GROUP
        if attempt == 1:
            bad = any_nonfinite(tl.where(column_ok[:, None], dk, 0.0)) | any_nonfinite(tl.where(column_ok[:, None], dv, 0.0))
            if REST_D > 0:
                bad = bad | any_nonfinite(tl.where(column_ok[:, None], dk_rest, 0.0))
            if REST_DV > 0:
                bad = bad | any_nonfinite(tl.where(column_ok[:, None], dv_rest, 0.0))
            heads = tl.where(bad, GROUP, 0)
            dk = tl.where(bad, 0.0, dk)
            dv = tl.where(bad, 0.0, dv)
            if REST_D > 0:
                dk_rest = tl.where(bad, 0.0, dk_rest)
            if REST_DV > 0:
                dv_rest = tl.where(bad, 0.0, dv_rest)
        for g in tl.range(0, heads):
            h = kv_head * GROUP + g
            q_base = head_pointer(q, memory_b, h, first_q, q_stride_b, q_stride_h, q_stride_s)
            do_base = head_pointer(grad_out, memory_b, h, first_q, grad_out_stride_b, grad_out_stride_h, grad_out_stride_s)
            row_base = (tl.cast(memory_b, tl.int64) * Q_HEADS + h) * tokens_q + first_q
            listed = tile_map
            a, full_a, full_z, z = lo, full_lo, full_hi, hi
            if tile_map is not None:
                listed += tl.cast(b, tl.int64) * tile_map_stride_b + tl.cast(h, tl.int64) * tile_map_stride_h
                listed += tl.cast(block, tl.int64) * 2 * (tile_count + 1)
                a, full_a, full_z, z = listed_range(listed, tile_count, lo, full_lo, full_hi, hi, BLOCK_M)
            for phase in tl.static_range(0, 1 if attempt == 1 else 3):
                if phase == 0:
                    start = a
                    stop = z if attempt == 1 else full_a
                elif phase == 1:
                    start = full_a
                    stop = full_z
                else:
                    start = full_z
                    stop = z
                if tile_map is not None and attempt == 1:
                    start *= BLOCK_M // CAREFUL
                    stop *= BLOCK_M // CAREFUL
                if attempt == 1 or phase == 2 or not MASK_ALL:
                    for start_m in tl.range(start, stop, 1 if tile_map is not None else CAREFUL if attempt == 1 else BLOCK_M):
                        if tile_map is not None:
                            start_m = listed_token(listed, start_m, BLOCK_M, CAREFUL if attempt == 1 else BLOCK_M)
                        start_m = tl.multiple_of(start_m, CAREFUL if attempt == 1 else BLOCK_M)
                        i = start_m + rows
                        p = i + shift
                        row_ok = i < len_q
                        q_pointers = q_base + tl.cast(start_m, tl.int64) * q_stride_s + q_offsets
                        q_tile = load_tile(q_pointers, row_ok, dims < HEAD_DIM, phase != 1, BLOCK_D > HEAD_DIM)
                        # Rows without keys, and rows that do not exist, have P = 0.
                        row_lse = tl.load(lse + row_base + i, mask=row_ok, other=INF)
                        row_lse = tl.where(row_lse == -INF, INF, row_lse) * (1.0 if NATURAL else LOG2_E)
                        s = dot(k_tile, tl.trans(q_tile), tl.zeros((BLOCK_N, CAREFUL if attempt == 1 else BLOCK_M), tl.float32), PRECISION, UPCAST)
                        if REST_D > 0:
                            q_rest_pointers = q_base + tl.cast(start_m, tl.int64) * q_stride_s + q_rest_offsets
                            q_rest = load_tile(q_rest_pointers, row_ok, rest_dims < HEAD_DIM, phase != 1, BLOCK_D + REST_D > HEAD_DIM)
                            s = dot(k_rest, tl.trans(q_rest), s, PRECISION, UPCAST)
                        slope = 1.0
                        if SOFTCAP:
                            capped = tanh(s * (scale / softcap))
                            slope = 1.0 - capped * capped
                            s = softcap * (1.0 if NATURAL else LOG2_E) * capped
                        else:
                            s = s * scale
                        s = add_bias(
                            s, b, h, i[None, :], j[:, None], p[None, :], len_q, len_k,
                            bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b, NATURAL,
                        )  # fmt: skip
                        weights = power(s - row_lse[None, :], NATURAL)
                        if phase != 1:
                            keep = keep_pairs(
                                b, h, i[None, :], j[:, None], p[None, :], len_q, len_k, lowest, left, right, chunk, prefix_len,
                                segments_q, segments_k, segments_q_stride, segments_k_stride,
                                blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
                                bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
                                sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q, SPARSE_Q, SPARSE_K, LEFT, RIGHT, CHUNK, CAUSAL,
                            )  # fmt: skip
                            if bias is not None:
                                keep = keep & (s != -INF)
                            weights = tl.where(keep, weights, 0.0)
                        do_pointers = do_base + tl.cast(start_m, tl.int64) * grad_out_stride_s + do_offsets
                        do_tile = load_tile(do_pointers, row_ok, v_dims < V_HEAD_DIM, phase != 1, BLOCK_DV > V_HEAD_DIM)
                        dp = dot(v_tile, tl.trans(do_tile), tl.zeros((BLOCK_N, CAREFUL if attempt == 1 else BLOCK_M), tl.float32), PRECISION, UPCAST)
                        if REST_DV > 0:
                            do_rest_pointers = do_base + tl.cast(start_m, tl.int64) * grad_out_stride_s + do_rest_offsets
                            do_rest = load_tile(do_rest_pointers, row_ok, rest_v_dims < V_HEAD_DIM, phase != 1, BLOCK_DV + REST_DV > V_HEAD_DIM)
                            dp = dot(v_rest, tl.trans(do_rest), dp, PRECISION, UPCAST)
                        row_delta = tl.load(delta + row_base + i, mask=row_ok, other=0.0)
                        used = weights
                        if rng is not None:
                            kept = kept_by_dropout(rng, drop_below, b, h, i[None, :], key_first, Q_HEADS, BLOCK_N, True)
                            used = tl.where(kept, weights, 0.0)
                            dp = tl.where(kept, dp * keep_scale, 0.0)
                        ds = weights * (dp - row_delta[None, :]) * slope
                        if phase != 1:
                            ds = tl.where(keep, ds, 0.0)
                        if attempt == 1:
                            dv = dot_kept(used.to(do_tile.dtype), keep, do_tile, dv, PRECISION, UPCAST)
                            dk = dot_kept(ds.to(q_tile.dtype), keep, q_tile, dk, PRECISION, UPCAST)
                        else:
                            dv = dot(used.to(do_tile.dtype), do_tile, dv, PRECISION, UPCAST)
                            dk = dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION, UPCAST)
                        if REST_DV > 0:
                            if attempt == 1:
                                dv_rest = dot_kept(used.to(do_rest.dtype), keep, do_rest, dv_rest, PRECISION, UPCAST)
                            else:
                                dv_rest = dot(used.to(do_rest.dtype), do_rest, dv_rest, PRECISION, UPCAST)
                        if REST_D > 0:
                            if attempt == 1:
                                dk_rest = dot_kept(ds.to(q_rest.dtype), keep, q_rest, dk_rest, PRECISION, UPCAST)
                            else:
                                dk_rest = dot(ds.to(q_rest.dtype), q_rest, dk_rest, PRECISION, UPCAST)

    stored = j < room
    v_scale = 1.0 if rng is None else keep_scale
    grad_k_rows = (first_k + j).to(tl.int64) * grad_k_stride_s
    grad_v_rows = (first_k + j).to(tl.int64) * grad_v_stride_s
    grad_k_base = head_pointer(grad_k, memory_bk, kv_head, 0, grad_k_stride_b, grad_k_stride_h, grad_k_stride_s) + grad_k_rows[:, None]
    grad_v_base = head_pointer(grad_v, memory_bk, kv_head, 0, grad_v_stride_b, grad_v_stride_h, grad_v_stride_s) + grad_v_rows[:, None]
    store_tile(grad_k_base + dims[None, :], tl.where(column_ok[:, None], dk * softmax_scale, 0.0), stored, dims < HEAD_DIM)
    store_tile(grad_v_base + v_dims[None, :], tl.where(column_ok[:, None], dv * v_scale, 0.0), stored, v_dims < V_HEAD_DIM)
    if REST_D > 0:
        store_tile(grad_k_base + rest_dims[None, :], tl.where(column_ok[:, None], dk_rest * softmax_scale, 0.0), stored, rest_dims < HEAD_DIM)
    if REST_DV > 0:
        store_tile(grad_v_base + rest_v_dims[None, :], tl.where(column_ok[:, None], dv_rest * v_scale, 0.0), stored, rest_v_dims < V_HEAD_DIM)


@triton.jit(do_not_specialize=RUNTIME)
def grad_q_kernel(
    q, k, v, grad_out, lse, delta, grad_q, scale, softmax_scale, softcap,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride_s, grad_q_stride_b, grad_q_stride_h, grad_q_stride_s,
    cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k, left, right, chunk,
    segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
    bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b,
    rng, drop_below, keep_scale, tile_map, tile_map_stride_b, tile_map_stride_h, tile_count,
    sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
    LEFT_PHASE: tl.constexpr, MASK_ALL: tl.constexpr, MASK_VALUES: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    SPARSE_Q: tl.constexpr, SPARSE_K: tl.constexpr,
):  # fmt: skip
    """grad_q of one block of BLOCK_M query rows of one head. Grid: sequences (+ 1 if packed) * heads * row blocks."""
    row_blocks = tl.cdiv(max_q, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % row_blocks
    if RIGHT or CAUSAL:
        block = row_blocks - 1 - block
    h = pid // row_blocks % Q_HEADS
    b = pid // row_blocks // Q_HEADS
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    if REST_D > 0:
        rest_dims = BLOCK_D + tl.arange(0, REST_D)
    if REST_DV > 0:
        rest_v_dims = BLOCK_DV + tl.arange(0, REST_DV)
    first_q, len_q, memory_b = query_block(cu_q, b, max_q, tokens_q, sequences)
    grad_q_base = head_pointer(grad_q, memory_b, h, first_q, grad_q_stride_b, grad_q_stride_h, grad_q_stride_s)
    if cu_q is not None:
        if b == sequences:
            for start in tl.range(block * BLOCK_M, len_q, row_blocks * BLOCK_M):
                tail = start + rows
                pointers = grad_q_base + (tail.to(tl.int64) * grad_q_stride_s)[:, None]
                store_tile(pointers + dims[None, :], tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tail < len_q, dims < HEAD_DIM)
                if REST_D > 0:
                    store_tile(pointers + rest_dims[None, :], tl.zeros((BLOCK_M, REST_D), tl.float32), tail < len_q, rest_dims < HEAD_DIM)
            return
    if block * BLOCK_M >= len_q:
        return
    first_k, len_k, _, lowest, memory_bk = key_block(cu_k, seqused_k, leftpad, b, max_k)
    if TOP_LEFT:
        shift = 0
    else:
        shift = len_k - len_q
    prefix_len = 0
    if prefix is not None:
        prefix_len = tl.load(prefix + b)

    i = block * BLOCK_M + rows
    p = i + shift
    row_ok = i < len_q
    q_base = head_pointer(q, memory_b, h, first_q, q_stride_b, q_stride_h, q_stride_s)
    do_base = head_pointer(grad_out, memory_b, h, first_q, grad_out_stride_b, grad_out_stride_h, grad_out_stride_s)
    q_pointers = q_base + (i.to(tl.int64) * q_stride_s)[:, None]
    do_pointers = do_base + (i.to(tl.int64) * grad_out_stride_s)[:, None]
    q_tile = load_tile(q_pointers + dims[None, :], row_ok, dims < HEAD_DIM, True, BLOCK_D > HEAD_DIM)
    do_tile = load_tile(do_pointers + v_dims[None, :], row_ok, v_dims < V_HEAD_DIM, True, BLOCK_DV > V_HEAD_DIM)
    if REST_D > 0:
        q_rest = load_tile(q_pointers + rest_dims[None, :], row_ok, rest_dims < HEAD_DIM, True, BLOCK_D + REST_D > HEAD_DIM)
    if REST_DV > 0:
        do_rest = load_tile(do_pointers + rest_v_dims[None, :], row_ok, rest_v_dims < V_HEAD_DIM, True, BLOCK_DV + REST_DV > V_HEAD_DIM)
    row_base = (tl.cast(memory_b, tl.int64) * Q_HEADS + h) * tokens_q + first_q
    row_lse = tl.load(lse + row_base + i, mask=row_ok, other=INF)
    row_lse = tl.where(row_lse == -INF, INF, row_lse) * (1.0 if NATURAL else LOG2_E)
    row_delta = tl.load(delta + row_base + i, mask=row_ok, other=0.0)

    kv_head = h // GROUP
    k_base = head_pointer(k, memory_bk, kv_head, first_k, k_stride_b, k_stride_h, k_stride_s)
    v_base = head_pointer(v, memory_bk, kv_head, first_k, v_stride_b, v_stride_h, v_stride_s)
    position_first = block * BLOCK_M + shift
    position_last = tl.minimum(block * BLOCK_M + BLOCK_M, len_q) - 1 + shift
    lo, full_lo, full_hi, hi = key_range(
        position_first, position_last, len_k, lowest, left, right, chunk, prefix_len, LEFT, RIGHT, CHUNK, CAUSAL and blocks_q is None
    )
    lo, full_lo, full_hi, hi = align_range(lo, full_lo, full_hi, hi, BLOCK_N, MASK_ALL)
    listed = tile_map
    if tile_map is not None:
        listed += tl.cast(b, tl.int64) * tile_map_stride_b + tl.cast(h, tl.int64) * tile_map_stride_h + tl.cast(block, tl.int64) * 2 * (tile_count + 1)
        lo, full_lo, full_hi, hi = listed_range(listed, tile_count, lo, full_lo, full_hi, hi, BLOCK_N)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if REST_D > 0:
        dq_rest = tl.zeros((BLOCK_M, REST_D), tl.float32)
    # The phases of the forward pass.
    for phase in tl.static_range(0, 4):
        if phase == 0:
            start = lo
            stop = full_lo
        elif phase == 1:
            start = full_lo
            stop = full_hi
        elif phase == 2:
            start = full_hi
            stop = hi
        else:
            start = hi
            stop = hi
            if MASK_VALUES:
                bad = any_nonfinite(dq)
                if REST_D > 0:
                    bad = bad | any_nonfinite(dq_rest)
                    dq_rest = tl.where(bad, 0.0, dq_rest)
                start = tl.where(bad, lo, hi)
                dq = tl.where(bad, 0.0, dq)
        if (phase == 0 and LEFT_PHASE) or (phase == 1 and not MASK_ALL) or phase == 2 or (phase == 3 and MASK_VALUES):
            columns = tl.arange(0, CAREFUL if phase == 3 else BLOCK_N)
            offset_columns = columns.to(tl.int64) if WIDE else columns
            k_offsets = offset_columns[:, None] * k_stride_s + dims[None, :]
            v_offsets = offset_columns[:, None] * v_stride_s + v_dims[None, :]
            if REST_D > 0:
                k_rest_offsets = offset_columns[:, None] * k_stride_s + rest_dims[None, :]
            if REST_DV > 0:
                v_rest_offsets = offset_columns[:, None] * v_stride_s + rest_v_dims[None, :]
            if tile_map is not None and phase == 3:
                start *= BLOCK_N // CAREFUL
                stop *= BLOCK_N // CAREFUL
            for n in tl.range(start, stop, 1 if tile_map is not None else CAREFUL if phase == 3 else BLOCK_N):
                if tile_map is not None:
                    n = listed_token(listed, n, BLOCK_N, CAREFUL if phase == 3 else BLOCK_N)
                n = tl.multiple_of(n, CAREFUL if phase == 3 else BLOCK_N)
                j = n + columns
                column_ok = (j < len_k) & (j >= lowest)
                k_pointers = k_base + tl.cast(n, tl.int64) * k_stride_s + k_offsets
                v_pointers = v_base + tl.cast(n, tl.int64) * v_stride_s + v_offsets
                k_tile = load_tile(k_pointers, column_ok, dims < HEAD_DIM, phase != 1, BLOCK_D > HEAD_DIM)
                v_tile = load_tile(v_pointers, column_ok, v_dims < V_HEAD_DIM, phase != 1, BLOCK_DV > V_HEAD_DIM)
                s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, CAREFUL if phase == 3 else BLOCK_N), tl.float32), PRECISION, UPCAST)
                if REST_D > 0:
                    k_rest_pointers = k_base + tl.cast(n, tl.int64) * k_stride_s + k_rest_offsets
                    k_rest = load_tile(k_rest_pointers, column_ok, rest_dims < HEAD_DIM, phase != 1, BLOCK_D + REST_D > HEAD_DIM)
                    s = dot(q_rest, tl.trans(k_rest), s, PRECISION, UPCAST)
                slope = 1.0
                if SOFTCAP:
                    capped = tanh(s * (scale / softcap))
                    slope = 1.0 - capped * capped
                    s = softcap * (1.0 if NATURAL else LOG2_E) * capped
                else:
                    s = s * scale
                s = add_bias(
                    s, b, h, i[:, None], j[None, :], p[:, None], len_q, len_k,
                    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b, NATURAL,
                )  # fmt: skip
                weights = power(s - row_lse[:, None], NATURAL)
                dp = dot(do_tile, tl.trans(v_tile), tl.zeros((BLOCK_M, CAREFUL if phase == 3 else BLOCK_N), tl.float32), PRECISION, UPCAST)
                if REST_DV > 0:
                    v_rest_pointers = v_base + tl.cast(n, tl.int64) * v_stride_s + v_rest_offsets
                    v_rest = load_tile(v_rest_pointers, column_ok, rest_v_dims < V_HEAD_DIM, phase != 1, BLOCK_DV + REST_DV > V_HEAD_DIM)
                    dp = dot(do_rest, tl.trans(v_rest), dp, PRECISION, UPCAST)
                if rng is not None:
                    kept = kept_by_dropout(rng, drop_below, b, h, i[:, None], n, Q_HEADS, CAREFUL if phase == 3 else BLOCK_N, False)
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                ds = weights * (dp - row_delta[:, None]) * slope
                if phase != 1:
                    keep = keep_pairs(
                        b, h, i[:, None], j[None, :], p[:, None], len_q, len_k, lowest, left, right, chunk, prefix_len,
                        segments_q, segments_k, segments_q_stride, segments_k_stride,
                        blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
                        bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
                        sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q, SPARSE_Q, SPARSE_K, LEFT, RIGHT, CHUNK, CAUSAL,
                    )  # fmt: skip
                    if bias is not None:
                        keep = keep & (s != -INF)
                    ds = tl.where(keep, ds, 0.0)
                if phase == 3:
                    dq = dot_kept(ds.to(k_tile.dtype), keep, k_tile, dq, PRECISION, UPCAST)
                else:
                    dq = dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION, UPCAST)
                if REST_D > 0:
                    if phase == 3:
                        dq_rest = dot_kept(ds.to(k_rest.dtype), keep, k_rest, dq_rest, PRECISION, UPCAST)
                    else:
                        dq_rest = dot(ds.to(k_rest.dtype), k_rest, dq_rest, PRECISION, UPCAST)

    grad_pointers = grad_q_base + (i.to(tl.int64) * grad_q_stride_s)[:, None]
    store_tile(grad_pointers + dims[None, :], dq * softmax_scale, row_ok, dims < HEAD_DIM)
    if REST_D > 0:
        store_tile(grad_pointers + rest_dims[None, :], dq_rest * softmax_scale, row_ok, rest_dims < HEAD_DIM)
