"""What the triton backend is held to on a GPU. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from attnhub.bench import flashinfer
from attnhub.bench.cases import Case
from attnhub.bench.target import Rows, Target, one, over

_FLEX, _FLASH, _CUDNN, _NAIVE = over("FlexAttention"), over("F.sdpa flash"), over("F.sdpa cuDNN"), over("naive")


def _saved(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
    """The part of naive maths' peak that is not needed, to a tenth of a percent, as the Triton v1/v2 report gives it."""
    theirs, ours = rows.get("naive", {}).get("extra_mib"), mine.get("extra_mib")
    return round(1 - ours / theirs, 3) if theirs and ours is not None else None


def _grid(mode: str, dim: int = 0) -> Callable[[Case], bool]:
    return lambda c: c.mode == mode and (not dim or c.head_dim == dim)


def _timed(graph: bool, holds: Callable[[Case], bool]) -> Callable[[Case], bool]:
    return lambda c: c.graph == graph and holds(c)


def _kind(word: str, mode: str) -> Callable[[Case], bool]:
    def holds(case: Case) -> bool:
        found = [text.split()[0] for text in case.features()] or ["grouped heads"]
        return case.mode == mode and found == [word]

    return holds


def _over_flashinfer(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
    rate, theirs = mine.get("kv_gb_per_s"), flashinfer.rate(Case.of(mine))
    return rate / theirs if rate and theirs else None


#: The speed-ups of the Triton v1/v2 report, by (batch, length); one head, head_dim 64.
_REPORT = {(1, 256): 1.12, (2, 512): 1.69, (4, 1024): 1.87}
_HOW = {False: "by plain call", True: "by CUDA graph"}
_FEATURES = ("softcap", "window", "alibi", "documents", "grouped heads", "prefix", "density", "sinks", "bias")

GPU: dict[str, tuple[Target, ...]] = {
    "grid": (
        Target("forward over FlexAttention, every point", 1.0, 1.0, _FLEX, _grid("forward"), every=True),
        Target("forward over FlexAttention", 1.08, 1.08, _FLEX, _grid("forward")),
        Target("forward D128 over flash", 1.3, 1.3, _FLASH, _grid("forward", 128)),
        Target("forward D64 over flash", 1.15, 1.15, _FLASH, _grid("forward", 64)),
        Target("forward over cuDNN", 0.0, 0.85, _CUDNN, _grid("forward")),
        Target("backward over FlexAttention, every point", 1.0, 1.0, _FLEX, _grid("backward"), every=True),
        Target("backward over FlexAttention", 1.0, 1.0, _FLEX, _grid("backward")),
        Target("backward over flash", 1.2, 1.2, _FLASH, _grid("backward")),
        Target("backward over cuDNN", 0.0, 0.85, _CUDNN, _grid("backward")),
    ),
    "v1v2": tuple(
        Target(f"{dtype} {batch} x {length} over naive, {how}", least, least, _NAIVE, one(Case(length, batch=batch, heads=1, dtype=name, graph=graph)))
        for name, dtype in (("float16", "fp16"), ("float32", "fp32")) for (batch, length), least in _REPORT.items() for graph, how in _HOW.items()
    ),
    "features": tuple(
        Target(f"{mode} with {kind} over FlexAttention", 1.0, 1.0, _FLEX, _kind(kind, mode), every=True)
        for kind in _FEATURES for mode in ("forward", "backward")
    ),
    "decode": (
        *(
            Target(f"over cuDNN, batch 16 and more, {how}", 1.0, 1.0, _CUDNN, _timed(graph, lambda c: c.batch >= 16 and not c.page_size), every=True)
            for graph, how in _HOW.items()
        ),
        *(
            Target(f"paged over contiguous, {how}", 0.95, 1.0, over("attnhub triton contiguous"), _timed(graph, lambda c: c.page_size > 0), every=True)
            for graph, how in _HOW.items()
        ),
    ),
    "memory": tuple(
        Target(f"saved of naive memory at {length} tokens", least, least, _saved, lambda c, n=length: c.mode == "forward" and c.seqlen_q == n, "{:.1%}")  # type: ignore[misc]
        for length, least in ((512, 0.94), (1024, 0.97))
    ),
}  # fmt: skip
#: What is compared with figures of one kind of card only.
H200 = {
    "decode": (
        *GPU["decode"],
        Target(
            "pages of 16 over FlashInfer's rate, batch 16 and more", 1.0, 1.0, _over_flashinfer, _timed(True, lambda c: c.page_size == 16 and c.batch >= 16),
            every=True,
        ),
    ),
}  # fmt: skip
