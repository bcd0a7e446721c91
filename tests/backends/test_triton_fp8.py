"""The triton backend's kernels for fp8, interpreted, against the fp64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_interpreter import interpreted
from triton_reference import PACKED, agree, ints, plan_for, some_bias, tensors, variant

from attnhub.backend import Call, Descale
from attnhub.backends.reference import maths
from attnhub.mask import FULL, ALiBi, Bias, Causal, LeftPad, Mask, SeqLens, Window


def eight(lengths: tuple[int, int], dims: tuple[int, int] = (40, 24), heads: tuple[int, int] = (4, 2), batch: int = 2) -> Any:
    """q, k, v in fp8, 16 times as large as what they stand for, and their factors [batch, heads[1]]."""
    q, k, v = ((16 * x).to(torch.float8_e4m3fn) for x in tensors(batch, heads, lengths, dims, torch.float32))
    generator = torch.Generator().manual_seed(7)
    return q, k, v, Descale(*((0.5 + torch.rand(batch, heads[1], generator=generator)) / 16 for _ in range(3)))


def check_fp8(call: Call) -> None:
    """Forward in fp8: v and its weights are multiplied in fp16, so that the output's bf16 is all that is rounded noticeably."""
    out, lse = plan_for(call).forward(call)
    assert lse is not None and lse.dtype == torch.float32 and out.dtype == torch.bfloat16
    want, want_lse = maths.forward(variant(call, torch.float64), None, torch.float64, True)
    plain, _ = maths.forward(variant(call, torch.float32), None, torch.float32, True)
    assert want_lse is not None
    agree("out", out, want, plain.to(torch.bfloat16), torch.bfloat16)
    agree("lse", lse, want_lse, want_lse + 1e-5 * want_lse.abs(), torch.float32)


@interpreted
@pytest.mark.parametrize(
    ("lengths", "mask", "extra"),
    [
        ((20, 37), FULL, {}), ((20, 50), Causal() & Window(17), {}), ((20, 37), Bias(some_bias().repeat(1, 2, 1, 1)), {}), ((20, 37), ALiBi(torch.rand(4)), {}),
        ((20, 37), Causal(), {"softcap": 2.0}), ((40, 17), Causal(), {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}), ((1, 100), Causal(), {}),
        ((3, 300), Causal() & SeqLens(ints(277, 2)), {}), ((50, 60), SeqLens(ints(33, 0)) & LeftPad(ints(3, 0)), {}),
    ],
    ids=("full", "window", "bias", "alibi", "softcap", "sinks", "decode", "decode_split", "padding"),
)  # fmt: skip
def test_fp8(lengths: tuple[int, int], mask: Mask, extra: dict[str, Any]) -> None:
    *qkv, factors = eight(lengths)
    check_fp8(Call(*qkv, mask, 0.25, need_lse=True, descale=factors, **extra))


@interpreted
def test_fp8_packed() -> None:
    q, k, v, _ = eight((50, 80), batch=1)
    _, _, _, factors = eight((1, 1), batch=3)
    check_fp8(Call(q, k, v, Causal(), 0.25, varlen=PACKED, need_lse=True, descale=factors))


@interpreted
def test_fp8_factors() -> None:
    """Absent, of any sign, 0, expanded, and each with strides of its own."""
    *qkv, factors = eight((20, 37))
    one = torch.tensor(0.1).expand(2, 2)
    for descale in (
        None, Descale(q=factors.q), Descale(v=factors.v), Descale(one, one, one), Descale(one, factors.k.t().contiguous().t(), factors.v),
        Descale(-factors.q, factors.k, -factors.v), Descale(torch.tensor([[0.1, -0.1], [0.0, 0.1]]), factors.k, factors.v),
    ):  # fmt: skip
        scale = 0.25 if descale is not None and descale.q is not None else 0.25 / 256
        for sign in (1, -1):
            check_fp8(Call(*qkv, Causal(), sign * scale, need_lse=True, descale=descale))


@interpreted
@pytest.mark.parametrize("length", [1, 20])
def test_fp8_padding_is_never_read(length: int) -> None:
    """(The interpreter takes fp8's NaN for 480: enough to be seen. That a NaN reaches the rows that attend to it is for GPUs to show.)"""
    q, k, v, factors = eight((length, 50))
    nan = torch.tensor(float("nan")).to(v.dtype)
    for x in (k, v):
        x[0, :, 33:], x[1, :, 7:] = nan, nan
    check_fp8(Call(q, k, v, SeqLens(ints(33, 7)) & Causal(), 0.25, need_lse=True, descale=factors))


@interpreted
def test_fp8_paged() -> None:
    q, k, v, factors = eight((3, 17 * 16), batch=2)
    k, v = (x[0].unflatten(1, (17, 16)).transpose(0, 1).contiguous() for x in (k, v))
    table = torch.randperm(16, generator=torch.Generator().manual_seed(3)).reshape(2, 8).int() + 1
    check_fp8(Call(q, k, v, Causal() & SeqLens(ints(83, 16)), 0.25, need_lse=True, block_table=table, descale=factors))
