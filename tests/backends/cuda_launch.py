"""What tests of the cuda backend's plans share, without a GPU: a stand-in for the driver's tensor maps, and arguments of launches as the driver reads them."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnhub.backend import Call
from attnhub.backends.cuda import hopper, hopper_params, hopper_plan, loading
from attnhub.backends.cuda.hopper import HopperVariant
from attnhub.problem import DeviceInfo, Feature, Problem

HOPPER = DeviceInfo("cuda", "nvidia", (9, 0), "H100")
PROBLEM = Problem(HOPPER, "bfloat16", "bfloat16", 128, 128, 4, 4, 2, 128, 128)


class Driver:
    """Keeps what the driver is asked for; a map is the tensor's address and zeros."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.encoded: list[dict[str, Any]] = []
        self.moved: list[tuple[int, int]] = []

    def cuTensorMapEncodeTiled(  # noqa: N802
        self, target: int, dtype: int, rank: int, address: int, dims: Any, strides: Any, box: Any, steps: Any, *rest: int
    ) -> int:
        assert not target % 64
        ctypes.memmove(target, address.to_bytes(8, "little"), 8)
        self.encoded.append(
            {"dtype": dtype, "rank": rank, "dims": tuple(dims), "strides": tuple(strides), "box": tuple(box), "steps": tuple(steps), "rest": rest}
        )
        return self.status

    def cuTensorMapReplaceAddress(self, target: int, address: int) -> int:  # noqa: N802
        ctypes.memmove(target, address.to_bytes(8, "little"), 8)
        self.moved.append((target, address))
        return self.status


def tensors(batch: int, length_q: int, length_k: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (64, 64)) -> list[Tensor]:
    shapes = ((heads[0], length_q, dims[0]), (heads[1], length_k, dims[0]), (heads[1], length_k, dims[1]))
    return [torch.randn(batch, *shape).bfloat16() for shape in shapes]


def features_of(call: Call) -> frozenset[Feature]:
    found = set(call.mask.features())
    found |= {Feature.VARLEN} if call.varlen is not None else set()
    return frozenset(found)


def launched(variant: Any, call: Call, blocks: int = 132) -> tuple[hopper_plan.Launch, list[bytes]]:
    """And the arguments of what it launches, as the driver reads them."""
    started: list[bytes] = []

    def launch(*numbers: int) -> None:
        assert numbers == (5, *found.grid, variant.threads, 1, 1, variant.shared_bytes, 9, numbers[-2], 0)
        started.append(ctypes.string_at(ctypes.c_void_p.from_address(numbers[-2]).value, hopper_params.LAYOUT.size))

    found = hopper_plan.Launch(variant, call, 0, blocks, loading.Kernel(SimpleNamespace(ptr=5), launch))
    return found, started


def packed(call: Call, rows: int, keys: int, data: tuple[int, ...] = (0,) * 7) -> tuple[bytes, HopperVariant, hopper_plan.Launch]:
    """The argument of a call for tiles of these sizes."""
    v = hopper.make("bfloat16", call.q.shape[3], call.v.shape[3], features_of(call), call.q.shape[2])
    sized = SimpleNamespace(
        rows=rows, tiles=dataclasses.replace(v.tiles, keys=keys), left=v.left, right=v.right, threads=v.threads, shared_bytes=v.shared_bytes
    )
    launch, started = launched(sized, call, 7)
    launch.start(9, [x.data_ptr() for x in (call.q, call.k, call.v, torch.empty_like(call.q))], (0, *data, 0))
    (found,) = started
    return found, v, launch


def field(argument: bytes, name: str, layout: Any = hopper_params) -> Any:
    """A field of a kernel's argument. layout: the module that declares it."""
    return struct.unpack_from("=" + dict(layout.FIELDS)[name], argument, layout.offsets()[name])[0]
