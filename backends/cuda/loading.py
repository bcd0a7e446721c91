"""Compiled kernels on devices, launched on torch's stream with one argument that lies in memory of ours."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Optional, TypeVar

import numpy as np
import torch
from torch import Tensor

from attnhub.backend import Call, Plan, PrepareError
from attnhub.backends.cuda import compile
from attnhub.reasons import Code, Reason

#: (stream, `Argument.parameters`, 0) -> launched, or CuPy's CUDADriverError.
Start = Callable[[int, int, int], None]


class Argument:
    """Memory of a kernel's one argument.

    The driver copies it before a launch returns, so that the next launch may have the same memory; CuPy lets other threads run meanwhile,
    so that each thread needs its own.
    """

    def __init__(self, size: int) -> None:
        # The driver wants tensor maps at addresses that are multiples of 64.
        memory = np.zeros(size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.address: int = memory.ctypes.data + start
        self.buffer = memory[start : start + size].data
        self._pointers = (ctypes.c_void_p * 1)(self.address)
        #: What the driver takes: where the addresses of arguments are.
        self.parameters = ctypes.addressof(self._pointers)


class Kernel:
    """A kernel of one argument on one device.

    function: CuPy's. launch: `cupy.cuda.driver.launchKernel`, in which the function's call ends after work of its own.
    """

    def __init__(self, function: Any, launch: Callable[..., None]) -> None:
        self._function = function  # keeps the module loaded
        self._launch = launch

    def sized(self, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int) -> Start:
        return partial(self._launch, self._function.ptr, *grid, *block, shared_bytes)


def _public_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# The private function takes 0.1 us, the public one 6.
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)


def _public_empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


#: (shape, strides, dtype) -> a tensor on the current device. The private function is what compiled graphs allocate by: it passes by the
#: dispatcher, and takes half of torch.empty_like's time. It takes plain tuples only.
empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", _public_empty
)
_thread = threading.local()


def pointer(tensor: Optional[Tensor], kept: list[Tensor]) -> int:
    """Address of a small contiguous tensor or 0. A copy that had to be made goes to ``kept``, to outlive the launch."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        kept.append(tensor)
    return tensor.data_ptr()


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def remember(found: dict[_Key, _Value], key: _Key, value: _Value, most: int) -> _Value:
    """Puts the value into a dict of at most so many, whose oldest ones go."""
    while len(found) >= most:
        del found[next(iter(found))]
    found[key] = value
    return value


class LaunchOfThread(threading.local):
    """The launch of a `Plan.repeat`, which each thread has for itself."""

    launch: Any = None


def lasting(make: Callable[[], Tensor], index: int) -> Tensor:
    """What ``make`` makes on the current stream of device ``index``, to be kept for later launches there.

    In another thread: while torch.compile warms up a CUDA graph, what its own thread allocates lies in the graph's memory, where nothing may stay.
    """
    stream = torch.cuda.current_stream(index)

    def work() -> Tensor:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


class CubinPlan(Plan):
    """A plan of one compiled kernel, loaded on the devices that have used it."""

    def __init__(self, cubin: str, shared_bytes: int) -> None:
        self._cubin = cubin
        self._shared_bytes = shared_bytes
        self._kernels: dict[int, Kernel] = {}
        self._lock = threading.Lock()

    def load(self, index: int) -> Kernel:
        """The kernel on device ``index``. Loading is not allowed while a CUDA graph is captured: `prepare` does it before."""
        with self._lock:
            found = self._kernels.get(index)
            if found is None:
                import cupy

                with torch.cuda.device(index):
                    _bind_thread(index)
                    kernel = cupy.RawModule(path=self._cubin).get_function(compile.ENTRY)
                    try:
                        kernel.max_dynamic_shared_size_bytes = self._shared_bytes
                    except Exception as error:  # CuPy's CUDADriverError; its type cannot be named without importing CuPy
                        raise PrepareError(
                            Reason(Code.OUT_OF_RESOURCES, f"the kernel needs {self._shared_bytes} bytes of shared memory: {error}")
                        ) from error
                    found = self._kernels[index] = Kernel(kernel.kernel, cupy.cuda.driver.launchKernel)
            return found

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        index = call.q.get_device()
        if index == current_device():
            return self._launch(call, index)
        with torch.cuda.device(index):
            return self._launch(call, index)

    def _launch(self, call: Call, index: int) -> tuple[Tensor, Optional[Tensor]]:
        raise NotImplementedError

    def _kernel(self, index: int) -> Kernel:
        """The kernel on device ``index``, ready to be launched by this thread."""
        found = self._kernels.get(index) or self.load(index)
        if index not in getattr(_thread, "bound", ()):
            _bind_thread(index)
        return found


def _bind_thread(index: int) -> None:
    """Makes the device's context current in this thread: CuPy launches by the driver's interface, which does not do it."""
    import cupy

    cupy.cuda.runtime.setDevice(index)
    _thread.bound = getattr(_thread, "bound", frozenset()) | {index}
