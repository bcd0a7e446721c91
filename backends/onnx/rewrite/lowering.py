"""`lower`: the node as operators that a runtime brings, where one does not take custom operators nor functions.

ai.onnx Attention (operator set 23) or com.microsoft GroupQueryAttention and MultiHeadAttention. What those have no word for (windows,
chunks, padding, ALiBi, other alignments) becomes the mask that is added to the scores, made by standard operators; sinks and lse,
which no mask can express, leave the node as it is, with the reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import version_converter

from attnhub.backends.onnx.bodies import form_of, nodes_of, remove_bodies
from attnhub.backends.onnx.model import output_file
from attnhub.backends.onnx.node import DOMAIN, INPUTS, Form
from attnhub.backends.onnx.rewrite import contrib
from attnhub.backends.onnx.rewrite.convert import (
    ConversionReport,
    Converted,
    Left,
    difference,
    infer_shapes,
    load,
    operators,
    used_names,
    write,
)
from attnhub.backends.onnx.rewrite.graph import FLOATS, Builder, NotRecognised, graphs, same_size, typed
from attnhub.backends.onnx.rewrite.standard import swap

STANDARD, CONTRIB = "ai.onnx", "com.microsoft"
TARGETS = (STANDARD, CONTRIB)
#: The first operator set with Attention.
STANDARD_OPSET = 23


def lower(
    source: Union[str, os.PathLike[str]],
    target: Union[str, os.PathLike[str]],
    *,
    to: str = STANDARD,
    inputs: Optional[Mapping[str, Any]] = None,
    verify: bool = True,
) -> ConversionReport:
    """See `attnhub.onnx.lower`."""
    if to not in TARGETS:
        raise ValueError(f"to={to!r}: allowed are {', '.join(map(repr, TARGETS))}")
    output_file("target", target)
    model = load(source)
    before = operators(model)
    ours = list(nodes_of(model))
    if not ours:
        return ConversionReport(os.fspath(source), "", model.opset_imports[""], (), ())
    names = used_names(model)
    converted: list[Converted] = []
    left: list[Left] = []
    for node in ours:
        label = node.name or str(node.outputs[0].name)
        try:
            now, notes = _lowered(node, names, to)
        except NotRecognised as reason:
            left.append(Left(label, f"{DOMAIN}::{node.op_type}", str(reason)))
            continue
        converted.append(Converted(label, _form(node).overload(), now, tuple(notes)))
    if not converted:
        return ConversionReport(os.fspath(source), "", model.opset_imports[""], (), tuple(left))
    common.RemoveUnusedNodesPass()(model)
    if left:
        # Half of a model in each world would run in neither.
        return ConversionReport(os.fspath(source), "", model.opset_imports[""], tuple(converted), tuple(left))
    remove_bodies(model)
    if to == CONTRIB:
        model.opset_imports[contrib.DOMAIN] = 1
    elif model.opset_imports[""] < STANDARD_OPSET:
        _raise(model)
    report = ConversionReport(
        os.fspath(source), os.fspath(target), model.opset_imports[""], tuple(converted), (), difference(before, operators(model))
    )
    return write(model, report, inputs, verify)


def _raise(model: ir.Model) -> None:
    """To the first operator set with Attention. The new nodes take part as operators of another domain until all others are there."""
    ours = [node for node in graphs(model) if node.op_type == "Attention" and node.domain == ""]
    for node in ours:
        node.domain = DOMAIN
    version_converter.convert_version(model, STANDARD_OPSET)
    for node in ours:
        node.domain = ""
    if model.opset_imports[""] < STANDARD_OPSET:
        raise ValueError(
            f"the model's operator set {model.opset_imports['']} cannot be raised to {STANDARD_OPSET}, the first with Attention"
        )
    infer_shapes(model)


def _form(node: ir.Node) -> Form:
    for value in node.outputs[1:]:
        if not value.uses() and not value.is_graph_output():
            value.name = ""
    try:
        return form_of(node)
    except ValueError as error:
        raise NotRecognised(str(error)) from error


@dataclass(frozen=True)
class _Node:
    """One node while it is lowered. square: whether its new keys are known to be as many as its queries."""

    form: Form
    have: dict[str, ir.Value]
    square: bool
    heads: Optional[int]
    kv_heads: Optional[int]


def _lowered(node: ir.Node, names: set[str], to: str) -> tuple[str, list[str]]:
    form = _form(node)
    have = {name: value for name, value in zip(INPUTS, node.inputs) if value is not None}
    if form.lse:
        raise NotRecognised("its output lse: no other operator gives it")
    q, k = have["Q"], have["K"]
    square = q.shape is not None and k.shape is not None and same_size(q.shape[2], k.shape[2])
    heads = [value.shape[1] if value.shape is not None and isinstance(value.shape[1], int) else None for value in (q, k)]
    found = _Node(form, have, square, heads[0], heads[1])
    if to == CONTRIB:
        return _contrib(node, found, names)
    if form.sinks:
        raise NotRecognised("sinks: ai.onnx Attention has none")
    return _standard(node, found, names)


# -- ai.onnx -----------------------------------------------------------------------------------------------------------------------


def _standard(node: ir.Node, found: _Node, names: set[str]) -> tuple[str, list[str]]:
    form, have = found.form, found.have
    b = Builder(node, names)
    causal = _causal_by_attribute(found)
    mask = _mask(b, found, causal, always_float=False)
    if mask is not None and causal:
        # Which queries have no key is asked of the mask alone: it has to hold everything.
        causal, mask = False, _mask(b, found, False, always_float=False)
    attributes: dict[str, Any] = {"is_causal": 1} if causal else {}
    if form.scale is not None:
        attributes["scale"] = form.scale
    if form.softcap:
        attributes["softcap"] = form.softcap
    # ONNX Runtime's Attention broadcasts the mask over batch and heads only.
    full = None if mask is None else _expanded(b, found, mask, _total(b, found))
    inputs = [have["Q"], have["K"], have["V"], full, have.get("past_key"), have.get("past_value")]
    while inputs[-1] is None:
        inputs.pop()
    made = b.node("Attention", inputs, attributes, 3 if form.past else 1)
    # Presents are outputs of the operator only with a past; without one they are K and V.
    presents = list(made.outputs[1:3]) if form.past else [b("Identity", have["K"]), b("Identity", have["V"])] if form.present else []
    swap(node, [_keyless_to_zero(b, made.outputs[0], mask), *presents])
    return "ai.onnx::Attention" + (" with a mask" if mask is not None else ""), []


def _causal_by_attribute(found: _Node) -> bool:
    """Whether is_causal of ai.onnx, aligned by the number of past keys, says what the node's says."""
    form = found.form
    if not form.is_causal or form.nonpad_kv_seqlen:
        return False
    return found.square if form.alignment == "bottom_right" else not form.past


