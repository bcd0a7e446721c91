"""nn.MultiheadAttention and nn.Transformer* through attnhub against the same modules unpatched."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import attnhub
from attnhub.integrations.calls import WEIGHTS

TOLERANCE = 5e-6
BATCH, LEN_Q, LEN_K, EMBED, HEADS = 3, 7, 9, 32, 4

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_vdim": {"kdim": 20, "vdim": 24},
    "kdim_no_bias": {"kdim": 20, "bias": False},
    "odd_heads": {"num_heads": 1},
}
MASKS = ["none", "padding", "float_padding", "bool", "float", "per_head", "padding_and_bool", "both_float", "causal", "causal_padding"]


def module(variant: str, batch_first: bool = True, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    options = {"num_heads": HEADS, **VARIANTS[variant], **options}
    made = nn.MultiheadAttention(EMBED, batch_first=batch_first, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.4)
    return made


def inputs(made: nn.MultiheadAttention, mask: str, attends: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """(query, key, value) in the module's layout, and the mask arguments. Every query keeps at least one key."""
    torch.manual_seed(2)
    query = torch.randn(BATCH, LEN_Q, EMBED)
    if attends == "self" and made._qkv_same_embed_dim:
        tensors = [query] * 3
    else:
        key, value = torch.randn(BATCH, LEN_K, made.kdim), torch.randn(BATCH, LEN_K, made.vdim)
        tensors = [query, key, key if attends == "memory" and made._qkv_same_embed_dim else value]
    len_k = tensors[1].shape[1]
    padding = torch.zeros(BATCH, len_k, dtype=torch.bool)
    padding[1, len_k - 3 :] = True
    padding[2, 3:] = True
    pairs = torch.rand(LEN_Q, len_k) < 0.4
    pairs[:, 0] = False
    floats = torch.randn(LEN_Q, len_k)
    causal = torch.triu(torch.ones(LEN_Q, len_k, dtype=torch.bool), 1)
    heads = torch.rand(BATCH * made.num_heads, LEN_Q, len_k) < 0.4
    heads[..., 0] = False
    arguments: dict[str, dict[str, Any]] = {
        "none": {}, "padding": {"key_padding_mask": padding}, "bool": {"attn_mask": pairs}, "float": {"attn_mask": floats}, "per_head": {"attn_mask": heads},
        "float_padding": {"key_padding_mask": torch.zeros(BATCH, len_k).masked_fill(padding, float("-inf"))},
        "padding_and_bool": {"key_padding_mask": padding, "attn_mask": pairs},
        "both_float": {"key_padding_mask": torch.randn(BATCH, len_k), "attn_mask": floats},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal_padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }  # fmt: skip
    if not made.batch_first:
        swapped: dict[int, Tensor] = {}
        tensors = [swapped.setdefault(id(t), t.transpose(0, 1).contiguous()) for t in tensors]
    return (tensors[0], tensors[1], tensors[2]), arguments[mask]


def gap(ours: Optional[Tensor], theirs: Optional[Tensor]) -> float:
    if ours is None or theirs is None:
        assert ours is None and theirs is None
        return 0.0
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0))


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
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        made(query, query, query, is_causal=True)


# -- nn.Transformer* -------------------------------------------------------------------------------------------------------


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    options = {"batch_first": True, "dropout": 0.0, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 48, **options), 2).eval()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("masked", ["none", "padding", "hole", "causal", "causal_padding"])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}, {"activation": nn.functional.silu}],
    ids=["post", "pre", "gelu", "sequence_first", "silu"],
)
def test_encoder_takes_no_fast_path(options: dict[str, Any], masked: str) -> None:
    """In eval torch calls its own fused layer, on nested tensors where padding is contiguous; patched, every layer counts a call."""
    model = encoder(**options)
    batch_first = options.get("batch_first", True)
    x = torch.randn(BATCH, LEN_Q, EMBED) if batch_first else torch.randn(LEN_Q, BATCH, EMBED)
    padding = torch.zeros(BATCH, LEN_Q, dtype=torch.bool)
    padding[1, 4:] = True
    if masked == "hole":
        padding[2, 1] = True
    arguments: dict[str, Any] = {} if masked in ("none", "causal") else {"src_key_padding_mask": padding}
    if masked.startswith("causal"):
        arguments |= {
            "mask": nn.Transformer.generate_square_subsequent_mask(LEN_Q) if masked == "causal" else torch.ones(LEN_Q, LEN_Q).triu(1).bool()
        }
    report = None
    found = []
    for mode in ("inference", "grad", "train"):
        model.train(mode == "train")
        with torch.set_grad_enabled(mode != "inference"):
            theirs = model(x, **arguments)
            report = attnhub.patch(model)
            ours = model(x, **arguments)
        assert [m.calls for m in report.modules] == [1, 1]
        valid = (
            (~padding if "src_key_padding_mask" in arguments else torch.ones_like(padding)).T
            if not batch_first
            else ~padding
            if arguments
            else ...
        )
        found.append(gap(ours[valid], theirs[valid]))
        assert attnhub.unpatch(model) == 2
    assert max(found) <= TOLERANCE


