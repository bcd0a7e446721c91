"""Measuring tile sizes, for `attnhub tune` and for ATTNHUB_TUNE=now.

A group is what one entry of a table is for. Its candidates are run in processes of their own first, which leaves their kernels in
Triton's cache and shows who fails; the others must agree with the definition, and are then timed in interleaved rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

import attnhub
from attnhub import config
from attnhub.backend import Call, Needs, PrepareError
from attnhub.backends.triton import table, tiles
from attnhub.backends.triton.tiles import Tiles, padded
from attnhub.bench import measure, peers, workers
from attnhub.bench.cases import ITEM, Case
from attnhub.bench.results import slug
from attnhub.mask import FULL, Causal
from attnhub.problem import Problem

log = logging.getLogger("attnhub")

#: Role -> the gradients that its kernel makes; None: it is a forward.
_NEEDS = {"forward": None, "decode": None, "grad_kv": Needs(False, True, True), "grad_q": Needs(True, False, False)}
ROLES = tuple(_NEEDS)
_PATIENCE = 90.0
#: Above this there are no candidates.
_WIDEST = 256


@dataclass(frozen=True)
class Settings:
    """rounds and seconds of a candidate's turn; margin: how much faster than the present tiles others must be to replace them."""

    rounds: int = 3
    seconds: float = 0.015
    margin: float = 0.02


@dataclass(frozen=True)
class Group:
    """What one entry of a table is for."""

    role: str
    dtype: str
    head_dim: int
    kind: str

    def __str__(self) -> str:
        return f"{self.role} {self.dtype} head_dim {self.head_dim} {self.kind}"

    def cases(self) -> list[Case]:
        """The problems that it is judged by, a short and a long one."""
        dim = self.head_dim
        if self.role == "decode":
            sizes = ((1, 8192), (32, 4096))
            return [Case(1, length, batch=batch, heads=32, kv_heads=8, head_dim=dim, dtype=self.dtype) for batch, length in sizes]
        # A product in fp32 is three at half of the rate, or runs on ordinary units at a tenth of it.
        tokens, width, lengths = (16384, 2048, (1024, 8192)) if ITEM[self.dtype] < 4 else (4096, 512, (1024, 4096))
        mode = "forward" if _NEEDS[self.role] is None else "backward"
        return [
            Case(length, batch=tokens // length, heads=max(1, width // dim), head_dim=dim, dtype=self.dtype, causal=self.kind == "causal", mode=mode)
            for length in lengths
        ]  # fmt: skip

    def candidates(self, limit: int, measured: Optional[Tiles] = None, exact: bool = False) -> list[Tiles]:
        """Tiles to try on a device with ``limit`` bytes of shared memory: the present ones first, which are those measured before, if any.

        exact: of fp32 on ordinary units.
        """
        item, width = ITEM[self.dtype], padded(self.head_dim)
        present = tiles.choices(self.role, self.head_dim, self.head_dim, item, limit, exact)[:1]
        if measured is not None:
            present.insert(0, measured)
        grid = (
            Tiles(block_m, block_n, warps, stages)
            for block_m, block_n in _BLOCKS[self.role, item] for warps in _warps(self.role, block_m, block_n, item) for stages in _STAGES[self.role, item]
        )  # fmt: skip
        fitting = (t for t in grid if tiles.estimate(self.role, t, 2 * width, item) <= limit)
        return list(dict.fromkeys([*present, *fitting]))


_BLOCKS = {
    ("forward", 2): ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)),
    ("forward", 4): ((16, 32), (32, 32), (64, 32), (64, 64), (128, 32), (128, 64)),
    ("decode", 2): ((16, 32), (16, 64), (16, 128)),
    ("decode", 4): ((16, 16), (16, 32), (16, 64), (16, 128)),
    ("grad_kv", 2): ((16, 64), (32, 64), (64, 64), (32, 128), (64, 128)),
    ("grad_kv", 4): ((16, 16), (32, 16), (16, 32), (32, 32), (16, 64), (32, 64), (32, 128)),
    ("grad_q", 2): ((64, 16), (64, 32), (64, 64), (128, 32), (128, 64)),
    ("grad_q", 4): ((16, 16), (32, 16), (16, 32), (32, 32), (64, 32), (64, 64), (128, 32)),
}
_STAGES = {
    (role, item): {"forward": (2, 3, 4), "decode": (2, 3, 4), "grad_kv": (1, 2, 3), "grad_q": (1, 2, 3)}[role] if item == 2 else (1, 2) for role, item in _BLOCKS
}


