"""Packed queries over paged K/V."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.api import attention
from attnhub.integrations.flash_attn.arguments import Result
from attnhub.kv_cache import KVCache
from attnhub.layouts import Varlen
from attnhub.mask import Mask


def paged_varlen(
    q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, block_table: Tensor, mask: Mask, dropout_p: float, softmax_scale: Optional[float],
    softcap: float, return_attn_probs: bool,
) -> Result:  # fmt: skip
    """q [Tq, Hq, D] over pages k, v [pages, page_size, Hk, D]; the pages are read where they lie.

    attnhub's kernels take pages with a batch of queries, not with packed ones. Queries are therefore padded to max_seqlen_q on the
    *left*: masks are aligned at the bottom right, so that every row keeps its position and the padding changes nothing.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("flash_attn_varlen_func(block_table=...): paged K/V has no gradient: call under torch.no_grad(), or pass packed k and v without a block_table")
    if return_attn_probs and dropout_p:
        raise ValueError(f"flash_attn_varlen_func(block_table=..., return_attn_probs=True, dropout_p={dropout_p}): there is no S_dmask for paged K/V; leave one of them out")
    if q.ndim != 3:
        raise ValueError(f"flash_attn_varlen_func: q has shape {tuple(q.shape)}: packed tokens [total, heads, head_dim] are needed")
    cu, longest = varlen.cu_seqlens_q.long(), varlen.max_seqlen_q
    count, total = cu.shape[0] - 1, q.shape[0]
    token = torch.arange(total, device=q.device)
    # Tokens behind the last sequence belong to number `count`, whose only row lies behind all others.
    owner = torch.searchsorted(cu[1:].contiguous(), token, right=True)
    real = owner < count
    ends = cu[1:].index_select(0, owner.clamp_max(max(count - 1, 0))) if count else token
    slot = torch.where(real, owner * longest + longest - ends + token, count * longest)
    padded = q.new_zeros(count * longest + 1, *q.shape[1:]).index_copy(0, slot, q)
    cache = KVCache(k, v, varlen.cu_seqlens_k.diff(), block_table, layout="bshd")
    found: Any = attention(
        padded[:-1].view(count, longest, *q.shape[1:]), None, None, mask, softmax_scale=softmax_scale, softcap=softcap, dropout_p=dropout_p, kv_cache=cache,
        return_lse=return_attn_probs, layout="bshd",
    )  # fmt: skip
    rows = found[0] if return_attn_probs else found
    # One row more for the tokens that belong to no sequence.
    out = torch.nn.functional.pad(rows.flatten(0, 1), (0, 0, 0, 0, 0, 1)).index_select(0, slot)
    if not return_attn_probs:
        return out
    lse = torch.nn.functional.pad(found[1].transpose(0, 1).flatten(1), (0, 1), value=float("-inf")).index_select(1, slot)
    return out, lse, q.new_empty(0)
