"""A result file held against the targets of its device and preset. Torch-free.

A class of cases is judged by the geometric mean of its cases (memory, and what must hold at every point, by the worst), and the worst
case is told beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional, Union

from attnhub.bench import cpu_targets, cuda_targets, models, onnx_targets, overhead_case, triton_targets
from attnhub.bench.cases import Case
from attnhub.bench.cpu_targets import AMX, AVX
from attnhub.bench.model_targets import MODELS
from attnhub.bench.models import ModelCase, case_of
from attnhub.bench.presets import PRESETS
from attnhub.bench.target import ABSENT, AIM, BELOW, DISTURBED, GATE, MISSED, Rows, Target

__all__ = ["ABSENT", "AIM", "AMX", "AVX", "BELOW", "DISTURBED", "GATE", "GPU", "H200", "MISSED", "MODELS", "Target", "Verdict", "judge", "judged", "table", "targets_of", "unjudged"]

#: By the preset, on any GPU and on one kind of card.
GPU = {**triton_targets.GPU, **cuda_targets.GPU}
H200 = {**triton_targets.H200, **cuda_targets.H200}
#: A fraction of a ceiling beyond which the ceiling was disturbed.
_MOST = 1.05
#: Turns of so many seconds are there for their length: none may be shorter than this part of it, since calls are counted beforehand.
_LONG, _SHORT = 1.0, 0.8

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


def targets_of(result: dict[str, Any]) -> tuple[Target, ...]:
    """The targets of a result file. ValueError where there are none."""
    if result["suite"] == overhead_case.SUITE:
        return cpu_targets.OVERHEAD if _on_cpu(result) else cuda_targets.OVERHEAD
    if result["suite"] != models.SUITE:
        return table(result["environment"], result["preset"])
    if result["preset"] not in MODELS:
        raise ValueError(f"there are targets for the presets {', '.join(MODELS)} of whole models; this file is of {result['preset']}")
    return MODELS[result["preset"]]


def table(environment: dict[str, Any], preset: str = "limits") -> tuple[Target, ...]:
    """The targets of a device and a preset of single calls. ValueError where there are none."""
    device = environment["device"]
    if device["type"] == "cpu":
        return onnx_targets.NODE if preset == "onnx" else AMX if "amx_bf16" in device["isa"] else AVX
    if preset not in GPU:
        raise ValueError(f"there are targets for CPUs and, on GPUs, for the presets {', '.join(GPU)}; this file is of {device['name']} and {preset}")
    return H200.get(preset, GPU[preset]) if "H200" in device["name"] else GPU[preset]


def judge(result: dict[str, Any]) -> list[Verdict]:
    """A verdict for every target of the file's device."""
    return [_verdict(target, by_case(result), judged(result)) for target in targets_of(result)]


def judged(result: dict[str, Any]) -> tuple[str, ...]:
    """Who is judged: the first of these that has a row."""
    if result["suite"] == overhead_case.SUITE:
        return ("attnhub auto",) if _on_cpu(result) else ("attnhub cuda",)
    if result["suite"] == models.SUITE:
        return ("attnhub",)
    if _on_cpu(result):
        return ("attnhub onnx",) if result["preset"] == "onnx" else ("attnhub", "attnhub cpu")
    return (PRESETS[result["preset"]].judged,)


def _on_cpu(result: dict[str, Any]) -> bool:
    return bool(result["environment"]["device"]["type"] == "cpu")


def by_case(result: dict[str, Any]) -> dict[Any, Rows]:
    """The rows that were timed, by case and peer."""
    cases: dict[Any, Rows] = {}
    for row in result["rows"]:
        if "seconds" in row or "microseconds" in row:
            cases.setdefault(case_of(result["suite"], row), {})[row["peer"]] = row
    return cases


def unjudged(result: dict[str, Any]) -> list[str]:
    """Why a GPU's verdicts say less than they seem to: cases of the preset that are not in the file, or without the peers that a target compares;
    turns that are fewer or shorter than the preset's.

    Of single calls on a CPU nothing is said: which peers are installed there differs. Nor of what is only aimed at in whole models,
    where a peer may not run.
    """
    whole = result["suite"] == models.SUITE
    if _on_cpu(result) and not whole:
        return []
    rows, asked = by_case(result), targets_of(result)
    found = _hasty(result)
    for case in _expected(result):
        mine = next((rows[case][name] for name in judged(result) if name in rows.get(case, {})), None)
        if mine is None:
            found.append(f"{case}: not measured")
            continue
        for target in asked:
            if target.holds(case) and (target.gate or not whole) and target.measure(rows[case], mine) is None:
                found.append(f"{case}: {target.name} has nothing to compare with")
    return found


def _expected(result: dict[str, Any]) -> tuple[Union[Case, ModelCase, str], ...]:
    """What a complete file holds."""
    if result["suite"] == overhead_case.SUITE:
        return tuple(case.mode for case in overhead_case.cases("cuda"))
    return models.PRESETS[result["preset"]].cases if result["suite"] == models.SUITE else tuple(PRESETS[result["preset"]].make("cuda"))


def _hasty(result: dict[str, Any]) -> list[str]:
    """Whether single calls were timed for less than their preset says: a clock that has not settled flatters."""
    if result["suite"] != "gpu":
        return []
    told = result["settings"]
    rounds, seconds = PRESETS[result["preset"]].turns
    found = []
    if told.get("rounds", 0) < rounds or told.get("round_seconds", 0.0) < seconds:
        found.append(f"{told.get('rounds', 0)} rounds with turns of {told.get('round_seconds', 0.0):g} s; the preset has {rounds} of {seconds:g} s")
    if seconds >= _LONG:
        short = [row for row in result["rows"] if row.get("turn_seconds", seconds) < _SHORT * seconds or len(row.get("seconds_rounds", ())) < rounds]
        found.extend(f"{Case.of(row)}: {row['peer']}: its turns were fewer or shorter than {rounds} of {seconds:g} s" for row in short if "seconds" in row)
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
