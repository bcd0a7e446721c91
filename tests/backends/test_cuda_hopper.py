"""The cuda backend's kernel for compute capability 9.0 on such a GPU: every part of a mask at lengths of several tiles, hard scores, values that are
not finite, strides, streams and graphs. What needs no GPU is in test_cuda_hopper_launch.py, test_cuda_hopper_schedule.py and test_cuda_hopper_careful.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_device import beside_graphs
from torch import Tensor

pytest.importorskip("cupy", reason="the extra attnhub[cuda13] is not installed")

import attnhub
from attnhub import runtime, testing
from attnhub.backend import Call, Needs
from attnhub.backends.cuda import backend, hopper_plan
from attnhub.backends.cuda.hopper_plan import HopperPlan
from attnhub.dense import allowed_pairs
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Causal, Chunk, LeftPad, Mask, SeqLens, Window
from attnhub.testing.cases import random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"),
]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Blocks of the launches of the kernel. A few blocks work through many tiles each."""
    monkeypatch.setattr(hopper_plan, "processors", lambda index: 5)
    monkeypatch.setattr(hopper_plan, "_memory", hopper_plan._Memory())
    found: list[int] = []
    run = HopperPlan._run

    def counted(self: HopperPlan, launch: Any, *args: Any) -> Any:
        found.append(launch.grid[0])
        return run(self, launch, *args)

    monkeypatch.setattr(HopperPlan, "_run", counted)
    runtime.clear()
    yield found
    runtime.clear()


_BF16 = {"dtype": "bfloat16", "seqlen_q": 200, "seqlen_k": 333, "head_dim": 64}
_DIMS = (8, 40, 64, 72, 96, 104, 128, 136, 192, 200, 256)
CASES = [
    *(testing.Case(**_BF16, q_heads=4, parts=(part,)) for part in (
        "causal", "top_left", "window", "window_left", "window_self", "chunk", "seqlens", "seqlens_zero", "leftpad", "alibi",
    )),
    *(testing.Case(**_BF16, q_heads=4, parts=("causal", part)) for part in ("prefix", "seqlens", "leftpad", "window_left", "alibi", "chunk")),
    testing.Case("bfloat16", seqlen_q=700, seqlen_k=700, head_dim=64, parts=("causal", "window_left", "leftpad"), q_heads=4),
    *(testing.Case("float16", seqlen_q=300, seqlen_k=270, head_dim=dim, parts=("causal",), q_heads=4) for dim in _DIMS),
    *(testing.Case("bfloat16", seqlen_q=260, seqlen_k=390, head_dim=dim) for dim in _DIMS),
    *(testing.Case("bfloat16", seqlen_q=1000, seqlen_k=1000, head_dim=dim, parts=parts, batch=1) for dim in (64, 128, 256) for parts in ((), ("causal",))),
    *(testing.Case("float16", seqlen_q=2100, seqlen_k=2100, head_dim=64, parts=parts, batch=1) for parts in (("causal",), ("causal", "seqlens"))),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=300, head_dim=192, v_head_dim=128, q_heads=4, parts=("causal",)),
    testing.Case("float16", seqlen_q=300, seqlen_k=500, head_dim=192, v_head_dim=128),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=300, head_dim=64, v_head_dim=128),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=300, head_dim=64, v_head_dim=256, parts=("causal",)),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=300, head_dim=128, v_head_dim=40),
    *(testing.Case("bfloat16", seqlen_q=129, seqlen_k=300, head_dim=dim, softcap=5.0, parts=("causal", "window_left"), scale_q=4.0) for dim in (64, 128, 256)),
    *(testing.Case("bfloat16", seqlen_q=129, seqlen_k=300, head_dim=dim, softcap=50.0, parts=("alibi",)) for dim in (64, 128, 256)),
    testing.Case("bfloat16", seqlen_q=129, seqlen_k=300, head_dim=128, sinks=True, parts=("causal",)),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=100, head_dim=64, sinks=True, q_heads=6, kv_heads=2, parts=("causal",)),
    testing.Case("bfloat16", lengths_q=(70, 0, 200, 1), lengths_k=(70, 5, 300, 0), head_dim=128, q_heads=4, parts=("causal",)),
    testing.Case("bfloat16", lengths_q=(70, 0, 200, 1), lengths_k=(70, 5, 300, 0), head_dim=256, sinks=True),
    testing.Case("float16", lengths_q=(129, 300), lengths_k=(129, 300), head_dim=64, parts=("causal", "window_left"), sinks=True),
    testing.Case("bfloat16", lengths_q=(128, 256, 64), lengths_k=(128, 300, 64), head_dim=96, q_heads=4, kv_heads=1),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=200, head_dim=64, layout="bshd", parts=("causal",), q_heads=4),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=200, head_dim=64, layout="strided", parts=("causal",)),
    testing.Case("float16", seqlen_q=200, seqlen_k=200, head_dim=256, layout="strided", parts=("causal",)),
    *(testing.Case("float16", seqlen_q=200, seqlen_k=200, head_dim=64, scale_q=factor) for factor in (4.0, 30.0)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: testing.Case, launches: list[int]) -> None:
    testing.Check("cuda", "forward", case, None, "cuda").run()
    assert launches


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3000, 3150))
def test_random(seed: int) -> None:
    case = random_case(seed, largest=700)
    if case.fits(backend.capability, "cuda"):
        testing.Check("cuda", "forward", case, None, "cuda").run()


