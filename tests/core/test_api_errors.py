"""Bad arguments: every error is a ValueError or TypeError that names the argument, what it was, and what is allowed or the fix."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnhub
import attnhub.integrations.flash_attn as flash
import attnhub.integrations.flash_attn.bert_padding
from attnhub import BoolMask, Causal, KVCache, SeqLens, Varlen, attention

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)
PACKED = torch.zeros(5, 2, 8)
LENGTHS = Varlen.from_lengths(torch.tensor([2, 3]))
CACHE = KVCache.empty(2, 2, 16, 8)
META = torch.device("meta")
FP8 = torch.float8_e4m3fn
Q8, K8, V8 = Q.to(FP8), K.to(FP8), V.to(FP8)
FACTORS = torch.ones(2, 2)
COS, POSITIONS = torch.ones(16, 4), torch.zeros(2, 5, dtype=torch.int64)
CACHE8 = KVCache.empty(2, 2, 16, 8, dtype=FP8)



NESTED = torch.nested.nested_tensor([Q[0], Q[1]])


def first_class() -> Any:
    from functorch.dim import dims

    return Q[dims(1)]


def ends(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(cu: list[int], longest: int) -> Any:
    return attention(PACKED, PACKED, PACKED, varlen=Varlen(ends(cu), ends(cu), longest, longest), backend="reference")


def layer(**options: Any) -> attnhub.nn.CachedAttention:
    return attnhub.nn.CachedAttention(**{"num_heads": 4, "head_dim": 8, "max_seqlen": 16, **options})


#: id -> (call, words that the message must hold)
BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "q none": (lambda: attention(None, K, V), ("q", "NoneType", "Tensor")),
    "q numpy": (lambda: attention(Q.numpy(), K, V), ("q", "ndarray", "Tensor")),
    "k list": (lambda: attention(Q, [1.0], V), ("k", "list", "Tensor")),
    "v float": (lambda: attention(Q, K, 3.0), ("v", "float", "Tensor")),
    "q of functorch.dim": (lambda: attention(first_class(), K, V), ("q", "functorch.dim", "torch.Tensor")),
    "q of torch.fx": (lambda: torch.fx.symbolic_trace(lambda q: attention(q, K, V)), ("q", "torch.fx", "Proxy", "torch.Tensor")),
    "nested for sdpa": (lambda: attnhub.scaled_dot_product_attention(NESTED, NESTED, NESTED), ("query", "nested", "varlen")),
    "k missing": (lambda: attention(Q), ("k and v", "kv_cache")),
    "v missing": (lambda: attention(Q, K), ("v", "needed")),
    "3 dimensions": (lambda: attention(Q[0], K[0], V[0]), ("4 dimensions", "(4, 5, 8)", "varlen")),
    "head_dim": (lambda: attention(Q, K[..., :4], V), ("head_dim", "8", "4")),
    "length of v": (lambda: attention(Q, K, V[:, :, :3]), ("k (2, 2, 7, 8)", "v (2, 2, 3, 6)", "length")),
    "heads of v": (lambda: attention(Q, K, V[:, :1]), ("k", "v", "heads")),
    "batch": (lambda: attention(Q, K[:1], V[:1]), ("batch 2", "k 1", "expand")),
    "heads": (lambda: attention(Q[:, :3], K, V), ("3 heads", "k 2", "multiple")),
    "no k heads": (lambda: attention(Q, K[:, :0], V[:, :0]), ("4 heads", "k 0", "multiple")),
    "head_dim 0": (lambda: attention(Q[..., :0], K[..., :0], V), ("head_dim", "at least 1")),
    "dtypes": (lambda: attention(Q, K.bfloat16(), V), ("float32", "bfloat16", "autocast")),
    "dtype of v": (lambda: attention(Q, K, V.double()), ("float32", "float64", "cast")),
    "integers": (lambda: attention(Q.int(), K.int(), V.int()), ("int32", "float16")),
    "complex": (lambda: attention(Q.cfloat(), K.cfloat(), V.cfloat()), ("complex64", "float32")),
    "e5m2": (lambda: attention(*(t.to(torch.float8_e5m2) for t in (Q, K, V))), ("float8_e5m2", "float8_e4m3fn is the only 8-bit format")),
    "e4m3fnuz": (lambda: attention(*(t.to(torch.float8_e4m3fnuz) for t in (Q, K, V))), ("float8_e4m3fnuz", "float8_e4m3fn is the only 8-bit format")),
    "fp8 keys": (lambda: attention(Q.bfloat16(), K8, V8), ("bfloat16", "float8_e4m3fn", "all in it")),
    "fp8 under autocast": (lambda: torch.autocast("cpu", torch.bfloat16)(attention)(Q, K8, V8), ("float32", "float8_e4m3fn", "autocast leaves it alone")),
    "fp8 grad": (lambda: attention(Q8.clone().requires_grad_(), K8, V8), ("float8_e4m3fn", "gradient", "no_grad", "detach")),
    "fp8 grad of sinks": (lambda: attention(Q8, K8, V8, sinks=torch.zeros(4).requires_grad_()), ("float8_e4m3fn", "gradient")),
    "fp8 grad of a factor": (lambda: attention(Q8, K8, V8, v_descale=torch.ones(2, 2).requires_grad_()), ("float8_e4m3fn", "gradient")),
    "factor number": (lambda: attention(Q8, K8, V8, q_descale=0.5), ("q_descale is a float", "torch.full", "expand(2, 2)")),
    "factor without fp8": (lambda: attention(Q, K, V, k_descale=FACTORS), ("k_descale", "float32", "float8_e4m3fn", "leave it out")),
    "factor shape": (lambda: attention(Q8, K8, V8, v_descale=torch.ones(2, 4)), ("v_descale", "(2, 4)", "[2, 2]", "expand")),
    "factor scalar": (lambda: attention(Q8, K8, V8, v_descale=torch.ones(())), ("v_descale", "()", "[2, 2]", "factor.expand(2, 2)")),
    "factor varlen": (lambda: attention(*(PACKED.to(FP8),) * 3, varlen=LENGTHS, k_descale=torch.ones(1, 2)), ("k_descale", "(1, 2)", "[2, 2]")),
    "factor dtype": (lambda: attention(Q8, K8, V8, q_descale=FACTORS.half()), ("q_descale", "float16", "float32")),
    "factor device": (lambda: attention(Q8, K8, V8, q_descale=FACTORS.to(META)), ("q_descale", "meta", "cpu")),
    "fp8 cache": (lambda: attention(Q, kv_cache=CACHE8), ("float32", "float8_e4m3fn", "kv_cache")),
    "fp8 cache and new": (lambda: attention(Q8, K[:, :, :1], V[:, :, :1], kv_cache=KVCache.empty(2, 2, 16, 8, v_head_dim=6, dtype=FP8)),
                          ("append_kv(k)", "float32", "float8_e4m3fn", "k_descale")),
    "fp8 into fp32": (lambda: attnhub.append_kv(CACHE, K8[:, :, :1], K8[:, :, :1]), ("append_kv(k)", "float8_e4m3fn", "float32")),
    "fp8 rotary": (lambda: attnhub.append_kv(CACHE8, K8[:, :, :1], K8[:, :, :1], rotary=(torch.ones(16, 2), torch.ones(16, 2))), ("append_kv(k)", "rotary", "rotate first")),
    "devices": (lambda: attention(Q, K.to(META), V.to(META)), ("cpu", "meta", "one device")),
    "mask tensor": (lambda: attention(Q, K, V, torch.ones(5, 7, dtype=torch.bool)), ("mask", "Tensor", "BoolMask", "Bias")),
    "mask string": (lambda: attention(Q, K, V, "causal"), ("mask", "str", "attnhub.Mask")),
    "mask shape": (lambda: attention(Q, K, V, BoolMask(torch.ones(4, 7, dtype=torch.bool))), ("bool_mask", "(1, 1, 4, 7)", "[2, 4, 5, 7]")),
    "bias shape": (lambda: attention(Q, K, V, attnhub.Bias(torch.ones(3, 1, 1, 7))), ("bias", "(3, 1, 1, 7)", "broadcast")),
    "alibi shape": (lambda: attention(Q, K, V, attnhub.ALiBi(torch.ones(3))), ("ALiBi", "(3,)", "[4]")),
    "lengths": (lambda: attention(Q, K, V, SeqLens(torch.tensor([1]))), ("seqused_k", "1 entries", "2 sequences")),
    "padding": (lambda: attention(Q, K, V, attnhub.LeftPad(torch.tensor([1, 2, 3]))), ("leftpad", "3 entries", "2")),
    "prefix": (lambda: attention(Q, K, V, Causal() & attnhub.Prefix(torch.tensor([1]))), ("prefix", "1 entries", "2")),
    "segments": (lambda: attention(Q, K, V, attnhub.Segments(torch.zeros(2, 5, dtype=torch.int32))), ("segment", "(2, 5)", "[2, 7]")),
    "blocks": (lambda: attention(Q, K, V, attnhub.BlockSparse(torch.ones(2, 2, dtype=torch.bool), (4, 4)) & attnhub.Bias(torch.ones(9))), ("bias", "(1, 1, 1, 9)")),
    "block count": (lambda: attention(Q, K, V, attnhub.BlockSparse(torch.ones(3, 2, dtype=torch.bool), (4, 4))), ("BlockSparse", "(1, 1, 3, 2)", "2, 2")),
    "mask device": (lambda: attention(Q, K, V, SeqLens(torch.zeros(2, dtype=torch.int32, device=META))), ("mask", "meta", "cpu", "move")),
    "scale tensor": (lambda: attention(Q, K, V, softmax_scale=torch.tensor(0.5)), ("softmax_scale", "Tensor", ".item()")),
    "scale list": (lambda: attention(Q, K, V, softmax_scale=[1]), ("softmax_scale", "list", "number")),  # type: ignore[arg-type]
    "softcap list": (lambda: attention(Q, K, V, softcap=[1]), ("softcap", "list", "number")),  # type: ignore[arg-type]
    "backend list": (lambda: attention(Q, K, V, backend=["cpu"]), ("backend=['cpu']", "name", "comma")),  # type: ignore[arg-type]
    "return_lse list": (lambda: attention(Q, K, V, return_lse=[1]), ("return_lse", "list", "True or False")),  # type: ignore[arg-type]
    "scale nan": (lambda: attention(Q, K, V, softmax_scale=math.nan), ("softmax_scale", "nan", "finite")),
    "scale inf": (lambda: attention(Q, K, V, softmax_scale=math.inf), ("softmax_scale", "inf", "finite")),
    "softcap negative": (lambda: attention(Q, K, V, softcap=-1.0), ("softcap=-1.0", "positive")),
    "softcap nan": (lambda: attention(Q, K, V, softcap=math.nan), ("softcap", "nan")),
    "softcap string": (lambda: attention(Q, K, V, softcap="30"), ("softcap", "str", "number")),
    "sinks shape": (lambda: attention(Q, K, V, sinks=torch.zeros(2)), ("sinks", "(2,)", "[4]")),
    "sinks list": (lambda: attention(Q, K, V, sinks=[0.0] * 4), ("sinks", "list", "Tensor")),
    "sinks integers": (lambda: attention(Q, K, V, sinks=torch.zeros(4, dtype=torch.int64)), ("sinks", "int64", "float")),
    "sinks device": (lambda: attention(Q, K, V, sinks=torch.zeros(4, device=META)), ("sinks", "meta", "cpu")),
    "dropout 1": (lambda: attention(Q, K, V, dropout_p=1.0), ("dropout_p=1.0", "< 1")),
    "dropout negative": (lambda: attention(Q, K, V, dropout_p=-0.1), ("dropout_p=-0.1", "0 <=")),
    "dropout string": (lambda: attention(Q, K, V, dropout_p="0.1"), ("dropout_p", "str", "number")),
    "layout": (lambda: attention(Q, K, V, layout="sbhd"), ("layout='sbhd'", "bhsd", "bshd")),  # type: ignore[arg-type]
    "backend type": (lambda: attention(Q, K, V, backend=3), ("backend=3", "name")),  # type: ignore[arg-type]
    "backend auto first": (lambda: attention(Q, K, V, backend="auto,sdpa"), ("backend='auto,sdpa'", "end")),
    "varlen 4-D": (lambda: attention(Q, K, V, varlen=LENGTHS), ("varlen", "[T, H, D]", "(2, 4, 5, 8)")),
    "varlen tuple": (lambda: attention(PACKED, PACKED, PACKED, varlen=(1, 2)), ("varlen", "tuple", "Varlen")),  # type: ignore[arg-type]
    "varlen device": (lambda: attention(*(t.to(META) for t in (PACKED, PACKED, PACKED)), varlen=LENGTHS), ("cu_seqlens", "cpu", "meta", "move")),
    "varlen, cache and new": (lambda: attention(PACKED, PACKED, PACKED, varlen=LENGTHS, kv_cache=CACHE), ("kv_cache", "varlen", "append_kv", "no k and v")),
    "cache tuple": (lambda: attention(Q, K, V, kv_cache=(K, V)), ("kv_cache", "tuple", "KVCache")),  # type: ignore[arg-type]
    "cache half": (lambda: attention(Q, K, kv_cache=CACHE), ("kv_cache", "both k and v")),
    "cache batch": (lambda: attention(Q[:1], kv_cache=CACHE), ("batch 1", "cache_seqlens", "2")),
    "cache grad": (lambda: attention(Q.clone().requires_grad_(), kv_cache=CACHE), ("kv_cache", "gradient", "no_grad")),
    "cache and lengths": (lambda: attention(Q, None, None, SeqLens(torch.tensor([1, 1])), kv_cache=CACHE), ("SeqLens", "kv_cache", "cache_seqlens")),
    "cache device": (lambda: attention(Q, kv_cache=KVCache.empty(2, 2, 16, 8, device="meta")), ("cpu", "meta", "device")),
    "cache heads": (lambda: attention(Q, kv_cache=KVCache.empty(2, 3, 16, 8)), ("4 heads", "k 3", "multiple")),
    # -- parts and layouts by themselves
    "align": (lambda: Causal("lower_right"), ("align='lower_right'", "bottom_right", "top_left")),  # type: ignore[arg-type]
    "window -2": (lambda: attnhub.Window(-2, 0), ("Window(left=-2", "-1")),
    "window string": (lambda: attnhub.Window("3"), ("Window(left='3'", "-1")),  # type: ignore[arg-type]
    "window fraction": (lambda: attnhub.Window(1.5), ("Window(left=1.5",)),  # type: ignore[arg-type]
    "chunk 0": (lambda: attnhub.Chunk(0), ("Chunk(size=0)", "at least 1")),
    "chunk fraction": (lambda: attnhub.Chunk(1.5), ("Chunk(size=1.5)",)),  # type: ignore[arg-type]
    "lengths float": (lambda: SeqLens(torch.tensor([1.0])), ("seqused_k", "integer", "float32")),
    "lengths list": (lambda: SeqLens([1, 2]), ("seqused_k", "integer tensor", "list")),  # type: ignore[arg-type]
    "lengths bool": (lambda: attnhub.LeftPad(torch.tensor([True])), ("leftpad", "bool")),
    "lengths 2-D": (lambda: attnhub.Prefix(torch.zeros(1, 2, dtype=torch.int32)), ("Prefix", "1 dimension", "(1, 2)")),
    "segments 1-D": (lambda: attnhub.Segments(torch.zeros(3, dtype=torch.int32)), ("Segments(ids_q)", "2 dimension")),
    "bool mask float": (lambda: BoolMask(torch.ones(2, 2)), ("BoolMask", "float32", "Bias")),
    "bool mask 5-D": (lambda: BoolMask(torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)), ("BoolMask", "at most 4", "(1, 1, 1, 1, 1)")),
    "bias bool": (lambda: attnhub.Bias(torch.ones(2, 2, dtype=torch.bool)), ("Bias", "bool", "BoolMask")),
    "alibi list": (lambda: attnhub.ALiBi([0.5]), ("ALiBi", "[Hq]", "list")),  # type: ignore[arg-type]
    "alibi 3-D": (lambda: attnhub.ALiBi(torch.ones(1, 1, 1)), ("ALiBi", "(1, 1, 1)")),
    "block size": (lambda: attnhub.BlockSparse(torch.ones(1, 1, dtype=torch.bool), (0, 4)), ("block_size=(0, 4)", "at least 1")),
    "block size number": (lambda: attnhub.BlockSparse(torch.ones(1, 1, dtype=torch.bool), 64), ("block_size=64", "BlockSparse")),  # type: ignore[arg-type]
    "blocks float": (lambda: attnhub.BlockSparse(torch.ones(1, 1), (4, 4)), ("BlockSparse", "bool")),
    "cu_seqlens float": (lambda: Varlen(torch.zeros(2), torch.zeros(2), 1, 1), ("Varlen(cu_seqlens_q)", "integer", "float32")),
    "cu_seqlens differ": (lambda: Varlen(torch.tensor([0, 1]), torch.tensor([0, 1, 2]), 1, 1), ("cu_seqlens_q (2,)", "cu_seqlens_k (3,)", "N + 1")),
    "max_seqlen negative": (lambda: Varlen(torch.tensor([0, 1]), torch.tensor([0, 1]), -1, 1), ("max_seqlen_q", "-1")),
    "max_seqlen string": (lambda: Varlen(torch.tensor([0, 1]), torch.tensor([0, 1]), 1, "1"), ("max_seqlen_k", "'1'")),  # type: ignore[arg-type]
    "cache layout": (lambda: KVCache(K, K, torch.zeros(2, dtype=torch.int32), layout="hbsd"), ("layout='hbsd'", "bshd")),  # type: ignore[arg-type]
    "cache shapes": (lambda: KVCache(K, V[:1], torch.zeros(2, dtype=torch.int32)), ("k_cache (2, 2, 7, 8)", "v_cache (1, 2, 7, 6)")),
    "cache table and index": (lambda: KVCache(K, K, torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)),
                              ("block_table", "cache_batch_idx", "not both")),
    "cache lengths 2-D": (lambda: KVCache(K, K, torch.zeros(2, 1, dtype=torch.int32)), ("cache_seqlens", "1 dimension")),
    "use a number": (lambda: attnhub.use(3), ("attnhub.use(3)", "strings")),  # type: ignore[arg-type]
    "use auto first": (lambda: attnhub.use("auto", "sdpa"), ("attnhub.use", "auto", "end")),
    "sdpa mask and causal": (lambda: attnhub.scaled_dot_product_attention(Q, Q, Q, torch.ones(5, 5), is_causal=True), ("attn_mask", "is_causal", "None")),
    "sdpa 1-D": (lambda: attnhub.scaled_dot_product_attention(Q[0, 0, 0], Q, Q), ("at least 2 dimensions", "1")),
    "sdpa integer mask": (lambda: attnhub.scaled_dot_product_attention(Q, Q, Q, torch.ones(5, 5, dtype=torch.int64)), ("int64", "floating")),
    "sdpa heads": (lambda: attnhub.scaled_dot_product_attention(Q, K[:, :1].expand(2, 3, 7, 8), K[:, :1].expand(2, 3, 7, 8), enable_gqa=True), ("4 query heads", "3 key heads")),
    # -- kinds of tensors, numbers beyond every range, forgotten parentheses
    "mask uncalled": (lambda: attention(Q, K, V, Causal), ("mask is a function", "call it", "attnhub.Causal()")),  # type: ignore[arg-type]
    "scale huge": (lambda: attention(Q, K, V, softmax_scale=10**400), ("softmax_scale=1000", "finite")),
    "softcap huge": (lambda: attention(Q, K, V, softcap=10**400), ("softcap=1000", "positive")),
    "lse string": (lambda: attention(Q, K, V, return_lse="no"), ("return_lse is a str", "True or False")),  # type: ignore[arg-type]
    "deterministic number": (lambda: attention(Q, K, V, deterministic=1), ("deterministic is a int", "True or False")),  # type: ignore[arg-type]
    "sparse": (lambda: attnhub.explain(Q.to_sparse(), K, V), ("q is a torch.sparse_coo tensor", "dense")),
    "nested": (lambda: attnhub.explain(Q, torch.nested.nested_tensor([K[0], K[1]]), V), ("k is a nested tensor", "varlen", "SeqLens")),
    "lengths complex": (lambda: SeqLens(torch.ones(2, dtype=torch.complex64)), ("seqused_k", "integer", "complex64")),
    "lengths beyond int32": (lambda: SeqLens(torch.tensor([3, 2**33 + 1])), ("seqused_k", "from 3 to 8589934593", "int32")),
    "lengths unsigned": (lambda: SeqLens(torch.tensor([3, 2**32 - 1], dtype=torch.uint32)), ("seqused_k", "4294967295", "int32")),
    "ids beyond int32": (lambda: attnhub.Segments(torch.full((2, 5), 2**33)), ("Segments(ids_q)", "8589934592", "renumber")),
    "slopes complex": (lambda: attnhub.ALiBi(torch.ones(4, dtype=torch.complex64)), ("ALiBi(slopes)", "real numbers", "complex64")),
    "slopes bool": (lambda: attnhub.ALiBi(torch.ones(4, dtype=torch.bool)), ("ALiBi(slopes)", "real numbers", "bool")),
    # -- fields that only Mask(...) itself lets through
    "field lengths": (lambda: attention(Q, K, V, attnhub.Mask(seqused_k=torch.tensor([1, 2]))), ("seqused_k=torch.int64 (2,)", "int32 [B]", "SeqLens")),
    "field pad": (lambda: attention(Q, K, V, attnhub.Mask(leftpad=torch.zeros(2))), ("leftpad=torch.float32", "int32", "LeftPad")),
    "field prefix": (lambda: attention(Q, K, V, attnhub.Mask(causal=True, prefix=torch.tensor([1, 2]))), ("prefix=torch.int64", "int32", "Prefix")),
    "field ids": (lambda: attention(Q, K, V, attnhub.Mask(segments=(torch.zeros(2, 5), torch.zeros(2, 7)))), ("segments", "int32 [B, S]", "Segments")),
    "field bool": (lambda: attention(Q, K, V, attnhub.Mask(bool_mask=torch.ones(1, 1, 5, 7))), ("bool_mask=torch.float32", "bool", "BoolMask")),
    "field bias": (lambda: attention(Q, K, V, attnhub.Mask(bias=torch.zeros(5, 7))), ("bias=torch.float32 (5, 7)", "4 dimensions", "Bias")),
    "field slopes": (lambda: attention(Q, K, V, attnhub.Mask(alibi=torch.ones(4, dtype=torch.float64))), ("alibi", "float64", "float32", "ALiBi")),
    "field window": (lambda: attention(Q, K, V, attnhub.Mask(window=(-5, 3))), ("window=(-5, 3)", "at least -1", "Window")),
    "field window short": (lambda: attention(Q, K, V, attnhub.Mask(window=(3,))), ("window=(3,)", "pair", "Window")),  # type: ignore[arg-type]
    "field chunk": (lambda: attention(Q, K, V, attnhub.Mask(chunk=-1)), ("chunk=-1", "at least 0", "Chunk")),
    "field align": (lambda: attention(Q, K, V, attnhub.Mask(causal=True, align="left")), ("align='left'", "bottom_right")),  # type: ignore[arg-type]
    "field block size": (lambda: attention(Q, K, V, attnhub.Mask(block_sparse=torch.ones(1, 1, 1, 1, dtype=torch.bool))), ("block_size=(0, 0)", "BlockSparse")),
    # -- packed sequences and pages that do not fit
    "packed lengths list": (lambda: Varlen.from_lengths([2, 3]), ("from_lengths(lengths_q)", "list", "tensor")),  # type: ignore[arg-type]
    "packed lengths float": (lambda: Varlen.from_lengths(torch.tensor([2.0])), ("from_lengths(lengths_q)", "float32", "integer")),
    "packed lengths negative": (lambda: Varlen.from_lengths(torch.tensor([3, -1])), ("from_lengths(lengths_q)", "from -1 to 3", "at least 0")),
    "packed lengths in all": (lambda: Varlen.from_lengths(torch.tensor([2**30] * 4)), ("from_lengths(lengths_q)", "4294967296 in all", "2^31")),
    "cu_seqlens start": (lambda: packed([1, 5], 4), ("cu_seqlens_q[0] is 1", "start with 0")),
    "cu_seqlens decrease": (lambda: packed([0, 4, 2], 4), ("cu_seqlens_q decreases behind entry 1", "cumulative")),
    "cu_seqlens end": (lambda: packed([0, 9], 9), ("cu_seqlens_q ends with 9", "q has 5 tokens")),
    "max_seqlen": (lambda: packed([0, 3, 5], 1), ("max_seqlen_q is 1", "longest sequence has 3", "upper bound")),
    "cu_seqlens of keys": (lambda: attention(PACKED, PACKED, PACKED, varlen=Varlen(ends([0, 5]), ends([0, 6]), 5, 6)), ("cu_seqlens_k ends with 6", "k has 5")),
    "table rows": (lambda: attention(Q, kv_cache=KVCache(K, K, ends([1, 1]), ends([[0]]))), ("block_table has 1 rows", "2 entries")),
    "row numbers": (lambda: attention(Q, kv_cache=KVCache(K, K, ends([1, 1]), None, ends([0]))), ("cache_batch_idx has 1 rows", "2 entries")),
    # -- layers, rotary tables, parts of keys
    "layer heads": (lambda: layer(num_heads=0), ("num_heads=0", "at least 1")),
    "layer heads string": (lambda: layer(num_heads="4"), ("num_heads='4'", "whole number")),
    "layer pages": (lambda: layer(page_size=-3), ("page_size=-3", "at least 0")),
    "layer batch": (lambda: layer(batch=1.5), ("batch=1.5", "whole number")),
    "layer head_dim": (lambda: attnhub.nn.CachedAttention(4), ("head_dim is needed", "embed_dim")),
    "layer mask": (lambda: layer(mask="causal"), ("mask is a str", "attnhub.Causal()")),
    "layer rotary base": (lambda: layer(rotary=math.nan), ("rotary=nan", "above 0")),
    "layer rotary string": (lambda: layer(rotary="llama"), ("rotary is a str", "(cos, sin)")),
    "layer x": (lambda: layer(embed_dim=32)(torch.zeros(1, 2, 30)), ("x has shape (1, 2, 30)", "[1, S, 32]")),
    "layer q": (lambda: layer()([1], Q, Q), ("q is a list", "Tensor")),
    "layer position": (lambda: layer().set_position(1.5), ("position is 1.5", "whole number")),
    "layer cache": (lambda: layer().use_cache(None), ("cache is a NoneType", "KVCache")),
    "layer explain": (lambda: layer().explain(-1), ("new_tokens=-1", "at least 0")),
    "rotary x": (lambda: attnhub.apply_rotary(Q.int(), COS, COS, POSITIONS), ("apply_rotary(x)", "int32", "floating")),
    "rotary table": (lambda: attnhub.apply_rotary(Q, COS, None, POSITIONS), ("apply_rotary(sin)", "NoneType")),  # type: ignore[arg-type]
    "rotary positions": (lambda: attnhub.apply_rotary(Q, COS, COS, POSITIONS.float()), ("positions are torch.float32 (2, 5)", "int64")),
    "rotary lengths": (lambda: attnhub.apply_rotary(Q, COS, COS, POSITIONS[:, :3]), ("(2, 3)", "[2, 5]")),
    "rotary negative": (lambda: attnhub.apply_rotary(Q, COS, COS, POSITIONS - 1), ("outside of the table of 16 positions",)),
    "rotary half": (lambda: attnhub.append_kv(CACHE, K, K, rotary=(COS, None)), ("rotary", "cos and sin are both needed")),  # type: ignore[arg-type]
    "merge list": (lambda: attnhub.merge_states([(Q, Q[..., 0])]), ("part 0", "(out, lse)", "unpack", "*")),  # type: ignore[arg-type]
    "merge integers": (lambda: attnhub.merge_states((Q, Q[..., 0].long())), ("part 0", "floating")),
    "merge devices": (lambda: attnhub.merge_states((Q, Q[..., 0]), (Q.to(META), Q[..., 0].to(META))), ("part 1 is on meta", "one device")),
    # -- integrations
    "patch option": (lambda: attnhub.patch(torch.nn.MultiheadAttention(8, 2), backend="cpu"), ("backend='cpu'", "only, strict", "attnhub.use")),
    "patch only": (lambda: attnhub.patch(torch.nn.MultiheadAttention(8, 2), only="self_attn"), ("only='self_attn'", "function")),  # type: ignore[arg-type]
    "patch class": (lambda: attnhub.patch(torch.nn.MultiheadAttention), ("MultiheadAttention is a class", "model")),
    "flash none": (lambda: flash.flash_attn_func(None, K, K), ("q is a NoneType", "Tensor")),
    "flash packed list": (lambda: flash.flash_attn_qkvpacked_func([Q, K, V]), ("qkv is a list", "Tensor")),
    "flash window": (lambda: flash.flash_attn_func(Q, K, K, window_size=(2.0, 0.0)), ("window_size=(2.0, 0.0)", "whole")),
    "flash lengths": (lambda: flash.flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=[1, 2]), ("cache_seqlens is a list", "[2]")),
    "flash pages": (lambda: flash.flash_attn_with_kvcache(Q, K, K, cache_seqlens=1, block_table=ends([[0]])), ("block_table has 1 rows", "2 entries")),
    "flash padding": (lambda: flash.bert_padding.unpad_input(Q, None), ("attention_mask is a NoneType", "Tensor")),
    "merge shapes": (lambda: attnhub.merge_states((Q, Q[..., 0]), (K, K[..., 0])), ("part 1", "(2, 4, 5, 8)")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_argument_value_and_fix(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    said = str(caught.value)
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpu"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("used", [[9, 3], [3, -1]], ids=str)
def test_lengths_out_of_range_on_the_host(used: list[int], backend: str, grad: bool) -> None:
    """The same error whoever serves, at the first call and at the next: not other keys than were asked for."""
    if not attnhub.backends()[backend]["available"]:
        pytest.skip(f"the {backend} backend is not available here")
    q = Q.clone().requires_grad_(grad)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"seqused_k\[\d\] is (9|-1)"):
            attention(q, K, V, SeqLens(torch.tensor(used)), backend=backend)
    if not grad:
        with pytest.raises(ValueError, match=r"seqused_k\[\d\] is (9|-1)"):
            attention(Q, kv_cache=KVCache(K, V, ends(used)), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpu"])
@pytest.mark.parametrize("page", [-1, 2])
def test_pages_that_the_cache_does_not_have(page: int, backend: str) -> None:
    """An error where they are used; behind the length they may be anything."""
    if not attnhub.backends()[backend]["available"]:
        pytest.skip(f"the {backend} backend is not available here")
    table, fine = ends([[0, page], [1, page]]), ends([[0, 0], [1, 0]])
    wanted = attention(Q, kv_cache=KVCache(K, V, ends([7, 3]), fine), backend="reference")
    torch.testing.assert_close(attention(Q, kv_cache=KVCache(K, V, ends([7, 3]), table), backend=backend), wanted)
    with pytest.raises(ValueError, match=rf"block_table\[1, 1\] is {page}"):
        attention(Q, kv_cache=KVCache(K, V, ends([7, 8]), table), backend=backend)


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**40, 2**64])
def test_sizes_beyond_every_length_mask_nothing(size: int) -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    for backend in ("reference", "sdpa", *(("cpu",) if attnhub.backends()["cpu"]["available"] else ())):
        wanted = attention(q, k, k, Causal(), backend=backend)
        for part in (attnhub.Window(size, size), attnhub.Chunk(size)):
            torch.testing.assert_close(attention(q, k, k, Causal() & part, backend=backend), wanted)


def test_nothing_is_chosen_or_written_before_the_arguments_are_checked() -> None:
    before = attnhub.last_decision()
    cache = KVCache.empty(2, 2, 16, 8)
    for bad in (lambda: attention(Q, K, V[:, :, :3]), lambda: attention(Q[:, :3], K, K, kv_cache=cache), lambda: attention(Q, K, K, "causal", kv_cache=cache)):
        with pytest.raises((ValueError, TypeError)):
            bad()
    assert attnhub.last_decision() == before


@pytest.mark.parametrize("name", ["mask string", "factor shape", "factor without fp8", "e5m2", "softcap negative", "sinks shape", "heads", "layout", "backend auto first"])
def test_explain_checks_like_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, words = BAD[name]
    monkeypatch.setitem(globals(), "attention", attnhub.explain)
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


def test_slopes_have_no_gradient() -> None:
    """Nobody computes it: said at once, also when the same call went well without."""
    mask = attnhub.ALiBi(torch.ones(4))
    attention(Q, K, V, mask)
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="slopes require a gradient"):
        attention(Q, K, V, attnhub.ALiBi(slopes))
    with torch.no_grad():
        attention(Q, K, V, attnhub.ALiBi(slopes))


def test_a_negative_bit_is_no_detail() -> None:
    """`.imag` of a conjugate is such a view: its memory, which a native kernel reads, holds the opposite of its values."""
    if not attnhub.backends()["cpu"]["available"]:
        pytest.skip("the cpu backend's library is not built here")
    attend = functools.partial(attention, backend="cpu")
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    for _ in range(2):
        torch.testing.assert_close(attend(torch._neg_view(q), k, v), attend(-q, k, v))
        torch.testing.assert_close(attend(q, k, torch._neg_view(v)), attend(q, k, -v))
