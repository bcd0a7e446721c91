"""A case of the conformance suite: one small problem, and the tensors that it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub import mask as masks
from attnhub.capability import Capability
from attnhub.kv_cache import KVCache
from attnhub.layouts import Varlen, out_dtype
from attnhub.mask import FULL, Mask
from attnhub.problem import FORWARD_ONLY, Feature
from attnhub.rotary import Rotary


@dataclass(frozen=True)
class Case:
    """One problem, reproducible from its fields: ``Case(...)`` as printed by a failure builds the same tensors.

    parts: names of mask parts (see `PART_FEATURES`). lengths_q, lengths_k: packed sequences when not empty; lengths_q alone with page_size: packed queries
    over pages. scale_q: factor on q,
    for peaky scores. layout ``strided`` cuts q, k, v out of larger buffers that hold NaN. descale: which of ``qkv`` come with factors
    (fp8 only), one for each sequence and K/V head; those tensors are stored the larger by as much. ``1`` among them: one for all.
    new_tokens: k and v are so many tokens that the call appends to a cache for seqlen_k, contiguous without page_size; rotary: columns of the angles
    that it rotates them and q by (0: none), in pairs interleaved or not, q at one_position or one behind the other.
    """

    dtype: str = "float32"
    batch: int = 2
    q_heads: int = 2
    kv_heads: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 33
    head_dim: int = 32
    v_head_dim: int = 0
    parts: tuple[str, ...] = ()
    softcap: float = 0.0
    sinks: bool = False
    dropout_p: float = 0.0
    lengths_q: tuple[int, ...] = ()
    lengths_k: tuple[int, ...] = ()
    page_size: int = 0
    layout: str = "bhsd"
    scale_q: float = 1.0
    descale: str = ""
    backward: bool = True
    seed: int = 0
    new_tokens: int = 0
    rotary: int = 0
    interleaved: bool = False
    one_position: bool = False

    def __str__(self) -> str:
        dims = f"{self.head_dim}" + (f"x{self.v_head_dim}" if self.v_head_dim and self.v_head_dim != self.head_dim else "")
        words = [self.dtype, f"B{self.batch}", f"H{self.q_heads}:{self.kv_heads}", f"S{self.seqlen_q}:{self.seqlen_k}", f"D{dims}", *self.parts]
        if self.softcap:
            words.append("softcap")
        if self.sinks:
            words.append("sinks")
        if self.dropout_p:
            words.append("dropout")
        if self.lengths_q:
            words.append("varlen" + ",".join(map(str, self.lengths_q)) + ";" + ",".join(map(str, self.lengths_k)))
        if self.page_size:
            words.append(f"page{self.page_size}")
        if self.new_tokens:
            words.append(f"new{self.new_tokens}")
        if self.rotary:
            words.append(f"rotary{self.rotary}" + "i" * self.interleaved + "p" * self.one_position)
        if self.layout != "bhsd":
            words.append(self.layout)
        if self.scale_q != 1:
            words.append(f"x{self.scale_q:g}")
        if self.descale:
            words.append(f"descale_{self.descale}")
        return "-".join(words)

    @property
    def differentiable(self) -> bool:
        """Whether gradients are a part of the case."""
        return self.backward and self.dtype not in FORWARD_ONLY and not self.new_tokens

    def features(self) -> frozenset[Feature]:
        """What a backend must declare to be given the case."""
        found = {f for part in self.parts for f in PART_FEATURES[part]}
        for feature, present in (
            (Feature.GQA, self.q_heads != self.kv_heads), (Feature.DV_DIFFERS, bool(self.v_head_dim) and self.v_head_dim != self.head_dim),
            (Feature.SOFTCAP, bool(self.softcap)), (Feature.SINKS, self.sinks), (Feature.DROPOUT, bool(self.dropout_p)),
            (Feature.VARLEN, bool(self.lengths_q)), (Feature.PAGED, bool(self.page_size)), (Feature.SEQLENS, bool(self.page_size or self.new_tokens)),
        ):  # fmt: skip
            if present:
                found.add(feature)
        return frozenset(found)

    def fits(self, capability: Capability, device_type: str) -> bool:
        """Whether the declaration covers the case on this kind of device (not: this architecture, which `explain` judges)."""
        ranges = [r for r in capability.devices if r.type == device_type]
        low, high, step = capability.head_dims
        v_low, v_high, v_step = capability.v_head_dims or capability.head_dims
        v_dim = self.v_head_dim or self.head_dim
        return (
            any(self.dtype in r.dtypes for r in ranges) and self.features() <= capability.features
            and low <= self.head_dim <= high and self.head_dim % step == 0 and v_low <= v_dim <= v_high and v_dim % v_step == 0
            and not any(dim * _ITEM_BYTES[self.dtype] % capability.align_bytes for dim in (self.head_dim, v_dim))
            and (not self.page_size or capability.page_sizes is None or self.page_size in capability.page_sizes)
        )  # fmt: skip

    def build(self, device: str | torch.device) -> Inputs:
        """The tensors of the case on a device."""
        return _build(self, torch.device(device))


@dataclass
class Inputs:
    """Arguments of `attnhub.attention` for a case. ``leaves``: tensors that get gradients, by name. k and v of a case with a cache are what that holds,
    or what is appended to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    kwargs: dict[str, Any]
    leaves: dict[str, Tensor]
    red_zones: list[Tensor]


