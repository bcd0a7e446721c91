"""The command line: every command, its JSON, its errors; and what new-backend writes really works."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

import attnhub
from attnhub import cli
from attnhub.cli import files
from attnhub.cli.devices import CLASSES
from attnhub.cli.new_backend import skeleton
from attnhub.decision import Policy, explain_command
from attnhub.problem import DeviceInfo, Feature, Problem
from attnhub.registry import registry
from attnhub.selector import Candidate, select

ROOT = pathlib.Path(attnhub.__file__).resolve().parent.parent


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli.main(args)
    return code, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, Any]:
    code, out = run(capsys, *args, "--json")
    return code, json.loads(out)


def python(args: Sequence[str], path: Sequence[str | os.PathLike[str]] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Another interpreter that finds this attnhub, wherever it comes from."""
    root = pathlib.Path(attnhub.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(root)]), **environment}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=280, check=False)


# -- doctor --------------------------------------------------------------------------------------------------------------


def test_doctor_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_json(capsys, "doctor")
    assert code == 0 and report["problems"] == []
    assert set(report["backends"]) == set(registry.names())
    assert report["backends"]["sdpa"]["available"] and report["torch"]["version"]
    code, out = run(capsys, "doctor")
    assert code == 0 and all(name in out for name in registry.names())


