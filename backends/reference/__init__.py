"""The oracle: attention by its definition, in fp64 for fp64 inputs and in fp32 for all others. Every feature, both passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from attnhub.backend import Backend, Call, Gradients, Needs, Plan
from attnhub.capability import Capability, DeviceRange
from attnhub.problem import Feature, Problem

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
#: Every feature there is: this backend is their definition.
EVERYTHING = frozenset(Feature)


class ReferencePlan(Plan):
    """Sq x Sk scores in memory, one expression after the other."""

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        from attnhub.backends.reference import maths

        return maths.forward(call, None, maths.torch.promote_types(call.q.dtype, maths.torch.float32), exact_nan=True)

    def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
        from attnhub.backends.reference import maths

        dtype = maths.torch.promote_types(call.q.dtype, maths.torch.float32)
        return maths.backward(call, grad_out, grad_lse, out, lse, needs, None, dtype)


class ReferenceBackend(Backend):
    name = "reference"
    automatic = False
    capability = Capability(
        devices=tuple(DeviceRange(t, dtypes=FLOATS if t != "mps" else FLOATS - {"float64"}) for t in ("cpu", "cuda", "mps", "xpu")),
        features=EVERYTHING,
        backward_features=EVERYTHING,
        head_dims=(1, 1 << 20, 1),
    )

    def cost(self, problem: Problem) -> float:
        return 100.0

    def prepare(self, problem: Problem) -> Plan:
        return ReferencePlan()


backend = ReferenceBackend()
