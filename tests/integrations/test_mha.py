"""nn.MultiheadAttention through attnhub against the same module unpatched."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from mha_modules import BATCH, EMBED, LEN_K, LEN_Q, MASKS, TOLERANCE, VARIANTS, gap, inputs, module

import attnhub
from attnhub.integrations.calls import WEIGHTS


@pytest.mark.parametrize("attends", ["self", "cross", "memory"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_matches(variant: str, mask: str, attends: str) -> None:
    """Both layouts, with and without weights, in eval mode (where torch has its fast path) and in training."""
    for batch_first in (True, False):
        for training in (True, False):
            made = module(variant, batch_first).train(training)
            patched = copy.deepcopy(made)
            report = attnhub.patch(patched)
            tensors, arguments = inputs(made, mask, attends)
            for options in ({"need_weights": False}, {"need_weights": True}, {"need_weights": True, "average_attn_weights": False}):
                with torch.no_grad():
                    theirs = made(*tensors, **arguments, **options)
                    ours = patched(*tensors, **arguments, **options)
                assert gap(ours[0], theirs[0]) <= TOLERANCE
                assert gap(ours[1], theirs[1]) <= TOLERANCE
            assert report.calls == 3 and report.modules[0].backends[WEIGHTS] == 2


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_match(variant: str, mask: str) -> None:
    for need_weights in (False, True):
        made = module(variant)
        patched = copy.deepcopy(made)
        attnhub.patch(patched)
        tensors, arguments = inputs(made, mask, "cross")
        found = []
        for m in (made, patched):
            leaves = [t.clone().requires_grad_() for t in tensors]
            out, weights = m(*leaves, need_weights=need_weights, **arguments)
            loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
            if weights is not None:
                loss = loss + (weights**2).sum()
            found.append(torch.autograd.grad(loss, [*leaves, *m.parameters()]))
        for ours, theirs in zip(found[1], found[0]):
            assert gap(ours, theirs) <= 4 * TOLERANCE


@pytest.mark.parametrize(
    ("how", "mask"), [("scale", "none"), ("zeros", "none"), ("mask", "padding"), ("mask", "causal"), ("mask", "float")]
)
def test_broken_backends_fail(how: str, mask: str, broken: Callable[[str], str]) -> None:
    made = module("plain").eval()
    tensors, arguments = inputs(made, mask, "self")
    with torch.no_grad():
        theirs = made(*tensors, need_weights=False, **arguments)[0]
        attnhub.patch(made)
        with attnhub.use(broken(how)):
            ours = made(*tensors, need_weights=False, **arguments)[0]
    assert gap(ours, theirs) > 1000 * TOLERANCE


def test_unbatched_inputs() -> None:
    made = module("plain")
    patched = copy.deepcopy(made)
    attnhub.patch(patched)
    query, key = torch.randn(LEN_Q, EMBED), torch.randn(LEN_K, EMBED)
    padding = torch.zeros(LEN_K, dtype=torch.bool)
    padding[5:] = True
    for options in ({"need_weights": True}, {"need_weights": False}, {"need_weights": True, "average_attn_weights": False}):
        with torch.no_grad():
            ours, theirs = (m(query, key, key, key_padding_mask=padding, **options) for m in (patched, made))
        assert gap(ours[0], theirs[0]) <= TOLERANCE and gap(ours[1], theirs[1]) <= TOLERANCE


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_keys_are_zero(kind: str, need_weights: bool) -> None:
    """Where torch gives NaN or 0, by path."""
    made = module("plain").eval()
    attnhub.patch(made)
    (query, _, _), _ = inputs(made, "none", "self")
    padding = torch.zeros(BATCH, LEN_Q, dtype=torch.bool)
    padding[1] = True
    mask = padding if kind == "bool" else torch.zeros(BATCH, LEN_Q).masked_fill(padding, float("-inf"))
    leaf = query.clone().requires_grad_()
    out, weights = made(leaf, leaf, leaf, key_padding_mask=mask, need_weights=need_weights)
    assert torch.equal(out[1], made.out_proj.bias.expand_as(out[1]))
    assert weights is None or not weights[1].any()
    out[1].sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))


@attnhub.use("cpu")
def test_padded_nan_reaches_nothing() -> None:
    """By our own kernel: a key_padding_mask hides by value, and torch's kernels multiply hidden values by zero."""
    made = module("no_bias").eval()
    attnhub.patch(made)
    (query, key, _), arguments = inputs(made, "padding", "memory")
    clean = [made(query, key, key, need_weights=w, **arguments)[0] for w in (False, True)]
    key = key.masked_fill(arguments["key_padding_mask"][:, :, None], float("nan"))
    for w, before in zip((False, True), clean):
        assert torch.equal(made(query, key, key, need_weights=w, **arguments)[0][2], before[2])


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_has_the_right_mean_and_is_off_in_eval(need_weights: bool) -> None:
    made = module("plain", dropout=0.5)
    attnhub.patch(made)
    torch.manual_seed(3)
    row = torch.randn(1, 5, EMBED)
    batch = row.expand(4000, 5, EMBED).contiguous()
    with torch.no_grad():
        exact = made.eval()(row, row, row, need_weights=need_weights)[0]
        dropped = made.train()(batch, batch, batch, need_weights=need_weights)[0]
    spread = dropped.std(0)
    assert bool((spread > 0).any())
    assert bool(((dropped.mean(0) - exact[0]).abs() <= 6 * spread / 4000**0.5 + 1e-6).all())


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights: bool) -> None:
    made = module("plain").eval()
    tensors, arguments = inputs(made, "padding", "cross")
    with torch.no_grad():
        exact = made(*tensors, need_weights=need_weights, **arguments)[0]
        with torch.autocast("cpu", torch.bfloat16):
            theirs = made(*tensors, need_weights=need_weights, **arguments)[0]
            attnhub.patch(made)
            ours = made(*tensors, need_weights=need_weights, **arguments)[0]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert gap(ours.float(), exact) <= 2 * gap(theirs.float(), exact) + 2**-8


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    made = module("plain").eval()
    parts = [torch.randn(n, EMBED) for n in (4, 1, 6)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with torch.no_grad():
        alone = [made(p[None], p[None], p[None], need_weights=False)[0][0] for p in parts]
        report = attnhub.patch(made)
        out = made(nested, nested, nested, need_weights=False)[0]
    assert out.is_nested and out.layout == layout
    for ours, theirs in zip(out.unbind(), alone):
        assert gap(ours, theirs) <= TOLERANCE
    assert report.calls == 1
    with pytest.raises(ValueError, match="attn_mask"):
        made(nested, nested, nested, attn_mask=torch.zeros(6, 6))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_weights_of_nested_tensors(layout: torch.layout, average: bool) -> None:
    """Padded with zeros, as torch's fast path gives them for strided ones; it has none for jagged ones."""
    made = module("plain").eval()
    parts = [torch.randn(n, EMBED) for n in (4, 1, 6)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    strided = torch.nested.nested_tensor(parts)
    with torch.no_grad():
        theirs = made(strided, strided, strided, average_attn_weights=average)
        report = attnhub.patch(made)
        ours = made(nested, nested, nested, average_attn_weights=average)
    assert gap(ours[1], theirs[1]) <= TOLERANCE and ours[0].layout == layout and not ours[1][1, ..., 1:].any()
    assert all(gap(a, b) <= TOLERANCE for a, b in zip(ours[0].unbind(), theirs[0].unbind())) and report.modules[0].backends == {WEIGHTS: 1}


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_of_nested_tensors(need_weights: bool) -> None:
    made = module("plain")
    attnhub.patch(made)
    parts = [torch.randn(n, EMBED) for n in (4, 1, 6)]
    alone = [p.clone().requires_grad_() for p in parts]
    sum(((made(p[None], p[None], p[None], need_weights=False)[0] ** 2).sum() for p in alone), torch.zeros(())).backward()
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    (made(nested, nested, nested, need_weights=need_weights)[0].values() ** 2).sum().backward()
    assert nested.grad is not None
    assert all(a.grad is not None and gap(b, a.grad) <= 4 * TOLERANCE for a, b in zip(alone, nested.grad.unbind()))


def test_bad_arguments_name_the_argument() -> None:
    made = module("plain")
    attnhub.patch(made)
    (query, _, _), _ = inputs(made, "none", "self")
    with pytest.raises(ValueError, match="attn_mask has shape"):
        made(query, query, query, attn_mask=torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[12, 7, 7\]"):
        made(query, query, query, attn_mask=torch.zeros(BATCH, LEN_Q, LEN_Q))
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        made(query, query, query, key_padding_mask=torch.zeros(BATCH, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        made(query, query, query, key_padding_mask=torch.zeros(BATCH, LEN_Q, dtype=torch.long))
    for weights in (False, True):
        with pytest.raises(ValueError, match=r"batch 2 and key .* 1: they must be equal"):
            made(query[:2], query[:1], query[:1], need_weights=weights)
    with pytest.raises(ValueError, match=r"key has shape .* a last dimension of"):
        made(query, query[..., :8], query)
    with pytest.raises(TypeError, match="value is a NoneType"):
        made(query, query, None)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        made(query, query, query, is_causal=True)
