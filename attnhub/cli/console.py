"""What commands print: tables by rich where it is installed, else plain text; and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def emit_json(data: Any) -> None:
    """One JSON document on standard output."""
    json.dump(data, sys.stdout, indent=1, sort_keys=False)
    sys.stdout.write("\n")


def say(text: str = "", style: str = "") -> None:
    """A line of text. style: rich's name of one."""
    console = _console()
    if console is None:
        print(text, flush=True)
    else:
        console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """A table. right: names of the columns that are set flush right. A cell with line breaks takes several lines."""
    text = [[str(cell) for cell in row] for row in rows]
    console = _console()
    if console is None:
        _plain(title, columns, text)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        shown.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in text:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> str:
    """A table in GitHub's Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(" ---: " if name in right else " --- " for name in columns) + "|"]
    lines.extend("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows)
    return "\n".join(lines) + "\n"


def _console() -> Any:
    """rich's console, or None: `doctor` has to work where nothing but Python does."""
    try:
        from rich.console import Console
    except Exception:
        return None
    # Where nobody looks (a pipe, CI), lines are not folded to a terminal of 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _plain(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    if title:
        print(title)
    cells = [list(columns), *rows]
    widths = [max(len(line) for row in cells for line in row[i].split("\n")) for i in range(len(columns))]
    for row in cells:
        split = [cell.split("\n") for cell in row]
        for n in range(max(map(len, split))):
            print("  ".join((part[n] if n < len(part) else "").ljust(width) for part, width in zip(split, widths)).rstrip())
    print(flush=True)
