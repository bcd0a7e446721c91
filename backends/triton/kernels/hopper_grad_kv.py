"""dK and dV for Hopper in Gluon, by blocks of keys: see `kernels.hopper` for the division of labour.

Scores are transposed, so that P^T and dS^T are register operands of the products with grad_out and Q. Where both gradients do not
fit into the registers of a warpgroup (head_dim 256), the kernel runs once for each.
"""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, N806
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
    barrier,
    copy_box,
    draw_tile,
    existing,
    head_of,
    hear_tile,
    keys,
    keys_to_rows,
    load_bias,
    load_rows,
    multiply_transposed,
    queries,
    row_pointers,
    tile_place,
    weights_again,
)
from attnhub.backends.triton.kernels.tile import INF, LOG2_E


@gluon.jit
def unknown_zero(PHASE: gl.constexpr):
    """0 under another name for each phase: where the resident tile varies, ptxas 12.8 computes a part of its address once for the loops of all
    phases, in the first of them, and leaves the others without it where that one has no tile. Grids have one axis, which it cannot know."""
    if PHASE == 0:
        zero = 0
    elif PHASE == 1:
        zero = gl.program_id(1)
    else:
        zero = gl.program_id(2)
    return zero


@gluon.jit
def grad_carefully(
    k_tile, v_tile, q, grad_out, lse, delta, strides, first, lo, hi, b, kv_head, first_q, memory_b, tokens_q, max_k, len_q, len_k, lowest, prefix_len,
    scale, softcap, limits, added, data, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr,
    LIMITS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """The sums of 64 rows of grad_k and grad_v again, see `kernels.hopper`."""
    q_strides, do_strides = strides
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    Q_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    DO_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
    j = first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    dk = gl.zeros((64, BLOCK_D), gl.float32, LAYOUT)
    dv = gl.zeros((64, BLOCK_DV), gl.float32, LAYOUT)
    for g in range(0, GROUP):
        h = kv_head * GROUP + g
        q_head = head_of(q, memory_b, h, q_strides)
        do_head = head_of(grad_out, memory_b, h, do_strides)
        row_base = (gl.cast(memory_b, gl.int64) * Q_HEADS + h) * tokens_q + first_q
        for m in range(lo, hi, CAREFUL):
            q_row = m + gl.arange(0, CAREFUL, gl.SliceLayout(1, Q_ROWS))
            do_row = m + gl.arange(0, CAREFUL, gl.SliceLayout(1, DO_ROWS))
            q_rows = load_rows(q_head, first_q, q_row, q_row < len_q, q_strides, HEAD_DIM, BLOCK_D, Q_ROWS)
            do_rows = load_rows(do_head, first_q, do_row, do_row < len_q, do_strides, V_HEAD_DIM, BLOCK_DV, DO_ROWS)
            step = gl.arange(0, CAREFUL, gl.SliceLayout(0, LAYOUT))
            i = m + step
            row_lse = gl.load(lse + row_base + i, mask=i < len_q, other=INF)
            row_lse = gl.where(row_lse == -INF, INF, row_lse) * (1.0 if NATURAL else LOG2_E)
            zeros = gl.zeros((64, CAREFUL), gl.float32, LAYOUT)
            value = load_bias(b, h, m, step[None, :], 0, j[:, None], len_q, max_k, added, LIMITS)
            weights, slope, keep = weights_again(
                add_transposed(k_tile, q_rows, zeros), value, row_lse[None, :], b, h, i[None, :], j[:, None], len_q, len_k, lowest, prefix_len, scale, softcap,
                limits, added, data, LIMITS, SOFTCAP, NATURAL, True,
            )  # fmt: skip
            if WANT_V:
                dv = add_kept(weights, keep, do_rows, dv)
            if WANT_K:
                row_delta = gl.load(delta + row_base + i, mask=i < len_q, other=0.0)
                ds = gl.where(keep, weights * (add_transposed(v_tile, do_rows, zeros) - row_delta[None, :]) * slope, 0.0)
                dk = add_kept(ds, keep, q_rows, dk)
    return dk, dv


@gluon.jit
def compute(
    common, WHICH: gl.constexpr, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr,
    GROUPS: gl.constexpr, HIDES: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr, LIMITS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """Warpgroup WHICH: grad_k and grad_v of 64 of a tile's 64 * GROUPS keys."""
    tensors, barriers, q, grad_out, lse, delta, grad_k, grad_v, strides, scales, place, queue, lengths, limits, added, data = common
    q_tiles, do_tiles, row_data, k_tiles, v_tiles = tensors
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty = barriers
    k_strides, v_strides, q_strides, do_strides = strides
    scale, softmax_scale, softcap = scales
    dtype: gl.constexpr = q_tiles.dtype
    STAGES: gl.constexpr = q_tiles.shape[0]
    BLOCK_M: gl.constexpr = q_tiles.shape[1]
    BLOCK_D: gl.constexpr = q_tiles.shape[2]
    BLOCK_DV: gl.constexpr = do_tiles.shape[2]
    BLOCK_N: gl.constexpr = 64 * GROUPS
    KV_HEADS: gl.constexpr = Q_HEADS // GROUP
    BUFFERS: gl.constexpr = kv_full.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    # 16 bytes a thread.
    WRITE_K: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    WRITE_V: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
    it = 0
    served = 0
    turn = 0
    index = gl.program_id(0)
    while index < place[2]:
        # Under a causal mask the first keys are met by the most rows.
        b, kv_head, block = tile_place(index, place, lengths[1], lengths[5], lengths[7], KV_HEADS, BLOCK_N, False)
        first_k, len_k, room, lowest, memory_bk, prefix_len = keys(lengths, b)
        if block * BLOCK_N < room:
            first_q, len_q, memory_b = queries(lengths, b)
            first = block * BLOCK_N + WHICH * 64
            lo, _, _, hi = keys_to_rows(block * BLOCK_N, BLOCK_N, len_q, len_k, lowest, prefix_len, limits, LIMITS, BLOCK_M)
            _, full_lo, full_hi, _ = keys_to_rows(first, 64, len_q, len_k, lowest, prefix_len, limits, LIMITS, BLOCK_M)
            j = first + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
            row = gl.arange(0, BLOCK_M, ROW)
            dk = gl.zeros((64, BLOCK_D), gl.float32, K_LAYOUT)
            dv = gl.zeros((64, BLOCK_DV), gl.float32, V_LAYOUT)
            buffer = served % BUFFERS
            k_tile = k_tiles.index(buffer * GROUPS + WHICH)
            v_tile = v_tiles.index(buffer * GROUPS + WHICH)
            mbarrier.wait(kv_full.index(buffer), served // BUFFERS & 1)
            served += 1
            if hi > lo:
                for g in range(0, GROUP):
                    h = kv_head * GROUP + g
                    m = lo
                    # Masked tiles at the beginning, full ones, masked ones at the end.
                    for phase in gl.static_range(0, 3):
                        if phase == 0:
                            stop = gl.minimum(full_lo, hi)
                        elif phase == 1:
                            stop = gl.minimum(full_hi, hi)
                        else:
                            stop = hi
                        if phase == 2 or not LIMITS[6]:
                            own = buffer * GROUPS + WHICH
                            if BUFFERS > 1:
                                own += unknown_zero(phase)
                            while m < stop:
                                stage = it % STAGES
                                mbarrier.wait(q_full.index(stage), it // STAGES & 1)
                                s = multiply_transposed(k_tiles.index(own), q_tiles.index(stage), S_LAYOUT)
                                mbarrier.wait(do_full.index(stage), it // STAGES & 1)
                                if WANT_K:
                                    dp = multiply_transposed(v_tiles.index(own), do_tiles.index(stage), S_LAYOUT)
                                value = load_bias(b, h, m, row[None, :], 0, j[:, None], len_q, lengths[7], added, LIMITS)
                                # In masked tiles both are awaited, so that no mask has to be kept until dP is there.
                                s = warpgroup_mma_wait(1 if WANT_K and phase == 1 else 0, deps=[s])
                                if WANT_K and phase != 1:
                                    dp = warpgroup_mma_wait(0, deps=[dp])
                                i = m + row
                                row_lse = row_data.index(stage * 2).load(ROW)
                                weights, slope, keep = weights_again(
                                    s, value, row_lse[None, :], b, h, i[None, :], j[:, None], len_q, len_k, lowest, prefix_len, scale, softcap,
                                    limits, added, data, LIMITS, SOFTCAP, NATURAL, phase != 1,
                                )  # fmt: skip
                                if WANT_K and phase != 1:
                                    row_delta = row_data.index(stage * 2 + 1).load(ROW)
                                    ds_wide = gl.where(keep, weights * (dp - row_delta[None, :]) * slope, 0.0)
                                if WANT_V:
                                    p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, V_LAYOUT, 2))
                                    dv = warpgroup_mma(p, do_tiles.index(stage), dv, is_async=True)
                                if WANT_K:
                                    if phase == 1:
                                        dp = warpgroup_mma_wait(1 if WANT_V else 0, deps=[dp])
                                        row_delta = row_data.index(stage * 2 + 1).load(ROW)
                                        ds_wide = weights * (dp - row_delta[None, :]) * slope
                                    ds = gl.convert_layout(ds_wide.to(dtype), gl.DotOperandLayout(0, K_LAYOUT, 2))
                                    dk = warpgroup_mma(ds, q_tiles.index(stage), dk, is_async=True)
                                if WANT_V:
                                    dv, p = warpgroup_mma_wait(1 if WANT_K else 0, deps=[dv, p])
                                mbarrier.arrive(do_empty.index(stage), count=1)
                                if WANT_K:
                                    dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])
                                mbarrier.arrive(q_empty.index(stage), count=1)
                                it += 1
                                m += BLOCK_M
                if HIDES:
                    bad = 0
                    if WANT_K:
                        bad = any_nonfinite(dk)
                    if WANT_V:
                        bad = gl.maximum(bad, any_nonfinite(dv))
                    if bad > 0:
                        dk_again, dv_again = grad_carefully(
                            k_tile, v_tile, q, grad_out, lse, delta, (q_strides, do_strides), first, lo, hi,
                            b, kv_head, first_q, memory_b, lengths[8], lengths[7], len_q, len_k, lowest, prefix_len, scale, softcap, limits, added, data,
                            Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, WANT_K, WANT_V, LIMITS, SOFTCAP, NATURAL,
                        )  # fmt: skip
                        dk = gl.convert_layout(dk_again, K_LAYOUT)
                        dv = gl.convert_layout(dv_again, V_LAYOUT)
            # Through shared memory, where the tiles of K and V are done with, for wide stores.
            if WANT_K:
                k_tile.store((dk * softmax_scale).to(dtype))
                k_result = k_tile.load(WRITE_K)
                k_head = head_of(grad_k, memory_bk, kv_head, k_strides)
                key = first + gl.arange(0, 64, gl.SliceLayout(1, WRITE_K))
                value = gl.where(((key < len_k) & (key >= lowest))[:, None], k_result, 0.0)
                gl.store(row_pointers(k_head, first_k + key, k_strides, BLOCK_D, WRITE_K), value, mask=existing(key < room, HEAD_DIM, BLOCK_D, WRITE_K))
            if WANT_V:
                v_tile.store(dv.to(dtype))
                v_result = v_tile.load(WRITE_V)
                v_head = head_of(grad_v, memory_bk, kv_head, v_strides)
                v_key = first + gl.arange(0, 64, gl.SliceLayout(1, WRITE_V))
                v_value = gl.where(((v_key < len_k) & (v_key >= lowest))[:, None], v_result, 0.0)
                v_pointers = row_pointers(v_head, first_k + v_key, v_strides, BLOCK_DV, WRITE_V)
                gl.store(v_pointers, v_value, mask=existing(v_key < room, V_HEAD_DIM, BLOCK_DV, WRITE_V))
            fence_async_shared()
            mbarrier.arrive(kv_empty.index(buffer), count=1)
        index = hear_tile(turn, queue)
        turn += 1


@gluon.jit
def copy(
    copied, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, WANT_K: gl.constexpr, LIMITS: gl.constexpr, NATURAL: gl.constexpr
):  # fmt: skip
    """One warp: a tile's keys and values once, then query rows, their gradients, lse and delta, as far ahead as there is room."""
    q, k, v, grad_out, lse, delta, tensors, barriers, place, queue, lengths, limits = copied
    q_tiles, do_tiles, row_data, k_tiles, v_tiles = tensors
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty = barriers
    tokens_q = lengths[8]
    STAGES: gl.constexpr = q_tiles.shape[0]
    BLOCK_M: gl.constexpr = q_tiles.shape[1]
    BLOCK_D: gl.constexpr = q_tiles.shape[2]
    BLOCK_DV: gl.constexpr = do_tiles.shape[2]
    BLOCK_N: gl.constexpr = 64 * GROUPS
    KV_HEADS: gl.constexpr = Q_HEADS // GROUP
    BUFFERS: gl.constexpr = kv_full.shape[0]
    ROW: gl.constexpr = gl.BlockedLayout([max(BLOCK_M // 32, 1)], [32], [1], [0])
    it = 0
    served = 0
    turn = 0
    index = gl.program_id(0)
    while index < place[2]:
        b, kv_head, block = tile_place(index, place, lengths[1], lengths[5], lengths[7], KV_HEADS, BLOCK_N, False)
        first_k, len_k, room, lowest, memory_bk, prefix_len = keys(lengths, b)
        if block * BLOCK_N < room:
            first_q, len_q, memory_b = queries(lengths, b)
            lo, _, _, hi = keys_to_rows(block * BLOCK_N, BLOCK_N, len_q, len_k, lowest, prefix_len, limits, LIMITS, BLOCK_M)
            buffer = served % BUFFERS
            mbarrier.wait(kv_empty.index(buffer), (served // BUFFERS & 1) ^ 1)
            served += 1
            mbarrier.expect(kv_full.index(buffer), BLOCK_N * (BLOCK_D + (BLOCK_DV if WANT_K else 0)) * 2)
            for part in gl.static_range(0, GROUPS):
                row = first_k + block * BLOCK_N + part * 64
                copy_box(k, memory_bk, kv_head, row, 0, kv_full.index(buffer), k_tiles.index(buffer * GROUPS + part))
                if WANT_K:
                    copy_box(v, memory_bk, kv_head, row, 0, kv_full.index(buffer), v_tiles.index(buffer * GROUPS + part))
            for g in range(0, GROUP):
                h = kv_head * GROUP + g
                row_base = (gl.cast(memory_b, gl.int64) * Q_HEADS + h) * tokens_q + first_q
                m = lo
                while m < hi:
                    stage = it % STAGES
                    parity = (it // STAGES & 1) ^ 1
                    mbarrier.wait(q_empty.index(stage), parity)
                    mbarrier.expect(q_full.index(stage), BLOCK_M * BLOCK_D * 2)
                    copy_box(q, memory_b, h, first_q + m, 0, q_full.index(stage), q_tiles.index(stage))
                    mbarrier.wait(do_empty.index(stage), parity)
                    mbarrier.expect(do_full.index(stage), BLOCK_M * BLOCK_DV * 2)
                    copy_box(grad_out, memory_b, h, first_q + m, 0, do_full.index(stage), do_tiles.index(stage))
                    i = m + gl.arange(0, BLOCK_M, ROW)
                    # Rows without keys, and rows that do not exist, have P = 0.
                    row_lse = gl.load(lse + row_base + i, mask=i < len_q, other=INF)
                    row_data.index(stage * 2).store(gl.where(row_lse == -INF, INF, row_lse) * (1.0 if NATURAL else LOG2_E))
                    if WANT_K:
                        row_data.index(stage * 2 + 1).store(gl.load(delta + row_base + i, mask=i < len_q, other=0.0))
                    # One lane arrives for all that have stored.
                    barrier()
                    mbarrier.arrive(q_full.index(stage), count=1)
                    it += 1
                    m += BLOCK_M
        index = draw_tile(turn, queue)
        turn += 1


@gluon.jit(do_not_specialize=RUNTIME)
def hopper_grad_kv_kernel(
    q_boxes, k_boxes, v_boxes, grad_out_boxes, q, grad_out, lse, delta, grad_k, grad_v, scale, softmax_scale, softcap,
    q_stride_b, q_stride_h, q_stride_s, grad_out_stride_b, grad_out_stride_h, grad_out_stride_s,
    grad_k_stride_b, grad_k_stride_h, grad_k_stride_s, grad_v_stride_b, grad_v_stride_h, grad_v_stride_s,
    cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k, left, right, chunk,
    segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
    bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b, pairs, section, tile_total, counter,
    Q_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, GROUPS: gl.constexpr,
    HIDES: gl.constexpr, WANT_K: gl.constexpr, WANT_V: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, CHUNK: gl.constexpr, CAUSAL: gl.constexpr, TOP_LEFT: gl.constexpr,
    LEFT_PHASE: gl.constexpr, MASK_ALL: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr,
):  # fmt: skip
    """grad_k (WANT_K) and grad_v (WANT_V); pairs are K/V heads. The boxes are of BLOCK_M (q, grad_out) or 64 tokens."""
    dtype: gl.constexpr = q_boxes.dtype
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_tiles = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS, 64, BLOCK_D], SHARED)
    # Without dK, values are not read, and their tiles are only where dV passes on its way out: those of K serve, if as wide.
    v_tiles = k_tiles
    if WANT_K or BLOCK_DV != BLOCK_D:
        v_tiles = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS, 64, BLOCK_DV], SHARED)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], SHARED)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_DV], SHARED)
    # Per stage: lse in the base of the exponential, and delta.
    row_data = gl.allocate_shared_memory(gl.float32, [STAGES * 2, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for buffer in gl.static_range(0, BUFFERS):
        mbarrier.init(kv_full.index(buffer), count=1)
        mbarrier.init(kv_empty.index(buffer), count=GROUPS)
    for stage in gl.static_range(0, STAGES):
        # Two arrivals: the copy engine's and that of lse and delta.
        mbarrier.init(q_full.index(stage), count=2)
        mbarrier.init(do_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=GROUPS)
        mbarrier.init(do_empty.index(stage), count=GROUPS)
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for slot in gl.static_range(0, 2):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=GROUPS)
    fence_async_shared()

    LIMITS: gl.constexpr = (LEFT, RIGHT, CHUNK, CAUSAL, TOP_LEFT, LEFT_PHASE, MASK_ALL, CAUSAL and blocks_q is None, False, True)
    tensors = (q_tiles, do_tiles, row_data, k_tiles, v_tiles)
    barriers = (kv_full, kv_empty, q_full, q_empty, do_full, do_empty)
    strides = (
        (grad_k_stride_b, grad_k_stride_h, grad_k_stride_s), (grad_v_stride_b, grad_v_stride_h, grad_v_stride_s),
        (q_stride_b, q_stride_h, q_stride_s), (grad_out_stride_b, grad_out_stride_h, grad_out_stride_s),
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
    common = (tensors, barriers, q, grad_out, lse, delta, grad_k, grad_v, strides, scales, place, queue, lengths, limits, added, data)
    copied = (q_boxes, k_boxes, v_boxes, grad_out_boxes, lse, delta, tensors, barriers, place, queue, lengths, limits)
    # Registers: see `kernels.hopper_forward`.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (compute, (common, 0, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, WANT_K, WANT_V, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 1, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, WANT_K, WANT_V, LIMITS, SOFTCAP, NATURAL)),
                (copy, (copied, Q_HEADS, GROUP, GROUPS, WANT_K, LIMITS, NATURAL)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (compute, (common, 0, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, WANT_K, WANT_V, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 1, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, WANT_K, WANT_V, LIMITS, SOFTCAP, NATURAL)),
                (compute, (common, 2, Q_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, GROUPS, HIDES, WANT_K, WANT_V, LIMITS, SOFTCAP, NATURAL)),
                (copy, (copied, Q_HEADS, GROUP, GROUPS, WANT_K, LIMITS, NATURAL)),
            ],
            [4, 4, 1], [160, 160, 32],
        )  # fmt: skip
