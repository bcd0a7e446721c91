"""The triton backend on a GPU: what only a GPU shows. Offsets past 2^31 elements, the same bits 250 times, and no stray access under
compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

import attnhub
from attnhub import config, runtime
from attnhub.backend import Call, Needs
from attnhub.backends.triton import hopper, launcher
from attnhub.backends.triton.launcher import TritonPlan
from attnhub.mask import Causal, SeqLens, Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(config.triton_interpret() or not torch.cuda.is_available(), reason="needs a GPU"),
]
HEADS, DIM, WINDOW = 16, 128, 128
#: More than 2^31 elements in HEADS heads.
LENGTH = 2**31 // (HEADS * DIM) + 5000
MASK = Causal() & Window(WINDOW - 1)


@pytest.fixture(params=["hopper", "general"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which kernels serve: those for Hopper, where there is one, or the general ones."""
    name = str(request.param)
    if name == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    if name == "general":
        monkeypatch.setattr(hopper, "serves_problem", lambda problem: False)
    runtime.clear()
    yield name
    runtime.clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    found: list[str] = []
    launch = launcher.launching.launch

    def named(kernel: Any, *args: Any, **arguments: Any) -> Any:
        found.append(kernel.fn.__name__)
        return launch(kernel, *args, **arguments)

    monkeypatch.setattr(launcher.launching, "launch", named)
    return found


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} GB are free")


