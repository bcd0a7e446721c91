"""Block-sparse masks for the kernels: a list of the tiles that hold a kept pair, made on the device, for each kernel's own tiles."""

from __future__ import annotations

from typing import Any

import torch

from attnhub.backends.triton.kernels.tile_map import tile_map_kernel
from attnhub.backends.triton.launch import Recorder
from attnhub.backends.triton.tiles import Tiles

_NONE: dict[str, Any] = {
    "tile_map": None, "tile_map_stride_b": 0, "tile_map_stride_h": 0, "tile_count": 0,
    "sparse": None, "sparse_stride_b": 0, "sparse_stride_h": 0, "sparse_stride_q": 0, "SPARSE_Q": 1, "SPARSE_K": 1,
}  # fmt: skip
_TILES = Tiles(0, 0, 4, 1)
#: Tiles of a row that one program of `tile_map_kernel` looks at in one step.
_STEP = 128


def block_sparse(recorder: Recorder, arguments: dict[str, Any], block_m: int, block_n: int, *, by_keys: bool = False, group: int = 1) -> dict[str, Any]:
    """The kernels' arguments for ``arguments["block_sparse"]`` (uint8, or None), those of ``arguments`` included that change with it.

    block_m query rows by block_n keys are one tile. by_keys: rows of the map are blocks of keys (dK/dV). group: query heads that one
    program serves together with all of their rows (PACK).
    """
    blocks = arguments["block_sparse"]
    if blocks is None:
        return _NONE
    batch, heads, rows, columns = blocks.shape
    row_size, column_size = arguments["block_size"]
    max_q, max_k = arguments["max_q"], arguments["max_k"]
    packed = group > 1
    if packed:
        block_m = max_q
    strides = blocks.stride()
    stride_b, stride_h = (0 if size == 1 else stride for size, stride in zip((batch, heads), strides))
    # Where a tile lies in one block, and that in one head's, the list says it all. Else pairs are tested one by one.
    aligned = (rows == 1 or row_size % block_m == 0) and (columns == 1 or column_size % block_n == 0) and not (packed and heads > 1)
    pairs: dict[str, Any] = {}
    if not aligned:
        pairs = {
            "sparse": blocks, "sparse_stride_b": stride_b, "sparse_stride_h": stride_h, "sparse_stride_q": strides[2],
            "SPARSE_Q": row_size, "SPARSE_K": column_size, "MASK_ALL": True, "MASK_VALUES": True, "LEFT_PHASE": False,
        }  # fmt: skip
    sides = [(rows, row_size, strides[2], block_m, -(-max_q // block_m)), (columns, column_size, strides[3], block_n, -(-max_k // block_n))]
    (rows, row_size, stride_row, tile_rows, row_tiles), (columns, column_size, stride_column, tile_columns, column_tiles) = sides[::-1] if by_keys else sides
    if heads == 1:
        group = 1
    heads //= group
    shape = (batch, heads, row_tiles, 2, column_tiles + 1)
    tile_map = recorder.buffer(f"tile_map {len(recorder.buffers)}", torch.empty(shape, dtype=torch.int32, device=blocks.device))
    recorder.launch(
        tile_map_kernel, batch * heads * row_tiles, _TILES,
        blocks=blocks, tile_map=tile_map, stride_b=strides[0], stride_h=strides[1], stride_row=stride_row, stride_column=stride_column,
        heads=heads, group=group, rows=rows, columns=columns, row_size=row_size, column_size=column_size,
        tile_rows=tile_rows, tile_columns=tile_columns, row_tiles=row_tiles, column_tiles=column_tiles, BLOCK=_STEP,
    )  # fmt: skip
    return {
        **_NONE, **pairs,
        "tile_map": tile_map, "tile_map_stride_b": 0 if batch == 1 else tile_map.stride(0), "tile_map_stride_h": 0 if heads == 1 else tile_map.stride(1),
        "tile_count": column_tiles,
    }  # fmt: skip
