"""`convert`: attention that a model spells out, or has as another operator, becomes ``attnhub::FlashAttention``."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Union

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from attnhub.backends.onnx.bodies import give_bodies
from attnhub.backends.onnx.body import BODY_OPSETS
from attnhub.backends.onnx.model import EXTERNAL_BYTES, output_file
from attnhub.backends.onnx.node import Form, is_ours
from attnhub.backends.onnx.rewrite import contrib, pattern, softmax, standard
from attnhub.backends.onnx.rewrite.check import Checked, check
from attnhub.backends.onnx.rewrite.graph import NotRecognised, check_nodes, graphs

#: Operators that are an attention, and of which `convert` knows nothing.
_UNKNOWN = {
    (contrib.DOMAIN, name): "operator that is not known to attnhub"
    for name in (
        "Attention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "DecoderMaskedMultiHeadAttention",
        "SparseAttention",
        "QAttention",
    )
}
_PATTERN = "MatMul-Softmax-MatMul"


@dataclass(frozen=True)
class Converted:
    """One attention: where it was, what it was, what it is, and where the two differ."""

    node: str
    was: str
    now: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """One node that stays as it was, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` or `lower` did. path: "" if nothing was written. operators: name -> (count before, count after) where they differ.

    checked: see `attnhub.backends.onnx.rewrite.check.Checked`; None where it was not asked for, or nothing was written.
    """

    source: str
    path: str
    opset: int
    converted: tuple[Converted, ...]
    left: tuple[Left, ...]
    operators: dict[str, tuple[int, int]] = field(default_factory=dict)
    bodies: tuple[str, ...] = ()
    checked: Optional[Checked] = None

    def __str__(self) -> str:
        lines = [
            f"{self.source} -> {self.path or '(nothing written)'}: {len(self.converted)} attention(s) rewritten, {len(self.left)} left, opset {self.opset}"
        ]
        for one in self.converted:
            lines.append(f"  {one.node}: {one.was} -> {one.now}")
            lines.extend(f"    note: {note}" for note in one.notes)
        lines.extend(f"  left {one.op} {one.node}: {one.reason}" for one in self.left)
        changed = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in sorted(self.operators.items()))
        if not self.converted and not self.left:
            lines.append("  there is no attention in it to rewrite")
        if changed:
            lines.append(f"  operators: {changed}")
        if self.checked is not None:
            lines.append(str(self.checked))
        return "\n".join(lines)


def convert(
    source: Union[str, os.PathLike[str]],
    target: Union[str, os.PathLike[str]],
    *,
    unpadded: bool = False,
    inputs: Optional[Mapping[str, Any]] = None,
    verify: bool = True,
) -> ConversionReport:
    """See `attnhub.onnx.convert`."""
    output_file("target", target)
    model = load(source)
    before = operators(model)
    names = used_names(model)
    converted: list[Converted] = []
    left: list[Left] = []
    for node in graphs(model):
        label = node.name or str(node.outputs[0].name)
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        try:
            made = _rewritten(node, names, unpadded)
        except NotRecognised as reason:
            left.append(Left(label, kind, str(reason)))
            continue
        if made is not None:
            form, was, notes = made
            converted.append(Converted(label, was, form.overload(), tuple(notes)))
    opset = model.opset_imports[""]
    if not converted:
        return ConversionReport(os.fspath(source), "", opset, (), tuple(left))
    common.RemoveUnusedNodesPass()(model)
    bodies = tuple(sorted({form.overload() for form in give_bodies(model)}))
    report = ConversionReport(
        os.fspath(source), os.fspath(target), opset, tuple(converted), tuple(left), difference(before, operators(model)), bodies
    )
    return write(model, report, inputs, verify)


def _rewritten(node: ir.Node, names: set[str], unpadded: bool) -> Optional[tuple[Form, str, list[str]]]:
    """(form, what the node was, notes) after putting ours in its place; None for a node that is no attention."""
    key = (node.domain, node.op_type)
    if key == ("", "Softmax"):
        found = pattern.find(node)
        return softmax.replace(found, names), _PATTERN, found.notes
    if key == ("", "Attention"):
        form, q_heads, kv_heads = standard.plan(node)
        standard.replace(node, form, q_heads, kv_heads, names)
        return form, "ai.onnx::Attention", standard.notes(node)
    if key == (contrib.DOMAIN, "MultiHeadAttention"):
        form = contrib.plan_multi_head(node)
        contrib.replace_multi_head(node, form, names)
        return form, f"{contrib.DOMAIN}::MultiHeadAttention", contrib.multi_head_notes(node)
    if key == (contrib.DOMAIN, "GroupQueryAttention"):
        form = contrib.plan_grouped(node, unpadded)
        contrib.replace_grouped(node, form, names)
        return form, f"{contrib.DOMAIN}::GroupQueryAttention", []
    if key in _UNKNOWN:
        raise NotRecognised(_UNKNOWN[key])
    return None


# -- what `lower` needs too ------------------------------------------------------------------------------------------------------


def load(source: Union[str, os.PathLike[str]]) -> ir.Model:
    """The model with shapes inferred, its functions that hold attention inlined, at an operator set that bodies can have.

    Raises ValueError for a file that is no ONNX model, or has a node without what it must have; FileNotFoundError for none.
    """
    path = pathlib.Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        model = ir.load(path)
        opset = model.opset_imports.get("", 0)
    except Exception as error:
        raise ValueError(f"{path} is no ONNX model: {type(error).__name__}: {error}") from error
    if not model.graph or not opset:
        raise ValueError(f"{path} is no ONNX model: it has no graph, or imports no operator set of ai.onnx")
    check_nodes(model)
    if opset < BODY_OPSETS.start:
        model = _raised(path, opset)
    if opset >= BODY_OPSETS.stop:
        raise ValueError(
            f"{path} is of operator set {opset}; function bodies were written for {BODY_OPSETS.start} to {BODY_OPSETS.stop - 1}"
        )
    # Bodies of ours are made anew in the end, so that they can stand aside while all other functions are inlined.
    bodies = {key: function for key, function in model.functions.items() if is_ours(function.domain, function.name)}
    others = [function for key, function in model.functions.items() if key not in bodies]
    if any(node.op_type in ("Softmax", "Attention") for function in others for node in function.all_nodes()):
        for key in bodies:
            del model.functions[key]
        common.InlinePass()(model)
        model.functions.update(bodies)
    infer_shapes(model)
    return model


def _raised(path: pathlib.Path, opset: int) -> ir.Model:
    """The model at operator set 18, by onnx's converter."""
    from onnx import version_converter

    try:
        return ir.from_proto(version_converter.convert_version(onnx.load(path), 18))
    except Exception as error:
        raise ValueError(
            f"{path} is of operator set {opset}, older than {BODY_OPSETS.start}, and onnx cannot raise it to 18: {error}. Export the model anew"
        ) from error


def infer_shapes(model: ir.Model) -> None:
    """By onnx, and by ONNX Runtime where its own operators, which onnx does not know, are in between."""
    with _quiet():
        common.ShapeInferencePass(data_prop=True)(model)
        if not any(node.domain == contrib.DOMAIN for node in graphs(model)) or _weights(model) > EXTERNAL_BYTES:
            return
        try:
            from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

            proto = ir.to_proto(model)
            inferred = SymbolicShapeInference.infer_shapes(proto, auto_merge=True, guess_output_rank=False)
        except Exception:
            return  # sympy is missing, or an operator is not known there: what onnx found has to do
    found = {value.name: value for value in inferred.graph.value_info}
    for node in graphs(model):
        for value in node.outputs:
            info = found.get(value.name)
            if info is not None and (value.shape is None or value.dtype is None) and info.type.tensor_type.elem_type:
                value.dtype = value.dtype or ir.DataType(info.type.tensor_type.elem_type)
                if value.shape is None and info.type.tensor_type.HasField("shape"):
                    value.shape = ir.Shape(
                        [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in info.type.tensor_type.shape.dim]
                    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What shape inference cannot infer is not the user's concern here: what depends on it is reported with its reason."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)


def _weights(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def used_names(model: ir.Model) -> set[str]:
    """Names of all nodes and values."""
    names = {str(value.name) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in graphs(model):
        names.add(str(node.name))
        names.update(str(value.name) for value in node.outputs)
    return names


def operators(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graphs(model))


def difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    names = {*before, *after}
    return {name: (before.get(name, 0), after.get(name, 0)) for name in names if before.get(name, 0) != after.get(name, 0)}


def write(model: ir.Model, report: ConversionReport, inputs: Optional[Mapping[str, Any]], verify: bool) -> ConversionReport:
    """Check the model against its source, and put it in place only if they agree."""
    target = pathlib.Path(report.path)
    external = f"{target.name}.data" if _weights(model) > EXTERNAL_BYTES else ""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".attnhub-") as folder:
        made = pathlib.Path(folder) / target.name
        if not external:
            ir.external_data.load_to_model(model)
        ir.save(model, made, external_data=external or None)
        if verify:
            report = replace(report, checked=check(report.source, str(made), inputs))
        for name in (external, target.name):
            if name:
                os.replace(made.with_name(name), target.with_name(name))
    return report
