"""A case of the suite ``models``: every peer's calls checked, then timed in interleaved rounds, as kernels are (measure.py)."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from torch import Tensor

import attnhub
from attnhub.bench import measure, zoo
from attnhub.bench.models import BASELINE, UNITS, ModelCase, left_out
from attnhub.bench.peers import first_line
from attnhub.bench.tasks import TASKS, Step, Task


@dataclass(frozen=True)
class Peer:
    """A model's name in a table. A backend that was asked for is set around every call, since a thread has its own policy."""

    name: str
    context: Callable[[], Any] = contextlib.nullcontext


def run_case(
    case: ModelCase, models: zoo.Zoo, names: tuple[str, ...], settings: measure.Settings, tick: Optional[Callable[[str], None]] = None
) -> list[dict[str, Any]]:
    """One row for every peer, absent ones with ``skipped``.

    names: transformers' implementations, and ``attnhub`` or ``attnhub <backend>``. ``difference`` is the largest one to the baseline's
    output: of unit vectors as it is, else as a part of the largest value.
    """
    device = models.device
    models.tidy()
    rows: list[dict[str, Any]] = []
    runners: list[measure.Runner] = []
    outputs: dict[str, Tensor] = {}
    task: Optional[Task] = None
    for name in names:
        row: dict[str, Any] = {**case.to_json(), "peer": name}
        rows.append(row)
        if why := left_out(case, name, device.type):
            row["skipped"] = why
            continue
        if tick:
            tick(name)
        try:
            lent = models.lend(case, name)
            if task is None:
                task = TASKS[case.task](case, lent.model, device)
            outputs[name] = _checked(task, lent, name, row)
            step = _with_backend(task.step(lent.model), name)
            rounds, calls = measure.plan(step, device, settings)
        except Exception as error:
            # Without room, or without a package: a row like any other.
            row["skipped"] = first_line(error)
            failed = True
        else:
            failed = False
        if failed:
            # Behind the clause that held the error and with it all that the call had made.
            models.tidy()
            continue
        runners.append(measure.Runner(row, Peer(name), step, rounds, calls, step))
    measure.interleave(runners, settings, device, tick)
    for runner in runners:
        row = runner.row
        with measure.own_mappings():
            row["extra_mib"], seconds, cpu_use = measure.extra_memory(runner.single, device)
        if not runner.times:
            runner.record(seconds, cpu_use)
        row["seconds"], row["seconds_rounds"] = statistics.median(runner.times), runner.times
        row["rate"], row["unit"] = case.units() / row["seconds"], UNITS[case.task]
        if BASELINE in outputs:
            row["difference"] = difference(outputs[row["peer"]], outputs[BASELINE], case.task != "embed")
    measure.compare(runners, BASELINE)
    return rows


def _checked(task: Task, lent: zoo.Lent, name: str, row: dict[str, Any]) -> Tensor:
    """What the model gives, in fp32 on the host. ArithmeticError where it is not finite, or where attention was computed by others."""
    before = lent.report.calls if lent.report else 0
    out = _with_backend(lambda: task.check(lent.model), name)().detach().float().cpu()
    if not bool(out.isfinite().all()):
        raise ArithmeticError("its output is not finite")
    if lent.report:
        served = lent.report.calls - before
        if not served or any(module.calls == 0 for module in lent.report.patched):
            raise ArithmeticError(f"attnhub served {served} calls of {len(lent.report.patched)} attention modules")
        totals: dict[str, int] = {}
        for module in lent.report.patched:
            for backend, count in module.backends.items():
                totals[backend] = totals.get(backend, 0) + count
        row["backend"] = ", ".join(sorted(totals))
        row["attention_modules"] = len(lent.report.patched)
    return out


def _with_backend(step: Step, name: str) -> Step:
    backend = name.removeprefix("attnhub").strip()
    if not name.startswith("attnhub") or not backend:
        return step

    def call() -> Tensor:
        with attnhub.use(backend):
            return step()

    return call


def difference(mine: Tensor, base: Tensor, relative: bool) -> float:
    """The largest difference; relative: as a part of the largest value of base."""
    largest = float((mine - base).abs().max()) / (float(base.abs().max()) if relative else 1.0)
    if not math.isfinite(largest):
        raise ArithmeticError("the outputs cannot be compared: the baseline's is 0")
    return largest
