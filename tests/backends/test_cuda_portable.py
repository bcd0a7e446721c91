"""The cuda backend on a GPU: conformance, and the portable kernel's two paths, poisoned padding, streams and graphs."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any, Optional

import pytest
import torch
from cuda_compiled import library
from torch import Tensor

from attnhub import config, testing
from attnhub.backend import Call
from attnhub.backends.cuda import backend, compile, variant
from attnhub.capability import DeviceRange
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Causal, Chunk, LeftPad, Mask, SeqLens, Window
from attnhub.testing.checks import Check


def _conformance() -> list[Check]:
    """The suite in fp16 (its basic cases are fp32), without the rows of odd head_dim, which are not aligned to 16 bytes."""
    everything = (DeviceRange("cuda", dtypes=frozenset({"float32", "float16", "bfloat16"})),)
    capability = dataclasses.replace(backend.capability, devices=everything)
    found = {}
    for made in testing.cases(capability, "cuda", "full"):
        case = dataclasses.replace(made, dtype="float16") if made.dtype == "float32" else made
        if case.head_dim % 8 == 0 and case.v_head_dim % 8 == 0:
            found[case] = None
    kinds = testing.checks("cuda", "cuda", "tiny", ("repeat", "reject"))
    return [Check("cuda", "forward", case, None, "cuda") for case in found] + kinds


@pytest.mark.gpu
@pytest.mark.parametrize("check", _conformance(), ids=str)
def test_conformance(check: Check) -> None:
    check.run()


def _plan(q: Tensor, v: Tensor, mask: Mask, turing: bool = False) -> Any:
    from attnhub.backends.cuda.launcher import CudaPlan

    major, minor = torch.cuda.get_device_capability()
    v_ = variant.make(
        arch=f"sm_{major}{minor}", turing=turing or (major, minor) < (8, 0), dtype=str(q.dtype)[6:], head_dim=q.shape[3],
        v_head_dim=v.shape[3], seqlen_q=q.shape[2], alibi=mask.alibi is not None,
    )  # fmt: skip
    plan = CudaPlan(v_, str(compile.cubin(v_, library(), config.cache_dir() / "cuda")))
    plan.load(torch.cuda.current_device())
    return plan


def _random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def _reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    scores = (q.double() @ k.double().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1).nan_to_num(0.0) @ v.double()


@pytest.mark.gpu
@pytest.mark.parametrize("turing", [False, True], ids=["m16n8k16", "m16n8k8"])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 200, 256])
@pytest.mark.parametrize(
    "mask",
    [FULL, Causal(), Causal() & Window(40), Window(9, 30), Causal() & Chunk(50)],
    ids=["full", "causal", "sliding", "window", "chunk"],
)
def test_both_paths(turing: bool, head_dim: int, mask: Mask) -> None:
    """The path for compute capability 7.5 too, on whatever device is here."""
    q, k, v = _random(2, 4, 197, head_dim), _random(2, 4, 333, head_dim), _random(2, 4, 333, head_dim)
    out, lse = _plan(q, v, mask, turing).forward(Call(q, k, v, mask, head_dim**-0.5, need_lse=True))
    exact = _reference(q, k, v, _allowed(mask, 197, 333))
    assert (out.double() - exact).abs().max() < 3e-3
    assert lse.isfinite().all()


def _allowed(mask: Mask, len_q: int, len_k: int) -> Tensor:
    p = torch.arange(len_q, device="cuda")[:, None] + (len_k - len_q if mask.align == "bottom_right" else 0)
    j = torch.arange(len_k, device="cuda")[None]
    left, right = mask.window
    ok = torch.ones(len_q, len_k, dtype=torch.bool, device="cuda")
    if mask.causal:
        ok &= j <= p
    if left >= 0:
        ok &= j >= p - left
    if right >= 0:
        ok &= j <= p + right
    if mask.chunk:
        ok &= p.div(mask.chunk, rounding_mode="floor") == j.div(mask.chunk, rounding_mode="floor")
    return ok


@pytest.mark.gpu
@pytest.mark.parametrize("turing", [False, True], ids=["m16n8k16", "m16n8k8"])
@pytest.mark.parametrize(
    "mask", [Causal(), Window(9, 5), Causal() & Chunk(50), Causal() & Window(40)], ids=["causal", "window", "chunk", "sliding"]
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_values_reach_only_the_rows_that_see_them(poison: float, mask: Mask, turing: bool) -> None:
    q, k, v = (_random(1, 2, 300, 64) for _ in range(3))
    allowed = _allowed(mask, 300, 300)
    exact = _reference(q, k, v, allowed)
    keys = [3, 70, 150, 211, 299]
    v[0, 0, keys, 5] = poison
    out, _ = _plan(q, v, mask, turing).forward(Call(q, k, v, mask, 64**-0.5))
    sees = allowed[:, keys].any(1)
    hit = out[0, 0, :, 5]
    assert torch.equal(hit.isnan() if math.isnan(poison) else hit.isposinf(), sees)
    exact[0, 0, sees, 5], out[0, 0, sees, 5] = 0, 0
    assert (out.double() - exact).abs().max() < 3e-3


@pytest.mark.gpu
def test_padding_is_never_read() -> None:
    q, k, v = (_random(3, 2, 150, 128) for _ in range(3))
    lengths, leftpad = torch.tensor([150, 0, 77], device="cuda"), torch.tensor([3, 0, 64], device="cuda")
    mask = SeqLens(lengths) & LeftPad(leftpad)
    j = torch.arange(150, device="cuda")
    exists = (j < lengths[:, None]) & (j >= leftpad[:, None])
    exact = _reference(q, k, v, exists[:, None, None])
    k[~exists[:, None].expand(3, 2, 150)] = float("nan")
    v[~exists[:, None].expand(3, 2, 150)] = float("nan")
    out, lse = _plan(q, v, mask).forward(Call(q, k, v, mask, 128**-0.5, need_lse=True))
    assert (out.double() - exact).abs().max() < 3e-3
    assert lse[1].isneginf().all() and (out[1] == 0).all()


@pytest.mark.gpu
def test_negative_and_zero_scales() -> None:
    q, k, v = (_random(1, 2, 100, 64) for _ in range(3))
    plan = _plan(q, v, Causal())
    allowed = _allowed(Causal(), 100, 100)
    negative, _ = plan.forward(Call(q, k, v, Causal(), -(64**-0.5)))
    assert (negative.double() - _reference(-q, k, v, allowed)).abs().max() < 3e-3
    mean, _ = plan.forward(Call(q, k, v, Causal(), 0.0))
    assert (mean.double() - _reference(q * 0, k, v, allowed)).abs().max() < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("turing", [False, True], ids=["m16n8k16", "m16n8k8"])
@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
def test_extreme_scores(mask: Mask, turing: bool) -> None:
    """Of some rows, beyond softmax.cuh's kExtreme; each of these sees one key alone."""
    q, k, v = (_random(1, 2, 200, 64) for _ in range(3))
    q[:, :, ::3], k[:, :, :100:4] = q[:, :, ::3] * 2.0**13, k[:, :, :100:4] * 2.0**12
    out, lse = _plan(q, v, mask, turing).forward(Call(q, k, v, mask, 64**-0.5, need_lse=True))
    assert out.isfinite().all() and lse.isfinite().all()
    assert (out.double() - _reference(q, k, v, _allowed(mask, 200, 200))).abs().max() < 5e-3