def randn(*shape: int, layout: str = "bhsd") -> Tensor:
    """bf16, heads first; with layout bshd they lie token by token."""
    if layout == "bshd":
        shape = (shape[0], shape[2], shape[1], shape[3])
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    return x.transpose(1, 2) if layout == "bshd" else x


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_offsets_past_2_to_the_31(layout: str, kernels: str, launched: list[str]) -> None:
    """The last rows of the first and of the last head, forward and backward, against the same rows alone."""
    needs_memory(45)
    q, k, v, grad = (randn(1, HEADS, LENGTH, DIM, layout=layout) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attnhub.attention(q, k, v, MASK, backend="triton")
    assert isinstance(out, Tensor) and q.numel() > 2**31
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    assert any(name.startswith("hopper") for name in launched) == (kernels == "hopper")
    rows, keys = 300, 300 + WINDOW
    for head in (0, HEADS - 1):
        one = slice(head, head + 1)
        alone = [x.detach()[:, one, -n:].clone().requires_grad_() for x, n in ((q, rows), (k, keys), (v, keys))]
        right = attnhub.attention(*alone, MASK, backend="reference")
        assert isinstance(right, Tensor)
        grads = torch.autograd.grad(right, alone, grad[:, one, -rows:])
        # Keys that rows before these meet are left out.
        whole = rows - WINDOW
        for mine, exact, count in ((out, right, rows), (dq, grads[0], rows), (dk, grads[1], whole), (dv, grads[2], whole)):
            torch.testing.assert_close(mine[:, one, -count:], exact[:, :, -count:], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("page_size", [0, 16, 64])
def test_a_cache_past_2_to_the_31(page_size: int) -> None:
    needs_memory(14)
    batch, kv_heads, length = 70, 8, 30720
    q = randn(batch, 32, 1, DIM)
    used = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    if page_size:
        count = batch * length // page_size
        k, v = (randn(count, kv_heads, page_size, DIM) for _ in range(2))
        table = torch.arange(count, dtype=torch.int32, device="cuda").view(batch, -1)
        cache = attnhub.KVCache(k, v, used, table)
        last = [x[table[-1].long()].transpose(0, 1).reshape(1, kv_heads, length, DIM) for x in (k, v)]
    else:
        k, v = (randn(batch, kv_heads, length, DIM) for _ in range(2))
        cache = attnhub.KVCache(k, v, used)
        last = [x[-1:] for x in (k, v)]
    assert k.numel() > 2**31
    out = attnhub.attention(q, kv_cache=cache, backend="triton")
    right = attnhub.attention(q[-1:], *last, backend="reference")
    assert isinstance(out, Tensor) and isinstance(right, Tensor)
    torch.testing.assert_close(out[-1:], right, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_repeats_bitwise(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The general kernels 250 times on the same inputs, forward and backward, while another stream disturbs the timing."""
    monkeypatch.setattr(hopper, "serves_problem", lambda problem: False)
    q, grad = (torch.randn(2, 4, 700, 64, device="cuda").to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 2, 700, 64, device="cuda").to(dtype) for _ in range(2))
    call = Call(q, k, v, Causal(), 0.125, need_lse=True)
    token = Call(q[:, :, :1], k, v, SeqLens(torch.tensor([700, 300], dtype=torch.int32, device="cuda")), 0.125, need_lse=True)
    plan = TritonPlan(attnhub.explain(q, k, v, call.mask, backend="triton").problem)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()

    def run() -> list[Tensor]:
        with torch.cuda.stream(other):
            noise @ noise
        out, lse = plan.forward(call)
        assert lse is not None
        found = [out, lse, *plan.backward(call, grad, None, out, lse, Needs())[:3], *plan.forward(token)]
        return [x for x in found if x is not None]

    first = run()
    assert len(first) == 7
    for _ in range(250):
        assert all(torch.equal(mine, before) for mine, before in zip(run(), first))


#: Calls of every kind of kernel, at lengths that are no multiples of tiles.
_SAMPLE = """
import torch, attnhub
from attnhub.backends.triton import hopper, launch
launched, original = set(), launch.launch
def named(kernel, *args, **arguments):
    launched.add(kernel.fn.__name__)
    return original(kernel, *args, **arguments)
launch.launch = named
from attnhub.mask import BlockSparse, Bias, Causal, FULL
from attnhub.layouts import Varlen
starts = torch.tensor([0, 200, 200, 690], dtype=torch.int32, device="cuda")
def both(mask, dtype, dim, **more):
    q, k, v = (torch.randn(2, h, 334, dim, device="cuda", dtype=dtype, requires_grad=True) for h in (8, 2, 2))
    attnhub.attention(q, k, v, mask, backend="triton", **more).float().sum().backward()
for general in (False, True):
    if general:
        hopper.serves_problem = lambda problem: False
        attnhub.runtime.clear()
    both(Causal(), torch.bfloat16, 64)
    both(FULL, torch.float16, 128)
    both(Bias(torch.randn(1, 8, 334, 334, device="cuda", dtype=torch.bfloat16)) & Causal(), torch.bfloat16, 96)
    q, k, v = (torch.randn(700, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))
    attnhub.attention(q, k, v, Causal(), varlen=Varlen(starts, starts, 490, 490), backend="triton").float().sum().backward()
both(Causal(), torch.float32, 64)
both(Causal(), torch.bfloat16, 64, dropout_p=0.2)
both(BlockSparse(torch.rand(1, 1, 3, 3, device="cuda") < 0.6, (128, 128)), torch.bfloat16, 64)
q, k, v = (torch.randn(2, h, s, 128, device="cuda", dtype=torch.bfloat16) for h, s in ((8, 1), (2, 4000), (2, 4000)))
attnhub.attention(q, k, v, backend="triton")
used = torch.tensor([37, 5], dtype=torch.int32, device="cuda")
table = torch.tensor([[3, 1, 2], [4, -1, -1]], dtype=torch.int32, device="cuda")
pages = [torch.randn(5, 2, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
attnhub.attention(torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16), kv_cache=attnhub.KVCache(*pages, used, table), backend="triton")
torch.cuda.synchronize()
kinds = {"forward_kernel", "grad_q_kernel", "grad_kv_kernel", "combine_kernel"}
if torch.cuda.get_device_capability() == (9, 0):
    kinds |= {"hopper_forward_kernel", "hopper_grad_q_kernel", "hopper_grad_kv_kernel"}
assert kinds <= launched, launched
print("all ran")
"""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_no_stray_access() -> None:
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", _SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all ran" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
