"""What models patched by attnhub are held to. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from attnhub.bench import models
from attnhub.bench.models import ModelCase
from attnhub.bench.target import Measure, Rows, Target, figure, over


def _memory_over(peer: str) -> Measure:
    """The peak of memory as a part of a peer's."""

    def measure(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
        theirs, ours = rows.get(peer, {}).get("extra_mib"), mine.get("extra_mib")
        return ours / theirs if theirs and ours is not None else None

    return measure


def _task(task: str, longer: bool | None = None) -> Callable[[ModelCase], bool]:
    """Cases of a task; longer: only those where attention has a large part of the work, or only the others."""
    return lambda c: c.task == task and (longer is None or (c.length >= 2048) == longer)


_PATCHED, _MEMORY_OF = over(models.BASELINE), ("training step's peak memory of sdpa's", 1.0, 1.0, _memory_over(models.BASELINE), _task("training"), "{:.1%}", True)
_FILES, _GRAPHS = ("embed", "prefill"), ("sdpa", "eager")
#: By the preset.
MODELS: dict[str, tuple[Target, ...]] = {
    "cpu": (
        Target("embeddings' largest difference", 1e-5, 1e-5, figure("difference"), _task("embed"), "{:.1e}", at_most=True),
        Target("other outputs' largest difference", 1e-5, 1e-5, figure("difference"), lambda c: c.task != "embed", "{:.1e}", at_most=True),
        Target("sentences/s over sdpa", 0.97, 1.0, _PATCHED, _task("embed"), every=True),
        Target("12-layer encoder over sdpa", 0.97, 1.0, _PATCHED, _task("encode", False), every=True),
        Target("12-layer encoder at 2048 over sdpa", 1.0, 1.0, _PATCHED, _task("encode", True), every=True),
        Target("prefill over sdpa", 1.0, 1.0, _PATCHED, _task("prefill"), every=True),
        Target("decode over sdpa", 0.97, 1.0, _PATCHED, _task("decode"), every=True),
        Target(*_MEMORY_OF),
    ),
    "gpu": (
        Target("prefill over sdpa", 0.0, 1.0, _PATCHED, _task("prefill"), every=True),
        Target("prefill over flex", 0.0, 1.0, over("flex"), _task("prefill"), every=True),
        Target("decode over sdpa", 0.0, 1.0, _PATCHED, _task("decode"), every=True),
        Target("decode over flex", 0.0, 1.0, over("flex"), _task("decode"), every=True),
        Target("training step over sdpa", 0.0, 1.0, _PATCHED, _task("training"), every=True),
        Target(*_MEMORY_OF),
    ),
    # Files in ONNX Runtime: the graphs of torch's exporter, and what ONNX Runtime's own optimizer makes of one.
    models.ONNX: (
        Target("embeddings' largest difference to torch", 1e-5, 1e-5, figure("difference"), _task("embed"), "{:.1e}", at_most=True),
        Target("other outputs' largest difference to torch", 1e-5, 1e-5, figure("difference"), _task("prefill"), "{:.1e}", at_most=True),
        *(Target(f"{task} over the exported graph of {peer}", 1.0, 1.0, over(peer), _task(task), every=True) for task in _FILES for peer in _GRAPHS),
        Target("embed over ONNX Runtime's fused graph", 0.0, 1.0, over("fused"), _task("embed"), every=True),
        *(
            Target(f"{task}'s peak memory of the exported graph of {peer}", 0.99, 0.6, _memory_over(peer), _task(task), "{:.0%}", at_most=True)
            for task in _FILES for peer in _GRAPHS
        ),
        Target("embed's peak memory of ONNX Runtime's fused graph", 0.99, 0.99, _memory_over("fused"), _task("embed"), "{:.0%}", at_most=True),
    ),
}
