"""New tokens in the decode kernel's launch: which calls may bring them, and how they are told to the kernel (kernels/decode/append.cuh)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnhub.backend import Append, Call
from attnhub.backends.cuda import fields
from attnhub.runtime import alignment

#: New tokens of a sequence; every block that attends to them rotates them once more.
MOST_TOKENS = 16
#: Values of `DecodeVariant.append`.
NONE, TOKENS, ROTARY = range(3)
NAMES = {TOKENS: "new tokens", ROTARY: "new tokens and rotary"}


def needed(call: Call) -> int:
    """The variant that a call needs: NONE where its tokens, if it has any, must be appended before the launch."""
    append, k, v = call.append, call.k, call.v
    if append is None or call.varlen is not None or not 1 <= append.k.shape[2] <= MOST_TOKENS:
        return NONE
    new = (append.k, append.v)
    if any(t.dtype != k.dtype or t.stride(3) != 1 for t in new) or alignment(*new) < 16:
        return NONE
    if any(stride == 0 and size > 1 for t in (k, v) for size, stride in zip(t.shape, t.stride())) or not apart(call)(*new, k, v):
        return NONE
    rotary = append.rotary
    if rotary is None:
        return TOKENS
    cos, sin = rotary.cos, rotary.sin
    pairs_of_columns = cos.shape[1] and cos.shape[1] % 2 == 0
    same = cos.dtype == sin.dtype and cos.stride() == sin.stride() and (cos.shape[1] == 1 or cos.stride(1) == 1)
    return ROTARY if pairs_of_columns and same and cos.dtype in (torch.float32, k.dtype) else NONE


def apart(call: Call) -> Callable[[Tensor, Tensor, Tensor, Tensor], bool]:
    """Whether new tokens k, v lie in other memory than a cache, for tensors of the call's shapes and strides: others read them while it is written."""
    assert call.append is not None
    new_k, new_v, k, v = (_extent(t) for t in (call.append.k, call.append.v, call.k, call.v))

    def check(new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor) -> bool:
        a, b, c, d = new_keys.data_ptr(), new_values.data_ptr(), keys.data_ptr(), values.data_ptr()
        return not (-new_k < a - c < k or -new_k < a - d < v or -new_v < b - c < k or -new_v < b - d < v)

    return check


def _extent(t: Tensor) -> int:
    """Bytes from the first to the last element."""
    return t.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())))


def shapes(append: Append | None) -> tuple[object, ...] | None:
    """All of an append that the kernel's argument holds but addresses, as part of a key."""
    if append is None:
        return None
    k, v, rotary = append
    angles = None if rotary is None else (rotary.cos.shape, rotary.cos.stride(0), rotary.cos.dtype, *rotary[2:])
    return (k.shape[2], k.stride(), v.stride(), angles)


def pointers(append: Append | None) -> tuple[int, int, int, int]:
    """new_k, new_v, cos, sin."""
    if append is None:
        return 0, 0, 0, 0
    k, v, rotary = append
    if rotary is None:
        return k.data_ptr(), v.data_ptr(), 0, 0
    return k.data_ptr(), v.data_ptr(), rotary.cos.data_ptr(), rotary.sin.data_ptr()


def strides(append: Append | None) -> tuple[int, ...]:
    """new_k_strides, new_v_strides, angle_stride."""
    if append is None:
        return (0,) * 7
    rotary = append.rotary
    return (*fields.strides(append.k), *fields.strides(append.v), 0 if rotary is None else rotary.cos.stride(0))


def numbers(call: Call) -> tuple[int, ...]:
    """new_tokens, cache_rows, rotary_half, rotary_positions, interleaved, one_position, narrow_angles."""
    append = call.append
    if append is None:
        return (0,) * 7
    new, rows, rotary = append.k.shape[2], call.k.shape[0], append.rotary
    if rotary is None:
        return (new, rows, 0, 0, 0, 0, 0)
    positions, half = rotary.cos.shape
    return (new, rows, half, min(positions, (1 << 31) - 1), rotary.interleaved, rotary.one_position, rotary.cos.dtype != torch.float32)
