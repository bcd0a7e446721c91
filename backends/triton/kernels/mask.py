"""Which pairs of query and key a kernel computes: ranges of whole tiles, and the test for a single pair.

Positions are those of `attnhub.mask`: query row i stands at ``p = i + shift`` on the key axis. A causal mask that nothing
widens is the window ``right = 0``; CAUSAL is set only where a prefix or blocks widen it. Every range function returns
``(lo, full_lo, full_hi, hi)``: tiles inside [full_lo, full_hi) need no mask, tiles outside [lo, hi) hold no allowed pair.
"""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_range(
    first, last, len_k, lowest, left, right, chunk, prefix,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Keys that queries at positions first..last (inclusive) may attend to."""
    lo = lowest
    full_lo = lowest
    hi = len_k
    full_hi = len_k
    if CAUSAL:
        hi = tl.minimum(hi, tl.maximum(last + 1, prefix))
        full_hi = tl.minimum(full_hi, tl.maximum(first + 1, prefix))
    if RIGHT:
        hi = tl.minimum(hi, last + right + 1)
        full_hi = tl.minimum(full_hi, first + right + 1)
    if LEFT:
        lo = tl.maximum(lo, first - left)
        full_lo = tl.maximum(full_lo, last - left)
    if CHUNK:
        # Positions before key 0 (more queries than keys) have no keys; division truncates, so they are set apart.
        chunk_first = tl.maximum(first, 0) // chunk * chunk
        chunk_last = tl.maximum(last, 0) // chunk * chunk
        lo = tl.maximum(lo, chunk_first)
        full_lo = tl.maximum(full_lo, chunk_last)
        hi = tl.minimum(hi, chunk_last + chunk)
        full_hi = tl.where(first < 0, 0, tl.minimum(full_hi, chunk_first + chunk))
    return lo, full_lo, full_hi, hi


@triton.jit
def query_range(
    first, last, len_q, shift, left, right, chunk, prefix,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Query rows that may attend to keys first..last (inclusive)."""
    lo = 0
    full_lo = 0
    hi = len_q
    full_hi = len_q
    if CAUSAL:
        lo = tl.where(first < prefix, lo, tl.maximum(lo, first - shift))
        full_lo = tl.where(last < prefix, full_lo, tl.maximum(full_lo, last - shift))
    if RIGHT:
        lo = tl.maximum(lo, first - right - shift)
        full_lo = tl.maximum(full_lo, last - right - shift)
    if LEFT:
        hi = tl.minimum(hi, last + left - shift + 1)
        full_hi = tl.minimum(full_hi, first + left - shift + 1)
    if CHUNK:
        chunk_first = first // chunk * chunk
        chunk_last = last // chunk * chunk
        lo = tl.maximum(lo, chunk_first - shift)
        full_lo = tl.maximum(full_lo, chunk_last - shift)
        hi = tl.minimum(hi, chunk_last + chunk - shift)
        full_hi = tl.minimum(full_hi, chunk_first + chunk - shift)
    return lo, full_lo, full_hi, hi


@triton.jit
def align_range(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr, MASK_ALL: tl.constexpr):
    """The same range in whole tiles: starts are multiples of BLOCK, and lo <= full_lo <= full_hi."""
    lo = tl.maximum(lo, 0) // BLOCK * BLOCK
    if MASK_ALL:
        full_lo = lo
        full_hi = lo
    else:
        full_lo = tl.maximum((tl.maximum(full_lo, 0) + BLOCK - 1) // BLOCK * BLOCK, lo)
        full_hi = tl.maximum(full_hi, 0) // BLOCK * BLOCK
        # Without a full tile in between, everything is one masked range.
        empty = full_hi <= full_lo
        full_lo = tl.where(empty, lo, full_lo)
        full_hi = tl.where(empty, lo, full_hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def keep_pairs(
    b, h, i, j, p, len_q, len_k, lowest, left, right, chunk, prefix,
    segments_q, segments_k, segments_q_stride, segments_k_stride,
    blocks_q, blocks_k, blocks_q_stride, blocks_k_stride,
    bool_mask, bool_stride_b, bool_stride_h, bool_stride_q, bool_stride_k,
    sparse, sparse_stride_b, sparse_stride_h, sparse_stride_q, SPARSE_Q: tl.constexpr, SPARSE_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """True where the pair is allowed. i, p, h (query side) and j (key side) are 2-D and broadcast in either order."""
    keep = (j < len_k) & (j >= lowest) & (i < len_q)
    if CAUSAL:
        causal = (j <= p) | (j < prefix)
        if blocks_q is not None:
            ids_q = tl.load(blocks_q + b * blocks_q_stride + i, mask=i < len_q, other=-1)
            ids_k = tl.load(blocks_k + b * blocks_k_stride + j, mask=j < len_k, other=-1)
            causal = causal | ((ids_q == ids_k) & (ids_q >= 0))
        keep = keep & causal
    if RIGHT:
        keep = keep & (j <= p + right)
    if LEFT:
        keep = keep & (j >= p - left)
    if CHUNK:
        keep = keep & (p >= 0) & (tl.maximum(p, 0) // chunk == j // chunk)
    if segments_q is not None:
        ids_q = tl.load(segments_q + b * segments_q_stride + i, mask=i < len_q, other=0)
        ids_k = tl.load(segments_k + b * segments_k_stride + j, mask=j < len_k, other=0)
        keep = keep & (ids_q == ids_k)
    if bool_mask is not None:
        base = bool_mask + tl.cast(b, tl.int64) * bool_stride_b + tl.cast(h, tl.int64) * bool_stride_h
        value = tl.load(base + i.to(tl.int64) * bool_stride_q + j.to(tl.int64) * bool_stride_k, mask=(i < len_q) & (j < len_k), other=0)
        keep = keep & (value != 0)
    if sparse is not None:
        base = sparse + tl.cast(b, tl.int64) * sparse_stride_b + tl.cast(h, tl.int64) * sparse_stride_h
        value = tl.load(base + (i // SPARSE_Q).to(tl.int64) * sparse_stride_q + j // SPARSE_K, mask=(i < len_q) & (j < len_k), other=0)
        keep = keep & (value != 0)
    return keep
