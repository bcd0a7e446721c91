"""How things are timed: interleaved rounds and medians, so that a change of clock or a neighbour hits all alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor

from attnhub.bench.cases import Case
from attnhub.bench.peers import BASELINE, Absent, Inputs, Peer, naive

#: The largest score matrix for which results are compared with the definition in fp64 (which holds it several times).
_CHECKED_SCORES = 1 << 25


@dataclass(frozen=True)
class Settings:
    """rounds: how often each peer's turn comes; round_seconds: how long a turn lasts at least (one call always runs)."""

    rounds: int = 3
    round_seconds: float = 0.1


def run_case(
    case: Case, tensors: Inputs, peers: list[Union[Peer, Absent]], settings: Settings, tick: Optional[Callable[[str], None]] = None
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for every peer, absent ones with ``skipped``. ``tick`` is told who is next, once for each turn."""
    device = tensors[0].device
    truth = _truth(case, tensors)
    rows: list[dict[str, Any]] = []
    steps: list[tuple[dict[str, Any], Peer, Callable[[], Any], int, list[float]]] = []
    for peer in peers:
        row: dict[str, Any] = {**case.to_json(), "peer": peer.name}
        rows.append(row)
        if isinstance(peer, Absent):
            row["skipped"] = peer.why
            continue
        row.update(peer.facts)
        if case.mode == "backward" and not peer.differentiable:
            row["skipped"] = "it has no backward"
            continue
        if tick:
            tick(peer.name)
        try:
            with peer.context():
                step = _step(case, peer, tensors)
                row["max_error"] = None if truth is None else _max_error(peer, tensors, truth)
                turns = _turns(step, device, settings.round_seconds)
        except Exception as error:
            # A peer that fails (out of memory, a shape it lacks) is a row like any other; the others go on.
            row["skipped"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        steps.append((row, peer, step, turns, []))
    for r in range(settings.rounds):
        # Each round begins with another peer: nobody always runs behind the same neighbour.
        first = r % max(1, len(steps))
        for row, peer, step, turns, times in steps[first:] + steps[:first]:
            if tick:
                tick(row["peer"])
            with peer.context():
                times.append(time_calls(step, turns, device))
    for row, peer, step, _, times in steps:
        with peer.context():
            row["extra_mib"] = extra_memory(step, device)
        row["seconds"] = statistics.median(times)
        row["seconds_rounds"] = times
        row["tflops"] = case.flops() / row["seconds"] / 1e12
        row["tokens_per_s"] = case.batch * case.seqlen_q / row["seconds"]
        row["kv_gb_per_s"] = case.kv_bytes() / row["seconds"] / 1e9 if case.seqlen_q == 1 else None
    base = next((row["seconds"] for row, *_ in steps if row["peer"] == BASELINE), None)
    for row, *_ in steps:
        row["speedup"] = base / row["seconds"] if base else None
    return rows


def _step(case: Case, peer: Peer, tensors: Inputs) -> Callable[[], Any]:
    if case.mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return peer.attend(*tensors)

        return forward
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    out = peer.attend(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(out.dtype)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _truth(case: Case, tensors: Inputs) -> Optional[Tensor]:
    if case.scores() > _CHECKED_SCORES:
        return None
    with torch.no_grad():
        q, k, v = (t.double() for t in tensors)
        return naive(q, k, v, case.causal)


def _max_error(peer: Peer, tensors: Inputs, truth: Tensor) -> float:
    with torch.no_grad():
        return float((peer.attend(*tensors).double() - truth).abs().max())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _turns(step: Callable[[], Any], device: torch.device, seconds: float) -> int:
    """Calls that fill a turn. The first calls also compile and fill caches."""
    for _ in range(2):
        step()
    _synchronize(device)
    return max(1, int(seconds / max(time_calls(step, 1, device), 1e-7)))


def time_calls(step: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds a call: by events on a GPU, so that the queue stays full; by the clock elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3 / calls
    started = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - started) / calls


# -- memory --------------------------------------------------------------------------------------------------------------


def extra_memory(step: Callable[[], Any], device: torch.device) -> Optional[float]:
    """MiB that one call needs at its peak beyond what was there before, its result included. None where it cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # Linux forgets the peak of the resident set when 5 is written there (man 5 proc_pid_clear_refs).
        _trim()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before) / 2**10
    except OSError:
        return None


def _trim() -> None:
    """Freed memory goes back to the system: glibc keeps blocks, and a call that reuses them would seem to need nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: the figure may then be too small by what it keeps


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
