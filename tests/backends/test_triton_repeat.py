"""The triton backend's shorter way for a public call that was seen before: `Plan.repeat`, for plain tensors and for a cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_calls import again, calls, ints, randn, shifted, tensors_of
from triton_gpu import H100, MARKS, Gpu, seen

import attnhub
from attnhub import runtime
from attnhub.backend import Call
from attnhub.backends.triton import launch, launcher
from attnhub.mask import Causal, SeqLens, Window
from attnhub.registry import registry

pytestmark = MARKS


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors are served as if they were on an H100."""
    runtime.clear()
    monkeypatch.setattr(runtime.device, "describe", lambda device: H100)
    # An earlier test may have asked whether there is a GPU.
    monkeypatch.setattr(registry.candidates()["triton"], "_probe", ())
    yield
    runtime.clear()


def attention_of(gpu: Gpu, call: Call, grad: bool) -> Any:
    """What `attnhub.attention` launches for such a call, and then its backward."""
    call = again(call)
    q, k, v = call.q, call.k, call.v
    if grad:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    found = attnhub.attention(
        q, k, v, call.mask, softmax_scale=call.softmax_scale, softcap=call.softcap, sinks=call.sinks, return_lse=call.need_lse, backend="triton",
    )  # fmt: skip
    out = found[0] if call.need_lse else found
    assert isinstance(out, Tensor)
    launched = [seen(gpu, tensors_of(call))]
    if grad:
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        launched += [seen(gpu, {**tensors_of(call), "out": out}), *((g.shape, g.stride()) for g in grads)]
    return launched, out.shape, out.stride()


