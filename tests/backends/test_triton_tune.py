"""Tables of tile sizes: how they are read and made, with Triton's kernels interpreted."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import pathlib
from typing import Any, Optional

import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_interpreter import INTERPRETED, compiled, interpreted, run_interpreted

import attnhub
from attnhub import cli
from attnhub.backend import PrepareError
from attnhub.backends.triton import table, tiles, tune
from attnhub.backends.triton.launcher import TritonPlan
from attnhub.backends.triton.tiles import Tiles
from attnhub.bench.cases import Case
from attnhub.problem import DeviceInfo, Feature, Problem
from attnhub.reasons import Code, Reason

CPU = torch.device("cpu")
H200 = DeviceInfo("cuda", "nvidia", (9, 0), "NVIDIA H200")


@compiled
def test_interpreted() -> None:
    """The tests below that are marked `interpreted`, in their own process."""
    run_interpreted(pathlib.Path(__file__).resolve())


def problem(head_dim: int = 128, dtype: str = "bfloat16", device: DeviceInfo = H200, **more: Any) -> Problem:
    return Problem(device, dtype, dtype, head_dim, head_dim, 4, 4, 1, 1024, 1024, **more)


def some_table(**entries: list[int]) -> dict[str, Any]:
    data = table.empty()
    for kind, chosen in entries.items():
        table.put(data, "nvidia 9.0", "forward", 2, 128, kind, {"tiles": chosen, "gain": 1.5})
    return data


# -- reading -------------------------------------------------------------------------------------------------------------


def test_the_shipped_table_is_one_and_is_shipped() -> None:
    data = table.load(table.SHIPPED)
    assert importlib.resources.files("attnhub.backends.triton").joinpath("tune.json").is_file()
    for name, device in data["devices"].items():
        assert {"device", "commit", "torch", "triton"} <= set(device["environment"]), name


def test_entries_are_found_by_class() -> None:
    data = some_table(full=[128, 64, 8, 3])
    wanted = Tiles(128, 64, 8, 3)
    assert table.find(data, "nvidia 9.0", "forward", 2, 128, "full") == wanted
    # A smaller head_dim and a mask fall back to what is there.
    assert table.find(data, "nvidia 9.0", "forward", 2, 64, "causal") == wanted
    table.put(data, "nvidia 9.0", "forward", 2, 64, "causal", {"tiles": [64, 64, 4, 2]})
    assert table.find(data, "nvidia 9.0", "forward", 2, 64, "causal") == Tiles(64, 64, 4, 2)
    # What 64 has for a mask hides nothing of 128 from who has none; and is not exact for another.
    assert table.find(data, "nvidia 9.0", "forward", 2, 32, "full") == wanted
    assert table.find(data, "nvidia 9.0", "forward", 2, 64, "causal", exact=True) == Tiles(64, 64, 4, 2)
    assert table.find(data, "nvidia 9.0", "forward", 2, 64, "full", exact=True) is None
    for other in (("nvidia 8.0", "forward", 2, 128), ("nvidia 9.0", "grad_q", 2, 128), ("nvidia 9.0", "forward", 4, 128), ("nvidia 9.0", "forward", 2, 256)):
        assert table.find(data, *other, "full") is None
    assert table.device_class(H200) == "nvidia 9.0" and table.device_class(DeviceInfo("cuda", "amd", (9, 4, 2))) == "amd 9.4.2"


def test_problems_with_a_mask_are_of_the_other_kind() -> None:
    assert table.kind(problem()) == "full" and table.kind(problem(features=frozenset({Feature.SEQLENS, Feature.GQA, Feature.LSE}))) == "full"
    for feature in (Feature.CAUSAL_BOTTOM_RIGHT, Feature.WINDOW, Feature.SOFTCAP, Feature.BIAS):
        assert table.kind(problem(features=frozenset({feature}))) == "causal"


@compiled
def test_plans_take_the_tiles_of_the_table(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = TritonPlan(problem())._tiles
    file = tmp_path / "mine.json"
    table.write(file, some_table(full=[32, 32, 2, 2], causal=[16, 32, 2, 2]))
    monkeypatch.setenv("ATTNHUB_TUNE", str(file))
    mine = TritonPlan(problem())._tiles
    assert mine["forward"] == [Tiles(32, 32, 2, 2), *shipped["forward"]] and mine["grad_q"] == shipped["grad_q"]
    assert TritonPlan(problem(features=frozenset({Feature.CAUSAL_TOP_LEFT})))._tiles["forward"][0] == Tiles(16, 32, 2, 2)
    # Another class of devices and another dtype know nothing of it.
    assert TritonPlan(problem(dtype="float32"))._tiles["forward"][0] != Tiles(32, 32, 2, 2)
    assert TritonPlan(problem(device=DeviceInfo("cuda", "nvidia", (8, 0))))._tiles["forward"][0] != Tiles(32, 32, 2, 2)
    # What does not fit is passed over, as ever: the choices behind it are the shipped ones.
    assert mine["forward"][1:] == shipped["forward"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no table"), ('{"schema": "x"}', "schema attnhub.triton.tune/1"), (json.dumps(some_table(full=[64, 64, 4])), "tiles="),
        (json.dumps(some_table(full=[48, 64, 4, 2])), "powers of two"), (json.dumps(some_table(other=[64, 64, 4, 2])), "full, causal"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_an_error(text: str, said: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was named is never silently left out."""
    file = tmp_path / "bad.json"
    file.write_text(text)
    monkeypatch.setenv("ATTNHUB_TUNE", str(file))
    with pytest.raises(ValueError, match=said):
        table.preferred({}, problem(), 2)
    monkeypatch.setenv("ATTNHUB_TUNE", str(tmp_path / "missing.json"))
    with pytest.raises(OSError, match=r"missing\.json"):
        table.preferred({}, problem(), 2)


