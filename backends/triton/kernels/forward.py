"""Forward: online softmax over the key tiles of one block of query rows (arXiv 2205.14135, 2307.08691).

One program serves BLOCK_M rows of one head of one sequence, or, for short queries, rows of all query heads that share a
K/V head (PACK), so that K/V are read once. With SPLIT the keys are divided among programs, each of which writes a partial
(out, lse) that `kernels.combine` merges.
"""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, N806, SIM102, SIM108, PLW2901
from __future__ import annotations

import triton
import triton.language as tl

from attnhub.backends.triton.kernels.dropout import kept_by_dropout
from attnhub.backends.triton.kernels.mask import align_range, keep_pairs, key_range
from attnhub.backends.triton.kernels.pages import load_pages, paged_rows, run_columns
from attnhub.backends.triton.kernels.tile import (
    CAREFUL,
    INF,
    LN_2,
    LOG2_E,
    add_bias,
    any_nonfinite,
    dot,
    dot_kept,
    head_pointer,
    load_factor,
    load_tile,
    negated_fp8,
    power,
    store_tile,
    tanh,
)
from attnhub.backends.triton.kernels.tile_map import listed_range, listed_token

#: Lengths and limits change from call to call and take no part in the choice of instructions.
RUNTIME = [
    "scale", "softcap", "sequences", "max_q", "max_k", "tokens_q", "tokens_k", "left", "right", "chunk", "splits", "table_stride",
    "drop_below", "keep_scale", "tile_map_stride_b", "tile_map_stride_h", "tile_count",
]  # fmt: skip


@triton.jit
def query_block(cu_q, b, max_q, tokens_q, sequences):
    """(first token, rows, batch index in memory) of sequence b. Packed: sequence N is what lies behind the last one."""
    if cu_q is None:
        first = 0
        length = max_q
        memory_b = b
    else:
        first = tl.load(cu_q + b)
        length = tl.where(b == sequences, tokens_q, tl.load(cu_q + tl.minimum(b + 1, sequences))) - first
        memory_b = 0
    return first, length, memory_b


