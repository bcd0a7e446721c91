"""What the machine can do at best, measured between the peers' turns: operations on registers, and reads of memory. CPU only.

A fraction of a ceiling compares machines where a ratio to another library cannot. Clocks change in the course of a run, so a case's
ceiling is measured between its own rounds; a neighbour can only lower a sample, so the largest of them counts.
"""

from __future__ import annotations

import statistics
from typing import Any, Optional

from attnhub.bench import processor
from attnhub.bench.cases import Case
from attnhub.registry import registry

#: The names of read rates among the kinds of ceilings; the others are dtypes. READ is from memory on the pages that tensors get
#: and is what decode steps are compared with; READ_HUGE says what pages of 2 MiB would give.
READ, READ_HUGE = "read", "read_huge_pages"


class Ceilings:
    """Samples of one run, by kind: a dtype (operations a second), READ and READ_HUGE (bytes a second)."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.read_bytes = processor.cold_bytes()
        self.samples: dict[str, list[float]] = {}

    def sample(self, kind: str) -> Optional[float]:
        """One measurement of 20 ms, kept; None where memory for it is short."""
        from attnhub.backends.cpu import library

        if kind in (READ, READ_HUGE):
            value = library.read_rate(self.threads, self.read_bytes, kind == READ_HUGE)
        else:
            value = library.peak_flops(kind, self.threads)
        if value <= 0:
            return None
        self.samples.setdefault(kind, []).append(value)
        return value

    def to_json(self) -> dict[str, Any]:
        """Median, largest and all samples of every kind, and what was read."""
        kinds = {kind: {"median": statistics.median(v), "max": max(v), "samples": v} for kind, v in self.samples.items()}
        return {"threads": self.threads, "read_bytes": self.read_bytes, **kinds}


class CaseCeilings:
    """The samples that belong to one case."""

    def __init__(self, ceilings: Optional[Ceilings], case: Case) -> None:
        self._all = ceilings
        self._kinds = (case.dtype, *((READ, READ_HUGE) if case.is_decode() else ())) if ceilings and case.dtype in _dtypes() else ()
        self._mine: dict[str, list[float]] = {kind: [] for kind in self._kinds}
        self._dtype = case.dtype

    def sample(self) -> None:
        """Once every kind that says something about the case."""
        for kind in self._kinds:
            value = self._all.sample(kind) if self._all else None
            if value is not None:
                self._mine[kind].append(value)

    def peak(self) -> Optional[float]:
        """Operations a second for the case's dtype."""
        return max(self._mine.get(self._dtype, ()), default=None)

    def read(self) -> Optional[float]:
        """Bytes a second; None unless it is a decode step."""
        return max(self._mine.get(READ, ()), default=None)


def available(threads: int) -> Optional[Ceilings]:
    """The ceilings of this machine's CPU, or None where the cpu backend's library is not built."""
    candidate = registry.candidates().get("cpu")
    return Ceilings(threads) if candidate is not None and candidate.backend is not None and not candidate.probe else None


def _dtypes() -> tuple[str, ...]:
    from attnhub.backends.cpu import library

    return tuple(library.DTYPES)
