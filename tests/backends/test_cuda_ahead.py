"""Kernels of the cuda backend compiled before they are needed: which ones, in processes side by side, for devices that need not be here."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_compiled import needs_nvrtc

from attnhub import cli
from attnhub.backend import Append, Call
from attnhub.backends.cuda import ahead, backend, compile, decode_append, decode_plan, hopper, launcher, nvrtc
from attnhub.backends.cuda.ahead import kernel_for
from attnhub.backends.cuda.decode import DecodeVariant
from attnhub.cli import ahead as command
from attnhub.mask import FULL
from attnhub.problem import DeviceInfo, Feature, Problem, seqlen_class
from attnhub.rotary import Rotary

HOPPER = DeviceInfo("cuda", "nvidia", (9, 0), "H100")
_BASE = Problem(HOPPER, "bfloat16", "bfloat16", 64, 64, 8, 2, 1, 1, 1024)


def _problem(arch: tuple[int, int] = (9, 0), **changes: Any) -> Problem:
    return dataclasses.replace(_BASE, device=dataclasses.replace(HOPPER, arch=arch), **changes)


# ---------------------------------------------------------------------------------------------- which kernels

_FEATURES = tuple(map(frozenset, (
    (), (Feature.CAUSAL_BOTTOM_RIGHT,), (Feature.WINDOW, Feature.LEFTPAD), (Feature.VARLEN,), (Feature.PAGED, Feature.SEQLENS), (Feature.SOFTCAP, Feature.ALIBI),
)))  # fmt: skip


@pytest.mark.parametrize("arch", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
def test_it_is_what_the_first_call_would_compile(arch: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(launcher, "_cubin", lambda variant: asked.append(variant) or "kernel.cubin")
    monkeypatch.setattr(launcher, "_loaded", lambda plan, problem: plan)
    kinds, plans = set(), {"decode": "DecodePlan", "hopper": "HopperPlan", "portable": "CudaPlan"}
    for dims, seqlen_q, features in itertools.product(((64, 64), (192, 128), (40, 72), (256, 256)), (1, 16, 32, 64, 128, 4096), _FEATURES):
        problem = _problem(arch, head_dim=dims[0], v_head_dim=dims[1], seqlen_q=seqlen_q, features=features, page_size=16 * (Feature.PAGED in features))
        if backend.check(problem):
            continue
        kernel, variant = kernel_for(problem)
        plan = backend.prepare(problem)
        assert asked[-1] == variant and type(plan).__name__ == plans[kernel]
        kinds.add(kernel)
    assert kinds == {(7, 5): {"portable"}, (9, 0): {"decode", "hopper", "portable"}}.get(arch, {"decode", "portable"})


def test_each_kernel_once() -> None:
    problems = [_problem(seqlen_q=n, features=f) for n in (1, 16, 32, 1024, 4096) for f in _FEATURES[:2]]
    found = ahead.distinct([(p, "") for p in problems])
    assert [kernel_for(*asked)[0] for asked in found.values()] == ["decode", "hopper", "hopper", "hopper"]  # full; causal of short and of long prompts
    assert next(iter(found.values()))[0] is problems[0]


@pytest.mark.parametrize(
    ("changes", "named", "asked"),
    [
        ({}, "", [""]),
        ({}, "rotary", ["", "rotary"]),
        ({"seqlen_q": 16}, "tokens", ["", "tokens"]),
        ({"features": frozenset({Feature.PAGED, Feature.SEQLENS}), "page_size": 16}, "", ["", "tokens", "rotary"]),
        ({"features": frozenset({Feature.PAGED, Feature.SEQLENS}), "page_size": 16}, "rotary", ["", "rotary"]),
        ({"features": frozenset({Feature.PAGED, Feature.SEQLENS, Feature.VARLEN}), "page_size": 16}, "rotary", [""]),
        ({"features": frozenset({Feature.PAGED, Feature.SEQLENS}), "page_size": 16, "seqlen_q": 32}, "", [""]),
        ({"seqlen_q": 4096}, "rotary", [""]),
        ({"arch": (7, 5)}, "rotary", [""]),
    ],
)  # fmt: skip
def test_kernels_for_calls_that_append(changes: dict[str, Any], named: str, asked: list[str]) -> None:
    problem = _problem(**changes)
    assert command.asked([problem], named) == [(problem, kind) for kind in asked]
    assert [v.append for v in ahead.distinct(command.asked([problem], named)) if isinstance(v, DecodeVariant)] in ([], [ahead.APPEND.index(kind) for kind in asked])


def test_they_are_what_a_decode_plan_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For calls that append, at its first of them."""
    made: list[Any] = []
    monkeypatch.setattr(launcher, "_cubin", lambda variant: made.append(variant) or "kernel.cubin")
    monkeypatch.setattr(launcher, "_loaded", lambda plan, problem: plan)
    monkeypatch.setattr(decode_plan, "is_capturing", lambda: False)
    problem = _problem(features=frozenset({Feature.PAGED, Feature.SEQLENS, Feature.ALIBI}), page_size=24)
    plan: Any = backend.prepare(problem)
    x, new = torch.zeros(3, 2, 24, 64, dtype=torch.bfloat16), torch.zeros(3, 2, 1, 64, dtype=torch.bfloat16)
    for rotary in (None, Rotary(torch.zeros(9, 32), torch.zeros(9, 32))):
        call = Call(torch.zeros(3, 8, 1, 64, dtype=torch.bfloat16), x, x.clone(), FULL, 0.1, append=Append(new, new.clone(), rotary))
        plan.appends(call)
    assert made == [kernel_for(*asked)[1] for asked in command.asked([problem], "")] and len(made) == 3
    assert [ahead.APPEND.index(kind) for kind in ("", "tokens", "rotary")] == [decode_append.NONE, decode_append.TOKENS, decode_append.ROTARY]


