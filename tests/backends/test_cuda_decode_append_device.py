"""New tokens in the decode kernel's launch, on a device. What needs none is in test_cuda_decode_append.py."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, Optional

import pytest
import torch
from cuda_device import in_pages
from torch import Tensor

import attnhub
from attnhub import KVCache, Rotary, runtime
from attnhub.backends.cuda.decode_plan import DecodePlan
from attnhub.mask import Causal, Mask

pytestmark = pytest.mark.gpu


def _later(cache: KVCache, q: Tensor, new: int, rotary: Optional[Rotary], mask: Mask) -> Any:
    """The same attention over a cache that holds the tokens already."""
    used = cache.cache_seqlens
    if rotary is not None:
        positions = used.long()[:, None] + torch.arange(q.shape[2], device=q.device)
        q = attnhub.apply_rotary(q, rotary.cos, rotary.sin, positions, rotary.interleaved)
    return attnhub.attention(q, None, None, mask, kv_cache=dataclasses.replace(cache, cache_seqlens=used + new), backend="cuda")


@pytest.mark.parametrize(("dim", "q_heads", "new", "page_size", "rotary"), [
    *((128, 32, 1, page_size, rotary) for page_size in (0, 1, 16) for rotary in (None, (64, False), (24, True))),
    (64, 8, 3, 5, (32, False)), (64, 8, 16, 64, (8, True)), (256, 8, 16, 64, (128, False)), (256, 8, 1, 0, None), (72, 6, 2, 0, (10, True)),
])  # fmt: skip
def test_tokens_are_appended_in_the_launch(
    dim: int, q_heads: int, new: int, page_size: int, rotary: Optional[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch operations and then attention, bit for bit, 20 times over: nobody reads what is being written."""
    appended: list[int] = []
    runtime.clear()  # short ways of other tests go round what is watched here
    run = DecodePlan._run
    monkeypatch.setattr(DecodePlan, "_run", lambda self, *args: (appended.append(self.variant.append), run(self, *args))[1])
    half, interleaved = rotary or (0, False)
    angles = torch.rand(3100, half, device="cuda") * 6
    turned = Rotary(angles.cos(), angles.sin(), interleaved) if rotary else None
    lengths = torch.tensor([2900, 15, 0, 2048], dtype=torch.int32, device="cuda")
    k, v = (torch.randn(4, 2, 3000, dim, device="cuda").bfloat16() for _ in range(2))
    order = torch.randperm(4 * -(-3000 // page_size), device="cuda").int().view(4, -1) if page_size else None
    if order is not None:
        k, v = in_pages(k, page_size, order), in_pages(v, page_size, order)
    q, new_k, new_v = (torch.randn(4, heads, new, dim, device="cuda").bfloat16() for heads in (q_heads, 2, 2))
    right = KVCache(k.clone(), v.clone(), lengths, order)
    attnhub.append_kv(right, new_k, new_v, rotary=None if turned is None else turned[:2], interleaved=interleaved)
    want = _later(right, q, new, turned, Causal())
    appended.clear()
    for _ in range(20):
        mine = KVCache(k.clone(), v.clone(), lengths, order)
        out = attnhub.attention(q, new_k, new_v, Causal(), kv_cache=mine, rotary=turned, backend="cuda")
        assert torch.equal(out, want)
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in ((mine.k_cache, right.k_cache), (mine.v_cache, right.v_cache)))
    assert appended == [2 if rotary else 1] * 20


@pytest.mark.parametrize("page_size", [0, 16])
def test_a_captured_step_appends_where_the_lengths_say(page_size: int) -> None:
    """One graph for a decode loop: replayed, it moves on by the lengths that it counts itself."""
    made, eager = (
        attnhub.nn.CachedAttention(32, 8, 128, batch=2, max_seqlen=4096, page_size=page_size, rotary=10000.0, dtype=torch.bfloat16, device="cuda", backend=name)
        for name in ("cuda", "reference")
    )  # fmt: skip
    token = [torch.zeros(2, 1, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (32, 8, 8)]
    prompt = [torch.randn(2, 9, heads, 128, device="cuda").bfloat16() for heads in (32, 8, 8)]
    with torch.no_grad():
        made(*prompt), eager(*prompt), made(*token)
        made.set_position(9)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(*token)
        made.set_position(9)  # capturing has run nothing
        for _ in range(8):
            fresh = [torch.randn_like(t) for t in token]
            for old, x in zip(token, fresh):
                old.copy_(x)
            graph.replay()
            torch.testing.assert_close(out, eager(*fresh), rtol=0.02, atol=0.02)
    assert made.position.tolist() == [17, 17]
    assert all(torch.equal(getattr(made.cache, name), getattr(eager.cache, name)) for name in ("k_cache", "v_cache"))


def test_a_step_is_one_launch_and_a_count() -> None:
    """No other kernel and no synchronisation, once a step has been seen before."""
    layer = attnhub.nn.CachedAttention(32, 8, 128, batch=2, max_seqlen=4096, page_size=16, rotary=10000.0, dtype=torch.bfloat16, device="cuda", backend="cuda")
    token = [torch.randn(2, 1, heads, 128, device="cuda").bfloat16() for heads in (32, 8, 8)]
    for _ in range(3):
        layer(*token)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(*token)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("attnhub_forward" in name for name in names) == 1 and len(names) <= 2, names


def test_tokens_that_pass_the_cache_are_asserted_by_the_device() -> None:
    """In a process of its own: the device is lost for the one that asks."""
    source = """
import torch, attnhub
q, k = torch.randn(1, 8, 1, 64, device="cuda").half(), torch.randn(1, 2, 1, 64, device="cuda").half()
cache = KVCache.empty(1, 2, 32, 64, dtype=torch.float16, device="cuda")
attnhub.attention(q, k, k, kv_cache=cache, backend="cuda")
cache.cache_seqlens.fill_(32)
attnhub.attention(q, k, k, kv_cache=cache, backend="cuda")
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode and "cache_seqlens: below 0, or the new tokens behind it pass what the cache holds" in done.stdout + done.stderr
