"""The triton backend's short ways to a launch against Triton's own, without a GPU: the driver and the compiler are stand-ins.

What is compared of a launch is all that decides its result: what the kernel was specialised on, the grid, the stream, and every
argument that is not compiled in, with addresses replaced by the names of what lies there.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import pathlib
import random
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

import attnhub
from attnhub import config, runtime
from attnhub.backend import Call, Descale, Needs
from attnhub.backends.triton import arguments, hopper, launch, launcher, tiles
from attnhub.backends.triton.kernels import backward, combine, forward, hopper_forward, hopper_grad_kv, hopper_grad_q
from attnhub.backends.triton.tiles import Tiles
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Bias, BoolMask, Causal, Chunk, LeftPad, Mask, Prefix, Segments, SeqLens, Window
from attnhub.problem import DeviceInfo, Problem
from attnhub.registry import registry

pytestmark = [
    pytest.mark.skipif(config.triton_interpret() or not launch._DIRECT, reason="Triton's own way is the only one here"),
    pytest.mark.usefixtures("one_thread"),
]
H100 = DeviceInfo("cuda", "nvidia", (9, 0))


@triton.jit
def copy_kernel(x, out):
    pass


@triton.jit(do_not_specialize=["size"])
def sized_kernel(x, size, constant: triton.language.constexpr):
    pass


KERNELS = (
    forward.forward_kernel, combine.combine_kernel, backward.delta_kernel, backward.grad_kv_kernel, backward.grad_q_kernel, copy_kernel, sized_kernel,
    hopper_grad_q.hopper_grad_q_kernel, hopper_grad_kv.hopper_grad_kv_kernel, hopper_forward.hopper_forward_kernel,
)  # fmt: skip


class Run:
    """A stand-in for Triton's launcher of one kernel: it writes down what it was asked to launch."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, gpu: Gpu, kernel: Kernel) -> None:
        self.gpu, self.kernel = gpu, kernel

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, launch_metadata: Any, enter: Any, leave: Any, *args: Any) -> None:
        assert (y, z, function, metadata) == (1, 1, self.kernel.function, self.kernel.packed_metadata)
        if enter is not None:
            enter(launch_metadata)
        self.gpu.launched.append((self.kernel, x, stream, args, threading.get_ident()))

    def launch(self, x: int, y: int, z: int, stream: int, function: int, cooperative: bool, pdl: bool, scratch: Any, profile: Any, metadata: Any, *rest: Any) -> None:
        assert cooperative is pdl is False and scratch is profile is None
        self(x, y, z, stream, function, metadata, *rest)


class Kernel:
    """A stand-in for Triton's CompiledKernel."""

    def __init__(self, gpu: Gpu, src: Any, options: dict[str, Any]) -> None:
        self.src, self.function, self.packed_metadata = src, next(gpu.functions), (object(),)
        self.metadata_group: dict[str, str] = {}
        self.types = list(src.signature.values())
        self.specialised = (src.fn.fn.__name__, src.signature, src.constants, src.attrs, options["num_warps"], options["num_stages"])
        self.run = Run(gpu, self)

    def launch_metadata(self, *args: Any) -> None:
        return None


