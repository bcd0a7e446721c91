"""dQ for Hopper in Gluon, by blocks of query rows: see `kernels.hopper` for the division of labour.

The product dS K of one key tile runs beside the scores and dP of the next. delta = rowsum(grad_out * out) - grad_lse is made
here, from tiles that are needed anyway, and written for the kernel of dK and dV.
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
    copy_box,
    draw_tile,
    existing,
    head_of,
    hear_tile,
    keys,
    load_bias,
    load_rows,
    multiply_transposed,
    queries,
    row_pointers,
    rows_to_keys,
    tile_place,
    weights_again,
)
from attnhub.backends.triton.kernels.tile import INF, LOG2_E


@gluon.jit
def grad_carefully(
    q_tile, do_tile, heads, strides, i, lse_i, delta_i, lo, hi, b, h, first_k, max_k, len_q, len_k, lowest, prefix_len, scale, softcap, limits, added, data,
    HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr, LIMITS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """The sums of 64 rows of grad_q again, see `kernels.hopper`. i, lse_i, delta_i are of the layout's rows."""
    k_head, v_head = heads
    k_strides, v_strides = strides
    BLOCK_D: gl.constexpr = q_tile.shape[1]
    BLOCK_DV: gl.constexpr = do_tile.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    K_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    V_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
    dq = gl.zeros((64, BLOCK_D), gl.float32, LAYOUT)
    for n in range(lo, hi, CAREFUL):
        k_row = n + gl.arange(0, CAREFUL, gl.SliceLayout(1, K_ROWS))
        v_row = n + gl.arange(0, CAREFUL, gl.SliceLayout(1, V_ROWS))
        k = load_rows(k_head, first_k, k_row, (k_row < len_k) & (k_row >= lowest), k_strides, HEAD_DIM, BLOCK_D, K_ROWS)
        v = load_rows(v_head, first_k, v_row, (v_row < len_k) & (v_row >= lowest), v_strides, V_HEAD_DIM, BLOCK_DV, V_ROWS)
        zeros = gl.zeros((64, CAREFUL), gl.float32, LAYOUT)
        step = gl.arange(0, CAREFUL, gl.SliceLayout(0, LAYOUT))
        j = n + step
        value = load_bias(b, h, 0, i[:, None], n, step[None, :], len_q, max_k, added, LIMITS)
        weights, slope, keep = weights_again(
            add_transposed(q_tile, k, zeros), value, lse_i[:, None], b, h, i[:, None], j[None, :], len_q, len_k, lowest, prefix_len, scale, softcap,
            limits, added, data, LIMITS, SOFTCAP, NATURAL, True,
        )  # fmt: skip
        ds = gl.where(keep, weights * (add_transposed(do_tile, v, zeros) - delta_i[:, None]) * slope, 0.0)
        dq = add_kept(ds, keep, k, dq)
    return dq


