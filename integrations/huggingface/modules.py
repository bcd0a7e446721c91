"""Which modules of a transformers model compute attention, and which of them ask transformers' attention interface."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Optional

from torch import nn

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
#: Attention by its class name. Pieces of one (dropouts, biases, masks, poolers) carry the word without computing attention.
_NAMED = re.compile(r"Attention|SelfAttn|CrossAttn")
_PIECE = re.compile(r"Dropout|Mask$|Bias$|Embedding|Output$|Norm$|Projection")
#: Models that select keys themselves compare the implementation with this pair, and hand indices to everything else.
_SPARSE = ("eager", "sdpa")
#: Names in the code of a method that asks whether its mask is a tensor and appends columns to it (DeepSeek-V4).
_MASK_TYPE = {"isinstance", "Tensor", "attention_mask", "pad"}


@dataclass(frozen=True)
class Found:
    """An attention module: its name in the model, itself, why the interface cannot route it ("" if it can), whether it asks the interface
    at all, and whether it may write attention out in operations of its own, which `reading` reads."""

    name: str
    module: nn.Module
    reason: str = ""
    asks: bool = True
    own: bool = False


def find_attention(model: nn.Module) -> list[Found]:
    """Every attention module of the transformers models inside a model, in order, innermost ones only."""
    found: list[Found] = []
    for name, module in _inside_transformers(model):
        cls = type(module)
        if _consults(cls):  # type: ignore[arg-type]
            reason = _obstacle(module)
            found.append(Found(name, module, reason, True, bool(reason)))
        elif _looks_like_attention(module):
            own = _takes_softmax(cls)  # type: ignore[arg-type]
            reason = f"{cls.__name__} never asks transformers' attention interface" + ("" if own else " and takes no softmax")
            found.append(Found(name, module, reason, False, own))
    return found


def _inside_transformers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from transformers import PreTrainedModel

    roots = [(name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    seen: set[int] = set()
    for prefix, root in roots:
        for name, module in root.named_modules(prefix=prefix):
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module


def _obstacle(module: nn.Module) -> str:
    cls = type(module)
    if not is_config(module.__dict__.get("config")):
        return f"{cls.__name__} holds no config of its own, so its implementation cannot be set"
    if _constants(cls) & {_SPARSE}:  # type: ignore[arg-type]
        return f"{cls.__name__} selects its keys itself and applies the selection only for the implementations eager and sdpa"
    if any({*code.co_names, *code.co_varnames} >= _MASK_TYPE for code in _codes(cls)):  # type: ignore[arg-type]
        return f"{cls.__name__} widens the additive mask of eager attention itself, and would misread any other"
    return ""


def is_config(value: Any) -> bool:
    """Whether a value is a transformers configuration."""
    return isinstance(value, _config_class())


@functools.cache
def _config_class() -> type:
    from transformers import configuration_utils

    # The class was spelled PretrainedConfig before transformers 5.
    found: Optional[type] = getattr(configuration_utils, "PreTrainedConfig", None) or getattr(configuration_utils, "PretrainedConfig", None)
    assert found is not None
    return found


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    if (
        not _NAMED.search(name)
        or _PIECE.search(name)
        or isinstance(module, nn.MultiheadAttention)
        or not any(True for _ in module.parameters())
    ):
        return False
    inner = (m for m in module.modules() if m is not module)
    return not any(isinstance(m, nn.MultiheadAttention) or _consults(type(m)) or _looks_like_attention(m) for m in inner)  # type: ignore[arg-type]


@functools.cache
def _consults(cls: Any) -> bool:
    """Whether a method of the class reads the attention interface. By its code, so it also holds for code from the Hub."""
    return any(_INTERFACE in code.co_names for code in _codes(cls))


@functools.cache
def _takes_softmax(cls: Any) -> bool:
    """Whether the class, or a function that it names, mentions a softmax or torch's attention."""
    space = vars(inspect.getmodule(cls) or inspect)
    names = {name for code in _codes(cls) for name in code.co_names}
    for name in list(names):
        code = getattr(inspect.unwrap(space[name]), "__code__", None) if callable(space.get(name)) else None
        if code is not None:
            names.update(n for inner in _nested(code) for n in inner.co_names)
    return any("softmax" in name.lower() or "scaled_dot_product" in name or "multi_head_attention" in name for name in names)


@functools.cache
def _constants(cls: Any) -> frozenset[Any]:
    return frozenset(c for code in _codes(cls) for c in code.co_consts if isinstance(c, tuple))


def _codes(cls: type) -> Iterator[CodeType]:
    for base in cls.__mro__:
        # transformers' own base class manages the interface; that is not computing attention.
        if base.__module__ in ("transformers.modeling_utils", "builtins") or base.__module__.startswith("torch."):
            continue
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else member
            code = getattr(function, "__code__", None)
            if code is not None:
                yield from _nested(code)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
