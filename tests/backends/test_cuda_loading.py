"""The cuda backend's kernels on devices, without one: what fails to load, arguments and launches of each thread, what is kept for later launches."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_launch import PROBLEM, Driver, field, tensors

from attnhub.backend import Call, PrepareError
from attnhub.backends.cuda import backend, decode, decode_params, decode_plan, hopper, hopper_params, hopper_plan, launcher, loading, params
from attnhub.backends.cuda.variant import make as make_portable
from attnhub.mask import FULL, Window
from attnhub.reasons import Code


class _Kernel:
    kernel = "the function"

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")


def _fake_cupy(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    runtime = SimpleNamespace(setDevice=lambda index: None)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=module, cuda=SimpleNamespace(runtime=runtime)))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "device", lambda index: __import__("contextlib").nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launcher, "_cubin", lambda variant: "kernel.cubin")


def test_too_little_shared_memory_is_a_prepare_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_cupy(monkeypatch, lambda path: SimpleNamespace(get_function=lambda name: _Kernel()))
    with pytest.raises(PrepareError, match="197120 bytes of shared memory") as caught:
        backend.prepare(PROBLEM)
    assert caught.value.reason.code is Code.OUT_OF_RESOURCES


def test_a_cubin_that_does_not_load_is_a_prepare_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> Any:
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available")

    _fake_cupy(monkeypatch, fail)
    with pytest.raises(PrepareError, match="NO_BINARY_FOR_GPU") as caught:
        backend.prepare(PROBLEM)
    assert caught.value.reason.code is Code.COMPILE_FAILED


@pytest.fixture(params=["hopper", "decode", "portable"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, driver: Driver) -> tuple[loading.CubinPlan, Call, list[tuple[int, ...]]]:
    """A plan for tensors of the host, a call of it, and what its kernel's launch is called with."""
    for module in (loading, hopper_plan, decode_plan, launcher):
        for name, found in (("current_device", lambda: -1), ("raw_stream", lambda index: 9), ("is_capturing", lambda: False), ("lasting", lambda make, index: make())):
            monkeypatch.setattr(module, name, found, raising=False)
        monkeypatch.setattr(module, "empty_strided", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype), raising=False)
    monkeypatch.setattr(loading, "_bind_thread", lambda index: None)
    monkeypatch.setattr(hopper_plan, "processors", lambda index: 132)
    monkeypatch.setattr(hopper_plan, "_memory", hopper_plan._Memory())
    monkeypatch.setattr(decode_plan, "slots", lambda index, shared_bytes: 132)
    monkeypatch.setattr(decode_plan, "_scratch", decode_plan._Scratch())
    monkeypatch.setattr(decode_plan, "_zeros", lambda count, index: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(decode_plan, "_floats", lambda count, index: torch.empty(count))
    call = Call(*tensors(1, 1 if request.param == "decode" else 200, 1000), FULL, 0.125)  # type: ignore[arg-type]
    plan: loading.CubinPlan
    if request.param == "hopper":
        plan = hopper_plan.HopperPlan(hopper.make("bfloat16", 64, 64), "", lambda: pytest.fail("not served"))
    elif request.param == "decode":
        plan = decode_plan.DecodePlan(decode.choose(dataclasses.replace(PROBLEM, head_dim=64, v_head_dim=64, seqlen_q=1)), "")
    else:
        plan = launcher.CudaPlan(make_portable(arch="sm_90", turing=False, dtype="bfloat16", head_dim=64, v_head_dim=64), "")
    calls: list[tuple[int, ...]] = []
    plan._kernels[-1] = loading.Kernel(SimpleNamespace(ptr=5), lambda *numbers: calls.append(numbers))
    return plan, call, calls


def test_each_thread_has_an_argument_of_its_own(started: Any) -> None:
    """CuPy lets another thread run while the driver reads it."""
    plan, call, calls = started

    def run() -> list[bool]:
        found = []
        for _ in range(3):
            assert plan.forward(call)[0].shape == call.q.shape
            found.append(again is not None and again(call.q, call.k, call.v) is not None)
        return found

    plan.forward(call)
    again = plan.repeat(call)
    mine = run()
    own = {numbers[-2] for numbers in calls}
    calls.clear()
    if again is not None:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(again, call.q, call.k, call.v).result() is None and not calls  # a thread's first call goes the long way
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() == mine
    theirs = {numbers[-2] for numbers in calls}
    assert len(own) == len(theirs) == 1 and own != theirs
    (where,) = theirs
    assert all(numbers[0] == 5 and numbers[-3:] == (9, where, 0) for numbers in calls)


@pytest.mark.parametrize("scale", [0.0, 1e-45])
def test_numbers_at_the_ends_of_their_ranges(scale: float, started: Any) -> None:
    """A position plus a window is an int, and the scale is no 0 in fp32, of which the -inf of a hidden score would make NaN."""
    plan, call, calls = started
    layout = {hopper_plan.HopperPlan: hopper_params, decode_plan.DecodePlan: decode_params, launcher.CudaPlan: params}[type(plan)]
    plan.forward(Call(call.q, call.k, call.v, Window((1 << 31) - 2, (1 << 31) - 2), scale))
    argument = ctypes.string_at(ctypes.c_void_p.from_address(calls[-1][-2]).value, sum(struct.calcsize("=" + code) for _, code in layout.FIELDS))
    longest = 1 << 30  # `CudaBackend.check`
    assert all(field(argument, f"window_{side}", layout) + longest < 1 << 31 for side in ("left", "right"))
    assert field(argument, "scale_log2", layout) >= torch.finfo(torch.float32).tiny


def test_an_error_of_a_launch_is_the_driver_s(started: Any) -> None:
    plan, call, _ = started

    def fail(*numbers: int) -> None:
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")

    plan._kernels[-1] = loading.Kernel(SimpleNamespace(ptr=5), fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
            plan.forward(call)


def test_the_driver_copies_from_where_an_argument_lies() -> None:
    arguments = [loading.Argument(size) for size in (8, 800, 833)]
    for n, argument in enumerate(arguments):
        argument.buffer[:] = bytes([n + 1]) * len(argument.buffer)
    for n, argument in enumerate(arguments):
        address = ctypes.c_void_p.from_address(argument.parameters).value
        assert address == argument.address and address % 64 == 0
        assert ctypes.string_at(address, len(argument.buffer)) == bytes([n + 1]) * len(argument.buffer)


def test_what_lasts_is_made_by_another_thread_on_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"stream of {index}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: setattr(current, "stream", stream) or contextlib.nullcontext())

    def make() -> Any:
        return threading.get_ident(), current.stream

    thread, stream = loading.lasting(make, 3)  # type: ignore[misc]
    assert thread != threading.get_ident() and stream == "stream of 3"
    with pytest.raises(ZeroDivisionError):
        loading.lasting(lambda: 1 // 0, 3)  # type: ignore[arg-type, return-value]


def test_raw_stream_is_torch_s() -> None:
    assert loading.raw_stream is getattr(torch._C, "_cuda_getCurrentRawStream", loading._public_stream)