def _inputs(*shape: int, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    batch, length, dim = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(batch, h, length, dim, device="cuda", generator=generator).to(dtype) for h in (heads[0], heads[1], heads[1])]


def _plan(q: Tensor, k: Tensor, v: Tensor, mask: Mask = FULL, **kwargs: Any) -> HopperPlan:
    plan = backend.prepare(attnhub.explain(q, k, v, mask, backend="cuda", **kwargs).problem)
    assert isinstance(plan, HopperPlan)
    return plan


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    pairs = allowed_pairs(mask, q.shape[0], q.shape[2], k.shape[2], (0, q.shape[2]), q.device)
    return torch.softmax(scores.masked_fill(~pairs, float("-inf")), -1).nan_to_num(0.0) @ v


def _hard(name: str, dim: int) -> list[Tensor]:
    """Scores of realistic and unfriendly spread: std 4, 10, 30; a sink key above all others; maxima that grow along the walk; extreme values."""
    q, k, v = (x.float() for x in _inputs(1, 1024, dim, heads=(2, 2)))
    if name.startswith("std"):
        q = q * float(name[3:])
    elif name.startswith("sink"):
        q, k[:, :, 0] = q + 1, dim**-0.5 * float(name[4:])
    elif name == "drift":
        q, k = q.abs(), k.abs() * torch.linspace(8, 0.1, 1024, device="cuda")[:, None]
    elif name == "extreme":
        q[:, :, ::7], k[:, :, ::5], v[:, :, ::3] = q[:, :, ::7] * 1e18, k[:, :, ::5] * 1e17, v[:, :, ::3] * 1e30
    return [x.bfloat16() for x in (q, k, v)]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
