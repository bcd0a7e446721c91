"""A stand-in for a GPU with Triton: it compiles nothing, and writes down what it was asked to launch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnhub import config
from attnhub.backends.triton import launch, launcher
from attnhub.backends.triton.kernels import backward, combine, forward, hopper_forward, hopper_grad_kv, hopper_grad_q
from attnhub.problem import DeviceInfo, Problem

#: For tests whose GPU is this one.
MARKS = [
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


def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """In place of Triton's driver and compiler until the test ends."""
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
