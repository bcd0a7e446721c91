"""Calls for each kernel of the cuda backend, for what test_cuda_device.py does with them on a device.

``python cuda_samples.py KERNEL`` launches the kernel's small samples once, to be watched by compute-sanitizer; with ``--broken TOOL`` a kernel with a
fault that the tool must report. On the CPU the reference backend takes the kernels' place.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnhub import runtime
from attnhub.backend import Call, Plan
from attnhub.backends.cuda import variant
from attnhub.backends.reference import backend as reference
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Causal, Chunk, LeftPad, Mask, SeqLens, Window
from attnhub.problem import DeviceInfo, Problem

#: turing: the portable kernel's path for compute capability 7.5, which every device can run.
KERNELS = ("hopper", "decode", "portable", "turing")
HOPPER = DeviceInfo("cuda", "nvidia", (9, 0), "H100")


@dataclass(frozen=True)
class Sample:
    """What a call looks like. padded: lengths of the keys and left padding, per sequence; packed: lengths of sequences one behind the other."""

    kernel: str
    name: str
    seqlen_q: int
    seqlen_k: int = 0
    head_dim: int = 64
    v_head_dim: int = 0
    heads: tuple[int, int] = (4, 2)
    batch: int = 2
    dtype: torch.dtype = torch.bfloat16
    mask: Mask = FULL
    padded: bool = False
    packed: tuple[int, ...] = ()
    page_size: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False

    def __str__(self) -> str:
        return f"{self.kernel}-{self.name}"

    def call(self, device: torch.device | str, seed: int = 0) -> Call:
        """The same shapes for each seed, other values: those of lengths and of the block table too."""
        generator = torch.Generator().manual_seed(seed)
        length, v_head_dim = self.seqlen_k or self.seqlen_q, self.v_head_dim or self.head_dim

        def random(heads: int, tokens: int, dim: int, batch: int = self.batch) -> Tensor:
            return torch.randn(batch, heads, tokens, dim, generator=generator).to(device, self.dtype)

        def ints(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (self.batch,), generator=generator, dtype=torch.int32).to(device)

        mask, varlen, table = self.mask, None, None
        if self.packed:
            order = torch.randperm(len(self.packed), generator=generator)
            lengths = torch.tensor(self.packed)[order]
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device, torch.int32)
            varlen = Varlen(starts, starts.clone(), max(self.packed), max(self.packed))
            # Tokens behind the last sequence belong to none.
            q, k, v = (
                random(h, sum(self.packed) + 7, d, 1)
                for h, d in zip((self.heads[0], *self.heads[1:] * 2), (self.head_dim, self.head_dim, v_head_dim))
            )
        elif self.page_size:
            each = -(-length // self.page_size)
            table = torch.randperm(self.batch * each, generator=generator).to(device, torch.int32).view(self.batch, each)
            q = random(self.heads[0], self.seqlen_q, self.head_dim)
            k, v = (random(self.heads[1], self.page_size, d, self.batch * each) for d in (self.head_dim, v_head_dim))
            mask = mask & SeqLens(ints(self.seqlen_q, length))
        else:
            q = random(self.heads[0], self.seqlen_q, self.head_dim)
            k, v = (random(self.heads[1], length, d) for d in (self.head_dim, v_head_dim))
            if self.padded:
                mask = mask & SeqLens(ints(length // 2, length)) & LeftPad(ints(0, length // 3))
        if self.alibi:
            mask = mask & ALiBi(torch.rand(self.heads[0], generator=generator).to(device))
        sinks = torch.randn(self.heads[0], generator=generator).to(device) if self.sinks else None
        return Call(q, k, v, mask, self.head_dim**-0.5, self.softcap, sinks, varlen=varlen, block_table=table, need_lse=True)

    def plan(self, call: Call) -> Plan:
        """The kernel's plan, loaded; of the reference backend where the call is on the CPU."""
        found = problem(call)
        if call.q.device.type == "cpu":
            return reference.prepare(found)
        from attnhub.backends.cuda import backend, launcher
        from attnhub.backends.cuda.decode_plan import DecodePlan
        from attnhub.backends.cuda.hopper_plan import HopperPlan

        kinds: dict[str, Any] = {"hopper": HopperPlan, "decode": DecodePlan}
        with torch.cuda.device(call.q.device):
            if self.kernel in kinds:
                plan = backend.prepare(found)
                assert isinstance(plan, kinds[self.kernel]), plan
                return plan
            chosen = self.variant(found)
            portable = launcher.CudaPlan(chosen, launcher._cubin(chosen))
            portable.load(call.q.get_device())
            return portable

    def variant(self, found: Problem) -> variant.Variant:
        """Of the portable kernel."""
        chosen = variant.choose(found)
        if self.kernel != "turing":
            return chosen
        return variant.make(
            arch=chosen.arch, turing=True, dtype=chosen.dtype, head_dim=chosen.head_dim, v_head_dim=chosen.v_head_dim, seqlen_q=found.seqlen_q,
            softcap=chosen.softcap, alibi=chosen.alibi,
        )  # fmt: skip


