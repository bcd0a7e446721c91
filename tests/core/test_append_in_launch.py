"""New tokens and rotary embedding of `attention`: by torch operations first, or by a plan that says it appends in its launch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Append, Backend, Call, KVCache, Plan, PrepareError, Problem, Rotary, apply_rotary, runtime
from attnhub.backend import Repeat
from attnhub.backends.reference import EVERYTHING, FLOATS, ReferencePlan
from attnhub.capability import Capability, DeviceRange
from attnhub.kv_cache import append_first
from attnhub.nn import CachedAttention
from attnhub.reasons import Code, Reason

Register = Callable[[Backend], Backend]
B, HQ, HK, D = 2, 4, 2, 8


class Appending(Backend):
    """The reference, whose plans append by themselves as long as they are willing."""

    name = "appending"
    capability = Capability((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING, head_dims=(1, 1 << 20, 1))

    def __init__(self) -> None:
        self.willing = True
        self.broken = False
        #: What forward got, and what the short way got.
        self.appends: list[Optional[Append]] = []
        self.short: list[Optional[Append]] = []
        self.lengths: list[list[int]] = []

    def cost(self, problem: Problem) -> float:
        return 1e-6

    def prepare(self, problem: Problem) -> Plan:
        backend = self

        class AppendingPlan(ReferencePlan):
            def appends(self, call: Call) -> bool:
                return backend.willing

            def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
                if backend.broken:
                    raise PrepareError(Reason(Code.OUT_OF_RESOURCES, "broken"))
                backend.appends.append(call.append)
                backend.lengths.append(call.mask.seqused_k.tolist() if call.mask.seqused_k is not None else [])
                if call.append is not None:
                    cache = KVCache(call.k, call.v, call.mask.seqused_k, call.block_table)  # type: ignore[arg-type]
                    call = append_first(call, cache)
                return super().forward(call)

            def repeat(self, call: Call) -> Optional[Repeat]:
                def again(q: Tensor, k: Tensor, v: Tensor, seqused: Tensor, table: Optional[Tensor] = None, append: Optional[Append] = None) -> Any:
                    backend.short.append(append)
                    mask = dataclasses.replace(call.mask, seqused_k=seqused)
                    return self.forward(Call(q, k, v, mask, call.softmax_scale, call.softcap, block_table=table, need_lse=call.need_lse, append=append))

                return again

        return AppendingPlan()


@pytest.fixture
def appending(register: Register) -> Appending:
    backend = Appending()
    register(backend)
    return backend


def tokens(new: int, queries: Optional[int] = None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, HQ, new if queries is None else queries, D), torch.randn(B, HK, new, D), torch.randn(B, HK, new, D)


def cache_of(page_size: int = 0, lengths: tuple[int, int] = (3, 9)) -> KVCache:
    cache = KVCache.empty(B, HK, 24, D, page_size=page_size)
    cache.k_cache.normal_(), cache.v_cache.normal_()
    cache.cache_seqlens.copy_(torch.tensor(lengths))
    return cache


def copied(cache: KVCache) -> KVCache:
    return KVCache(cache.k_cache.clone(), cache.v_cache.clone(), cache.cache_seqlens, cache.block_table)


def angles(positions: int = 32, half: int = 3) -> tuple[Tensor, Tensor]:
    angle = torch.rand(positions, half)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("one_position", [False, True])
@pytest.mark.parametrize("page_size", [0, 4])
def test_rotary_is_rotating_first(page_size: int, one_position: bool, interleaved: bool) -> None:
    """q at the positions that it is said to have, k where it goes, whoever serves."""
    q, k, v = tokens(3, queries=2)
    rotary = Rotary(*angles(), interleaved, one_position)
    caches = {"bhsd": cache_of(page_size)}
    right = copied(caches["bhsd"])
    caches["bshd"] = copied(right)
    start = right.cache_seqlens.long()[:, None]
    turned_q = apply_rotary(q, *rotary[:2], start.expand(-1, 2) if one_position else start + torch.arange(2), interleaved)
    turned_k = apply_rotary(k, *rotary[:2], start + torch.arange(3), interleaved)
    want = attnhub.attention(turned_q, turned_k, v, attnhub.Causal(), kv_cache=right)
    for layout, mine in caches.items():
        given = (q, k, v) if layout == "bhsd" else tuple(t.transpose(1, 2) for t in (q, k, v))
        out = attnhub.attention(*given, attnhub.Causal(), kv_cache=mine, rotary=rotary, layout=layout)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        torch.testing.assert_close(out if layout == "bhsd" else out.transpose(1, 2), want)
        assert torch.equal(mine.k_cache, right.k_cache) and torch.equal(mine.v_cache, right.v_cache)


@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_plan_that_appends_gets_the_tokens(page_size: int, rotated: bool, appending: Appending) -> None:
    rotary = Rotary(*angles(), True) if rotated else None
    mine = cache_of(page_size)
    right = copied(mine)
    for round_ in range(3):
        q, k, v = tokens(2)
        out = attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=mine, rotary=rotary)
        want = attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=right, rotary=rotary, backend="reference")
        torch.testing.assert_close(out, want)
        assert torch.equal(mine.k_cache, right.k_cache) and torch.equal(mine.v_cache, right.v_cache)
        append = appending.appends[-1]
        assert append is not None and append.k is k and append.v is v and append.rotary is rotary
        assert appending.lengths[-1] == mine.cache_seqlens.tolist(), "counted without the new ones"
        mine.advance(2)
        assert len(appending.appends) == round_ + 1 and len(appending.short) == round_


def test_a_plan_that_does_not_gets_a_cache_that_holds_them(appending: Appending) -> None:
    appending.willing = False
    mine, rotary = cache_of(), Rotary(*angles())
    right = copied(mine)
    for _ in range(3):
        q, k, v = tokens(2)
        out = attnhub.attention(q, k, v, kv_cache=mine, rotary=rotary)
        assert appending.appends[-1] is None and appending.lengths[-1] == [5, 11]
        torch.testing.assert_close(out, attnhub.attention(q, k, v, kv_cache=right, rotary=rotary, backend="reference"))
        assert torch.equal(mine.k_cache, right.k_cache)
    assert not appending.short


def test_what_is_not_plain_is_offered_too(appending: Appending, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in the mask, sinks, layouts."""
    from attnhub import api

    mine = cache_of()
    right = copied(mine)
    q, k, v = tokens(2)
    settings: dict[str, Any] = {"mask": attnhub.Causal() & attnhub.LeftPad(torch.tensor([1, 4])), "sinks": torch.randn(HQ), "return_lse": True}
    with monkeypatch.context() as patch:
        patch.setattr(api, "append_first", lambda *_: pytest.fail("appended twice"))
        out = attnhub.attention(*(t.transpose(1, 2) for t in (q, k, v)), kv_cache=mine, layout="bshd", **settings)  # type: ignore[misc]
    want = attnhub.attention(q, k, v, kv_cache=right, backend="reference", **settings)
    torch.testing.assert_close((out[0].transpose(1, 2), out[1]), want)
    assert appending.appends[0] is not None and torch.equal(mine.k_cache, right.k_cache)


