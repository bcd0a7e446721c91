"""torch's own attention: F.scaled_dot_product_attention where it can express the problem, tiled torch maths where it cannot.

The always-there fallback: every feature, every device that torch has, forward and backward. It also runs the backward pass
of backends that have none.
"""

from __future__ import annotations

from attnhub.backend import Backend, Plan
from attnhub.backends.reference import EVERYTHING, TORCH_DEVICES, probe_torch
from attnhub.capability import Capability
from attnhub.problem import Problem
from attnhub.reasons import Reason


class SdpaBackend(Backend):
    name = "sdpa"
    capability = Capability(
        devices=TORCH_DEVICES,
        features=EVERYTHING,
        backward_features=EVERYTHING,
        head_dims=(1, 1 << 20, 1),
    )

    def probe(self) -> tuple[Reason, ...]:
        return probe_torch()

    def cost(self, problem: Problem) -> float:
        """1 by definition where torch's kernel serves the call; the tiled maths read and write scores through memory. On a GPU a mask that has to be
        written out first costs launches, memory and the faster kernels.
        """
        from attnhub.backends.sdpa import launcher

        if not launcher.expressible(problem):
            return 4.0
        return 2.0 if problem.device.type == "cuda" and problem.features & launcher.WRITTEN_OUT else 1.0

    def prepare(self, problem: Problem) -> Plan:
        from attnhub.backends.sdpa import launcher

        return launcher.plan(problem)

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": torch.__version__}


backend = SdpaBackend()
