"""Switching modules to attnhub by the one thing that they consult, their config, without touching anybody else's.

transformers reads the implementation from ``module.config``. Config objects are shared: by all modules of a model, and by
every model built from the same object. So a routed module gets a private copy of its config that names attnhub, nested
configs included. The rest of the model, which makes the masks, gets that copy too if every attention module on the config is
routed, since others could not read attnhub's masks; otherwise it keeps making the masks that it made before.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from attnhub.integrations.huggingface.modules import is_config

NAME = "attnhub"
_IMPLEMENTATION = "_attn_implementation_internal"
#: Set on a routed module whose masks are made for another implementation, because other modules of its config read them.
FOREIGN_MASKS = "_attnhub_foreign_masks"
#: Set on a routed module of a model that transformers runs by eager attention alone, where no mask means that every key is attended to:
#: such models say ``is_causal`` of modules that are not (BridgeTower's layers of image tokens).
EAGER_ONLY = "_attnhub_eager_only"

#: Set on every module with a private config: what makes a process that unpickles it register attnhub with transformers.
REGISTRATION = "_attnhub_registration"

#: module -> attribute -> (config before the patch, the private copy in its place, the implementation that the copy was given).
_swapped: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any, Any]]] = weakref.WeakKeyDictionary()


class Registration:
    """Nothing but a way of being pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, ()


def _registered() -> Registration:
    from attnhub.integrations.huggingface import register

    reason = register()
    if reason:
        raise RuntimeError(f"attnhub: a patched model cannot be unpickled here: {reason}")
    return Registration()


def route(model: nn.Module, attention: Iterable[nn.Module], routed: Iterable[nn.Module]) -> None:
    """Give private configs to a model so that the ``routed`` ones of its ``attention`` modules consult attnhub."""
    chosen = {id(m) for m in routed}
    if not chosen:
        return
    plan = _Plan()
    names = {id(module): name for name, module in model.named_modules()}
    for module in attention:
        config = _nearest_config(model, names.get(id(module), ""))
        if config is not None:
            plan.note(config, id(module) in chosen)
    for module in model.modules():
        if id(module) in chosen and not _has_sdpa(model, names[id(module)]):
            module.__dict__[EAGER_ONLY] = True
        if id(module) in chosen and plan.is_shared(module.__dict__.get("config")):
            module.__dict__[FOREIGN_MASKS] = True
        for attribute, config in list(module.__dict__.items()):
            if not is_config(config):
                continue
            private = plan.switched(config) if id(module) in chosen and attribute == "config" else plan.for_others(config)
            if private is not config:
                record = _swapped.setdefault(module, {})
                before = config
                if attribute in record:
                    before, earlier, given = record[attribute]
                    _keep_choice(before, earlier, given)
                record[attribute] = (before, private, private.__dict__.get(_IMPLEMENTATION))
                module.__dict__[attribute] = private
                module.__dict__[REGISTRATION] = Registration()


def restore(model: nn.Module) -> None:
    """Put every config back. What was changed in a private copy meanwhile (a vocabulary resized, another implementation set, say) moves to the original."""
    pairs: dict[int, tuple[Any, Any, Any]] = {}
    for module in model.modules():
        module.__dict__.pop(FOREIGN_MASKS, None)
        module.__dict__.pop(EAGER_ONLY, None)
        module.__dict__.pop(REGISTRATION, None)
        for attribute, (before, private, given) in _swapped.pop(module, {}).items():
            pairs[id(private)] = (before, private, given)
            if module.__dict__.get(attribute) is private:
                module.__dict__[attribute] = before
    for before, private, given in pairs.values():
        _keep_choice(before, private, given)
        for key, value in private.__dict__.items():
            if key != _IMPLEMENTATION and id(value) not in pairs and before.__dict__.get(key, _swapped) is not value:
                before.__dict__[key] = value


def _keep_choice(before: Any, private: Any, given: Any) -> None:
    """An implementation that was set since the copy was made is somebody's choice: it moves to the config before the patch."""
    now = private.__dict__.get(_IMPLEMENTATION)
    if now != given:
        before.__dict__[_IMPLEMENTATION] = now


