"""merge_states: attention over parts of the keys, combined exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import merge_states

State = tuple[Tensor, Tensor]


def _parts(dtype: torch.dtype = torch.float32, cuts: tuple[int, ...] = (0, 5, 6, 17, 30)) -> tuple[State, list[State], Tensor]:
    q, k, v = torch.randn(2, 4, 7, 16, dtype=dtype), torch.randn(2, 2, cuts[-1], 16, dtype=dtype), torch.randn(2, 2, cuts[-1], 8, dtype=dtype)
    parts = [attnhub.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, backend="reference") for a, b in itertools.pairwise(cuts)]
    whole = attnhub.attention(q, k, v, return_lse=True, backend="reference")
    return whole, parts, q


def _close(a: State, b: State, **tolerance: float) -> None:
    torch.testing.assert_close(a[0], b[0], **tolerance)
    torch.testing.assert_close(a[1], b[1], **tolerance)


def test_parts_make_the_whole() -> None:
    whole, parts, _ = _parts()
    _close(merge_states(*parts), whole, atol=1e-6, rtol=1e-5)


def test_any_order_and_grouping() -> None:
    whole, (a, b, c, d), _ = _parts()
    for merged in (
        merge_states(d, b, a, c), merge_states(merge_states(a, b), merge_states(c, d)), merge_states(a, merge_states(b, merge_states(c, d))),
        merge_states(merge_states(merge_states(a, b), c), d),
    ):  # fmt: skip
        _close(merged, whole, atol=1e-6, rtol=1e-5)


def test_one_part_is_itself() -> None:
    whole, _, _ = _parts()
    _close(merge_states(whole), whole, atol=1e-7, rtol=1e-6)


def test_a_part_without_keys_counts_for_nothing() -> None:
    whole, parts, q = _parts()
    nothing = (torch.full((2, 4, 7, 8), float("nan")), torch.full((2, 4, 7), -math.inf))
    _close(merge_states(nothing, *parts, nothing), whole, atol=1e-6, rtol=1e-5)
    out, lse = merge_states(nothing, nothing)
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -math.inf))
    empty = attnhub.attention(q, q.new_zeros(2, 2, 0, 16), q.new_zeros(2, 2, 0, 8), return_lse=True)
    _close(merge_states(*parts, empty), whole, atol=1e-6, rtol=1e-5)


def test_rows_empty_in_some_parts() -> None:
    """Causal over the first half leaves later keys to nobody: those rows come from one part alone."""
    q, k, v = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    whole = attnhub.attention(q, k, v, attnhub.Causal(), return_lse=True)
    early = attnhub.attention(q, k[:, :, :3], v[:, :, :3], attnhub.Causal("top_left"), return_lse=True)
    late_mask = torch.ones(6, 6).tril().bool()[:, 3:]
    late = attnhub.attention(q, k[:, :, 3:], v[:, :, 3:], attnhub.BoolMask(late_mask), return_lse=True)
    _close(merge_states(early, late), whole, atol=1e-6, rtol=1e-5)


def test_huge_and_tiny_logits_do_not_overflow() -> None:
    out = torch.randn(1, 1, 3, 4)
    far = [(out, torch.tensor([[[3e4, -3e4, 0.0]]])), (-out, torch.tensor([[[-3e4, 3e4, 0.0]]]))]
    merged, lse = merge_states(*far)
    torch.testing.assert_close(merged, torch.stack([out[0, 0, 0], -out[0, 0, 1], 0 * out[0, 0, 2]])[None, None])
    torch.testing.assert_close(lse, torch.tensor([[[3e4, 3e4, math.log(2)]]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_out_keeps_the_dtype_of_the_parts(dtype: torch.dtype) -> None:
    whole, parts, _ = _parts(dtype)
    out, lse = merge_states(*parts)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, whole[0], atol=2e-2, rtol=2e-2)


def test_double_precision_is_kept() -> None:
    whole, parts, _ = _parts(torch.float64)
    out, lse = merge_states(*parts)
    assert out.dtype == lse.dtype == torch.float64
    _close((out, lse), whole, atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_the_whole() -> None:
    q, k, v = (torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    g_out, g_lse = torch.randn(2, 2, 9, 8, dtype=torch.float64), torch.randn(2, 2, 9, dtype=torch.float64)

    def grads(state: State) -> tuple[Tensor, ...]:
        return torch.autograd.grad([state[0], state[1]], [q, k, v], [g_out.to(state[0].dtype), g_lse.to(state[1].dtype)])

    whole = attnhub.attention(q, k, v, return_lse=True, backend="reference")
    parts = [attnhub.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, backend="reference") for a, b in ((0, 4), (4, 9))]
    for got, want in zip(grads(merge_states(*parts)), grads(whole)):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_gradcheck() -> None:
    outs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: merge_states(*zip(t[:3], t[3:])), (*outs, *lses))


def test_no_gradient_from_a_part_without_keys() -> None:
    out, lse = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, requires_grad=True)
    nothing = torch.full((1, 2, 4), float("nan"), requires_grad=True), torch.full((1, 2), -math.inf, requires_grad=True)
    merged, total = merge_states((out, lse), nothing)
    (merged.sum() + total.sum()).backward()
    assert out.grad is not None and torch.equal(out.grad, torch.ones_like(out))
    assert lse.grad is not None and torch.allclose(lse.grad, torch.ones_like(lse))
    for t in nothing:
        assert t.grad is not None and torch.equal(t.grad, torch.zeros_like(t))


def test_errors_name_the_part() -> None:
    good = torch.zeros(1, 2, 3), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="at least one"):
        merge_states()
    for bad in ((torch.zeros(1, 2, 4), torch.zeros(1, 2)), (torch.zeros(1, 2, 3), torch.zeros(1, 3)), (torch.zeros(1, 3, 3), torch.zeros(1, 3))):
        with pytest.raises(ValueError, match=r"part 1 .*\(1, 2, 3\)"):
            merge_states(good, bad)
