"""What patching a transformers model changes, what it leaves alone, and what it says about both."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub.integrations import calls as counting
from attnhub.patching import PatchError, PatchReport

transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-6
VOCAB = 99
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
LLAMA = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}


def config(name: str, implementation: str = "eager", **options: Any) -> Any:
    made = getattr(transformers, name)(**options)
    made._attn_implementation = implementation
    return made


def build(model: str, configuration: Any) -> Any:
    torch.manual_seed(1)
    made = getattr(transformers, model)(configuration).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 1.3 / parameter.shape[-1] ** 0.5)
    return made


def llama(implementation: str = "eager", **options: Any) -> Any:
    return build("LlamaForCausalLM", config("LlamaConfig", implementation, **{**LLAMA, **options}))


def bert(**options: Any) -> Any:
    return build("BertModel", config("BertConfig", **{**SMALL, **options}))


IDS = torch.arange(3, 45).reshape(2, 21)
LEFT = torch.ones(2, 21, dtype=torch.long)
LEFT[1, :6] = 0
#: The first token behind the padding is predicted from a row of padding, which is garbage in every implementation.
LABELS = IDS.masked_fill((LEFT == 0) | (LEFT.cumsum(1) == 1) & (LEFT.roll(1) == 0), -100)


def logits(model: Any, mask: Any = LEFT, **options: Any) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=mask, **options)
    found = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[LEFT.bool()]
    assert isinstance(found, Tensor)
    return found


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> bool:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0)) <= tolerance


# -- what cannot be routed is reported -------------------------------------------------------------------------------------

#: What no route serves: sliding chunks, hashes, products without a softmax.
OTHER_ATTENTION = {
    "LongformerModel": ("LongformerConfig", {**SMALL, "attention_window": 8}, "computes something else than softmax"),
    "YosoModel": ("YosoConfig", SMALL, "takes no softmax"),
}
#: These select keys and hand indices to every implementation but eager and sdpa.
SPARSE = {
    **LLAMA, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 2, "moe_intermediate_size": 16, "index_topk": 6,
    "index_n_heads": 4, "index_head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_ATTENTION)
def test_other_attention_is_reported_and_never_claimed(name: str) -> None:
    configuration, options, reason = OTHER_ATTENTION[name]
    model = build(name, config(configuration, **options))
    torch.manual_seed(4)
    before = logits(model)
    report = attnhub.patch(model)
    torch.manual_seed(4)
    assert torch.equal(logits(model), before) and report.calls == 0
    assert not report.patched and len(report.skipped) == 2 and all(reason in m.reason for m in report.skipped)
    assert model.config._attn_implementation == "eager"


def test_strict_raises_for_what_is_known_before_a_run() -> None:
    model = build("YosoModel", config("YosoConfig", **SMALL))
    with pytest.raises(PatchError, match="takes no softmax"):
        attnhub.patch(model, strict=True)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sparse_selectors_are_served_with_their_own_selection(implementation: str) -> None:
    if not hasattr(transformers, "DeepseekV32Config"):
        pytest.skip("this transformers has no DeepSeek-V3.2")
    model = build("DeepseekV32Model", config("DeepseekV32Config", implementation, **SPARSE))
    theirs = logits(model)
    report = attnhub.patch(model)
    assert close(logits(model), theirs) and model.config._attn_implementation == implementation
    assert len(report.patched) == 2 and report.calls == 2


@pytest.mark.parametrize("foreign", [False, True])
def test_no_mask_and_no_word_of_causality(foreign: bool) -> None:
    """A module without is_causal that gets no mask attends to all, as in eager attention; unless its masks are sdpa's, where None may be causal."""
    from attnhub.integrations.huggingface.attention import attention_forward
    from attnhub.integrations.huggingface.routing import FOREIGN_MASKS

    module = torch.nn.Module().eval()
    if foreign:
        setattr(module, FOREIGN_MASKS, True)
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=foreign).transpose(1, 2)
    torch.testing.assert_close(attention_forward(module, q, k, v, None)[0], theirs)
    model = llama("sdpa")
    report = attnhub.patch(model, only=lambda name, _: ".1." in name)
    assert len(report.patched) == 1 and [FOREIGN_MASKS in vars(layer.self_attn) for layer in model.model.layers] == [False, True]
    attnhub.unpatch(model)
    attnhub.patch(model)
    assert not any(FOREIGN_MASKS in vars(layer.self_attn) for layer in model.model.layers)


