"""Kernels compiled ahead, in processes side by side: compiling one case after the other would take most of a GPU run's time.

Each process calls the peers that compile (FlexAttention, and what is written in Triton) once at a case. Inductor and Triton keep what
they make on disk, where the process that measures finds it. ``python -m attnhub.bench.precompile`` is such a process: it reads a
JSON line for each case and answers with one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Optional

from attnhub.bench.cases import Case

if TYPE_CHECKING:
    from attnhub.bench.measure import Settings

#: Peers and backends that compile at their first call.
_PEERS, _BACKENDS = ("flex", "v1"), ("auto", "triton", "cuda")
#: A process holds a CUDA context and one case's tensors.
_MOST_JOBS = 12
_SILENT_SECONDS = 180.0


def jobs() -> int:
    """Processes for this machine."""
    return max(1, min(_MOST_JOBS, (os.cpu_count() or 1) - 2))


def run(
    cases: list[Case], names: tuple[str, ...], backends: Optional[tuple[str, ...]], count: int, tick: Optional[Callable[[str], None]] = None,
    limit: float = 0.0, command: tuple[str, ...] = (sys.executable, "-m", "attnhub.bench.precompile"),
) -> list[str]:  # fmt: skip
    """Compile for the cases in ``count`` processes; a time limit in seconds, 0 is none. Returns what went wrong, a line for each case:
    a failure here costs time later and nothing else."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    chosen = [name for name in names if name in _PEERS], [name for name in (_BACKENDS if backends is None else backends) if name in _BACKENDS]
    # The same shapes compile the same kernels, whether a graph is replayed or not. Long ones first, so that none is left for the end.
    distinct = dict.fromkeys(dataclasses.replace(case, graph=False) for case in cases)
    for case in sorted(distinct, key=lambda c: c.mode == "forward"):
        todo.put(json.dumps({"case": case.to_json(), "peers": chosen[0], "backends": chosen[1]}))
    failures: list[str] = []
    stop = time.monotonic() + limit if limit else float("inf")

    def serve() -> None:
        process: Optional[_Process] = None
        try:
            while time.monotonic() < stop:
                try:
                    line = todo.get_nowait()
                except queue.Empty:
                    break
                if process is None:
                    process = _Process(command)
                answer = process.ask(line, min(_SILENT_SECONDS, stop - time.monotonic()))
                if tick:
                    tick("")
                if answer is None:
                    failures.append(f"no answer for {line}")
                    process.end()
                    process = None
                elif answer.strip() != "{}":
                    failures.append(answer.strip())
        finally:
            if process is not None:
                process.end()

    threads = [threading.Thread(target=serve) for _ in range(min(count, len(distinct)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


class _Process:
    """One such process, and a thread that reads its answers."""

    def __init__(self, command: tuple[str, ...]) -> None:
        # Each has one processor: Inductor's own pool would start as many helpers in every one of them.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
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


def estimate(cases: list[Case], names: tuple[str, ...], backends: Optional[tuple[str, ...]], settings: Settings) -> float:
    """Seconds that a GPU run takes, about: rounds, first calls, and what FlexAttention traces even where its kernels are on disk."""
    peers = len(names) + (4 if backends is None else len(backends))
    each = peers * (settings.rounds * settings.round_seconds + 0.1) + 0.3
    compiling = 20.0 + len(cases) * 10.0 / jobs()
    return len(cases) * (each + (1.5 if "flex" in names else 0.0)) + compiling


def _compile(case: Case, names: list[str], backends: list[str]) -> dict[str, str]:
    """Call everybody once. Returns what failed: {peer: why}."""
    import torch

    from attnhub.bench import peers

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tensors = peers.inputs(case, device)
    failed = {}
    for peer in peers.assemble(case, tensors, tuple(names), tuple(backends)):
        if isinstance(peer, peers.Absent):
            continue
        try:
            with peer.context():
                if case.mode == "forward":
                    with torch.no_grad():
                        peer.attend(*tensors)
                elif peer.differentiable:
                    leaves = tuple(t.detach().requires_grad_() for t in tensors)
                    out = peer.attend(*leaves)
                    torch.autograd.grad(out, leaves, torch.ones_like(out))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            failed[peer.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return failed


def main() -> None:
    """Serve lines until standard input ends."""
    # Compilers print: answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        case = Case.of(asked["case"])
        try:
            failed = _compile(case, asked["peers"], asked["backends"])
        except Exception as error:
            failed = {"": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps({f"{case}: {name}": why for name, why in failed.items()}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