def _warps(role: str, block_m: int, block_n: int, item: int) -> tuple[int, ...]:
    """Four warps, and eight where a block has enough rows for two groups of four; few rows may do with two."""
    resident = block_n if role == "grad_kv" else block_m
    if role == "decode":
        return (2, 4, 8)
    return (4, 8) if resident >= 128 or (item == 4 and resident >= 64) or role == "grad_kv" else (4,)


@dataclass(frozen=True)
class Outcome:
    """What came of a group. times: relative to the present tiles, of those that were timed; refused: why the others were not."""

    group: Group
    best: Tiles
    present: Tiles
    times: dict[Tiles, float]
    refused: dict[Tiles, str]

    def entry(self) -> dict[str, Any]:
        """The group's entry in a table. gain: how many times as fast as the tiles that were there before."""
        return {"tiles": list(dataclasses.astuple(self.best)), "gain": round(1 / self.times[self.best], 3), "timed": len(self.times)}


def groups(roles: tuple[str, ...] = ROLES, dtypes: tuple[str, ...] = ("bfloat16", "float32"), head_dims: tuple[int, ...] = (64, 128, 256)) -> list[Group]:
    """All groups. A decode step sees all keys: it has one kind."""
    return [
        Group(role, dtype, dim, kind) for role in roles for dtype in dtypes for dim in head_dims for kind in (("full",) if role == "decode" else table.KINDS)
    ]  # fmt: skip


class Trial:
    """The cases of a group on a device, to be run with any tiles."""

    def __init__(self, group: Group, device: torch.device, cases: Optional[list[Case]] = None) -> None:
        self.group = group
        self._needs = _NEEDS[group.role]
        self._calls: list[tuple[Case, Call, Problem, tuple[Tensor, ...]]] = []
        self._right: list[list[Tensor]] = []
        for case in group.cases() if cases is None else cases:
            q, k, v = peers.inputs(case, device)
            mask = Causal() if case.causal and case.seqlen_q > 1 else FULL
            call = Call(q, k, v, mask, case.head_dim**-0.5, need_lse=self._needs is not None)
            problem = attnhub.explain(q, k, v, mask, return_lse=call.need_lse, backend="triton").problem
            saved: tuple[Tensor, ...] = ()
            if self._needs is not None:
                with table.measuring():
                    out, lse = _plan(problem, None).forward(call)
                assert lse is not None
                saved = (measure.grad_out(out), out, lse)
            self._calls.append((case, call, problem, saved))

    def steps(self, chosen: Tiles) -> list[Callable[[], tuple[Tensor, ...]]]:
        """For each case: run it with these tiles; returns the tensors that the kernel makes."""
        return [self._step(call, problem, saved, chosen) for _, call, problem, saved in self._calls]

    def _step(self, call: Call, problem: Problem, saved: tuple[Tensor, ...], chosen: Tiles) -> Callable[[], tuple[Tensor, ...]]:
        plan, needs = _plan(problem, {self.group.role: [chosen]}), self._needs
        if needs is None:
            return lambda: plan.forward(call)[:1]  # type: ignore[return-value]
        grad_out, out, lse = saved
        return lambda: tuple(grad for grad in plan.backward(call, grad_out, None, out, lse, needs)[:3] if grad is not None)

    def errors(self, results: list[tuple[Tensor, ...]]) -> list[float]:
        """For each case the largest error of what `steps` returned, against the definition in fp64."""
        if not self._right:
            self._right = [self._definition(case, call) for case, call, _, _ in self._calls]
        return [max(measure.distance(mine, wanted) for mine, wanted in zip(result, right)) for result, right in zip(results, self._right)]

    def _definition(self, case: Case, call: Call) -> list[Tensor]:
        truth = measure.Truth(case, (call.q, call.k, call.v), False)
        if self._needs is None:
            return [truth.out]
        return [grad for grad, needed in zip(truth.grads, self._needs) if needed and grad is not None]


