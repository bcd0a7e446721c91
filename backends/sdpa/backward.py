"""torch's flash backward kernels, called by their aten names from any backend's (out, lse)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor

from attnhub import dense
from attnhub.backend import Call, Gradients, Needs
from attnhub.backends.sdpa.blocks import MOST_HEADS, row_blocks, without_padding
from attnhub.problem import Feature

#: The version whose backward was run from another kernel's lse.
_CUDNN = 91900
_CAUSAL = frozenset({Feature.CAUSAL_TOP_LEFT, Feature.CAUSAL_BOTTOM_RIGHT})


@contextmanager
def torch_deterministic() -> Iterator[None]:
    """torch's switch for deterministic algorithms, which its kernels read when they are called, on for one call of them."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only or not before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def flash_backward(call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Optional[Gradients]:
    """The gradients, or None where these kernels cannot express the call and the tiled maths must."""
    q, mask = call.q, call.mask
    if (
        grad_lse is not None or needs.bias or call.varlen is not None or call.block_table is not None or call.softcap
        or call.dropout_p or q.shape[3] != call.v.shape[3]
    ):  # fmt: skip
        return None
    out = out if out.dtype == q.dtype else out.to(q.dtype)
    grad_out = grad_out if grad_out.dtype == q.dtype else grad_out.to(q.dtype)
    # No row may lack keys here: P = exp(s - lse) would be NaN.
    maskless = not mask.features() - _CAUSAL and call.sinks is None and (not mask.causal or q.shape[2] == call.k.shape[2])
    if q.device.type == "cpu":
        grads = _maskless_cpu(call, grad_out, out, lse) if maskless else _masked_cpu(call, grad_out, out, lse)
    elif maskless and _on_cuda(q):
        grads = _maskless_cuda(call, grad_out, out, lse)
    else:
        return None
    sinks = None
    if needs.sinks and call.sinks is not None:
        delta = (grad_out.float() * out.float()).sum(-1)
        share = torch.where(lse == float("-inf"), 0.0, torch.exp(call.sinks[None, :, None] - lse))
        sinks = -(share * delta).sum((0, 2)).to(call.sinks.dtype)
    dq, dk, dv = (grad if need else None for grad, need in zip(grads, needs))
    return Gradients(dq, dk, dv, None, sinks)


def _on_cuda(q: Tensor) -> bool:
    nvidia = q.device.type == "cuda" and not torch.version.hip and q.shape[0] * q.shape[1] <= MOST_HEADS
    return nvidia and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] <= 256 and q.shape[3] % 8 == 0


def all_heads(call: Call, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V repeated for every query head: these kernels know no groups."""
    group = call.q.shape[1] // k.shape[1]
    return (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) if group > 1 else (k, v)


def _by_group(call: Call, grad: Tensor) -> Tensor:
    group = call.q.shape[1] // call.k.shape[1]
    return grad.unflatten(1, (-1, group)).sum(2) if group > 1 else grad


def _maskless_cpu(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = all_heads(call, call.k, call.v)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, call.q, k, v, out, lse, 0.0, call.mask.causal, scale=call.softmax_scale
    )  # fmt: skip
    return dq, _by_group(call, dk), _by_group(call, dv)


def _by_cudnn(q: Tensor) -> bool:
    """Whether cuDNN's kernel is the faster one, about twice, and is allowed: on Hopper."""
    return (
        torch.cuda.get_device_capability(q.device) == (9, 0)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and (torch.backends.cudnn.version() or 0) >= _CUDNN
        and hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward")
    )


def _maskless_cuda(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = all_heads(call, call.k, call.v)
    if _by_cudnn(call.q):
        rng = torch.zeros((), dtype=torch.int64, device=call.q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, call.q, k, v, out, lse.unsqueeze(-1), rng, rng, None, None, None, call.q.shape[2], k.shape[2], 0.0, call.mask.causal,
            scale=call.softmax_scale,
        )  # fmt: skip
        return dq, _by_group(call, dk), _by_group(call, dv)
    # Without dropout the seed and offset are not read.
    rng = torch.empty((), dtype=torch.uint64, device=call.q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out, call.q, k, v, out, lse, None, None, call.q.shape[2], k.shape[2], 0.0, call.mask.causal, rng, rng, scale=call.softmax_scale
    )  # fmt: skip
    return dq, _by_group(call, dk), _by_group(call, dv)


def _masked_cpu(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By blocks of rows with a dense additive mask. A row without keys gets lse 0 and no gradient: its P is exp(-inf) = 0."""
    q, mask = call.q, call.mask
    batch, q_heads, seqlen_q, _ = q.shape
    k, v = all_heads(call, *without_padding(call))
    seqlen_k = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for (top, bottom), (first, last) in row_blocks(call):
        if first == last:
            continue
        rows, keys = slice(top, bottom), slice(first, last)
        allowed = dense.allowed_pairs(mask, batch, seqlen_q, seqlen_k, (top, bottom), q.device)[..., keys]
        bias = dense.added_bias(mask, q_heads, seqlen_q, seqlen_k, (top, bottom), q.device, wide)
        added = torch.zeros((), dtype=wide) if bias is None else bias if bias.shape[3] == 1 else bias[..., keys]
        block_lse = lse[:, :, rows]
        empty = block_lse == float("-inf")
        part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            torch.where(empty.unsqueeze(-1), 0.0, grad_out[:, :, rows]).to(q.dtype), q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
            torch.where(empty, 0.0, block_lse), 0.0, False, attn_mask=torch.where(allowed, added, float("-inf")), scale=call.softmax_scale,
        )  # fmt: skip
        dq[:, :, rows] = part[0]
        dk[:, :, keys] += part[1]
        dv[:, :, keys] += part[2]
    return dq, _by_group(call, dk).to(k.dtype), _by_group(call, dv).to(v.dtype)
