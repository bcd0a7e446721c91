"""Masks against four nested loops, written from the docstring of `Mask` and from nothing else."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Optional

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import attnhub
from attnhub.mask import FULL, Mask
from attnhub.problem import Feature


def _loops(mask: Mask, batch: int, heads: int, sq: int, sk: int) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """(allowed, bias) [B, Hq, Sq, Sk] pair by pair."""
    allowed = torch.zeros(batch, heads, sq, sk, dtype=torch.bool)
    bias = torch.zeros(batch, heads, sq, sk)

    def at(data: torch.Tensor, *index: int) -> Any:
        return data[tuple(0 if size == 1 else i for i, size in zip(index, data.shape))].item()

    for b in range(batch):
        length = sk if mask.seqused_k is None else int(mask.seqused_k[b])
        for h in range(heads):
            for i in range(sq):
                p = i if mask.align == "top_left" else i + length - sq
                for j in range(sk):
                    ok = True
                    if mask.causal:
                        ok = j <= p
                        if mask.prefix is not None:
                            ok = ok or j < int(mask.prefix[b])
                        if mask.blocks is not None:
                            a, c = int(mask.blocks[0][b, i]), int(mask.blocks[1][b, j])
                            ok = ok or (a == c and a >= 0)
                    left, right = mask.window
                    if left != -1 and j < p - left:
                        ok = False
                    if right != -1 and j > p + right:
                        ok = False
                    if mask.chunk and math.floor(p / mask.chunk) != math.floor(j / mask.chunk):
                        ok = False
                    if mask.segments is not None and int(mask.segments[0][b, i]) != int(mask.segments[1][b, j]):
                        ok = False
                    if mask.seqused_k is not None and j >= int(mask.seqused_k[b]):
                        ok = False
                    if mask.leftpad is not None and j < int(mask.leftpad[b]):
                        ok = False
                    if mask.bool_mask is not None and not at(mask.bool_mask, b, h, i, j):
                        ok = False
                    if mask.block_sparse is not None and not at(mask.block_sparse, b, h, i // mask.block_size[0], j // mask.block_size[1]):
                        ok = False
                    if mask.bias is not None:
                        added = at(mask.bias, b, h, i, j)
                        ok = ok and added != -math.inf
                        bias[b, h, i, j] += added
                    if mask.alibi is not None:
                        slope = mask.alibi[h] if mask.alibi.ndim == 1 else mask.alibi[b, h]
                        bias[b, h, i, j] += -float(slope) * abs(p - j)
                    allowed[b, h, i, j] = ok
    return allowed, bias if mask.bias is not None or mask.alibi is not None else None


def _same(mask: Mask, batch: int, heads: int, sq: int, sk: int) -> None:
    allowed, bias = mask.to_dense(batch=batch, q_heads=heads, seqlen_q=sq, seqlen_k=sk)
    want, want_bias = _loops(mask, batch, heads, sq, sk)
    assert allowed.dtype == torch.bool and torch.equal(allowed.expand(batch, heads, sq, sk), want)
    assert (bias is None) == (want_bias is None)
    if bias is not None and want_bias is not None:
        assert bias.dtype == torch.float32
        torch.testing.assert_close(bias.expand(batch, heads, sq, sk), want_bias)


@st.composite
def _masks(draw: st.DrawFn, unique: bool = True, without: tuple[str, ...] = ()) -> tuple[list[Mask], tuple[int, int, int, int]]:
    """Parts of one mask, in any order, and the sizes (B, Hq, Sq, Sk)."""
    batch, heads, sq, sk = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 7)), draw(st.integers(1, 9))
    align = draw(st.sampled_from(["bottom_right", "top_left"]))
    ints = st.integers

    def vector(low: int, high: int) -> torch.Tensor:
        return torch.tensor(draw(st.lists(ints(low, high), min_size=batch, max_size=batch)))

    def grid(width: int, low: int, high: int) -> torch.Tensor:
        rows = st.lists(ints(low, high), min_size=width, max_size=width)
        return torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch)))

    def dense(*sizes: int) -> torch.Tensor:
        shape = [draw(st.sampled_from([1, size])) for size in sizes]
        drop = draw(ints(0, len(sizes) - 2))
        shape = shape[drop:] if all(s == 1 for s in shape[:drop]) else shape
        generator = torch.Generator().manual_seed(draw(ints(0, 99)))
        return torch.rand(*shape, generator=generator)

    makers = {
        "causal": lambda: attnhub.Causal(align),
        "window": lambda: attnhub.Window(draw(ints(-1, 4)), draw(ints(-1, 4)), align),
        "chunk": lambda: attnhub.Chunk(draw(ints(1, 5)), align),
        "prefix": lambda: attnhub.Prefix(vector(0, sk + 1)),
        "segments": lambda: attnhub.Segments(grid(sq, 0, 2), grid(sk, 0, 2)),
        "blocks": lambda: attnhub.Segments(grid(sq, -1, 1), grid(sk, -1, 1), widen_causal=True),
        "seqused_k": lambda: attnhub.SeqLens(vector(0, sk)),
        "leftpad": lambda: attnhub.LeftPad(vector(0, sk)),
        "bool_mask": lambda: attnhub.BoolMask(dense(batch, heads, sq, sk) < 0.7),
        "bias": lambda: attnhub.Bias(dense(batch, heads, sq, sk).apply_(lambda x: -math.inf if x < 0.2 else x)),
        "alibi": lambda: attnhub.ALiBi(torch.rand(*((batch, heads) if draw(st.booleans()) else (heads,))), align),
        "block_sparse": lambda: attnhub.BlockSparse(torch.rand(1, heads, -(-sq // 2), -(-sk // 3)) < 0.6, (2, 3)),
    }
    names = draw(st.lists(st.sampled_from(sorted(set(makers) - set(without))), unique=unique, max_size=5))
    return [makers[name]() for name in names], (batch, heads, sq, sk)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(_masks())
def test_to_dense_is_what_the_docstring_says(drawn: tuple[list[Mask], tuple[int, int, int, int]]) -> None:
    parts, sizes = drawn
    mask = FULL
    for part in parts:
        mask = mask & part
    _same(mask, *sizes)
    other_order = FULL
    for part in reversed(parts):
        other_order = part & other_order
    first, second = (m.to_dense(batch=sizes[0], q_heads=sizes[1], seqlen_q=sizes[2], seqlen_k=sizes[3]) for m in (mask, other_order))
    assert torch.equal(first[0].expand(*sizes), second[0].expand(*sizes)), "& commutes"
    assert mask.features() == other_order.features()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(_masks(unique=False, without=("prefix", "blocks", "seqused_k")), st.integers(0, 5))
def test_and_is_the_intersection(drawn: tuple[list[Mask], tuple[int, int, int, int]], cut: int) -> None:
    """Of parts that widen nothing and move no positions: a pair is allowed by a & b if by a and by b; biases add up."""
    parts, (batch, heads, sq, sk) = drawn
    try:
        a, b = (functools.reduce(Mask.__and__, side, FULL) for side in (parts[:cut], parts[cut:]))
        both = a & b
    except ValueError as error:
        assert "both hold" in str(error)
        return
    (allowed_a, bias_a), (allowed_b, bias_b), (allowed, bias) = (
        m.to_dense(batch=batch, q_heads=heads, seqlen_q=sq, seqlen_k=sk) for m in (a, b, both)
    )  # fmt: skip
    assert torch.equal((allowed_a & allowed_b).expand(batch, heads, sq, sk), allowed.expand(batch, heads, sq, sk))
    if bias is not None:
        zero = torch.zeros(())
        torch.testing.assert_close(bias.expand(batch, heads, sq, sk), (zero if bias_a is None else bias_a) + (zero if bias_b is None else bias_b) + bias.new_zeros(batch, heads, sq, sk))


# -- by hand -----------------------------------------------------------------------------------------------------------------------


def _rows(mask: Mask, sq: int, sk: int) -> list[str]:
    allowed, _ = mask.to_dense(batch=1, q_heads=1, seqlen_q=sq, seqlen_k=sk)
    return ["".join("x" if bool(a) else "." for a in row) for row in allowed.expand(1, 1, sq, sk)[0, 0]]


def test_pictures() -> None:
    assert _rows(attnhub.Causal(), 2, 4) == ["xxx.", "xxxx"]
    assert _rows(attnhub.Causal("top_left"), 2, 4) == ["x...", "xx.."]
    assert _rows(attnhub.Causal(), 4, 2) == ["..", "..", "x.", "xx"]
    assert _rows(attnhub.Causal("top_left"), 4, 2) == ["x.", "xx", "xx", "xx"]
    assert _rows(attnhub.Causal() & attnhub.Window(1), 4, 4) == ["x...", "xx..", ".xx.", "..xx"]
    assert _rows(attnhub.Window(0, 1), 3, 3) == ["xx.", ".xx", "..x"]
    assert _rows(attnhub.Window(0, 0), 2, 4) == ["..x.", "...x"]
    assert _rows(attnhub.Causal() & attnhub.Chunk(2), 4, 4) == ["x...", "xx..", "..x.", "..xx"]
    assert _rows(attnhub.Causal() & attnhub.Prefix(torch.tensor([2])), 4, 4) == ["xx..", "xx..", "xxx.", "xxxx"]
    assert _rows(attnhub.Prefix(torch.tensor([2])), 2, 4) == ["xxxx", "xxxx"], "a prefix widens causal and restricts nothing"
    image = torch.tensor([[-1, 0, 0, -1]])
    assert _rows(attnhub.Causal() & attnhub.Segments(image, widen_causal=True), 4, 4) == ["x...", "xxx.", "xxx.", "xxxx"]
    assert _rows(attnhub.Segments(torch.tensor([[0, 0, 1]])), 3, 3) == ["xx.", "xx.", "..x"]
    assert _rows(attnhub.Causal() & attnhub.SeqLens(torch.tensor([3])), 2, 5) == ["xx...", "xxx.."]
    assert _rows(attnhub.Causal("top_left") & attnhub.SeqLens(torch.tensor([3])), 2, 5) == ["x....", "xx..."]
    assert _rows(attnhub.Causal() & attnhub.LeftPad(torch.tensor([1])), 3, 3) == ["...", ".x.", ".xx"]
    assert _rows(attnhub.BlockSparse(torch.tensor([[True, False], [False, True]]), (1, 2)), 2, 3) == ["xx.", "..x"]


def test_alibi_is_symmetric_around_the_position() -> None:
    _, bias = attnhub.ALiBi(torch.tensor([0.5])).to_dense(batch=1, q_heads=1, seqlen_q=2, seqlen_k=4)
    assert bias is not None and bias[0, 0].tolist() == [[-1.0, -0.5, 0.0, -0.5], [-1.5, -1.0, -0.5, 0.0]]
    _, bias = attnhub.ALiBi(torch.tensor([0.5]), "top_left").to_dense(batch=1, q_heads=1, seqlen_q=1, seqlen_k=3)
    assert bias is not None and bias[0, 0].tolist() == [[0.0, -0.5, -1.0]]


def test_negative_positions_are_floored_into_their_own_chunk() -> None:
    """Row 0 of 4 queries over 2 keys stands at -2: chunk floor(-2 / 2) = -1 holds no key."""
    assert _rows(attnhub.Chunk(2), 4, 2) == ["..", "..", "xx", "xx"]


# -- algebra -----------------------------------------------------------------------------------------------------------------------


def test_full_is_neutral() -> None:
    for mask in (attnhub.Causal("top_left"), attnhub.Window(3, 1), attnhub.SeqLens(torch.tensor([2])), FULL):
        for both in (mask & FULL, FULL & mask):
            for field in dataclasses.fields(Mask):
                assert getattr(both, field.name) is getattr(mask, field.name) or getattr(both, field.name) == getattr(mask, field.name)


def test_windows_take_the_tighter_end() -> None:
    assert (attnhub.Window(5, -1) & attnhub.Window(3, 4)).window == (3, 4)
    assert (attnhub.Window(-1, 0) & attnhub.Window(2, -1)).window == (2, 0)


def test_lengths_padding_masks_and_biases_combine() -> None:
    both = attnhub.SeqLens(torch.tensor([5, 2])) & attnhub.SeqLens(torch.tensor([3, 4]))
    assert both.seqused_k is not None and both.seqused_k.tolist() == [3, 2]
    both = attnhub.LeftPad(torch.tensor([1, 2])) & attnhub.LeftPad(torch.tensor([2, 0]))
    assert both.leftpad is not None and both.leftpad.tolist() == [2, 2]
    both = attnhub.BoolMask(torch.tensor([[True, False]])) & attnhub.BoolMask(torch.tensor([[True], [False]]))
    assert both.bool_mask is not None and both.bool_mask[0, 0].tolist() == [[True, False], [False, False]]
    both = attnhub.Bias(torch.ones(2, 1)) & attnhub.Bias(torch.full((1, 3), 2.0))
    assert both.bias is not None and both.bias.shape == (1, 1, 2, 3) and both.bias.unique().tolist() == [3.0]


def test_biases_keep_their_gradients_through_and() -> None:
    a, b = torch.zeros(3, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    both = attnhub.Bias(a) & attnhub.Bias(b) & attnhub.Causal()
    q = torch.randn(1, 1, 3, 4)
    attnhub.attention(q, q, q, both)[..., 0].sum().backward()
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(a.grad.sum(0), b.grad)


def test_bias_of_minus_infinity_masks_out_through_and() -> None:
    hidden = attnhub.Bias(torch.tensor([[0.0, -math.inf]])) & attnhub.Bias(torch.tensor([[-math.inf, 1.0]]))
    assert _rows(hidden, 1, 2) == [".."]


@pytest.mark.parametrize("widen", ["prefix", "blocks"])
@pytest.mark.parametrize("swap", [False, True])
def test_widening_parts_have_no_alignment_of_their_own(widen: str, swap: bool) -> None:
    """Neither reads a position, and neither takes align=."""
    part = attnhub.Prefix(torch.tensor([2])) if widen == "prefix" else attnhub.Segments(torch.tensor([[0, 0, -1]]), torch.tensor([[0, 0, -1, -1]]), widen_causal=True)
    causal = attnhub.Causal("top_left")
    mask = part & causal if swap else causal & part
    assert mask.align == "top_left"
    _same(mask, 1, 1, 3, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: attnhub.Causal() & attnhub.Window(2, align="top_left"),
        lambda: attnhub.Causal("top_left") & attnhub.Chunk(2),
        lambda: attnhub.ALiBi(torch.ones(2)) & attnhub.Causal("top_left"),
    ],
)
def test_two_alignments_do_not_mix(make: Any) -> None:
    with pytest.raises(ValueError, match=r"mask & other.*align.*to_dense"):
        make()


def test_parts_without_position_mix_with_any_alignment() -> None:
    for part in (attnhub.SeqLens(torch.tensor([2])), attnhub.LeftPad(torch.tensor([1])), attnhub.Segments(torch.tensor([[0, 1]])), attnhub.BoolMask(torch.ones(2, 2, dtype=torch.bool))):
        assert (part & attnhub.Causal("top_left")).align == "top_left" == (attnhub.Causal("top_left") & part).align


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("chunk", lambda: attnhub.Chunk(2) & attnhub.Chunk(3)),
        ("prefix", lambda: attnhub.Prefix(torch.tensor([1])) & attnhub.Prefix(torch.tensor([2]))),
        ("segments", lambda: attnhub.Segments(torch.zeros(1, 2, dtype=torch.int32)) & attnhub.Segments(torch.ones(1, 2, dtype=torch.int32))),
        ("alibi", lambda: attnhub.ALiBi(torch.ones(2)) & attnhub.ALiBi(torch.ones(2))),
        ("block_sparse", lambda: attnhub.BlockSparse(torch.ones(1, 1, dtype=torch.bool), (2, 2)) & attnhub.BlockSparse(torch.ones(1, 1, dtype=torch.bool), (4, 4))),
    ],
)
def test_what_cannot_be_combined_says_so(name: str, make: Any) -> None:
    with pytest.raises(ValueError, match=rf"both hold {name}.*to_dense"):
        make()


def test_the_same_part_twice_is_once() -> None:
    for part in (
        attnhub.Chunk(int("1000")), attnhub.Prefix(torch.tensor([1])), attnhub.Segments(torch.zeros(1, 2, dtype=torch.int32)), attnhub.ALiBi(torch.ones(2)),
        attnhub.BlockSparse(torch.ones(1, 1, dtype=torch.bool), (2, 2)),
    ):  # fmt: skip
        both = part & part
        assert both.features() == part.features()


def test_equal_numbers_are_the_same_part() -> None:
    assert (attnhub.Chunk(int("1000")) & attnhub.Chunk(int("1000"))).chunk == 1000


def test_and_with_something_else() -> None:
    with pytest.raises(TypeError, match=r"attnhub\.Mask.*Tensor"):
        attnhub.Causal() & torch.ones(2, 2, dtype=torch.bool)  # type: ignore[operator]


# -- the value ---------------------------------------------------------------------------------------------------------------------


def test_features_name_every_part() -> None:
    ids = torch.zeros(1, 2, dtype=torch.int32)
    for mask, features in (
        (FULL, set()), (attnhub.Causal(), {Feature.CAUSAL_BOTTOM_RIGHT}), (attnhub.Causal("top_left"), {Feature.CAUSAL_TOP_LEFT}),
        (attnhub.Window(1), {Feature.WINDOW}), (attnhub.Window(1, align="top_left"), {Feature.WINDOW, Feature.CAUSAL_TOP_LEFT}), (attnhub.Window(), set()),
        (attnhub.Chunk(2), {Feature.CHUNK}), (attnhub.Prefix(torch.tensor([1])), {Feature.PREFIX}), (attnhub.Segments(ids), {Feature.SEGMENTS}),
        (attnhub.Segments(ids, widen_causal=True), {Feature.SEGMENTS}), (attnhub.SeqLens(torch.tensor([1])), {Feature.SEQLENS}),
        (attnhub.LeftPad(torch.tensor([1])), {Feature.LEFTPAD}), (attnhub.BoolMask(torch.ones(2, dtype=torch.bool)), {Feature.BOOL_MASK}),
        (attnhub.Bias(torch.ones(2)), {Feature.BIAS}), (attnhub.ALiBi(torch.ones(2)), {Feature.ALIBI}),
        (attnhub.BlockSparse(torch.ones(1, 1, dtype=torch.bool), (2, 2)), {Feature.BLOCK_SPARSE}),
        (attnhub.Causal() & attnhub.Window(3) & attnhub.SeqLens(torch.tensor([1])), {Feature.CAUSAL_BOTTOM_RIGHT, Feature.WINDOW, Feature.SEQLENS}),
    ):  # fmt: skip
        assert mask.features() == features


def test_masks_are_immutable_pytrees_with_identity_equality() -> None:
    mask = attnhub.Causal() & attnhub.Window(3) & attnhub.SeqLens(torch.tensor([1]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.causal = False  # type: ignore[misc]
    assert attnhub.Window(3) != attnhub.Window(3) and len({mask, mask, attnhub.Causal()}) == 2
    leaves, spec = pytree.tree_flatten(mask)
    again = pytree.tree_unflatten(leaves, spec)
    for field in dataclasses.fields(Mask):
        assert getattr(again, field.name) is getattr(mask, field.name) or getattr(again, field.name) == getattr(mask, field.name)
    dumped = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert pytree.tree_unflatten(leaves, dumped).window == (3, -1)


def test_integers_of_any_width_become_int32() -> None:
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        mask = attnhub.SeqLens(torch.tensor([1], dtype=dtype))
        assert mask.seqused_k is not None and mask.seqused_k.dtype == torch.int32


def test_causal_masks_are_made_once() -> None:
    assert attnhub.Causal() is attnhub.Causal("bottom_right") is not attnhub.Causal("top_left") is attnhub.Causal("top_left")
    with pytest.raises(ValueError, match="align="):
        attnhub.Causal([])  # type: ignore[arg-type]
