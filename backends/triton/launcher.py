"""From a call to kernel launches: arguments, tiles, grids, and smaller tiles where the first choice does not fit.

A call is worked out once and recorded; calls that differ from it only in where their tensors lie replay the recording. So whatever a
launch depends on must be in `call_key`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from attnhub import config
from attnhub.backend import Call, Gradients, Needs, Plan, PrepareError, Repeat
from attnhub.backends.triton import hopper, table
from attnhub.backends.triton import launch as launching
from attnhub.backends.triton import tiles as tiling
from attnhub.backends.triton.arguments import (
    Arguments,
    broadcast,
    call_key,
    kernel_arguments,
    kernel_inputs,
    last_dense,
    negated,
    strides_of,
)
from attnhub.backends.triton.block_sparse import block_sparse
from attnhub.backends.triton.kernels.backward import delta_kernel, grad_kv_kernel, grad_q_kernel
from attnhub.backends.triton.kernels.combine import combine_kernel
from attnhub.backends.triton.kernels.forward import forward_kernel
from attnhub.backends.triton.kernels.grad_bias import grad_bias_kernel
from attnhub.backends.triton.launch import Recorder, Recording, hooked
from attnhub.backends.triton.tiles import Tiles
from attnhub.layouts import empty_out
from attnhub.problem import Problem
from attnhub.reasons import Code, Reason

log = logging.getLogger("attnhub")

#: Queries up to this length are packed: all heads of a K/V head's group in one block of rows.
_PACKED_SEQLEN_Q = 16
_COMBINE_ROWS = 4
_DELTA_ROWS = 16
#: Query rows (tokens, or tokens times the heads of a group) up to which keys are divided among programs.
_DECODE_ROWS = 64
#: Keys from which on a run (see `kernels.pages`) is long enough for the tiles of contiguous keys.
_LONG_RUN = 64
#: Key tiles from which on a loop counts as long.
_LONG_LOOP = 16
#: Recordings that a plan keeps.
_MOST_RECORDINGS = 512
_FP8 = "float8_e4m3fn"
#: Item size of q, k and v by dtype; the others have 2 bytes.
_ITEM_BYTES = {"float32": 4, _FP8: 1}
#: For kernels that work row by row: only the warps and stages count.
_ROW_TILES = Tiles(0, 0, 4, 3)
_HERE = contextlib.nullcontext()


class Variant(NamedTuple):
    """A kernel that can play a part: its role in `tiles`, whether it serves the arguments, and how it is launched with some tiles."""

    role: str
    serves: Callable[[Arguments], bool]
    launch: Callable[[Recorder, Arguments, Tiles], None]


class TritonPlan(Plan):
    """Kernels for one class of problems. Tiles shrink, once and for good, where the device turns out too small for them."""

    def __init__(self, problem: Problem) -> None:
        self._interpreted = config.triton_interpret()
        if self._interpreted:
            self._tiles = tiling.interpreted()
        else:
            item = _ITEM_BYTES.get(problem.q_dtype, 2)
            limit = tiling.shared_memory(problem.device.vendor, problem.device.arch)
            device, dims = problem.device, (problem.head_dim, problem.v_head_dim)
            exact = item == 4 and not tiling.tf32x3(device.vendor, device.arch, *dims, (problem.seqlen_q, problem.seqlen_k))
            blocks = problem.batch * problem.q_heads * _cdiv(problem.seqlen_q, 128)
            self._tiles = {role: tiling.choices(role, *dims, item, limit, exact, blocks) for role in tiling.roles(item)}
            self._tiles = {**table.preferred(self._tiles, problem, item), **hopper.choices(problem)}
        #: `call_key` of a call -> how to repeat it.
        self._recordings: dict[tuple[Any, ...], Recording] = {}
        #: Role -> seconds that its first launch took, and whether Triton had the kernel on disk.
        self._compiled: dict[str, tuple[float, Optional[bool]]] = {}
        #: Role -> why its kernel, not the last choice, cannot run here.
        self._refused: dict[str, str] = {}

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"kernel": "triton"}
        for role, choices in self._tiles.items():
            if choices:
                seconds, from_disk = self._compiled.get(role, (None, None))
                described[role] = {**vars(choices[0]), "compile_seconds": seconds, "from_disk_cache": from_disk}
        return {**described, **({"refused": dict(self._refused)} if self._refused else {})}

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        if call.softmax_scale < 0 and call.q.dtype != torch.float8_e4m3fn:
            call = negated(call)
        inputs = kernel_inputs(call)
        key, addresses = call_key(call, inputs)
        with _on_device(call.q):
            buffers = self._replay(key, call.q, addresses) or self._forward(key, call, inputs)
        return buffers["out"], buffers.get("lse")

    def repeat(self, call: Call) -> Optional[Repeat]:
        recording = self._recordings.get(call_key(call, kernel_inputs(call))[0])
        # Whether fp32 products may use tf32 can change between calls.
        if recording is None or call.softmax_scale < 0 or call.q.dtype == torch.float32:
            return None

        def again(q: Tensor, *others: Tensor) -> Optional[tuple[Tensor, Optional[Tensor]]]:
            if hooked():
                return None
            # In the order of `kernel_inputs`.
            with _on_device(q):
                buffers = recording.replay(q, [x.data_ptr() for x in (q, *others)])
            return buffers["out"], buffers.get("lse")

        return again

    def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
        scale = call.softmax_scale
        if scale < 0:
            call = negated(call)
        inputs = kernel_inputs(call)
        lse = inputs["lse"] = lse.contiguous()
        inputs["out"], inputs["grad_out"] = last_dense(out), last_dense(grad_out)
        if grad_lse is not None:
            inputs["grad_lse"] = grad_lse.to(torch.float32).contiguous()
        key, addresses = call_key(call, inputs)
        key = (needs, *key)
        with _on_device(call.q):
            buffers = self._replay(key, call.q, addresses) or self._backward(key, call, inputs, needs)
            grad_sinks = None
            if needs.sinks and call.sinks is not None:
                # The sink is a key with value 0: dS = P * (0 - delta). Tokens outside of all sequences have lse -inf.
                share = torch.exp(call.sinks[None, :, None] - lse)
                grad_sinks = -torch.where(lse == -math.inf, 0.0, share * buffers["delta"]).sum((0, 2)).to(call.sinks.dtype)
            if scale < 0 and needs.q:
                buffers["grad_q"].neg_()
        get = buffers.get
        return Gradients(get("grad_q"), get("grad_k") if needs.k else None, get("grad_v") if needs.v else None, get("grad_bias"), grad_sinks)

    def _replay(self, key: tuple[Any, ...], q: Tensor, addresses: list[int]) -> Optional[dict[str, Tensor]]:
        recording = self._recordings.get(key)
        return None if recording is None or hooked() else recording.replay(q, addresses)

    def _forward(self, key: tuple[Any, ...], call: Call, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        recorder = Recorder(inputs)
        out = recorder.buffer("out", empty_out(call.q, call.v.shape[3]))
        lse = recorder.buffer("lse", call.q.new_empty(call.q.shape[:3], dtype=torch.float32)) if call.need_lse else None
        arguments = kernel_arguments(call, self._interpreted)
        group, max_q, pages = arguments["GROUP"], arguments["max_q"], call.block_table
        pack = group > 1 and max_q <= _PACKED_SEQLEN_Q
        arguments.update(
            out=out, lse=lse, **strides_of("out", out), PACK=pack, table_stride=0 if pages is None else pages.shape[1],
            PAGE_SIZE=0 if pages is None else call.k.shape[2], **dict.fromkeys(("sinks", "block_table")),
        )  # fmt: skip
        arguments.update(recorder.inputs)
        self._run(_DECODE if max_q * (group if pack else 1) <= _DECODE_ROWS else _FORWARD, recorder, arguments)
        self._record(key, recorder)
        return recorder.buffers

    def _backward(self, key: tuple[Any, ...], call: Call, inputs: dict[str, Tensor], needs: Needs) -> dict[str, Tensor]:
        recorder = Recorder(inputs)
        grad_out, out, lse = (inputs[name] for name in ("grad_out", "out", "lse"))
        arguments = kernel_arguments(call, self._interpreted)
        delta = recorder.buffer("delta", torch.empty_like(lse))
        arguments.update(
            delta=delta, grad_lse=None, softmax_scale=float(call.softmax_scale), rows=lse.numel(),
            **strides_of("grad_out", grad_out), **strides_of("out", out),
        )  # fmt: skip
        arguments.update(recorder.inputs)
        arguments["delta_made"] = False
        for name, x, needed in (("grad_k", call.k, needs.k or needs.v), ("grad_v", call.v, needs.k or needs.v), ("grad_q", call.q, needs.q)):
            if needed:
                grad = arguments[name] = recorder.buffer(name, torch.empty_like(x))
                arguments.update(strides_of(name, grad))
        # dQ first: one of its kernels makes delta on its way.
        if needs.q:
            self._run(_GRAD_Q, recorder, arguments)
        _make_delta(recorder, arguments)
        if needs.k or needs.v:
            self._run(_GRAD_KV, recorder, arguments)
        bias = call.mask.bias
        if needs.bias and bias is not None:
            grad_bias = recorder.buffer("grad_bias", torch.empty(bias.shape, dtype=bias.dtype, device=bias.device))
            self._run(_GRAD_BIAS, recorder, {**arguments, **broadcast("grad_bias", "grad_bias", grad_bias)})
        self._record(key, recorder)
        return recorder.buffers

    def _run(self, variants: tuple[Variant, ...], recorder: Recorder, arguments: Arguments) -> None:
        """Launch the first variant that serves the arguments; the next one if it cannot be compiled or does not fit; the last serves everything."""
        able = [v for v in variants[:-1] if self._tiles.get(v.role) and v.serves(arguments)]
        before = len(recorder.launched)
        for variant in (*able, variants[-1]):
            try:
                self._try(variant.role, functools.partial(_whole, variant.launch, recorder, arguments))
            except PrepareError as error:
                if variant is variants[-1] or error.reason.code not in (Code.OUT_OF_RESOURCES, Code.COMPILE_FAILED):
                    raise
                self._tiles[variant.role] = []
                self._refused[variant.role] = str(error.reason)
                log.warning("triton: %s; the general kernel serves instead", error.reason)
                continue
            if variant.role not in self._compiled and recorder.launched[before:]:
                launched = recorder.launched[before:]
                found = [x.from_disk for x in launched if x.from_disk is not None]
                self._compiled[variant.role] = sum(x.seconds for x in launched), all(found) if found else None
            return

    def _try(self, role: str, launch: Callable[[Tiles], None]) -> None:
        """Launch with the role's tiles. Triton compiles, and finds out what does not fit, before anything runs."""
        choices = self._tiles[role]
        while choices:
            tiles = choices[0]
            try:
                launch(tiles)
                return
            except OutOfResources as error:
                # Another thread may have gone on to smaller ones meanwhile.
                if choices[0] is not tiles:
                    continue
                if len(choices) == 1:
                    raise PrepareError(Reason(Code.OUT_OF_RESOURCES, f"{role} kernel with its smallest tiles: {error}")) from error
                del choices[0]
            except TritonError as error:
                # The front end's errors, and ptxas's.
                raise PrepareError(Reason(Code.COMPILE_FAILED, f"{role} kernel: {error}")) from error
            except RuntimeError as error:
                # So fail the passes in between; errors of a launch are of the same type and not for us.
                if "PassManager" not in str(error):
                    raise
                raise PrepareError(Reason(Code.COMPILE_FAILED, f"{role} kernel: {error}")) from error
        raise PrepareError(Reason(Code.OUT_OF_RESOURCES, f"{role} kernel: even the smallest tiles pass this device's shared memory"))

    def _record(self, key: tuple[Any, ...], recorder: Recorder) -> None:
        recording = recorder.recording()
        if recording is None:
            return
        if len(self._recordings) >= _MOST_RECORDINGS:
            # Lengths that grew past: they may come again, in the next sequence.
            self._recordings.clear()
        self._recordings[key] = recording