def test_attention_launches_what_triton_would(gpu: Gpu, chosen: None, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    """Through the public call, which asks the plan for its shorter way."""
    found = {name: call for name, call in calls().items() if call.varlen is None and call.block_table is None}
    names = [(name, grad) for name, call in found.items() for grad in (False, True) if not (grad and call.need_lse)]
    expected = {}
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_DIRECT", False)
        for name, grad in names:
            runtime.clear()
            expected[name, grad] = attention_of(gpu, found[name], grad)
    assert not replays
    runtime.clear()
    order = names * 3
    random.Random(2).shuffle(order)
    for name, grad in order:
        assert attention_of(gpu, found[name], grad) == expected[name, grad], (name, grad)
    assert len(replays) > len(order)


def caches() -> dict[str, tuple[Tensor, attnhub.KVCache, dict[str, Any]]]:
    """Calls of `attnhub.attention` that read a cache and append nothing: q, the cache, further arguments."""
    q = randn(2, 4, 1, 64)
    pages = randn(9, 2, 16, 64), randn(9, 2, 16, 64)
    rows = randn(2, 2, 96, 64), randn(2, 2, 96, 64)
    table, used = ints(*range(8)).reshape(2, 4), ints(33, 2)
    tokens_first = [x.transpose(1, 2).contiguous() for x in pages]
    return {
        "paged": (q, attnhub.KVCache(*pages, used, table), {}),
        "paged, causal, lse": (q, attnhub.KVCache(*pages, used, table), {"mask": Causal(), "return_lse": True}),
        "paged, window, softcap": (q, attnhub.KVCache(*pages, used, table), {"mask": Causal() & Window(9), "softcap": 3.0, "softmax_scale": 0.3}),
        "paged, bshd": (q, attnhub.KVCache(*tokens_first, used, table, layout="bshd"), {}),
        "paged, more queries": (randn(2, 4, 80, 64), attnhub.KVCache(*pages, used, table), {"mask": Causal()}),
        "paged, wider table": (q, attnhub.KVCache(*pages, used, table.repeat(1, 2)), {}),
        "contiguous": (q, attnhub.KVCache(*rows, used), {}),
        "rows chosen": (q, attnhub.KVCache(*rows, used, cache_batch_idx=ints(1, 0)), {}),
        "paged, shifted q": (shifted(q), attnhub.KVCache(*pages, used, table), {}),
        "paged, shifted table": (q, attnhub.KVCache(*pages, used, shifted(table)), {}),
        "paged, sliced table": (q, attnhub.KVCache(*pages, used, table.repeat(1, 2)[:, :4]), {}),
        "paged, strided lengths": (q, attnhub.KVCache(*pages, used.repeat(2)[::2], table), {}),
        "paged, negative scale": (q, attnhub.KVCache(*pages, used, table), {"softmax_scale": -0.3}),
    }  # fmt: skip


def relaid(x: Tensor) -> Tensor:
    """A copy with the same strides, as far from an aligned address."""
    offset = x.data_ptr() % 16 // x.element_size()
    flat = x.as_strided((sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1,), (1,))
    room = torch.empty(flat.numel() + offset + 16, dtype=x.dtype)
    room = room[-room.data_ptr() % 16 // x.element_size() :][offset : offset + flat.numel()]
    return room.copy_(flat).as_strided(x.shape, x.stride())


def reading_of(gpu: Gpu, q: Tensor, cache: attnhub.KVCache, arguments: dict[str, Any]) -> Any:
    """What a call launches, with its tensors elsewhere in memory than those given."""
    names = ("k_cache", "v_cache", "cache_seqlens", "block_table", "cache_batch_idx")
    tensors = {name: relaid(x) for name, x in (("q", q), *((name, getattr(cache, name)) for name in names)) if x is not None}
    elsewhere = attnhub.KVCache(layout=cache.layout, **{name: x for name, x in tensors.items() if name != "q"})
    found = attnhub.attention(tensors["q"], kv_cache=elsewhere, backend="triton", **arguments)
    out = found[0] if isinstance(found, tuple) else found
    return seen(gpu, tensors), out.shape, out.stride()


@pytest.mark.parametrize("name", caches())
def test_a_cache_is_read_again_the_short_way(name: str, gpu: Gpu, chosen: None, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    """Neither normalised nor keyed once more, unless an address or a stride is none that the short way is for; and the same launches."""
    case = caches()[name]
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_DIRECT", False)
        expected = reading_of(gpu, *case)
    runtime.clear()
    counted = {"normalised": 0, "keyed": 0}

    def counting(what: str, function: Any) -> Any:
        def counted_function(*args: Any, **named: Any) -> Any:
            counted[what] += 1
            return function(*args, **named)

        return counted_function

    monkeypatch.setattr(attnhub.arguments, "normalise", counting("normalised", attnhub.arguments.normalise))
    monkeypatch.setattr(launcher, "call_key", counting("keyed", launcher.call_key))
    assert reading_of(gpu, *case) == expected
    before = dict(counted)
    for _ in range(3):
        assert reading_of(gpu, *case) == expected
    long = any(word in name for word in ("shifted", "sliced", "strided", "negative"))
    assert (counted["normalised"] - before["normalised"], counted["keyed"] - before["keyed"]) == ((3, 3) if long else (0, 0))
    assert len(replays) == 3
    decision = attnhub.last_decision()
    assert decision is not None and decision.chosen == "triton"


def test_the_short_way_to_a_cache_refuses_what_the_long_one_does(gpu: Gpu, chosen: None) -> None:
    """After a call that was right, one that is wrong in something still says so."""
    q, cache, _ = caches()["paged"]

    def attend(q: Tensor = q, cache: attnhub.KVCache = cache, **arguments: Any) -> Any:
        return attnhub.attention(q, kv_cache=cache, backend="triton", **arguments)

    attend()
    attend()
    learnt = attnhub.KVCache(cache.k_cache.clone().requires_grad_(), cache.v_cache, cache.cache_seqlens, cache.block_table)
    k = randn(2, 2, 1, 64)
    for error, words, wrong in (
        (ValueError, "has no gradient", {"q": q.clone().requires_grad_()}),
        (ValueError, "has batch 1", {"q": q[:1]}),
        (ValueError, "head_dim", {"q": randn(2, 4, 1, 32)}),
        (ValueError, "multiple", {"q": randn(2, 3, 1, 64)}),
        (ValueError, "one dtype", {"q": q.to(torch.float16)}),
        (ValueError, "SeqLens and kv_cache", {"mask": SeqLens(ints(3, 3))}),
        (TypeError, "give both", {"k": k}),
        (TypeError, "softmax_scale is a list", {"softmax_scale": [1]}),
        (ValueError, "finite", {"softmax_scale": float("inf")}),
        (ValueError, "softcap", {"softcap": -1.0}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            attend(**wrong)
    gpu.launched.clear()
    attend(cache=learnt, q=q)
    assert gpu.launched


def test_last_decision_tells_what_compiling_took(gpu: Gpu, chosen: None) -> None:
    q = randn(2, 4, 80, 64)
    before = attnhub.explain(q, q, q, backend="triton")
    attnhub.attention(q, q, q, backend="triton")
    for decision in (attnhub.last_decision(), attnhub.explain(q, q, q, backend="triton")):
        assert decision is not None and decision.plan["backend"] == "triton"
        assert decision.plan["forward"]["compile_seconds"] >= 0 and decision.plan["grad_q"]["compile_seconds"] is None
    assert before.plan == {}
