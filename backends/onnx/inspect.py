"""What is wrong with a file, before a runtime says so, or runs it all the same: `attnhub onnx check`.

A runtime ignores attributes that it does not know and takes a newer operator set for the one it has. Here each is an error that
names node and reason.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

import onnx
from onnx import AttributeProto, helper
from onnx.external_data_helper import uses_external_data

from attnhub.backends.onnx.node import DEFAULTS, DOMAIN, INPUTS, OP, OUTPUTS, REQUIRED_INPUTS, VERSION, Form, is_ours

_RANKS = {"Q": 4, "K": 4, "V": 4, "past_key": 4, "past_value": 4, "nonpad_kv_seqlen": 1, "sinks": 1, "leftpad": 1}
_KINDS = {int: AttributeProto.INT, float: AttributeProto.FLOAT, str: AttributeProto.STRING}
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_LENGTHS, _NUMBERS = {onnx.TensorProto.INT64}, {onnx.TensorProto.FLOAT}
_TYPES = {
    "Q": _FLOATS, "K": _FLOATS, "V": _FLOATS, "attn_mask": {*_FLOATS, onnx.TensorProto.BOOL}, "past_key": _FLOATS, "past_value": _FLOATS,
    "nonpad_kv_seqlen": _LENGTHS, "sinks": _NUMBERS, "leftpad": _LENGTHS, "alibi_slopes": _NUMBERS,
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """node: its name, or "" for the file as a whole."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node or 'the file'}: {self.reason}"


def check(path: Union[str, os.PathLike[str]]) -> tuple[Problem, ...]:
    """See `attnhub.onnx.check`."""
    file = pathlib.Path(path)
    try:
        model = onnx.load(os.fspath(file), load_external_data=False)
    except FileNotFoundError:
        raise
    except Exception as error:
        return (Problem("", f"it is no ONNX model: {type(error).__name__}: {error}"),)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:
        inferred = model  # what is wrong there, the runtime says; the nodes are looked at with the shapes that the file has
    return (*_file(model, file.parent), *_nodes(model, inferred))


def _file(model: onnx.ModelProto, folder: pathlib.Path) -> Iterator[Problem]:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for domain, version in opsets.items():
        if is_ours(domain, OP) and version > VERSION:
            yield Problem("", f"it is of operator set {domain} {version}; this attnhub knows {VERSION}: update attnhub")
    if not opsets.get("", 0):
        yield Problem("", "it imports no operator set of ai.onnx")
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            reason = _external(tensor, folder)
            if reason:
                yield Problem("", f"weight {tensor.name}: {reason}")


