"""One model class, tiny and with random weights, by eager attention and by attnhub: what `attnhub coverage` asks of its processes.

``python -m attnhub.integrations.huggingface.probe`` answers a line of JSON (the name of a class; null: the
names of all) by one (the finding) until its input ends.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any, Optional

import torch
from torch import Tensor, nn

import attnhub
from attnhub.bench.workers import answer
from attnhub.cli.offline import forbid_hub
from attnhub.integrations.huggingface.inputs import VARIANTS, tiny_inputs
from attnhub.integrations.huggingface.media import BATCH, LENGTH, padding
from attnhub.integrations.huggingface.modules import find_attention
from attnhub.integrations.huggingface.own import OWN
from attnhub.integrations.huggingface.tiny import WAYS, TooLargeError, tiny_model
from attnhub.patching import PatchError

#: A process that needs more address space than this fails at the class that does.
MEMORY = 12 << 30
#: Largest difference from eager attention, relative to the largest output where that is above 1.
TOLERANCE = 2e-5
#: The same in fp64, for models that make more of rounding than that in fp32. Some of their operations stay in fp32.
TOLERANCE_FP64 = 1e-6
_LONG = 160


def probe(name: str) -> dict[str, Any]:
    """What was found of a class of transformers: ``state`` in a word or two, ``reason`` says why, the rest are numbers.

    calls: attention calls that attnhub served. ran, served: attention modules that ran, and those of them that attnhub served.
    difference: from eager attention, in valid positions, the largest of no, left and right padding. reasons: of modules that ran unserved.
    """
    import transformers

    cls = getattr(transformers, name)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return {"state": "no model"}
    if getattr(cls, "config_class", None) is None:
        return {"state": "not run", "reason": "it has no configuration class of its own"}
    if cls.forward is nn.Module.forward:
        return {"state": "not run", "reason": "it has no forward pass"}
    try:
        model, way, variant, eager = _first_that_runs(cls)
    except MemoryError:
        return {"state": "not run", "reason": "its tiny configuration needs too much memory"}
    except Exception as error:
        return {"state": "not run", "reason": f"tiny: {_line(error)}"}
    try:
        return _compare(model, eager, variant, way)
    except Exception as error:
        return {"state": "fails", "reason": _line(error)}


def _compare(model: Any, eager: dict[str, list[Tensor]], variant: tuple[str, ...], way: str) -> dict[str, Any]:
    try:
        report = attnhub.patch(model)
    except PatchError:
        return {"state": "no attention"}
    ran: set[nn.Module] = set()
    modules = {id(found.module): found.module for found in find_attention(model)}
    modules |= {id(m): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    hooks = [m.register_forward_hook(lambda module, *_: ran.add(module)) for m in modules.values()]
    ours = {pad: _run(model, pad, variant) for pad in eager}
    largest, size = _largest(ours, eager)
    for hook in hooks:
        hook.remove()
    names = {id(m): name for name, m in model.named_modules()}
    reports = {m.name: m for m in report.modules}
    kept = [reports[names[id(m)]] for m in ran if names[id(m)] in reports]
    unserved = [m for m in kept if not m.calls or OWN in m.backends]
    found = {
        "calls": report.calls,
        "modules": len(report.modules),
        "ran": len(ran),
        "served": len(ran) - len(unserved),
        "difference": largest,
        "reasons": sorted({m.reason or (f"some of the softmaxes of {m.kind} are" if m.calls else f"{m.kind} made") + " no call of attention" for m in unserved}),
        "own": sorted({type(m).__name__ for m in ran if hasattr(type(m), "_attnhub_trials")} - {m.kind for m in unserved}),
    }
    if not ran:
        return {"state": "not run", "reason": "none of its attention modules ran", **found}
    if largest > TOLERANCE * size:
        for other in ("sdpa", "default"):
            # Eager attention adds a boolean mask as numbers, for one.
            theirs = _by_another(type(model), other, way, variant, tuple(eager))
            if theirs is not None and (gap := _largest(ours, theirs))[0] <= TOLERANCE * gap[1]:
                found |= {"difference": gap[0], "note": f"compared with {other} attention, from which eager attention is {largest:.1e} away"}
                return {"state": "routed" if not unserved else "partly", **found}
        wide = _in_fp64(type(model), way, variant, tuple(eager))
        if wide is not None and wide[0] <= TOLERANCE_FP64 * wide[1]:
            # Some make much of rounding: where deformable attention samples beside an edge, where one value is normalised.
            found |= {"difference": wide[0], "note": f"compared in fp64 with {wide[2]} attention; in fp32 it is {largest:.1e} from eager attention"}
            return {"state": "routed" if not unserved else "partly", **found}
        return {"state": "differs", "reason": f"{largest:.1e} from eager attention, of values up to {size:.1f}", **found}
    return {"state": "routed" if not unserved else "partly" if report.calls else "not routed", **found}


def _largest(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]]) -> tuple[float, float]:
    """The largest difference of valid outputs, and the largest of the outputs it was found in where that is above 1."""
    worst = (0.0, 1.0)
    for pad, outputs in theirs.items():
        for a, b in zip(ours[pad], outputs):
            rows = _valid(b, pad)
            if rows is None or not b.numel():
                continue
            # Detectors fill what stands for no text with -inf.
            gap = float((a - b).masked_fill(a == b, 0.0)[rows].nan_to_num(torch.inf).abs().max())
            size = float(b.nan_to_num(0.0, 0.0, 0.0)[rows].abs().max())
            worst = max(worst, (gap, max(1.0, size)), key=lambda pair: pair[0] / pair[1])
    return worst


def _by_another(cls: Any, implementation: str, way: str, variant: tuple[str, ...], paddings: tuple[str, ...]) -> Optional[dict[str, list[Tensor]]]:
    """The outputs by transformers' sdpa attention, where the class has it, or by what transformers chooses for each part of the model."""
    try:
        model = tiny_model(cls, implementation, way)
        return {pad: _run(model, pad, variant) for pad in paddings}
    except Exception:
        return None


