"""flash-attn's helpers between padded batches [B, S, ...] and packed tokens [T, ...]. All are differentiable."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from attnhub.integrations.flash_attn.arguments import check_tensors

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input", "unpad_input_for_concatenated_sequences"]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` of input [N, ...]."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """[first_axis_dim, ...] with values [T, ...] at rows ``indices`` and 0 elsewhere."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(packed tokens [T, ...], indices [T], cu_seqlens [B + 1] int32, max_seqlen, seqused [B] int32) of hidden_states [B, S, ...].

    attention_mask [B, S]: nonzero marks a token. unused_mask: tokens that get room too, but do not count in seqused.
    Reads the longest length on the host.
    """
    _check("attention_mask", attention_mask, hidden_states)
    used = attention_mask.sum(-1, dtype=torch.int32)
    kept = attention_mask
    if unused_mask is not None:
        _check("unused_mask", unused_mask, hidden_states)
        kept = attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    return (*_take(hidden_states, kept, lengths), used)


def unpad_input_for_concatenated_sequences(hidden_states: Tensor, attention_mask_in_length: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(packed tokens, indices, cu_seqlens, max_seqlen) of rows that hold several sequences one after another.

    attention_mask_in_length [B, S]: each row starts with the lengths of its sequences; zeros follow. The tokens behind their
    sum are padding.
    """
    _check("attention_mask_in_length", attention_mask_in_length, hidden_states)
    filled = attention_mask_in_length.sum(-1, keepdim=True)
    kept = torch.arange(hidden_states.shape[1], device=filled.device) < filled
    flat = attention_mask_in_length.flatten()
    return _take(hidden_states, kept, flat[flat != 0].to(torch.int32))


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """[batch, seqlen, ...] with the tokens [T, ...] where ``indices`` say, 0 elsewhere: the inverse of `unpad_input`."""
    flat = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return flat.view(batch, seqlen, *flat.shape[1:])


def _take(hidden_states: Tensor, kept: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def _check(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    check_tensors(hidden_states=hidden_states, **{name: mask})
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: [batch, seqlen] = {list(hidden_states.shape[:2])} is needed, as in hidden_states")
