"""Torch devices as `DeviceInfo`: vendor, architecture, instruction sets."""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch

from attnhub.problem import DeviceInfo


@functools.lru_cache(maxsize=64)
def describe(device: torch.device) -> DeviceInfo:
    """What backends need to know of a device. Initialises CUDA only for a CUDA device."""
    if device.type == "cpu":
        return DeviceInfo("cpu", platform.machine().lower(), (), _cpu_name(), cpu_isa())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return DeviceInfo("cuda", "amd", _gfx(properties.gcnArchName), properties.name)
        return DeviceInfo("cuda", "nvidia", (properties.major, properties.minor), properties.name)
    if device.type == "mps":
        return DeviceInfo("mps", "apple", (), "Apple GPU")
    if device.type == "xpu":
        return DeviceInfo("xpu", "intel", (), torch.xpu.get_device_name(device))
    return DeviceInfo(device.type)


def named(value: Any, argument: str = "device=") -> torch.device:
    """The torch device of a name. ValueError, by the name of the argument, for what is none or is not in this machine."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"{argument}{value!r}: a device of torch is needed: cpu, cuda, cuda:1, xpu or mps") from None
    if device.type == "cpu":
        return device
    backend: Any = torch.backends.mps if device.type == "mps" else getattr(torch, device.type, None)
    if not hasattr(backend, "is_available") or not backend.is_available():
        raise ValueError(f"{argument}{str(device)!r}: torch {torch.__version__} finds no {device.type} device here; `attnhub doctor` lists what there is")
    count = backend.device_count() if hasattr(backend, "device_count") else 1
    if (device.index or 0) >= count:
        raise ValueError(f"{argument}{str(device)!r}: torch finds {count} {device.type} device{'s' * (count != 1)} here, counted from {device.type}:0")
    return device


def _gfx(name: str) -> tuple[int, ...]:
    """``gfx942:sramecc+`` -> (9, 4, 2); ``gfx90a`` -> (9, 0, 10); ``gfx1100`` -> (11, 0, 0)."""
    digits = name.split(":", 1)[0].removeprefix("gfx")
    return (int(digits[:-2]), int(digits[-2], 16), int(digits[-1], 16))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


#: our name -> flags of /proc/cpuinfo that must all be there.
_ISA_FLAGS = {
    "avx2": ("avx2",),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_bf16", "amx_tile"),
    "neon": ("asimd",),
}


@functools.lru_cache(maxsize=1)
def cpu_isa() -> frozenset[str]:
    """Instruction sets of this CPU that matter here. Without /proc/cpuinfo: what torch says of it."""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
    except OSError:
        capability = torch.backends.cpu.get_cpu_capability()
        flags = set()
        if capability in ("AVX2", "AVX512"):
            flags |= {"avx2", "fma", "f16c"}
        if capability == "AVX512":
            flags |= set(_ISA_FLAGS["avx512"])
    return frozenset(name for name, needed in _ISA_FLAGS.items() if flags.issuperset(needed))


