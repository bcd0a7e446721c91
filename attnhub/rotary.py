"""Rotary position embedding (RoFormer, arXiv 2104.09864) at given positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Rotary embedding of the new tokens of a call over a K/V cache: `attention(..., rotary=)`.

    cos, sin: [max_positions, R] with 2 * R <= head_dim, on q's device. Dimensions are paired as in `apply_rotary`; those behind 2 * R pass through.
    Key i of the new ones is rotated at position cache_seqlens + i; query i too, or at cache_seqlens if one_position.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    one_position: bool = False


def check_rotary(rotary: Any, q: Tensor) -> None:
    """Raises TypeError or ValueError unless it is a `Rotary` that fits q [B, H, S, D]."""
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary is a {type(rotary).__name__}: an attnhub.Rotary(cos, sin, interleaved) is needed")
    for name, table in (("cos", rotary.cos), ("sin", rotary.sin)):
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"rotary: {name} is a {table.dtype if isinstance(table, Tensor) else type(table).__name__}: a floating tensor is needed")
        if table.device != q.device:
            raise ValueError(f"rotary: {name} is on {table.device} and q on {q.device}: move it to {q.device}")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"rotary: {name} requires a gradient, and a K/V cache has none: detach() it, or call under torch.no_grad()")
    _check_tables(rotary.cos, rotary.sin, q.shape[-1])


def _check_tables(cos: Tensor, sin: Tensor, head_dim: int) -> None:
    if cos.shape != sin.shape or cos.ndim != 2 or 2 * cos.shape[-1] > head_dim:
        raise ValueError(f"rotary cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [max_positions, R] with 2 * R <= head_dim {head_dim}")


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first 2 * R dimensions of x [B, H, S, D] by the angles of ``positions`` [B, S].

    cos, sin: [max_positions, R]. interleaved=False pairs dimension d with d + R (GPT-NeoX, Llama), True pairs 2d with
    2d + 1 (GPT-J). Computed in fp32, returned in x's dtype. The dimensions behind 2 * R pass through.
    """
    for name, value in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"apply_rotary({name}) is a {value.dtype if isinstance(value, Tensor) else type(value).__name__}: a floating tensor is needed")
    _check_tables(cos, sin, x.shape[-1])
    if x.ndim != 4 or not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64) or positions.ndim != 2:
        got = f"{positions.dtype} {tuple(positions.shape)}" if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"apply_rotary: x has shape {tuple(x.shape)} and positions are {got}: [B, H, S, D] and int64 or int32 [B, S] are needed")
    if positions.shape[1] != x.shape[2] or positions.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"apply_rotary: positions have shape {tuple(positions.shape)}: [B, S] = [{x.shape[0]}, {x.shape[2]}] is needed, as x {tuple(x.shape)} has")
    half = cos.shape[-1]
    try:
        # Unlike an index, this takes no negative position for one counted from the end.
        c, s = (torch.nn.functional.embedding(positions, table).float().unsqueeze(1) for table in (cos, sin))
    except IndexError as error:  # of the host's memory; devices assert it
        raise ValueError(f"rotary: a position is outside of the table of {cos.shape[0]} positions: {error}") from error
    rotated, passed = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return torch.cat((turned.to(x.dtype), passed), dim=-1)