def test_no_mask_where_there_is_only_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a module that says is_causal and gets no mask attends to all (BridgeTower's image tokens); with sdpa attention it is causal."""
    from attnhub.integrations.huggingface.attention import attention_forward

    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    for has_sdpa in (True, False):
        monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_supports_sdpa", has_sdpa)
        model = llama("eager")
        module = model.model.layers[0].self_attn
        attnhub.patch(model)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=has_sdpa).transpose(1, 2)
        torch.testing.assert_close(attention_forward(module, q, k, v, None)[0], theirs)
        attnhub.unpatch(model)
        assert not any(name.startswith("_attnhub") for name in vars(module))


@pytest.mark.parametrize("keys", [5, 9, 3])
def test_a_mask_of_nothing_for_other_keys(keys: int) -> None:
    """Models that put keys before those of their mask (MuseGlimmerAssistant) mean all of them where the mask masks nothing."""
    from attnhub.integrations.huggingface.attention import attention_forward
    from attnhub.integrations.huggingface.compact import CompactMask
    from attnhub.mask import FULL

    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, keys, 8), torch.randn(2, 4, keys, 8)
    ours, _ = attention_forward(torch.nn.Module().eval(), q, k, v, CompactMask(FULL, 2, 5, 5, 5, q.device))
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def test_masks_for_attention_that_holds_no_config() -> None:
    """The image encoder of GIT is routed; its text attention adds the mask itself, and must get the additive one."""
    text = {**SMALL, "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}}
    model = build("GitModel", config("GitConfig", **text))
    theirs = logits(model)
    report = attnhub.patch(model)
    assert close(logits(model), theirs) and report.calls == 2 and len(report.patched) == 4


def test_a_model_without_attention_is_an_error() -> None:
    with pytest.raises(PatchError, match="no attention that attnhub knows"):
        attnhub.patch(torch.nn.Linear(2, 2))


def test_both_integrations_report_their_part() -> None:
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
    }
    model = build("SiglipVisionModel", config("SiglipVisionConfig", **options))
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        theirs = model(pixel_values=pixels)
        report = attnhub.patch(model)
        ours = model(pixel_values=pixels)
    assert sorted(m.integration for m in report.patched) == ["huggingface", "huggingface", "mha"]
    assert all(m.calls == 1 for m in report.patched)
    assert close(ours.pooler_output, theirs.pooler_output)
    assert attnhub.unpatch(model) == 3


# -- nothing else changes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_two_models_that_share_a_config(implementation: str) -> None:
    shared = config("LlamaConfig", implementation, **LLAMA)
    one, other = build("LlamaForCausalLM", shared), build("LlamaForCausalLM", shared)
    assert one.config is other.config
    before = logits(other)
    report = attnhub.patch(one)
    assert shared._attn_implementation == implementation
    assert torch.equal(logits(other), before) and report.calls == 0
    assert close(logits(one), before) and report.calls == 2
    second = attnhub.patch(other)
    attnhub.unpatch(one)
    logits(one)
    assert report.calls == 2 and second.calls == 0
    logits(other)
    assert second.calls == 2


def test_unpatch_restores_exactly() -> None:
    text = {**SMALL, "eos_token_id": 2, "projection_dim": 16}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
        "projection_dim": 16,
    }
    configuration = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    configuration._attn_implementation = {"text_config": "eager", "vision_config": "sdpa"}
    model = build("CLIPModel", configuration)

    def holders() -> list[tuple[str, str, int, Any]]:
        return [
            (name, key, id(value), value._attn_implementation)
            for name, module in model.named_modules() for key, value in vars(module).items() if hasattr(value, "_attn_implementation")
        ]  # fmt: skip

    before, state = holders(), json.dumps(model.config.to_dict(), default=str)
    report = attnhub.patch(model)
    assert len(report.patched) == 4
    assert {implementation for *_, implementation in holders()} == {"attnhub"}
    assert model.config.text_config is model.text_model.config, "nested configs stay one object"
    model.config.text_config.layer_norm_eps = 0.25
    assert attnhub.unpatch(model) == 4
    assert holders() == before
    assert configuration.text_config.layer_norm_eps == 0.25, "what changed while patched is kept"
    configuration.text_config.layer_norm_eps = json.loads(state)["text_config"]["layer_norm_eps"]
    assert json.dumps(model.config.to_dict(), default=str) == state
    assert attnhub.unpatch(model) == 0


