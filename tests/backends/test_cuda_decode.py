"""The cuda backend's kernel for a few queries over a long cache. Without a GPU its source runs on the host, lane by lane (cuda_on_host.py), and passes
the shared conformance cases there; every variant compiles. With one: the cases again, splits, pages, graphs, streams.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import runtime, testing
from attnhub.backend import Backend, Call, Plan
from attnhub.backends.cuda import backend, compile, decode, decode_params, decode_plan, launcher, nvrtc
from attnhub.backends.cuda.decode import DecodeVariant
from attnhub.backends.cuda.decode_plan import DecodePlan
from attnhub.capability import Capability, DeviceRange
from attnhub.layouts import empty_out
from attnhub.mask import ALiBi, Causal, Mask, SeqLens, Window
from attnhub.problem import DeviceInfo, Feature, Problem
from attnhub.reasons import Code
from attnhub.registry import registry

_spec = importlib.util.spec_from_file_location("cuda_on_host", Path(__file__).with_name("cuda_on_host.py"))
assert _spec is not None and _spec.loader is not None
cuda_on_host: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_on_host)

needs_nvrtc = pytest.mark.skipif(nvrtc.find() is None, reason="NVRTC is not installed")
HOPPER = DeviceInfo("cuda", "nvidia", (9, 0), "H100")
_MAIN = """
extern "C" void run(const attnhub::Params* params, unsigned blocks, unsigned threads, unsigned shared_bytes) {
    gridDim.x = blocks;
    host::launch(blocks, threads, shared_bytes, blockIdx, threadIdx, [params] { attnhub_forward(*params); });
}
"""

# ---------------------------------------------------------------------------------------------- on the host


class HostPlan(Plan):
    """Runs the kernel's source by its own launch's numbers."""

    def __init__(self, variant: DecodeVariant, library: Any, launched: list[int]) -> None:
        self.variant, self.library, self.launched = variant, library, launched

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        launch = decode_plan.Launch(self.variant, call, 0)
        out = empty_out(call.q, launch.v_head_dim).fill_(float("nan"))
        lse = torch.full(launch.lse_shape, float("nan"))
        partial, tickets = torch.full((launch.partial or 1,), float("nan")), torch.zeros(launch.tiles, dtype=torch.int32)
        mask = call.mask
        pointers = (call.q, call.k, call.v, out, lse, mask.seqused_k, mask.leftpad, mask.prefix, call.block_table, call.sinks, mask.alibi, partial, tickets)
        kept = [None if x is None else x if i < 4 else x.contiguous() for i, x in enumerate(pointers)]
        argument = launch.argument(*(0 if x is None else x.data_ptr() for x in kept))
        self.library.run(np.frombuffer(argument.tobytes(), np.uint8).ctypes.data_as(cuda_on_host.ctypes.c_void_p), launch.grid[0], self.variant.threads, self.variant.shared_bytes)
        assert not tickets.any()
        self.launched.append(launch.grid[0] // launch.tiles)
        return out, lse if call.need_lse else None


class HostBackend(Backend):
    name = "decode_on_host"
    automatic = False
    capability = Capability(
        (DeviceRange("cpu", dtypes=frozenset({"float16", "bfloat16"})),), backend.capability.features - {Feature.VARLEN}, (1, 256, 1), align_bytes=16,
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plans: dict[DecodeVariant, Plan] = {}
        self.launched: list[int] = []

    def prepare(self, problem: Problem) -> Plan:
        variant = decode.choose(dataclasses.replace(problem, device=HOPPER))
        if variant not in self.plans:
            self.plans[variant] = HostPlan(variant, cuda_on_host.build(self.folder / str(len(self.plans)), variant, _MAIN), self.launched)
        return self.plans[variant]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostBackend]:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    found = HostBackend(tmp_path_factory.mktemp("host"))
    registry.register(found)
    yield found
    registry.unregister(found.name)


_D64 = {"dtype": "bfloat16", "head_dim": 64, "backward": False}
HOST_CASES = [
    testing.Case(**_D64, seqlen_q=1, seqlen_k=300, q_heads=8),
    testing.Case(**_D64, seqlen_q=1, seqlen_k=5, q_heads=6),
    testing.Case(**_D64, seqlen_q=7, seqlen_k=150, q_heads=6, parts=("causal", "seqlens")),
    testing.Case(**_D64, seqlen_q=16, seqlen_k=90, q_heads=2, kv_heads=1, parts=("causal", "window_left", "leftpad")),
    testing.Case(**_D64, seqlen_q=3, seqlen_k=200, parts=("window", "seqlens_zero"), sinks=True),
    testing.Case(**_D64, seqlen_q=2, seqlen_k=70, parts=("causal", "chunk"), layout="strided"),
    testing.Case(**_D64, seqlen_q=5, seqlen_k=40, parts=("top_left", "prefix"), layout="bshd"),
    testing.Case(**_D64, seqlen_q=2, seqlen_k=90, page_size=16, parts=("causal",), q_heads=4),
    testing.Case(**_D64, seqlen_q=1, seqlen_k=200, page_size=48, q_heads=8, sinks=True),
    testing.Case("float16", seqlen_q=3, seqlen_k=100, head_dim=40, v_head_dim=72, page_size=5, q_heads=4, softcap=5.0, parts=("causal", "alibi"), backward=False),
    testing.Case("float16", seqlen_q=1, seqlen_k=77, head_dim=40, v_head_dim=72, page_size=1, q_heads=4, softcap=5.0, parts=("alibi",), backward=False),
]  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", HOST_CASES, ids=str)
def test_the_source_passes_the_cases_on_the_host(case: testing.Case, splits: int, host: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_plan, "slots", lambda index, shared_bytes: 1)
    monkeypatch.setattr(decode, "split_count", lambda *_: splits)
    host.launched.clear()
    testing.Check(host.name, "forward", case, None, "cpu").run()
    assert set(host.launched) == {splits}