@pytest.mark.parametrize("name", ["std1", "std4", "std10", "std30", "sink20", "sink60", "drift", "extreme"])
def test_hard_scores(name: str, mask: Mask, dim: int, launches: list[int]) -> None:
    """The rule of the conformance suite: twice the error of plain maths in bf16, and one rounding unit."""
    q, k, v = _hard(name, dim)
    exact = _exact(q, k, v, mask)
    scores = q @ k.mT * dim**-0.5
    pairs = allowed_pairs(mask, 1, 1024, 1024, (0, 1024), q.device)
    plain = torch.softmax(scores.masked_fill(~pairs, float("-inf")).float(), -1).bfloat16() @ v
    out = attnhub.attention(q, k, v, mask, backend="cuda")
    assert isinstance(out, Tensor) and launches
    allowed = 2 * (plain.double() - exact).abs().nan_to_num(0.0).max() + 2.0**-8 * exact.abs().max()
    assert torch.isfinite(out).all() and (out.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
@pytest.mark.parametrize("power", [4, 8, 13])
def test_scores_whose_products_with_the_scale_round_far(power: int, mask: Mask, dtype: torch.dtype) -> None:
    """Below, around and beyond softmax.cuh's kExtreme; rows of ordinary scores between them, and maxima that grow from there."""
    q, k, v = _inputs(1, 700, 64, heads=(4, 2), dtype=dtype)
    q[:, :, ::3], k[:, :, 100:400:2] = q[:, :, ::3] * 2.0**power, k[:, :, 100:400:2] * 2.0 ** (power - 2)
    exact = _exact(q, k, v, mask)
    out, lse = attnhub.attention(q, k, v, mask, backend="cuda", return_lse=True)
    group = k.double().repeat_interleave(2, 1)
    scores = (q.double() @ group.mT * 0.125).masked_fill(~allowed_pairs(mask, 1, 700, 700, (0, 700), q.device), float("-inf"))
    assert torch.isfinite(out).all()
    rounding = 2.0**-20 * 0.125 * q.double().norm(dim=-1) * k.double().norm(dim=-1).max()
    assert ((lse.double() - scores.logsumexp(-1)).abs() <= 1e-3 + rounding).all()
    # Rows whose two largest scores are closer than fp32 tells them apart may take either.
    top = scores.topk(2, -1).values.nan_to_num(0.0, neginf=-1e30)
    clear = (top[..., 0] - top[..., 1] > 2.0**-18 * top[..., 0].abs()) | (top[..., 0].abs() < 2.0**8)
    # The largest weight is rounded, and out.
    assert clear.float().mean() > 0.9 and (out.double() - exact)[clear].abs().max() < torch.finfo(dtype).eps * exact.abs().max()


MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": Window(40, 10),
    "chunk": Causal() & Chunk(90),
    "padding": SeqLens(torch.tensor([150, 222], dtype=torch.int32)),
    "left padding": LeftPad(torch.tensor([100, 3], dtype=torch.int32)) & Causal(),
}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", MASKS)
def test_values_that_are_not_finite_reach_only_who_may_see_them(name: str, bad: float, dim: int, launches: list[int]) -> None:
    """NaN and infinities, in keys, values and rows. What they do not reach is as if they were zeros."""
    mask = MASKS[name]
    mask = dataclasses.replace(mask, **{n: t.cuda() for n in ("seqused_k", "leftpad") if (t := getattr(mask, n)) is not None})
    q, k, v = _inputs(2, 300, dim)
    v[0, 0, 250, 3], v[1, 1, 10], v[1, 1, 299] = bad, -bad, bad
    k[0, 1, 280, 0], q[1, 0, 77] = float("nan"), bad
    bad_q, bad_k = (~torch.isfinite(x).all(-1) for x in (q, k))
    pairs = allowed_pairs(mask, 2, 300, 300, (0, 300), q.device).expand(2, 4, 300, 300).float()
    weights = (pairs @ bad_k.repeat_interleave(2, 1)[..., None].float() > 0)[..., 0] | (bad_q & (pairs.sum(-1) > 0))
    reached = weights[..., None] | (pairs @ (~torch.isfinite(v)).repeat_interleave(2, 1).float() > 0)
    out = attnhub.attention(q, k, v, mask, backend="cuda")
    assert isinstance(out, Tensor) and launches and reached.any() and not reached.all()
    wrong = (torch.isfinite(out) == reached).nonzero()
    assert not len(wrong), f"{len(wrong)} elements, {wrong[:5].tolist()}"
    exact = _exact(*(x.nan_to_num(0.0, 0.0, 0.0) for x in (q, k, v)), mask)
    assert (out.double() - exact)[~reached].abs().max() < 0.02