def _external(tensor: onnx.TensorProto, folder: pathlib.Path) -> str:
    """What is wrong with the bytes of a weight beside the model, or ""."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / entries.get("location", "")
    if not file.is_file():
        return f"its file {file.name} is not there"
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        return f"offset {entries.get('offset')!r} and length {entries.get('length')!r} are no numbers"
    size = file.stat().st_size
    return (
        f"{file.name} holds {size} bytes; bytes {offset} to {offset + length} are needed"
        if not 0 <= offset <= offset + length <= size
        else ""
    )


def _nodes(model: onnx.ModelProto, inferred: onnx.ModelProto) -> Iterator[Problem]:
    types: dict[str, onnx.TypeProto.Tensor] = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        types[value.name] = value.type.tensor_type
    for tensor in model.graph.initializer:
        types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)).tensor_type
    bodies = {(function.domain, function.overload) for function in model.functions if is_ours(function.domain, function.name)}
    for node in _all(model):
        if node.domain.split(".")[0] != DOMAIN:
            continue
        label = node.name or (node.output[0] if node.output else node.op_type)
        if not is_ours(node.domain, node.op_type):
            yield Problem(label, f"operator {node.domain}::{node.op_type} is not known; there is {DOMAIN}::{OP}")
            continue
        for reason in (*_attributes(node), *_arguments(node, types)):
            yield Problem(label, reason)
        if bodies and (node.domain, node.overload) not in bodies:
            have = ", ".join(f"{domain} {overload}" for domain, overload in sorted(bodies))
            yield Problem(label, f"it has no function body: {node.domain} {node.overload} is not among {have}")


def _all(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    stack = [model.graph.node, *(function.node for function in model.functions if not is_ours(function.domain, function.name))]
    while stack:
        for node in stack.pop():
            yield node
            stack.extend(attribute.g.node for attribute in node.attribute if attribute.type == AttributeProto.GRAPH)


def _attributes(node: onnx.NodeProto) -> Iterator[str]:
    known: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.name == "version":
            if attribute.type != AttributeProto.INT or not 1 <= attribute.i <= VERSION:
                yield f"attribute version is {_shown(attribute)}; this attnhub knows the versions 1 to {VERSION}: update attnhub"
        elif attribute.name not in DEFAULTS:
            yield f"attribute {attribute.name} is not known; there are {', '.join(DEFAULTS)}"
        elif attribute.type != _KINDS[type(DEFAULTS[attribute.name] if DEFAULTS[attribute.name] is not None else 1.0)]:
            yield f"attribute {attribute.name} is {_shown(attribute)}, of the wrong type"
        else:
            value = helper.get_attribute_value(attribute)
            known[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    if known.get("is_causal", 0) not in (0, 1):
        yield f"attribute is_causal is {known['is_causal']}; it must be 0 or 1"
    try:
        Form.of_node(known, frozenset(), frozenset(), False)
    except ValueError as error:
        yield f"attribute {error}"


def _shown(attribute: onnx.AttributeProto) -> str:
    try:
        return repr(helper.get_attribute_value(attribute))
    except ValueError:
        return "of no type"


def _arguments(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto.Tensor]) -> Iterator[str]:
    have = {name: value for name, value in zip(INPUTS, node.input) if value}
    if len(node.input) > len(INPUTS):
        yield f"{len(node.input)} inputs; there are {len(INPUTS)}"
    if len(node.output) > len(OUTPUTS):
        yield f"{len(node.output)} outputs; there are {len(OUTPUTS)}"
    missing = [name for name in INPUTS[:REQUIRED_INPUTS] if name not in have]
    if missing:
        yield f"without {', '.join(missing)}"
    if ("past_key" in have) != ("past_value" in have):
        yield "past_key and past_value must be given together"
    if "past_key" in have and "nonpad_kv_seqlen" in have:
        yield "nonpad_kv_seqlen and past_key cannot be given together"
    shapes: dict[str, list[int]] = {}  # 0 for a size that is not known
    kinds: dict[str, int] = {}
    for name, value in have.items():
        if value not in types:
            continue
        kind = types[value].elem_type
        if kind and kind not in _TYPES[name]:
            allowed = ", ".join(onnx.TensorProto.DataType.Name(one) for one in sorted(_TYPES[name]))
            yield f"{name} is {onnx.TensorProto.DataType.Name(kind)}; allowed are {allowed}"
        kinds[name] = kind
        if types[value].HasField("shape"):
            shapes[name] = [max(0, dim.dim_value) for dim in types[value].shape.dim]
            if name in _RANKS and len(shapes[name]) != _RANKS[name]:
                yield f"{name} has {len(shapes[name])} dimensions, not {_RANKS[name]}"
    same = {kinds[name] for name in ("Q", "K", "V", "past_key", "past_value") if kinds.get(name)}
    if len(same) > 1:
        yield f"Q, K, V and the past are of {len(same)} types: {', '.join(onnx.TensorProto.DataType.Name(kind) for kind in sorted(same))}"
    yield from _sizes(shapes)


def _sizes(shapes: Mapping[str, list[int]]) -> Iterator[str]:
    q, k, v = (shapes.get(name, []) if len(shapes.get(name, [])) == 4 else [0, 0, 0, 0] for name in "QKV")
    if q[1] and k[1] and q[1] % k[1]:
        yield f"the {q[1]} heads of Q must be a multiple of the {k[1]} heads of K and V"
    for first, second, what in ((q[3], k[3], "head_dim of Q and K"), (k[1], v[1], "heads of K and V"), (k[2], v[2], "lengths of K and V")):
        if first and second and first != second:
            yield f"the {what} differ: {first} and {second}"
