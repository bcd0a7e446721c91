"""The benchmark harness: what is counted, what a machine's ceilings are, and how a result file is held against targets."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

import pytest
import torch

from attnhub import cli
from attnhub.bench import ceilings, flashinfer, measure, onnx_node, pages, parts, peers, precompile, processor, results, targets, workers
from attnhub.bench.cases import Case
from attnhub.bench.presets import PORTABLE, PRESETS

CPU = torch.device("cpu")
built = pytest.mark.skipif(ceilings.available(1) is None, reason="the cpu backend's library is not built")


def test_a_training_step_counts_both_passes() -> None:
    forward, backward, training = (Case(64, causal=True, mode=mode).flops() for mode in ("forward", "backward", "training"))
    assert training == forward + backward == 7 * forward // 2
    assert not Case(1, 64, mode="training").is_decode() and Case(1, 64).is_decode()


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


def test_the_limits_cover_what_they_must() -> None:
    cases = PRESETS["limits"].make("cpu")
    assert len(set(cases)) == len(cases)
    for dtype in ("float32", "bfloat16", "float16"):
        mine = [c for c in cases if c.dtype == dtype]
        assert sum(c.is_decode() for c in mine) == 2 and any(c.kv_heads == 8 and c.causal for c in mine)
        for heads, length, dim in ((8, 512, 64), (8, 1024, 64), (16, 2048, 128)):
            assert {c.causal for c in mine if (c.heads, c.seqlen_q, c.head_dim, c.mode) == (heads, length, dim, "forward")} == {True, False}
            trained = {c.causal for c in mine if (c.heads, c.seqlen_q, c.head_dim, c.mode) == (heads, length, dim, "training")}
            assert trained == (set() if dtype == "float16" else {True, False})
    names = [target.name for target in targets.AVX if not any(target.holds(c) for c in [*cases, *PRESETS["kylin"].make("cpu")])]
    assert not names, f"no case belongs to {names}"


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


# -- ceilings ------------------------------------------------------------------------------------------------------------


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


# -- features, pages, graphs ---------------------------------------------------------------------------------------------

FEATURES = [
    Case(96, batch=2, heads=4, head_dim=16, causal=True, softcap=2.0),
    Case(96, batch=2, heads=4, head_dim=16, causal=True, window=20),
    Case(96, batch=2, heads=4, head_dim=16, causal=True, alibi=True),
    Case(96, heads=4, head_dim=16, causal=True, documents=5),
    Case(96, batch=2, heads=4, kv_heads=2, head_dim=16, causal=True),
    Case(96, batch=2, heads=4, head_dim=16, causal=True, prefix=30),
    Case(300, batch=2, heads=4, head_dim=16, density=0.3),
    Case(96, batch=2, heads=4, head_dim=16, causal=True, sinks=True),
    Case(96, batch=2, heads=4, head_dim=16, bias=True),
]


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_everybody_computes_the_same_problem(case: Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's functions, dense masks for torch and attnhub's masks mean the same, in both directions."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = dataclasses.replace(case, mode=mode)
    tensors = peers.inputs(case, CPU)
    everybody = peers.assemble(case, tensors, ("sdpa", "flex"), ("auto", "reference"))
    rows = {row["peer"]: row for row in measure.run_case(case, tensors, everybody, measure.Settings(1, 1e-4))}
    lacks = {"F.sdpa": "softcap" in str(case) or "sinks" in str(case), "FlexAttention": mode == "backward" and not flex_differentiates_on_cpu(rows)}
    for name, row in rows.items():
        assert ("skipped" in row) == lacks.get(name, False), row
        if "skipped" not in row:
            assert row["max_error"] < 2e-6 and row.get("max_grad_error", 0.0) < 2e-5, row


def flex_differentiates_on_cpu(rows: dict[str, Any]) -> bool:
    return "backward" not in rows["FlexAttention"].get("skipped", "").lower()


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_a_slice_of_the_truth_is_the_truth_of_a_slice(case: Case) -> None:
    tensors = peers.inputs(dataclasses.replace(case, mode="backward"), CPU)
    whole, part = (measure.Truth(dataclasses.replace(case, mode="backward"), tensors, w) for w in (True, False))
    heads = case.heads // case.kv_heads
    assert part.out.shape[:2] == (1, heads) and torch.allclose(part.out, whole.out[:1, :heads], atol=1e-12)
    for mine, right in zip(part.grads, whole.grads):
        assert mine is not None and right is not None and torch.allclose(mine, right[:1, : mine.shape[1]], atol=1e-12)


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


def test_pages_hold_the_same_keys() -> None:
    case = Case(1, 64, batch=3, heads=4, kv_heads=2, head_dim=16, page_size=16)
    tensors = peers.inputs(case, CPU)
    everybody = peers.assemble(case, tensors, ("sdpa", "flash", "flex"), ("sdpa", "reference"))
    rows = measure.run_case(case, tensors, everybody, measure.Settings(1, 1e-4))
    names = ["F.sdpa", "attnhub sdpa", "attnhub reference", "attnhub sdpa contiguous", "attnhub reference contiguous"]
    assert [row["peer"] for row in rows] == names and all(row["max_error"] < 1e-6 for row in rows)
    table = parts.paged(tensors[1], tensors[2], 16).block_table
    assert table is not None and sorted(table.flatten().tolist()) == list(range(12)) != table.flatten().tolist()


def test_fp8_holds_the_same_values() -> None:
    case = Case(40, batch=2, heads=4, kv_heads=2, head_dim=16, dtype="bfloat16", causal=True, fp8=True)
    tensors = peers.inputs(case, CPU)
    for x, whole in zip(tensors, peers.inputs(dataclasses.replace(case, fp8=False), CPU)):
        small, factor = parts.quantised(x, 2)
        # Three bits of mantissa, and what lies far below the largest value.
        assert ((x - whole).abs() <= whole.abs() / 16 + factor.max() / 512).all()
        assert small.dtype == torch.float8_e4m3fn and factor.shape == (2, 2) and torch.equal(parts.dequantised(small, factor, x.dtype), x)
    everybody = peers.assemble(case, tensors, ("sdpa",), ("reference",))
    rows = {row["peer"]: row for row in measure.run_case(case, tensors, everybody, measure.Settings(1, 1e-4))}
    assert list(rows) == ["F.sdpa", "attnhub reference", "attnhub reference bfloat16"]
    assert all(row["max_error"] < 0.02 for row in rows.values())
    with pytest.raises(ValueError, match="fp8 is timed"):
        dataclasses.replace(case, mode="backward")


def test_a_graph_needs_a_gpu() -> None:
    case = Case(16, graph=True)
    (row,) = measure.run_case(case, peers.inputs(case, CPU), [peers.Peer("x", lambda q, k, v: q)], measure.Settings(1, 1e-4))
    assert row["skipped"] == "ValueError: CUDA graphs need a CUDA device"


def test_seconds_of_a_graph_are_those_of_one_call() -> None:
    runner = measure.Runner({}, peers.Peer("x", lambda q, k, v: q), lambda: time.sleep(0.02), 1, 1, lambda: None, 20)
    runner.turn(CPU)
    assert 0.001 <= runner.times[0] < 0.01


def test_cases_of_old_files_are_read() -> None:
    old = {**Case(64, causal=True).to_json(), "peer": "x"}
    assert Case.of(old) == Case(64, causal=True) and "window" not in old and "graph" not in old
    new = Case(64, causal=True, window=8, graph=True)
    assert Case.of(json.loads(json.dumps(new.to_json()))) == new and str(new).endswith("causal window 8 graph")
    for wrong in ({"seqlen_q": 1, "seqlen_k": 64, "window": 3}, {"seqlen_q": 64, "documents": 2, "batch": 2}, {"seqlen_q": 1, "seqlen_k": 65, "page_size": 16}):
        with pytest.raises(ValueError, match=r"timed with|one batch|pages are timed"):
            Case(**wrong)


@pytest.mark.parametrize("case", [c for c in FEATURES if not c.density], ids=str)
def test_flops_count_the_pairs_that_attend(case: Case) -> None:
    found = parts.parts(case, CPU)
    allowed, _ = found.mask.to_dense(batch=case.batch, q_heads=case.heads, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k)
    if found.document_ids is not None:
        assert found.varlen is not None and sum(case.document_lengths()) == case.seqlen_q and len(set(case.document_lengths())) > 2
        allowed = allowed & (found.document_ids[:, None] == found.document_ids[None, :])
    pairs = int(allowed[0, 0].sum())
    # Half of a square stands for a triangle, here as everywhere.
    assert case._pairs() == pytest.approx(pairs, abs=case.seqlen_q)


def test_gpu_presets_have_a_case_for_every_target() -> None:
    for name, found in targets.GPU.items():
        cases = PRESETS[name].make("cuda")
        assert len(set(cases)) == len(cases)
        assert not [target.name for target in found if not any(target.holds(case) for case in cases)], name
        who, backends = PRESETS[name].who("cuda")
        assert who is not None and backends is not None and (PRESETS[name].judged.removeprefix("attnhub ") in (*backends, PORTABLE))
    decode = [c for c in PRESETS["decode"].make("cuda") if targets.H200["decode"][-1].holds(c)]
    assert len(decode) == 4 and all(map(flashinfer.rate, decode))


# -- compiling ahead -----------------------------------------------------------------------------------------------------

_ECHO = "import sys, json\nfor line in sys.stdin:\n    case = json.loads(line)['case']\n    {}\n    print('{{}}', flush=True)"


def test_compiling_ahead_survives_what_goes_wrong() -> None:
    cases = [Case(n, mode=mode) for n in (16, 32, 64) for mode in ("forward", "backward")]
    ticks: list[str] = []

    def run(text: str, limit: float = 0.0) -> dict[str, str]:
        return precompile.run(cases, ("flex", "sdpa"), None, 2, ticks.append, limit, (sys.executable, "-c", _ECHO.format(text)))

    assert run("pass") == {} and len(ticks) == 6
    # A process that dies (out of memory, say) takes one case with it.
    assert run("sys.exit(1) if case['seqlen_q'] == 32 else 0") == {str(c): "no answer" for c in cases if c.seqlen_q == 32}
    started = time.monotonic()
    assert len(run("import time; time.sleep(60)", 0.5)) == 6 and time.monotonic() - started < 20
    # Graph or not, the kernels are the same.
    ticks.clear()
    precompile.run([Case(16), Case(16, graph=True)], (), (), 2, ticks.append, 0.0, (sys.executable, "-c", _ECHO.format("pass")))
    assert len(ticks) == 1


def test_answers_come_in_the_order_of_the_questions() -> None:
    command = (sys.executable, "-c", "import sys, json, time\nfor line in sys.stdin:\n    n = json.loads(line)\n    time.sleep(0.2 / n)\n    print(n * 2, flush=True)")
    assert workers.ask(command, [1, 2, 3, 4], 3) == [2, 4, 6, 8]
    assert workers.ask(command, [], 3) == [] and workers.jobs() >= 1


def test_a_compiling_process_runs_its_peers() -> None:
    ticks: list[str] = []
    assert precompile.run([Case(16), Case(16, mode="backward")], ("sdpa",), ("auto",), 1, ticks.append) == {} and len(ticks) == 2
    assert precompile._compile({"case": Case(16, head_dim=8).to_json(), "peers": ["v1", "naive"], "backends": []}) == {}
    assert "KeyError" in precompile._compile({"case": Case(16).to_json(), "peers": ["nobody"], "backends": []})[""]
    assert precompile.estimate([Case(16)], ("flex",), None, measure.Settings()) > 0


def test_results_are_kept_case_by_case(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    command = ["bench", "cpu", "--preset", "quick", "--peers", "sdpa", "--backends", "sdpa", "--rounds", "1", "--seconds", "0.0001", "--output", str(file)]
    assert cli.main(["bench", "gpu", "--preset", "decode", "--only", "page 16 graph", "--list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cases"]) == 6
    fp32 = [*command, "--only", "forward fp32", "--only", "backward"]
    assert cli.main([*fp32, "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed["cases"]) == 3 and not file.exists() and listed["seconds"] > 0
    real, ran = measure.run_case, []

    def run_case(case: Case, *rest: Any, **more: Any) -> Any:
        ran.append(str(case))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(case, *rest, **more)

    monkeypatch.setattr(results, "commit", lambda: "c0ffee")
    monkeypatch.setattr(measure, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        cli.main(fp32)
    assert {str(Case.of(row)) for row in results.load(file)["rows"]} == {ran[0]}
    assert cli.main([*fp32, "--resume"]) == 0
    assert ran == [listed["cases"][0], listed["cases"][1], listed["cases"][1], listed["cases"][2]]
    assert list(dict.fromkeys(str(Case.of(row)) for row in results.load(file)["rows"])) == listed["cases"]
    assert cli.main([*fp32, "--resume", "--rounds", "2"]) == 2 and "another settings" in capsys.readouterr().err
    # Two checkouts with changes on the same commit need not be the same code.
    monkeypatch.setattr(results, "commit", lambda: "c0ffee" + results.CHANGED)
    assert cli.main(fp32) == 0
    assert cli.main([*fp32, "--resume"]) == 2 and "changes on top" in capsys.readouterr().err
    # What measured nothing replaces nothing.
    held = file.read_bytes()
    assert cli.main([*fp32, "--limit", "1e-9"]) == 0 and file.read_bytes() == held
    other = tmp_path / "y.json"
    elsewhere = [str(other) if word == str(file) else word for word in fp32]
    assert cli.main([*elsewhere, "--limit", "1e-9"]) == 0 and results.load(other)["unmeasured"] == listed["cases"]
    assert cli.main([*command, "--only", "nothing"]) == 2


# -- ONNX Runtime --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "case", "node"),
    [
        ("onnxruntime", Case(48, heads=4, head_dim=32), "MultiHeadAttention"),
        ("onnxruntime", Case(48, batch=2, heads=4, kv_heads=2, head_dim=32, causal=True), "GroupQueryAttention"),
        ("onnxruntime-mha", Case(48, batch=2, heads=4, head_dim=32, causal=True), "MultiHeadAttention"),
        ("onnxruntime-graph", Case(48, batch=2, heads=4, head_dim=32, causal=True), "MatMul, Softmax, MatMul"),
        ("onnxruntime-graph", Case(48, batch=2, heads=4, head_dim=32), "MatMul, Softmax, MatMul"),
    ],
    ids=str,
)
def test_onnxruntime_computes_the_same(name: str, case: Case, node: str) -> None:
    pytest.importorskip("onnxruntime")
    tensors = peers.inputs(case, CPU)
    (peer,) = peers.assemble(case, tensors, (name,), ())
    assert isinstance(peer, peers.Peer), peer
    (row,) = measure.run_case(case, tensors, [peer], measure.Settings(1, 1e-4))
    assert row["max_error"] < 1e-5 and row["node"] == node


def test_the_model_is_what_onnx_reads() -> None:
    onnx = pytest.importorskip("onnx")
    data = onnx_node.model("Thing", "some.domain", [("a", onnx_node.FLOAT, 2), ("b", onnx_node.INT32, 0)], [("c", onnx_node.FLOAT, 1)], {"n": 300})
    model = onnx.load_from_string(data)
    (node,) = model.graph.node
    assert (node.op_type, node.domain, list(node.input), list(node.output)) == ("Thing", "some.domain", ["a", "b"], ["c"])
    assert node.attribute[0].i == 300 and [len(v.type.tensor_type.shape.dim) for v in model.graph.input] == [2, 0]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18), ("some.domain", 1)]


# -- files and targets ---------------------------------------------------------------------------------------------------


def _environment(name: str = "AMD EPYC", isa: tuple[str, ...] = ("avx512",), **cpu: int) -> dict[str, Any]:
    return {"device": {"type": "cpu", "name": name, "isa": list(isa)}, "cpu": cpu, "threads": 1, "torch": "2"}


def _row(case: Case, peer: str, seconds: float, **figures: Any) -> dict[str, Any]:
    return {
        **case.to_json(), "peer": peer, "seconds": seconds, "speedup": None, "tflops": 1.0, "tokens_per_s": 1.0, "extra_mib": 1.0,
        "max_error": None, "backend": "cpu", **figures,
    }  # fmt: skip


def _result(rows: list[dict[str, Any]], **environment: Any) -> dict[str, Any]:
    return {
        "schema": results.SCHEMA, "suite": "cpu", "preset": "limits", "environment": _environment(**environment), "commit": None,
        "settings": {"threads": 1}, "rows": rows,
    }  # fmt: skip


def test_folders_tell_processors_apart() -> None:
    assert results.folder(_environment(family=25, model=17)) == "amd-epyc-family-25-model-17"
    assert results.folder(_environment("Intel(R) Xeon(R) Processor @ 2.00GHz", family=6, model=143)) == "intel-xeon-family-6-model-143"
    assert results.folder(_environment("AMD EPYC 9654 96-Core Processor", family=25, model=17)) == "amd-epyc-9654-96-core"
    assert results.folder({"device": {"type": "cuda", "name": "NVIDIA H200"}}) == "nvidia-h200"
    assert results.machine({"device": {"type": "cpu", "name": "AMD EPYC"}}) == "AMD EPYC"
    assert results.target("x/", _result([], family=26, model=2)).as_posix() == "x/amd-epyc-family-26-model-2/cpu-limits-1t.json"
    facts = results.environment(CPU)["cpu"]
    assert facts == processor.facts() and processor.cold_bytes() >= 64 << 20


def test_judging(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, odd = Case(512), Case(2048, heads=16, head_dim=128), Case(8192)
    grouped = Case(2048, heads=32, head_dim=128, causal=True)
    rows = [
        _row(small, "F.sdpa", 4.0), _row(small, "attnhub", 1.0, peak_fraction=0.9),
        _row(large, "F.sdpa", 1.0), _row(large, "attnhub", 1.0, peak_fraction=0.75), _row(large, "attnhub cpu", 0.1),
        _row(odd, "attnhub cpu", 1.0, extra_mib=65.0),
        _row(grouped, "ONNX Runtime", 1.0), _row(grouped, "attnhub", 1.0), {**small.to_json(), "peer": "naive", "skipped": "no"},
    ]  # fmt: skip
    found = {verdict.target.name: verdict for verdict in targets.judge(_result(rows))}
    full = found["fp32 prefill full over F.sdpa"]
    assert full.mean == pytest.approx(2.0) and (full.cases, full.worst, full.worst_case, full.word) == (2, 1.0, str(large), targets.GATE)
    assert found["fp32 prefill D64 full, of FMA peak"].word == targets.AIM and found["fp32 prefill D128 full, of FMA peak"].word == targets.GATE
    assert found["extra memory at 8192 tokens"].word == targets.MISSED
    assert found["over ONNX Runtime's GroupQueryAttention"].word == targets.MISSED
    assert found["bf16 decode over F.sdpa"].word == targets.ABSENT
    amx = {verdict.target.name: verdict for verdict in targets.judge(_result(rows, isa=("amx_bf16",)))}
    assert amx["fp32 prefill full over F.sdpa"].word == targets.AIM and "fp16 prefill over F.sdpa" not in amx
    (disturbed,) = (v for v in targets.judge(_result([_row(small, "attnhub", 1.0, peak_fraction=1.2)])) if v.cases and v.target.fraction)
    assert disturbed.word == targets.DISTURBED
    with pytest.raises(ValueError, match="for the presets grid"):
        targets.table({"device": {"type": "cuda", "name": "x", "isa": []}})

    file = tmp_path / "cpu-limits-1t.json"
    file.write_text(json.dumps(_result(rows)))
    assert cli.main(["bench", "judge", "--input", str(file)]) == 1
    assert "MISSED" in capsys.readouterr().out
    file.write_text(json.dumps(_result(rows[:2])))
    assert cli.main(["bench", "judge", "--input", str(file), "--json"]) == 0
    assert {verdict["verdict"] for verdict in json.loads(capsys.readouterr().out)} == {targets.AIM, targets.ABSENT}


def test_judging_on_gpus() -> None:
    def result(preset: str, rows: list[dict[str, Any]], name: str = "NVIDIA H200") -> dict[str, Any]:
        environment = {"device": {"type": "cuda", "name": name, "isa": []}, "threads": 1, "torch": "2"}
        return {**_result(rows), "preset": preset, "environment": environment, "suite": "gpu", "settings": {}}

    def verdicts(preset: str, rows: list[dict[str, Any]], name: str = "NVIDIA H200") -> dict[str, str]:
        return {v.target.name: v.word for v in targets.judge(result(preset, rows, name)) if v.word != targets.ABSENT}

    one, two = PRESETS["grid"].make("cuda")[:2]
    rows = [_row(one, "FlexAttention", 2.0), _row(one, "attnhub triton", 1.0), _row(two, "FlexAttention", 0.99), _row(two, "attnhub triton", 1.0)]
    rows += [_row(one, "F.sdpa cuDNN", 0.5), _row(two, "F.sdpa cuDNN", 0.5), _row(one, "attnhub", 0.1)]
    assert verdicts("grid", rows) == {
        "forward over FlexAttention, every point": targets.MISSED, "forward over FlexAttention": targets.AIM, "forward over cuDNN": targets.BELOW,
    }  # fmt: skip
    small = [_row(c, peer, t) for c in PRESETS["v1v2"].make("cuda")[:2] for peer, t in (("naive", 1.11), ("attnhub triton", 1.0))]
    assert set(verdicts("v1v2", small).values()) == {targets.MISSED}
    window = next(c for c in PRESETS["features"].make("cuda") if c.window)
    assert verdicts("features", [_row(window, "FlexAttention", 1.0), _row(window, "attnhub triton", 1.0)]) == {
        "forward with window over FlexAttention": targets.AIM
    }
    paged = next(c for c in PRESETS["decode"].make("cuda") if c.page_size == 16 and c.graph and c.batch == 64 and c.kv_heads == 8)
    mine = [_row(paged, "attnhub triton", 1.0, kv_gb_per_s=4200.0), _row(paged, "attnhub triton contiguous", 0.96)]
    assert verdicts("decode", mine) == {
        "paged over contiguous, by CUDA graph": targets.GATE, "pages of 16 over FlashInfer's rate, batch 16 and more": targets.MISSED,
    }  # fmt: skip
    assert verdicts("decode", mine, "NVIDIA H100") == {"paged over contiguous, by CUDA graph": targets.GATE}
    lengths = PRESETS["memory"].make("cuda")[:2]
    held = [_row(c, peer, 1.0, extra_mib=mib) for c, all_mib in zip(lengths, (8.5, 33.0)) for peer, mib in (("naive", all_mib), ("attnhub triton", c.seqlen_q / 1024))]
    assert verdicts("memory", held) == {"saved of naive memory at 512 tokens": targets.AIM, "saved of naive memory at 1024 tokens": targets.AIM}
    held[-1]["extra_mib"] = 1.02
    assert verdicts("memory", held)["saved of naive memory at 1024 tokens"] == targets.MISSED
    text = "".join(pages._verdicts(result("memory", held)))
    assert "saved of naive memory" in text
    columns, shown = pages.one_table(held, "memory")
    assert "CPU use" not in columns and [line[columns.index("saved of naive")] for line in shown] == ["", "94.1%", "", "96.9%"]
    columns, shown = pages.table(rows[:2])
    assert [line[columns.index("over FlexAttention")] for line in shown] == ["1.00x", "2.00x"]


def test_a_grid_is_drawn_as_lines(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    from attnhub.bench import plot

    cases = [c for c in PRESETS["grid"].make("cuda") if c.head_dim != 256][:20]
    rows = [_row(c, peer, 1.0, speedup=1.0) for c in cases for peer in ("F.sdpa", "attnhub")] + [{**cases[0].to_json(), "peer": "x", "skipped": "no"}]
    environment = {"device": {"type": "cuda", "name": "x", "isa": []}, "threads": 1, "torch": "2"}
    result = {**_result(rows), "preset": "grid", "environment": environment}
    assert len(plot._lines(result).axes) == len({(c.mode, c.head_dim, c.causal) for c in cases}) and len(plot._bars(result).axes) == 1
    plot.draw(result, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG") and len(os.listdir(tmp_path)) == 1
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw({**result, "rows": rows[-1:]}, tmp_path / "none.png")


def test_pages_show_the_columns_that_a_file_has(tmp_path: pathlib.Path) -> None:
    old, new = _row(Case(512), "F.sdpa", 1.0), _row(Case(512), "attnhub", 1.0, cpu_use=1.5, peak_fraction=0.5)
    assert pages.table([old])[0] == ["peer", "time", "over F.sdpa", "TFLOP/s", "tokens/s", "extra MiB", "max error", "notes"]
    columns, shown = pages.table([old, new, {**Case(512).to_json(), "peer": "y", "skipped": "no"}])
    assert "CPU use" in columns and "of read rate" not in columns and {len(line) for line in shown} == {len(columns)}
    assert shown[1][columns.index("of peak")] == "50%" and shown[0][columns.index("CPU use")] == ""
    folder = tmp_path / results.FOLDER / "x"
    folder.mkdir(parents=True)
    result = _result([old, new], family=25, model=17)
    result["environment"]["ceilings"] = {"threads": 1, "read": {"median": 2e10, "max": 3e10, "samples": []}}
    (folder / "cpu-limits-1t.json").write_text(json.dumps(result))
    (folder / "cpu-kylin.json").write_text(json.dumps({**result, "preset": "kylin", "settings": {}}))
    text = pages.page(tmp_path)
    assert "## AMD EPYC (family 25 model 17): cpu limits, 1 thread\n" in text and "20 GB/s read from memory (largest 30)" in text
    assert "| fp32 prefill full over F.sdpa |" in text and "| case | peer | time | tokens/s | extra MiB | CPU use |" in text


def test_judge_wants_every_case_of_a_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without rows, or without the rows of a case, is no met target."""
    made = json.loads((pathlib.Path(__file__).parents[1] / "benchmarks/results/nvidia-h200/gpu-decode.json").read_text())
    made["preset"], made["rows"] = "features", []
    file = tmp_path / "gpu-features.json"
    file.write_text(json.dumps(made))
    assert cli.main(["bench", "judge", "--input", str(file)]) == 1
    assert "not measured" in capsys.readouterr().err
