"""The node by any backend: the native library calls back here, and `attnhub.attention` computes on ONNX Runtime's own memory.

The library has checked and normalised everything: what arrives is the same struct that the cpu backend's kernels take. Tensors are
views of it; nothing is copied but the result, into the output that ONNX Runtime allocated (and what another device needs).
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.api import attention
from attnhub.backends.cpu.library import CALL
from attnhub.backends.cpu.library import Mask as MaskStruct
from attnhub.mask import Mask

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char), ctypes.c_int64)
#: By attnhub_cpu_dtype.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAUSAL, _TOP_LEFT = 1, 2


@functools.cache
def number_of(library: Any, backend: str, device: Optional[str]) -> int:
    """The number by which session options name the callback of this choice. Made once; the library keeps it as long as it lives."""

    def run(call: int, reason: Any, size: int) -> int:
        try:
            _compute(call, backend, device)
        except BaseException as error:  # an exception cannot cross C
            text = f"{type(error).__name__}: {error}".encode()[: size - 1]
            ctypes.memmove(reason, text + b"\0", len(text) + 1)
            return 1
        return 0

    function = _CALLBACK(run)
    _kept.append(function)
    library.attnhub_onnx_add_callback.restype = ctypes.c_int64
    library.attnhub_onnx_add_callback.argtypes = [_CALLBACK]
    return int(library.attnhub_onnx_add_callback(function))


#: ctypes frees a function that nothing holds.
_kept: list[Any] = []


def _compute(address: int, backend: str, device: Optional[str]) -> None:
    values = CALL.unpack(ctypes.string_at(address, CALL.size))
    dtype, flags = _DTYPES[values[1]], values[3]
    q_address, k_address, v_address, out_address, lse_address = values[5:10]
    batch, q_heads, kv_heads, seqlen_q, seqlen_k, head_dim, v_head_dim = values[10:17]
    softmax_scale, softcap = values[29:31]
    mask = MaskStruct.from_address(values[34])
    move: Callable[[Tensor], Tensor] = (lambda tensor: tensor) if device is None else (lambda tensor: tensor.to(device))
    q = move(_view(q_address, (batch, q_heads, seqlen_q, head_dim), dtype))
    k = move(_view(k_address, (batch, kv_heads, seqlen_k, head_dim), dtype))
    v = move(_view(v_address, (batch, kv_heads, seqlen_k, v_head_dim), dtype))
    sinks = None if not mask.sinks else move(_view(mask.sinks, (q_heads,), torch.float32))
    with torch.no_grad():
        found = attention(
            q, k, v, _mask(mask, flags, (batch, q_heads, seqlen_q, seqlen_k), move), softmax_scale=softmax_scale, softcap=softcap, sinks=sinks,
            return_lse=bool(lse_address), backend=backend,
        )  # fmt: skip
    out, lse = found if isinstance(found, tuple) else (found, None)
    _view(out_address, (batch, q_heads, seqlen_q, v_head_dim), dtype).copy_(out)
    if lse is not None:
        _view(lse_address, (batch, q_heads, seqlen_q), torch.float32).copy_(lse)


def _mask(mask: Any, flags: int, sizes: tuple[int, int, int, int], move: Callable[[Tensor], Tensor]) -> Mask:
    batch, q_heads = sizes[:2]

    def lengths(address: Optional[int]) -> Optional[Tensor]:
        return None if not address else move(_view(address, (batch,), torch.int32))

    def broadcast(address: Optional[int], strides: Sequence[int], full: Sequence[int], dtype: torch.dtype) -> Optional[Tensor]:
        # A stride of 0 is a dimension of size 1 that broadcasts; what is left is contiguous.
        return None if not address else move(_view(address, [size if stride else 1 for size, stride in zip(full, strides)], dtype))

    alibi = broadcast(mask.alibi, mask.alibi_strides, (batch, q_heads), torch.float32)
    return Mask(
        causal=bool(flags & _CAUSAL),
        align="top_left" if flags & _TOP_LEFT else "bottom_right",
        window=(mask.window_left, mask.window_right),
        chunk=mask.chunk,
        seqused_k=lengths(mask.seqused_k),
        leftpad=lengths(mask.leftpad),
        bool_mask=broadcast(mask.bool_mask, mask.bool_mask_strides, sizes, torch.bool),
        bias=broadcast(mask.bias, mask.bias_strides, sizes, _DTYPES[mask.bias_dtype]),
        alibi=alibi if alibi is None or alibi.shape[0] == batch else alibi[0],
    )


def _view(address: Optional[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on memory that somebody else owns."""
    elements = math.prod(shape)
    if not elements or not address:
        return torch.empty(tuple(shape), dtype=dtype)
    buffer = (ctypes.c_char * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(tuple(shape))
