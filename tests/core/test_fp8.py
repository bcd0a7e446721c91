"""float8_e4m3fn: what the factors mean, the dtypes of results, and that there is no backward.

Seen to fail: every packed sequence with the first one's factors, out in fp16, a capability that allows a backward, a cache written
before the dtypes are checked.
"""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Code, Feature, KVCache, Problem, Varlen
from attnhub.backend import Backend, Call, Plan
from attnhub.capability import Capability, DeviceRange
from attnhub.decision import NoBackendError
from attnhub.problem import DeviceInfo

FP8 = torch.float8_e4m3fn


def inputs(batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 5, length_k: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return tuple((8 * torch.randn(batch, h, n, d)).to(FP8) for h, n, d in ((heads, length, 8), (kv_heads, length_k, 8), (kv_heads, length_k, 6)))  # type: ignore[return-value]


def factors(batch: int = 2, kv_heads: int = 2) -> dict[str, Tensor]:
    return {f"{name}_descale": (0.5 + torch.rand(batch, kv_heads)) / 8 for name in "qkv"}


def wide(x: Tensor, factor: Optional[Tensor]) -> Tensor:
    """What x [B, H, S, D] stands for, in fp32."""
    return x.float() if factor is None else x.float() * factor.repeat_interleave(x.shape[1] // factor.shape[1], 1)[:, :, None, None]


@pytest.mark.parametrize("given", ["", "q", "k", "v", "kv", "qkv"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fp8_is_the_attention_of_what_it_stands_for(given: str, kv_heads: int) -> None:
    q, k, v = inputs(kv_heads=kv_heads)
    some = {name: factor for name, factor in factors(kv_heads=kv_heads).items() if name[0] in given}
    out, lse = attnhub.attention(q, k, v, attnhub.Causal(), return_lse=True, backend="reference", **some)
    stands_for = (wide(x, some.get(f"{name}_descale")) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    wanted, wanted_lse = attnhub.attention(*stands_for, attnhub.Causal(), return_lse=True, backend="reference")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out, wanted.bfloat16(), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def test_one_factor_for_all_takes_no_memory() -> None:
    q, k, v = inputs()
    one = torch.tensor(0.125)
    got = attnhub.attention(q, k, v, q_descale=one.expand(2, 2), k_descale=one.expand(2, 2), backend="reference")
    assert torch.equal(got, attnhub.attention(q, k, v, softmax_scale=8**-0.5 / 64, backend="reference"))


def test_layouts_and_strides() -> None:
    q, k, v = inputs()
    some = factors()
    wanted = attnhub.attention(q, k, v, backend="reference", **some)
    swapped = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    got = attnhub.attention(*swapped, layout="bshd", backend="reference", **{name: t.t().contiguous().t() for name, t in some.items()})
    assert torch.equal(got.transpose(1, 2), wanted) and got.is_contiguous() and wanted.is_contiguous()


def test_packed_sequences_have_a_factor_each() -> None:
    lengths_q, lengths_k = torch.tensor([3, 0, 4]), torch.tensor([5, 2, 6])
    q, k, v = ((8 * torch.randn(int(n.sum()), h, 8)).to(FP8) for n, h in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2)))
    some = factors(batch=3)
    varlen = Varlen.from_lengths(lengths_q, lengths_k)
    got = attnhub.attention(q, k, v, attnhub.Causal(), varlen=varlen, backend="reference", **some)
    assert got.dtype == torch.bfloat16
    starts_q, starts_k = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    for n in (0, 2):
        rows, keys = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
        one = [t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])]
        wanted = attnhub.attention(*one, attnhub.Causal(), backend="reference", **{name: t[n : n + 1] for name, t in some.items()})
        assert torch.equal(got[rows], wanted[0].transpose(0, 1))


@pytest.mark.parametrize("page_size", [0, 4])
def test_a_cache_in_fp8(page_size: int) -> None:
    q, k, v = inputs(length=7)
    some = factors()
    cache = KVCache.empty(2, 2, 16, 8, v_head_dim=6, page_size=page_size, dtype=FP8)
    outs = []
    for start, stop in ((0, 5), (5, 6), (6, 7)):
        now = slice(start, stop)
        outs.append(attnhub.attention(q[:, :, now], k[:, :, now], v[:, :, now], attnhub.Causal(), kv_cache=cache, backend="reference", **some))
        cache.advance(stop - start)
    wanted = attnhub.attention(q, k, v, attnhub.Causal(), backend="reference", **some)
    torch.testing.assert_close(torch.cat(outs, 2), wanted, rtol=2**-7, atol=1e-6)


def test_nothing_is_written_before_the_dtypes_are_checked() -> None:
    _, k, v = inputs(length_k=1)
    cache = KVCache.empty(2, 2, 16, 8, v_head_dim=6, dtype=FP8)
    with pytest.raises(ValueError, match="one dtype"):
        attnhub.attention(torch.randn(2, 4, 1, 8), k, v, kv_cache=cache)
    assert not cache.k_cache.view(torch.uint8).any()


def test_nothing_to_attend_to() -> None:
    q, k, v = inputs()
    out, lse = attnhub.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True, **factors())
    assert out.dtype == torch.bfloat16 and not out.any() and torch.all(lse == float("-inf"))


