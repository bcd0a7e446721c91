"""What the cuda backend is held to on a GPU of compute capability 9.0. Torch-free.

The aims of the grid are what FA4 reached beside cuDNN on an H200 in other runs, where that is more than the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from attnhub.bench import flashinfer
from attnhub.bench import overhead_case as overhead
from attnhub.bench.cases import Case
from attnhub.bench.target import Measure, Rows, Target, figure, over

_CUDNN, _FLASH = over("F.sdpa cuDNN"), over("F.sdpa flash")
#: Outputs are means of normal numbers: who is so far off computes something else, and is no peer.
_WRONG = 0.05
#: The rule of flash-attn's tests: max|out - exact| is at most twice that of torch.
_ERROR = 2.0


def _others(rows: Rows, mine: dict[str, Any]) -> Rows:
    """The rows of a case that are not attnhub's."""
    return {name: row for name, row in rows.items() if row is not mine and not name.startswith("attnhub") and (row.get("max_error") or 0.0) < _WRONG}


def _over_fastest(*needed: str) -> Measure:
    """How many times as fast as the fastest of all others; None unless the needed ones are there."""

    def measure(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
        others = _others(rows, mine)
        if any(name not in others for name in needed):
            return None
        return float(min(row["seconds"] for row in others.values()) / mine["seconds"])

    return measure


def _error(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
    """The largest error as a multiple of the others' largest."""
    theirs = max((row.get("max_error") or 0.0 for row in _others(rows, mine).values()), default=0.0)
    return mine["max_error"] / theirs if theirs and mine.get("max_error") is not None else None


def _microseconds(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
    return float(mine["seconds"] * 1e6)


def _always(case: Case) -> bool:
    return True


#: No point of a preset may be less exact than torch's kernels allow.
_EXACT = Target("max error, of the others' largest", _ERROR, _ERROR, _error, _always, "{:.2f}", at_most=True)


# -- forward -------------------------------------------------------------------------------------------------------------

#: (head_dim, causal) -> {length: (gate, aim)}
_GRID = {
    (64, False): {1024: (1.05, 1.05), 4096: (1.12, 1.12), 16384: (1.14, 1.15)},
    (64, True): {1024: (1.05, 1.05), 4096: (1.08, 1.08), 16384: (1.15, 1.15)},
    (128, False): {1024: (1.08, 1.08), 4096: (1.07, 1.07), 16384: (1.07, 1.08)},
    (128, True): {1024: (1.18, 1.18), 4096: (1.20, 1.20), 16384: (1.15, 1.18)},
    (256, False): {1024: (1.05, 1.05), 4096: (1.05, 1.05), 16384: (1.05, 1.07)},
    (256, True): {1024: (1.05, 1.05), 4096: (1.05, 1.10), 16384: (1.05, 1.16)},
}
_BETWEEN = (512, 2048, 8192)


def _kind(dim: int, causal: bool) -> str:
    return f"D{dim} {'causal' if causal else 'full'}"


def _points(dim: int, causal: bool, lengths: tuple[int, ...]) -> Callable[[Case], bool]:
    return lambda c: (c.mode, c.head_dim, c.causal) == ("forward", dim, causal) and c.seqlen_q in lengths


_FORWARD = tuple(
    Target(f"{_kind(*kind)}, {length} tokens, over cuDNN", gate, aim, _CUDNN, _points(*kind, (length,)), every=True)
    for kind, lengths in _GRID.items() for length, (gate, aim) in lengths.items()
)  # fmt: skip
_FORWARD_BETWEEN = tuple(
    Target(f"{_kind(*kind)}, 512, 2048 and 8192 tokens, over cuDNN, every point", 1.0, 1.0, _CUDNN, _points(*kind, _BETWEEN), every=True) for kind in _GRID
)
_SUSTAINED = tuple(Target(f"{_kind(*kind)}, sustained, over cuDNN", 1.05, 1.05, _CUDNN, _points(*kind, (4096,)), every=True) for kind in _GRID)


# -- features ------------------------------------------------------------------------------------------------------------


def _feature(case: Case) -> str:
    """What a case of the preset is about."""
    words = [text.split()[0] for text in case.features()]
    return words[0] if words else "grouped heads" if case.heads != case.kv_heads else case.dtype


#: Who has to be in a file beside each feature. Others count where they are there: cuDNN with a dense mask, say.
_NEEDED = {
    "grouped heads": ("F.sdpa cuDNN", "F.sdpa flash"), "window": ("aten flash", "FlexAttention"), "documents": ("aten flash", "FlexAttention"),
    "softcap": ("FlexAttention",), "float16": ("F.sdpa cuDNN", "F.sdpa flash"),
}  # fmt: skip
_FEATURES = tuple(
    Target(f"{name} over the fastest other, every point", 1.0, 1.0, _over_fastest(*needed), lambda c, name=name: _feature(c) == name, every=True)  # type: ignore[misc]
    for name, needed in _NEEDED.items()
)


# -- decode --------------------------------------------------------------------------------------------------------------

_HOW = {False: "by plain call", True: "by CUDA graph"}
#: What is held -> its page sizes.
_PAGES = {"contiguous": (0,), "pages of 16": (16,), "pages of 64 and 256": (64, 256), "pages of 1": (1,)}


def _over_cudnn_and_flashinfer(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
    """How many times as fast as the better of cuDNN in the same run and FlashInfer's rate."""
    cudnn, theirs = rows.get("F.sdpa cuDNN", {}).get("seconds"), flashinfer.seconds(Case.of(mine))
    return min(cudnn, theirs) / mine["seconds"] if cudnn and theirs else None


def _steps(graph: bool, sizes: tuple[int, ...]) -> Callable[[Case], bool]:
    return lambda c: c.is_decode() and c.graph == graph and c.page_size in sizes


def _decode(h200: bool) -> tuple[Target, ...]:
    """h200: FlashInfer's rates are of this card. They were reached by CUDA graph, which is what they are compared with."""
    found = []
    for graph, how in _HOW.items():
        who, measure = ("the better of cuDNN and FlashInfer's rate", _over_cudnn_and_flashinfer) if h200 and graph else ("cuDNN", _CUDNN)
        found += [Target(f"{held} over {who}, {how}, every point", 1.05, 1.05, measure, _steps(graph, sizes), every=True) for held, sizes in _PAGES.items()]

    def smallest(case: Case) -> bool:
        return case.graph and (case.batch, case.seqlen_k) == (1, 8192)

    return (*found, Target("1 x 8192 by CUDA graph, time", 14.0, 14.0, _microseconds, smallest, "{:.1f} us", at_most=True), _EXACT)


# -- tables --------------------------------------------------------------------------------------------------------------

_ON_THE_GRID = "the grid's geometric mean over flash"
GPU: dict[str, tuple[Target, ...]] = {
    "cuda-grid": (*_FORWARD, *_FORWARD_BETWEEN, _EXACT),
    "cuda-sustained": (*_SUSTAINED, _EXACT),
    "cuda-features": (*_FEATURES, _EXACT),
    "cuda-decode": _decode(False),
    "cuda-few": (Target("few queries over cuDNN and flash, every point", 1.0, 1.0, _over_fastest("F.sdpa cuDNN"), _always, every=True), _EXACT),
    "cuda-short": (Target("the automatic choice over the fastest of torch, geometric mean", 1.0, 1.2, _over_fastest("F.sdpa"), _always), _EXACT),
    "cuda-portable": (
        Target(_ON_THE_GRID, 1.0, 1.0, _FLASH, _always),
        *(Target(f"D{dim} over flash", 0.0, 1.0, _FLASH, lambda c, dim=dim: c.head_dim == dim) for dim in (64, 128, 256)),  # type: ignore[misc]
        _EXACT,
    ),
}
#: The same with what was measured on that card only.
H200 = {"cuda-decode": _decode(True)}
#: Host time. The design asks the same of calls with gradients, whose backward is another backend's: aimed at here.
OVERHEAD = tuple(
    Target(f"{mode}: host time of F.sdpa's", gate, 1.0, figure("ratio"), lambda c, mode=mode: c == mode, "{:.2f}", at_most=True)  # type: ignore[misc]
    for mode, gate in ((overhead.NO_GRAD, 1.0), (overhead.NO_GRAD_PREFILL, 1.0), (overhead.GRAD, 0.0))
)
