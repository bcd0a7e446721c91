"""How things are timed: interleaved rounds and medians, so that a change of clock or a neighbour hits all alike."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol, Union

import torch
from torch import Tensor

import attnhub
from attnhub.backend import Needs
from attnhub.backends.reference import maths
from attnhub.bench import processor, resident
from attnhub.bench.cases import Case
from attnhub.bench.ceilings import CaseCeilings, Ceilings
from attnhub.bench.parts import parts, slice_of
from attnhub.bench.peers import BASELINE, Absent, Inputs, Peer, first_line

#: The largest score matrix for which results are compared with the definition in fp64 as a whole. Of larger ones a GPU checks the first
#: K/V head of the first batch, in blocks of rows with so many scores.
_CHECKED_SCORES, _BLOCK_SCORES = 1 << 25, 1 << 26
#: The longest sequence that a GPU checks at all.
_CHECKED_LENGTH = 1 << 14
#: Calls in a CUDA graph: what replaying one graph costs is then nothing to each of them.
_GRAPH_CALLS = 20
_MOST_COPIES = 64
#: What part of a turn tells how many calls fill it: 1 / so much.
_TRIED = 10


@dataclass(frozen=True)
class Settings:
    """rounds: how often each peer's turn comes; round_seconds: how long a turn lasts at least (one call always runs).

    peer_seconds: what all turns of one peer may take in a case. Who is slower than that gets fewer rounds; who takes that long for
    one call is timed once.
    """

    rounds: int = 3
    round_seconds: float = 0.1
    peer_seconds: float = 12.0


class Named(Protocol):
    """What a turn needs of a peer: its name, and a context in which its calls are made."""

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> Callable[[], Any]: ...


@dataclass
class Runner:
    """A peer at its case: what is called, how often, and what came of it (seconds of a call, processor seconds of a second)."""

    row: dict[str, Any]
    peer: Named
    step: Callable[[], Any]
    rounds: int
    calls: int
    #: The same call by itself where step is more than one.
    single: Callable[[], Any]
    per_step: int = 1
    times: list[float] = field(default_factory=list)
    cpu_use: list[float] = field(default_factory=list)

    def turn(self, device: torch.device) -> None:
        with self.peer.context():
            seconds, cpu_use = time_turn(self.step, self.calls, device)
            self.record(seconds / self.per_step, cpu_use)

    def record(self, seconds: float, cpu_use: Optional[float]) -> None:
        self.times.append(seconds)
        if cpu_use is not None:
            self.cpu_use.append(cpu_use)


def run_case(
    case: Case, tensors: Inputs, peers: list[Union[Peer, Absent]], settings: Settings, tick: Optional[Callable[[str], None]] = None,
    ceilings: Optional[Ceilings] = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for every peer, absent ones with ``skipped``. ``tick`` is told who is next, once for each turn."""
    device = tensors[0].device
    if device.type == "cpu":
        _one_arena()
    truth = _truth(case, tensors)
    ring = _ring(case, tensors)
    rows: list[dict[str, Any]] = []
    runners: list[Runner] = []
    for peer in peers:
        row: dict[str, Any] = {**case.to_json(), "peer": peer.name}
        rows.append(row)
        if isinstance(peer, Absent):
            row["skipped"] = peer.why
            continue
        row.update(peer.facts)
        if case.mode != "forward" and not peer.differentiable:
            row["skipped"] = "it has no backward"
            continue
        if tick:
            tick(peer.name)
        try:
            with peer.context():
                single = step = _step(case, peer, ring)
                row["max_error"] = None if truth is None else truth.error(peer, tensors)
                if case.mode != "forward":
                    row["max_grad_error"] = None if truth is None else truth.grad_error(step)
                if case.graph:
                    step = captured(single, device)
                rounds, calls = plan(step, device, settings)
                if "backend" in peer.facts and (told := attnhub.last_decision()):
                    row["plan"] = dict(told.plan)  # which of a backend's kernels served
        except Exception as error:
            # A peer that fails (out of memory, a shape it lacks) is a row like any other; the others go on.
            row["skipped"] = first_line(error)
            continue
        runners.append(Runner(row, peer, step, rounds, calls, single, _GRAPH_CALLS if case.graph else 1))
    limits = CaseCeilings(ceilings, case)
    limits.sample()
    interleave(runners, settings, device, tick, limits.sample)
    for runner in runners:
        with runner.peer.context():
            runner.row["extra_mib"], seconds, cpu_use = extra_memory(runner.single, device)
        if not runner.times:
            runner.record(seconds, cpu_use)
        _fill(runner, case, limits, len(ring))
    compare(runners, BASELINE)
    return rows


