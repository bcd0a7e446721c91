"""Forward for Hopper in Gluon: see `kernels.hopper` for the division of labour.

Inside a warpgroup the scores of the next key tile and the product of the last weights with V run together, and the softmax
runs under the latter (arXiv 2407.08608, section 3.2). Keys are walked from the last tile to the first, so that a causal block
meets its only masked tiles at the start.
"""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, N806, SIM102
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnhub.backends.triton.kernels.hopper import (
    CAREFUL,
    RUNTIME,
    add_kept,
    add_transposed,
    any_nonfinite,
    biased,
    copy_box,
    draw_tile,
    existing,
    head_of,
    hear_tile,
    kept,
    keys,
    load_bias,
    load_rows,
    power,
    queries,
    row_pointers,
    rows_to_keys,
    tanh,
    tile_place,
)
from attnhub.backends.triton.kernels.tile import INF, LN_2, LOG2_E


@gluon.jit
def softmax_step(
    s, value, m, total, b, h, i, j, len_q, len_k, lowest, prefix_len, scale, softcap, limits, added, data,
    LIMITS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(weights, m, total, shrink, pairs kept) after one key tile. s: raw products; value: see `kernels.hopper.load_bias`; m is kept in base 2, or base e with NATURAL."""
    plain: gl.constexpr = not SOFTCAP and added[0] is None and added[5] is None
    keep = True
    if SOFTCAP:
        s = softcap * (1.0 if NATURAL else LOG2_E) * tanh(s * (scale / softcap))
    elif not plain:
        s = s * scale
    s, left = biased(s, value, b, h, i[:, None], j[None, :], len_q, len_k, added, LIMITS, NATURAL)
    if MASKED:
        keep = kept(b, h, i[:, None], j[None, :], len_q, len_k, lowest, prefix_len, limits, data, LIMITS)
        if added[0] is not None:
            keep = keep & left
        s = gl.where(keep, s, -INF)
    top = gl.max(s, 1)
    # One fused multiply-add per score where nothing comes between the scale, which is positive, and the exponential.
    m_new = gl.maximum(m, top * scale if plain else top)
    m_used = m_new
    if MASKED:
        # A row that has met no key yet: -inf - -inf would be NaN.
        m_used = gl.where(m_new == -INF, 0.0, m_new)
    weights = power((s * scale if plain else s) - m_used[:, None], NATURAL)
    shrink = power(m - m_used, NATURAL)
    total = total * shrink + gl.sum(weights, 1)
    return weights, m_new, total, shrink, keep


@gluon.jit
def multiply_scores(q_tiles, own, k_tiles, stage, CHUNKS: gl.constexpr, layout: gl.constexpr):
    """q k^T of one stage: started, not awaited. The head dimension lies in CHUNKS parts, those of q from tile ``own`` on."""
    N: gl.constexpr = k_tiles.shape[1]
    zeros = gl.zeros((64, N), gl.float32, layout)
    s = warpgroup_mma(q_tiles.index(own), k_tiles.index(stage * CHUNKS).permute((1, 0)), zeros, use_acc=False, is_async=True)
    for c in gl.static_range(1, CHUNKS):
        s = warpgroup_mma(q_tiles.index(own + c), k_tiles.index(stage * CHUNKS + c).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def attend_carefully(
    q_tiles, own, heads, strides, first, lo, hi, b, h, first_k, max_k, len_q, len_k, lowest, prefix_len, scale, softcap, limits, added, data,
    HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr, BLOCK_DV: gl.constexpr, CHUNKS: gl.constexpr,
    LIMITS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """(sums [64, BLOCK_DV], m, total) of 64 query rows again, see `kernels.hopper`."""
    k_head, v_head = heads
    k_strides, v_strides = strides
    WIDTH: gl.constexpr = q_tiles.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    K_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    V_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
    i = first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    m = gl.full((64,), -INF, gl.float32, gl.SliceLayout(1, LAYOUT))
    total = gl.full((64,), 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
    acc = gl.zeros((64, BLOCK_DV), gl.float32, LAYOUT)
    for n in range(lo, hi, CAREFUL):
        k_row = n + gl.arange(0, CAREFUL, gl.SliceLayout(1, K_ROWS))
        s = gl.zeros((64, CAREFUL), gl.float32, LAYOUT)
        for c in gl.static_range(0, CHUNKS):
            k_ok = (k_row < len_k) & (k_row >= lowest)
            k = load_rows(k_head + c * WIDTH, first_k, k_row, k_ok, k_strides, HEAD_DIM - c * WIDTH, WIDTH, K_ROWS)
            s = add_transposed(q_tiles.index(own + c), k, s)
        step = gl.arange(0, CAREFUL, gl.SliceLayout(0, LAYOUT))
        j = n + step
        value = load_bias(b, h, 0, i[:, None], n, step[None, :], len_q, max_k, added, LIMITS)
        weights, m, total, shrink, keep = softmax_step(
            s, value, m, total, b, h, i, j, len_q, len_k, lowest, prefix_len, scale, softcap, limits, added, data, LIMITS, SOFTCAP, NATURAL, True
        )
        v_row = n + gl.arange(0, CAREFUL, gl.SliceLayout(1, V_ROWS))
        v = load_rows(v_head, first_k, v_row, (v_row < len_k) & (v_row >= lowest), v_strides, V_HEAD_DIM, BLOCK_DV, V_ROWS)
        acc = add_kept(weights, keep, v, acc * shrink[:, None])
    return acc, m, total


@gluon.jit
def compute(
    common, WHICH: gl.constexpr, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr,
    CHUNKS: gl.constexpr, GROUPS: gl.constexpr, HIDES: gl.constexpr,
    LIMITS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """Warpgroup WHICH: out and lse of 64 of a tile's 64 * GROUPS query rows."""
    tensors, barriers, k, v, out, lse, sinks, strides, scale, softcap, place, queue, lengths, limits, added, data = common
    out_strides, k_strides, v_strides = strides
    q_tiles, k_tiles, v_tiles = tensors
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    tokens_q = lengths[8]
    dtype: gl.constexpr = v_tiles.dtype
    STAGES: gl.constexpr = v_tiles.shape[0]
    BLOCK_N: gl.constexpr = v_tiles.shape[1]
    BLOCK_DV: gl.constexpr = v_tiles.shape[2]
    BLOCK_M: gl.constexpr = 64 * GROUPS
    BUFFERS: gl.constexpr = q_full.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    # 16 bytes a thread.
    WRITE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
    it = 0
    served = 0
    turn = 0
    index = gl.program_id(0)
    while index < place[2]:
        b, h, block = tile_place(index, place, lengths[0], lengths[5], lengths[6], Q_HEADS, BLOCK_M, True)
        first_q, len_q, memory_b = queries(lengths, b)
        if block * BLOCK_M < len_q:
            first_k, len_k, _, lowest, memory_bk, prefix_len = keys(lengths, b)
            lo, _, _, hi = rows_to_keys(block * BLOCK_M, BLOCK_M, len_q, len_k, lowest, prefix_len, limits, LIMITS, BLOCK_N)
            first = block * BLOCK_M + WHICH * 64
            _, full_lo, full_hi, _ = rows_to_keys(first, 64, len_q, len_k, lowest, prefix_len, limits, LIMITS, BLOCK_N)
            i = first + gl.arange(0, 64, ROW)
            column = gl.arange(0, BLOCK_N, COLUMN)
            m = gl.full((64,), -INF, gl.float32, ROW)
            total = gl.full((64,), 0.0, gl.float32, ROW)
            acc = gl.zeros((64, BLOCK_DV), gl.float32, O_LAYOUT)
            if hi > lo:
                n = lo + (hi - lo - 1) // BLOCK_N * BLOCK_N
                buffer = served % BUFFERS
                own = (buffer * GROUPS + WHICH) * CHUNKS
                mbarrier.wait(q_full.index(buffer), served // BUFFERS & 1)
                mbarrier.wait(k_full.index(it % STAGES), it // STAGES & 1)
                s = multiply_scores(q_tiles, own, k_tiles, it % STAGES, CHUNKS, S_LAYOUT)
                value = load_bias(b, h, 0, i[:, None], n, column[None, :], len_q, lengths[7], added, LIMITS)
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(k_empty.index(it % STAGES), count=1)
                following, m, total, shrink, _first = softmax_step(
                    s, value, m, total, b, h, i, n + column, len_q, len_k, lowest, prefix_len, scale, softcap,
                    limits, added, data, LIMITS, SOFTCAP, NATURAL, True,
                )  # fmt: skip
                # Where registers allow, weights travel from step to step in fp32: pairs of two bytes are taken apart and put together again.
                if GROUPS > 2:
                    following = following.to(dtype)
                # Masked tiles at the end, full ones, masked ones at the beginning.
                for phase in gl.static_range(0, 3):
                    if phase == 0:
                        # Where all is masked, full_hi is the first tile of this warpgroup, which may lie behind that of the whole block.
                        stop = lo if LIMITS[6] else gl.maximum(full_hi, lo)
                    elif phase == 1:
                        stop = gl.maximum(full_lo, lo)
                    else:
                        stop = lo
                    if phase == 0 or (phase == 1 and not LIMITS[6]) or (phase == 2 and LIMITS[5]):
                        while n - BLOCK_N >= stop:
                            n -= BLOCK_N
                            before = it % STAGES
                            before_parity = it // STAGES & 1
                            it += 1
                            stage = it % STAGES
                            mbarrier.wait(k_full.index(stage), it // STAGES & 1)
                            weights = gl.convert_layout(following.to(dtype), P_LAYOUT)
                            s = multiply_scores(q_tiles, own, k_tiles, stage, CHUNKS, S_LAYOUT)
                            mbarrier.wait(v_full.index(before), before_parity)
                            acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
                            value = load_bias(b, h, 0, i[:, None], n, column[None, :], len_q, lengths[7], added, LIMITS)
                            s = warpgroup_mma_wait(1, deps=[s])
                            mbarrier.arrive(k_empty.index(stage), count=1)
                            following, m, total, shrink, _tile = softmax_step(
                                s, value, m, total, b, h, i, n + column, len_q, len_k, lowest, prefix_len, scale, softcap,
                                limits, added, data, LIMITS, SOFTCAP, NATURAL, phase != 1,
                            )  # fmt: skip
                            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                            mbarrier.arrive(v_empty.index(before), count=1)
                            acc = acc * gl.convert_layout(shrink, OUT_ROW)[:, None]
                            if GROUPS > 2:
                                following = following.to(dtype)
                weights = gl.convert_layout(following.to(dtype), P_LAYOUT)
                mbarrier.wait(v_full.index(it % STAGES), it // STAGES & 1)
                acc = warpgroup_mma(weights, v_tiles.index(it % STAGES), acc, is_async=True)
                acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                mbarrier.arrive(v_empty.index(it % STAGES), count=1)
                it += 1
                if HIDES:
                    if any_nonfinite(acc) > 0:
                        heads = (head_of(k, memory_bk, h // GROUP, k_strides), head_of(v, memory_bk, h // GROUP, v_strides))
                        again, m_again, total_again = attend_carefully(
                            q_tiles, own, heads, (k_strides, v_strides), first, lo, hi, b, h, first_k, lengths[7], len_q, len_k, lowest, prefix_len, scale,
                            softcap, limits, added, data, HEAD_DIM, V_HEAD_DIM, BLOCK_DV, CHUNKS, LIMITS, SOFTCAP, NATURAL,
                        )  # fmt: skip
                        acc = gl.convert_layout(again, O_LAYOUT)
                        m = gl.convert_layout(m_again, ROW)
                        total = gl.convert_layout(total_again, ROW)
                mbarrier.arrive(q_empty.index(buffer), count=1)
                served += 1

            if sinks is not None:
                sink = gl.load(sinks + h) * (1.0 if NATURAL else LOG2_E)
                m_new = gl.maximum(m, sink)
                m_used = gl.where(m_new == -INF, 0.0, m_new)
                shrink = power(m - m_used, NATURAL)
                total = total * shrink + power(sink - m_used, NATURAL)
                acc = acc * gl.convert_layout(shrink, OUT_ROW)[:, None]
                m = m_new
            empty = total == 0.0
            divisor = gl.where(empty, 1.0, total)
            acc = acc * gl.convert_layout(1.0 / divisor, OUT_ROW)[:, None]
            result = gl.convert_layout(acc.to(dtype), WRITE)
            value = gl.where(empty, -INF, m * (1.0 if NATURAL else LN_2) + gl.log2(divisor) * LN_2)
            head = head_of(out, memory_b, h, out_strides)
            lse_row = (gl.cast(memory_b, gl.int64) * Q_HEADS + h) * tokens_q + first_q
            row = first + gl.arange(0, 64, gl.SliceLayout(1, WRITE))
            gl.store(row_pointers(head, first_q + row, out_strides, BLOCK_DV, WRITE), result, mask=existing(row < len_q, V_HEAD_DIM, BLOCK_DV, WRITE))
            if lse is not None:
                gl.store(lse + lse_row + i, value, mask=i < len_q)
        index = hear_tile(turn, queue)
        turn += 1


@gluon.jit
def copy(copied, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, CHUNKS: gl.constexpr, GROUPS: gl.constexpr, LIMITS: gl.constexpr):
    """One warp: the tiles of q, k and v into shared memory, as far ahead as there is room."""
    q, k, v, tensors, barriers, place, queue, lengths, limits = copied
    q_tiles, k_tiles, v_tiles = tensors
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = v_tiles.shape[0]
    BLOCK_N: gl.constexpr = v_tiles.shape[1]
    WIDTH: gl.constexpr = q_tiles.shape[2]
    BLOCK_M: gl.constexpr = 64 * GROUPS
    BUFFERS: gl.constexpr = q_full.shape[0]
    it = 0
    served = 0
    turn = 0
    index = gl.program_id(0)
    while index < place[2]:
        b, h, block = tile_place(index, place, lengths[0], lengths[5], lengths[6], Q_HEADS, BLOCK_M, True)
        first_q, len_q, memory_b = queries(lengths, b)
        if block * BLOCK_M < len_q:
            first_k, len_k, _, lowest, memory_bk, prefix_len = keys(lengths, b)
            lo, _, _, hi = rows_to_keys(block * BLOCK_M, BLOCK_M, len_q, len_k, lowest, prefix_len, limits, LIMITS, BLOCK_N)
            if hi > lo:
                buffer = served % BUFFERS
                mbarrier.wait(q_empty.index(buffer), (served // BUFFERS & 1) ^ 1)
                mbarrier.expect(q_full.index(buffer), BLOCK_M * CHUNKS * WIDTH * 2)
                for part in gl.static_range(0, GROUPS * CHUNKS):
                    row = first_q + block * BLOCK_M + part // CHUNKS * 64
                    copy_box(q, memory_b, h, row, part % CHUNKS * WIDTH, q_full.index(buffer), q_tiles.index(buffer * GROUPS * CHUNKS + part))
                served += 1
                n = lo + (hi - lo - 1) // BLOCK_N * BLOCK_N
                while n >= lo:
                    stage = it % STAGES
                    parity = (it // STAGES & 1) ^ 1
                    mbarrier.wait(k_empty.index(stage), parity)
                    mbarrier.expect(k_full.index(stage), BLOCK_N * CHUNKS * WIDTH * 2)
                    for c in gl.static_range(0, CHUNKS):
                        copy_box(k, memory_bk, h // GROUP, first_k + n, c * WIDTH, k_full.index(stage), k_tiles.index(stage * CHUNKS + c))
                    mbarrier.wait(v_empty.index(stage), parity)
                    mbarrier.expect(v_full.index(stage), BLOCK_N * v_tiles.shape[2] * 2)
                    copy_box(v, memory_bk, h // GROUP, first_k + n, 0, v_full.index(stage), v_tiles.index(stage))
                    it += 1
                    n -= BLOCK_N
        index = draw_tile(turn, queue)
        turn += 1


@gluon.jit(do_not_specialize=RUNTIME)
def hopper_forward_kernel(
    q_boxes, k_boxes, v_boxes, k, v, out, lse, sinks, scale, softcap, out_stride_b, out_stride_h, out_stride_s,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k, left, right, chunk,
    segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
    bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b, pairs, section, tile_total, counter,
    Q_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr,
    CHUNKS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, GROUPS: gl.constexpr, HIDES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, CHUNK: gl.constexpr, CAUSAL: gl.constexpr, TOP_LEFT: gl.constexpr,
    LEFT_PHASE: gl.constexpr, MASK_ALL: gl.constexpr, PAIRS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """out [B, Hq, Sq, Dv] and, if lse is not None, lse [B, Hq, Sq] fp32. scale: as in `kernels.forward`.

    q_boxes, k_boxes, v_boxes: tensor descriptors over [B, H, S, D] with boxes of 64 (q) or BLOCK_N tokens by WIDTH (BLOCK_DV for v).
    Any one-dimensional grid: its programs walk the tile_total tiles of `kernels.hopper.tile_place`.
    BUFFERS: tiles of q in flight, the one in use included. HIDES: whether a tile can hold values that some of its rows must not see.
    """
    dtype: gl.constexpr = v_boxes.dtype
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS * CHUNKS, 64, WIDTH], SHARED)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, BLOCK_N, WIDTH], SHARED)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_DV], SHARED)
    q_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for buffer in gl.static_range(0, BUFFERS):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=GROUPS)
    for stage in gl.static_range(0, STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=GROUPS)
        mbarrier.init(v_empty.index(stage), count=GROUPS)
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for slot in gl.static_range(0, 2):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=GROUPS)
    fence_async_shared()

    LIMITS: gl.constexpr = (LEFT, RIGHT, CHUNK, CAUSAL, TOP_LEFT, LEFT_PHASE, MASK_ALL, CAUSAL and blocks_q is None, PAIRS, False)
    tensors = (q_tiles, k_tiles, v_tiles)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    place = (pairs, section, tile_total)
    queue = (counter, numbers, told, heard)
    lengths = (cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k)
    limits = (left, right, chunk)
    added = (bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b)
    data = (
        segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
        bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    )  # fmt: skip
    strides = (
        (out_stride_b, out_stride_h, out_stride_s), (k_stride_b, k_stride_h, k_stride_s), (v_stride_b, v_stride_h, v_stride_s),
    )  # fmt: skip
    common = (tensors, barriers, k, v, out, lse, sinks, strides, scale, softcap, place, queue, lengths, limits, added, data)
    copied = (q_boxes, k_boxes, v_boxes, tensors, barriers, place, queue, lengths, limits)
    # Registers: 65536 are shared by the computing warpgroups and the four warps' worth that the copying one counts as.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (compute, (common, 0, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, CHUNKS, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 1, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, CHUNKS, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (copy, (copied, Q_HEADS, GROUP, CHUNKS, GROUPS, LIMITS)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (compute, (common, 0, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, CHUNKS, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 1, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, CHUNKS, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 2, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, CHUNKS, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (copy, (copied, Q_HEADS, GROUP, CHUNKS, GROUPS, LIMITS)),
            ],
            [4, 4, 1], [160, 160, 32],
        )  # fmt: skip
