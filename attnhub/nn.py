"""Modules for those who write inference engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from attnhub import runtime
from attnhub.api import attention, explain
from attnhub.decision import Decision
from attnhub.kv_cache import KVCache, append_kv
from attnhub.mask import Causal, Mask, _whole
from attnhub.repeats import append_again
from attnhub.rotary import Rotary, apply_rotary

__all__ = ["CachedAttention"]


class CachedAttention(nn.Module):
    """Attention that owns its K/V cache: each call appends its tokens at the position, attends to all of the cache, and moves on.

    num_heads, kv_heads, head_dim: kv_heads divides num_heads (GQA; default num_heads). head_dim: default embed_dim / num_heads.
    embed_dim: with it the layer has projections q_proj, k_proj, v_proj and o_proj (names and shapes of Llama's; bias on the first
        three, out_bias on the last), and is called with x [B, S, embed_dim]. Without it the layer has no parameters, and is called
        with q [B, S, num_heads, head_dim], k and v [B, S, kv_heads, head_dim].
    batch, max_seqlen: sequences, and tokens that each may have. page_size: 0 is a contiguous cache, else one of pages.
    mask: of new tokens (aligned at the bottom right) over all tokens; default `attnhub.Causal`. softmax_scale, softcap: `attention`'s.
    rotary: (cos, sin), each [positions, R], or the base of Llama's angles (10000.0). rotary_interleaved: pairs (2d, 2d + 1).
    backend: as in `attention`: names in order of preference; one without ``auto`` at the end is strict. By default the best backend
        for each call serves, and another where that one cannot; `served` counts them, `explain` tells why.

    For inference: no gradients. The cache follows ``.to(...)`` and stays out of state_dict. One layer, one caller at a time.
    """

    def __init__(
        self, num_heads: int, kv_heads: Optional[int] = None, head_dim: Optional[int] = None, *, embed_dim: Optional[int] = None, batch: int = 1,
        max_seqlen: int = 2048, page_size: int = 0, bias: bool = False, out_bias: bool = False, mask: Optional[Mask] = None,
        softmax_scale: Optional[float] = None, softcap: float = 0.0, rotary: Union[tuple[Tensor, Tensor], float, None] = None,
        rotary_interleaved: bool = False, backend: Optional[str] = None, dtype: Optional[torch.dtype] = None,
        device: Union[torch.device, str, None] = None,
    ) -> None:  # fmt: skip
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        sizes = {"num_heads": num_heads, "kv_heads": kv_heads, "head_dim": head_dim, "embed_dim": embed_dim, "batch": batch, "max_seqlen": max_seqlen}
        for name, size in (*sizes.items(), ("page_size", page_size)):
            least = 0 if name in ("batch", "page_size") else 1
            if size is not None and (not _whole(size) or size < least):
                raise ValueError(f"CachedAttention({name}={size!r}): a whole number of at least {least} is needed")
        if num_heads % kv_heads:
            raise ValueError(f"CachedAttention: num_heads={num_heads} is not a multiple of kv_heads={kv_heads}")
        if head_dim is None:
            if embed_dim is None or embed_dim % num_heads:
                why = "without embed_dim" if embed_dim is None else f"since embed_dim={embed_dim} is not a multiple of num_heads={num_heads}"
                raise ValueError(f"CachedAttention: head_dim is needed {why}")
            head_dim = embed_dim // num_heads
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"CachedAttention: mask is a {type(mask).__name__}: an attnhub.Mask or None is needed, as attnhub.Causal() makes one")
        self.num_heads, self.kv_heads, self.head_dim, self.embed_dim = num_heads, kv_heads, head_dim, embed_dim
        self.mask = Causal() if mask is None else mask
        self.softmax_scale, self.softcap, self.backend = softmax_scale, softcap, backend
        place: dict[str, Any] = {"dtype": dtype or torch.get_default_dtype(), "device": device or torch.get_default_device()}
        if embed_dim is not None:
            self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **place)
            self.k_proj, self.v_proj = (nn.Linear(embed_dim, kv_heads * head_dim, bias, **place) for _ in range(2))
            self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, out_bias, **place)
            self.requires_grad_(False)
        self.rotary_interleaved = rotary_interleaved
        #: The base of the angles and their number, where the tables were made of these.
        self._angles: Optional[tuple[float, int]] = None
        if isinstance(rotary, (int, float)):
            if isinstance(rotary, bool) or not 0 < rotary < math.inf or head_dim % 2:
                raise ValueError(f"CachedAttention(rotary={rotary}): the base of the angles is needed, a number above 0 (Llama's is 10000.0), and an even head_dim ({head_dim})")
            self._angles = float(rotary), max_seqlen
            rotary = _angles(float(rotary), head_dim, max_seqlen)
        #: (cos, sin) in fp32 whatever the layer's dtype: angles of far positions need the digits.
        self.rotary: Optional[tuple[Tensor, Tensor]] = None
        if rotary is not None:
            if not isinstance(rotary, (tuple, list)) or len(rotary) != 2 or not all(isinstance(t, Tensor) for t in rotary):
                raise TypeError(f"CachedAttention: rotary is a {type(rotary).__name__}: a pair of tensors (cos, sin), or the base of the angles is needed")
            self.rotary = rotary[0].to(place["device"], torch.float32), rotary[1].to(place["device"], torch.float32)
        #: Calls by the backend that served them, outside compiled graphs.
        self.served: dict[str, int] = {}
        self.use_cache(KVCache.empty(batch, kv_heads, max_seqlen, head_dim, page_size=page_size, **place))

    def use_cache(self, cache: KVCache) -> None:
        """Go on with a cache of your own (pages of a shared pool, say). Reads its longest length on the host."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"use_cache: cache is a {type(cache).__name__}: an attnhub.KVCache is needed")
        keys = cache.heads_first()[0]
        if keys.shape[1] != self.kv_heads or keys.shape[3] != self.head_dim:
            raise ValueError(f"use_cache: the cache has {keys.shape[1]} heads of {keys.shape[3]}; the layer needs {self.kv_heads} of {self.head_dim}")
        self.cache = cache
        lengths = cache.cache_seqlens
        # Without values (a meta device, a FakeTensorMode) there is nothing to read: such a layer is made for its shapes.
        self._longest = int(lengths.max()) if lengths.numel() and not lengths.is_meta and not is_fake(lengths) else 0

    @property
    def position(self) -> Tensor:
        """[B] int32: where each sequence's next token goes. The cache's own tensor; change it through `set_position`."""
        return self.cache.cache_seqlens

    def set_position(self, position: Union[int, Tensor]) -> None:
        """Where the next tokens go: one number, or [B] integers (which are read on the host). What lies behind exists no more.

        0 begins anew; after a padded prefill, the true lengths drop the padding; a smaller number takes tokens back.
        """
        if isinstance(position, Tensor):
            if position.shape != self.position.shape or position.is_floating_point():
                raise ValueError(
                    f"set_position: position is {position.dtype} {tuple(position.shape)}: a whole number or integers [{self.position.shape[0]}] are needed"
                )
            least, most = (int(position.min()), int(position.max())) if position.numel() else (0, 0)
        elif not _whole(position):
            raise TypeError(f"set_position: position is {position!r}: a whole number or integers [{self.position.shape[0]}] are needed")
        else:
            least = most = position
        if least < 0 or most > self.cache.capacity():
            raise ValueError(f"set_position: {least} to {most} is outside of 0 to {self.cache.capacity()}, the tokens that the cache holds")
        self.position.copy_(position) if isinstance(position, Tensor) else self.position.fill_(position)
        self._longest = most

    def forward(self, x: Tensor, k: Optional[Tensor] = None, v: Optional[Tensor] = None) -> Tensor:
        """x [B, S, embed_dim] -> the same; without projections q (x), k, v [B, S, heads, head_dim] -> [B, S, num_heads, head_dim].

        A call that is refused leaves the position where it was.
        """
        for name, t in (("x" if self.embed_dim else "q", x), ("k", k), ("v", v)):
            if not isinstance(t, Tensor) and (t is not None or t is x):
                raise TypeError(f"CachedAttention: {name} is a {type(t).__name__}: a Tensor is needed")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, k, v)):
            raise ValueError("CachedAttention is for inference and has no gradient: call it under torch.no_grad(), or detach() its inputs")
        if self.embed_dim is None:
            if k is None or v is None:
                raise TypeError("CachedAttention without embed_dim has no projections: call it with q, k and v")
            return self._attend(x, k, v)
        if k is not None or v is not None:
            raise TypeError("CachedAttention with embed_dim makes k and v by its projections: call it with x alone")
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"CachedAttention: x has shape {tuple(x.shape)}: [B, S, embed_dim] = [{self.position.shape[0]}, S, {self.embed_dim}] is needed")
        heads = (*x.shape[:-1], -1, self.head_dim)
        out = self._attend(self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads))
        projected: Tensor = self.o_proj(out.flatten(2))
        return projected

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        batch, new = cache.cache_seqlens.shape[0], q.shape[1]
        for name, t, heads in (("q", q, self.num_heads), ("k", k, self.kv_heads), ("v", v, self.kv_heads)):
            if t.shape != (batch, new, heads, self.head_dim):
                raise ValueError(f"CachedAttention: {name} has shape {tuple(t.shape)}: [{batch}, {new}, {heads}, {self.head_dim}] is needed")
        tracing = torch.compiler.is_compiling()
        if not tracing and self._longest + new > cache.capacity():
            raise ValueError(
                f"CachedAttention: {new} new tokens behind position {self._longest} pass the {cache.capacity()} that the cache holds: "
                "set_position(...) takes tokens back, max_seqlen= makes room"
            )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        rotary = None if self.rotary is None else Rotary(*self.rotary, self.rotary_interleaved)
        if tracing or not self.mask.structural:
            out: Any = attention(
                q, k, v, self.mask, softmax_scale=self.softmax_scale, softcap=self.softcap, kv_cache=cache, rotary=rotary, backend=self.backend
            )  # fmt: skip
        else:
            out = append_again(q, k, v, self.mask, cache, rotary, self.softmax_scale, self.softcap, self.backend or "")
        if out is None:
            out = self._append_first(q, k, v)
        else:
            cache.advance(new)
        if not tracing:
            self._longest += new
            served = runtime.last_backend() or "none (nothing to compute)"
            self.served[served] = self.served.get(served, 0) + 1
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    def _append_first(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """Where the backend that serves does not append: what is left is a call that only reads a cache, the shortest way then."""
        cache, new = self.cache, k.shape[2]
        if self.rotary is not None:
            positions = self.position.long()[:, None] + torch.arange(new, device=q.device)
            q = apply_rotary(q, *self.rotary, positions, self.rotary_interleaved)
        append_kv(cache, k, v, rotary=self.rotary, interleaved=self.rotary_interleaved)
        cache.advance(new)
        try:
            return attention(q, None, None, self.mask, softmax_scale=self.softmax_scale, softcap=self.softcap, kv_cache=cache, backend=self.backend)
        except Exception:
            cache.advance(-new)
            raise

    def explain(self, new_tokens: int = 1) -> Decision:
        """Who would serve the next call with so many tokens a sequence, and every reason why not the others. Nothing runs."""
        if not _whole(new_tokens) or new_tokens < 0:
            raise ValueError(f"explain(new_tokens={new_tokens!r}): a whole number of at least 0 is needed")
        keys = self.cache.heads_first()[0]
        q = keys.new_empty(self.position.shape[0], new_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        return explain(q, None, None, self.mask, softmax_scale=self.softmax_scale, softcap=self.softcap, kv_cache=self.cache, backend=self.backend)

    def extra_repr(self) -> str:
        kind = "contiguous" if self.cache.block_table is None else f"pages of {self.cache.heads_first()[0].shape[2]}"
        return f"{self.num_heads}/{self.kv_heads} heads of {self.head_dim}, cache: {self.position.shape[0]} x {self.cache.capacity()}, {kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CachedAttention:
        super()._apply(fn, recurse)
        before = self.cache
        self.cache = pytree.tree_map_only(Tensor, fn, self.cache)
        # Angles, and slopes of ALiBi, keep their dtype: these go to the cache's device only.
        device = self.cache.k_cache.device
        if before.k_cache.is_meta and device.type != "meta":
            # `to_empty`: a table and positions that nobody has written yet. The cache is empty, and the angles can be made again.
            keys, paged = before.heads_first()[0], before.block_table is not None
            batch, page_size = self.position.shape[0], keys.shape[2] if paged else 0
            self.use_cache(KVCache.empty(
                batch, self.kv_heads, before.capacity(), self.head_dim, page_size=page_size, dtype=self.cache.k_cache.dtype, device=device
            ))  # fmt: skip
            if self._angles is not None:
                base, positions = self._angles
                self.rotary = _angles(base, self.head_dim, positions)
        self.mask, self.rotary = pytree.tree_map_only(Tensor, lambda t: t.to(device), (self.mask, self.rotary))
        return self


def _angles(base: float, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of Llama's angles, position * base^(-2d / head_dim)."""
    rates = torch.exp(torch.arange(0, head_dim, 2, dtype=torch.float64) * (-math.log(base) / head_dim))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return angles.cos().float(), angles.sin().float()
