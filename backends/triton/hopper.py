"""Launching the kernels for Hopper (`kernels.hopper`): which calls they serve, their tiles, tensor descriptors and grids.

They do not keep a NaN or infinity of a masked key from the rows of its tile. Where a mask hides values, they mark the blocks of 64 rows that
came out not finite, and the general kernels compute those blocks again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from attnhub.backends.triton.block_sparse import NO_SPARSE
from attnhub.backends.triton.launch import Recorder
from attnhub.backends.triton.tiles import Tiles
from attnhub.problem import Problem

#: Gluon changed up to this version in ways that the kernels do not follow.
_OLDEST = (3, 6)
#: Bytes of tensors that programs running side by side may share through the L2 cache (50 MB, of two halves).
_SECTION = 24 << 20
_MOST_DIM = 256


def serves_problem(problem: Problem) -> bool:
    """Whether the kernels can serve calls of a problem; `serves` judges the call."""
    device = problem.device
    if device.vendor != "nvidia" or device.arch != (9, 0) or problem.q_dtype not in ("float16", "bfloat16"):
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= _OLDEST and max(problem.head_dim, problem.v_head_dim) <= _MOST_DIM and _importable()


def choices(problem: Problem) -> dict[str, list[Tiles]]:
    """Tiles by role, none where the kernels do not serve the problem. Those of a forward with more rows come with `_LONG`.

    block_m, block_n: 64 query rows (keys in dK/dV) for each computing warpgroup. The rows here are the fastest of two to four measured on an H100.
    """
    if not serves_problem(problem):
        return {}
    return {role: [rows[_width(max(problem.head_dim, problem.v_head_dim))]] for role, rows in _TILES.items()}


_TILES = {
    "hopper_forward": {64: Tiles(128, 128, 4, 2), 128: Tiles(128, 128, 4, 2), 256: Tiles(128, 64, 4, 2)},
    "hopper_grad_kv": {64: Tiles(64, 128, 4, 2), 128: Tiles(64, 128, 4, 2), 256: Tiles(32, 128, 4, 2)},
    "hopper_grad_q": {64: Tiles(128, 128, 4, 3), 128: Tiles(128, 64, 4, 3), 256: Tiles(128, 32, 4, 2)},
}
#: Three warpgroups share each tile of K and V: for head_dim 64, from so many query rows on.
_LONG = (2048, Tiles(192, 128, 4, 2))
#: Up to so many keys, the start and end of a tile matter more than an even load: a program for each multiprocessor, walking over tiles.
_WALKED = 2048


def _width(dim: int) -> int:
    """The width of a tile in shared memory: a power of two, in rows of 128 bytes."""
    return max(64, 1 << (dim - 1).bit_length())


@functools.lru_cache(maxsize=1)
def _importable() -> bool:
    """Gluon is experimental: a version may lack what the kernels name."""
    try:
        import attnhub.backends.triton.kernels.hopper_forward
        import attnhub.backends.triton.kernels.hopper_grad_kv
        import attnhub.backends.triton.kernels.hopper_grad_q  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def serves(arguments: dict[str, Any]) -> bool:
    """Whether the kernels serve a call: what the copy engine can address, and the parts of a mask that they know."""
    if arguments["block_sparse"] is not None or arguments["rng"] is not None or arguments.get("PAGE_SIZE"):
        return False
    return all(_addressable(arguments[name]) for name in ("q", "k", "v", "grad_out") if arguments.get(name) is not None)


def _addressable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: aligned to 16 bytes, and nothing repeated."""
    item = x.element_size()
    if x.data_ptr() % 16 or x.stride(3) != 1:
        return False
    return all(size == 1 or (stride > 0 and stride * item % 16 == 0) for size, stride in zip(x.shape[:3], x.stride()[:3]))


