"""Whether CuPy, NVRTC and a device are here, and in which versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from attnhub.backends.cuda import nvrtc
from attnhub.backends.cuda.launcher import toolkit_major
from attnhub.reasons import Code, Reason


def _install() -> str:
    extra = "cuda12" if toolkit_major() == 12 else "cuda13"
    return f"pip install 'attnhub[{extra}]'"


def probe() -> tuple[Reason, ...]:
    """All reasons why the backend cannot run here."""
    return (*_cupy(), *_compiler(), *_device())


def _cupy() -> tuple[Reason, ...]:
    if importlib.util.find_spec("cupy") is None:
        return (Reason(Code.NOT_INSTALLED, "CuPy is not installed", _install()),)
    try:
        import cupy

        if torch.version.cuda and torch.cuda.is_available():
            cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # any failure of a foreign package's import, a wrong libcudart included
        return (
            Reason(Code.BROKEN, f"CuPy is installed and does not work: {type(error).__name__}: {error}", f"Reinstall it: {_install()}"),
        )
    return ()


def _compiler() -> tuple[Reason, ...]:
    if nvrtc.find(toolkit_major()) is None:
        return (Reason(Code.NO_COMPILER, "NVRTC (libnvrtc.so) is not found", _install()),)
    return ()


def _device() -> tuple[Reason, ...]:
    if torch.version.cuda is None:
        return (Reason(Code.NO_DEVICE, f"torch {torch.__version__} is not a CUDA build", "Install a CUDA build of torch."),)
    if not torch.cuda.is_available():
        return (Reason(Code.NO_DEVICE, "torch finds no CUDA device", "Check the driver with nvidia-smi."),)
    return ()


def versions() -> dict[str, str]:
    """Versions of CuPy and NVRTC, as far as they are installed."""
    found = {}
    for distribution in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    library = nvrtc.find(toolkit_major())
    if library is not None:
        found["nvrtc"] = ".".join(map(str, library.version))
    return found
