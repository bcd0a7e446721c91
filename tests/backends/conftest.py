"""Fixtures that the backends' tests share."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from attnhub import runtime

if TYPE_CHECKING:
    from cuda_launch import Driver
    from triton_gpu import Gpu

#: For modules that several files here share.
sys.path.insert(0, str(pathlib.Path(__file__).parent))


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A stand-in for a GPU with Triton."""
    from triton_gpu import installed

    yield from installed(monkeypatch)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A stand-in for what CUDA's driver does about tensor maps."""
    from cuda_launch import Driver

    from attnhub.backends.cuda import tensor_map

    fake = Driver()
    monkeypatch.setattr(tensor_map, "_driver", lambda: fake)
    return fake


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every `Recording` of the triton backend that is replayed, in order."""
    from attnhub.backends.triton import launch

    found: list[launch.Recording] = []
    original = launch.Recording.replay

    def replay(self: launch.Recording, like: torch.Tensor, pointers: list[int]) -> dict[str, torch.Tensor]:
        found.append(self)
        return original(self, like, pointers)

    monkeypatch.setattr(launch.Recording, "replay", replay)
    return found