def compare(runners: list[Runner], baseline: str) -> None:
    """Every row's speedup over the peer of that name; None where it is absent."""
    base = next((runner.row["seconds"] for runner in runners if runner.peer.name == baseline), None)
    for runner in runners:
        runner.row["speedup"] = base / runner.row["seconds"] if base else None


def interleave(
    runners: list[Runner], settings: Settings, device: torch.device, tick: Optional[Callable[[str], None]] = None,
    after: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """The rounds, ``after`` behind each. Each begins with another peer: nobody always runs behind the same neighbour."""
    for r in range(settings.rounds):
        first = r % max(1, len(runners))
        for runner in runners[first:] + runners[:first]:
            if tick:
                tick(runner.peer.name)
            if r < runner.rounds:
                runner.turn(device)
        after()


def _fill(runner: Runner, case: Case, limits: CaseCeilings, copies: int) -> None:
    """The figures of a row that follow from its times."""
    row, seconds = runner.row, statistics.median(runner.times)
    row["seconds"] = seconds
    row["seconds_rounds"], row["turn_seconds"] = runner.times, seconds * runner.per_step * runner.calls
    row["tflops"] = case.flops() / seconds / 1e12
    row["tokens_per_s"] = case.batch * case.seqlen_q / seconds
    row["kv_gb_per_s"] = case.kv_bytes() / seconds / 1e9 if case.is_decode() else None
    if runner.cpu_use:
        row["cpu_use"] = statistics.median(runner.cpu_use)
    if peak := limits.peak():
        row["peak_tflops"] = peak / 1e12
        row["peak_fraction"] = case.flops() / seconds / peak
    if read := limits.read():
        row["read_gb_per_s"] = read / 1e9
        row["bandwidth_fraction"] = case.kv_bytes() / seconds / read
        row["kv_copies"] = copies


def _ring(case: Case, tensors: Inputs) -> list[Inputs]:
    """The inputs of successive calls. On a CPU every decode step finds its K/V in memory and not in the cache, as in a model, whose
    other layers' K/V were read since the last step: calls take turns at copies that no cache holds together."""
    if tensors[0].device.type != "cpu" or not case.is_decode():
        return [tensors]
    q, k, v = tensors
    copies = max(1, -(-processor.cold_bytes() // case.kv_bytes()))
    # A tiny cache of keys would need thousands of copies; by then what is timed is the call itself.
    return [tensors, *((q, k.clone(), v.clone()) for _ in range(min(copies, _MOST_COPIES) - 1))]


def _step(case: Case, peer: Peer, ring: list[Inputs]) -> Callable[[], Any]:
    if case.mode == "forward":
        following = itertools.cycle(ring)

        def forward() -> Tensor:
            with torch.no_grad():
                return peer.attend(*next(following))

        return forward
    leaves = tuple(t.detach().requires_grad_() for t in ring[0])
    out = peer.attend(*leaves)
    grad = grad_out(out)
    if case.mode == "training":
        del out
        return lambda: torch.autograd.grad(peer.attend(*leaves), leaves, grad)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def grad_out(out: Tensor) -> Tensor:
    """The gradient of out that every peer gets."""
    return torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(out.dtype)


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of _GRAPH_CALLS calls, to be replayed. ValueError where there are none."""
    if device.type != "cuda":
        raise ValueError("CUDA graphs need a CUDA device")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_GRAPH_CALLS):
            step()
    return graph.replay


class Truth:
    """The definition in fp64 of a case, or of its first K/V head where the whole is large. ``out`` and ``grads`` (of q, k, v) hold it."""

    def __init__(self, case: Case, tensors: Inputs, whole: bool) -> None:
        call = slice_of(case, *tensors, parts(case, tensors[0].device), whole)
        rows = max(1, _BLOCK_SCORES // (call.q.shape[0] * call.q.shape[1] * call.k.shape[2]))
        out, lse = maths.forward(call, rows, torch.float64, False)
        assert lse is not None
        self.out = out
        self.grads: tuple[Optional[Tensor], ...] = ()
        if case.mode != "forward":
            grad = grad_out(tensors[0])[: out.shape[0], : out.shape[1]].double()
            self.grads = tuple(maths.backward(call, grad, None, out, lse, Needs(), rows, torch.float64)[:3])

    def error(self, peer: Peer, tensors: Inputs) -> float:
        with torch.no_grad():
            return distance(peer.attend(*tensors), self.out)

    def grad_error(self, step: Callable[[], Any]) -> float:
        return max(distance(mine, right) for mine, right in zip(step(), self.grads) if right is not None)


def distance(mine: Tensor, right: Tensor) -> float:
    """The largest difference, over the part that right holds. ArithmeticError where it is not finite."""
    largest = float((mine[: right.shape[0], : right.shape[1]].double() - right).abs().max())
    if not math.isfinite(largest):
        raise ArithmeticError("its result is not finite")
    return largest


def _truth(case: Case, tensors: Inputs) -> Optional[Truth]:
    whole = case.scores() <= _CHECKED_SCORES
    if not whole and (tensors[0].device.type == "cpu" or case.seqlen_q > _CHECKED_LENGTH):
        return None
    try:
        return Truth(case, tensors, whole)
    except torch.OutOfMemoryError:
        return None


def plan(step: Callable[[], Any], device: torch.device, settings: Settings) -> tuple[int, int]:
    """(rounds, calls in each). The first calls also compile and fill caches. No rounds: one call is all that there is time for."""
    first = time_turn(step, 1, device)[0]
    if first > settings.peer_seconds:
        # It may have been a compiler's time and not the call's own.
        if device.type == "cpu" or time_turn(step, 1, device)[0] > settings.peer_seconds:
            return 0, 1
    elif first < settings.peer_seconds / 10:
        step()
        first = time_turn(step, 1, device)[0]
        if (few := int(settings.round_seconds / _TRIED / max(first, 1e-7))) > 1:
            # One call by itself also pays for an empty queue: a turn would be much shorter than asked for.
            first = time_turn(step, few, device)[0]
    rounds = min(settings.rounds, max(1, int(settings.peer_seconds / max(first, settings.round_seconds))))
    return rounds, max(1, int(settings.round_seconds / max(first, 1e-7)))


def time_turn(step: Callable[[], Any], calls: int, device: torch.device) -> tuple[float, Optional[float]]:
    """Seconds a call, and processor seconds used in a second of the clock (None on a GPU, where the host only waits).

    Seconds are those of events on a GPU, so that the queue stays full, and of the clock elsewhere. Processor seconds are the
    process's: threads of a pool that spin while they wait count as much as those that work.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3 / calls, None
    used, started = time.process_time(), time.perf_counter()
    for _ in range(calls):
        step()
    elapsed = time.perf_counter() - started
    return elapsed / calls, (time.process_time() - used) / elapsed


# -- memory --------------------------------------------------------------------------------------------------------------


def extra_memory(step: Callable[[], Any], device: torch.device) -> tuple[Optional[float], float, Optional[float]]:
    """(MiB that one call needs at its peak beyond what was there before, its result included; its seconds; its processor use).

    MiB is None where it cannot be known. On a CPU the call runs on a new thread, for which OpenMP starts a new pool: what threads
    keep for their next call (scratch buffers of a kernel or of a BLAS) is then allocated anew and counts, as it does in a process
    that makes its first call. What a library keeps for the process as a whole (ONNX Runtime's arena and pool) does not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds, _ = time_turn(step, 1, device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20, seconds, None
    threads, found = torch.get_num_threads(), []

    def call() -> None:
        # A new thread begins with as many threads as the environment says.
        torch.set_num_threads(threads)
        before = resident.begin()
        turn = time_turn(step, 1, device)
        found.append((None if before is None else max(0, resident.peak() - before) / 2**10, *turn))

    others = _thread_count()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    # Its pool ends by itself, and what that frees must not be missing in the next measurement.
    patience = time.monotonic() + 2
    while _thread_count() > others and time.monotonic() < patience:
        time.sleep(0.001)
    if not found:
        raise RuntimeError("a call that worked before failed when its memory was measured")
    return found[0]


@functools.lru_cache(maxsize=1)
def _one_arena() -> None:
    """New threads share the main heap: glibc gives nothing back from the end of the others, where a later call would then find room."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


@contextlib.contextmanager
def own_mappings() -> Iterator[None]:
    """Within, glibc maps every block of 64 KiB and more by itself, so that what is freed leaves the resident set. Otherwise the peak of a
    whole model's step depends by a tenth on what lies free from earlier ones. Slower: nothing is timed in it."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        yield
        return
    set_option(-3, 1 << 16)  # M_MMAP_THRESHOLD
    try:
        yield
    finally:
        # What the thresholds have grown to by themselves in a process that has used large tensors.
        set_option(-3, 32 << 20)
        set_option(-1, 64 << 20)  # M_TRIM_THRESHOLD


def _thread_count() -> int:
    try:
        return resident.status("Threads")
    except OSError:
        return 0
