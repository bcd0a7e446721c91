"""Kernels from source to cubin, with a cache on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from attnhub.backends.cuda.nvrtc import Nvrtc
from attnhub.backends.cuda.variant import Variant

KERNELS = Path(__file__).parent / "kernels"
MAIN = "forward.cu"
ENTRY = "attnhub_forward"


@lru_cache(maxsize=1)
def sources() -> dict[str, str]:
    """File name -> text of everything that is compiled."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(KERNELS.glob("*.cu*"))}


def headers() -> dict[str, str]:
    """What the main file includes, for NVRTC."""
    return {name: text for name, text in sources().items() if name != MAIN}


def key(variant: Variant, version: tuple[int, int]) -> str:
    """Name of a cubin in the cache: everything that it depends on."""
    digest = hashlib.sha256()
    for part in (str(version), *variant.options(), *(x for item in sources().items() for x in item)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def cubin(variant: Variant, nvrtc: Nvrtc, directory: Path) -> Path:
    """Path of the variant's cubin in ``directory``, compiled if it is not there. Raises `CompileError` or OSError.

    Safe against other processes and against being killed: a file appears under its name only when it is complete.
    """
    path = directory / f"{key(variant, nvrtc.version)}.cubin"
    if not path.exists():
        compiled = nvrtc.compile(sources()[MAIN], MAIN, headers(), variant.options())
        write_atomically(path, compiled.cubin)
    return path


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
