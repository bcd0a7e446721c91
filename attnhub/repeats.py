"""Eager calls that were seen before: by their exact metadata they need no validation and no classification."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

from attnhub import arguments, config, ops, runtime
from attnhub.backend import Append, Call, PrepareError
from attnhub.eager import append_in_launch, is_eager, is_usual_tensor, no_modes, run
from attnhub.kv_cache import KVCache
from attnhub.mask import FULL, Mask
from attnhub.registry import registry
from attnhub.rotary import Rotary

#: Forgotten when full: a decode loop brings lengths that never return; those calls are served by the runtime's cache of classes.
_seen = runtime.seen
_SEEN_LIMIT = 1024


def repeated(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, softmax_scale: Optional[float], softcap: float, return_lse: bool, backend: str
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """An eager call of plain tensors alone: the shortest way to the plan, since host time counts here."""
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    strides = None if q.is_contiguous() and k.is_contiguous() and v.is_contiguous() else (q.stride(), k.stride(), v.stride())
    devices = None if q.is_cpu and k.is_cpu and v.is_cpu else (q.device, k.device, v.device)
    key = (
        q.shape, k.shape, v.shape, strides, devices, (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15, q.dtype, k.dtype, v.dtype,
        None if mask is FULL else mask.structure if mask.structural else (mask.structure, *[(t.shape, t.dtype, t.device) for t in mask.held]),
        softmax_scale, softcap, return_lse, grad, backend, runtime._context.get(), config.snapshot(), registry.generation,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    try:
        seen = _seen.get(key)
    except TypeError:
        # A list for a number, say: `arguments.normalise` has words for it.
        if not isinstance(backend, str):
            raise TypeError(f"backend={backend!r}: a backend's name or a comma-separated list of names is needed") from None
        if not isinstance(return_lse, bool):
            raise TypeError(f"return_lse is a {type(return_lse).__name__}: True or False is needed") from None
        seen = None
    if seen is None:
        call = arguments.normalise(q, k, v, mask, softmax_scale, softcap, None, 0.0, None, None, return_lse, "bhsd")
        out, lse = run(call, backend, return_lse)
        if call.q is q and call.k is k and call.v is v and is_eager(call) and not runtime.is_empty(call):
            bits = runtime._LSE_GRAD if grad and return_lse else 0
            call.need_lse = return_lse
            chosen = runtime.prepared(call, backend, grad, bits)
            call.need_lse = return_lse or grad
            _remember(key, call, chosen, mask.structural and not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15)
        return (out, lse) if lse is not None else out
    chosen, scale, repeat = seen
    runtime._served.chosen = chosen
    if repeat is not None and not grad:
        again = repeat(q, k, v)
        if again is not None:
            return again if return_lse else again[0]  # type: ignore[return-value]
    call = Call(q, k, v, mask, scale, softcap, need_lse=return_lse)
    try:
        if grad and (return_lse or not chosen.differentiable):
            call.need_lse = True
            result: Union[Tensor, tuple[Tensor, Tensor]] = ops.EagerAttention.apply(q, k, v, mask.bias, None, call, chosen, return_lse, repeat)
            return result
        out, lse = chosen.forward(call)
    except PrepareError as error:
        # Strides of a mask, say, are not in the key, and another kernel had to be compiled for them.
        runtime.launch_failed(chosen, error)
        call.need_lse = return_lse
        out, lse = run(call, backend, return_lse)
    return (out, lse) if lse is not None else out


def read_again(
    q: Tensor, cache: KVCache, mask: Mask, softmax_scale: Optional[float], softcap: float, return_lse: bool, backend: str,
    k: Optional[Tensor] = None, v: Optional[Tensor] = None, rotary: Optional[Rotary] = None,
) -> Union[Tensor, tuple[Tensor, Tensor], None]:  # fmt: skip
    """What `repeated` is, for a cache. None: the long way has to be gone, this time or always.

    k, v: new tokens, which this way appends only in the launch that attends. After None nothing has been appended.
    """
    if rotary is not None and type(rotary) is not Rotary:
        return None
    append = None if k is None or v is None else Append(k, v, rotary)
    added: tuple[Any, ...] = () if append is None else (k, v) if rotary is None else (k, v, rotary.cos, rotary.sin)
    keys, values = cache.heads_first()
    table = cache.table()
    tensors = (q, keys, values, cache.cache_seqlens) if table is None else (q, keys, values, cache.cache_seqlens, table)
    addresses = 0
    for t in (*tensors, *added):
        if not is_usual_tensor(t):
            return None
        addresses |= t.data_ptr()
    if addresses & 15 or (torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad or values.requires_grad or any(t.requires_grad for t in added))):
        return None
    key = (
        KVCache, table is None, None if rotary is None else rotary[2:],
        *[(t.shape, t.is_contiguous() or t.stride(), t.get_device(), t.dtype) for t in (*tensors, *added)], None if mask is FULL else mask.structure,
        softmax_scale, softcap, return_lse, backend, runtime._context.get(), config.snapshot(), registry.generation,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    try:
        seen = _seen.get(key)
    except TypeError:
        # A list for a number, say: the long way has words for it.
        return None
    if seen is not None:
        chosen, _, repeat = seen
        again = None if repeat is None else repeat(*tensors) if append is None else repeat(*tensors, append=append)
        if again is not None:
            runtime._served.chosen = chosen
            return again if return_lse else again[0]  # type: ignore[return-value]
        return None
    call = arguments.normalise(q, k, v, mask, softmax_scale, softcap, None, 0.0, None, cache, return_lse, "bhsd", rotary=rotary)
    found = run(call, backend, return_lse) if append is None else append_in_launch(call, cache, backend)
    if found is None:
        # While a graph is captured a backend may say no for want of a kernel, and only then.
        if not (q.is_cuda and torch.cuda.is_current_stream_capturing()) and not runtime.is_empty(call):
            _remember(key, call, runtime.prepared(call, backend, False), False)
        return None
    out, lse = found
    # A tensor that was copied on the way is no input of the plan's.
    given = (
        call.q is q and call.mask.seqused_k is cache.cache_seqlens and call.k.data_ptr() == keys.data_ptr() and call.v.data_ptr() == values.data_ptr()
        and all(t.is_contiguous() for t in tensors[3:])
    )  # fmt: skip
    if is_eager(call) and not runtime.is_empty(call):
        _remember(key, call, runtime.prepared(call, backend, False), given)
    return (out, lse) if lse is not None else out


def append_again(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, cache: KVCache, rotary: Optional[Rotary], softmax_scale: Optional[float], softcap: float, backend: str
) -> Union[Tensor, tuple[Tensor, Tensor], None]:  # fmt: skip
    """`attention` with new tokens and a mask without tensors, by a backend that appends them in the launch that attends; else None, and nothing is done."""
    usual = no_modes() and not torch.compiler.is_compiling()
    return read_again(q, cache, mask, softmax_scale, softcap, False, backend, k, v, rotary) if usual else None


def _remember(key: tuple[Any, ...], call: Call, chosen: runtime.Prepared, repeatable: bool) -> None:
    """What serves calls of a key from now on. repeatable: whether the call is one that `Plan.repeat` speaks of."""
    if len(_seen) >= _SEEN_LIMIT:
        _seen.clear()
    _seen[key] = chosen, call.softmax_scale, chosen.plan.repeat(call) if repeatable else None
