"""How the benchmarks measure: turns, memory, processor use, who takes part and who is absent, and the ceilings of a machine."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import pytest
import torch

from attnhub.bench import ceilings, measure, peers, processor
from attnhub.bench.cases import Case

CPU = torch.device("cpu")
built = pytest.mark.skipif(ceilings.available(1) is None, reason="the cpu backend's library is not built")


def test_a_training_step_runs_both_passes_and_checks_gradients() -> None:
    calls = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(q.requires_grad)
        return peers.naive(q, k, v, False)

    case = Case(16, mode="training")
    tensors = peers.inputs(case, CPU)
    wrong = peers.Peer("wrong gradient", lambda q, k, v: peers.naive(q, k, v, False) + 0.5 * (q - q.detach()))
    mine, other = measure.run_case(case, tensors, [peers.Peer("mine", attend), wrong], measure.Settings(2, 1e-4))
    assert sum(calls) > 3 and len(mine["seconds_rounds"]) == 2
    assert mine["max_error"] < 1e-5 and mine["max_grad_error"] < 1e-5
    assert other["max_error"] < 1e-5 and other["max_grad_error"] > 0.1


def test_speedups_are_over_the_baseline() -> None:
    def runner(name: str, seconds: float) -> measure.Runner:
        return measure.Runner({"seconds": seconds}, peers.Peer(name, peers.naive), lambda: None, 1, 1, lambda: None)  # type: ignore[arg-type]

    runners = [runner("mine", 0.5), runner("theirs", 2.0), runner("other", 4.0)]
    measure.compare(runners, "theirs")
    assert [r.row["speedup"] for r in runners] == [4.0, 1.0, 0.5]
    measure.compare(runners, "absent")
    assert [r.row["speedup"] for r in runners] == [None] * 3


def test_the_ring_is_larger_than_the_cache() -> None:
    case = Case(1, 4096, heads=8, kv_heads=2)
    ring = measure._ring(case, peers.inputs(case, CPU))
    assert len({k.data_ptr() for _, k, _ in ring}) == len(ring)
    assert len(ring) * case.kv_bytes() >= min(processor.cold_bytes(), measure._MOST_COPIES * case.kv_bytes())
    assert all(torch.equal(k, ring[0][1]) for _, k, _ in ring)
    assert len(measure._ring(Case(8), peers.inputs(Case(8), CPU))) == 1


def test_a_slow_peer_gets_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(measure, "time_turn", lambda step, calls, device: (5.0, None))
        assert measure.plan(lambda: None, CPU, measure.Settings(3, 0.1, 12.0)) == (2, 1)
        assert measure.plan(lambda: None, CPU, measure.Settings(3, 0.1, 60.0)) == (3, 1)
        assert measure.plan(lambda: None, CPU, measure.Settings(3, 0.1, 2.0)) == (0, 1)
    slow = peers.Peer("slow", lambda q, k, v: peers.naive(q, k, v, False))
    (row,) = measure.run_case(Case(16), peers.inputs(Case(16), CPU), [slow], measure.Settings(3, 1e-6, 1e-9))
    assert len(row["seconds_rounds"]) == 1 and row["seconds"] > 0


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_extra_memory_sees_what_a_thread_keeps() -> None:
    """A call that makes its thread keep 64 MiB needs 64 MiB each time it is asked, and none is counted for a call that makes nothing."""
    import threading

    kept = threading.local()

    def step() -> None:
        if not hasattr(kept, "buffer"):
            kept.buffer = torch.ones(16 << 20)

    step()
    found = [measure.extra_memory(step, CPU)[0] for _ in range(2)]
    assert all(mib is not None and 60 < mib < 80 for mib in found), found
    mib, seconds, cpu_use = measure.extra_memory(lambda: None, CPU)
    assert mib is not None and mib < 8 and seconds >= 0 and cpu_use is not None


def test_processor_use_is_measured() -> None:
    (row,) = measure.run_case(Case(64), peers.inputs(Case(64), CPU), [peers.Peer("x", lambda q, k, v: q)], measure.Settings(3, 0.02))
    assert 0 < row["cpu_use"] < 1.5


@built
def test_ceilings_exceed_what_any_kernel_reaches() -> None:
    from attnhub.backends.cpu import library

    threads = torch.get_num_threads()
    case = Case(512, heads=8, head_dim=128)
    tensors = peers.inputs(case, CPU)
    everybody = peers.assemble(case, tensors, ("naive", "sdpa"), ("cpu",))
    limits = ceilings.Ceilings(threads)
    rows = measure.run_case(case, tensors, everybody, measure.Settings(3, 0.02), ceilings=limits)
    found = limits.to_json()
    assert set(found) == {"threads", "read_bytes", "float32"} and len(found["float32"]["samples"]) == 4
    assert found["float32"]["median"] <= found["float32"]["max"]
    # A noisy neighbour lowers samples, so more are taken where the first are too low; a ceiling that is none stays too low.
    fastest = max(case.flops() / min(row["seconds_rounds"]) for row in rows if "skipped" not in row)
    assert max(found["float32"]["max"], *(limits.sample("float32") or 0 for _ in range(20))) > fastest
    assert all(row["peak_fraction"] > 0 for row in rows if "skipped" not in row)
    for name in library.available_isas():
        assert library.peak_flops("bfloat16", 1, library.ISAS[name]) > 1e8
        assert library.read_rate(1, 1 << 20, isa=library.ISAS[name]) > 1e8


@built
def test_ceilings_of_nothing_are_0() -> None:
    from attnhub.backends.cpu import library

    assert library.peak_flops("float32", 0) == 0 == library.read_rate(0, 1 << 20) == library.read_rate(1, -1)
    missing = set(library.ISAS) - set(library.available_isas()) - {"auto"}
    assert all(library.peak_flops("float32", 1, library.ISAS[name]) == 0 for name in missing)


@built
def test_decode_rows_are_compared_with_the_read_rate() -> None:
    case = Case(1, 256, heads=4, kv_heads=2, dtype="bfloat16")
    tensors = peers.inputs(case, CPU)
    limits = ceilings.Ceilings(1)
    limits.read_bytes = 1 << 20
    (row,) = measure.run_case(case, tensors, peers.assemble(case, tensors, ("sdpa",), ()), measure.Settings(1, 0.001), ceilings=limits)
    assert row["bandwidth_fraction"] == pytest.approx(row["kv_gb_per_s"] / row["read_gb_per_s"])
    assert {ceilings.READ, ceilings.READ_HUGE, "bfloat16"} < set(limits.to_json())


def test_a_peer_without_finite_results_is_not_timed() -> None:
    (row,) = measure.run_case(Case(16), peers.inputs(Case(16), CPU), [peers.Peer("x", lambda q, k, v: q / 0 * 0)], measure.Settings(1, 1e-4))
    assert row["skipped"] == "ArithmeticError: its result is not finite"


def test_who_finds_no_memory_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("none")

    monkeypatch.setattr(peers, "_dense_mask", nothing_left)
    monkeypatch.setattr(measure, "Truth", nothing_left)
    case = Case(32, causal=True, window=5)
    tensors = peers.inputs(case, CPU)
    rows = measure.run_case(case, tensors, peers.assemble(case, tensors, ("sdpa",), ("reference",)), measure.Settings(1, 1e-4))
    assert rows[0]["skipped"] == "there is no memory for it" and rows[1]["seconds"] > 0 and rows[1]["max_error"] is None


def test_a_graph_needs_a_gpu() -> None:
    case = Case(16, graph=True)
    (row,) = measure.run_case(case, peers.inputs(case, CPU), [peers.Peer("x", lambda q, k, v: q)], measure.Settings(1, 1e-4))
    assert row["skipped"] == "ValueError: CUDA graphs need a CUDA device"


def test_seconds_of_a_graph_are_those_of_one_call() -> None:
    runner = measure.Runner({}, peers.Peer("x", lambda q, k, v: q), lambda: time.sleep(0.02), 1, 1, lambda: None, 20)
    runner.turn(CPU)
    assert 0.001 <= runner.times[0] < 0.01