def test_padding_full_of_nan_changes_nothing() -> None:
    q, k, v = _inputs(3, 300, 128)
    lengths = torch.tensor([300, 0, 177], device="cuda")
    mask = SeqLens(lengths)
    clean = attnhub.attention(q, k, v, mask, backend="cuda")
    behind = (torch.arange(300, device="cuda") >= lengths[:, None])[:, None].expand(3, 2, 300)
    k[behind], v[behind] = float("nan"), float("nan")
    dirty = attnhub.attention(q, k, v, mask, backend="cuda")
    # By the careful way its weights are not rounded.
    torch.testing.assert_close(dirty, clean, rtol=0.01, atol=0.01)
    assert isinstance(dirty, Tensor) and not dirty[1].any()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_of_many_lengths(causal: bool, launches: list[int]) -> None:
    """Sequences that begin and end anywhere in a tile, empty ones among them, and tokens that belong to none."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 400, (41,), generator=generator)
    lengths[[0, 7, 8, 40]] = 0
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to("cuda", torch.int32)
    tokens, longest = int(starts[-1]) + 333, int(lengths.max())
    q, k, v = (torch.randn(tokens, heads, 64, generator=generator).bfloat16().cuda() for heads in (4, 2, 2))
    k[int(starts[-1]) :], v[int(starts[-1]) :] = float("nan"), float("nan")
    mask, varlen = Causal() if causal else FULL, Varlen(starts, starts, longest, longest)
    (mine, lse), (right, right_lse) = (
        attnhub.attention(*x, mask, varlen=varlen, backend=name, return_lse=True)
        for name, x in (("cuda", (q, k, v)), ("reference", (q, k.nan_to_num(0.0), v.nan_to_num(0.0))))
    )
    assert launches
    torch.testing.assert_close(mine, right, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, right_lse, rtol=1e-3, atol=1e-3)
    assert not mine[int(starts[-1]) :].any()


@pytest.mark.parametrize("shape", ["expanded heads", "expanded batch", "packed qkv", "odd steps", "columns of a wider row"])
def test_strides(shape: str, launches: list[int]) -> None:
    q, k, v = _inputs(2, 200, 64, heads=(4, 4))
    if shape == "expanded heads":
        k, v = k[:, :1].expand(2, 4, 200, 64), v[:, :1].expand(2, 4, 200, 64)
    elif shape == "expanded batch":
        k, v = k[:1].expand(2, 4, 200, 64), v[:1].expand(2, 4, 200, 64)
    elif shape == "packed qkv":
        q, k, v = torch.randn(2, 200, 3, 4, 64, device="cuda").bfloat16().permute(2, 0, 3, 1, 4).unbind(0)
    elif shape == "odd steps":
        q, k, v = (torch.randn(2, 9, 401, 64, device="cuda").bfloat16()[:, 1::2, 1::2] for _ in range(3))
    else:
        q, k, v = (torch.randn(2, 4, 200, 104, device="cuda").bfloat16()[..., 8:98] for _ in range(3))
    out = attnhub.attention(q, k, v, Causal(), backend="cuda")
    assert isinstance(out, Tensor) and launches
    assert (out.double() - _exact(q, k, v, Causal())).abs().max() < 0.02


@pytest.mark.parametrize("scale", [0.0, 1e-50, -0.125])
def test_scales_of_nothing_and_below(scale: float) -> None:
    q, k, v = _inputs(1, 200, 64, heads=(2, 2))
    out = attnhub.attention(q, k, v, Causal(), softmax_scale=scale, backend="cuda")
    assert isinstance(out, Tensor)
    assert (out.double() - _exact(q * (scale * 8), k, v, Causal())).abs().max() < 0.02


@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_repeats_bitwise(dim: int, mask: Mask) -> None:
    """300 times on the same inputs, while another stream disturbs the timing."""
    q, k, v = _inputs(2, 1000, dim)
    plan, call = _plan(q, k, v, mask, return_lse=True), Call(q, k, v, mask, dim**-0.5, need_lse=True)
    out, lse = plan.forward(call)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for i in range(300):
        if i % 3 == 0:
            with torch.cuda.stream(other):
                noise = torch.tanh(noise @ noise)
        again, again_lse = plan.forward(call)
        assert lse is not None and again_lse is not None and torch.equal(again, out) and torch.equal(again_lse, lse)


@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
def test_streams_threads_and_graphs(mask: Mask) -> None:
    """Launches side by side, and graphs replayed beside them, do not take each other's tiles."""
    q, k, v = _inputs(2, 1500, 128)
    plan, call = _plan(q, k, v, mask), Call(q, k, v, mask, 128**-0.5)
    graph, captured = beside_graphs(lambda: plan.forward(call)[0], times=20)
    other = _inputs(2, 1500, 128, seed=1)
    right, _ = plan.forward(Call(*other, mask, 128**-0.5))
    for x, y in zip((q, k, v), other):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, right)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
