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
    """q [Tq, Hq, D] over pages k, v [pages, page_size, Hk, D], of which varlen's cu_seqlens_k say how many keys each sequence has."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("flash_attn_varlen_func(block_table=...): paged K/V has no gradient: call under torch.no_grad(), or pass packed k and v without a block_table")
    if return_attn_probs and dropout_p:
        raise ValueError(f"flash_attn_varlen_func(block_table=..., return_attn_probs=True, dropout_p={dropout_p}): there is no S_dmask for paged K/V; leave one of them out")
    cache = KVCache(k, v, varlen.cu_seqlens_k.diff(), block_table, layout="bshd")
    found: Any = attention(
        q, None, None, mask, softmax_scale=softmax_scale, softcap=softcap, dropout_p=dropout_p, varlen=varlen, kv_cache=cache, return_lse=return_attn_probs
    )  # fmt: skip
    return (found[0].contiguous(), found[1], q.new_empty(0)) if return_attn_probs else found.contiguous()
