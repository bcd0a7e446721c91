"""Variants of the kernel: what is fixed at compile time, and the tile sizes that fit the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnhub.problem import Feature, Problem

#: Shared memory that one block may use: compute capability 7.5 has 64 KiB; 8.6 and 8.9, the smallest of the others, 99 KiB.
_SHARED_TURING = 64 * 1024
_SHARED_AMPERE = 99 * 1024
#: The same on 9.0, 10.0 and 10.3 (228 KiB), up to the largest tile that was measured.
_SHARED_TWO_BLOCKS_LARGE = 96 * 1024
_LARGE = ("sm_90", "sm_100", "sm_103")
#: Registers (of 255 per thread) that accumulators, scores and staged tiles may take so that nothing spills, found by compiling
#: every head_dim: without and with softcap or ALiBi.
_REGISTERS_TURING = (148, 140)
_REGISTERS_AMPERE = (192, 160)
#: With no more than this two blocks share a multiprocessor of compute capability 8.0 (164 KiB, 1 KiB per block reserved).
_SHARED_TWO_BLOCKS = 81 * 1024


@dataclass(frozen=True)
class Variant:
    """One compiled kernel.

    arch: ``sm_90``. turing: the path without cp.async and with m16n8k8 products (any architecture can run it). row_tiles:
    16-row tiles of queries per warp. keys: rows of a K/V tile. keep_query: Q stays in registers.
    """

    arch: str
    turing: bool
    dtype: str
    head_dim: int
    v_head_dim: int
    row_tiles: int
    keys: int
    keep_query: int
    softcap: bool = False
    alibi: bool = False
    warps: int = 4
    stages: int = 1

    main = "forward.cu"

    def generated(self) -> dict[str, str]:
        return {}

    @property
    def rows(self) -> int:
        """Query rows per block."""
        return self.row_tiles * 16 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory per block: Q, K and V tiles, over which the epilogue lays the tile of out."""
        q_pitch, v_pitch = _pitch(self.head_dim), _pitch(self.v_head_dim)
        return max((self.rows + self.stages * self.keys) * q_pitch + self.stages * self.keys * v_pitch, self.rows * v_pitch)

    @property
    def held_registers(self) -> int:
        """Registers per thread for out, scores and, on the path without cp.async, the larger staged tile."""
        columns = _columns(self.v_head_dim)
        held = self.row_tiles * (columns + self.keys) // 2
        if self.turing:
            held += self.keys // 16 * -(-_columns(max(self.head_dim, self.v_head_dim)) // 64) * 4
        return held

    def options(self) -> tuple[str, ...]:
        """NVRTC's options. Denormal fp32 values count as 0 (they lie far below one rounding unit of the result)."""
        defines = {
            "TURING": self.turing,
            "TYPE": {"float16": "Half", "bfloat16": "BFloat16"}[self.dtype],
            "HEAD_DIM": self.head_dim,
            "V_HEAD_DIM": self.v_head_dim,
            "ROW_TILES": self.row_tiles,
            "WARPS": self.warps,
            "KEYS": self.keys,
            "STAGES": self.stages,
            "KEEP_QUERY": self.keep_query,
            "SOFTCAP": self.softcap,
            "ALIBI": self.alibi,
        }
        return (
            f"-arch={self.arch}", "-std=c++17", "-default-device", "-ftz=true",
            *(f"-DATTNHUB_{name}={int(value) if isinstance(value, bool) else value}" for name, value in defines.items()),
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {
            "arch": self.arch,
            "product": "m16n8k8" if self.turing else "m16n8k16",
            "tile": [self.rows, self.keys],
            "shared_bytes": self.shared_bytes,
        }


def _columns(head_dim: int) -> int:
    """head_dim with its padding in shared memory."""
    return -(-head_dim // 16) * 16


def _pitch(head_dim: int) -> int:
    """Bytes from one row of a tile to the next: `Tile` in kernels/tile.cuh."""
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
    """A variant with the tile sizes for it.

    Two row tiles per warp halve the shared-memory reads per product, which otherwise bound it; they fit the registers up
    to 128 columns of out, and need more than 64 queries to be of use.
    """
    limit = _SHARED_TURING if turing else _SHARED_AMPERE
    two_blocks = _SHARED_TWO_BLOCKS_LARGE if arch.startswith(_LARGE) else _SHARED_TWO_BLOCKS
    registers = (_REGISTERS_TURING if turing else _REGISTERS_AMPERE)[softcap or alibi]
    row_tiles = 2 if not turing and max(head_dim, v_head_dim) <= 128 and seqlen_q > 64 else 1

    def sized(keys: int) -> Variant:
        # With few columns Q fits the registers, but more keys per step are worth more (H200: 3 to 6% at head_dim 64).
        keep_query = _columns(head_dim) // 16 if head_dim <= 64 and keys <= 64 else 0
        return Variant(arch, turing, dtype, head_dim, v_head_dim, row_tiles, keys, keep_query, softcap, alibi)

    def fits(v: Variant) -> bool:
        room = registers - 32 if v.keys > 64 else registers  # the unrolled loops over keys want some as well
        return v.shared_bytes <= limit and (v.held_registers <= room or v.keys == 16)

    fitting = [v for v in map(sized, (96, 64, 48, 32, 16) if row_tiles == 2 else (64, 48, 32, 16)) if fits(v)]
    return next((v for v in fitting if v.shared_bytes <= two_blocks), fitting[0])
