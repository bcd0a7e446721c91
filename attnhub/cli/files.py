"""Files that commands write: whole or not at all, and found from any folder of a checkout."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from attnhub.cli import CommandError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file atomically; its folder is made when missing."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def checkout(start: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The root of the attnhub checkout that holds ``start`` (default: the current folder). CommandError outside of one."""
    here = pathlib.Path(start or os.getcwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "attnhub" / "reasons.py").is_file() and (folder / "pyproject.toml").is_file():
            return folder
    raise CommandError(f"{here} is not inside an attnhub checkout; run this in one, or name it with --root")


def write_or_check(pages: dict[pathlib.Path, str], check: bool) -> list[pathlib.Path]:
    """Write pages, or with ``check`` only compare. Returns those that differ from what is there."""
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if not check:
        for path in stale:
            write_text(path, pages[path])
    return stale
