"""The toy backend. This module only declares: what it needs is imported by ``probe`` and ``prepare``."""

from __future__ import annotations

import functools
import importlib.resources
import json

from attnhub import Backend, Capability, DeviceRange, Feature, Plan, Problem, Reason

_FLOATS = frozenset({"float16", "bfloat16", "float32"})


@functools.lru_cache(maxsize=1)
def _costs() -> dict[str, float]:
    """Device type -> measured time relative to torch's own attention (1.0 is as fast, 0.5 is twice as fast)."""
    costs: dict[str, float] = json.loads((importlib.resources.files(__name__) / "tune.json").read_text())
    return costs


class ToyBackend(Backend):
    """Forward only: another backend runs the backward pass from this one's lse."""

    name = "toy"
    capability = Capability(
        devices=(DeviceRange("cpu", dtypes=_FLOATS), DeviceRange("cuda", dtypes=_FLOATS, status="untested")),
        # A feature that is not listed is rejected with a reason; list it once the kernel has it.
        features=frozenset({Feature.GQA, Feature.DV_DIFFERS, Feature.CAUSAL_BOTTOM_RIGHT, Feature.LSE}),
        head_dims=(1, 256, 1),
    )

    def probe(self) -> tuple[Reason, ...]:
        """Reasons why the backend cannot run on this machine: a package, a compiler or a driver that is missing."""
        return ()

    def cost(self, problem: Problem) -> float:
        return _costs().get(problem.device.type, 2.0)

    def prepare(self, problem: Problem) -> Plan:
        """Compile and configure for a class of problems. Raise `attnhub.PrepareError` if that fails: the next backend is tried."""
        from attnhub_toy.launcher import ToyPlan

        return ToyPlan()


backend = ToyBackend()
