"""Backends with one thing wrong: a comparison that they pass compares nothing."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Optional

import pytest
import torch
from torch import Tensor

from attnhub.backend import Backend, Call, Plan
from attnhub.mask import BoolMask, Mask
from attnhub.problem import Problem
from attnhub.registry import registry

#: For modules that several files here share.
sys.path.insert(0, str(pathlib.Path(__file__).parent))


class _BrokenPlan(Plan):
    """The reference, with scores scaled by 1.5, the mask lost, zeros for a result, or each query seeing what comes after it."""

    def __init__(self, plan: Plan, how: str) -> None:
        self._plan, self._how = plan, how

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        if self._how == "scale":
            call.softmax_scale *= 1.5
        if self._how == "mask":
            call.mask = Mask()
        if self._how == "causal":
            call.mask = _seeing_ahead(call.mask)
        out, lse = self._plan.forward(call)
        return (torch.zeros_like(out) if self._how == "zeros" else out), lse


def _seeing_ahead(mask: Mask) -> Mask:
    """The mask without causality; of a dense one, everything above the diagonal is seen."""
    if mask.bool_mask is not None and mask.bool_mask.shape[-2] > 1:
        rows, columns = mask.bool_mask.shape[-2:]
        mask = replace(mask, bool_mask=None) & BoolMask(mask.bool_mask | ~torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows))
    return replace(mask, causal=False, blocks=None)


class _Broken(Backend):
    automatic = False

    def __init__(self, how: str) -> None:
        self.name, self._how = f"broken_{how}", how
        self.capability = registry.get("reference").capability

    def prepare(self, problem: Problem) -> Plan:
        return _BrokenPlan(registry.get("reference").prepare(problem), self._how)


@pytest.fixture
def broken(register: Callable[[Backend], Backend]) -> Callable[[str], str]:
    """``broken("scale" | "mask" | "zeros" | "causal")`` registers such a backend until the test ends and returns its name."""
    return lambda how: register(_Broken(how)).name
