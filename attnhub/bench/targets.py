"""What the cpu backend and, on a GPU, the triton backend are held to, as data, and a result file held against it. Torch-free.

A class of cases is judged by the geometric mean of its cases (memory, and what must hold at every point, by the worst), and the worst
case is told beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

from attnhub.bench import models
from attnhub.bench.cases import PRESETS, Case
from attnhub.bench.models import ModelCase, case_of

AIM, GATE, MISSED, ABSENT = "aim met", "gate met", "MISSED", "not in this file"
#: The verdict on what is only aimed at.
BELOW = "below aim"
#: The verdict on fractions of a ceiling that exceed it: the ceiling was measured while something else took the processor.
DISTURBED = "DISTURBED"
_MOST = 1.05
#: Who is judged: the first of these that has a row.
_JUDGED, _JUDGED_ON_GPUS, _JUDGED_IN_ONNX = ("attnhub", "attnhub cpu"), ("attnhub triton",), ("attnhub onnx",)

Rows = dict[str, dict[str, Any]]
#: (rows of a case by peer, the judged row) -> what is compared; None where it was not measured.
Measure = Callable[[Rows, dict[str, Any]], Optional[float]]


def _over(peer: str) -> Measure:
    def measure(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
        theirs = rows.get(peer, {}).get("seconds")
        return theirs / mine["seconds"] if theirs else None

    return measure


def _figure(key: str) -> Measure:
    return lambda rows, mine: mine.get(key)


@dataclass(frozen=True)
class Target:
    """A class of cases with its gate (the least that is accepted; 0: it is only aimed at) and its aim. at_most: smaller is better.

    fraction: a part of what the machine reached, which no kernel exceeds. every: each case has to meet it, not the mean.
    """

    name: str
    gate: float
    aim: float
    measure: Measure
    holds: Callable[[Any], bool]
    form: str = "{:.2f}x"
    at_most: bool = False
    fraction: bool = False
    every: bool = False

    def text(self, value: float) -> str:
        return self.form.format(value)

    def word(self, value: float) -> str:
        if self.at_most:
            return AIM if value <= self.aim else GATE if value <= self.gate else MISSED
        return AIM if value >= self.aim else MISSED if value < self.gate else GATE if self.gate else BELOW


@dataclass(frozen=True)
class Verdict:
    """A target with what a file says of it. mean: the geometric mean over the cases; None without any."""

    target: Target
    cases: int
    mean: Optional[float]
    worst: float
    worst_case: str
    word: str

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target.name, "gate": self.target.gate, "aim": self.target.aim, "cases": self.cases, "mean": self.mean,
            "worst": None if self.mean is None else self.worst, "worst_case": self.worst_case, "verdict": self.word,
        }  # fmt: skip


# -- classes of cases ----------------------------------------------------------------------------------------------------


def _prefill(dtype: str, causal: Optional[bool] = None, dim: Optional[int] = None) -> Callable[[Case], bool]:
    return lambda c: (
        c.mode == "forward" and c.dtype == dtype and c.seqlen_q == c.seqlen_k > 1
        and (causal is None or c.causal == causal) and (dim is None or c.head_dim == dim)
    )  # fmt: skip


def _decode(dtype: str) -> Callable[[Case], bool]:
    return lambda c: c.is_decode() and c.dtype == dtype


def _training(dtype: str) -> Callable[[Case], bool]:
    return lambda c: c.mode == "training" and c.dtype == dtype


def _one(case: Case) -> Callable[[Case], bool]:
    return lambda c: c == case


# -- tables --------------------------------------------------------------------------------------------------------------

_SDPA = _over("F.sdpa")
_PEAK, _READ, _MEMORY = _figure("peak_fraction"), _figure("bandwidth_fraction"), _figure("extra_mib")

#: Targets that hold on every processor: fractions of what it reached in the same run, and memory.
_EVERYWHERE = (
    Target("fp32 prefill D128 full, of FMA peak", 0.70, 0.85, _PEAK, _prefill("float32", False, 128), "{:.0%}", fraction=True),
    Target("fp32 prefill D64 full, of FMA peak", 0.60, 0.78, _PEAK, _prefill("float32", False, 64), "{:.0%}", fraction=True),
    Target("extra memory at 8192 tokens", 64, 64, _MEMORY, lambda c: c.mode == "forward" and c.seqlen_q == 8192, "{:.1f} MiB", at_most=True),
)
#: x86 without AMX, where torch's bf16 runs on vdpbf16ps at best.
AVX = (
    Target("fp32 prefill full over F.sdpa", 1.8, 2.2, _SDPA, _prefill("float32", False)),
    Target("fp32 prefill causal over F.sdpa", 2.2, 3.0, _SDPA, _prefill("float32", True)),
    Target("bf16 prefill full over F.sdpa", 3.5, 4.2, _SDPA, _prefill("bfloat16", False)),
    Target("bf16 prefill causal over F.sdpa", 4.5, 6.0, _SDPA, _prefill("bfloat16", True)),
    Target("fp16 prefill over F.sdpa", 4.0, 8.0, _SDPA, _prefill("float16")),
    Target("fp32 decode over F.sdpa", 4.0, 4.0, _SDPA, _decode("float32")),
    Target("bf16 decode over F.sdpa", 30.0, 30.0, _SDPA, _decode("bfloat16")),
    Target("fp32 decode, of read rate", 0.70, 0.85, _READ, _decode("float32"), "{:.0%}", fraction=True),
    Target("bf16 decode, of read rate", 0.70, 0.85, _READ, _decode("bfloat16"), "{:.0%}", fraction=True),
    Target("fp32 training over F.sdpa", 1.7, 2.2, _SDPA, _training("float32")),
    Target("bf16 training over F.sdpa", 1.7, 2.5, _SDPA, _training("bfloat16")),
    Target("bf16 prefill D128 full, of vdpbf16ps peak", 0.70, 0.85, _PEAK, _prefill("bfloat16", False, 128), "{:.0%}", fraction=True),
    Target("bf16 prefill D64 full, of vdpbf16ps peak", 0.60, 0.78, _PEAK, _prefill("bfloat16", False, 64), "{:.0%}", fraction=True),
    Target("over ONNX Runtime's GroupQueryAttention", 1.3, 2.0, _over("ONNX Runtime"), _one(Case(2048, heads=32, head_dim=128, causal=True))),
    *_EVERYWHERE,
)
#: x86 with AMX, which torch's bf16 uses, too.
AMX = (
    Target("bf16 prefill full over F.sdpa", 1.2, 1.8, _SDPA, _prefill("bfloat16", False)),
    Target("bf16 prefill causal over F.sdpa", 1.5, 2.2, _SDPA, _prefill("bfloat16", True)),
    Target("fp32 prefill full over F.sdpa", 1.1, 1.3, _SDPA, _prefill("float32", False)),
    Target("fp32 prefill causal over F.sdpa", 1.6, 2.0, _SDPA, _prefill("float32", True)),
    Target("fp32 decode over F.sdpa", 4.0, 4.0, _SDPA, _decode("float32")),
    Target("bf16 decode over F.sdpa", 3.0, 3.0, _SDPA, _decode("bfloat16")),
    *_EVERYWHERE,
)


#: The node beside ONNX Runtime's own, at the shape of its target.
NODE_CASE = Case(2048, heads=32, head_dim=128, causal=True)
#: Speed-up that is asked for over the graph that exporters write.
OVER_GRAPH = 3.0
NODE = tuple(
    Target(f"causal prefill over {name}", gate, gate, _over(peer), _one(NODE_CASE))
    for name, peer, gate in (
        ("GroupQueryAttention", "ONNX Runtime", 1.3), ("MultiHeadAttention", "ONNX Runtime MultiHeadAttention", 1.5),
        ("the exported graph", "ONNX Runtime graph", OVER_GRAPH),
    )
)  # fmt: skip


# -- GPU -----------------------------------------------------------------------------------------------------------------

_FLEX, _FLASH, _CUDNN, _NAIVE = _over("FlexAttention"), _over("F.sdpa flash"), _over("F.sdpa cuDNN"), _over("naive")


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


#: The rate at which FlashInfer reads pages of 16 tokens on an H200, replayed from a CUDA graph, in GB/s: (batch, keys, K/V heads).
#: Measured on such a card in another run than any of ours, so that a few percent mean nothing.
_FLASHINFER = {(16, 8192, 8): 3740.0, (64, 8192, 8): 4300.0, (128, 2048, 8): 4000.0, (64, 4096, 32): 4390.0}


def _flashinfer_key(case: Case) -> tuple[int, int, int]:
    return case.batch, case.seqlen_k, case.kv_heads


def _over_flashinfer(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
    rate = mine.get("kv_gb_per_s")
    return rate / _FLASHINFER[_flashinfer_key(Case.of(mine))] if rate else None


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
        Target(f"{dtype} {batch} x {length} over naive, {how}", least, least, _NAIVE, _one(Case(length, batch=batch, heads=1, dtype=name, graph=graph)))
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
            Target(f"paged over contiguous, {how}", 0.95, 1.0, _over("attnhub triton contiguous"), _timed(graph, lambda c: c.page_size > 0), every=True)
            for graph, how in _HOW.items()
        ),
    ),
    "memory": tuple(
        Target(f"saved of naive memory at {length} tokens", least, least, _saved, lambda c, n=length: c.mode == "forward" and c.seqlen_q == n, "{:.1%}")  # type: ignore[misc]
        for length, least in ((512, 0.94), (1024, 0.97))
    ),
}  # fmt: skip
#: What is compared with figures of one kind of card only.
_H200 = (
    Target(
        "pages of 16 over FlashInfer's rate, batch 16 and more", 1.0, 1.0, _over_flashinfer,
        _timed(True, lambda c: c.page_size == 16 and _flashinfer_key(c) in _FLASHINFER), every=True,
    ),
)  # fmt: skip


# -- whole models --------------------------------------------------------------------------------------------------------


def _memory_over(peer: str) -> Measure:
    """The peak of memory as a part of a peer's."""

    def measure(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
        theirs, ours = rows.get(peer, {}).get("extra_mib"), mine.get("extra_mib")
        return ours / theirs if theirs and ours is not None else None

    return measure


def _task(task: str, longer: bool | None = None) -> Callable[[ModelCase], bool]:
    """Cases of a task; longer: only those where attention has a large part of the work, or only the others."""
    return lambda c: c.task == task and (longer is None or (c.length >= 2048) == longer)


_PATCHED, _MEMORY_OF = _over(models.BASELINE), ("training step's peak memory of sdpa's", 1.0, 1.0, _memory_over(models.BASELINE), _task("training"), "{:.1%}", True)
_FILES, _GRAPHS = ("embed", "prefill"), ("sdpa", "eager")
#: By the preset.
MODELS: dict[str, tuple[Target, ...]] = {
    "cpu": (
        Target("embeddings' largest difference", 1e-5, 1e-5, _figure("difference"), _task("embed"), "{:.1e}", at_most=True),
        Target("other outputs' largest difference", 1e-5, 1e-5, _figure("difference"), lambda c: c.task != "embed", "{:.1e}", at_most=True),
        Target("sentences/s over sdpa", 0.97, 1.0, _PATCHED, _task("embed"), every=True),
        Target("12-layer encoder over sdpa", 0.97, 1.0, _PATCHED, _task("encode", False), every=True),
        Target("12-layer encoder at 2048 over sdpa", 1.0, 1.0, _PATCHED, _task("encode", True), every=True),
        Target("prefill over sdpa", 1.0, 1.0, _PATCHED, _task("prefill"), every=True),
        Target("decode over sdpa", 0.97, 1.0, _PATCHED, _task("decode"), every=True),
        Target(*_MEMORY_OF),
    ),
    "gpu": (
        Target("prefill over sdpa", 0.0, 1.0, _PATCHED, _task("prefill"), every=True),
        Target("prefill over flex", 0.0, 1.0, _over("flex"), _task("prefill"), every=True),
        Target("decode over sdpa", 0.0, 1.0, _PATCHED, _task("decode"), every=True),
        Target("decode over flex", 0.0, 1.0, _over("flex"), _task("decode"), every=True),
        Target("training step over sdpa", 0.0, 1.0, _PATCHED, _task("training"), every=True),
        Target(*_MEMORY_OF),
    ),
    # Files in ONNX Runtime: the graphs of torch's exporter, and what ONNX Runtime's own optimizer makes of one.
    models.ONNX: (
        Target("embeddings' largest difference to torch", 1e-5, 1e-5, _figure("difference"), _task("embed"), "{:.1e}", at_most=True),
        Target("other outputs' largest difference to torch", 1e-5, 1e-5, _figure("difference"), _task("prefill"), "{:.1e}", at_most=True),
        *(Target(f"{task} over the exported graph of {peer}", 1.0, 1.0, _over(peer), _task(task), every=True) for task in _FILES for peer in _GRAPHS),
        Target("embed over ONNX Runtime's fused graph", 0.0, 1.0, _over("fused"), _task("embed"), every=True),
        *(
            Target(f"{task}'s peak memory of the exported graph of {peer}", 0.99, 0.6, _memory_over(peer), _task(task), "{:.0%}", at_most=True)
            for task in _FILES for peer in _GRAPHS
        ),
        Target("embed's peak memory of ONNX Runtime's fused graph", 0.99, 0.99, _memory_over("fused"), _task("embed"), "{:.0%}", at_most=True),
    ),
}


def targets_of(result: dict[str, Any]) -> tuple[Target, ...]:
    """The targets of a result file. ValueError where there are none."""
    if result["suite"] != models.SUITE:
        return table(result["environment"], result["preset"])
    if result["preset"] not in MODELS:
        raise ValueError(f"there are targets for the presets {', '.join(MODELS)} of whole models; this file is of {result['preset']}")
    return MODELS[result["preset"]]


def table(environment: dict[str, Any], preset: str = "limits") -> tuple[Target, ...]:
    """The targets of a result file's device and preset. ValueError where there are none."""
    device = environment["device"]
    if device["type"] == "cpu":
        return NODE if preset == "onnx" else AMX if "amx_bf16" in device["isa"] else AVX
    if preset not in GPU:
        raise ValueError(f"there are targets for CPUs and, on GPUs, for the presets {', '.join(GPU)}; this file is of {device['name']} and {preset}")
    return GPU[preset] + (_H200 if preset == "decode" and "H200" in device["name"] else ())


def judge(result: dict[str, Any]) -> list[Verdict]:
    """A verdict for every target of the file's device."""
    return [_verdict(target, by_case(result), _judged(result)) for target in targets_of(result)]


def by_case(result: dict[str, Any]) -> dict[Any, Rows]:
    """The rows that were timed, by case and peer."""
    cases: dict[Any, Rows] = {}
    for row in result["rows"]:
        if "seconds" in row:
            cases.setdefault(case_of(result["suite"], row), {})[row["peer"]] = row
    return cases


def _judged(result: dict[str, Any]) -> tuple[str, ...]:
    if result["suite"] != models.SUITE and result["preset"] == "onnx":
        return _JUDGED_IN_ONNX
    on_gpu = result["environment"]["device"]["type"] != "cpu" and result["suite"] != models.SUITE
    return _JUDGED_ON_GPUS if on_gpu else _JUDGED


def unjudged(result: dict[str, Any]) -> list[str]:
    """Why a GPU's verdicts say less than they seem to: cases of the preset that are not in the file, or without the peers that a target compares.

    Of single calls on a CPU nothing is said: which peers are installed there differs. Nor of what is only aimed at in whole models,
    where a peer may not run.
    """
    whole = result["suite"] == models.SUITE
    if result["environment"]["device"]["type"] == "cpu" and not whole:
        return []
    rows = by_case(result)
    expected: tuple[Union[Case, ModelCase], ...] = (
        models.PRESETS[result["preset"]].cases if whole else tuple(PRESETS[result["preset"]].make("cuda"))
    )
    found = []
    for case in expected:
        mine = next((rows.get(case, {}).get(name) for name in _judged(result) if name in rows.get(case, {})), None)
        if mine is None:
            found.append(f"{case}: not measured")
            continue
        for target in targets_of(result):
            if target.holds(case) and (target.gate or not whole) and target.measure(rows[case], mine) is None:
                found.append(f"{case}: {target.name} has nothing to compare with")
    return found


def _verdict(target: Target, cases: dict[Any, Rows], judged: tuple[str, ...]) -> Verdict:
    found: list[tuple[float, str]] = []
    for case, rows in cases.items():
        mine = next((rows[name] for name in judged if name in rows), None)
        if mine is None or not target.holds(case):
            continue
        value = target.measure(rows, mine)
        if value is not None:
            found.append((value, str(case)))
    if not found:
        return Verdict(target, 0, None, 0.0, "", ABSENT)
    # Nothing is as good as nothing measured: a mean of 0 MiB is 0.
    mean = math.exp(sum(math.log(value) for value, _ in found) / len(found)) if all(value > 0 for value, _ in found) else 0.0
    worst, worst_case = (max if target.at_most else min)(found)
    word = target.word(worst if target.at_most or target.every else mean)
    if target.fraction and max(value for value, _ in found) > _MOST:
        word = DISTURBED
    return Verdict(target, len(found), mean, worst, worst_case, word)
