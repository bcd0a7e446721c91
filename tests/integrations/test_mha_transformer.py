"""nn.Transformer* through attnhub against the same modules unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mha_modules import BATCH, EMBED, HEADS, LEN_K, LEN_Q, TOLERANCE, encoder, gap, module
from torch import Tensor, nn

import attnhub


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
