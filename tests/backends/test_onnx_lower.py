"""attnhub.onnx.lower: the node as operators of a runtime, or left with the reason."""

from __future__ import annotations

import pathlib
from typing import Any, Optional

import pytest

import attnhub

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from attnhub.backends.onnx.model import one_node  # noqa: E402
from attnhub.backends.onnx.node import Form  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT


def sized(form: Form, square: bool, batch: Optional[int] = None) -> Any:
    """A model of one node with fixed heads; its keys as many as its queries, or not."""
    model = one_node(form, FLOAT)
    length, total = "s" if square else "seqlen_k", "s" if square else "seqlen_k"
    total = f"past + {total}" if form.past else total
    shapes: dict[str, list[Any]] = {
        "Q": ["batch", 4, "s", 8], "K": ["batch", 2, length, 8], "V": ["batch", 2, length, 8], "past_key": ["batch", 2, "past", 8],
        "past_value": ["batch", 2, "past", 8], "attn_mask": [1, 1, "s", total], "leftpad": ["batch"], "nonpad_kv_seqlen": ["batch"], "sinks": [4],
        "alibi_slopes": [4],
    }  # fmt: skip
    for value in model.graph.input:
        shape = [batch if size == "batch" and batch else size for size in shapes[value.name]]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shape))
    return model


@pytest.mark.parametrize(
    ("form", "square", "batch", "standard", "contrib"),
    [
        (Form(), False, None, "ai.onnx::Attention", "MultiHeadAttention"),
        (Form(is_causal=True, alignment="top_left", softcap=5.0, scale=0.3), True, None, "ai.onnx::Attention", "GroupQueryAttention"),
        (Form(is_causal=True), False, None, "ai.onnx::Attention with a mask", "MultiHeadAttention with a mask"),
        (Form(is_causal=True, window_left=3), True, None, "ai.onnx::Attention with a mask", "GroupQueryAttention"),
        (Form(window_left=1, window_right=1, chunk=4, mask="float"), False, None, "ai.onnx::Attention with a mask", "MultiHeadAttention with a mask"),
        (Form(mask="bool", nonpad_kv_seqlen=True), True, None, "ai.onnx::Attention with a mask", "MultiHeadAttention with a mask"),
        (Form(is_causal=True, leftpad=True, alibi=True), True, None, "ai.onnx::Attention with a mask", "MultiHeadAttention with a mask"),
        (Form(is_causal=True, past=True, present=True), True, None, "ai.onnx::Attention", "MultiHeadAttention with a mask"),
        (Form(is_causal=True, past=True, present=True), True, 1, "ai.onnx::Attention", "GroupQueryAttention"),
        (Form(is_causal=True, past=True, mask="bool"), True, None, "ai.onnx::Attention with a mask", "MultiHeadAttention with a mask"),
        (Form(present=True), False, None, "ai.onnx::Attention", "MultiHeadAttention"),
        (Form(is_causal=True, sinks=True), True, None, None, "GroupQueryAttention"),
        (Form(sinks=True), False, None, None, None),
        (Form(lse=True), False, None, None, None),
    ],
    ids=str,
)  # fmt: skip
def test_lower(
    form: Form, square: bool, batch: Optional[int], standard: Optional[str], contrib: Optional[str], tmp_path: pathlib.Path
) -> None:
    """To both targets, checked; a node that cannot be expressed leaves no file."""
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx.save(sized(form, square, batch), source)
    for to, now in (("ai.onnx", standard), ("com.microsoft", contrib)):
        report = attnhub.onnx.lower(source, target, to=to)
        if now is None:
            assert report.left and not report.path and not target.exists()
            continue
        assert [made.now for made in report.converted] == [now if to == "ai.onnx" else f"com.microsoft::{now}"]
        assert report.checked is not None and report.checked.body_difference is not None and report.checked.body_difference < 1e-5
        model = onnx.load(str(target))
        assert not model.functions and {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
        assert [v.name for v in model.graph.output] == [n for n in form.outputs() if n]
        target.unlink()


@pytest.mark.parametrize("to", ["ai.onnx", "com.microsoft"])
@pytest.mark.parametrize(
    ("form", "mask"),
    [
        (Form(mask="bool"), ["batch", 1, 1, "seqlen_k"]),
        (Form(mask="float"), [1, 4, 1, "seqlen_k"]),
        (Form(mask="bool"), ["seqlen_k"]),
        (Form(mask="float"), ["s", 1]),
        (Form(mask="bool", past=True), ["batch", 1, 1, "past + seqlen_k"]),
        (Form(nonpad_kv_seqlen=True), None),
        (Form(leftpad=True), None),
    ],
    ids=str,
)
def test_masks_of_one_row(form: Form, mask: Optional[list[Any]], to: str, tmp_path: pathlib.Path) -> None:
    """A row of padding, as every encoder has it: ONNX Runtime's operators want one for each query."""
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    model = sized(form, False)
    for value in model.graph.input:
        if value.name == "attn_mask":
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, mask))
    onnx.save(model, source)
    report = attnhub.onnx.lower(source, target, to=to)
    assert report.checked is not None and report.checked.body_difference is not None and report.checked.body_difference < 1e-5
    assert not report.checked.notes


def test_a_file_that_loads_and_does_not_run_is_not_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnhub.backends.onnx.rewrite import lowering
    from attnhub.backends.onnx.rewrite.check import ConversionMismatch

    monkeypatch.setattr(lowering, "_expanded", lambda b, found, mask, total: mask)
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx.save(sized(Form(leftpad=True), False), source)
    with pytest.raises(ConversionMismatch, match=r"the source runs at Q \[2, 4, 6, 8\].* and the rewritten file does not: .*attn_mask"):
        attnhub.onnx.lower(source, target)
    assert not target.exists()


def test_lower_takes_two_targets(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"to='trt': allowed are 'ai.onnx', 'com.microsoft'"):
        attnhub.onnx.lower(tmp_path / "a.onnx", tmp_path / "b.onnx", to="trt")
