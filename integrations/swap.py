"""Giving one module object another class, and taking it back: a cached subclass made of a mixin of ours and the module's class.

State, names, hooks and identity of the module stay. The class is made at run time, so instances pickle and copy through
`rebuild`, which makes it again; other swappers (FSDP, parametrisations) may build on top of it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Swapped:
    """Base of the mixins. A swapped class has its mixin, and the class before, in these attributes."""

    _attnhub_mixin: type
    _attnhub_before: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = getattr(type(self), "__getstate__", None)
        # Python 3.10 has no object.__getstate__; the dictionary is what it gives for a module.
        state = own(self) if own is not None and own is not getattr(object, "__getstate__", None) else self.__dict__.copy()
        return rebuild, (type(self)._attnhub_mixin, type(self)._attnhub_before), state


@functools.cache
def subclass(mixin: Any, cls: Any) -> type:
    """The class of a swapped module: the mixin first, named like the class before."""
    members = {
        "_attnhub_mixin": mixin,
        "_attnhub_before": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (mixin, cls), members)


def rebuild(mixin: type, cls: type) -> Any:
    """An empty instance of the swapped class; unpickling fills it."""
    made: Any = subclass(mixin, cls)
    return made.__new__(made)


def swap(module: nn.Module, mixin: type) -> None:
    """Make the module an instance of mixin + its class, once."""
    if not isinstance(module, mixin):
        module.__class__ = subclass(mixin, type(module))  # type: ignore[arg-type]


def unswap(module: nn.Module) -> bool:
    """Give the module its class back; whether it was swapped."""
    if not isinstance(module, Swapped):
        return False
    module.__class__ = _without(type(module))  # type: ignore[arg-type]
    return True


@functools.cache
def _without(cls: Any) -> type:
    """The class as it would be had the swap never happened, with what others built on top of it."""
    if "_attnhub_before" in vars(cls):
        before: type = vars(cls)["_attnhub_before"]
        return _without(before)
    if not issubclass(cls, Swapped):
        unchanged: type = cls
        return unchanged
    members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(_without(base) for base in cls.__bases__), members)
