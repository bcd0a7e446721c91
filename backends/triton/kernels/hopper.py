"""What the kernels for Hopper share. They are written in Gluon, Triton's lower language, in which a program says which warp does what:
one warp copies tiles (TMA) while warpgroups of 64 rows compute (the division of labour of FlashAttention-3, arXiv 2407.08608).

Ranges of tiles are the functions of `kernels.mask`, compiled for Gluon; `kernels.mask.keep_pairs` and `kernels.tile.add_bias` say what
`kept` and `biased` do in fewer instructions. Arguments that only pass through a function travel as tuples:

place    (pairs of sequence and head, pairs in a section, tiles in all): see `tile_place`
queue    (counter of the tiles drawn, or None; their numbers and barriers in shared memory): see `draw_tile`
lengths  (cu_q, cu_k, seqused_k, leftpad, prefix, sequences, max_q, max_k, tokens_q, tokens_k)
limits   (left, right, chunk); LIMITS their constants (LEFT, RIGHT, CHUNK, CAUSAL, TOP_LEFT, LEFT_PHASE, MASK_ALL, whether ranges are causal,
         PAIRS: whether two neighbours in a row of the bias are one aligned word, BY_KEYS: whether `kept` asks from the side of keys)
added    bias and ALiBi, in the order of `kernels.tile.add_bias`
data     ids and boolean mask, in the order of `kernels.mask.keep_pairs`
"""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2, tma, warpgroup_mma

from attnhub.backends.triton.kernels import forward, mask, tile
from attnhub.backends.triton.kernels.tile import INF, LOG2_E

align_range = gluon.jit(mask.align_range.fn)
key_range = gluon.jit(mask.key_range.fn)
power = gluon.jit(tile.power.fn)
query_block = gluon.jit(forward.query_block.fn)
query_range = gluon.jit(mask.query_range.fn)
# Renamed after Triton 3.6.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

#: Lengths and limits change from call to call and take no part in the choice of instructions.
RUNTIME = [
    "scale", "softmax_scale", "softcap", "sequences", "max_q", "max_k", "tokens_q", "tokens_k", "left", "right", "chunk", "pairs", "section", "tile_total",
]  # fmt: skip


@gluon.jit
def regular_tile(turn):
    """The tile of a program's turn in a fixed order. In every other turn the programs take their tiles in reverse order: whose last tile was
    among the longer ones then gets one of the shorter."""
    programs = gl.num_programs(0)
    p = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, p, programs - 1 - p)


