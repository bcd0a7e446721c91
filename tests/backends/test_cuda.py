"""The cuda backend: without a GPU, every variant compiles for every architecture; with one, conformance, stream and graph."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import re
import subprocess
import threading
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from attnhub import testing
from attnhub.backend import Call, PrepareError
from attnhub.backends.cuda import backend, compile, nvrtc, params, probe, variant
from attnhub.capability import DeviceRange
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Causal, Chunk, LeftPad, Mask, SeqLens, Window
from attnhub.problem import DeviceInfo, Feature, Problem
from attnhub.reasons import Code
from attnhub.testing.checks import Check

HOPPER = DeviceInfo("cuda", "nvidia", (9, 0), "H100")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
needs_nvrtc = pytest.mark.skipif(nvrtc.find() is None, reason="NVRTC is not installed")


def _problem(**changes: Any) -> Problem:
    base = Problem(HOPPER, "float16", "float16", 64, 64, 4, 4, 2, 128, 128)
    return dataclasses.replace(base, **changes)


def _codes(problem: Problem) -> set[Code]:
    return {reason.code for reason in (*backend.capability.check(problem), *backend.check(problem))}


# ---------------------------------------------------------------------------------------------- declaration


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"q_dtype": "float32", "kv_dtype": "float32"}, Code.DTYPE),
        ({"kv_dtype": "bfloat16"}, Code.MIXED_DTYPE),
        ({"head_dim": 257, "v_head_dim": 257}, Code.HEAD_DIM),
        ({"align_bytes": 8}, Code.ALIGNMENT),
        ({"device": DeviceInfo("cpu", "x86_64")}, Code.DEVICE_TYPE),
        ({"device": DeviceInfo("cuda", "amd", (9, 4, 2))}, Code.DEVICE_TYPE),
        ({"device": DeviceInfo("cuda", "nvidia", (7, 0))}, Code.ARCH),
        ({"device": DeviceInfo("cuda", "nvidia", (7, 5)), "q_dtype": "bfloat16", "kv_dtype": "bfloat16"}, Code.DTYPE),
        ({"device": DeviceInfo("cuda", "nvidia", (7, 5)), "features": frozenset({Feature.PAGED}), "page_size": 16}, Code.NO_PAGED),
        ({"features": frozenset({Feature.DROPOUT})}, Code.NO_DROPOUT),
        ({"features": frozenset({Feature.BOOL_MASK})}, Code.NO_BOOL_MASK),
        ({"seqlen_k": 1 << 31}, Code.TOO_LARGE),
        ({"batch": 1 << 16, "q_heads": 64, "seqlen_q": 1 << 16}, Code.TOO_LARGE),
    ],
)
def test_what_is_outside_is_rejected_with_its_code(changes: dict[str, Any], code: Code) -> None:
    assert code in _codes(_problem(**changes))


def test_what_is_declared_is_accepted() -> None:
    for device, dtype in (((7, 5), "float16"), ((8, 6), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "float16")):
        problem = _problem(device=DeviceInfo("cuda", "nvidia", device), q_dtype=dtype, kv_dtype=dtype, features=backend.capability.features - {Feature.PAGED})
        assert not _codes(problem)


def test_every_verdict_about_the_backward_says_that_there_is_none() -> None:
    assert [r.code for r in backend.capability.check_backward(_problem())] == [Code.NO_BACKWARD]


# ---------------------------------------------------------------------------------------------- probe


def test_probe_names_the_missing_package_and_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    reasons = {reason.code: reason for reason in probe.probe()}
    assert "attnhub[cuda12]" in reasons[Code.NOT_INSTALLED].hint


def test_probe_reports_a_broken_cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')\n")
    monkeypatch.delitem(__import__("sys").modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = [reason for reason in probe.probe() if reason.code is Code.BROKEN]
    assert broken and "libcudart.so.99" in broken[0].detail


def test_probe_and_prepare_report_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find", lambda major=None: None)
    assert Code.NO_COMPILER in {reason.code for reason in probe.probe()}
    with pytest.raises(PrepareError) as caught:
        backend.prepare(_problem())
    assert caught.value.reason.code is Code.NO_COMPILER


@needs_nvrtc
def test_a_kernel_that_does_not_compile_is_a_prepare_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNHUB_CACHE_DIR", str(tmp_path))
    with pytest.raises(PrepareError) as caught:
        backend.prepare(_problem(device=DeviceInfo("cuda", "nvidia", (99, 9))))
    assert caught.value.reason.code is Code.COMPILE_FAILED
    assert not list(tmp_path.rglob("*.cubin"))


# ---------------------------------------------------------------------------------------------- compilation


def _library() -> nvrtc.Nvrtc:
    library = nvrtc.find()
    assert library is not None
    return library


@needs_nvrtc
def test_the_struct_is_laid_out_as_python_packs_it() -> None:
    """static_assert in the compiler's own words; a shifted field is a compile error."""
    asserts = [f"static_assert(sizeof(attnhub::Params) == {params.LAYOUT.size});"]
    asserts += [f"static_assert(__builtin_offsetof(attnhub::Params, {name}) == {at});" for name, at in params.offsets().items()]
    options = ("-arch=sm_80", "-std=c++17", "-default-device")
    source = '#include "portable/params.cuh"\n' + "\n".join(asserts)
    _library().compile(source, "layout.cu", compile.headers(), options)
    with pytest.raises(nvrtc.CompileError, match=r"static_assert|static assertion"):
        _library().compile(
            source.replace(f"== {params.LAYOUT.size}", f"== {params.LAYOUT.size + 8}"), "layout.cu", compile.headers(), options
        )