def _plan(problem: Problem, chosen: Optional[dict[str, list[Tiles]]]) -> Any:
    from attnhub.backends.triton.launcher import TritonPlan

    with table.measuring():
        plan = TritonPlan(problem)
    if chosen is not None:
        plan._tiles = chosen
    return plan


def attempt(question: dict[str, Any]) -> dict[str, str]:
    """Run {"group", "tiles"} once. {} if it went well, else {"why"}. A fault of the device ends the process, which it would spoil."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    group = Group(**question["group"])
    try:
        for step in Trial(group, device, group.cases()[:1]).steps(Tiles(*question["tiles"])):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except PrepareError as error:
        return {"why": str(error)}
    except RuntimeError as error:
        if "CUDA error" in str(error) or "Triton Error" in str(error):
            sys.exit(1)
        return {"why": f"{type(error).__name__}: {error}"}
    return {}


def compile_ahead(work: dict[Group, list[Tiles]], jobs: int, tick: Optional[Callable[[str], None]] = None, limit: float = 0.0) -> dict[Group, list[Tiles]]:
    """The candidates that run, tried in ``jobs`` processes."""
    pairs = [(group, chosen) for group, candidates in work.items() for chosen in candidates]
    questions = [{"group": dataclasses.asdict(group), "tiles": dataclasses.astuple(chosen)} for group, chosen in pairs]
    answers = workers.ask((sys.executable, "-m", "attnhub.backends.triton.tune"), questions, jobs, tick, limit, _PATIENCE)
    good: dict[Group, list[Tiles]] = {group: [] for group in work}
    for (group, chosen), answer in zip(pairs, answers):
        if answer == {}:
            good[group].append(chosen)
    return good


def run(group: Group, candidates: list[Tiles], device: torch.device, settings: Settings, trial: Optional[Trial] = None) -> Optional[Outcome]:
    """Time the candidates, of which the first are the present tiles. None if none of them works."""
    trial = trial or Trial(group, device)
    steps: dict[Tiles, list[Callable[[], Any]]] = {}
    errors: dict[Tiles, list[float]] = {}
    refused: dict[Tiles, str] = {}
    for chosen in candidates:
        try:
            mine = trial.steps(chosen)
            errors[chosen] = trial.errors([step() for step in mine])
            steps[chosen] = mine
        except (PrepareError, ArithmeticError) as error:
            refused[chosen] = str(error)
    if not steps:
        return None
    # Twice the error of the best: other tiles add in another order, a wrong one is far off.
    least = [min(found) for found in zip(*errors.values())]
    for chosen, found in errors.items():
        if any(mine > 2 * best + _unit(group) for mine, best in zip(found, least)):
            refused[chosen] = f"errors {found} where others have {least}"
            del steps[chosen]
    times = _time(steps, device, settings)
    present = candidates[0] if candidates[0] in steps else next(iter(steps))
    relative = {
        chosen: math.exp(statistics.fmean(math.log(mine / now) for mine, now in zip(found, times[present]))) for chosen, found in times.items()
    }  # fmt: skip
    fastest = min(relative, key=lambda chosen: relative[chosen])
    return Outcome(group, fastest if relative[fastest] < 1 - settings.margin else present, present, relative, refused)


def _unit(group: Group) -> float:
    """A rounding unit of results of size one."""
    return torch.finfo(getattr(torch, group.dtype)).eps


def _time(steps: dict[Tiles, list[Callable[[], Any]]], device: torch.device, settings: Settings) -> dict[Tiles, list[float]]:
    """Median seconds of each case, in rounds that begin with another candidate each."""
    samples: dict[Tiles, list[list[float]]] = {chosen: [[] for _ in mine] for chosen, mine in steps.items()}
    order = list(steps)
    for n in range(len(next(iter(steps.values())))):
        calls = {chosen: max(1, int(settings.seconds / max(measure.time_turn(steps[chosen][n], 1, device)[0], 1e-7))) for chosen in order}
        for r in range(settings.rounds):
            first = r * len(order) // settings.rounds
            for chosen in order[first:] + order[:first]:
                samples[chosen][n].append(measure.time_turn(steps[chosen][n], calls[chosen], device)[0])
    return {chosen: [statistics.median(found) for found in mine] for chosen, mine in samples.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Where and by what a table was measured."""
    import triton

    from attnhub.bench import results

    cuda = device.type == "cuda"
    return {
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": torch._C._cuda_getDriverVersion() if cuda and hasattr(torch._C, "_cuda_getDriverVersion") else None,
        "torch": torch.__version__, "triton": str(triton.__version__), "commit": results.commit(),
    }  # fmt: skip


