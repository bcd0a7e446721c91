"""What modules do with scores between the two products, written down as terms of attention. A step that is none gives None: the values are needed."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.integrations.huggingface.deferred import Deferred, meta
from attnhub.integrations.huggingface.scores import Scores

#: A filled value from which on exp(value - largest score) is 0 in fp32; fp16 has no lower finite number than -65504.
_MASKED = -3e4
_MUL = {"mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"}
_DIV = {"div", "divide", "true_divide", "__div__", "__truediv__", "div_", "__idiv__", "__itruediv__"}
_ADD = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_SUB = {"sub", "subtract", "__sub__", "sub_", "__isub__"}
_FILL = {"masked_fill", "masked_fill_"}
_CAST = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "softmax"}
_RESHAPE = {"view", "reshape", "flatten", "unflatten"}
_NOTED = _MUL | _DIV | _ADD | _SUB | _FILL | _CAST | _RESHAPE | {"dropout"}
_IN_PLACE = {"mul_", "__imul__", "div_", "__idiv__", "__itruediv__", "add_", "__iadd__", "sub_", "__isub__", "masked_fill_"}
_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def step(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Deferred]:
    """The result of an operation on a `Deferred`, or None if it needs the values."""
    if name == "where":
        return _where(func, args, kwargs)
    if name in ("max", "maximum"):
        return _floor(func, args, kwargs)
    if name not in _NOTED:
        return None
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
    if scores.is_softmax and name == "masked_fill" and not kwargs and len(rest) == 2 and _fills_masked(made, *rest):
        return _noted(x, made, func, rest, {})
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
        made.steps.append((meta(x)[0], func, (other, *rest[1:]), {}))
        made.reads(other)
        vars(scores).update(vars(made))
        return x
    dtype = meta(x)[1]
    if isinstance(other, Tensor) and other.ndim and other.is_floating_point():
        dtype = torch.promote_types(dtype, other.dtype)
    return _noted(x, made, func, (other, *rest[1:]), {}, dtype)


def _noted(x: Deferred, made: Scores, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], dtype: Optional[torch.dtype] = None) -> Deferred:
    shape, before = meta(x)
    made.steps.append((shape, func, rest, kwargs))
    made.reads(*rest)
    return Deferred(made, shape, dtype or before)


def _grows(x: Deferred, other: Tensor) -> bool:
    """Whether broadcasting with a tensor would change the scores' shape or dtype class."""
    shape, _ = meta(x)
    if other.ndim > len(shape):
        return True
    return any(b not in (1, a) for a, b in zip(reversed(shape), reversed(other.shape)))


def _scale(x: Deferred, made: Scores, other: Any, inverse: bool) -> bool:
    shape, _ = meta(x)
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
    shape, dtype = meta(x)
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
    shape, _ = meta(x)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or _grows(x, mask) or not _is_masked(value):
        return False
    made.allowed.append((~mask, shape[:-2]))
    return True


def _fills_masked(made: Scores, mask: Any, value: Any) -> bool:
    """Whether weights are set to 0 where they are in any case: a row that was masked as a whole has no others in attnhub."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device.type != "cpu" or _number(value) != 0:
        return False
    return any(allowed.shape == mask.shape and torch.equal(allowed, ~mask) for allowed, _ in made.allowed)


def _is_masked(value: Any) -> bool:
    number = _number(value)
    return number is not None and number <= _MASKED


def _number(value: Any) -> Optional[float]:
    """A number or a tensor of one, if no device has to be waited for; else None."""
    if isinstance(value, Tensor):
        if value.ndim:
            return None
        number, version = getattr(value, "_attnhub_number", (None, -1))
        if number is not None and version == value._version:
            value = number
        elif value.device.type == "cpu":
            value = value.item()
    return value if isinstance(value, (int, float)) else None


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
    made, (shape, _) = x._scores.copy(), meta(x)
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
    shape, dtype = meta(x)
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
                dtype = meta(a)[1]
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
    shape, dtype = meta(x)
    if kwargs or not all(isinstance(a, (int, tuple, list)) for a in rest):
        return None
    new = _new_shape(shape, name, rest)
    if len(new) < 3 or new[-2:] != shape[-2:]:
        return None
    return Deferred(x._scores, new, dtype)


def _new_shape(shape: torch.Size, name: str, rest: tuple[Any, ...]) -> torch.Size:
    sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    if name in ("view", "reshape") and all(isinstance(n, int) for n in sizes) and sum(n == -1 for n in sizes) <= 1:
        known = math.prod(n for n in sizes if n != -1)
        total = math.prod(shape)
        if known and total % known == 0 and (-1 in sizes or known == total):
            return torch.Size(total // known if n == -1 else n for n in sizes)
    return torch.Size(getattr(torch.empty(shape, device="meta"), name)(*rest).shape)


