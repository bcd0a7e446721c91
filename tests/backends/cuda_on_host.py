"""Compiles a CUDA kernel for the host, to run it without a GPU: what is asm becomes a call of a function in cuda_on_host.h."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from attnhub.backends.cuda import compile, loading

#: Beginning of an instruction -> function.
_FUNCTIONS = {
    "cp.async.cg.": "cp_async",
    "atom.acq_rel.gpu.global.add.s32": "draw",
    "cp.async.ca.": "copy_word",
    "cp.async.commit_group": "cp_async_commit",
    "cp.async.wait_group": "cp_async_wait",
    "cp.async.wait_all": "cp_async_wait_all",
    "ld.shared.v4.b32": "load4",
    "st.shared.v4.b32": "store4",
    "ld.shared.b32": "load1",
    "st.shared.b32": "store1",
    "st.global.v4.b32": "store_global4",
    "st.global.v2.b32": "store_global2",
    "ldmatrix.sync.aligned.m8n8.x4.shared": "blocks<false>",
    "ldmatrix.sync.aligned.m8n8.x4.trans": "blocks<true>",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16": "mma<host::BFloat16>",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16": "mma<host::Half>",
    "cvt.rn.bf16x2.f32": "pack<host::BFloat16>",
    "cvt.rn.f16x2.f32": "pack<host::Half>",
    "fma.rn.bf16x2": "taint<host::BFloat16>",
    "fma.rn.f16x2": "taint<host::Half>",
    "ex2.approx": "exp2",
    "bar.sync": "meet_pair",
    "barrier.sync 0;": "meet_anywhere",
    "rcp.approx": "reciprocal",
    "cvt.f32.f16": "widen",
}


def _closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at ``start``; there are none in strings."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    raise ValueError(text[start : start + 80])


def _call(statement: str) -> str:
    first = re.search(r'"([^"]*)"', statement)
    assert first is not None
    if not first[1]:
        return "(void)0"  # tells a compiler something
    name = next((name for beginning, name in _FUNCTIONS.items() if first[1].startswith(beginning)), "unknown")
    operands, at = [], 0
    while found := re.compile(r'"[=+]?[rflnh]"(\()').search(statement, at):
        at = _closing(statement, found.start(1))
        operands.append(statement[found.start(1) + 1 : at])
    return f"host::{name}({', '.join(operands)})"


def translate(source: str) -> str:
    """The source with calls in place of asm, and without what only a CUDA compiler knows."""
    out, at = "", 0
    while found := re.compile(r"asm (?:volatile)?\(|asm(?: volatile)?\(").search(source, at):
        end = _closing(source, found.end() - 1)
        out += source[at : found.start()] + _call(source[found.end() : end])
        at = end + 1
    out += source[at:]
    return re.sub(r"extern __shared__ .*?unsigned char (\w+)\[\];", r"unsigned char* \1 = host::shared.data();", out)


_MAIN = """
extern "C" void run(const attnhub::Params* params, unsigned blocks, unsigned threads, unsigned shared_bytes) {
    gridDim.x = blocks;
    host::launch(blocks, threads, shared_bytes, blockIdx, threadIdx, [params] { attnhub_forward(*params); });
}
extern "C" void set_backwards(int yes) { host::backwards = yes; }
extern "C" const char* failure() { return host::failure.c_str(); }
extern "C" int most_stores() {  // to one address
    int most = 0;
    for (const auto& [address, count] : host::stores) most = max(most, count);
    return most;
}
"""


def build(folder: Path, variant: Any) -> Any:
    """The library of a variant's kernel: ``run(params, blocks, threads, shared_bytes)``; ``set_backwards``, ``failure``, ``most_stores`` of _MAIN."""
    defines = [option for option in variant.options() if option.startswith("-D")]
    library = compile_host(folder, {**compile.sources(), **variant.generated()}, f'#include "{variant.main}"\n{_MAIN}', defines)
    library.failure.restype = ctypes.c_char_p
    return library


def kernel(run: Callable[[ctypes.c_void_p, int, int, int], Any]) -> loading.Kernel:
    """``run(params, blocks, threads, shared_bytes)`` in place of a kernel on a device."""

    def launch(function: int, *numbers: int) -> None:
        blocks, _, _, threads, _, _, shared_bytes, _, parameters, _ = numbers
        run(ctypes.c_void_p.from_address(parameters), blocks, threads, shared_bytes)

    return loading.Kernel(SimpleNamespace(ptr=0), launch)


def compile_host(folder: Path, sources: dict[str, str], main: str, defines: list[str]) -> Any:
    """The library of ``main``, C++ that includes some of the sources."""
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(translate(text))
    (folder / "main.cpp").write_text(f'#include "cuda_on_host.h"\n{main}')
    library = folder / "kernel.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{folder}", f"-I{Path(__file__).parent}", *defines, "main.cpp", "-o", library]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(library))
