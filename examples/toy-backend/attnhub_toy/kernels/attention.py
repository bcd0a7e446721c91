"""The kernel, to be replaced: softmax(scale * q k^T) v by plain torch operations, one query row group at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """Write the result to out [B, Hq, Sq, Dv]; return lse [B, Hq, Sq], fp32, natural logarithm.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; Hq is a multiple of Hk. Causal is aligned at the bottom right: the
    last query stands at the last key. A query without keys gives 0, and lse -inf.
    """
    batch, q_heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k = k.shape[1], k.shape[2]
    grouped = q.float().reshape(batch, kv_heads, q_heads // kv_heads, seqlen_q, head_dim)
    scores = torch.einsum("bhgid,bhjd->bhgij", grouped, k.float()) * softmax_scale
    if causal:
        i, j = torch.arange(seqlen_q, device=q.device)[:, None], torch.arange(seqlen_k, device=q.device)[None, :]
        scores = scores.masked_fill(j > i + (seqlen_k - seqlen_q), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    # Without keys lse is -inf, and -inf - -inf would be NaN.
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    out.copy_(torch.einsum("bhgij,bhje->bhgie", weights, v.float()).reshape(out.shape))
    return lse.reshape(batch, q_heads, seqlen_q)