def test_problems_as_json() -> None:
    problem = _problem(features=_FEATURES[2], page_size=16, need_backward=True)
    assert Problem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


def _model(*features: Feature, seqlen_q: int = 32, **changes: Any) -> Problem:
    """As a small run on a CPU poses it."""
    return _problem(seqlen_q=seqlen_q, seqlen_k=32, features=frozenset(features), q_dtype="float32", kv_dtype="float32", align_bytes=8, batch=2, **changes)


def _names(problems: list[Problem]) -> set[str]:
    served, refused = command.sort(problems)
    assert not refused
    return {f"{kernel}-{v.describe()['tile'][0]}-{getattr(v, 'left', '')}-{getattr(v, 'paging', '')}" for kernel, v in (kernel_for(p) for p in served)}


@pytest.mark.parametrize(
    ("changes", "options", "names"),
    [
        ({}, {}, {"decode-16--0", "hopper-192-False-", "hopper-128-False-"}),
        ({}, {"page_size": 16}, {"decode-16--0", "decode-16--1", "hopper-192-False-", "hopper-128-False-"}),
        ({}, {"page_size": 24, "packed": True}, {"decode-16--0", "decode-16--2", "hopper-192-False-", "hopper-128-False-", "portable-64--"}),
        ({"head_dim": 128, "v_head_dim": 128}, {}, {"decode-16--0", "hopper-128-False-"}),
    ],
)
def test_kernels_of_a_model(changes: dict[str, Any], options: dict[str, Any], names: set[str]) -> None:
    small = [_model(Feature.CAUSAL_BOTTOM_RIGHT, **changes), _model(seqlen_q=1, **changes)]
    problems = command.of_model(small, HOPPER, "bfloat16", **options)
    assert _names(problems) == names
    assert all(p.q_dtype == "bfloat16" and p.align_bytes == 16 and p.seqlen_q == seqlen_class(p.seqlen_q) for p in problems)


def test_a_window_does_not_fill_short_prompts() -> None:
    small = [_model(Feature.CAUSAL_BOTTOM_RIGHT, Feature.WINDOW, head_dim=128, v_head_dim=128)]
    assert _names(command.of_model(small, HOPPER, "bfloat16")) == {"decode-16--0", "hopper-128-True-", "hopper-128-False-"}


