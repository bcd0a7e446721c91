"""The triton backend's kernels for Hopper on such a GPU: every part of a mask at lengths of several tiles, and values that are not finite.

The conformance suite's problems are mostly shorter than the forward kernel's tiles and go to the general one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

import attnhub
from attnhub import config, runtime, testing
from attnhub.backend import Call, Needs
from attnhub.backends.triton import hopper, launcher
from attnhub.backends.triton.launcher import TritonPlan
from attnhub.dense import allowed_pairs
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Causal, LeftPad, Mask, SeqLens, Window
from attnhub.testing.cases import random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(config.triton_interpret() or not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"),
]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans use the kernels for Hopper, for small problems too, which otherwise divide their keys; and where the table lets programs walk,
    a few of them walk over many tiles each."""
    monkeypatch.setattr(hopper.launching, "processors", lambda device: 5)
    monkeypatch.setattr(hopper, "serves_forward", hopper.serves)
    first, *rest = launcher._FORWARD
    monkeypatch.setattr(launcher, "_FORWARD", (first._replace(serves=hopper.serves), *rest))
    runtime.clear()
    yield
    runtime.clear()


_BF16 = {"dtype": "bfloat16", "seqlen_q": 200, "seqlen_k": 333, "head_dim": 64}
CASES = [
    *(testing.Case(**_BF16, q_heads=4, parts=(part,)) for part in (
        "causal", "top_left", "window", "window_left", "window_self", "chunk", "segments", "seqlens", "seqlens_zero", "leftpad", "bool_mask", "bool_row",
        "bias", "bias_row", "bias_fp32", "bias_inf", "alibi",
    )),
    *(testing.Case(**_BF16, q_heads=4, parts=("causal", part)) for part in ("prefix", "blocks", "seqlens", "leftpad", "window_left", "alibi", "bias", "chunk")),
    # Warpgroups of a block begin at different tiles, and every tile is masked.
    *(testing.Case(**_BF16, q_heads=4, parts=parts) for parts in (("causal", "window_left", "bool_mask"), ("window", "bias"), ("top_left", "window", "segments"))),
    *(testing.Case("float16", seqlen_q=300, seqlen_k=270, head_dim=dim, parts=("causal",), q_heads=4) for dim in (8, 40, 64, 72, 96, 128, 136, 192, 256)),
    *(testing.Case("bfloat16", seqlen_q=260, seqlen_k=390, head_dim=dim, parts=parts) for dim in (64, 128, 256) for parts in ((), ("causal",))),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=300, head_dim=192, v_head_dim=128, q_heads=4, parts=("causal",)),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=300, head_dim=64, v_head_dim=128),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=300, head_dim=64, v_head_dim=256),
    testing.Case("bfloat16", seqlen_q=129, seqlen_k=129, head_dim=128, softcap=5.0, parts=("causal", "window_left"), scale_q=4.0),
    testing.Case("bfloat16", seqlen_q=129, seqlen_k=300, head_dim=128, sinks=True, parts=("causal",)),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=100, head_dim=64, sinks=True, q_heads=6, kv_heads=2, parts=("causal",)),
    testing.Case("bfloat16", lengths_q=(70, 0, 200, 1), lengths_k=(70, 5, 300, 0), head_dim=128, q_heads=4, parts=("causal",)),
    testing.Case("float16", lengths_q=(129, 300), lengths_k=(129, 300), head_dim=64, parts=("causal", "window_left"), sinks=True),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=200, head_dim=64, layout="bshd", parts=("causal",), q_heads=4),
    testing.Case("bfloat16", seqlen_q=200, seqlen_k=200, head_dim=64, layout="strided", parts=("causal",)),
    testing.Case("float16", seqlen_q=200, seqlen_k=200, head_dim=64, scale_q=30.0),
    # Rows of an even number of keys, whose bias is loaded in pairs.
    *(testing.Case("bfloat16", seqlen_q=200, seqlen_k=334, head_dim=64, q_heads=4, parts=(part,)) for part in ("bias", "bias_row", "bias_fp32", "bias_inf")),
]  # fmt: skip


def _used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launches of the kernels for Hopper that follow."""
    found: list[str] = []
    for name in ("forward", "grad_q", "grad_kv"):
        kernel = getattr(hopper, name)

        def counted(*args: Any, _kernel: Any = kernel, _name: str = name) -> None:
            _kernel(*args)
            found.append(_name)

        monkeypatch.setattr(hopper, name, counted)
    for group in ("_FORWARD", "_GRAD_Q", "_GRAD_KV"):
        first, *rest = getattr(launcher, group)
        monkeypatch.setattr(launcher, group, (first._replace(launch=getattr(hopper, first.role.removeprefix("hopper_"))), *rest))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: testing.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    used = _used(monkeypatch)
    testing.Check("triton", "forward", case, None, "cuda").run()
    assert "forward" in used
    testing.Check("triton", "backward", case, None, "cuda").run()
    assert {"grad_q", "grad_kv"} <= set(used)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2000, 2100))
def test_random(seed: int) -> None:
    case = random_case(seed, largest=700)
    for kind in ("forward", "backward"):
        testing.Check("triton", kind, case, None, "cuda").run()


MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": Window(40, 10),
    "padding": SeqLens(torch.tensor([150, 222], dtype=torch.int32)),
    "left padding": LeftPad(torch.tensor([100, 3], dtype=torch.int32)) & Causal(),
}


def _reached(mask: Mask, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Which elements of out and of the gradients a value that is not finite reaches, when it passes through allowed pairs only."""
    bad_q, bad_k, bad_grad = (~torch.isfinite(x).all(-1) for x in (q, k, grad))
    group = q.shape[1] // k.shape[1]
    pairs = allowed_pairs(mask, q.shape[0], q.shape[2], k.shape[2], (0, q.shape[2]), q.device).expand(*q.shape[:3], k.shape[2]).float()
    meets_key = pairs @ bad_k.repeat_interleave(group, 1)[..., None].float() > 0
    weights = meets_key[..., 0] | (bad_q & (pairs.sum(-1) > 0))
    out = weights[..., None] | (pairs @ (~torch.isfinite(v)).repeat_interleave(group, 1).float() > 0)
    scores = out.any(-1) | bad_grad

    def keys(rows: Tensor) -> Tensor:
        met = (pairs.mT @ rows[..., None].float() > 0)[..., 0]
        return met.unflatten(1, (-1, group)).any(2)[..., None]

    return {
        "out": out, "dq": (scores & (pairs.sum(-1) > 0))[..., None].expand_as(q), "dk": keys(scores).expand_as(k),
        "dv": keys(weights | bad_grad).expand_as(v),
    }  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", MASKS)
