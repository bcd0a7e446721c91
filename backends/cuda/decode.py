"""Variants of the kernel for a few queries over a long cache (kernels/decode): which problems it serves, what is fixed at compile time, splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnhub.problem import Feature, Problem

#: Rows of a tile and keys of a block: one product of the matrix unit.
ROWS = KEYS = 16
#: Largest class of query lengths that it serves; of any length where keys are in pages, at a price: keys are read once for 16 rows.
MOST_QUERIES = 16
#: As many as the weights of all splits that a warp keeps while it merges them.
MOST_SPLITS = 128
#: What a warp keeps in registers grows with the dimensions: up to 128 columns, and beyond.
_WARPS = ((8, 4), (4, 2))
#: Room for slots where one block has a multiprocessor for itself, and where two share it or one may have 99 KiB in all.
_SLOTS_BYTES, _SLOTS_BYTES_SMALL = 128 * 1024, 80 * 1024
#: Compute capabilities whose blocks may have more than 99 KiB.
_LARGE = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))
#: Tiles of rows from which on two blocks share a multiprocessor, of which there are 132, where keys are in pages or slots are no larger than this.
_MANY_TILES, _NARROW = 4 * 132, 2048
#: Time relative to cuDNN's of one query over contiguous keys: as fast where the memory is the bound, faster for small batches and wide heads, and in host
#: time; behind with more rows for a K/V head than a tile has, with so many tiles before so few keys that blocks hardly begin, and with several queries
#: before few keys, which may be a training step, whose backward pass is another's then: for so few it is all host time.
_COST, _COST_BEHIND = 0.95, 1.05
#: Of several queries before many keys, for which cuDNN takes several times as long: while tiles are few, and where each of many reads the keys again.
_COST_FEW, _COST_FEW_MANY_TILES = 0.7, 0.9
_MANY_KEYS, _MULTIPROCESSORS = 1024, 132
_CROWD, _CROWDS_KEYS = 8 * 132, 512
#: Parts of a row that the kernel's merge asks for at once.
_BATCH = 16
#: What waiting for them takes, and what a block takes before and after its keys, in times of a warp's step over 16 keys; from runs on an H200.
_BATCH_STEPS, _BLOCK_STEPS = 0.5, 3
#: From this many waves on nothing is split.
_WAVES = 3.5


@dataclass(frozen=True)
class DecodeVariant:
    """One compiled kernel. paging: 0 no pages, 1 pages of a multiple of 16 keys, 2 of any size. append: 1 new tokens are appended to the cache, 2 with
    rotary embedding. warps: per block. slots: of 16 keys or values, per warp: those that are used, and those that are on their way.
    """

    arch: str
    dtype: str
    head_dim: int
    v_head_dim: int
    paging: int = 0
    softcap: bool = False
    alibi: bool = False
    append: int = 0
    warps: int = 8
    slots: int = 4

    main = "decode/forward.cu"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory per block: slots of keys and values, what the merge of warps and splits keeps, entries of the block table."""
        merge = ROWS * 8 + MOST_SPLITS * 4
        ahead = self.slots // 2
        table = (4 if ahead < 3 else 8 if ahead < 7 else 16) * 4 * (0, 1, KEYS)[self.paging]
        return self.warps * (self.slots * slot_bytes(self.head_dim, self.v_head_dim) + merge + table)

    def generated(self) -> dict[str, str]:
        return {}

    def options(self) -> tuple[str, ...]:
        """NVRTC's options. Denormal fp32 values count as 0 (they lie far below one rounding unit of the result)."""
        defines = {
            "TURING": 0,
            "TYPE": {"float16": "Half", "bfloat16": "BFloat16"}[self.dtype],
            "HEAD_DIM": self.head_dim,
            "V_HEAD_DIM": self.v_head_dim,
            "WARPS": self.warps,
            "SLOTS": self.slots,
            "PAGING": self.paging,
            "MOST_SPLITS": MOST_SPLITS,
            "SOFTCAP": int(self.softcap),
            "ALIBI": int(self.alibi),
            "APPEND": self.append,
            "SHARED_BYTES": self.shared_bytes,
        }
        return (f"-arch={self.arch}", "-std=c++17", "-default-device", "-ftz=true", *(f"-DATTNHUB_{name}={value}" for name, value in defines.items()))

    def describe(self) -> dict[str, Any]:
        return {"arch": self.arch, "product": "m16n8k16", "tile": [ROWS, KEYS * self.warps], "slots": self.slots, "shared_bytes": self.shared_bytes}


