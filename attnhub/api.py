"""The public calls: `attention`, `scaled_dot_product_attention`, `explain`, `backends`.

Arguments are normalised here, once; errors name the argument, what it was, what is allowed, and the fix.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnhub import config, ops, philox, runtime, spec
from attnhub.backend import Append, Call, Descale, PrepareError
from attnhub.decision import Decision
from attnhub.kv_cache import KVCache, append_first, check_new
from attnhub.layouts import Varlen, lse_dtype
from attnhub.mask import FULL, BoolMask, Causal, Mask, SeqLens
from attnhub.mask import Bias as BiasMask
from attnhub.registry import registry
from attnhub.rotary import Rotary, check_rotary

Layout = Literal["bhsd", "bshd"]
_FP8 = torch.float8_e4m3fn
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, _FP8}
_NO_DESCALE = Descale()
_TOP_LEFT = Causal("top_left")
_PLAIN = {Tensor, torch.nn.Parameter}


def attention(
    q: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    mask: Optional[Mask] = None,
    *,
    softmax_scale: Optional[float] = None,
    softcap: float = 0,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0,
    varlen: Optional[Varlen] = None,
    kv_cache: Optional[KVCache] = None,
    rotary: Optional[Rotary] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    deterministic: bool = False,
    return_lse: bool = False,
    layout: Layout = "bhsd",
    backend: Optional[str] = None,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """softmax(softmax_scale * q k^T + ...) v by the best backend for this problem.

    In this order, accumulated in fp32: ``s = softmax_scale * q k^T``; ``s = softcap * tanh(s / softcap)``; biases of the
    mask are added; masked pairs are removed; softmax, whose denominator also holds ``exp(sinks[h])``; dropout; ``@ v``.
    A query without any key gives 0 (and lse -inf).

    q: [B, Hq, Sq, D], k: [B, Hk, Sk, D], v: [B, Hk, Sk, Dv], fp16, bf16, fp32, fp64 or float8_e4m3fn; Hq is a multiple of Hk (GQA).
        With ``layout="bshd"`` heads and tokens are exchanged, in q, k, v and out. With ``varlen``: [T, H, D], whatever the layout.
    mask: parts joined by ``&`` (`attnhub.Causal`, `Window`, `BoolMask`, ...). None attends to everything.
    softmax_scale: default 1 / sqrt(D). softcap: 0 is off. sinks: [Hq], differentiable. dropout_p: probability of dropping.
    varlen: packed sequences. kv_cache: k and v (or None) are appended to it in place, and q attends to all of the cache. With both, q is
        packed, k and v are None (append first), and the cache says which keys there are: varlen's own are not read.
    rotary: with kv_cache and new k and v: `attnhub.Rotary`. k is rotated before it is appended, and q, at their positions. A backend may append
        and rotate in the launch that attends (cuda's kernel for few queries does); else torch operations do it first.
    q_descale, k_descale, v_descale: for float8_e4m3fn inputs, as in flash-attn 3: fp32 [B, Hk] (varlen: B is the number of sequences;
        any strides, so ``factor.expand(B, Hk)`` is fine). q, k and v stand for q * q_descale, k * k_descale and v * v_descale; None
        is 1. The result is then bf16, and there is a forward pass only.
    deterministic: admit only backends that promise bitwise repeatable results, forward and backward, for this call
        (`torch.use_deterministic_algorithms` and ATTNHUB_DETERMINISTIC do so for all).
    return_lse: also return the fp32 (fp64 for fp64 inputs) natural logarithm of the softmax denominator, [B, Hq, Sq] (varlen: [Hq, T]), differentiable.
    backend: a name or a list ("cuda,triton", "cuda,auto"): strict, see docs/choosing.md.

    Raises ValueError or TypeError for arguments that do not fit, `attnhub.NoBackendError` if no admitted backend can serve
    the call, with every reason.
    """
    plain = (
        varlen is None and sinks is None and not dropout_p and layout == "bhsd" and q_descale is None and k_descale is None
        and v_descale is None and not deterministic and (rotary is None or kv_cache is not None) and not torch.compiler.is_compiling()
    )  # fmt: skip
    if plain and (mask is None or _is_usual_mask(mask)) and _no_modes() and _is_usual_tensor(q):
        usual = FULL if mask is None else mask
        if kv_cache is None:
            if _is_usual_tensor(k) and _is_usual_tensor(v):
                return _repeated(q, k, v, usual, softmax_scale, softcap, return_lse, backend or "")  # type: ignore[arg-type]
        elif (k is None) == (v is None) and (rotary is None or k is not None) and type(kv_cache) is KVCache and usual.structural:
            read = _read_again(q, kv_cache, usual, softmax_scale, softcap, return_lse, backend or "", k, v, rotary)
            if read is not None:
                return read
    descale = _descale(q_descale, k_descale, v_descale)
    call = _normalise(q, k, v, mask, softmax_scale, softcap, sinks, dropout_p, varlen, kv_cache, return_lse, layout, None, descale, deterministic, rotary)
    found = None
    if call.append is not None:
        assert kv_cache is not None
        found = _append_in_launch(call, kv_cache, backend or "")
        call = call if found is not None else append_first(call, kv_cache)
    out, lse = _run(call, backend or "", return_lse) if found is None else found
    if varlen is not None:
        out = out[0].transpose(0, 1)
        return (out, lse[0]) if lse is not None else out
    if layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if lse is not None else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention's contract, served by attnhub.

    query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev]: any leading dimensions that broadcast. is_causal is
    aligned top left. attn_mask: bool (True attends) or floating, broadcastable to [..., Hq, L, S]. Unlike torch in some
    versions, a row without keys always gives 0.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("scaled_dot_product_attention: attn_mask must be None when is_causal=True (as in torch); combine them into one mask")
    if query.ndim < 2 or key.ndim < 2 or value.ndim < 2:
        raise ValueError(f"scaled_dot_product_attention: q, k, v need at least 2 dimensions, got {query.ndim}, {key.ndim}, {value.ndim}")
    mask = _TOP_LEFT if is_causal else FULL
    plain = attn_mask is None and not dropout_p and not torch.compiler.is_compiling() and _no_modes()
    if plain and _is_usual_tensor(query) and _is_usual_tensor(key) and _is_usual_tensor(value) and _is_usual(query, key, value, enable_gqa):
        return _repeated(query, key, value, mask, scale, 0.0, False, "")  # type: ignore[return-value]
    if _is_usual(query, key, value, enable_gqa):
        if attn_mask is not None:
            mask = BoolMask(attn_mask) if attn_mask.dtype == torch.bool else BiasMask(attn_mask)
        return attention(query, key, value, mask, softmax_scale=scale, dropout_p=dropout_p)  # type: ignore[return-value]
    if enable_gqa:
        heads = query.shape[-3] if query.ndim > 2 else 1
        kv_heads = key.shape[-3] if key.ndim > 2 else 1
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"scaled_dot_product_attention(enable_gqa=True): {heads} query heads are not a multiple of {kv_heads} key heads")
        key, value = (t.repeat_interleave(heads // t.shape[-3], -3) if t.ndim > 2 and t.shape[-3] != heads else t for t in (key, value))
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    batch, heads = math.prod(lead[:-1]), (lead[-1] if lead else 1)
    q4, k4, v4 = (t.expand(*lead, *t.shape[-2:]).reshape(batch, heads, *t.shape[-2:]) for t in (query, key, value))
    if attn_mask is not None:
        full = (query.shape[-2], key.shape[-2])
        if attn_mask.ndim > 2 or len(lead) > 1:
            attn_mask = attn_mask.expand(*lead, *full).reshape(batch, heads, *full) if attn_mask.ndim > 2 else attn_mask
        mask = BoolMask(attn_mask) if attn_mask.dtype == torch.bool else BiasMask(attn_mask)
    out = attention(q4, k4, v4, mask, softmax_scale=scale, dropout_p=dropout_p)
    assert isinstance(out, Tensor)
    return out.reshape(*lead, *out.shape[-2:])


def _is_usual(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the shapes are what `attention` takes: 4 dimensions, one batch, heads that agree or divide."""
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4 or not query.shape[0] == key.shape[0] == value.shape[0]:
        return False
    heads, kv_heads = query.shape[1], key.shape[1]
    return kv_heads == value.shape[1] and (heads == kv_heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0))