def _in_fp64(cls: Any, way: str, variant: tuple[str, ...], paddings: tuple[str, ...]) -> Optional[tuple[float, float, str]]:
    """`_largest` of the model in fp64, and from what: eager attention, or what transformers chooses. None if it does not run so."""
    found: list[tuple[float, float, str]] = []
    ours: dict[str, list[Tensor]] = {}
    try:
        for name in ("eager", "default"):
            model = tiny_model(cls, name, way).double()
            theirs = {pad: _run(model, pad, variant) for pad in paddings}
            if not ours:
                attnhub.patch(model)
                ours = {pad: _run(model, pad, variant) for pad in paddings}
            found.append((*_largest(ours, theirs), name))
    except Exception:
        # What ran before counts.
        pass
    return min(found, key=lambda pair: pair[0] / pair[1], default=None)


def _first_that_runs(cls: Any) -> tuple[Any, str, tuple[str, ...], dict[str, list[Tensor]]]:
    """The first tiny model of the class that runs, its way, the variant of its inputs, and its outputs by padding. Raises what the last one raised, of small enough ones."""
    last: Optional[Exception] = None
    for way in WAYS:
        try:
            model = tiny_model(cls, way=way)
            return (model, way, *_first_run(model))
        except TooLargeError as error:
            last = last or error
        except Exception as error:
            last = error
    assert last is not None
    raise last


def _first_run(model: Any) -> tuple[tuple[str, ...], dict[str, list[Tensor]]]:
    """The first variant of inputs that the model runs with, padded too, and its outputs. Raises what the plain one raised."""
    plain: Optional[Exception] = None
    for variant in VARIANTS:
        try:
            paddings = ("none", "left", "right") if "attention_mask" in tiny_inputs(model, "none", variant) else ("none",)
            return variant, {pad: _run(model, pad, variant) for pad in paddings}
        except Exception as error:
            plain = error if plain is None or not variant else plain
    assert plain is not None
    raise plain


def _run(model: Any, pad: str, variant: tuple[str, ...]) -> list[Tensor]:
    """The floating outputs of a forward pass, in order."""
    torch.manual_seed(11)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    made = tiny_inputs(model, pad, variant)
    if dtype != torch.float32:
        made = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in made.items()}
    with torch.no_grad():
        out = model(**made)
    found = list(_tensors(out))
    if not found:
        raise ValueError("its forward pass gives no floating tensor")
    if any(bool(torch.isnan(t).any()) or not bool(torch.isfinite(t).any()) for t in found if t.numel()) and pad == "none":
        raise ValueError("the eager outputs of its tiny model are no numbers")
    return found


def _tensors(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree if tree.dtype == torch.float64 else tree.float()
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _tensors(part)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)


def _valid(out: Tensor, pad: str) -> Optional[Any]:
    """Which part of an output is compared: with padding only what belongs to tokens, and of that only tokens that are none."""
    if pad == "none":
        return ...
    if out.ndim >= 2 and out.shape[:2] == (BATCH, LENGTH):
        return padding(pad).bool()
    return None


def _line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"


def classes() -> dict[str, str]:
    """Every name that a modeling file of transformers exports as a class -> the folder of the file."""
    import transformers

    modules: dict[str, str] = transformers._class_to_module  # type: ignore[attr-defined]
    return {
        name: module.split(".")[1]
        for name, module in sorted(modules.items())
        if module.startswith("models.") and ".modeling_" in module and name[0].isupper() and not re.search("Pre[tT]rained", name)
    }


def _answer(question: Any) -> Any:
    if question is None:
        import transformers

        return {"classes": classes(), "transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    return probe(question)


def main() -> None:
    forbid_hub()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass
    answer(_answer)


if __name__ == "__main__":
    main()
