"""The processor, from what Linux tells without privileges: two machines may both call themselves `AMD EPYC`. Torch-free."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any

_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


@functools.lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """vendor, name, family, model, stepping, caches in bytes (that of one core, and how many processors share it); what is unknown is left out.

    No clock is among them: /proc/cpuinfo tells the one of this instant, and the ceilings of a run say more.
    """
    found: dict[str, Any] = {}
    info = _cpuinfo()
    for name, key in (("vendor", "vendor_id"), ("name", "model name"), ("microcode", "microcode")):
        if key in info:
            found[name] = info[key]
    for name, key in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping")):
        if info.get(key, "").isdigit():
            found[name] = int(info[key])
    # Arm's counterparts of family and model.
    for name, key in (("implementer", "CPU implementer"), ("part", "CPU part"), ("variant", "CPU variant")):
        if key in info:
            found[name] = info[key]
    if caches := _caches():
        found["caches"] = caches
    pages = _read(pathlib.Path(_HUGE_PAGES))
    if chosen := re.search(r"\[(\w+)\]", pages):
        # Reading memory on pages of 4 KiB is slower than on pages of 2 MiB, and this decides which ones tensors get.
        found["transparent_huge_pages"] = chosen[1]
    return found


def last_cache() -> int:
    """Bytes of the last level's cache; 32 MiB where nobody tells."""
    caches = facts().get("caches", {})
    return max((c["bytes"] for c in caches.values()), default=32 << 20)


def cold_bytes() -> int:
    """How much memory has to be read in a ring before a cache holds none of what comes next: 4 times the last cache, within reason."""
    return min(max(4 * last_cache(), 128 << 20), 2 << 30, max(available_memory() // 4, 64 << 20))


def available_memory() -> int:
    """Bytes that programs can still take; 4 GiB where nobody tells."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30


def model_words(processor: dict[str, Any]) -> str:
    """``family 25 model 17``, or Arm's implementer and part; empty where neither is known."""
    if "family" in processor and "model" in processor:
        return f"family {processor['family']} model {processor['model']}"
    if "implementer" in processor and "part" in processor:
        return f"implementer {processor['implementer']} part {processor['part']}"
    return ""


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo."""
    found: dict[str, str] = {}
    for line in _read(pathlib.Path("/proc/cpuinfo")).split("\n\n", 1)[0].splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found[key.strip()] = value.strip()
    return found


def _caches() -> dict[str, dict[str, int]]:
    found = {}
    for folder in sorted(pathlib.Path(_CACHES).glob("index*")):
        kind, level, size = (_read(folder / name) for name in ("type", "level", "size"))
        if kind in ("Data", "Unified") and size.endswith("K"):
            found[f"L{level}"] = {"bytes": int(size[:-1]) * 1024, "shared_by": _count(_read(folder / "shared_cpu_list"))}
    return found


def _count(processors: str) -> int:
    """``0-3,8`` -> 5."""
    total = 0
    for part in filter(None, processors.split(",")):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
