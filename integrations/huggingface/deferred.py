"""Attention that a module writes out in torch operations, computed by attnhub: the products wait until it is known what they are for.

Inside `DeferredMaths` a product of two tensors of three or more dimensions gives a `Deferred`: a tensor that knows its operands and has no
values yet. Scaling, adding a bias, filling a mask, casting and a softmax over the last dimension are noted down; the product
with v that follows is one call of attnhub. Anything else that is done with a `Deferred` first runs what was noted, operation
for operation as the module wrote it: the maths are then the module's own, and so is the result. Nothing here knows a model.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnhub.api import scaled_dot_product_attention
from attnhub.backend import PrepareError
from attnhub.decision import NoBackendError
from attnhub.integrations.calls import served_by
from attnhub.integrations.huggingface import einsum
from attnhub.integrations.huggingface.scores import Scores, attend

#: A filled value from which on exp(value - largest score) is 0 in fp32; fp16 has no lower finite number than -65504.
_MASKED = -3e4
_MATMUL = {"matmul", "__matmul__", "bmm"}
_MUL = {"mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"}
_DIV = {"div", "divide", "true_divide", "__div__", "__truediv__", "div_", "__idiv__", "__itruediv__"}
_ADD = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_SUB = {"sub", "subtract", "__sub__", "sub_", "__isub__"}
_FILL = {"masked_fill", "masked_fill_"}
_CAST = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "softmax"}
_RESHAPE = {"view", "reshape", "flatten", "unflatten"}
_IN_PLACE = {"mul_", "__imul__", "div_", "__idiv__", "__itruediv__", "add_", "__iadd__", "sub_", "__isub__", "masked_fill_"}
_ASKS = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "get_device", "element_size", "__len__"}
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_nested", "is_quantized", "itemsize"}
_SHAPED_LIKE = {"expand_as", "reshape_as", "view_as", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}
_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


class Deferred(Tensor):
    """Scores or weights without values. Whatever looks at the values gets an ordinary tensor of them."""

    _scores: Scores

    @staticmethod
    def __new__(cls, scores: Scores, shape: Any, dtype: torch.dtype) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=scores.q.device)  # type: ignore[attr-defined]
        made._scores = scores
        if len(shape) == 4:
            # What the module calls batch and heads.
            scores.lead = torch.Size(shape[:-2])
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def value(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            shape = self.shape
        return self._scores.value().reshape(shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _handle(func, args, kwargs or {}, None)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_values(args), **_values(kwargs or {}))


class DeferredMaths(TorchFunctionMode):
    """The scope in which products wait. ``served``: the backends of the calls that attnhub then made; ``refused``: why it could not make another."""

    def __init__(self) -> None:
        super().__init__()
        self.served: list[str] = []
        self.refused = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _handle(func, args, kwargs or {}, self)


def _handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scope: Optional[DeferredMaths]) -> Any:
    name = getattr(func, "__name__", "")
    if not any(isinstance(a, Deferred) for a in args) and not any(isinstance(a, Deferred) for a in kwargs.values()):
        if scope is None:
            return func(*_values(args), **_values(kwargs))
        if name in _MATMUL or name in ("baddbmm", "einsum"):
            made = _product(name, func, args, kwargs)
            if made is not None:
                return made
        elif name == "scaled_dot_product_attention":
            return _sdpa(func, args, kwargs, scope)
        result = func(*args, **kwargs)
        if name in ("tensor", "full") and result.ndim == 0:
            number = args[-1] if name == "tensor" else (*args, kwargs.get("fill_value"))[1]
            if isinstance(number, (int, float)):
                # Reading it from a device would wait for the device.
                result._attnhub_number = number
        return result
    if name in _ASKS or (name == "__get__" and getattr(func.__self__, "__name__", "") in _ATTRIBUTES):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if name in _SHAPED_LIKE and isinstance(args[-1] if name.endswith("_as") else args[0], Deferred):
        shape, dtype, device = *_meta(args[-1] if name.endswith("_as") else args[0]), args[0].device
        if name.endswith("_as") and not isinstance(args[0], Deferred):
            return getattr(args[0], {"expand_as": "expand"}.get(name, "reshape"))(shape)
        if not name.endswith("_as"):
            return func(torch.empty((), dtype=dtype, device=device).expand(shape), *args[1:], **kwargs)
    if scope is not None:
        done = _step(name, func, args, kwargs, scope)
        if done is not None:
            return done
    return func(*_values(args), **_values(kwargs))


def _values(tree: Any) -> Any:
    if isinstance(tree, Deferred):
        return tree.value()
    if isinstance(tree, (list, tuple)) and any(isinstance(part, (Deferred, list, tuple)) for part in tree):
        return type(tree)(_values(part) for part in tree)
    if isinstance(tree, dict):
        return {key: _values(part) for key, part in tree.items()}
    return tree


# -- products --------------------------------------------------------------------------------------------------------------


def _product(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Deferred]:
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
    lead = torch.broadcast_shapes(q.shape[:-2], kt.shape[:-2])
    scores = Scores(q, kt, lambda: func(*args, **kwargs))
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


# -- what is done with scores ----------------------------------------------------------------------------------------------


def _step(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scope: DeferredMaths) -> Any:
    """The result of an operation on a `Deferred`, or None if it needs the values."""
    if name in _MATMUL or name == "einsum":
        return _with_v(name, args, kwargs, scope)
    if name == "where":
        return _where(func, args, kwargs)
    if name in ("max", "maximum"):
        return _floor(func, args, kwargs)
    x = args[0] if args else None
    if not isinstance(x, Deferred):
        if name not in _ADD | _MUL or len(args) != 2 or not isinstance(args[1], Deferred) or name in _IN_PLACE or kwargs:
            return None
        x, args = args[1], (args[1], args[0])
    scores = x._scores
    if scores.known is not None:
        return None
    rest = args[1:]
    if name in _RESHAPE:
        return _reshaped(x, name, rest, kwargs)
    if name == "dropout":
        return _dropout(x, func, rest, kwargs)
    made = scores.copy()
    if name in _CAST:
        return _cast(x, made, name, func, rest, kwargs)
    if scores.is_softmax or kwargs or not rest:
        return None
    other = rest[0].value() if isinstance(rest[0], Deferred) else rest[0]
    noted = False
    if name in _MUL | _DIV and len(rest) == 1:
        noted = _scale(x, made, other, name in _DIV)
    elif name in _ADD | _SUB and len(rest) == 1:
        noted = _add(x, made, other, name in _SUB)
    elif name in _FILL and len(rest) == 2:
        noted = _fill(x, made, other, rest[1])
    if not noted:
        return None
    if name in _IN_PLACE:
        made.steps.append((_meta(x)[0], func, (other, *rest[1:]), {}))
        made.reads(other)
        vars(scores).update(vars(made))
        return x
    dtype = _meta(x)[1]
    if isinstance(other, Tensor) and other.ndim and other.is_floating_point():
        dtype = torch.promote_types(dtype, other.dtype)
    return _noted(x, made, func, (other, *rest[1:]), {}, dtype)


def _noted(x: Deferred, made: Scores, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], dtype: Optional[torch.dtype] = None) -> Deferred:
    shape, before = _meta(x)
    made.steps.append((shape, func, rest, kwargs))
    made.reads(*rest)
    return Deferred(made, shape, dtype or before)


def _meta(x: Deferred) -> tuple[torch.Size, torch.dtype]:
    with torch._C.DisableTorchFunctionSubclass():
        return x.shape, x.dtype


def _grows(x: Deferred, other: Tensor) -> bool:
    """Whether broadcasting with a tensor would change the scores' shape or dtype class."""
    shape, _ = _meta(x)
    if other.ndim > len(shape):
        return True
    return any(b not in (1, a) for a, b in zip(reversed(shape), reversed(other.shape)))


