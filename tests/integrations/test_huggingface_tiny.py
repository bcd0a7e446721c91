"""Tiny configurations and inputs of every kind of model: that the model runs, in which way it was made small, and what it was given."""

from __future__ import annotations

import json
import pathlib

import pytest
from families import transformers

from attnhub.integrations.huggingface.hints import HINTS, OF_CLASSES
from attnhub.integrations.huggingface.inputs import VARIANTS, tiny_inputs
from attnhub.integrations.huggingface.media import BESIDE, INPUTS
from attnhub.integrations.huggingface.probe import _first_that_runs, _run
from attnhub.integrations.huggingface.shapes import SHAPES
from attnhub.integrations.huggingface.tiny import MOST_PARAMETERS, configs_of, tiny_config, tiny_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
_MEASURED = json.loads((ROOT / "docs/huggingface-coverage.json").read_text(encoding="utf-8"))["transformers"]
pytestmark = pytest.mark.skipif(transformers.__version__ != _MEASURED, reason="the rules are for the transformers of docs/huggingface-coverage.md")

#: class -> the way in which it is small, the variant of its inputs, and the names of these.
KINDS: dict[str, tuple[str, tuple[str, ...], set[str]]] = {
    # Sizes that a hint knows, and layers of a kind each
    "Glm4vMoeTextModel": ("narrow", (), {"input_ids", "attention_mask"}),
    "ZambaModel": ("narrow", (), {"input_ids", "attention_mask"}),
    # Widths that hang together, backbones
    "DonutSwinModel": ("scaled", (), {"pixel_values"}),
    "DetrModel": ("narrow", (), {"pixel_values"}),
    # Images in text, as patches, in pairs
    "PaliGemmaModel": ("narrow", ("pixel_values", "placeholders"), {"pixel_values", "input_ids", "attention_mask"}),
    "MuseGlimmerVisionModel": ("narrow", (), {"pixel_values", "grid_thw"}),
    "Siglip2VisionModel": ("narrow", (), {"pixel_values", "pixel_attention_mask", "spatial_shapes"}),
    "SegGptModel": ("narrow", (), {"pixel_values", "prompt_pixel_values", "prompt_masks"}),
    # Sound and its codes
    "GlmAsrEncoder": ("narrow", ("features turned",), {"input_features"}),
    "MusicgenForCausalLM": ("narrow", ("codebooks in the batch",), {"input_ids", "attention_mask"}),
    # Time, decisions, entities, questions
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
    assert sum(p.numel() for p in model.parameters()) <= MOST_PARAMETERS
    assert set(outputs) == ({"none", "left", "right"} if "attention_mask" in made else {"none"})
    for a, b in zip(outputs["none"], _run(model, "none", variant)):
        assert a.equal(b), "the same inputs every time"


def test_images_stand_where_the_model_expects_them() -> None:
    model = tiny_model(transformers.PaliGemmaModel)
    text = tiny_inputs(model, "none", ("pixel_values", "placeholders"))["input_ids"]
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    assert (text == model.config.image_token_id).sum(1).tolist() == [patches] * 2


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


def test_variants_name_what_there_is_and_leave_no_shape_out() -> None:
    named = {name for variant in VARIANTS for name in variant}
    assert named <= set(INPUTS) | set(SHAPES) and set(SHAPES) <= named
    assert {name for names in BESIDE.values() for name in names} | set(BESIDE) <= set(INPUTS)


def test_hints_are_of_configurations_and_classes_that_exist() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Inner ones that have no type of their own, or no place in the list.
    others = set(HINTS) - set(CONFIG_MAPPING)
    assert others == {"attn_config", "fun_asr_nano_adaptor", "talker_config"}
    assert all(hasattr(transformers, name) for name in OF_CLASSES)