def _boxes(x: Tensor, rows: int, width: int) -> Any:
    """A tensor descriptor over [B, H, S, D] with boxes of rows tokens by width dimensions."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # The stride of a dimension of size 1 is arbitrary in torch; the engine wants one that it could use.
    strides = [stride if size > 1 else 64 for size, stride in zip(x.shape[:3], x.stride()[:3])]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, width], NVMMASharedLayout(128, 16, 4))


def _hides(arguments: dict[str, Any]) -> bool:
    """Whether a tile can hold values that some of its rows must not see."""
    return bool(arguments["MASK_VALUES"]) or any(arguments[name] is not None for name in ("cu_q", "seqused_k", "leftpad"))


def _programs(arguments: dict[str, Any], heads: int, row_bytes: int, blocks: int, length: int) -> tuple[int, dict[str, int]]:
    """(programs of the grid, the kernel's arguments about it). row_bytes: of one token in what programs of a head share."""
    pairs = heads * (arguments["sequences"] + (arguments["cu_q"] is not None))
    tiles = pairs * blocks
    # Without a mask that makes blocks differ, blocks of a head follow one another.
    uneven = arguments["RIGHT"] or arguments["CAUSAL"]
    section = max(1, _SECTION // max(1, row_bytes * length)) if uneven else 1
    programs = min(tiles, _processors(arguments["q"].device)) if length <= _WALKED else tiles
    return programs, {"pairs": pairs, "section": section, "tile_total": tiles}


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def forward(recorder: Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
    """out and lse."""
    from attnhub.backends.triton.kernels.forward import forward_kernel
    from attnhub.backends.triton.kernels.hopper_forward import hopper_forward_kernel

    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    dim, v_width = arguments["HEAD_DIM"], _width(arguments["V_HEAD_DIM"])
    width = -(-dim // 64) * 64
    if width & (width - 1):
        width = 64
    if max(dim, v_width) <= 64 and arguments["max_q"] >= _LONG[0]:
        tiles = _LONG[1]
    groups, blocks = tiles.block_m // 64, -(-arguments["max_q"] // tiles.block_m)
    heads = arguments["Q_HEADS"]
    programs, place = _programs(arguments, heads, 2 * (dim + v_width), blocks, arguments["max_k"])
    flags = _flags(recorder, arguments, place["pairs"] * blocks * groups)
    recorder.launch(
        hopper_forward_kernel, programs, tiles,
        **{
            **arguments, **place, "flags": flags, "BLOCK_DV": v_width, "BLOCK_N": tiles.block_n, "WIDTH": width, "CHUNKS": -(-dim // width),
            "STAGES": tiles.num_stages, "GROUPS": groups,
            "q_boxes": _boxes(q, 64, width), "k_boxes": _boxes(k, tiles.block_n, width), "v_boxes": _boxes(v, tiles.block_n, v_width),
        },
    )  # fmt: skip
    if flags is not None:
        again = {**arguments, **NO_SPARSE, "flags": flags, "flag_blocks": blocks * groups, "PACK": False, "splits": 1, "SPLIT": False}
        recorder.launch(forward_kernel, -(-arguments["max_q"] // 64) * place["pairs"], _AGAIN, **again, BLOCK_M=64, BLOCK_N=_AGAIN.block_n)


def grad_q(recorder: Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
    """grad_q, and delta for what follows."""
    from attnhub.backends.triton.kernels.backward import grad_q_kernel
    from attnhub.backends.triton.kernels.hopper_grad_q import hopper_grad_q_kernel

    width, v_width = _width(arguments["HEAD_DIM"]), _width(arguments["V_HEAD_DIM"])
    groups, blocks = tiles.block_m // 64, -(-arguments["max_q"] // tiles.block_m)
    programs, place = _programs(arguments, arguments["Q_HEADS"], 2 * (width + v_width), blocks, arguments["max_k"])
    flags = _flags(recorder, arguments, place["pairs"] * blocks * groups)
    recorder.launch(
        hopper_grad_q_kernel, programs, tiles,
        **{
            **arguments, **place, **_all_boxes(arguments, 64, tiles.block_n, width, v_width), "flags": flags,
            "BLOCK_D": width, "BLOCK_DV": v_width, "BLOCK_N": tiles.block_n, "STAGES": tiles.num_stages, "GROUPS": groups,
        },
    )  # fmt: skip
    arguments["delta_made"] = True
    if flags is not None:
        again = {**arguments, **NO_SPARSE, "flags": flags, "flag_blocks": blocks * groups}
        recorder.launch(grad_q_kernel, -(-arguments["max_q"] // 64) * place["pairs"], _AGAIN, **again, BLOCK_M=64, BLOCK_N=_AGAIN.block_n)


def grad_kv(recorder: Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
    """grad_k and grad_v."""
    from attnhub.backends.triton.kernels.backward import grad_kv_kernel
    from attnhub.backends.triton.kernels.hopper_grad_kv import hopper_grad_kv_kernel

    width, v_width = _width(arguments["HEAD_DIM"]), _width(arguments["V_HEAD_DIM"])
    heads = arguments["Q_HEADS"] // arguments["GROUP"]
    # Sums in registers: 64 rows of both gradients, or one after the other.
    parts = [(True, True)] if width + v_width <= 256 else [(True, False), (False, True)]
    groups, blocks = tiles.block_n // 64, -(-arguments["max_k"] // tiles.block_n)
    programs, place = _programs(arguments, heads, 2 * (width + v_width) * arguments["GROUP"], blocks, arguments["max_q"])
    for want_k, want_v in parts:
        flags = _flags(recorder, arguments, place["pairs"] * blocks * groups)
        recorder.launch(
            hopper_grad_kv_kernel, programs, tiles,
            **{
                **arguments, **place, **_all_boxes(arguments, tiles.block_m, 64, width, v_width), "flags": flags, "WANT_K": want_k, "WANT_V": want_v,
                "BLOCK_D": width, "BLOCK_DV": v_width, "BLOCK_M": tiles.block_m, "STAGES": tiles.num_stages, "GROUPS": groups,
            },
        )  # fmt: skip
        if flags is not None:
            again = {**arguments, **NO_SPARSE, "flags": flags, "flag_blocks": blocks * groups}
            recorder.launch(grad_kv_kernel, -(-arguments["max_k"] // 64) * place["pairs"], _AGAIN, **again, BLOCK_M=_AGAIN.block_n, BLOCK_N=64)


def _all_boxes(arguments: dict[str, Any], rows: int, keys: int, width: int, v_width: int) -> dict[str, Any]:
    return {
        "q_boxes": _boxes(arguments["q"], rows, width), "grad_out_boxes": _boxes(arguments["grad_out"], rows, v_width),
        "k_boxes": _boxes(arguments["k"], keys, width), "v_boxes": _boxes(arguments["v"], keys, v_width),
    }  # fmt: skip


def _flags(recorder: Recorder, arguments: dict[str, Any], blocks: int) -> Tensor | None:
    """A mark for each block of 64 rows, where there is something that must not leak."""
    if not _hides(arguments):
        return None
    return recorder.buffer(f"flags {len(recorder.buffers)}", torch.empty(blocks, dtype=torch.int32, device=arguments["q"].device))


#: Tiles of the general kernels that compute marked blocks again: 64 rows by so many keys, of any width.
_AGAIN = Tiles(64, 32, 4, 1)
