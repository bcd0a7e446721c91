"""Tiny configurations and inputs of every kind of model: that the model runs, in which way it was made small, and what it was given."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from families import transformers

from attnhub.integrations.huggingface.hints import HINTS, OF_CLASSES
from attnhub.integrations.huggingface.inputs import tiny_inputs
from attnhub.integrations.huggingface.probe import _first_that_runs, _run
from attnhub.integrations.huggingface.tiny import MOST_PARAMETERS, configs_of, tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
_MEASURED = json.loads((ROOT / "docs/huggingface-coverage.json").read_text(encoding="utf-8"))["transformers"]
pytestmark = pytest.mark.skipif(transformers.__version__ != _MEASURED, reason="the rules are for the transformers of docs/huggingface-coverage.md")

#: class -> the way in which it is small, the variant of its inputs, and the names of these.
KINDS: dict[str, tuple[str, tuple[str, ...], set[str]]] = {
    # Sizes that a hint knows, and layers of a kind each
    "Glm4vMoeTextModel": ("narrow", (), {"input_ids", "attention_mask"}),
    "ZambaModel": ("narrow", (), {"input_ids", "attention_mask"}),
    # Widths that hang together
    "SwinModel": ("scaled", (), {"pixel_values"}),
    "DetrModel": ("narrow", (), {"pixel_values"}),
    "RTDetrModel": ("scaled", (), {"pixel_values"}),
    "MaskFormerModel": ("narrow", (), {"pixel_values"}),
    # Images as patches, in pairs, and with the text that they stand in
    "MuseGlimmerVisionModel": ("narrow", (), {"pixel_values", "grid_thw"}),
    "Siglip2VisionModel": ("narrow", (), {"pixel_values", "pixel_attention_mask", "spatial_shapes"}),
    "SegGptModel": ("narrow", (), {"pixel_values", "prompt_pixel_values", "prompt_masks"}),
    "Blip2Model": ("narrow", ("input_ids", "placeholders"), {"pixel_values", "input_ids", "attention_mask", "decoder_input_ids"}),
    # Sound and its codes
    "GlmAsrEncoder": ("narrow", ("features turned",), {"input_features"}),
    "ClapModel": ("narrow", ("input_features", "one channel"), {"input_features", "input_ids", "attention_mask"}),
    "MusicgenForCausalLM": ("narrow", ("codebooks in the batch",), {"input_ids", "attention_mask"}),
    "WavLMForXVector": ("narrow", ("longer sound",), {"input_values"}),
    # Time, decisions, entities, documents, questions
    "TimesFmModel": ("narrow", (), {"past_values", "past_values_padding", "freq"}),
    "DecisionTransformerModel": ("narrow", (), {"states", "actions", "rewards", "returns_to_go", "timesteps"}),
    "LukeForEntityClassification": ("narrow", ("entity_ids",), {"input_ids", "attention_mask", "entity_ids", "entity_attention_mask", "entity_position_ids"}),
    "SplinterForPreTraining": ("narrow", ("marked",), {"input_ids", "attention_mask"}),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_tiny_model_runs(name: str) -> None:
    model, way, variant, outputs = _first_that_runs(getattr(transformers, name))
    made = tiny_inputs(model, "none", variant)
    assert (way, variant, set(made)) == KINDS[name]
    assert sum(p.numel() for p in model.parameters()) <= MOST_PARAMETERS and outputs
    for a, b in zip(outputs, _run(model, "none", variant)):
        assert a.equal(b), "the same inputs every time"


def test_images_stand_where_the_model_expects_them() -> None:
    model, _, variant, _ = _first_that_runs(transformers.Blip2Model)
    text = tiny_inputs(model, "none", variant)["input_ids"]
    assert (text == model.config.image_token_index).sum(1).tolist() == [model.config.num_query_tokens] * 2


def test_a_hierarchy_keeps_its_ratios_and_its_stages() -> None:
    config = tiny_config(transformers.HGNetV2Config)
    assert [b / a for a, b in zip(config.stage_in_channels[1:], transformers.HGNetV2Config().stage_in_channels[1:])] == [4, 4, 4]
    assert config.stage_in_channels[1:] == config.stage_out_channels[:-1] and config.stem_channels[0] == 3
    assert tiny_config(transformers.RTDetrConfig).backbone_config.out_indices == [2, 3, 4]
    dinov2 = tiny_config(transformers.DepthAnythingConfig).backbone_config
    assert len(dinov2.out_indices) == 4 and max(dinov2.out_indices) == dinov2.num_hidden_layers == 4


@pytest.mark.parametrize("way", ["narrow", "scaled", "shallow"])
def test_ways(way: str) -> None:
    before, made = transformers.BertConfig(), tiny_config(transformers.BertConfig, way)
    assert made.num_hidden_layers == 2 and made.vocab_size == 128
    assert made.hidden_size == {"narrow": 32, "scaled": before.hidden_size // 4, "shallow": before.hidden_size}[way]
    assert made.num_attention_heads == (4 if way == "narrow" else before.num_attention_heads)


def test_no_backbone_needs_timm() -> None:
    assert "timm" in transformers.DetrConfig().backbone_config.model_type
    assert not any("timm" in c.model_type for c in configs_of(tiny_config(transformers.DetrConfig)))


def test_hints_are_of_configurations_and_classes_that_exist() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known: set[Any] = set(CONFIG_MAPPING)
    for name in CONFIG_MAPPING:
        # Inner configurations have types of their own.
        known |= {x for c in configs_of_default(CONFIG_MAPPING[name]) for x in (c.model_type, c.base_config_key)}
    assert set(HINTS) <= known, sorted(set(HINTS) - known)
    assert all(hasattr(transformers, name) for name in OF_CLASSES)


def configs_of_default(cls: Any) -> list[Any]:
    try:
        return list(configs_of(cls()))
    except Exception:
        # Some have no default.
        return []
