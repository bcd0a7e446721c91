"""Launching the Hopper kernel: one struct per shape, whose tensor maps are moved to each call's tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.backend import Call, Plan, Repeat
from attnhub.backends.cuda import tensor_map
from attnhub.backends.cuda.fields import alibi_batch_stride, limits, scales, strides
from attnhub.backends.cuda.hopper import HopperVariant
from attnhub.backends.cuda.hopper_params import LAYOUT, MAPS_AT, POINTERS, POINTERS_AT
from attnhub.backends.cuda.loading import (
    Argument,
    CubinPlan,
    Kernel,
    LaunchOfThread,
    current_device,
    empty_strided,
    is_capturing,
    lasting,
    pointer,
    raw_stream,
    remember,
)
from attnhub.layouts import empty_out

#: K and V of the heads that take turns should stay in L2 (50 MB), beside what is read ahead where memory is the bound: see kernels/hopper/schedule.cuh.
_SECTION_BYTES, _SHORT_SECTION_BYTES = 24 << 20, 12 << 20
#: Queries from which tiles go in phases, of which there are at most so many.
_LONG, _PHASES = 2048, 31
#: The kernel's tanh is exact to a few 1e-7, and its error is multiplied by the softcap.
_LARGEST_SOFTCAP = 1000.0
_ROWS = 64  # of a warpgroup: boxes of Q and of out
#: Launches by shape that are remembered, in each thread, and maps of one of their tensors.
_LIMIT, _MAPS = 256, 64


def serves(variant: HopperVariant, call: Call) -> bool:
    """Whether the kernel serves a call: what the copy engine can address, numbers that it knows, and rows of out in pieces of 16 bytes where
    they leave from the registers.
    """
    return (
        call.softmax_scale >= 0
        and call.softcap <= _LARGEST_SOFTCAP
        and all(map(tensor_map.addressable, (call.q, call.k, call.v)))
        and not (variant.tiles.out_direct and call.v.shape[3] % 8)
    )


@lru_cache
def processors(index: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


class Launch:
    """All that calls of the same shapes, strides and numbers have in common. Used by one thread."""

    def __init__(self, variant: HopperVariant, call: Call, index: int, blocks: int, kernel: Kernel) -> None:
        q, k, v, mask, varlen = call.q, call.k, call.v, call.mask, call.varlen
        batch, q_heads, seqlen_q, head_dim = q.shape
        kv_heads, seqlen_k, v_head_dim = k.shape[1], k.shape[2], v.shape[3]
        out = empty_out(q, v_head_dim)
        self.index = index
        #: Of what a launch makes: shape, strides, dtype.
        self.out = tuple(out.shape), out.stride(), out.dtype
        self.lse = (batch, q_heads, seqlen_q), (q_heads * seqlen_q, seqlen_q, 1), torch.float32

        rows, sequences = variant.rows, batch if varlen is None else varlen.cu_seqlens_q.shape[0] - 1
        q_tiles = -(-seqlen_q // rows)
        # Packed: the slots of schedule.cuh.
        tiles = q_heads * (batch * q_tiles if varlen is None else seqlen_q // rows + sequences + 1)
        self.grid = (min(tiles, blocks), 1, 1)
        # Tiles that differ in length are handed out as blocks become free.
        self.uneven = varlen is not None or variant.left or variant.right or mask.seqused_k is not None
        by_position = varlen is None and (variant.left or variant.right)
        head_bytes = max(1, seqlen_k * (head_dim + v_head_dim) * 2 * kv_heads // q_heads)

        short = seqlen_q < _LONG
        section_bytes = _SHORT_SECTION_BYTES if short else _SECTION_BYTES
        self.argument = Argument(LAYOUT.size)
        LAYOUT.pack_into(
            self.argument.buffer, 0, b"", b"", b"", b"", *(0 for _ in range(POINTERS.size // 8)),
            *strides(q), *strides(k), *strides(v), *out.stride()[:3],
            sequences, q_heads, q_heads // kv_heads, seqlen_q, seqlen_k, head_dim, v_head_dim, q_tiles, tiles,
            max(1, section_bytes // head_bytes), by_position * (1 if short else _PHASES), mask.align == "top_left", mask.causal,
            *limits(mask), alibi_batch_stride(mask, q_heads), tensor_map.addressable(out),
            tensor_map.steps(q), tensor_map.steps(k), tensor_map.steps(v),
            *scales(call.softmax_scale, call.softcap),
        )  # fmt: skip
        tensors, rows_of_boxes = [q, k, v], (_ROWS, variant.tiles.keys, variant.tiles.keys, _ROWS)
        if tensor_map.addressable(out):
            tensors.append(out)
        for at, x, box_rows in zip(MAPS_AT, tensors, rows_of_boxes):
            tensor_map.encode(self.argument.address + at, x, box_rows)
        #: Where the tensors of the maps lie, and by that the maps that were used before: asking the driver takes three times as long.
        self._moved = [x.data_ptr() for x in tensors]
        self._maps: list[dict[int, bytes]] = [{} for _ in tensors]
        self._start, self._parameters = kernel.sized(self.grid, (variant.threads, 1, 1), variant.shared_bytes), self.argument.parameters

    def start(self, stream: int, addresses: list[int], others: tuple[int, ...]) -> None:
        """Launches the kernel. addresses: of q, k, v and out; others: pointers from ``lse`` on."""
        if addresses != self._moved:
            self._move(addresses)
        POINTERS.pack_into(self.argument.buffer, POINTERS_AT, *addresses, *others)
        self._start(stream, self._parameters, 0)

    def _move(self, addresses: list[int]) -> None:
        buffer, moved = self.argument.buffer, self._moved
        for n, maps in enumerate(self._maps):
            address = addresses[n]
            if address != moved[n]:
                at = MAPS_AT[n]
                made = maps.get(address)
                if made is None:
                    tensor_map.move(self.argument.address + at, address)
                    if len(maps) >= _MAPS:
                        maps.clear()
                    maps[address] = bytes(buffer[at : at + tensor_map.SIZE])
                else:
                    buffer[at : at + tensor_map.SIZE] = made
                moved[n] = address


class _Memory(threading.local):
    """Of one thread: its launches by shape, and the counters of its streams."""

    def __init__(self) -> None:
        self.launches: dict[tuple[Any, ...], Launch] = {}
        self.counters: dict[tuple[int, int], Tensor] = {}


_memory = _Memory()


class HopperPlan(CubinPlan):
    """One compiled variant. Calls that it cannot serve go to the portable kernel, made when first needed."""

    def __init__(self, variant: HopperVariant, cubin: str, portable: Callable[[], Plan]) -> None:
        super().__init__(cubin, variant.shared_bytes)
        self.variant = variant
        self._make_portable = portable
        self._portable: Optional[Plan] = None

    def _launch(self, call: Call, index: int) -> tuple[Tensor, Optional[Tensor]]:
        q, k, v, mask, varlen = call.q, call.k, call.v, call.mask, call.varlen
        if not serves(self.variant, call):
            if self._portable is None:
                self._portable = self._make_portable()
            return self._portable.forward(call)
        key = self._key(call, index)
        launch = _memory.launches.get(key)
        if launch is None:
            kernel = self._kernel(index)  # makes the context current in a new thread, without which the driver makes no tensor map
            launch = remember(_memory.launches, key, Launch(self.variant, call, index, processors(index), kernel), _LIMIT)
        kept: list[Tensor] = []
        data = (
            0 if varlen is None else pointer(varlen.cu_seqlens_q, kept), 0 if varlen is None else pointer(varlen.cu_seqlens_k, kept),
            pointer(mask.seqused_k, kept), pointer(mask.leftpad, kept), pointer(mask.prefix, kept), pointer(call.sinks, kept),
            pointer(mask.alibi, kept),
        )  # fmt: skip
        return self._run(launch, q, k, v, call.need_lse, data)

    def _key(self, call: Call, index: int) -> tuple[Any, ...]:
        q, k, v, mask, varlen = call.q, call.k, call.v, call.mask, call.varlen
        return (
            self, index, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), call.softmax_scale, call.softcap, mask.structure,
            None if varlen is None else varlen.cu_seqlens_q.shape[0], None if mask.alibi is None else mask.alibi.ndim,
        )  # fmt: skip

    def _run(
        self, launch: Launch, q: Tensor, k: Tensor, v: Tensor, need_lse: bool, data: tuple[int, ...]
    ) -> tuple[Tensor, Optional[Tensor]]:
        stream = raw_stream(launch.index)
        out = empty_strided(*launch.out)
        lse = empty_strided(*launch.lse) if need_lse else None
        counters = _counters(launch.index, stream) if launch.uneven else None
        launch.start(
            stream, [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()],
            (0 if lse is None else lse.data_ptr(), *data, 0 if counters is None else counters.data_ptr()),
        )  # fmt: skip
        return out, lse

    def repeat(self, call: Call) -> Optional[Repeat]:
        index, need_lse = call.q.get_device(), call.need_lse
        if not serves(self.variant, call) or (call.mask.seqused_k is not None and not call.mask.seqused_k.is_contiguous()):
            return None
        key, here = self._key(call, index), LaunchOfThread()

        def again(q: Tensor, k: Tensor, v: Tensor, seqused_k: Optional[Tensor] = None) -> Optional[tuple[Tensor, Optional[Tensor]]]:
            launch = here.launch
            if launch is None:
                launch = here.launch = _memory.launches.get(key)
            if launch is None or index != current_device():
                return None  # the first call of a thread
            return self._run(launch, q, k, v, need_lse, (0, 0, 0 if seqused_k is None else seqused_k.data_ptr(), 0, 0, 0, 0))

        return again

    def describe(self) -> dict[str, Any]:
        return self.variant.describe()


def _counters(index: int, stream: int) -> Tensor:
    """Two zeros, which the kernel leaves as zeros. One launch after the other on a stream may use the same.

    A graph may be replayed beside anything: what is captured has counters of its own, set to zero by the graph.
    """
    if stream and is_capturing():  # the default stream cannot be
        return _zeros(index)
    found = _memory.counters.get((index, stream))
    if found is None:
        found = _memory.counters[index, stream] = lasting(lambda: _zeros(index), index)
    return found


def _zeros(index: int) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=torch.device("cuda", index))