def test_a_written_table_is_read_again(tmp_path: pathlib.Path) -> None:
    data = some_table(full=[128, 64, 8, 3], causal=[64, 64, 4, 3])
    table.write(tmp_path / "a" / "t.json", data)
    assert table.load(tmp_path / "a" / "t.json") == data and os.listdir(tmp_path / "a") == ["t.json"]
    assert '"full": { "tiles": [ 128, 64, 8, 3 ], "gain": 1.5 }' in (tmp_path / "a" / "t.json").read_text()


# -- measuring -----------------------------------------------------------------------------------------------------------


def test_candidates_begin_with_the_present_ones_and_fit() -> None:
    limit = tiles.shared_memory("nvidia", (9, 0))
    for group in tune.groups():
        item = 4 if group.dtype == "float32" else 2
        found = group.candidates(limit)
        assert found[0] == tiles.choices(group.role, group.head_dim, group.head_dim, item, limit)[0] and len(set(found)) == len(found)
        assert 1 <= len(found) <= 32 and all(tiles.estimate(group.role, t, 2 * group.head_dim, item) <= limit for t in found), group
        assert group.candidates(limit, Tiles(16, 16, 1, 1))[0] == Tiles(16, 16, 1, 1)
        for case in group.cases():
            assert case.causal == (group.kind == "causal") and case.is_decode() == (group.role == "decode")


class _Clock:
    """Stands for the time of calls: each step says how long it takes."""

    def __init__(self, seconds: dict[Tiles, float], wrong: Optional[Tiles] = None, broken: Optional[Tiles] = None) -> None:
        self.seconds, self.wrong, self.broken = seconds, wrong, broken

    def steps(self, chosen: Tiles) -> Any:
        if chosen == self.broken:
            raise PrepareError(Reason(Code.OUT_OF_RESOURCES, "too large"))
        return [lambda: chosen]

    def errors(self, results: list[Tiles]) -> list[float]:
        return [1.0 if results[0] == self.wrong else 1e-3]


