"""Tensor maps, by which the copy engine of compute capability 9.0 addresses a tensor: encoded by the driver, through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from torch import Tensor

from attnhub.backend import PrepareError
from attnhub.reasons import Code, Reason

SIZE = 128
#: Columns of a box: 128 bytes, the width of the swizzle.
BOX_COLUMNS = 64
#: Of a dimension that the map leaves out.
_ANY_STRIDE = 128
_MOST_BYTES = 1 << 40
_DTYPES = {"float16": 6, "bfloat16": 9}
_RANK = 4
_NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_256_BYTES, _ZEROS_OUTSIDE = 0, 3, 3, 0


@cache
def _driver() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        encode = library.cuTensorMapEncodeTiled
        replace = library.cuTensorMapReplaceAddress
    except (OSError, AttributeError) as error:
        raise PrepareError(
            Reason(Code.NO_DEVICE, f"the driver has no tensor maps: {error}", "Install a driver of CUDA 12.0 or later.")
        ) from error
    encode.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    replace.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


def steps(x: Tensor) -> int:
    """Which of a tensor's heads (1) and sequences (2) lie apart: the map leaves out dimensions of stride 0."""
    return (x.shape[1] > 1 and x.stride(1) != 0) + 2 * (x.shape[0] > 1 and x.stride(0) != 0)


def addressable(x: Tensor) -> bool:
    """Whether a map can describe [B, H, S, D]: tokens apart, rows in one piece, everything in multiples of 16 bytes."""
    strides, item = x.stride(), x.element_size()
    if x.data_ptr() % 16 or strides[3] != 1 or (x.shape[2] > 1 and strides[2] == 0):
        return False
    return all(size == 1 or (stride * item % 16 == 0 and stride * item < _MOST_BYTES) for size, stride in zip(x.shape[:3], strides[:3]))


def encode(target: int, x: Tensor, rows: int) -> None:
    """Writes the map of x [B, H, S, D], as (D, S, H, B) in boxes of ``rows`` tokens, to the address ``target`` (a multiple of 64)."""
    item, wanted = x.element_size(), steps(x)
    shape, strides = x.shape, x.stride()
    dims = (shape[3], shape[2], shape[1] if wanted & 1 else 1, shape[0] if wanted & 2 else 1)
    apart = (
        strides[2] * item if shape[2] > 1 else _ANY_STRIDE,
        strides[1] * item if wanted & 1 else _ANY_STRIDE,
        strides[0] * item if wanted & 2 else _ANY_STRIDE,
    )
    status = _driver().cuTensorMapEncodeTiled(
        target, _DTYPES[str(x.dtype)[6:]], _RANK, x.data_ptr(), (ctypes.c_uint64 * _RANK)(*dims), (ctypes.c_uint64 * (_RANK - 1))(*apart),
        (ctypes.c_uint32 * _RANK)(BOX_COLUMNS, rows, 1, 1), (ctypes.c_uint32 * _RANK)(1, 1, 1, 1), _NO_INTERLEAVE, _SWIZZLE_128_BYTES,
        _PROMOTE_256_BYTES, _ZEROS_OUTSIDE,
    )  # fmt: skip
    if status:
        raise PrepareError(
            Reason(
                Code.ALIGNMENT if x.data_ptr() % 16 else Code.STRIDE,
                f"the driver makes no tensor map of a tensor at {x.data_ptr():#x} with shape {tuple(shape)} and strides {strides} (error {status})",
                "Make the tensor contiguous; its pointer must be a multiple of 16 bytes.",
            )
        )


def move(target: int, address: int) -> None:
    """The same map for a tensor at another address."""
    status = _driver().cuTensorMapReplaceAddress(target, address)
    if status:
        raise PrepareError(
            Reason(
                Code.ALIGNMENT,
                f"the driver makes no tensor map at {address:#x} (error {status})",
                "Pointers must be multiples of 16 bytes.",
            )
        )
