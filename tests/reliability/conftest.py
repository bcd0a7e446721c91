"""Every case of this folder runs on every backend that is usable on this machine and declares what the case needs.

A test takes the fixture ``on`` and says by ``@pytest.mark.needs(...)`` which features it uses.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub.mask import Mask
from attnhub.registry import registry


@dataclass(frozen=True)
class On:
    """A backend on a device, with the widest dtype that it serves there."""

    name: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"

    @property
    def slow(self) -> bool:
        """Interpreted or wrapped in another runtime: the same test with fewer repeats."""
        return self.device == "cpu" and self.name in ("triton", "onnx")

    @property
    def tolerance(self) -> float:
        return {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[self.dtype]

    def randn(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.randn(shape).to(dtype or self.dtype).to(self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def ints(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def attention(self, q: Tensor, k: Optional[Tensor] = None, v: Optional[Tensor] = None, mask: Optional[Mask] = None, **kwargs: Any) -> Any:
        out = attnhub.attention(q, k, v, mask, backend=self.name, **kwargs)
        decision = attnhub.last_decision()
        assert decision is None or decision.chosen == self.name or q.numel() == 0 or (k is not None and k.numel() == 0)
        return out

    def exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Mask] = None, **kwargs: Any) -> Any:
        """The same call by the definition in fp64."""
        if mask is not None and mask.bias is not None:
            mask = dataclasses.replace(mask, bias=mask.bias.detach().double())
        if kwargs.get("sinks") is not None:
            kwargs["sinks"] = kwargs["sinks"].detach().double()
        return attnhub.attention(q.detach().double(), k.detach().double(), v.detach().double(), mask, backend="reference", **kwargs)

    def close(self, got: Tensor, want: Tensor, factor: float = 1.0) -> None:
        torch.testing.assert_close(got.double(), want.double(), atol=factor * self.tolerance, rtol=factor * self.tolerance)


def _places() -> list[On]:
    found = []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name, candidate in registry.candidates().items():
        if candidate.backend is None or candidate.probe:
            continue
        for device in devices:
            if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
                continue
            dtypes = frozenset().union(*(r.dtypes for r in candidate.backend.capability.devices if r.type == device), frozenset())
            widest = next((d for d in ("float32", "float16", "bfloat16") if d in dtypes), None)
            if widest is not None:
                found.append(On(name, device, getattr(torch, widest)))
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*features, dtype=None, but=()): what a backend must declare to be given the test, and which ones are left out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "on" not in metafunc.fixturenames:
        return
    features: set[attnhub.Feature] = set()
    dtype, without = None, ()
    for mark in metafunc.definition.iter_markers("needs"):
        features |= {attnhub.Feature(name) for name in mark.args}
        dtype, without = mark.kwargs.get("dtype", dtype), mark.kwargs.get("but", without)
    places = []
    for place in _places():
        capability = registry.get(place.name).capability
        served = frozenset().union(*(r.dtypes for r in capability.devices if r.type == place.device))
        if features <= capability.features and (dtype is None or dtype in served) and place.name not in without:
            places.append(place if dtype is None else dataclasses.replace(place, dtype=getattr(torch, dtype)))
    metafunc.parametrize("on", places, ids=str)
