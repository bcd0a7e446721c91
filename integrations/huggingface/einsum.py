"""The equations of torch.einsum that are products of stacks of matrices."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor


def operands(args: tuple[Any, ...]) -> Optional[tuple[Any, Any]]:
    found = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    return (found[0], found[1]) if len(found) == 2 else None


def letters(equation: Any, a: Any, b: Any) -> Optional[tuple[str, str, str]]:
    """The letters of both operands and of the result; an ellipsis that is the same in all three becomes capital letters."""
    if not isinstance(equation, str) or "->" not in equation or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    inputs, _, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if "..." in equation:
        if len(parts) != 2 or equation.count("...") != 3:
            return None
        ranks = {x.dim() - len(part) + 3 for x, part in zip((a, b), parts)}
        dots = "ABCDEFGH"[: ranks.pop()]
        if ranks or dots in equation:
            return None
        parts, out = [part.replace("...", dots) for part in parts], out.replace("...", dots)
    if len(parts) != 2 or len(parts[0]) != a.dim() or len(parts[1]) != b.dim() or any(len(set(part)) != len(part) for part in (*parts, out)):
        return None
    return parts[0], parts[1], out


def scores(equation: Any, q: Any, k: Any) -> Optional[tuple[Tensor, Tensor]]:
    """(q, k^T) with equal leading letters, if the equation is a stack of products of matrices, ``...qd,...kd->...qk`` in any order."""
    found = letters(equation, q, k)
    if found is None:
        return None
    a, b, out = found
    lead, row, column = out[:-2], out[-2:-1], out[-1:]
    inner = [letter for letter in a if letter in b and letter not in out]
    if len(inner) != 1 or not lead or set(a) != {*lead, row, *inner} or set(b) != {*lead, column, *inner}:
        return None
    return q.permute([a.index(c) for c in (*lead, row, *inner)]), k.permute([b.index(c) for c in (*lead, *inner, column)])


