"""q k^T and what was done with it, written down instead of computed; and the call of attnhub that it becomes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.api import attention
from attnhub.mask import FULL, Bias, BoolMask


class Scores:
    """q k^T and what was done with it so far: once as the steps that compute it, once as attention's own terms.

    Tensors of a term come with the leading dimensions that the scores had then.
    """

    def __init__(self, q: Tensor, kt: Tensor, lead: torch.Size, first: Callable[[], Tensor]) -> None:
        self.q, self.kt, self._first = q, kt, first
        self.steps: list[tuple[torch.Size, Any, tuple[Any, ...], dict[str, Any]]] = []
        self.scale = 1.0
        self.factors: list[tuple[Tensor, torch.Size]] = []
        self.terms: list[tuple[Tensor, torch.Size]] = []
        self.allowed: list[tuple[Tensor, torch.Size]] = []
        self.origin = self.lead = lead
        self.is_softmax = False
        self.dropout_p = 0.0
        self.known: Optional[Tensor] = None
        self.read: list[tuple[Tensor, int]] = []
        self.reads(q, kt)

    def reads(self, *tensors: Any) -> None:
        """Note what will be read later. As autograd does for what it saved: nobody may change it in place until then."""
        self.read.extend((t, t._version) for t in tensors if isinstance(t, Tensor) and not t.is_inference())

    def check(self) -> None:
        if any(t._version != version for t, version in self.read):
            raise RuntimeError(
                "attnhub: a tensor was changed in place after a product of it was written down and before that product was used. "
                "Leave this module out: attnhub.patch(model, only=...)."
            )

    def copy(self) -> Scores:
        made = copy.copy(self)
        for name in ("steps", "factors", "terms", "allowed", "read"):
            setattr(made, name, list(getattr(self, name)))
        return made

    def value(self) -> Tensor:
        """What the module's own operations give."""
        if self.known is None:
            self.check()
            x = self._first()
            for shape, func, args, kwargs in self.steps:
                x = func(x.reshape(shape), *args, **kwargs)
            self.known = x
        return self.known


def attend(scores: Scores, shape: torch.Size, v: Tensor) -> Tensor:
    scores.check()
    lead = scores.lead
    batch, heads = math.prod(lead[:-1]), lead[-1]
    rows = shape[-2]
    q = _four(scores.q, scores.origin, lead)
    k = _four(scores.kt.transpose(-1, -2), scores.origin, lead)
    v = _four(v, shape[:-2], lead)
    if k.shape[1] != v.shape[1]:
        k, v = (t.expand(batch, heads, *t.shape[2:]) for t in (k, v))
    mask = FULL
    for term, at in scores.terms:
        mask = mask & Bias(_term(term, at, lead))
    for allowed, at in scores.allowed:
        mask = mask & BoolMask(_term(allowed, at, lead))
    for factor, at in scores.factors:
        q = q * _term(factor, at, lead)
    kind = v.device.type
    autocast = torch.is_autocast_enabled(kind)
    out_dtype = torch.get_autocast_dtype(kind) if autocast else v.dtype
    wide = out_dtype if autocast else torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    result = attention(q.to(wide), k.to(wide), v.to(wide), mask, softmax_scale=scores.scale, dropout_p=scores.dropout_p)
    assert isinstance(result, Tensor)
    # A product of matrices would be contiguous, and the module may go on with view().
    return result.to(out_dtype).contiguous().reshape(*shape[:-2], rows, v.shape[-1])


def _four(x: Tensor, at: torch.Size, lead: torch.Size) -> Tensor:
    """A stack that broadcasts to leading dimensions ``at`` as [batch, heads, S, D], or with 1 head where all of them share it."""
    heads, last = lead[-1], x.shape[-2:]
    if at == lead and len(lead) > 1 and x.shape[-3] == 1 and heads > 1:
        return x.expand(*lead[:-1], 1, *last).reshape(-1, 1, *last)
    return x.expand(*at, *last).reshape(math.prod(lead[:-1]), heads, *last)


def _term(x: Tensor, at: torch.Size, lead: torch.Size) -> Tensor:
    """A tensor that broadcasts against scores of leading dimensions ``at``, for scores of [batch, heads]."""
    last = (1, 1, *x.shape)[-2:]
    if all(n == 1 for n in x.shape[:-2]):
        return x.reshape(last)
    if at == lead and len(lead) == 2:
        return x
    return x.expand(*at, *last).reshape(math.prod(lead[:-1]), lead[-1], *last)


