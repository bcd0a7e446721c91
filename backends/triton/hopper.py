"""Launching the kernels for Hopper (`kernels.hopper`): which calls they serve, their tiles, tensor descriptors and grids."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnhub.backends.triton import launch as launching
from attnhub.backends.triton.launch import Recorder
from attnhub.backends.triton.tiles import Tiles
from attnhub.problem import Feature, Problem

#: Gluon changed up to this version in ways that the kernels do not follow.
_OLDEST = (3, 6)
#: Bytes of tensors that programs running side by side may share through the L2 cache (50 MB, of two halves).
_SECTION = 24 << 20
_MOST_DIM = 256
#: `kernels.hopper.tanh` is exact to a few 1e-7, and its error is multiplied by the softcap: scores of larger ones take the general kernels' tanh.
_LARGEST_SOFTCAP = 1000.0
#: The forward's least scale: with 0, which smaller ones are in fp32, its masked scores, -inf, would become NaN. No score times this counts beside 1.
_SMALLEST = 2.0**-120
#: Tiles of V in flight in dQ.
_V_STAGES = 2
#: Shared memory of a block of threads, without what barriers, row data and changes of layout take.
_SHARED = 232448 - 8192


def serves_problem(problem: Problem) -> bool:
    """Whether the kernels can serve calls of a problem; `serves` judges the call."""
    device = problem.device
    if device.vendor != "nvidia" or device.arch != (9, 0) or problem.q_dtype not in ("float16", "bfloat16"):
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= _OLDEST and max(problem.head_dim, problem.v_head_dim) <= _MOST_DIM and _importable()


#: Each tile has a program; a program for each multiprocessor walks over the tiles in a fixed order; or it draws the next that nobody has, at the
#: price of a counter that is zeroed first.
EACH, WALK, DRAW = 0, 1, 2


class Row(NamedTuple):
    """Tiles for lengths up to ``longest``, and how programs come to them: EACH, WALK or DRAW."""

    longest: float
    tiles: Tiles
    walk: int


_ANY = math.inf
#: (role, width, whether a mask makes blocks of rows differ in work) -> rows by rising length: the fastest of two to nine tried on an H100 at 512
#: to 16384 tokens (width 256 of uneven work: the forward alone, to 16384; its backward as the narrower ones); the trials are in no result file.
#: block_m, block_n: 64 query rows (keys in dK/dV) for each computing warpgroup. Walking and drawing save the start and end of a tile.
_TABLE: dict[tuple[str, int, bool], tuple[Row, ...]] = {
    ("hopper_forward", 64, False): (Row(8192, Tiles(128, 128, 4, 2), WALK), Row(_ANY, Tiles(192, 128, 4, 2), WALK)),
    ("hopper_forward", 64, True): (
        Row(512, Tiles(128, 128, 4, 2), WALK), Row(8192, Tiles(128, 128, 4, 2), DRAW), Row(_ANY, Tiles(192, 128, 4, 2), DRAW),
    ),
    ("hopper_forward", 128, False): (Row(_ANY, Tiles(128, 128, 4, 2), WALK),),
    ("hopper_forward", 128, True): (
        Row(512, Tiles(128, 64, 4, 3), DRAW), Row(8192, Tiles(128, 128, 4, 2), DRAW), Row(_ANY, Tiles(128, 128, 4, 2), EACH),
    ),
    ("hopper_forward", 256, False): (Row(_ANY, Tiles(128, 64, 4, 2), WALK),),
    ("hopper_forward", 256, True): (Row(_ANY, Tiles(128, 64, 4, 2), DRAW),),
    ("hopper_grad_q", 64, False): (Row(2048, Tiles(128, 128, 4, 3), WALK), Row(_ANY, Tiles(128, 128, 4, 3), EACH)),
    ("hopper_grad_q", 64, True): (Row(_ANY, Tiles(128, 128, 4, 3), DRAW),),
    ("hopper_grad_q", 128, False): (Row(_ANY, Tiles(128, 64, 4, 3), WALK),),
    ("hopper_grad_q", 128, True): (Row(_ANY, Tiles(128, 64, 4, 3), DRAW),),
    ("hopper_grad_q", 256, False): (Row(_ANY, Tiles(128, 32, 4, 2), WALK),),
    ("hopper_grad_q", 256, True): (Row(_ANY, Tiles(128, 32, 4, 2), DRAW),),
    ("hopper_grad_kv", 64, False): (Row(_ANY, Tiles(128, 128, 4, 2), WALK),),
    ("hopper_grad_kv", 64, True): (Row(1024, Tiles(64, 128, 4, 3), DRAW), Row(_ANY, Tiles(128, 128, 4, 2), DRAW)),
    ("hopper_grad_kv", 128, False): (Row(_ANY, Tiles(64, 128, 4, 2), WALK),),
    ("hopper_grad_kv", 128, True): (Row(_ANY, Tiles(64, 128, 4, 2), DRAW),),
    ("hopper_grad_kv", 256, False): (Row(_ANY, Tiles(32, 128, 4, 2), WALK),),
    ("hopper_grad_kv", 256, True): (Row(_ANY, Tiles(32, 128, 4, 2), DRAW),),
}  # fmt: skip
ROLES = ("hopper_forward", "hopper_grad_kv", "hopper_grad_q")
_UNEVEN = frozenset({Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT, Feature.WINDOW})
#: What needs registers of its own beside scores and dP.
_MORE = frozenset({Feature.SOFTCAP, Feature.ALIBI, Feature.BIAS})
#: (role, width) -> the backward's tiles with such a part: with the table's, sums and scores do not stay in registers.
_SMALLER = {("hopper_grad_q", 64): Tiles(128, 64, 4, 3), ("hopper_grad_kv", 64): Tiles(64, 128, 4, 3)}


def _row(role: str, width: int, uneven: bool, length: int) -> Row:
    return next(row for row in _TABLE[role, width, uneven] if length <= row.longest)


def choices(problem: Problem) -> dict[str, list[Tiles]]:
    """Tiles by role, none where the kernels do not serve the problem."""
    if not serves_problem(problem):
        return {}
    width, uneven = _width(max(problem.head_dim, problem.v_head_dim)), bool(problem.features & _UNEVEN)
    found = {role: _row(role, width, uneven, problem.seqlen_k if role == "hopper_grad_kv" else problem.seqlen_q).tiles for role in ROLES}
    if problem.features & _MORE:
        found.update((role, _SMALLER[role, width]) for role in ROLES if (role, width) in _SMALLER)
    return {role: [tiles] for role, tiles in found.items()}


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
    if arguments["block_sparse"] is not None or arguments["rng"] is not None or arguments.get("PAGE_SIZE") or arguments["softcap"] > _LARGEST_SOFTCAP:
        return False
    return all(_addressable(arguments[name]) for name in ("q", "k", "v", "grad_out") if arguments.get(name) is not None)


def serves_forward(arguments: dict[str, Any]) -> bool:
    """As `serves`, of the forward; where blocks of 64 rows are for less than half of the device, smaller programs that divide the keys are faster."""
    pairs = arguments["Q_HEADS"] * (arguments["sequences"] + (arguments["cu_q"] is not None))
    return serves(arguments) and 2 * pairs * -(-arguments["max_q"] // 64) > launching.processors(arguments["q"].device)


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


def _in_pairs(arguments: dict[str, Any]) -> bool:
    """Whether two neighbours in a row of the bias are one aligned word."""
    bias = arguments["bias"]
    if bias is None or bias.data_ptr() % 16 or arguments["bias_stride_k"] != 1:
        return False
    return not any(size % 2 for size in (arguments["max_k"], *(arguments[f"bias_stride_{axis}"] for axis in "bhq")))


def _programs(
    recorder: Recorder, role: str, arguments: dict[str, Any], width: int, row_bytes: int, block: int, resident: int, staged: int, name: str = ""
) -> tuple[int, dict[str, Any]]:
    """(programs of the grid, the kernel's arguments about it). row_bytes: of one token in what programs of a head share. block: tokens of a
    program's tile. resident, staged: bytes of the tiles that stay for a whole block and of those that pass by.
    """
    by_keys = role == "hopper_grad_kv"
    heads = arguments["Q_HEADS"] // (arguments["GROUP"] if by_keys else 1)
    length, walked = (arguments["max_k"], arguments["max_q"]) if by_keys else (arguments["max_q"], arguments["max_k"])
    pairs, packed = heads * arguments["sequences"], arguments["cu_q"] is not None
    # Packed: the slots of `kernels.hopper.tile_place`, of sequences and of what lies behind the last one.
    tokens = arguments["tokens_k" if by_keys else "tokens_q"]
    tiles = heads * (tokens // block + arguments["sequences"] + 1) if packed else pairs * -(-length // block)
    uneven = bool(arguments["LEFT"] or arguments["RIGHT"] or arguments["CAUSAL"])
    # Without such a mask the blocks of a head follow one another.
    section = max(1, _SECTION // max(1, row_bytes * walked)) if uneven else 1
    way = DRAW if packed else _row(role, width, uneven, length).walk
    programs = tiles if way == EACH else min(tiles, launching.processors(arguments["q"].device))
    counter = None
    if way == DRAW and programs < tiles:
        counter = recorder.zeros(f"{role}{name}_counter", arguments["q"].new_empty(1, dtype=torch.int32))
    # Who walks on copies the next block's resident tiles meanwhile, where there is room.
    buffers = 2 if programs < tiles and 2 * resident + staged <= _SHARED else 1
    return programs, {"pairs": pairs, "section": section, "tile_total": tiles, "BUFFERS": buffers, "counter": counter}


def forward(recorder: Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
    """out and lse."""
    from attnhub.backends.triton.kernels.hopper_forward import hopper_forward_kernel

    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    dim, v_width = arguments["HEAD_DIM"], _width(arguments["V_HEAD_DIM"])
    width = -(-dim // 64) * 64
    if width & (width - 1):
        width = 64
    groups = tiles.block_m // 64
    chunks = -(-dim // width)
    # The output passes through another half of its tile.
    resident, staged = 2 * tiles.block_m * chunks * width, 2 * tiles.num_stages * tiles.block_n * (chunks * width + v_width) + tiles.block_m * v_width
    programs, place = _programs(recorder, "hopper_forward", arguments, max(_width(dim), v_width), 2 * (dim + v_width), tiles.block_m, resident, staged)
    recorder.launch(
        hopper_forward_kernel, programs, tiles,
        **{
            **arguments, **place, "scale": max(arguments["scale"], _SMALLEST), "HIDES": _hides(arguments), "PAIRS": _in_pairs(arguments),
            "BLOCK_DV": v_width, "BLOCK_N": tiles.block_n, "WIDTH": width, "CHUNKS": chunks, "STAGES": tiles.num_stages, "GROUPS": groups,
            "q_boxes": _boxes(q, 64, width), "k_boxes": _boxes(k, tiles.block_n, width), "v_boxes": _boxes(v, tiles.block_n, v_width),
        },
    )  # fmt: skip


def grad_q(recorder: Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
    """grad_q, and delta for what follows."""
    from attnhub.backends.triton.kernels.hopper_grad_q import hopper_grad_q_kernel

    width, v_width = _width(arguments["HEAD_DIM"]), _width(arguments["V_HEAD_DIM"])
    groups = tiles.block_m // 64
    resident, staged = 2 * tiles.block_m * (width + v_width), 2 * tiles.block_n * (tiles.num_stages * width + _V_STAGES * v_width)
    programs, place = _programs(recorder, "hopper_grad_q", arguments, max(width, v_width), 2 * (width + v_width), tiles.block_m, resident, staged)
    recorder.launch(
        hopper_grad_q_kernel, programs, tiles,
        **{
            **arguments, **place, **_all_boxes(arguments, 64, tiles.block_n, width, v_width), "HIDES": _hides(arguments), "PAIRS": _in_pairs(arguments),
            "BLOCK_D": width, "BLOCK_DV": v_width, "BLOCK_N": tiles.block_n, "STAGES": tiles.num_stages, "V_STAGES": _V_STAGES, "GROUPS": groups,
        },
    )  # fmt: skip
    arguments["delta_made"] = True


def grad_kv(recorder: Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
    """grad_k and grad_v."""
    from attnhub.backends.triton.kernels.hopper_grad_kv import hopper_grad_kv_kernel

    width, v_width = _width(arguments["HEAD_DIM"]), _width(arguments["V_HEAD_DIM"])
    # Sums in registers: 64 rows of both gradients, or one after the other.
    parts = [(True, True)] if width + v_width <= 256 else [(True, False), (False, True)]
    groups = tiles.block_n // 64
    staged = 2 * tiles.num_stages * tiles.block_m * (width + v_width)
    row_bytes = 2 * (width + v_width) * arguments["GROUP"]
    for want_k, want_v in parts:
        # Without dK a tile of V is only there to be written, if that of K has another width.
        resident = 2 * tiles.block_n * (width + (v_width if want_k or width != v_width else 0))
        programs, place = _programs(
            recorder, "hopper_grad_kv", arguments, max(width, v_width), row_bytes, tiles.block_n, resident, staged, f"{int(want_k)}{int(want_v)}"
        )
        recorder.launch(
            hopper_grad_kv_kernel, programs, tiles,
            **{
                **arguments, **place, **_all_boxes(arguments, tiles.block_m, 64, width, v_width), "HIDES": _hides(arguments), "WANT_K": want_k, "WANT_V": want_v,
                "BLOCK_D": width, "BLOCK_DV": v_width, "BLOCK_M": tiles.block_m, "STAGES": tiles.num_stages, "GROUPS": groups,
            },
        )  # fmt: skip


def _all_boxes(arguments: dict[str, Any], rows: int, keys: int, width: int, v_width: int) -> dict[str, Any]:
    return {
        "q_boxes": _boxes(arguments["q"], rows, width), "grad_out_boxes": _boxes(arguments["grad_out"], rows, v_width),
        "k_boxes": _boxes(arguments["k"], keys, width), "v_boxes": _boxes(arguments["v"], keys, v_width),
    }  # fmt: skip
