"""Backends with one thing wrong: a comparison that they pass compares nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub.backend import Backend, Call, Plan
from attnhub.problem import Problem
from attnhub.registry import registry


class _BrokenPlan(Plan):
    """The reference, with scores scaled by 1.5, the mask lost, or zeros for a result."""

    def __init__(self, plan: Plan, how: str) -> None:
        self._plan, self._how = plan, how

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        if self._how == "scale":
            call.softmax_scale *= 1.5
        if self._how == "mask":
            call.mask = attnhub.Mask()
        out, lse = self._plan.forward(call)
        return (torch.zeros_like(out) if self._how == "zeros" else out), lse


class _Broken(Backend):
    automatic = False

    def __init__(self, how: str) -> None:
        self.name, self._how = f"broken_{how}", how
        self.capability = registry.get("reference").capability

    def prepare(self, problem: Problem) -> Plan:
        return _BrokenPlan(registry.get("reference").prepare(problem), self._how)


@pytest.fixture
def broken(register: Callable[[Backend], Backend]) -> Callable[[str], str]:
    """``broken("scale" | "mask" | "zeros")`` registers such a backend until the test ends and returns its name."""
    return lambda how: register(_Broken(how)).name