def explain(
    q: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    mask: Optional[Mask] = None,
    *,
    softmax_scale: Optional[float] = None,
    softcap: float = 0,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0,
    varlen: Optional[Varlen] = None,
    kv_cache: Optional[KVCache] = None,
    rotary: Optional[Rotary] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    deterministic: bool = False,
    return_lse: bool = False,
    layout: Layout = "bhsd",
    backend: Optional[str] = None,
) -> Decision:
    """The decision for the call that `attention` with the same arguments would make; nothing runs, no cache is appended to.

    Every installed backend is in it, accepted or with all its reasons. Never raises for "no backend": ``chosen`` is None.
    """
    descale = _descale(q_descale, k_descale, v_descale)
    if rotary is not None:
        _check_rotary(rotary, q, k, kv_cache)
    if kv_cache is not None:
        new = 0 if k is None else k.shape[2 if layout == "bhsd" else 1]
        q, layout = q.transpose(1, 2) if layout == "bshd" and varlen is None else q, "bhsd"
        k, v, mask, table = _cached(kv_cache, mask, new)
        if varlen is not None and table is None:
            table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]
        call = _normalise(q, k, v, mask, softmax_scale, softcap, sinks, dropout_p, varlen, None, return_lse, layout, table, descale, deterministic)
    else:
        call = _normalise(q, k, v, mask, softmax_scale, softcap, sinks, dropout_p, varlen, None, return_lse, layout, None, descale, deterministic)
    return runtime.explain(call, backend or "", _wants_grad(call), _grad_bits(call, return_lse))


