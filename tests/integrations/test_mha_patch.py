"""Patching keeps a module with nn.MultiheadAttention what it was, and reports what cannot be routed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from mha_modules import BATCH, EMBED, HEADS, LEN_Q, TOLERANCE, encoder, gap, inputs, module
from torch import nn
from torch.nn.utils import parametrizations, prune

import attnhub


def test_class_state_copy_and_pickle() -> None:
    model = encoder()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    x = torch.randn(BATCH, LEN_Q, EMBED)
    report = attnhub.patch(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention) and isinstance(model.layers[0], nn.TransformerEncoderLayer)
    assert "(self_attn): MultiheadAttention(" in repr(model)
    with torch.no_grad():
        expected = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            calls = report.calls
            assert torch.equal(other(x), expected) and report.calls == calls
            fresh = attnhub.patch(other)
            other.layers[0].self_attn.out_proj.bias += 1.0
            assert not torch.equal(other(x), expected), "a copy runs its own weights"
            assert fresh.calls == 2 and torch.equal(model(x), expected)
            assert attnhub.unpatch(other) == 2 and [type(m) for m in other.modules()] == classes
    assert attnhub.patch(model).modules[0] is report.modules[0], "patching twice keeps the report"
    assert attnhub.unpatch(model) == 2
    assert [type(m) for m in model.modules()] == classes and attnhub.unpatch(model) == 0


def test_only_selects() -> None:
    model = encoder()
    report = attnhub.patch(model, only=lambda name, _: name.startswith("layers.1"))
    assert [m.name for m in report.patched] == ["layers.1.self_attn"] and report.skipped[0].reason == "left out by only="
    with torch.no_grad():
        model(torch.randn(BATCH, LEN_Q, EMBED))
    assert report.calls == 1
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


def test_another_swapper_on_top() -> None:
    """Parametrisations swap classes too: unpatching takes out our class from under theirs."""
    made = module("plain").eval()
    (query, _, _), _ = inputs(made, "none", "self")
    attnhub.patch(made)
    parametrizations.weight_norm(made, "in_proj_weight")
    with torch.no_grad():
        patched = made(query, query, query, need_weights=False)[0]
    assert attnhub.unpatch(made) == 1
    assert not any(c.__name__ == "MultiheadAttentionMixin" for c in type(made).__mro__)
    with torch.no_grad():
        assert gap(made(query, query, query, need_weights=False)[0], patched) <= TOLERANCE


def test_a_forward_on_the_module_is_not_bypassed_in_silence() -> None:
    """As accelerate's hooks set it: the class's forward, ours included, is never called."""
    made = module("plain")
    made.forward = lambda query, *args, **kwargs: (query, None)  # type: ignore[method-assign]
    report = attnhub.patch(nn.ModuleList([made]))
    assert not report.patched and "set on the module" in report.skipped[0].reason and type(made) is nn.MultiheadAttention


def test_quantised_weights_are_reported() -> None:
    dynamic, packed, whole = module("plain"), module("plain"), torch.ao.nn.quantizable.MultiheadAttention(EMBED, HEADS)
    dynamic.out_proj = torch.ao.nn.quantized.dynamic.Linear(EMBED, EMBED)
    packed.in_proj_weight = nn.Parameter(torch.zeros(3 * EMBED, EMBED, dtype=torch.uint8), requires_grad=False)
    report = attnhub.patch(nn.ModuleDict({"dynamic": dynamic, "packed": packed, "whole": whole, "plain": module("plain")}))
    reasons = {m.name: m.reason for m in report.skipped}
    assert [m.name for m in report.patched] == ["plain"] and set(reasons) == {"dynamic", "packed", "whole"}
    assert "out_proj.weight is no tensor" in reasons["dynamic"] and "in_proj_weight is torch.uint8" in reasons["packed"]
    assert "forward of its own" in reasons["whole"]


@pytest.mark.parametrize("how", ["weight_norm", "out_proj", "old_weight_norm", "pruned"])
def test_parametrised_weights_are_read_as_they_are(how: str) -> None:
    made = module("plain").eval()
    if how == "weight_norm":
        source = parametrizations.weight_norm(made, "in_proj_weight").parametrizations.in_proj_weight.original0
    elif how == "out_proj":
        source = parametrizations.weight_norm(made.out_proj, "weight").parametrizations.weight.original0
    elif how == "old_weight_norm":
        source = nn.utils.weight_norm(made, "in_proj_weight").in_proj_weight_g
    else:
        source = prune.random_unstructured(made, "in_proj_weight", 0.3).in_proj_weight_orig
    (query, _, _), _ = inputs(made, "none", "self")
    keys = list(made.state_dict())
    theirs = made(query, query, query, need_weights=False)[0]
    report = attnhub.patch(made)
    with torch.no_grad():
        ours = made(query, query, query, need_weights=False)[0]
        source *= 2.0
        assert gap(made(query, query, query, need_weights=False)[0], theirs) > 0.1
    assert gap(ours, theirs) <= TOLERANCE and report.calls == 2 and list(made.state_dict()) == keys
    assert attnhub.unpatch(made) == 1


def test_hooks_see_what_they_saw() -> None:
    """Forward and backward hooks of the attention, and of layers in eval mode, where torch's own fused layer calls none of its parts."""
    model, seen = encoder(), []
    attention = model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append(("pre", sorted(kwargs))), with_kwargs=True)
    attention.register_forward_hook(lambda m, args, out: seen.append(("post", out[0].shape, out[1])))
    attention.register_full_backward_hook(lambda m, gin, gout: seen.append(("backward", gout[0].shape)))
    found = []
    for patched in (False, True):
        if patched:
            attnhub.patch(model)
        for training in (True, False):
            seen.clear()
            model.train(training)(torch.randn(BATCH, LEN_Q, EMBED, requires_grad=True)).sum().backward()
            found.append(list(seen))
    assert [kind for kind, *_ in found[0]] == ["pre", "post", "backward"]
    assert found[0] == found[2] == found[1] == found[3]


def test_counting_a_call_asks_no_plan_to_describe_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes as long as a small call."""
    made = module("plain").eval()
    report = attnhub.patch(made)
    (query, _, _), _ = inputs(made, "none", "self")
    with attnhub.use("sdpa"), torch.no_grad():
        made(query, query, query, need_weights=False)
        monkeypatch.setattr(attnhub.runtime, "_with_plan", lambda *_: pytest.fail("a plan was asked"))
        made(query, query, query, need_weights=False)
    assert report.modules[0].backends == {"sdpa": 2}
