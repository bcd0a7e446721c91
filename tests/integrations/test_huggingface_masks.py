"""attnhub's mask function against the dense masks of transformers: the same pairs, as structure where structure is claimed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub.mask import FULL

pytest.importorskip("transformers")
from transformers import masking_utils as mu

from attnhub.integrations.huggingface.compact import CompactMask
from attnhub.integrations.huggingface.masks import attnhub_mask, recognise

BATCH = 3
#: In newer versions positions inside a packed document start at its first token, which moves chunks.
REMAPS = hasattr(mu, "packed_sequence_compatibility_function")
HAS_OFFSETS = "q_offset" in inspect.signature(mu.sdpa_mask).parameters


def packed(length: int) -> Callable[..., Any]:
    """Two documents a row, of 5 and length - 5 tokens."""
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).expand(BATCH, -1)
    ids = (torch.arange(length) >= 5).long().expand(BATCH, -1)
    if not REMAPS:
        return lambda inner: mu.and_masks(inner, mu.packed_sequence_mask_function(ids))
    return lambda inner: mu.packed_sequence_compatibility_function(inner, positions, ids)


def image_blocks(length: int) -> Any:
    ids = torch.full((BATCH, length), -1)
    ids[:, 2:6] = 0
    ids[1, 8:10] = 1
    return mu.blockwise_overlay(ids)


NO_LEFT = torch.zeros(BATCH, dtype=torch.long)
PATTERNS: dict[str, Callable[[int], Any]] = {
    "causal": lambda n: mu.causal_mask_function,
    "bidirectional": lambda n: mu.bidirectional_mask_function,
    "sliding": lambda n: mu.sliding_window_causal_mask_function(4),
    "sliding_wide": lambda n: mu.sliding_window_causal_mask_function(100),
    "sliding_bidirectional": lambda n: mu.sliding_window_bidirectional_mask_function(3),
    "chunked": lambda n: mu.chunked_causal_mask_function(4, NO_LEFT),
}
#: name -> (q_length, kv_length, q_offset, kv_offset) as each cache of transformers gives them.
SIZES = {
    "no_cache": (11, 11, 0, 0),
    "dynamic_decode": (1, 12, 11, 0),
    "dynamic_chunk": (3, 14, 11, 0),
    "static_prefill": (5, 16, 0, 0),
    "static_decode": (1, 16, 9, 0),
    "static_chunk": (3, 16, 6, 0),
    "sliding_decode": (1, 4, 9, 6),
    "sliding_chunk": (3, 6, 9, 6),
}


def tokens(kind: str, length: int) -> Optional[Tensor]:
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    if kind == "absent":
        return None
    if kind == "left":
        mask[1, :4] = False
        mask[2, : length - 1] = False
    if kind == "right":
        mask[1, length - 4 :] = False
        mask[2, 1:] = False
    if kind == "hole":
        mask[1, 3] = False
        mask[2, :2] = False
    return mask


def both(sizes: str, function: Any, pad: str, tensor_offset: bool = False) -> tuple[Any, Tensor]:
    """(what attnhub's function gives, transformers' dense mask)."""
    q_length, kv_length, q_offset, kv_offset = SIZES[sizes]
    shared = {
        "batch_size": BATCH,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": tokens(pad, q_offset + q_length),
    }
    where: dict[str, Any]
    if HAS_OFFSETS:
        where = {"q_length": q_length, "q_offset": torch.tensor(q_offset) if tensor_offset else q_offset}
    else:
        where = {"cache_position": torch.arange(q_offset, q_offset + q_length)}
    dense = mu.sdpa_mask(**shared, **where, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return attnhub_mask(**shared, **where), dense


@pytest.mark.parametrize("tensor_offset", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_pairs_as_the_dense_mask(pattern: str, sizes: str, tensor_offset: bool) -> None:
    for pad in ("absent", "ones", "left", "right", "hole"):
        made, dense = both(sizes, PATTERNS[pattern](SIZES[sizes][1]), pad, tensor_offset)
        assert torch.equal(made.dense() if isinstance(made, CompactMask) else made, dense), pad


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_pairs_where_values_cannot_be_read(pattern: str, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device in a decode step, or while a CUDA graph is captured."""
    from attnhub.integrations.huggingface import masks

    monkeypatch.setattr(masks, "_is_readable", lambda *_: False)
    monkeypatch.setattr(masks, "_is_free_to_read", lambda *_: False)
    for pad, tensor_offset in itertools.product(("absent", "ones", "left", "right", "hole"), (False, True)):
        made, dense = both(sizes, PATTERNS[pattern](SIZES[sizes][1]), pad, tensor_offset)
        assert torch.equal(made.dense() if isinstance(made, CompactMask) else made, dense), pad
        assert isinstance(made, CompactMask) or pattern in ("chunked", "sliding_bidirectional")


