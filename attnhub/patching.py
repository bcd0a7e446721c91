"""`attnhub.patch`: route a model's attention through attnhub, by whichever integration knows the model. `unpatch` undoes it.

Integrations are found by entry point (``attnhub.integrations``), as backends are.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

from attnhub.registry import entry_points, load

log = logging.getLogger("attnhub")

GROUP = "attnhub.integrations"
BUILTIN = {name: f"attnhub.integrations.{name}:integration" for name in ("huggingface", "mha")}


@dataclass
class ModuleReport:
    """One attention module: its name in the model, its class, whether it is routed, and if not, why.

    ``calls`` counts the calls that attnhub has served for it, outside tracing. ``backends`` says by whom.
    """

    name: str
    kind: str
    integration: str
    patched: bool
    reason: str = ""
    calls: int = 0
    backends: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class PatchReport:
    """What `patch` did, kept up to date while the model runs."""

    modules: list[ModuleReport] = field(default_factory=list)

    @property
    def patched(self) -> list[ModuleReport]:
        return [m for m in self.modules if m.patched]

    @property
    def skipped(self) -> list[ModuleReport]:
        return [m for m in self.modules if not m.patched]

    @property
    def calls(self) -> int:
        """Attention calls served by attnhub since the patch."""
        return sum(m.calls for m in self.modules)

    def to_json(self) -> dict[str, Any]:
        return {"calls": self.calls, "modules": [m.to_json() for m in self.modules]}

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} of {len(self.modules)} attention modules patched, {self.calls} calls served"]
        for m in self.modules:
            served = ", ".join(f"{name} x{count}" for name, count in sorted(m.backends.items())) or "no call yet"
            lines.append(f"  {m.name or '(root)'} [{m.kind}]: " + (served if m.patched else f"skipped: {m.reason}"))
        return "\n".join(lines)


class Integration(Protocol):
    """What an entry point in ``attnhub.integrations`` gives."""

    name: str

    def matches(self, model: Any) -> bool:
        """Whether the integration knows this model (or some of its modules). Cheap; must not import what the model does not use."""

    def patch(self, model: Any, **options: Any) -> list[ModuleReport]:
        """Route what can be routed; report every attention module found. Patching twice changes nothing more.

        Options beyond ``only`` are named in its signature; what no integration names is refused before anything is patched.
        """

    def unpatch(self, model: Any) -> int:
        """Restore exactly; how many modules were restored."""


class PatchError(RuntimeError):
    """``patch(strict=True)`` met a module that cannot be routed. ``report`` holds all of them."""

    def __init__(self, message: str, report: PatchReport) -> None:
        super().__init__(message)
        self.report = report


def _integrations() -> list[Integration]:
    found: list[Integration] = []
    for name, target, distribution in entry_points(GROUP, BUILTIN):
        try:
            found.append(load(target))
        except Exception as error:
            log.warning("integration %s of %s is left out: loading %s raised %s: %s", name, distribution, target, type(error).__name__, error)
    return found


def patch(model: Any, *, strict: bool = False, only: Optional[Callable[[str, Any], bool]] = None, **options: Any) -> PatchReport:
    """Route the attention of a model through attnhub, in place.

    model: a HuggingFace model, or any ``nn.Module`` that holds nn.MultiheadAttention or nn.Transformer layers.
    strict: raise `PatchError` (after restoring the model) if any attention module cannot be routed.
    only: ``only(name, module)`` says which modules to route; the others are reported as skipped.

    Returns the report: every attention module found, patched or skipped with the reason; it keeps counting calls. A model
    that no integration knows is an error, since a silent no-op would look like success.
    """
    if isinstance(model, type):
        raise TypeError(f"patch(model): {model.__name__} is a class: a model is needed; patch what it makes")
    integrations = [i for i in _integrations() if i.matches(model)]
    report = PatchReport()
    if only is not None and not callable(only):
        raise TypeError(f"patch(only={only!r}): a function of (name, module) is needed, as in only=lambda name, module: name.startswith('decoder.')")
    known = {name for i in integrations for name, p in inspect.signature(i.patch).parameters.items() if p.kind is p.KEYWORD_ONLY}
    if integrations and (unknown := sorted(options.keys() - known)):
        raise TypeError(
            f"patch({unknown[0]}={options[unknown[0]]!r}): there is no such option; there are {', '.join(sorted({'only', 'strict', *known}))}. "
            "Who serves the calls is chosen by attnhub.use(...) around them, or ATTNHUB_BACKEND"
        )
    if only is not None:
        options["only"] = only
    for integration in integrations:
        report.modules.extend(integration.patch(model, **options))
    if not report.modules:
        raise PatchError(
            f"patch(model): no attention that attnhub knows was found in {type(model).__name__}. It routes HuggingFace models (whole ones: "
            "only= chooses among their modules), nn.MultiheadAttention, nn.TransformerEncoderLayer and nn.TransformerDecoderLayer; call attnhub.attention in own code.",
            report,
        )
    if strict and report.skipped:
        unpatch(model)
        raise PatchError(f"patch(strict=True): not everything can be routed; the model was restored.\n{report}", report)
    return report


def unpatch(model: Any) -> int:
    """Restore a patched model exactly, but for what was set in its configs since; how many modules were restored (0 if it was not patched)."""
    return sum(integration.unpatch(model) for integration in _integrations() if integration.matches(model))