# -- ATTNHUB_TUNE=now ----------------------------------------------------------------------------------------------------


def kept(problem: Problem, missing: list[str]) -> dict[str, Any]:
    """This machine's own table, with the entries that a problem needs measured where they are missing.

    One file for each device, driver and set of versions, under a lock: processes that start together measure once.
    """
    device = torch.device(problem.device.type, torch.cuda.current_device()) if problem.device.type == "cuda" else torch.device("cpu")
    facts = environment(device)
    path = config.cache_dir() / f"triton-tune-{slug(' '.join(str(facts[name]) for name in ('device', 'driver', 'torch', 'triton')))}.json"
    with _locked(path):
        found = table.load(path) if path.exists() else table.empty()
        name, item, width, which = table.device_class(problem.device), ITEM.get(problem.q_dtype, 0), padded(max(problem.head_dim, problem.v_head_dim)), table.kind(problem)
        todo = [
            Group(role, problem.q_dtype, width, which) for role in missing
            if _wanted(role, problem) and width <= _WIDEST and (role, item) in _BLOCKS and not table.find(found, name, role, item, width, which, exact=True)
        ]  # fmt: skip
        if not todo or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return found
        log.warning("ATTNHUB_TUNE=now: measuring tile sizes of the triton backend (%s); kept in %s", ", ".join(map(str, todo)), path)
        limit = tiles.shared_memory(problem.device.vendor, problem.device.arch)
        exact = item == 4 and not tiles.tf32x3(problem.device.vendor, problem.device.arch, width, width, (problem.seqlen_q, problem.seqlen_k))
        for group, good in compile_ahead({group: group.candidates(limit, exact=exact) for group in todo}, workers.jobs()).items():
            outcome = run(group, good, device, Settings()) if good else None
            # What cannot be measured is not tried again and again.
            fallback = {"tiles": list(dataclasses.astuple(group.candidates(limit, exact=exact)[0])), "gain": 1.0, "timed": 0}
            table.put(found, name, group.role, item, width, which, fallback if outcome is None else outcome.entry())
        found["devices"].setdefault(name, {"tiles": {}})["environment"] = facts
        table.write(path, found)
    return found


def _wanted(role: str, problem: Problem) -> bool:
    if role == "decode":
        return problem.seqlen_q <= 16
    return problem.seqlen_q > 16 if role == "forward" else problem.need_backward


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Hold a file lock beside ``path``; where the system has none, go without."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    workers.answer(attempt)
