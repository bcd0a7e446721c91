"""A result file of `attnhub bench` that grows case by case, so that a stop loses nothing: what --resume keeps, and what --limit leaves."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from attnhub.bench import results
from attnhub.bench.measure import Settings
from attnhub.cli import CommandError, files


def settings(args: argparse.Namespace, rounds: int, round_seconds: float, peer_seconds: float) -> Settings:
    """Those of the arguments, and these where they say nothing."""
    found = Settings(
        rounds if args.rounds is None else args.rounds, round_seconds if args.seconds is None else args.seconds,
        peer_seconds if args.peer_seconds is None else args.peer_seconds,
    )  # fmt: skip
    if found.rounds < 1 or found.round_seconds <= 0 or found.peer_seconds <= 0 or args.threads < 0:
        raise CommandError("--rounds must be at least 1, --seconds and --peer-seconds above 0, --threads not below 0")
    return found


class Growing:
    """A result, begun without rows, and its file if --output names one."""

    def __init__(self, args: argparse.Namespace, suite: str, preset: str, device: Any, settings: Settings, **more: Any) -> None:
        told = {"rounds": settings.rounds, "round_seconds": settings.round_seconds, "peer_seconds": settings.peer_seconds, **more}
        if args.threads:
            told["threads"] = args.threads
        self.result = results.document(suite, preset, device, told, [])
        self.path = results.target(args.output, self.result) if args.output else None
        self._args, self._started = args, time.monotonic()

    def left(self, todo: list[Any], of: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """The cases that --resume does not find in the file, whose rows are then a part of the result. of: the case of a row."""
        if not self._args.resume or self.path is None or not self.path.exists():
            return todo
        try:
            self.result["rows"] = results.continued(self.path, self.result)
        except ValueError as error:
            raise CommandError(str(error)) from error
        known = {of(row) for row in self.result["rows"]}
        return [case for case in todo if case not in known]

    def cases(self, todo: list[Any]) -> Iterator[tuple[str, Any]]:
        """(its place and name, the case) one after the other, until --limit."""
        limit = self._args.limit
        for n, case in enumerate(todo):
            if limit and time.monotonic() - self._started > limit:
                self.result["unmeasured"] = [str(left) for left in todo[n:]]
                print(f"--limit {limit:g}: {len(todo) - n} cases are not measured; --resume measures them", file=sys.stderr)
                break
            yield f"[{n + 1}/{len(todo)}] {case}", case

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.result["rows"].extend(rows)
        self._write()

    def finish(self) -> bool:
        """Whether there is a file now that says what this run says: one that measured nothing replaces no file that holds something."""
        if self.path is None or not (self.result["rows"] or not self.path.exists()):
            return False
        self._write()
        return True

    def _write(self) -> None:
        if self.path is not None:
            files.write_json(self.path, self.result)