#: Shared memory of one block, in KiB (CUDA C++ programming guide, technical specifications per compute capability).
LIMITS = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99}


def _made(arch: str, dtype: str, head_dim: int, v_head_dim: int = 0, **more: Any) -> variant.Variant:
    return variant.make(arch=arch, turing=arch == "sm_75", dtype=dtype, head_dim=head_dim, v_head_dim=v_head_dim or head_dim, **more)


def _variants() -> list[variant.Variant]:
    """Both paths, both dtypes, tile sizes from the smallest to the largest, each optional part, exact and padded head dims."""
    found = [_made("sm_75", "float16", *dims) for dims in ((1, 1), (64, 64), (100, 100), (112, 112), (128, 128), (192, 128), (256, 256))]
    found += [_made(arch, dtype, d) for arch in ("sm_80", "sm_86", "sm_89", "sm_90") for d in (64, 128, 256) for dtype in DTYPES]
    for softcap, alibi in ((True, False), (False, True), (True, True)):
        found += [_made(arch, "bfloat16", d, softcap=softcap, alibi=alibi) for arch in ("sm_80", "sm_86", "sm_90") for d in (64, 128, 256)]
        found.append(_made("sm_75", "float16", 256, softcap=softcap, alibi=alibi))
    for dims in ((7, 7), (72, 72), (96, 96), (112, 112), (160, 160), (192, 128), (224, 224), (256, 16), (16, 256)):
        found += [_made(arch, "bfloat16", *dims) for arch in ("sm_80", "sm_86", "sm_90")]
    found += [_made(arch, "float16", d, seqlen_q=16) for arch in ("sm_80", "sm_86", "sm_90") for d in (64, 128, 256)]
    return list(dict.fromkeys(found))


def _name(v: variant.Variant) -> str:
    parts = [v.arch, v.dtype, f"D{v.head_dim}x{v.v_head_dim}", f"{v.rows}x{v.keys}x{v.stages}", "softcap" * v.softcap, "alibi" * v.alibi]
    return "-".join(part for part in parts if part)


def _compile(v: variant.Variant) -> nvrtc.Compiled:
    return _library().compile(compile.sources()[v.main], v.main, compile.headers(), (*v.options(), "--ptxas-options=-v"))


