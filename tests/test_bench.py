"""The benchmark harness: what is counted, what a machine's ceilings are, and how a result file is held against targets."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

from attnhub import cli
from attnhub.bench import ceilings, measure, onnx_node, pages, peers, processor, results, targets
from attnhub.bench.cases import PRESETS, Case

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
        assert measure._plan(lambda: None, CPU, measure.Settings(3, 0.1, 12.0)) == (2, 1)
        assert measure._plan(lambda: None, CPU, measure.Settings(3, 0.1, 60.0)) == (3, 1)
        assert measure._plan(lambda: None, CPU, measure.Settings(3, 0.1, 2.0)) == (0, 1)
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


# -- ONNX Runtime --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case(48, heads=4, head_dim=32), Case(48, batch=2, heads=4, kv_heads=2, head_dim=32, causal=True)], ids=str)
def test_onnxruntime_computes_the_same(case: Case) -> None:
    pytest.importorskip("onnxruntime")
    tensors = peers.inputs(case, CPU)
    (peer,) = peers.assemble(case, tensors, ("onnxruntime",), ())
    assert isinstance(peer, peers.Peer), peer
    (row,) = measure.run_case(case, tensors, [peer], measure.Settings(1, 1e-4))
    assert row["max_error"] < 1e-5 and row["node"] == ("GroupQueryAttention" if case.causal else "MultiHeadAttention")


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
    with pytest.raises(ValueError, match="CPUs only"):
        targets.table({"device": {"type": "cuda", "name": "x", "isa": []}})

    file = tmp_path / "cpu-limits-1t.json"
    file.write_text(json.dumps(_result(rows)))
    assert cli.main(["bench", "judge", "--input", str(file)]) == 1
    assert "MISSED" in capsys.readouterr().out
    file.write_text(json.dumps(_result(rows[:2])))
    assert cli.main(["bench", "judge", "--input", str(file), "--json"]) == 0
    assert {verdict["verdict"] for verdict in json.loads(capsys.readouterr().out)} == {targets.AIM, targets.ABSENT}


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
