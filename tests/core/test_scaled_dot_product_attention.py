"""attnhub.scaled_dot_product_attention against torch's, over its whole contract."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attnhub
from attnhub import scaled_dot_product_attention as ours

DENSE = [
    ((5, 8), (7, 8)),
    ((3, 5, 8), (3, 7, 8)),
    ((2, 3, 5, 8), (2, 3, 7, 8)),
    ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8)),
    ((2, 1, 2, 3, 5, 8), (2, 1, 2, 3, 7, 8)),
]
BROADCAST = [
    ((2, 3, 5, 8), (1, 3, 7, 8)), ((1, 3, 5, 8), (2, 3, 7, 8)), ((2, 3, 5, 8), (2, 1, 7, 8)), ((2, 1, 3, 5, 8), (2, 4, 3, 7, 8)),
    ((5, 8), (2, 3, 7, 8)), ((3, 5, 8), (2, 3, 7, 8)), ((2, 1, 5, 8), (3, 7, 8)),
]  # fmt: skip


def _inputs(q: tuple[int, ...], k: tuple[int, ...], v_dim: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(q), torch.randn(k), torch.randn(*k[:-1], v_dim)


def _same(*args: Any, **kwargs: Any) -> torch.Tensor:
    got, want = ours(*args, **kwargs), F.scaled_dot_product_attention(*args, **kwargs)
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    return got


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q", "k"), DENSE + BROADCAST, ids=str)
def test_shapes_and_top_left_causal(q: tuple[int, ...], k: tuple[int, ...], causal: bool) -> None:
    _same(*_inputs(q, k), is_causal=causal)
    _same(*_inputs(q, k, 4), is_causal=causal, scale=0.3)


@pytest.mark.parametrize(("sq", "sk"), [(1, 9), (9, 1), (4, 9), (9, 4), (6, 6)])
def test_causal_is_top_left(sq: int, sk: int) -> None:
    _same(*_inputs((2, 2, sq, 8), (2, 2, sk, 8)), is_causal=True)


def _mask_shapes(full: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every shape of two or more dimensions that broadcasts to the full one."""
    found = []
    for rank in range(2, len(full) + 1):
        for ones in itertools.product((False, True), repeat=rank):
            found.append(tuple(1 if one else size for one, size in zip(ones, full[-rank:])))
    return sorted(set(found))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("q", "k"), [*DENSE[:4], BROADCAST[1], BROADCAST[3]], ids=str)
def test_masks_of_every_broadcastable_shape(q: tuple[int, ...], k: tuple[int, ...], kind: str) -> None:
    lead = torch.broadcast_shapes(q[:-2], k[:-2])
    query, key, value = _inputs(q, k)
    for shape in _mask_shapes((*lead, q[-2], k[-2])):
        mask: torch.Tensor = torch.randn(shape)
        if kind == "bool":
            mask = mask > -1
            mask[..., 0] = True
        _same(query, key, value, mask)


def test_rows_without_keys_are_zero() -> None:
    q, k, v = _inputs((2, 3, 5, 8), (2, 3, 7, 8))
    hidden = torch.rand(5, 7) < 0.6
    hidden[1] = False
    hidden[3] = False
    for mask in (hidden, torch.zeros(5, 7).masked_fill(~hidden, float("-inf"))):
        out = ours(q, k, v, mask)
        assert torch.equal(out[:, :, [1, 3]], torch.zeros(2, 3, 2, 8))
        want = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(out[:, :, [0, 2, 4]], want[:, :, [0, 2, 4]], atol=2e-6, rtol=1e-5)
    assert torch.equal(ours(q[0, 0], k[0, 0], v[0, 0], torch.zeros(5, 7, dtype=torch.bool)), torch.zeros(5, 8))


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (4, 1), (6, 3), (4, 4)])
@pytest.mark.parametrize("lead", [(), (2,), (2, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_enable_gqa(q_heads: int, kv_heads: int, lead: tuple[int, ...], masked: bool) -> None:
    q, k, v = _inputs((*lead, q_heads, 5, 8), (*lead, kv_heads, 7, 8))
    mask = torch.randn(5, 7) if masked else None
    got = ours(q, k, v, mask, enable_gqa=True)
    group = q_heads // kv_heads
    want = F.scaled_dot_product_attention(q, k.repeat_interleave(group, -3), v.repeat_interleave(group, -3), mask)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_without_enable_gqa_heads_must_broadcast() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        ours(*_inputs((2, 4, 5, 8), (2, 2, 7, 8)))
    _same(*_inputs((2, 4, 5, 8), (2, 1, 7, 8)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in _inputs((2, 3, 5, 8), (2, 3, 7, 8)))
    got = ours(q, k, v, is_causal=True)
    assert got.dtype == dtype
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(got.double(), want, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("q", "k"), [DENSE[0], DENSE[2], DENSE[3], BROADCAST[1], BROADCAST[2]], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_gradients(q: tuple[int, ...], k: tuple[int, ...], mask: str | None) -> None:
    leaves = [t.requires_grad_() for t in _inputs(q, k)]
    kwargs: dict[str, Any] = {"is_causal": mask == "causal"}
    if mask == "bool":
        kwargs["attn_mask"] = torch.rand(5, 7) < 0.8
        kwargs["attn_mask"][:, 0] = True
    if mask == "float":
        kwargs["attn_mask"] = torch.randn(5, 7, requires_grad=True)
        leaves.append(kwargs["attn_mask"])
    got, want = ours(*leaves[:3], **kwargs), F.scaled_dot_product_attention(*leaves[:3], **kwargs)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("q", "k"), [((2, 3, 0, 8), (2, 3, 7, 8)), ((0, 3, 5, 8), (0, 3, 7, 8)), ((2, 3, 5, 8), (2, 3, 0, 8)), ((0, 8), (4, 8))], ids=str)
def test_zero_sizes(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    query, key, value = _inputs(q, k)
    out = ours(query, key, value)
    assert out.shape == query.shape and not out.any()


def test_dropout_keeps_the_mean_and_drops() -> None:
    q, k = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 64, 8)
    v = torch.eye(64)[None, None]
    out = ours(q, k, v, dropout_p=0.5)
    assert abs((out == 0).float().mean().item() - 0.5) < 0.1
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 2 / 64))


def test_signature_is_torchs() -> None:
    """Positional order and names of the documented signature."""
    q = torch.randn(1, 1, 3, 4)
    assert torch.equal(ours(q, q, q, None, 0.0, True), ours(query=q, key=q, value=q, attn_mask=None, dropout_p=0.0, is_causal=True, scale=None, enable_gqa=False))


def test_it_is_served_by_attnhub() -> None:
    q = torch.randn(1, 1, 3, 4)
    with attnhub.use("reference"):
        ours(q, q, q)
    assert attnhub.last_decision().chosen == "reference"  # type: ignore[union-attr]
