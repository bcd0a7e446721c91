"""The only reader of the environment. Torch-free.

Every variable is read at each use, so that a change inside the process takes effect at the next call.
"""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Variable:
    """One environment variable: what it means and which values it allows. The source of ``docs/environment.md``."""

    name: str
    default: str
    allowed: str
    meaning: str


VARIABLES = (
    Variable("ATTNHUB_BACKEND", "auto", "a backend's name, or a comma-separated list in order of preference; `auto` may end a list",
             "Which backend serves every call that does not choose by argument or context. Strict: a name that cannot serve a call is an error with its reasons, never silently replaced."),
    Variable("ATTNHUB_DISABLE", "", "comma-separated backend names", "Backends that are never chosen, not even by name."),
    Variable("ATTNHUB_DETERMINISTIC", "0", "0 or 1", "1 admits only backends that promise bitwise repeatable results (as torch.use_deterministic_algorithms(True) does)."),
    Variable("ATTNHUB_CACHE_DIR", "the platform's cache folder", "a folder", "Where compiled kernels are kept."),
    Variable("ATTNHUB_CUDA_KEEP", "", "a folder", "Where the cuda backend leaves, for each kernel that a process needs, its source, NVRTC's options, the cubin and the report of registers and spills."),
    Variable("ATTNHUB_TUNE", "", "a file that `attnhub tune` wrote, or `now`",
             "Tile sizes of the triton backend: a table of your own before the shipped one. `now` measures what no table has for this device when a kernel is first needed (seconds to minutes) and keeps it under ATTNHUB_CACHE_DIR; for several hosts, tune once and give them the file. Unset: nothing is ever measured. Read when a plan is made, so set it before the first call."),
    Variable("ATTNHUB_LOG", "warning", "debug, info, warning, error", "Level of the logger `attnhub`; read when attnhub is first used."),
    Variable("ATTNHUB_CPU_ISA", "", "portable, avx2, avx512, avx512_bf16, amx_bf16, neon", "Forces one instruction-set path of the cpu backend, for tests; read when a plan is made, so set it before the first call. Asking for one that the CPU lacks is an error."),
    Variable("TRITON_INTERPRET", "0", "0 or 1", "Triton's own variable: 1 interprets kernels on CPU tensors. The triton backend then serves them, by name only."),
)  # fmt: skip

_BACKEND, _DISABLE, _DETERMINISTIC = b"ATTNHUB_BACKEND", b"ATTNHUB_DISABLE", b"ATTNHUB_DETERMINISTIC"
# os.environ decodes and encodes at each read (0.5 us, three reads a call). Its bytes dictionary on POSIX answers in 0.03 us;
# it is private, so that its absence (Windows has str keys) falls back to the public way.
_raw = getattr(os.environ, "_data", None)
_FAST = isinstance(_raw, dict) and all(isinstance(key, bytes) for key in _raw)

#: What the choice of a backend reads, unparsed: equal snapshots mean equal policies.
Snapshot = tuple[Optional[bytes], Optional[bytes], Optional[bytes]]


def snapshot() -> Snapshot:
    """(ATTNHUB_BACKEND, ATTNHUB_DISABLE, ATTNHUB_DETERMINISTIC) as they stand now; cheap, for the key of a call."""
    if _FAST:
        get = _raw.get  # type: ignore[union-attr]
        return get(_BACKEND), get(_DISABLE), get(_DETERMINISTIC)
    return tuple(None if (v := os.environ.get(name.decode())) is None else v.encode() for name in (_BACKEND, _DISABLE, _DETERMINISTIC))  # type: ignore[return-value]


def parse_names(value: str, where: str) -> tuple[str, ...]:
    """A list of backend names: ``triton,cpu`` or ``cuda,auto``. Empty means ``auto``."""
    if not isinstance(value, str):
        raise TypeError(f"{where}={value!r}: a backend's name or a comma-separated list of names is needed")
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if "auto" in names[:-1]:
        raise ValueError(f"{where}={value!r}: `auto` may only end the list, since nothing behind it could ever be tried")
    return names or ("auto",)


def disabled(snap: Snapshot) -> frozenset[str]:
    """Names in ATTNHUB_DISABLE."""
    return frozenset(name.strip() for name in (snap[1] or b"").decode().split(",") if name.strip())


def deterministic(snap: Snapshot) -> bool:
    """Whether ATTNHUB_DETERMINISTIC asks for repeatable results."""
    value = (snap[2] or b"0").decode().strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"ATTNHUB_DETERMINISTIC={value!r}: allowed are 0 and 1")
    return value == "1"


def set_variables() -> dict[str, str]:
    """Those of our variables that are set, for `doctor`."""
    return {v.name: os.environ[v.name] for v in VARIABLES if v.name in os.environ}


def unread_variables() -> dict[str, str]:
    """Variables of our name that nothing reads, misspelt ones perhaps -> the one that is like it, or ""."""
    import difflib

    names, prefix = [v.name for v in VARIABLES], "ATTNHUB_"
    # The tests' own are no mistake.
    unread = [name for name in os.environ if name.startswith(prefix) and name not in names and not name.startswith(f"{prefix}TEST_")]
    return {name: next(iter(difflib.get_close_matches(name, names, 1)), "") for name in sorted(unread)}


def cache_dir() -> pathlib.Path:
    """Folder for compiled kernels, made when missing. OSError names the variable where it cannot be made."""
    value = os.environ.get("ATTNHUB_CACHE_DIR")
    if value:
        path = pathlib.Path(value).expanduser()
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        path = pathlib.Path(base) / "attnhub"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"ATTNHUB_CACHE_DIR={value!r}" if value else f"the cache folder {str(path)!r}"
        raise OSError(error.errno, f"{where} cannot be made ({error.strerror}); name a folder that can be written in ATTNHUB_CACHE_DIR") from error
    return path


def cuda_keep() -> Optional[pathlib.Path]:
    """Folder for the sources and reports of compiled CUDA kernels, or None."""
    value = os.environ.get("ATTNHUB_CUDA_KEEP", "").strip()
    return pathlib.Path(value).expanduser() if value else None


def log_level() -> str:
    """Level of the logger ``attnhub``, upper case."""
    value = os.environ.get("ATTNHUB_LOG", "warning").strip().lower()
    if value not in ("debug", "info", "warning", "error"):
        raise ValueError(f"ATTNHUB_LOG={value!r}: allowed are debug, info, warning, error")
    return value.upper()


def tune() -> str:
    """The table of tile sizes that goes before the shipped one: a path, ``now`` to measure what is missing, or ""."""
    return os.environ.get("ATTNHUB_TUNE", "").strip()


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment, changed, for one that works for it: what is measured here is not measured there as well."""
    found = {**os.environ, **changes}
    if tune() == "now":
        found.pop("ATTNHUB_TUNE", None)
    return found


def cpu_isa() -> str:
    """Forced instruction-set path of the cpu backend, or ""."""
    return os.environ.get("ATTNHUB_CPU_ISA", "").strip().lower()


def triton_interpret() -> bool:
    """Whether Triton interprets its kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").strip() in ("1", "true", "on")
