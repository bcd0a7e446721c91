"""Every test starts from the same policy and the same random state, and leaves no backend of its own behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from attnhub import runtime
from attnhub.backend import Backend
from attnhub.registry import registry


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATTNHUB_BACKEND", "ATTNHUB_DISABLE", "ATTNHUB_DETERMINISTIC", "ATTNHUB_LOG"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)


@pytest.fixture
def register() -> Iterator[Callable[[Backend], Backend]]:
    """``register(backend)`` adds a backend to this process until the test ends."""
    added: list[str] = []

    def add(backend: Backend) -> Backend:
        registry.register(backend)
        added.append(backend.name)
        return backend

    yield add
    for name in added:
        registry.unregister(name)
    runtime.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
