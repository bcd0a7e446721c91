"""Result files of the benchmarks: where they lie, how they are held against targets, and the pages and pictures made of them."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest
import torch

from attnhub import cli
from attnhub.bench import pages, processor, results, targets
from attnhub.bench.cases import Case
from attnhub.bench.presets import PRESETS

CPU = torch.device("cpu")


def _environment(name: str = "AMD EPYC", isa: tuple[str, ...] = ("avx512",), **cpu: int) -> dict[str, Any]:
    return {"device": {"type": "cpu", "name": name, "isa": list(isa)}, "cpu": cpu, "threads": 1, "torch": "2"}


def _row(case: Case, peer: str, seconds: float, **figures: Any) -> dict[str, Any]:
    return {
        **case.to_json(), "peer": peer, "seconds": seconds, "speedup": None, "tflops": 1.0, "tokens_per_s": 1.0, "extra_mib": 1.0,
        "max_error": None, "backend": "cpu", **figures,
    }  # fmt: skip


def _result(rows: list[dict[str, Any]], **environment: Any) -> dict[str, Any]:
    return {
        "schema": results.SCHEMA, "suite": "cpu", "preset": "limits", "environment": _environment(**environment), "commit": None,
        "settings": {"threads": 1}, "rows": rows,
    }  # fmt: skip


def test_folders_tell_processors_apart() -> None:
    assert results.folder(_environment(family=25, model=17)) == "amd-epyc-family-25-model-17"
    assert results.folder(_environment("Intel(R) Xeon(R) Processor @ 2.00GHz", family=6, model=143)) == "intel-xeon-family-6-model-143"
    assert results.folder(_environment("AMD EPYC 9654 96-Core Processor", family=25, model=17)) == "amd-epyc-9654-96-core"
    assert results.folder({"device": {"type": "cuda", "name": "NVIDIA H200"}}) == "nvidia-h200"
    assert results.machine({"device": {"type": "cpu", "name": "AMD EPYC"}}) == "AMD EPYC"
    assert results.target("x/", _result([], family=26, model=2)).as_posix() == "x/amd-epyc-family-26-model-2/cpu-limits-1t.json"
    facts = results.environment(CPU)["cpu"]
    assert facts == processor.facts() and processor.cold_bytes() >= 64 << 20


def test_judging(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, odd = Case(512), Case(2048, heads=16, head_dim=128), Case(8192)
    grouped = Case(2048, heads=32, head_dim=128, causal=True)
    rows = [
        _row(small, "F.sdpa", 4.0), _row(small, "attnhub", 1.0, peak_fraction=0.9),
        _row(large, "F.sdpa", 1.0), _row(large, "attnhub", 1.0, peak_fraction=0.75), _row(large, "attnhub cpu", 0.1),
        _row(odd, "attnhub cpu", 1.0, extra_mib=65.0),
        _row(grouped, "ONNX Runtime", 1.0), _row(grouped, "attnhub", 1.0), {**small.to_json(), "peer": "naive", "skipped": "no"},
    ]  # fmt: skip
    found = {verdict.target.name: verdict for verdict in targets.judge(_result(rows))}
    full = found["fp32 prefill full over F.sdpa"]
    assert full.mean == pytest.approx(2.0) and (full.cases, full.worst, full.worst_case, full.word) == (2, 1.0, str(large), targets.GATE)
    assert found["fp32 prefill D64 full, of FMA peak"].word == targets.AIM and found["fp32 prefill D128 full, of FMA peak"].word == targets.GATE
    assert found["extra memory at 8192 tokens"].word == targets.MISSED
    assert found["over ONNX Runtime's GroupQueryAttention"].word == targets.MISSED
    assert found["bf16 decode over F.sdpa"].word == targets.ABSENT
    amx = {verdict.target.name: verdict for verdict in targets.judge(_result(rows, isa=("amx_bf16",)))}
    assert amx["fp32 prefill full over F.sdpa"].word == targets.AIM and "fp16 prefill over F.sdpa" not in amx
    (disturbed,) = (v for v in targets.judge(_result([_row(small, "attnhub", 1.0, peak_fraction=1.2)])) if v.cases and v.target.fraction)
    assert disturbed.word == targets.DISTURBED
    with pytest.raises(ValueError, match="for the presets grid"):
        targets.table({"device": {"type": "cuda", "name": "x", "isa": []}})

    file = tmp_path / "cpu-limits-1t.json"
    file.write_text(json.dumps(_result(rows)))
    assert cli.main(["bench", "judge", "--input", str(file)]) == 1
    assert "MISSED" in capsys.readouterr().out
    file.write_text(json.dumps(_result(rows[:2])))
    assert cli.main(["bench", "judge", "--input", str(file), "--json"]) == 0
    assert {verdict["verdict"] for verdict in json.loads(capsys.readouterr().out)} == {targets.AIM, targets.ABSENT}


def test_judging_on_gpus() -> None:
    def result(preset: str, rows: list[dict[str, Any]], name: str = "NVIDIA H200") -> dict[str, Any]:
        environment = {"device": {"type": "cuda", "name": name, "isa": []}, "threads": 1, "torch": "2"}
        return {**_result(rows), "preset": preset, "environment": environment, "suite": "gpu", "settings": {}}

    def verdicts(preset: str, rows: list[dict[str, Any]], name: str = "NVIDIA H200") -> dict[str, str]:
        return {v.target.name: v.word for v in targets.judge(result(preset, rows, name)) if v.word != targets.ABSENT}

    one, two = PRESETS["grid"].make("cuda")[:2]
    rows = [_row(one, "FlexAttention", 2.0), _row(one, "attnhub triton", 1.0), _row(two, "FlexAttention", 0.99), _row(two, "attnhub triton", 1.0)]
    rows += [_row(one, "F.sdpa cuDNN", 0.5), _row(two, "F.sdpa cuDNN", 0.5), _row(one, "attnhub", 0.1)]
    assert verdicts("grid", rows) == {
        "forward over FlexAttention, every point": targets.MISSED, "forward over FlexAttention": targets.AIM, "forward over cuDNN": targets.BELOW,
    }  # fmt: skip
    small = [_row(c, peer, t) for c in PRESETS["v1v2"].make("cuda")[:2] for peer, t in (("naive", 1.11), ("attnhub triton", 1.0))]
    assert set(verdicts("v1v2", small).values()) == {targets.MISSED}
    window = next(c for c in PRESETS["features"].make("cuda") if c.window)
    assert verdicts("features", [_row(window, "FlexAttention", 1.0), _row(window, "attnhub triton", 1.0)]) == {
        "forward with window over FlexAttention": targets.AIM
    }
    paged = next(c for c in PRESETS["decode"].make("cuda") if c.page_size == 16 and c.graph and c.batch == 64 and c.kv_heads == 8)
    mine = [_row(paged, "attnhub triton", 1.0, kv_gb_per_s=4200.0), _row(paged, "attnhub triton contiguous", 0.96)]
    assert verdicts("decode", mine) == {
        "paged over contiguous, by CUDA graph": targets.GATE, "pages of 16 over FlashInfer's rate, batch 16 and more": targets.MISSED,
    }  # fmt: skip
    assert verdicts("decode", mine, "NVIDIA H100") == {"paged over contiguous, by CUDA graph": targets.GATE}
    lengths = PRESETS["memory"].make("cuda")[:2]
    held = [_row(c, peer, 1.0, extra_mib=mib) for c, all_mib in zip(lengths, (8.5, 33.0)) for peer, mib in (("naive", all_mib), ("attnhub triton", c.seqlen_q / 1024))]
    assert verdicts("memory", held) == {"saved of naive memory at 512 tokens": targets.AIM, "saved of naive memory at 1024 tokens": targets.AIM}
    held[-1]["extra_mib"] = 1.02
    assert verdicts("memory", held)["saved of naive memory at 1024 tokens"] == targets.MISSED
    text = "".join(pages._verdicts(result("memory", held)))
    assert "saved of naive memory" in text
    columns, shown = pages.one_table(held, "memory")
    assert "CPU use" not in columns and [line[columns.index("saved of naive")] for line in shown] == ["", "94.1%", "", "96.9%"]
    columns, shown = pages.table(rows[:2])
    assert [line[columns.index("over FlexAttention")] for line in shown] == ["1.00x", "2.00x"]


def test_a_grid_is_drawn_as_lines(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    from attnhub.bench import plot

    cases = [c for c in PRESETS["grid"].make("cuda") if c.head_dim != 256][:20]
    rows = [_row(c, peer, 1.0, speedup=1.0) for c in cases for peer in ("F.sdpa", "attnhub")] + [{**cases[0].to_json(), "peer": "x", "skipped": "no"}]
    environment = {"device": {"type": "cuda", "name": "x", "isa": []}, "threads": 1, "torch": "2"}
    result = {**_result(rows), "preset": "grid", "environment": environment}
    assert len(plot._lines(result).axes) == len({(c.mode, c.head_dim, c.causal) for c in cases}) and len(plot._bars(result).axes) == 1
    plot.draw(result, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG") and len(os.listdir(tmp_path)) == 1
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw({**result, "rows": rows[-1:]}, tmp_path / "none.png")


def test_pages_show_the_columns_that_a_file_has(tmp_path: pathlib.Path) -> None:
    old, new = _row(Case(512), "F.sdpa", 1.0), _row(Case(512), "attnhub", 1.0, cpu_use=1.5, peak_fraction=0.5)
    assert pages.table([old])[0] == ["peer", "time", "over F.sdpa", "TFLOP/s", "tokens/s", "extra MiB", "max error", "notes"]
    columns, shown = pages.table([old, new, {**Case(512).to_json(), "peer": "y", "skipped": "no"}])
    assert "CPU use" in columns and "of read rate" not in columns and {len(line) for line in shown} == {len(columns)}
    assert shown[1][columns.index("of peak")] == "50%" and shown[0][columns.index("CPU use")] == ""
    folder = tmp_path / results.FOLDER / "x"
    folder.mkdir(parents=True)
    result = _result([old, new], family=25, model=17)
    result["environment"]["ceilings"] = {"threads": 1, "read": {"median": 2e10, "max": 3e10, "samples": []}}
    (folder / "cpu-limits-1t.json").write_text(json.dumps(result))
    (folder / "cpu-kylin.json").write_text(json.dumps({**result, "preset": "kylin", "settings": {}}))
    text = pages.page(tmp_path)
    assert "## AMD EPYC (family 25 model 17): cpu limits, 1 thread\n" in text and "20 GB/s read from memory (largest 30)" in text
    assert "| fp32 prefill full over F.sdpa |" in text and "| case | peer | time | tokens/s | extra MiB | CPU use |" in text


def test_judge_wants_every_case_of_a_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without rows, or without the rows of a case, is no met target."""
    made = json.loads((pathlib.Path(__file__).parents[1] / "benchmarks/results/nvidia-h200/gpu-decode.json").read_text())
    made["preset"], made["rows"] = "features", []
    file = tmp_path / "gpu-features.json"
    file.write_text(json.dumps(made))
    assert cli.main(["bench", "judge", "--input", str(file)]) == 1
    assert "not measured" in capsys.readouterr().err
