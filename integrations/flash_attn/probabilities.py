"""S_dmask: the weights before dropout, negative where dropout takes them. Sq x Sk memory, without gradients, for tests."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from attnhub import dense, philox
from attnhub.integrations.weights import attention_with_weights
from attnhub.layouts import Varlen
from attnhub.mask import Mask


def next_rng(device: torch.device) -> Tensor:
    """What the next call with dropout on the device will draw. torch's generator stays where it is."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type="cuda" if device.type == "cpu" else device.type):
        return philox.draw(device)


@torch.no_grad()
def s_dmask(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, varlen: Optional[Varlen], dropout_p: float, rng: Tensor, **options: Any
) -> Tensor:
    """[B, Hq, Sq, Sk] of q [B, Sq, Hq, D] and its like; packed: [N, Hq, max_seqlen_q, max_seqlen_k], 0 where there is no pair."""
    if varlen is None:
        return _signed(q, k, v, mask, dropout_p, rng, 0, options)
    starts_q, starts_k = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    count = len(starts_q) - 1
    found = q.new_zeros(count, q.shape[1], varlen.max_seqlen_q, varlen.max_seqlen_k)
    for n in range(count):
        rows, keys = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
        length_q, length_k = rows.stop - rows.start, keys.stop - keys.start
        if length_q and length_k:
            own = dense.select_sequence(mask, n, length_q, length_k)
            found[n : n + 1, :, :length_q, :length_k] = _signed(q[None, rows], k[None, keys], v[None, keys], own, dropout_p, rng, n, options)
    return found


def _signed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout_p: float, rng: Tensor, first: int, options: dict[str, Any]) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    _, weights = attention_with_weights(q, k, v, mask, **options)
    kept = philox.keep_mask(rng, dropout_p, q.shape[0], q.shape[1], (0, q.shape[2]), k.shape[2], first)
    return torch.where(kept, weights, -weights)
