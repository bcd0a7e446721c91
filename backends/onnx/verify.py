"""Whether a file computes what its torch model does: ONNX Runtime with and without the library, on the example and on fresh inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import onnxruntime
import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from attnhub.backends.onnx.library import library_path, native_calls, register
from attnhub.backends.onnx.session import run_all

#: Largest difference to torch that passes, relative to the largest output, by the widest rounding in the model.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class ExportMismatch(RuntimeError):  # noqa: N818 - it is raised to users, who read it as a sentence
    """The written file does not compute what the torch model computes."""


@dataclass(frozen=True)
class Trial:
    """One set of inputs: the arguments of the torch model. ``example``: those that were exported with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    example: bool = False


@dataclass(frozen=True)
class Verification:
    """See the fields of the same names of `attnhub.backends.onnx.export.ExportReport`."""

    native_difference: Optional[float]
    body_difference: Optional[float]
    native_calls: int
    verified: tuple[str, ...]
    notes: tuple[str, ...]


def verify(path: str, program: torch.onnx.ONNXProgram, module: torch.nn.Module, trials: Sequence[Trial]) -> Verification:
    """Run the file on every trial both ways. Raises `ExportMismatch` with the output, the way and the sizes."""
    notes: list[str] = []
    native: Optional[onnxruntime.InferenceSession] = None
    try:
        library_path()
    except FileNotFoundError as error:
        notes.append(str(error))
    else:
        native = _session(path, register(), "with attnhub's library", notes)
    plain = _session(path, onnxruntime.SessionOptions(), "with ONNX Runtime alone", notes)
    verified: list[str] = []
    worst: dict[str, float] = {}
    calls = 0
    for trial in trials:
        feeds = feeds_of(program, trial.args, trial.kwargs)
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in feeds.items())
        try:
            with torch.no_grad():
                expected = _tensors(module(*copies(trial.args), **copies(trial.kwargs)))
        except Exception as error:
            if trial.example:
                raise
            notes.append(f"not verified at {sizes}: the torch model raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        verified.append(sizes)
        for label, session in (("with attnhub's library", native), ("with ONNX Runtime alone", plain)):
            if session is None:
                continue
            before = native_calls() if session is native else 0
            difference = _compare(f"{path} {label} at {sizes}", session, feeds, expected)
            calls += native_calls() - before if session is native else 0
            worst[label] = max(worst.get(label, 0.0), difference)
    return Verification(worst.get("with attnhub's library"), worst.get("with ONNX Runtime alone"), calls, tuple(verified), tuple(notes))


def _session(path: str, options: onnxruntime.SessionOptions, label: str, notes: list[str]) -> Optional[onnxruntime.InferenceSession]:
    """None with a note where ONNX Runtime lacks an operator of the model for its dtypes (bfloat16 products on CPU)."""
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        notes.append(f"not verified {label}: {error}")
        return None


def feeds_of(program: torch.onnx.ONNXProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs by the names that they have in the file. Numbers, flags and None are constants there, not inputs."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    given = [leaf for leaf, spec in zip(leaves, _user_inputs(program)) if not isinstance(spec, ConstantArgument)]
    return {str(value.name): torch.as_tensor(leaf) for value, leaf in zip(program.model.graph.inputs, given)}


def _user_inputs(program: torch.onnx.ONNXProgram) -> list[Any]:
    assert program.exported_program is not None
    return [s.arg for s in program.exported_program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]


# -- fresh inputs ----------------------------------------------------------------------------------------------------------


def fresh(program: torch.onnx.ONNXProgram, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> Trial:
    """Inputs like the example's with other values, every free size larger, and sizes that depend on it following.

    Integers and non-finite floats are drawn from the example's own elements: what lengths, ids and masks may be, only it says.
    """
    assert program.exported_program is not None
    exported = program.exported_program
    placeholders = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    larger = _larger_sizes(exported)
    generator = torch.Generator().manual_seed(seed)
    leaves, tree = pytree.tree_flatten((args, dict(kwargs)))
    made = []
    for leaf, spec in zip(leaves, _user_inputs(program)):
        value = placeholders.get(getattr(spec, "name", ""))
        if isinstance(leaf, Tensor) and isinstance(value, Tensor):
            made.append(_draw(leaf, [larger(size) for size in value.shape], generator))
        else:
            made.append(leaf)
    new_args, new_kwargs = pytree.tree_unflatten(made, tree)
    return Trial(tuple(new_args), new_kwargs)


def _larger_sizes(exported: torch.export.ExportedProgram) -> Callable[[Any], int]:
    """A size of the program, possibly symbolic -> the number that it is to be."""
    chosen: dict[Any, int] = {}

    def of_symbol(symbol: Any, hint: int) -> int:
        if symbol not in chosen:
            limits = exported.range_constraints.get(symbol)
            # Different steps, so that sizes which only happen to agree in the example do not go on agreeing.
            wanted = hint + 3 + 2 * len(chosen)
            chosen[symbol] = wanted if limits is None or limits.upper >= wanted else int(limits.upper)
        return chosen[symbol]

    def of_size(size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        env = size.node.shape_env
        hints = getattr(env, "backed_var_to_val", None) or env.var_to_val
        return int(expression.xreplace({symbol: of_symbol(symbol, int(hints.get(symbol, 2))) for symbol in expression.free_symbols}))

    return of_size


def _draw(like: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    source = like.detach().cpu()
    if not source.numel():
        return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
    if source.is_floating_point() and bool(source.isfinite().all()):
        exact = source.double()
        spread = float(exact.std()) if source.numel() > 1 else 1.0
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * spread + exact.mean()
        # What has a sign only (slopes, say) keeps it.
        values = values.abs() if bool((exact >= 0).all()) else values
    else:
        values = source.flatten()[torch.randint(source.numel(), tuple(shape), generator=generator)]
    return values.to(like.dtype).to(like.device)


# -- comparing -------------------------------------------------------------------------------------------------------------


def copies(tree: Any) -> Any:
    """Arguments that a model may change in place."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), tree)


def _tensors(tree: Any) -> list[Tensor]:
    """The leaves of a nest of results as tensors, None left out."""
    return [
        leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)
        for leaf in pytree.tree_leaves(tree)
        if leaf is not None and not isinstance(leaf, str)
    ]


def _compare(where: str, session: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor], expected: list[Tensor]) -> float:
    """Largest difference of the file's outputs to the expected ones."""
    kept = {value.name for value in session.get_inputs()}
    found = run_all(session, {name: tensor for name, tensor in feeds.items() if name in kept})
    if len(found) != len(expected):
        raise ExportMismatch(f"{where}: {len(found)} outputs, the torch model has {len(expected)}")
    largest = 0.0
    for output, got, want in zip(session.get_outputs(), found, expected):
        if got.shape != want.shape:
            raise ExportMismatch(f"{where}: output {output.name} has shape {tuple(got.shape)}, torch's {tuple(want.shape)}")
        if not want.numel():
            continue
        exact, close = want.detach().cpu().double(), got.double()
        # Equal infinities (the lse of rows without keys) and equal NaNs do not differ.
        same = (close == exact) | (close.isnan() & exact.isnan())
        difference = float(torch.where(same, 0.0, (close - exact).abs()).max())
        finite = exact[exact.isfinite()].abs()
        limit = _tolerance(expected) * max(1.0, float(finite.max()) if finite.numel() else 1.0)
        if not difference <= limit:
            raise ExportMismatch(f"{where}: output {output.name} differs from torch by {difference:.3g}, allowed is {limit:.3g}")
        largest = max(largest, difference)
    return largest


def _tolerance(outputs: list[Tensor]) -> float:
    return max((_TOLERANCE.get(tensor.dtype, 1e-3) for tensor in outputs), default=1e-3)
