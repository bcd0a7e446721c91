"""A class of cases with the least that is accepted of it, and what is compared in it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from attnhub.bench.cases import Case

AIM, GATE, MISSED, ABSENT = "aim met", "gate met", "MISSED", "not in this file"
#: The verdict on what is only aimed at.
BELOW = "below aim"
#: The verdict on fractions of a ceiling that exceed it: the ceiling was measured while something else took the processor.
DISTURBED = "DISTURBED"

Rows = dict[str, dict[str, Any]]
#: (rows of a case by peer, the judged row) -> what is compared; None where it was not measured.
Measure = Callable[[Rows, dict[str, Any]], Optional[float]]


def over(peer: str) -> Measure:
    """How many times as fast as a peer."""

    def measure(rows: Rows, mine: dict[str, Any]) -> Optional[float]:
        theirs = rows.get(peer, {}).get("seconds")
        return theirs / mine["seconds"] if theirs else None

    return measure


def figure(key: str) -> Measure:
    """A figure of the judged row itself."""
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
            return AIM if value <= self.aim else BELOW if not self.gate else GATE if value <= self.gate else MISSED
        return AIM if value >= self.aim else MISSED if value < self.gate else GATE if self.gate else BELOW


def one(case: Case) -> Callable[[Case], bool]:
    """The class that holds a single case."""
    return lambda c: c == case
