"""Attention that a model writes out in operations of its own, read by attnhub while it runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from families import BATCH, LENGTH, PADDINGS, VOCAB, padding, transformers
from torch import Tensor, nn

import attnhub
from attnhub.integrations.huggingface.deferred import Deferred
from attnhub.integrations.huggingface.reading import DeferredMaths
from attnhub.integrations.huggingface.tiny import enlarge

TOLERANCE = 5e-6
_PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 128}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
#: class -> (configuration, its arguments, whether a text sees only what is before it)
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "BloomForCausalLM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "eos_token_id": None}, True),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "attention_types": [[["global", "local"], 1]], "window_size": 6, "eos_token_id": None}, True,
    ),
    "MptForCausalLM": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "eos_token_id": None}, True),
    "FalconForCausalLM": ("FalconConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB, "eos_token_id": None}, True),
    "XGLMForCausalLM": (
        "XGLMConfig",
        {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": None}, True,
    ),
    "DebertaModel": ("DebertaConfig", {**_PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, False),
    "DebertaV2Model": ("DebertaV2Config", {**_PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}, False),
    "XLNetModel": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": VOCAB}, False),
    "XLMModel": ("XLMConfig", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": VOCAB, "pad_index": 0}, False),
    "SqueezeBertModel": ("SqueezeBertConfig", {**_PLAIN, "embedding_size": 32}, False),
    "MPNetModel": ("MPNetConfig", _PLAIN, False),
    "RoFormerModel": ("RoFormerConfig", {**_PLAIN, "embedding_size": 32}, False),
}  # fmt: skip
GENERATORS = [name for name in MODELS if name.endswith("CausalLM")]


def build(name: str) -> Any:
    configuration, options, _ = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, configuration)(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    enlarge(model)
    return model


def run(model: Any, pad: str) -> Tensor:
    torch.manual_seed(2)
    mask = padding(pad)
    with torch.no_grad():
        out = model(input_ids=torch.randint(3, VOCAB, (BATCH, LENGTH)), attention_mask=mask)
    found = (out.logits if hasattr(out, "logits") else out.last_hidden_state).float()
    return found if mask is None else found[mask.bool()]


@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_own_attention_is_served(name: str, pad: str) -> None:
    model = build(name)
    theirs = run(model, pad)
    report = attnhub.patch(model)
    assert float((run(model, pad) - theirs).abs().max()) <= TOLERANCE
    assert len(report.patched) == 2 and not report.skipped and all(m.calls > 0 for m in report.patched)
    assert attnhub.unpatch(model) == 2
    calls = report.calls
    assert torch.equal(run(model, pad), theirs) and report.calls == calls
    assert type(model).__module__.startswith("transformers.") and not any("_attnhub" in key for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("name", MODELS)
def test_own_attention_in_bf16_is_as_good(name: str) -> None:
    for pad in PADDINGS:
        exact = run(build(name), pad)
        model = build(name).to(torch.bfloat16)
        theirs = float((run(model, pad) - exact).abs().max())
        report = attnhub.patch(model)
        assert float((run(model, pad) - exact).abs().max()) <= 2 * theirs and report.calls > 0


@pytest.mark.parametrize("how", ["scale", "mask", "zeros"])
@pytest.mark.parametrize("name", MODELS)
def test_broken_backends_fail(name: str, how: str, broken: Callable[[str], str]) -> None:
    """Causality is no structure here but part of the mask, so that losing the mask loses it too."""
    backend = broken(how)
    for pad in ("none", "left", "right") if MODELS[name][2] or how != "mask" else ("left", "right"):
        model = build(name)
        theirs = run(model, pad)
        report = attnhub.patch(model)
        with attnhub.use(backend):
            assert float((run(model, pad) - theirs).abs().max()) > 1000 * TOLERANCE
        assert all(m.backends == {backend: m.calls} for m in report.patched)


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_is_equal(name: str) -> None:
    model = build(name)
    ids = torch.arange(3, 21).reshape(2, 9)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    for options in ({}, {"num_beams": 3}):
        arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
        theirs = model.generate(**arguments)
        report = attnhub.patch(model)
        assert torch.equal(model.generate(**arguments), theirs) and report.calls > 0
        attnhub.unpatch(model)


@pytest.mark.parametrize("name", ["BloomForCausalLM", "MptForCausalLM", "DebertaV2Model", "XLNetModel"])
def test_gradients_match(name: str) -> None:
    """Those of relative position embeddings too, which reach attention as a bias."""
    model = build(name)
    ids = torch.randint(3, VOCAB, (2, 12))

    def gradients() -> list[Optional[Tensor]]:
        out = model(input_ids=ids)
        loss = (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    theirs = gradients()
    report = attnhub.patch(model)
    ours = gradients()
    assert report.calls == 2
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert float((a - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))


def test_weights_that_are_asked_for_are_the_models_own() -> None:
    model = build("BloomForCausalLM")
    ids = torch.randint(3, VOCAB, (2, 12))
    with torch.no_grad():
        theirs = model(input_ids=ids, output_attentions=True).attentions
        report = attnhub.patch(model)
        ours = model(input_ids=ids, output_attentions=True).attentions
    assert all(type(a) is Tensor and torch.equal(a, b) for a, b in zip(ours, theirs)) and report.calls == 0
    assert all("is asked for its attention weights" in m.reason for m in report.modules)


def test_dropout_acts_in_training_only() -> None:
    configuration, options, _ = MODELS["BloomForCausalLM"]
    config = getattr(transformers, configuration)(**options, attention_dropout=0.5)
    model = transformers.BloomForCausalLM(config).eval()
    enlarge(model)
    theirs = run(model, "none")
    report = attnhub.patch(model)
    assert float((run(model, "none") - theirs).abs().max()) <= TOLERANCE
    model.train()
    assert float((run(model, "none") - theirs).abs().max()) > 0.01 and report.calls == 4


def test_copies_run_their_own_weights_and_pickle() -> None:
    model = build("MptForCausalLM")
    report = attnhub.patch(model)
    theirs = run(model, "none")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, "none"), theirs)
        with torch.no_grad():
            other.transformer.blocks[0].attn.out_proj.weight.zero_()
        assert not torch.equal(run(other, "none"), theirs)
    assert report.calls == 2


def test_what_is_no_attention_runs_as_it_is_written() -> None:
    model = transformers.LongformerModel(transformers.LongformerConfig(**{**_PLAIN, "attention_window": 8})).eval()
    theirs = run(model, "right")
    report = attnhub.patch(model)
    assert len(report.patched) == 2
    for _ in range(5):
        assert torch.equal(run(model, "right"), theirs)
    assert report.calls == 0 and not report.patched and all("something else than softmax" in m.reason for m in report.skipped)


def test_a_part_is_called_a_part() -> None:
    """Of the three softmaxes of Nystromformer one is followed by v."""
    model = transformers.NystromformerModel(transformers.NystromformerConfig(**{**_PLAIN, "num_landmarks": 4, "segment_means_seq_len": 20, "conv_kernel_size": 3})).eval()
    enlarge(model)
    ids = torch.randint(3, VOCAB, (2, 20))
    with torch.no_grad():
        theirs = model(input_ids=ids).last_hidden_state
        report = attnhub.patch(model)
        torch.testing.assert_close(model(input_ids=ids).last_hidden_state, theirs, rtol=1e-4, atol=1e-4)
    assert all(m.calls == 1 and m.backends["own operations"] == 2 for m in report.patched) and report.calls == 2


@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_multi_head_attention_forward_is_read(need_weights: bool) -> None:
    """WavLM calls it with projections of its own."""
    layer = nn.MultiheadAttention(8, 2, batch_first=False)
    x, mask = torch.randn(5, 2, 8), torch.randn(2 * 2, 5, 5)
    arguments = (x, x, x, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight, layer.out_proj.bias)
    theirs, weights = nn.functional.multi_head_attention_forward(*arguments, attn_mask=mask, need_weights=need_weights)
    with DeferredMaths() as scope:
        ours, seen = nn.functional.multi_head_attention_forward(*arguments, attn_mask=mask, need_weights=need_weights)
    assert len(scope.served) == 1 and scope.missed == 0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (seen is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(seen + 0.0, weights)


def test_compiles_without_being_read() -> None:
    """A graph holds the model's own operations: there are no values to wait for."""
    model = build("BloomForCausalLM")
    theirs = run(model, "none")
    report = attnhub.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert float((run(compiled, "none") - theirs).abs().max()) <= TOLERANCE and report.calls == 0


