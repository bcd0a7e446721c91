"""The cpu backend: tiled flash attention in C++ for any x86-64 or other 64-bit CPU, SIMD chosen at run time.

This module only declares. The shared library is loaded by ``probe``, torch's side by ``prepare``.
"""

from __future__ import annotations

from attnhub.backend import Backend, Plan, PrepareError
from attnhub.capability import Capability, DeviceRange
from attnhub.problem import Feature, Problem
from attnhub.reasons import Code, Reason

_FLOATS = frozenset({"float32", "bfloat16", "float16"})
_GRADIENTS = frozenset({Feature.BIAS_GRAD, Feature.SINKS_GRAD, Feature.LSE_GRAD})


class CpuBackend(Backend):
    """fp32, bf16 and fp16 with fp32 accumulation; every mask; head_dim 1 to 512. Forward and backward; paged K/V forward only."""

    name = "cpu"
    capability = Capability(
        devices=(DeviceRange("cpu", "x86_64", dtypes=_FLOATS), DeviceRange("cpu", dtypes=_FLOATS, status="untested")),
        features=frozenset(Feature) - _GRADIENTS,
        backward_features=frozenset(Feature) - {Feature.PAGED},
        head_dims=(1, 512, 1),
    )

    def probe(self) -> tuple[Reason, ...]:
        from attnhub.backends.cpu import library

        try:
            library.load()
        except (OSError, ImportError) as error:
            return (Reason(Code.NOT_BUILT, str(error), library.BUILD_HINT),)
        return ()

    def cost(self, problem: Problem) -> float:
        from attnhub.backends.cpu.cost import cost

        return cost(problem)

    def prepare(self, problem: Problem) -> Plan:
        from attnhub.backends.cpu import library

        try:
            library.load()
        except (OSError, ImportError) as error:
            raise PrepareError(Reason(Code.NOT_BUILT, str(error), library.BUILD_HINT)) from error
        from attnhub.backends.cpu.launcher import CpuPlan

        return CpuPlan(problem)

    def versions(self) -> dict[str, str]:
        from attnhub.backends.cpu import library

        try:
            lib = library.load()
        except (OSError, ImportError):
            return {}
        best = library.isa_name(lib.attnhub_cpu_best_isa())
        return {"libattnhub_cpu": f"ABI {lib.attnhub_cpu_abi_version()}", "isa": f"{best} (of {', '.join(library.available_isas())})"}


backend = CpuBackend()
