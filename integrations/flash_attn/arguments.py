"""flash-attn's arguments in attnhub's terms."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Causal, Mask, Window, _whole

#: What every function but the cached one returns: out, or (out, softmax_lse, S_dmask).
Result = Union[Tensor, tuple[Tensor, Tensor, Tensor]]


def mask_of(causal: bool, window_size: Sequence[int], alibi_slopes: Optional[Tensor]) -> Mask:
    """All are aligned at the bottom right. A negative end of the window is open."""
    # Dynamo traces what a cache holds anyway, with a warning.
    make = _structure if torch.compiler.is_compiling() else _made
    mask = make(bool(causal), *window(window_size))
    return mask if alibi_slopes is None else mask & ALiBi(alibi_slopes)


def _structure(causal: bool, left: int, right: int) -> Mask:
    mask = Causal() if causal else FULL
    return mask & Window(left, right) if left >= 0 or right >= 0 else mask


_made = functools.lru_cache(maxsize=64)(_structure)


def window(window_size: Sequence[int]) -> tuple[int, int]:
    """(left, right), -1 for an open end."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size={window_size!r}: a pair (left, right) is needed, -1 for an end that is open")
    left, right = window_size
    if not _whole(left) or not _whole(right):
        raise TypeError(f"window_size={window_size!r}: whole numbers are needed")
    return (left if left >= 0 else -1), (right if right >= 0 else -1)


def check_tensors(**tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: a Tensor is needed")


def unpack(name: str, packed: Tensor, ndim: int, parts: int) -> tuple[Tensor, ...]:
    """Views of the parts that lie side by side before the heads: qkv [..., 3, H, D], kv [..., 2, H, D]."""
    check_tensors(**{name: packed})
    if packed.ndim != ndim or packed.shape[-3] != parts:
        lead = "total" if ndim == 4 else "batch, seqlen"
        raise ValueError(f"{name} has shape {tuple(packed.shape)}: [{lead}, {parts}, heads, head_dim] is needed")
    return packed.unbind(-3)


def lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: Any, max_seqlen_k: Any) -> Varlen:
    """Maxima that are tensors of one element (as callers take them from ``lengths.max()``) are read, which waits for the device."""
    max_q, max_k = (int(m) if isinstance(m, Tensor) else m for m in (max_seqlen_q, max_seqlen_k))
    return Varlen(cu_seqlens_q, cu_seqlens_k, max_q, max_k)