def was_switched(module: nn.Module) -> bool:
    """Whether a routed module asks for something else by now, since another implementation was set after the patch."""
    record = _swapped.get(module, {}).get("config")
    return record is not None and module.__dict__.get("config") is record[1] and record[1].__dict__.get(_IMPLEMENTATION) != record[2]


@contextlib.contextmanager
def renamed(model: nn.Module, name: str) -> Iterator[None]:
    """A patched model whose configs name another of attnhub's functions for a while. ValueError where that cannot be done."""
    from attnhub.integrations.huggingface.modules import find_attention

    private = {id(c): c for m in model.modules() for _, c, _ in _swapped.get(m, {}).values()}
    ours = {key: c for key, c in private.items() if c.__dict__.get(_IMPLEMENTATION) == NAME}
    for found in find_attention(model):
        if id(found.module.__dict__.get("config")) not in ours or found.own:
            what = found.reason or "it is not patched"
            raise ValueError(f"attnhub: {found.name or type(model).__name__} cannot take part: {what}. Call attnhub.patch(model) first.")
    for config in ours.values():
        config.__dict__[_IMPLEMENTATION] = name
    try:
        yield
    finally:
        for config in ours.values():
            config.__dict__[_IMPLEMENTATION] = NAME


def _has_sdpa(model: nn.Module, name: str) -> bool:
    """Whether the transformers model around a module says that it also runs by sdpa attention."""
    from transformers import PreTrainedModel

    while True:
        owner = model.get_submodule(name)
        if isinstance(owner, PreTrainedModel) or not name:
            return bool(getattr(owner, "_supports_sdpa", True))
        name = name.rpartition(".")[0]


def _nearest_config(model: nn.Module, name: str) -> Any:
    """The config of a module, or of the closest module around it that has one: whoever that is makes its masks."""
    while True:
        config = model.get_submodule(name).__dict__.get("config")
        if is_config(config) or not name:
            return config if is_config(config) else None
        name = name.rpartition(".")[0]


class _Plan:
    """The private copies of one patch. ``note`` every attention module first."""

    def __init__(self) -> None:
        self._configs: dict[int, Any] = {}
        self._routed: set[int] = set()
        self._unrouted: set[int] = set()
        self._switched: dict[int, Any] = {}
        self._others: dict[int, Any] = {}

    def note(self, config: Any, routed: bool) -> None:
        self._configs[id(config)] = config
        (self._routed if routed else self._unrouted).add(id(config))

    def is_shared(self, config: Any) -> bool:
        """Whether modules that are not routed read the masks of this config too."""
        return is_config(config) and bool({id(c) for c in _with_nested(config)} & self._unrouted)

    def switched(self, config: Any) -> Any:
        """The copy for routed modules: it names attnhub."""
        if id(config) not in self._switched:
            private = self._copy(config)
            private.__dict__[_IMPLEMENTATION] = NAME
            self._switched[id(config)] = private
        return self._switched[id(config)]

    def for_others(self, config: Any) -> Any:
        """What the modules around the attention get: the copy that makes attnhub's masks, or their own config."""
        tree = {id(c) for c in _with_nested(config)}
        if not tree & self._routed:
            return config
        if not tree & self._unrouted:
            return self.switched(config)
        if id(config) not in self._others:
            nested = [value for value in config.__dict__.values() if is_config(value)]
            changes = any(self.for_others(value) is not value for value in nested)
            self._others[id(config)] = self._copy(config) if changes else config
        return self._others[id(config)]

    def _copy(self, config: Any) -> Any:
        private = copy.copy(config)
        for key, value in config.__dict__.items():
            if is_config(value):
                private.__dict__[key] = self.for_others(value)
        return private


def _with_nested(config: Any) -> Iterable[Any]:
    yield config
    for value in config.__dict__.values():
        if is_config(value):
            yield from _with_nested(value)
