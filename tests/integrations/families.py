"""Tiny random models of thirty families of transformers, one forward pass of each, and how far two passes are apart.

The weights are large enough that attention is far from uniform: with transformers' own initialisation all keys look alike,
and a comparison of outputs passes with scores scaled by 1.5.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

BATCH, LENGTH, VOCAB = 3, 21, 99
PADDINGS = ("none", "left", "right")
#: (output, which of its rows are valid, or None for all of them)
Outputs = list[tuple[Tensor, Optional[Tensor]]]


@dataclass(frozen=True)
class Family:
    """A tiny model of a family.

    kind: what it takes (text, image, both, text in and out, sound in and text out, sound). causal: whether a text sees only what is before
    it. generates: whether `generate` runs on it. Mixtures of experts ask all of theirs: a rounding that sends a token to
    another expert would be no error of attention.
    """

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "text"
    causal: bool = True
    generates: bool = False

    def breaks(self) -> Iterator[str]:
        """The broken backends that must show in its outputs: an image has no padding, nor an order."""
        yield from ("scale", "zeros")
        if self.kind != "image":
            yield "mask"
        if self.causal:
            yield "causal"


_PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
_GQA = {**_PLAIN, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
_MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
_MOE = {"num_local_experts": 2, "num_experts_per_tok": 2}
_IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
    "scale_embedding": False,
}  # fmt: skip
_SLIDING_THEN_FULL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _GQA, generates=True),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", {**_GQA, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6}, generates=True),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**_GQA, "head_dim": 16}, generates=True),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**_GQA, "sliding_window": 6}, generates=True),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**_GQA, **_MOE, "sliding_window": None}, generates=True),
    "gemma2": Family(
        "Gemma2ForCausalLM", "Gemma2Config",
        {**_GQA, "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, generates=True,
    ),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GQA, **_SLIDING_THEN_FULL, "head_dim": 8, "query_pre_attn_scalar": 8}, generates=True),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 128, "eos_token_id": None}, generates=True),
    "gpt_neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_PLAIN, "eos_token_id": None}, generates=True),
    "gpt_oss": Family("GptOssForCausalLM", "GptOssConfig", {**_GQA, **_MOE, **_SLIDING_THEN_FULL, "head_dim": 8}, generates=True),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**_GQA, **_MLA, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 2, "moe_intermediate_size": 16},
        generates=True,
    ),
    "llama4": Family(
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**_GQA, "head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 1, "intermediate_size_mlp": 48,
         "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", {**_GQA, "sliding_window": 6}, generates=True),
    "cohere2": Family("Cohere2ForCausalLM", "Cohere2Config", {**_GQA, **_SLIDING_THEN_FULL, "logit_scale": 1.0}, generates=True),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", _GQA, generates=True),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", {**_GQA, "attention_multiplier": 0.4}, generates=True),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", {**_GQA, "sliding_window": 6}, generates=True),
    "opt": Family("OPTForCausalLM", "OPTConfig", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
                                                  "max_position_embeddings": 128, "word_embed_proj_dim": 32, "pad_token_id": 0, "eos_token_id": None}, generates=True),
    "bert": Family("BertModel", "BertConfig", _PLAIN, causal=False),
    "roberta": Family("RobertaModel", "RobertaConfig", {**_PLAIN, "pad_token_id": 0}, causal=False),
    "distilbert": Family("DistilBertModel", "DistilBertConfig", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB}, causal=False),
    "modernbert": Family("ModernBertModel", "ModernBertConfig", {**_PLAIN, "pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2}, causal=False),
    "vit": Family("ViTModel", "ViTConfig", _IMAGE, kind="image", causal=False),
    "dinov2": Family("Dinov2Model", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2}, kind="image", causal=False),
    "clip": Family(
        "CLIPModel", "CLIPConfig",
        {"text_config": {**_PLAIN, "eos_token_id": 2, "projection_dim": 16}, "vision_config": {**_IMAGE, "projection_dim": 16}, "projection_dim": 16}, kind="clip",
    ),
    "gemma3_image": Family(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": {**_GQA, **_SLIDING_THEN_FULL, "head_dim": 8, "query_pre_attn_scalar": 8}, "vision_config": {**_IMAGE, "vision_use_head": False},
         "mm_tokens_per_image": 9, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}, kind="image_text",
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0},
        kind="text_to_text",
    ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", {**_BART, "max_position_embeddings": 128}, kind="text_to_text"),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64, "suppress_tokens": None, "begin_suppress_tokens": None},
        kind="sound_to_text",
    ),
    "wav2vec2": Family(
        "Wav2Vec2Model", "Wav2Vec2Config",
        {**_PLAIN, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
         "feat_extract_norm": "layer", "do_stable_layer_norm": True, "mask_time_prob": 0.0}, kind="sound", causal=False,
    ),
}  # fmt: skip

GENERATORS = [name for name, family in FAMILIES.items() if family.generates]


def build(name: str) -> Any:
    """The tiny model of a family, with eager attention."""
    family = FAMILIES[name]
    torch.manual_seed(1)
    config = getattr(transformers, family.config)(**family.options)
    config._attn_implementation = "eager"
    model = getattr(transformers, family.model)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in key and "lm_head" not in key:
                parameter.normal_(0.0, 1.3 / parameter.shape[-1] ** 0.5)
            elif "sink" in key or "relative_attention_bias" in key:
                parameter.normal_()
    return model


def padding(kind: str) -> Optional[Tensor]:
    if kind == "none":
        return None
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :13] = 0
    return mask if kind == "left" else mask.flip(1)


def run(model: Any, name: str, pad: str) -> Outputs:
    """One forward pass."""
    torch.manual_seed(2)
    kind, dtype, device = FAMILIES[name].kind, model.dtype, model.device
    mask = padding(pad)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    pixels = torch.randn(BATCH, 3, 24, 24).to(device, dtype)
    sound = torch.randn(BATCH, 8, 24).to(device, dtype)
    valid = None if mask is None else mask.bool().to(device)
    if kind == "clip":
        ids[:, -1] = 2 if pad != "right" else ids[:, -1]
    if kind == "image_text":
        ids = ids.masked_fill(ids == 5, 4)
        ids[:, 5:14] = 5
        mask, valid = (None, None) if pad == "none" else (_edges(pad).long().to(device), _edges(pad).to(device))
    text: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": None if mask is None else mask.to(device)}
    with torch.no_grad():
        if kind == "image":
            return [(model(pixel_values=pixels).last_hidden_state, None)]
        if kind == "clip":
            out = model(**text, pixel_values=pixels)
            return [(out.text_model_output.last_hidden_state, valid), (out.vision_model_output.last_hidden_state, None)]
        if kind == "image_text":
            out = model(**text, pixel_values=pixels, token_type_ids=(text["input_ids"] == 5).long())
            return [(out.logits, valid)]
        if kind == "text_to_text":
            return [(model(**text, decoder_input_ids=text["input_ids"][:, :7]).logits, None)]
        if kind == "sound_to_text":
            out = model(input_features=sound, decoder_input_ids=text["input_ids"], decoder_attention_mask=text["attention_mask"])
            return [(out.logits, valid)]
        if kind == "sound":
            heard = None if mask is None else mask.repeat_interleave(16, 1).to(device)
            out = model(torch.randn(BATCH, 16 * LENGTH).to(device, dtype), attention_mask=heard).last_hidden_state
            rows = None if heard is None else model._get_feature_vector_attention_mask(out.shape[1], heard)
            return [(out, rows)]
        out = model(**text)
        return [(out.logits if hasattr(out, "logits") else out.last_hidden_state, valid)]


def _edges(pad: str) -> Tensor:
    """Padding that leaves the image's tokens alone."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if pad == "left":
        mask[1, :2] = mask[2, :4] = False
    else:
        mask[1, -3:] = mask[2, -6:] = False
    return mask


def difference(ours: Outputs, theirs: Outputs) -> float:
    """The largest absolute difference of valid rows."""
    worst = 0.0
    for (a, valid), (b, _) in zip(ours, theirs):
        gap = (a - b).abs()
        worst = max(worst, float((gap if valid is None else gap[valid]).max()))
    return worst
