"""A tensor without values: a product, and what was done with it, that nobody has looked at yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnhub.integrations.huggingface.scores import Scores

#: What can be answered without the values.
_ASKS = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "get_device", "element_size", "__len__"}
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_nested", "is_quantized", "itemsize"}
_SHAPED_LIKE = {"expand_as", "reshape_as", "view_as", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}


class Deferred(Tensor):
    """Scores or weights without values. Whatever looks at the values gets an ordinary tensor of them."""

    _scores: Scores
    _meta: tuple[torch.Size, torch.dtype]

    @staticmethod
    def __new__(cls, scores: Scores, shape: Any, dtype: torch.dtype) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=scores.q.device)  # type: ignore[attr-defined]
        made._scores, made._meta = scores, (torch.Size(shape), dtype)
        if len(shape) == 4:
            # What the module calls batch and heads.
            scores.lead = torch.Size(shape[:-2])
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def value(self) -> Tensor:
        return self._scores.value().reshape(self._meta[0])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ASKS or (name == "__get__" and getattr(func.__self__, "__name__", "") in _ATTRIBUTES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name.endswith("_as") and name in _SHAPED_LIKE and not isinstance(args[0], Deferred):
            return getattr(args[0], "expand" if name == "expand_as" else "reshape")(meta(args[1])[0])
        if name.endswith("_like") and name in _SHAPED_LIKE:
            shape, dtype = meta(args[0])
            return func(torch.empty((), dtype=dtype, device=args[0].device).expand(shape), *args[1:], **kwargs)
        return func(*values(args), **values(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*values(args), **values(kwargs or {}))


def values(tree: Any) -> Any:
    if isinstance(tree, Deferred):
        return tree.value()
    if isinstance(tree, (list, tuple)) and any(isinstance(part, (Deferred, list, tuple)) for part in tree):
        return type(tree)(values(part) for part in tree)
    if isinstance(tree, dict):
        return {key: values(part) for key, part in tree.items()}
    return tree


def meta(x: Deferred) -> tuple[torch.Size, torch.dtype]:
    """Its shape and dtype."""
    return x._meta
