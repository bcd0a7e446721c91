"""Cases of the conformance suite: small problems, one per feature and trap, and seeded random ones."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
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


@dataclass(frozen=True)
class Case:
    """One problem, reproducible from its fields: ``Case(...)`` as printed by a failure builds the same tensors.

    parts: names of mask parts (see `_PARTS`). lengths_q, lengths_k: packed sequences when not empty; lengths_q alone with page_size: packed queries
    over pages. scale_q: factor on q,
    for peaky scores. layout ``strided`` cuts q, k, v out of larger buffers that hold NaN. descale: which of ``qkv`` come with factors
    (fp8 only), one for each sequence and K/V head; those tensors are stored the larger by as much. ``1`` among them: one for all.
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
        return self.backward and self.dtype not in FORWARD_ONLY

    def features(self) -> frozenset[Feature]:
        """What a backend must declare to be given the case."""
        found = {f for part in self.parts for f in _PART_FEATURES[part]}
        for feature, present in (
            (Feature.GQA, self.q_heads != self.kv_heads), (Feature.DV_DIFFERS, bool(self.v_head_dim) and self.v_head_dim != self.head_dim),
            (Feature.SOFTCAP, bool(self.softcap)), (Feature.SINKS, self.sinks), (Feature.DROPOUT, bool(self.dropout_p)),
            (Feature.VARLEN, bool(self.lengths_q)), (Feature.PAGED, bool(self.page_size)), (Feature.SEQLENS, bool(self.page_size)),
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
    """Arguments of `attnhub.attention` for a case. ``leaves``: tensors that get gradients, by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    kwargs: dict[str, Any]
    leaves: dict[str, Tensor]
    red_zones: list[Tensor]


_ITEM_BYTES = {"float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

_PART_FEATURES: dict[str, tuple[Feature, ...]] = {
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
        k = tensor(case.batch, case.kv_heads, case.seqlen_k, case.head_dim, factor=k_size)
        v = tensor(case.batch, case.kv_heads, case.seqlen_k, v_dim, factor=v_size)
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
    if case.page_size:
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


def cases(capability: Capability, device_type: str = "cpu", level: str = "quick") -> list[Case]:
    """The cases that a declaration covers. level: ``tiny`` (interpreters), ``quick`` (CI), ``full`` (hundreds; long lengths)."""
    if level not in ("tiny", "quick", "full"):
        raise ValueError(f"level={level!r}: allowed are tiny, quick, full")
    seen: dict[Case, None] = {}
    for made in _all(level):
        case = made
        if level == "tiny":
            case = dataclasses.replace(made, batch=min(made.batch, 2), seqlen_q=min(made.seqlen_q, 20), seqlen_k=min(made.seqlen_k, 37))
        if case.fits(capability, device_type):
            seen[case] = None
    return list(seen)


def _all(level: str) -> Iterator[Case]:
    dtypes = ("float32", "bfloat16", "float16", "float64")
    for dtype in dtypes:
        yield Case(dtype)
        yield Case(dtype, parts=("causal",), q_heads=4, seqlen_q=40, seqlen_k=70, head_dim=64)
    basic = [
        Case(parts=(part,), seqlen_q=21, seqlen_k=37) for part in _PART_FEATURES
    ] + [
        Case(parts=("causal",), seqlen_q=37, seqlen_k=21),
        Case(parts=("top_left",), seqlen_q=37, seqlen_k=21),
        Case(parts=("causal", "window_left"), seqlen_q=50, seqlen_k=50),
        Case(parts=("top_left", "window"), seqlen_q=19, seqlen_k=50),
        Case(parts=("causal", "chunk"), seqlen_q=40, seqlen_k=40),
        Case(parts=("causal", "prefix"), seqlen_q=30, seqlen_k=30),
        Case(parts=("causal", "blocks"), seqlen_q=30, seqlen_k=30),
        Case(parts=("causal", "segments"), seqlen_q=30, seqlen_k=30),
        Case(parts=("causal", "seqlens"), seqlen_q=5, seqlen_k=40),
        Case(parts=("causal", "leftpad"), seqlen_q=24, seqlen_k=24),
        Case(parts=("leftpad", "seqlens"), seqlen_q=9, seqlen_k=40),
        Case(parts=("causal", "bias"), q_heads=4, seqlen_q=17, seqlen_k=29),
        Case(parts=("causal", "alibi"), q_heads=4, seqlen_q=17, seqlen_k=29),
        Case(parts=("causal", "bool_row"), dtype="bfloat16", seqlen_q=17, seqlen_k=29),
        Case(parts=("bias_fp32",), dtype="bfloat16", seqlen_q=17, seqlen_k=29),
        Case(parts=("bias_inf",), dtype="float16", seqlen_q=17, seqlen_k=29),
        Case(parts=("bias_inf",), dtype="bfloat16", seqlen_q=17, seqlen_k=29),
        Case(softcap=3.0, scale_q=8.0), Case(softcap=20.0, parts=("causal",), dtype="bfloat16"), Case(softcap=2.0, scale_q=1e4, backward=False),
        Case(sinks=True), Case(sinks=True, parts=("causal",), q_heads=4, seqlen_q=37, seqlen_k=21), Case(sinks=True, parts=("seqlens_zero",)),
        Case(dropout_p=0.3), Case(dropout_p=0.5, parts=("causal",), q_heads=4, dtype="bfloat16"),
        Case(scale_q=30.0), Case(scale_q=200.0, parts=("causal",), backward=False), Case(scale_q=30.0, dtype="bfloat16"),
        Case(v_head_dim=16), Case(v_head_dim=64, parts=("causal",)), Case(head_dim=192, v_head_dim=128, seqlen_q=20, seqlen_k=40, dtype="bfloat16"),
        Case(seqlen_q=1, seqlen_k=129, q_heads=8, head_dim=64), Case(seqlen_q=1, seqlen_k=300, q_heads=8, kv_heads=1, parts=("causal",), head_dim=128),
        Case(seqlen_q=1, seqlen_k=257, q_heads=4, dtype="bfloat16", parts=("seqlens",), head_dim=128),
        Case(seqlen_q=4, seqlen_k=200, q_heads=8, parts=("causal",), head_dim=64, dtype="float16"), Case(seqlen_q=1, seqlen_k=1),
        Case(seqlen_q=16, seqlen_k=100, q_heads=6, parts=("causal", "window_left")), Case(batch=1, q_heads=1, kv_heads=1, seqlen_q=1, seqlen_k=65, parts=("top_left",)),
        Case(layout="bshd", parts=("causal",)), Case(layout="strided", parts=("causal",)), Case(layout="strided", dtype="bfloat16", q_heads=4, head_dim=64),
        Case(layout="expanded", q_heads=4, parts=("causal",)),
        Case(lengths_q=(5, 0, 17, 1), lengths_k=(5, 0, 17, 1)), Case(lengths_q=(5, 9, 17), lengths_k=(8, 0, 40), parts=("causal",), q_heads=4),
        Case(lengths_q=(0, 0), lengths_k=(3, 4)), Case(lengths_q=(33, 12), lengths_k=(33, 12), parts=("causal", "window_left"), dtype="bfloat16"),
        Case(lengths_q=(12, 8), lengths_k=(20, 9), softcap=5.0, parts=("top_left",)),
        Case(page_size=16, seqlen_q=1, seqlen_k=77, q_heads=4, backward=False), Case(page_size=1, seqlen_q=3, seqlen_k=19, parts=("causal",), backward=False),
        Case(page_size=16, seqlen_q=6, seqlen_k=100, q_heads=8, head_dim=64, dtype="bfloat16", parts=("causal",), backward=False),
        Case(page_size=5, seqlen_q=1, seqlen_k=33, parts=("window_left", "causal"), backward=False),
        Case(page_size=16, lengths_q=(5, 0, 17, 1), seqlen_k=70, q_heads=4, parts=("causal",), backward=False),
        Case(page_size=5, lengths_q=(1, 1, 9), seqlen_k=33, q_heads=8, head_dim=64, dtype="bfloat16", parts=("causal", "window_left"), sinks=True, backward=False),
        Case(page_size=16, lengths_q=(1, 1, 1), seqlen_k=300, q_heads=8, kv_heads=1, head_dim=64, parts=("alibi",), softcap=20.0, backward=False),
        Case(parts=("causal", "block_sparse"), q_heads=4, seqlen_q=40, seqlen_k=70), Case(parts=("block_sparse", "seqlens"), seqlen_q=3, seqlen_k=70, q_heads=4),
        Case(lengths_q=(5, 0, 33), lengths_k=(8, 3, 40), parts=("block_sparse",), q_heads=4), Case(parts=("block_sparse", "bias_row"), dropout_p=0.2),
        Case(lengths_q=(5, 0, 17), lengths_k=(8, 3, 40), parts=("causal",), q_heads=4, dropout_p=0.4), Case(seqlen_q=1, seqlen_k=150, q_heads=4, dropout_p=0.4),
        Case(lengths_q=(5, 0, 17), lengths_k=(8, 3, 40), parts=("bias",)), Case(parts=("window_left", "bias_row"), dtype="bfloat16", softcap=5.0, q_heads=4),
        # Multi-head latent attention: prefill, and decoding with the latent as both K and V.
        Case(head_dim=192, v_head_dim=128, seqlen_q=20, seqlen_k=37, parts=("causal",)),
        Case("bfloat16", batch=1, q_heads=16, kv_heads=1, seqlen_q=1, seqlen_k=100, head_dim=576, v_head_dim=512),
        Case("bfloat16", batch=1, seqlen_q=18, seqlen_k=35, head_dim=576, v_head_dim=512, parts=("causal",)),
        Case("bfloat16", seqlen_q=18, seqlen_k=35, head_dim=96, v_head_dim=64), Case("bfloat16", seqlen_q=18, seqlen_k=35, head_dim=64, v_head_dim=96),
    ]  # fmt: skip
    yield from basic
    yield from _fp8()
    dims = (1, 2, 3, 8, 15, 40, 64, 72, 80, 96, 100, 128) + (() if level == "tiny" else (160, 192, 256, 257, 384, 512))
    for dim in dims:
        yield Case(head_dim=dim, seqlen_q=18, seqlen_k=35, parts=("causal",))
    for dim in (64, 80, 128, 256) + (() if level == "tiny" else (40, 96, 160, 192, 320, 512)):
        for dtype in ("bfloat16", "float16"):
            yield Case(dtype, head_dim=dim, seqlen_q=18, seqlen_k=35, parts=("causal",), q_heads=4)
    if level == "tiny":
        return
    for length in (1, 2, 3, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 200, 257):
        yield Case(seqlen_q=length, seqlen_k=length, parts=("causal",), backward=length < 130)
        yield Case("bfloat16", seqlen_q=length, seqlen_k=length + 3, head_dim=64, backward=length < 130)
    if level == "full":
        for length in (1000, 2047, 4095, 4096, 4097):
            yield Case("bfloat16", batch=1, seqlen_q=length, seqlen_k=length, head_dim=128, parts=("causal",), q_heads=4)
            yield Case("float16", batch=1, seqlen_q=length, seqlen_k=length - 3, head_dim=64, parts=("causal", "window_left"))
        for seed in range(300):
            yield random_case(seed)
        for seed in range(1000, 1100):
            yield dataclasses.replace(random_case(seed), dtype="float8_e4m3fn", descale=("qkv", "kv", "", "qkv1")[seed % 4])


def _fp8() -> Iterator[Case]:
    """With factors wherever they are not left out on purpose: a forgotten one is then an error by a factor."""
    fp8 = functools.partial(Case, "float8_e4m3fn", descale="qkv")
    yield from (fp8(q_heads=4, parts=(part,), seqlen_q=21, seqlen_k=37, head_dim=64) for part in _PART_FEATURES)
    yield from (fp8(descale=which, q_heads=4, parts=("causal",), seqlen_q=21, seqlen_k=37, head_dim=64) for which in ("q", "k", "v", "kv", "qkv1", ""))
    yield from (fp8(head_dim=dim, seqlen_q=18, seqlen_k=35, parts=("causal",)) for dim in (1, 3, 16, 40, 80, 128, 256))
    yield from (
        fp8(layout="bshd", parts=("causal",)), fp8(layout="strided", q_heads=4, head_dim=64), fp8(layout="expanded", q_heads=4, parts=("causal",)),
        fp8(v_head_dim=64, parts=("causal",)), fp8(head_dim=192, v_head_dim=128, seqlen_q=20, seqlen_k=40),
        fp8(softcap=3.0, scale_q=4.0), fp8(sinks=True, parts=("causal",), q_heads=4, seqlen_q=37, seqlen_k=21), fp8(scale_q=6.0), fp8(descale="", scale_q=30.0),
        fp8(dropout_p=0.5, parts=("causal",), q_heads=4),
        fp8(seqlen_q=1, seqlen_k=300, q_heads=8, kv_heads=1, parts=("causal",), head_dim=128), fp8(seqlen_q=4, seqlen_k=200, q_heads=8, parts=("causal", "seqlens"), head_dim=64),
        fp8(seqlen_q=1, seqlen_k=1), fp8(lengths_q=(5, 9, 0, 17), lengths_k=(8, 0, 3, 40), parts=("causal",), q_heads=4, head_dim=64),
        fp8(page_size=16, seqlen_q=1, seqlen_k=77, q_heads=4), fp8(page_size=5, seqlen_q=6, seqlen_k=60, q_heads=8, head_dim=64, parts=("causal",)),
    )  # fmt: skip


def random_case(seed: int, largest: int = 300) -> Case:
    """A random case; the seed is all that is needed to see it again."""
    r = random.Random(seed)
    kv_heads = r.choice((1, 1, 2, 3))
    dim = r.choice((8, 16, 24, 32, 64, 64, 80, 96, 128, 128, r.randint(1, 256)))
    options: dict[str, Any] = {}
    parts: list[str] = []
    align = r.choice((None, "causal", "causal", "top_left"))
    if align:
        parts.append(align)
    for part in ("window", "seqlens", "leftpad", "bool_mask", "bias", "alibi", "chunk"):
        if r.random() < 0.12:
            parts.append(part)
    seqlen_q, seqlen_k = r.randint(1, largest), r.randint(1, largest)
    batch: Optional[int] = r.randint(1, 3)
    if r.random() < 0.2:
        count = r.randint(1, 5)
        options["lengths_q"] = tuple(r.choice((0, r.randint(1, largest))) for _ in range(count))
        options["lengths_k"] = tuple(r.choice((0, r.randint(1, largest))) for _ in range(count))
        if not sum(options["lengths_q"]) or not sum(options["lengths_k"]):
            options = {}
    return Case(
        dtype=r.choice(("float32", "bfloat16", "float16")), batch=batch or 1, q_heads=kv_heads * r.choice((1, 1, 2, 4)), kv_heads=kv_heads,
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=dim, parts=tuple(parts), softcap=r.choice((0.0, 0.0, 0.0, 10.0)), sinks=r.random() < 0.1,
        layout=r.choice(("bhsd", "bshd", "strided")) if not options else "bhsd", seed=seed, **options,
    )  # fmt: skip
