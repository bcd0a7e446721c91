"""What the arguments of all kernels have in common."""

from __future__ import annotations

import math
import struct

from torch import Tensor

from attnhub.mask import Mask

LOG2E = math.log2(math.e)
#: Windows and chunks are cut here, so that the kernels' positions cannot overflow; sequences are no longer (`TOO_LARGE`).
FAR = (1 << 30) - 1
#: Of a softmax_scale without its sign. Smaller ones are 0 in fp32, and would turn the -inf of a masked score into NaN.
SMALLEST_SCALE = 2.0**-120


def offsets(fields: tuple[tuple[str, str], ...]) -> dict[str, int]:
    """Field -> its offset in bytes. fields: (name, format) in order, without padding between them."""
    found, position = {}, 0
    for name, code in fields:
        found[name] = position
        position += struct.calcsize("=" + code)
    return found


def strides(x: Tensor) -> tuple[int, ...]:
    """Of batch (or page), head and token; that of a dimension of size 1 is arbitrary."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3]))


def limits(mask: Mask) -> tuple[int, int, int]:
    """window_left, window_right, chunk."""
    return min(mask.window[0], FAR), min(mask.window[1], FAR), min(mask.chunk, FAR)


def alibi_batch_stride(mask: Mask, q_heads: int) -> int:
    return q_heads if mask.alibi is not None and mask.alibi.ndim == 2 else 0


def scales(softmax_scale: float, softcap: float) -> tuple[float, float, float]:
    """scale_log2, cap_inner, cap_outer."""
    size = max(abs(softmax_scale), SMALLEST_SCALE)
    return size * LOG2E, 2 * LOG2E * size / softcap if softcap else 0.0, softcap * LOG2E
