"""Large scores under the triton backend's forward, interpreted with what a GPU's compiler makes of a product and a sum: one instruction, which rounds
once (test_triton_compiles.py sees it in the machine code). The limits are those of the backend's README."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton.runtime.interpreter import InterpreterBuilder
from triton_interpreter import interpreted
from triton_reference import agree, plan_for, tensors, variant

from attnhub.backend import Call
from attnhub.backends.reference import maths
from attnhub.mask import FULL, ALiBi, Causal, Mask

#: Largest score that is served, as a power of 2: weights of fp16 inputs are fp16 where they meet v.
LIMITS = {torch.float16: 27, torch.bfloat16: 30, torch.float32: 30}
SLOPES = ALiBi(torch.tensor([0.5, 0.25]))
#: Queries, keys: tiles of several; a decode step, whose keys are divided too.
SHAPES = [(40, 200), (1, 3000)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """a * b + c, a * b - c and c - a * b rounded once: products of fp32 are exact in fp64."""
    multiply = InterpreterBuilder.create_fmul

    def create_fmul(self: Any, a: Any, b: Any) -> Any:
        found = multiply(self, a, b)
        found.product = a.data.astype(np.float64) * b.data.astype(np.float64)
        return found

    def fusing(original: Any, sign: int) -> Any:
        def create(self: Any, a: Any, b: Any) -> Any:
            found = original(self, a, b)
            if found.data.dtype == np.float32:
                left = getattr(a, "product", None)
                right = getattr(b, "product", None) if left is None else None  # one of two products is rounded
                found.data = ((a.data if left is None else left) + sign * (b.data if right is None else right)).astype(np.float32)
            return found

        return create

    monkeypatch.setattr(InterpreterBuilder, "create_fmul", create_fmul)
    monkeypatch.setattr(InterpreterBuilder, "create_fadd", fusing(InterpreterBuilder.create_fadd, 1))
    monkeypatch.setattr(InterpreterBuilder, "create_fsub", fusing(InterpreterBuilder.create_fsub, -1))


def call_of(shape: tuple[int, int], dtype: torch.dtype, mask: Mask, power: float) -> Call:
    """Whose largest score is 2^power, by its scale: q, k and their products are ordinary numbers."""
    q, k, v = tensors(1, (2, 2), shape, (32, 32), dtype)
    largest = float((q.double() @ k.double().mT).abs().max())
    return Call(q, k, v, mask, 2.0**power / largest, need_lse=True)


def check(call: Call) -> None:
    """Against the reference in fp64. The largest weight is what rounding makes of 1, and rounded like out: a unit each (the interpreter cuts bf16 off)."""
    out, lse = plan_for(call).forward(call)
    want, want_lse = maths.forward(variant(call, torch.float64), None, torch.float64, True)
    _, plain_lse = maths.forward(variant(call, call.q.dtype), None, torch.float32, True)
    assert lse is not None and want_lse is not None and plain_lse is not None
    error = float((out.double() - want).abs().nan_to_num(float("inf")).max())
    assert error <= 2 * torch.finfo(out.dtype).eps * float(want.abs().max()), f"out: error {error:.2e}"
    agree("lse", lse, want_lse, plain_lse, torch.float32)


@interpreted
@pytest.mark.parametrize("below", [0, 6])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("shape", "mask"), [(SHAPES[0], FULL), (SHAPES[0], Causal()), (SHAPES[1], FULL)], ids=["full", "causal", "decode"])
def test_scores_up_to_the_limit(shape: tuple[int, int], dtype: torch.dtype, below: int, mask: Mask, fused: None) -> None:
    check(call_of(shape, dtype, mask, LIMITS[dtype] - below))


@interpreted
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beyond_it_rows_are_lost(shape: tuple[int, int], dtype: torch.dtype, fused: None) -> None:
    """A limit that the README states: who lifts it changes both."""
    with pytest.raises(AssertionError, match="out: "):
        check(call_of(shape, dtype, FULL, LIMITS[dtype] + 3))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_score_that_is_scaled_first_may_have_any_size(shape: tuple[int, int], dtype: torch.dtype, fused: None) -> None:
    check(call_of(shape, dtype, SLOPES, 100))


@interpreted
def test_products_that_are_rounded_have_no_limit() -> None:
    """It is the one rounding of two that makes it."""
    check(call_of(SHAPES[0], torch.bfloat16, FULL, 60))
