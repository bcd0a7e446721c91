"""The node's function body: the same meaning in standard ONNX operators, for runtimes without the native library.

One body per `Form`, because a body cannot ask whether an optional input is there. Everything is computed in float32.
Keys behind ``nonpad_kv_seqlen`` and in front of ``leftpad`` are cleared first, so that NaN or Inf in padding reaches no
result; under a mask *by value* (attn_mask, causal, window) a masked V is multiplied by 0, which NaN and Inf survive. The
native kernel selects instead.
"""

from __future__ import annotations

from typing import Any, Union

import onnx
from onnx import TensorProto, helper

from attnhub.backends.onnx.node import DOMAIN, OP, Form

#: Operator sets that export writes.
OPSETS = (18, 21, 22)
#: Operator sets whose operators have, as used here, one meaning; a body must have its model's version.
BODY_OPSETS = range(15, 26)

_Constant = Union[float, int, list[int]]


def function_body(form: Form, opset: int, domain: str = DOMAIN) -> onnx.FunctionProto:
    """The function ``attnhub::FlashAttention`` of one form, told apart from those of other forms by its domain (and ``overload``).

    Raises ValueError for an opset that is not one of `BODY_OPSETS`.
    """
    if opset not in BODY_OPSETS:
        raise ValueError(f"opset={opset}: allowed are {BODY_OPSETS.start} to {BODY_OPSETS.stop - 1}")
    ops = _Ops(opset=opset)
    outputs = _attention(ops, form)
    function = helper.make_function(
        domain,
        OP,
        [name or f"absent_{i}" for i, name in enumerate(form.inputs())],
        outputs,
        ops.nodes,
        [helper.make_opsetid("", opset)],
        [],  # a body is of one form and reads none; onnx.reference would want every one that is named here
    )
    function.overload = form.overload()
    return function


