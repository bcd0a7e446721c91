"""The dropout mask: one definition for every backend, so that any backward may follow any forward.

Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"). The pair (b, h, i, j) uses output
word ``j & 3`` of the counter ``(j >> 2, i, b * Hq + h, offset mod 2^32)`` under the key ``(seed mod 2^32, seed >> 32)``, and
is kept if that word, unsigned, is at least ``floor(p * 2^32)``. i and j are local to the sequence, b is its index.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def draw(device: torch.device) -> Tensor:
    """(seed, offset) of one call, int64 [2], from torch's generator of the device."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Four words in [0, 2^32) as int64. counter: int64 tensors that broadcast; seed: int64 scalar tensor."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap modulo 2^64; the arithmetic shift's sign bits are masked off.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def keep_mask(rng: Tensor, dropout_p: float, batch: int, q_heads: int, rows: tuple[int, int], seqlen_k: int, first_batch: int = 0) -> Tensor:
    """bool [B, Hq, R, Sk]: pairs that dropout keeps. rng: int64 [2] = (seed, offset). first_batch: index of the first sequence."""
    device = rng.device
    quads = -(-seqlen_k // 4)
    c0 = torch.arange(quads, device=device)[None, None, :]
    c1 = torch.arange(*rows, device=device)[None, :, None]
    c2 = torch.arange(first_batch * q_heads, (first_batch + batch) * q_heads, device=device)[:, None, None]
    words = philox((c0, c1, c2, rng[1] & _LOW), rng[0])
    shape = (batch * q_heads, rows[1] - rows[0], quads)
    flat = torch.stack([w.expand(shape) for w in words], -1).reshape(batch, q_heads, rows[1] - rows[0], quads * 4)
    return flat[..., :seqlen_k] >= int(dropout_p * 2**32)