@pytest.mark.parametrize("pattern", ["causal", "sliding"])
def test_a_decode_step_that_may_be_compiled_changes_in_tensors_only(pattern: str) -> None:
    """transformers forbids the causal shortcut there. Lengths that grow with every step must not be numbers."""
    if not HAS_OFFSETS:
        pytest.skip("this transformers passes tensors only")
    function = PATTERNS[pattern](16)
    structures = set()
    for filled, pad in itertools.product((5, 9, 15), ("left", "hole", "ones")):
        for offset in (filled, torch.tensor(filled)):
            shared = {
                "batch_size": BATCH,
                "q_length": 1,
                "kv_length": 16,
                "mask_function": function,
                "attention_mask": tokens(pad, filled + 1),
            }
            made = attnhub_mask(**shared, q_offset=offset, allow_is_causal_skip=False)
            dense = mu.sdpa_mask(**shared, q_offset=offset, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
            assert isinstance(made, CompactMask) and torch.equal(made.dense(), dense) and made.contiguous() is made
            structures.add((made.keys, made.mask.causal, made.mask.window, made.mask.align, made.mask.features()))
    assert len(structures) == 1


def test_packed_and_blocks() -> None:
    for inner, compact in (
        (mu.causal_mask_function, True),
        (mu.sliding_window_causal_mask_function(4), True),
        (mu.chunked_causal_mask_function(4, NO_LEFT), not REMAPS),
    ):
        made, dense = both("no_cache", packed(11)(inner), "absent")
        assert isinstance(made, CompactMask) == compact
        assert torch.equal(made.dense() if compact else made, dense)
        assert not compact or made.mask.segments is not None
    if not hasattr(mu, "blockwise_overlay"):
        return
    for pad in ("absent", "left", "right", "hole"):
        made, dense = both("no_cache", mu.or_masks(mu.causal_mask_function, image_blocks(11)), pad)
        assert isinstance(made, CompactMask) and made.mask.blocks is not None and torch.equal(made.dense(), dense)
        made, dense = both("no_cache", mu.or_masks(mu.sliding_window_causal_mask_function(4), image_blocks(11)), pad)
        assert torch.equal(made, dense), "a window that blocks widen is no structure of attnhub's"


@pytest.mark.parametrize(
    ("pattern", "sizes", "pad", "expected"),
    [
        ("causal", "no_cache", "absent", {"causal"}),
        ("causal", "no_cache", "ones", {"causal"}),
        ("causal", "no_cache", "left", {"causal", "leftpad"}),
        ("causal", "no_cache", "right", {"causal", "seqused_k"}),
        ("causal", "no_cache", "hole", {"causal", "bool_mask"}),
        ("causal", "dynamic_decode", "ones", set()),
        ("causal", "dynamic_chunk", "left", {"causal", "leftpad"}),
        ("causal", "static_prefill", "absent", {"causal"}),
        ("causal", "static_decode", "ones", set()),
        ("bidirectional", "no_cache", "ones", set()),
        ("bidirectional", "no_cache", "right", {"seqused_k"}),
        ("sliding", "no_cache", "absent", {"causal", "window"}),
        ("sliding_wide", "no_cache", "absent", {"causal"}),
        ("sliding", "sliding_decode", "ones", set()),
        ("sliding_bidirectional", "no_cache", "absent", {"window"}),
        ("chunked", "no_cache", "absent", {"causal", "chunk"}),
    ],
)
def test_structure(pattern: str, sizes: str, pad: str, expected: set[str]) -> None:
    made, _ = both(sizes, PATTERNS[pattern](SIZES[sizes][1]), pad)
    assert isinstance(made, CompactMask)
    parts = ("causal", "window", "chunk", "leftpad", "seqused_k", "bool_mask", "segments", "blocks")
    assert {p for p in parts if getattr(made.mask, p) is not getattr(FULL, p) and getattr(made.mask, p) != getattr(FULL, p)} == expected
    assert (made.mask is FULL) == (not expected)


def test_unknown_functions_stay_dense() -> None:
    def checkerboard(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return (q + kv) % 2 == 0

    for function in (checkerboard, mu.and_masks(mu.causal_mask_function, checkerboard), mu.or_masks(mu.causal_mask_function, checkerboard)):
        assert recognise(function) is None
        made, dense = both("no_cache", function, "left")
        assert isinstance(made, Tensor) and torch.equal(made, dense)


def test_a_static_cache_goes_on_counting_in_its_own_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnhub.integrations.huggingface import masks

    monkeypatch.setattr(masks, "_is_free_to_read", lambda *_: False)
    offset = torch.tensor(4)
    made = attnhub_mask(BATCH, 16, 1, offset, 0, mu.causal_mask_function)
    assert isinstance(made, CompactMask)
    before = made.dense()
    offset += 3
    assert torch.equal(made.dense(), before) and before[0].sum() == 5


def test_a_model_that_looks_inside_gets_the_dense_mask() -> None:
    made, dense = both("no_cache", mu.causal_mask_function, "left")
    assert isinstance(made, CompactMask)
    assert made.shape == dense.shape and made.dtype == torch.bool and made.ndim == 4 and len(made) == BATCH
    assert torch.equal(made[:, :, 2:, :4], dense[:, :, 2:, :4])
    assert torch.equal(torch.cat([made, dense], -1), torch.cat([dense, dense], -1))
    assert torch.equal(~made, ~dense) and torch.equal(made & dense, dense) and torch.equal(dense | made, dense)
    assert torch.equal(torch.where(made, 0.0, 1.0), torch.where(dense, 0.0, 1.0))
    assert torch.equal(made.to(torch.float32), dense.float())
    assert made.to("cpu") is made
    moved = made.to("meta")
    assert isinstance(moved, CompactMask) and all(t.device.type == "meta" for t in moved.mask.tensors())
    assert torch.equal(made.expand(BATCH, 2, 11, 11), dense.expand(BATCH, 2, 11, 11))
    assert attnhub_mask(BATCH, 11, 11, mask_function=mu.causal_mask_function, attention_mask=made) is made


def test_dense_masks_of_all_kinds_are_served() -> None:
    """A 4-D mask that the caller prepared reaches the attention function as it is: bool or additive, longer than the keys or not."""
    from attnhub.integrations.huggingface.attention import attention_forward

    module = torch.nn.Module().eval()
    module.is_causal = True  # type: ignore[assignment]
    q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))
    allowed = torch.rand(2, 1, 5, 7) < 0.5
    allowed[..., 0] = True
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2)
    additive = torch.zeros(2, 1, 5, 7).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, additive, torch.nn.functional.pad(allowed, (0, 3), value=True)):
        out, weights = attention_forward(module, q, k, v, mask)
        assert weights is None and out.is_contiguous()
        torch.testing.assert_close(out, theirs)
    causal = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5], is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attention_forward(module, q, k, v, None)[0], causal)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(attention_forward(module, q, k, v, None, is_causal=False)[0], full)
    torch.testing.assert_close(attention_forward(module, q[:, :, :1], k, v, None)[0], full[:, :1])
    torch.testing.assert_close(attention_forward(module, q, k, v, None, is_causal=False, scaling=torch.tensor(8**-0.5))[0], full)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        attention_forward(module, q, k, v, torch.zeros(2, 1, 5, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="indices"):
        attention_forward(module, q, k, v, None, indices=torch.zeros(1))
    with pytest.raises(ValueError, match="continuous batching"):
        attention_forward(module, q, k, v, None, cache=object())


def test_sinks_of_each_query() -> None:
    from attnhub.integrations.huggingface.attention import attention_forward

    module = torch.nn.Module().eval()
    q, k, v, sinks = (torch.randn(2, 4, 5, n) for n in (8, 8, 8, 1))
    sinks.requires_grad_()
    scores = torch.cat([q @ k.transpose(-2, -1) * 8**-0.5, sinks], -1)
    theirs = (torch.softmax(scores, -1)[..., :-1] @ v).transpose(1, 2)
    for options in ({}, {"output_attentions": True}):
        ours, _ = attention_forward(module, q, k, v, None, is_causal=False, sinks=sinks, **options)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours.square().sum(), sinks)[0], torch.autograd.grad(theirs.square().sum(), sinks, retain_graph=True)[0]
        )


def test_packed_documents_with_lengths_are_served_as_varlen() -> None:
    from attnhub.integrations.huggingface.attention import attention_forward

    module = torch.nn.Module().eval()
    ids = torch.tensor([[0] * 5 + [1] * 6])
    mask = CompactMask(attnhub.Causal() & attnhub.Segments(ids), 1, 11, 11, 11, "cpu")
    q, k, v = (torch.randn(1, 4, 11, 8) for _ in range(3))
    theirs, _ = attention_forward(module, q, k, v, mask)
    cu = torch.tensor([0, 5, 11], dtype=torch.int32)
    ours, _ = attention_forward(module, q, k, v, mask, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=6, max_length_k=6)
    torch.testing.assert_close(ours, theirs)
    decision = attnhub.last_decision()
    assert decision is not None and attnhub.Feature.VARLEN in decision.problem.features