@triton.jit
def key_block(cu_k, seqused_k, leftpad, b, max_k):
    """(first token, keys that exist, keys in memory, first key that is no padding, batch index in memory) of sequence b."""
    if cu_k is None:
        first = 0
        room = max_k
        memory_b = b
    else:
        first = tl.load(cu_k + b)
        room = tl.load(cu_k + b + 1) - first
        memory_b = 0
    length = room
    if seqused_k is not None:
        length = tl.maximum(tl.minimum(tl.load(seqused_k + b), room), 0)
    lowest = 0
    if leftpad is not None:
        lowest = tl.maximum(tl.load(leftpad + b), 0)
    return first, length, room, lowest, memory_b


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q, k, v, out, lse, sinks, scale, softcap,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s, out_stride_b, out_stride_h, out_stride_s,
    cu_q, cu_k, seqused_k, leftpad, prefix, block_table, table_stride,
    sequences, max_q, max_k, tokens_q, tokens_k, left, right, chunk, splits,
    segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
    bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b,
    rng, drop_below, keep_scale, tile_map, tile_map_stride_b, tile_map_stride_h, tile_count,
    sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q,
    q_descale, q_descale_stride_b, q_descale_stride_h, k_descale, k_descale_stride_b, k_descale_stride_h,
    v_descale, v_descale_stride_b, v_descale_stride_h,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
    LEFT_PHASE: tl.constexpr, MASK_ALL: tl.constexpr, MASK_VALUES: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PACK: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FP8: tl.constexpr,
    SPARSE_Q: tl.constexpr, SPARSE_K: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, Sq, Dv] and, if lse is not None, lse [B, Hq, Sq] fp32 of one block of query rows.

    The grid is one-dimensional: (sequences (+ 1 if packed) * heads * splits * row blocks); heads are K/V heads with PACK.
    scale is softmax_scale * log2(e), or softmax_scale alone with SOFTCAP or NATURAL; it is never negative, but with FP8.
    Head dimensions are cut into a main part and a rest, each a power of two: HEAD_DIM <= BLOCK_D + REST_D, V_HEAD_DIM <= BLOCK_DV + REST_DV.
    rng (int64 [2] or None), drop_below: see `kernels.dropout`; keep_scale is 1 / (1 - p).
    """
    PACKED_HEADS: tl.constexpr = GROUP if PACK else 1
    PROGRAM_HEADS: tl.constexpr = Q_HEADS // PACKED_HEADS
    row_blocks = tl.cdiv(max_q * PACKED_HEADS, BLOCK_M)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    if RIGHT or CAUSAL:
        # The last rows see the most keys: start with them, so that no long block is left for the end.
        row_block = row_blocks - 1 - row_block
    rest = pid // row_blocks
    split = 0
    if SPLIT:
        split = rest % splits
        rest = rest // splits
    head = rest % PROGRAM_HEADS
    b = rest // PROGRAM_HEADS

    first_q, len_q, memory_b = query_block(cu_q, b, max_q, tokens_q, sequences)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    if REST_D > 0:
        rest_dims = BLOCK_D + tl.arange(0, REST_D)
    if REST_DV > 0:
        rest_v_dims = BLOCK_DV + tl.arange(0, REST_DV)
    if SPLIT:
        # Partial results lie split by split, each in the shape of the whole.
        split_rows = tl.cast(split, tl.int64) * tokens_q * Q_HEADS
        if cu_q is None:
            split_rows = split_rows * sequences
        out += split_rows * V_HEAD_DIM
        lse += split_rows
    if cu_q is not None:
        if b == sequences:
            # Tokens behind the last sequence: rows without keys.
            for start in tl.range(row_block * BLOCK_M, len_q * PACKED_HEADS, row_blocks * BLOCK_M):
                tail = start + tl.arange(0, BLOCK_M)
                h = head * PACKED_HEADS + tail % PACKED_HEADS
                token = first_q + tail // PACKED_HEADS
                ok = tail < len_q * PACKED_HEADS
                pointers = out + (h.to(tl.int64) * out_stride_h + token.to(tl.int64) * out_stride_s)[:, None]
                store_tile(pointers + v_dims[None, :], tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), ok, v_dims < V_HEAD_DIM)
                if REST_DV > 0:
                    store_tile(pointers + rest_v_dims[None, :], tl.zeros((BLOCK_M, REST_DV), tl.float32), ok, rest_v_dims < V_HEAD_DIM)
                if lse is not None:
                    no_keys = tl.full((BLOCK_M,), -INF, tl.float32)
                    if sinks is not None and not SPLIT:
                        no_keys = tl.load(sinks + h, mask=ok, other=-INF)
                    tl.store(lse + h.to(tl.int64) * tokens_q + token, no_keys, mask=ok)
            return
    if row_block * BLOCK_M >= len_q * PACKED_HEADS:
        return
    first_k, len_k, _, lowest, memory_bk = key_block(cu_k, seqused_k, leftpad, b, max_k)
    if TOP_LEFT:
        shift = 0
    else:
        shift = len_k - len_q
    prefix_len = 0
    if prefix is not None:
        prefix_len = tl.load(prefix + b)

    # A packed row is one query token of one head of the group: tokens outside, heads inside.
    i = rows // PACKED_HEADS
    h = head * PACKED_HEADS + rows % PACKED_HEADS
    kv_head = head if PACK else head // GROUP
    row_ok = i < len_q
    p = i + shift
    position_first = row_block * BLOCK_M // PACKED_HEADS + shift
    position_last = tl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // PACKED_HEADS, len_q - 1) + shift

    q_rows = h.to(tl.int64) * q_stride_h + (first_q + i).to(tl.int64) * q_stride_s
    q_pointers = q + tl.cast(memory_b, tl.int64) * q_stride_b + q_rows[:, None]
    q_tile = load_tile(q_pointers + dims[None, :], row_ok, dims < HEAD_DIM, True, BLOCK_D > HEAD_DIM)
    if REST_D > 0:
        q_rest = load_tile(q_pointers + rest_dims[None, :], row_ok, rest_dims < HEAD_DIM, True, BLOCK_D + REST_D > HEAD_DIM)
    if FP8:
        if q_descale is not None:
            scale *= load_factor(q_descale, b, kv_head, q_descale_stride_b, q_descale_stride_h)
        if k_descale is not None:
            scale *= load_factor(k_descale, b, kv_head, k_descale_stride_b, k_descale_stride_h)
        # The largest score is taken before it is scaled: a negative scale goes into the signs of q.
        q_tile = negated_fp8(q_tile, scale < 0)
        if REST_D > 0:
            q_rest = negated_fp8(q_rest, scale < 0)
        scale = tl.abs(scale)
    if PAGE_SIZE > 0:
        k_base = head_pointer(k, 0, kv_head, 0, k_stride_b, k_stride_h, k_stride_s)
        v_base = head_pointer(v, 0, kv_head, 0, v_stride_b, v_stride_h, v_stride_s)
        table = block_table + tl.cast(b, tl.int64) * table_stride
    else:
        k_base = head_pointer(k, memory_bk, kv_head, first_k, k_stride_b, k_stride_h, k_stride_s)
        v_base = head_pointer(v, memory_bk, kv_head, first_k, v_stride_b, v_stride_h, v_stride_s)
        table = 0

    lo, full_lo, full_hi, hi = key_range(
        position_first, position_last, len_k, lowest, left, right, chunk, prefix_len, LEFT, RIGHT, CHUNK, CAUSAL and blocks_q is None
    )
    lo, full_lo, full_hi, hi = align_range(lo, full_lo, full_hi, hi, BLOCK_N, MASK_ALL)
    # A range counts keys, or positions in the list of kept tiles.
    TILE: tl.constexpr = BLOCK_N if tile_map is None else 1
    listed = tile_map
    if tile_map is not None:
        listed += tl.cast(b, tl.int64) * tile_map_stride_b + tl.cast(head, tl.int64) * tile_map_stride_h
        if not PACK:
            listed += tl.cast(row_block, tl.int64) * 2 * (tile_count + 1)
        lo, full_lo, full_hi, hi = listed_range(listed, tile_count, lo, full_lo, full_hi, hi, BLOCK_N)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), TILE), splits) * TILE
        lo += split * share
        hi = tl.minimum(hi, lo + share)
        full_lo = tl.minimum(tl.maximum(full_lo, lo), tl.maximum(hi, lo))
        full_hi = tl.maximum(tl.minimum(full_hi, hi // TILE * TILE), full_lo)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    if REST_DV > 0:
        acc_rest = tl.zeros((BLOCK_M, REST_DV), tl.float32)
    m = tl.full((BLOCK_M,), -INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Phases: 0 masked tiles on the left, 1 full tiles, 2 masked tiles on the right; 3 repeats everything, with the product
    # that keeps masked values apart, if a NaN or infinity has shown up (a masked one enters as 0 * NaN).
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
                bad = any_nonfinite(acc)
                if REST_DV > 0:
                    bad = bad | any_nonfinite(acc_rest)
                    acc_rest = tl.where(bad, 0.0, acc_rest)
                start = tl.where(bad, lo, hi)
                acc = tl.where(bad, 0.0, acc)
                m = tl.where(bad, -INF, m)
                total = tl.where(bad, 0.0, total)
        if (phase == 0 and LEFT_PHASE) or (phase == 1 and not MASK_ALL) or phase == 2 or (phase == 3 and MASK_VALUES):
            columns = tl.arange(0, CAREFUL if phase == 3 else BLOCK_N)
            offset_columns = columns.to(tl.int64) if WIDE else columns
            if PAGE_SIZE > 0:
                offset_columns = run_columns(offset_columns, CAREFUL if phase == 3 else BLOCK_N, PAGE_SIZE)
            k_offsets = offset_columns[:, None] * k_stride_s + dims[None, :]
            v_offsets = offset_columns[:, None] * v_stride_s + v_dims[None, :]
            if REST_D > 0:
                k_rest_offsets = offset_columns[:, None] * k_stride_s + rest_dims[None, :]
            if REST_DV > 0:
                v_rest_offsets = offset_columns[:, None] * v_stride_s + rest_v_dims[None, :]
            if tile_map is not None and phase == 3:
                start *= BLOCK_N // CAREFUL
                stop *= BLOCK_N // CAREFUL
            if PAGE_SIZE > 0 and tile_map is None:
                following_pages = load_pages(table, start, len_k, CAREFUL if phase == 3 else BLOCK_N, PAGE_SIZE)
            for n in tl.range(start, stop, 1 if tile_map is not None else CAREFUL if phase == 3 else BLOCK_N):
                if tile_map is not None:
                    n = listed_token(listed, n, BLOCK_N, CAREFUL if phase == 3 else BLOCK_N)
                n = tl.multiple_of(n, CAREFUL if phase == 3 else BLOCK_N)
                j = n + columns
                column_ok = (j < len_k) & (j >= lowest)
                if PAGE_SIZE > 0:
                    if tile_map is None:
                        pages = following_pages
                        following_pages = load_pages(table, n + (CAREFUL if phase == 3 else BLOCK_N), len_k, CAREFUL if phase == 3 else BLOCK_N, PAGE_SIZE)
                    else:
                        pages = load_pages(table, n, len_k, CAREFUL if phase == 3 else BLOCK_N, PAGE_SIZE)
                    k_rows = paged_rows(k_base, pages, n, k_stride_b, k_stride_s, CAREFUL if phase == 3 else BLOCK_N, PAGE_SIZE, WIDE)
                    v_rows = paged_rows(v_base, pages, n, v_stride_b, v_stride_s, CAREFUL if phase == 3 else BLOCK_N, PAGE_SIZE, WIDE)
                    k_tile_pointers = k_rows + k_offsets
                    v_tile_pointers = v_rows + v_offsets
                    if REST_D > 0:
                        k_rest_pointers = k_rows + k_rest_offsets
                    if REST_DV > 0:
                        v_rest_pointers = v_rows + v_rest_offsets
                else:
                    k_tile_pointers = k_base + tl.cast(n, tl.int64) * k_stride_s + k_offsets
                    v_tile_pointers = v_base + tl.cast(n, tl.int64) * v_stride_s + v_offsets
                    if REST_D > 0:
                        k_rest_pointers = k_base + tl.cast(n, tl.int64) * k_stride_s + k_rest_offsets
                    if REST_DV > 0:
                        v_rest_pointers = v_base + tl.cast(n, tl.int64) * v_stride_s + v_rest_offsets
                k_tile = load_tile(k_tile_pointers, column_ok, dims < HEAD_DIM, phase != 1, BLOCK_D > HEAD_DIM)
                s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, CAREFUL if phase == 3 else BLOCK_N), tl.float32), PRECISION, UPCAST)
                if REST_D > 0:
                    k_rest = load_tile(k_rest_pointers, column_ok, rest_dims < HEAD_DIM, phase != 1, BLOCK_D + REST_D > HEAD_DIM)
                    s = dot(q_rest, tl.trans(k_rest), s, PRECISION, UPCAST)
                if SOFTCAP:
                    s = softcap * (1.0 if NATURAL else LOG2_E) * tanh(s * (scale / softcap))
                elif phase != 1 or alibi is not None:
                    s = s * scale
                s = add_bias(
                    s, b, h[:, None], i[:, None], j[None, :], p[:, None], len_q, len_k,
                    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b, NATURAL,
                )  # fmt: skip
                if phase != 1:
                    keep = keep_pairs(
                        b, h[:, None], i[:, None], j[None, :], p[:, None], len_q, len_k, lowest, left, right, chunk, prefix_len,
                        segments_q, segments_k, segments_q_stride, segments_k_stride,
                        blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
                        bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
                        sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q, SPARSE_Q, SPARSE_K, LEFT, RIGHT, CHUNK, CAUSAL,
                    )  # fmt: skip
                    if bias is not None:
                        keep = keep & (s != -INF)
                    s = tl.where(keep, s, -INF)
                    m_new = tl.maximum(m, tl.max(s, 1))
                    # A row that has met no key yet: -inf - -inf would be NaN.
                    m_used = tl.where(m_new == -INF, 0.0, m_new)
                    weights = power(s - m_used[:, None], NATURAL)
                    shrink = power(m - m_used, NATURAL)
                elif SOFTCAP or alibi is not None:
                    m_new = tl.maximum(m, tl.max(s, 1))
                    weights = tl.exp2(s - m_new[:, None])
                    shrink = tl.exp2(m - m_new)
                else:
                    # One fused multiply-add per score.
                    m_new = tl.maximum(m, tl.max(s, 1) * scale)
                    weights = tl.exp2(s * scale - m_new[:, None])
                    shrink = tl.exp2(m - m_new)
                total = total * shrink + tl.sum(weights, 1)
                acc = acc * shrink[:, None]
                if REST_DV > 0:
                    acc_rest = acc_rest * shrink[:, None]
                m = m_new
                if rng is not None:
                    # The denominator, and lse, are without dropout.
                    kept = kept_by_dropout(rng, drop_below, b, h[:, None], i[:, None], n, Q_HEADS, CAREFUL if phase == 3 else BLOCK_N, False)
                    weights = tl.where(kept, weights, 0.0)
                v_tile = load_tile(v_tile_pointers, column_ok, v_dims < V_HEAD_DIM, phase != 1, BLOCK_DV > V_HEAD_DIM)
                if FP8:
                    # Hopper's fp8 product wants v along the keys, and turning it there goes byte by byte. fp16 holds all e4m3 numbers,
                    # and weights with 11 bits.
                    v_tile = v_tile.to(tl.float16)
                if phase == 3:
                    acc = dot_kept(weights.to(v_tile.dtype), keep, v_tile, acc, PRECISION, UPCAST)
                else:
                    acc = dot(weights.to(v_tile.dtype), v_tile, acc, PRECISION, UPCAST)
                if REST_DV > 0:
                    v_rest = load_tile(v_rest_pointers, column_ok, rest_v_dims < V_HEAD_DIM, phase != 1, BLOCK_DV + REST_DV > V_HEAD_DIM)
                    if FP8:
                        v_rest = v_rest.to(tl.float16)
                    if phase == 3:
                        acc_rest = dot_kept(weights.to(v_rest.dtype), keep, v_rest, acc_rest, PRECISION, UPCAST)
                    else:
                        acc_rest = dot(weights.to(v_rest.dtype), v_rest, acc_rest, PRECISION, UPCAST)

    if sinks is not None and not SPLIT:
        sink = tl.load(sinks + h, mask=row_ok, other=0.0) * (1.0 if NATURAL else LOG2_E)
        m_new = tl.maximum(m, sink)
        m_used = tl.where(m_new == -INF, 0.0, m_new)
        shrink = power(m - m_used, NATURAL)
        total = total * shrink + power(sink - m_used, NATURAL)
        acc = acc * shrink[:, None]
        if REST_DV > 0:
            acc_rest = acc_rest * shrink[:, None]
        m = m_new
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    if rng is not None:
        acc = acc * keep_scale
    if v_descale is not None:
        acc *= load_factor(v_descale, b, kv_head, v_descale_stride_b, v_descale_stride_h)
    out_rows = tl.cast(memory_b, tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h + (first_q + i).to(tl.int64) * out_stride_s
    store_tile(out + out_rows[:, None] + v_dims[None, :], acc, row_ok, v_dims < V_HEAD_DIM)
    if REST_DV > 0:
        acc_rest = acc_rest / total[:, None]
        if rng is not None:
            acc_rest = acc_rest * keep_scale
        if v_descale is not None:
            acc_rest *= load_factor(v_descale, b, kv_head, v_descale_stride_b, v_descale_stride_h)
        store_tile(out + out_rows[:, None] + rest_v_dims[None, :], acc_rest, row_ok, rest_v_dims < V_HEAD_DIM)
    if lse is not None:
        value = tl.where(empty, -INF, m * (1.0 if NATURAL else LN_2) + tl.log2(total) * LN_2)
        lse_rows = (tl.cast(memory_b, tl.int64) * Q_HEADS + h) * tokens_q + first_q + i
        tl.store(lse + lse_rows, value, mask=row_ok)