_ITEM_BYTES = {"float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

PART_FEATURES: dict[str, tuple[Feature, ...]] = {
    "causal": (Feature.CAUSAL_BOTTOM_RIGHT,),
    "top_left": (Feature.CAUSAL_TOP_LEFT,),
    "window": (Feature.WINDOW,),
    "window_left": (Feature.WINDOW,),
    "window_self": (Feature.WINDOW,),
    "chunk": (Feature.CHUNK,),
    "prefix": (Feature.PREFIX,),
    "segments": (Feature.SEGMENTS,),
    "blocks": (Feature.SEGMENTS,),
    "seqlens": (Feature.SEQLENS,),
    "seqlens_zero": (Feature.SEQLENS,),
    "leftpad": (Feature.LEFTPAD,),
    "bool_mask": (Feature.BOOL_MASK,),
    "bool_row": (Feature.BOOL_MASK,),
    "bias": (Feature.BIAS,),
    "bias_row": (Feature.BIAS,),
    "bias_fp32": (Feature.BIAS,),
    "bias_inf": (Feature.BIAS,),
    "alibi": (Feature.ALIBI,),
    "block_sparse": (Feature.BLOCK_SPARSE,),
}


def _part(name: str, case: Case, device: torch.device, random_: torch.Generator, leaves: dict[str, Tensor]) -> Mask:
    batch = len(case.lengths_q) or case.batch
    sq, sk = max(case.lengths_q, default=case.seqlen_q), max(case.lengths_k, default=case.seqlen_k)
    heads = case.q_heads

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=random_).to(torch.int32).to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random_, dtype=torch.float64)

    def bias(tensor: Tensor, dtype: torch.dtype) -> Mask:
        leaves["bias"] = tensor.to(dtype).to(device).requires_grad_()
        return masks.Bias(leaves["bias"])

    dtype = out_dtype(getattr(torch, case.dtype))
    if name == "causal":
        return masks.Causal()
    if name == "top_left":
        return masks.Causal("top_left")
    align = "top_left" if "top_left" in case.parts else "bottom_right"
    if name == "window":
        return masks.Window(5, 3, align)  # type: ignore[arg-type]
    if name == "window_left":
        return masks.Window(4, -1, align)  # type: ignore[arg-type]
    if name == "window_self":
        return masks.Window(0, 0, align)  # type: ignore[arg-type]
    if name == "chunk":
        return masks.Chunk(7, align)  # type: ignore[arg-type]
    if name == "prefix":
        return masks.Prefix(ints(0, sk, batch))
    if name == "segments":
        return masks.Segments(ints(0, 2, batch, sq).sort().values, ints(0, 2, batch, sk).sort().values)
    if name == "blocks":
        return masks.Segments(ints(-1, 1, batch, sq), ints(-1, 1, batch, sk), widen_causal=True)
    if name == "seqlens":
        lengths = ints(1, sk, batch)
        if case.lengths_k:
            lengths = torch.minimum(lengths, torch.tensor(case.lengths_k, dtype=torch.int32, device=device))
        return masks.SeqLens(lengths)
    if name == "seqlens_zero":
        return masks.SeqLens(torch.tensor([0] + [sk] * (batch - 1), dtype=torch.int32, device=device))
    if name == "leftpad":
        return masks.LeftPad(ints(0, sk, batch))
    if name == "bool_mask":
        dense = torch.rand(batch, heads, sq, sk, generator=random_) < 0.6
        dense[0, 0, : sq // 3] = False
        return masks.BoolMask(dense.to(device))
    if name == "bool_row":
        return masks.BoolMask((torch.rand(batch, 1, 1, sk, generator=random_) < 0.6).to(device))
    if name == "bias":
        return bias(normal(batch, heads, sq, sk), dtype)
    if name == "bias_row":
        return bias(normal(1, heads, 1, sk), dtype)
    if name == "bias_fp32":
        return bias(normal(1, heads, sq, sk), torch.float32)
    if name == "bias_inf":
        added = normal(1, 1, sq, sk)
        added[..., : sq // 2, :] = added[..., : sq // 2, :].masked_fill(torch.rand(sq // 2, sk, generator=random_) < 0.5, float("-inf"))
        added[..., sq // 4, :] = torch.finfo(dtype).min
        added[..., 0, :] = float("-inf")
        return masks.Bias(added.to(dtype).to(device))
    if name == "alibi":
        return masks.ALiBi(torch.rand(heads, generator=random_).to(device), align)  # type: ignore[arg-type]
    if name == "block_sparse":
        kept = torch.rand(batch, heads, -(-sq // 8), -(-sk // 16), generator=random_) < 0.5
        return masks.BlockSparse(kept.to(device), (8, 16))
    raise ValueError(f"unknown mask part {name!r}")


def _build(case: Case, device: torch.device) -> Inputs:
    random_ = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    keys = case.new_tokens or case.seqlen_k
    red_zones: list[Tensor] = []

    def tensor(*shape: int, factor: float = 1.0) -> Tensor:
        values = (torch.randn(*shape, generator=random_, dtype=torch.float64) * factor).to(dtype).to(device)
        if case.layout == "bshd" and len(shape) == 4:
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        if case.layout == "strided":
            # Rows stay 16-byte aligned, so that backends with vector loads take the case.
            room = torch.full((*shape[:-1], 2 * shape[-1]), float("nan"), dtype=dtype, device=device)
            red_zones.append(room)
            inside = room[..., : shape[-1]]
            inside.copy_(values)
            return inside
        return values

    descale = _factors(case, device, random_)
    q_size, k_size, v_size = (1.0 if factor is None else 1.0 / float(factor.mean()) for factor in descale.values())
    v_dim = case.v_head_dim or case.head_dim
    leaves: dict[str, Tensor] = {}
    kwargs: dict[str, Any] = {name: factor for name, factor in descale.items() if factor is not None}
    if case.lengths_q and case.page_size:
        q = tensor(sum(case.lengths_q), case.q_heads, case.head_dim, factor=case.scale_q * q_size)
        k = tensor(len(case.lengths_q), case.kv_heads, case.seqlen_k, case.head_dim, factor=k_size)
        v = tensor(len(case.lengths_q), case.kv_heads, case.seqlen_k, v_dim, factor=v_size)
        kwargs["varlen"] = Varlen.from_lengths(torch.tensor(case.lengths_q, device=device))
    elif case.lengths_q:
        q = tensor(sum(case.lengths_q), case.q_heads, case.head_dim, factor=case.scale_q * q_size)
        k = tensor(sum(case.lengths_k), case.kv_heads, case.head_dim, factor=k_size)
        v = tensor(sum(case.lengths_k), case.kv_heads, v_dim, factor=v_size)
        kwargs["varlen"] = Varlen.from_lengths(torch.tensor(case.lengths_q, device=device), torch.tensor(case.lengths_k, device=device))
    else:
        q = tensor(case.batch, case.q_heads, case.seqlen_q, case.head_dim, factor=case.scale_q * q_size)
        k = tensor(case.batch, case.kv_heads, keys, case.head_dim, factor=k_size)
        v = tensor(case.batch, case.kv_heads, keys, v_dim, factor=v_size)
        if case.layout == "expanded":
            k, v = (t[:, :1].expand(case.batch, case.kv_heads, *t.shape[2:]) for t in (k, v))
    for name, leaf in (("q", q), ("k", k), ("v", v)):
        leaves[name] = leaf.detach().requires_grad_(case.differentiable)
    mask = FULL
    for part in case.parts:
        mask = mask & _part(part, case, device, random_, leaves)
    if case.softcap:
        kwargs["softcap"] = case.softcap
    if case.sinks:
        leaves["sinks"] = torch.randn(case.q_heads, generator=random_).to(device).requires_grad_()
        kwargs["sinks"] = leaves["sinks"]
    if case.dropout_p:
        kwargs["dropout_p"] = case.dropout_p
    if case.new_tokens:
        kwargs["kv_cache"] = _to_append_to(case, (k_size, v_size), random_, device)
        if case.rotary:
            angles = torch.rand(kwargs["kv_cache"].capacity() + case.seqlen_q, case.rotary, generator=random_) * 2 * math.pi
            kwargs["rotary"] = Rotary(angles.cos().to(device), angles.sin().to(device), case.interleaved, case.one_position)
    elif case.page_size:
        kwargs["kv_cache"] = _paged(case, leaves["k"].detach(), leaves["v"].detach(), random_, device)
    return Inputs(leaves["q"], leaves["k"], leaves["v"], mask, kwargs, leaves, red_zones)


def _factors(case: Case, device: torch.device, random_: torch.Generator) -> dict[str, Optional[Tensor]]:
    """name -> fp32 [B, Hk] around 1/64: fp8 values that use their range. Factors of two sequences or heads differ by up to 3 times."""
    shape = (len(case.lengths_q) or case.batch, case.kv_heads)
    found: dict[str, Optional[Tensor]] = {}
    for name in "qkv":
        factor = None
        if name in case.descale:
            factor = ((0.5 + torch.rand(1, 1, generator=random_)) / 64).expand(shape) if "1" in case.descale else (0.5 + torch.rand(shape, generator=random_)) / 64
        found[f"{name}_descale"] = factor if factor is None else factor.to(device)
    return found


def _paged(case: Case, k: Tensor, v: Tensor, random_: torch.Generator, device: torch.device) -> KVCache:
    """A cache whose pages are shuffled, whose lengths differ, and whose unused slots and pages hold NaN."""
    batch, heads, length, _ = k.shape
    per_sequence = -(-length // case.page_size)
    order = torch.randperm(batch * per_sequence + 3, generator=random_)[: batch * per_sequence].view(batch, per_sequence)
    shape = (batch * per_sequence + 3, heads, case.page_size)
    k_cache = torch.full((*shape, k.shape[3]), float("nan"), dtype=k.dtype, device=device)
    v_cache = torch.full((*shape, v.shape[3]), float("nan"), dtype=v.dtype, device=device)
    lengths = torch.randint(1, length + 1, (batch,), generator=random_)
    for b in range(batch):
        for t in range(int(lengths[b])):
            page, slot = int(order[b, t // case.page_size]), t % case.page_size
            k_cache[page, :, slot], v_cache[page, :, slot] = k[b, :, t], v[b, :, t]
    return KVCache(k_cache, v_cache, lengths.to(torch.int32).to(device), order.to(torch.int32).to(device))


def _to_append_to(case: Case, sizes: tuple[float, float], random_: torch.Generator, device: torch.device) -> KVCache:
    """A cache with room for new tokens: one sequence holds nothing, one is full afterwards. NaN wherever no token is, and in a row before and one behind."""
    size = case.page_size or case.seqlen_k
    per_sequence = -(-case.seqlen_k // size)
    rows, most = case.batch * per_sequence + 3 * bool(case.page_size), per_sequence * size - case.new_tokens
    lengths = torch.tensor([0, most, *torch.randint(0, most + 1, (case.batch,), generator=random_).tolist()][: case.batch], dtype=torch.int32)
    order = torch.randperm(rows, generator=random_) if case.page_size else torch.arange(rows)
    table = order[: case.batch * per_sequence].view(case.batch, per_sequence)
    used = torch.arange(per_sequence * size) < lengths[:, None]
    held = torch.zeros(rows, size, dtype=torch.bool).index_put_((table.flatten(),), used.view(-1, size))
    swapped, dtype = case.layout == "bshd", getattr(torch, case.dtype)

    def stored(dim: int, factor: float) -> Tensor:
        values = torch.randn(rows, case.kv_heads, size, dim, generator=random_, dtype=torch.float64) * factor
        values = values.masked_fill(~held[:, None, :, None], float("nan"))
        shape = (rows + 2, size, case.kv_heads) if swapped else (rows + 2, case.kv_heads, size)
        room = torch.full((*shape, dim * (2 if case.layout == "strided" else 1)), float("nan"), dtype=dtype, device=device)
        inside = room[1:-1, ..., :dim]
        return inside.copy_((values.transpose(1, 2) if swapped else values).to(dtype))

    keys, values = stored(case.head_dim, sizes[0]), stored(case.v_head_dim or case.head_dim, sizes[1])
    return KVCache(keys, values, lengths.to(device), table.int().to(device) if case.page_size else None, layout="bshd" if swapped else "bhsd")
