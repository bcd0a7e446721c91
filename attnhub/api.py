"""The public calls: `attention`, `scaled_dot_product_attention`, `explain`, `backends`."""

from __future__ import annotations

import math
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.compiler import is_compiling

from attnhub import arguments, recording, runtime
from attnhub.decision import Decision
from attnhub.eager import append_in_launch, grad_bits, is_usual_mask, no_modes, run, wants_grad
from attnhub.kv_cache import KVCache, append_first
from attnhub.layouts import Varlen
from attnhub.mask import FULL, BoolMask, Causal, Mask
from attnhub.mask import Bias as BiasMask
from attnhub.registry import registry
from attnhub.repeats import has_usual_shapes, read_again, repeated
from attnhub.rotary import Rotary

Layout = Literal["bhsd", "bshd"]
_TOP_LEFT = Causal("top_left")


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
    if profiler._is_profiler_enabled and not is_compiling() and not recording.inside():
        return recording.recorded(  # type: ignore[no-any-return]
            "attnhub::attention", (q, k, v), attention, q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
            varlen=varlen, kv_cache=kv_cache, rotary=rotary, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, deterministic=deterministic,
            return_lse=return_lse, layout=layout, backend=backend,
        )  # fmt: skip
    plain = (
        varlen is None and sinks is None and dropout_p == 0 and layout == "bhsd" and q_descale is None and k_descale is None
        and v_descale is None and not deterministic and (rotary is None or kv_cache is not None) and not is_compiling()
    )  # fmt: skip
    if plain and no_modes() and (mask is None or is_usual_mask(mask)):
        usual = FULL if mask is None else mask
        if kv_cache is None:
            again = repeated(q, k, v, usual, softmax_scale, softcap, return_lse, backend or "")
            if again is not None:
                return again
        elif (k is None) == (v is None) and (rotary is None or k is not None) and type(kv_cache) is KVCache and usual.structural:
            read = read_again(q, kv_cache, usual, softmax_scale, softcap, return_lse, backend or "", k, v, rotary)
            if read is not None:
                return read
    descale = arguments.descales(q_descale, k_descale, v_descale)
    call = arguments.normalise(q, k, v, mask, softmax_scale, softcap, sinks, dropout_p, varlen, kv_cache, return_lse, layout, None, descale, deterministic, rotary)
    found = None
    if call.append is not None:
        assert kv_cache is not None
        found = append_in_launch(call, kv_cache, backend or "")
        call = call if found is not None else append_first(call, kv_cache)
    out, lse = run(call, backend or "", return_lse) if found is None else found
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
    if profiler._is_profiler_enabled and not is_compiling() and not recording.inside():
        return recording.recorded(  # type: ignore[no-any-return]
            "attnhub::scaled_dot_product_attention", (query, key, value), scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal, scale,
            enable_gqa,
        )  # fmt: skip
    if attn_mask is not None and is_causal:
        raise ValueError("scaled_dot_product_attention: attn_mask must be None when is_causal=True (as in torch); combine them into one mask")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"scaled_dot_product_attention({name}): a torch.Tensor is needed, got {type(t).__name__}")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.is_nested:
            # They have no shape to look at, and raise torch's "Internal error".
            raise TypeError(f"scaled_dot_product_attention({name}): a nested tensor; use attnhub.attention with varlen=, or torch's own function")
    if query.ndim < 2 or key.ndim < 2 or value.ndim < 2:
        raise ValueError(f"scaled_dot_product_attention: q, k, v need at least 2 dimensions, got {query.ndim}, {key.ndim}, {value.ndim}")
    mask = _TOP_LEFT if is_causal else FULL
    if attn_mask is None and dropout_p == 0 and not is_compiling() and no_modes():
        again = repeated(query, key, value, mask, scale, 0.0, False, "", bool(enable_gqa))
        if again is not None:
            return again  # type: ignore[return-value]
    if has_usual_shapes(query, key, value, enable_gqa):
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
    descale = arguments.descales(q_descale, k_descale, v_descale)
    if rotary is not None:
        arguments.check_rotary(rotary, q, k, kv_cache)
    table = None
    if kv_cache is not None:
        new = 0 if k is None else k.shape[2 if layout == "bhsd" else 1]
        q, layout = q.transpose(1, 2) if layout == "bshd" and varlen is None else q, "bhsd"
        k, v, mask, table = arguments.cached(kv_cache, mask, new)
        if varlen is not None and table is None:
            table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]
    call = arguments.normalise(q, k, v, mask, softmax_scale, softcap, sinks, dropout_p, varlen, None, return_lse, layout, table, descale, deterministic)
    return runtime.explain(call, backend or "", wants_grad(call), grad_bits(call, return_lse))


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
