"""From a torch model to an ONNX file with one ``attnhub::FlashAttention`` node per attention, and the proof that it computes the same."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import onnx_ir
import onnxruntime
import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from attnhub import ops
from attnhub.backends.onnx.body import OPSETS, function_body
from attnhub.backends.onnx.library import library_path, native_calls, register
from attnhub.backends.onnx.model import IR_VERSION
from attnhub.backends.onnx.node import DOMAIN, INPUTS, OP, OUTPUTS, VERSION, Form
from attnhub.backends.onnx.session import run_all
from attnhub.backends.onnx.translate import IN_PLACE_CACHE, UnsupportedInOnnx, translate_forward

#: Largest difference to torch that passes verification, relative to the largest output, by the widest rounding in the model.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class ExportMismatch(RuntimeError):  # noqa: N818 - it is raised to users, who read it as a sentence
    """The written file does not compute what the torch model computes on the example inputs."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from torch on the example inputs.

    nodes: number of FlashAttention nodes. bodies: overload names of the function bodies in the file. native_difference,
    body_difference: largest absolute difference of any output to torch in ONNX Runtime with and without attnhub's library;
    None where it was not verified, and then ``notes`` says why. native_calls: how often the native kernel ran meanwhile.
    """

    path: str
    nodes: int
    opset: int
    ir_version: int
    bodies: tuple[str, ...]
    native_difference: Optional[float] = None
    body_difference: Optional[float] = None
    native_calls: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.nodes} attnhub::FlashAttention node(s), opset {self.opset}, IR {self.ir_version}, {len(self.bodies)} function bodies"
        ]
        for label, difference in (("with attnhub's library", self.native_difference), ("with ONNX Runtime alone", self.body_difference)):
            lines.append(f"  {label}: " + ("not verified" if difference is None else f"largest difference to torch {difference:.3g}"))
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def export(
    model: Union[torch.nn.Module, Callable[..., Any]],
    args: Union[Tensor, Sequence[Any]],
    path: Union[str, os.PathLike[str]],
    *,
    kwargs: Optional[Mapping[str, Any]] = None,
    dynamic_shapes: Any = None,
    opset: int = 18,
    input_names: Optional[Sequence[str]] = None,
    output_names: Optional[Sequence[str]] = None,
    verify: bool = True,
) -> ExportReport:
    """Write a model as ONNX; every attnhub attention in it becomes one node that carries its own function body.

    model: a module in eval mode that uses `attnhub.attention` (after `attnhub.patch(model)`, say), or a function.
    args, kwargs: example inputs. dynamic_shapes: as in `torch.export.export`. opset: 18, 21 or 22.
    verify: run the file in ONNX Runtime on the example inputs, with and without attnhub's library, and compare with torch.

    Raises `UnsupportedInOnnx` for what the node cannot express, ValueError for another opset or a model without attnhub's
    attention, `ExportMismatch` if verification fails (the file stays, for a look at it). Weights beyond 1.5 GB go to a file
    beside it.
    """
    if opset not in OPSETS:
        raise ValueError(
            f"opset={opset}: allowed are {', '.join(map(str, OPSETS))}, which are tested. At 23 torch's exporter fuses rotary embeddings into "
            "an operator that fails in ONNX Runtime for batches above 1, and at 26 it writes broken models"
        )
    module = model if isinstance(model, torch.nn.Module) else _Function(model).eval()
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    program = _trace(module, args, kwargs, dynamic_shapes, opset, input_names, output_names)
    forms = _finish(program.model, opset)
    if not forms:
        raise ValueError(
            "the model has no attnhub attention: call attnhub.patch(model) first, or attnhub.attention inside it. Nothing was written"
        )
    target = os.fspath(path)
    program.save(target)
    bodies = tuple(sorted({form.overload() for form in forms}))
    report = ExportReport(target, len(forms), opset, IR_VERSION, bodies)
    return _verify(report, module, args, kwargs, _feeds(program, args, kwargs)) if verify else report


class _Function(torch.nn.Module):
    """A plain function, as torch.export wants it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def _trace(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, opset: int,
    input_names: Optional[Sequence[str]], output_names: Optional[Sequence[str]],
) -> torch.onnx.ONNXProgram:  # fmt: skip
    table: dict[Callable[..., Any], Callable[..., Any]] = {ops.forward_op: translate_forward}
    try:
        # ONNX has no gradients; under no_grad no attention asks for the lse that only a backward would need.
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                _copies(args),
                kwargs=_copies(kwargs),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
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


