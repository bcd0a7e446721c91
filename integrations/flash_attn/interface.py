"""The six functions without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor

from attnhub.api import attention
from attnhub.integrations.flash_attn.arguments import Result, check_tensors, lengths, mask_of, unpack
from attnhub.integrations.flash_attn.paged import paged_varlen
from attnhub.integrations.flash_attn.probabilities import next_rng, s_dmask
from attnhub.layouts import Varlen


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Optional[float] = None, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Optional[Tensor] = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] -> out [B, Sq, Hq, Dv], contiguous; Hq is a multiple of Hk.

    causal, window_size and ALiBi are aligned at the bottom right: query i stands at key i + Sk - Sq. A row without keys is 0.
    dropout_p: probability of dropping. softmax_scale: default 1 / sqrt(D). window_size: (left, right), both inclusive, -1 open.
    softcap: 0 is off. alibi_slopes: [Hq] or [B, Hq]; adds -slope * |i + Sk - Sq - j|. deterministic: repeatable gradients.
    return_attn_probs: (out, softmax_lse, S_dmask). softmax_lse [B, Hq, Sq] is fp32, differentiable, and -inf for a row without
    keys. S_dmask is empty without dropout, else the weights before dropout [B, Hq, Sq, Sk], negative where dropped.

    Raises ValueError or TypeError for arguments that do not fit, `attnhub.NoBackendError` with every reason if nothing serves.
    """
    return _attend(q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: Optional[float] = None, causal: bool = False, window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Optional[Tensor] = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_func` of qkv [B, S, 3, H, D], read in place."""
    q, k, v = unpack("qkv", qkv, 5, 3)
    return _attend(q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: Optional[float] = None, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Optional[Tensor] = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_func` of q [B, Sq, Hq, D] and kv [B, Sk, 2, Hk, D], read in place."""
    k, v = unpack("kv", kv, 5, 2)
    return _attend(q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None, causal: bool = False, window_size: Sequence[int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None, deterministic: bool = False, return_attn_probs: bool = False, block_table: Optional[Tensor] = None,
) -> Result:  # fmt: skip
    """Sequences packed one after another: q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv] -> out [Tq, Hq, Dv]; lse [Hq, Tq].

    cu_seqlens_q, cu_seqlens_k: [N + 1] integers, cumulative from 0; a sequence may have no tokens. Tokens behind the last
    belong to none: their out is 0. S_dmask is [N, Hq, max_seqlen_q, max_seqlen_k]. All else is `flash_attn_func`'s.
    block_table: [N, max_pages]; k and v are then pages [pages, page_size, Hk, D], and cu_seqlens_k says only how many keys
    each sequence has. Without gradients.
    """
    varlen = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is not None:
        mask = mask_of(causal, window_size, alibi_slopes)
        return paged_varlen(q, k, v, varlen, block_table, mask, dropout_p, softmax_scale, softcap, return_attn_probs)
    return _attend(q, k, v, varlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: Optional[float] = None, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Optional[Tensor] = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_varlen_func` of qkv [T, 3, H, D], read in place."""
    q, k, v = unpack("qkv", qkv, 4, 3)
    varlen = lengths(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _attend(q, k, v, varlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None, causal: bool = False, window_size: Sequence[int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_varlen_func` of q [Tq, Hq, D] and kv [Tk, 2, Hk, D], read in place."""
    k, v = unpack("kv", kv, 4, 2)
    varlen = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend(q, k, v, varlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, varlen: Optional[Varlen], dropout_p: float, softmax_scale: Optional[float], causal: bool,
    window_size: Sequence[int], softcap: float, alibi_slopes: Optional[Tensor], deterministic: bool, return_attn_probs: bool,
) -> Result:  # fmt: skip
    check_tensors(q=q, k=k, v=v)
    mask = mask_of(causal, window_size, alibi_slopes)
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap}
    # The draw that the call is about to make, so that S_dmask can show what it dropped.
    rng = next_rng(q.device) if return_attn_probs and dropout_p else None
    # `attention` does the same with layout="bshd", by a longer way.
    q_, k_, v_ = (t.transpose(1, 2) if varlen is None and t.ndim == 4 else t for t in (q, k, v))
    found: Any = attention(q_, k_, v_, mask, dropout_p=dropout_p, varlen=varlen, deterministic=deterministic, return_lse=return_attn_probs, **options)
    out: Tensor = found[0] if return_attn_probs else found
    out = (out.transpose(1, 2) if varlen is None else out).contiguous()
    if not return_attn_probs:
        return out
    return out, found[1], q.new_empty(0) if rng is None else s_dmask(q, k, v, mask, varlen, dropout_p, rng, **options)
