"""Variants of the portable kernel (kernels/portable): what is fixed at compile time, and the tile sizes that fit the hardware."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attnhub.backends.cuda.options import ELEMENTS, options
from attnhub.problem import Feature, Problem

_KIB = 1024
#: Shared memory by compute capability: (of one block, of a multiprocessor), in KiB. Others, 12.0 among them, have at least that of 8.6 and 8.9.
_SHARED = {"sm_75": (64, 64), "sm_80": (163, 164), "sm_87": (163, 164), "sm_90": (227, 228), "sm_100": (227, 228), "sm_103": (227, 228)}
_SHARED_LEAST = (99, 100)
#: Of a multiprocessor's shared memory each block takes this much for itself.
_RESERVED = 1 * _KIB
#: Registers (of 255 per thread) that accumulators, scores and staged tiles may take so that nothing spills, found by compiling
#: every head_dim: without and with softcap or ALiBi.
_REGISTERS_TURING = (148, 140)
_REGISTERS_AMPERE = (192, 160)
#: Warps on a multiprocessor, two for each of its schedulers: as many as 255 registers allow. With one, nothing runs while it waits.
_WARPS = 8


@dataclass(frozen=True)
class Variant:
    """One compiled kernel.

    arch: ``sm_90``. turing: the path without cp.async and with m16n8k8 products (any architecture can run it). warps: of a block. row_tiles:
    16-row tiles of queries per warp. keys: rows of a K/V tile. stages: tiles of K, and of V, in shared memory. kept: steps of 16
    columns of Q that stay in registers. pairs: two warps share their rows, and divide the keys of Q K^T and the columns of P V.
    """

    arch: str
    turing: bool
    dtype: str
    head_dim: int
    v_head_dim: int
    warps: int
    row_tiles: int
    keys: int
    stages: int = 1
    kept: int = 0
    pairs: bool = False
    softcap: bool = False
    alibi: bool = False

    main = "portable/forward.cu"

    def generated(self) -> dict[str, str]:
        return {}

    @property
    def rows(self) -> int:
        """Query rows per block."""
        return self.row_tiles * 16 * self.warps // (2 if self.pairs else 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory per block: Q, K and V tiles, over which the epilogue lays the tile of out."""
        q_pitch, v_pitch = _pitch(self.head_dim), _pitch(self.v_head_dim)
        exchanged = self.rows * (_pitch(self.keys) + 8) if self.pairs else 0
        return max((self.rows + self.stages * self.keys) * q_pitch + self.stages * self.keys * v_pitch + exchanged, self.rows * v_pitch)

    @property
    def held_registers(self) -> int:
        """Registers per thread for out, scores and, on the path without cp.async, the larger staged tile."""
        held = self.row_tiles * (_columns(self.v_head_dim) + self.keys) // (4 if self.pairs else 2)
        if self.turing:
            held += self.keys // 16 * -(-_columns(max(self.head_dim, self.v_head_dim)) // 64) * 4
        return held

    def options(self) -> tuple[str, ...]:
        """NVRTC's options."""
        defines = {
            "TURING": self.turing,
            "TYPE": ELEMENTS[self.dtype],
            "HEAD_DIM": self.head_dim,
            "V_HEAD_DIM": self.v_head_dim,
            "WARPS": self.warps,
            "PAIRS": self.pairs,
            "ROW_TILES": self.row_tiles,
            "KEYS": self.keys,
            "STAGES": self.stages,
            "KEPT": self.kept,
            "SOFTCAP": self.softcap,
            "ALIBI": self.alibi,
        }
        return options(self.arch, defines)

    def describe(self) -> dict[str, Any]:
        return {
            "arch": self.arch,
            "product": "m16n8k8" if self.turing else "m16n8k16",
            "tile": [self.rows, self.keys],
            "warps": self.warps,
            "stages": self.stages,
            "shared_bytes": self.shared_bytes,
        }


