"""The rates at which FlashInfer reads pages of 16 tokens on an H200, replayed from a CUDA graph. Torch-free.

It was measured on such a card in another run than any of ours, so that a few percent mean nothing.
"""

from __future__ import annotations

from typing import Optional

from attnhub.bench.cases import Case

#: GB/s of K and V by (batch, keys, K/V heads); 32 query heads, head_dim 128, bf16.
RATES = {
    (1, 8192, 8): 1730.0, (1, 65536, 8): 3430.0, (16, 8192, 8): 3740.0, (64, 8192, 8): 4300.0, (128, 2048, 8): 4000.0, (64, 4096, 32): 4390.0,
}  # fmt: skip


def rate(case: Case) -> Optional[float]:
    """GB/s at a decode step of these shapes; None where it was not measured."""
    known = case.is_decode() and (case.heads, case.head_dim, case.dtype) == (32, 128, "bfloat16")
    return RATES.get((case.batch, case.seqlen_k, case.kv_heads)) if known else None


def seconds(case: Case) -> Optional[float]:
    """What a step takes at that rate."""
    found = rate(case)
    return case.kv_bytes() / (found * 1e9) if found else None
