"""The cuda backend's portable kernel (mma.sync) on a device for which the backend has another one: what GPUs before Hopper would run."""

from __future__ import annotations

from typing import Any, Union

import torch

from attnhub import config
from attnhub.backend import Call, Plan
from attnhub.bench.cases import Case
from attnhub.bench.parts import parts
from attnhub.bench.peers import Absent, Attend, Inputs, Peer, first_line
from attnhub.bench.presets import PORTABLE
from attnhub.registry import registry


def peer(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    """The peer, compiled for the tensors' device, or why it is absent."""
    device = tensors[0].device
    if case.mode != "forward" or case.page_size or case.fp8 or case.dtype not in ("float16", "bfloat16"):
        return Absent(PORTABLE, "it takes forward passes in fp16 and bf16 without pages")
    if {"prefix", "density", "bias"} & {text.split()[0] for text in case.features()}:
        return Absent(PORTABLE, f"it is timed without {case.features()[0].split()[0]}")
    if device.type != "cuda":
        return Absent(PORTABLE, "it runs on GPUs")
    candidate = registry.candidates().get("cuda")
    if candidate is None or candidate.probe:
        return Absent(PORTABLE, ", ".join(reason.code.value for reason in candidate.probe) if candidate else "there is no cuda backend")
    try:
        found = plan(case, device)
    except Exception as error:
        # NVRTC, the driver and CuPy: each has its own exception.
        return Absent(PORTABLE, first_line(error))
    return Peer(PORTABLE, caller(case, found, device), facts={"kernel": found.describe()}, differentiable=False)


def plan(case: Case, device: torch.device) -> Plan:
    """The kernel for a case. Raises what NVRTC, the driver or CuPy raise."""
    from attnhub.backends.cuda import compile, launcher, nvrtc, variant

    major, minor = torch.cuda.get_device_capability(device)
    chosen = variant.make(
        arch=f"sm_{major}{minor}", turing=(major, minor) < (8, 0), dtype=case.dtype, head_dim=case.head_dim, v_head_dim=case.head_dim,
        seqlen_q=case.seqlen_q, softcap=case.softcap > 0, alibi=case.alibi,
    )  # fmt: skip
    library = nvrtc.find(launcher.toolkit_major())
    if library is None:
        raise RuntimeError("NVRTC is not found")
    return launcher.CudaPlan(chosen, str(compile.cubin(chosen, library, config.cache_dir() / "cuda")))


def caller(case: Case, found: Plan, device: torch.device) -> Attend:
    """The case by a plan, past the choice of a backend."""
    known = parts(case, device)
    more: dict[str, Any] = {"softcap": case.softcap, "sinks": known.sinks, "varlen": known.varlen}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return found.forward(Call(q, k, v, known.mask, case.head_dim**-0.5, **more))[0]

    return attend
