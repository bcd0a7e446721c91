"""ONNX: export models with one ``attnhub::FlashAttention`` node per attention, and run them by attnhub's native kernel.

A thin facade: the onnx backend, found by entry point, does the work. `register` and `library_path` need neither torch nor
onnx, so that a serving image holds onnxruntime and attnhub only. docs/onnx.md specifies the node.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

from attnhub.registry import BUILTIN, GROUP, entry_points, load

if TYPE_CHECKING:
    import onnxruntime
    import torch

    from attnhub.backends.onnx import OnnxBackend
    from attnhub.backends.onnx.export import ExportReport
    from attnhub.backends.onnx.inspect import Problem
    from attnhub.backends.onnx.rewrite.convert import ConversionReport

__all__ = ["check", "convert", "export", "library_path", "lower", "native_calls", "register"]


@functools.lru_cache(maxsize=1)
def _backend() -> OnnxBackend:
    """The onnx backend alone: asking the registry for it would probe every backend, and drivers with them."""
    target = next(target for name, target, _ in entry_points(GROUP, BUILTIN) if name == "onnx")
    backend: OnnxBackend = load(target)
    return backend


def export(
    model: Union[torch.nn.Module, Callable[..., Any]],
    inputs: Union[torch.Tensor, Sequence[Any], Mapping[str, Any]],
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
    """Write a model as ONNX; every attnhub attention in it becomes one node that carries its own function body.

    model: a module in eval mode that uses `attnhub.attention` (after `attnhub.patch(model)`, say), or a function.
    inputs, kwargs: example inputs, positional or by name. dynamic_shapes: as in `torch.export.export`. opset: 18, 21 or 22.
    kv_cache: a transformers decoder gets ``past_key_values.N.key/value`` as inputs and ``present.N.key/value`` as outputs, and
        dynamic_shapes of its own. An encoder-decoder becomes two files: ``<stem>.encoder.onnx`` gives ``cross.N.key/value``, which the
        decoder at ``path`` takes.
    fp16: export a float16 copy of the model; its floating inputs and outputs are float16 then.
    report: run the file in ONNX Runtime, with and without attnhub's library, on the example and on fresh random inputs of other sizes,
        and compare with torch.

    Weights beyond 1.5 GB go to a file beside the model. Returns a report: nodes, opset, IR version, bodies, largest differences. Raises
    ValueError for what the node cannot express (the message names the feature and the fix), for another opset, and for a model
    without attnhub's attention; RuntimeError if the file and torch differ.
    """
    return _backend().export(
        model,
        inputs,
        path,
        kwargs=kwargs,
        dynamic_shapes=dynamic_shapes,
        opset=opset,
        kv_cache=kv_cache,
        fp16=fp16,
        input_names=input_names,
        output_names=output_names,
        report=report,
    )


def convert(
    source: Union[str, os.PathLike[str]],
    target: Union[str, os.PathLike[str]],
    *,
    unpadded: bool = False,
    inputs: Optional[Mapping[str, Any]] = None,
    verify: bool = True,
) -> ConversionReport:
    """Rewrite the attention of an ONNX file into attnhub's nodes: written out as MatMul, Softmax, MatMul (torch's exporters, optimum),
    ai.onnx Attention, com.microsoft MultiHeadAttention and GroupQueryAttention.

    unpadded: all sequences of a batch are always as long as ``total_sequence_length``; without that promise a GroupQueryAttention is
        rewritten only where the batch is 1. inputs: name -> array, for the check; made up by default.
    verify: run both files in ONNX Runtime and compare.

    The report lists what was rewritten, and each node that looked like attention and was left, with the reason; nothing is rewritten in
    part. Nothing is written if nothing is recognised. Raises ValueError for what is no ONNX model, RuntimeError if the files
    differ (and nothing is written then).
    """
    return _backend().convert(source, target, unpadded=unpadded, inputs=inputs, verify=verify)


def lower(
    source: Union[str, os.PathLike[str]],
    target: Union[str, os.PathLike[str]],
    *,
    to: str = "ai.onnx",
    inputs: Optional[Mapping[str, Any]] = None,
    verify: bool = True,
) -> ConversionReport:
    """Rewrite attnhub's nodes into operators of a runtime: ``to="ai.onnx"`` (Attention; the file then has operator set 23 or newer) or
    ``to="com.microsoft"`` (GroupQueryAttention where it is one, else MultiHeadAttention).

    Nothing is written if a node cannot be expressed (sinks, lse); the report says which and why. inputs, verify and errors as in `convert`.
    """
    return _backend().lower(source, target, to=to, inputs=inputs, verify=verify)


def check(path: Union[str, os.PathLike[str]]) -> tuple[Problem, ...]:
    """What is wrong with attnhub's nodes in a file: node and reason, empty if nothing is.

    Looks at what runtimes pass over too: attributes and versions that are not known, bodies that are missing, weights that are cut off.
    Raises FileNotFoundError.
    """
    return _backend().check_file(path)


def register(
    session_options: Optional[onnxruntime.SessionOptions] = None, *, backend: Optional[str] = None, device: Optional[str] = None
) -> onnxruntime.SessionOptions:
    """Make sessions with these options run attnhub's nodes by the native kernel. Returns the options, new ones for None.

    backend: instead of the native kernel, `attnhub.attention(backend=...)` computes every node, on views of ONNX Runtime's memory: a name, a
    list "a,b", or "auto". It needs torch, and a Python process. device: where the tensors are moved for it and back, "cuda" for example.

    Registering the same options again changes nothing. Raises ImportError without onnxruntime, RuntimeError for one older
    than 1.20, FileNotFoundError if the library was not built, ValueError for an unknown backend or options that have another one.
    """
    return _backend().register(session_options, backend=backend, device=device)


def library_path() -> str:
    """Path of the shared library, for `SessionOptions.register_custom_ops_library` and the C, C++, C# or Java interfaces.

    Raises FileNotFoundError if this installation was made without a C++ compiler.
    """
    return _backend().library_path()


def native_calls() -> int:
    """How many times the native kernel has run in this process: the proof that a session really uses it."""
    return _backend().native_calls()