def _scale(x: Deferred, made: Scores, other: Any, inverse: bool) -> bool:
    shape, _ = _meta(x)
    if isinstance(other, (int, float)):
        if not (math.isfinite(other) and other > 0):
            return False
        factor: Any = 1.0 / other if inverse else float(other)
        made.scale *= factor
    elif isinstance(other, Tensor) and other.is_floating_point():
        # A factor of a row moves into q. Of its sign nothing is known: after a mask was filled in, that would matter.
        at = shape[:-2]
        if made.allowed or _grows(x, other) or (other.ndim and other.shape[-1] != 1) or any(lead != at for _, lead in made.terms):
            return False
        factor = other.reciprocal() if inverse else other
        made.factors.append((factor, at))
    else:
        return False
    made.terms = [(term * factor, lead) for term, lead in made.terms]
    return True


def _add(x: Deferred, made: Scores, other: Any, minus: bool) -> bool:
    shape, dtype = _meta(x)
    if isinstance(other, (int, float)):
        if other:
            made.terms.append((torch.full((), -float(other) if minus else float(other), device=made.q.device), shape[:-2]))
        return True
    if not isinstance(other, Tensor) or _grows(x, other) or other.dtype == torch.bool:
        return False
    term = -other if minus else other
    made.terms.append((term if term.is_floating_point() else term.to(dtype), shape[:-2]))
    return True