# -- operations ------------------------------------------------------------------------------------------------------------

Q, K, V = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
KEEP = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:, None, None, :]
LOW = torch.finfo(torch.float32).min
#: No two rows of it differ by a constant, which a softmax would not show.
WAVES = 3 * torch.linspace(0, 40, 70).square().sin()


def _in_place(s: Tensor) -> Tensor:
    s /= 3.0
    s += torch.zeros(2, 1, 5, 7).masked_fill(~KEEP, LOW)
    view = s.view(6, 5, 7)
    view *= 2.0
    return s


SERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda s: s.softmax(-1),
    "scaled": lambda s: torch.softmax(s * 0.3, dim=-1),
    "divided by a tensor": lambda s: (s / torch.tensor(2.5)).softmax(3),
    "a factor a head": lambda s: (s * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1) + torch.ones(3, 5, 7).tril()).softmax(-1),
    "biases, then scaled": lambda s: ((1.0 + s + torch.linspace(0, 1, 7)) * 0.5).softmax(-1),
    "bias of a batch of heads": lambda s: (s.view(6, 5, 7) - WAVES[:42].view(6, 1, 7)).view(2, 3, 5, 7).softmax(-1),
    "windows of a batch": lambda s: (s.view(1, 2, 3, 5, 7) + WAVES.view(2, 1, 5, 7).unsqueeze(0)).view(-1, 3, 5, 7).softmax(-1),
    "filled": lambda s: s.masked_fill(~KEEP, LOW).softmax(-1),
    "filled, and its weights with 0": lambda s: s.masked_fill(~KEEP, LOW).softmax(-1).masked_fill(~KEEP, torch.scalar_tensor(0.0)),
    "chosen": lambda s: torch.where(KEEP, s, torch.full([], LOW)).softmax(-1),
    "chosen by a number that was another": lambda s: torch.where(KEEP, s, torch.full([], -2.0).fill_(LOW)).softmax(-1),
    "filled as the scores are shaped": lambda s: s.masked_fill_((~KEEP).expand_as(s), -1e9).softmax(-1),
    "clamped": lambda s: torch.max(s.masked_fill(~KEEP, LOW), torch.tensor(LOW)).softmax(-1),
    "cast": lambda s: torch.nn.functional.softmax(s.double(), dim=-1).to(torch.float32).type_as(s),
    "in place": lambda s: _in_place(s).softmax(-1),
}  # fmt: skip
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "another dimension": lambda s: s.softmax(-2),
    "negative scale": lambda s: (s * -1.0).softmax(-1),
    "capped": lambda s: (s.clamp(-1, 1)).softmax(-1),
    "heads mixed": lambda s: torch.einsum("bhij,hg->bgij", s, torch.ones(3, 3)).softmax(-1),
    "filled with a number of no account": lambda s: s.masked_fill(~KEEP, -2.0).softmax(-1),
    "filled with a number that was low": lambda s: torch.where(KEEP, s, torch.tensor(LOW).fill_(-2.0)).softmax(-1),
    "weights changed": lambda s: s.softmax(-1) * 0.5,
    "filled, and other weights with 0": lambda s: s.masked_fill(~KEEP, LOW).softmax(-1).masked_fill(KEEP, 0.0),
    "filled, and its weights with 1": lambda s: s.masked_fill(~KEEP, LOW).softmax(-1).masked_fill(~KEEP, 1.0),
    "weights chosen": lambda s: s.softmax(-1).masked_fill(~KEEP, 0.0),
    "no softmax": lambda s: s * 2,
    "assigned": lambda s: s.index_fill_(3, torch.tensor([1]), 0.0).softmax(-1),
    "listed": lambda s: torch.cat([s[..., :3], s[..., 3:]], -1).softmax(-1),
    "stacked": lambda s: torch.stack([s, s]).sum(0).softmax(-1),
}


