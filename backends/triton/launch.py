"""Launching a kernel without Triton's per-call binding once it is compiled.

Triton binds and specialises every argument at every call, and these kernels have about seventy. The compiled kernel is
therefore kept under a key of our own, which holds whatever Triton specialises on: exact values of strides and constants,
dtypes, alignment of pointers, which arguments are absent. Lengths and scales are not part of it.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from attnhub import config
from attnhub.backend import PrepareError
from attnhub.backends.triton.tiles import Tiles
from attnhub.reasons import Code, Reason

#: From here on a compiled kernel takes all of its function's arguments, the constants too.
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
#: Keys grow with every new shape of contiguous tensors: the oldest half goes when they pass this number.
_MOST = 2048
_compiled: dict[tuple[Any, ...], Any] = {}
_names: dict[Any, tuple[tuple[str, ...], tuple[bool, ...]]] = {}


def launch(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Run a Triton kernel over a one-dimensional grid on the current device and stream. arguments: all of the kernel's, by name."""
    if programs >= 2**31:
        raise PrepareError(Reason(Code.TOO_LARGE, f"{programs} programs; a grid holds fewer than 2^31"))
    grid = (programs, 1, 1)
    # Multiply-adds may be fused; newer Tritons want that said.
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True}
    if not _DIRECT or config.triton_interpret():
        kernel[grid](**arguments, **options)
        return
    known = _names.get(kernel.fn)
    if known is None:
        known = tuple(p.name for p in kernel.params), tuple(bool(p.do_not_specialize) for p in kernel.params)
        _names[kernel.fn] = known
    values = [arguments[name] for name in known[0]]
    key: list[Any] = [kernel.fn, tiles.num_warps, tiles.num_stages]
    for value, runtime in zip(values, known[1]):
        if isinstance(value, Tensor):
            key.append((value.dtype, value.data_ptr() % 16 == 0, value.device))
        elif runtime:
            # The type of a length is its width: 32 bits where it fits.
            key.append(isinstance(value, float) or -(2**31) <= value < 2**31)
        else:
            key.append(value)
    signature = tuple(key)
    compiled = _compiled.get(signature)
    if compiled is not None:
        compiled[grid](*values)
        return
    compiled = kernel[grid](**arguments, **options)
    if len(_compiled) >= _MOST:
        for old in list(_compiled)[: _MOST // 2]:
            _compiled.pop(old, None)
    _compiled[signature] = compiled
