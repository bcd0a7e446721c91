"""Running a normalised call: straight by its plan where nothing but eager torch is at work, else through the operator."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnhub import ops, runtime, spec
from attnhub.backend import Call, PrepareError
from attnhub.kv_cache import KVCache
from attnhub.mask import Mask
from attnhub.memory import LOWEST, has_memory, need_memory

_PLAIN = {Tensor, torch.nn.Parameter}
_strided = torch.strided


def run(call: Call, backend: str, return_lse: bool) -> tuple[Tensor, Optional[Tensor]]:
    grad = wants_grad(call)
    if grad and call.q.dtype == torch.float8_e4m3fn:
        raise ValueError("q, k and v are float8_e4m3fn, which has no gradient: call under torch.no_grad(), or detach() whatever requires one")
    if not torch.compiler.is_compiling() and is_eager(call):
        if not grad:
            return runtime.forward(call, backend)
        if not runtime.is_empty(call):
            return _run_with_grad(call, backend, return_lse)
    flat, sizes, data = spec.encode(call.mask, call.softcap, call.dropout_p, call.rng, call.varlen, call.block_table, call.descale, call.deterministic)
    out, lse = ops.forward_op(
        call.q, call.k, call.v, call.mask.bias, call.sinks, data, flat, sizes, call.softmax_scale, return_lse, grad, backend
    )  # fmt: skip
    return out, lse if return_lse else None


def _run_with_grad(call: Call, backend: str, return_lse: bool) -> tuple[Tensor, Optional[Tensor]]:
    while True:
        chosen = runtime._served.chosen = runtime.prepared(call, backend, True, grad_bits(call, return_lse))
        try:
            if chosen.differentiable and not return_lse:
                return chosen.forward(call)[0], None
            call.need_lse = True
            result = ops.EagerAttention.apply(call.q, call.k, call.v, call.mask.bias, call.sinks, call, chosen, return_lse, None)
            return result if return_lse else (result, None)
        except PrepareError as error:
            runtime.launch_failed(chosen, error)


def append_in_launch(call: Call, cache: KVCache, backend: str) -> Optional[tuple[Tensor, Optional[Tensor]]]:
    """A call with new tokens by a plan that appends them itself, or None."""
    if torch.compiler.is_compiling() or not is_eager(call):
        return None
    # What the call holds is a copy of a cache whose rows have gaps.
    return runtime.append_in_launch(call, backend) if all(t.stride(3) == 1 for t in cache.heads_first()) else None


def is_eager(call: Call) -> bool:
    """Whether the operator layer can be left out: plain tensors with memory, and no mode, transform, trace, autocast or dual number.

    Raises ValueError where neither can serve: a storage was freed.
    """
    tensors = _tensors(call)
    if not no_modes():
        if forward_ad._current_level >= 0 and all(type(t) in _PLAIN and not t.is_neg() for t in tensors) and any(map(ops.has_tangent, tensors)):
            raise ops.no_forward_mode()
        return False
    for t in tensors:
        if type(t) not in _PLAIN or t.is_neg():
            return False
        if t.data_ptr() < LOWEST and not has_memory(t):
            need_memory(_named(call))
            return False
    return True


def _tensors(call: Call) -> list[Tensor]:
    append, varlen = call.append, call.varlen
    added = () if append is None else (append.k, append.v) if append.rotary is None else (append.k, append.v, append.rotary.cos, append.rotary.sin)
    packed = () if varlen is None else (varlen.cu_seqlens_q, varlen.cu_seqlens_k)
    several = (*call.mask.held, call.sinks, call.rng, *(call.descale or ()), *packed, call.block_table, *added)
    return [call.q, call.k, call.v, *(t for t in several if t is not None)]


def _named(call: Call) -> list[tuple[str, Tensor]]:
    names = {id(t): name for name, t in (("q", call.q), ("k", call.k), ("v", call.v), ("sinks", call.sinks), ("block_table", call.block_table))}
    names.update((id(t), "mask: a tensor") for t in call.mask.tensors())
    return [(names.get(id(t), "a tensor of the call"), t) for t in _tensors(call)]


def is_usual_tensor(t: Any) -> bool:
    # The operator layer makes real what a negative bit only says. Sparse and nested tensors have no strides to look at.
    return type(t) in _PLAIN and (t.is_cpu or t.is_cuda) and t.layout is _strided and not t.is_nested and not t.is_neg()


def is_usual_mask(mask: Any) -> bool:
    """Whether all tensors of a mask are usual ones that need no gradient. Where `no_modes`."""
    if type(mask) is not Mask:
        return False
    if not mask.held:
        return True
    learnt = (mask.bias is not None and mask.bias.requires_grad) or (mask.alibi is not None and mask.alibi.requires_grad)
    return not learnt and all(type(t) in _PLAIN and not t.is_neg() and (t.data_ptr() >= LOWEST or has_memory(t)) for t in mask.held)


# Looked up once: each attribute of a module takes as long as what is called.
_function_modes, _dispatch_modes, _any_autocast = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack, torch._C._is_any_autocast_enabled
_transform, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state


def no_modes() -> bool:
    """Whether no mode, transform, trace, autocast, forward-mode level or context_parallel is active."""
    return not (
        _function_modes() or _dispatch_modes() or _any_autocast() or _transform() is not None or _tracing() is not None or forward_ad._current_level >= 0
        or ops.in_context_parallel()
    )  # fmt: skip


def wants_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and (
        call.q.requires_grad or call.k.requires_grad or call.v.requires_grad
        or (call.mask.bias is not None and call.mask.bias.requires_grad) or (call.sinks is not None and call.sinks.requires_grad)
        or (call.descale is not None and any(t is not None and t.requires_grad for t in call.descale))
    )  # fmt: skip


def grad_bits(call: Call, return_lse: bool) -> int:
    bits = 0
    if torch.is_grad_enabled():
        if call.mask.bias is not None and call.mask.bias.requires_grad:
            bits |= runtime._BIAS_GRAD
        if call.sinks is not None and call.sinks.requires_grad:
            bits |= runtime._SINKS_GRAD
        if return_lse and wants_grad(call):
            bits |= runtime._LSE_GRAD
    return bits
