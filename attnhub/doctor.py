"""What is here: versions, devices, native libraries, backends and why they cannot run. Works without torch.

Nothing in here raises for something that is missing or broken: what went wrong is the result.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import os
import platform
import sys
from typing import Any

import attnhub
from attnhub import config

#: Distributions that attnhub can use, in the order of the report.
DISTRIBUTIONS = (
    "torch", "numpy", "rich", "triton", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "transformers", "matplotlib",
)  # fmt: skip
#: backend -> file of its native library.
LIBRARIES = {"cpu": "libattnhub_cpu.so", "onnx": "libattnhub_onnx.so"}


def examine() -> dict[str, Any]:
    """Everything as JSON-ready data. ``problems`` holds what keeps `attnhub.attention` from working at all, ``notes`` settings that do nothing or will
    fail when they are first needed."""
    torch_report = _torch()
    backends, error = _backends(torch_report["error"])
    report = {
        "attnhub": {"version": attnhub.__version__, "path": os.path.dirname(os.path.abspath(attnhub.__file__)), "installed": _version("attnhub")},
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None},
        "torch": torch_report,
        "cpu": _cpu(),
        "libraries": {name: _library(name, file) for name, file in LIBRARIES.items()},
        "backends": backends,
        "integrations": _integrations(),
        "environment": config.set_variables(),
    }
    problems = []
    if torch_report["error"]:
        problems.append(f"torch does not import: {torch_report['error']}")
    if error:
        problems.append(error)
    elif not any(entry["available"] and entry["automatic"] for entry in backends.values()):
        problems.append("no backend can be chosen automatically on this machine")
    problems.extend(_policy_problems())
    report["problems"] = problems
    report["notes"] = _notes(tuple(backends))
    return report


def describe_error(error: BaseException) -> str:
    """``ModuleNotFoundError: No module named 'torch'``."""
    return f"{type(error).__name__}: {error}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    report: dict[str, Any] = {"version": None, "cuda": None, "hip": None, "threads": None, "devices": [], "error": None}
    try:
        import torch
    except Exception as error:
        # A torch whose libraries do not load raises OSError or ImportError, by version.
        report["error"] = describe_error(error)
        return report
    report.update(version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip, threads=torch.get_num_threads())
    try:
        from attnhub.device import describe

        found = [torch.device("cpu")]
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        found += [torch.device("xpu", i) for i in range(torch.xpu.device_count())] if hasattr(torch, "xpu") and torch.xpu.is_available() else []
        found += [torch.device("mps")] if torch.backends.mps.is_available() else []
        report["devices"] = [{"device": str(device), **describe(device).to_json()} for device in found]
    except Exception as error:
        report["error"] = f"asking torch for its devices: {describe_error(error)}"
    return report


def _cpu() -> dict[str, Any]:
    return {"machine": platform.machine(), "processor": platform.processor(), "count": os.cpu_count()}


def _library(backend: str, file: str) -> dict[str, Any]:
    try:
        path = str(importlib.resources.files(f"attnhub.backends.{backend}") / file)
    except Exception as error:
        return {"path": None, "built": False, "error": describe_error(error)}
    return {"path": path, "built": os.path.exists(path), "error": None}


def _backends(torch_error: str | None) -> tuple[dict[str, dict[str, Any]], str]:
    """(backends by name, what is wrong with the registry itself). All of them compute on torch's tensors: without torch none can."""
    try:
        from attnhub.reasons import Code, Reason
        from attnhub.registry import registry

        candidates = registry.candidates()
    except Exception as error:
        return {}, f"the registry does not load: {describe_error(error)}"
    found: dict[str, dict[str, Any]] = {}
    for name, candidate in candidates.items():
        backend, probe = candidate.backend, candidate.probe
        if torch_error:
            code = Code.NOT_INSTALLED if _version("torch") is None else Code.BROKEN
            probe = (Reason(code, f"torch: {torch_error}", "install torch: https://pytorch.org/get-started/locally"), *probe)
        entry: dict[str, Any] = {
            "available": backend is not None and not probe,
            "automatic": backend is not None and backend.automatic,
            "distribution": registry.distribution(name),
            "reasons": [reason.to_json() for reason in probe],
            "versions": {},
            "devices": [],
        }
        if backend is not None:
            entry["devices"] = sorted({r.type for r in backend.capability.devices})
            try:
                entry["versions"] = backend.versions()
            except Exception as error:
                entry["versions"] = {"error": describe_error(error)}
        found[name] = entry
    return found, ""


def _integrations() -> dict[str, dict[str, Any]]:
    try:
        from attnhub.registry import entry_points, load

        patching = importlib.import_module("attnhub.patching")
        points = entry_points(patching.GROUP, patching.BUILTIN)
    except Exception as error:
        return {"(all)": {"loads": False, "error": describe_error(error), "distribution": "?"}}
    found = {}
    for name, target, distribution in points:
        try:
            load(target)
            found[name] = {"loads": True, "error": None, "distribution": distribution}
        except Exception as error:
            found[name] = {"loads": False, "error": describe_error(error), "distribution": distribution}
    return found


def _notes(backends: tuple[str, ...]) -> list[str]:
    notes = [f"{name} is set and nothing reads it" + (f"; {like} is a variable" if like else "") for name, like in config.unread_variables().items()]
    snapshot = config.snapshot()
    named = {"ATTNHUB_DISABLE": config.disabled(snapshot), "ATTNHUB_BACKEND": {n.strip() for n in (snapshot[0] or b"").decode().split(",")} - {"auto", ""}}
    for variable, names in named.items():
        if backends and (unknown := sorted(names - set(backends))):
            notes.append(f"{variable} names {', '.join(unknown)}: no backend has that name; installed are {', '.join(backends)}")
    if config.tune() not in ("", "now") and not os.path.isfile(os.path.expanduser(config.tune())):
        notes.append(f"ATTNHUB_TUNE={config.tune()!r} is neither a file nor `now`")
    if "ATTNHUB_CACHE_DIR" in config.set_variables():
        try:
            config.cache_dir()
        except OSError as error:
            notes.append(str(error.strerror))
    return notes


def _policy_problems() -> list[str]:
    problems = []
    snapshot = config.snapshot()
    for parse in (
        lambda: config.parse_names((snapshot[0] or b"").decode(), "ATTNHUB_BACKEND"), lambda: config.deterministic(snapshot), config.log_level,
    ):  # fmt: skip
        try:
            parse()
        except ValueError as error:
            problems.append(str(error))
    return problems
