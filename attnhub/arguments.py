"""What a call is given, checked and normalised once into a `Call`; errors name the argument, what it was, what is allowed, and the fix."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from attnhub import philox
from attnhub import rotary as rotations
from attnhub.backend import Append, Call, Descale
from attnhub.kv_cache import KVCache, check_new
from attnhub.layouts import Varlen, check_cumulative, lse_dtype
from attnhub.mask import FULL, Mask, SeqLens, check_fields
from attnhub.rotary import Rotary

_FP8 = torch.float8_e4m3fn
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, _FP8}
_NO_DESCALE = Descale()
_WRAP = "wrap a bool tensor in attnhub.BoolMask(...), an additive one in attnhub.Bias(...)"
#: Scores are fp32: a factor beyond its range is no number there.
_LARGEST = torch.finfo(torch.float32).max


def normalise(
    q: Tensor, k: Optional[Tensor], v: Optional[Tensor], mask: Optional[Mask], softmax_scale: Optional[float], softcap: float,
    sinks: Optional[Tensor], dropout_p: float, varlen: Optional[Varlen], kv_cache: Optional[KVCache], need_lse: bool, layout: str,
    block_table: Optional[Tensor] = None, descale: Descale = _NO_DESCALE, deterministic: bool = False, rotary: Optional[Rotary] = None,
) -> Call:  # fmt: skip
    for name, value, kind in (("q", q, Tensor), ("k", k, Tensor), ("v", v, Tensor), ("sinks", sinks, Tensor), ("varlen", varlen, Varlen), ("kv_cache", kv_cache, KVCache)):
        if not isinstance(value, kind) and (value is not None or name == "q"):
            # Others have a Tensor too (functorch.dim), and torch.fx a Proxy.
            found = type(value).__name__ if type(value).__module__ in ("builtins", "numpy") else f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"{name} is a {found}: a {'torch.Tensor' if kind is Tensor else kind.__name__} is needed")
    for name, number in (("softcap", softcap), ("dropout_p", dropout_p)):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name} is a {type(number).__name__}: a number is needed")
    for name, switch in (("return_lse", need_lse), ("deterministic", deterministic)):
        if not isinstance(switch, bool):
            raise TypeError(f"{name} is a {type(switch).__name__}: True or False is needed")
    new_tokens: Optional[tuple[Tensor, Tensor]] = None
    if mask is None:
        mask = FULL
    elif not isinstance(mask, Mask):
        fix = f"call it, as in attnhub.Causal(), or {_WRAP}" if callable(mask) else _WRAP
        raise TypeError(f"mask is a {type(mask).__name__}: an attnhub.Mask or None is needed; {fix}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if isinstance(t, Tensor) and (t.is_nested or t.layout != torch.strided):
            found = "nested" if t.is_nested else str(t.layout)
            raise TypeError(f"{name} is a {found} tensor: a dense one is needed; packed sequences go with varlen=, padded ones with a mask (SeqLens)")
    if layout != "bhsd":
        if layout != "bshd":
            raise ValueError(f"layout={layout!r}: allowed are 'bhsd' and 'bshd'")
        if varlen is None:
            q, k, v = (None if t is None else t.transpose(1, 2) if t.ndim == 4 else t for t in (q, k, v))  # type: ignore[assignment]
    if kv_cache is not None:
        new_tokens = _new_tokens(q, k, v, kv_cache, varlen)
        k, v, mask, block_table = cached(kv_cache, mask, 0)
        if varlen is not None and block_table is None:
            # Rows of a contiguous cache are pages of their own.
            block_table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]
    if k is None or v is None:
        raise TypeError("k and v are needed unless kv_cache is given")
    if varlen is not None:
        q, k, v = _unpack(q, k, v, varlen, block_table is not None)
    _check_shapes(q, k, v, block_table)
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        # Kernels read rows of head_dim; a strided last dimension is copied once, here.
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if softmax_scale is None:
        scale = q.shape[3] ** -0.5
    elif not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale is a {type(softmax_scale).__name__}: a number or None is needed (call .item() on a tensor)")
    elif not -_LARGEST <= softmax_scale <= _LARGEST:
        raise ValueError(f"softmax_scale={softmax_scale}: a finite number is needed")
    else:
        scale = float(softmax_scale)
    call = Call(q, k, v, mask, scale, 0.0, None, 0.0, None, varlen, block_table, need_lse)
    call.deterministic = bool(deterministic)
    if softcap:
        if not 0 < softcap <= _LARGEST:
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
        check_rotary(rotary, q, None if new_tokens is None else new_tokens[0], kv_cache)
    if kv_cache is not None and new_tokens is not None:
        check_new(kv_cache, *new_tokens, rotary is not None)
        call.append = Append(*new_tokens, rotary)
    return call


def check_rotary(rotary: Rotary, q: Tensor, k: Optional[Tensor], kv_cache: Optional[KVCache]) -> None:
    if kv_cache is None or k is None:
        raise ValueError("rotary= goes with kv_cache= and new tokens k and v: without them rotate q and k yourself (attnhub.apply_rotary)")
    rotations.check_rotary(rotary, q)


def descales(q_descale: Optional[Tensor], k_descale: Optional[Tensor], v_descale: Optional[Tensor]) -> Descale:
    return _NO_DESCALE if q_descale is None and k_descale is None and v_descale is None else Descale(q_descale, k_descale, v_descale)


def cached(cache: KVCache, mask: Optional[Mask], new: int) -> tuple[Tensor, Tensor, Mask, Optional[Tensor]]:
    if mask is not None and mask.seqused_k is not None:
        raise ValueError("mask: SeqLens and kv_cache cannot be given together: the cache's cache_seqlens say which keys exist")
    table, batch = cache.table(), cache.cache_seqlens.shape[0]
    if table is not None and table.shape[0] != batch:
        name = "block_table" if cache.block_table is not None else "cache_batch_idx"
        raise ValueError(f"kv_cache: {name} has {table.shape[0]} rows and cache_seqlens {batch} entries: one for each sequence is needed")
    keys, values = cache.heads_first()
    lengths = SeqLens(cache.cache_seqlens + new if new else cache.cache_seqlens)
    return keys, values, lengths if mask is None or mask is FULL else mask & lengths, table


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


def _unpack(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, paged: bool) -> tuple[Tensor, Tensor, Tensor]:
    if q.ndim != 3 or (not paged and (k.ndim != 3 or v.ndim != 3)):
        raise ValueError(f"with varlen, q, k and v are packed tokens [T, H, D], got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if varlen.cu_seqlens_q.device != q.device or varlen.cu_seqlens_k.device != q.device:
        raise ValueError(f"cu_seqlens are on {varlen.cu_seqlens_q.device}/{varlen.cu_seqlens_k.device} and q on {q.device}: move them to {q.device}")
    check_cumulative("q", varlen.cu_seqlens_q, varlen.max_seqlen_q, q.shape[0])
    if not paged:
        check_cumulative("k", varlen.cu_seqlens_k, varlen.max_seqlen_k, k.shape[0])
    k, v = (t if paged else t.transpose(0, 1).unsqueeze(0) for t in (k, v))
    return q.transpose(0, 1).unsqueeze(0), k, v


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, block_table: Optional[Tensor]) -> None:
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
    if dtype not in FLOATS:
        other = "; float8_e4m3fn is the only 8-bit format" if dtype.is_floating_point and dtype.itemsize == 1 else ""
        raise ValueError(f"q is {dtype}: float16, bfloat16, float32, float64 or float8_e4m3fn is needed{other}")


def _check_mask(mask: Mask, call: Call) -> None:
    """Every tensor of the mask fits the problem; a misfit would read out of bounds or broadcast silently."""
    check_fields(mask)
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
    if mask.alibi is not None and mask.alibi.dtype != torch.float32 and q.dtype != torch.float64:
        raise ValueError(f"mask: alibi is {mask.alibi.dtype}: float32 is needed; attnhub.ALiBi(...) makes it")
    if mask.block_sparse is not None:
        bq, bk = mask.block_size
        want = (batch, q_heads, -(-seqlen_q // bq), -(-seqlen_k // bk))
        have = mask.block_sparse.shape
        if have[0] not in (1, batch) or have[1] not in (1, q_heads) or tuple(have[2:]) != want[2:]:
            raise ValueError(f"mask: BlockSparse has shape {tuple(have)}; [{batch} or 1, {q_heads} or 1, {want[2]}, {want[3]}] is needed for blocks of {mask.block_size}")
    for value in mask.tensors():
        if value.device != q.device:
            raise ValueError(f"mask: a tensor is on {value.device} and q on {q.device}: move it to {q.device}")


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
