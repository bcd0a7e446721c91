"""Devices by name: classes that `attnhub explain` can be asked about without having them, and those of this machine."""

from __future__ import annotations

import platform
from typing import Any

from attnhub.cli import CommandError
from attnhub.problem import DeviceInfo

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512"}

#: class -> the device. Architectures: NVIDIA's CUDA programming guide, table of compute capabilities; AMD's ROCm list of gfx targets.
CLASSES: dict[str, DeviceInfo] = {
    "v100": DeviceInfo("cuda", "nvidia", (7, 0), "NVIDIA V100"),
    "t4": DeviceInfo("cuda", "nvidia", (7, 5), "NVIDIA T4"),
    "a100": DeviceInfo("cuda", "nvidia", (8, 0), "NVIDIA A100"),
    "a10": DeviceInfo("cuda", "nvidia", (8, 6), "NVIDIA A10"),
    "rtx3090": DeviceInfo("cuda", "nvidia", (8, 6), "NVIDIA RTX 3090"),
    "l4": DeviceInfo("cuda", "nvidia", (8, 9), "NVIDIA L4"),
    "l40s": DeviceInfo("cuda", "nvidia", (8, 9), "NVIDIA L40S"),
    "rtx4090": DeviceInfo("cuda", "nvidia", (8, 9), "NVIDIA RTX 4090"),
    "h100": DeviceInfo("cuda", "nvidia", (9, 0), "NVIDIA H100"),
    "h200": DeviceInfo("cuda", "nvidia", (9, 0), "NVIDIA H200"),
    "b200": DeviceInfo("cuda", "nvidia", (10, 0), "NVIDIA B200"),
    "rtx5090": DeviceInfo("cuda", "nvidia", (12, 0), "NVIDIA RTX 5090"),
    "mi250": DeviceInfo("cuda", "amd", (9, 0, 10), "AMD Instinct MI250"),
    "mi300": DeviceInfo("cuda", "amd", (9, 4, 2), "AMD Instinct MI300"),
    "apple": DeviceInfo("mps", "apple", (), "Apple GPU"),
    "xpu-intel": DeviceInfo("xpu", "intel", (), "Intel GPU"),
    "x86-64": DeviceInfo("cpu", "x86_64", (), "any x86-64"),
    "avx2": DeviceInfo("cpu", "x86_64", (), "x86-64 with AVX2", _AVX2),
    "avx512": DeviceInfo("cpu", "x86_64", (), "x86-64 with AVX-512", _AVX512),
    "avx512-bf16": DeviceInfo("cpu", "x86_64", (), "x86-64 with AVX-512 BF16", _AVX512 | {"avx512_bf16"}),
    "amx": DeviceInfo("cpu", "x86_64", (), "Intel Xeon with AMX", _AVX512 | {"avx512_bf16", "amx_bf16"}),
    "aarch64": DeviceInfo("cpu", "aarch64", (), "64-bit Arm", frozenset({"neon"})),
}


def resolve(name: str) -> tuple[DeviceInfo, bool]:
    """(device, whether it is one of this machine). name: ``cpu``, ``cuda``, ``cuda:1``, ``xpu``, ``mps``, or a class."""
    if name in CLASSES:
        return CLASSES[name], False
    kind = name.split(":", maxsplit=1)[0]
    if kind not in ("cpu", "cuda", "xpu", "mps"):
        raise CommandError(f"--device {name}: neither a device (cpu, cuda, xpu, mps) nor a class ({', '.join(CLASSES)})")
    try:
        import torch

        from attnhub.device import describe

        index = int(name.split(":")[1]) if ":" in name else 0
        return describe(torch.device(kind) if kind in ("cpu", "mps") else torch.device(kind, index)), True
    except Exception as error:
        if kind == "cpu":
            return DeviceInfo("cpu", platform.machine().lower()), True
        raise CommandError(
            f"--device {name}: this machine has none ({type(error).__name__}: {error}); name a class instead: "
            + ", ".join(c for c, info in CLASSES.items() if info.type == kind)
        ) from error


def asked(name: str, instead: str) -> Any:
    """torch's device of a name; of ``cuda`` the current one. instead: what can be done where torch finds none."""
    import torch

    from attnhub.device import named

    if name.split(":", maxsplit=1)[0] == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"torch finds no CUDA device here; {instead}")
    try:
        device = named(name, "--device ")
    except ValueError as error:
        raise CommandError(str(error)) from None
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device