def _outcome(monkeypatch: pytest.MonkeyPatch, clock: _Clock, margin: float = 0.02) -> Optional[tune.Outcome]:
    monkeypatch.setattr(tune.measure, "time_turn", lambda step, calls, device: (clock.seconds[step()], None))
    group = tune.Group("forward", "bfloat16", 128, "full")
    return tune.run(group, list(clock.seconds), CPU, tune.Settings(margin=margin), clock)  # type: ignore[arg-type]


def test_the_fastest_that_agrees_replaces_the_present(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = (Tiles(16, 16, 1, n) for n in (1, 2, 3, 4))
    found = _outcome(monkeypatch, _Clock({a: 1.0, b: 0.5, c: 0.2, d: 0.1}, wrong=c, broken=d))
    assert found is not None and found.best == b and found.present == a and set(found.refused) == {c, d}
    assert found.entry() == {"tiles": [16, 16, 1, 2], "gain": 2.0, "timed": 2} and "too large" in found.refused[d]
    # Noise replaces nothing.
    near = _outcome(monkeypatch, _Clock({a: 1.0, b: 0.99}))
    assert near is not None and near.best == a
    # Present tiles that fail give way to the best of the others.
    broken = _outcome(monkeypatch, _Clock({a: 1.0, b: 0.9, c: 0.8}, broken=a))
    assert broken is not None and broken.best == c and broken.present == b
    assert _outcome(monkeypatch, _Clock({a: 1.0}, broken=a)) is None


def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(self: tune.Group) -> list[Case]:
        if self.role == "decode":
            return [Case(1, n, heads=2, kv_heads=1, head_dim=self.head_dim, dtype=self.dtype) for n in (32, 64)]
        mode = "forward" if self.role == "forward" else "backward"
        return [Case(n, heads=2, head_dim=self.head_dim, dtype=self.dtype, causal=self.kind == "causal", mode=mode) for n in (80, 96)]

    monkeypatch.setattr(tune.Group, "cases", cases)


@interpreted
@pytest.mark.parametrize("role", tune.ROLES)
def test_trials_run_each_role_with_the_tiles_given(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch)
    group = tune.Group(role, "float32", 16, "full" if role == "decode" else "causal")
    trial = tune.Trial(group, CPU)
    for chosen in (Tiles(16, 16, 1, 1), Tiles(32, 16, 1, 1)):
        errors = trial.errors([step() for step in trial.steps(chosen)])
        assert len(errors) == 2 and max(errors) < 1e-5
    wrong = [tuple(t + 0.1 for t in step()) for step in trial.steps(chosen)]
    assert min(trial.errors(wrong)) > 0.05
    outcome = tune.run(group, [Tiles(16, 16, 1, 1), Tiles(16, 32, 1, 1)], CPU, tune.Settings(1, 1e-4), trial)
    assert outcome is not None and len(outcome.times) == 2 and not outcome.refused
    assert tune.attempt({"group": dataclasses.asdict(group), "tiles": [16, 16, 1, 1]}) == {}


@interpreted
def test_tune_writes_a_table_as_it_goes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _small(monkeypatch)
    monkeypatch.setattr(tune.Group, "candidates", lambda self, limit, measured=None, exact=False: [measured or Tiles(16, 16, 1, 1), Tiles(16, 32, 1, 1)])
    monkeypatch.setattr(tune, "compile_ahead", lambda work, jobs, tick, limit: dict(work))
    file = tmp_path / "t.json"
    table.write(file, some_table(full=[128, 64, 8, 3]))
    command = ["tune", "--head-dims", "16", "--dtypes", "float32", "--rounds", "1", "--seconds", "0.0001", "--output", str(file), "--json"]
    assert cli.main([*command, "--roles", "forward,decode"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["group"] for row in told["groups"]] == ["forward float32 head_dim 16 full", "forward float32 head_dim 16 causal", "decode float32 head_dim 16 full"]
    data = table.load(file)
    name = next(name for name in data["devices"] if name != "nvidia 9.0")
    assert set(data["devices"][name]["tiles"]) == {"forward", "decode"} and data["devices"][name]["environment"]["torch"] == torch.__version__
    assert table.find(data, "nvidia 9.0", "forward", 2, 128, "full") == Tiles(128, 64, 8, 3)
    assert cli.main([*command, "--roles", "grad_q", "--limit", "1e-9"]) == 1 and "time limit" in capsys.readouterr().out


def test_what_tune_refuses(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["--roles", "sideways"], "known are forward"), (["--dtypes", "float64"], "allowed are float16"), (["--head-dims", "512"], "1 to 256"),
        (["--rounds", "0"], "--rounds must"),
    ):  # fmt: skip
        assert cli.main(["tune", *wrong, "--output", str(tmp_path / "t.json")]) == 2 and said in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("[]")
    assert cli.main(["tune", "--output", str(tmp_path / "bad.json")]) == 2 and "no table" in capsys.readouterr().err
    if not INTERPRETED and not torch.cuda.is_available():
        assert cli.main(["tune", "--output", str(tmp_path / "t.json")]) == 2 and "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr("attnhub.cli.tune._in_checkout", lambda path: False)
    assert cli.main(["tune"]) == 2 and "--output FILE is needed" in capsys.readouterr().err
    assert cli.main(["tune", "--list", "--output", str(tmp_path / "t.json")]) == 0 and "grad_kv bfloat16 head_dim 64 causal" in capsys.readouterr().out


# -- ATTNHUB_TUNE=now ----------------------------------------------------------------------------------------------------


def test_nothing_is_measured_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "kept", lambda *_: pytest.fail("measured"))
    chosen = {"forward": [Tiles(64, 64, 4, 3)]}
    monkeypatch.delenv("ATTNHUB_TUNE", raising=False)
    assert table.preferred(chosen, problem(device=DeviceInfo("cuda", "nvidia", (12, 0))), 2) == chosen


