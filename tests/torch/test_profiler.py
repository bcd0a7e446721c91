"""torch.profiler: a call is one event with its name and shapes, whoever serves it.

Seen to fail: `recording.recorded` that only calls the function, and one that does not note that it is inside a call.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import attnhub

Make = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.mark.parametrize("backend", ("cpu", "sdpa", "reference"))
def test_calls_are_events(qkv: Make, backend: str) -> None:
    q, k, v = qkv(kv_heads=2)
    cache = attnhub.KVCache.empty(2, 2, 32, 16)
    shapes = [list(t.shape) for t in (q, k, v)]
    with attnhub.use(backend), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(3):  # the shorter way of calls seen before, too
            attnhub.attention(q, k, v, attnhub.Causal())
        attnhub.attention(q.clone().requires_grad_(), k, v, attnhub.Causal()).sum().backward()
        attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=cache)
        attnhub.scaled_dot_product_attention(q, k, v, torch.zeros(9, 9), enable_gqa=True)
        with pytest.raises(ValueError, match="head_dim"):
            attnhub.attention(q, k[..., :4], v)
    events = [(e.name, e.input_shapes) for e in found.events() if e.name.startswith("attnhub::") and "append" not in e.name]
    assert events[:5] == [("attnhub::attention", shapes)] * 5
    assert events[5] == ("attnhub::scaled_dot_product_attention", shapes)
    assert [name for name, _ in events[6:]] == ["attnhub::attention"]


def test_compiled_calls_are_events_of_the_operator(qkv: Make) -> None:
    inputs = qkv()
    compiled = torch.compile(attnhub.attention, backend="aot_eager", fullgraph=True)
    compiled(*inputs)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        compiled(*inputs)
    assert {e.name for e in found.events() if e.name.startswith("attnhub::")} == {"attnhub::forward"}
