"""Processes side by side that answer lines of JSON: for work that holds a processor, or that may end its process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Optional

from attnhub import config

#: Each process holds a CUDA context and the tensors of what it works at.
_MOST_JOBS = 12


def jobs() -> int:
    """Processes for this machine."""
    return max(1, min(_MOST_JOBS, (os.cpu_count() or 1) - 2))


def ask(
    command: tuple[str, ...], questions: list[Any], count: int, tick: Optional[Callable[[str], None]] = None, limit: float = 0.0, patience: float = 180.0,
    heard: Optional[Callable[[int, Optional[Any]], None]] = None,
) -> list[Optional[Any]]:  # fmt: skip
    """The answers of ``count`` processes ``command`` to JSON-ready questions, in their order.

    None where there is none: its process ended, said nothing for ``patience`` seconds, or the time limit (seconds, 0: none) had passed.
    A process that ended is replaced. ``tick`` is called after each question, ``heard`` (by one thread at a time) with its number and answer.
    """
    answers: list[Optional[Any]] = [None] * len(questions)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for n in range(len(questions)):
        todo.put(n)
    stop = time.monotonic() + limit if limit else float("inf")
    one_at_a_time = threading.Lock()

    def serve() -> None:
        process: Optional[_Process] = None
        try:
            while time.monotonic() < stop:
                try:
                    n = todo.get_nowait()
                except queue.Empty:
                    break
                if process is None:
                    process = _Process(command)
                answer = process.ask(json.dumps(questions[n]), min(patience, stop - time.monotonic()))
                if tick:
                    tick("")
                if answer is None:
                    process.end()
                    process = None
                else:
                    answers[n] = json.loads(answer)
                if heard:
                    with one_at_a_time:
                        heard(n, answers[n])
        finally:
            if process is not None:
                process.end()

    threads = [threading.Thread(target=serve) for _ in range(min(count, len(questions)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


class _Process:
    """One process, and a thread that reads its answers."""

    def __init__(self, command: tuple[str, ...]) -> None:
        # Each has one processor: Inductor's own pool would start as many helpers in every one of them.
        path = os.pathsep.join(filter(None, sys.path))
        environment = config.child_environment(TORCHINDUCTOR_COMPILE_THREADS="1", OMP_NUM_THREADS="1", PYTHONPATH=path)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        self._answers: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, line: str, seconds: float) -> Optional[str]:
        """The answer to a line; None if the process ended or says nothing for so long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return self._answers.get(timeout=max(seconds, 0.0))
        except (OSError, queue.Empty):
            return None

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()


def answer(work: Callable[[Any], Any]) -> None:
    """What such a process does: answer every line of standard input by ``work``, until it ends."""
    # Compilers print: answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        found = work(json.loads(line))
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(found) + "\n")
            answers.flush()
