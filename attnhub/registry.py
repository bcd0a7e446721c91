"""The installed backends, found by entry point. The built-in ones are entry points like any other's.

A plugin that fails to load becomes a verdict with the code ``plugin_error``, never a crash.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import threading
from typing import Any, Optional

from attnhub import config
from attnhub.backend import Backend
from attnhub.reasons import Code, Reason
from attnhub.selector import Candidate

log = logging.getLogger("attnhub")
log.setLevel(config.log_level())

GROUP = "attnhub.backends"
#: For a bare checkout on PYTHONPATH, where no distribution declares entry points. A test holds it equal to pyproject.toml.
BUILTIN = {name: f"attnhub.backends.{name}:backend" for name in ("reference", "sdpa", "cpu", "triton", "cuda", "onnx")}


def entry_points(group: str, builtin: dict[str, str]) -> list[tuple[str, str, str]]:
    """(name, ``module:attribute``, distribution) of a group, the built-in ones first. A name that is taken twice keeps its first owner."""
    found = [(e.name, e.value, e.dist.name if e.dist else "?") for e in importlib.metadata.entry_points(group=group)]
    have = {value for _, value, _ in found}
    found = [(name, value, "attnhub") for name, value in builtin.items() if value not in have] + found
    found.sort(key=lambda entry: (entry[1] not in builtin.values(), entry[0]))
    return found


def load(target: str) -> Any:
    """The object behind ``module:attribute``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry:
    """Backends by name, with their probes. One per process: `registry`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._candidates: Optional[dict[str, Candidate]] = None
        self._distributions: dict[str, str] = {}
        self.generation = 0

    def candidates(self) -> dict[str, Candidate]:
        """Every backend with its probe; declarations are loaded once, probes run when somebody asks."""
        found = self._candidates
        if found is None:
            with self._lock:
                if self._candidates is None:
                    self._candidates = self._load()
                found = self._candidates
        return found

    def names(self) -> tuple[str, ...]:
        return tuple(self.candidates())

    def get(self, name: str) -> Backend:
        """The backend of this name; KeyError with the installed names where there is none or it failed to load."""
        candidate = self.candidates().get(name)
        if candidate is None or candidate.backend is None:
            why = "; ".join(map(str, candidate.probe)) if candidate else f"installed are {', '.join(self.names())}"
            raise KeyError(f"no backend {name!r}: {why}")
        return candidate.backend

    def distribution(self, name: str) -> str:
        """The distribution that brings a backend."""
        self.candidates()
        return self._distributions.get(name, "?")

    def register(self, backend: Backend, distribution: str = "(registered at run time)") -> None:
        """Add or replace a backend in this process, for notebooks and tests. A package uses an entry point instead."""
        with self._lock:
            candidates = dict(self.candidates())
            candidates[backend.name] = _candidate(backend)
            self._candidates = candidates
            self._distributions[backend.name] = distribution
            self.generation += 1

    def unregister(self, name: str) -> None:
        """Forget a backend in this process."""
        with self._lock:
            candidates = dict(self.candidates())
            candidates.pop(name, None)
            self._candidates = candidates
            self.generation += 1

    def _load(self) -> dict[str, Candidate]:
        candidates: dict[str, Candidate] = {}
        for name, target, distribution in entry_points(GROUP, BUILTIN):
            if name in candidates:
                log.warning("backend %r of distribution %s ignored: %s has the name already", name, distribution, self._distributions[name])
                continue
            self._distributions[name] = distribution
            candidates[name] = self._load_one(name, target, distribution)
        return candidates

    @staticmethod
    def _load_one(name: str, target: str, distribution: str) -> Candidate:
        try:
            backend = load(target)
            if not isinstance(backend, Backend):
                raise TypeError(f"{target} is a {type(backend).__name__}, not an attnhub.Backend instance")
            if backend.name != name:
                raise ValueError(f"the entry point is named {name!r}, the backend {backend.name!r}; they must be equal")
        except Exception as error:
            detail = f"loading {target} of {distribution} raised {type(error).__name__}: {error}"
            return Candidate(None, (Reason(Code.PLUGIN_ERROR, detail, f"fix or uninstall {distribution}"),))
        return _candidate(backend)


def _candidate(backend: Backend) -> Candidate:
    return Candidate(backend, lambda: _probe(backend))


def _probe(backend: Backend) -> tuple[Reason, ...]:
    try:
        return tuple(backend.probe())
    except Exception as error:
        return (Reason(Code.BROKEN, f"its probe raised {type(error).__name__}: {error}"),)


registry = Registry()


