"""What the triton backend's kernels, interpreted, read and what reaches a result: pages, padding, strides, values that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_interpreter import interpreted
from triton_reference import check, ints, plan_for, tensors

from attnhub.backend import Call, Needs
from attnhub.backends.triton import tiles
from attnhub.layouts import Varlen
from attnhub.mask import ALiBi, Causal, LeftPad, Prefix, SeqLens, Window


@interpreted
@pytest.mark.parametrize("page_size", [1, 4, 12, 16, 48, 64])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_paged(page_size: int, length: int) -> None:
    """Pages smaller and larger than tiles (of 16 and 32 keys here), and such that a tile begins inside one."""
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(17, 2, page_size, 16, generator=generator) for _ in range(2))
    k[0], v[0] = float("nan"), float("nan")
    q = torch.randn(2, 4, length, 16, generator=generator)
    used = ints(5 * page_size + min(3, page_size), page_size)
    table = torch.randperm(16, generator=generator).reshape(2, 8).int() + 1
    # Entries behind a sequence's length are never followed.
    table[0, 6:], table[1, 1:] = -1, 10**6
    for page, filled in ((table[0, 5], 3),):
        k[page, :, filled:], v[page, :, filled:] = float("nan"), float("inf")
    check(Call(q, k, v, Causal() & Window(9 if length == 3 else -1) & SeqLens(used), 0.3, need_lse=True, block_table=table), backward=False)


@interpreted
@pytest.mark.parametrize("page_size", [4, 12, 64])
def test_paged_reads_nothing_else(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one address outside of the tensors is read, at a sequence that ends with the table, and at one whose further entries are no pages."""
    from triton.runtime.interpreter import InterpreterBuilder

    k, v = (torch.randn(10, 2, page_size, 16) for _ in range(2))
    q, used = torch.randn(2, 4, 1, 16), ints(5 * page_size, page_size)
    table = torch.arange(10, dtype=torch.int32).reshape(2, 5)
    table[1, 1:] = 2**31 - 1
    call = Call(q, k, v, SeqLens(used), 0.3, block_table=table)
    spans = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in (q, k, v, used, table)]
    load = InterpreterBuilder.create_masked_load
    read = 0

    def checked(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        nonlocal read
        addresses = pointers.data[mask.data].astype("int64")
        assert all(any(lo <= address < hi for lo, hi in spans) for address in addresses.flatten().tolist()), "a read outside of the tensors"
        read += addresses.size
        return load(self, pointers, mask, *rest)

    with monkeypatch.context() as patch:
        # Of one part each: `combine` would read partial results.
        patch.setattr(tiles, "split_count", lambda programs, key_tiles, slots: 1)
        patch.setattr(InterpreterBuilder, "create_masked_load", checked)
        plan_for(call).forward(call)
    assert read >= k[0].numel() * 2 * 6


@interpreted
@pytest.mark.parametrize("dim", [16, 40])
def test_masked_values_that_are_not_finite(dim: int) -> None:
    """NaN and infinities reach exactly the rows that attend to them, in both directions; in the last dimensions too, which may be a part apart."""
    q, k, v = tensors(1, (2, 1), (40, 40), (dim, dim), torch.float32)
    v[:, :, 30, -2:], v[:, 0, 35, -3], v[:, 0, 36, -4] = float("nan"), float("inf"), float("-inf")
    check(Call(q, k, v, Causal(), 0.25, need_lse=True), backward=False)

    q, k, v = tensors(1, (2, 1), (40, 40), (dim, dim), torch.float32)
    k[:, :, 30, -1], v[:, :, 33, -1] = float("nan"), float("nan")
    call = Call(q, k, v, Causal(), 0.25, need_lse=True)
    plan = plan_for(call)
    out, lse = plan.forward(call)
    assert lse is not None
    assert torch.isfinite(out[:, :, :30]).all() and not torch.isfinite(out[:, :, 30:]).any()
    grads = plan.backward(call, torch.ones_like(out), None, out, lse, Needs())
    assert grads.q is not None and torch.isfinite(grads.q[:, :, :30]).all()

    q, k, v = tensors(1, (2, 1), (40, 40), (dim, dim), torch.float32)
    call = Call(q, k, v, Window(2, 0), 0.25, need_lse=True)
    out, lse = plan.forward(call)
    assert lse is not None
    grad_out = torch.ones_like(out)
    clean = plan.backward(call, grad_out, None, out, lse, Needs())
    grad_out[:, :, 20, -1] = float("nan")
    grads = plan.backward(call, grad_out, None, out, lse, Needs())
    others = [j for j in range(40) if j not in (18, 19, 20)]
    for grad, right in ((grads.k, clean.k), (grads.v, clean.v)):
        assert grad is not None and right is not None
        assert (~torch.isfinite(grad[0, 0, :, -1])).nonzero().flatten().tolist() == [18, 19, 20]
        torch.testing.assert_close(grad[:, :, others], right[:, :, others])


@interpreted
@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_padding_is_never_read(fill: float) -> None:
    q, k, v = tensors(2, (2, 1), (20, 50), (16, 16), torch.float32)
    for x in (k, v):
        x[0, :, 33:], x[1, :, 7:], x[0, :, :3] = fill, fill, fill
    check(Call(q, k, v, SeqLens(ints(33, 7)) & LeftPad(ints(3, 0)) & Causal(), 0.25, need_lse=True))


@interpreted
@pytest.mark.parametrize("name", ["seqused_k", "leftpad", "prefix", "alibi", "alibi of sequences", "sinks", "cu_seqlens", "block_table"])
def test_small_tensors_with_strides(name: str) -> None:
    """Every second element of a larger tensor, or one element repeated: as with a dense copy."""

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, 7)], -1).flatten(-2)[..., ::2]

    q, k, v = tensors(2, (4, 2), (20, 37), (16, 16), torch.float32)
    calls = []
    for change in (strided, lambda x: x):
        mask, extra, heads = Causal(), {}, (q, k, v)
        if name == "seqused_k":
            mask = mask & SeqLens(change(ints(30, 9)))
        elif name == "leftpad":
            mask = mask & LeftPad(change(ints(5, 20)))
        elif name == "prefix":
            mask = mask & Prefix(change(ints(12, 30)))
        elif name == "alibi":
            mask = mask & ALiBi(change(torch.tensor([0.1, 0.2, 0.3, 0.4])))
        elif name == "alibi of sequences":
            mask = mask & ALiBi(change(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])))
        elif name == "sinks":
            extra = {"sinks": change(torch.tensor([0.5, -1.0, 2.0, 0.1]))}
        elif name == "cu_seqlens":
            heads = tensors(1, (4, 2), (20, 37), (16, 16), torch.float32)
            extra = {"varlen": Varlen(change(ints(0, 8, 20)), change(ints(0, 17, 37)), 12, 20)}
        else:
            heads = (q[:, :, :1], *(x[:, :, :32].reshape(2, 2, 4, 8, 16).transpose(1, 2).reshape(8, 2, 8, 16) for x in (k, v)))
            mask = Causal() & SeqLens(ints(32, 9))
            extra = {"block_table": change(ints(3, 2, 1, 0, 7, 4, 5, 6).view(2, 4))}
        calls.append(Call(*heads, mask, 0.25, need_lse=True, **extra))
    (out, lse), (wanted, wanted_lse) = (plan_for(call).forward(call) for call in calls)
    assert lse is not None and wanted_lse is not None
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