class _Ops:
    """Writes nodes: ``ops("Add", a, b)`` appends one and returns its output's name. Numbers become constants."""

    def __init__(self, prefix: str = "", opset: int = 18) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        self._opset = opset

    def __call__(self, op: str, *inputs: Union[str, _Constant], **attributes: Any) -> str:
        names = [name if isinstance(name, str) else self.constant(name) for name in inputs]
        output = f"{self._prefix}{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output

    def constant(self, value: _Constant) -> str:
        """A float is a float32 scalar, an int an int64 scalar, a list int64 of one dimension."""
        if isinstance(value, float):
            tensor = helper.make_tensor("", TensorProto.FLOAT, [], [value])
        elif isinstance(value, int):
            tensor = helper.make_tensor("", TensorProto.INT64, [], [value])
        else:
            tensor = helper.make_tensor("", TensorProto.INT64, [len(value)], value)
        return self("Constant", value=tensor)

    def output(self, name: str, value: str) -> str:
        """Give a value the name of an output."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        return name

    def size(self, of: str, axis: int) -> str:
        """The length of an axis, as int64 of one dimension."""
        return self("Shape", of, start=axis, end=axis + 1)

    def float32(self, value: str) -> str:
        return self("Cast", value, to=TensorProto.FLOAT)

    def range(self, size: str) -> str:
        """0, 1, ... as int64 [size]."""
        return self("Range", 0, self("Squeeze", size, [0]), 1)

    def reshape(self, value: str, *sizes: str) -> str:
        """To sizes that may be 0, which allowzero takes as such."""
        return self("Reshape", value, self("Concat", *sizes, axis=0), allowzero=1)

    def reduce(self, op: str, value: str, otherwise: float, *rows: str) -> str:
        """``op`` over the last axis, kept as size 1; ``otherwise`` at every row where the tensor is empty.

        ONNX Runtime returns an empty tensor with its axes unreduced, so that the empty case has to be a branch of its own.
        """
        full, empty = _Ops(prefix=f"{op}_{len(self.nodes)}_"), _Ops(prefix=f"{op}_{len(self.nodes)}_empty_")
        # The axes of ReduceMax became an input at 18, those of ReduceSum at 13.
        as_input = op == "ReduceSum" or self._opset >= 18
        reduced = full(op, value, [-1], keepdims=1) if as_input else full(op, value, axes=[-1], keepdims=1)
        shape = empty("Concat", *rows, [1], axis=0)
        filled = empty("ConstantOfShape", shape, value=helper.make_tensor("", TensorProto.FLOAT, [1], [otherwise]))
        is_empty = self("Equal", self("Size", value), 0)
        return self("If", is_empty, then_branch=empty.graph(filled), else_branch=full.graph(reduced))

    def graph(self, output: str) -> onnx.GraphProto:
        """These nodes as a branch: it reads what it needs from outside."""
        return helper.make_graph(self.nodes, "branch", [], [helper.make_empty_tensor_value_info(output)])

    def all(self, conditions: list[str]) -> str:
        together = conditions[0]
        for condition in conditions[1:]:
            together = self("And", together, condition)
        return together


def _attention(ops: _Ops, form: Form) -> list[str]:
    """Writes the whole body; the names of its outputs."""
    key, value = "K", "V"
    if form.past:
        key, value = ops("Concat", "past_key", "K", axis=2), ops("Concat", "past_value", "V", axis=2)
    batch, q_heads, seqlen_q, head_dim = (ops.size("Q", axis) for axis in range(4))
    kv_heads, seqlen_k, v_head_dim = ops.size(key, 1), ops.size(key, 2), ops.size(value, 3)

    # The queries of the heads that share a K/V head stand one below another: grouped-query attention is one product.
    rows = ops("Mul", ops("Div", q_heads, kv_heads), seqlen_q)
    scale = ops.constant(form.scale) if form.scale is not None else ops("Reciprocal", ops("Sqrt", ops.float32(head_dim)))
    q = ops.reshape(ops.float32("Q"), batch, kv_heads, rows, head_dim)
    scores = ops("Mul", ops("MatMul", q, ops("Transpose", ops.float32(key), perm=[0, 1, 3, 2])), scale)
    if form.softcap:
        scores = ops("Mul", ops("Tanh", ops("Div", scores, form.softcap)), form.softcap)
    scores = ops.reshape(scores, batch, q_heads, seqlen_q, seqlen_k)

    j = ops.range(seqlen_k)
    padding = _padding(ops, form, j)
    conditions = [ops("Unsqueeze", condition, [1, 2]) for condition in padding]
    if form.is_causal or form.window_left >= 0 or form.window_right >= 0 or form.chunk or form.alibi:
        p = _positions(ops, form, seqlen_q, seqlen_k)
        conditions += _positional(ops, form, p, j)
        if form.alibi:
            distance = ops.float32(ops("Abs", ops("Sub", p, j)))
            scores = ops("Sub", scores, ops("Mul", ops("Unsqueeze", "alibi_slopes", [-2, -1]), distance))
    if form.mask == "bool":
        conditions.append("attn_mask")
    minus_infinity = ops.constant(float("-inf"))
    if form.mask == "float":
        bias = ops.float32("attn_mask")
        # A pair that the bias masks out is selected away too: its score may be NaN.
        masked = ops("IsInf", bias, detect_positive=0)
        scores = ops("Where", masked, minus_infinity, ops("Add", scores, bias))
    if conditions:
        scores = ops("Where", ops.all(conditions), scores, minus_infinity)

    values = ops.float32(value)
    if padding:
        values = ops("Where", ops("Unsqueeze", ops.all(padding), [1, 3]), values, 0.0)
    return _softmax(ops, form, scores, values, (batch, q_heads, kv_heads, rows, seqlen_q, seqlen_k, v_head_dim), (key, value))


def _padding(ops: _Ops, form: Form, j: str) -> list[str]:
    """Conditions [batch, seqlen_k] that hold for keys that exist."""
    conditions = []
    if form.nonpad_kv_seqlen:
        conditions.append(ops("Less", j, ops("Unsqueeze", "nonpad_kv_seqlen", [1])))
    if form.leftpad:
        conditions.append(ops("GreaterOrEqual", j, ops("Unsqueeze", "leftpad", [1])))
    return conditions


def _positions(ops: _Ops, form: Form, seqlen_q: str, seqlen_k: str) -> str:
    """Positions of the queries on the key axis: [seqlen_q, 1], or [batch, 1, seqlen_q, 1] where lengths differ."""
    p = ops("Unsqueeze", ops.range(seqlen_q), [1])
    if form.alignment == "top_left":
        return p
    length = ops("Unsqueeze", "nonpad_kv_seqlen", [1, 2, 3]) if form.nonpad_kv_seqlen else seqlen_k
    return ops("Add", p, ops("Sub", length, seqlen_q))


def _positional(ops: _Ops, form: Form, p: str, j: str) -> list[str]:
    """Conditions on pairs that follow from positions."""
    conditions = []
    if form.is_causal:
        conditions.append(ops("LessOrEqual", j, p))
    if form.window_left >= 0:
        conditions.append(ops("GreaterOrEqual", j, ops("Sub", p, form.window_left)))
    if form.window_right >= 0:
        conditions.append(ops("LessOrEqual", j, ops("Add", p, form.window_right)))
    if form.chunk:
        # The chunk [first, first + chunk) of p, with Mod's floored remainder: p may be negative.
        first = ops("Sub", p, ops("Mod", p, form.chunk))
        conditions.append(ops("GreaterOrEqual", j, first))
        conditions.append(ops("Less", j, ops("Add", first, form.chunk)))
    return conditions


def _softmax(ops: _Ops, form: Form, scores: str, values: str, sizes: tuple[str, ...], present: tuple[str, str]) -> list[str]:
    """softmax(scores) @ values with 0 for rows without keys, and the outputs in their order."""
    batch, q_heads, kv_heads, rows, seqlen_q, seqlen_k, v_head_dim = sizes
    highest = ops.reduce("ReduceMax", scores, float("-inf"), batch, q_heads, seqlen_q)
    if form.sinks:
        sinks = ops("Unsqueeze", "sinks", [-2, -1])
        highest = ops("Max", highest, sinks)
    # Without any key the maximum is -inf: 0 in its place leaves every weight 0 instead of NaN.
    keyless = ops("IsInf", highest, detect_positive=0)
    highest = ops("Where", keyless, 0.0, highest)
    weights = ops("Exp", ops("Sub", scores, highest))
    total = ops.reduce("ReduceSum", weights, 0.0, batch, q_heads, seqlen_q)
    if form.sinks:
        total = ops("Add", total, ops("Exp", ops("Sub", sinks, highest)))
    out = ops("MatMul", ops.reshape(weights, batch, kv_heads, rows, seqlen_k), values)
    out = ops("Div", ops.reshape(out, batch, q_heads, seqlen_q, v_head_dim), ops("Where", keyless, 1.0, total))

    outputs = [ops.output("Y", ops("CastLike", out, "Q"))]
    if form.present or form.lse:
        outputs += [ops.output("present_key", present[0]), ops.output("present_value", present[1])]
    if form.lse:
        outputs.append(ops.output("lse", ops.reshape(ops("Add", ops("Log", total), highest), batch, q_heads, seqlen_q)))
    return outputs
