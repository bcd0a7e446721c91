"""The oracle: attention by its definition, in fp64 for fp64 inputs and in fp32 for all others. Every feature, both passes (fp8: forward)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from attnhub.backend import Backend, Call, Gradients, Needs, Plan
from attnhub.capability import Capability, DeviceRange
from attnhub.problem import Feature, Problem
from attnhub.reasons import Code, Reason

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
#: Where torch runs, in the dtypes that it computes in. Tried on x86-64 and on one kind of GPU.
TORCH_DEVICES = (
    DeviceRange("cpu", "x86_64", dtypes=FLOATS),
    DeviceRange("cpu", dtypes=FLOATS, status="untested"),
    DeviceRange("cuda", "nvidia", (9, 0), (9, 0), FLOATS),
    DeviceRange("cuda", dtypes=FLOATS, status="untested"),
    DeviceRange("mps", dtypes=FLOATS - {"float64"}, status="untested"),
    DeviceRange("xpu", dtypes=FLOATS, status="untested"),
)
_FP8 = frozenset({"float8_e4m3fn"})
#: fp8, which torch casts from and does not compute in. Tried on x86-64.
_FP8_DEVICES = (
    DeviceRange("cpu", "x86_64", dtypes=_FP8), DeviceRange("cpu", dtypes=_FP8, status="untested"),
    DeviceRange("cuda", dtypes=_FP8, status="untested"), DeviceRange("xpu", dtypes=_FP8, status="untested"),
)  # fmt: skip
#: Every feature there is: this backend is their definition.
EVERYTHING = frozenset(Feature)


def probe_torch() -> tuple[Reason, ...]:
    """Whether torch itself is there and imports."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return (Reason(Code.NOT_INSTALLED, "the package torch is not installed", "pip install torch"),)
        return (Reason(Code.BROKEN, f"importing torch fails: {error!r}"),)
    except Exception as error:  # a broken installation can fail in any way
        return (Reason(Code.BROKEN, f"importing torch fails: {error!r}"),)
    return ()


class ReferencePlan(Plan):
    """Sq x Sk scores in memory, one expression after the other."""

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        from attnhub.backends.reference import maths
        from attnhub.layouts import lse_dtype

        return maths.forward(call, None, lse_dtype(call.q.dtype), exact_nan=True)

    def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
        from attnhub.backends.reference import maths
        from attnhub.layouts import lse_dtype

        return maths.backward(call, grad_out, grad_lse, out, lse, needs, None, lse_dtype(call.q.dtype))


class ReferenceBackend(Backend):
    name = "reference"
    automatic = False
    capability = Capability(
        devices=(*TORCH_DEVICES, *_FP8_DEVICES),
        features=EVERYTHING,
        backward_features=EVERYTHING,
        head_dims=(1, 1 << 20, 1),
    )

    def probe(self) -> tuple[Reason, ...]:
        return probe_torch()

    def cost(self, problem: Problem) -> float:
        return 100.0

    def prepare(self, problem: Problem) -> Plan:
        return ReferencePlan()


backend = ReferenceBackend()