@pytest.mark.parametrize("name", [*SERVED, *OTHERS])
def test_operations(name: str) -> None:
    """Served or not, the result is what torch gives; and what is served is known."""
    maths = (SERVED | OTHERS)[name]
    q, k, v = (t.clone().requires_grad_() for t in (Q, K, V))
    theirs = maths(q @ k.transpose(-1, -2)) @ v
    wanted = torch.autograd.grad(theirs.square().sum(), (q, k, v))
    with DeferredMaths() as scope:
        ours = 1.0 * (maths(torch.matmul(q, k.transpose(-1, -2))) @ v)
    ours = ours.contiguous()
    assert type(ours) is Tensor and len(scope.served) == (name in SERVED)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), (q, k, v)), wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scores", "values", "axes"),
    [("bhqd,bhkd->bhqk", "bhqk,bhkd->bqhd", "bhsd"), ("ibnd,jbnd->bnij", "bnij,jbnd->ibnd", "sbhd"), ("...qhd,...khd->...hqk", "...hqk,...khd->...qhd", "bshd")],
)
def test_einsum(scores: str, values: str, axes: str) -> None:
    q, k, v = (t.permute(["bhsd".index(c) for c in axes]).contiguous() for t in (Q, K, V))
    theirs = torch.einsum(values, torch.einsum(scores, q, k).softmax(-1), v)
    with DeferredMaths() as scope:
        ours = torch.einsum(values, torch.einsum(scores, q, k).softmax(-1), v)
        # CvT's notation.
        listed = torch.einsum(values, [torch.einsum(scores, [q, k]).softmax(-1), v])
    assert len(scope.served) == 2 and torch.equal(ours, listed)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_head_of_keys_serves_all() -> None:
    k, v = K[:, :1], V[:, :1]
    with DeferredMaths() as scope:
        ours = (Q @ k.transpose(-1, -2)).softmax(-1) @ v
    torch.testing.assert_close(ours, (Q @ k.transpose(-1, -2)).softmax(-1) @ v, rtol=1e-5, atol=1e-5)
    decision = attnhub.last_decision()
    assert len(scope.served) == 1 and decision is not None and decision.problem.kv_heads == 1


