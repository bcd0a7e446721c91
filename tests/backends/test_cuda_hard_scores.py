"""The cuda backend's kernels on scores of unfriendly spread, by the rule of the conformance suite: twice the error of plain maths in bf16, and one
rounding unit. On a device (`make gpu-check` runs it); those for few queries and of the portable kernel on the host too.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable

import cuda_on_host
import cuda_samples as samples
import pytest
import torch
from cuda_decode_on_host import HostBackend
from torch import Tensor

import attnhub
from attnhub.backend import Call
from attnhub.backends.cuda import decode_plan, launcher, variant
from attnhub.dense import allowed_pairs
from attnhub.mask import FULL, Causal, Mask

SPREADS = ("std1", "std4", "std10", "std30", "sink20", "sink60", "rising", "falling", "extreme")


def hard(name: str, rows: int, keys: int, dim: int, device: str) -> list[Tensor]:
    """bf16 inputs whose scores are of realistic and unfriendly spread: std 1, 4, 10, 30; a sink key 20 or 60 nats above the others; scores that rise or fall
    along the keys; values near the ends of bf16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, dim, generator=generator) for n in (rows, keys, keys))
    if name.startswith("std"):
        q = q * float(name[3:])
    elif name.startswith("sink"):
        q, k[:, :, 0] = q + 1, dim**-0.5 * float(name[4:])
    elif name in ("rising", "falling"):
        ends = (0.1, 8) if name == "rising" else (8, 0.1)
        q, k = q.abs(), k.abs() * torch.linspace(*ends, keys)[:, None]
    elif name == "extreme":
        q[:, :, ::7], k[:, :, ::5], v[:, :, ::3] = q[:, :, ::7] * 1e18, k[:, :, ::5] * 1e17, v[:, :, ::3] * 1e30
    return [x.to(device, torch.bfloat16) for x in (q, k, v)]


def judge(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> float:
    """The error as a part of what is allowed: twice that of plain maths in bf16, and one rounding unit."""
    pairs = allowed_pairs(mask, 1, q.shape[2], k.shape[2], (0, q.shape[2]), q.device)
    scale = q.shape[3] ** -0.5
    exact = torch.softmax((q.double() @ k.double().mT * scale).masked_fill(~pairs, float("-inf")), -1) @ v.double()
    plain = torch.softmax((q @ k.mT * scale).masked_fill(~pairs, float("-inf")).float(), -1).bfloat16() @ v
    allowed = 2 * (plain.double() - exact).abs().nan_to_num(0.0).max() + 2.0**-8 * exact.abs().max()
    error = (out.double() - exact).abs().nan_to_num(float("inf")).max()
    return float(error / allowed)


@pytest.mark.parametrize("name", SPREADS)
def test_the_rule_passes_the_reference_and_fails_what_is_off(name: str) -> None:
    q, k, v = hard(name, 40, 100, 64, "cpu")
    out = attnhub.attention(q, k, v, Causal(), backend="reference")
    assert isinstance(out, Tensor) and judge(out, q, k, v, Causal()) <= 1
    off = out.clone()
    off[0, 1, 7] += 0.25 * out.abs().max()
    assert judge(off, q, k, v, Causal()) > 1
    off[0, 1, 7, 3] = float("nan")
    assert judge(off, q, k, v, Causal()) > 1


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("kernel", ["hopper", "decode", "portable"])
def test_hard_scores(kernel: str, name: str, dim: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0) and kernel == "hopper":
        pytest.skip("needs a Hopper GPU")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0, for bf16")
    for mask in (FULL, Causal()):
        for rows in (1, 16) if kernel == "decode" else (1024,):
            q, k, v = hard(name, rows, 1024, dim, "cuda")
            call = Call(q, k, v, mask, dim**-0.5)
            out, _ = samples.Sample(kernel, name, rows).plan(call).forward(call)
            found = judge(out, q, k, v, mask)
            assert found <= 1, f"{found:.2f} of the allowed error, {mask}, {rows} rows"


# ---------------------------------------------------------------------------------------------- on the host


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Call], Tensor]:
    """``on_host(kernel, call)``: out by the kernel's own source, run lane by lane (cuda_on_host.py)."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("hard")
    few = HostBackend(folder)
    chosen = variant.make(arch="sm_80", turing=False, dtype="bfloat16", head_dim=64, v_head_dim=64)
    library = cuda_on_host.build(folder / "portable", chosen)
    portable = launcher.CudaPlan(chosen, "")
    portable._kernel = lambda index: cuda_on_host.kernel(library.run)  # type: ignore[method-assign]

    def run(kernel: str, call: Call) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "raw_stream", lambda index: 0)
            patch.setattr(decode_plan, "slots", lambda index, shared_bytes: 12)
            plan = few.prepare(samples.problem(call)) if kernel == "decode" else None
            return (portable._launch(call, 0) if plan is None else plan.forward(call))[0]

    return run


@pytest.mark.parametrize(("kernel", "rows"), [("decode", 1), ("decode", 16), ("portable", 140)])
@pytest.mark.parametrize("name", SPREADS)
def test_hard_scores_on_the_host(name: str, kernel: str, rows: int, on_host: Callable[[str, Call], Tensor]) -> None:
    q, k, v = hard(name, rows, 300, 64, "cpu")
    out = on_host(kernel, Call(q, k, v, Causal(), 0.125))
    assert judge(out, q, k, v, Causal()) <= 1
