"""NVRTC's options for a variant of a kernel."""

from __future__ import annotations

from collections.abc import Mapping

#: dtype -> the kernels' name of it: kernels/element.cuh.
ELEMENTS = {"float16": "Half", "bfloat16": "BFloat16"}


def options(arch: str, defines: Mapping[str, object]) -> tuple[str, ...]:
    """defines: name, without ATTNHUB_, -> value. Denormal fp32 values count as 0 (they lie far below one rounding unit of the result)."""
    return (
        f"-arch={arch}", "-std=c++17", "-default-device", "-ftz=true",
        *(f"-DATTNHUB_{name}={int(value) if isinstance(value, bool) else value}" for name, value in defines.items()),
    )  # fmt: skip
