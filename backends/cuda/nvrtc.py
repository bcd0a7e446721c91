"""NVRTC, NVIDIA's run-time compiler, through ctypes: CUDA C++ to a cubin for any architecture, with or without a GPU.

CuPy's own compilation is not used, because it compiles for the device at hand only and needs one. The library comes with
the package ``nvidia-cuda-nvrtc`` (which torch's CUDA builds depend on) or with a CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

_TOOLKIT = Path("/usr/local/cuda/lib64")


class CompileError(RuntimeError):
    """NVRTC rejected the source or the options; the text is its log."""


class Compiled(NamedTuple):
    """A cubin and the compiler's log (with ``--ptxas-options=-v``: registers, stack and spills)."""

    cubin: bytes
    log: str


class Nvrtc:
    """A loaded NVRTC library. ``version`` is (major, minor)."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Some versions look for their built-ins on the linker's path only, and find them if they are loaded already.
        self._builtins = [ctypes.CDLL(str(builtins)) for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*")]
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def compile(self, source: str, name: str, headers: Mapping[str, str], options: Sequence[str]) -> Compiled:
        """Compiles ``source``; ``headers`` maps the names in its includes to their text. Raises `CompileError`."""
        program = ctypes.c_void_p()
        count = len(headers)
        texts = (ctypes.c_char_p * count)(*[text.encode() for text in headers.values()])
        names = (ctypes.c_char_p * count)(*[header.encode() for header in headers])
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), count, texts, names))
        try:
            arguments = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
            status = self._library.nvrtcCompileProgram(program, len(options), arguments)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"{self._error(status)} for {' '.join(options)}\n{log}")
            return Compiled(self._read(program, "CUBIN"), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            raise CompileError(self._error(status))

    def _error(self, status: int) -> str:
        text = self._library.nvrtcGetErrorString(status)
        return text.decode() if isinstance(text, bytes) else f"NVRTC error {status}"


@cache
def find(major: Optional[int] = None) -> Optional[Nvrtc]:
    """The NVRTC to use: of CUDA ``major`` if there is one (a cubin must suit the driver), else any. None if there is none."""
    others = []
    for candidate in _candidates():
        try:
            library = Nvrtc(candidate)
        except (OSError, AttributeError, CompileError):
            continue  # not a loadable NVRTC: the next candidate, and in the end NO_COMPILER, says it
        if major is None or library.version[0] == major:
            return library
        others.append(library)
    return others[0] if others else None


def _candidates() -> list[str]:
    found: list[str] = []
    try:
        packages = [Path(p) for p in importlib.import_module("nvidia").__path__]
    except ImportError:
        packages = []
    for folder in packages:
        found += sorted((str(p) for p in folder.glob("*/lib/libnvrtc.so.*") if _is_library(p)), reverse=True)
    found += [str(p) for p in _TOOLKIT.glob("libnvrtc.so.*") if _is_library(p)]
    found += ["libnvrtc.so.13", "libnvrtc.so.12"]
    by_linker = ctypes.util.find_library("nvrtc")
    return found + ([by_linker] if by_linker else [])


def _is_library(path: Path) -> bool:
    return re.fullmatch(r"libnvrtc\.so\.\d+", path.name) is not None