#: Calls seen before, by exact metadata, need no validation and no classification. Forgotten when full (a decode loop brings
#: lengths that never return; those calls are served by the runtime's cache of classes).
_seen = runtime.seen
_SEEN_LIMIT = 1024


def _repeated(
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
        # A list for a number, say: `_normalise` has words for it.
        if not isinstance(backend, str):
            raise TypeError(f"backend={backend!r}: a backend's name or a comma-separated list of names is needed") from None
        if not isinstance(return_lse, bool):
            raise TypeError(f"return_lse is a {type(return_lse).__name__}: True or False is needed") from None
        seen = None
    if seen is None:
        call = _normalise(q, k, v, mask, softmax_scale, softcap, None, 0.0, None, None, return_lse, "bhsd")
        out, lse = _run(call, backend, return_lse)
        if call.q is q and call.k is k and call.v is v and _is_eager(call) and not runtime.is_empty(call):
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
        out, lse = _run(call, backend, return_lse)
    return (out, lse) if lse is not None else out


def _remember(key: tuple[Any, ...], call: Call, chosen: runtime.Prepared, repeatable: bool) -> None:
    """What serves calls of a key from now on. repeatable: whether the call is one that `Plan.repeat` speaks of."""
    if len(_seen) >= _SEEN_LIMIT:
        _seen.clear()
    _seen[key] = chosen, call.softmax_scale, chosen.plan.repeat(call) if repeatable else None


def _read_again(
    q: Tensor, cache: KVCache, mask: Mask, softmax_scale: Optional[float], softcap: float, return_lse: bool, backend: str,
    k: Optional[Tensor] = None, v: Optional[Tensor] = None, rotary: Optional[Rotary] = None,
) -> Union[Tensor, tuple[Tensor, Tensor], None]:  # fmt: skip
    """What `_repeated` is, for a cache. None: the long way has to be gone, this time or always.

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
        if not _is_usual_tensor(t):
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
    call = _normalise(q, k, v, mask, softmax_scale, softcap, None, 0.0, None, cache, return_lse, "bhsd", rotary=rotary)
    found = _run(call, backend, return_lse) if append is None else _append_in_launch(call, cache, backend)
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
    if _is_eager(call) and not runtime.is_empty(call):
        _remember(key, call, runtime.prepared(call, backend, False), given)
    return (out, lse) if lse is not None else out


def append_again(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, cache: KVCache, rotary: Optional[Rotary], softmax_scale: Optional[float], softcap: float, backend: str
) -> Union[Tensor, tuple[Tensor, Tensor], None]:  # fmt: skip
    """`attention` with new tokens and a mask without tensors, by a backend that appends them in the launch that attends; else None, and nothing is done."""
    usual = _no_modes() and not torch.compiler.is_compiling()
    return _read_again(q, cache, mask, softmax_scale, softcap, False, backend, k, v, rotary) if usual else None


def _is_usual_tensor(t: Any) -> bool:
    # The operator layer makes real what a negative bit only says.
    return type(t) in _PLAIN and (t.is_cpu or t.is_cuda) and not t.is_neg()


def _is_usual_mask(mask: Any) -> bool:
    """Whether all tensors of a mask are usual ones that need no gradient."""
    if type(mask) is not Mask:
        return False
    if mask.structural:
        return True
    learnt = (mask.bias is not None and mask.bias.requires_grad) or (mask.alibi is not None and mask.alibi.requires_grad)
    return not learnt and all(type(t) in _PLAIN and not t.is_neg() for t in mask.held)


def _no_modes() -> bool:
    """Whether no mode, transform, trace, autocast or forward-mode level is active."""
    return not (
        torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack() or torch._C._is_any_autocast_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )  # fmt: skip


def _append_in_launch(call: Call, cache: KVCache, backend: str) -> Optional[tuple[Tensor, Optional[Tensor]]]:
    """A call with new tokens by a plan that appends them itself, or None."""
    # What the call holds is a copy of a cache whose rows have gaps.
    own = all(t.stride(3) == 1 for t in cache.heads_first())
    return runtime.append_in_launch(call, backend) if own and not torch.compiler.is_compiling() and _is_eager(call) else None


def _run(call: Call, backend: str, return_lse: bool) -> tuple[Tensor, Optional[Tensor]]:
    grad = _wants_grad(call)
    if grad and call.q.dtype == _FP8:
        raise ValueError("q, k and v are float8_e4m3fn, which has no gradient: call under torch.no_grad(), or detach() whatever requires one")
    if not torch.compiler.is_compiling() and _is_eager(call):
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
        chosen = runtime._served.chosen = runtime.prepared(call, backend, True, _grad_bits(call, return_lse))
        try:
            if chosen.differentiable and not return_lse:
                return chosen.forward(call)[0], None
            call.need_lse = True
            result = ops.EagerAttention.apply(call.q, call.k, call.v, call.mask.bias, call.sinks, call, chosen, return_lse, None)
            return result if return_lse else (result, None)
        except PrepareError as error:
            runtime.launch_failed(chosen, error)


def _wants_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and (
        call.q.requires_grad or call.k.requires_grad or call.v.requires_grad
        or (call.mask.bias is not None and call.mask.bias.requires_grad) or (call.sinks is not None and call.sinks.requires_grad)
        or (call.descale is not None and any(t is not None and t.requires_grad for t in call.descale))
    )  # fmt: skip


def _grad_bits(call: Call, return_lse: bool) -> int:
    bits = 0
    if torch.is_grad_enabled():
        if call.mask.bias is not None and call.mask.bias.requires_grad:
            bits |= runtime._BIAS_GRAD
        if call.sinks is not None and call.sinks.requires_grad:
            bits |= runtime._SINKS_GRAD
        if return_lse and _wants_grad(call):
            bits |= runtime._LSE_GRAD
    return bits


def _is_eager(call: Call) -> bool:
    """Whether the operator layer can be left out: plain tensors with memory, and no mode, transform, trace, autocast or dual number."""
    append = call.append
    added = () if append is None else (append.k, append.v) if append.rotary is None else (append.k, append.v, append.rotary.cos, append.rotary.sin)
    tensors = [t for t in (call.q, call.k, call.v, *call.mask.tensors(), call.sinks, call.rng, *(call.descale or ()), *added) if t is not None]
    if any(type(t) not in _PLAIN or t.is_neg() for t in tensors) or call.q.is_meta:
        return False
    if forward_ad._current_level < 0:
        return _no_modes()
    if any(t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("attnhub.attention has no forward-mode derivative: use reverse mode, or torch's math SDPA for dual numbers")
    return False


# -- normalising ---------------------------------------------------------------------------------------------------------


def _normalise(
    q: Tensor, k: Optional[Tensor], v: Optional[Tensor], mask: Optional[Mask], softmax_scale: Optional[float], softcap: float,
    sinks: Optional[Tensor], dropout_p: float, varlen: Optional[Varlen], kv_cache: Optional[KVCache], need_lse: bool, layout: str,
    block_table: Optional[Tensor] = None, descale: Descale = _NO_DESCALE, deterministic: bool = False, rotary: Optional[Rotary] = None,
) -> Call:  # fmt: skip
    for name, value, kind in (("q", q, Tensor), ("k", k, Tensor), ("v", v, Tensor), ("sinks", sinks, Tensor), ("varlen", varlen, Varlen), ("kv_cache", kv_cache, KVCache)):
        if not isinstance(value, kind) and (value is not None or name == "q"):
            raise TypeError(f"{name} is a {type(value).__name__}: a {kind.__name__} is needed")
    for name, number in (("softcap", softcap), ("dropout_p", dropout_p)):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name} is a {type(number).__name__}: a number is needed")
    new_tokens: Optional[tuple[Tensor, Tensor]] = None
    if mask is None:
        mask = FULL
    elif not isinstance(mask, Mask):
        raise TypeError(
            f"mask is a {type(mask).__name__}: an attnhub.Mask or None is needed; wrap a bool tensor in attnhub.BoolMask(...), "
            "an additive one in attnhub.Bias(...)"
        )
    if layout != "bhsd":
        if layout != "bshd":
            raise ValueError(f"layout={layout!r}: allowed are 'bhsd' and 'bshd'")
        if varlen is None:
            q, k, v = (None if t is None else t.transpose(1, 2) if t.ndim == 4 else t for t in (q, k, v))  # type: ignore[assignment]
    if kv_cache is not None:
        new_tokens = _new_tokens(q, k, v, kv_cache, varlen)
        k, v, mask, block_table = _cached(kv_cache, mask, 0)
        if varlen is not None and block_table is None:
            # Rows of a contiguous cache are pages of their own.
            block_table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]
    if k is None or v is None:
        raise TypeError("k and v are needed unless kv_cache is given")
    if varlen is not None:
        q, k, v = _unpack(q, k, v, varlen, block_table is not None)
    _check_shapes(q, k, v, block_table, varlen)
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        # Kernels read rows of head_dim; a strided last dimension is copied once, here.
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if softmax_scale is None:
        scale = q.shape[3] ** -0.5
    elif not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale is a {type(softmax_scale).__name__}: a number or None is needed (call .item() on a tensor)")
    elif not -math.inf < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale={softmax_scale}: a finite number is needed")
    else:
        scale = float(softmax_scale)
    call = Call(q, k, v, mask, scale, 0.0, None, 0.0, None, varlen, block_table, need_lse)
    call.deterministic = bool(deterministic)
    if softcap:
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap={softcap}: 0 (off) or a positive number is needed")
        call.softcap = float(softcap)
    if sinks is not None:
        if sinks.shape != (q.shape[1],):
            raise ValueError(f"sinks has shape {tuple(sinks.shape)}: [Hq] = [{q.shape[1]}] is needed, one sink a query head")
        if not sinks.is_floating_point() or sinks.device != q.device:
            raise ValueError(f"sinks is {sinks.dtype} on {sinks.device}: a floating tensor on {q.device} is needed")
        wide = lse_dtype(q.dtype)
        call.sinks = sinks if sinks.dtype == wide else sinks.to(wide)
    if dropout_p:
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p={dropout_p}: 0 <= dropout_p < 1 is needed")
        call.dropout_p = float(dropout_p)
        call.rng = philox.draw(q.device)
    if mask is not FULL:
        _check_mask(mask, call)
    if descale is not _NO_DESCALE:
        _check_descale(descale, call)
        call.descale = descale
    if rotary is not None:
        _check_rotary(rotary, q, None if new_tokens is None else new_tokens[0], kv_cache)
    if kv_cache is not None and new_tokens is not None:
        check_new(kv_cache, *new_tokens, rotary is not None)
        call.append = Append(*new_tokens, rotary)
    return call


def _check_rotary(rotary: Rotary, q: Tensor, k: Optional[Tensor], kv_cache: Optional[KVCache]) -> None:
    if kv_cache is None or k is None:
        raise ValueError("rotary= goes with kv_cache= and new tokens k and v: without them rotate q and k yourself (attnhub.apply_rotary)")
    check_rotary(rotary, q)


def _descale(q_descale: Optional[Tensor], k_descale: Optional[Tensor], v_descale: Optional[Tensor]) -> Descale:
    return _NO_DESCALE if q_descale is None and k_descale is None and v_descale is None else Descale(q_descale, k_descale, v_descale)


def _check_descale(descale: Descale, call: Call) -> None:
    q = call.q
    shape = (q.shape[0] if call.varlen is None else call.varlen.cu_seqlens_q.shape[0] - 1, call.k.shape[1])
    for name, value in zip(("q_descale", "k_descale", "v_descale"), descale):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: a Tensor is needed; for a number, torch.full((1, 1), number, device=q.device).expand{shape}")
        if q.dtype != _FP8:
            raise ValueError(f"{name} is given and q is {q.dtype}: factors go with float8_e4m3fn inputs; leave it out, and multiply q, k or v by it")
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: [B, Hk] = {list(shape)} is needed; for one factor, factor.expand{shape}")
        if value.dtype != torch.float32 or value.device != q.device:
            raise ValueError(f"{name} is {value.dtype} on {value.device}: a float32 tensor on {q.device} is needed")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, block_table: Optional[Tensor], varlen: Optional[Varlen]) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k and v need 4 dimensions ([B, H, S, D]; [T, H, D] goes with varlen=), got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    batch, q_heads, _, head_dim = q.shape
    kv_batch, kv_heads, seqlen_k, k_dim = k.shape
    v_shape = v.shape
    if k_dim != head_dim:
        raise ValueError(f"head_dim of q is {head_dim} and of k {k_dim} (q {tuple(q.shape)}, k {tuple(k.shape)}): they must be equal")
    if v_shape[0] != kv_batch or v_shape[1] != kv_heads or v_shape[2] != seqlen_k:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must agree in batch, heads and length")
    if block_table is None and kv_batch != batch:
        raise ValueError(f"q has batch {batch} and k {kv_batch}: they must be equal; use k.expand({batch}, -1, -1, -1) to share K/V, which copies nothing")
    if kv_heads != q_heads and (kv_heads == 0 or q_heads % kv_heads):
        raise ValueError(f"q has {q_heads} heads and k {kv_heads}: the heads of q must be a multiple of those of k (grouped-query attention)")
    if head_dim == 0 or v_shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got {head_dim} for q and k, {v_shape[3]} for v")
    _check_dtypes(q, k, v)
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: they must be on one device")


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    dtype = q.dtype
    if k.dtype != dtype or v.dtype != dtype:
        found = f"q is {dtype}, k {k.dtype}, v {v.dtype}: they must be of one dtype; "
        if _FP8 in (dtype, k.dtype, v.dtype):
            raise ValueError(found + "float8_e4m3fn is served with q, k, v and the kv_cache all in it, and autocast leaves it alone")
        if not torch._C._is_any_autocast_enabled():
            raise ValueError(found + "cast them, or run under torch.autocast")
    if dtype not in _FLOATS:
        other = "; float8_e4m3fn is the only 8-bit format" if dtype.is_floating_point and dtype.itemsize == 1 else ""
        raise ValueError(f"q is {dtype}: float16, bfloat16, float32, float64 or float8_e4m3fn is needed{other}")


def _unpack(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, paged: bool) -> tuple[Tensor, Tensor, Tensor]:
    if q.ndim != 3 or (not paged and (k.ndim != 3 or v.ndim != 3)):
        raise ValueError(f"with varlen, q, k and v are packed tokens [T, H, D], got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if varlen.cu_seqlens_q.device != q.device or varlen.cu_seqlens_k.device != q.device:
        raise ValueError(f"cu_seqlens are on {varlen.cu_seqlens_q.device}/{varlen.cu_seqlens_k.device} and q on {q.device}: move them to {q.device}")
    k, v = (t if paged else t.transpose(0, 1).unsqueeze(0) for t in (k, v))
    return q.transpose(0, 1).unsqueeze(0), k, v


def _check_mask(mask: Mask, call: Call) -> None:
    """Every tensor of the mask fits the problem; a misfit would read out of bounds or broadcast silently."""
    q = call.q
    batch, q_heads, seqlen_q, _ = q.shape
    seqlen_k = call.k.shape[2]
    if call.varlen is not None:
        batch, seqlen_q, seqlen_k = call.varlen.cu_seqlens_q.shape[0] - 1, call.varlen.max_seqlen_q, call.varlen.max_seqlen_k
    if call.block_table is not None:
        seqlen_k = call.block_table.shape[1] * call.k.shape[2]
    for name in ("prefix", "seqused_k", "leftpad"):
        value = getattr(mask, name)
        if value is not None and value.shape[0] != batch:
            raise ValueError(f"mask: {name} has {value.shape[0]} entries; the batch has {batch} sequences")
    for name in ("segments", "blocks"):
        pair = getattr(mask, name)
        if pair is not None and (pair[0].shape != (batch, seqlen_q) or pair[1].shape != (batch, seqlen_k)):
            raise ValueError(
                f"mask: segment ids have shapes {tuple(pair[0].shape)} and {tuple(pair[1].shape)}; [{batch}, {seqlen_q}] and [{batch}, {seqlen_k}] are needed"
            )
    for name in ("bool_mask", "bias"):
        value = getattr(mask, name)
        if value is not None and any(have not in (1, want) for have, want in zip(value.shape, (batch, q_heads, seqlen_q, seqlen_k))):
            raise ValueError(
                f"mask: {name} has shape {tuple(value.shape)}, which does not broadcast to [B, Hq, Sq, Sk] = [{batch}, {q_heads}, {seqlen_q}, {seqlen_k}]"
            )
    if mask.alibi is not None and mask.alibi.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask: ALiBi slopes require a gradient, which is not computed: detach() them, or add them as Bias, whose gradient is")
    if mask.alibi is not None and (mask.alibi.shape[-1] != q_heads or (mask.alibi.ndim == 2 and mask.alibi.shape[0] != batch)):
        raise ValueError(f"mask: ALiBi slopes have shape {tuple(mask.alibi.shape)}; [{q_heads}] or [{batch}, {q_heads}] is needed")
    if mask.block_sparse is not None:
        bq, bk = mask.block_size
        want = (batch, q_heads, -(-seqlen_q // bq), -(-seqlen_k // bk))
        have = mask.block_sparse.shape
        if have[0] not in (1, batch) or have[1] not in (1, q_heads) or tuple(have[2:]) != want[2:]:
            raise ValueError(f"mask: BlockSparse has shape {tuple(have)}; [{batch} or 1, {q_heads} or 1, {want[2]}, {want[3]}] is needed for blocks of {mask.block_size}")
    for value in mask.tensors():
        if value.device != q.device:
            raise ValueError(f"mask: a tensor is on {value.device} and q on {q.device}: move it to {q.device}")


def _cached(cache: KVCache, mask: Optional[Mask], new: int) -> tuple[Tensor, Tensor, Mask, Optional[Tensor]]:
    if mask is not None and mask.seqused_k is not None:
        raise ValueError("mask: SeqLens and kv_cache cannot be given together: the cache's cache_seqlens say which keys exist")
    keys, values = cache.heads_first()
    lengths = SeqLens(cache.cache_seqlens + new if new else cache.cache_seqlens)
    return keys, values, lengths if mask is None or mask is FULL else mask & lengths, cache.table()


def _new_tokens(
    q: Tensor, k: Optional[Tensor], v: Optional[Tensor], cache: KVCache, varlen: Optional[Varlen] = None
) -> Optional[tuple[Tensor, Tensor]]:
    """The tokens to append, or None."""
    if (k is None) != (v is None):
        raise TypeError("kv_cache: give both k and v (the new tokens), or neither")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v)):
        raise ValueError("kv_cache writes the new keys in place and has no gradient: call under torch.no_grad(), or pass k and v without a cache")
    if varlen is not None and k is not None:
        raise ValueError("kv_cache and varlen: packed queries read a cache that the new tokens are in already; append_kv(...) and advance(...) it first, and pass no k and v")
    batch = q.shape[0] if varlen is None else varlen.cu_seqlens_q.shape[0] - 1
    if batch != cache.cache_seqlens.shape[0]:
        raise ValueError(f"q has batch {batch} and the cache's cache_seqlens {cache.cache_seqlens.shape[0]} entries: they must agree")
    if k is None or v is None:
        return None
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"kv_cache: the new tokens k {tuple(k.shape)} and v {tuple(v.shape)} need 4 dimensions, [B, Hk, S, D]")
    return k, v


def backends() -> dict[str, dict[str, Any]]:
    """Every installed backend: what it declares and whether it can run on this machine (``reasons`` is empty then)."""
    found: dict[str, dict[str, Any]] = {}
    for name, candidate in registry.candidates().items():
        backend, probe = candidate.backend, candidate.probe
        entry: dict[str, Any] = {"available": backend is not None and not probe, "reasons": [r.to_json() for r in probe]}
        entry["distribution"] = registry.distribution(name)
        if backend is not None:
            c = backend.capability
            entry["automatic"] = backend.automatic
            entry["devices"] = sorted({r.type for r in c.devices})
            entry["features"] = sorted(f.value for f in c.features)
            entry["backward"] = sorted(f.value for f in c.backward_features) if c.backward_features is not None else None
        found[name] = entry
    return found