def test_a_launch_that_fails_has_appended_nothing_and_the_next_backend_appends(appending: Appending) -> None:
    appending.broken = True
    mine = cache_of()
    right = copied(mine)
    q, k, v = tokens(2)
    out = attnhub.attention(q, k, v, kv_cache=mine, backend="appending,reference")
    torch.testing.assert_close(out, attnhub.attention(q, k, v, kv_cache=right, backend="reference"))
    assert torch.equal(mine.k_cache, right.k_cache) and attnhub.last_decision().chosen == "reference"  # type: ignore[union-attr]


def test_a_strict_choice_that_cannot_serve_has_written_nothing() -> None:
    mine = cache_of()
    before = copied(mine)
    with pytest.raises(attnhub.NoBackendError):
        attnhub.attention(*tokens(2), kv_cache=mine, backend="cuda")
    assert torch.equal(mine.k_cache, before.k_cache)


def test_a_layer_takes_the_launch_or_the_two_steps(appending: Appending) -> None:
    made = CachedAttention(HQ, HK, D, batch=B, max_seqlen=16, rotary=100.0)
    right = CachedAttention(HQ, HK, D, batch=B, max_seqlen=16, rotary=100.0, backend="reference")
    for step, willing in ((4, True), (1, True), (1, True), (1, False), (1, False)):
        if willing != appending.willing:
            runtime.clear()  # the answer has been remembered
        appending.willing = willing
        qkv = [t.transpose(1, 2) for t in tokens(step)]
        torch.testing.assert_close(made(*qkv), right(*qkv))
        assert (appending.appends[-1] is not None) == willing
        assert made.position.tolist() == right.position.tolist()
    assert torch.equal(made.cache.k_cache, right.cache.k_cache)
    appending.willing, appending.broken = True, True
    made.backend = "appending"
    runtime.clear()
    with pytest.raises(attnhub.NoBackendError):
        made(*[t.transpose(1, 2) for t in tokens(1)])
    assert made.position.tolist() == [8, 8]


