"""Block-sparse masks in the triton backend's kernels, interpreted: lists of tiles, and tiles that are never read."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_interpreter import interpreted
from triton_reference import check, ints, plan_for, some_blocks, tensors

from attnhub.backend import Call, Needs
from attnhub.mask import BlockSparse, Causal, SeqLens


@interpreted
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (5, 7), (1000, 1000)])
@pytest.mark.parametrize(("by_keys", "group"), [(False, 1), (False, 2), (True, 1)])
def test_tile_map(size: tuple[int, int], by_keys: bool, group: int) -> None:
    """The list of a row of tiles holds exactly those that touch a kept block, and the ranks count them."""
    from attnhub.backends.triton.block_sparse import block_sparse
    from attnhub.backends.triton.launch import Recorder

    lengths, tile = (40, 150), (16, 32)
    mask = some_blocks(lengths, size, 2, 4)
    assert mask.block_sparse is not None
    arguments = {"max_q": lengths[0], "max_k": lengths[1], "block_sparse": mask.block_sparse.view(torch.uint8), "block_size": mask.block_size}
    found = block_sparse(Recorder({}), arguments, *tile, by_keys=by_keys, group=group)
    pairs = mask.block_sparse.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[:, :, : lengths[0], : lengths[1]]
    pairs = pairs.unflatten(1, (4 // group, group)).any(2)
    if group > 1:
        tile = (lengths[0], tile[1])
    if by_keys:
        pairs, tile = pairs.transpose(2, 3), (tile[1], tile[0])
    for b in range(2):
        for h in range(4 // group):
            rows = pairs[b, h].split(tile[0])
            assert found["tile_map"].shape[2] == len(rows)
            for r, row in enumerate(rows):
                want = [t for t, columns in enumerate(row.split(tile[1], 1)) if columns.any()]
                listed, ranks = found["tile_map"][b, h, r]
                assert listed[: len(want)].tolist() == want
                assert ranks.tolist() == [sum(w < t for w in want) for t in range(found["tile_count"] + 1)]
    whole = all(s % t == 0 or s > 100 for s, t in zip(size, (16, 32))) and group == 1
    assert (found["sparse"] is None) == whole


@interpreted
def test_dropped_tiles_are_never_read() -> None:
    """NaN in keys and values of dropped blocks reaches nothing although no pair is tested; in both directions."""
    q, k, v = tensors(1, (2, 1), (64, 128), (16, 16), torch.float32)
    kept = torch.tensor([[True, False, True, False], [False, False, True, False]])
    k[:, :, 32:64], v[:, :, 96:] = float("nan"), float("nan")
    call = Call(q, k, v, BlockSparse(kept, (32, 32)), 0.25, need_lse=True)
    plan = plan_for(call)
    out, lse = plan.forward(call)
    assert lse is not None and torch.isfinite(out).all() and torch.isfinite(lse).all()
    grads = plan.backward(call, torch.ones_like(out), None, out, lse, Needs())
    for grad in (grads.q, grads.k, grads.v):
        assert grad is not None and torch.isfinite(grad).all()
    # Inside of a kept block, a row that does not attend to it computes once more, over the same list.
    q, k, v = tensors(1, (2, 1), (64, 128), (16, 16), torch.float32)
    v[:, :, 77] = float("inf")
    call = Call(q, k, v, BlockSparse(kept, (32, 32)) & Causal(), 0.25, need_lse=True)
    check(call, backward=False)
    found = []
    v[:, :, 77] = 0.0
    for value in (0.0, float("nan")):
        k[:, :, 78] = value
        out, lse = plan.forward(call)
        assert lse is not None
        found.append(plan.backward(call, torch.ones_like(out), None, out, lse, Needs()))
    clean, poisoned = (grads.q for grads in found)
    assert clean is not None and poisoned is not None
    torch.testing.assert_close(poisoned[:, :, :14], clean[:, :, :14])
    assert not torch.isfinite(poisoned[:, :, 14:]).any()

    k[:, :, 78] = 0.0
    out, lse = plan.forward(call)
    assert lse is not None
    grad_out = torch.ones_like(out)
    grad_out[:, :, 5] = float("nan")
    grads = plan.backward(call, grad_out, None, out, lse, Needs())
    for wrong, right in ((grads.k, found[0].k), (grads.v, found[0].v)):
        assert wrong is not None and right is not None
        torch.testing.assert_close(wrong[:, :, 70:], right[:, :, 70:])
        assert not torch.isfinite(wrong[:, :, 64:70]).any()


@interpreted
def test_block_sparse_paged() -> None:
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(17, 2, 16, 16, generator=generator) for _ in range(2))
    table = torch.randperm(16, generator=generator).reshape(2, 8).int() + 1
    for length in (1, 20):
        q = torch.randn(2, 4, length, 16, generator=generator)
        mask = some_blocks((length, 128), (8, 32), 2, 4) if length > 1 else BlockSparse(torch.tensor([[True, False, True, True]]), (1, 32))
        check(Call(q, k, v, mask & SeqLens(ints(101, 37)), 0.3, need_lse=True, block_table=table), backward=False)
