"""K/V caches: contiguous or paged, appended in place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, Optional

import torch
from torch import Tensor

from attnhub.backend import Call
from attnhub.mask import _check_ints, register_pytree
from attnhub.rotary import apply_rotary

Layout = Literal["bhsd", "bshd"]


def _is_count(x: Any) -> bool:
    return isinstance(x, (Integral, torch.SymInt)) and not isinstance(x, bool)


@dataclass(frozen=True, eq=False)
class KVCache:
    """A cache that `attention` reads and appends to.

    - Contiguous: k_cache [B, Hk, S_max, D], v_cache [B, Hk, S_max, Dv] (``layout="bshd"``: [B, S_max, Hk, D]). With
      ``cache_batch_idx`` [B] the cache may hold more rows than the batch, and row b of the batch is row cache_batch_idx[b].
    - Paged: k_cache [pages, Hk, page_size, D] (``"bshd"``: [pages, page_size, Hk, D]) and block_table [B, max_pages]:
      token t of sequence b lies in page block_table[b, t // page_size] at t % page_size.

    cache_seqlens: [B] int32, tokens already in the cache *before* this call's new ones. `attention` does not change it;
    `advance` does, once all layers have appended.
    """

    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    block_table: Optional[Tensor] = None
    cache_batch_idx: Optional[Tensor] = None
    layout: Layout = "bhsd"

    def __post_init__(self) -> None:
        if self.layout not in ("bhsd", "bshd"):
            raise ValueError(f"KVCache(layout={self.layout!r}): allowed are 'bhsd' and 'bshd'")
        for name in ("k_cache", "v_cache"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"KVCache({name}): a torch.Tensor is needed, got {type(value).__name__}")
        if self.k_cache.dtype != self.v_cache.dtype or not self.k_cache.is_floating_point():
            raise ValueError(f"KVCache: k_cache is {self.k_cache.dtype} and v_cache {self.v_cache.dtype}: one floating dtype is needed for both")
        if self.k_cache.ndim != 4 or self.v_cache.ndim != 4 or self.k_cache.shape[:3] != self.v_cache.shape[:3]:
            raise ValueError(
                f"KVCache: k_cache {tuple(self.k_cache.shape)} and v_cache {tuple(self.v_cache.shape)} must be 4-D and agree in all but head_dim"
            )
        if self.block_table is not None and self.cache_batch_idx is not None:
            raise ValueError("KVCache: give block_table or cache_batch_idx, not both: a block table already says which rows are used")
        _check_ints("KVCache(cache_seqlens)", self.cache_seqlens, 1)
        if self.cache_seqlens.dtype != torch.int32:
            raise ValueError(f"KVCache(cache_seqlens): int32 is needed, since advance() counts in place in your tensor; got {self.cache_seqlens.dtype}")
        for name in ("v_cache", "cache_seqlens", "block_table", "cache_batch_idx"):
            value = getattr(self, name)
            if value is not None and value.device != self.k_cache.device:
                raise ValueError(f"KVCache: {name} is on {value.device} and k_cache on {self.k_cache.device}: they must be on one device")
        if self.block_table is not None:
            object.__setattr__(self, "block_table", _check_ints("KVCache(block_table)", self.block_table, 2))
        elif self.cache_batch_idx is not None:
            object.__setattr__(self, "cache_batch_idx", _check_ints("KVCache(cache_batch_idx)", self.cache_batch_idx, 1))

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, max_seqlen: int, head_dim: int, *, v_head_dim: Optional[int] = None, page_size: int = 0,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> KVCache:  # fmt: skip
        """A new, empty cache for ``max_seqlen`` tokens a sequence; paged with its own pages in order if ``page_size`` > 0."""
        sizes = {"batch": batch, "kv_heads": kv_heads, "max_seqlen": max_seqlen, "head_dim": head_dim, "v_head_dim": head_dim if v_head_dim is None else v_head_dim}
        for name, size in sizes.items():
            if not _is_count(size) or size < 1:
                raise ValueError(f"KVCache.empty({name}={size!r}): an int of at least 1 is needed")
        if not _is_count(page_size) or page_size < 0:
            raise ValueError(f"KVCache.empty(page_size={page_size!r}): an int is needed: tokens of a page, or 0 for no pages")
        block_table = None
        rows, length = batch, max_seqlen
        if page_size:
            per_sequence = -(-max_seqlen // page_size)
            rows, length = batch * per_sequence, page_size
            block_table = torch.arange(rows, dtype=torch.int32, device=device).view(batch, per_sequence)
        k = torch.zeros(rows, kv_heads, length, head_dim, dtype=dtype, device=device)
        v = torch.zeros(rows, kv_heads, length, sizes["v_head_dim"], dtype=dtype, device=device)
        return cls(k, v, torch.zeros(batch, dtype=torch.int32, device=device), block_table)

    def heads_first(self) -> tuple[Tensor, Tensor]:
        """(k, v) as views [rows or pages, Hk, S_max or page_size, head_dim]."""
        if self.layout == "bhsd":
            return self.k_cache, self.v_cache
        return self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2)

    def kept_heads_first(self, alike: Any) -> tuple[Tensor, Tensor]:
        """`heads_first`, remembered with ``alike``: whoever passes the same again has found k_cache and v_cache to have the same shapes and strides."""
        if self.layout == "bhsd":
            return self.k_cache, self.v_cache
        kept: Optional[tuple[Any, Tensor, Tensor]] = self.__dict__.get("_kept")
        if kept is not None and kept[0] is alike:
            _, keys, values = kept
            # What is kept has held its memory, so that an equal address is the same memory.
            if keys.data_ptr() == self.k_cache.data_ptr() and values.data_ptr() == self.v_cache.data_ptr():
                return keys, values
        keys, values = self.heads_first()
        self.__dict__["_kept"] = alike, keys, values
        return keys, values

    def __getstate__(self) -> dict[str, Any]:
        """The fields, without what was made from them."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def table(self) -> Optional[Tensor]:
        """The block table; a cache with cache_batch_idx is one whose pages are whole rows."""
        return self.cache_batch_idx.unsqueeze(1) if self.cache_batch_idx is not None else self.block_table

    def capacity(self) -> int:
        """Tokens that one sequence can hold."""
        length = self.heads_first()[0].shape[2]
        table = self.table()
        return length if table is None else table.shape[1] * length

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more in cache_seqlens, in place, once every layer has appended them; fewer if negative, as after drafts that were refused."""
        if not _is_count(tokens):
            raise TypeError(f"KVCache.advance(tokens={tokens!r}): an int is needed; lengths that differ are yours to write to cache_seqlens")
        self.cache_seqlens.add_(tokens)


_FIELDS = ("k_cache", "v_cache", "cache_seqlens", "block_table", "cache_batch_idx")


def _flatten(cache: KVCache) -> tuple[list[Any], tuple[Any, ...]]:
    names = tuple(name for name in _FIELDS if getattr(cache, name) is not None)
    return [getattr(cache, name) for name in names], (names, cache.layout)


def _unflatten(children: Any, context: tuple[Any, ...]) -> KVCache:
    cache = object.__new__(KVCache)
    names, layout = context
    tensors = dict(zip(names, children))
    for name in _FIELDS:
        object.__setattr__(cache, name, tensors.get(name))
    object.__setattr__(cache, "layout", layout)
    return cache


register_pytree(KVCache, _flatten, _unflatten)


def append_kv(
    cache: KVCache, k: Tensor, v: Tensor, *, rotary: Optional[tuple[Tensor, Tensor]] = None, interleaved: bool = False
) -> None:
    """Write the new tokens k [B, Hk, S, D], v [B, Hk, S, Dv] behind cache_seqlens, in place.

    rotary: (cos, sin), each [max_positions, R]: k is rotated at its positions first (`attnhub.rotary.apply_rotary`).
    cache_seqlens stays as it is (see `KVCache.advance`). New tokens are cast to the cache's dtype, but neither to nor from fp8. There is no gradient: call it under
    torch.no_grad(), as generation is run, or detach() what requires one.

    Raises ValueError where shapes disagree, for tensors that require a gradient while gradients are recorded and, on CPU, where the tokens do not fit; on
    other devices the indices are asserted by the device.
    """
    check_new(cache, k, v, rotary is not None)
    for name, table in zip(("cos", "sin"), rotary or ()):
        if isinstance(table, Tensor) and table.requires_grad and torch.is_grad_enabled():
            raise _no_gradient(f"rotary: {name}")
    keys, values = cache.heads_first()
    cos, sin = rotary if rotary is not None else (None, None)
    from attnhub import ops

    ops.append_kv(keys, values, k, v, cache.cache_seqlens, cache.table(), cos, sin, interleaved)


def _no_gradient(what: str) -> ValueError:
    return ValueError(
        f"append_kv({what}): it requires a gradient, and a K/V cache, which is written in place, has none: call under torch.no_grad(), or detach() it"
    )


def check_new(cache: KVCache, k: Tensor, v: Tensor, rotated: bool) -> None:
    """Raises ValueError unless the cache takes new tokens of these shapes, dtypes and devices, whose gradients nobody wants."""
    keys, values = cache.heads_first()
    batch = cache.cache_seqlens.shape[0]
    for name, new, old in (("k", k, keys), ("v", v, values)):
        if not isinstance(new, Tensor):
            raise TypeError(f"append_kv({name}): a torch.Tensor is needed, got {type(new).__name__}")
        if not new.is_floating_point():
            raise ValueError(f"append_kv({name}): {new.dtype} tokens; a floating dtype is needed")
        if new.ndim != 4 or new.shape[0] != batch or new.shape[1] != old.shape[1] or new.shape[3] != old.shape[3]:
            raise ValueError(f"append_kv({name}): got {tuple(new.shape)}; the cache needs [{batch}, {old.shape[1]}, S, {old.shape[3]}]")
        if new.device != old.device:
            raise ValueError(f"append_kv({name}): it is on {new.device} and the cache on {old.device}: they must be on one device")
    if torch.is_grad_enabled():
        for name, t in (("k", k), ("v", v), ("k_cache", cache.k_cache), ("v_cache", cache.v_cache)):
            if t.requires_grad:
                raise _no_gradient(name)
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"append_kv: k has {k.shape[2]} new tokens and v {v.shape[2]}")
    for name, new, old in (("k", k, keys), ("v", v, values)):
        if torch.float8_e4m3fn in (new.dtype, old.dtype) and (new.dtype != old.dtype or rotated):
            raise ValueError(
                f"append_kv({name}): {new.dtype} tokens into a {old.dtype} cache{' with rotary=' if rotated else ''}: float8_e4m3fn is stored as it "
                "is; rotate first, then quantise with the factor that attention gets as k_descale or v_descale"
            )


def append_first(call: Call, cache: KVCache) -> Call:
    """Appends a call's new tokens by torch operations, in place, and gives the call that is left. cache: the one that it is about."""
    append, used = call.append, call.mask.seqused_k
    assert append is not None and used is not None
    q, rotary, interleaved = call.q, None, False
    if append.rotary is not None:
        cos, sin, interleaved, one_position = append.rotary
        rotary = cos, sin
        positions = used.long()[:, None]
        positions = positions.expand(-1, q.shape[2]) if one_position else positions + torch.arange(q.shape[2], device=q.device)
        q = apply_rotary(q, cos, sin, positions, interleaved)
    append_kv(cache, append.k, append.v, rotary=rotary, interleaved=interleaved)
    keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in cache.heads_first())
    mask = replace(call.mask, seqused_k=used + append.k.shape[2])
    return Call(
        q, keys, values, mask, call.softmax_scale, call.softcap, call.sinks, call.dropout_p, call.rng, call.varlen, call.block_table, call.need_lse,
        call.descale, call.deterministic,
    )  # fmt: skip
