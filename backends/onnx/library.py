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
#: Session options that the native library reads and sets (kernels/library.cpp).
MARK, CALLBACK = "attnhub.custom_ops", "attnhub.callback"


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


def register(
    session_options: Optional[onnxruntime.SessionOptions] = None, *, backend: Optional[str] = None, device: Optional[str] = None
) -> onnxruntime.SessionOptions:
    """See `attnhub.onnx.register`."""
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < MIN_RUNTIME:
        raise RuntimeError(f"onnxruntime {onnxruntime.__version__} is too old for attnhub's library: pip install 'onnxruntime>=1.20'")
    if device is not None and backend is None:
        raise ValueError(f"device={device!r} without backend: the native kernel runs on the CPU")
    options = onnxruntime.SessionOptions() if session_options is None else session_options
    if not isinstance(options, onnxruntime.SessionOptions):
        raise TypeError(f"session_options is a {type(options).__name__}: onnxruntime.SessionOptions or None is needed; a backend's name goes with backend=")
    wanted = _callback(backend, device)
    if _entry(options, MARK):
        if _entry(options, CALLBACK) != wanted:
            raise ValueError("these session options are registered with another backend; take new ones")
        return options
    if wanted:
        options.add_session_config_entry(CALLBACK, wanted)
    options.register_custom_ops_library(library_path())
    return options


def _callback(backend: Optional[str], device: Optional[str]) -> str:
    """The value of the session option, "" for the native kernel."""
    if backend is None:
        return ""
    from attnhub.backends.onnx import callback
    from attnhub.config import parse_names
    from attnhub.registry import registry

    unknown = [name for name in parse_names(backend, "backend") if name not in ("auto", *registry.names())]
    if unknown:
        raise ValueError(f"backend={backend!r}: {', '.join(unknown)} unknown; there are auto, {', '.join(registry.names())}")
    return str(callback.number_of(_loaded(), backend, device))


def _entry(options: onnxruntime.SessionOptions, key: str) -> str:
    try:
        return str(options.get_session_config_entry(key))
    except Exception:  # ONNX Runtime's way of saying that it is not there
        return ""


def native_calls() -> int:
    """How many times the native kernel has run in this process: the proof that a session really uses it."""
    return int(_loaded().attnhub_onnx_calls())


@functools.lru_cache(maxsize=1)
def _loaded() -> Any:
    library = ctypes.CDLL(library_path())
    library.attnhub_onnx_calls.restype = ctypes.c_uint64
    library.attnhub_onnx_calls.argtypes = []
    return library