def test_a_large_batch_has_tiles_of_its_own() -> None:
    problems = command.of_model([_model(seqlen_q=1, head_dim=128, v_head_dim=128)], HOPPER, "bfloat16", page_size=16)
    decoding = {v for kernel, v in map(kernel_for, problems) if kernel == "decode"}
    assert {(v.warps, v.paging) for v in decoding if isinstance(v, DecodeVariant)} == {(8, 0), (8, 1), (4, 1)}


def test_what_is_not_served_is_told_once_with_its_reasons() -> None:
    small = [_model(Feature.BIAS), _model(Feature.CAUSAL_BOTTOM_RIGHT, head_dim=20, v_head_dim=20), _model()]
    served, refused = command.sort(command.of_model(small, HOPPER, "bfloat16"))
    assert served and [len(row["reasons"]) for row in refused] == [1, 1]
    assert "no_bias" in refused[0]["reasons"][0] and "alignment" in refused[1]["reasons"][0]


# ---------------------------------------------------------------------------------------------- compiling


@needs_nvrtc
def test_compiled_once_where_the_backend_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [_problem(), _problem((8, 0), seqlen_q=64, head_dim=16, v_head_dim=16), _problem((99, 9), seqlen_q=1)]
    asked = [(problems[0], ""), (problems[0], "rotary"), (problems[1], ""), (_problem(seqlen_q=16), ""), (problems[2], "")]
    ticks: list[str] = []
    rows = ahead.compile_all(asked, tmp_path, None, 2, ticks.append)
    assert [(row["kernel"], row["append"]) for row in rows] == [("decode", ""), ("decode", "rotary"), ("portable", ""), ("decode", "")] and len(ticks) == 4
    assert ["error" in row for row in rows] == [False, False, False, True] and "sm_999" in rows[3]["error"]
    for row in rows:
        problem = Problem.from_json(row["problem"])
        if "error" not in row:
            assert Path(row["cubin"]).read_bytes()[:4] == b"\x7fELF" and Path(row["cubin"]).stat().st_size == row["bytes"]
            assert not row["cached"] and row["seconds"] > 0.05 and row["variant"] == kernel_for(problem)[1].describe()
    # The backend finds them: an NVRTC of the same version that cannot compile.
    library = nvrtc.find()
    assert library is not None
    lazy: Any = SimpleNamespace(version=library.version)
    for row in rows[:2]:
        assert str(compile.cubin(kernel_for(problems[0], row["append"])[1], lazy, tmp_path)) == row["cubin"]
    assert [row.get("cached") for row in ahead.compile_all(asked, tmp_path, None, 2)] == [True, True, True, None]