@gluon.jit
def draw_tile(turn, queue):
    """The copying warp's tile after ``turn`` others: the first that no program has, told to the computing warpgroups; without a queue, the regular one."""
    counter, numbers, told, heard = queue
    if counter is None:
        index = regular_tile(turn + 1)
    else:
        LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        slot = turn % 2
        index = gl.num_programs(0) + gl.atomic_add(counter, 1)
        mbarrier.wait(heard.index(slot), (turn // 2 & 1) ^ 1)
        numbers.index(slot).store(gl.full((1,), index, gl.int32, LANES))
        # One lane arrives for all that have stored.
        barrier()
        mbarrier.arrive(told.index(slot), count=1)
    return index


@gluon.jit
def hear_tile(turn, queue):
    """A computing warpgroup's tile after ``turn`` others: what the copying warp drew."""
    counter, numbers, told, heard = queue
    if counter is None:
        index = regular_tile(turn + 1)
    else:
        slot = turn % 2
        mbarrier.wait(told.index(slot), turn // 2 & 1)
        index = gl.max(numbers.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        # One lane arrives for all that have read.
        barrier()
        mbarrier.arrive(heard.index(slot), count=1)
    return index


@gluon.jit
def tile_place(index, place, cu, sequences, longest, HEADS: gl.constexpr, BLOCK: gl.constexpr, LAST_FIRST: gl.constexpr):
    """(sequence, head, block) of a tile; the block may lie behind the sequence's end.

    cu: first tokens of packed sequences; longest: the length of the others. Of these, heads whose tensors share the cache form sections,
    in which blocks come in the order of their numbers or, with LAST_FIRST, in the reverse: what a causal mask makes longest starts first.
    Packed sequence b has the slots from cu[b] // BLOCK + b on, enough for its blocks wherever it begins.
    """
    pairs, section, _ = place
    if cu is None:
        blocks = gl.cdiv(longest, BLOCK)
        part = index // (section * blocks)
        inside = index - part * section * blocks
        size = gl.minimum(section, pairs - part * section)
        block = inside // size
        pair = part * section + inside - block * size
        if LAST_FIRST:
            block = blocks - 1 - block
        b = pair // HEADS
        h = pair - b * HEADS
    else:
        slot = index // HEADS
        h = index - slot * HEADS
        b = 0
        above = sequences + 1
        while above - b > 1:
            middle = (b + above) // 2
            behind = gl.load(cu + middle) // BLOCK + middle > slot
            above = gl.where(behind, middle, above)
            b = gl.where(behind, b, middle)
        block = slot - (gl.load(cu + b) // BLOCK + b)
    return b, h, block


@gluon.jit
def queries(lengths, b):
    """(first token, rows, batch index in memory) of sequence b."""
    cu_q, _, _, _, _, sequences, max_q, _, tokens_q, _ = lengths
    return query_block(cu_q, b, max_q, tokens_q, sequences)


@gluon.jit
def keys(lengths, b):
    """(first token, keys that exist, keys in memory, first key that is no padding, batch index in memory, prefix) of sequence b.

    Packed: sequence number ``sequences`` is what lies behind the last one; it has no keys.
    """
    _, cu_k, seqused_k, leftpad, prefix, sequences, _, max_k, _, tokens_k = lengths
    last = gl.minimum(b, sequences - 1)
    if cu_k is None:
        first = 0
        room = max_k
        length = room
        memory_b = b
    else:
        first = gl.load(cu_k + b)
        room = gl.where(b == sequences, tokens_k, gl.load(cu_k + last + 1)) - first
        length = gl.where(b == sequences, 0, room)
        memory_b = 0
    if seqused_k is not None:
        length = gl.maximum(gl.minimum(gl.load(seqused_k + last), length), 0)
    lowest = 0
    if leftpad is not None:
        lowest = gl.maximum(gl.load(leftpad + last), 0)
    prefix_len = 0
    if prefix is not None:
        prefix_len = gl.load(prefix + last)
    return first, length, room, lowest, memory_b, prefix_len


@gluon.jit
def rows_to_keys(first, rows, len_q, len_k, lowest, prefix_len, limits, LIMITS: gl.constexpr, BLOCK: gl.constexpr):
    """(lo, full_lo, full_hi, hi) of the keys that ``rows`` query rows from ``first`` on meet, in whole tiles of BLOCK."""
    left, right, chunk = limits
    shift = 0 if LIMITS[4] else len_k - len_q
    last = gl.minimum(first + rows, len_q) - 1
    lo, full_lo, full_hi, hi = key_range(
        first + shift, last + shift, len_k, lowest, left, right, chunk, prefix_len, LIMITS[0], LIMITS[1], LIMITS[2], LIMITS[7]
    )
    return align_range(lo, full_lo, full_hi, hi, BLOCK, LIMITS[6])


@gluon.jit
def keys_to_rows(first, rows, len_q, len_k, lowest, prefix_len, limits, LIMITS: gl.constexpr, BLOCK: gl.constexpr):
    """(lo, full_lo, full_hi, hi) of the query rows that ``rows`` keys from ``first`` on meet, in whole tiles of BLOCK."""
    left, right, chunk = limits
    shift = 0 if LIMITS[4] else len_k - len_q
    last = gl.minimum(first + rows, len_k) - 1
    lo, full_lo, full_hi, hi = query_range(first, last, len_q, shift, left, right, chunk, prefix_len, LIMITS[0], LIMITS[1], LIMITS[2], LIMITS[7])
    # A block that holds no key at all, or padding, has no full tile.
    hi = gl.where((first < len_k) & (first + rows > lowest), hi, 0)
    full_hi = gl.where((first >= lowest) & (first + rows <= len_k), full_hi, 0)
    lo, full_lo, full_hi, hi = align_range(lo, full_lo, full_hi, hi, BLOCK, LIMITS[6])
    return lo, full_lo, gl.maximum(gl.minimum(full_hi, hi // BLOCK * BLOCK), full_lo), hi


@gluon.jit
def row_limits(i, len_q, len_k, lowest, prefix_len, limits, LIMITS: gl.constexpr):
    """(first key, end of the keys) that rows i meet as far as limits and lengths say."""
    left, right, chunk = limits
    p = i if LIMITS[4] else i + (len_k - len_q)
    lo = gl.where(i < len_q, lowest, len_k)
    hi = len_k
    if LIMITS[7]:
        hi = gl.minimum(hi, gl.maximum(p + 1, prefix_len))
    if LIMITS[1]:
        hi = gl.minimum(hi, p + right + 1)
    if LIMITS[0]:
        lo = gl.maximum(lo, p - left)
    if LIMITS[2]:
        # Positions before key 0 have no keys; division truncates, so they are set apart.
        start = gl.maximum(p, 0) // chunk * chunk
        lo = gl.maximum(lo, start)
        hi = gl.where(p >= 0, gl.minimum(hi, start + chunk), 0)
    return lo, hi


@gluon.jit
def key_limits(j, len_q, len_k, lowest, prefix_len, limits, LIMITS: gl.constexpr):
    """(first row, end of the rows) that meet keys j as far as limits and lengths say: `row_limits` from the other side."""
    left, right, chunk = limits
    shift = 0 if LIMITS[4] else len_k - len_q
    lo = gl.where((j >= lowest) & (j < len_k), 0, len_q)
    hi = len_q
    if LIMITS[7]:
        lo = gl.where(j < prefix_len, lo, gl.maximum(lo, j - shift))
    if LIMITS[1]:
        lo = gl.maximum(lo, j - right - shift)
    if LIMITS[0]:
        hi = gl.minimum(hi, j + left - shift + 1)
    if LIMITS[2]:
        start = j // chunk * chunk
        lo = gl.maximum(lo, start - shift)
        hi = gl.minimum(hi, start + chunk - shift)
    return lo, hi


@gluon.jit
def kept(b, h, i, j, len_q, len_k, lowest, prefix_len, limits, data, LIMITS: gl.constexpr):
    """Which pairs are allowed. i and j are 2-D and broadcast in either order.

    Limits cost two comparisons a pair, with what they mean for a whole row or, with LIMITS[9], key.
    """
    if LIMITS[9]:
        lo, hi = key_limits(j, len_q, len_k, lowest, prefix_len, limits, LIMITS)
        keep = (i >= lo) & (i < hi)
    else:
        lo, hi = row_limits(i, len_q, len_k, lowest, prefix_len, limits, LIMITS)
        keep = (j >= lo) & (j < hi)
    segments_q, segments_k, segments_q_stride, segments_k_stride, blocks_q, blocks_k, blocks_q_stride, blocks_k_stride = data[:8]
    bool_mask, stride_b, stride_h, stride_q, stride_k = data[8:]
    if blocks_q is not None:
        p = i if LIMITS[4] else i + (len_k - len_q)
        ids_q = gl.load(blocks_q + b * blocks_q_stride + i, mask=i < len_q, other=-1)
        ids_k = gl.load(blocks_k + b * blocks_k_stride + j, mask=j < len_k, other=-1)
        keep = keep & ((j <= p) | (j < prefix_len) | ((ids_q == ids_k) & (ids_q >= 0)))
    if segments_q is not None:
        segment_q = gl.load(segments_q + b * segments_q_stride + i, mask=i < len_q, other=0)
        segment_k = gl.load(segments_k + b * segments_k_stride + j, mask=j < len_k, other=0)
        keep = keep & (segment_q == segment_k)
    if bool_mask is not None:
        base = bool_mask + gl.cast(b, gl.int64) * stride_b + gl.cast(h, gl.int64) * stride_h
        value = gl.load(base + i.to(gl.int64) * stride_q + j.to(gl.int64) * stride_k, mask=(i < len_q) & (j < len_k), other=0)
        keep = keep & (value != 0)
    return keep


@gluon.jit
def tanh(x):
    """tanh with an absolute error of a few 1e-7, in five instructions: enough for scores of two-byte inputs that are capped below 1000."""
    grown = 1.0 + gl.exp2(x * (2.0 * LOG2_E))
    return 1.0 - 2.0 * gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [grown], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def load_bias(b, h, row, i, column, j, len_q, columns, added, LIMITS: gl.constexpr):
    """The bias of rows ``row + i`` and keys ``column + j`` as it lies in memory, 0 where there is none. i and j are 2-D and broadcast.

    It is loaded while products run, before they are awaited. columns: keys in memory. LIMITS[8]: neighbours of a row lie together.
    """
    value = 0.0
    bias, stride_b, stride_h, stride_q, stride_k, _, _ = added
    if bias is not None:
        base = bias + gl.cast(b, gl.int64) * stride_b + gl.cast(h, gl.int64) * stride_h
        base += gl.cast(row, gl.int64) * stride_q + gl.cast(column, gl.int64) * stride_k
        pointers = base + i.to(gl.int64) * stride_q + j.to(gl.int64) * stride_k
        exist = (row + i < len_q) & (column + j < columns)
        if LIMITS[8]:
            pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 2 * bias.dtype.element_ty.primitive_bitwidth // 8]), [1, 2])
            exist = gl.max_constancy(exist, [1, 2])
        value = gl.load(pointers, mask=exist, other=0.0)
    return value


@gluon.jit
def biased(s, value, b, h, i, j, len_q, len_k, added, LIMITS: gl.constexpr, NATURAL: gl.constexpr):
    """(scores plus bias and ALiBi, in base 2 or, with NATURAL, base e; pairs that the bias leaves). value: see `load_bias`.

    As in `kernels.tile.add_bias`, whose text says why a bias wants base e.
    """
    left = True
    bias, _, _, _, _, alibi, alibi_stride_b = added
    if bias is not None:
        wide = value.to(gl.float32)
        left = wide != -INF
        s = s + wide
    if alibi is not None:
        slope = gl.load(alibi + b * alibi_stride_b + h) * (1.0 if NATURAL else LOG2_E)
        p = i if LIMITS[4] else i + (len_k - len_q)
        s = s - slope * gl.abs(p - j).to(gl.float32)
    return s, left


@gluon.jit
def weights_again(
    s, value, row_lse, b, h, i, j, len_q, len_k, lowest, prefix_len, scale, softcap, limits, added, data,
    LIMITS: gl.constexpr, SOFTCAP: gl.constexpr, NATURAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(P, d capped score / d score, pairs kept) of the backward from raw products and lse. i, j, row_lse broadcast in either order.

    value: see `load_bias`.
    """
    slope = 1.0
    if SOFTCAP:
        capped = tanh(s * (scale / softcap))
        slope = 1.0 - capped * capped
        s = softcap * (1.0 if NATURAL else LOG2_E) * capped
    else:
        s = s * scale
    s, left = biased(s, value, b, h, i, j, len_q, len_k, added, LIMITS, NATURAL)
    weights = power(s - row_lse, NATURAL)
    keep = True
    if MASKED:
        keep = kept(b, h, i, j, len_q, len_k, lowest, prefix_len, limits, data, LIMITS)
        if added[0] is not None:
            keep = keep & left
        weights = gl.where(keep, weights, 0.0)
    return weights, slope, keep


@gluon.jit
def multiply_transposed(a, x, layout: gl.constexpr):
    """a x^T of two tiles in shared memory [64, D] and [N, D]: started, not awaited."""
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = x.shape[0]
    zeros = gl.zeros((M, N), gl.float32, layout)
    return warpgroup_mma(a, x.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def any_nonfinite(x):
    """Whether a 2-D tile holds NaN or an infinity: a scalar, 0 or 1."""
    return gl.max(gl.max(gl.where(gl.abs(x) < INF, 0, 1), 1), 0)


# -- values that are not finite -------------------------------------------------------------------------------------------
#
# A masked pair has weight 0, but 0 * NaN is NaN. A warpgroup whose sums end up with a NaN or infinity computes its 64 rows once
# more, CAREFUL rows of the other side at a time, with the products of `kept_product`.

#: Rows of the other side in a step of the repetition: the smallest product's.
CAREFUL: gl.constexpr = gl.constexpr(16)


@gluon.jit
def load_rows(head, first, rows, rows_ok, strides, DIM: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """A tile of WIDTH dimensions, of which DIM exist, at ``rows`` of a head; 0 where there is nothing."""
    return gl.load(row_pointers(head, first + rows, strides, WIDTH, layout), mask=existing(rows_ok, DIM, WIDTH, layout), other=0.0)


@gluon.jit
def add_transposed(a, x, acc):
    """acc + a x^T for a tile a [64, W] in shared memory and x [CAREFUL, W] in registers; acc has a layout of version 2."""
    layout: gl.constexpr = acc.type.layout
    left = a.load(gl.DotOperandLayout(0, layout, 2))
    return mma_v2(left, gl.convert_layout(gl.permute(x, (1, 0)), gl.DotOperandLayout(1, layout, 2)), acc)


@gluon.jit
def add_kept(p, keep, x, acc):
    """acc + p x over the kept pairs only: a NaN or infinity in x reaches a row only through a pair that keep allows.

    The product sees finite values; which rows meet which other value is a second product, of zeros and ones.
    """
    layout: gl.constexpr = acc.type.layout
    A: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    wide = x.to(gl.float32)
    finite = gl.abs(wide) < INF
    acc = mma_v2(gl.convert_layout(p.to(x.dtype), A), gl.convert_layout(gl.where(finite, wide, 0.0).to(x.dtype), B), acc)
    ones = gl.convert_layout(gl.where(keep, 1.0, 0.0).to(x.dtype), A)
    # NaN counts as both infinities: their sum.
    for sign in gl.static_range(0, 2):
        special = INF if sign == 0 else -INF
        marks = gl.where(finite | (wide == -special), 0.0, 1.0).to(x.dtype)
        met = mma_v2(ones, gl.convert_layout(marks, B), gl.zeros_like(acc))
        acc += gl.where(met > 0, special, 0.0)
    return acc


@gluon.jit
def copy_box(x, b, h, token, column, barrier, tile):
    """Start copying a box of x [B, H, S, D] into a 2-D tile; ``barrier`` counts the bytes. Outside of x there are zeros."""
    ROWS: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = tile.shape[1]
    load_box(x, [b, h, token, column], barrier, tile.reshape((1, 1, ROWS, WIDTH)))


@gluon.jit
def head_of(x, memory_b, h, strides):
    """Where head h of a sequence begins. strides: of batch, head and token."""
    return x + gl.cast(memory_b, gl.int64) * strides[0] + gl.cast(h, gl.int64) * strides[1]


@gluon.jit
def row_pointers(head, rows, strides, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Pointers [rows, WIDTH] to rows of a head."""
    return head + (rows.to(gl.int64) * strides[2])[:, None] + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def existing(rows_ok, DIM: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """The mask of a tile whose width was padded from DIM to WIDTH."""
    return rows_ok[:, None] & (gl.arange(0, WIDTH, gl.SliceLayout(0, layout)) < DIM)[None, :]
