"""Compiling ahead of a benchmark, and result files that grow case by case."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import Any

import pytest

from attnhub import cli
from attnhub.bench import measure, precompile, results, workers
from attnhub.bench.cases import Case

_ECHO = "import sys, json\nfor line in sys.stdin:\n    case = json.loads(line)['case']\n    {}\n    print('{{}}', flush=True)"


def test_compiling_ahead_survives_what_goes_wrong() -> None:
    cases = [Case(n, mode=mode) for n in (16, 32, 64) for mode in ("forward", "backward")]
    ticks: list[str] = []

    def run(text: str, limit: float = 0.0) -> dict[str, str]:
        return precompile.run(cases, ("flex", "sdpa"), None, 2, ticks.append, limit, (sys.executable, "-c", _ECHO.format(text)))

    assert run("pass") == {} and len(ticks) == 6
    # A process that dies (out of memory, say) takes one case with it.
    assert run("sys.exit(1) if case['seqlen_q'] == 32 else 0") == {str(c): "no answer" for c in cases if c.seqlen_q == 32}
    started = time.monotonic()
    assert len(run("import time; time.sleep(60)", 0.5)) == 6 and time.monotonic() - started < 20
    # Graph or not, the kernels are the same.
    ticks.clear()
    precompile.run([Case(16), Case(16, graph=True)], (), (), 2, ticks.append, 0.0, (sys.executable, "-c", _ECHO.format("pass")))
    assert len(ticks) == 1


def test_answers_come_in_the_order_of_the_questions() -> None:
    command = (sys.executable, "-c", "import sys, json, time\nfor line in sys.stdin:\n    n = json.loads(line)\n    time.sleep(0.2 / n)\n    print(n * 2, flush=True)")
    assert workers.ask(command, [1, 2, 3, 4], 3) == [2, 4, 6, 8]
    assert workers.ask(command, [], 3) == [] and workers.jobs() >= 1


def test_a_compiling_process_runs_its_peers() -> None:
    ticks: list[str] = []
    assert precompile.run([Case(16), Case(16, mode="backward")], ("sdpa",), ("auto",), 1, ticks.append) == {} and len(ticks) == 2
    assert precompile._compile({"case": Case(16, head_dim=8).to_json(), "peers": ["v1", "naive"], "backends": []}) == {}
    assert "KeyError" in precompile._compile({"case": Case(16).to_json(), "peers": ["nobody"], "backends": []})[""]
    assert precompile.estimate([Case(16)], ("flex",), None, measure.Settings()) > 0


def test_results_are_kept_case_by_case(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    command = ["bench", "cpu", "--preset", "quick", "--peers", "sdpa", "--backends", "sdpa", "--rounds", "1", "--seconds", "0.0001", "--output", str(file)]
    assert cli.main(["bench", "gpu", "--preset", "decode", "--only", "page 16 graph", "--list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cases"]) == 6
    fp32 = [*command, "--only", "forward fp32", "--only", "backward"]
    assert cli.main([*fp32, "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed["cases"]) == 3 and not file.exists() and listed["seconds"] > 0
    real, ran = measure.run_case, []

    def run_case(case: Case, *rest: Any, **more: Any) -> Any:
        ran.append(str(case))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(case, *rest, **more)

    monkeypatch.setattr(results, "commit", lambda: "c0ffee")
    monkeypatch.setattr(measure, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        cli.main(fp32)
    assert {str(Case.of(row)) for row in results.load(file)["rows"]} == {ran[0]}
    assert cli.main([*fp32, "--resume"]) == 0
    assert ran == [listed["cases"][0], listed["cases"][1], listed["cases"][1], listed["cases"][2]]
    assert list(dict.fromkeys(str(Case.of(row)) for row in results.load(file)["rows"])) == listed["cases"]
    assert cli.main([*fp32, "--resume", "--rounds", "2"]) == 2 and "another settings" in capsys.readouterr().err
    # Two checkouts with changes on the same commit need not be the same code.
    monkeypatch.setattr(results, "commit", lambda: "c0ffee" + results.CHANGED)
    assert cli.main(fp32) == 0
    assert cli.main([*fp32, "--resume"]) == 2 and "changes on top" in capsys.readouterr().err
    # What measured nothing replaces nothing.
    held = file.read_bytes()
    assert cli.main([*fp32, "--limit", "1e-9"]) == 0 and file.read_bytes() == held
    other = tmp_path / "y.json"
    elsewhere = [str(other) if word == str(file) else word for word in fp32]
    assert cli.main([*elsewhere, "--limit", "1e-9"]) == 0 and results.load(other)["unmeasured"] == listed["cases"]
    assert cli.main([*command, "--only", "nothing"]) == 2
