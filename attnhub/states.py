"""Attention over parts of the keys, combined exactly: the algebra behind split K/V, cascades and ring attention."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(*states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Combine (out, lse) pairs over disjoint sets of keys into the (out, lse) of their union.

    out: [..., S, Dv], lse: fp32 (fp64 for fp64 inputs) [..., S], natural logarithm, as `attention(..., return_lse=True)` returns them. A part
    with lse -inf (no key) counts for nothing. Differentiable; out keeps the dtype of the first part. Exact up to rounding,
    in any order and grouping (the associativity is that of log-sum-exp: FlashInfer, arXiv 2501.01005, section 2.2).
    """
    if not states:
        raise ValueError("merge_states(): at least one (out, lse) pair is needed")
    for i, part in enumerate(states):
        if not isinstance(part, (tuple, list)) or len(part) != 2 or not all(isinstance(t, Tensor) and t.is_floating_point() for t in part):
            raise TypeError(f"merge_states(): part {i} is no (out, lse) pair of floating tensors, as attention(..., return_lse=True) returns; unpack a list of pairs with *")
    outs, lses = zip(*states)
    for i, (out, lse) in enumerate(states):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"merge_states(): part {i} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; "
                f"all parts must be {tuple(outs[0].shape)} with lse {tuple(outs[0].shape[:-1])}"
            )
        if out.device != outs[0].device or lse.device != outs[0].device:
            raise ValueError(f"merge_states(): part {i} is on {out.device} and {lse.device}, part 0 on {outs[0].device}: move them to one device")
    dtype = torch.float64 if lses[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    top = stacked.detach().amax(0)
    safe = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    weights = torch.exp(stacked - safe)
    total = weights.sum(0)
    some = total > 0
    divisor = torch.where(some, total, torch.ones_like(total))
    # The out of a part without keys is selected away before it meets its zero weight: it may hold anything.
    shares = torch.stack([(w / divisor).unsqueeze(-1) * torch.where((w > 0).unsqueeze(-1), o.to(dtype), 0.0) for w, o in zip(weights, outs)])
    lse = torch.where(some, torch.log(divisor) + safe, torch.full_like(safe, float("-inf")))
    return shares.sum(0).to(outs[0].dtype), lse