@pytest.mark.gpu
def test_slopes_per_sequence() -> None:
    q, k, v = (_random(2, 4, 120, 64) for _ in range(3))
    slopes = torch.rand(2, 4, device="cuda")
    j = torch.arange(120, device="cuda")
    exact = _reference(q, k, v, _allowed(Causal(), 120, 120), -slopes[..., None, None].double() * (j[:, None] - j).abs())
    mask = Causal() & ALiBi(slopes)
    out, _ = _plan(q, v, mask).forward(Call(q, k, v, mask, 64**-0.5))
    assert (out.double() - exact).abs().max() < 3e-3


@pytest.mark.gpu
def test_tokens_behind_the_last_sequence_are_zero() -> None:
    q, k, v = (_random(1, 2, 90, 64) for _ in range(3))
    ends = torch.tensor([0, 40, 40, 70], dtype=torch.int32, device="cuda")
    k[:, :, 70:], v[:, :, 70:] = float("nan"), float("nan")
    out, lse = _plan(q, v, FULL).forward(Call(q, k, v, FULL, 0.125, varlen=Varlen(ends, ends, 40, 40), need_lse=True))
    assert (out[:, :, 70:] == 0).all() and lse[:, :, 70:].isneginf().all()
    for a, b in ((0, 40), (40, 70)):
        exact = _reference(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], torch.ones(b - a, b - a, dtype=torch.bool, device="cuda"))
        assert (out[:, :, a:b].double() - exact).abs().max() < 3e-3


@pytest.mark.gpu
def test_the_current_stream_a_graph_and_a_new_thread() -> None:
    q, k, v = (_random(2, 4, 500, 128) for _ in range(3))
    plan, call = _plan(q, v, Causal()), Call(q, k, v, Causal(), 128**-0.5)
    other = torch.randn_like(q)
    expected_other, _ = plan.forward(Call(other, k, v, Causal(), 128**-0.5))
    expected, _ = plan.forward(call)
    torch.cuda.synchronize()

    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(plan.forward(call)[0]))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)

    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured, _ = plan.forward(call)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would read q before this copy
        q.copy_(other)
        ordered, _ = plan.forward(call)
        graph.replay()
    side.synchronize()
    assert torch.equal(ordered, expected_other)
    assert torch.equal(captured, expected_other)


@pytest.mark.gpu
def test_250_runs_are_bitwise_equal() -> None:
    q, k, v = (_random(2, 4, 700, 128) for _ in range(3))
    plan, call = _plan(q, v, Causal()), Call(q, k, v, Causal(), 128**-0.5, need_lse=True)
    out, lse = plan.forward(call)
    for _ in range(250):
        again, again_lse = plan.forward(call)
        assert torch.equal(again, out) and torch.equal(again_lse, lse)


@pytest.mark.gpu
def test_offsets_pass_2_to_the_31() -> None:
    keys = torch.empty(1, 40_000, 512, 128, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    q = _random(1, 512, 128, 128, dtype=torch.bfloat16)
    out, _ = _plan(q, keys, FULL).forward(Call(q, keys, keys, FULL, 128**-0.5))
    for head in (0, 511):
        exact = _reference(
            q[:, head : head + 1], keys[:, head : head + 1], keys[:, head : head + 1], torch.ones(1, dtype=torch.bool, device="cuda")
        )
        assert (out[:, head : head + 1].double() - exact).abs().max() < 2e-3
