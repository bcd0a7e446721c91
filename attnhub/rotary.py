"""Rotary position embedding (RoFormer, arXiv 2104.09864) at given positions."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first 2 * R dimensions of x [B, H, S, D] by the angles of ``positions`` [B, S].

    cos, sin: [max_positions, R]. interleaved=False pairs dimension d with d + R (GPT-NeoX, Llama), True pairs 2d with
    2d + 1 (GPT-J). Computed in fp32, returned in x's dtype. The dimensions behind 2 * R pass through.
    """
    half = cos.shape[-1]
    if cos.shape != sin.shape or cos.ndim != 2 or 2 * half > x.shape[-1]:
        raise ValueError(f"rotary cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [max_positions, R] with 2 * R <= head_dim {x.shape[-1]}")
    c, s = cos[positions].float().unsqueeze(1), sin[positions].float().unsqueeze(1)
    rotated, passed = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return torch.cat((turned.to(x.dtype), passed), dim=-1)
