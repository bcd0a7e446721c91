"""What keeps a call of F.scaled_dot_product_attention from attnhub, seen from its arguments alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


def obstacle(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool) -> str:
    """The first reason, or "". What torch itself refuses is left to torch, so that its own error comes."""
    for name, t in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if t is None and name == "attn_mask":
            continue
        if type(t) not in _PLAIN:
            if not isinstance(t, Tensor):
                return f"{name} is a {type(t).__name__}"
            if type(t).__torch_function__ is not torch._C._disabled_torch_function_impl:
                return f"{name} is a {type(t).__name__}, which has a __torch_function__ of its own"
        if t.is_nested:
            return f"{name} is a nested tensor"
        if t.layout != torch.strided:
            return f"{name} has layout {t.layout}"
        if t.device.type == "meta":
            return f"{name} is on the meta device"
        if t.dtype not in _FLOATS and not (name == "attn_mask" and t.dtype == torch.bool):
            return f"{name} is {t.dtype}"
    # In a traced graph a number may be a torch.SymFloat, and whether there is more than one query a torch.SymBool.
    if not isinstance(dropout_p, (int, float, torch.SymFloat)):
        return f"dropout_p is a {type(dropout_p).__name__}"
    if not isinstance(is_causal, (bool, torch.SymBool)):
        return f"is_causal is a {type(is_causal).__name__}"
    if attn_mask is not None and is_causal:
        return "attn_mask is given and is_causal=True"
    if not 0.0 <= dropout_p < 1.0:
        return f"dropout_p={dropout_p}"
    if torch.compiler.is_compiling():
        return ""
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return ""
