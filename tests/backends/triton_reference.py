"""Forward and backward of the triton backend's plans against the reference in fp64."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import torch

from attnhub.backend import Call, Needs, Plan
from attnhub.backends.reference import maths
from attnhub.backends.triton import TritonBackend
from attnhub.device import describe
from attnhub.layouts import Varlen
from attnhub.mask import BlockSparse, Mask
from attnhub.problem import DeviceInfo, Problem


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def problem(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, device: Optional[DeviceInfo] = None) -> Problem:
    dtype = str(q.dtype).removeprefix("torch.")
    return Problem(
        device or describe(q.device), dtype, dtype, q.shape[3], v.shape[3], q.shape[1], k.shape[1], q.shape[0], q.shape[2], k.shape[2]
    )  # fmt: skip


def plan_for(call: Call) -> Plan:
    return TritonBackend().prepare(problem(call.q, call.k, call.v))


def tensors(batch: int, heads: tuple[int, int], lengths: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, bshd: bool = False) -> Any:
    generator = torch.Generator().manual_seed(sum(lengths) * 7 + sum(dims))
    found = []
    for h, s, d in ((heads[0], lengths[0], dims[0]), (heads[1], lengths[1], dims[0]), (heads[1], lengths[1], dims[1])):
        shape = (batch, s, h, d) if bshd else (batch, h, s, d)
        x = torch.randn(shape, generator=generator).to(dtype)
        found.append(x.transpose(1, 2) if bshd else x)
    return found


def variant(call: Call, dtype: torch.dtype) -> Call:
    sinks = None if call.sinks is None else call.sinks.to(dtype)
    mask = call.mask
    if mask.bias is not None and dtype == torch.float64:
        # Its gradient comes in its own dtype.
        mask = dataclasses.replace(mask, bias=mask.bias.double())
    return Call(
        call.q.to(dtype), call.k.to(dtype), call.v.to(dtype), mask, call.softmax_scale, call.softcap, sinks, call.dropout_p, call.rng,
        call.varlen, call.block_table, True, call.descale,
    )  # fmt: skip


def agree(name: str, got: torch.Tensor, want: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype, factor: int = 2) -> None:
    """At most twice (factor) the error of PyTorch's own maths in this dtype, plus one rounding unit; non-finite values equal."""
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), f"{name}: finite values elsewhere"
    assert torch.equal(got[~finite].double().nan_to_num(nan=1.5), want[~finite].double().nan_to_num(nan=1.5)), f"{name}: other non-finite values"
    if not finite.any():
        return
    error = (got.double() - want)[finite].abs().max().item()
    allowed = factor * (plain.double() - want)[finite].abs().max().item() + torch.finfo(dtype).eps * want[finite].abs().max().item()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(call: Call, backward: bool = True) -> None:
    """Forward and backward against the reference in fp64; the yardstick is the reference in the inputs' own precision."""
    dtype = call.q.dtype
    plan = plan_for(call)
    out, lse = plan.forward(call)
    assert lse is not None and lse.dtype == torch.float32 and out.dtype == dtype
    exact, same = variant(call, torch.float64), variant(call, dtype)
    want, want_lse = maths.forward(exact, None, torch.float64, True)
    plain, plain_lse = maths.forward(same, None, torch.float32, True)
    assert want_lse is not None and plain_lse is not None
    agree("out", out, want, plain, dtype)
    agree("lse", lse, want_lse, plain_lse, torch.float32)
    if not backward:
        return
    generator = torch.Generator().manual_seed(5)
    # Strides that are not the output's.
    grad_out = torch.randn(out.transpose(1, 2).shape, generator=generator).to(dtype).transpose(1, 2)
    grad_lse = torch.randn(lse.shape, generator=generator)
    needs = Needs(True, True, True, call.mask.bias is not None, call.sinks is not None)
    grads = plan.backward(call, grad_out, grad_lse, out, lse, needs)
    exact_grads = maths.backward(exact, grad_out.double(), grad_lse.double(), want, want_lse, needs, None, torch.float64)
    # P and dS are multiplied in the inputs' dtype by any implementation: the yardstick rounds them too.
    plain_grads = maths.backward(same, grad_out, grad_lse, plain, plain_lse, needs, None, torch.float32)
    for name in ("q", "k", "v", "bias", "sinks"):
        got, wanted, yardstick = getattr(grads, name), getattr(exact_grads, name), getattr(plain_grads, name)
        if wanted is None:
            assert got is None
            continue
        assert got.shape == wanted.shape
        # A sink's gradient is a sum over all rows: with two of them, the yardstick's error may vanish by chance.
        slack = 1.0 if dtype != torch.float32 or name == "sinks" else 0.0
        yardstick = yardstick.double() + slack * torch.finfo(dtype).eps * wanted.abs().max()
        # Three times for gradients: P is recomputed from an lse that is itself rounded.
        agree("d" + name, got, wanted, yardstick, dtype, factor=3)


def some_bias() -> torch.Tensor:
    bias = torch.randn(1, 2, 20, 37, generator=torch.Generator().manual_seed(1))
    bias[..., 5:9] = float("-inf")
    bias[:, :, 3] = float("-inf")
    return bias


def some_blocks(lengths: tuple[int, int], size: tuple[int, int], batch: int = 1, heads: int = 1) -> Mask:
    """About half of the blocks, and one row of blocks without any."""
    shape = (batch, heads, -(-lengths[0] // size[0]), -(-lengths[1] // size[1]))
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(sum(size))) < 0.5
    kept[:, :, 0] = False
    return BlockSparse(kept, size)


PACKED = Varlen(ints(0, 20, 20, 45), ints(0, 13, 33, 70), 25, 37)
