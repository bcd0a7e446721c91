"""Patched models under torch.compile and torch.export: one graph without breaks, for every length, with caches that grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from families import BATCH, FAMILIES, LENGTH, PADDINGS, VOCAB, build, padding, run, transformers
from torch import Tensor, nn

import attnhub

TOLERANCE = 5e-6
IDS = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


class LastState(nn.Module):
    """The model with a tensor for an output."""

    def __init__(self, model: Any, **fixed: Any) -> None:
        super().__init__()
        self.model, self.fixed = model, fixed

    def forward(self, **inputs: Any) -> Tensor:
        out = self.model(**inputs, **self.fixed)
        found = out.logits if hasattr(out, "logits") else out.last_hidden_state
        assert isinstance(found, Tensor)
        return found


def compiled(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


@pytest.mark.parametrize("pad", [pytest.param(pad, marks=() if pad == "left" else pytest.mark.long) for pad in PADDINGS])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "bert", "gpt2"])
def test_text_models_are_one_graph(name: str, pad: str) -> None:
    model = build(name)
    (theirs, valid), *_ = run(model, name, pad)
    report = attnhub.patch(model)
    graph, counter = compiled(LastState(model, **({"use_cache": False} if FAMILIES[name].generates else {})))
    mask = padding(pad)
    torch.manual_seed(2)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    with torch.no_grad():
        ours = graph(input_ids=ids, attention_mask=mask)
    assert float((ours - theirs)[... if valid is None else valid].abs().max()) <= TOLERANCE
    assert counter.frame_count == 1 and not torch._dynamo.utils.counters["graph_break"]
    assert sum("attnhub.forward" in str(node.target) for node in counter.graphs[0].graph.nodes) == len(report.patched)
    assert report.calls == 0, "calls are counted outside tracing"


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_image_and_sound_encoders_are_one_graph(name: str) -> None:
    model = build(name)
    encoder = model if name == "vit" else model.model.encoder
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24)} if name == "vit" else {"input_features": torch.randn(2, 8, 24)}
    with torch.no_grad():
        theirs = encoder(**inputs).last_hidden_state
        attnhub.patch(model)
        graph, counter = compiled(LastState(encoder))
        assert float((graph(**inputs) - theirs).abs().max()) <= TOLERANCE
    assert counter.frame_count == 1 and not torch._dynamo.utils.counters["graph_break"]
    assert sum("attnhub.forward" in str(node.target) for node in counter.graphs[0].graph.nodes) == 2


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.long) for name in ("mistral", "bert"))])
def test_one_graph_serves_every_length(name: str) -> None:
    model = build(name)
    fixed = {"use_cache": False} if FAMILIES[name].generates else {}
    wanted = [LastState(model, **fixed)(input_ids=IDS[:, :n], attention_mask=padding("left")[:, :n]) for n in (9, 12, 17, 21)]  # type: ignore[index]
    attnhub.patch(model)
    graph, counter = compiled(LastState(model, **fixed), dynamic=True)
    counts = []
    for n, theirs in zip((9, 12, 17, 21), wanted):
        mask = padding("left")
        assert mask is not None
        valid = mask[:, :n].bool()
        with torch.no_grad():
            ours = graph(input_ids=IDS[:, :n].contiguous(), attention_mask=mask[:, :n].contiguous())
        assert float((ours - theirs)[valid].abs().max()) <= TOLERANCE
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts == counts[:1] * 4


def test_trains_in_one_graph() -> None:
    model = build("llama").train()
    labels = IDS.clone()
    theirs = model(input_ids=IDS, labels=labels, use_cache=False).loss
    wanted = torch.autograd.grad(theirs, list(model.parameters()))
    attnhub.patch(model)
    torch._dynamo.reset()
    graph = torch.compile(lambda ids, labels: model(input_ids=ids, labels=labels, use_cache=False).loss, backend="aot_eager", fullgraph=True)
    ours = graph(IDS, labels)
    for a, b in zip(torch.autograd.grad(ours, list(model.parameters())), wanted):
        assert float((a - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.long)])
def test_a_step_with_a_static_cache_is_one_graph(name: str) -> None:
    """Prefill as it is, then decode steps: no more graphs than without attnhub, where a sliding cache counts in a number once."""
    model = build(name)
    found, graphs = [], []
    for patched in (False, True):
        if patched:
            attnhub.patch(model)
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(input_ids=IDS[:, :8], past_key_values=cache, use_cache=True)
            step, counter = compiled(LastState(model, use_cache=True))
            rows = [step(input_ids=IDS[:, n : n + 1].contiguous(), past_key_values=cache, position_ids=torch.tensor([[n]])) for n in range(8, 14)]
        found.append(torch.cat(rows, 1))
        graphs.append(counter.frame_count)
    assert 0 < graphs[1] <= graphs[0] <= 2
    assert float((found[0] - found[1]).abs().max()) <= TOLERANCE


def test_exports() -> None:
    model = build("bert")
    mask = padding("left")
    assert mask is not None
    with torch.no_grad():
        theirs = model(input_ids=IDS, attention_mask=mask).last_hidden_state
    attnhub.patch(model)
    exported = torch.export.export(model, (), {"input_ids": IDS, "attention_mask": mask}, strict=False)
    assert sum("attnhub.forward" in str(node.target) for node in exported.graph.nodes) == 2
    ours = exported.module()(input_ids=IDS, attention_mask=mask).last_hidden_state
    assert float((ours - theirs)[mask.bool()].abs().max()) <= TOLERANCE