@gluon.jit
def compute(
    common, WHICH: gl.constexpr, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr,
    GROUPS: gl.constexpr, HIDES: gl.constexpr,
    LIMITS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """Warpgroup WHICH: grad_q and delta of 64 of a tile's 64 * GROUPS query rows."""
    tensors, barriers, k, v, out, lse, grad_lse, delta, grad_q, strides, scales, place, queue, lengths, limits, added, data = common
    q_tiles, do_tiles, k_tiles, v_tiles = tensors
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    out_strides, grad_q_strides, k_strides, v_strides = strides
    scale, softmax_scale, softcap = scales
    tokens_q = lengths[8]
    dtype: gl.constexpr = q_tiles.dtype
    BLOCK_D: gl.constexpr = q_tiles.shape[2]
    BLOCK_DV: gl.constexpr = do_tiles.shape[2]
    STAGES: gl.constexpr = k_tiles.shape[0]
    V_STAGES: gl.constexpr = v_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    BLOCK_M: gl.constexpr = 64 * GROUPS
    BUFFERS: gl.constexpr = q_full.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DS_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, Q_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    # 16 bytes a thread.
    WRITE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
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
            row_base = (gl.cast(memory_b, gl.int64) * Q_HEADS + h) * tokens_q + first_q
            read_row = first + gl.arange(0, 64, gl.SliceLayout(1, READ))
            out_head = head_of(out, memory_b, h, out_strides)
            o = gl.load(
                row_pointers(out_head, first_q + read_row, out_strides, BLOCK_DV, READ), mask=existing(read_row < len_q, V_HEAD_DIM, BLOCK_DV, READ), other=0.0
            )
            i = first + gl.arange(0, 64, ROW)
            lse_i = gl.load(lse + row_base + i, mask=i < len_q, other=INF)
            # Rows without keys, and rows that do not exist, have P = 0.
            lse_i = gl.where(lse_i == -INF, INF, lse_i) * (1.0 if NATURAL else LOG2_E)
            row_delta = gl.zeros((64,), gl.float32, gl.SliceLayout(1, READ))
            if grad_lse is not None:
                row_delta = -gl.load(grad_lse + row_base + read_row, mask=read_row < len_q, other=0.0)
            buffer = served % BUFFERS
            q_tile = q_tiles.index(buffer * GROUPS + WHICH)
            do_tile = do_tiles.index(buffer * GROUPS + WHICH)
            mbarrier.wait(q_full.index(buffer), served // BUFFERS & 1)
            served += 1
            dq = gl.zeros((64, BLOCK_D), gl.float32, Q_LAYOUT)
            if hi <= lo:
                row_delta += gl.sum(o.to(gl.float32) * do_tile.load(READ).to(gl.float32), 1)
                gl.store(delta + row_base + read_row, row_delta, mask=read_row < len_q)
            else:
                column = gl.arange(0, BLOCK_N, COLUMN)
                n = lo + (hi - lo - 1) // BLOCK_N * BLOCK_N
                # The first tile, beside whose products delta is made; under names of its own, since later tiles of whole pairs have constants for some.
                mbarrier.wait(k_full.index(it % STAGES), it // STAGES & 1)
                s_1 = multiply_transposed(q_tile, k_tiles.index(it % STAGES), S_LAYOUT)
                mbarrier.wait(v_full.index(it % V_STAGES), it // V_STAGES & 1)
                dp_1 = multiply_transposed(do_tile, v_tiles.index(it % V_STAGES), S_LAYOUT)
                value_1 = load_bias(b, h, 0, i[:, None], n, column[None, :], len_q, lengths[7], added, LIMITS)
                row_delta += gl.sum(o.to(gl.float32) * do_tile.load(READ).to(gl.float32), 1)
                gl.store(delta + row_base + read_row, row_delta, mask=read_row < len_q)
                delta_i = gl.convert_layout(row_delta, ROW)
                s_1 = warpgroup_mma_wait(1, deps=[s_1])
                weights_1, slope_1, keep_1 = weights_again(
                    s_1, value_1, lse_i[:, None], b, h, i[:, None], (n + column)[None, :], len_q, len_k, lowest, prefix_len, scale, softcap,
                    limits, added, data, LIMITS, SOFTCAP, NATURAL, True,
                )  # fmt: skip
                dp_1 = warpgroup_mma_wait(0, deps=[dp_1])
                mbarrier.arrive(v_empty.index(it % V_STAGES), count=1)
                # From step to step dS travels in fp32: see `kernels.hopper_forward`.
                ds_wide = gl.where(keep_1, weights_1 * (dp_1 - delta_i[:, None]) * slope_1, 0.0)
                it += 1
                n -= BLOCK_N
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
                        while n >= stop:
                            before = (it + STAGES - 1) % STAGES
                            mbarrier.wait(k_full.index(it % STAGES), it // STAGES & 1)
                            s = multiply_transposed(q_tile, k_tiles.index(it % STAGES), S_LAYOUT)
                            mbarrier.wait(v_full.index(it % V_STAGES), it // V_STAGES & 1)
                            dp = multiply_transposed(do_tile, v_tiles.index(it % V_STAGES), S_LAYOUT)
                            ds = gl.convert_layout(ds_wide.to(dtype), DS_LAYOUT)
                            dq = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
                            value = load_bias(b, h, 0, i[:, None], n, column[None, :], len_q, lengths[7], added, LIMITS)
                            s = warpgroup_mma_wait(2, deps=[s])
                            j = n + column
                            weights, slope, keep = weights_again(
                                s, value, lse_i[:, None], b, h, i[:, None], j[None, :], len_q, len_k, lowest, prefix_len, scale, softcap,
                                limits, added, data, LIMITS, SOFTCAP, NATURAL, phase != 1,
                            )  # fmt: skip
                            dp = warpgroup_mma_wait(1, deps=[dp])
                            mbarrier.arrive(v_empty.index(it % V_STAGES), count=1)
                            ds_wide = weights * (dp - delta_i[:, None]) * slope
                            if phase != 1:
                                ds_wide = gl.where(keep, ds_wide, 0.0)
                            dq, ds = warpgroup_mma_wait(0, deps=[dq, ds])
                            mbarrier.arrive(k_empty.index(before), count=1)
                            it += 1
                            n -= BLOCK_N
                before = (it + STAGES - 1) % STAGES
                ds = gl.convert_layout(ds_wide.to(dtype), DS_LAYOUT)
                dq = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
                dq, ds = warpgroup_mma_wait(0, deps=[dq, ds])
                mbarrier.arrive(k_empty.index(before), count=1)
                if HIDES:
                    if any_nonfinite(dq) > 0:
                        AGAIN: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
                        heads = (head_of(k, memory_bk, h // GROUP, k_strides), head_of(v, memory_bk, h // GROUP, v_strides))
                        again = grad_carefully(
                            q_tile, do_tile, heads, (k_strides, v_strides), gl.convert_layout(i, AGAIN),
                            gl.convert_layout(lse_i, AGAIN), gl.convert_layout(delta_i, AGAIN), lo, hi, b, h, first_k, lengths[7], len_q, len_k, lowest, prefix_len,
                            scale, softcap, limits, added, data, HEAD_DIM, V_HEAD_DIM, LIMITS, SOFTCAP, NATURAL,
                        )  # fmt: skip
                        dq = gl.convert_layout(again, Q_LAYOUT)
            # Through shared memory, where the tile of Q is done with, for wide stores.
            q_tile.store((dq * softmax_scale).to(dtype))
            result = q_tile.load(WRITE)
            fence_async_shared()
            mbarrier.arrive(q_empty.index(buffer), count=1)
            head = head_of(grad_q, memory_b, h, grad_q_strides)
            row = first + gl.arange(0, 64, gl.SliceLayout(1, WRITE))
            pointers = row_pointers(head, first_q + row, grad_q_strides, BLOCK_D, WRITE)
            gl.store(pointers, result, mask=existing(row < len_q, HEAD_DIM, BLOCK_D, WRITE))
        index = hear_tile(turn, queue)
        turn += 1


@gluon.jit
def copy(copied, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, LIMITS: gl.constexpr):
    """One warp: a tile's query rows and their gradients once, then keys and values, as far ahead as there is room."""
    q, k, v, grad_out, tensors, barriers, place, queue, lengths, limits = copied
    q_tiles, do_tiles, k_tiles, v_tiles = tensors
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    BLOCK_D: gl.constexpr = q_tiles.shape[2]
    BLOCK_DV: gl.constexpr = do_tiles.shape[2]
    STAGES: gl.constexpr = k_tiles.shape[0]
    V_STAGES: gl.constexpr = v_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
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
            buffer = served % BUFFERS
            mbarrier.wait(q_empty.index(buffer), (served // BUFFERS & 1) ^ 1)
            served += 1
            mbarrier.expect(q_full.index(buffer), BLOCK_M * (BLOCK_D + BLOCK_DV) * 2)
            for part in gl.static_range(0, GROUPS):
                row = first_q + block * BLOCK_M + part * 64
                copy_box(q, memory_b, h, row, 0, q_full.index(buffer), q_tiles.index(buffer * GROUPS + part))
                copy_box(grad_out, memory_b, h, row, 0, q_full.index(buffer), do_tiles.index(buffer * GROUPS + part))
            if hi > lo:
                n = lo + (hi - lo - 1) // BLOCK_N * BLOCK_N
                while n >= lo:
                    mbarrier.wait(k_empty.index(it % STAGES), (it // STAGES & 1) ^ 1)
                    mbarrier.expect(k_full.index(it % STAGES), BLOCK_N * BLOCK_D * 2)
                    copy_box(k, memory_bk, h // GROUP, first_k + n, 0, k_full.index(it % STAGES), k_tiles.index(it % STAGES))
                    mbarrier.wait(v_empty.index(it % V_STAGES), (it // V_STAGES & 1) ^ 1)
                    mbarrier.expect(v_full.index(it % V_STAGES), BLOCK_N * BLOCK_DV * 2)
                    copy_box(v, memory_bk, h // GROUP, first_k + n, 0, v_full.index(it % V_STAGES), v_tiles.index(it % V_STAGES))
                    it += 1
                    n -= BLOCK_N
        index = draw_tile(turn, queue)
        turn += 1


@gluon.jit(do_not_specialize=RUNTIME)
def hopper_grad_q_kernel(
    q_boxes, k_boxes, v_boxes, grad_out_boxes, k, v, out, lse, grad_lse, delta, grad_q, scale, softmax_scale, softcap,
    out_stride_b, out_stride_h, out_stride_s, grad_q_stride_b, grad_q_stride_h, grad_q_stride_s,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k, left, right, chunk,
    segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
    bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b, pairs, section, tile_total, counter,
    Q_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, BUFFERS: gl.constexpr, GROUPS: gl.constexpr, HIDES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, CHUNK: gl.constexpr, CAUSAL: gl.constexpr, TOP_LEFT: gl.constexpr,
    LEFT_PHASE: gl.constexpr, MASK_ALL: gl.constexpr, PAIRS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """grad_q, and delta [B, Hq, Sq] fp32. The boxes are of 64 (q, grad_out) or BLOCK_N tokens. STAGES, V_STAGES: tiles of K and V in
    flight; those of K are needed a little longer. The rest is as in `kernels.hopper_forward`.
    """
    dtype: gl.constexpr = q_boxes.dtype
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS, 64, BLOCK_D], SHARED)
    do_tiles = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS, 64, BLOCK_DV], SHARED)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], SHARED)
    v_tiles = gl.allocate_shared_memory(dtype, [V_STAGES, BLOCK_N, BLOCK_DV], SHARED)
    q_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    for buffer in gl.static_range(0, BUFFERS):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=GROUPS)
    for stage in gl.static_range(0, STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=GROUPS)
    for stage in gl.static_range(0, V_STAGES):
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=GROUPS)
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for slot in gl.static_range(0, 2):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=GROUPS)
    fence_async_shared()

    LIMITS: gl.constexpr = (LEFT, RIGHT, CHUNK, CAUSAL, TOP_LEFT, LEFT_PHASE, MASK_ALL, CAUSAL and blocks_q is None, PAIRS, False)
    tensors = (q_tiles, do_tiles, k_tiles, v_tiles)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    strides = (
        (out_stride_b, out_stride_h, out_stride_s), (grad_q_stride_b, grad_q_stride_h, grad_q_stride_s),
        (k_stride_b, k_stride_h, k_stride_s), (v_stride_b, v_stride_h, v_stride_s),
    )  # fmt: skip
    scales = (scale, softmax_scale, softcap)
    place = (pairs, section, tile_total)
    queue = (counter, numbers, told, heard)
    lengths = (cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k)
    limits = (left, right, chunk)
    added = (bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b)
    data = (
        segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
        bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    )  # fmt: skip
    common = (tensors, barriers, k, v, out, lse, grad_lse, delta, grad_q, strides, scales, place, queue, lengths, limits, added, data)
    copied = (q_boxes, k_boxes, v_boxes, grad_out_boxes, tensors, barriers, place, queue, lengths, limits)
    # Registers: see `kernels.hopper_forward`.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (compute, (common, 0, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 1, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (copy, (copied, Q_HEADS, GROUP, GROUPS, LIMITS)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (compute, (common, 0, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 1, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 2, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, LIMITS, SOFTCAP, NATURAL)),
                (copy, (copied, Q_HEADS, GROUP, GROUPS, LIMITS)),
            ],
            [4, 4, 1], [160, 160, 32],
        )  # fmt: skip
