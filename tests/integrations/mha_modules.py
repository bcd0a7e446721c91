"""Modules, their inputs under every kind of mask, and the distance between two results."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

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


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    options = {"batch_first": True, "dropout": 0.0, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 48, **options), 2).eval()


def gap(ours: Optional[Tensor], theirs: Optional[Tensor]) -> float:
    if ours is None or theirs is None:
        assert ours is None and theirs is None
        return 0.0
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0))
