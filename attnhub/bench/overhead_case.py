"""What the suite ``overhead`` times, and what the design allows. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

SUITE = "overhead"
#: A device computes this faster than any host asks for it.
_TINY = (1, 2, 16, 16)
#: The same for kernels that are not made for a few queries.
_PREFILL = (1, 2, 128, 64)


@dataclass(frozen=True)
class OverheadCase:
    """A tiny self-attention call on q, k and v of ``shape`` [B, H, S, D]."""

    mode: str
    shape: tuple[int, int, int, int] = _TINY
    grad: bool = False
    backward: bool = False


NO_GRAD, NO_GRAD_PREFILL, GRAD = "no grad", "no grad, 128 tokens", "grad"
_ALWAYS = (OverheadCase(NO_GRAD), OverheadCase(GRAD, grad=True), OverheadCase("grad and backward", grad=True, backward=True))


def cases(device: str) -> tuple[OverheadCase, ...]:
    """What is timed on a type of device. GPU backends have one kernel for a few queries and another for many."""
    return _ALWAYS if device == "cpu" else (*_ALWAYS, OverheadCase(NO_GRAD_PREFILL, _PREFILL))


def budget(case: OverheadCase, device: str) -> Optional[float]:
    """The largest ratio to F.scaled_dot_product_attention that the design allows (docs/design.md); None: it says nothing."""
    return None if case.backward else 2.0 if device == "cpu" else 1.0
