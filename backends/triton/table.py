"""Tile sizes that were measured, by device class: the shipped `tune.json`, and before it what ATTNHUB_TUNE names. Free of torch and triton.

A table is ``{"schema", "devices": {"nvidia 9.0": {"environment", "tiles": {role: {bytes of an element: {head_dim: {kind: entry}}}}}}}``. An
entry's ``tiles`` are [block_m, block_n, num_warps, num_stages]; head_dim is a padded one and stands for all up to it that have no entry of
their own; kind is one of KINDS.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any, Optional

from attnhub import config
from attnhub.backends.triton.tiles import Tiles, padded
from attnhub.problem import DeviceInfo, Feature, Problem

SCHEMA = "attnhub.triton.tune/1"
SHIPPED = pathlib.Path(__file__).with_name("tune.json")
#: Without and with a mask: what a mask needs in registers moves the best tiles.
KINDS = ("full", "causal")
NOW = "now"
_UNMASKED = {Feature.GQA, Feature.DV_DIFFERS, Feature.LSE, Feature.VARLEN, Feature.PAGED, Feature.SEQLENS, Feature.LEFTPAD, Feature.DETERMINISTIC}


_state = threading.local()


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Plans made inside measure nothing themselves."""
    before, _state.measuring = getattr(_state, "measuring", False), True
    try:
        yield
    finally:
        _state.measuring = before


def device_class(device: DeviceInfo) -> str:
    """``nvidia 9.0``: devices of one class share a table."""
    return f"{device.vendor} {'.'.join(map(str, device.arch))}".strip()


def kind(problem: Problem) -> str:
    """Which of KINDS a problem is."""
    return "full" if problem.features <= _UNMASKED else "causal"


def empty() -> dict[str, Any]:
    """A table without entries."""
    return {"schema": SCHEMA, "devices": {}}


def load(path: pathlib.Path) -> dict[str, Any]:
    """A table, checked. ValueError if the file is none, OSError if it cannot be read."""
    return _load(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _load(path: pathlib.Path, changed: int) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no table of `attnhub tune`: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("devices"), dict):
        raise ValueError(f"{path} is no table of `attnhub tune` (schema {SCHEMA}); make one with `attnhub tune --output {path.name}`")
    for name, device in data["devices"].items():
        for role, items in device["tiles"].items():
            for item, widths in items.items():
                for width, kinds in widths.items():
                    for which, entry in kinds.items():
                        _check(f"{path}: {name}, {role}, {item} bytes, head_dim {width}, {which}", which, entry)
    found: dict[str, Any] = data
    return found


def _check(where: str, which: str, entry: Any) -> None:
    tiles = entry.get("tiles") if isinstance(entry, dict) else None
    if which not in KINDS or not isinstance(tiles, list) or len(tiles) != 4 or not all(isinstance(n, int) and n > 0 for n in tiles):
        raise ValueError(f"{where}: tiles={tiles!r}; [block_m, block_n, num_warps, num_stages] above 0 and one of {', '.join(KINDS)} are needed")
    if any(n & (n - 1) for n in tiles[:3]) or tiles[0] < 16 or tiles[1] < 16:
        raise ValueError(f"{where}: tiles={tiles!r}; blocks are powers of two from 16 on, warps a power of two")


def find(data: dict[str, Any], device: str, role: str, item: int, width: int, which: str, exact: bool = False) -> Optional[Tiles]:
    """The entry for a padded head_dim and a kind. Unless ``exact``, a mask without an entry takes the one without a mask, and a head_dim
    without either those of the next larger one that has them.
    """
    rows = data["devices"].get(device, {}).get("tiles", {}).get(role, {}).get(str(item), {})
    for wide in [width] if exact else sorted(int(name) for name in rows if int(name) >= width):
        kinds = rows.get(str(wide), {})
        entry = kinds.get(which) or (None if exact else kinds.get("full"))
        if entry:
            return Tiles(*entry["tiles"])
    return None


def put(data: dict[str, Any], device: str, role: str, item: int, width: int, which: str, entry: dict[str, Any]) -> None:
    """Set an entry."""
    tiles = data["devices"].setdefault(device, {}).setdefault("tiles", {})
    tiles.setdefault(role, {}).setdefault(str(item), {}).setdefault(str(width), {})[which] = entry


def write(path: pathlib.Path, data: dict[str, Any]) -> None:
    """Replace a table's file atomically, an entry a line."""
    text = json.dumps(data, indent=1)
    # Short lists on one line: a table is read by people, too.
    text = re.sub(r"\{\s+\"tiles\": \[[^]]*\][^}]*\}", lambda found: " ".join(found.group().split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def preferred(chosen: dict[str, list[Tiles]], problem: Problem, item: int) -> dict[str, list[Tiles]]:
    """The choices with the measured one in front of each, where there is one. ValueError for a file in ATTNHUB_TUNE that is no table."""
    named = config.tune()
    tables = [] if not named or named == NOW else [load(pathlib.Path(named).expanduser())]
    tables.append(load(SHIPPED))
    device, width, which = device_class(problem.device), padded(max(problem.head_dim, problem.v_head_dim)), kind(problem)
    missing = [role for role in chosen if not any(find(table, device, role, item, width, which, exact=True) for table in tables)]
    if named == NOW and missing and problem.device.type == "cuda" and not getattr(_state, "measuring", False):
        from attnhub.backends.triton.tune import kept

        # Behind the shipped table: what is shipped is the same on every machine of a class.
        tables.append(kept(problem, missing))
    found: dict[str, list[Tiles]] = {}
    for role, choices in chosen.items():
        # An exact entry of any table goes before what another one has for a larger head_dim.
        tries = ((table, exact) for exact in (True, False) for table in tables)
        first = next((t for table, exact in tries if (t := find(table, device, role, item, width, which, exact))), None)
        found[role] = choices if first is None else [first, *(t for t in choices if t != first)]
    return found