def test_what_leaves_the_scope_is_a_tensor_still() -> None:
    with DeferredMaths():
        weights = (Q @ K.transpose(-1, -2)).softmax(-1)
    theirs = (Q @ K.transpose(-1, -2)).softmax(-1)
    assert isinstance(weights, Deferred) and weights.shape == theirs.shape and weights.dtype == theirs.dtype
    assert torch.equal(weights.sum(-1), theirs.sum(-1)) and torch.equal(weights[0, 1], theirs[0, 1])
    assert torch.equal(pickle.loads(pickle.dumps(weights)), theirs) and weights.numpy().shape == theirs.shape
    assert repr(weights) == repr(theirs)


def test_an_operand_that_changes_meanwhile_is_an_error() -> None:
    q, bias = Q.clone(), torch.zeros(5, 7)
    for changed in (q, bias):
        with DeferredMaths():
            weights = ((q @ K.transpose(-1, -2)) + bias).softmax(-1)
            changed.add_(1.0)
            with pytest.raises(RuntimeError, match="changed in place"):
                weights @ V
    with pytest.raises(RuntimeError, match="changed in place"):
        weights.sum()


def test_sdpa_in_the_scope_is_served() -> None:
    with DeferredMaths() as scope:
        ours = nn.functional.scaled_dot_product_attention(Q, K, V, attn_mask=KEEP)
    torch.testing.assert_close(ours, nn.functional.scaled_dot_product_attention(Q, K, V, attn_mask=KEEP), rtol=1e-5, atol=1e-5)
    assert len(scope.served) == 1
