"""What the cpu backend is held to, as data, and a result file held against it. Torch-free.

A class of cases is judged by the geometric mean of its cases (memory by the worst), and the worst case is told beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from attnhub.bench.cases import Case

AIM, GATE, MISSED, ABSENT = "aim met", "gate met", "MISSED", "not in this file"
#: The verdict on fractions of a ceiling that exceed it: the ceiling was measured while something else took the processor.
DISTURBED = "DISTURBED"
_MOST = 1.05
#: Who is judged: the first of these that has a row.
_JUDGED = ("attnhub", "attnhub cpu")

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
    """A class of cases with its gate (the least that is accepted) and its aim. at_most: smaller is better.

    fraction: a part of what the machine reached, which no kernel exceeds.
    """

    name: str
    gate: float
    aim: float
    measure: Measure
    holds: Callable[[Case], bool]
    form: str = "{:.2f}x"
    at_most: bool = False
    fraction: bool = False

    def text(self, value: float) -> str:
        return self.form.format(value)

    def word(self, value: float) -> str:
        if self.at_most:
            return AIM if value <= self.aim else GATE if value <= self.gate else MISSED
        return AIM if value >= self.aim else GATE if value >= self.gate else MISSED


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


def table(environment: dict[str, Any]) -> tuple[Target, ...]:
    """The targets of a result file's processor. ValueError where there are none."""
    device = environment["device"]
    if device["type"] != "cpu":
        raise ValueError(f"there are targets for CPUs only; this file was measured on {device['name']}")
    return AMX if "amx_bf16" in device["isa"] else AVX


def judge(result: dict[str, Any]) -> list[Verdict]:
    """A verdict for every target of the file's processor."""
    cases: dict[Case, Rows] = {}
    for row in result["rows"]:
        if "seconds" in row:
            cases.setdefault(Case(**{name: row[name] for name in Case.__dataclass_fields__}), {})[row["peer"]] = row
    return [_verdict(target, cases) for target in table(result["environment"])]


def _verdict(target: Target, cases: dict[Case, Rows]) -> Verdict:
    found: list[tuple[float, str]] = []
    for case, rows in cases.items():
        mine = next((rows[name] for name in _JUDGED if name in rows), None)
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
    word = target.word(worst if target.at_most else mean)
    if target.fraction and max(value for value, _ in found) > _MOST:
        word = DISTURBED
    return Verdict(target, len(found), mean, worst, worst_case, word)
