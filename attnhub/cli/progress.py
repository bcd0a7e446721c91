"""A progress bar on standard error, where a person looks at it; nothing else otherwise."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Optional


@contextlib.contextmanager
def bar(text: str, total: int, quiet: bool) -> Iterator[Optional[Callable[[str], None]]]:
    """A function that counts one more of ``total`` and shows what it is told; None where nobody looks."""
    if quiet or not sys.stderr.isatty() or not importlib.util.find_spec("rich"):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=total)

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=f"{text}: {what}" if what else text)

        yield tick