def _keyless_to_zero(b: Builder, out: ir.Value, mask: Optional[ir.Value]) -> ir.Value:
    """Queries from which the mask takes every key give NaN or the mean of V, by runtime; here they give 0."""
    if mask is None:
        return out
    allowed = mask if mask.dtype == ir.DataType.BOOL else b("Greater", mask, b("CastLike", -math.inf, mask))
    count = b("ReduceSum", b("Cast", allowed, to=ir.DataType.FLOAT.value), [-1], keepdims=1)
    return b("Where", b("Greater", count, 0.0), out, b("CastLike", 0.0, out))


def _mask(b: Builder, found: _Node, causal_elsewhere: bool, always_float: bool) -> Optional[ir.Value]:
    """Everything that is left for a mask: bool or float of 4 dimensions, None if nothing is."""
    form, have = found.form, found.have
    conditions: list[ir.Value] = []
    bias: Optional[ir.Value] = None
    if form.mask == "bool":
        conditions.append(have["attn_mask"])  # its type is known: the form says bool
    elif form.mask == "float":
        bias = typed(b("CastLike", have["attn_mask"], have["Q"]), have["Q"].dtype)
    positional = (form.is_causal and not causal_elsewhere) or form.window_left >= 0 or form.window_right >= 0 or form.chunk
    if positional or form.alibi or form.leftpad or form.nonpad_kv_seqlen:
        total = _total(b, found)
        j = _range(b, total)
        if form.nonpad_kv_seqlen:
            conditions.append(b("Less", j, b("Unsqueeze", have["nonpad_kv_seqlen"], [1, 2, 3])))
        if form.leftpad:
            conditions.append(b("GreaterOrEqual", j, b("Unsqueeze", have["leftpad"], [1, 2, 3])))
        p = _positions(b, found, total)
        if form.is_causal and not causal_elsewhere:
            conditions.append(b("LessOrEqual", j, p))
        if form.window_left >= 0:
            conditions.append(b("GreaterOrEqual", j, b("Sub", p, form.window_left)))
        if form.window_right >= 0:
            conditions.append(b("LessOrEqual", j, b("Add", p, form.window_right)))
        if form.chunk:
            first = b("Sub", p, b("Mod", p, form.chunk))
            conditions += [b("GreaterOrEqual", j, first), b("Less", j, b("Add", first, form.chunk))]
        if form.alibi:
            distance = b("Cast", b("Abs", b("Sub", p, j)), to=ir.DataType.FLOAT.value)
            slopes = b("Mul", b("Unsqueeze", have["alibi_slopes"], [-2, -1]), distance)
            slopes = b("CastLike", b("Neg", slopes), have["Q"])
            bias = slopes if bias is None else b("Add", bias, slopes)
    allowed: Optional[ir.Value] = None
    for condition in conditions:
        allowed = condition if allowed is None else b("And", allowed, condition)
    if bias is None and (allowed is None or not always_float):
        return allowed if allowed is None else typed(allowed, ir.DataType.BOOL)
    if allowed is None:
        return bias
    zero = b("CastLike", 0.0, have["Q"]) if bias is None else bias
    return b("Where", allowed, zero, b("CastLike", -math.inf, have["Q"]))