def test_now_measures_what_is_missing_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_TUNE", "now")
    monkeypatch.setenv("ATTNHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tune, "compile_ahead", lambda work, jobs: {group: candidates[:2] for group, candidates in work.items()})
    measured: list[str] = []

    def run(group: tune.Group, candidates: list[Tiles], device: torch.device, settings: tune.Settings) -> Optional[tune.Outcome]:
        measured.append(str(group))
        if group.role == "grad_q":
            return None
        return tune.Outcome(group, candidates[1], candidates[0], {candidates[0]: 1.0, candidates[1]: 0.5}, {})

    monkeypatch.setattr(tune, "run", run)
    here = problem(device=DeviceInfo("cuda", "nvidia", (12, 0), "NVIDIA X"), need_backward=True)
    chosen = {role: [Tiles(64, 64, 4, 3)] for role in (*tiles.ROLES, "role of another kernel")}
    with table.measuring():
        assert table.preferred(chosen, here, 2) == chosen and not measured
    found = table.preferred(chosen, here, 2)
    assert measured == [f"{role} bfloat16 head_dim 128 full" for role in ("forward", "grad_kv", "grad_q")]
    assert found["forward"][0] == tune.Group("forward", "bfloat16", 128, "full").candidates(tiles.shared_memory("nvidia", (12, 0)))[1]
    assert found["decode"] == chosen["decode"]
    assert table.preferred(chosen, here, 2) == found and len(measured) == 3
    (file,) = tmp_path.glob("triton-tune-nvidia-x-*.json")
    assert table.load(file)["devices"]["nvidia 12.0"]["environment"]["triton"]
    # Other classes of problems are measured when they come.
    table.preferred(chosen, dataclasses.replace(here, seqlen_q=1, need_backward=False), 2)
    assert measured[3:] == ["decode bfloat16 head_dim 128 full"]


def test_the_cpu_is_never_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_TUNE", "now")
    monkeypatch.setattr(tune, "kept", lambda *_: pytest.fail("measured"))
    q = torch.randn(1, 1, 4, 16)
    here = attnhub.explain(q, q, q).problem
    assert table.preferred({"forward": [Tiles(16, 16, 1, 1)]}, here, 4) == {"forward": [Tiles(16, 16, 1, 1)]}
