"""The triton backend's kernels, interpreted, against the fp64 reference: every part of a mask, feature, type and head dim."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_interpreter import interpreted
from triton_reference import PACKED, agree, check, ints, plan_for, some_bias, some_blocks, tensors, variant

from attnhub.backend import Call, Needs
from attnhub.backends.reference import maths
from attnhub.backends.triton import tiles
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Bias, BlockSparse, BoolMask, Causal, Chunk, LeftPad, Mask, Prefix, Segments, SeqLens, Window


def document_ids(length: int, size: int, first: int) -> torch.Tensor:
    return (torch.arange(length) // size + first).int()[None].repeat(2, 1)


def bias_of(*shape: int) -> Mask:
    return Bias(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


SINKS = torch.tensor([0.5, -1.0])
#: Large seeds and offsets: every word of the counter and the key counts.
DROPOUT: dict[str, Any] = {"dropout_p": 0.4, "rng": torch.tensor([2**61 + 12345, 2**60 + 2**31 + 7])}
#: name -> (lengths of q and k, mask, further arguments of Call).
CASES: dict[str, tuple[tuple[int, int], Mask, dict[str, Any]]] = {
    "full": ((20, 37), FULL, {}),
    "causal": ((37, 37), Causal(), {}),
    "causal_more_keys": ((20, 50), Causal(), {}),
    "causal_more_queries": ((50, 20), Causal(), {}),
    "causal_top_left": ((20, 50), Causal("top_left"), {}),
    "causal_top_left_more_queries": ((50, 20), Causal("top_left"), {}),
    "window": ((50, 60), Window(17, 3), {}),
    "causal_window": ((60, 60), Causal() & Window(9), {}),
    "window_right_top_left": ((40, 60), Window(-1, 5, "top_left"), {}),
    "chunk": ((50, 40), Causal() & Chunk(13), {}),
    "prefix": ((40, 40), Causal() & Prefix(ints(25, 0)), {}),
    "segments": ((40, 40), Causal() & Segments(document_ids(40, 11, 0)), {}),
    "blocks": ((40, 40), Causal() & Segments(document_ids(40, 11, -1), widen_causal=True), {}),
    "seqlens": ((20, 50), SeqLens(ints(33, 0)), {}),
    "seqlens_causal": ((20, 50), SeqLens(ints(33, 7)) & Causal(), {}),
    "leftpad": ((20, 50), LeftPad(ints(19, 3)) & Causal(), {}),
    "bool_mask": ((20, 37), BoolMask(torch.rand(2, 1, 20, 37, generator=torch.Generator().manual_seed(2)) > 0.4), {}),
    "bias": ((20, 37), Bias(some_bias()), {}),
    "bias_whole": ((20, 37), bias_of(2, 2, 20, 37), {"softcap": 2.0}),
    "bias_of_batch": ((20, 37), bias_of(2, 1, 20, 37) & Causal(), DROPOUT),
    "bias_one": ((20, 37), bias_of(1, 1, 20, 37) & Window(9, 3), {"sinks": SINKS}),
    "bias_of_keys": ((40, 37), bias_of(1, 2, 1, 37) & Causal(), {"softmax_scale": -0.3}),
    "bias_of_queries": ((20, 70), bias_of(2, 1, 20, 1) & SeqLens(ints(61, 0)), {}),
    "bias_scalar": ((40, 50), bias_of(1, 1, 1, 1) & ALiBi(torch.tensor([0.5, 0.25])) & Causal(), {}),
    "bias_packed": ((50, 80), bias_of(3, 2, 25, 37) & Causal(), {"varlen": PACKED}),
    "bias_packed_one": ((50, 80), bias_of(1, 1, 25, 37), {"varlen": PACKED, "sinks": SINKS}),
    "bias_packed_of_keys": ((50, 80), bias_of(1, 2, 1, 37) & Causal(), {"varlen": PACKED}),
    "bias_of_heads_block_sparse": ((50, 100), bias_of(1, 2, 50, 100) & some_blocks((50, 100), (16, 32), 2, 2), {}),
    "bias_of_queries_block_sparse": ((50, 100), bias_of(1, 2, 50, 1) & some_blocks((50, 100), (16, 32), 2, 1), {}),
    "bias_of_keys_block_sparse": ((50, 100), bias_of(1, 2, 1, 100) & some_blocks((50, 100), (8, 5), 2, 1), {}),
    "alibi": ((20, 37), ALiBi(torch.tensor([0.5, 0.25])) & Causal(), {}),
    "softcap": ((20, 37), Causal(), {"softcap": 2.0}),
    "sinks": ((20, 37), Causal() & Window(4), {"sinks": SINKS}),
    "sinks_rows_without_keys": ((40, 17), Causal(), {"sinks": SINKS}),
    "negative_scale": ((20, 37), Causal(), {"softmax_scale": -0.3}),
    "decode": ((1, 100), Causal(), {}),
    "decode_split_sinks": ((3, 300), Causal() & SeqLens(ints(277, 2)), {"sinks": SINKS}),
    "decode_window": ((2, 100), Causal() & Window(30), {}),
    "packed": ((50, 80), Causal(), {"varlen": PACKED}),
    "packed_sinks": ((50, 80), FULL, {"varlen": PACKED, "sinks": SINKS}),
    "packed_seqlens": ((50, 80), Causal() & SeqLens(ints(5, 3, 30)), {"varlen": PACKED}),
    "dropout": ((20, 37), FULL, DROPOUT),
    "dropout_most": ((20, 37), Causal(), {**DROPOUT, "dropout_p": 0.9}),
    "dropout_window_sinks_softcap": ((50, 60), Causal() & Window(17), {**DROPOUT, "sinks": SINKS, "softcap": 2.0}),
    "dropout_bias": ((20, 37), Bias(some_bias()), DROPOUT),
    "dropout_decode_split": ((3, 300), Causal() & SeqLens(ints(277, 2)), {**DROPOUT, "sinks": SINKS}),
    "dropout_packed": ((50, 80), Causal(), {**DROPOUT, "varlen": PACKED}),
    # Tiles of the interpreter have sides of 16 and 32: blocks of 32 are made of whole tiles, others are not.
    "block_sparse": ((80, 100), some_blocks((80, 100), (32, 32)), {}),
    "block_sparse_by_head": ((80, 100), some_blocks((80, 100), (16, 64), 2, 2) & Causal(), {}),
    "block_sparse_small": ((40, 60), some_blocks((40, 60), (5, 7), 2, 1), {}),
    "block_sparse_window_dropout": ((80, 100), some_blocks((80, 100), (32, 32), 2, 2) & Window(40, 10), DROPOUT),
    "block_sparse_left_padded": ((80, 100), some_blocks((80, 100), (32, 64)) & Causal() & LeftPad(ints(37, 0)), {}),
    "block_sparse_bias": ((20, 37), some_blocks((20, 37), (8, 16)) & Bias(some_bias()), {}),
    "block_sparse_chunk_seqlens": ((70, 90), some_blocks((70, 90), (16, 32)) & Causal() & Chunk(29) & SeqLens(ints(81, 0)), {}),
    "block_sparse_more_queries": ((100, 40), some_blocks((100, 40), (32, 32)) & Causal("top_left") & Window(20, -1, "top_left"), {}),
    "block_sparse_decode_split": ((1, 300), BlockSparse(torch.rand(2, 1, 1, 5, generator=torch.Generator().manual_seed(1)) < 0.5, (16, 64)), {}),
    "block_sparse_decode_by_head": ((5, 300), BlockSparse(torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.5, (2, 64)) & Causal(), {}),
    "block_sparse_packed": ((50, 80), some_blocks((25, 37), (16, 32), 3, 2) & Causal(), {"varlen": PACKED}),
    "packed_decode": ((5, 80), Causal(), {"varlen": Varlen(ints(0, 1, 1, 3), ints(0, 13, 33, 70), 2, 37)}),
}


def check_case(name: str, dims: tuple[int, int]) -> None:
    lengths, mask, extra = CASES[name]
    extra = dict(extra)
    scale = extra.pop("softmax_scale", 0.25)
    q, k, v = tensors(1 if "varlen" in extra else 2, (2, 1), lengths, dims, torch.float32)
    check(Call(q, k, v, mask, scale, need_lse=True, **extra))


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    check_case(name, (16, 16))


@interpreted
def test_more_heads_in_a_group_than_rows_in_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in decoding with multi-head latent attention: the packed rows take several tiles, and the keys are split all the same."""
    from attnhub.backends.triton import launch

    counts = []
    chosen = tiles.split_count
    monkeypatch.setattr(tiles, "split_count", lambda *a: counts.append(chosen(*a)) or counts[-1])
    monkeypatch.setattr(launch, "processors", lambda device: 32)
    q, k, v = tensors(1, (80, 1), (1, 200), (40, 16), torch.float32)
    check(Call(q, k, v, Causal(), 0.25, need_lse=True))
    assert counts == [chosen(5, 13, 32)] and counts[0] > 1


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(16, 16), (5, 24)])
def test_two_byte_types(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    q, k, v = tensors(1, (4, 2), (37, 37), dims, dtype, bshd=True)
    check(Call(q, k, v, Causal(), 0.3, need_lse=True))


@interpreted
@pytest.mark.parametrize("dims", [(1, 1), (3, 40), (80, 8), (40, 40), (48, 33), (64, 96), (129, 129), (192, 128), (320, 257), (512, 512), (576, 512)])
def test_any_head_dim(dims: tuple[int, int]) -> None:
    q, k, v = tensors(1, (2, 2), (18, 70), dims, torch.float32)
    check(Call(q, k, v, Causal(), dims[0] ** -0.5, need_lse=True))


@interpreted
@pytest.mark.parametrize("name", ["packed", "packed_decode", "decode_split_sinks", "dropout_bias", "bias_of_keys", "block_sparse_by_head", "softcap"])
def test_features_with_a_head_dim_in_parts(name: str) -> None:
    check_case(name, (41, 35))


@interpreted
@pytest.mark.parametrize("dims", [(32, 32), (40, 32), (16, 64)])
def test_head_dims_in_halves(dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a product of fp32 is three in tf32: main part and rest may be equal, and each of q/k and v may have a rest alone."""
    from attnhub.backends.triton import arguments

    monkeypatch.setattr(arguments, "precision", lambda q, v_head_dim, lengths: "tf32x3")
    monkeypatch.setattr(tiles, "TF32X3_PART", 16)
    width = tiles.widths(*dims, 16, 16, 16)
    assert width.main == width.v_main and width.rest + width.v_rest > 0
    q, k, v = tensors(1, (4, 2), (20, 37), dims, torch.float32)
    check(Call(q, k, v, Causal(), 0.25, need_lse=True))


@interpreted
@pytest.mark.parametrize("length", [1, 15, 17, 32, 33])
def test_lengths_around_a_tile(length: int) -> None:
    q, k, v = tensors(1, (2, 1), (length, length), (16, 16), torch.float32)
    check(Call(q, k, v, Causal(), 0.25, need_lse=True))


@interpreted
def test_expanded_keys_and_strange_strides() -> None:
    q, k, v = tensors(2, (4, 1), (20, 20), (16, 16), torch.float32)
    k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    # The stride of a dimension of size 1 is arbitrary.
    k = k.as_strided(k.shape, (0, 2**40, 16, 1))
    check(Call(q, k, v, Causal(), 0.25, need_lse=True))


@interpreted
def test_extreme_scores() -> None:
    """Scores of 300 in fp32: rounding of the scores themselves is all the error there is, and it hangs on the order in which q k^T is summed.

    The 300 are one summand. Where torch's product meets it last, a score is rounded once at that size (rms error 0.9e-5); where it comes
    first, with every summand that follows (3.5e-5). numpy's product, by which Triton interprets tl.dot, sums in an order of its own that
    differs between processors (2.0e-5 on a Zen 4, last or not). A dot product has no order: the kernel is allowed twice the error of plain
    maths in the worse of the two.
    """
    q, k, v = tensors(4, (4, 4), (17, 33), (16, 16), torch.float32)
    for shift in (-300.0, 300.0):
        far, one = torch.full_like(k[..., :1], shift), torch.ones_like(q[..., :1])
        calls = [
            Call(torch.cat(q_parts, -1), torch.cat(k_parts, -1), v, Causal(), 1.0, need_lse=True)
            for q_parts, k_parts in (((q, one), (k, far)), ((one, q), (far, k)))
        ]
        want = maths.forward(variant(calls[0], torch.float64), None, torch.float64, True)
        plains = [maths.forward(variant(call, torch.float32), None, torch.float32, True) for call in calls]
        for call in calls:
            for name, got, right, *plain in zip(("out", "lse"), plan_for(call).forward(call), want, *plains):
                assert got is not None and right is not None
                agree(name, got, right, max(plain, key=lambda p: (p.double() - right).abs().max().item()), torch.float32)


@interpreted
def test_only_asked_gradients() -> None:
    q, k, v = tensors(1, (2, 2), (17, 17), (16, 16), torch.float32)
    call = Call(q, k, v, FULL, 0.25, need_lse=True)
    plan = plan_for(call)
    out, lse = plan.forward(call)
    assert lse is not None
    grads = plan.backward(call, torch.ones_like(out), None, out, lse, Needs(False, False, True))
    assert grads.q is None and grads.k is None and grads.v is not None
    no_lse = Call(q, k, v, FULL, 0.25)
    assert plan.forward(no_lse)[1] is None