def _total(b: Builder, found: _Node) -> ir.Value:
    """How many keys there are, past ones too."""
    total = b.size(found.have["K"], 2)
    return b("Add", total, b.size(found.have["past_key"], 2)) if found.form.past else total


def _expanded(b: Builder, found: _Node, mask: ir.Value, total: ir.Value) -> ir.Value:
    """With a row for every query and a column for every key: one of either, which broadcasts elsewhere, does not in ONNX Runtime's operators."""
    return b("Expand", mask, b("Concat", [1], [1], b.size(found.have["Q"], 2), total, axis=0))


def _range(b: Builder, size: ir.Value) -> ir.Value:
    return b("Range", 0, b("Squeeze", size, [0]), 1)


def _positions(b: Builder, found: _Node, total: ir.Value) -> ir.Value:
    """Where the queries stand: [seqlen_q, 1], or [batch, 1, seqlen_q, 1]."""
    seqlen_q = b.size(found.have["Q"], 2)
    p = b("Unsqueeze", _range(b, seqlen_q), [1])
    if found.form.alignment == "top_left":
        return p
    length = b("Unsqueeze", found.have["nonpad_kv_seqlen"], [1, 2, 3]) if found.form.nonpad_kv_seqlen else total
    return b("Add", p, b("Sub", length, seqlen_q))


# -- com.microsoft -----------------------------------------------------------------------------------------------------------------


def _contrib(node: ir.Node, found: _Node, names: set[str]) -> tuple[str, list[str]]:
    if found.heads is None or found.kv_heads is None:
        raise NotRecognised("the numbers of heads of Q and K are not known")
    if found.have["Q"].dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and found.have["Q"].dtype in FLOATS:
        raise NotRecognised(f"type {found.have['Q'].dtype}: com.microsoft's operators take float and float16 on CPU")
    return _grouped(node, found, names) if _is_grouped(found) else _multi_head(node, found, names)