def _columns(head_dim: int) -> int:
    """head_dim with its padding in shared memory."""
    return -(-head_dim // 16) * 16


def _pitch(head_dim: int) -> int:
    """Bytes from one row of a tile to the next: `Tile` in kernels/portable/tile.cuh."""
    return (_columns(head_dim) + 8) * 2


def choose(problem: Problem) -> Variant:
    """The variant for a problem on its device (compute capability 7.5 and up)."""
    arch = problem.device.arch
    return make(
        arch=f"sm_{arch[0]}{arch[1]}",
        turing=tuple(arch) < (8, 0),
        dtype=problem.q_dtype,
        head_dim=problem.head_dim,
        v_head_dim=problem.v_head_dim,
        seqlen_q=problem.seqlen_q,
        softcap=Feature.SOFTCAP in problem.features,
        alibi=Feature.ALIBI in problem.features,
    )


def make(
    *,
    arch: str,
    turing: bool,
    dtype: str,
    head_dim: int,
    v_head_dim: int,
    seqlen_q: int = 1 << 20,
    softcap: bool = False,
    alibi: bool = False,
) -> Variant:
    """A variant with the tile sizes for it: the first of those below that fits and fills a multiprocessor with warps, else the first that fits.

    Their order was measured on an H200 (9.0) at head_dim 64, 128 and 256 in bf16, up to 16384 tokens. What follows for other devices and for widths
    between is reasoned from shared memory and registers alone.
    """
    per_block, per_multiprocessor = (x * _KIB for x in (_SHARED["sm_75"] if turing else _SHARED.get(arch.rstrip("af"), _SHARED_LEAST)))
    registers = (_REGISTERS_TURING if turing else _REGISTERS_AMPERE)[softcap or alibi]

    def room(keys: int, row_tiles: int, pairs: bool) -> int:
        if keys <= 64 or row_tiles == 1:
            return registers
        return registers - (16 if pairs else 32)  # the unrolled loops over keys want some as well

    def sized(warps: int, row_tiles: int, keys: int, stages: int, pairs: bool = False) -> Variant:
        v = Variant(arch, turing, dtype, head_dim, v_head_dim, warps, row_tiles, keys, stages, 0, pairs, softcap, alibi)
        # What registers are left keep Q; pairs want them for fragments.
        left = 0 if turing or pairs else room(keys, row_tiles, pairs) - v.held_registers
        return replace(v, kept=min(_columns(head_dim) // 16, max(0, left) // (4 * row_tiles)))

    def fits(v: Variant) -> bool:
        return v.shared_bytes <= per_block and (v.held_registers <= room(v.keys, v.row_tiles, v.pairs) or v.keys == 16)

    def fills(v: Variant) -> bool:
        return turing or (v.keys >= 32 and v.warps * (per_multiprocessor // (v.shared_bytes + _RESERVED)) >= _WARPS)

    widest = max(head_dim, v_head_dim)
    small = [sized(4, 1, keys, 1) for keys in (64, 48, 32, 16)]
    if turing or seqlen_q <= 64:
        shapes = small
    elif widest <= 128:
        # Two row tiles per warp halve the reads from shared memory per product, which otherwise bound it. They fit up to 128 columns of out.
        few = [sized(4, 2, 64, 2), *(sized(4, 2, keys, 1) for keys in (96, 64, 48, 32))]
        many = [sized(8, 2, keys, 1) for keys in (64, 48, 32)] if seqlen_q > 128 else []
        shapes = [*few, *many, sized(4, 2, 16, 1)]
    else:
        # Out leaves registers for one row tile per warp, or for two with half the columns each.
        halves = _columns(v_head_dim) % 32 == 0
        paired = [sized(8, 2, keys, 1, pairs=True) for keys in (128, 96, 64)] if halves else []
        shapes = [*paired, sized(8, 1, 64, 2), *(sized(8, 1, keys, 1) for keys in (80, 64, 48, 32)), *small]
    fitting = [v for v in shapes if fits(v)]
    return next((v for v in fitting if fills(v)), fitting[0])
