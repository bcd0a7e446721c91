"""Floating-point operations of the attention operators, for `torch.utils.flop_counter.FlopCounterMode`.

The rules are torch's own for its attention: a multiplication with its addition counts 2, softmax and masks count nothing,
and a causal mask (or any other that removes pairs) counts as if every pair were computed. Packed sequences count their own
pairs only. Per pair the forward makes two products (q k^T and p v), the backward five.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnhub.spec import WORDS, parse


def forward_flops(
    q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor], data: Sequence[Tensor], spec: str, sizes: Sequence[int], *rest: Any,
    out_val: Any = None, **unused: Any,
) -> int:  # fmt: skip
    """2 * Hq * pairs * (D + Dv)."""
    return 2 * q.shape[1] * _pairs(q, k, data, spec, sizes) * (q.shape[3] + v.shape[3])


def backward_flops(
    grad_out: Tensor, grad_lse: Optional[Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor], out: Tensor,
    lse: Tensor, data: Sequence[Tensor], spec: str, sizes: Sequence[int], *rest: Any, out_val: Any = None, **unused: Any,
) -> int:  # fmt: skip
    """2 * Hq * pairs * (3 * D + 2 * Dv): the scores again, then dP, dV, dQ and dK."""
    return 2 * q.shape[1] * _pairs(q, k, data, spec, sizes) * (3 * q.shape[3] + 2 * v.shape[3])


def _pairs(q: Tensor, k: Tensor, data: Sequence[Tensor], spec: str, sizes: Sequence[int]) -> int:
    """Pairs of query and key, summed over the batch, for one head."""
    tensor, size = 0, 0
    for name, _ in parse(spec):
        if name == "varlen" and "block_table" not in spec.split():
            return _packed_pairs(data[tensor], data[tensor + 1], sizes[size], sizes[size + 1])
        if name == "block_table":
            return q.shape[0] * q.shape[2] * data[tensor].shape[1] * k.shape[2]
        size += WORDS[name][0]
        tensor += WORDS[name][1]
    return q.shape[0] * q.shape[2] * k.shape[2]


def _packed_pairs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> int:
    if cu_seqlens_q.is_meta or isinstance(cu_seqlens_q, FakeTensor):
        # Without values, the most that it can be.
        return (cu_seqlens_q.shape[0] - 1) * max_seqlen_q * max_seqlen_k
    return int((cu_seqlens_q.long().diff() * cu_seqlens_k.long().diff()).sum())


def register() -> None:
    """Give the formulas to torch's counter: to its registry, and to the counters that are counting now.

    Called by `attnhub.ops` once torch.utils.flop_counter is imported, not before: that module imports Triton, which
    ``import attnhub`` must not.
    """
    import torch
    from torch.utils import flop_counter
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for op, formula in ((torch.ops.attnhub.forward, forward_flops), (torch.ops.attnhub.backward, backward_flops)):
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op, get_raw=True)(formula)
        for mode in _get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", mode)
            if isinstance(counter, flop_counter.FlopCounterMode):
                counter.flop_registry.setdefault(op, flop_counter.flop_registry[op])
