"""Reading and writing graphs of onnx_ir: constants, small evaluations, sizes that are provably equal, and new nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Optional, Union

import numpy as np
import onnx
import onnx_ir as ir

from attnhub.backends.onnx.node import DOMAIN, INPUTS, OP, Form

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class NotRecognised(Exception):  # noqa: N818 - a reason, not a failure
    """Why a node stays as it is."""


def constant(value: Optional[ir.Value]) -> Optional[np.ndarray[Any, Any]]:
    """The value of an initializer or Constant node of a thousand elements at most, else None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > 1000 else tensor.numpy()


def evaluate(value: Optional[ir.Value], depth: int = 16) -> Optional[np.ndarray[Any, Any]]:
    """What a small computation on constants and known sizes gives, or None: scales as exporters write them."""
    if value is None or depth == 0:
        return None
    found = constant(value)
    node = value.producer()
    if found is not None or node is None or node.domain != "":
        return found
    if node.op_type in ("Slice", "Gather") and _is_shape(node.inputs[0]):
        return _part_of_shape(node)
    if node.op_type not in _SIMPLE:
        return None
    inputs = [evaluate(v, depth - 1) for v in node.inputs[: 1 if node.op_type in _VIEWS else None]]
    if any(v is None for v in inputs):
        return None
    if node.op_type == "Cast":
        kind = ir.DataType(node.attributes["to"].as_int())
        # numpy lacks bfloat16 arithmetic; what is computed here is rounded where it is used.
        return np.asarray(inputs[0]).astype(np.float32 if kind in FLOATS else kind.numpy())
    with np.errstate(all="ignore"):
        result: np.ndarray[Any, Any] = np.asarray(_SIMPLE[node.op_type](*inputs))
    return result


_VIEWS = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape")
_SIMPLE: dict[str, Any] = {
    "Sqrt": np.sqrt, "Mul": np.multiply, "Div": np.divide, "Add": np.add, "Sub": np.subtract, "Pow": np.power, "Neg": np.negative,
    "Reciprocal": np.reciprocal, **dict.fromkeys(_VIEWS, np.asarray),
}  # fmt: skip


def _is_shape(value: Optional[ir.Value]) -> bool:
    return value is not None and value.producer() is not None and value.producer().op_type == "Shape"  # type: ignore[union-attr]


def _part_of_shape(node: ir.Node) -> Optional[np.ndarray[Any, Any]]:
    shape = node.inputs[0].producer().inputs[0].shape  # type: ignore[union-attr]
    shape_node = node.inputs[0].producer()  # type: ignore[union-attr]
    if shape is None or "start" in shape_node.attributes or "end" in shape_node.attributes:  # type: ignore[union-attr]
        return None
    dims = [size if isinstance(size, int) else None for size in shape]
    if node.op_type == "Gather":
        at = constant(node.inputs[1])
        picked: Any = None if at is None else [dims[int(i)] for i in at.reshape(-1)]
        picked = picked[0] if picked is not None and at is not None and at.ndim == 0 else picked
    else:
        bounds = [constant(v) for v in node.inputs[1:3]]
        if any(b is None or b.size != 1 for b in bounds) or len(node.inputs) > 4:
            return None
        start, end = (int(b.reshape(-1)[0]) for b in bounds if b is not None)
        picked = dims[max(start, -len(dims)) : min(end, len(dims))]
    if picked is None or (isinstance(picked, list) and any(size is None for size in picked)):
        return None
    return np.asarray(picked)


def scalar(value: Optional[ir.Value]) -> Optional[float]:
    """The one number that a value is, if that is known."""
    found = evaluate(value)
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None


def rank(value: ir.Value) -> Optional[int]:
    return None if value.shape is None else len(value.shape)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal: the same number, or the same symbol."""
    if isinstance(a, int) or isinstance(b, int):
        return bool(a == b)
    return a.value is not None and a.value == b.value


def typed(value: ir.Value, dtype: Optional[ir.DataType]) -> ir.Value:
    """The value, with its type noted where that is known."""
    if dtype is not None:
        value.dtype = dtype
    return value


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let everything read ``new`` in the place of ``old``. An output of the graph keeps its name."""
    typed(new, old.dtype)
    new.shape = old.shape
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}_before_attnhub"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def is_op(value: Optional[ir.Value], *names: str) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in names