def _is_grouped(found: _Node) -> bool:
    """Whether GroupQueryAttention, causal over all keys, is what the node is."""
    form = found.form
    plain = not (form.mask or form.leftpad or form.nonpad_kv_seqlen or form.chunk or form.alibi) and form.window_right == -1
    q, v = found.have["Q"].shape, found.have["V"].shape
    width = q is not None and v is not None and isinstance(q[3], int) and q[3] == v[3] and q[3] % 8 == 0
    # With past keys and several new tokens ONNX Runtime's takes a batch of one only.
    taken = not form.past or (form.alignment == "bottom_right" and q is not None and q[0] == 1)
    return form.is_causal and found.square and plain and bool(width) and taken


def _grouped(node: ir.Node, found: _Node, names: set[str]) -> tuple[str, list[str]]:
    form, have = found.form, found.have
    b = Builder(node, names)
    q, k, v = (typed(b.join_heads(have[name]), have[name].dtype) for name in ("Q", "K", "V"))
    total = _total(b, found)
    last = b("Cast", b("Sub", total, 1), to=ir.DataType.INT32.value)
    seqlens = b("Expand", last, b.size(have["Q"], 0))
    attributes: dict[str, Any] = {"num_heads": found.heads, "kv_num_heads": found.kv_heads}
    if form.scale is not None:
        attributes["scale"] = form.scale
    if form.softcap:
        attributes["softcap"] = form.softcap
    if form.window_left >= 0:
        attributes["local_window_size"] = form.window_left + 1
    inputs = [
        q,
        k,
        v,
        have.get("past_key"),
        have.get("past_value"),
        seqlens,
        b("Cast", b("Squeeze", total, [0]), to=ir.DataType.INT32.value),
    ]
    if form.sinks:
        inputs += [None, None, None, None, b("CastLike", have["sinks"], have["Q"])]
    made = b.node("GroupQueryAttention", inputs, attributes, 3, contrib.DOMAIN)
    swap(node, [b.split_heads(made.outputs[0], int(found.heads or 0)), *made.outputs[1:3]])
    return f"{contrib.DOMAIN}::GroupQueryAttention", []


def _multi_head(node: ir.Node, found: _Node, names: set[str]) -> tuple[str, list[str]]:
    form, have = found.form, found.have
    for name, given in (("softcap", form.softcap), ("sinks", form.sinks)):
        if given:
            raise NotRecognised(
                f"{name}: MultiHeadAttention has none, and GroupQueryAttention is causal, without a mask, over as many new keys as queries, "
                "with a past for a batch of 1"
            )
    b = Builder(node, names)
    k, v = have["K"], have["V"]
    if form.past:
        k, v = b("Concat", have["past_key"], k, axis=2), b("Concat", have["past_value"], v, axis=2)
    mask = _mask(b, found, False, always_float=True)
    if mask is not None:
        mask = _expanded(b, found, mask, b.size(k, 2))
    repeats = int(found.heads or 0) // int(found.kv_heads or 1)
    wide = [_repeated(b, t, repeats, int(found.heads or 0)) if repeats > 1 else t for t in (k, v)]
    inputs = [b.join_heads(have["Q"]), *(b.join_heads(t) for t in wide), None, None, mask]
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, Any] = {"num_heads": found.heads}
    if form.scale is not None:
        attributes["scale"] = form.scale
    made = b.node("MultiHeadAttention", inputs, attributes, 1, contrib.DOMAIN)
    presents = [b("Identity", t) for t in (k, v)] if form.present else []
    swap(node, [_keyless_to_zero(b, b.split_heads(made.outputs[0], int(found.heads or 0)), mask), *presents])
    return f"{contrib.DOMAIN}::MultiHeadAttention" + (" with a mask" if mask is not None else ""), []


def _repeated(b: Builder, value: ir.Value, repeats: int, heads: int) -> ir.Value:
    """[B, Hk, T, D] -> [B, Hk * repeats, T, D], copies of a head side by side."""
    single = b("Unsqueeze", value, [2])
    many = b("Expand", single, [1, 1, repeats, 1, 1])
    shape = b("Concat", b.size(value, 0), [heads], b("Shape", value, start=2), axis=0)
    return b("Reshape", many, shape)
