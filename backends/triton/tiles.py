"""Tile sizes: which blocks, warps and pipeline stages a kernel is compiled with. Free of torch and triton."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """block_m query rows by block_n keys; num_warps, num_stages as Triton means them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def smaller(self) -> Tiles | None:
        """The next configuration that needs less shared memory, or None."""
        if self.num_stages > 1:
            return Tiles(self.block_m, self.block_n, self.num_warps, self.num_stages - 1)
        if self.block_m <= 16 and self.block_n <= 16:
            return None
        block_m, block_n = (self.block_m, self.block_n // 2) if self.block_n >= self.block_m else (self.block_m // 2, self.block_n)
        return Tiles(block_m, block_n, min(self.num_warps, 4), 2)


def padded(size: int) -> int:
    """The power of two at or above a size, at least 16 (the smallest matrix product)."""
    return max(16, 1 << (size - 1).bit_length())


#: The least width of a rest on a GPU. With rests of 16 (head_dim 40 and 72 in fp16) the code that Triton 3.6 makes for Hopper gives wrong
#: results or touches memory that it must not; the same kernels are right when interpreted. With 64 (head_dim 192) it is right.
LEAST_REST = 64


def _cut(head_dim: int, least: int, least_rest: int, most: int) -> tuple[int, int]:
    main = max(padded(head_dim), least)
    if main > most and head_dim > main // 2:
        return main // 2, max(padded(head_dim - main // 2), least, least_rest)
    if main in (head_dim, least):
        return main, 0
    rest = max(padded(head_dim - main // 2), least, least_rest)
    return (main, 0) if rest >= main // 2 else (main // 2, rest)


@dataclass(frozen=True)
class Widths:
    """What a kernel gives the head dimensions: a main part and a rest (0: none), each a power of two, for q/k and for v."""

    main: int
    rest: int
    v_main: int
    v_rest: int

    @property
    def total(self) -> int:
        return self.main + self.rest + self.v_main + self.v_rest


@functools.lru_cache(maxsize=256)
def widths(head_dim: int, v_head_dim: int, least: int = 16, least_rest: int = LEAST_REST, most: int = 1024) -> Widths:
    """Both head dimensions in parts: 192 is 128 + 64, 576 is 512 + 64; 100 would be 64 + 64 and is 128. least, least_rest: of each part, of a rest;
    most: of a head_dim that is left in one part though it is, or is padded to, a power of two; larger ones are cut in half.

    The main parts of q/k and v are equal (where they would differ, the smaller head_dim is padded to the larger one's main part):
    with 64 for q and k and 32 for v, the code that Triton 3.6 makes for Hopper gave wrong results in bf16 (out, dQ and dK; the same
    kernels are right when interpreted).
    """
    (main, rest), (v_main, v_rest) = _cut(head_dim, least, least_rest, most), _cut(v_head_dim, least, least_rest, most)
    if main < v_main:
        main, rest = v_main, 0
    elif v_main < main:
        v_main, v_rest = main, 0
    return Widths(main, rest, v_main, v_rest)


#: role -> element size -> largest mean of the two padded head dims -> tiles. The 2-byte rows up to 256 are the fastest of four to
#: six measured on an H200 at 4096 tokens (decode: of five at 8192 keys). The others are not measured: chosen by what ptxas reports.
#: Above 256, with 64 rows, Hopper's warp-group products leave every warp group the whole accumulator, which spills 16 KB: 32 rows
#: go to the older instructions. Rows of fp32 (4) are for sums of three tf32 products (`tf32x3`), the exact ones below. Rows
#: of fp8 (1) are the 2-byte ones: v is multiplied as fp16.
_TABLE: dict[str, dict[int, dict[int, Tiles]]] = {
    "forward": {
        1: {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(128, 64, 8, 2), 576: Tiles(32, 32, 8, 2)},
        2: {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(128, 64, 8, 2), 576: Tiles(32, 32, 8, 2)},
        4: {64: Tiles(128, 32, 8, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(32, 32, 8, 2)},
    },
    "decode": {
        1: {64: Tiles(16, 128, 4, 3), 128: Tiles(16, 128, 4, 3), 256: Tiles(16, 64, 4, 2), 576: Tiles(16, 32, 8, 2)},
        2: {64: Tiles(16, 128, 4, 3), 128: Tiles(16, 128, 4, 3), 256: Tiles(16, 64, 4, 2), 576: Tiles(16, 32, 8, 2)},
        4: {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 8, 2)},
    },
    # For small pages, with programs for every multiprocessor; else those for decoding. At 128 the fastest of six tried on an H100 (pages of 16; in no result file).
    "decode_paged": {
        1: {64: Tiles(16, 128, 4, 3), 128: Tiles(16, 64, 2, 4), 256: Tiles(16, 64, 4, 2), 576: Tiles(16, 32, 8, 2)},
        2: {64: Tiles(16, 128, 4, 3), 128: Tiles(16, 64, 2, 4), 256: Tiles(16, 64, 4, 2), 576: Tiles(16, 32, 8, 2)},
        4: {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 8, 2)},
    },
    "grad_kv": {
        2: {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(32, 64, 8, 2), 576: Tiles(32, 32, 8, 1)},
        4: {64: Tiles(32, 64, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(32, 16, 8, 1)},
    },
    "grad_q": {
        2: {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(128, 32, 8, 1), 576: Tiles(32, 32, 8, 1)},
        4: {64: Tiles(64, 64, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(16, 32, 8, 1)},
    },
    "grad_bias": {
        2: {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 64, 4, 1), 256: Tiles(64, 64, 8, 1), 576: Tiles(64, 32, 8, 1)},
        4: {64: Tiles(64, 32, 4, 1), 128: Tiles(64, 32, 4, 1), 256: Tiles(16, 32, 8, 1)},
    },
}
#: fp32 whose products run on ordinary units, all of whose operands live in registers: role -> largest mean of the padded head dims -> tiles.
#: Chosen by what ptxas reports.
_EXACT: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(64, 32, 4, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(32, 16, 8, 1), 576: Tiles(16, 16, 8, 1)},
    "decode": {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 16, 4, 2), 576: Tiles(16, 16, 8, 1)},
    "decode_paged": {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 16, 4, 2), 576: Tiles(16, 16, 8, 1)},
    "grad_kv": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 32, 4, 1), 256: Tiles(16, 16, 8, 1), 576: Tiles(16, 16, 16, 1)},
    "grad_q": {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 16, 4, 1), 256: Tiles(16, 16, 8, 1), 576: Tiles(16, 16, 8, 1)},
    "grad_bias": {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 16, 4, 1), 256: Tiles(16, 16, 8, 1), 576: Tiles(16, 16, 8, 1)},
}
ROLES = tuple(_TABLE)


