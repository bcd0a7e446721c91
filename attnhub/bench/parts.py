"""What a case holds besides q, k and v: its mask and sinks as attnhub takes them, and a K/V cache in pages."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from attnhub.backend import Call
from attnhub.bench.cases import SPARSE_BLOCK, Case
from attnhub.kv_cache import KVCache
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Bias, BlockSparse, Causal, Mask, Prefix, Window


@dataclass(frozen=True, eq=False)
class Parts:
    """mask, sinks and varlen: attnhub's arguments. document_ids: [T] int32, for who knows no packed sequences."""

    mask: Mask
    sinks: Optional[Tensor] = None
    varlen: Optional[Varlen] = None
    document_ids: Optional[Tensor] = None


@functools.lru_cache(maxsize=1)
def parts(case: Case, device: torch.device) -> Parts:
    """The same for every peer of a case. Kept until the next case asks: a bias may take a gigabyte."""
    generator = torch.Generator(device=device).manual_seed(2)
    mask = Causal() if case.causal and case.seqlen_q > 1 else FULL
    if case.window:
        mask = mask & Window(case.window - 1)
    if case.prefix:
        mask = mask & Prefix(torch.full((case.batch,), case.prefix, dtype=torch.int32, device=device))
    if case.alibi:
        # The slopes of the paper (arXiv 2108.12409) for a power of two of heads.
        mask = mask & ALiBi(2.0 ** (-8.0 * torch.arange(1, case.heads + 1, device=device) / case.heads))
    if case.density:
        count = -(-case.seqlen_q // SPARSE_BLOCK)
        kept = torch.rand(1, 1, count, count, generator=generator, device=device) < case.density
        # No row is without keys.
        mask = mask & BlockSparse(kept | torch.eye(count, dtype=torch.bool, device=device), (SPARSE_BLOCK, SPARSE_BLOCK))
    if case.bias:
        bias = torch.randn(1, case.heads, case.seqlen_q, case.seqlen_k, generator=generator, device=device, dtype=torch_dtype(case))
        mask = mask & Bias(bias)
    sinks = torch.randn(case.heads, generator=generator, device=device) if case.sinks else None
    varlen, ids = None, None
    if case.documents:
        lengths = torch.tensor(case.document_lengths(), dtype=torch.int32, device=device)
        varlen = Varlen.from_lengths(lengths)
        ids = torch.repeat_interleave(torch.arange(case.documents, dtype=torch.int32, device=device), lengths.long())
    return Parts(mask, sinks, varlen, ids)


def torch_dtype(case: Case) -> torch.dtype:
    """The dtype of the case's tensors."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    return dtype


def slice_of(case: Case, q: Tensor, k: Tensor, v: Tensor, found: Parts, whole: bool) -> Call:
    """The case in fp64 as the reference takes it: whole, or the first K/V head of the first batch alone with its query heads."""
    batch, heads, kv_heads = (case.batch, case.heads, case.kv_heads) if whole else (1, case.heads // case.kv_heads, 1)
    mask, sinks = found.mask, found.sinks
    if mask is not FULL and not whole:
        mask = Mask(
            causal=mask.causal, window=mask.window, prefix=None if mask.prefix is None else mask.prefix[:batch],
            alibi=None if mask.alibi is None else mask.alibi[:heads], bias=None if mask.bias is None else mask.bias[:, :heads],
            block_sparse=mask.block_sparse, block_size=mask.block_size,
        )  # fmt: skip
    q, k, v = q[:batch, :heads].double(), k[:batch, :kv_heads].double(), v[:batch, :kv_heads].double()
    sinks = None if sinks is None else sinks[:heads].double()
    return Call(q, k, v, mask, case.head_dim**-0.5, case.softcap, sinks, varlen=found.varlen, need_lse=True)


def quantised(x: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """x [B, H, S, D] in float8_e4m3fn and its factors [B, kv_heads]: powers of two, so that values once quantised come back as they were."""
    grouped = x.view(x.shape[0], kv_heads, -1).float()
    largest = torch.finfo(torch.float8_e4m3fn).max
    factor = torch.exp2(torch.ceil(torch.log2(grouped.abs().amax(-1) / largest)))
    return (grouped / factor[:, :, None]).to(torch.float8_e4m3fn).view(x.shape), factor


def dequantised(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantised` stands for."""
    return (x.float().view(x.shape[0], factor.shape[1], -1) * factor[:, :, None]).view(x.shape).to(dtype)


def paged(k: Tensor, v: Tensor, page_size: int) -> KVCache:
    """A copy of k and v [B, Hk, S, D] in pages of random order, all of S in use."""
    batch, heads, length, _ = k.shape
    count = length // page_size
    table = torch.randperm(batch * count, generator=torch.Generator().manual_seed(3)).to(device=k.device, dtype=torch.int32).view(batch, count)

    def pages(x: Tensor) -> Tensor:
        found = torch.empty(batch * count, heads, page_size, x.shape[3], dtype=x.dtype, device=x.device)
        found[table.flatten().long()] = x.view(batch, heads, count, page_size, x.shape[3]).transpose(1, 2).flatten(0, 1)
        return found

    return KVCache(pages(k), pages(v), torch.full((batch,), length, dtype=torch.int32, device=k.device), table)
