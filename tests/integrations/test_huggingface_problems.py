"""What a transformers model asks of attention, found by running a small part of it: its own heads and dimensions, each kind of its masks."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import attnhub

transformers = pytest.importorskip("transformers")

from attnhub.integrations.huggingface.problems import problems, reduce  # noqa: E402

_ROOT = pathlib.Path(attnhub.__file__).resolve().parents[1]
#: class -> (configuration, its values, heads, dimensions, features that must be met at a prompt)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int], tuple[int, int], set[str]]] = {
    "LlamaForCausalLM": (
        "LlamaConfig", {"hidden_size": 1024, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 128256,
                        "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
        (8, 2), (128, 128), {"causal_bottom_right", "leftpad", "seqlens"},
    ),
    "Gemma2ForCausalLM": (
        "Gemma2Config", {"hidden_size": 512, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256, "sliding_window": 4096},
        (4, 2), (256, 256), {"causal_bottom_right", "window", "softcap", "leftpad"},
    ),
    "BertModel": ("BertConfig", {"num_hidden_layers": 12}, (12, 12), (64, 64), {"seqlens", "leftpad"}),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config", {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}, (4, 4), (192, 128),
        {"causal_bottom_right", "dv_differs"},
    ),
}  # fmt: skip


def _folder(name: str, path: pathlib.Path, **more: Any) -> str:
    kind, values, *_ = MODELS[name]
    getattr(transformers, kind)(**values, architectures=[name], dtype="bfloat16", **more).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", MODELS)
def test_its_own_heads_and_masks(name: str, tmp_path: pathlib.Path) -> None:
    _, _, heads, dims, features = MODELS[name]
    found = problems(_folder(name, tmp_path))
    assert (found["model"], found["dtype"], found["note"]) == (name, "bfloat16", "")
    asked = found["problems"]
    assert {(p["q_heads"], p["kv_heads"]) for p in asked} == {heads} and {(p["head_dim"], p["v_head_dim"]) for p in asked} == {dims}
    prompts = [set(p["features"]) for p in asked if p["seqlen_q"] > 1]
    assert features <= set().union(*prompts)
    assert (len(prompts) < len(asked)) == (name != "BertModel")
    if "window" in features:
        assert any("window" in f for f in prompts) and any("window" not in f for f in prompts)


def test_a_layer_of_each_kind_is_left() -> None:
    config = transformers.GptOssConfig(num_hidden_layers=24, intermediate_size=2880)
    kinds = list(dict.fromkeys(config.layer_types))
    reduce(config)
    assert config.layer_types == kinds and config.num_hidden_layers == len(kinds) == 2
    assert config.sliding_window == 8 and config.intermediate_size == 64 and config.num_attention_heads == 64 and config.vocab_size == 512


def test_as_a_process_that_goes_on_after_an_error(tmp_path: pathlib.Path) -> None:
    lines = [json.dumps({"folder": folder}) for folder in (str(tmp_path / "nothing"), _folder("BertModel", tmp_path / "bert"))]
    command = [sys.executable, "-m", "attnhub.integrations.huggingface.problems"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", cwd=_ROOT, capture_output=True, text=True, check=True)
    wrong, right = map(json.loads, done.stdout.splitlines())
    assert set(wrong) == {"error"} and right["model"] == "BertModel" and right["problems"]