@needs_nvrtc
def test_two_that_want_the_same_share_one_compilation(tmp_path: Path) -> None:
    found: list[Any] = []
    problem = _problem((8, 0), seqlen_q=64, head_dim=16, v_head_dim=16)
    threads = [threading.Thread(target=lambda: found.extend(ahead.compile_all([(problem, "")], tmp_path, None, 1))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({row["cubin"] for row in found}) == 1 and [p.name for p in tmp_path.glob("*.cubin")] == [Path(found[0]["cubin"]).name]
    # Whoever came second did not compile, but waited.
    assert min(row["processor_seconds"] for row in found) < 0.5 * max(row["processor_seconds"] for row in found)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_process_that_dies_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    code = "import json, sys\nfor line in sys.stdin:\n  if json.loads(line)['problem']['head_dim'] == 64: sys.exit(3)\n  print('{\"cubin\": \"x\"}', flush=True)"
    rows = ahead.compile_all([(_problem(), ""), (_problem(head_dim=128, v_head_dim=128), "")], tmp_path, None, 1, command=(sys.executable, "-c", code))
    assert "process ended" in rows[0]["error"] and rows[1]["cubin"] == "x"


@needs_nvrtc
@pytest.mark.long
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)], ids=lambda d: f"D{d[0]}x{d[1]}")
def test_a_cold_compile_takes_three_seconds_at_most(dims: tuple[int, int], tmp_path: Path) -> None:
    """In the median of a width's variants for 9.0, in two processes. Processor time, so that what else the machine does says nothing; one compilation uses
    one processor."""
    features = [
        (), (Feature.CAUSAL_BOTTOM_RIGHT,), (Feature.WINDOW,), (Feature.LEFTPAD,), (Feature.VARLEN,), (Feature.SOFTCAP,), (Feature.ALIBI, Feature.CAUSAL_BOTTOM_RIGHT),
        (Feature.SOFTCAP, Feature.CHUNK), (Feature.SOFTCAP, Feature.ALIBI, Feature.WINDOW),
    ]  # fmt: skip
    problems = [
        _problem(head_dim=dims[0], v_head_dim=dims[1], seqlen_q=n, features=frozenset(f), q_dtype=t, kv_dtype=t)
        for f in features for n in (1024, 16384) for t in ("bfloat16", "float16")
    ]  # fmt: skip
    rows = ahead.compile_all([(p, "") for p in problems], tmp_path, None, 2)
    # Features that ask for the same kernel share it; fewer than this would say that kernels are no longer made for their features.
    assert len(rows) >= 16 and not any("error" in row or row["cached"] for row in rows)
    assert len({kernel_for(p)[1] for p in problems}) == len(rows) and all(isinstance(kernel_for(p)[1], hopper.HopperVariant) for p in problems)
    assert statistics.median(row["processor_seconds"] for row in rows) <= 3


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was asked to be compiled; nothing is."""
    asked: list[Any] = []

    def compile_all(wanted: list[ahead.Asked], directory: Path, toolkit: Any, count: int, tick: Any = None) -> list[dict[str, Any]]:
        asked.append((wanted, directory, count))
        rows = [
            {"kernel": kernel_for(p)[0], "problem": p.to_json(), "append": append, "variant": v.describe(), "cubin": "x", "cached": False, "seconds": 1.0}
            for v, (p, append) in ahead.distinct(wanted).items()
        ]  # fmt: skip
        if any(p.head_dim == 8 for p, _ in wanted):
            rows[0]["error"] = "CompileError: because"
        return rows

    monkeypatch.setenv("ATTNHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "compile_all", compile_all)
    monkeypatch.setattr(nvrtc, "find", lambda major=None: SimpleNamespace(version=(13, 5)))
    return asked


def test_shapes_for_a_named_architecture(compiled: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shapes = ["--head-dim", "128", "--heads", "8", "--kv-heads", "2", "--causal", "--seqlen-q", "1,4096", "--jobs", "5"]
    assert cli.main(["warmup", "--arch", "sm_90a", *shapes, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["kernel"] for row in told["kernels"]] == ["decode", "hopper"] and not told["refused"]
    assert told["directory"] == str(tmp_path / "cuda") and told["nvrtc"] == "13.5" and told["device"]["arch"] == [9, 0]
    (wanted, directory, count), = compiled
    assert directory == tmp_path / "cuda" and count == 2  # no more than kernels
    assert {f.value for f in wanted[0][0].features} == {"gqa", "causal_bottom_right"} and wanted[0][0].q_dtype == "bfloat16"
    assert cli.main(["warmup", "--arch", "a100", *shapes]) == 0
    said = capsys.readouterr().out
    assert "portable" in said and "sm_80" in said and "2 of 2 kernels" in said
    for more, kinds in ((["--append", "rotary"], {"", "rotary"}), (["--page-size", "16"], {"", "tokens", "rotary"})):
        assert cli.main(["warmup", "--arch", "sm_90a", *shapes, *more, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert {row["append"] for row in told["kernels"] if row["kernel"] == "decode"} == kinds
        assert "seqlens" in told["kernels"][0]["problem"]["features"]
    assert cli.main(["warmup", "--arch", "sm_90a", *shapes, *more]) == 0
    assert "decode, rotary" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--arch", "sm90"], 2, "--arch sm90: an architecture is needed, as in sm_80 or sm_90a"),
        (["--arch", "mi300"], 2, "no NVIDIA GPU"),
        (["--arch", "sm_70"], 1, "not served by cuda"),
        (["--arch", "sm_75"], 1, "bfloat16"),
        (["--arch", "sm_90a", "--dtype", "float32"], 1, "float32"),
        (["--arch", "sm_90a", "--head-dim", "8"], 1, "CompileError: because"),
        (["--arch", "sm_90a", "--heads", "8", "--kv-heads", "3"], 2, "--heads 8 is not a multiple of --kv-heads 3"),
        (["--arch", "sm_90a", "--append", "tokens", "--packed"], 2, "--append tokens: packed queries append nothing"),
        (["--arch", "sm_90a", "--model", "/nowhere"], 2, "--model /nowhere: a folder with a HuggingFace model"),
    ],
)
def test_what_cannot_be_is_told(arguments: list[str], code: int, said: str, compiled: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", *arguments]) == code
    out = capsys.readouterr()
    assert said in out.out + out.err


def test_without_a_device_or_a_compiler(compiled: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["warmup", "--model", str(tmp_path)]) == 2 and "name the architecture" in capsys.readouterr().err
    monkeypatch.setattr(nvrtc, "find", lambda major=None: None)
    assert cli.main(["warmup", "--arch", "sm_90a"]) == 2 and "attnhub[cuda13]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ({"model": "M", "dtype": "float16", "problems": [_model(Feature.CAUSAL_BOTTOM_RIGHT).to_json()], "note": "one thing"}, 0, "M: one thing"),
        ({"model": "M", "dtype": "", "problems": [_model().to_json()], "note": ""}, 1, "float32"),
        ({"model": "M", "dtype": "float16", "problems": [_model().to_json(), _model(Feature.BIAS).to_json()], "note": ""}, 1, "not served by cuda: head_dim 64, bias: no_bias"),
        ({"model": "M", "dtype": "", "problems": [], "note": ""}, 2, "it asked for no attention"),
        ({"error": "KeyError: 'x'"}, 2, "KeyError: 'x'; give the shapes instead"),
        (None, 2, "attnhub[hf]"),
    ],
)
def test_a_model(answer: Any, code: int, said: str, compiled: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from attnhub.bench import workers

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(workers, "ask", lambda command, questions, count, **more: [answer])
    assert cli.main(["warmup", "--arch", "sm_90a", "--model", str(tmp_path)]) == code
    out = capsys.readouterr()
    assert said in out.out + out.err
    if code == 0:
        assert {p.q_dtype for p, _ in compiled[0][0]} == {"float16"}


def test_calls_on_a_device_find_their_kernels(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of shapes that the cuda backend is chosen for, compiled side by side before."""
    from attnhub import device, runtime

    monkeypatch.setattr(device, "describe", lambda where: HOPPER)
    monkeypatch.setattr(runtime, "decide", lambda problem, policy: SimpleNamespace(chosen="cuda" if problem.seqlen_q > 1 else "sdpa"))
    parser: Callable[[str], Any] = cli._parser
    args = parser("warmup").parse_args(["warmup", "--seqlen-q", "1,64,4096", "--causal", "--jobs", "1", "--append", "tokens"])
    command.compile_chosen(args, torch.device("cuda"))
    assert [p.seqlen_q for p, _ in compiled[0][0]] == [64, 4096] and compiled[0][2] == 1
    monkeypatch.setattr(runtime, "decide", lambda problem, policy: SimpleNamespace(chosen="cuda"))
    command.compile_chosen(args, torch.device("cuda"))
    assert [(p.seqlen_q, append) for p, append in compiled[1][0]] == [(1, ""), (1, "tokens"), (64, ""), (4096, "")]
    monkeypatch.setattr(device, "describe", lambda where: DeviceInfo("cuda", "amd", (9, 4, 2)))
    command.compile_chosen(args, torch.device("cuda"))
    assert len(compiled) == 2
