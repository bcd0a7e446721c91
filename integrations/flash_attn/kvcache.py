"""flash_attn_with_kvcache: append to a cache in place, and attend to all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from attnhub.api import attention
from attnhub.integrations.flash_attn.arguments import check_tensors, mask_of, window
from attnhub.kv_cache import KVCache
from attnhub.mask import LeftPad, _whole
from attnhub.rotary import Rotary


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Optional[Tensor] = None, v: Optional[Tensor] = None, rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None, cache_seqlens: Optional[Union[int, Tensor]] = None, cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None, block_table: Optional[Tensor] = None, softmax_scale: Optional[float] = None, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0, return_softmax_lse: bool = False,
) -> Union[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """q [B, Sq, Hq, D] over a cache; k, v [B, Snew, Hk, D] are written into it first, in place. -> out [B, Sq, Hq, D], no gradients.

    k_cache, v_cache: [rows, S_max, Hk, D]; or pages [pages, page_size, Hk, D] of any size with block_table [B, max_pages].
    cache_seqlens: tokens in the cache before this call, one number or [B]; needed with k and v, else the whole cache is the default.
    It is not changed. cache_batch_idx [B]: the row of the cache that each sequence has (not with block_table).
    cache_leftpad [B]: the first key of each sequence. rotary_cos, rotary_sin [positions, R], with k and v only: k is rotated at
    cache_seqlens, cache_seqlens + 1, ...; q likewise where causal or windowed, else all of it at cache_seqlens.
    rotary_interleaved: pairs (2d, 2d + 1), or (d, d + R). num_splits: how keys are divided among programs is the backend's to
    choose; any number gives the same result. return_softmax_lse: also lse [B, Hq, Sq], fp32. All else is `flash_attn_func`'s.

    Raises ValueError for arguments that do not fit, before anything is written.
    """
    if (k is None) != (v is None):
        raise ValueError("flash_attn_with_kvcache: give both k and v (the new tokens), or neither")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("flash_attn_with_kvcache: give both rotary_cos and rotary_sin, or neither")
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits={num_splits!r}: a whole number of at least 0 is needed; 0 leaves it to the backend")
    if k is not None and cache_seqlens is None:
        raise ValueError("flash_attn_with_kvcache: cache_seqlens is needed with k and v: it says where in the cache they go")
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    if q.ndim != 4 or k_cache.ndim != 4:
        raise ValueError(f"flash_attn_with_kvcache: q {tuple(q.shape)} and k_cache {tuple(k_cache.shape)} need 4 dimensions, [B, S, H, D]")
    used = _used(q, k_cache, cache_seqlens, block_table)
    cache = KVCache(k_cache, v_cache, used, block_table, cache_batch_idx, layout="bshd")
    mask = mask_of(causal, window_size, alibi_slopes)
    if cache_leftpad is not None:
        mask = mask & LeftPad(cache_leftpad)
    rotary = None
    if rotary_cos is not None and rotary_sin is not None:
        if k is None:
            raise ValueError("flash_attn_with_kvcache: rotary_cos and rotary_sin are for new tokens: pass k and v, or rotate q yourself (attnhub.apply_rotary)")
        rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved, one_position=not causal and window(window_size) == (-1, -1))
    q, k, v = (t.transpose(1, 2) if t is not None and t.ndim == 4 else t for t in (q, k, v))  # type: ignore[assignment]
    found: Any = attention(
        q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, kv_cache=cache, rotary=rotary, return_lse=return_softmax_lse
    )  # fmt: skip
    out = (found[0] if return_softmax_lse else found).transpose(1, 2).contiguous()
    return (out, found[1]) if return_softmax_lse else out


def _used(q: Tensor, k_cache: Tensor, cache_seqlens: Optional[Union[int, Tensor]], block_table: Optional[Tensor]) -> Tensor:
    """cache_seqlens as [B] int32."""
    if isinstance(cache_seqlens, Tensor):
        if cache_seqlens.shape != (q.shape[0],):
            raise ValueError(f"cache_seqlens has shape {tuple(cache_seqlens.shape)}: a number or [B] = [{q.shape[0]}] is needed")
        return cache_seqlens if cache_seqlens.dtype == torch.int32 else cache_seqlens.to(torch.int32)
    length = cache_seqlens
    if length is not None and not _whole(length):
        raise TypeError(f"cache_seqlens is a {type(length).__name__}: a whole number or a tensor of integers [B] = [{q.shape[0]}] is needed")
    if length is None:
        length = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)