class Gpu:
    """A stand-in for Triton's driver, with its compiler."""

    def __init__(self) -> None:
        self.functions = itertools.count(1)
        self.launched: list[tuple[Kernel, int, int, tuple[Any, ...], int]] = []
        self.device, self.streams, self.refuse = 0, {-1: 7, 0: 7, 1: 8}, lambda src: None

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.streams[device]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def compile(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> Kernel:
        self.refuse(src)
        return Kernel(self, src, options)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu()
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(triton.compiler, "compile", found.compile)
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    monkeypatch.setattr(launch, "_compiled", {})
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield found
    for kernel in KERNELS:
        kernel.device_caches.clear()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[launch.Recording]:
    """Every recording that is replayed, in order."""
    found: list[launch.Recording] = []
    original = launch.Recording.replay

    def replay(self: launch.Recording, like: Tensor, pointers: list[int]) -> dict[str, Tensor]:
        found.append(self)
        return original(self, like, pointers)

    monkeypatch.setattr(launch.Recording, "replay", replay)
    return found


def plan(dtype: str = "bfloat16") -> launcher.TritonPlan:
    return launcher.TritonPlan(Problem(H100, dtype, dtype, 64, 64, 4, 2, 2, 64, 64))


def seen(gpu: Gpu, inputs: dict[str, Tensor]) -> list[Any]:
    """What was launched since the last look."""
    names: dict[int, Any] = {0: None}
    for name, x in inputs.items():
        names.setdefault(x.data_ptr(), name)
    found = []
    for kernel, programs, stream, args, _ in gpu.launched:
        values: list[Any] = []
        for kind, value in zip(kernel.types, args):
            if kind.startswith("*"):
                address = value if isinstance(value, int) else value.data_ptr()
                values.append(names.setdefault(address, f"buffer {len(names)}"))
            elif kind.startswith("tensordesc"):
                where = names.setdefault(value.base.data_ptr(), f"buffer {len(names)}")
                values.append((kind, where, tuple(value.shape), tuple(value.strides), tuple(value.block_shape)))
            elif kind != "constexpr":
                values.append((kind, value))
        found.append((kernel.specialised, programs, stream, values))
    gpu.launched.clear()
    return found


def by_triton(monkeypatch: pytest.MonkeyPatch, run: Callable[[launcher.TritonPlan], Any], dtype: str) -> Any:
    """The same call by a new plan, launched as Triton launches."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_DIRECT", False)
        return run(plan(dtype))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def shifted(x: Tensor) -> Tensor:
    """The same values and strides at an address that is no multiple of 16."""
    size = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
    return torch.empty(size + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)


def bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def pitched(x: Tensor, pitch: int) -> Tensor:
    """The same values with another distance between tokens."""
    return torch.empty(*x.shape[:3], pitch, dtype=x.dtype)[..., : x.shape[3]].copy_(x)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def calls(dtype: torch.dtype = torch.bfloat16) -> dict[str, Call]:
    """Calls of one plan. Many differ from the first in one thing alone."""
    q, k, v = randn(2, 4, 80, 64, dtype=dtype), randn(2, 2, 96, 64, dtype=dtype), randn(2, 2, 96, 64, dtype=dtype)

    def call(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Mask = FULL, scale: float = 0.125, **extra: Any) -> Call:
        return Call(q, k, v, mask, scale, **extra)

    token = randn(2, 4, 1, 64, dtype=dtype)
    long_k, long_v = randn(2, 2, 4000, 64, dtype=dtype), randn(2, 2, 4000, 64, dtype=dtype)
    far = torch.zeros(2, 1, 2**24, dtype=torch.uint8).view(dtype)[..., : 96 * 64].view(2, 1, 96, 64).expand(2, 2, 96, 64)
    documents = (torch.arange(96) // 9).int()[None].repeat(2, 1)
    bias, keep = randn(2, 4, 80, 96, dtype=torch.float32), torch.rand(2, 4, 80, 96) > 0.5
    packed_q, packed_k, packed_v = randn(1, 4, 50, 64, dtype=dtype), randn(1, 2, 80, 64, dtype=dtype), randn(1, 2, 80, 64, dtype=dtype)
    cu_q, cu_k = ints(0, 20, 20, 45), ints(0, 13, 33, 70)
    pages_k, pages_v = randn(9, 2, 16, 64, dtype=dtype), randn(9, 2, 16, 64, dtype=dtype)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    found = {
        "plain": call(),
        "lse": call(need_lse=True),
        "scale": call(scale=0.25),
        "negative scale": call(scale=-0.125),
        "softcap": call(softcap=2.0),
        "another softcap": call(softcap=3.0),
        "q shifted": call(q=shifted(q)),
        "k shifted": call(k=shifted(k)),
        "v shifted": call(v=shifted(v)),
        "q and k shifted": call(q=shifted(q), k=shifted(k)),
        "q bshd": call(q=bshd(q)),
        "k bshd": call(k=bshd(k)),
        "v bshd": call(v=bshd(v)),
        "all bshd": call(q=bshd(q), k=bshd(k), v=bshd(v)),
        "k pitched": call(k=pitched(k, 80)),
        "k pitched oddly": call(k=pitched(k, 65)),
        "v pitched oddly": call(v=pitched(v, 65)),
        "k and v expanded": call(k=k[:1].expand_as(k), v=v[:1].expand_as(v)),
        "k far apart": call(k=far),
        "k is v": call(k=v),
        "one sequence": call(q[:1], k[:1], v[:1]),
        "fewer queries": call(q=q[:, :, :79]),
        "fewer keys": call(k=k[:, :, :95], v=v[:, :, :95]),
        "fewer keys, dense": call(k=k[:, :, :95].contiguous(), v=v[:, :, :95].contiguous()),
        "few queries": call(q=q[:, :, :33]),
        "very few queries": call(q=q[:, :, :7]),
        "causal": call(mask=Causal()),
        "causal top left": call(mask=Causal("top_left")),
        "window": call(mask=Window(5, 3)),
        "another window": call(mask=Window(5, 4)),
        "left window": call(mask=Window(5)),
        "chunk": call(mask=Causal() & Chunk(7)),
        "another chunk": call(mask=Causal() & Chunk(8)),
        "lengths": call(mask=SeqLens(ints(40, 7))),
        "lengths shifted": call(mask=SeqLens(shifted(ints(40, 7)))),
        "left padding": call(mask=LeftPad(ints(40, 7))),
        "lengths and left padding": call(mask=SeqLens(ints(40, 7)) & LeftPad(ints(0, 1))),
        "prefix": call(mask=Causal() & Prefix(ints(9, 0))),
        "prefix without causal": call(mask=Prefix(ints(9, 0))),
        "segments": call(mask=Segments(documents[:, :80].contiguous(), documents)),
        "segments, sliced": call(mask=Segments(documents[:, :80], documents)),
        "blocks": call(mask=Causal() & Segments(documents[:, :80].contiguous(), documents, widen_causal=True)),
        "bool mask": call(mask=BoolMask(keep)),
        "bool mask of heads": call(mask=BoolMask(keep[:1])),
        "bool mask transposed": call(mask=BoolMask(keep.transpose(2, 3).contiguous().transpose(2, 3))),
        "bias": call(mask=Bias(bias)),
        "bias shifted": call(mask=Bias(shifted(bias))),
        "bias of rows": call(mask=Bias(bias[:, :, :, :1])),
        "bias in fp16": call(mask=Bias(bias.half())),
        "alibi": call(mask=ALiBi(torch.rand(4))),
        "alibi of sequences": call(mask=ALiBi(torch.rand(2, 4))),
        "sinks": call(sinks=torch.rand(4)),
        "sinks shifted": call(sinks=shifted(torch.rand(4))),
        "token": call(q=token),
        "token, lse": call(q=token, need_lse=True),
        "token, many keys": call(token, long_k, long_v),
        "token, many keys, lse": call(token, long_k, long_v, need_lse=True),
        "token, many keys, sinks": call(token, long_k, long_v, sinks=torch.rand(4)),
        "packed": call(packed_q, packed_k, packed_v, varlen=Varlen(cu_q, cu_k, 25, 37)),
        "packed, longer": call(packed_q, packed_k, packed_v, varlen=Varlen(cu_q, cu_k, 26, 37)),
        "packed, longer keys": call(packed_q, packed_k, packed_v, varlen=Varlen(cu_q, cu_k, 25, 38)),
        "packed, fewer": call(packed_q, packed_k, packed_v, varlen=Varlen(cu_q[:3], cu_k[:3], 25, 37)),
        "not packed": call(packed_q, packed_k, packed_v),
        "paged": call(q=token, k=pages_k, v=pages_v, mask=Causal() & SeqLens(ints(33, 2)), block_table=table),
        "paged, wider table": call(q=token, k=pages_k, v=pages_v, mask=Causal() & SeqLens(ints(33, 2)), block_table=table.repeat(1, 2)),
        "paged, sliced table": call(q=token, k=pages_k, v=pages_v, mask=Causal() & SeqLens(ints(33, 2)), block_table=table.repeat(1, 2)[:, :4]),
    }  # fmt: skip
    return found


def again(call: Call) -> Call:
    """The same call with other tensors of the same metadata (nothing reads their values)."""

    def other(x: Optional[Tensor]) -> Any:
        if x is None:
            return None
        size = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
        return torch.empty(size + 8, dtype=x.dtype)[x.data_ptr() % 16 // x.element_size() :].as_strided(x.shape, x.stride())

    mask, varlen = call.mask, call.varlen
    changes = {}
    for field in dataclasses.fields(mask):
        value = getattr(mask, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = other(value)
        elif isinstance(value, tuple) and isinstance(value[0], Tensor):
            changes[field.name] = tuple(map(other, value))
    if varlen is not None:
        varlen = Varlen(other(varlen.cu_seqlens_q), other(varlen.cu_seqlens_k), varlen.max_seqlen_q, varlen.max_seqlen_k)
    return Call(
        other(call.q), other(call.k), other(call.v), mask if mask is FULL else dataclasses.replace(mask, **changes), call.softmax_scale, call.softcap, other(call.sinks),
        call.dropout_p, call.rng, varlen, other(call.block_table), call.need_lse,
    )  # fmt: skip


def tensors_of(call: Call) -> dict[str, Tensor]:
    """The call's own tensors by the kernels' names, without those that are copied first."""
    own = {x.data_ptr() for x in (call.q, call.k, call.v, *call.mask.held, call.sinks, call.block_table) if x is not None}
    if call.varlen is not None:
        own |= {call.varlen.cu_seqlens_q.data_ptr(), call.varlen.cu_seqlens_k.data_ptr()}
    found = arguments.kernel_inputs(call)
    if call.softmax_scale < 0:
        del found["q"]
    return {name: x for name, x in found.items() if x.data_ptr() in own}


def forward_of(gpu: Gpu, call: Call) -> Callable[[launcher.TritonPlan], Any]:
    def run(chosen: launcher.TritonPlan) -> Any:
        out, lse = chosen.forward(call)
        return seen(gpu, tensors_of(call)), out.shape, out.stride(), out.dtype, None if lse is None else (lse.shape, lse.stride(), lse.dtype)

    return run


@pytest.mark.parametrize("way", ["replay", "compiled"])
def test_forward_launches_what_triton_would(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any], way: str) -> None:
    """In any order, each call of one plan is launched as by a plan of its own that takes Triton's way."""
    found, shared = calls(), plan()
    order = [*found] * 3
    random.Random(0).shuffle(order)
    for name in order:
        run = forward_of(gpu, again(found[name]))
        assert run(shared if way == "replay" else plan()) == by_triton(monkeypatch, run, "bfloat16"), name
    assert len(replays) == (len(order) - len(shared._recordings) if way == "replay" else 0)


def test_one_tensor_in_two_places_is_two_arguments(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    q = randn(2, 2, 33, 64)
    shared = plan()
    for k, v in ((q, q), (randn(2, 2, 33, 64), q), (q, randn(2, 2, 33, 64))):
        run = forward_of(gpu, Call(q, k, v, FULL, 0.125))
        assert run(shared) == by_triton(monkeypatch, run, "bfloat16")
    assert len(replays) == 2


def backward_of(gpu: Gpu, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], needs: Needs, out: Tensor, lse: Tensor) -> Callable[[launcher.TritonPlan], Any]:
    def run(chosen: launcher.TritonPlan) -> Any:
        grads = chosen.backward(call, grad_out, grad_lse, out, lse, needs)
        inputs = {**tensors_of(call), "out": out, "lse": lse, "grad_out": grad_out, **({} if grad_lse is None else {"grad_lse": grad_lse})}
        if not (grad_out.stride(-1) == 1 and lse.is_contiguous()):
            del inputs["grad_out"], inputs["lse"]
        return seen(gpu, inputs), [None if g is None else (g.shape, g.stride(), g.dtype) for g in grads]

    return run


def backward_variants(call: Call) -> dict[str, tuple[Any, ...]]:
    shape = (*call.q.shape[:3], call.v.shape[3])
    grad_out, out, lse = randn(*shape), randn(*shape), randn(*shape[:3], dtype=torch.float32)
    all_three = Needs()
    found = {
        "plain": (grad_out, None, all_three, out, lse),
        "grad_lse": (grad_out, randn(*shape[:3], dtype=torch.float32), all_three, out, lse),
        "grad_lse in bf16": (grad_out, randn(*shape[:3]), all_three, out, lse),
        "grad_out bshd": (bshd(grad_out), None, all_three, out, lse),
        "grad_out shifted": (shifted(grad_out), None, all_three, out, lse),
        "grad_out expanded": (grad_out[..., :1].expand(shape), None, all_three, out, lse),
        "out bshd": (grad_out, None, all_three, bshd(out), lse),
        "lse strided": (grad_out, None, all_three, out, lse.transpose(1, 2).contiguous().transpose(1, 2)),
        "only q": (grad_out, None, Needs(True, False, False), out, lse),
        "only v": (grad_out, None, Needs(False, False, True), out, lse),
        "only k": (grad_out, None, Needs(False, True, False), out, lse),
    }  # fmt: skip
    if call.sinks is not None:
        found["sinks"] = (grad_out, None, Needs(sinks=True), out, lse)
    return found


def test_backward_launches_what_triton_would(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    shared = plan()
    order = [(name, call, kind) for name, call in calls().items() if "paged" not in name for kind in backward_variants(call) if kind == "plain" or name in ("plain", "sinks")] * 2
    random.Random(1).shuffle(order)
    for name, call, kind in order:
        same = again(call)
        run = backward_of(gpu, same, *backward_variants(same)[kind])
        assert run(shared) == by_triton(monkeypatch, run, "bfloat16"), (name, kind)
    assert len(replays) == len(order) - len(shared._recordings) >= len(order) // 2


def test_a_replay_finds_counters_at_zero(gpu: Gpu) -> None:
    """Programs that draw their tiles from a counter leave it past the last one."""
    q = randn(1, 2, 8, 16)
    recorder = launch.Recorder({"q": q})
    recorder.buffer("out", torch.empty_like(q))
    counter = recorder.zeros("counter", torch.full((1,), 7, dtype=torch.int32))
    assert counter.item() == 0
    recording = recorder.recording()
    assert recording is not None
    for _ in range(2):
        found = recording.replay(q, [q.data_ptr()])["counter"]
        assert found.item() == 0
        found.fill_(9)


def test_every_part_of_a_call_is_in_the_key() -> None:
    """A new field of Call or Mask must be put into `_key` or `_inputs`, and here. `deterministic` changes nothing: all kernels are repeatable."""
    assert set(Call.__slots__) == {
        "q", "k", "v", "mask", "softmax_scale", "softcap", "sinks", "dropout_p", "rng", "varlen", "block_table", "need_lse", "descale", "deterministic",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(Mask)} == {
        "causal", "align", "window", "chunk", "prefix", "segments", "blocks", "seqused_k", "leftpad", "bool_mask", "bias", "alibi",
        "block_sparse", "block_size",
    }  # fmt: skip
    q = randn(2, 4, 80, 64)
    sparse = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    keys = {}
    for name, call in {
        # Ids and tables are made contiguous first; and which of the tensors are the same one is no matter.
        **{name: call for name, call in calls().items() if name not in ("segments, sliced", "paged, sliced table", "k is v")},
        "dropout": Call(q, q, q, FULL, 0.125, dropout_p=0.1, rng=torch.zeros(2, dtype=torch.int64)),
        "more dropout": Call(q, q, q, FULL, 0.125, dropout_p=0.2, rng=torch.zeros(2, dtype=torch.int64)),
        "factor of q": Call(q, q, q, FULL, 0.125, descale=Descale(q=torch.ones(2, 4))),
        "factor of k": Call(q, q, q, FULL, 0.125, descale=Descale(k=torch.ones(2, 4))),
        "one factor": Call(q, q, q, FULL, 0.125, descale=Descale(k=torch.ones(1, 1).expand(2, 4))),
        "block sparse": Call(q, q, q, Mask(block_sparse=sparse, block_size=(16, 16)), 0.125),
        "block sparse, other blocks": Call(q, q, q, Mask(block_sparse=sparse, block_size=(12, 16)), 0.125),
    }.items():
        key = launcher.call_key(call, arguments.kernel_inputs(call))[0]
        assert key not in keys, f"{name} has the key of {keys.get(key)}"
        keys[key] = name


class OnSecondDevice(Tensor):
    def get_device(self) -> int:
        return 1


def test_devices_and_streams(gpu: Gpu, replays: list[Any]) -> None:
    """A kernel is loaded on one device; the stream is the current one of the tensors' device at each launch."""
    shared = plan()
    call = calls()["plain"]
    for _ in range(2):
        shared.forward(call)
    gpu.streams[-1] = 9
    shared.forward(call)
    assert [stream for _, _, stream, *_ in gpu.launched] == [7, 7, 9]
    functions = {kernel.function for kernel, *_ in gpu.launched}
    gpu.launched.clear()
    gpu.device = 1
    second = Call(*(x.as_subclass(OnSecondDevice) for x in (call.q, call.k, call.v)), FULL, 0.125)  # type: ignore[arg-type]
    for _ in range(2):
        shared.forward(second)
    assert [stream for _, _, stream, *_ in gpu.launched] == [8, 8]
    assert functions.isdisjoint(kernel.function for kernel, *_ in gpu.launched) and len(replays) == 3


def test_tf32_is_followed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, call = plan("float32"), calls(torch.float32)["plain"]
    specialised = []
    for precision in ("tf32x3", "tf32", "tf32x3", "tf32"):
        monkeypatch.setattr(arguments, "precision", lambda *_, precision=precision: precision)
        shared.forward(call)
        specialised.append(gpu.launched[-1][0].specialised)
    assert specialised[0] == specialised[2] != specialised[1] == specialised[3]
    assert shared.repeat(call) is None


def test_both_switches_of_tf32_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one raises once the new one has been used."""
    q = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"), shape=(1, 1, 1, 64), get_device=lambda: 0)
    monkeypatch.setattr(arguments, "arch", lambda device: (9, 0))
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the old switch alone")
    before = matmul.fp32_precision
    try:
        for setting, wanted in (("tf32", "tf32"), ("ieee", "tf32x3")):
            matmul.fp32_precision = setting
            assert arguments.precision(q, 64, (100, 100)) == wanted  # type: ignore[arg-type]
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("arch", "dim", "v_dim", "lengths", "wanted"),
    [
        ((9, 0), 64, 256, (64, 65), "tf32x3"), ((9, 0), 64, 64, (64, 64), "ieee"), ((9, 0), 64, 64, (3000, 2), "tf32x3"),
        ((9, 0), 257, 64, (100, 100), "ieee"), ((9, 0), 64, 512, (100, 100), "ieee"), ((8, 0), 64, 64, (100, 100), "ieee"),
        ((10, 0), 64, 64, (100, 100), "ieee"),
    ],
)  # fmt: skip
def test_precision_of_fp32(
    arch: tuple[int, int], dim: int, v_dim: int, lengths: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tf32 products where their error was found small enough; the plan's tiles are those of the same products."""
    q = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"), shape=(1, 1, 1, dim), get_device=lambda: 0)
    monkeypatch.setattr(arguments, "arch", lambda device: arch)
    assert arguments.precision(q, v_dim, lengths) == wanted  # type: ignore[arg-type]
    made = launcher.TritonPlan(Problem(DeviceInfo("cuda", "nvidia", arch, ""), "float32", "float32", dim, v_dim, 4, 2, 2, *lengths))
    limit = tiles.shared_memory("nvidia", arch)
    for role in tiles.roles(4):
        assert made._tiles[role] == tiles.choices(role, dim, v_dim, 4, limit, exact=wanted == "ieee")
    q.dtype = torch.float16
    assert arguments.precision(q, v_dim, lengths) == "ieee"  # type: ignore[arg-type]


def test_few_rows_of_fp32_have_smaller_blocks() -> None:
    for heads, batch, length, block in ((1, 1, 256, 32), (1, 2, 512, 32), (1, 4, 1024, 128), (8, 1, 1024, 128)):
        made = launcher.TritonPlan(Problem(H100, "float32", "float32", 64, 64, heads, heads, batch, length, length))
        assert made._tiles["forward"][0].block_m == block
        other = launcher.TritonPlan(Problem(H100, "float16", "float16", 64, 64, heads, heads, batch, length, length))
        assert other._tiles["forward"][0].block_m == 64


def test_a_profilers_hook_sees_every_launch(gpu: Gpu, replays: list[Any]) -> None:
    shared, call, calls_of_hook = plan(), calls()["token, many keys"], []
    for _ in range(2):
        shared.forward(call)
    assert len(replays) == 1 and shared.repeat(call) is not None

    def hook(metadata: Any) -> None:
        calls_of_hook.append(metadata)

    hooks: Any = launch._hooks
    chain = hasattr(hooks.launch_enter_hook, "add")
    hooks.launch_enter_hook.add(hook) if chain else setattr(hooks, "launch_enter_hook", hook)
    try:
        repeat = shared.repeat(call)
        assert repeat is not None and repeat(call.q, call.k, call.v) is None
        shared.forward(call)
        assert len(calls_of_hook) == 2 and len(replays) == 1
    finally:
        hooks.launch_enter_hook.remove(hook) if chain else setattr(hooks, "launch_enter_hook", None)
    shared.forward(call)
    assert len(calls_of_hook) == 2 and len(replays) == 2


def test_no_tensor_is_kept(gpu: Gpu, replays: list[Any]) -> None:
    """Neither by recordings nor by what finds compiled kernels."""
    shared = plan()
    call = calls()["lengths and left padding"]
    held = [weakref.ref(x) for x in (call.q, call.k, call.v, *call.mask.held)]
    out, lse = shared.forward(call)
    call.need_lse = True
    out, lse = shared.forward(call)
    assert lse is not None
    held += [weakref.ref(out), weakref.ref(lse)]
    shared.backward(call, torch.empty_like(out), None, out, lse, Needs())
    gpu.launched.clear()
    del call, out, lse
    gc.collect()
    assert [ref for ref in held if ref() is not None] == []


def test_threads_do_not_mix_their_tensors(gpu: Gpu) -> None:
    shared = plan()
    mine: dict[int, list[tuple[int, ...]]] = {}
    start = threading.Barrier(4)

    def work() -> None:
        own = mine.setdefault(threading.get_ident(), [])
        start.wait()
        for _ in range(300):
            q, k, v = (randn(1, 4, 20, 64) for _ in range(3))
            own.append((q.data_ptr(), k.data_ptr(), v.data_ptr(), shared.forward(Call(q, k, v, FULL, 0.125))[0].data_ptr()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    launched: dict[int, list[tuple[int, ...]]] = {}
    for _, _, _, args, thread_id in gpu.launched:
        launched.setdefault(thread_id, []).append(tuple(x if isinstance(x, int) else x.data_ptr() for x in args[:4]))
    assert forward.forward_kernel.arg_names[:4] == ["q", "k", "v", "out"]
    assert launched == mine
    # A recording is not changed by being replayed.
    for recording in shared._recordings.values():
        assert [step.arguments[position] for step in recording._steps for position, _ in step.pointers] == [None] * 4


def test_a_compiled_kernel_is_found_by_all_that_triton_specialises_on(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    values: list[Any] = [
        0, 1, 2, 16, 17, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, -1, -16, -(2**31), -(2**31) - 1, 0.0, 1.0, 2.5, True, False, None,
        x, x[1:], x[4:], x.half(), x.int(), x.bfloat16()[1:], x.bool(),
    ]  # fmt: skip
    tiles = [Tiles(0, 0, 4, 1), Tiles(0, 0, 8, 1), Tiles(0, 0, 4, 2)]

    def specialised(value: Any, constant: int, choice: Tiles, runtime: bool) -> Any:
        launch.launch(sized_kernel, 1, choice, x=None if runtime else value, size=value if runtime else 7, constant=constant)
        return gpu.launched.pop()[0].specialised

    def by_triton(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_DIRECT", False)
            return specialised(*args)

    order = [*itertools.product(values, (1, 2), tiles, (False, True))] * 2
    random.Random(3).shuffle(order)
    for args in order:
        assert specialised(*args) == by_triton(*args)
    # One kernel serves all even numbers of 32 bits, say.
    assert len(launch._compiled) < 12 * len(values)


def test_what_cannot_be_repeated_is_not_recorded(gpu: Gpu) -> None:
    """A tensor that neither came with the call nor was announced as a buffer."""
    x = torch.randn(32)
    recorder = launch.Recorder({"x": x})
    recorder.launch(copy_kernel, 1, Tiles(0, 0, 4, 1), x=recorder.inputs["x"], out=recorder.buffer("out", torch.empty(32)))
    assert recorder.recording() is not None
    recorder.launch(copy_kernel, 1, Tiles(0, 0, 4, 1), x=recorder.inputs["x"], out=torch.empty(32))
    assert recorder.recording() is None
    recorder = launch.Recorder({"x": x})
    # A view of an input may lie anywhere.
    recorder.launch(copy_kernel, 1, Tiles(0, 0, 4, 1), x=recorder.inputs["x"][4:], out=recorder.buffer("out", torch.empty(32)))
    assert recorder.recording() is None


def test_tensor_descriptors_describe_the_new_tensor(gpu: Gpu) -> None:
    def recorded(shape: tuple[int, int], block: list[int]) -> Optional[launch.Recording]:
        recorder = launch.Recorder({"x": torch.randn(shape)})
        described = TensorDescriptor.from_tensor(recorder.inputs["x"], block)
        recorder.launch(copy_kernel, 1, Tiles(0, 0, 4, 1), x=described, out=recorder.buffer("out", torch.empty(shape)))
        return recorder.recording()

    recording = recorded((32, 64), [16, 32])
    assert recording is not None
    x = torch.randn(32, 64)
    gpu.launched.clear()
    buffers = recording.replay(x, [x.data_ptr()])
    ((kernel, _, _, (described, out), _),) = gpu.launched
    assert described.base.data_ptr() == x.data_ptr() and (tuple(described.shape), tuple(described.strides)) == ((32, 64), (64, 1))
    assert described.block_shape == [16, 32] and out == buffers["out"].data_ptr()
    recorded((48, 64), [16, 32])
    assert gpu.launched[-1][0] is kernel
    recorded((48, 64), [16, 64])
    assert gpu.launched[-1][0] is not kernel and len(launch._compiled) == 2
    assert not [x for x in gc.get_referrers(x) if isinstance(x, (dict, TensorDescriptor))]


def test_an_unknown_triton_launches_its_own_way(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    monkeypatch.setattr(launch, "_DIRECT", False)
    shared, call = plan(), calls()["plain"]
    for _ in range(3):
        shared.forward(call)
    assert len(gpu.launched) == 3 and not replays and not launch._compiled and shared.repeat(call) is None


def test_the_next_kernel_serves_where_the_first_cannot(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def special(recorder: launch.Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
        tried.append(tiles)
        raise OutOfResources(2, 1, "shared memory")

    first = launcher.Variant("special", lambda arguments: not arguments["RIGHT"], special)
    monkeypatch.setattr(launcher, "_FORWARD", (first, *launcher._FORWARD))
    shared, found = plan(), calls()
    shared._tiles["special"] = [Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 2)]
    shared.forward(found["causal"])
    assert tried == []
    shared.forward(found["plain"])
    assert tried == [Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 2)]
    shared.forward(found["lse"])
    assert len(tried) == 2 and len(gpu.launched) == 3


def test_an_attempt_that_fails_half_way_leaves_no_trace(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    """dQ's first tiles do not fit, after the row sums were launched; a replay launches all that the second attempt did, the row sums too."""
    monkeypatch.setattr(hopper, "serves_problem", lambda problem: False)
    refused = []

    def refuse(src: Any) -> None:
        if src.fn.fn.__name__ == "grad_q_kernel" and not refused:
            refused.append(src)
            raise OutOfResources(2, 1, "shared memory")

    gpu.refuse = refuse
    shared, call = plan(), calls()["plain"]
    run = backward_of(gpu, call, *backward_variants(call)["plain"])
    names = [[specialised[0] for specialised, *_ in run(shared)[0]] for _ in range(2)]
    assert refused and len(replays) == 1
    assert names == [["delta_kernel", "delta_kernel", "grad_q_kernel", "grad_kv_kernel"], ["delta_kernel", "grad_q_kernel", "grad_kv_kernel"]]


def test_a_kernel_that_does_not_compile_is_passed_over(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def special(recorder: launch.Recorder, arguments: dict[str, Any], tiles: Tiles) -> None:
        raise CompilationError("source", None, "no")  # type: ignore[arg-type]

    monkeypatch.setattr(launcher, "_FORWARD", (launcher.Variant("special", lambda arguments: True, special), *launcher._FORWARD))
    shared = plan()
    shared._tiles["special"] = [Tiles(128, 128, 8, 2)]
    shared.forward(calls()["plain"])
    assert len(gpu.launched) == 1 and shared._tiles["special"] == []


def test_first_launch_is_described(gpu: Gpu, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, found = plan(), calls()
    described = shared.describe()
    assert {described[role]["compile_seconds"] for role in ("forward", "decode", "grad_kv", "grad_q")} == {None}
    file = tmp_path / "kernel.cubin"
    file.write_bytes(b"")
    compile_one = gpu.compile

    def compiled(*args: Any, **named: Any) -> Kernel:
        kernel = compile_one(*args, **named)
        kernel.metadata_group = {"kernel.cubin": str(file)}
        return kernel

    monkeypatch.setattr(triton.compiler, "compile", compiled)
    os.utime(file, (time.time() + 60,) * 2)
    shared.forward(found["plain"])
    described = shared.describe()
    first = described["forward"]["compile_seconds"]
    assert first > 0 and described["forward"]["from_disk_cache"] is False and described["decode"]["compile_seconds"] is None
    os.utime(file, (1, 1))
    shared.forward(found["lse"])
    assert shared.describe()["forward"] == described["forward"]
    shared.forward(found["token"])
    assert shared.describe()["decode"]["from_disk_cache"] is True
    # Another plan finds the kernel in memory.
    other = plan()
    other.forward(found["token"])
    assert (other.describe()["decode"]["compile_seconds"], other.describe()["decode"]["from_disk_cache"]) == (0.0, None)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors are served as if they were on an H100."""
    runtime.clear()
    monkeypatch.setattr(runtime.device, "describe", lambda device: H100)
    # An earlier test may have asked whether there is a GPU.
    monkeypatch.setattr(registry.candidates()["triton"], "_probe", ())
    yield
    runtime.clear()


def attention_of(gpu: Gpu, call: Call, grad: bool) -> Any:
    """What `attnhub.attention` launches for such a call, and then its backward."""
    call = again(call)
    q, k, v = call.q, call.k, call.v
    if grad:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    found = attnhub.attention(
        q, k, v, call.mask, softmax_scale=call.softmax_scale, softcap=call.softcap, sinks=call.sinks, return_lse=call.need_lse, backend="triton",
    )  # fmt: skip
    out = found[0] if call.need_lse else found
    assert isinstance(out, Tensor)
    launched = [seen(gpu, tensors_of(call))]
    if grad:
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        launched += [seen(gpu, {**tensors_of(call), "out": out}), *((g.shape, g.stride()) for g in grads)]
    return launched, out.shape, out.stride()


def test_attention_launches_what_triton_would(gpu: Gpu, chosen: None, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    """Through the public call, which asks the plan for its shorter way."""
    found = {name: call for name, call in calls().items() if call.varlen is None and call.block_table is None}
    names = [(name, grad) for name, call in found.items() for grad in (False, True) if not (grad and call.need_lse)]
    expected = {}
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_DIRECT", False)
        for name, grad in names:
            runtime.clear()
            expected[name, grad] = attention_of(gpu, found[name], grad)
    assert not replays
    runtime.clear()
    order = names * 3
    random.Random(2).shuffle(order)
    for name, grad in order:
        assert attention_of(gpu, found[name], grad) == expected[name, grad], (name, grad)
    assert len(replays) > len(order)


def caches() -> dict[str, tuple[Tensor, attnhub.KVCache, dict[str, Any]]]:
    """Calls of `attnhub.attention` that read a cache and append nothing: q, the cache, further arguments."""
    q = randn(2, 4, 1, 64)
    pages = randn(9, 2, 16, 64), randn(9, 2, 16, 64)
    rows = randn(2, 2, 96, 64), randn(2, 2, 96, 64)
    table, used = ints(*range(8)).reshape(2, 4), ints(33, 2)
    tokens_first = [x.transpose(1, 2).contiguous() for x in pages]
    return {
        "paged": (q, attnhub.KVCache(*pages, used, table), {}),
        "paged, causal, lse": (q, attnhub.KVCache(*pages, used, table), {"mask": Causal(), "return_lse": True}),
        "paged, window, softcap": (q, attnhub.KVCache(*pages, used, table), {"mask": Causal() & Window(9), "softcap": 3.0, "softmax_scale": 0.3}),
        "paged, bshd": (q, attnhub.KVCache(*tokens_first, used, table, layout="bshd"), {}),
        "paged, more queries": (randn(2, 4, 80, 64), attnhub.KVCache(*pages, used, table), {"mask": Causal()}),
        "paged, wider table": (q, attnhub.KVCache(*pages, used, table.repeat(1, 2)), {}),
        "contiguous": (q, attnhub.KVCache(*rows, used), {}),
        "rows chosen": (q, attnhub.KVCache(*rows, used, cache_batch_idx=ints(1, 0)), {}),
        "paged, shifted q": (shifted(q), attnhub.KVCache(*pages, used, table), {}),
        "paged, shifted table": (q, attnhub.KVCache(*pages, used, shifted(table)), {}),
        "paged, sliced table": (q, attnhub.KVCache(*pages, used, table.repeat(1, 2)[:, :4]), {}),
        "paged, strided lengths": (q, attnhub.KVCache(*pages, used.repeat(2)[::2], table), {}),
        "paged, negative scale": (q, attnhub.KVCache(*pages, used, table), {"softmax_scale": -0.3}),
    }  # fmt: skip


def reading_of(gpu: Gpu, q: Tensor, cache: attnhub.KVCache, arguments: dict[str, Any]) -> Any:
    """What a call launches, with its tensors elsewhere in memory than those given."""
    names = ("k_cache", "v_cache", "cache_seqlens", "block_table", "cache_batch_idx")
    tensors = {name: relaid(x) for name, x in (("q", q), *((name, getattr(cache, name)) for name in names)) if x is not None}
    elsewhere = attnhub.KVCache(layout=cache.layout, **{name: x for name, x in tensors.items() if name != "q"})
    found = attnhub.attention(tensors["q"], kv_cache=elsewhere, backend="triton", **arguments)
    out = found[0] if isinstance(found, tuple) else found
    return seen(gpu, tensors), out.shape, out.stride()


def relaid(x: Tensor) -> Tensor:
    """A copy with the same strides, as far from an aligned address."""
    offset = x.data_ptr() % 16 // x.element_size()
    flat = x.as_strided((sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1,), (1,))
    room = torch.empty(flat.numel() + offset + 16, dtype=x.dtype)
    room = room[-room.data_ptr() % 16 // x.element_size() :][offset : offset + flat.numel()]
    return room.copy_(flat).as_strided(x.shape, x.stride())


@pytest.mark.parametrize("name", caches())
def test_a_cache_is_read_again_the_short_way(name: str, gpu: Gpu, chosen: None, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    """Neither normalised nor keyed once more, unless an address or a stride is none that the short way is for; and the same launches."""
    case = caches()[name]
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_DIRECT", False)
        expected = reading_of(gpu, *case)
    runtime.clear()
    counted = {"normalised": 0, "keyed": 0}

    def counting(what: str, function: Any) -> Any:
        def counted_function(*args: Any, **named: Any) -> Any:
            counted[what] += 1
            return function(*args, **named)

        return counted_function

    monkeypatch.setattr(attnhub.arguments, "normalise", counting("normalised", attnhub.arguments.normalise))
    monkeypatch.setattr(launcher, "call_key", counting("keyed", launcher.call_key))
    assert reading_of(gpu, *case) == expected
    before = dict(counted)
    for _ in range(3):
        assert reading_of(gpu, *case) == expected
    long = any(word in name for word in ("shifted", "sliced", "strided", "negative"))
    assert (counted["normalised"] - before["normalised"], counted["keyed"] - before["keyed"]) == ((3, 3) if long else (0, 0))
    assert len(replays) == 3
    decision = attnhub.last_decision()
    assert decision is not None and decision.chosen == "triton"


def test_the_short_way_to_a_cache_refuses_what_the_long_one_does(gpu: Gpu, chosen: None) -> None:
    """After a call that was right, one that is wrong in something still says so."""
    q, cache, _ = caches()["paged"]

    def attend(q: Tensor = q, cache: attnhub.KVCache = cache, **arguments: Any) -> Any:
        return attnhub.attention(q, kv_cache=cache, backend="triton", **arguments)

    attend()
    attend()
    learnt = attnhub.KVCache(cache.k_cache.clone().requires_grad_(), cache.v_cache, cache.cache_seqlens, cache.block_table)
    k = randn(2, 2, 1, 64)
    for error, words, wrong in (
        (ValueError, "has no gradient", {"q": q.clone().requires_grad_()}),
        (ValueError, "has batch 1", {"q": q[:1]}),
        (ValueError, "head_dim", {"q": randn(2, 4, 1, 32)}),
        (ValueError, "multiple", {"q": randn(2, 3, 1, 64)}),
        (ValueError, "one dtype", {"q": q.to(torch.float16)}),
        (ValueError, "SeqLens and kv_cache", {"mask": SeqLens(ints(3, 3))}),
        (TypeError, "give both", {"k": k}),
        (TypeError, "softmax_scale is a list", {"softmax_scale": [1]}),
        (ValueError, "finite", {"softmax_scale": float("inf")}),
        (ValueError, "softcap", {"softcap": -1.0}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            attend(**wrong)
    gpu.launched.clear()
    attend(cache=learnt, q=q)
    assert gpu.launched


def test_last_decision_tells_what_compiling_took(gpu: Gpu, chosen: None) -> None:
    q = randn(2, 4, 80, 64)
    before = attnhub.explain(q, q, q, backend="triton")
    attnhub.attention(q, q, q, backend="triton")
    for decision in (attnhub.last_decision(), attnhub.explain(q, q, q, backend="triton")):
        assert decision is not None and decision.plan["backend"] == "triton"
        assert decision.plan["forward"]["compile_seconds"] >= 0 and decision.plan["grad_q"]["compile_seconds"] is None
    assert before.plan == {}


def moved(call: Call, device: str) -> Call:
    """The same call on a device, in the same layout."""

    def on(x: Any) -> Any:
        if isinstance(x, tuple) and isinstance(x[0], Tensor):
            return tuple(map(on, x))
        if not isinstance(x, Tensor):
            return x
        # All that is reached through the strides, at the same distance from an aligned address.
        offset = x.data_ptr() % 16 // x.element_size()
        flat = x.as_strided((sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1,), (1,))
        room = torch.empty(flat.numel() + offset, dtype=x.dtype, device=device)
        room[offset:].copy_(flat)
        return room[offset:].as_strided(x.shape, x.stride())

    mask, varlen = call.mask, call.varlen
    if mask is not FULL:
        mask = dataclasses.replace(mask, **{field.name: on(getattr(mask, field.name)) for field in dataclasses.fields(mask)})
    if varlen is not None:
        varlen = Varlen(on(varlen.cu_seqlens_q), on(varlen.cu_seqlens_k), varlen.max_seqlen_q, varlen.max_seqlen_k)
    return Call(
        on(call.q), on(call.k), on(call.v), mask, call.softmax_scale, call.softcap, on(call.sinks), call.dropout_p, on(call.rng), varlen,
        on(call.block_table), call.need_lse,
    )  # fmt: skip


def same_bits(got: Any, want: Any) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.gpu
@pytest.mark.parametrize("name", calls())
def test_replayed_on_a_gpu(name: str, replays: list[Any]) -> None:
    """The same bits as the first time: elsewhere in memory, on another stream, in a CUDA graph, in the backward."""
    call = calls()[name]
    shared = plan()
    with torch.cuda.device(0):
        first = shared.forward(moved(call, "cuda"))
        assert same_bits(shared.forward(moved(call, "cuda")), first) and len(replays) == 1
        here = moved(call, "cuda")
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            there = shared.forward(here)
        side.synchronize()
        assert same_bits(there, first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = shared.forward(here)
        for x in captured:
            if x is not None:
                x.fill_(7)
        graph.replay()
        assert same_bits(captured, first) and len(replays) == 3
        if name.startswith("paged"):
            return
        call.need_lse = True
        grads = []
        for _ in range(3):
            here = moved(call, "cuda")
            out, lse = shared.forward(here)
            assert lse is not None
            grads.append(shared.backward(here, torch.ones_like(out), None, out, lse, Needs(sinks=call.sinks is not None)))
        assert same_bits(grads[1], grads[0]) and same_bits(grads[2], grads[0]) and len(replays) >= 3 + 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_replayed_on_the_other_gpu() -> None:
    call, shared = calls()["lse"], plan()
    with torch.cuda.device(0):
        first = shared.forward(moved(call, "cuda:0"))
        for _ in range(2):
            other = shared.forward(moved(call, "cuda:1"))
            assert all(x is not None and x.device.index == 1 for x in other)
            assert torch.cuda.current_device() == 0
            assert same_bits([x.to("cuda:0") for x in other if x is not None], first)
        assert same_bits(shared.forward(moved(call, "cuda:0")), first)


@pytest.mark.parametrize(
    ("batch", "heads", "length", "parts"),
    [(1, 1, 256, True), (2, 1, 512, True), (1, 8, 512, False), (4, 1, 1024, True), (1, 8, 1024, False)],
)
def test_parts_of_sums_lie_in_memory_only_where_they_pay_off(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, batch: int, heads: int, length: int, parts: bool
) -> None:
    """64 programs on 132 multiprocessors divide loops of 16 key tiles and not of 8; their parts would be four times the output."""
    kept, buffer = [], launch.Recorder.buffer

    def named(self: launch.Recorder, name: str, x: Tensor) -> Tensor:
        kept.append(name)
        return buffer(self, name, x)

    monkeypatch.setattr(launch.Recorder, "buffer", named)
    monkeypatch.setattr(hopper, "serves_problem", lambda problem: False)
    q, k, v = (randn(batch, heads, length, 64) for _ in range(3))
    plan().forward(Call(q, k, v, FULL, 0.125))
    assert "out" in kept and ("partial_out" in kept) == parts


@pytest.mark.parametrize(("softcap", "by_hopper"), [(30.0, True), (1000.0, True), (1e6, False)])
def test_large_softcaps_take_the_exact_tanh(gpu: Gpu, softcap: float, by_hopper: bool) -> None:
    """An error of 1e-7 in tanh is one of a tenth in a score capped at a million."""
    q, k, v = (randn(2, 16, 512, 64) for _ in range(3))
    shared = launcher.TritonPlan(Problem(H100, "bfloat16", "bfloat16", 64, 64, 16, 16, 2, 512, 512))
    out, lse = shared.forward(Call(q, k, v, Causal(), 0.125, softcap=softcap, need_lse=True))
    assert lse is not None
    shared.backward(Call(q, k, v, Causal(), 0.125, softcap=softcap), out, None, out, lse, Needs())
    names = [kernel.specialised[0] for kernel, *_ in gpu.launched]
    assert len(names) >= 3 and all(name.startswith("hopper") == by_hopper for name in names), names


@pytest.mark.parametrize(
    ("page_size", "batch", "role"),
    [(16, 64, "decode_paged"), (48, 64, "decode_paged"), (64, 64, "decode"), (192, 64, "decode"), (16, 4, "decode"), (0, 64, "decode")],
)
def test_small_pages_for_a_full_device_have_tiles_of_their_own(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, page_size: int, batch: int, role: str) -> None:
    shared = launcher.TritonPlan(Problem(H100, "bfloat16", "bfloat16", 64, 64, 4, 2, batch, 1, 192))
    tried = []
    original = launcher.TritonPlan._try
    monkeypatch.setattr(launcher.TritonPlan, "_try", lambda self, role, run: (tried.append(role), original(self, role, run))[1])
    q, used = randn(batch, 4, 1, 64), torch.full((batch,), 192, dtype=torch.int32)
    if page_size:
        count = 192 // page_size
        pages = randn(batch * count, 2, page_size, 64)
        shared.forward(Call(q, pages, pages, SeqLens(used), 0.125, block_table=torch.zeros(batch, count, dtype=torch.int32)))
    else:
        k = randn(batch, 2, 192, 64)
        shared.forward(Call(q, k, k, SeqLens(used), 0.125))
    assert tried == [role]
