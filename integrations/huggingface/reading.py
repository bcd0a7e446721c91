"""Attention that a module writes out in torch operations, computed by attnhub: the products wait until it is known what they are for.

Inside `DeferredMaths` a product of two tensors of three or more dimensions gives a `Deferred`: a tensor that knows its operands and has no
values yet. Scaling, adding a bias, filling a mask, casting and a softmax over the last dimension are noted down; the product
with v that follows is one call of attnhub. Anything else that is done with a `Deferred` first runs what was noted, operation
for operation as the module wrote it: the maths are then the module's own, and so is the result. Nothing here knows a model.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any, Optional

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnhub.api import scaled_dot_product_attention
from attnhub.backend import PrepareError
from attnhub.decision import NoBackendError
from attnhub.integrations.calls import served_by
from attnhub.integrations.huggingface import einsum
from attnhub.integrations.huggingface.deferred import Deferred, meta, values
from attnhub.integrations.huggingface.scores import Scores, attend
from attnhub.integrations.huggingface.steps import step

_MATMUL = {"matmul", "__matmul__", "bmm"}
_LOOKED_AT = _MATMUL | {"baddbmm", "einsum", "softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "tensor", "full"}


class DeferredMaths(TorchFunctionMode):
    """The scope in which products wait. ``served``: the backends of the calls that attnhub then made; ``missed``: how many softmaxes
    were part of no such call; ``refused``: why the last of them could not be."""

    def __init__(self) -> None:
        super().__init__()
        self.served: list[str] = []
        self.missed = 0
        self.refused = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if Deferred not in types and name not in _LOOKED_AT:
            # Most operations of a module: it is the host's time that they cost.
            return func(*args, **kwargs) if kwargs else func(*args)
        return _handle(name, func, args, kwargs or {}, self)


def _handle(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scope: DeferredMaths) -> Any:
    if name == "softmax":
        scope.missed += 1
    if name == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = (args[0], *args[1])
    if any(isinstance(a, Deferred) for a in args) or any(isinstance(a, Deferred) for a in kwargs.values()):
        done = _with_v(name, args, kwargs, scope) if name in _MATMUL or name == "einsum" else step(name, func, args, kwargs)
        return Deferred.__torch_function__(func, (), args, kwargs) if done is None else done
    if name in _MATMUL or name in ("baddbmm", "einsum"):
        made = product(name, func, args, kwargs)
        if made is not None:
            return made
    elif name == "scaled_dot_product_attention":
        return _sdpa(func, args, kwargs, scope)
    elif func is torch.nn.functional.multi_head_attention_forward:
        with scope:
            return _as_its_own_operations(func)(*args, **kwargs)
    result = func(*args, **kwargs)
    if name in ("tensor", "full") and result.ndim == 0 and not result.is_inference():
        number = args[-1] if name == "tensor" else (*args, kwargs.get("fill_value"))[1]
        if isinstance(number, (int, float)):
            # Reading it from a device would wait for the device.
            result._attnhub_number = number, result._version
    return result


@functools.cache
def _as_its_own_operations(func: Any) -> Any:
    """A function of torch written in Python, without the question at its top whether somebody wants to take it over as a whole."""
    space = {**func.__globals__, "has_torch_function": lambda _: False}
    made = FunctionType(func.__code__, space, func.__name__, func.__defaults__, func.__closure__)
    made.__kwdefaults__ = func.__kwdefaults__
    return made


# -- products --------------------------------------------------------------------------------------------------------------


def product(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Deferred]:
    """A product that waits, or None if it is not one of two stacks of matrices."""
    term, scale, beta = None, 1.0, 1.0
    if name == "einsum":
        operands = einsum.operands(args)
        parsed = einsum.scores(args[0], *operands) if operands is not None else None
        if parsed is None:
            return None
        q, kt = parsed
    elif name == "baddbmm":
        given = dict(zip(("input", "batch1", "batch2"), args)) | kwargs
        if set(given) - {"input", "batch1", "batch2", "beta", "alpha"} or len(given) < 3:
            return None
        q, kt, term = given["batch1"], given["batch2"], given["input"]
        scale, beta = given.get("alpha", 1), given.get("beta", 1)
    elif len(args) == 2 and not kwargs:
        q, kt = args
    else:
        return None
    if not (isinstance(q, Tensor) and isinstance(kt, Tensor)) or q.ndim != kt.ndim or q.ndim < 3 or not _fits(q, kt):
        return None
    lead = torch.Size(b if a == 1 else a for a, b in zip(q.shape[:-2], kt.shape[:-2]))
    scores = Scores(q, kt, lead, lambda: func(*args, **kwargs))
    scores.scale = float(scale)
    dtype = q.dtype
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
    shape = (*lead, q.shape[-2], kt.shape[-1])
    if term is not None and beta:
        if not isinstance(term, Tensor) or isinstance(term, Deferred):
            return None
        scores.terms.append((term * beta if beta != 1 else term, lead))
        scores.reads(term)
    return Deferred(scores, shape, dtype)


def _fits(q: Tensor, kt: Tensor) -> bool:
    if not (q.is_floating_point() and q.dtype == kt.dtype and q.device == kt.device and q.shape[-1] == kt.shape[-2]):
        return False
    return all(a == b or 1 in (a, b) for a, b in zip(q.shape[:-2], kt.shape[:-2]))


# -- the call --------------------------------------------------------------------------------------------------------------


def _with_v(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], scope: DeferredMaths) -> Optional[Tensor]:
    """weights @ v through attnhub, or None if this is not what the product is."""
    order: Optional[list[int]] = None
    if name == "einsum":
        operands = einsum.operands(args)
        letters = None if operands is None else einsum.letters(args[0], *operands)
        if operands is None or letters is None or kwargs:
            return None
        x, v = operands
        a, b, c = letters
        lead, inner = a[:-2], a[-1]
        last = [letter for letter in b if letter not in a]
        if not isinstance(x, Deferred) or not isinstance(v, Tensor) or len(last) != 1 or set(b) != {*lead, inner, *last} or set(c) != {*a[:-1], *last}:
            return None
        v = v.permute([b.index(letter) for letter in (*lead, inner, *last)])
        order = [(*a[:-1], *last).index(letter) for letter in c]
    elif len(args) == 2 and not kwargs:
        x, v = args
    else:
        return None
    if not isinstance(x, Deferred) or isinstance(v, Deferred) or not isinstance(v, Tensor):
        return None
    shape, dtype = meta(x)
    scores = x._scores
    if not scores.is_softmax or scores.known is not None or v.ndim != len(shape) or v.shape[-2] != shape[-1]:
        return None
    if v.dtype != dtype and not torch.is_autocast_enabled(v.device.type):
        return None
    if not all(n in (1, m) for n, m in zip(v.shape[:-2], shape[:-2])):
        return None
    try:
        out = attend(scores, shape, v)
    except (NoBackendError, PrepareError) as error:
        scope.refused = str(error).splitlines()[0]
        return None
    scope.served.append(served_by())
    scope.missed -= 1
    return out if order is None else out.permute(order)


def _sdpa(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scope: DeferredMaths) -> Any:
    args, kwargs = values(args), values(kwargs)
    try:
        out = scaled_dot_product_attention(*args, **kwargs)
    except (NoBackendError, PrepareError, ValueError, TypeError) as error:
        scope.refused = str(error).splitlines()[0]
        return func(*args, **kwargs)
    scope.served.append(served_by())
    return out
