"""Attention that also returns its weights: the definition in plain torch operations, for callers that ask to see them."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from attnhub.mask import Mask


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    softmax_scale: Optional[float] = None,
    softcap: float = 0.0,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Sq, Dv], weights [B, Hq, Sq, Sk] as multiplied with v: after dropout, without the sink's share).

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; sinks [Hq] or [B, Hq, Sq, 1]. As in `attnhub.attention` a row without
    keys is 0, in out and in weights. Differentiable; scores and softmax in fp32 (fp64 for fp64); Sq x Sk memory.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    size = {"batch": q.shape[0], "q_heads": q.shape[1], "seqlen_q": q.shape[2], "seqlen_k": k.shape[2]}
    allowed, bias = mask.to_dense(**size, device=q.device)
    # A key that nobody sees may hold anything, and a product of its NaN with weight 0 would still be NaN.
    dead = ~allowed.any(-2).any(1)
    k, v = (t.masked_fill(dead[:, None, :, None], 0.0) for t in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-2, -1)).to(wide) * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    scores = torch.where(allowed, scores, float("-inf"))
    if sinks is not None:
        column = (sinks.reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks).to(wide)
        scores = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], -1)
    some = (scores > float("-inf")).any(-1, keepdim=True)
    weights = torch.softmax(torch.where(some, scores, 0.0), -1) * some
    weights = weights[..., : k.shape[2]].to(v.dtype)
    if dropout_p:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    return weights @ v, weights