def _fill(x: Deferred, made: Scores, mask: Any, value: Any) -> bool:
    shape, _ = _meta(x)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or _grows(x, mask) or not _is_masked(value):
        return False
    made.allowed.append((~mask, shape[:-2]))
    return True


def _is_masked(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.ndim:
            return False
        number = getattr(value, "_attnhub_number", None)
        value = number if number is not None or value.device.type != "cpu" else value.item()
    return isinstance(value, (int, float)) and value <= _MASKED


def _where(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Deferred]:
    """where(allowed, scores, very negative) and where(masked, very negative, scores)."""
    if len(args) != 3 or kwargs:
        return None
    condition, a, b = args
    x, value = (a, b) if isinstance(a, Deferred) else (b, a)
    if not isinstance(x, Deferred) or isinstance(value, Deferred) or x._scores.known is not None or x._scores.is_softmax:
        return None
    if type(condition) is not Tensor or condition.dtype != torch.bool or _grows(x, condition) or not _is_masked(value):
        return None
    made, (shape, _) = x._scores.copy(), _meta(x)
    made.allowed.append((condition if x is a else ~condition, shape[:-2]))
    if x is a:
        return _noted(x, made, lambda s, c, v: func(c, s, v), (condition, value), {})
    return _noted(x, made, lambda s, c, v: func(c, v, s), (condition, value), {})


def _floor(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Deferred]:
    """max(scores, lowest finite number), against -inf: what is so low is masked in any case."""
    if len(args) != 2 or kwargs or not isinstance(args[0], Deferred) or not isinstance(args[1], Tensor) or isinstance(args[1], Deferred):
        return None
    x, low = args
    if x._scores.known is not None or x._scores.is_softmax or not _is_masked(low):
        return None
    return _noted(x, x._scores.copy(), func, (low,), {})


def _cast(x: Deferred, made: Scores, name: str, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Deferred]:
    shape, dtype = _meta(x)
    if name == "softmax":
        dim = kwargs.get("dim", rest[0] if rest else None)
        if made.is_softmax or dim not in (-1, len(shape) - 1):
            return None
        made.is_softmax = True
        wanted = kwargs.get("dtype", next((a for a in rest[1:] if isinstance(a, torch.dtype)), None))
        return _noted(x, made, func, rest, kwargs, wanted or dtype)
    if name in _DTYPES:
        dtype = _DTYPES[name]
    elif name in ("to", "type", "type_as"):
        given = (*rest, *kwargs.values())
        for a in given:
            if isinstance(a, torch.dtype):
                dtype = a
            elif isinstance(a, Tensor) and not isinstance(a, Deferred) and a.device == made.q.device:
                dtype = a.dtype
            elif isinstance(a, Deferred):
                dtype = _meta(a)[1]
            elif not isinstance(a, bool) and not (isinstance(a, (torch.device, str)) and name == "to" and torch.device(a) == made.q.device):
                return None
        if name == "type" and not any(isinstance(a, torch.dtype) for a in given):
            return None
        rest, kwargs, func = (dtype,), {}, Tensor.to
    if not dtype.is_floating_point:
        return None
    return _noted(x, made, func, rest, kwargs, dtype)


def _dropout(x: Deferred, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Deferred]:
    given = dict(zip(("p", "training", "inplace"), rest)) | kwargs
    # torch.dropout(input, p, train) has no defaults, F.dropout does.
    active = bool(given.get("training", given.get("train", True)))
    p = float(given.get("p", 0.5)) if active else 0.0
    if not x._scores.is_softmax or given.get("inplace") or (p and x._scores.dropout_p):
        return None
    made = x._scores.copy()
    made.dropout_p = max(p, made.dropout_p)
    return _noted(x, made, func, rest, kwargs)


def _reshaped(x: Deferred, name: str, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Deferred]:
    """The same scores under other leading dimensions: an alias, so that operations in place reach both."""
    shape, dtype = _meta(x)
    if kwargs or not all(isinstance(a, (int, tuple, list)) for a in rest):
        return None
    new = torch.empty(shape, device="meta")
    new = getattr(new, name)(*rest)
    if new.ndim < 3 or new.shape[-2:] != shape[-2:]:
        return None
    return Deferred(x._scores, new.shape, dtype)


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
    shape, dtype = _meta(x)
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
    return out if order is None else out.permute(order)


def _sdpa(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scope: DeferredMaths) -> Any:
    args, kwargs = _values(args), _values(kwargs)
    try:
        out = scaled_dot_product_attention(*args, **kwargs)
    except (NoBackendError, PrepareError, ValueError, TypeError) as error:
        scope.refused = str(error).splitlines()[0]
        return func(*args, **kwargs)
    scope.served.append(served_by())
    return out
