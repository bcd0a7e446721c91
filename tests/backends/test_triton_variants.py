"""Which kernel, which tiles and which precision a plan of the triton backend takes, and what it says of them."""

from __future__ import annotations

import os
import pathlib
import time
import types
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

import triton
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources
from triton_calls import backward_of, backward_variants, calls, randn
from triton_gpu import H100, MARKS, Gpu, Kernel, plan

from attnhub.backend import Call, Needs
from attnhub.backends.triton import arguments, hopper, launch, launcher, tiles
from attnhub.backends.triton.tiles import Tiles
from attnhub.mask import FULL, Causal, SeqLens
from attnhub.problem import DeviceInfo, Problem

pytestmark = MARKS


def test_the_next_kernel_serves_where_the_first_cannot(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def special(recorder: launch.Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
        tried.append(tiles)
        raise OutOfResources(2, 1, "shared memory")

    first = launcher.Variant("special", lambda arguments: not arguments["RIGHT"], special)
    monkeypatch.setattr(launcher, "_FORWARD", (first, *launcher._FORWARD))
    shared, found = plan(), calls()
    shared._tiles["special"] = [Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 2)]
    shared.forward(found["causal"])
    assert tried == []
    shared.forward(found["plain"])
    assert tried == [Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 2)]
    shared.forward(found["lse"])
    assert len(tried) == 2 and len(gpu.launched) == 3


