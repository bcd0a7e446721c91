"""Kernels from source to cubin, with a cache on disk."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from attnhub import config
from attnhub.backends.cuda.nvrtc import Nvrtc

KERNELS = Path(__file__).parent / "kernels"
ENTRY = "attnhub_forward"
_REPORT = "--ptxas-options=-v"  # changes the log, not the cubin


class Compilable(Protocol):
    """A variant of a kernel."""

    @property
    def main(self) -> str:
        """The file that is compiled, a name in `sources`."""

    def generated(self) -> dict[str, str]:
        """Headers that are written for the variant: name -> text."""

    def options(self) -> tuple[str, ...]:
        """NVRTC's options."""


@lru_cache(maxsize=1)
def sources() -> dict[str, str]:
    """File name, below kernels/, -> text of everything that is compiled."""
    return {path.relative_to(KERNELS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(KERNELS.rglob("*.cu*"))}


def headers() -> dict[str, str]:
    """What main files include, for NVRTC."""
    return {name: text for name, text in sources().items() if name.endswith(".cuh")}


def key(variant: Compilable, version: tuple[int, int]) -> str:
    """Name of a cubin in the cache: everything that it depends on."""
    digest = hashlib.sha256()
    texts = {**sources(), **variant.generated()}
    for part in (str(version), variant.main, *variant.options(), *(x for item in texts.items() for x in item)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def cubin(variant: Compilable, nvrtc: Nvrtc, directory: Path) -> Path:
    """Path of the variant's cubin in ``directory``, compiled if it is not there. Raises `CompileError` or OSError.

    Processes that want the same wait for the first of them. Safe against being killed: a file appears under its name only when it is
    complete. With ATTNHUB_CUDA_KEEP what went in and came out is kept there, and compiled for it if need be.
    """
    name = key(variant, nvrtc.version)
    path, kept = directory / f"{name}.cubin", config.cuda_keep()
    keep = None if kept is None else kept / name
    if path.exists() and (keep is None or keep.exists()):
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / f"{name}.lock"):
        if not path.exists() or (keep is not None and not keep.exists()):
            included = {**headers(), **variant.generated()}
            compiled = nvrtc.compile(sources()[variant.main], variant.main, included, (*variant.options(), _REPORT))
            write_atomically(path, compiled.cubin)
            if keep is not None:
                _keep(keep, variant, nvrtc, included, compiled.cubin, compiled.log)
    return path


def _keep(folder: Path, variant: Compilable, nvrtc: Nvrtc, included: dict[str, str], binary: bytes, log: str) -> None:
    """Sources in the tree that ``nvcc -I folder`` could compile, options.txt, kernel.cubin and NVRTC's report of resources."""
    needed, found = [variant.main], {variant.main: sources()[variant.main]}
    while needed:
        for name in re.findall(r'#include "([^"]+)"', found[needed.pop()]):
            if name not in found:
                found[name] = included[name]
                needed.append(name)
    for name, text in found.items():
        write_atomically(folder / name, text.encode())
    write_atomically(
        folder / "options.txt", ("\n".join((f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]}", *variant.options())) + "\n").encode()
    )
    write_atomically(folder / "kernel.cubin", binary)
    write_atomically(folder / "report.txt", log.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that readers see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