def _finish(model: Any, opset: int) -> list[Form]:
    """Give every node its final outputs, its overload and its body. Changes the model; the forms found, one per node."""
    forms = []
    for node in itertools.chain(model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values())):
        if (node.domain, node.op_type) != (DOMAIN, OP):
            continue
        _drop_unused_outputs(node)
        inputs = frozenset(name for name, value in zip(INPUTS, node.inputs) if value is not None)
        outputs = frozenset(name for name, value in zip(OUTPUTS, node.outputs) if value.name)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        form = Form.of_node(attributes, inputs, outputs, "attn_mask" in inputs and _is_bool(node.inputs[INPUTS.index("attn_mask")]))
        node.overload = form.overload()
        forms.append(form)
    for form in set(forms):
        function = onnx_ir.serde.deserialize_function(function_body(form, opset))
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
    model.ir_version = IR_VERSION
    return forms


def _is_bool(value: Any) -> bool:
    if value.dtype is None:
        raise RuntimeError(f"the exporter left the type of attn_mask {value.name!r} open; the node's function body depends on it")
    return bool(value.dtype == onnx_ir.DataType.BOOL)


def _drop_unused_outputs(node: Any) -> None:
    """Outputs that nothing reads: the last ones go, one in between gets the empty name, which means absent."""
    used = [bool(value.uses()) or value.is_graph_output() for value in node.outputs]
    node.resize_outputs(max((i for i, use in enumerate(used) if use), default=0) + 1)
    for value, use in list(zip(node.outputs, used))[1:]:
        if not use:
            value.name = ""


def _feeds(program: torch.onnx.ONNXProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The example inputs by the names that they have in the file. Numbers, flags and None are constants there, not inputs."""
    assert program.exported_program is not None
    specs = [s.arg for s in program.exported_program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    leaves = [leaf for spec, leaf in zip(specs, pytree.tree_leaves((args, kwargs))) if not isinstance(spec, ConstantArgument)]
    return {str(value.name): torch.as_tensor(leaf) for value, leaf in zip(program.model.graph.inputs, leaves)}


def _verify(
    report: ExportReport, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: dict[str, Tensor]
) -> ExportReport:
    with torch.no_grad():
        expected = _tensors(module(*_copies(args), **_copies(kwargs)))
    notes: list[str] = []
    native: Optional[float] = None
    calls = 0
    try:
        library_path()
    except FileNotFoundError as error:
        notes.append(str(error))
    else:
        before = native_calls()
        native = _compare(report, inputs, expected, register(), "with attnhub's library", notes)
        calls = native_calls() - before
    body = _compare(report, inputs, expected, onnxruntime.SessionOptions(), "with ONNX Runtime alone", notes)
    return ExportReport(report.path, report.nodes, report.opset, report.ir_version, report.bodies, native, body, calls, tuple(notes))


def _copies(tree: Any) -> Any:
    """Arguments that a model may change in place."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), tree)


def _tensors(tree: Any) -> list[Tensor]:
    """The leaves of a nest of results as tensors, None left out."""
    return [
        leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)
        for leaf in pytree.tree_leaves(tree)
        if leaf is not None and not isinstance(leaf, str)
    ]


def _compare(
    report: ExportReport,
    inputs: Mapping[str, Tensor],
    expected: list[Tensor],
    options: onnxruntime.SessionOptions,
    where: str,
    notes: list[str],
) -> Optional[float]:
    """Largest difference of the file's outputs to the expected ones; None with a note where ONNX Runtime cannot run the model."""
    try:
        session = onnxruntime.InferenceSession(report.path, options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        notes.append(f"not verified {where}: {error}")
        return None
    found = run_all(session, inputs)
    if len(found) != len(expected):
        raise ExportMismatch(f"{report.path} {where}: {len(found)} outputs, the torch model has {len(expected)}")
    largest = 0.0
    for output, got, want in zip(session.get_outputs(), found, expected):
        if got.shape != want.shape:
            raise ExportMismatch(f"{report.path} {where}: output {output.name} has shape {tuple(got.shape)}, torch's {tuple(want.shape)}")
        if not want.numel():
            continue
        exact, close = want.detach().cpu().double(), got.double()
        # Equal infinities (the lse of rows without keys) and equal NaNs do not differ.
        same = (close == exact) | (close.isnan() & exact.isnan())
        difference = float(torch.where(same, 0.0, (close - exact).abs()).max())
        finite = exact[exact.isfinite()].abs()
        limit = _tolerance(expected) * max(1.0, float(finite.max()) if finite.numel() else 1.0)
        if not difference <= limit:
            raise ExportMismatch(
                f"{report.path} {where}: output {output.name} differs from torch by {difference:.3g}, allowed is {limit:.3g}"
            )
        largest = max(largest, difference)
    return largest


def _tolerance(outputs: list[Tensor]) -> float:
    return max((_TOLERANCE.get(tensor.dtype, 1e-3) for tensor in outputs), default=1e-3)
