"""Counting the calls that attnhub serves for patched modules, outside tracing."""

from __future__ import annotations

import logging
import weakref
from typing import Optional

import torch
from torch import nn

from attnhub import runtime
from attnhub.patching import ModuleReport

log = logging.getLogger("attnhub")

#: What a report calls the plain maths that gives attention weights: no fused kernel has them.
WEIGHTS = "explicit weights"

#: Reports of patched modules. A module that was patched and deleted leaves nothing behind.
reports: weakref.WeakKeyDictionary[nn.Module, ModuleReport] = weakref.WeakKeyDictionary()

_said_weights = False


def count(module: nn.Module, name: Optional[str] = None) -> None:
    """One call served for the module, by the backend of this thread's last decision unless a name is given."""
    if torch.compiler.is_compiling():
        return
    report = reports.get(module)
    if report is None:
        return
    if name is None:
        name = served_by()
    report.calls += 1
    report.backends[name] = report.backends.get(name, 0) + 1


def served_by() -> str:
    """The backend of this thread's last decision."""
    # Not from `last_decision`, which asks the plan to describe itself: as long as a small call takes.
    return runtime.last_backend() or "none (nothing to compute)"


def count_weights(module: nn.Module, asked_by: str) -> None:
    """One call served by plain maths because the weights were asked for; said once in a process."""
    global _said_weights
    if torch.compiler.is_compiling():
        return
    count(module, WEIGHTS)
    if not _said_weights:
        _said_weights = True
        log.warning(
            "attention weights were asked for (%s): %s, and every other call that asks, computes them by plain maths with Sq x Sk memory, "
            "because no fused kernel has them",
            asked_by, type(module).__name__,
        )  # fmt: skip
