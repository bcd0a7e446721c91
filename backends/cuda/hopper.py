"""Variants of the kernel for compute capability 9.0 (kernels/hopper): which problems it serves, its tiles, what is fixed at compile time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from attnhub.backends.cuda import wgmma
from attnhub.backends.cuda.options import ELEMENTS, options
from attnhub.problem import DeviceInfo, Feature, Problem, few_tiles

#: Shared memory that a block may have.
MOST_SHARED = 227 * 1024
#: What barriers and the slot of the scheduler take of it, at most.
_SHARED_BARRIERS = 512
#: Widths of tiles; a head_dim between them is padded by the copy engine.
WIDTHS = (64, 96, 128, 192, 256)
#: A warpgroup has 64 rows; with fewer queries than this the portable kernel's smaller tiles are faster.
_FEWEST_QUERIES = 17

_POSITIONS = frozenset({Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT})
_BOTH_SIDES = frozenset({Feature.WINDOW, Feature.CHUNK})
_LENGTHS = frozenset({Feature.SEQLENS, Feature.VARLEN, Feature.LEFTPAD})
#: Registers beside scores and out (threads have 232 where two warpgroups compute).
_LARGER_SCORES = frozenset({Feature.SOFTCAP, Feature.ALIBI})


@dataclass(frozen=True)
class Tiles:
    """consumers: computing warpgroups, of 64 query rows each. keys: rows of a K/V tile. stages: tiles of K, and of V, in flight.

    keep_query: Q stays in registers. out_direct: out leaves from the registers, not through shared memory. take_turns: warpgroups start their
    products one after the other.
    """

    consumers: int
    keys: int
    stages: int
    keep_query: bool = False
    out_direct: bool = False
    take_turns: bool = False


#: Width of q and k, of v -> tiles; other pairs are padded to the larger one. Those of equal widths 64, 128 and 256 are the fastest of about 75 that were tried on an H200.
_TABLE: dict[tuple[int, int], Tiles] = {
    (64, 64): Tiles(3, 128, 4, take_turns=True),
    (96, 96): Tiles(2, 128, 2, keep_query=True, take_turns=True),
    (128, 128): Tiles(2, 128, 2, keep_query=True, take_turns=True),
    (192, 128): Tiles(2, 112, 2),
    (192, 192): Tiles(2, 96, 2, out_direct=True),
    (256, 256): Tiles(2, 64, 2, out_direct=True),
}
#: Two warpgroups, of fewer rows together: more tiles, and less of them wasted under a mask.
_SHORT_64 = Tiles(2, 128, 3, keep_query=True, take_turns=True)
_SHORT_64_BELOW = 2048
#: How much faster the taller tiles are where both fill the multiprocessors, of which H100 (SXM) and H200 have so many.
_TALLER_GAIN, _PROCESSORS = 1.12, 132


@dataclass(frozen=True)
class HopperVariant:
    """One compiled kernel. head_dim, v_head_dim: widths of its tiles.

    left, right: a mask may cut rows there, beside the keys' end. hides: pairs may be masked out whose key and value are in memory.
    """

    dtype: str
    head_dim: int
    v_head_dim: int
    tiles: Tiles
    left: bool = False
    right: bool = False
    hides: bool = False
    softcap: bool = False
    alibi: bool = False

    main = "hopper/forward.cu"

    @property
    def rows(self) -> int:
        """Query rows per block."""
        return 64 * self.tiles.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.tiles.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory per block: tiles of Q, out, K and V in rows of 128 bytes, and barriers."""
        tiles = self.tiles
        query, out = _tile_bytes(64, self.head_dim), _tile_bytes(64, self.v_head_dim)
        keys = _tile_bytes(tiles.keys, self.head_dim) + _tile_bytes(tiles.keys, self.v_head_dim)
        return tiles.consumers * (query if tiles.out_direct else query + out) + tiles.stages * keys + _SHARED_BARRIERS

    def generated(self) -> dict[str, str]:
        """Headers that are written for the variant."""
        widths = {self.tiles.keys, self.tiles.keys // 2, self.v_head_dim // 64 * 64, self.v_head_dim % 64} - {0}
        return {wgmma.NAME: wgmma.header(widths, self.dtype)}

    def options(self) -> tuple[str, ...]:
        """NVRTC's options."""
        tiles = self.tiles
        # 65536 are shared by the computing warpgroups and the one whose threads schedule and copy.
        producer, consumer = (40, 232) if tiles.consumers == 2 else (32, 160)
        defines = {
            "TYPE": ELEMENTS[self.dtype],
            "HEAD_DIM": self.head_dim,
            "V_HEAD_DIM": self.v_head_dim,
            "CONSUMERS": tiles.consumers,
            "KEYS": tiles.keys,
            "STAGES": tiles.stages,
            "KEEP_QUERY": tiles.keep_query,
            "OUT_DIRECT": tiles.out_direct,
            "TAKE_TURNS": tiles.take_turns,
            "LEFT": self.left,
            "RIGHT": self.right,
            "HIDES": self.hides,
            "SOFTCAP": self.softcap,
            "ALIBI": self.alibi,
            "SHARED_BYTES": self.shared_bytes,
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
        }
        return options("sm_90a", defines)

    def describe(self) -> dict[str, Any]:
        return {
            "arch": "sm_90a",
            "product": "wgmma",
            "tile": [self.rows, self.tiles.keys],
            "stages": self.tiles.stages,
            "shared_bytes": self.shared_bytes,
        }


def _tile_bytes(rows: int, width: int) -> int:
    return -(-width // 64) * rows * 128


def _width(head_dim: int) -> int:
    return next(width for width in WIDTHS if head_dim <= width)


def runs_on(device: DeviceInfo) -> bool:
    return tuple(device.arch) == (9, 0) and device.vendor == "nvidia"


def serves(problem: Problem) -> bool:
    """Whether the kernel is for a problem; `hopper_plan.serves` judges the call."""
    return runs_on(problem.device) and problem.seqlen_q >= _FEWEST_QUERIES


#: Time relative to cuDNN's by width of the tiles: without a mask, causal, and causal from `_LONG` tokens on. An H200, bf16: 512 to 16384
#: tokens, of 96 and 192 columns 1024 and 4096, which are in no result file.
_COSTS = {64: (0.92, 0.95, 0.84), 96: (0.85, 0.85, 0.8), 128: (0.9, 0.9, 0.8), 192: (0.92, 0.92, 0.85), 256: (0.88, 0.94, 0.78)}
_LONG = 2048
_PLAIN = frozenset({Feature.LSE, Feature.DETERMINISTIC, Feature.GQA, *_POSITIONS})
#: Where torch's kernels were not beside it: behind them, as long as they serve, and before the triton backend.
_COST_UNKNOWN = 1.1
#: Of `few_tiles`: behind the triton backend, which splits keys.
_COST_FEW_TILES = 1.3


def cost(problem: Problem) -> float:
    """`Backend.cost` of a problem that it serves."""
    width = _width(problem.head_dim)
    if few_tiles(problem):
        return _COST_FEW_TILES
    if not problem.features <= _PLAIN or problem.seqlen_q != problem.seqlen_k or problem.head_dim != problem.v_head_dim or problem.head_dim != width:
        return _COST_UNKNOWN
    full, causal, long = _COSTS[width]
    return full if not problem.features & _POSITIONS else causal if problem.seqlen_q < _LONG else long


def choose(problem: Problem) -> HopperVariant:
    """The variant for a problem that it serves."""
    variant = make(problem.q_dtype, problem.head_dim, problem.v_head_dim, problem.features, problem.seqlen_q)
    if variant.tiles == _TABLE[64, 64]:
        pairs = problem.batch * problem.q_heads
        most, fewer = (pairs * -(-problem.seqlen_q // (64 * tiles.consumers)) for tiles in (_SHORT_64, variant.tiles))
        # Tiles of different lengths fill the last wave by themselves.
        if fewer < _PROCESSORS if variant.right or variant.left else _filled(fewer) * _TALLER_GAIN < _filled(most):
            return dataclasses.replace(variant, tiles=_SHORT_64)
    return variant


def _filled(tiles: int) -> float:
    """Part of the multiprocessors that tiles of one length keep busy, waves being whole."""
    return tiles / (_PROCESSORS * -(-tiles // _PROCESSORS))


def make(dtype: str, head_dim: int, v_head_dim: int, features: frozenset[Feature] = frozenset(), seqlen_q: int = 1 << 20) -> HopperVariant:
    """A variant with the tiles for it."""
    right = bool(features & (_POSITIONS | _BOTH_SIDES))
    left = bool(features & _BOTH_SIDES) or Feature.LEFTPAD in features
    width, v_width = _width(head_dim), _width(v_head_dim)
    if (width, v_width) not in _TABLE:
        width = v_width = max(width, v_width)
    return HopperVariant(
        dtype, width, v_width, _tiles(width, v_width, features, seqlen_q), left=left, right=right,
        hides=left or right or bool(features & _LENGTHS), softcap=Feature.SOFTCAP in features, alibi=Feature.ALIBI in features,
    )  # fmt: skip


def _tiles(width: int, v_width: int, features: frozenset[Feature], seqlen_q: int) -> Tiles:
    if (width, v_width) == (64, 64) and (features & _LARGER_SCORES or seqlen_q < _SHORT_64_BELOW):
        return _SHORT_64
    return _TABLE[width, v_width]