@pytest.mark.parametrize("start", ["eager", "sdpa"])
@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_an_implementation_set_after_the_patch_survives_unpatch(start: str, chosen: str) -> None:
    model = llama(start)
    configuration = model.config
    theirs = logits(model)
    report = attnhub.patch(model)
    model.set_attn_implementation(chosen)
    configuration.use_cache = False
    assert close(logits(model), theirs) and report.calls == 0
    assert attnhub.unpatch(model) == 2
    assert model.config is configuration and {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {chosen}
    assert close(logits(model), theirs) and report.calls == 0
    attnhub.patch(model)
    assert attnhub.unpatch(model) == 2 and model.config._attn_implementation == chosen, "nothing was set since"


def test_patching_again_routes_what_was_switched_away() -> None:
    model = llama("sdpa")
    theirs = logits(model)
    first = attnhub.patch(model)
    model.set_attn_implementation("eager")
    again = attnhub.patch(model)
    assert close(logits(model), theirs) and first.calls == again.calls == 2
    assert attnhub.unpatch(model) == 2 and model.config._attn_implementation == "eager"


def test_implementations_of_parts_set_after_the_patch() -> None:
    parts = {"text_config": {**SMALL, "eos_token_id": 2}, "vision_config": {**SMALL, "image_size": 24, "patch_size": 8}}
    configuration = transformers.CLIPConfig(**parts, projection_dim=16)
    configuration._attn_implementation = "eager"
    model = build("CLIPModel", configuration)
    attnhub.patch(model)
    model.vision_model.config._attn_implementation = "sdpa"
    attnhub.unpatch(model)
    assert model.config is configuration and configuration._attn_implementation == configuration.text_config._attn_implementation == "eager"
    assert configuration.vision_config._attn_implementation == "sdpa" and model.vision_model.config is configuration.vision_config


def test_patching_twice_and_a_part() -> None:
    model = llama()
    theirs = logits(model)
    first = attnhub.patch(model)
    again = attnhub.patch(model)
    assert [a is b for a, b in zip(first.modules, again.modules)] == [True, True]
    assert close(logits(model), theirs) and first.calls == again.calls == 2
    assert attnhub.unpatch(model) == 2
    only = attnhub.patch(model, only=lambda name, _: ".0." in name)
    assert [m.name for m in only.patched] == ["model.layers.0.self_attn"]
    assert only.skipped[0].reason == "left out by only="


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_part_of_a_model_beside_its_own_attention(implementation: str) -> None:
    """Layers that are not routed could not read attnhub's masks, so the masks stay what they were."""
    model = llama(implementation)
    for mask in (LEFT, None):
        theirs = logits(model, mask)
        report = attnhub.patch(model, only=lambda name, _: ".1." in name)
        assert close(logits(model, mask), theirs)
        assert report.calls == 1 and model.config._attn_implementation == implementation
        rest = attnhub.patch(model)
        assert close(logits(model, mask), theirs) and rest.calls == 3
        assert attnhub.unpatch(model) == 2 and model.config._attn_implementation == implementation


def test_implementation_is_not_saved(tmp_path: Path) -> None:
    model = llama()
    theirs = logits(model)
    attnhub.patch(model)
    model.save_pretrained(tmp_path)
    assert "attnhub" not in (tmp_path / "config.json").read_text()
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa" and close(logits(again), theirs)
    from attnhub.integrations.huggingface import register

    assert register() == ""
    by_name = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="attnhub").eval()
    assert close(logits(by_name), theirs)
    report = attnhub.patch(by_name)
    logits(by_name)
    assert report.calls == 2
    attnhub.unpatch(by_name)
    assert by_name.config._attn_implementation == "attnhub"


def test_copies_run_their_own_weights() -> None:
    model = llama()
    report = attnhub.patch(model)
    theirs = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), theirs)
        with torch.no_grad():
            other.model.layers[0].self_attn.o_proj.weight.zero_()
        assert not torch.equal(logits(other), theirs)
    assert report.calls == 2, "copies are not counted as the model"