def test_an_attempt_that_fails_half_way_leaves_no_trace(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    """dQ's first tiles do not fit, after the row sums were launched; a replay launches all that the second attempt did, the row sums too."""
    monkeypatch.setattr(hopper, "serves_problem", lambda problem: False)
    refused = []

    def refuse(src: Any) -> None:
        if src.fn.fn.__name__ == "grad_q_kernel" and not refused:
            refused.append(src)
            raise OutOfResources(2, 1, "shared memory")

    gpu.refuse = refuse
    shared, call = plan(), calls()["plain"]
    run = backward_of(gpu, call, *backward_variants(call)["plain"])
    names = [[specialised[0] for specialised, *_ in run(shared)[0]] for _ in range(2)]
    assert refused and len(replays) == 1
    assert names == [["delta_kernel", "delta_kernel", "grad_q_kernel", "grad_kv_kernel"], ["delta_kernel", "grad_q_kernel", "grad_kv_kernel"]]


def test_a_kernel_that_does_not_compile_is_passed_over(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def special(recorder: launch.Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
        raise CompilationError("source", None, "no")  # type: ignore[arg-type]

    monkeypatch.setattr(launcher, "_FORWARD", (launcher.Variant("special", lambda arguments: True, special), *launcher._FORWARD))
    shared = plan()
    shared._tiles["special"] = [Tiles(128, 128, 8, 2)]
    shared.forward(calls()["plain"])
    assert len(gpu.launched) == 1 and shared._tiles["special"] == []


def test_first_launch_is_described(gpu: Gpu, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, found = plan(), calls()
    described = shared.describe()
    assert {described[role]["compile_seconds"] for role in ("forward", "decode", "grad_kv", "grad_q")} == {None}
    file = tmp_path / "kernel.cubin"
    file.write_bytes(b"")
    compile_one = gpu.compile

    def compiled(*args: Any, **named: Any) -> Kernel:
        kernel = compile_one(*args, **named)
        kernel.metadata_group = {"kernel.cubin": str(file)}
        return kernel

    monkeypatch.setattr(triton.compiler, "compile", compiled)
    os.utime(file, (time.time() + 60,) * 2)
    shared.forward(found["plain"])
    described = shared.describe()
    first = described["forward"]["compile_seconds"]
    assert first > 0 and described["forward"]["from_disk_cache"] is False and described["decode"]["compile_seconds"] is None
    os.utime(file, (1, 1))
    shared.forward(found["lse"])
    assert shared.describe()["forward"] == described["forward"]
    shared.forward(found["token"])
    assert shared.describe()["decode"]["from_disk_cache"] is True
    # Another plan finds the kernel in memory.
    other = plan()
    other.forward(found["token"])
    assert (other.describe()["decode"]["compile_seconds"], other.describe()["decode"]["from_disk_cache"]) == (0.0, None)


def test_tf32_is_followed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, call = plan("float32"), calls(torch.float32)["plain"]
    specialised = []
    for precision in ("tf32x3", "tf32", "tf32x3", "tf32"):
        monkeypatch.setattr(arguments, "precision", lambda *_, precision=precision: precision)
        shared.forward(call)
        specialised.append(gpu.launched[-1][0].specialised)
    assert specialised[0] == specialised[2] != specialised[1] == specialised[3]
    assert shared.repeat(call) is None


def test_both_switches_of_tf32_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one raises once the new one has been used."""
    q = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"), shape=(1, 1, 1, 64), get_device=lambda: 0)
    monkeypatch.setattr(arguments, "arch", lambda device: (9, 0))
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the old switch alone")
    before = matmul.fp32_precision
    try:
        for setting, wanted in (("tf32", "tf32"), ("ieee", "tf32x3")):
            matmul.fp32_precision = setting
            assert arguments.precision(q, 64, (100, 100)) == wanted  # type: ignore[arg-type]
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("arch", "dim", "v_dim", "lengths", "wanted"),
    [
        ((9, 0), 64, 256, (64, 65), "tf32x3"), ((9, 0), 64, 64, (64, 64), "ieee"), ((9, 0), 64, 64, (3000, 2), "tf32x3"),
        ((9, 0), 257, 64, (100, 100), "ieee"), ((9, 0), 64, 512, (100, 100), "ieee"), ((8, 0), 64, 64, (100, 100), "ieee"),
        ((10, 0), 64, 64, (100, 100), "ieee"),
    ],
)  # fmt: skip
def test_precision_of_fp32(
    arch: tuple[int, int], dim: int, v_dim: int, lengths: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tf32 products where their error was found small enough; the plan's tiles are those of the same products."""
    q = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"), shape=(1, 1, 1, dim), get_device=lambda: 0)
    monkeypatch.setattr(arguments, "arch", lambda device: arch)
    assert arguments.precision(q, v_dim, lengths) == wanted  # type: ignore[arg-type]
    made = launcher.TritonPlan(Problem(DeviceInfo("cuda", "nvidia", arch, ""), "float32", "float32", dim, v_dim, 4, 2, 2, *lengths))
    limit = tiles.shared_memory("nvidia", arch)
    for role in tiles.roles(4):
        assert made._tiles[role] == tiles.choices(role, dim, v_dim, 4, limit, exact=wanted == "ieee")
    q.dtype = torch.float16
    assert arguments.precision(q, v_dim, lengths) == "ieee"  # type: ignore[arg-type]


def test_few_rows_of_fp32_have_smaller_blocks() -> None:
    for heads, batch, length, block in ((1, 1, 256, 32), (1, 2, 512, 32), (1, 4, 1024, 128), (8, 1, 1024, 128)):
        made = launcher.TritonPlan(Problem(H100, "float32", "float32", 64, 64, heads, heads, batch, length, length))
        assert made._tiles["forward"][0].block_m == block
        other = launcher.TritonPlan(Problem(H100, "float16", "float16", 64, 64, heads, heads, batch, length, length))
        assert other._tiles["forward"][0].block_m == 64


@pytest.mark.parametrize(
    ("batch", "heads", "length", "parts"),
    [(1, 1, 256, True), (2, 1, 512, True), (1, 8, 512, False), (4, 1, 1024, True), (1, 8, 1024, False)],
)
def test_parts_of_sums_lie_in_memory_only_where_they_pay_off(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, batch: int, heads: int, length: int, parts: bool
) -> None:
    """64 programs on 132 multiprocessors divide loops of 16 key tiles and not of 8; their parts would be four times the output."""
    kept, buffer = [], launch.Recorder.buffer

    def named(self: launch.Recorder, name: str, x: Tensor) -> Tensor:
        kept.append(name)
        return buffer(self, name, x)

    monkeypatch.setattr(launch.Recorder, "buffer", named)
    monkeypatch.setattr(hopper, "serves_problem", lambda problem: False)
    q, k, v = (randn(batch, heads, length, 64) for _ in range(3))
    plan().forward(Call(q, k, v, FULL, 0.125))
    assert "out" in kept and ("partial_out" in kept) == parts


@pytest.mark.parametrize(("softcap", "by_hopper"), [(30.0, True), (1000.0, True), (1e6, False)])
def test_large_softcaps_take_the_exact_tanh(gpu: Gpu, softcap: float, by_hopper: bool) -> None:
    """An error of 1e-7 in tanh is one of a tenth in a score capped at a million."""
    q, k, v = (randn(2, 16, 512, 64) for _ in range(3))
    shared = launcher.TritonPlan(Problem(H100, "bfloat16", "bfloat16", 64, 64, 16, 16, 2, 512, 512))
    out, lse = shared.forward(Call(q, k, v, Causal(), 0.125, softcap=softcap, need_lse=True))
    assert lse is not None
    shared.backward(Call(q, k, v, Causal(), 0.125, softcap=softcap), out, None, out, lse, Needs())
    names = [kernel.specialised[0] for kernel, *_ in gpu.launched]
    assert len(names) >= 3 and all(name.startswith("hopper") == by_hopper for name in names), names


@pytest.mark.parametrize(
    ("page_size", "batch", "role"),
    [(16, 64, "decode_paged"), (48, 64, "decode_paged"), (64, 64, "decode"), (192, 64, "decode"), (16, 4, "decode"), (0, 64, "decode")],
)
def test_small_pages_for_a_full_device_have_tiles_of_their_own(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, page_size: int, batch: int, role: str) -> None:
    shared = launcher.TritonPlan(Problem(H100, "bfloat16", "bfloat16", 64, 64, 4, 2, batch, 1, 192))
    tried = []
    original = launcher.TritonPlan._try
    monkeypatch.setattr(launcher.TritonPlan, "_try", lambda self, role, run: (tried.append(role), original(self, role, run))[1])
    q, used = randn(batch, 4, 1, 64), torch.full((batch,), 192, dtype=torch.int32)
    if page_size:
        count = 192 // page_size
        pages = randn(batch * count, 2, page_size, 64)
        shared.forward(Call(q, pages, pages, SeqLens(used), 0.125, block_table=torch.zeros(batch, count, dtype=torch.int32)))
    else:
        k = randn(batch, 2, 192, 64)
        shared.forward(Call(q, k, k, SeqLens(used), 0.125))
    assert tried == [role]