def graphs(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the model's graph and of the branches and loops in it."""
    yield from list(model.graph.all_nodes())


def check_nodes(model: ir.Model) -> None:
    """ValueError, naming the node, for one of ai.onnx that lacks an input or an attribute which its operator must have, or has one of a wrong type."""
    opset = model.opset_imports[""]
    for node in graphs(model):
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except Exception:  # not in this operator set: the runtime will say so, and no rule here knows it either
            continue
        single = onnx.defs.OpSchema.FormalParameterOption.Single
        for index, formal in enumerate(schema.inputs):
            if formal.option == single and (index >= len(node.inputs) or node.inputs[index] is None):
                raise ValueError(f"node {node.name or node.op_type}: {node.op_type} lacks its input {formal.name}")
        missing = [name for name, attribute in schema.attributes.items() if attribute.required and name not in node.attributes]
        if missing:
            raise ValueError(f"node {node.name or node.op_type}: {node.op_type} lacks its attribute {', '.join(missing)}")
        for name, attribute in node.attributes.items():
            kind: Any = schema.attributes[name].type if name in schema.attributes else attribute.type
            if attribute.type.value != kind.value:
                raise ValueError(f"node {node.name or node.op_type}: attribute {name} of {node.op_type} is of type {attribute.type.name}")
        if not node.outputs:
            raise ValueError(f"node {node.name or node.op_type}: {node.op_type} has no output")


class Builder:
    """Writes nodes in front of another: ``b("Add", x, y)`` gives the first output. Numbers become constants."""

    def __init__(self, before: ir.Node, used: set[str]) -> None:
        self._before, self._used = before, used
        self._stem = f"attnhub_{before.name or before.op_type}"

    def __call__(self, op: str, *inputs: Union[ir.Value, int, float, list[int], None], **attributes: Any) -> ir.Value:
        node = self.node(op, inputs, attributes)
        return node.outputs[0]

    def node(
        self, op: str, inputs: Any, attributes: Optional[dict[str, Any]] = None, outputs: int = 1, domain: str = "", overload: str = ""
    ) -> ir.Node:
        values = [value if value is None or isinstance(value, ir.Value) else self.constant(value) for value in inputs]
        made = ir.node(op, values, attributes or {}, domain=domain, overload=overload, num_outputs=outputs, name=self._name(op))
        for value in made.outputs:
            value.name = self._name(op)
        self._before.graph.insert_before(self._before, made)  # type: ignore[union-attr]
        return made

    def constant(self, value: Any, dtype: Optional[ir.DataType] = None) -> ir.Value:
        """A float is a float32 scalar, an int an int64 scalar, a list int64 of one dimension; dtype overrides."""
        if dtype is None:
            array = np.asarray(value, dtype=np.float32 if isinstance(value, float) else np.int64)
        else:
            array = np.asarray(value).astype(dtype.numpy())
        tensor = ir.tensor(array, dtype=dtype, name=self._name("constant"))
        made: ir.Value = self.node("Constant", [], {"value": tensor}).outputs[0]
        made.dtype, made.shape = tensor.dtype, ir.Shape(array.shape)
        return made

    def attention(self, form: Form, tensors: dict[str, Optional[ir.Value]]) -> ir.Node:
        """The node of a form, with its overload; the function body is the caller's to add."""
        inputs = [tensors.get(name) for name in INPUTS]
        mask = tensors.get("attn_mask")
        if mask is not None and mask.dtype is None:
            typed(mask, ir.DataType.BOOL if form.mask == "bool" else tensors["Q"].dtype)  # type: ignore[union-attr]
        while inputs[-1] is None:
            inputs.pop()
        made = self.node(OP, inputs, form.attributes(), len(form.outputs()), DOMAIN, form.overload())
        for output, name in zip(made.outputs, form.outputs()):
            if not name:
                output.name = ""
        typed(made.outputs[0], tensors["Q"].dtype)  # type: ignore[union-attr]
        return made

    def split_heads(self, value: ir.Value, heads: int) -> ir.Value:
        """[B, S, H * D] -> [B, H, S, D]."""
        return typed(self("Transpose", self("Reshape", value, [0, 0, heads, -1]), perm=[0, 2, 1, 3]), value.dtype)

    def join_heads(self, value: ir.Value) -> ir.Value:
        """[B, H, S, D] -> [B, S, H * D]."""
        return self("Reshape", self("Transpose", value, perm=[0, 2, 1, 3]), [0, 0, -1])

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The length of an axis, int64 [1]."""
        return self("Shape", value, start=axis, end=axis + 1)

    def _name(self, op: str) -> str:
        name, number = f"{self._stem}_{op}", 0
        while name in self._used:
            number += 1
            name = f"{self._stem}_{op}_{number}"
        self._used.add(name)
        return name


def default_scale(value: Optional[float], head_dim: Any) -> Optional[float]:
    """None where a scale is what the node takes by itself, 1 / sqrt(head_dim), to float32 rounding."""
    if value is None or not isinstance(head_dim, int) or head_dim < 1:
        return value
    return None if abs(value * math.sqrt(head_dim) - 1.0) < 3e-7 else value
