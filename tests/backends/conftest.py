"""Fixtures that the backends' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attnhub import runtime


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and threads that spin on a busy machine lose seconds. Tests of threads set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces one path of the cpu backend; plans that were prepared for another one are dropped before and after."""
    monkeypatch.setenv("ATTNHUB_CPU_ISA", request.param)
    runtime.clear()
    yield request.param
    runtime.clear()
