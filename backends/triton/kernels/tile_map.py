"""Block-sparse masks as lists of tiles: for every row of tiles, the indices of those that hold a kept pair.

A map is int32 [B or 1, heads, rows, 2, tiles + 1]: of each row, first the list of its kept tiles in ascending order, then the ranks:
rank[t] is the number of kept tiles before tile t. A range of tiles is then a range of the list.
"""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

RUNTIME = [
    "stride_b", "stride_h", "stride_row", "stride_column", "heads", "group", "rows", "columns", "row_size", "column_size",
    "tile_rows", "tile_columns", "row_tiles", "column_tiles",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def tile_map_kernel(
    blocks, tile_map, stride_b, stride_h, stride_row, stride_column, heads, group, rows, columns, row_size, column_size,
    tile_rows, tile_columns, row_tiles, column_tiles, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of tiles of a map. Grid: batch * heads * row_tiles.

    blocks (uint8) holds rows x columns blocks of row_size x column_size pairs; a tile is tile_rows x tile_columns pairs. A head of the
    map is kept where any of ``group`` neighbouring heads of the blocks is.
    """
    pid = tl.program_id(0)
    row = pid % row_tiles
    h = pid // row_tiles % heads
    b = pid // row_tiles // heads
    first_row = row * tile_rows // row_size
    last_row = tl.minimum(((row + 1) * tile_rows - 1) // row_size, rows - 1)
    base = blocks + tl.cast(b, tl.int64) * stride_b
    listed = tile_map + tl.cast(pid, tl.int64) * 2 * (column_tiles + 1)
    ranks = listed + column_tiles + 1
    found = 0
    for start in tl.range(0, column_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tile_ok = tile < column_tiles
        first_column = tile * tile_columns // column_size
        last_column = tl.minimum(((tile + 1) * tile_columns - 1) // column_size, columns - 1)
        kept = tl.zeros((BLOCK,), tl.int32)
        for g in tl.range(0, group):
            for r in tl.range(first_row, last_row + 1):
                line = base + tl.cast(h * group + g, tl.int64) * stride_h + tl.cast(r, tl.int64) * stride_row
                for step in tl.range(0, (tile_columns - 1) // column_size + 2):
                    column = first_column + step
                    value = tl.load(line + column.to(tl.int64) * stride_column, mask=tile_ok & (column <= last_column), other=0)
                    kept = kept | tl.where(value != 0, 1, 0)
        rank = found + tl.cumsum(kept, 0) - kept
        tl.store(ranks + tile, rank, mask=tile_ok)
        tl.store(listed + rank, tile, mask=tile_ok & (kept != 0))
        found += tl.sum(kept, 0)
    tl.store(ranks + column_tiles, found)


@triton.jit
def listed_range(row, count, lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """The four bounds of `kernels.mask`, in tokens, as positions in a row's list. row: where the list begins; count: tiles in a row."""
    last = tl.minimum(tl.maximum(hi + BLOCK - 1, 0) // BLOCK, count)
    ranks = row + count + 1
    lo = tl.load(ranks + tl.minimum(lo // BLOCK, last))
    full_lo = tl.load(ranks + tl.minimum(full_lo // BLOCK, last))
    full_hi = tl.load(ranks + tl.minimum(full_hi // BLOCK, last))
    return lo, full_lo, full_hi, tl.load(ranks + last)


@triton.jit
def listed_token(row, position, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """First token of a step: positions count steps of STEP tokens, BLOCK // STEP of them for each tile of the list."""
    index = position // (BLOCK // STEP)
    token = tl.load(row + index) * BLOCK
    if STEP != BLOCK:
        token += (position - index * (BLOCK // STEP)) * STEP
    return token