def roles(item: int) -> tuple[str, ...]:
    """The roles that there are for an item size: fp8 has no backward."""
    return tuple(role for role in ROLES if item in _TABLE[role])


#: Shared memory that one block of threads may use, in bytes, by NVIDIA compute capability.
_SHARED_MEMORY = {(7, 5): 65536, (8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}


def shared_memory(vendor: str, arch: tuple[int, ...]) -> int:
    """Bytes of shared memory per block: of the newest known architecture not above this one, or 64 KiB (AMD, Intel)."""
    if vendor != "nvidia":
        return 65536
    known = [a for a in _SHARED_MEMORY if a <= arch]
    # A minor version above 0 inside a family may have less than its first member; an unknown one is taken as small.
    return _SHARED_MEMORY[max(known)] if arch in _SHARED_MEMORY or not known else min(_SHARED_MEMORY[max(known)], 101376)


def estimate(role: str, tiles: Tiles, dims: int, item: int) -> int:
    """Bytes of shared memory that a kernel needs, roughly: resident operands plus staged ones. dims is D + Dv, padded."""
    if role in ("forward", "decode", "decode_paged"):
        return item * (tiles.block_m * dims // 2 + tiles.num_stages * tiles.block_n * dims)
    resident, staged = (tiles.block_n, tiles.block_m) if role == "grad_kv" else (tiles.block_m, tiles.block_n)
    return item * (resident * dims + tiles.num_stages * staged * dims + tiles.block_m * tiles.block_n)


#: The largest head_dim whose fp32 products may be sums of three in tf32, and the largest that is then summed in one part. A tensor core cuts its
#: partial sums off where fp32 maths round, and parts are added in fp32. Emulated for an H100 with head_dim 256 and scores around 30, errors in one
#: part passed what conformance allows, and in two did not. Shorter operands also spill less.
TF32X3_WIDEST = 256
TF32X3_PART = 64
#: So few pairs of a query and a key take no time, and leave the error of a single score to be seen: on an H200 up to 3.3 times what conformance
#: allows a score that is the only one of its row, or the largest.
_EXACT_PAIRS = 4096


def tf32x3(vendor: str, arch: tuple[int, ...], head_dim: int, v_head_dim: int, lengths: tuple[int, int] | None = None) -> bool:
    """Whether fp32 products are sums of three products in tf32 (of the operands' upper and lower halves). On Hopper alone: 8.x cuts off sums of four
    where Hopper cuts off sums of eight (emulated, head_dim 64: more than conformance allows), and of 10.x nothing is known here. lengths: queries and
    keys of the longest sequence; None: many.
    """
    many = lengths is None or lengths[0] * lengths[1] > _EXACT_PAIRS
    return vendor == "nvidia" and arch[:1] == (9,) and max(head_dim, v_head_dim) <= TF32X3_WIDEST and many


#: (role, element size, largest mean of the padded head dims) -> tiles for so few rows that blocks of 128 would be for _FEW_BLOCKS programs at most:
#: the fastest of seven tried on an H100 at 2 x 512 rows (at 4 x 1024 the table's are faster; the trials are in no result file).
_FEW: dict[tuple[str, int, int], Tiles] = {("forward", 4, 64): Tiles(32, 64, 4, 2)}
_FEW_BLOCKS = 16


def choices(role: str, head_dim: int, v_head_dim: int, item: int, limit: int, exact: bool = False, blocks: int = 1 << 30) -> list[Tiles]:
    """Tiles to try in this order for a kernel: the table's, then smaller ones, without those that surely do not fit. exact: fp32 on ordinary units.
    blocks: of 128 query rows, in all heads of all sequences.
    """
    width = widths(head_dim, v_head_dim)
    rows = _EXACT[role] if exact else _TABLE[role][item]
    mean = min(d for d in rows if 2 * d >= width.total)
    tiles: Tiles | None = rows[mean]
    if blocks <= _FEW_BLOCKS and not exact:
        tiles = _FEW.get((role, item, mean), tiles)
    found = []
    while tiles is not None:
        if estimate(role, tiles, width.total, item) <= limit:
            found.append(tiles)
        tiles = tiles.smaller()
    return found


def interpreted() -> dict[str, list[Tiles]]:
    """Tiles for Triton's interpreter: small, so that tiny tensors still have several of them, and not all square."""
    sizes = {"forward": (16, 16), "decode": (16, 32), "decode_paged": (16, 16), "grad_kv": (32, 16), "grad_q": (16, 32), "grad_bias": (16, 32)}
    return {role: [Tiles(*sizes[role], 1, 1)] for role in ROLES}


#: Programs of a decoding role that one multiprocessor runs at a time: one with deep tiles, or two with small ones.
RESIDENT = {"decode": 1, "decode_paged": 2}


@functools.lru_cache(maxsize=1024)
def split_count(programs: int, key_tiles: int, slots: int) -> int:
    """Into how many parts to divide the keys so that every slot (multiprocessor, times the programs it runs at a time) has work.

    One if the programs nearly fill the device, else the fewest that reach 85% of the best achievable wave efficiency, with
    at least two key tiles in each.
    """
    if programs >= 0.8 * slots or key_tiles <= 1:
        return 1
    most = max(1, min(key_tiles // 2, 128, slots // programs))
    efficiency = []
    for splits in range(1, most + 1):
        waves = programs * splits / slots
        efficiency.append(waves / -(-programs * splits // slots))
    best = max(efficiency)
    return next(i + 1 for i, e in enumerate(efficiency) if e >= 0.85 * best)