def slot_bytes(head_dim: int, v_head_dim: int) -> int:
    """16 rows: `Block` in kernels/decode/block.cuh."""
    return KEYS * -(-max(head_dim, v_head_dim) // 64) * 128


def serves(problem: Problem) -> bool:
    """Whether the kernel is for a problem. Pages are served by it alone."""
    if problem.device.vendor != "nvidia" or tuple(problem.device.arch) < (8, 0):
        return False
    return bool(problem.page_size) or (problem.seqlen_q <= MOST_QUERIES and Feature.VARLEN not in problem.features)


def _tiles(problem: Problem) -> int:
    """Of rows."""
    return problem.batch * problem.kv_heads * -(-problem.q_heads // problem.kv_heads * problem.seqlen_q // ROWS)


def cost(problem: Problem) -> float:
    """`Backend.cost` of a problem that it serves, on compute capability 9.0."""
    one_tile = problem.q_heads // problem.kv_heads * problem.seqlen_q <= ROWS
    if problem.seqlen_q > 1 and problem.seqlen_k >= _MANY_KEYS:
        return _COST_FEW if one_tile or _tiles(problem) <= _MULTIPROCESSORS else _COST_FEW_MANY_TILES
    crowded = _tiles(problem) > _CROWD and problem.seqlen_k < _CROWDS_KEYS
    return _COST if one_tile and problem.seqlen_q == 1 and not crowded else _COST_BEHIND


def choose(problem: Problem) -> DecodeVariant:
    """The variant for a problem that it serves."""
    arch, features, page = tuple(problem.device.arch), problem.features, problem.page_size
    shared = _tiles(problem) >= _MANY_TILES and (page or slot_bytes(problem.head_dim, problem.v_head_dim) <= _NARROW)
    return make(
        f"sm_{arch[0]}{arch[1]}", problem.q_dtype, problem.head_dim, problem.v_head_dim, 0 if not page else 2 if page % KEYS else 1,
        softcap=Feature.SOFTCAP in features, alibi=Feature.ALIBI in features, alone=arch in _LARGE and not shared,
    )  # fmt: skip


def make(
    arch: str, dtype: str, head_dim: int, v_head_dim: int, paging: int = 0, softcap: bool = False, alibi: bool = False, append: int = 0, alone: bool = True
) -> DecodeVariant:
    """A variant with the warps and slots for it. alone: a block has a multiprocessor for itself."""
    warps = _WARPS[max(head_dim, v_head_dim) > 128][not alone]
    slots = (_SLOTS_BYTES if alone else _SLOTS_BYTES_SMALL) // (warps * slot_bytes(head_dim, v_head_dim))
    return DecodeVariant(arch, dtype, head_dim, v_head_dim, paging, softcap, alibi, append, warps, slots)


def split_count(tiles: int, seqlen_k: int, warps: int, slots: int, tile_rows: int = ROWS) -> int:
    """Into how many parts the keys of a tile of rows are divided: the fewest of those that take the least time. slots: blocks that the device runs at a
    time; seqlen_k: what a cache can hold, since what it does hold is known to the device only.
    """
    if tiles >= _WAVES * slots:
        return 1
    blocks = -(-seqlen_k // KEYS)

    def steps(splits: int) -> float:
        """From the first key to the last row's merge. A warp merges rows one after the other."""
        merge = -(-tile_rows // warps) * -(-splits // _BATCH) * _BATCH_STEPS if splits > 1 else 0
        return -(-tiles * splits // slots) * (-(-blocks // (splits * warps)) + _BLOCK_STEPS) + merge

    return min(range(1, max(1, min(MOST_SPLITS, -(-blocks // warps))) + 1), key=steps)
