"""`generate` with a patched model: the same tokens as with eager attention, in fp32, with every cache and search."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import pytest
import torch
from families import BATCH, GENERATORS, VOCAB, build, transformers
from torch import Tensor

import attnhub

#: Ten families in `make test`, the others in `make test-all`.
QUICK = ("llama", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "gpt2", "gpt_oss", "deepseek_v3", "cohere2")
SOURCES: dict[str, dict[str, Tensor]] = {
    "t5": {"input_ids": torch.arange(3, 21).reshape(2, 9), "attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5])},
    "bart": {"input_ids": torch.arange(3, 21).reshape(2, 9), "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4])},
    "whisper": {"input_features": torch.linspace(-2, 2, 384).sin().reshape(2, 8, 24)},
}


def quick_or_long(names: Sequence[str], quick: Container[str] = QUICK) -> list[object]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.long) for name in names]


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
@pytest.mark.parametrize("name", quick_or_long(GENERATORS))
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


@pytest.mark.parametrize("how", ["scale", "mask", "zeros", "causal"])
@pytest.mark.parametrize("name", quick_or_long(GENERATORS, ("llama", "mistral", "gpt_oss")))
def test_a_broken_backend_generates_other_tokens(name: str, how: str, broken: Callable[[str], str]) -> None:
    model = build(name)
    theirs = generate(model, "left")
    attnhub.patch(model)
    with attnhub.use(broken(how)):
        assert not torch.equal(generate(model, "left"), theirs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", quick_or_long(GENERATORS, ("llama", "mistral", "gpt_oss")))
def test_beam_search_is_equal(name: str, cache: str) -> None:
    model = build(name)
    options = {"num_beams": 3, **({"cache_implementation": "static"} if cache == "static" else {})}
    theirs = generate(model, "left", **options)
    report = attnhub.patch(model)
    assert torch.equal(generate(model, "left", **options), theirs)
    assert report.calls > 0


@pytest.mark.parametrize("how", ["greedy", "static", "beams"])
@pytest.mark.parametrize("name", SOURCES)
def test_encoder_decoder_generation_is_equal(name: str, how: str) -> None:
    model = build(name)
    search: dict[str, Any] = {"greedy": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}[how]
    options = {"max_new_tokens": 8, "do_sample": False, **search}
    theirs = model.generate(**SOURCES[name], **options)
    report = attnhub.patch(model)
    assert torch.equal(model.generate(**SOURCES[name], **options), theirs)
    assert all(m.calls > 0 for m in report.patched)


@pytest.mark.parametrize("how", ["assistant", "prompt"])
def test_assisted_generation_is_equal(how: str) -> None:
    """Drafts of another model, itself patched or not, or of the prompt; a step then has several queries."""
    model, drafts = build("llama"), build("mistral")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    options: dict[str, Any] = {"assistant_model": drafts} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    options |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(**options)
    report = attnhub.patch(model)
    assert torch.equal(model.generate(**options), theirs) and report.calls > 0
    if how == "assistant":
        drafted = attnhub.patch(drafts)
        assert torch.equal(model.generate(**options), theirs) and drafted.calls > 0