def _whole(launch: Callable[[Recorder, Arguments, Tiles], None], recorder: Recorder, arguments: Arguments, tiles: Tiles) -> None:
    """Launch, and leave no trace of an attempt that fails half way: a recording holds what its successor launches, and no more."""
    launched, buffers, made = len(recorder.launched), set(recorder.buffers), arguments.get("delta_made")
    try:
        launch(recorder, arguments, tiles)
    except Exception:
        del recorder.launched[launched:]
        arguments["delta_made"] = made
        for name in set(recorder.buffers) - buffers:
            del recorder.buffers[name]
        raise


def _everything(arguments: Arguments) -> bool:
    return True


def _full_of_short_runs(arguments: Arguments) -> bool:
    """Whether K and V lie in pages of which a tile meets several, and there is a program for nearly every multiprocessor."""
    page = arguments["PAGE_SIZE"]
    programs = arguments["sequences"] * arguments["Q_HEADS"] // (arguments["GROUP"] if arguments["PACK"] else 1)
    return bool(0 < page & -page < _LONG_RUN and programs >= 0.8 * launching.processors(arguments["q"].device))


def _forward(recorder: Recorder, arguments: Arguments, tiles: Tiles, role: str = "forward") -> None:
    """`forward_kernel`; where rows and heads are too few for the device, the keys are divided among programs, and combined."""
    group = arguments["GROUP"] if arguments["PACK"] else 1
    rows = arguments["max_q"] * group
    interpreted = config.triton_interpret()
    block_m = tiles.block_m
    if rows <= _DECODE_ROWS and not interpreted:
        block_m = max(block_m, min(tiling.padded(rows), 64 if arguments["BLOCK_DV"] < 512 else 32))
    programs = _cdiv(rows, block_m) * (arguments["Q_HEADS"] // group) * _sequences(arguments)
    slots = launching.processors(arguments["q"].device) * tiling.RESIDENT.get(role, 1)
    key_tiles = _cdiv(arguments["max_k"], tiles.block_n)
    splits = 1
    # Parts of the sums are in fp32 and lie in memory: of many rows they pay off where the loops are long.
    if rows <= _DECODE_ROWS or arguments["PACK"] or 4 * programs <= slots or (2 * programs <= slots and key_tiles >= _LONG_LOOP):
        splits = tiling.split_count(programs, key_tiles, slots)
    arguments = {**arguments, **block_sparse(recorder, arguments, block_m, tiles.block_n, group=group)}
    blocks = {"splits": splits, "SPLIT": splits > 1, "BLOCK_M": block_m, "BLOCK_N": tiles.block_n}
    if splits == 1:
        recorder.launch(forward_kernel, programs, tiles, **arguments, **blocks)
        return
    out = arguments["out"]
    partial_out = recorder.buffer("partial_out", out.new_empty((splits, *out.shape), dtype=torch.float32))
    partial_lse = recorder.buffer("partial_lse", out.new_empty((splits, *out.shape[:3]), dtype=torch.float32))
    partial = {"out": partial_out, "lse": partial_lse, **strides_of("out", partial_out[0])}
    recorder.launch(forward_kernel, programs * splits, tiles, **{**arguments, **partial}, **blocks)
    rows = math.prod(out.shape[:3])
    recorder.launch(
        combine_kernel, _cdiv(rows, _COMBINE_ROWS), _ROW_TILES,
        **{**arguments, "BLOCK_DV": tiling.padded(arguments["V_HEAD_DIM"])}, partial_out=partial_out, partial_lse=partial_lse,
        rows=rows, splits=splits, BLOCK_R=_COMBINE_ROWS,
    )  # fmt: skip


def _make_delta(recorder: Recorder, arguments: Arguments) -> None:
    """delta, unless it is there already."""
    if not arguments["delta_made"]:
        rows = arguments["rows"]
        grad_strides = {f"grad_stride_{axis}": arguments[f"grad_out_stride_{axis}"] for axis in "bhs"}
        width = {"BLOCK_DV": tiling.padded(arguments["V_HEAD_DIM"])}
        recorder.launch(delta_kernel, _cdiv(rows, _DELTA_ROWS), _ROW_TILES, **{**arguments, **grad_strides, **width}, BLOCK_R=_DELTA_ROWS)
        arguments["delta_made"] = True


def _grad_kv(recorder: Recorder, arguments: Arguments, tiles: Tiles) -> None:
    programs = _cdiv(arguments["max_k"], tiles.block_n) * (arguments["Q_HEADS"] // arguments["GROUP"]) * _sequences(arguments)
    sparse = block_sparse(recorder, arguments, tiles.block_m, tiles.block_n, by_keys=True)
    recorder.launch(grad_kv_kernel, programs, tiles, **{**arguments, **sparse}, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n)


def _grad_q(recorder: Recorder, arguments: Arguments, tiles: Tiles) -> None:
    _make_delta(recorder, arguments)
    programs = _cdiv(arguments["max_q"], tiles.block_m) * arguments["Q_HEADS"] * _sequences(arguments)
    sparse = block_sparse(recorder, arguments, tiles.block_m, tiles.block_n)
    recorder.launch(grad_q_kernel, programs, tiles, **{**arguments, **sparse}, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n)


def _grad_bias(recorder: Recorder, arguments: Arguments, tiles: Tiles) -> None:
    batch, heads, rows, keys = arguments["grad_bias"].shape
    one = {"ONE_B": batch == 1, "ONE_H": heads == 1, "ONE_Q": rows == 1, "ONE_K": keys == 1}
    programs = batch * heads * _cdiv(rows, tiles.block_m) * _cdiv(keys, tiles.block_n)
    sparse = block_sparse(recorder, arguments, tiles.block_m, tiles.block_n)
    recorder.launch(grad_bias_kernel, programs, tiles, **{**arguments, **sparse}, **one, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n)


#: In order of preference; the last of each serves everything.
_FORWARD = (Variant("hopper_forward", hopper.serves_forward, hopper.forward), Variant("forward", _everything, _forward))
_DECODE = (
    Variant("decode_paged", _full_of_short_runs, functools.partial(_forward, role="decode_paged")),
    Variant("decode", _everything, functools.partial(_forward, role="decode")),
)
_GRAD_KV = (Variant("hopper_grad_kv", hopper.serves, hopper.grad_kv), Variant("grad_kv", _everything, _grad_kv))
_GRAD_Q = (Variant("hopper_grad_q", hopper.serves, hopper.grad_q), Variant("grad_q", _everything, _grad_q))
_GRAD_BIAS = (Variant("grad_bias", _everything, _grad_bias),)


def _sequences(arguments: Arguments) -> int:
    """Sequences that programs are for. In a packed batch, what lies behind the last one is one more."""
    return int(arguments["sequences"]) + (arguments["cu_q"] is not None)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' own."""
    if x.is_cuda and x.get_device() != torch._C._cuda_getDevice():
        return torch.cuda.device(x.device)
    if x.is_xpu:
        return torch.xpu.device(x.device)
    return _HERE
