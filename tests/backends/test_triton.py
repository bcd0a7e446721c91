"""The triton backend: its kernels under Triton's interpreter against the fp64 reference, and compiled for GPUs that are not here.

Triton decides at import whether kernels are interpreted. The process that pytest was started in keeps real compilation
(the tests of compilation need it) and runs this file once more in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
from typing import Any, Optional

import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from attnhub import config, testing
from attnhub.backend import Call, Descale, Needs, Plan, PrepareError
from attnhub.backends.reference import maths
from attnhub.backends.triton import TritonBackend, tiles
from attnhub.device import describe
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Bias, BlockSparse, BoolMask, Causal, Chunk, LeftPad, Mask, Prefix, Segments, SeqLens, Window
from attnhub.problem import DeviceInfo, Problem
from attnhub.reasons import Code

INTERPRETED = config.triton_interpret()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="runs in the process without TRITON_INTERPRET")


@compiled
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["test_conformance", "not test_conformance"])
def test_interpreted(which: str) -> None:
    """Every test below that is marked `interpreted`, in a process of its own: in two parts, that two processors can share."""
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", which, str(pathlib.Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@interpreted
@pytest.mark.parametrize("check", testing.checks("triton", device="cpu", level="tiny") if INTERPRETED else [], ids=str)
def test_conformance(check: testing.Check) -> None:
    check.run()


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


def document_ids(length: int, size: int, first: int) -> torch.Tensor:
    return (torch.arange(length) // size + first).int()[None].repeat(2, 1)


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


def bias_of(*shape: int) -> Mask:
    return Bias(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


PACKED = Varlen(ints(0, 20, 20, 45), ints(0, 13, 33, 70), 25, 37)
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


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    lengths, mask, extra = CASES[name]
    extra = dict(extra)
    scale = extra.pop("softmax_scale", 0.25)
    q, k, v = tensors(1 if "varlen" in extra else 2, (2, 1), lengths, (16, 16), torch.float32)
    check(Call(q, k, v, mask, scale, need_lse=True, **extra))


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


@interpreted
@pytest.mark.parametrize("dims", [(1, 1), (3, 40), (80, 8), (40, 40), (48, 33), (64, 96), (129, 129), (192, 128), (320, 257), (512, 512), (576, 512)])
def test_any_head_dim(dims: tuple[int, int]) -> None:
    q, k, v = tensors(1, (2, 2), (18, 70), dims, torch.float32)
    check(Call(q, k, v, Causal(), dims[0] ** -0.5, need_lse=True))


@interpreted
@pytest.mark.parametrize("name", ["packed", "packed_decode", "decode_split_sinks", "dropout_bias", "bias_of_keys", "block_sparse_by_head", "softcap"])
def test_features_with_a_head_dim_in_parts(name: str) -> None:
    lengths, mask, extra = CASES[name]
    extra = dict(extra)
    scale = extra.pop("softmax_scale", 0.25)
    q, k, v = tensors(1 if "varlen" in extra else 2, (2, 1), lengths, (41, 35), torch.float32)
    check(Call(q, k, v, mask, scale, need_lse=True, **extra))


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


def test_widths_of_three_products() -> None:
    """Up to 64 in one part, above in two."""
    cut = {64: (64, 0), 65: (64, 64), 128: (64, 64), 129: (128, 64), 192: (128, 64), 200: (128, 128), 256: (128, 128)}
    for dim, parts in cut.items():
        width = tiles.widths(dim, dim, most=tiles.TF32X3_PART)
        assert (width.main, width.rest) == (width.v_main, width.v_rest) == parts


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


@interpreted
def test_cpu_tensors_are_served_but_never_preferred() -> None:
    q, k, v = tensors(1, (2, 2), (4, 4), (16, 16), torch.float32)
    backend = TritonBackend()
    assert backend.capability.check(problem(q, k, v)) == () and backend.probe() == ()
    assert backend.cost(problem(q, k, v)) > 1e5


@compiled
def test_declaration() -> None:
    backend = TritonBackend()
    q, k, v = tensors(1, (2, 2), (4, 4), (16, 16), torch.float32)
    assert [r.code for r in backend.capability.check(problem(q, k, v))] == [Code.DEVICE_TYPE]
    assert backend.capability.check(problem(q, k, v, DeviceInfo("cuda", "nvidia", (9, 0)))) == ()
    assert [r.code for r in backend.capability.check(problem(q, k, v, DeviceInfo("cuda", "nvidia", (7, 0))))] == [Code.ARCH]
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        assert [r.code for r in backend.probe()] == [Code.NO_DEVICE]
    eighth = tensors(1, (2, 2), (4, 4), (16, 16), torch.float8_e4m3fn)
    for arch, reasons in (((8, 0), [Code.DTYPE]), ((8, 6), [Code.DTYPE]), ((8, 9), []), ((9, 0), []), ((12, 0), [])):
        assert [r.code for r in backend.capability.check(problem(*eighth, DeviceInfo("cuda", "nvidia", arch)))] == reasons
    wide = tensors(1, (2, 2), (4, 4), (577, 512), torch.float32)
    assert Code.HEAD_DIM in {r.code for r in backend.capability.check(problem(*wide, DeviceInfo("cuda", "nvidia", (9, 0))))}


def test_importing_the_declaration_imports_no_triton() -> None:
    code = "import sys, attnhub.backends.triton as t; assert t.backend.name == 'triton'; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2])


def test_smaller_tiles_after_a_refusal() -> None:
    """A device that refuses the first tiles gets smaller ones, and at last a reason; nothing has run until then."""
    from triton.runtime.errors import OutOfResources

    from attnhub.backends.triton.launcher import TritonPlan

    q, k, v = tensors(1, (2, 2), (4, 4), (128, 128), torch.float16)
    plan = TritonPlan(problem(q, k, v, DeviceInfo("cuda", "nvidia", (9, 0))))
    plan._tiles = {"forward": tiles.choices("forward", 128, 128, 2, 232448)}
    offered = []

    def launch(choice: tiles.Tiles) -> None:
        offered.append(choice)
        if len(offered) < 3:
            raise OutOfResources(100, 50, "shared memory")

    plan._try("forward", launch)
    assert len(offered) == 3
    assert plan._tiles["forward"][0] is offered[-1]
    sizes = [tiles.estimate("forward", t, 256, 2) for t in offered]
    assert sizes == sorted(sizes, reverse=True)

    def refuse(choice: tiles.Tiles) -> None:
        raise OutOfResources(100, 50, "shared memory")

    with pytest.raises(PrepareError) as error:
        plan._try("forward", refuse)
    assert error.value.reason.code is Code.OUT_OF_RESOURCES


def test_tiles_that_another_thread_has_given_up() -> None:
    """It deletes them first; whoever fails with them too goes on to the next ones, although these are the last."""
    from triton.runtime.errors import OutOfResources

    from attnhub.backends.triton.launcher import TritonPlan

    q, k, v = tensors(1, (2, 2), (4, 4), (128, 128), torch.float16)
    plan = TritonPlan(problem(q, k, v, DeviceInfo("cuda", "nvidia", (9, 0))))
    large, small = tiles.Tiles(64, 64, 4, 3), tiles.Tiles(64, 64, 4, 2)
    plan._tiles = {"forward": [large, small]}
    served = []

    def launch(choice: tiles.Tiles) -> None:
        if choice is large:
            plan._tiles["forward"].remove(large)
            raise OutOfResources(100, 50, "shared memory")
        served.append(choice)

    plan._try("forward", launch)
    assert served == [small]


def test_split_count() -> None:
    assert tiles.split_count(1000, 64, 132) == 1
    assert tiles.split_count(8, 1, 132) == 1
    for programs, key_tiles in ((8, 128), (1, 1000), (64, 16)):
        splits = tiles.split_count(programs, key_tiles, 132)
        assert 1 < splits <= max(1, key_tiles // 2)
