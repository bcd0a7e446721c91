"""The dense truth of a mask, for a block of query rows: what every kernel must agree with.

Written to be read. `reference` uses it whole, `sdpa` row block by row block.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from attnhub.mask import Mask

Rows = tuple[int, int]


def query_positions(mask: Mask, seqlen_q: int, seqlen_k: int, rows: Rows, device: torch.device) -> Tensor:
    """Position p of each query row on the key axis: [1, R], or [B, R] when lengths differ by sequence."""
    i = torch.arange(*rows, device=device)[None, :]
    if mask.align == "top_left":
        return i
    if mask.seqused_k is not None:
        return i + (mask.seqused_k.long()[:, None] - seqlen_q)
    return i + (seqlen_k - seqlen_q)


def allowed_pairs(mask: Mask, batch: int, seqlen_q: int, seqlen_k: int, rows: Rows, device: torch.device) -> Tensor:
    """bool [B or 1, Hq or 1, R, Sk]: which pairs of rows[0] <= i < rows[1] are attended to. See `Mask` for each rule."""
    j = torch.arange(seqlen_k, device=device)[None, None, :]
    p = query_positions(mask, seqlen_q, seqlen_k, rows, device)[:, :, None]
    allowed = torch.ones((1, rows[1] - rows[0], seqlen_k), dtype=torch.bool, device=device)
    if mask.causal:
        causal = j <= p
        if mask.prefix is not None:
            causal = causal | (j < mask.prefix.long()[:, None, None])
        if mask.blocks is not None:
            ids_q, ids_k = mask.blocks[0][:, rows[0] : rows[1], None], mask.blocks[1][:, None, :]
            causal = causal | ((ids_q == ids_k) & (ids_q >= 0))
        allowed = allowed & causal
    left, right = mask.window
    if left >= 0:
        allowed = allowed & (j >= p - left)
    if right >= 0:
        allowed = allowed & (j <= p + right)
    if mask.chunk:
        allowed = allowed & (torch.div(p, mask.chunk, rounding_mode="floor") == torch.div(j, mask.chunk, rounding_mode="floor"))
    if mask.segments is not None:
        allowed = allowed & (mask.segments[0][:, rows[0] : rows[1], None] == mask.segments[1][:, None, :])
    allowed = allowed & existing_keys(mask, seqlen_k, device)[:, None, :]
    allowed = allowed[:, None]
    if mask.bool_mask is not None:
        allowed = allowed & _rows_of(mask.bool_mask, rows)
    if mask.block_sparse is not None:
        bq, bk = mask.block_size
        i = torch.arange(*rows, device=device)
        allowed = allowed & mask.block_sparse[:, :, i // bq][:, :, :, torch.arange(seqlen_k, device=device) // bk]
    if mask.bias is not None:
        allowed = allowed & (_rows_of(mask.bias, rows) != float("-inf"))
    return allowed


def existing_keys(mask: Mask, seqlen_k: int, device: torch.device) -> Tensor:
    """bool [B or 1, Sk]: keys that are not padding."""
    j = torch.arange(seqlen_k, device=device)[None, :]
    exists = torch.ones_like(j, dtype=torch.bool)
    if mask.seqused_k is not None:
        exists = exists & (j < mask.seqused_k.long()[:, None])
    if mask.leftpad is not None:
        exists = exists & (j >= mask.leftpad.long()[:, None])
    return exists


def check_lengths(mask: Mask, seqlen_k: int) -> None:
    """Raises ValueError for seqused_k out of range. On the host alone: elsewhere it would wait for the device."""
    used = mask.seqused_k
    if used is None or not used.is_cpu or not used.numel():
        return
    least, most = used.aminmax()
    if least < 0 or most > seqlen_k:
        n = int(used.argmin() if least < 0 else used.argmax())
        raise ValueError(f"seqused_k[{n}] is {int(used[n])} (of SeqLens, or a cache's cache_seqlens): 0 to {seqlen_k} is needed, the keys that there are")


def added_bias(mask: Mask, q_heads: int, seqlen_q: int, seqlen_k: int, rows: Rows, device: torch.device, dtype: torch.dtype) -> Optional[Tensor]:
    """Bias plus ALiBi for the rows, broadcastable to [B, Hq, R, Sk], or None."""
    total: Optional[Tensor] = None
    if mask.bias is not None:
        total = _rows_of(mask.bias, rows).to(dtype)
    if mask.alibi is not None:
        p = query_positions(mask, seqlen_q, seqlen_k, rows, device)[:, :, None]
        distance = (p - torch.arange(seqlen_k, device=device)).abs().to(dtype)[:, None]
        slopes = mask.alibi.to(dtype).reshape(-1, q_heads, 1, 1)
        total = -slopes * distance if total is None else total - slopes * distance
    return total


def _rows_of(data: Tensor, rows: Rows) -> Tensor:
    return data if data.shape[2] == 1 else data[:, :, rows[0] : rows[1]]


def select_sequence(mask: Mask, n: int, length_q: int, length_k: int) -> Mask:
    """The mask of the n-th packed sequence alone, as one of batch size 1."""

    def pick(value: Optional[Tensor]) -> Optional[Tensor]:
        return None if value is None else value[n : n + 1] if value.shape[0] > 1 else value

    def square(value: Optional[Tensor]) -> Optional[Tensor]:
        value = pick(value)
        if value is None:
            return None
        value = value if value.shape[2] == 1 else value[:, :, :length_q]
        return value if value.shape[3] == 1 else value[..., :length_k]

    def ids(pair: Optional[tuple[Tensor, Tensor]]) -> Optional[tuple[Tensor, Tensor]]:
        return None if pair is None else (pair[0][n : n + 1, :length_q], pair[1][n : n + 1, :length_k])

    blocks = mask.block_sparse
    if blocks is not None:
        blocks = blocks[n : n + 1] if blocks.shape[0] > 1 else blocks
    return Mask(
        causal=mask.causal, align=mask.align, window=mask.window, chunk=mask.chunk, prefix=pick(mask.prefix), segments=ids(mask.segments),
        blocks=ids(mask.blocks), seqused_k=pick(mask.seqused_k), leftpad=pick(mask.leftpad), bool_mask=square(mask.bool_mask),
        bias=square(mask.bias), alibi=mask.alibi if mask.alibi is None or mask.alibi.ndim == 1 else pick(mask.alibi),
        block_sparse=blocks, block_size=mask.block_size,
    )  # fmt: skip