# -- the choice ------------------------------------------------------------------------------------------------------------


class _Eight(Backend):
    """Declares fp8, and a backward of everything."""

    name = "eight"
    capability = Capability(
        (DeviceRange("cpu", dtypes=frozenset({"float8_e4m3fn", "float32"})),), frozenset(Feature), backward_features=frozenset(Feature)
    )

    def prepare(self, problem: Problem) -> Plan:
        class Constant(Plan):
            def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
                return torch.full((*call.q.shape[:3], call.v.shape[3]), 7.0, dtype=torch.bfloat16), None

        return Constant()


def test_a_backend_that_declares_it_is_chosen(register: Any) -> None:
    register(_Eight())
    q, k, v = inputs()
    for some in ({}, factors(), {}):
        assert torch.all(attnhub.attention(q, k, v, **some) == 7.0)
        decision = attnhub.last_decision()
        assert decision is not None and decision.chosen == "eight" and decision.problem.q_dtype == "float8_e4m3fn"
    assert attnhub.explain(q, k, v, **factors()).chosen == "eight"


def test_no_backend_can_train_in_it(register: Any) -> None:
    register(_Eight())
    q, k, v = inputs()
    decision = attnhub.explain(q.clone().requires_grad_(), k, v, backend="eight,reference")
    assert decision.chosen is None
    for name in ("eight", "reference"):
        assert Code.NO_BACKWARD in {r.code for r in decision.verdicts[name].reasons}  # type: ignore[union-attr]
        assert "forward pass only" in str(decision.backward_verdicts[name].reasons[0])  # type: ignore[union-attr]
    # Made for a backward all the same, as an exported graph may be.
    with pytest.raises(NoBackendError):
        attnhub.ops.forward_op(q, k, v, None, None, [], "", [], 0.3, False, True, "eight")


@pytest.mark.parametrize("name", ["cpu", "cuda", "onnx", "sdpa"])
def test_backends_that_do_not_declare_it_refuse_by_dtype(name: str) -> None:
    capability = attnhub.registry.registry.get(name).capability
    place = next(r for r in capability.devices)
    where = DeviceInfo(place.type, place.vendor, place.min_arch)
    problem = Problem(where, "float8_e4m3fn", "float8_e4m3fn", 64, 64, 2, 2, 2, 64, 64)
    assert [r.code for r in capability.check(problem)] == [Code.DTYPE]


def test_fp8_keys_under_other_queries_are_mixed_dtypes() -> None:
    for candidate in attnhub.registry.registry.candidates().values():
        assert candidate.backend is not None
        place = candidate.backend.capability.devices[-1]
        problem = Problem(DeviceInfo(place.type, place.vendor, place.min_arch), "bfloat16", "float8_e4m3fn", 64, 64, 2, 2, 2, 64, 64)
        assert Code.MIXED_DTYPE in {r.code for r in candidate.backend.capability.check(problem)}
