"""Continuous batching: `generate_batch` of a patched model gives the tokens of `generate`, its decode steps read the pages where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, transformers

import attnhub
from attnhub.integrations.huggingface import paged as paging
from attnhub.integrations.huggingface.paged import NAME, paged

ContinuousBatchingConfig = pytest.importorskip("transformers.generation.configuration_utils").__dict__.get("ContinuousBatchingConfig")
if ContinuousBatchingConfig is None or not hasattr(ContinuousBatchingConfig(), "page_size"):
    pytest.skip("this transformers hands over no block tables", allow_module_level=True)

NEW = 8
#: Of several lengths; the last two begin alike for longer than a page.
PROMPTS = [
    torch.randint(10, 99, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 3)
] + [[*range(20, 32), 50 + n] for n in (0, 1)]  # fmt: skip
FULL_ATTENTION = ("llama", "qwen3", "mixtral", "olmo2", "granite", "gpt2")
SLIDING = ("mistral", "gpt_oss", "gemma2", "gemma3", "phi3", "cohere2")
QUICK = ("llama", "gpt2", "mistral", "gpt_oss", "gemma2")


def by_generate(model: Any) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found


def by_generate_batch(model: Any) -> list[list[int]]:
    generation = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=24)
    outputs = model.generate_batch(PROMPTS, generation_config=generation, continuous_batching_config=batching, progress_bar=False)
    return [outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in (*FULL_ATTENTION, *SLIDING)])
def test_the_tokens_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    theirs = by_generate(model)
    report = attnhub.patch(model)
    seen: list[str] = []

    def attention(*args: Any, **options: Any) -> Any:
        seen.append("pages" if "kv_cache" in options else "packed" if options["varlen"].max_seqlen_q > 1 else "packed steps")
        return attnhub.attention(*args, **options)

    monkeypatch.setattr(paging, "attention", attention)
    with paged(model):
        assert model.config._attn_implementation == NAME
        assert by_generate_batch(model) == theirs
    assert model.config._attn_implementation == "attnhub" and report.calls == len(seen) > 0
    assert "packed" in seen and ("pages" in seen) == (name in FULL_ATTENTION) and ("packed steps" in seen) == (name in SLIDING)
    if name in FULL_ATTENTION:
        # Steps of all sequences together, each once for both layers.
        assert seen.count("pages") >= 2 * (NEW - 2)
    assert by_generate(model) == theirs, "and outside of the scope everything is as before"


@pytest.mark.parametrize("how", ["scale", "mask", "zeros"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_broken_backend_gives_other_tokens(name: str, how: str, broken: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is generated in a thread of its own, which sees the environment and no context."""
    model = build(name)
    theirs = by_generate(model)
    report = attnhub.patch(model)
    backend = broken(how)
    monkeypatch.setenv("ATTNHUB_BACKEND", backend)
    with paged(model):
        assert by_generate_batch(model) != theirs
    assert set(report.modules[0].backends) == {backend}


def test_without_the_scope_transformers_refuses() -> None:
    model = build("llama")
    attnhub.patch(model)
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        by_generate_batch(model)


def test_models_that_cannot_take_part() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn cannot take part: it is not patched"), paged(model):
        pass
    attnhub.patch(model, only=lambda name, _: ".0." in name)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn"), paged(model):
        pass
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=99))
    attnhub.patch(bloom)
    with pytest.raises(ValueError, match="never asks transformers' attention interface"), paged(bloom):
        pass


def test_an_ordinary_call_in_the_scope_is_an_error() -> None:
    model = build("llama")
    attnhub.patch(model)
    with paged(model), pytest.raises(ValueError, match="leave the scope first"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_scopes_leave_transformers_as_it_was() -> None:
    from transformers.generation.continuous_batching import initialization

    before = initialization.ensure_decode_fast_path_is_available
    one, other = build("llama"), build("mistral")
    attnhub.patch(one), attnhub.patch(other)
    with paged(one):
        with paged(other):
            assert initialization.ensure_decode_fast_path_is_available is not before
        assert initialization.ensure_decode_fast_path_is_available is not before
    assert initialization.ensure_decode_fast_path_is_available is before
    with pytest.raises(ZeroDivisionError), paged(one):
        1 / 0  # noqa: B018
    assert initialization.ensure_decode_fast_path_is_available is before and one.config._attn_implementation == "attnhub"