def test_a_pickled_model_runs_where_nothing_was_imported(tmp_path: Path) -> None:
    models = [build("LlamaModel", config("LlamaConfig", **LLAMA)), build("BloomModel", config("BloomConfig", hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB))]
    ids = torch.arange(1, 13)[None]
    wanted = [model(ids)[0] for model in models]
    for model in models:
        attnhub.patch(model)
    torch.save((models, ids, wanted), tmp_path / "models.pt")
    program = f"""
import torch
models, ids, wanted = torch.load({str(tmp_path / "models.pt")!r}, weights_only=False)
for model, right in zip(models, wanted):
    torch.testing.assert_close(model(ids)[0], right, rtol=1e-5, atol=1e-5)
import attnhub
assert attnhub.last_decision() is not None
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_user_may_switch_away() -> None:
    model = llama()
    theirs = logits(model)
    report = attnhub.patch(model)
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model), theirs) and report.calls == 0
    attnhub.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_importing_the_integration_imports_no_transformers() -> None:
    code = (
        "import sys, torch, attnhub; from attnhub.integrations.huggingface import integration; m = torch.nn.MultiheadAttention(8, 2);"
        "assert not integration.matches(m); attnhub.patch(m); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- weights, training, masks of the user ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_output_attentions(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_said_weights", False)
    model = llama() if name == "llama" else bert()
    with torch.no_grad():
        theirs = model(input_ids=IDS, attention_mask=LEFT, output_attentions=True)
        report = attnhub.patch(model)
        with caplog.at_level(logging.WARNING, "attnhub"):
            ours = [model(input_ids=IDS, attention_mask=LEFT, output_attentions=True) for _ in range(2)]
    assert sum("attention weights were asked for" in r.message for r in caplog.records) == 1
    rows = LEFT.bool()[:, None, :, None]
    assert len(ours[0].attentions) == len(theirs.attentions) == 2
    for a, b in zip(ours[0].attentions, theirs.attentions):
        assert a.shape == b.shape and close(a * rows, b * rows)
    assert all(m.backends == {counting.WEIGHTS: 2} for m in report.patched)
    logits(model)
    assert all(m.calls == 3 for m in report.patched)


def gradients(model: Any, **inputs: Any) -> list[Tensor]:
    loss = model(**inputs).loss
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [loss.detach(), *(g for g in found if g is not None)]


TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "Gemma2ForCausalLM": ("Gemma2Config", {**LLAMA, "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "GptOssForCausalLM": ("GptOssConfig", {**LLAMA, "head_dim": 8, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "T5ForConditionalGeneration": (
        "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_match(name: str) -> None:
    """Sinks and relative position biases included: parameters that only attention reads."""
    configuration, options = TRAINED[name]
    model = build(name, config(configuration, **options)).train()
    labels = LABELS
    theirs = gradients(model, input_ids=IDS, attention_mask=LEFT, labels=labels)
    report = attnhub.patch(model)
    ours = gradients(model, input_ids=IDS, attention_mask=LEFT, labels=labels)
    assert len(ours) == len(theirs) and report.calls > 0
    for a, b in zip(ours, theirs):
        assert close(a, b, 2e-5)


def test_gradient_checkpointing() -> None:
    model = llama().train()
    inputs = {"input_ids": IDS, "attention_mask": LEFT, "labels": LABELS}
    theirs = gradients(model, **inputs)
    report = attnhub.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = gradients(model, **inputs)
    assert all(close(a, b, 2e-5) for a, b in zip(ours, theirs)) and report.calls == 4


def test_dropout_acts_in_training_only() -> None:
    model = bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    theirs = logits(model)
    report = attnhub.patch(model)
    assert close(logits(model), theirs)
    model.train()
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    one = logits(model)
    torch.manual_seed(5)
    assert torch.equal(logits(model), one) and report.calls == 10


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_the_users_own(kind: str) -> None:
    model = llama()
    allowed = torch.rand(2, 1, 21, 21) < 0.5
    allowed |= torch.eye(21, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    theirs = logits(model, additive)
    report = attnhub.patch(model)
    assert close(logits(model, allowed if kind == "bool" else additive), theirs) and report.calls == 2


def test_packed_documents() -> None:
    """position_ids that start again begin a new document, which sees nothing of the one before."""
    model = llama()
    positions = torch.cat([torch.arange(8), torch.arange(13)]).expand(2, -1)
    theirs = logits(model, None, position_ids=positions)
    alone = logits(model, None)
    report = attnhub.patch(model)
    ours = logits(model, None, position_ids=positions)
    assert close(ours, theirs) and not close(ours, alone, 0.01) and report.calls == 2


def test_report_reads_well() -> None:
    model = llama()
    report = attnhub.patch(model)
    logits(model)
    assert isinstance(report, PatchReport)
    assert str(report).startswith("2 of 2 attention modules patched, 2 calls served")
    assert json.loads(json.dumps(report.to_json()))["modules"][0]["integration"] == "huggingface"
