"""Kernels of the cuda backend compiled by NVRTC, without a GPU, and what the disassembler says of them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from attnhub.backends.cuda import compile, nvrtc

needs_nvrtc = pytest.mark.skipif(nvrtc.find() is None, reason="NVRTC is not installed")


def library() -> nvrtc.Nvrtc:
    found = nvrtc.find()
    assert found is not None
    return found


def compiled(variant: compile.Compilable) -> nvrtc.Compiled:
    """With the compiler's report."""
    included = {**compile.headers(), **variant.generated()}
    return library().compile(compile.sources()[variant.main], variant.main, included, (*variant.options(), "--ptxas-options=-v"))


def check_layout(header: str, size: int, offsets: Mapping[str, int]) -> None:
    """That a struct is laid out as Python packs it, by static_assert in the compiler's own words; a shifted field is a compile error."""
    asserts = [f"static_assert(sizeof(attnhub::Params) == {size});"]
    asserts += [f"static_assert(__builtin_offsetof(attnhub::Params, {name}) == {at});" for name, at in offsets.items()]
    options = ("-arch=sm_90a", "-std=c++17", "-default-device")
    source = f'#include "{header}"\n' + "\n".join(asserts)
    library().compile(source, "layout.cu", compile.headers(), options)
    with pytest.raises(nvrtc.CompileError, match=r"static_assert|static assertion"):
        library().compile(source.replace(f"== {size}", f"== {size + 64}"), "layout.cu", compile.headers(), options)


def disassembled(cubin: bytes, folder: Path, function: str = "") -> tuple[list[str], dict[str, int]]:
    """Instructions, from a function on, and labels among them, by the disassembler that Triton brings."""
    triton = pytest.importorskip("triton", reason="brings nvdisasm")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not tool.exists():
        pytest.skip("no nvdisasm")
    (folder / "kernel.cubin").write_bytes(cubin)
    text = subprocess.run([tool, "-c", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text[text.index(f".text.{function}:") if function else 0 :].splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
    return code, labels
