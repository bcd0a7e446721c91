"""Calls of one plan of the triton backend that differ in what a launch may depend on, and what each of them launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor
from triton_gpu import Gpu, seen

from attnhub.backend import Call, Needs
from attnhub.backends.triton import arguments, launcher
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Bias, BoolMask, Causal, Chunk, LeftPad, Mask, Prefix, Segments, SeqLens, Window


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def shifted(x: Tensor) -> Tensor:
    """The same values and strides at an address that is no multiple of 16."""
    size = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
    return torch.empty(size + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)


def bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def pitched(x: Tensor, pitch: int) -> Tensor:
    """The same values with another distance between tokens."""
    return torch.empty(*x.shape[:3], pitch, dtype=x.dtype)[..., : x.shape[3]].copy_(x)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def calls(dtype: torch.dtype = torch.bfloat16) -> dict[str, Call]:
    """Calls of one plan. Many differ from the first in one thing alone."""
    q, k, v = randn(2, 4, 80, 64, dtype=dtype), randn(2, 2, 96, 64, dtype=dtype), randn(2, 2, 96, 64, dtype=dtype)

    def call(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Mask = FULL, scale: float = 0.125, **extra: Any) -> Call:
        return Call(q, k, v, mask, scale, **extra)

    token = randn(2, 4, 1, 64, dtype=dtype)
    long_k, long_v = randn(2, 2, 4000, 64, dtype=dtype), randn(2, 2, 4000, 64, dtype=dtype)
    far = torch.zeros(2, 1, 2**24, dtype=torch.uint8).view(dtype)[..., : 96 * 64].view(2, 1, 96, 64).expand(2, 2, 96, 64)
    documents = (torch.arange(96) // 9).int()[None].repeat(2, 1)
    bias, keep = randn(2, 4, 80, 96, dtype=torch.float32), torch.rand(2, 4, 80, 96) > 0.5
    packed_q, packed_k, packed_v = randn(1, 4, 50, 64, dtype=dtype), randn(1, 2, 80, 64, dtype=dtype), randn(1, 2, 80, 64, dtype=dtype)
    cu_q, cu_k = ints(0, 20, 20, 45), ints(0, 13, 33, 70)
    pages_k, pages_v = randn(9, 2, 16, 64, dtype=dtype), randn(9, 2, 16, 64, dtype=dtype)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    found = {
        "plain": call(),
        "lse": call(need_lse=True),
        "scale": call(scale=0.25),
        "negative scale": call(scale=-0.125),
        "softcap": call(softcap=2.0),
        "another softcap": call(softcap=3.0),
        "q shifted": call(q=shifted(q)),
        "k shifted": call(k=shifted(k)),
        "v shifted": call(v=shifted(v)),
        "q and k shifted": call(q=shifted(q), k=shifted(k)),
        "q bshd": call(q=bshd(q)),
        "k bshd": call(k=bshd(k)),
        "v bshd": call(v=bshd(v)),
        "all bshd": call(q=bshd(q), k=bshd(k), v=bshd(v)),
        "k pitched": call(k=pitched(k, 80)),
        "k pitched oddly": call(k=pitched(k, 65)),
        "v pitched oddly": call(v=pitched(v, 65)),
        "k and v expanded": call(k=k[:1].expand_as(k), v=v[:1].expand_as(v)),
        "k far apart": call(k=far),
        "k is v": call(k=v),
        "one sequence": call(q[:1], k[:1], v[:1]),
        "fewer queries": call(q=q[:, :, :79]),
        "fewer keys": call(k=k[:, :, :95], v=v[:, :, :95]),
        "fewer keys, dense": call(k=k[:, :, :95].contiguous(), v=v[:, :, :95].contiguous()),
        "few queries": call(q=q[:, :, :33]),
        "very few queries": call(q=q[:, :, :7]),
        "causal": call(mask=Causal()),
        "causal top left": call(mask=Causal("top_left")),
        "window": call(mask=Window(5, 3)),
        "another window": call(mask=Window(5, 4)),
        "left window": call(mask=Window(5)),
        "chunk": call(mask=Causal() & Chunk(7)),
        "another chunk": call(mask=Causal() & Chunk(8)),
        "lengths": call(mask=SeqLens(ints(40, 7))),
        "lengths shifted": call(mask=SeqLens(shifted(ints(40, 7)))),
        "left padding": call(mask=LeftPad(ints(40, 7))),
        "lengths and left padding": call(mask=SeqLens(ints(40, 7)) & LeftPad(ints(0, 1))),
        "prefix": call(mask=Causal() & Prefix(ints(9, 0))),
        "prefix without causal": call(mask=Prefix(ints(9, 0))),
        "segments": call(mask=Segments(documents[:, :80].contiguous(), documents)),
        "segments, sliced": call(mask=Segments(documents[:, :80], documents)),
        "blocks": call(mask=Causal() & Segments(documents[:, :80].contiguous(), documents, widen_causal=True)),
        "bool mask": call(mask=BoolMask(keep)),
        "bool mask of heads": call(mask=BoolMask(keep[:1])),
        "bool mask transposed": call(mask=BoolMask(keep.transpose(2, 3).contiguous().transpose(2, 3))),
        "bias": call(mask=Bias(bias)),
        "bias shifted": call(mask=Bias(shifted(bias))),
        "bias of rows": call(mask=Bias(bias[:, :, :, :1])),
        "bias in fp16": call(mask=Bias(bias.half())),
        "alibi": call(mask=ALiBi(torch.rand(4))),
        "alibi of sequences": call(mask=ALiBi(torch.rand(2, 4))),
        "sinks": call(sinks=torch.rand(4)),
        "sinks shifted": call(sinks=shifted(torch.rand(4))),
        "token": call(q=token),
        "token, lse": call(q=token, need_lse=True),
        "token, many keys": call(token, long_k, long_v),
        "token, many keys, lse": call(token, long_k, long_v, need_lse=True),
        "token, many keys, sinks": call(token, long_k, long_v, sinks=torch.rand(4)),
        "packed": call(packed_q, packed_k, packed_v, varlen=Varlen(cu_q, cu_k, 25, 37)),
        "packed, longer": call(packed_q, packed_k, packed_v, varlen=Varlen(cu_q, cu_k, 26, 37)),
        "packed, longer keys": call(packed_q, packed_k, packed_v, varlen=Varlen(cu_q, cu_k, 25, 38)),
        "packed, fewer": call(packed_q, packed_k, packed_v, varlen=Varlen(cu_q[:3], cu_k[:3], 25, 37)),
        "not packed": call(packed_q, packed_k, packed_v),
        "paged": call(q=token, k=pages_k, v=pages_v, mask=Causal() & SeqLens(ints(33, 2)), block_table=table),
        "paged, wider table": call(q=token, k=pages_k, v=pages_v, mask=Causal() & SeqLens(ints(33, 2)), block_table=table.repeat(1, 2)),
        "paged, sliced table": call(q=token, k=pages_k, v=pages_v, mask=Causal() & SeqLens(ints(33, 2)), block_table=table.repeat(1, 2)[:, :4]),
    }  # fmt: skip
    return found


def again(call: Call) -> Call:
    """The same call with other tensors of the same metadata (nothing reads their values)."""

    def other(x: Optional[Tensor]) -> Any:
        if x is None:
            return None
        size = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
        return torch.empty(size + 8, dtype=x.dtype)[x.data_ptr() % 16 // x.element_size() :].as_strided(x.shape, x.stride())

    mask, varlen = call.mask, call.varlen
    changes = {}
    for field in dataclasses.fields(mask):
        value = getattr(mask, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = other(value)
        elif isinstance(value, tuple) and isinstance(value[0], Tensor):
            changes[field.name] = tuple(map(other, value))
    if varlen is not None:
        varlen = Varlen(other(varlen.cu_seqlens_q), other(varlen.cu_seqlens_k), varlen.max_seqlen_q, varlen.max_seqlen_k)
    return Call(
        other(call.q), other(call.k), other(call.v), mask if mask is FULL else dataclasses.replace(mask, **changes), call.softmax_scale, call.softcap, other(call.sinks),
        call.dropout_p, call.rng, varlen, other(call.block_table), call.need_lse,
    )  # fmt: skip


def tensors_of(call: Call) -> dict[str, Tensor]:
    """The call's own tensors by the kernels' names, without those that are copied first."""
    own = {x.data_ptr() for x in (call.q, call.k, call.v, *call.mask.held, call.sinks, call.block_table) if x is not None}
    if call.varlen is not None:
        own |= {call.varlen.cu_seqlens_q.data_ptr(), call.varlen.cu_seqlens_k.data_ptr()}
    found = arguments.kernel_inputs(call)
    if call.softmax_scale < 0:
        del found["q"]
    return {name: x for name, x in found.items() if x.data_ptr() in own}


def forward_of(gpu: Gpu, call: Call) -> Callable[[launcher.TritonPlan], Any]:
    def run(chosen: launcher.TritonPlan) -> Any:
        out, lse = chosen.forward(call)
        return seen(gpu, tensors_of(call)), out.shape, out.stride(), out.dtype, None if lse is None else (lse.shape, lse.stride(), lse.dtype)

    return run


def backward_of(gpu: Gpu, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], needs: Needs, out: Tensor, lse: Tensor) -> Callable[[launcher.TritonPlan], Any]:
    def run(chosen: launcher.TritonPlan) -> Any:
        grads = chosen.backward(call, grad_out, grad_lse, out, lse, needs)
        inputs = {**tensors_of(call), "out": out, "lse": lse, "grad_out": grad_out, **({} if grad_lse is None else {"grad_lse": grad_lse})}
        if not (grad_out.stride(-1) == 1 and lse.is_contiguous()):
            del inputs["grad_out"], inputs["lse"]
        return seen(gpu, inputs), [None if g is None else (g.shape, g.stride(), g.dtype) for g in grads]

    return run


def backward_variants(call: Call) -> dict[str, tuple[Any, ...]]:
    shape = (*call.q.shape[:3], call.v.shape[3])
    grad_out, out, lse = randn(*shape), randn(*shape), randn(*shape[:3], dtype=torch.float32)
    all_three = Needs()
    found = {
        "plain": (grad_out, None, all_three, out, lse),
        "grad_lse": (grad_out, randn(*shape[:3], dtype=torch.float32), all_three, out, lse),
        "grad_lse in bf16": (grad_out, randn(*shape[:3]), all_three, out, lse),
        "grad_out bshd": (bshd(grad_out), None, all_three, out, lse),
        "grad_out shifted": (shifted(grad_out), None, all_three, out, lse),
        "grad_out expanded": (grad_out[..., :1].expand(shape), None, all_three, out, lse),
        "out bshd": (grad_out, None, all_three, bshd(out), lse),
        "lse strided": (grad_out, None, all_three, out, lse.transpose(1, 2).contiguous().transpose(1, 2)),
        "only q": (grad_out, None, Needs(True, False, False), out, lse),
        "only v": (grad_out, None, Needs(False, False, True), out, lse),
        "only k": (grad_out, None, Needs(False, True, False), out, lse),
    }  # fmt: skip
    if call.sinks is not None:
        found["sinks"] = (grad_out, None, Needs(sinks=True), out, lse)
    return found
