"""The problem: everything a choice of backend may depend on, and nothing else.

It holds no tensors, no exact lengths, no grad mode, no free memory and no time, so that one decision serves a whole
class of calls and a recomputation under checkpointing gets the same kernel.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class Feature(str, enum.Enum):
    """What a problem can ask of a backend beyond plain softmax(q k^T) v. The value is the name used everywhere."""

    GQA = "gqa"
    DV_DIFFERS = "dv_differs"
    CAUSAL_BOTTOM_RIGHT = "causal_bottom_right"
    CAUSAL_TOP_LEFT = "causal_top_left"
    WINDOW = "window"
    CHUNK = "chunk"
    PREFIX = "prefix"
    SEGMENTS = "segments"
    SEQLENS = "seqlens"
    LEFTPAD = "leftpad"
    BOOL_MASK = "bool_mask"
    BIAS = "bias"
    ALIBI = "alibi"
    BLOCK_SPARSE = "block_sparse"
    SOFTCAP = "softcap"
    SINKS = "sinks"
    DROPOUT = "dropout"
    LSE = "lse"
    VARLEN = "varlen"
    PAGED = "paged"
    DETERMINISTIC = "deterministic"
    # Of the backward pass only: a forward never has to list them.
    BIAS_GRAD = "bias_grad"
    SINKS_GRAD = "sinks_grad"
    LSE_GRAD = "lse_grad"


#: dtypes that have a forward pass only, whatever a backend declares of its backward.
FORWARD_ONLY = frozenset({"float8_e4m3fn"})


@dataclass(frozen=True)
class DeviceInfo:
    """A device as backends see it; tests make up their own (an MI300 on a laptop).

    type: ``cpu``, ``cuda``, ``mps``, ``xpu``, ``meta``. vendor: ``nvidia``, ``amd``, ``apple``, ``intel`` for accelerators;
    the machine (``x86_64``, ``aarch64``) for CPUs. arch: compute capability (9, 0) or gfx number (9, 4, 2). isa: for CPUs,
    the instruction sets that matter here (``avx2``, ``fma``, ``f16c``, ``avx512``, ``avx512_bf16``, ``amx_bf16``).
    """

    type: str
    vendor: str = ""
    arch: tuple[int, ...] = ()
    name: str = ""
    isa: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "vendor": self.vendor, "arch": list(self.arch), "name": self.name, "isa": sorted(self.isa)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeviceInfo:
        """The inverse of `to_json`."""
        return cls(**{**data, "arch": tuple(data["arch"]), "isa": frozenset(data["isa"])})


@dataclass(frozen=True)
class Problem:
    """A class of attention calls that share one decision.

    dtypes are torch's names without the prefix (``bfloat16``). ``seqlen_q`` is the class of the query length: 0, 1, 16 (2
    to 16) or a power of two above; ``batch`` and ``seqlen_k`` are the power of two at or above the true size.
    ``align_bytes`` is the largest power of two, at most 16, that divides every data pointer and every stride (in bytes) of
    q, k and v. ``page_size`` is 0 unless the K/V cache is paged.
    ``need_backward`` means that a backward pass may follow: ``Feature.LSE`` is then among the features.
    """

    device: DeviceInfo
    q_dtype: str
    kv_dtype: str
    head_dim: int
    v_head_dim: int
    q_heads: int
    kv_heads: int
    batch: int
    seqlen_q: int
    seqlen_k: int
    features: frozenset[Feature] = field(default_factory=frozenset)
    align_bytes: int = 16
    page_size: int = 0
    need_backward: bool = False

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        out["device"] = self.device.to_json()
        out["features"] = sorted(f.value for f in self.features)
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Problem:
        """The inverse of `to_json`."""
        return cls(**{**data, "device": DeviceInfo.from_json(data["device"]), "features": frozenset(map(Feature, data["features"]))})


#: Tiles of queries: their rows, and half as many as an H100 or H200 has multiprocessors.
_TILE_ROWS, _FEW_TILES = 128, 66


def few_tiles(problem: Problem) -> bool:
    """Whether tiles of queries are far fewer than multiprocessors while there are many keys, as in a chunk of a prompt behind a long cache: a backend that
    divides the keys among them is ahead there, and one that does not stands back."""
    tiles = problem.batch * problem.q_heads * -(-problem.seqlen_q // _TILE_ROWS)
    return tiles <= _FEW_TILES and problem.seqlen_k >= 8 * problem.seqlen_q


def seqlen_class(seqlen_q: int) -> int:
    """Class of a query length: 0, 1, 16 (2 to 16), else the power of two at or above it."""
    if seqlen_q <= 1:
        return seqlen_q
    return 16 if seqlen_q <= 16 else 1 << (seqlen_q - 1).bit_length()


def size_bucket(size: int) -> int:
    """The power of two at or above a size (0 stays 0)."""
    return 1 << (size - 1).bit_length() if size > 0 else 0
