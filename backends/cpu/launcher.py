"""From a `Call` to one call of the shared library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub import config
from attnhub.backend import Call, Gradients, Needs, Plan, Repeat
from attnhub.backends.cpu import library
from attnhub.layouts import empty_out, out_strides
from attnhub.mask import FULL, Mask
from attnhub.problem import Problem

_BIAS_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_pack = library.CALL.pack
_threads = torch.get_num_threads


def _public_empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


#: What compiled graphs allocate by: it passes by the dispatcher, and takes half of torch.empty_like's time. It is private, and takes plain tuples only.
_empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cpu", _public_empty
)


class CpuPlan(Plan):
    """Serves every call of one dtype. The instruction set is settled here; everything else follows the call's shapes."""

    def __init__(self, problem: Problem) -> None:
        """Raises ValueError if ATTNHUB_CPU_ISA names what this processor or this build lacks."""
        self._library = library.load()
        self._forward = self._library.attnhub_cpu_forward
        self._backward = self._library.attnhub_cpu_backward
        self._dtype = library.DTYPES[problem.q_dtype]
        self._isa = library.resolve_isa(config.cpu_isa())
        self._problem = problem

    def describe(self) -> dict[str, Any]:
        """Blocks are those of the class's largest sizes, without a mask."""
        p = self._problem
        forward, backward = library.cut(
            p.q_dtype, self._isa, _threads(), p.batch, p.q_heads, p.kv_heads, p.seqlen_q, p.page_size or p.seqlen_k, p.head_dim, p.v_head_dim
        )
        return {
            "kernel": "tiled online softmax, C++", "isa": library.isa_name(self._isa), "threads": _threads(),
            "forward": forward._asdict(), "backward": backward._asdict() if p.need_backward else None,
        }  # fmt: skip

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        q, v = call.q, call.v
        out = empty_out(q, v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if call.need_lse else None
        packed, _keep = self._packed(call, out, lse)
        status = self._forward(packed)
        if status:
            self._raise(status)
        return out, lse

    def repeat(self, call: Call) -> Optional[Repeat]:
        """All but addresses and the number of threads is packed once: host time shows in small models."""
        if call.mask.seqused_k is not None or call.block_table is not None:
            return None
        q, strides, need_lse = call.q, out_strides(call.q, call.v.shape[3]), call.need_lse
        shape, dtype = (*q.shape[:3], call.v.shape[3]), q.dtype
        lse_shape, lse_strides = shape[:3], (shape[1] * shape[2], shape[2], 1)
        out = _empty_strided(shape, strides, dtype)
        packed, keep = self._packed(call, out, None)
        head, tail = packed[: library.ADDRESSES_AT - 8], packed[library.ADDRESSES_AT + library.ADDRESSES.size :]
        addresses, threads, forward = library.ADDRESSES.pack, library.THREADS.pack, self._forward

        def again(q: Tensor, k: Tensor, v: Tensor, keep: Any = keep) -> tuple[Tensor, Optional[Tensor]]:
            out = _empty_strided(shape, strides, dtype)
            lse = _empty_strided(lse_shape, lse_strides, torch.float32) if need_lse else None
            where = addresses(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr())
            status = forward(head + threads(_threads()) + where + tail)
            if status:
                self._raise(status)
            return out, lse

        return again

    def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
        q, k, v, bias = call.q, call.k, call.v, call.mask.bias
        grad_out = _rows(grad_out, q.dtype)
        lse = lse.to(torch.float32).contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.to(torch.float32).contiguous()
        packed, _keep = self._packed(call, _rows(out, q.dtype), lse)
        wanted = ((q, needs.q), (k, needs.k), (v, needs.v))
        dq, dk, dv = grads = [torch.empty_like(t) if need else None for t, need in wanted]
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32) if needs.bias and bias is not None else None
        grad_sinks = torch.empty(call.sinks.shape, dtype=torch.float32) if needs.sinks and call.sinks is not None else None
        status = self._backward(packed, library.GRADIENTS.pack(
            grad_out.data_ptr(), *grad_out.stride()[:3], 0 if grad_lse is None else grad_lse.data_ptr(),
            *(0 if g is None else g.data_ptr() for g in grads), *(n for g in grads for n in ((0, 0, 0) if g is None else g.stride()[:3])),
            0 if grad_bias is None else grad_bias.data_ptr(), *((0, 0, 0, 0) if grad_bias is None else _broadcast_strides(grad_bias)),
            0 if grad_sinks is None else grad_sinks.data_ptr(),
        ))  # fmt: skip
        if status:
            self._raise(status)
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        if grad_sinks is not None and call.sinks is not None:
            grad_sinks = grad_sinks.to(call.sinks.dtype)
        return Gradients(dq, dk, dv, grad_bias, grad_sinks)

    def _packed(self, call: Call, out: Tensor, lse: Optional[Tensor]) -> tuple[bytes, Any]:
        """attnhub_cpu_call of a call, and what must live until it returns.

        One call on tiny tensors is to take no longer than torch's own (4 us): nothing is read twice here, and a call without mask
        data makes no ctypes object.
        """
        q, k, v, mask = call.q, call.k, call.v, call.mask
        batch, q_heads, len_q, dim = q.shape
        _, kv_heads, len_k, v_dim = v.shape
        q0, q1, q2, _ = q.stride()
        k0, k1, k2, _ = k.stride()
        v0, v1, v2, _ = v.stride()
        o0, o1, o2, _ = out.stride()
        flags, parts, seed, offset, keep = 0, 0, 0, 0, None
        if mask is not FULL:
            flags = (1 if mask.causal else 0) | (2 if mask.align == "top_left" else 0)
        if call.sinks is not None or call.varlen is not None or call.block_table is not None or not _is_plain(mask):
            keep = _mask_parts(call)
            parts = ctypes.addressof(keep[0])
        if call.dropout_p:
            assert call.rng is not None
            seed, offset = (word % 2**64 for word in call.rng.tolist())
        return _pack(
            2, self._dtype, self._isa, flags, _threads(),
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(),
            batch, q_heads, kv_heads, len_q, len_k, dim, v_dim,
            q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2,
            call.softmax_scale, call.softcap, call.dropout_p, seed, offset, parts, 0, 0,
        ), keep  # fmt: skip

    def _raise(self, status: int) -> None:
        text = "attnhub's cpu backend: " + self._library.attnhub_cpu_last_error().decode()
        if status == library.INVALID:
            raise ValueError(text)
        raise MemoryError(text) if status == library.NO_MEMORY else RuntimeError(text)


