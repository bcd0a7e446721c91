"""Kernels compiled before anybody asks for them, in processes side by side, for a device that need not be here.

``python -m attnhub.backends.cuda.ahead`` is such a process: it answers lines of JSON, a problem each, by what became of the problem's kernel.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from attnhub.backends.cuda import compile, decode, hopper, nvrtc, variant
from attnhub.backends.cuda.decode import DecodeVariant
from attnhub.backends.cuda.hopper import HopperVariant
from attnhub.backends.cuda.variant import Variant
from attnhub.problem import Problem

AnyVariant = Union[HopperVariant, DecodeVariant, Variant]
#: What one kernel may take, on a machine that does much else, before its process counts as lost.
_PATIENCE = 300.0


def kernel_for(problem: Problem) -> tuple[str, AnyVariant]:
    """(kernel, variant) of a problem that the backend serves: what `launcher.prepare` compiles."""
    if decode.serves(problem):
        return "decode", decode.choose(problem)
    if hopper.serves(problem):
        return "hopper", hopper.choose(problem)
    return "portable", variant.choose(problem)


def distinct(problems: Sequence[Problem]) -> dict[AnyVariant, Problem]:
    """Each kernel once, with the first problem that asks for it."""
    found: dict[AnyVariant, Problem] = {}
    for problem in problems:
        found.setdefault(kernel_for(problem)[1], problem)
    return found


def compile_all(
    problems: Sequence[Problem], directory: Path, toolkit: Optional[int], count: int, tick: Optional[Callable[[str], None]] = None,
    command: tuple[str, ...] = (sys.executable, "-m", "attnhub.backends.cuda.ahead"),
) -> list[dict[str, Any]]:  # fmt: skip
    """Compile what the problems need into ``directory``, in ``count`` processes. toolkit: CUDA's major version, as for `nvrtc.find`.

    Returns a row for each kernel: ``kernel``, ``problem`` (the first that asked for it), ``variant``; and ``cubin``, ``bytes``, ``cached`` (it was there),
    ``seconds`` and ``processor_seconds``, or ``error``.
    """
    from attnhub.bench import workers

    wanted = distinct(problems)
    questions = [{"problem": p.to_json(), "directory": str(directory), "toolkit": toolkit} for p in wanted.values()]
    answers = workers.ask(command, questions, max(1, count), tick, patience=_PATIENCE)
    rows = []
    for (chosen, problem), answer in zip(wanted.items(), answers):
        outcome = answer or {"error": f"its process ended, or said nothing for {_PATIENCE:g} s"}
        rows.append({"kernel": kernel_for(problem)[0], "problem": problem.to_json(), "variant": chosen.describe(), **outcome})
    return rows


def _compile(question: dict[str, Any]) -> dict[str, Any]:
    library = nvrtc.find(question["toolkit"])
    if library is None:
        return {"error": "NVRTC is not found"}
    _, chosen = kernel_for(Problem.from_json(question["problem"]))
    directory = Path(question["directory"])
    cached = (directory / f"{compile.key(chosen, library.version)}.cubin").exists()
    started, processor = time.perf_counter(), time.process_time()
    try:
        path = compile.cubin(chosen, library, directory)
        size = path.stat().st_size
    except (nvrtc.CompileError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "cubin": str(path), "bytes": size, "cached": cached, "seconds": round(time.perf_counter() - started, 3),
        "processor_seconds": round(time.process_time() - processor, 3),
    }  # fmt: skip


if __name__ == "__main__":
    from attnhub.bench import workers

    workers.answer(_compile)
