"""The suite ``models`` of the benchmarks: shapes, shared weights, what a call is checked for, files, targets and pages. Tiny models."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from attnhub import cli
from attnhub.bench import cases, measure, model_runs, models, pages, plot, results, targets
from attnhub.bench.models import ModelCase

transformers = pytest.importorskip("transformers")
zoo = pytest.importorskip("attnhub.bench.zoo")
tasks = pytest.importorskip("attnhub.bench.tasks")

CPU = torch.device("cpu")
ONCE = measure.Settings(1, 1e-4)
DECODER = "llama-8-layers"
TASKS = [
    ModelCase("bert-base", "encode", 16), ModelCase(DECODER, "prefill", 16, 2), ModelCase(DECODER, "decode", 16, 2, cache="dynamic"),
    ModelCase(DECODER, "decode", 16, 2, cache="static"), ModelCase(DECODER, "training", 16), ModelCase("llama-3-1b", "training", 16, dtype="bfloat16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Any:
    return zoo.Zoo(CPU, models.TINY)


def test_presets_hold_what_they_must() -> None:
    cpu, gpu = ([str(case) for case in models.PRESETS[name].cases] for name in ("cpu", "gpu"))
    assert [f"minilm embed fp32 B{b} S{n}" in cpu for b in (1, 32) for n in (32, 128, 256)] == [True] * 6
    assert {"bert-base encode fp32 B1 S512", "bert-base encode fp32 B1 S2048", "llama-8-layers prefill fp32 B1 S2048"} < set(cpu)
    assert "llama-8-layers decode fp32 B1 S2048 dynamic cache" in cpu and "llama-8-layers training fp32 B1 S4096" in cpu
    assert "llama-3-8b prefill bf16 B1 S8192" in gpu and "llama-3-1b training bf16 B1 S4096" in gpu
    assert [f"llama-3-8b decode bf16 B{b} S2048 static cache" in gpu for b in (1, 16, 64)] == [True] * 3
    assert models.HEADROOM % 128 == 0 and models.config_of("llama-3-8b", "full")[1]["num_hidden_layers"] == 32
    case = ModelCase("m", "decode", 2048, 16)
    assert case.units() == 16 and ModelCase("m", "prefill", 64, 2).units() == 128 and ModelCase("m", "embed", 64, 2).units() == 2
    assert ModelCase.of({**case.to_json(), "peer": "x"}) == case and models.case_of("models", case.to_json()) == case
    assert isinstance(models.case_of("cpu", cases.Case(8).to_json()), cases.Case)
    for name, preset in models.PRESETS.items():
        assert not [t.name for t in targets.MODELS[name] if not any(t.holds(c) for c in preset.cases)]


@pytest.mark.parametrize("model", [DECODER, "bert-base"])
def test_a_model_is_what_transformers_makes_of_its_weights(model: str) -> None:
    """Nothing is left as it was allocated: buffers are computed, and every parameter is set."""
    made = zoo.build(model, CPU, torch.float32, models.TINY)
    ordinary = type(made)(made.config, **({"add_pooling_layer": False} if model == "bert-base" else {})).eval()
    ordinary.load_state_dict(made.state_dict())
    assert [name for name, _ in ordinary.named_buffers()] == [name for name, _ in made.named_buffers()]
    assert all(torch.equal(a, b) for a, b in zip(ordinary.buffers(), made.buffers()))
    ids = zoo.token_ids((2, 12), 256, CPU)
    with torch.no_grad():
        assert torch.equal(made(ids)[0], ordinary(ids)[0])
    for name, parameter in made.named_parameters():
        values = parameter.detach()
        assert abs(float(values.std()) * values.shape[-1] ** 0.5 - 1) < 0.2 if values.ndim > 1 else values.unique().tolist() in ([0.0], [1.0]), name
    assert torch.equal(next(zoo.build(model, CPU, torch.float32, models.TINY).parameters()), next(made.parameters()))
    half = zoo.build(model, CPU, torch.bfloat16, models.TINY)
    assert half.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(half.buffers(), made.buffers())), "frequencies of rotary embeddings stay fp32"


def test_peers_share_weights_and_nothing_else(tiny: Any) -> None:
    lent = {name: tiny.lend(TASKS[1], name) for name in ("sdpa", "eager", "attnhub")}
    pointers = {name: [p.data_ptr() for p in one.model.parameters()] for name, one in lent.items()}
    assert pointers["sdpa"] == pointers["eager"] == pointers["attnhub"]
    kinds = {name: one.model.model.layers[0].self_attn.config._attn_implementation for name, one in lent.items()}
    assert kinds == {"sdpa": "sdpa", "eager": "eager", "attnhub": "attnhub"}
    assert tiny.lend(TASKS[1], "sdpa") is lent["sdpa"]
    tiny.lend(TASKS[0], "sdpa")
    assert tiny.lend(TASKS[1], "sdpa") is not lent["sdpa"], "one model at a time"


@pytest.mark.parametrize("case", TASKS, ids=str)
def test_every_task_is_checked_and_timed(case: ModelCase, tiny: Any) -> None:
    ticks: list[str] = []
    rows = {row["peer"]: row for row in model_runs.run_case(case, tiny, ("sdpa", "eager", "flex", "attnhub", "attnhub reference"), ONCE, ticks.append)}
    assert rows.pop("flex")["skipped"] and set(rows) == {"sdpa", "eager", "attnhub", "attnhub reference"} and len(ticks) == 8
    for row in rows.values():
        assert row["rate"] == pytest.approx(case.units() / row["seconds"]) and row["unit"] == models.UNITS[case.task], row
        assert row["difference"] < (0.1 if case.dtype == "bfloat16" else 1e-5) and row["speedup"] > 0
    assert rows["attnhub reference"]["backend"] == "reference" and rows["attnhub"]["backend"] and "backend" not in rows["sdpa"]
    assert all(p.grad is None for p in tiny._plain.parameters())


@pytest.mark.parametrize("case", [TASKS[0], TASKS[1], TASKS[3], TASKS[4]], ids=str)
def test_wrong_attention_is_seen(case: ModelCase, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnhub.integrations.huggingface import attention as route

    real = route.attention
    monkeypatch.setattr(route, "attention", lambda q, *rest, **more: real(1.5 * q, *rest, **more))
    row = model_runs.run_case(case, tiny, ("sdpa", "attnhub"), ONCE)[1]
    assert row["difference"] > 1e-2


def test_a_model_that_attnhub_does_not_serve_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = zoo.Zoo(CPU, models.TINY)
    lent = fresh.lend(TASKS[0], "attnhub")
    lent.model.set_attn_implementation("sdpa")
    for module in lent.model.modules():
        if "config" in module.__dict__:
            module.config = fresh.lend(TASKS[0], "sdpa").model.config
    row = model_runs.run_case(TASKS[0], fresh, ("sdpa", "attnhub"), ONCE)[1]
    assert "served 0 calls of 2" in row["skipped"]
    step = tasks.Encode.step
    monkeypatch.setattr(tasks.Encode, "step", lambda self, model: lambda: step(self, model)() * float("nan"))
    assert "not finite" in model_runs.run_case(TASKS[0], fresh, ("sdpa",), ONCE)[0]["skipped"]


def test_who_fails_leaves_nothing_behind(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that ends in the middle of its backward, for want of memory say, has made gradients that all peers would hold."""

    def broken(self: Any, model: Any) -> Any:
        model(input_ids=self.ids(8), labels=self.ids(8)).loss.backward()
        raise torch.OutOfMemoryError("no room\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(tasks.Training, "check", broken)
        (row,) = model_runs.run_case(TASKS[4], tiny, ("sdpa",), ONCE)
    assert row["skipped"] == "OutOfMemoryError: no room" and all(p.grad is None for p in tiny._plain.parameters())


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_decode_steps_begin_again(kind: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ModelCase(DECODER, "decode", 16, 2, cache=kind)
    model = tiny.lend(case, "attnhub").model
    monkeypatch.setattr(tasks, "HEADROOM", 8)
    task = tasks.Decode(case, model, CPU)
    first, step = task.check(model), task.step(model)
    lengths = [int(task.cache.get_seq_length())]
    for _ in range(9):
        step()
        lengths.append(int(task.cache.get_seq_length()))
    assert lengths == [*range(17, 25), 17, 18]
    assert torch.equal(task.check(model), first)
    assert all(k.shape[2] == 24 if kind == "static" else k.shape[2] == 16 for k, _ in task.before)


_STEPS = """
import sys, torch
from attnhub.bench import measure

def step():
    held = [torch.ones(1 << 20) for _ in range(5)]
    held.append(held[0] + held[1])

for n in range(4):
    if sys.argv[1] == "own":
        with measure.own_mappings():
            print(measure.extra_memory(step, torch.device("cpu"))[0])
    else:
        print(measure.extra_memory(step, torch.device("cpu"))[0])
    holes = [torch.ones(1 << (14 + n + k % 7)) for k in range(40)]
    del holes[::2]
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_does_not_depend_on_what_lies_free() -> None:
    """A step that needs 24 MiB at its peak, after others that left holes of all sizes; in a process of its own, as models are measured. What is
    first in a process costs more than itself.
    """
    done = subprocess.run([sys.executable, "-c", _STEPS, "own"], capture_output=True, text=True, check=True)
    found = [float(line) for line in done.stdout.split()[1:]]
    assert len(found) == 3 and all(abs(mib - 24) < 1 for mib in found), found


# -- MiniLM --------------------------------------------------------------------------------------------------------------


def test_minilm_embeds_rows_of_every_length(tiny: Any) -> None:
    from attnhub.cli.demo import model_folder

    try:
        model_folder()
    except cli.CommandError as error:
        pytest.skip(str(error))
    case = ModelCase("minilm", "embed", 16, 3)
    task = tasks.Embed(case, tiny.lend(case, "sdpa").model, CPU)
    assert task.batch["attention_mask"].sum(1).tolist() == [16, 16, 16] and task.padded["attention_mask"].sum(1).tolist() == [16, 12, 8]
    assert len({tuple(row) for row in task.batch["input_ids"].tolist()}) == 3
    rows = model_runs.run_case(case, tiny, ("sdpa", "attnhub"), ONCE)
    assert rows[1]["difference"] <= 1e-5 and rows[1]["attention_modules"] == 6
    norms = task.check(tiny.lend(case, "sdpa").model).norm(dim=-1)
    assert norms.shape == (6,) and torch.allclose(norms, torch.ones(6))


# -- files, targets, pages -----------------------------------------------------------------------------------------------


def _row(case: ModelCase, peer: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        **case.to_json(), "peer": peer, "seconds": seconds, "speedup": None, "rate": 1.0, "unit": models.UNITS[case.task], "extra_mib": 10.0, **more
    }  # fmt: skip


def _document(preset: str, rows: list[dict[str, Any]], kind: str = "cpu") -> dict[str, Any]:
    environment = {"device": {"type": kind, "name": "x", "isa": []}, "threads": 1, "torch": "2", "transformers": "5"}
    return {"schema": results.SCHEMA, "suite": "models", "preset": preset, "environment": environment, "commit": None, "settings": {}, "rows": rows}


def _both(cpu: bool, ours: float, memory: float = 10.0, **more: Any) -> list[dict[str, Any]]:
    preset = models.PRESETS["cpu" if cpu else "gpu"]
    return [row for c in preset.cases for row in (_row(c, "sdpa", 1.0), _row(c, "attnhub", 1 / ours, extra_mib=memory, **more))]


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        (_both(True, 1.0, difference=1e-5), set()),
        (_both(True, 0.98, difference=1e-7), {"12-layer encoder at 2048 over sdpa", "prefill over sdpa"}),
        (_both(True, 1.0, difference=1.1e-5), {"embeddings' largest difference", "other outputs' largest difference"}),
        (_both(True, 1.0, 10.01, difference=0.0), {"training step's peak memory of sdpa's"}),
        (_both(True, 0.96, difference=0.0), {t.name for t in targets.MODELS["cpu"] if "over sdpa" in t.name}),
    ],
)
def test_gates(rows: list[dict[str, Any]], missed: set[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _document("cpu", rows)
    assert {v.target.name for v in targets.judge(result) if v.word == targets.MISSED} == missed and not targets.unjudged(result)
    file = tmp_path / "models-cpu.json"
    file.write_text(json.dumps(result))
    assert cli.main(["bench", "judge", "--input", str(file)]) == bool(missed)
    assert "over sdpa" in capsys.readouterr().out


def test_one_bad_case_misses_a_gate_and_a_missing_one_is_said() -> None:
    rows = _both(True, 2.0, difference=0.0)
    next(row for row in rows if row["peer"] == "attnhub" and row["task"] == "embed")["seconds"] = 1.1
    (verdict,) = (v for v in targets.judge(_document("cpu", rows)) if v.word == targets.MISSED)
    assert verdict.target.name == "sentences/s over sdpa" and verdict.worst_case == "minilm embed fp32 B1 S32"
    assert any("not measured" in why for why in targets.unjudged(_document("cpu", rows[2:])))
    without = [row for row in rows if row["peer"] == "attnhub" or row["task"] != "training"]
    assert any("nothing to compare" in why for why in targets.unjudged(_document("cpu", without)))
    on_gpu = _document("gpu", _both(False, 0.5), "cuda")
    words = {v.target.name: v.word for v in targets.judge(on_gpu)}
    assert words["prefill over sdpa"] == targets.BELOW and words["prefill over flex"] == targets.ABSENT and not targets.unjudged(on_gpu)
    with pytest.raises(ValueError, match="presets cpu, gpu"):
        targets.judge(_document("cpu-tiny", []))


def test_the_page_shows_models(tmp_path: pathlib.Path) -> None:
    rows = [*_both(True, 1.0, difference=1e-6, backend="cpu"), {**TASKS[0].to_json(), "peer": "flex", "skipped": "why"}]
    folder = tmp_path / results.FOLDER / "x"
    folder.mkdir(parents=True)
    (folder / "models-cpu.json").write_text(json.dumps(_document("cpu", rows)))
    (folder / "models-gpu.json").write_text(json.dumps(_document("gpu", _both(False, 1.0), "cuda")))
    text = pages.page(tmp_path)
    assert "## x: models cpu" in text and "| minilm embed fp32 B1 S32 | attnhub |" in text and "| decode over flex |" in text
    assert "Not timed: bert-base encode fp32 B1 S16: flex (why)." in text
    with pytest.raises(ValueError, match="models"):
        plot.draw(_document("cpu", rows), tmp_path / "x.png")


def test_the_command(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    command = ["bench", "models", "--scale", "tiny", "--only", "training", "--only", "encode", "--output", str(file)]
    assert cli.main(["bench", "models", "--preset", "gpu", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peers"] == ["sdpa", "eager", "flex", "attnhub"]
    real, ran = model_runs.run_case, []

    def run_case(case: ModelCase, *rest: Any) -> Any:
        ran.append(str(case))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(results, "commit", lambda: "c0ffee")
    monkeypatch.setattr(model_runs, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        cli.main(command)
    assert {str(ModelCase.of(row)) for row in results.load(file)["rows"]} == {ran[0]}, "written after every case"
    assert cli.main([*command, "--resume"]) == 0 and ran == [ran[0], ran[1], ran[1]]
    made = results.load(file)
    assert made["preset"] == "cpu-tiny" and len(made["rows"]) == 4 and all("seconds" in row for row in made["rows"])
    assert results.target(f"{tmp_path}/", made).name == "models-cpu-tiny.json"
    assert cli.main([*command, "--limit", "1e-9"]) == 0 and results.load(file)["rows"] == made["rows"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models", "--preset", "grid"], "none of the suite models"), (["cpu", "--preset", "gpu"], "one of the suite models"),
        (["models", "--peers", "naive"], "models know sdpa"), (["models", "--only", "nothing"], "leaves no case"),
        (["models", "--lengths", "8"], "of single calls"), (["models", "--rounds", "0"], "at least 1"),
        (["models", "--device", "cuda"], "finds no CUDA"),
    ],
)  # fmt: skip
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", *words]) == 2 and message in capsys.readouterr().err
