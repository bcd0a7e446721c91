"""attnhub.scaled_dot_product_attention on torch's own samples for F.scaled_dot_product_attention: results, metadata, gradients.

Seen to fail: is_causal aligned at the bottom right, a scale 1.001 times too large, a bias without its gradient, dk 1.01 times too large.
"""

from __future__ import annotations

import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnhub

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def samples() -> Callable[[torch.dtype, bool], list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        if "expecttest" not in sys.modules:
            # torch's test helpers want it for a base class that the samples have no use for.
            stand_in = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "expecttest", stand_in)
        found = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (op,) = (o for o in found.op_db if o.name == "nn.functional.scaled_dot_product_attention")

    def make(dtype: torch.dtype, grad: bool) -> list[Any]:
        torch.manual_seed(0)
        return [s for s in op.sample_inputs("cpu", dtype, requires_grad=grad) if not s.kwargs.get("dropout_p")]

    return make


def _tensors(sample: Any) -> list[Tensor]:
    return [t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]


def _call(function: Callable[..., Tensor], sample: Any) -> Tensor:
    return function(sample.input, *sample.args, **sample.kwargs)


def _double(sample: Any) -> Any:
    return sample.transform(lambda t: t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t)


def _near(got: Tensor, torchs: Tensor, truth: Tensor, units: int = 1) -> None:
    """Four times torch's own error and some rounding units: the samples' scores go up to hundreds. In fp64 torch's result is the truth, to 1e-11."""
    assert got.shape == torchs.shape and got.dtype == torchs.dtype
    if truth.numel():
        unit = 1e-11 if got.dtype == torch.float64 else units * torch.finfo(got.dtype).eps
        allowed = 4 * (torchs.double() - truth).abs().max() + unit * truth.abs().max().clamp_min(1)
        assert (got.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_samples(samples: Any, dtype: torch.dtype, grad: bool) -> None:
    found = samples(dtype, grad)
    assert len(found) > 10
    for sample in found:
        got, want = _call(attnhub.scaled_dot_product_attention, sample), _call(F.scaled_dot_product_attention, sample)
        exact = _double(sample)
        truth = _call(F.scaled_dot_product_attention, exact)
        assert got.stride() == want.stride() and got.requires_grad == want.requires_grad
        _near(got.detach(), want.detach(), truth.detach())
        if not grad or dtype.itemsize == 2:
            # What gradients in 16 bits may be off, out being rounded before the backward, is the conformance suite's to say.
            continue
        seed = torch.randn_like(want)
        ours, theirs = (torch.autograd.grad(o, [t for t in _tensors(sample) if t.requires_grad], seed, allow_unused=True) for o in (got, want))
        right = torch.autograd.grad(truth, [t for t in _tensors(exact) if t.requires_grad], seed.double(), allow_unused=True)
        for mine, other, true in zip(ours, theirs, right, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                _near(mine, other, true, 64)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(samples: Any, backend: str) -> None:
    """Numbers against derivatives in fp64, batched gradients too. `reference` stands for all that torch's autograd does not see into."""
    for sample in samples(torch.float64, True):
        leaves = [t for t in _tensors(sample) if t.requires_grad]

        def f(*values: Tensor, sample: Any = sample, leaves: list[Tensor] = leaves) -> Tensor:
            swapped = dict(zip(map(id, leaves), values))
            return _call(attnhub.scaled_dot_product_attention, sample.transform(lambda value: swapped.get(id(value), value)))

        with attnhub.use(backend):
            assert torch.autograd.gradcheck(f, leaves, fast_mode=True, check_batched_grad=True)
