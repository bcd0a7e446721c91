"""Compiled kernels on devices, and torch's stream in the form that CuPy launches on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.backend import Call, Plan, PrepareError
from attnhub.backends.cuda import compile
from attnhub.reasons import Code, Reason


class Stream:
    """What CuPy wants of a stream."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def _public_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# The private function takes 0.1 us, the public one 6.
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)
_thread = threading.local()


def pointer(tensor: Optional[Tensor], kept: list[Tensor]) -> int:
    """Address of a small contiguous tensor or 0. A copy that had to be made goes to ``kept``, to outlive the launch."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        kept.append(tensor)
    return tensor.data_ptr()


class CubinPlan(Plan):
    """A plan of one compiled kernel, loaded on the devices that have used it."""

    def __init__(self, cubin: str, shared_bytes: int) -> None:
        self._cubin = cubin
        self._shared_bytes = shared_bytes
        self._functions: dict[int, Any] = {}
        self._lock = threading.Lock()

    def load(self, index: int) -> Any:
        """The kernel on device ``index``. Loading is not allowed while a CUDA graph is captured: `prepare` does it before."""
        with self._lock:
            function = self._functions.get(index)
            if function is None:
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
                    function = self._functions[index] = kernel.kernel
            return function

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        index = call.q.get_device()
        if index == current_device():
            return self._launch(call, index)
        with torch.cuda.device(index):
            return self._launch(call, index)

    def _launch(self, call: Call, index: int) -> tuple[Tensor, Optional[Tensor]]:
        raise NotImplementedError

    def _function(self, index: int) -> Any:
        function = self._functions.get(index) or self.load(index)
        if index not in getattr(_thread, "bound", ()):
            _bind_thread(index)
        return function


def _bind_thread(index: int) -> None:
    """Makes the device's context current in this thread: CuPy launches by the driver's interface, which does not do it."""
    import cupy

    cupy.cuda.runtime.setDevice(index)
    _thread.bound = getattr(_thread, "bound", frozenset()) | {index}