def test_decoder_layer_and_whole_transformer() -> None:
    torch.manual_seed(1)
    model = nn.Transformer(EMBED, HEADS, 2, 2, 48, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(BATCH, LEN_K, EMBED), torch.randn(BATCH, LEN_Q, EMBED)
    padding = torch.zeros(BATCH, LEN_K, dtype=torch.bool)
    padding[1, 5:] = True
    arguments = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(LEN_Q), "src_key_padding_mask": padding, "memory_key_padding_mask": padding,
    }  # fmt: skip
    with torch.no_grad():
        theirs = model(source, target, **arguments)
        report = attnhub.patch(model)
        ours = model(source, target, **arguments)
    assert len(report.patched) == 6 and all(m.calls == 1 for m in report.patched)
    assert gap(ours, theirs) <= TOLERANCE


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    """A user's layer around torch's forward."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(src, *args, **kwargs)
        assert isinstance(out, Tensor)
        return out + 1


class OwnAttention(nn.MultiheadAttention):
    """A user's attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        return query, None


def test_subclasses() -> None:
    model = OwnEncoderLayer(EMBED, HEADS, 48, batch_first=True).eval()
    x = torch.randn(BATCH, LEN_Q, EMBED)
    with torch.no_grad():
        theirs = model(x)
        report = attnhub.patch(model)
        ours = model(x)
    assert report.calls == 1 and gap(ours, theirs) <= TOLERANCE
    own = nn.ModuleDict({"a": OwnAttention(EMBED, HEADS), "b": module("plain")})
    report = attnhub.patch(own)
    assert [m.name for m in report.patched] == ["b"] and "OwnAttention" in report.skipped[0].reason
    attnhub.unpatch(own)
    with pytest.raises(attnhub.patching.PatchError):
        attnhub.patch(own, strict=True)
    assert type(own["b"]) is nn.MultiheadAttention


@pytest.mark.gpu
def test_encoder_on_cuda() -> None:
    """fp32; kernels may sum in another order, and some use three tf32 products for one of fp32."""
    model = encoder().cuda()
    x = torch.randn(BATCH, LEN_Q, EMBED, device="cuda")
    padding = torch.zeros(BATCH, LEN_Q, dtype=torch.bool, device="cuda")
    padding[1, 4:] = True
    with torch.no_grad():
        theirs = model(x, src_key_padding_mask=padding)
        report = attnhub.patch(model)
        ours = model(x, src_key_padding_mask=padding)
    assert [m.calls for m in report.modules] == [1, 1]
    assert gap(ours[~padding], theirs[~padding]) <= 1e-4


# -- patching keeps the module what it was ---------------------------------------------------------------------------------


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


# -- what cannot be routed, and what looks like it ---------------------------------------------------------------------------


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


def test_transforms_checkpoints_and_exports() -> None:
    made = module("plain").eval()
    (query, _, _), _ = inputs(made, "none", "self")
    parameters = dict(made.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(made, values, (x, x, x), {"need_weights": False})[0] ** 2).sum()

    theirs = torch.func.grad(loss)(parameters, query), torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, query[:, None])
    report = attnhub.patch(made)
    assert not made.load_state_dict(made.state_dict(), strict=True).missing_keys
    ours = torch.func.grad(loss)(parameters, query), torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, query[:, None])
    for mine, right in zip(ours, theirs):
        assert all(gap(mine[name], right[name]) <= 4 * TOLERANCE for name in parameters)
    leaf = query.clone().requires_grad_()
    for reentrant in (True, False):
        torch.utils.checkpoint.checkpoint(lambda x: (made(x, x, x, need_weights=False)[0] ** 2).sum(), leaf, use_reentrant=reentrant).backward()
        assert gap(made.in_proj_weight.grad, theirs[0]["in_proj_weight"]) <= 4 * TOLERANCE
        made.zero_grad()
    assert report.calls > 0

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = made

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    program = torch.export.export(Whole(), (query,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))
    longer = torch.randn(BATCH, 2 * LEN_Q, EMBED)
    assert gap(program.module()(longer), Whole()(longer)) <= TOLERANCE


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_compiles_into_one_graph(mask: str, need_weights: bool) -> None:
    made = module("bias_kv_zero_attn" if mask in ("padding", "none") else "plain").eval()
    tensors, arguments = inputs(made, mask, "self" if "causal" in mask else "memory")
    theirs = made(*tensors, need_weights=need_weights, **arguments)
    report = attnhub.patch(made)
    torch._dynamo.reset()
    ours = torch.compile(made, backend="aot_eager", fullgraph=True)(*tensors, need_weights=need_weights, **arguments)
    assert gap(ours[0], theirs[0]) <= TOLERANCE and gap(ours[1], theirs[1]) <= TOLERANCE and report.calls == 0
    want, got = (torch.autograd.grad((out[0] ** 2).sum(), made.out_proj.weight)[0] for out in (theirs, ours))
    assert gap(got, want) <= 4 * TOLERANCE


def test_compiles_into_one_graph() -> None:
    model = encoder()
    x = torch.randn(BATCH, LEN_Q, EMBED)
    padding = torch.zeros(BATCH, LEN_Q, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        theirs = model(x, src_key_padding_mask=padding)
        report = attnhub.patch(model)
        torch._dynamo.reset()
        ours = torch.compile(model, backend="aot_eager", fullgraph=True)(x, src_key_padding_mask=padding)
    assert gap(ours[~padding], theirs[~padding]) <= TOLERANCE
    assert report.calls == 0, "calls are counted outside tracing"


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