def test_doctor_works_without_torch(tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    done = python(["-m", "attnhub", "doctor", "--json"], [tmp_path])
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert "libtorch_cpu.so" in report["torch"]["error"]
    assert any("torch does not import" in problem for problem in report["problems"])
    assert not report["backends"]["sdpa"]["available"]
    assert "libtorch_cpu.so" in python(["-m", "attnhub", "doctor"], [tmp_path]).stdout


def test_doctor_works_without_rich_and_with_a_broken_package(tmp_path: pathlib.Path) -> None:
    for name in ("rich", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this package is broken')\n")
    done = python(["-m", "attnhub", "doctor"], [tmp_path])
    assert done.returncode == 0, done.stderr
    assert "broken: importing onnxruntime raised RuntimeError: this package is broken" in " ".join(done.stdout.split())


def test_doctor_names_a_wrong_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ATTNHUB_BACKEND", "auto,cpu")
    code, report = run_json(capsys, "doctor")
    assert code == 1 and any("ATTNHUB_BACKEND" in problem for problem in report["problems"])


def test_doctor_notes_what_is_set_in_vain(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "doctor")[1]["notes"] == []
    (tmp_path / "file").write_text("")
    for name, value in (("BACKENDS", "cpu"), ("DISABLE", "cpuu"), ("BACKEND", "typo,auto"), ("TUNE", "/nowhere"), ("CACHE_DIR", str(tmp_path / "file"))):
        monkeypatch.setenv(f"ATTNHUB_{name}", value)
    code, report = run_json(capsys, "doctor")
    assert code == 0 and not report["problems"]
    found = "\n".join(report["notes"])
    for words in ("ATTNHUB_BACKENDS is set and nothing reads it; ATTNHUB_BACKEND is", "ATTNHUB_DISABLE names cpuu", "ATTNHUB_BACKEND names typo", "'/nowhere'", "CACHE_DIR="):
        assert words in found
    assert "NOTE: ATTNHUB_DISABLE names cpuu" in " ".join(run(capsys, "doctor")[1].split())


def test_a_wrong_log_level_is_told_and_no_traceback(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_LOG", "loud")
    for command in ("doctor", "explain", "warmup"):
        done = python(["-m", "attnhub", command], [tmp_path])
        assert done.returncode == (1 if command == "doctor" else 2) and "ATTNHUB_LOG='loud': allowed are debug" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_cache_folder_that_cannot_be_made(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNHUB_CACHE_DIR", str(tmp_path / "file"))
    done = python(["-m", "attnhub", "warmup", "--arch", "sm_80", "--head-dim", "64", "--seqlen-q", "64"], [tmp_path])
    assert done.returncode == 2 and f"ATTNHUB_CACHE_DIR='{tmp_path / 'file'}' cannot be made" in done.stderr and "Traceback" not in done.stderr


# -- explain -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", sorted(CLASSES))
def test_explain_knows_devices_that_are_not_here(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, decision = run_json(capsys, "explain", "--device", device, "--dtype", "fp16", "--kv-heads", "2", "--features", "causal_bottom_right")
    assert code == 0 and decision["device_assumed"]
    assert set(decision["verdicts"]) == set(registry.names())
    codes = {r["code"] for v in decision["verdicts"].values() for r in v["reasons"]}
    assert not codes & {"no_device", "not_installed"}, "what this machine lacks says nothing about the device that was asked about"
    assert "gqa" in decision["problem"]["features"]


def test_explain_gives_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    code, decision = run_json(capsys, "explain", "--device", "t4", "--dtype", "fp64", "--head-dim", "1000", "--features", "dropout", "--backend", "onnx")
    assert code == 1 and decision["chosen"] is None
    codes = {r["code"] for r in decision["verdicts"]["onnx"]["reasons"]}
    assert {"device_type", "head_dim", "no_dropout"} <= codes
    code, out = run(capsys, "explain", "--device", "t4", "--dtype", "fp64", "--features", "dropout", "--backend", "onnx")
    assert "no_dropout" in out and "chosen: none" in out


@pytest.mark.parametrize("features", [(), (Feature.CAUSAL_BOTTOM_RIGHT, Feature.SOFTCAP), (Feature.PAGED, Feature.SEQLENS)])
@pytest.mark.parametrize("backward", [False, True])
def test_the_command_in_an_error_gives_the_same_decision(features: Sequence[Feature], backward: bool, capsys: pytest.CaptureFixture[str]) -> None:
    found = {*features, Feature.GQA, Feature.DV_DIFFERS} | ({Feature.LSE} if backward else set())
    problem = Problem(
        DeviceInfo("cpu"), "float32", "float32", 64, 32, 8, 2, 4, 1024, 2048, frozenset(found), page_size=16 if Feature.PAGED in found else 0, need_backward=backward,
    )  # fmt: skip
    command = explain_command(problem, Policy(("sdpa", "auto"), "argument")).split()
    assert command[:2] == ["attnhub", "explain"]
    _, decision = run_json(capsys, *command[1:])
    want = problem.to_json()
    assert {k: v for k, v in decision["problem"].items() if k != "device"} == {k: v for k, v in want.items() if k != "device"}
    assert decision["policy"]["names"] == ["sdpa", "auto"] and decision["chosen"] == "sdpa"
    assert decision["command"].split() == command


def test_explain_chooses_as_the_selector_does(capsys: pytest.CaptureFixture[str]) -> None:
    _, decision = run_json(capsys, "explain", "--device", "h200", "--dtype", "bf16", "--backward")
    problem = Problem(CLASSES["h200"], "bfloat16", "bfloat16", 64, 64, 8, 8, 1, 1024, 1024, frozenset({Feature.LSE}), need_backward=True)
    want = select(problem, Policy(), {name: Candidate(c.backend) for name, c in registry.candidates().items()})
    assert (decision["chosen"], decision["backward"], decision["order"]) == (want.chosen, want.backward, list(want.order))


def test_explain_obeys_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ATTNHUB_DISABLE", "sdpa")
    _, decision = run_json(capsys, "explain")
    assert decision["verdicts"]["sdpa"]["reasons"][0]["code"] == "disabled"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain", "--device", "tpu"], "neither a device"),
        (["explain", "--dtype", "int8"], "allowed are float16"),
        (["explain", "--features", "colour"], "unknown colour; known are gqa"),
        (["explain", "--heads", "8", "--kv-heads", "3"], "not a multiple"),
        (["explain", "--backend", "auto,cpu"], "may only end the list"),
        (["export", "/nowhere", "x.onnx"], "neither a folder with a config.json nor module:attribute"),
        (["new-backend", "Bad-Name"], "lower-case letters"),
        (["new-backend", "sdpa"], "is taken by attnhub"),
        (["bench", "cpu", "--preset", "quick", "--peers", "nobody"], "unknown nobody; known are naive"),
        (["bench", "cpu", "--preset", "quick", "--dtypes", "int8"], "allowed are float16"),
        (["bench", "cpu", "--preset", "quick", "--lengths", "7"], "leave no case"),
        (["bench", "plot"], "--input FILE"),
        (["docs", "--root", "/"], "not inside an attnhub checkout"),
    ],
)  # fmt: skip
def test_wrong_usage_names_the_fix(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err


def test_a_negative_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["explain", "--heads", "-1"])
    assert done.value.code == 2 and "--heads: -1 is negative" in capsys.readouterr().err


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as done:
            cli.main([command, "--help"])
        assert done.value.code == 0
        assert "--json" in capsys.readouterr().out


# -- matrix, export, bench, demo -----------------------------------------------------------------------------------------


def test_matrix_says_what_is_declared(capsys: pytest.CaptureFixture[str]) -> None:
    _, declared = run_json(capsys, "matrix")
    for name, candidate in registry.candidates().items():
        assert candidate.backend is not None
        assert declared[name]["features"] == sorted(f.value for f in candidate.backend.capability.features)


@pytest.mark.parametrize(("config", "words"), [("{", "not a valid JSON"), ('{"model_type": "foo"}', "`foo`"), ('{"model_type": "llama"}', "no file named")])
def test_export_of_a_folder_that_does_not_load(config: str, words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(config)
    assert cli.main(["export", str(tmp_path), str(tmp_path / "x.onnx")]) == 2
    error = capsys.readouterr().err
    assert "transformers does not load it" in error and words in error


@pytest.mark.parametrize("args", [["explain", "--heads", "abc"], ["warmup", "--seqlen-q", "1,abc"], ["tune", "--head-dims", "64,abc"]], ids=" ".join)
def test_numbers_that_are_none_are_told(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2 and f"argument {args[1]}: 'abc' is no whole number" in capsys.readouterr().err


def test_export_of_a_function(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "exported_module.py").write_text("import attnhub\ndef attend(q, k, v):\n    return attnhub.attention(q, k, v, attnhub.Causal())\n")
    monkeypatch.chdir(tmp_path)
    code, report = run_json(capsys, "export", "exported_module:attend", "out.onnx", "--inputs", "1x4x8x16,1x2x8x16,1x2x8x16")
    assert code == 0 and report["nodes"] == 1 and report["body_difference"] < 1e-5
    assert (tmp_path / "out.onnx").is_file()


def test_bench_writes_a_result_file_and_a_picture(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "cpu", "--preset", "quick", "--seconds", "0.001", "--rounds", "2", "--output", f"{tmp_path}/", "--backends", "auto,sdpa,triton"]
    code, result = run_json(capsys, *args)
    assert code == 0
    (path,) = tmp_path.glob("*/cpu-quick.json")
    assert json.loads(path.read_text()) == result
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    timed = [row for row in result["rows"] if "skipped" not in row]
    assert {"naive", "F.sdpa", "attnhub", "attnhub sdpa"} <= {row["peer"] for row in timed}
    for row in timed:
        assert row["seconds"] > 0 and row["max_error"] < 0.05 and len(row["seconds_rounds"]) == 2
    assert all("device_type" in row["skipped"] for row in result["rows"] if row["peer"] == "attnhub triton")
    assert result["environment"]["device"]["type"] == "cpu" and result["schema"] == "attnhub.bench/1"
    assert cli.main(["bench", "plot", "--input", str(path), "--plot", str(tmp_path / "again.png")]) == 0


def test_bench_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error column is measured, not assumed."""
    import torch

    from attnhub.bench import measure, peers
    from attnhub.bench.cases import Case

    case = Case(32, causal=True)
    tensors = peers.inputs(case, torch.device("cpu"))
    wrong = peers.Peer("wrong", lambda q, k, v: 1.5 * peers.naive(q, k, v, True))
    (row,) = measure.run_case(case, tensors, [wrong], measure.Settings(1, 1e-4))
    assert row["max_error"] > 0.1
    broken = peers.Peer("broken", lambda q, k, v: q @ v)
    (row,) = measure.run_case(case, tensors, [broken], measure.Settings(1, 1e-4))
    assert "RuntimeError" in row["skipped"]


def test_bench_flops_and_presets() -> None:
    from attnhub.bench.cases import Case
    from attnhub.bench.presets import PRESETS

    assert Case(8, heads=2, head_dim=4).flops() == 4 * 2 * 8 * 8 * 4
    assert Case(8, heads=2, head_dim=4, causal=True, mode="backward").flops() == 4 * 2 * 8 * 8 * 4 // 2 * 5 // 2
    assert Case(1, 64, heads=8, kv_heads=2, head_dim=16, dtype="bfloat16").kv_bytes() == 2 * 2 * 64 * 16 * 2
    for preset in PRESETS.values():
        for device in ("cpu", "cuda"):
            cases = preset.make(device)
            assert cases and len(set(cases)) == len(cases)


def test_bench_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run_json(capsys, "bench", "overhead", "--device", "cpu", "--seconds", "0.001")
    assert code == 0
    assert {(row["mode"], row["peer"]) for row in result["rows"]} >= {("no grad", "attnhub auto"), ("grad", "attnhub sdpa"), ("no grad", "F.sdpa")}
    assert all(row["ratio"] == 1 for row in result["rows"] if row["peer"] == "F.sdpa")


def test_demo_holds_and_asks_no_network(tmp_path: pathlib.Path) -> None:
    """The whole of `make demo`: a real model, a Llama, an ONNX file."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*a, **k):\n    print('NETWORK', a, flush=True)\n    raise OSError('no network here')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
    )
    done = python(["-m", "attnhub", "demo", "--rounds", "1", "--json"], [tmp_path], OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert len(result["checks"]) >= 12 and all(check["holds"] for check in result["checks"])


def test_demo_fails_when_attention_is_wrong() -> None:
    """A check that cannot fail shows nothing: with every score scaled 1.5 times the demo must say so and exit with 1."""
    broken = (
        "import sys, attnhub.arguments as arguments\n"
        "whole = arguments.normalise\n"
        "def scaled(*a, **k):\n    call = whole(*a, **k)\n    call.softmax_scale *= 1.5\n    return call\n"
        "arguments.normalise = scaled\n"
        "from attnhub.cli import main\n"
        "sys.exit(main(['demo', '--rounds', '1', '--json']))\n"
    )
    done = python(["-c", broken], OMP_NUM_THREADS="2")
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [check["claim"] for check in json.loads(done.stdout)["checks"] if not check["holds"]]
    assert any("embeddings agree" in claim for claim in failed) and any("tokens equal" in claim for claim in failed)


# -- new-backend ---------------------------------------------------------------------------------------------------------


def test_the_example_is_what_new_backend_writes() -> None:
    example = ROOT / "examples" / "toy-backend"
    if not example.is_dir():
        pytest.skip("an installed wheel has no examples")
    on_disk = {p.relative_to(example).as_posix() for p in example.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".pyc"}
    written = skeleton("toy")
    assert on_disk == set(written)
    for path, text in written.items():
        assert (example / path).read_text(encoding="utf-8") == text, f"{path}: run `attnhub new-backend toy` again"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """(source folder, folder that it is installed in) of a distribution made by new-backend, installed by pip without a network."""
    folder = tmp_path_factory.mktemp("toy")
    assert cli.main(["new-backend", "toy", "--output", str(folder / "source")]) == 0
    command = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "source", folder / "site"


def test_a_new_backend_passes_conformance(toy: tuple[pathlib.Path, pathlib.Path]) -> None:
    source, site = toy
    done = python(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(source / "tests")], [site], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_a_new_backend_is_found_and_explained(toy: tuple[pathlib.Path, pathlib.Path]) -> None:
    done = python(["-m", "attnhub", "explain", "--backend", "toy", "--features", "causal_bottom_right", "--json"], [toy[1]])
    decision = json.loads(done.stdout)
    assert decision["chosen"] == "toy" and decision["why"] == "backend= names it"
    done = python(["-m", "attnhub", "explain", "--backend", "toy", "--features", "softcap,paged", "--json"], [toy[1]])
    assert done.returncode == 1
    assert {"no_softcap", "no_paged"} <= {r["code"] for r in json.loads(done.stdout)["verdicts"]["toy"]["reasons"]}


def test_a_broken_new_backend_fails_conformance(toy: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Scores scaled 1.5 times: the suite that the skeleton brings must see it."""
    source, site = toy
    patch = tmp_path / "conftest.py"
    patch.write_text(
        "import attnhub_toy.launcher as launcher\nwhole = launcher.attention_forward\n"
        "launcher.attention_forward = lambda q, k, v, out, scale, causal: whole(q, k, v, out, 1.5 * scale, causal)\n"
    )
    (tmp_path / "test_toy.py").write_text((source / "tests" / "test_toy.py").read_text())
    done = python(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tmp_path)], [site], OMP_NUM_THREADS="1")
    assert done.returncode == 1 and "errors as a fraction of the allowed" in done.stdout


def test_new_backend_never_writes_over_anything(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("precious")
    assert cli.main(["new-backend", "mine", "--output", str(tmp_path)]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


# -- files ---------------------------------------------------------------------------------------------------------------


def test_files_are_written_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file.json"
    files.write_json(target, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in target.parent.iterdir()] == ["file.json"]
