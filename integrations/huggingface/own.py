"""Modules that compute attention in operations of their own: their class is swapped for one whose forward runs in `DeferredMaths`."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnhub.integrations.calls import count, reports
from attnhub.integrations.huggingface.attention import wants_weights
from attnhub.integrations.huggingface.masks import is_tracing
from attnhub.integrations.huggingface.reading import DeferredMaths
from attnhub.integrations.swap import Swapped, swap, unswap

#: Forward passes after which a module that attnhub could never serve is left alone.
_TRIALS = 3

#: What a report calls softmaxes that were none of attnhub's in a module that attnhub served otherwise. They are not counted as calls.
OWN = "own operations"


class OwnMathsMixin(Swapped):
    """Serves the module's attention where its operations can be read as one; otherwise they run as they are written."""

    _attnhub_trials = 0
    _attnhub_obstacle = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        # In a graph there are no values to wait for.
        if self._attnhub_trials >= _TRIALS or is_tracing():
            return forward(*args, **kwargs)
        if wants_weights(self, kwargs.get("output_attentions") or None):  # type: ignore[arg-type]
            # They are the module's own to make.
            report = reports.get(self)  # type: ignore[call-overload]
            if report is not None and not report.calls:
                report.reason = f"{type(self)._attnhub_before.__name__} is asked for its attention weights, which its own operations make"
            return forward(*args, **kwargs)
        with DeferredMaths() as scope:
            result = forward(*args, **kwargs)
        self._attnhub_note(scope)
        return result

    def _attnhub_note(self, scope: DeferredMaths) -> None:
        module: Any = self
        report = reports.get(module)
        for name in scope.served:
            count(module, name)
        if scope.served and scope.missed > 0 and report is not None:
            report.backends[OWN] = report.backends.get(OWN, 0) + scope.missed
        if scope.served:
            self._attnhub_trials = 0
            if report is not None and not report.patched:
                report.patched, report.reason = True, ""
        elif report is None or not report.calls:
            self._attnhub_trials += 1
            if report is not None:
                report.patched, report.reason = False, _reason(module, scope.refused)


def _reason(module: Any, refused: str) -> str:
    name = type(module)._attnhub_before.__name__
    if refused:
        return f"no backend serves what {name} computes: {refused}"
    before = module._attnhub_obstacle
    return (f"{before}; " if before else "") + f"{name} computes something else than softmax(scale * q k^T + bias) v: its own operations ran"


def take_over(module: nn.Module, obstacle: str = "") -> None:
    """Run the module's forward in `DeferredMaths` from now on. obstacle: why transformers' interface cannot route it, where it asks it."""
    swap(module, OwnMathsMixin)
    module.__dict__["_attnhub_obstacle"] = obstacle


def give_back(module: nn.Module) -> bool:
    """Undo `take_over`; whether there was anything to undo."""
    if not isinstance(module, OwnMathsMixin):
        return False
    for name in ("_attnhub_trials", "_attnhub_obstacle"):
        module.__dict__.pop(name, None)
    return unswap(module)
