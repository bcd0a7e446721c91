"""Launching kernels in little host time.

Triton binds and specialises every argument at every call, and these kernels have about eighty. There are three ways to launch
them, each for what the next one cannot do:

- Triton's own, ``kernel[grid](...)``: compiles; also the way while a profiler's hooks are set, under the interpreter, on devices other
  than NVIDIA's (AMD specialises on more than is known here), and with a Triton whose launcher nobody has looked at.
- The compiled kernel, found under a key of our own that holds what Triton specialises on: for a call with new lengths or strides.
- `Recording.replay`: for a call that repeats an earlier one in everything but where its tensors lie.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from attnhub import config
from attnhub.backend import PrepareError
from attnhub.backends.triton.tiles import Tiles
from attnhub.reasons import Code, Reason

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
#: In these versions a compiled kernel's `run` takes the grid, stream, function, metadata, hooks, and then all of the kernel's
#: arguments, constants included; an integer may stand for a pointer; and the rules of specialisation are those of `_specialised`.
_DIRECT = (3, 3) <= _VERSION <= (3, 9) and torch.version.hip is None and getattr(torch.version, "xpu", None) is None and not config.triton_interpret()
_hooks: Any = triton.knobs.runtime if _VERSION >= (3, 4) else triton.compiler.CompiledKernel
#: Compiled kernels by what they were specialised on. The oldest half goes when they pass this number.
_MOST = 2048
_compiled: dict[tuple[Any, ...], Any] = {}
#: Kernel -> places of its parameters: constants, specialised on, neither.
_kinds: dict[Any, tuple[list[int], list[int], list[int]]] = {}
#: Types of arguments that say all there is to say.
_NUMBERS = frozenset({int, float, bool, str, type(None)})


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of the device. The interpreter pretends to a few, so that keys are divided there too."""
    if config.triton_interpret():
        return 8
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def hooked() -> bool:
    """Whether somebody, a profiler say, wants to see every launch."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    # From 3.5 on there always is a hook: a chain of calls, which may be empty.
    return (enter is not None and bool(getattr(enter, "calls", True))) or (leave is not None and bool(getattr(leave, "calls", True)))


class Launched(NamedTuple):
    """What was launched. compiled: None if Triton's own way had to be taken. seconds: of a launch that had to compile or load first, else 0."""

    compiled: Any
    programs: int
    arguments: list[Any]
    seconds: float
    from_disk: Optional[bool]


def launch(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> Launched:
    """Run a Triton kernel over a one-dimensional grid on the current device and stream.

    arguments: by name, all that the kernel takes; what it does not take is passed over.
    """
    if programs >= 2**31:
        raise PrepareError(Reason(Code.TOO_LARGE, f"{programs} programs; a grid holds fewer than 2^31"))
    values = [arguments[name] for name in kernel.arg_names]
    # Multiply-adds may be fused; newer Tritons want that said.
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True}
    direct = _DIRECT and not hooked()
    key: tuple[Any, ...] = ()
    if direct:
        device = driver.active.get_current_device()
        key = (kernel.fn, device, tiles.num_warps, tiles.num_stages, *_specialised(kernel, values))
        compiled = _compiled.get(key)
        if compiled is not None:
            stream = driver.active.get_current_stream(device)
            compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
            return Launched(compiled, programs, values, 0.0, None)
    began, start = time.time(), time.perf_counter()
    compiled = kernel[(programs, 1, 1)](**dict(zip(kernel.arg_names, values)), **options)
    seconds, from_disk = time.perf_counter() - start, _was_on_disk(compiled, began)
    if not direct:
        return Launched(None, programs, values, seconds, from_disk)
    if len(_compiled) >= _MOST:
        for old in list(_compiled)[: _MOST // 2]:
            _compiled.pop(old, None)
    _compiled[key] = compiled
    return Launched(compiled, programs, values, seconds, from_disk)


def _entry(compiled: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What launches a compiled kernel without hooks, and its arguments between the stream and the kernel's own."""
    run = compiled.run
    if _VERSION in ((3, 5), (3, 6)) and run.global_scratch_size == run.profile_scratch_size == 0:
        # The C function behind `run`, which does nothing else for such a kernel and takes a microsecond for it.
        return run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata, None, None, None)
    return run, (compiled.function, compiled.packed_metadata, None, None, None)


def _specialised(kernel: Any, values: list[Any]) -> list[Any]:
    """What Triton compiles into a kernel of its arguments."""
    kinds = _kinds.get(kernel.fn)
    if kinds is None:
        kinds = _kinds[kernel.fn] = ([], [], [])
        for place, p in enumerate(kernel.params):
            kinds[0 if p.is_constexpr else 2 if p.do_not_specialize else 1].append(place)
    constant, specialised, runtime = kinds
    found = [values[place] for place in constant]
    for place in specialised:
        value = values[place]
        if isinstance(value, Tensor):
            found.append((value.dtype, value.data_ptr() % 16 == 0))
        elif type(value) is int and value > 1:
            # Divisible or not; 32 bits or 64.
            found.append((value % 16 == 0, value < 2**31))
        elif type(value) in _NUMBERS:
            found.append((type(value), value))
        else:
            # A tensor descriptor: all of it but the tensor, its sizes and its strides.
            fixed = {name: part for name, part in vars(value).items() if name not in ("base", "shape", "strides")}
            found.append((type(value), value.base.dtype, len(value.shape), repr(fixed)))
    for place in runtime:
        value = values[place]
        found.append(value.dtype if isinstance(value, Tensor) else type(value) if type(value) is not int else -(2**31) <= value < 2**31)
    return found


def _was_on_disk(compiled: Any, began: float) -> Optional[bool]:
    """Whether Triton found the kernel in its cache on disk: then the files are older than the call. None under the interpreter."""
    try:
        return max(os.stat(path).st_mtime for path in compiled.metadata_group.values()) < began
    except (AttributeError, OSError, TypeError, ValueError):
        return None


class _Step(NamedTuple):
    """One launch of a recording: ``run(programs, 1, 1, stream, *fixed, *arguments)``."""

    run: Callable[..., Any]
    fixed: tuple[Any, ...]
    programs: int
    #: In the kernel's order, without what changes from call to call.
    arguments: list[Any]
    #: (position in arguments, number of the tensor whose address goes there).
    pointers: tuple[tuple[int, int], ...]
    #: (position, number of the tensor, the descriptor without it).
    descriptors: tuple[tuple[int, int, Any], ...]
    #: Keeps the loaded module alive.
    compiled: Any


class Recording:
    """The launches of one call, without its tensors. It is never changed, so that threads may share it."""

    def __init__(self, device_type: str, buffers: list[tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype, bool]], steps: list[_Step]) -> None:
        self._buffers = buffers
        self._steps = steps
        self._empty = _allocator(device_type)
        self._current_stream = driver.active.get_current_stream

    def replay(self, like: Tensor, addresses: list[int]) -> dict[str, Tensor]:
        """Allocate the call's buffers on the device of ``like``, which must be current, and launch. addresses: of the inputs, as recorded."""
        buffers = {}
        empty = self._empty
        for name, shape, strides, dtype, zeroed in self._buffers:
            # Allocators of device memory align to more than Triton specialises on.
            buffers[name] = x = empty(shape, strides, dtype)
            if zeroed:
                x.zero_()
            addresses.append(x.data_ptr())
        stream = self._current_stream(like.get_device())
        for run, fixed, programs, template, pointers, descriptors, _ in self._steps:
            arguments = template.copy()
            for position, number in pointers:
                arguments[position] = addresses[number]
            for position, number, descriptor in descriptors:
                arguments[position] = _with_base(descriptor, _Address(addresses[number]))
            run(programs, 1, 1, stream, *fixed, *arguments)
        return buffers