def _is_plain(mask: Mask) -> bool:
    """Whether nothing but causal and the alignment is in a mask."""
    return mask is FULL or (
        mask.window == (-1, -1) and mask.seqused_k is None and mask.bool_mask is None and mask.bias is None and mask.leftpad is None
        and not mask.chunk and mask.prefix is None and mask.segments is None and mask.blocks is None and mask.alibi is None
        and mask.block_sparse is None
    )  # fmt: skip


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype and with whole rows: gradients come as autograd made them, expanded ones included."""
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _broadcast_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides in elements, 0 where a dimension of size 1 stands for every index."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride()))


def _mask_parts(call: Call) -> tuple[library.Mask, list[Tensor]]:
    """attnhub_cpu_mask of a call, and the tensors whose memory it points to."""
    mask, parts, keep = call.mask, library.Mask(), []

    def pointer(tensor: Tensor) -> int:
        keep.append(tensor)
        return tensor.data_ptr()

    def strided(name: str, tensor: Tensor) -> None:
        setattr(parts, name, pointer(tensor))
        setattr(parts, name + "_strides", _broadcast_strides(tensor))

    parts.window_left, parts.window_right = mask.window
    parts.chunk = mask.chunk
    for name in ("seqused_k", "leftpad", "prefix"):
        lengths = getattr(mask, name)
        if lengths is not None:
            setattr(parts, name, pointer(lengths.contiguous()))
    if mask.segments is not None:
        strided("segment_q", mask.segments[0])
        strided("segment_k", mask.segments[1])
    if mask.blocks is not None:
        strided("block_q", mask.blocks[0])
        strided("block_k", mask.blocks[1])
    if mask.bool_mask is not None:
        strided("bool_mask", mask.bool_mask)
    if mask.bias is not None:
        bias = mask.bias.detach()
        if bias.dtype not in _BIAS_DTYPES:
            bias = bias.to(torch.float32)
        strided("bias", bias)
        parts.bias_dtype = _BIAS_DTYPES[bias.dtype]
    if mask.alibi is not None:
        slopes = mask.alibi.detach()
        strided("alibi", slopes if slopes.ndim == 2 else slopes[None])
    if mask.block_sparse is not None:
        strided("block_sparse", mask.block_sparse)
        parts.block_sparse_rows, parts.block_sparse_keys = mask.block_size
    if call.sinks is not None:
        parts.sinks = pointer(call.sinks.detach().to(torch.float32).contiguous())
    if call.varlen is not None:
        parts.cu_seqlens_q = pointer(call.varlen.cu_seqlens_q.contiguous())
        if call.block_table is None:
            parts.cu_seqlens_k = pointer(call.varlen.cu_seqlens_k.contiguous())
        parts.num_sequences = call.varlen.cu_seqlens_q.shape[0] - 1
    if call.block_table is not None:
        strided("block_table", call.block_table)
        parts.max_pages = call.block_table.shape[1]
        parts.num_pages = call.k.shape[0]
    return parts, keep
