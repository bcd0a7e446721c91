"""Blocks of query rows for masks that have to be made dense: how many rows at once, and which keys they can see."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnhub import dense
from attnhub.backend import Call
from attnhub.mask import Mask

#: Scores (or mask elements) of one block of rows: 4 Mi elements are 16 MiB in fp32.
BLOCK_ELEMENTS = 1 << 22
#: Batch times heads that torch's CUDA kernels take; beyond, some launch a grid that the device refuses (pytorch#142228).
MOST_HEADS = 65535


def row_blocks(call: Call) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(rows, range of keys) pairs that cover all query rows with dense masks of at most BLOCK_ELEMENTS elements (or one row)."""
    batch, q_heads, seqlen_q, _ = call.q.shape
    seqlen_k = call.k.shape[2]
    step = max(1, BLOCK_ELEMENTS // max(1, seqlen_k * mask_planes(call.mask, batch, q_heads)))
    for start in range(0, seqlen_q, step):
        rows = (start, min(start + step, seqlen_q))
        yield rows, key_range(call.mask, seqlen_q, seqlen_k, rows)


def without_padding(call: Call) -> tuple[Tensor, Tensor]:
    """k and v with zeros where a key is padding, which torch's kernels would multiply by a zero weight: 0 * NaN is NaN."""
    k, v, mask = call.k, call.v, call.mask
    if mask.seqused_k is None and mask.leftpad is None:
        return k, v
    dense.check_lengths(mask, k.shape[2])
    exists = dense.existing_keys(mask, k.shape[2], k.device)[:, None, :, None]
    zero = torch.zeros((), dtype=k.dtype, device=k.device)
    return torch.where(exists, k, zero), torch.where(exists, v, zero)


def mask_planes(mask: Mask, batch: int, q_heads: int) -> int:
    """How many Sq x Sk planes the dense mask has."""
    by_head = mask.alibi is not None or any(t is not None and t.shape[1] > 1 for t in (mask.bool_mask, mask.bias, mask.block_sparse))
    by_batch = any(True for _ in mask.tensors())
    return (q_heads if by_head else 1) * (batch if by_batch else 1)


def key_range(mask: Mask, seqlen_q: int, seqlen_k: int, rows: tuple[int, int]) -> tuple[int, int]:
    """A range that holds every key that the rows can attend to by structure alone, so that blocks skip what is masked anyway."""
    if mask.seqused_k is not None and mask.align == "bottom_right":
        return 0, seqlen_k
    offset = 0 if mask.align == "top_left" else seqlen_k - seqlen_q
    first, last = 0, seqlen_k
    left, right = mask.window
    if left >= 0:
        first = max(0, rows[0] + offset - left)
    if right >= 0:
        last = min(last, rows[1] + offset + right)
    if mask.causal and mask.prefix is None and mask.blocks is None:
        last = min(last, rows[1] + offset)
    last = max(0, last)
    return min(first, last), last

