"""`attnhub coverage`: what it finds of a class is true, it survives classes that cannot be tried, goes on where it stopped, and its page is fresh."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import transformers

import attnhub
from attnhub import cli
from attnhub.cli import coverage
from attnhub.integrations.huggingface.probe import _largest, classes, probe
from attnhub.registry import registry

ROOT = pathlib.Path(__file__).resolve().parents[2]
#: One of each way, and how many attention modules ran.
ROUTED = {"LlamaModel": 2, "Gemma3TextModel": 2, "BertForMaskedLM": 2, "ViTModel": 2, "T5ForConditionalGeneration": 6, "WhisperModel": 6, "BloomModel": 2}


@pytest.mark.parametrize("name", ROUTED)
def test_routed(name: str) -> None:
    found = probe(name)
    assert found["state"] == "routed" and found["ran"] == found["served"] == ROUTED[name] and found["calls"] >= found["ran"]
    assert found["difference"] <= 1e-5 and not found["reasons"]
    assert found["own"] == (["BloomAttention"] if name == "BloomModel" else [])


@pytest.mark.parametrize("how", ["scale", "mask", "zeros"])
@pytest.mark.parametrize("name", ["LlamaModel", "BertModel", "T5EncoderModel", "BloomModel"])
def test_a_broken_backend_differs(name: str, how: str, broken: Callable[[str], str]) -> None:
    with attnhub.use(broken(how)):
        assert probe(name)["state"] == "differs"


def test_the_other_states(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe("LongformerModel")["state"] == "not routed" and "something else than softmax" in probe("LongformerModel")["reasons"][0]
    assert probe("LEDModel")["state"] == "partly" and probe("LEDModel")["served"] == 4
    assert probe("ResNetModel")["state"] == "no attention"
    assert probe("BarkModel")["state"] == "not run"
    assert probe("BertLayer") == {"state": "no model"}
    monkeypatch.setattr(registry.get("reference"), "prepare", lambda problem: 1 / 0)
    with attnhub.use("reference"):
        assert probe("BertModel")["state"] == "fails"


@pytest.mark.parametrize("ours", [0.0, 1.0, -torch.inf])
@pytest.mark.parametrize("theirs", [0.0, 1.0, -torch.inf])
def test_what_is_infinite_in_both_is_no_difference(ours: float, theirs: float) -> None:
    """Detectors fill what stands for no text with -inf."""
    a, b = (torch.tensor([[2.0, x]]) for x in (ours, theirs))
    gap, size = _largest({"none": [a]}, {"none": [b]})
    assert (gap == 0.0) == (ours == theirs) and size in (1.0, 2.0)


def test_rounding_that_grows_is_told_from_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention adds this model's bool mask as numbers, and what transformers chooses is no nearer than rounding lets it; in fp64 it is."""
    monkeypatch.setattr("attnhub.integrations.huggingface.probe._by_another", lambda *_: None)
    found = probe("GroundingDinoModel")
    assert found["state"] == "partly" and found["note"].startswith("compared in fp64 with default attention") and found["difference"] < 1e-6


def test_every_class_is_listed_with_its_folder() -> None:
    found = classes()
    assert found["LlamaForCausalLM"] == "llama" and found["GPTNeoModel"] == "gpt_neo" and len(found) > 1000
    assert all(hasattr(transformers, name) for name in ("BertModel", "T5Model")) and "LlamaPreTrainedModel" not in found


def run(*arguments: str) -> int:
    return cli.main(("coverage", "--jobs", "1", *arguments))


def test_it_goes_on_where_it_stopped_and_survives(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that ends, one that says nothing, and findings of before."""
    (tmp_path / "worker.py").write_text(
        "import os, time\nfrom attnhub.bench.workers import answer\n"
        "def work(name):\n"
        "    if name is None: return {'classes': dict.fromkeys(('Aa', 'Bb', 'Cc', 'Dd'), 'x'), 'transformers': '5', 'torch': '2'}\n"
        "    if name == 'Bb': os._exit(1)\n    if name == 'Cc': time.sleep(60)\n"
        "    return {'state': 'no model' if name == 'Dd' else 'routed', 'ran': 1, 'served': 1, 'difference': 0.0, 'calls': int(time.time())}\n"
        "answer(work)\n"
    )
    monkeypatch.setattr(coverage, "PROBE", "worker")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    output = tmp_path / "found.json"
    assert run("--output", str(output), "--patience", "5") == 0
    found = json.loads(output.read_text())
    assert found["transformers"] == "5" and {n: f["state"] for n, f in found["classes"].items()} == {"Aa": "routed", "Bb": "not run", "Cc": "not run"}
    assert "process ended" in found["classes"]["Bb"]["reason"]
    found["classes"]["Aa"]["calls"] = -1
    output.write_text(json.dumps(found))
    assert run("--output", str(output), "--patience", "5", "--resume") == 0
    assert json.loads(output.read_text())["classes"]["Aa"]["calls"] == -1, "what is known is kept"
    assert run("--output", str(output), "--patience", "5", "--only", "^A") == 0
    assert json.loads(output.read_text())["classes"]["Aa"]["calls"] > 0
    assert "1 routed, 2 not run" in capsys.readouterr().out


def test_defects_are_an_exit_code(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(coverage, "_probe_all", lambda path, args: {"classes": {"A": {"state": "differs", "folder": "a"}}})
    assert run("--output", str(tmp_path / "f.json")) == 1


def test_the_page() -> None:
    """`attnhub docs --check` compares it with the findings; here, that the findings say what is claimed of them."""
    found: dict[str, Any] = coverage.read(ROOT / coverage.RESULTS)
    states = [finding["state"] for finding in found["classes"].values()]
    assert set(states) <= set(coverage.STATES) and not {"differs", "fails"} & set(states)
    assert states.count("routed") > 900 and (ROOT / coverage.PAGE).read_text(encoding="utf-8") == coverage.page(found)
    for finding in found["classes"].values():
        if finding["state"] == "routed":
            assert finding["served"] == finding["ran"] > 0 and finding["calls"] > 0
        if finding["state"] in ("not run", "partly", "not routed"):
            assert finding.get("reason") or finding.get("reasons")
    assert all(f"| {state} |" in coverage.page(found) for state in coverage.STATES)
