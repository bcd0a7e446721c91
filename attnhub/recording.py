"""Calls as torch.profiler sees them: eager ones pass by the dispatcher, which records operators, so they record themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_local = threading.local()
#: Records shapes too. It is private: without it calls have a name only.
_Fast: Any = getattr(getattr(torch._C, "_profiler", None), "_RecordFunctionFast", None)


def inside() -> bool:
    """Whether this thread is in a call that is recorded: one call is one event."""
    return getattr(_local, "inside", False)


def recorded(name: str, tensors: tuple[Any, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) as an event of this name with the shapes of these tensors."""
    event = torch.profiler.record_function(name) if _Fast is None else _Fast(name, [t for t in tensors if isinstance(t, Tensor)])
    _local.inside = True
    try:
        with event:
            return function(*args, **kwargs)
    finally:
        _local.inside = False
