"""From a torch model to an ONNX file with one ``attnhub::FlashAttention`` node per attention, and the proof that it computes the same."""

from __future__ import annotations

import copy
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import onnx_ir
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnhub import ops
from attnhub.backends.onnx import cached
from attnhub.backends.onnx.bodies import give_bodies, nodes_of
from attnhub.backends.onnx.body import OPSETS
from attnhub.backends.onnx.gelu import reorder_gelu
from attnhub.backends.onnx.model import EXTERNAL_BYTES, IR_VERSION, output_file
from attnhub.backends.onnx.node import Form
from attnhub.backends.onnx.translate import IN_PLACE_CACHE, UnsupportedInOnnx, translate_forward
from attnhub.backends.onnx.verify import Trial, copies, fresh, verify


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from torch.

    nodes: number of FlashAttention nodes. bodies: overload names of the function bodies in the file. native_difference,
    body_difference: largest absolute difference of any output to torch in ONNX Runtime with and without attnhub's library;
    None where it was not verified, and then ``notes`` says why. verified: the sizes of the inputs that were compared, the example's
    first. native_calls: how often the native kernel ran meanwhile. external_data: the file of the weights, "" where they are in
    the model. encoder: the report of the other file of an encoder-decoder with a K/V cache.
    """

    path: str
    nodes: int
    opset: int
    ir_version: int
    bodies: tuple[str, ...]
    native_difference: Optional[float] = None
    body_difference: Optional[float] = None
    native_calls: int = 0
    verified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    external_data: str = ""
    encoder: Optional[ExportReport] = None

    def __str__(self) -> str:
        lines = [] if self.encoder is None else [str(self.encoder)]
        lines.append(
            f"{self.path}: {self.nodes} attnhub::FlashAttention node(s), opset {self.opset}, IR {self.ir_version}, {len(self.bodies)} function bodies"
        )
        lines.extend(f"  body {body}" for body in self.bodies)
        if self.external_data:
            lines.append(f"  weights in {self.external_data}")
        for label, difference in (("with attnhub's library", self.native_difference), ("with ONNX Runtime alone", self.body_difference)):
            lines.append(f"  {label}: " + ("not verified" if difference is None else f"largest difference to torch {difference:.3g}"))
        lines.extend(f"  verified at {sizes}" for sizes in self.verified)
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def export(
    model: Union[torch.nn.Module, Callable[..., Any]],
    inputs: Union[Tensor, Sequence[Any], Mapping[str, Any]],
    path: Union[str, os.PathLike[str]],
    *,
    kwargs: Optional[Mapping[str, Any]] = None,
    dynamic_shapes: Any = None,
    opset: int = 18,
    kv_cache: bool = False,
    fp16: bool = False,
    input_names: Optional[Sequence[str]] = None,
    output_names: Optional[Sequence[str]] = None,
    report: bool = True,
) -> ExportReport:
    """See `attnhub.onnx.export`.

    Raises `UnsupportedInOnnx` for what the node cannot express, ValueError for another opset or a model without attnhub's
    attention, `ExportMismatch` if verification fails (the file stays, for a look at it).
    """
    if opset not in OPSETS:
        raise ValueError(
            f"opset={opset}: allowed are {', '.join(map(str, OPSETS))}, which are tested. At 23 torch's exporter fuses rotary embeddings into "
            "an operator that fails in ONNX Runtime for batches above 1, and at 26 it writes broken models"
        )
    target = output_file("path", path)
    if not isinstance(inputs, (Tensor, Sequence, Mapping)):
        raise TypeError(f"inputs is a {type(inputs).__name__}: a tensor, a tuple of them, or a mapping of names to them is needed")
    if not callable(model):
        raise TypeError(f"model is a {type(model).__name__}: an nn.Module or a function is needed")
    named = dict(kwargs or {})
    module = model if isinstance(model, torch.nn.Module) else _Function(model).eval()
    if fp16:
        module, inputs, named = copy.deepcopy(module).half(), _half(inputs), _half(named)
    if kv_cache:
        given = {"dynamic_shapes": dynamic_shapes, "input_names": input_names, "output_names": output_names}
        wrong = [name for name, value in given.items() if value is not None]
        if wrong:
            raise ValueError(f"kv_cache=True makes {', '.join(wrong)} itself; leave them out")
        encoder, decoder = cached.parts(module, inputs, named)
        first = None if encoder is None else _export_part(encoder, target.with_name(f"{target.stem}.encoder{target.suffix}"), opset, report)
        return replace(_export_part(decoder, target, opset, report), encoder=first)
    if isinstance(inputs, Mapping):
        args, named = (), {**inputs, **named}
    else:
        args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    part = cached.Part(module, args, dynamic_shapes, list(input_names or ()), list(output_names or ()), {})
    return _export_part(part, target, opset, report, named)


def _export_part(
    part: cached.Part, target: pathlib.Path, opset: int, report: bool, kwargs: Optional[dict[str, Any]] = None
) -> ExportReport:
    kwargs = kwargs or {}
    program = _trace(part, kwargs, opset)
    forms = _finish(program.model)
    if not forms:
        raise ValueError(
            "the model has no attnhub attention: call attnhub.patch(model) first, or attnhub.attention inside it. Nothing was written"
        )
    for value in program.model.graph.inputs:
        for axis, name in part.dims.get(str(value.name), {}).items():
            if value.shape is not None:
                value.shape[axis] = onnx_ir.SymbolicDim(name)
    external = _save(program.model, target)
    made = ExportReport(
        str(target), len(forms), opset, IR_VERSION, tuple(sorted({form.overload() for form in forms})), external_data=external
    )
    if not report:
        return made
    trials = part.trials or (fresh(program, part.args, kwargs),)
    found = verify(str(target), program, part.module, (Trial(part.args, kwargs, example=True), *trials))
    return replace(made, **vars(found))


def _half(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.half() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree)


def _save(model: Any, target: pathlib.Path) -> str:
    """Write the model; the name of the file beside it that holds the weights, or ""."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{target.name}.data" if size > EXTERNAL_BYTES else ""
    onnx_ir.save(model, target, external_data=external or None)
    return external