def test_one_graph_appends_by_the_operator(appending: Appending) -> None:
    """An operator that is traced does not write to its inputs: there the tokens are appended first."""
    torch._dynamo.reset()
    mine, rotary = cache_of(), Rotary(*angles())
    right = copied(mine)
    q, k, v = tokens(2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=mine, rotary=rotary)

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=right, rotary=rotary, backend="reference"))
    assert torch.equal(mine.k_cache, right.k_cache) and appending.appends == [None]


def test_new_tokens_without_queries_are_appended(appending: Appending) -> None:
    mine = cache_of()
    q, k, v = tokens(2, queries=0)
    out = attnhub.attention(q, k, v, kv_cache=mine)
    assert isinstance(out, Tensor) and out.shape == q.shape and torch.equal(mine.k_cache[0, :, 3:5], k[0]) and not appending.appends


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"rotary": angles()}, TypeError, r"rotary is a tuple: an attnhub.Rotary"),
    ({"rotary": Rotary(*angles(half=5))}, ValueError, r"2 \* R <= head_dim 8"),
    ({"rotary": Rotary(angles()[0], angles(31)[1])}, ValueError, r"rotary cos \(32, 3\) and sin \(31, 3\)"),
    ({"rotary": Rotary(angles()[0].int(), angles()[1])}, TypeError, r"rotary: cos is a torch.int32"),
    ({"rotary": Rotary(angles()[0], angles()[1].to("meta"))}, ValueError, r"rotary: sin is on meta"),
    ({"rotary": Rotary(angles()[0].requires_grad_(), angles()[1])}, ValueError, r"rotary: cos requires a gradient"),
    ({"rotary": Rotary(*angles()), "k": None, "v": None}, ValueError, r"rotary= goes with kv_cache= and new tokens"),
    ({"rotary": Rotary(*angles()), "kv_cache": None}, ValueError, r"rotary= goes with kv_cache= and new tokens"),
    ({"rotary": Rotary(*angles(10))}, ValueError, r"rotary: a position is outside of the table of 10"),
    ({"k": torch.zeros(B, HK, 2, D, device="meta")}, ValueError, r"append_kv\(k\): it is on meta"),
    ({"k": torch.zeros(B, HK, 1, D)}, ValueError, r"1 new tokens and v 2"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["attention", "explain"])
def test_what_does_not_fit(name: str, change: dict[str, Any], error: type[Exception], words: str, appending: Appending) -> None:
    mine = cache_of()
    before = copied(mine)
    q, k, v = tokens(2)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "kv_cache": mine, **change}
    appending.willing = False
    if name == "explain" and ("rotary" not in change or "outside" in words):
        attnhub.explain(**given)  # looks at what decides
        return
    with pytest.raises(error, match=words):
        getattr(attnhub, name)(**given)
    assert torch.equal(mine.k_cache, before.k_cache) and not appending.appends
