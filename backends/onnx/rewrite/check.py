"""Two files on the same inputs in ONNX Runtime: the numeric check of `convert` and `lower`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import onnx
import onnxruntime

from attnhub.backends.onnx.library import library_path, native_calls, register

#: Largest difference that passes, relative to the largest output, by the coarsest output type.
_TOLERANCE = {"float16": 2e-2, "float32": 1e-4}
_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int64)": np.int64,
    "tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip


class ConversionMismatch(RuntimeError):  # noqa: N818 - it is raised to users, who read it as a sentence
    """The rewritten file does not compute what its source does. Nothing was written."""


@dataclass(frozen=True)
class Checked:
    """native_difference, body_difference: largest absolute difference of any output to the source's, with and without attnhub's library.

    None where that way was not run; ``notes`` says why. sizes: what the inputs were. undefined: elements that are NaN in the source.
    """

    native_difference: Optional[float] = None
    body_difference: Optional[float] = None
    native_calls: int = 0
    sizes: tuple[str, ...] = ()
    undefined: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for label, difference in (("with attnhub's library", self.native_difference), ("with ONNX Runtime alone", self.body_difference)):
            lines.append(f"  {label}: " + ("not checked" if difference is None else f"largest difference to the source {difference:.3g}"))
        lines.extend(f"  checked at {sizes}" for sizes in self.sizes)
        if self.undefined:
            lines.append(f"  {self.undefined} elements are NaN in the source and were not compared")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def check(source: str, made: str, inputs: Optional[Mapping[str, Any]]) -> Checked:
    """Compare at two sets of sizes, or on the inputs given. Raises `ConversionMismatch`."""
    notes: list[str] = []
    try:
        original = _open(source, _has_library())
    except Exception as error:
        return Checked(
            notes=(f"not checked, ONNX Runtime does not run the source: {(str(error).splitlines() or [type(error).__name__])[0]}",)
        )
    names = [value.name for value in (*original.get_inputs(), *original.get_outputs())]
    ways = {"with ONNX Runtime alone": _open_made(made, False)}
    if _has_library():
        ways["with attnhub's library"] = _open_made(made, True)
    for label, session in ways.items():
        if names != [value.name for value in (*session.get_inputs(), *session.get_outputs())]:
            raise ConversionMismatch(f"{label}: inputs and outputs are no longer {', '.join(names)}. Nothing was written")
    feeds, wants = _runs(original, source, inputs, notes)
    worst: dict[str, float] = {}
    calls = undefined = 0
    for feed, want in zip(feeds, wants):
        undefined += sum(int(np.isnan(w).sum()) for w in want if np.issubdtype(w.dtype, np.floating))
        for label, session in ways.items():
            before = native_calls() if _has_library() else 0
            try:
                found = session.run(None, feed)
            except Exception as error:
                at = ", ".join(f"{name} {list(value.shape)}" for name, value in feed.items())
                raise ConversionMismatch(f"{label}: the source runs at {at} and the rewritten file does not: {error}. Nothing was written") from error
            calls += native_calls() - before if _has_library() else 0
            worst[label] = max(worst.get(label, 0.0), _compare(label, session, found, want))
    sizes = tuple(", ".join(f"{name} {list(value.shape)}" for name, value in feed.items()) for feed in feeds)
    return Checked(worst.get("with attnhub's library"), worst.get("with ONNX Runtime alone"), calls, sizes, undefined, tuple(notes))


def _has_library() -> bool:
    try:
        library_path()
    except FileNotFoundError:
        return False
    return True


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def _open(path: str, native: bool) -> onnxruntime.InferenceSession:
    options = register(_quiet()) if native else _quiet()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _open_made(path: str, native: bool) -> onnxruntime.InferenceSession:
    try:
        return _open(path, native)
    except Exception as error:
        label = "with attnhub's library" if native else "with ONNX Runtime alone"
        raise ConversionMismatch(f"{label}: the source loads and the rewritten file does not: {error}. Nothing was written") from error


def _runs(
    session: onnxruntime.InferenceSession, source: str, inputs: Optional[Mapping[str, Any]], notes: list[str]
) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Inputs that the source takes, and what it makes of them."""
    if inputs is not None:
        feed = {name: np.asarray(value) for name, value in inputs.items()}
        try:
            return [feed], [session.run(None, feed)]
        except Exception as error:
            raise ValueError(f"inputs: {source} does not run on them: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    limits = _index_limits(source)
    feeds: list[dict[str, Any]] = []
    wants: list[list[Any]] = []
    problem = ""
    for trial in _TRIALS:
        # The last resort: what is free is as long as the same axis of another input.
        if trial == "fixed" and feeds:
            break
        sizes = _Sizes(trial, session.get_inputs())
        try:
            feed = {value.name: _made(value, sizes, limits) for value in session.get_inputs()}
            want = session.run(None, feed)
        except Exception as error:
            problem = problem or (str(error).splitlines() or [type(error).__name__])[0]
            continue
        shapes = {name: value.shape for name, value in feed.items()}
        if all(shapes != {name: value.shape for name, value in other.items()} for other in feeds):
            feeds.append(feed)
            wants.append(want)
    if not feeds:
        notes.append(f"not checked: the source does not run on made-up inputs ({problem}); pass inputs of your own")
    return feeds, wants


#: What the sizes that a source leaves free are set to. Not every source takes every one of these.
_TRIALS = ("small", "larger", "one sequence", "one token", "no past", "fixed")


class _Sizes:
    """Names of free sizes -> numbers. ``past + length`` and the like follow from their parts."""

    def __init__(self, trial: str, inputs: Sequence[Any]) -> None:
        self._trial = trial
        self._known: dict[str, int] = {}
        self._fixed = {axis: size for value in inputs for axis, size in enumerate(value.shape) if isinstance(size, int)}

    def __call__(self, name: Any, axis: int) -> int:
        if isinstance(name, int):
            return name
        if name is None or self._trial == "fixed":
            return self._fixed.get(axis, 4)
        if name == "total_sequence_length" and "past_sequence_length" in self._known:
            return self("past_sequence_length + sequence_length", axis)
        if not re.fullmatch(r"\w+", name):
            return _arithmetic(name, lambda part: self(part, axis))
        if name not in self._known:
            self._known[name] = self._chosen(name.lower(), axis)
        return self._known[name]

    def _chosen(self, name: str, axis: int) -> int:
        batch = "batch" in name or (axis == 0 and not self._known)
        past = "past" in name
        if (self._trial == "one sequence" and batch) or (self._trial == "one token" and not batch and not past):
            return 1
        if self._trial == "no past" and past:
            return 0
        larger = self._trial == "larger"
        return 2 + larger if batch else 5 + len(self._known) + 4 * larger


def _arithmetic(text: str, size: Callable[[str], int]) -> int:
    """The value of an expression of names, numbers, +, -, * and //."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            operations = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right, ast.FloorDiv: left // right if right else 0}
            return operations[type(node.op)]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return size(node.id)
        raise ValueError(f"size {text!r} is not understood")

    return value(ast.parse(text, mode="eval").body)


def _made(value: Any, sizes: _Sizes, limits: Mapping[str, int]) -> Any:
    """A random input. Masks keep the first keys, ids stay in their tables."""
    generator = np.random.default_rng(len(value.name))
    shape = tuple(sizes(size, axis) for axis, size in enumerate(value.shape))
    dtype = np.dtype(_TYPES[value.type])
    name = value.name.lower()
    if name == "total_sequence_length":
        return np.asarray(sizes("total_sequence_length", 0)).reshape(shape).astype(dtype)
    if name == "seqlens_k":
        return np.full(shape, sizes("total_sequence_length", 0) - 1, dtype)
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    if "mask" in name and len(shape) == 2 and dtype != np.bool_:
        made = np.ones(shape, dtype)
        made[0, shape[1] - shape[1] // 3 :] = 0
        return made
    if dtype == np.bool_:
        kept = generator.random(shape) > 0.3
        if kept.ndim:
            kept[..., 0] = True
        return kept
    if "seq" in name and len(shape) == 1:
        return generator.integers(1, 6, shape).astype(dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    return generator.integers(0, limits.get(value.name, 2), shape).astype(dtype)


def _index_limits(source: str) -> dict[str, int]:
    """Inputs that index a table -> the table's length."""
    graph = onnx.load(source, load_external_data=False).graph
    lengths = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) > 1}
    names = {value.name: value.name for value in graph.input}
    for node in graph.node:
        if node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze") and node.input and node.input[0] in names:
            names[node.output[0]] = names[node.input[0]]
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in lengths and node.input[1] in names:
            name = names[node.input[1]]
            found[name] = min(found.get(name, 1 << 40), lengths[node.input[0]])
    return found


