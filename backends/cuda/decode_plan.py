"""Launching the decode kernel: one launch, in which the warp that comes last to a row merges its parts."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.backend import Append, Call, PrepareError, Repeat
from attnhub.backends.cuda import decode, decode_append, decode_params
from attnhub.backends.cuda.decode import DecodeVariant
from attnhub.backends.cuda.fields import alibi_batch_stride, limits, scales, strides
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

log = logging.getLogger("attnhub")

#: Launches by shape that are remembered, in each thread.
_LIMIT = 256
#: Tickets for launches in graphs, and the fewest of a stream, see `_Scratch`.
_CAPTURED, _FEWEST_TICKETS = 1 << 20, 1024
#: Streams whose scratch is kept, and of how many partial sums (16 MiB): longer launches do not wait for the host.
_STREAMS, _MOST_KEPT = 64, 4 << 20
#: Shared memory of a multiprocessor where torch does not say it, and what each block takes beside its own.
_SHARED_BYTES, _RESERVED_BYTES = 100 * 1024, 1024


@lru_cache
def slots(index: int, shared_bytes: int) -> int:
    """Blocks that a device runs at a time."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_multiprocessor", _SHARED_BYTES)
    return properties.multi_processor_count * max(1, shared // (shared_bytes + _RESERVED_BYTES))


class _Scratch:
    """What the splits of a launch leave in memory: partial sums, and tickets, which are zeros that blocks count on and leave as zeros.

    One launch after the other on a stream may use the same. A graph may be replayed beside anything, so that each launch in one has its own:
    partial sums from the graph's memory, and tickets from a store that is never given back, since filling some would be a node more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_stream: dict[tuple[int, int], _Pair] = {}
        self._store: dict[int, tuple[Tensor, int]] = {}

    def prepare(self, index: int) -> None:
        """Makes the store of a device, unless a graph is being captured."""
        with self._lock:
            if index not in self._store and not is_capturing():
                self._store[index] = (lasting(lambda: _zeros(_CAPTURED, index), index), 0)
                torch.cuda.synchronize(index)  # whatever stream uses them, they are zeros

    def take(self, partial: int, tickets: int, index: int, stream: int) -> _Pair:
        """At least so many partial sums and tickets, for a launch on the current stream ``stream`` of the current device ``index``."""
        if stream and is_capturing():  # the default stream cannot be
            return _Pair(_floats(partial, index), self._captured(tickets, index))
        if partial > _MOST_KEPT:
            return _Pair(_floats(partial, index), self.take(0, tickets, index, stream).tensors[1])
        found = self._by_stream.get((index, stream))
        if found is None or found.partial_size < partial or found.tickets_size < tickets:
            if found is not None:
                partial, tickets = max(partial, found.partial_size), max(tickets, found.tickets_size)
            tickets = max(tickets, _FEWEST_TICKETS)
            made = _Pair(lasting(lambda: _floats(partial, index), index), lasting(lambda: _zeros(tickets, index), index))
            # Those that are given up may still be in use: torch gives their memory away when the stream has come to this point.
            with self._lock:
                found = remember(self._by_stream, (index, stream), made, _STREAMS)
        return found

    def _captured(self, count: int, index: int) -> Tensor:
        with self._lock:
            store, used = self._store.get(index, (None, 0))
            if store is None or used + count > _CAPTURED:
                return _zeros(count, index)
            self._store[index] = (store, used + count)
            return store[used : used + count]


class _Pair:
    """Partial sums and tickets. Kept until the launch, since meanwhile another thread may have larger ones made for the stream."""

    __slots__ = ("partial_at", "partial_size", "tensors", "tickets_at", "tickets_size")

    def __init__(self, partial: Tensor, tickets: Tensor) -> None:
        self.tensors = partial, tickets
        self.partial_at, self.tickets_at = partial.data_ptr(), tickets.data_ptr()
        self.partial_size, self.tickets_size = partial.shape[0], tickets.shape[0]


def _floats(count: int, index: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=torch.device("cuda", index))


def _zeros(count: int, index: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", index))


_scratch = _Scratch()


class Launch:
    """All that calls of the same shapes, strides and numbers have in common. Used by one thread."""

    def __init__(self, variant: DecodeVariant, call: Call, index: int, kernel: Kernel) -> None:
        q, k, v, mask = call.q, call.k, call.v, call.mask
        batch, q_heads, seqlen_q, _ = q.shape
        kv_heads, group = k.shape[1], q_heads // k.shape[1]
        page_size, pages = (k.shape[2], call.block_table.shape[1]) if call.block_table is not None else (0, 0)
        seqlen_k = page_size * pages if page_size else k.shape[2]
        out = empty_out(q, v.shape[3])

        varlen, sequences, longest = call.varlen, batch, seqlen_q
        if varlen is not None:
            sequences, longest = varlen.cu_seqlens_q.shape[0] - 1, max(1, min(seqlen_q, varlen.max_seqlen_q))
        row_tiles = -(-group * longest // decode.ROWS)
        # Packed: one sequence more for the tokens behind the last one.
        self.tiles = (sequences + (varlen is not None)) * kv_heads * row_tiles
        tile_rows = min(decode.ROWS, group * longest)
        splits = decode.split_count(self.tiles, seqlen_k, variant.warps, slots(index, variant.shared_bytes), tile_rows)
        self.grid = (self.tiles * splits, 1, 1)
        #: Rows of tiles, if they are split.
        self.rows = 0 if splits == 1 else self.tiles * tile_rows
        #: fp32 values that splits leave: rows of out, and two for each row.
        self.partial = self.rows * splits * (-(-v.shape[3] // 16) * 16 + 2)
        self.index = index
        #: Of what a launch makes: shape, strides, dtype.
        self.out = tuple(out.shape), out.stride(), out.dtype
        self.lse = (batch, q_heads, seqlen_q), (q_heads * seqlen_q, seqlen_q, 1), torch.float32

        whole = v.shape[3] % 4 == 0 and not any(stride % 4 for n, stride in zip(out.shape[:3], out.stride()[:3]) if n > 1)
        self.argument = Argument(decode_params.SIZE)
        decode_params.REST.pack_into(
            self.argument.buffer, decode_params.POINTERS.size, *strides(q), *strides(k), *strides(v), *strides(out), *decode_append.strides(call.append),
            sequences, q_heads, group, seqlen_q, seqlen_k, pages, tile_rows, mask.causal, mask.align == "top_left",
            *limits(mask), alibi_batch_stride(mask, q_heads), call.softmax_scale < 0, whole, *decode_append.numbers(call),
            *(part for number in (kv_heads, max(1, page_size), row_tiles, splits) for part in decode_params.divisor(number)),
            *scales(call.softmax_scale, call.softcap),
        )  # fmt: skip
        self._start, self._parameters = kernel.sized(self.grid, (variant.threads, 1, 1), variant.shared_bytes), self.argument.parameters

    def start(self, stream: int, *pointers: int) -> None:
        """Launches the kernel. pointers: `decode_params.POINTERS`."""
        decode_params.POINTERS.pack_into(self.argument.buffer, 0, *pointers)
        self._start(stream, self._parameters, 0)


class _Launches(threading.local):
    """Of one thread: launches by shape."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], Launch] = {}


class DecodePlan(CubinPlan):
    """One compiled variant, and those that append new tokens, which are made when they are first asked for.

    another: makes the plan of another variant, ready on the current device; raises `PrepareError`.
    """

    def __init__(self, variant: DecodeVariant, cubin: str, another: Optional[Callable[[DecodeVariant], DecodePlan]] = None) -> None:
        super().__init__(cubin, variant.shared_bytes)
        self.variant = variant
        self._launches = _Launches()
        self._another = another
        self._appending: dict[int, Optional[DecodePlan]] = {}

    def load(self, index: int) -> Kernel:
        _scratch.prepare(index)
        return super().load(index)

    def appends(self, call: Call) -> bool:
        kind = decode_append.needed(call)
        return kind != decode_append.NONE and self._appender(kind, call.q.get_device()) is not None

    def _appender(self, kind: int, index: int) -> Optional[DecodePlan]:
        """The plan that appends, loaded on a device; None if there is none, or if it would have to be loaded while a graph is captured."""
        if kind not in self._appending:
            if self._another is None or is_capturing():
                return None
            try:
                plan: Optional[DecodePlan] = self._another(dataclasses.replace(self.variant, append=kind))
            except PrepareError as error:
                log.warning("cuda appends new tokens by torch operations, before its launch: %s", error.reason)
                plan = None
            self._appending.setdefault(kind, plan)
        found = self._appending[kind]
        return None if found is None or (index not in found._kernels and is_capturing()) else found

    def _launch(self, call: Call, index: int) -> tuple[Tensor, Optional[Tensor]]:
        if self.variant.append == decode_append.NONE and call.append is not None:
            appender = self._appending[decode_append.needed(call)]
            assert appender is not None
            return appender._launch(call, index)
        launch = self._find(call, index)
        kept: list[Tensor] = []
        mask = call.mask
        starts = None if call.varlen is None else call.varlen.cu_seqlens_q
        data = tuple(pointer(x, kept) for x in (starts, mask.seqused_k, mask.leftpad, mask.prefix, call.block_table, call.sinks, mask.alibi))
        return self._run(launch, call.q, call.k, call.v, call.need_lse, data, call.append)

    def _find(self, call: Call, index: int) -> Launch:
        launches, key = self._launches.found, self._key(call, index)
        found = launches.get(key)
        if found is None:
            found = remember(launches, key, Launch(self.variant, call, index, self._kernel(index)), _LIMIT)
        return found

    def _key(self, call: Call, index: int) -> tuple[Any, ...]:
        q, k, v, mask, table, varlen = call.q, call.k, call.v, call.mask, call.block_table, call.varlen
        return (
            index, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), call.softmax_scale, call.softcap, mask.structure,
            None if table is None else table.shape[1], None if varlen is None else (varlen.cu_seqlens_q.shape[0], varlen.max_seqlen_q), None if mask.alibi is None else mask.alibi.ndim,
            decode_append.shapes(call.append),
        )  # fmt: skip

    def _run(
        self, launch: Launch, q: Tensor, k: Tensor, v: Tensor, need_lse: bool, data: tuple[int, ...], append: Optional[Append] = None
    ) -> tuple[Tensor, Optional[Tensor]]:
        stream = raw_stream(launch.index)
        out = empty_strided(*launch.out)
        lse = empty_strided(*launch.lse) if need_lse else None
        scratch = _scratch.take(launch.partial, launch.rows, launch.index, stream) if launch.partial else None
        launch.start(
            stream, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), *data,
            0 if scratch is None else scratch.partial_at, 0 if scratch is None else scratch.tickets_at, *decode_append.pointers(append),
        )  # fmt: skip
        return out, lse

    def repeat(self, call: Call) -> Optional[Repeat]:
        if self.variant.append == decode_append.NONE and call.append is not None:
            appender = self._appending.get(decode_append.needed(call))
            return None if appender is None else appender.repeat(call)
        mask, table, need_lse = call.mask, call.block_table, call.need_lse
        if any(x is not None and not x.is_contiguous() for x in (mask.seqused_k, table)):
            return None
        index = call.q.get_device()
        key, here = self._key(call, index), LaunchOfThread()
        apart = None if call.append is None else decode_append.apart(call)

        def again(
            q: Tensor, k: Tensor, v: Tensor, seqused_k: Optional[Tensor] = None, block_table: Optional[Tensor] = None, append: Optional[Append] = None
        ) -> Optional[tuple[Tensor, Optional[Tensor]]]:
            launch = here.launch
            if launch is None:
                launch = here.launch = self._launches.found.get(key)
                if launch is None:
                    return None  # the first call of a thread
            if index != current_device() or (apart is not None and append is not None and not apart(append.k, append.v, k, v)):
                return None
            data = (0, 0 if seqused_k is None else seqused_k.data_ptr(), 0, 0, 0 if block_table is None else block_table.data_ptr(), 0, 0)
            return self._run(launch, q, k, v, need_lse, data, append)

        return again

    def describe(self) -> dict[str, Any]:
        made = [kind for kind, plan in sorted(self._appending.items()) if plan is not None]
        appended = {"append": [decode_append.NAMES[kind] for kind in made]} if made else {}
        return {**self.variant.describe(), **appended}
