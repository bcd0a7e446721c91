"""Kernels compiled before anybody asks for them, in processes side by side, for a device that need not be here.

``python -m attnhub.backends.cuda.ahead`` is such a process: it answers lines of JSON, a problem each, by what became of a kernel of the problem.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from attnhub.backends.cuda import compile, decode, hopper, nvrtc, variant
from attnhub.backends.cuda.decode import DecodeVariant
from attnhub.backends.cuda.hopper import HopperVariant
from attnhub.backends.cuda.variant import Variant
from attnhub.problem import Feature, Problem

AnyVariant = Union[HopperVariant, DecodeVariant, Variant]
#: A kernel of a problem: what its plan launches, or what that makes once a call brings new tokens, without rotary embedding or with it.
Asked = tuple[Problem, str]
#: The second of these, by `DecodeVariant.append`.
APPEND = ("", "tokens", "rotary")
#: What one kernel may take, on a machine that does much else, before its process counts as lost.
_PATIENCE = 300.0


def kernel_for(problem: Problem, append: str = "") -> tuple[str, AnyVariant]:
    """(kernel, variant) of a problem that the backend serves: what `launcher.prepare` compiles, or what its plan does for calls that append."""
    if decode.serves(problem):
        return "decode", dataclasses.replace(decode.choose(problem), append=APPEND.index(append))
    if hopper.serves(problem):
        return "hopper", hopper.choose(problem)
    return "portable", variant.choose(problem)


def appends(problem: Problem) -> bool:
    """Whether calls of a problem may append new tokens in their launch (`DecodePlan.appends`), so that its plan makes more kernels."""
    return decode.serves(problem) and problem.seqlen_q <= decode.MOST_QUERIES and Feature.VARLEN not in problem.features


def distinct(asked: Sequence[Asked]) -> dict[AnyVariant, Asked]:
    """Each kernel once, with the first that asks for it."""
    found: dict[AnyVariant, Asked] = {}
    for one in asked:
        found.setdefault(kernel_for(*one)[1], one)
    return found


def compile_all(
    asked: Sequence[Asked], directory: Path, toolkit: Optional[int], count: int, tick: Optional[Callable[[str], None]] = None,
    command: tuple[str, ...] = (sys.executable, "-m", "attnhub.backends.cuda.ahead"),
) -> list[dict[str, Any]]:  # fmt: skip
    """Compile what is asked for into ``directory``, in ``count`` processes. toolkit: CUDA's major version, as for `nvrtc.find`.

    Returns a row for each kernel: ``kernel``, ``problem`` (the first that asked for it), ``append``, ``variant``; and ``cubin``, ``bytes``, ``cached`` (it was there),
    ``seconds`` and ``processor_seconds``, or ``error``.
    """
    from attnhub.bench import workers

    wanted = distinct(asked)
    questions = [{"problem": p.to_json(), "append": append, "directory": str(directory), "toolkit": toolkit} for p, append in wanted.values()]
    answers = workers.ask(command, questions, max(1, count), tick, patience=_PATIENCE)
    rows = []
    for (chosen, (problem, append)), answer in zip(wanted.items(), answers):
        outcome = answer or {"error": f"its process ended, or said nothing for {_PATIENCE:g} s"}
        rows.append({"kernel": kernel_for(problem)[0], "problem": problem.to_json(), "append": append, "variant": chosen.describe(), **outcome})
    return rows


def _compile(question: dict[str, Any]) -> dict[str, Any]:
    library = nvrtc.find(question["toolkit"])
    if library is None:
        return {"error": "NVRTC is not found"}
    _, chosen = kernel_for(Problem.from_json(question["problem"]), question["append"])
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
