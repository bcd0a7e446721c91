"""`warmup`: what a first call of a class of problems has to wait for, done before the first request."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub import runtime
from attnhub.api import attention
from attnhub.arguments import FLOATS
from attnhub.decision import Decision
from attnhub.device import named
from attnhub.kv_cache import KVCache
from attnhub.layouts import Varlen
from attnhub.mask import Mask
from attnhub.rotary import Rotary


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def warmup(
    *,
    q_heads: int,
    head_dim: int,
    seqlen_q: int,
    seqlen_k: Optional[int] = None,
    batch: int = 1,
    kv_heads: Optional[int] = None,
    v_head_dim: Optional[int] = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    mask: Optional[Mask] = None,
    softmax_scale: Optional[float] = None,
    softcap: float = 0.0,
    sinks: bool = False,
    dropout_p: float = 0.0,
    descale: str = "",
    packed: bool = False,
    page_size: int = 0,
    append: str = "",
    return_lse: bool = False,
    layout: str = "bhsd",
    need_backward: bool = False,
    backend: Optional[str] = None,
) -> Decision:
    """Choose, compile and load what serves calls of these shapes, so that the first request waits for none of it.

    Two calls of `attention` on tensors of zeros are made, with a backward pass if need_backward; they need the memory of such a call.
    Plans are shared by classes of lengths and batches (powers of two; Sq 0, 1, 2 to 16): a server that decodes up to 8192 tokens
    warms up 1 x 1024, 1 x 2048, 1 x 4096 and 1 x 8192. Compiled kernels also stay on disk, for processes that start later.

    q_heads, head_dim, seqlen_q, ...: the shapes, seqlen_k, kv_heads and v_head_dim by default as those of q. mask: as for `attention`;
    its tensors have to fit the shapes. sinks: whether there are any. descale: which of q, k and v come with factors (float8_e4m3fn), as
    in "qkv" or "kv". packed: ``batch`` sequences of these lengths in a `Varlen`. page_size: above 0, K/V in a paged `KVCache` with
    seqlen_k tokens. append: "tokens" for calls whose seqlen_q tokens are appended to such a cache (contiguous without page_size), as those of
    `CachedAttention` are, and fill it; "rotary" for calls that rotate them too. device: default cuda where there is one, else cpu.

    Returns the decision that served the calls. Its ``plan`` holds, besides what the backend tells of its kernels, ``first_call_seconds`` (with
    everything that is done once) and ``next_call_seconds``. Raises what `attention` raises: ValueError or TypeError, by name, for arguments that do
    not fit, `NoBackendError` if no backend serves them.
    """
    where = named("cuda" if device is None and torch.cuda.is_available() else "cpu" if device is None else device)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise ValueError(f"dtype={dtype!r}: a dtype of torch is needed: {', '.join(sorted(map(str, FLOATS)))}")
    for name, value in (("q_heads", q_heads), ("head_dim", head_dim), ("seqlen_q", seqlen_q), ("batch", batch)):
        if not _is_whole(value) or value < 1:
            raise ValueError(f"{name}={value!r}: a whole number above 0 is needed")
    for name, optional in (("seqlen_k", seqlen_k), ("kv_heads", kv_heads), ("v_head_dim", v_head_dim)):
        if optional is not None and (not _is_whole(optional) or optional < 1):
            raise ValueError(f"{name}={optional!r}: a whole number above 0 is needed, or None for that of q")
    if kv_heads and q_heads % kv_heads:
        raise ValueError(f"kv_heads={kv_heads}: q_heads={q_heads} must be a multiple of it (grouped-query attention)")
    if not _is_whole(page_size) or page_size < 0:
        raise ValueError(f"page_size={page_size!r}: a whole number above 0 is needed, or 0 for K/V without pages")
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout={layout!r}: allowed are 'bhsd' and 'bshd'")
    if not isinstance(descale, str):
        raise TypeError(f"descale={descale!r}: letters of 'qkv' are needed, one for each tensor that comes with factors")
    for name, switch in (("sinks", sinks), ("packed", packed), ("need_backward", need_backward)):
        if not isinstance(switch, bool):
            raise TypeError(f"{name} is a {type(switch).__name__}: True or False is needed")
    if page_size and need_backward:
        raise ValueError(f"page_size={page_size}: a paged cache has no backward pass; leave out need_backward")
    if set(descale) - set("qkv"):
        raise ValueError(f"descale={descale!r}: letters of 'qkv' are needed, one for each tensor that comes with factors")
    length, heads, v_dim = seqlen_k or seqlen_q, kv_heads or q_heads, v_head_dim or head_dim
    if append not in ("", "tokens", "rotary"):
        raise ValueError(f"append={append!r}: allowed are 'tokens' and 'rotary', and '' for calls that append nothing")
    if append and (packed or need_backward or length < seqlen_q):
        why = "packed queries append nothing" if packed else "a cache has no backward pass" if need_backward else f"seqlen_k={length} must hold seqlen_q={seqlen_q}"
        raise ValueError(f"append={append!r}: {why}")
    settings: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap, "dropout_p": dropout_p, "return_lse": return_lse, "backend": backend}
    settings["sinks"] = torch.zeros(q_heads, device=where) if sinks else None
    settings.update((f"{name}_descale", torch.ones(batch, heads, device=where)) for name in descale)

    def zeros(h: int, s: int, d: int) -> Tensor:
        shape = (batch * s, h, d) if packed else (batch, s, h, d) if layout == "bshd" else (batch, h, s, d)
        return torch.zeros(shape, dtype=dtype, device=where, requires_grad=need_backward)

    q = zeros(q_heads, seqlen_q, head_dim)
    inputs: tuple[Tensor, ...] = (q,)
    if page_size or append:
        cache = KVCache.empty(batch, heads, length, head_dim, v_head_dim=v_dim, page_size=page_size, dtype=dtype, device=where)
        cache.cache_seqlens.fill_(length - seqlen_q if append else length)
        settings["kv_cache"] = cache
        if append:
            inputs = (q, zeros(heads, seqlen_q, head_dim), zeros(heads, seqlen_q, v_dim))
        if append == "rotary":
            angles = torch.zeros(length, head_dim // 2, device=where)
            settings["rotary"] = Rotary(angles.cos(), angles)
    else:
        inputs = (q, zeros(heads, length, head_dim), zeros(heads, length, v_dim))
    if packed:
        settings["varlen"] = Varlen.from_lengths(*(torch.full((batch,), n, dtype=torch.int32, device=where) for n in (seqlen_q, length)))

    def call() -> float:
        started = time.perf_counter()
        with torch.set_grad_enabled(need_backward):
            result = attention(*inputs, mask=mask, layout=layout, **settings)  # type: ignore[arg-type,misc]
            out = result if isinstance(result, Tensor) else result[0]
            if need_backward:
                torch.autograd.grad(out, inputs, torch.ones_like(out))
        if where.type in ("cuda", "xpu"):
            getattr(torch, where.type).synchronize(where)
        return time.perf_counter() - started

    first, following = call(), call()
    chosen = runtime._served.chosen
    assert chosen is not None
    told = {"backend": chosen.backend, **chosen.plan.describe(), "first_call_seconds": first, "next_call_seconds": following}
    return dataclasses.replace(chosen.decision, plan=told)
