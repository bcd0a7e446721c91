"""The native ONNX Runtime library: where it is, how a session gets it, and how often it ran. Needs neither torch nor onnx."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    import onnxruntime

FILE = "libattnhub_onnx.so"
#: The oldest ONNX Runtime that the library was run on. (Its interface, version 17, is that of 1.17.)
MIN_RUNTIME = (1, 20)


def library_path() -> str:
    """Path of the shared library, for `SessionOptions.register_custom_ops_library` and the C, C++, C# or Java interfaces.

    Raises FileNotFoundError if this installation was made without a C++ compiler.
    """
    path = importlib.resources.files("attnhub.backends.onnx") / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} was not built: install a C++17 compiler and reinstall attnhub (in a checkout: "
            "cmake -S . -B build/dev -DATTNHUB_INPLACE=ON && cmake --build build/dev). "
            "Files exported by attnhub run without it, through the function bodies that they carry."
        )
    return str(path)


def register(session_options: Optional[onnxruntime.SessionOptions] = None) -> onnxruntime.SessionOptions:
    """Make sessions with these options run attnhub's nodes by the native kernel. Returns the options, new ones for None.

    Registering the same options again changes nothing. Raises ImportError without onnxruntime, RuntimeError for one older
    than 1.20, FileNotFoundError if the library was not built.
    """
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < MIN_RUNTIME:
        raise RuntimeError(f"onnxruntime {onnxruntime.__version__} is too old for attnhub's library: pip install 'onnxruntime>=1.20'")
    options = onnxruntime.SessionOptions() if session_options is None else session_options
    options.register_custom_ops_library(library_path())
    return options


def native_calls() -> int:
    """How many times the native kernel has run in this process: the proof that a session really uses it."""
    return int(_loaded().attnhub_onnx_calls())


@functools.lru_cache(maxsize=1)
def _loaded() -> Any:
    library = ctypes.CDLL(library_path())
    library.attnhub_onnx_calls.restype = ctypes.c_uint64
    library.attnhub_onnx_calls.argtypes = []
    return library