def _spilled(log: str) -> int:
    """Bytes of the kernel itself; the function that does blocks again is not counted."""
    ((stores, loads),) = re.findall(r"properties for attnhub_forward\s+ptxas[^\n]* (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return max(int(stores), int(loads))


def _memory_in_loop(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Loads and stores of local memory in the loop over keys, the tiles of keys that a mask cuts included, by the disassembler that Triton brings."""
    triton = pytest.importorskip("triton", reason="brings nvdisasm")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not tool.exists():
        pytest.skip("no nvdisasm")
    (folder / "kernel.cubin").write_bytes(cubin)
    text = subprocess.run([tool, "-c", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text[text.index(".text.attnhub_forward:") :].splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
    ends = [(labels.get(m[1], 1 << 30), i) for i, line in enumerate(code) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))]
    loops = [code[a:b] for a, b in ends if a < b and all(any(word in line for line in code[a:b]) for word in ("HMMA", "MUFU.EX2"))]
    loop = loops[0]  # the first in the code: the kernel's own
    return sum(bool(re.search(r"\bLDL\b", line)) for line in loop), sum(bool(re.search(r"\bSTL\b", line)) for line in loop)


def _check(v: variant.Variant, folder: Path) -> None:
    compiled = _compile(v)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert "warning" not in compiled.log.lower(), compiled.log
    assert v.shared_bytes <= LIMITS[v.arch] * 1024
    # A few numbers that only masks and the end need may wait in memory. In the loop they are read, of thousands of instructions, and never written.
    assert _spilled(compiled.log) <= 40, compiled.log
    if _spilled(compiled.log):
        loads, stores = _memory_in_loop(compiled.cubin, folder)
        assert loads <= 6 and stores == 0


_QUICK = [_made("sm_90", "bfloat16", d) for d in (64, 128, 256)]


@needs_nvrtc
@pytest.mark.parametrize("v", [*_QUICK, *(pytest.param(v, marks=pytest.mark.long) for v in _variants() if v not in _QUICK)], ids=_name)
def test_variants_compile_without_spills_in_loops(v: variant.Variant, tmp_path: Path) -> None:
    _check(v, tmp_path)


@needs_nvrtc
def test_the_compiler_says_when_registers_spill(tmp_path: Path) -> None:
    """The check above can fail: a tile too large for the registers does spill."""
    with pytest.raises(AssertionError):
        _check(dataclasses.replace(_made("sm_80", "float16", 128), keys=96), tmp_path)


@pytest.mark.parametrize("arch", LIMITS)
def test_tiles_fit_every_pair_of_head_dims(arch: str) -> None:
    for head_dim in range(1, 257, 5):
        for v_head_dim in range(1, 257, 5):
            for more in ({}, {"softcap": True}, {"seqlen_q": 64}, {"seqlen_q": 100}):
                v = _made(arch, "float16", head_dim, v_head_dim, **more)
                assert v.shared_bytes <= LIMITS[arch] * 1024
                assert v.keys % 16 == 0 and v.keys % (v.warps * 2) == 0 and (v.keys >= 32 or arch == "sm_75")
                assert 16 * v.kept <= head_dim + 15 and (not v.pairs or -(-v.v_head_dim // 16) % 2 == 0)
    assert _made(f"{arch}a", "float16", 128) == dataclasses.replace(_made(arch, "float16", 128), arch=f"{arch}a") or arch == "sm_75"


# ---------------------------------------------------------------------------------------------- cache


class _Counting:
    """An NVRTC that compiles nothing and counts."""

    version = (13, 0)

    def __init__(self) -> None:
        self.compiled = 0

    def compile(self, *args: Any) -> nvrtc.Compiled:
        self.compiled += 1
        return nvrtc.Compiled(b"cubin of " + repr(args[3]).encode(), "")


SMALL = variant.make(arch="sm_80", turing=False, dtype="float16", head_dim=64, v_head_dim=64)


def test_a_cubin_is_compiled_once_and_kept(tmp_path: Path) -> None:
    fake: Any = _Counting()
    first = compile.cubin(SMALL, fake, tmp_path)
    assert compile.cubin(SMALL, fake, tmp_path) == first and fake.compiled == 1
    compile.cubin(dataclasses.replace(SMALL, keys=32), fake, tmp_path)
    assert fake.compiled == 2
    fake.version = (13, 1)
    compile.cubin(SMALL, fake, tmp_path)
    assert fake.compiled == 3 and len(list(tmp_path.glob("*.cubin"))) == 3


def test_a_changed_source_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = _Counting()
    compile.cubin(SMALL, fake, tmp_path)
    changed = {**compile.sources(), "portable/mask.cuh": compile.sources()["portable/mask.cuh"] + "\n"}
    monkeypatch.setattr(compile, "sources", lambda: changed)
    compile.cubin(SMALL, fake, tmp_path)
    assert fake.compiled == 2


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(compile.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        compile.write_atomically(tmp_path / "x.cubin", b"data")
    assert not list(tmp_path.iterdir())


def _write_many(path: str, byte: int) -> None:
    for _ in range(50):
        compile.write_atomically(Path(path), bytes([byte]) * 100_000)


def test_processes_that_write_one_file_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "x.cubin"
    writers = [multiprocessing.get_context("spawn").Process(target=_write_many, args=(str(path), byte)) for byte in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_bytes() in (b"\1" * 100_000, b"\2" * 100_000)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["x.cubin"]


# ---------------------------------------------------------------------------------------------- on a GPU


def _conformance() -> list[Check]:
    """The suite in fp16 (its basic cases are fp32), without the rows of odd head_dim, which are not aligned to 16 bytes."""
    everything = (DeviceRange("cuda", dtypes=frozenset({"float32", *DTYPES})),)
    capability = dataclasses.replace(backend.capability, devices=everything)
    found = {}
    for made in testing.cases(capability, "cuda", "full"):
        case = dataclasses.replace(made, dtype="float16") if made.dtype == "float32" else made
        if case.head_dim % 8 == 0 and case.v_head_dim % 8 == 0:
            found[case] = None
    kinds = testing.checks("cuda", "cuda", "tiny", ("repeat", "reject"))
    return [Check("cuda", "forward", case, None, "cuda") for case in found] + kinds


@pytest.mark.gpu
@pytest.mark.parametrize("check", _conformance(), ids=str)
def test_conformance(check: Check) -> None:
    check.run()


def _plan(q: Tensor, v: Tensor, mask: Mask, turing: bool = False) -> Any:
    from attnhub.backends.cuda.launcher import CudaPlan

    library = nvrtc.find()
    assert library is not None
    major, minor = torch.cuda.get_device_capability()
    v_ = variant.make(
        arch=f"sm_{major}{minor}", turing=turing or (major, minor) < (8, 0), dtype=str(q.dtype)[6:], head_dim=q.shape[3],
        v_head_dim=v.shape[3], seqlen_q=q.shape[2], alibi=mask.alibi is not None,
    )  # fmt: skip
    from attnhub import config

    plan = CudaPlan(v_, str(compile.cubin(v_, library, config.cache_dir() / "cuda")))
    plan.load(torch.cuda.current_device())
    return plan


def _random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def _reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    scores = (q.double() @ k.double().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1).nan_to_num(0.0) @ v.double()


@pytest.mark.gpu
@pytest.mark.parametrize("turing", [False, True], ids=["m16n8k16", "m16n8k8"])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 200, 256])
@pytest.mark.parametrize(
    "mask",
    [FULL, Causal(), Causal() & Window(40), Window(9, 30), Causal() & Chunk(50)],
    ids=["full", "causal", "sliding", "window", "chunk"],
)
def test_both_paths(turing: bool, head_dim: int, mask: Mask) -> None:
    """The path for compute capability 7.5 too, on whatever device is here."""
    q, k, v = _random(2, 4, 197, head_dim), _random(2, 4, 333, head_dim), _random(2, 4, 333, head_dim)
    out, lse = _plan(q, v, mask, turing).forward(Call(q, k, v, mask, head_dim**-0.5, need_lse=True))
    exact = _reference(q, k, v, _allowed(mask, 197, 333))
    assert (out.double() - exact).abs().max() < 3e-3
    assert lse.isfinite().all()


def _allowed(mask: Mask, len_q: int, len_k: int) -> Tensor:
    p = torch.arange(len_q, device="cuda")[:, None] + (len_k - len_q if mask.align == "bottom_right" else 0)
    j = torch.arange(len_k, device="cuda")[None]
    left, right = mask.window
    ok = torch.ones(len_q, len_k, dtype=torch.bool, device="cuda")
    if mask.causal:
        ok &= j <= p
    if left >= 0:
        ok &= j >= p - left
    if right >= 0:
        ok &= j <= p + right
    if mask.chunk:
        ok &= p.div(mask.chunk, rounding_mode="floor") == j.div(mask.chunk, rounding_mode="floor")
    return ok


@pytest.mark.gpu
@pytest.mark.parametrize("turing", [False, True], ids=["m16n8k16", "m16n8k8"])
@pytest.mark.parametrize(
    "mask", [Causal(), Window(9, 5), Causal() & Chunk(50), Causal() & Window(40)], ids=["causal", "window", "chunk", "sliding"]
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_values_reach_only_the_rows_that_see_them(poison: float, mask: Mask, turing: bool) -> None:
    q, k, v = (_random(1, 2, 300, 64) for _ in range(3))
    allowed = _allowed(mask, 300, 300)
    exact = _reference(q, k, v, allowed)
    keys = [3, 70, 150, 211, 299]
    v[0, 0, keys, 5] = poison
    out, _ = _plan(q, v, mask, turing).forward(Call(q, k, v, mask, 64**-0.5))
    sees = allowed[:, keys].any(1)
    hit = out[0, 0, :, 5]
    assert torch.equal(hit.isnan() if math.isnan(poison) else hit.isposinf(), sees)
    exact[0, 0, sees, 5], out[0, 0, sees, 5] = 0, 0
    assert (out.double() - exact).abs().max() < 3e-3


@pytest.mark.gpu
def test_padding_is_never_read() -> None:
    q, k, v = (_random(3, 2, 150, 128) for _ in range(3))
    lengths, leftpad = torch.tensor([150, 0, 77], device="cuda"), torch.tensor([3, 0, 64], device="cuda")
    mask = SeqLens(lengths) & LeftPad(leftpad)
    j = torch.arange(150, device="cuda")
    exists = (j < lengths[:, None]) & (j >= leftpad[:, None])
    exact = _reference(q, k, v, exists[:, None, None])
    k[~exists[:, None].expand(3, 2, 150)] = float("nan")
    v[~exists[:, None].expand(3, 2, 150)] = float("nan")
    out, lse = _plan(q, v, mask).forward(Call(q, k, v, mask, 128**-0.5, need_lse=True))
    assert (out.double() - exact).abs().max() < 3e-3
    assert lse[1].isneginf().all() and (out[1] == 0).all()


@pytest.mark.gpu
def test_negative_and_zero_scales() -> None:
    q, k, v = (_random(1, 2, 100, 64) for _ in range(3))
    plan = _plan(q, v, Causal())
    allowed = _allowed(Causal(), 100, 100)
    negative, _ = plan.forward(Call(q, k, v, Causal(), -(64**-0.5)))
    assert (negative.double() - _reference(-q, k, v, allowed)).abs().max() < 3e-3
    mean, _ = plan.forward(Call(q, k, v, Causal(), 0.0))
    assert (mean.double() - _reference(q * 0, k, v, allowed)).abs().max() < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("turing", [False, True], ids=["m16n8k16", "m16n8k8"])
@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
def test_extreme_scores(mask: Mask, turing: bool) -> None:
    """Of some rows, beyond softmax.cuh's kExtreme; each of these sees one key alone."""
    q, k, v = (_random(1, 2, 200, 64) for _ in range(3))
    q[:, :, ::3], k[:, :, :100:4] = q[:, :, ::3] * 2.0**13, k[:, :, :100:4] * 2.0**12
    out, lse = _plan(q, v, mask, turing).forward(Call(q, k, v, mask, 64**-0.5, need_lse=True))
    assert out.isfinite().all() and lse.isfinite().all()
    assert (out.double() - _reference(q, k, v, _allowed(mask, 200, 200))).abs().max() < 5e-3


@pytest.mark.gpu
def test_slopes_per_sequence() -> None:
    q, k, v = (_random(2, 4, 120, 64) for _ in range(3))
    slopes = torch.rand(2, 4, device="cuda")
    j = torch.arange(120, device="cuda")
    exact = _reference(q, k, v, _allowed(Causal(), 120, 120), -slopes[..., None, None].double() * (j[:, None] - j).abs())
    mask = Causal() & ALiBi(slopes)
    out, _ = _plan(q, v, mask).forward(Call(q, k, v, mask, 64**-0.5))
    assert (out.double() - exact).abs().max() < 3e-3


@pytest.mark.gpu
def test_tokens_behind_the_last_sequence_are_zero() -> None:
    q, k, v = (_random(1, 2, 90, 64) for _ in range(3))
    ends = torch.tensor([0, 40, 40, 70], dtype=torch.int32, device="cuda")
    k[:, :, 70:], v[:, :, 70:] = float("nan"), float("nan")
    out, lse = _plan(q, v, FULL).forward(Call(q, k, v, FULL, 0.125, varlen=Varlen(ends, ends, 40, 40), need_lse=True))
    assert (out[:, :, 70:] == 0).all() and lse[:, :, 70:].isneginf().all()
    for a, b in ((0, 40), (40, 70)):
        exact = _reference(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], torch.ones(b - a, b - a, dtype=torch.bool, device="cuda"))
        assert (out[:, :, a:b].double() - exact).abs().max() < 3e-3


@pytest.mark.gpu
def test_the_current_stream_a_graph_and_a_new_thread() -> None:
    q, k, v = (_random(2, 4, 500, 128) for _ in range(3))
    plan, call = _plan(q, v, Causal()), Call(q, k, v, Causal(), 128**-0.5)
    other = torch.randn_like(q)
    expected_other, _ = plan.forward(Call(other, k, v, Causal(), 128**-0.5))
    expected, _ = plan.forward(call)
    torch.cuda.synchronize()

    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(plan.forward(call)[0]))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)

    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured, _ = plan.forward(call)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would read q before this copy
        q.copy_(other)
        ordered, _ = plan.forward(call)
        graph.replay()
    side.synchronize()
    assert torch.equal(ordered, expected_other)
    assert torch.equal(captured, expected_other)


@pytest.mark.gpu
def test_250_runs_are_bitwise_equal() -> None:
    q, k, v = (_random(2, 4, 700, 128) for _ in range(3))
    plan, call = _plan(q, v, Causal()), Call(q, k, v, Causal(), 128**-0.5, need_lse=True)
    out, lse = plan.forward(call)
    for _ in range(250):
        again, again_lse = plan.forward(call)
        assert torch.equal(again, out) and torch.equal(again_lse, lse)


@pytest.mark.gpu
def test_offsets_pass_2_to_the_31() -> None:
    keys = torch.empty(1, 40_000, 512, 128, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    q = _random(1, 512, 128, 128, dtype=torch.bfloat16)
    out, _ = _plan(q, keys, FULL).forward(Call(q, keys, keys, FULL, 128**-0.5))
    for head in (0, 511):
        exact = _reference(
            q[:, head : head + 1], keys[:, head : head + 1], keys[:, head : head + 1], torch.ones(1, dtype=torch.bool, device="cuda")
        )
        assert (out[:, head : head + 1].double() - exact).abs().max() < 2e-3
