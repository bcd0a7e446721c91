"""The cases of the conformance suite: one per feature and trap, and seeded random ones."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any, Optional

from attnhub.capability import Capability
from attnhub.testing.case import PART_FEATURES, Case


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
        Case(parts=(part,), seqlen_q=21, seqlen_k=37) for part in PART_FEATURES
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
    yield from _appends()
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
        for seed in range(2000, 2040):
            yield random_append(seed)


def _fp8() -> Iterator[Case]:
    """With factors wherever they are not left out on purpose: a forgotten one is then an error by a factor."""
    fp8 = functools.partial(Case, "float8_e4m3fn", descale="qkv")
    yield from (fp8(q_heads=4, parts=(part,), seqlen_q=21, seqlen_k=37, head_dim=64) for part in PART_FEATURES)
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


def _appends() -> Iterator[Case]:
    """New tokens: of decode steps, of drafts that are verified, and more than a kernel for few queries may take."""
    step = functools.partial(Case, batch=3, q_heads=4, seqlen_q=1, seqlen_k=40, head_dim=64, new_tokens=1)
    some = functools.partial(step, seqlen_q=5, new_tokens=5, parts=("causal",))
    yield from (
        step(), step("bfloat16", rotary=32), step("float16", rotary=8, interleaved=True), some(rotary=16), some("bfloat16", parts=("causal", "window_left")),
        some(rotary=32, interleaved=True, layout="strided"), step(seqlen_q=2, new_tokens=4, rotary=12, one_position=True), step(v_head_dim=40, parts=("alibi",), softcap=5.0),
        step(page_size=16, rotary=32), step("bfloat16", page_size=16, seqlen_q=3, new_tokens=3, rotary=32, interleaved=True, layout="bshd", parts=("causal",)),
        some(page_size=5, rotary=6, parts=("causal", "window_left")), step("float16", page_size=1, seqlen_k=20), some(page_size=16, seqlen_q=20, new_tokens=20, rotary=16),
        some(page_size=16, seqlen_q=2, rotary=32, interleaved=True, one_position=True, sinks=True), step("float8_e4m3fn", page_size=16, descale="qkv"),
        step(seqlen_k=300, rotary=32, parts=("leftpad",)), step("bfloat16", page_size=32, seqlen_k=500, q_heads=8, kv_heads=1, head_dim=128, rotary=64, parts=("causal",)),
    )  # fmt: skip


def random_append(seed: int) -> Case:
    """A random case with new tokens."""
    r = random.Random(seed)
    dim, queries, kv_heads = r.choice((16, 24, 64, 80, 128, 128, 256)), r.choice((1, 1, 2, 5, 16, 19)), r.choice((1, 2, 3))
    return Case(
        r.choice(("bfloat16", "float16")), r.randint(1, 4), kv_heads * r.choice((1, 1, 2, 4)), kv_heads, queries, r.randint(24, 700), dim,
        r.choice((0, 0, 0, 40)), r.choice(((), ("causal",), ("causal", "window_left"), ("window",), ("causal", "alibi"))), softcap=r.choice((0.0, 0.0, 10.0)),
        page_size=r.choice((0, 0, 1, 5, 16, 24, 64)), layout=r.choice(("bhsd", "bhsd", "bshd", "strided")), seed=seed, new_tokens=r.choice((queries, queries, 1, 7)),
        rotary=r.choice((0, dim // 2, dim // 4, 1, 2, 6)), interleaved=r.random() < 0.5, one_position=r.random() < 0.2,
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