class _Function(torch.nn.Module):
    """A plain function, as torch.export wants it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def _trace(part: cached.Part, kwargs: dict[str, Any], opset: int) -> torch.onnx.ONNXProgram:
    table: dict[Callable[..., Any], Callable[..., Any]] = {ops.forward_op: translate_forward}
    try:
        # ONNX has no gradients; under no_grad no attention asks for the lse that only a backward would need.
        with torch.no_grad():
            program = torch.onnx.export(
                part.module,
                copies(part.args),
                kwargs=copies(kwargs),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=part.dynamic_shapes,
                input_names=part.input_names or None,
                output_names=part.output_names or None,
                custom_translation_table=table,
                verbose=False,
            )
    except Exception as error:
        unsupported = _unsupported_behind(error)
        if unsupported is None:
            raise
        raise unsupported from None
    assert program is not None
    return program


def _unsupported_behind(error: Optional[BaseException]) -> Optional[UnsupportedInOnnx]:
    """Our own error inside torch's wrappings. An in-place cache fails before it comes to our translation: only its name is left."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UnsupportedInOnnx):
            return error
        if "attnhub.append_kv" in str(error):
            return UnsupportedInOnnx(*IN_PLACE_CACHE)
        error = error.__cause__ or error.__context__
    return None


def _finish(model: Any) -> list[Form]:
    """Give every node its final outputs and its body. Changes the model; the forms found, one per node."""
    for node in nodes_of(model):
        _drop_unused_outputs(node)
    reorder_gelu(model)
    forms = give_bodies(model)
    model.ir_version = IR_VERSION
    return forms


def _drop_unused_outputs(node: Any) -> None:
    """Outputs that nothing reads: the last ones go, one in between gets the empty name, which means absent."""
    used = [bool(value.uses()) or value.is_graph_output() for value in node.outputs]
    node.resize_outputs(max((i for i, use in enumerate(used) if use), default=0) + 1)
    for value, use in list(zip(node.outputs, used))[1:]:
        if not use:
            value.name = ""