def _allocator(device_type: str) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """An empty_strided(shape, strides, dtype) on the current device."""
    # What TorchInductor's generated code calls, in half the host time of torch.empty_strided.
    found: Any = getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}", None)
    return found or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device_type))


class Recorder:
    """Launches the kernels of one call and takes down what a `Recording` needs.

    Every tensor that a kernel is given must be one of ``inputs`` or have gone through `buffer`, the same object and no view of it: else the
    call works and is not recorded, since nobody knows how the tensor came about.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        # Each an object of its own: if one tensor is both k and v, only the object tells which of them an argument is.
        self.inputs = {name: x.detach() for name, x in inputs.items()}
        self.buffers: dict[str, Tensor] = {}
        self.zeroed: set[str] = set()
        self.launched: list[Launched] = []

    def buffer(self, name: str, x: Tensor) -> Tensor:
        """An uninitialised tensor that kernels write, to be allocated anew when the call is replayed."""
        self.buffers[name] = x
        return x

    def zeros(self, name: str, x: Tensor) -> Tensor:
        """As `buffer`, of a tensor that kernels find full of zeros."""
        self.zeroed.add(name)
        return self.buffer(name, x.zero_())

    def launch(self, kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
        self.launched.append(launch(kernel, programs, tiles, **arguments))

    def recording(self) -> Optional[Recording]:
        """None if a launch, or a tensor, was none that can be repeated."""
        numbers = {id(x): number for number, x in enumerate((*self.inputs.values(), *self.buffers.values()))}
        steps = []
        for compiled, programs, values, _, _ in self.launched:
            if compiled is None:
                return None
            arguments = list(values)
            pointers, descriptors = [], []
            for position, value in enumerate(values):
                if type(value) in _NUMBERS:
                    continue
                described = hasattr(value, "base")
                if not described and not isinstance(value, Tensor):
                    # A constant of another type, of Triton's.
                    continue
                number = numbers.get(id(value.base if described else value))
                if number is None:
                    return None
                arguments[position] = None
                if described:
                    descriptors.append((position, number, _with_base(value, None)))
                else:
                    pointers.append((position, number))
            steps.append(_Step(*_entry(compiled), programs, arguments, tuple(pointers), tuple(descriptors), compiled))
        device_type = next(iter(self.inputs.values())).device.type
        return Recording(device_type, [(name, tuple(x.shape), x.stride(), x.dtype, name in self.zeroed) for name, x in self.buffers.items()], steps)


class _Address:
    """What a descriptor's base has to be to a launcher."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _with_base(descriptor: Any, base: Optional[_Address]) -> Any:
    """A copy of a tensor descriptor that describes other memory."""
    copy = object.__new__(type(descriptor))
    copy.__dict__.update(descriptor.__dict__, base=base)
    return copy
