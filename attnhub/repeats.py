"""Eager calls that were seen before: by their exact metadata they need no validation and no classification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor

from attnhub import arguments, config, ops, runtime
from attnhub.backend import Append, Call, PrepareError, Repeat
from attnhub.eager import append_in_launch, is_eager, is_usual_tensor, no_modes, run
from attnhub.kv_cache import KVCache
from attnhub.mask import FULL, Mask
from attnhub.memory import LOWEST, has_memory
from attnhub.registry import registry
from attnhub.rotary import Rotary

#: Forgotten when full: a decode loop brings lengths that never return; those calls are served by the runtime's cache of classes.
_seen = runtime.seen
_SEEN_LIMIT = 1024
#: Those of them that came last, by all but their tensors; so many for one key, each of which is compared with a call's tensors.
_recent = runtime.recent
_RECENT_LIMIT = 4
_is_deterministic: Callable[[], bool] = getattr(torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled)
# Attributes of modules take as long as what is called here.
_is_grad_enabled, _get_context, _snapshot, _served = torch.is_grad_enabled, runtime._context.get, config.snapshot, runtime._served


def _tensor_guards() -> Any:
    try:
        found: Any = torch._C._dynamo.guards.TensorGuards
        tensor, other = (torch.empty(n, device="cpu") for n in (2, 3))
        works = found(tensor, dynamic_dims_sizes=[[2]], dynamic_dims_strides=[[1]]).check
        return found if works(tensor) and not works(other) else None
    except Exception:
        return None


#: torch.compile's own check whether tensors are as others were: type, dispatch keys, dtype, device, shape, strides, requires_grad, and that none is
#: there twice, in a fraction of the time that a key of `_seen` takes. It is private: without it (None) each call is looked up there.
_Guards: Any = _tensor_guards()


def _state() -> tuple[Any, ...]:
    """What a choice depends on beside the call."""
    return _is_grad_enabled(), _get_context(), _snapshot(), registry.generation, _is_deterministic()


def repeated(
    q: Any, k: Any, v: Any, mask: Mask, softmax_scale: Optional[float], softcap: float, return_lse: bool, backend: str, enable_gqa: Optional[bool] = None
) -> Union[Tensor, tuple[Tensor, Tensor], None]:  # fmt: skip
    """An eager call of plain tensors alone: the shortest way to the plan, since host time counts here. None: it is no such call.

    mask: one of `eager.is_usual_mask`. enable_gqa: None, or what F.scaled_dot_product_attention says, and its rules for shapes.
    """
    rest = (enable_gqa, None if mask is FULL else mask.structure, softmax_scale, softcap, return_lse, backend, _state())
    try:
        recent = _recent.get(rest, ())
    except TypeError:
        # A list for a number, say: `arguments.normalise` has words for it.
        if not isinstance(backend, str):
            raise TypeError(f"backend={backend!r}: a backend's name or a comma-separated list of names is needed") from None
        if not isinstance(return_lse, bool):
            raise TypeError(f"return_lse is a {type(return_lse).__name__}: True or False is needed") from None
        recent = None
    if recent and (getattr(q, "is_nested", False) or getattr(k, "is_nested", False) or getattr(v, "is_nested", False)):
        # `_Guards` must not see them: its check ends the process.
        return None
    for entry in recent or ():
        if (
            entry[0](q, k, v) and not ((a := q.data_ptr()) | (b := k.data_ptr()) | (c := v.data_ptr())) & 15
            and ((a >= LOWEST <= b and c >= LOWEST) or _have_memory(q, k, v))
        ):  # fmt: skip
            _, seen, grad = entry
            break
    else:
        if not (is_usual_tensor(q) and is_usual_tensor(k) and is_usual_tensor(v)) or (enable_gqa is not None and not has_usual_shapes(q, k, v, enable_gqa)):
            return None
        grad = _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        strides = None if q.is_contiguous() and k.is_contiguous() and v.is_contiguous() else (q.stride(), k.stride(), v.stride())
        unaligned = ((a := q.data_ptr()) | (b := k.data_ptr()) | (c := v.data_ptr())) & 15
        if not ((a >= LOWEST <= b and c >= LOWEST) or _have_memory(q, k, v)):
            return None
        key = (
            q.shape, k.shape, v.shape, strides, q.is_cuda, q.get_device(), k.get_device(), v.get_device(), unaligned, q.dtype, k.dtype, v.dtype,
            None if mask.structural else tuple([(t.shape, t.dtype, t.device) for t in mask.held]), grad, rest,
        )  # fmt: skip
        known = None if recent is None else _seen.get(key)
        if known is None:
            call = arguments.normalise(q, k, v, mask, softmax_scale, softcap, None, 0.0, None, None, return_lse, "bhsd")
            out, lse = run(call, backend, return_lse)
            if call.q is q and call.k is k and call.v is v and is_eager(call) and not runtime.is_empty(call):
                bits = runtime._LSE_GRAD if grad and return_lse else 0
                call.need_lse = return_lse
                chosen = runtime.prepared(call, backend, grad, bits)
                call.need_lse = return_lse or grad
                _remember(key, call, chosen, mask.structural and not unaligned)
            return (out, lse) if lse is not None else out
        seen = known
        if mask.structural and not unaligned:
            _note(rest, seen, grad, (q, k, v))
    chosen, scale, shorter = seen.chosen, seen.scale, seen.repeat
    _served.chosen = chosen
    if shorter is not None and (not grad or (chosen.differentiable and not return_lse)):
        again = shorter(q, k, v)
        if again is not None:
            return again if return_lse else again[0]  # type: ignore[return-value]
    call = Call(q, k, v, mask, scale, softcap, need_lse=return_lse)
    try:
        if grad and (return_lse or not chosen.differentiable):
            call.need_lse = True
            result: Union[Tensor, tuple[Tensor, Tensor]] = ops.EagerAttention.apply(q, k, v, mask.bias, None, call, chosen, return_lse, shorter)
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
    table, bhsd = cache.table(), cache.layout == "bhsd"
    lengths = cache.cache_seqlens
    tensors = (q, cache.k_cache, cache.v_cache, lengths) if table is None else (q, cache.k_cache, cache.v_cache, lengths, table)
    if append is not None:
        tensors = (*tensors, k, v) if rotary is None else (*tensors, k, v, rotary.cos, rotary.sin)  # type: ignore[assignment]
    rest = (
        KVCache, table is None, bhsd, append is None, None if rotary is None else rotary[2:], None if mask is FULL else mask.structure, softmax_scale, softcap,
        return_lse, backend, _state(),
    )  # fmt: skip
    try:
        recent = _recent.get(rest, ())
    except TypeError:
        # A list for a number, say: the long way has words for it.
        return None
    if recent and _any_nested(*tensors):
        return None
    for alike, seen, _ in recent:
        if alike(*tensors):
            if seen.repeat is None or _unaligned(tensors) or not _have_memory(*tensors):
                return None
            again = _with_cache(seen.repeat, q, *cache.kept_heads_first(alike), lengths, table, append)
            if again is None:
                return None
            _served.chosen = seen.chosen
            return again if return_lse else again[0]  # type: ignore[return-value]
    for t in tensors:
        if not is_usual_tensor(t) or (t.requires_grad and torch.is_grad_enabled()):
            return None
    if _unaligned(tensors) or not _have_memory(*tensors):
        return None
    key = (*[(t.shape, t.is_contiguous() or t.stride(), t.get_device(), t.dtype) for t in tensors], rest)
    known = _seen.get(key)
    keys, values = cache.heads_first()
    if known is not None:
        _note(rest, known, False, tensors)
        again = None if known.repeat is None else _with_cache(known.repeat, q, keys, values, lengths, table, append)
        if again is None:
            return None
        _served.chosen = known.chosen
        return again if return_lse else again[0]  # type: ignore[return-value]
    call = arguments.normalise(q, k, v, mask, softmax_scale, softcap, None, 0.0, None, cache, return_lse, "bhsd", rotary=rotary)
    found = run(call, backend, return_lse) if append is None else append_in_launch(call, cache, backend)
    if found is None:
        # While a graph is captured a backend may say no for want of a kernel, and only then.
        if not (q.is_cuda and torch.cuda.is_current_stream_capturing()) and not runtime.is_empty(call):
            _remember(key, call, runtime.prepared(call, backend, False), False)
        return None
    out, lse = found
    # A tensor that was copied on the way is no input of the plan's.
    repeatable = (
        call.q is q and call.mask.seqused_k is lengths and call.k.data_ptr() == keys.data_ptr() and call.v.data_ptr() == values.data_ptr()
        and lengths.is_contiguous() and (table is None or table.is_contiguous())
    )  # fmt: skip
    if is_eager(call) and not runtime.is_empty(call):
        _remember(key, call, runtime.prepared(call, backend, False), repeatable)
    return (out, lse) if lse is not None else out


def append_again(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, cache: KVCache, rotary: Optional[Rotary], softmax_scale: Optional[float], softcap: float, backend: str
) -> Union[Tensor, tuple[Tensor, Tensor], None]:  # fmt: skip
    """`attention` with new tokens and a mask without tensors, by a backend that appends them in the launch that attends; else None, and nothing is done."""
    usual = no_modes() and not torch.compiler.is_compiling()
    return read_again(q, cache, mask, softmax_scale, softcap, False, backend, k, v, rotary) if usual else None


def _any_nested(*tensors: Any) -> bool:
    """Whether `_Guards` must not see them: on a nested tensor its check ends the process."""
    for t in tensors:  # noqa: SIM110 - a generator would double the time
        if getattr(t, "is_nested", False):
            return True
    return False


def _with_cache(
    repeat: Repeat, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, table: Optional[Tensor], append: Optional[Append]
) -> Optional[tuple[Tensor, Optional[Tensor]]]:  # fmt: skip
    if append is not None:
        return repeat(q, keys, values, lengths, append=append) if table is None else repeat(q, keys, values, lengths, table, append=append)
    return repeat(q, keys, values, lengths) if table is None else repeat(q, keys, values, lengths, table)


def _have_memory(*tensors: Tensor) -> bool:
    return all(map(has_memory, tensors))


def _unaligned(tensors: tuple[Tensor, ...]) -> int:
    addresses = 0
    for t in tensors:
        addresses |= t.data_ptr()
    return addresses & 15


def has_usual_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether shapes for F.scaled_dot_product_attention are what `attention` takes: 4 dimensions, one batch, heads that agree or divide."""
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4 or not query.shape[0] == key.shape[0] == value.shape[0]:
        return False
    heads, kv_heads = query.shape[1], key.shape[1]
    return kv_heads == value.shape[1] and (heads == kv_heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0))


def _remember(key: tuple[Any, ...], call: Call, chosen: runtime.Prepared, repeatable: bool) -> None:
    """What serves calls of a key from now on. repeatable: whether the call is one that `Plan.repeat` speaks of."""
    if len(_seen) >= _SEEN_LIMIT:
        _seen.clear()
        _recent.clear()
    _seen[key] = runtime.Seen(chosen, call.softmax_scale, chosen.plan.repeat(call) if repeatable else None)


def _note(rest: tuple[Any, ...], seen: runtime.Seen, grad: bool, tensors: tuple[Tensor, ...]) -> None:
    """Has calls like this one found by their tensors."""
    if _Guards is None or len(set(map(id, tensors))) < len(tensors):
        return
    # Dispatch keys (of inference mode, say) and subclasses are not in the key of `_seen`.
    if seen.alike is None or not seen.alike(*tensors):
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        seen.alike = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    _recent[rest] = ((seen.alike, seen, grad), *_recent.get(rest, ())[: _RECENT_LIMIT - 1])
