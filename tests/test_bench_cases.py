"""The benchmarks' cases and peers: every peer computes the same problem, and presets hold what their targets speak of."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from attnhub.bench import flashinfer, measure, onnx_node, parts, peers, targets
from attnhub.bench.cases import Case
from attnhub.bench.presets import PORTABLE, PRESETS

CPU = torch.device("cpu")
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


def test_a_training_step_counts_both_passes() -> None:
    forward, backward, training = (Case(64, causal=True, mode=mode).flops() for mode in ("forward", "backward", "training"))
    assert training == forward + backward == 7 * forward // 2
    assert not Case(1, 64, mode="training").is_decode() and Case(1, 64).is_decode()


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


def test_gpu_presets_have_a_case_for_every_target() -> None:
    for name, found in targets.GPU.items():
        cases = PRESETS[name].make("cuda")
        assert len(set(cases)) == len(cases)
        assert not [target.name for target in found if not any(target.holds(case) for case in cases)], name
        who, backends = PRESETS[name].who("cuda")
        assert who is not None and backends is not None and (PRESETS[name].judged.removeprefix("attnhub").strip() or "auto") in (*backends, PORTABLE)
    decode = [c for c in PRESETS["decode"].make("cuda") if targets.H200["decode"][-1].holds(c)]
    assert len(decode) == 4 and all(map(flashinfer.rate, decode))


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