def test_values_that_are_not_finite_reach_only_who_may_see_them(name: str, bad: float, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinities, in keys, values, rows and their gradients. What they do not reach is as if they were zeros."""
    mask = MASKS[name]
    mask = dataclasses.replace(mask, **{n: t.cuda() for n in ("seqused_k", "leftpad") if (t := getattr(mask, n)) is not None})
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (torch.randn(2, heads, 300, dim, device="cuda", generator=generator).bfloat16() for heads in (4, 2, 2, 4))
    v[0, 0, 250, 3] = bad
    v[1, 1, 10] = -bad
    v[1, 1, 299] = bad
    # An infinite key can be one with weight 0, and finite.
    k[0, 1, 280, 0] = float("nan")
    q[1, 0, 77] = bad
    grad[0, 3, 290] = bad
    reached = _reached(mask, q, k, v, grad)
    used = _used(monkeypatch)
    results = []
    for backend, inputs in (("triton", (q, k, v, grad)), ("reference", [t.nan_to_num(0.0, 0.0, 0.0) for t in (q, k, v, grad)])):
        leaves = [t.clone().requires_grad_() for t in inputs[:3]]
        out = attnhub.attention(*leaves, mask, backend=backend)
        assert isinstance(out, Tensor)
        out.backward(inputs[3])
        results.append([out.detach(), *(t.grad for t in leaves)])
    assert {"forward", "grad_q", "grad_kv"} <= set(used)
    for what, mine, right in zip(("out", "dq", "dk", "dv"), *results):
        assert reached[what].any() and not reached[what].all()
        wrong = (torch.isfinite(mine) == reached[what]).nonzero()
        assert not len(wrong), f"{what}: {len(wrong)} elements, {wrong[:5].tolist()}"
        torch.testing.assert_close(mine[~reached[what]], right[~reached[what]], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale", [0.0, 1e-50])
def test_a_scale_of_nothing_weighs_all_keys_alike(scale: float) -> None:
    q, k, v = (torch.randn(1, 2, 200, 64, device="cuda").bfloat16() for _ in range(3))
    out = attnhub.attention(q, k, v, Causal(), softmax_scale=scale, backend="triton")
    count = torch.arange(1, 201, device="cuda")[:, None]
    torch.testing.assert_close(out, (v.float().cumsum(2) / count).bfloat16(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_of_many_lengths(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that begin and end anywhere in a tile, empty ones among them, and tokens that belong to none."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 400, (41,), generator=generator)
    lengths[[0, 7, 8, 40]] = 0
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to("cuda", torch.int32)
    tokens = int(starts[-1]) + 333
    longest = int(lengths.max())
    q, k, v, grad = (torch.randn(tokens, heads, 64, generator=generator).bfloat16().cuda() for heads in (4, 2, 2, 4))
    used, results = _used(monkeypatch), []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attnhub.attention(*leaves, Causal() if causal else FULL, varlen=Varlen(starts, starts, longest, longest), backend=backend)
        assert isinstance(out, Tensor)
        out.backward(grad)
        results.append([out.detach(), *(t.grad for t in leaves)])
    assert used == ["forward", "grad_q", "grad_kv"]
    for mine, right in zip(*results):
        torch.testing.assert_close(mine, right, rtol=0.02, atol=0.02)
        assert not mine[int(starts[-1]) :].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_repeats_bitwise(dim: int, causal: bool) -> None:
    """250 times on the same inputs, forward and backward, while another stream disturbs the timing."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (torch.randn(2, 4, 1000, dim, device="cuda", generator=generator).bfloat16() for _ in range(4))
    call = Call(q, k, v, Causal() if causal else FULL, dim**-0.5, need_lse=True)
    plan = TritonPlan(attnhub.explain(q, k, v, call.mask, backend="triton").problem)
    assert set(hopper.ROLES) <= set(plan._tiles)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    out, lse = plan.forward(call)
    assert lse is not None
    first = (out, lse, *plan.backward(call, grad, None, out, lse, Needs())[:3])
    for _ in range(250):
        with torch.cuda.stream(other):
            noise @ noise
        again, again_lse = plan.forward(call)
        assert again_lse is not None
        for mine, before in zip((again, again_lse, *plan.backward(call, grad, None, out, lse, Needs())[:3]), first):
            assert mine is not None and before is not None and torch.equal(mine, before)