def problem(call: Call) -> Problem:
    """That of the call; of one on the CPU as if it were on compute capability 9.0."""
    found = runtime.explain(call, "auto", False, 0).problem
    return dataclasses.replace(found, device=HOPPER) if call.q.device.type == "cpu" else found


def tensors(call: Call) -> list[Tensor]:
    """All that a kernel reads."""
    mask, varlen = call.mask, call.varlen
    found = [call.q, call.k, call.v, mask.seqused_k, mask.leftpad, mask.alibi, call.sinks, call.block_table]
    found += [varlen.cu_seqlens_q, varlen.cu_seqlens_k] if varlen is not None else []
    return [x for x in found if x is not None]


def fill(call: Call, other: Call) -> None:
    """Writes another call's values into a call's tensors."""
    for mine, its in zip(tensors(call), tensors(other), strict=True):
        mine.copy_(its)


_LONG, _MIXED = Causal() & Window(200), (700, 0, 130, 1, 333, 64)
_HALF = torch.float16

#: For repeats, graphs, streams and threads: long enough that blocks of a launch meet.
SAMPLES = (
    Sample("hopper", "full-64", 1000),
    Sample("hopper", "causal-64-long", 4100, heads=(4, 1), batch=1, mask=Causal()),
    Sample("hopper", "full-128-fp16", 1000, 1300, head_dim=128, dtype=_HALF),
    Sample("hopper", "causal-128-gqa", 1500, head_dim=128, heads=(16, 2), mask=Causal()),
    Sample("hopper", "window-256", 1200, head_dim=256, mask=_LONG),
    Sample("hopper", "chunk-96-softcap", 900, head_dim=96, mask=Causal() & Chunk(150), softcap=20.0),
    Sample("hopper", "causal-192-128-sinks", 1100, head_dim=192, v_head_dim=128, mask=Causal(), sinks=True),
    Sample("hopper", "packed-128", 0, head_dim=128, heads=(8, 2), mask=Causal(), packed=_MIXED),
    Sample("hopper", "padded-64-alibi", 800, mask=Causal(), padded=True, alibi=True),
    Sample("decode", "split-128", 1, 8192, head_dim=128, heads=(32, 8), batch=1),
    Sample("decode", "unsplit-64", 1, 300, heads=(32, 32), batch=64),
    Sample("decode", "causal-256", 16, 3000, head_dim=256, mask=Causal(), padded=True),
    Sample("decode", "192-128-fp16", 2, 2500, head_dim=192, v_head_dim=128, heads=(16, 4), mask=Causal(), dtype=_HALF),
    Sample("decode", "paged-16-128", 1, 4096, head_dim=128, heads=(32, 8), page_size=16),
    Sample("decode", "paged-5-64-softcap", 3, 2000, heads=(8, 2), page_size=5, mask=Causal(), softcap=20.0, sinks=True),
    Sample("decode", "paged-64-256", 1, 4096, head_dim=256, page_size=64),
    Sample("portable", "full-64", 1000),
    Sample("portable", "causal-128-gqa", 1500, head_dim=128, heads=(16, 2), mask=Causal()),
    Sample("portable", "window-256", 1200, head_dim=256, mask=_LONG, dtype=_HALF),
    Sample("portable", "causal-192-128-sinks", 1100, head_dim=192, v_head_dim=128, mask=Causal(), sinks=True),
    Sample("portable", "packed-128", 0, head_dim=128, heads=(8, 2), mask=Causal(), packed=_MIXED),
    Sample("portable", "padded-64-alibi", 800, mask=Causal(), padded=True, alibi=True, softcap=20.0),
    Sample("turing", "causal-128", 1000, head_dim=128, mask=Causal(), dtype=_HALF),
    Sample("turing", "packed-64", 0, heads=(8, 2), packed=_MIXED, dtype=_HALF),
)

