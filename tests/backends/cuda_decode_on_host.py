"""A backend of the cuda backend's kernel for a few queries, whose source runs on the host (cuda_on_host.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Optional

import cuda_on_host
import torch
from torch import Tensor

from attnhub.backend import Backend, Call, Plan
from attnhub.backends.cuda import backend, decode, decode_plan
from attnhub.backends.cuda.decode import DecodeVariant
from attnhub.capability import Capability, DeviceRange
from attnhub.layouts import empty_out
from attnhub.problem import DeviceInfo, Problem

HOPPER = DeviceInfo("cuda", "nvidia", (9, 0), "H100")


class HostPlan(Plan):
    """Runs the kernel's source by its own launch's numbers."""

    def __init__(self, variant: DecodeVariant, library: Any, launched: list[int]) -> None:
        self.variant, self.library, self.launched = variant, library, launched

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        launch = decode_plan.Launch(self.variant, call, 0, cuda_on_host.kernel(self.library.run))
        out = empty_out(call.q, call.v.shape[3]).fill_(float("nan"))
        lse = torch.full(call.q.shape[:3], float("nan"))
        assert launch.out == (out.shape, out.stride(), out.dtype) and launch.lse == (lse.shape, lse.stride(), lse.dtype)
        partial, tickets = torch.full((launch.partial or 1,), float("nan")), torch.zeros(max(1, launch.rows), dtype=torch.int32)
        mask = call.mask
        starts = None if call.varlen is None else call.varlen.cu_seqlens_q
        pointers = (call.q, call.k, call.v, out, lse, starts, mask.seqused_k, mask.leftpad, mask.prefix, call.block_table, call.sinks, mask.alibi, partial, tickets, None, None, None, None)
        kept = [None if x is None else x if i < 4 else x.contiguous() for i, x in enumerate(pointers)]
        launch.start(0, *(0 if x is None else x.data_ptr() for x in kept))
        assert not tickets.any()
        self.launched.append(launch.grid[0] // launch.tiles)
        return out, lse if call.need_lse else None


class HostBackend(Backend):
    name = "decode_on_host"
    automatic = False
    capability = Capability(
        (DeviceRange("cpu", dtypes=frozenset({"float16", "bfloat16"})),), backend.capability.features, (1, 256, 1), align_bytes=16,
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plans: dict[DecodeVariant, Plan] = {}
        self.launched: list[int] = []

    def prepare(self, problem: Problem) -> Plan:
        variant = decode.choose(dataclasses.replace(problem, device=HOPPER))
        if variant not in self.plans:
            self.plans[variant] = HostPlan(variant, cuda_on_host.build(self.folder / str(len(self.plans)), variant), self.launched)
        return self.plans[variant]
