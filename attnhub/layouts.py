"""Layouts of tokens in memory: packed sequences, and the one rule for output strides."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnhub.mask import _check_ints, readable, register_pytree


@dataclass(frozen=True, eq=False)
class Varlen:
    """Sequences packed one after another: q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv]; lse [Hq, Tq].

    cu_seqlens_q, cu_seqlens_k: [N + 1] int32, cumulative lengths starting with 0. max_seqlen_q, max_seqlen_k: the longest
    (an upper bound is enough). Zero-length sequences are fine. Tokens behind cu_seqlens[-1] belong to no sequence: their
    output is 0. On the host cu_seqlens are looked at; on a device they are not, since that would wait for it.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def __post_init__(self) -> None:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            object.__setattr__(self, name, _check_ints(f"Varlen({name})", getattr(self, name), 1))
        if self.cu_seqlens_q.shape != self.cu_seqlens_k.shape or self.cu_seqlens_q.shape[0] < 1:
            raise ValueError(
                f"Varlen: cu_seqlens_q {tuple(self.cu_seqlens_q.shape)} and cu_seqlens_k {tuple(self.cu_seqlens_k.shape)} "
                "must both be [N + 1] for the same N sequences"
            )

        for name in ("max_seqlen_q", "max_seqlen_k"):
            value = getattr(self, name)
            if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < 0:
                raise ValueError(f"Varlen({name}={value!r}): a whole number of at least 0 is needed")

    @classmethod
    def from_lengths(cls, lengths_q: Tensor, lengths_k: Tensor | None = None) -> Varlen:
        """From the lengths of the sequences ([N] integers each). Synchronises with the device once, for the maxima."""

        def cumulate(name: str, lengths: Tensor) -> tuple[Tensor, int]:
            if not isinstance(lengths, Tensor):
                raise TypeError(f"Varlen.from_lengths({name}) is a {type(lengths).__name__}: a tensor of integers [N] is needed")
            lengths = _check_ints(f"Varlen.from_lengths({name})", lengths, 1)
            if not lengths.numel():
                return lengths.new_zeros(1), 0
            cu = lengths.cumsum(0)
            least, longest, total = torch.stack((lengths.min(), lengths.max(), cu[-1])).tolist()
            if least < 0 or total >= 1 << 31:
                raise ValueError(f"Varlen.from_lengths({name}): lengths from {least} to {longest}, {total} in all: at least 0 each, less than 2^31 in all are needed")
            return torch.nn.functional.pad(cu, (1, 0)).to(torch.int32), longest

        cu_q, max_q = cumulate("lengths_q", lengths_q)
        cu_k, max_k = (cu_q, max_q) if lengths_k is None else cumulate("lengths_k", lengths_k)
        return cls(cu_q, cu_k, max_q, max_k)


def check_cumulative(side: str, cu: Tensor, longest: int, tokens: int) -> None:
    """Raises ValueError unless the numbers of cu_seqlens are what `Varlen` says. Nothing is asked where a look would wait for a device."""
    if not readable(cu):
        return
    ends = (cu.clone() if cu._is_zerotensor() else cu).tolist()
    if ends[0] != 0:
        raise ValueError(f"varlen: cu_seqlens_{side}[0] is {ends[0]}: cumulative lengths start with 0")
    lengths = [end - start for start, end in pairwise(ends)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"varlen: cu_seqlens_{side} decreases behind entry {lengths.index(min(lengths))}: cumulative lengths are needed")
    if lengths and max(lengths) > longest:
        raise ValueError(f"varlen: max_seqlen_{side} is {longest} and the longest sequence has {max(lengths)} tokens: an upper bound is needed")
    if ends[-1] > tokens:
        raise ValueError(f"varlen: cu_seqlens_{side} ends with {ends[-1]} and {side} has {tokens} tokens: it must not pass them")


_FIELDS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _unflatten(children: Any, context: tuple[Any, ...]) -> Varlen:
    varlen = object.__new__(Varlen)
    for name, child in zip(_FIELDS, children):
        object.__setattr__(varlen, name, child)
    return varlen


register_pytree(Varlen, lambda varlen: ([getattr(varlen, name) for name in _FIELDS], (_FIELDS,)), _unflatten)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32; fp64 for fp64 inputs, whose gradients would otherwise lose half of their digits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 for fp8 inputs: their 3 bits of mantissa would throw away what was accumulated in fp32. Else the inputs' own."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


def out_strides(q: Tensor, v_head_dim: int) -> tuple[int, int, int, int]:
    """Strides of the output [B, Hq, Sq, Dv]: dense, in the memory order of q (heads inside tokens, or tokens inside heads).

    The only place where output strides are decided; real kernels and the fake one both ask it, and torch's own attention
    does the same. Where one of the two dimensions has size 1, its stride means nothing and the order is [B, Hq, Sq, Dv].
    """
    _, heads, length, _ = q.shape
    if heads != 1 and length != 1 and q.stride(1) < q.stride(2):
        return (length * heads * v_head_dim, v_head_dim, heads * v_head_dim, 1)
    return (heads * length * v_head_dim, length * v_head_dim, v_head_dim, 1)


def empty_out(q: Tensor, v_head_dim: int) -> Tensor:
    """The output [B, Hq, Sq, Dv], uninitialised, with `out_dtype` and `out_strides`."""
    batch, heads, length, head_dim = q.shape
    if q.dtype == torch.float8_e4m3fn:
        return q.new_empty_strided((batch, heads, length, v_head_dim), out_strides(q, v_head_dim), dtype=torch.bfloat16)
    if head_dim == v_head_dim and q.is_contiguous():
        # The same strides, at half of the host time.
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return q.new_empty_strided((batch, heads, length, v_head_dim), out_strides(q, v_head_dim))


def in_order(out: Tensor, q: Tensor) -> Tensor:
    """An output of another memory order as one with `out_strides` (a differentiable copy where it differs)."""
    strides = out_strides(q, out.shape[3])
    if out.stride() == strides:
        return out
    if strides[1] < strides[2]:
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous().view(out.shape)