#: For compute-sanitizer, under which a kernel takes up to some hundred times as long: lengths that are no multiples of tiles, each way of loading.
SMALL = (
    Sample("hopper", "causal-64", 334, mask=Causal()),
    Sample("hopper", "full-128", 200, 141, head_dim=128, batch=1),
    Sample("hopper", "window-256", 150, head_dim=256, heads=(2, 1), batch=1, mask=Causal() & Window(40)),
    Sample("hopper", "padded-104-40", 130, 201, head_dim=104, v_head_dim=40, padded=True, mask=Causal(), alibi=True),
    Sample("hopper", "packed-128", 0, head_dim=128, packed=(70, 0, 130, 1), mask=Causal(), sinks=True),
    Sample("decode", "split-128", 1, 1500, head_dim=128, heads=(8, 2), batch=1),
    Sample("decode", "padded-72-40", 7, 150, head_dim=72, v_head_dim=40, heads=(6, 2), mask=Causal(), padded=True, alibi=True),
    Sample("decode", "paged-16-64", 1, 300, page_size=16),
    Sample("decode", "paged-5-256", 3, 133, head_dim=256, page_size=5, mask=Causal(), sinks=True),
    Sample("portable", "causal-64", 200, mask=Causal(), batch=1),
    Sample("portable", "full-128", 150, 141, head_dim=128, batch=1),
    Sample("portable", "window-200-40", 100, 140, head_dim=200, v_head_dim=40, heads=(2, 1), batch=1, mask=Causal() & Window(40)),
    Sample("portable", "causal-256", 150, 260, head_dim=256, heads=(2, 1), batch=1, mask=Causal()),
    Sample("portable", "packed-72", 0, head_dim=72, packed=(70, 0, 130, 1), mask=Causal(), sinks=True),
    Sample("portable", "padded-64", 90, 130, padded=True, alibi=True, softcap=5.0),
    Sample("turing", "causal-64", 200, mask=Causal(), batch=1, dtype=_HALF),
    Sample("turing", "packed-72", 0, head_dim=72, packed=(70, 0, 130, 1), dtype=_HALF),
)

#: One fault each, named as the kernels are: tool -> source.
BROKEN = {
    "memcheck": 'extern "C" __global__ void attnhub_forward(float* x, int size) { x[size + threadIdx.x] = 1.f; }',
    "racecheck": """extern "C" __global__ void attnhub_forward(float* x, int size) {
        __shared__ volatile int shared[8];  // written and read by both warps
        shared[threadIdx.x % 8] = threadIdx.x;
        x[threadIdx.x % size] = static_cast<float>(shared[(threadIdx.x + 1) % 8]);
    }""",
    "synccheck": """extern "C" __global__ void attnhub_forward(float* x, int size) {
        __syncwarp(0xffffu);  // by all 32 lanes
        x[threadIdx.x % size] = 1.f;
    }""",
}


def run_small(kernel: str, device: str) -> None:
    for sample in SMALL:
        if sample.kernel == kernel:
            call = sample.call(device)
            out, lse = sample.plan(call).forward(call)
            assert lse is not None and bool(out.isfinite().all()), sample
            print("ran", sample, flush=True)


def run_broken(tool: str) -> None:
    import tempfile

    import cupy
    import numpy as np

    from attnhub.backends.cuda import compile, nvrtc

    library = nvrtc.find()
    assert library is not None
    major, minor = torch.cuda.get_device_capability()
    x = torch.zeros(32, device="cuda")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(library.compile(BROKEN[tool], "broken.cu", {}, (f"-arch=sm_{major}{minor}",)).cubin)
        file.flush()
        kernel = cupy.RawModule(path=file.name).get_function(compile.ENTRY)
        kernel((1,), (64,), (np.uint64(x.data_ptr()), np.int32(32)))
    with contextlib.suppress(RuntimeError):  # the tool has ended the context
        torch.cuda.synchronize()
    print("launched", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", nargs="?", choices=KERNELS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--broken", choices=tuple(BROKEN))
    args = parser.parse_args()
    if args.broken:
        run_broken(args.broken)
    else:
        run_small(args.kernel, args.device)
        if args.device != "cpu":
            torch.cuda.synchronize()
    print("done", flush=True)