def _compare(label: str, session: onnxruntime.InferenceSession, found: list[Any], want: list[Any]) -> float:
    largest = 0.0
    for output, got, exact in zip(session.get_outputs(), found, want):
        if got.shape != exact.shape:
            raise ConversionMismatch(
                f"{label}: output {output.name} has shape {got.shape}, the source's {exact.shape}. Nothing was written"
            )
        if not exact.size or not np.issubdtype(exact.dtype, np.floating):
            if not np.array_equal(got, exact):
                raise ConversionMismatch(f"{label}: output {output.name} differs from the source. Nothing was written")
            continue
        defined = ~np.isnan(exact)
        close, true = got[defined].astype(np.float64), exact[defined].astype(np.float64)
        if not close.size:
            continue
        same = close == true
        difference = float(np.where(same, 0.0, np.abs(np.where(same, 0.0, close) - np.where(same, 0.0, true))).max())
        finite = np.abs(true[np.isfinite(true)])
        limit = _TOLERANCE.get(str(exact.dtype), 1e-4) * max(1.0, float(finite.max()) if finite.size else 1.0)
        if not difference <= limit:
            raise ConversionMismatch(
                f"{label}: output {output.name} differs from the source by {difference:.3g}, allowed is {limit:.3g}. Nothing was written"
            )
        largest = max(largest, difference)
    return largest