def test_backwards_of_others_run_from_its_lse(mask: Mask, dim: int) -> None:
    """Triton's, and torch's through the sdpa backend."""
    from attnhub.backends.sdpa import backend as sdpa
    from attnhub.backends.triton import backend as triton

    q, k, v = _inputs(2, 512, dim, heads=(4, 4))
    call, grad_out = Call(q, k, v, mask, dim**-0.5, need_lse=True), torch.randn(q.shape, device="cuda").bfloat16()
    out, lse = _plan(q, k, v, mask, return_lse=True).forward(call)
    assert lse is not None
    right = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(_exact(right[0], right[1], right[2], mask), right, grad_out.double())
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    problem = attnhub.explain(leaves[0], leaves[1], leaves[2], mask).problem
    assert problem.need_backward
    for other in (sdpa, triton):
        for grad, expected in zip(other.prepare(problem).backward(call, grad_out, None, out, lse, Needs()), exact):
            assert grad is not None and (grad.double() - expected).norm() < 0.01 * expected.norm(), other.name


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["causal", "window", "chunk", "left padding", "packed", "long"])
def test_the_order_of_tiles_changes_nothing(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other or as many as there are, in phases or not: bit by bit the same."""
    length, varlen = 2300 if name == "long" else 300, None
    q, k, v = _inputs(1 if name in ("packed", "long") else 2, length, dim)
    mask = MASKS["causal" if name in ("packed", "long") else name]
    if mask.leftpad is not None:
        mask = dataclasses.replace(mask, leftpad=mask.leftpad.cuda())
    if name == "packed":
        starts = torch.tensor([0, 70, 70, 290], dtype=torch.int32, device="cuda")
        varlen = Varlen(starts, starts, 220, 220)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    plan = _plan(q, k, v, mask, **({"varlen": varlen} if varlen else {}))
    call = Call(*((x.transpose(0, 1)[None] for x in (q, k, v)) if varlen else (q, k, v)), mask, dim**-0.5, varlen=varlen)
    found = []
    for blocks, long in ((132, 2048), (5, 1), (1, 1 << 30)):
        monkeypatch.setattr(hopper_plan, "processors", lambda index, blocks=blocks: blocks)
        monkeypatch.setattr(hopper_plan, "_LONG", long)
        monkeypatch.setattr(hopper_plan, "_memory", hopper_plan._Memory())
        found.append(plan.forward(call)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_offsets_pass_2_to_the_31() -> None:
    keys = torch.empty(1, 40_000, 512, 128, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    q = torch.randn(1, 512, 128, 128, device="cuda").bfloat16()
    out = attnhub.attention(q, keys, keys, backend="cuda")
    assert isinstance(out, Tensor)
    for head in (0, 511):
        at = slice(head, head + 1)
        assert (out[:, at].double() - _exact(q[:, at], keys[:, at], keys[:, at], FULL)).abs().max() < 2e-3
