"""The cuda backend's kernel for a few queries over a long cache. Without a GPU its source runs on the host, lane by lane (cuda_on_host.py), and passes
the shared conformance cases there. With one: the cases again, splits, pages, graphs, streams; new tokens are
in test_cuda_decode_append_device.py.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import cuda_on_host
import pytest
import torch
from cuda_decode_on_host import HOPPER, HostBackend
from cuda_device import beside_graphs, in_pages
from torch import Tensor

import attnhub
from attnhub import runtime, testing
from attnhub.backend import Call
from attnhub.backends.cuda import backend, decode, decode_plan, launcher, variant
from attnhub.backends.cuda.decode_plan import DecodePlan
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Causal, Mask, SeqLens, Window
from attnhub.problem import DeviceInfo, Feature, Problem
from attnhub.reasons import Code
from attnhub.registry import registry

# ---------------------------------------------------------------------------------------------- on the host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostBackend]:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    found = HostBackend(tmp_path_factory.mktemp("host"))
    registry.register(found)
    yield found
    registry.unregister(found.name)


_D64 = {"dtype": "bfloat16", "head_dim": 64, "backward": False}
HOST_CASES = [
    testing.Case(**_D64, seqlen_q=1, seqlen_k=300, q_heads=8),
    testing.Case(**_D64, seqlen_q=1, seqlen_k=5, q_heads=6),
    testing.Case(**_D64, seqlen_q=7, seqlen_k=150, q_heads=6, parts=("causal", "seqlens")),
    testing.Case(**_D64, seqlen_q=16, seqlen_k=90, q_heads=2, kv_heads=1, parts=("causal", "window_left", "leftpad")),
    testing.Case(**_D64, seqlen_q=3, seqlen_k=200, parts=("window", "seqlens_zero"), sinks=True),
    testing.Case(**_D64, seqlen_q=2, seqlen_k=70, parts=("causal", "chunk"), layout="strided"),
    testing.Case(**_D64, seqlen_q=5, seqlen_k=40, parts=("top_left", "prefix"), layout="bshd"),
    testing.Case(**_D64, seqlen_q=2, seqlen_k=90, page_size=16, parts=("causal",), q_heads=4),
    testing.Case(**_D64, seqlen_q=1, seqlen_k=200, page_size=48, q_heads=8, sinks=True),
    testing.Case(**_D64, page_size=16, lengths_q=(5, 0, 17, 1), seqlen_k=70, q_heads=4, parts=("causal",)),
    testing.Case(**_D64, page_size=48, lengths_q=(1, 1, 9), seqlen_k=133, q_heads=8, parts=("causal", "window_left"), sinks=True),
    testing.Case(**_D64, page_size=16, seqlen_q=21, seqlen_k=60, parts=("causal",)),
    testing.Case("float16", seqlen_q=3, seqlen_k=100, head_dim=40, v_head_dim=72, page_size=5, q_heads=4, softcap=5.0, parts=("causal", "alibi"), backward=False),
    testing.Case("float16", seqlen_q=1, seqlen_k=77, head_dim=40, v_head_dim=72, page_size=1, q_heads=4, softcap=5.0, parts=("alibi",), backward=False),
]  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", HOST_CASES, ids=str)
def test_the_source_passes_the_cases_on_the_host(case: testing.Case, splits: int, host: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_plan, "slots", lambda index, shared_bytes: 1)
    monkeypatch.setattr(decode, "split_count", lambda *_: splits)
    host.launched.clear()
    testing.Check(host.name, "forward", case, None, "cpu").run()
    assert set(host.launched) == {splits}


def test_values_that_are_not_finite_reach_only_who_may_see_them(host: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_plan, "slots", lambda index, shared_bytes: 4)
    q, k, v = torch.randn(1, 4, 6, 64).bfloat16(), torch.randn(1, 2, 40, 64).bfloat16(), torch.randn(1, 2, 40, 64).bfloat16()
    k[0, 0, 38], v[0, 1, 37, 3], v[0, 1, 39, 9] = float("nan"), float("inf"), float("nan")
    out = attnhub.attention(q, k, v, Causal(), backend=host.name)
    assert isinstance(out, Tensor)
    bad = ~torch.isfinite(out)
    expected = torch.zeros_like(bad)
    expected[0, :2, 4:] = True  # query i stands at 34 + i
    expected[0, 2:, 3:, 3] = expected[0, 2:, 5:, 9] = True
    assert torch.equal(bad, expected)
    clean = attnhub.attention(q, *(x.nan_to_num(0.0, 0.0) for x in (k, v)), Causal(), backend="reference")
    assert isinstance(clean, Tensor) and (out - clean)[~bad].abs().max() < 0.02


def test_tokens_behind_the_last_packed_sequence_are_zero(host: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_plan, "slots", lambda index, shared_bytes: 12)
    starts = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    k, v = torch.randn(30, 2, 16, 64).bfloat16(), torch.randn(30, 2, 16, 64).bfloat16()
    cache = attnhub.KVCache(k, v, torch.tensor([150, 3, 160], dtype=torch.int32), torch.randperm(30).int().view(3, 10))
    q, varlen = torch.randn(11, 4, 64).bfloat16(), Varlen(starts, starts, 5, 5)
    (mine, lse), (right, right_lse) = (
        attnhub.attention(q, None, None, Causal(), varlen=varlen, kv_cache=cache, return_lse=True, backend=name) for name in (host.name, "reference")
    )
    assert not mine[7:].any() and bool((lse[:, 7:] == float("-inf")).all())
    torch.testing.assert_close(mine, right, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, right_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [0, 12, 40])
def test_extreme_scores(power: int, host: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where maximum * scale rounds by more than the largest exponent."""
    monkeypatch.setattr(decode_plan, "slots", lambda index, shared_bytes: 12)
    q, k, v = (torch.randn(1, 2, 1 if i == 0 else 200, 64) for i in range(3))
    q, k, v = (q * 2.0**power).bfloat16(), (k * 2.0 ** (power // 2)).bfloat16(), v.bfloat16()
    out, lse = attnhub.attention(q, k, v, backend=host.name, return_lse=True)
    scores = q.double() @ k.double().mT / 8
    assert (out.double() - torch.softmax(scores, -1) @ v.double()).abs().max() < 0.02
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
def test_the_portable_kernel_too_stands_extreme_scores(mask: Mask, portable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host: its launch with a library in place of the kernel. Rows whose scores are ordinary are between the others."""
    q, k, v = (torch.randn(1, 2, 100, 64) for _ in range(3))
    q[:, :, ::3], k[:, :, :50:4] = q[:, :, ::3] * 2.0**13, k[:, :, :50:4] * 2.0**12
    q, k, v = q.half(), k.half(), v.half()
    out, lse = portable(q, k, v, mask)
    scores = q.double() @ k.double().mT * 8
    if mask.causal:
        scores = scores.masked_fill(~torch.ones(100, 100, dtype=torch.bool).tril(), float("-inf"))
    assert (out.double() - torch.softmax(scores, -1) @ v.double()).abs().max() < 5e-3
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-2)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    chosen = variant.make(arch="sm_80", turing=False, dtype="float16", head_dim=64, v_head_dim=64, seqlen_q=64)
    library = cuda_on_host.build(tmp_path_factory.mktemp("portable"), chosen)
    plan = launcher.CudaPlan(chosen, "")
    plan._kernel = lambda index: cuda_on_host.kernel(library.run)  # type: ignore[method-assign]

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "raw_stream", lambda index: 0)
            return plan._launch(Call(q, k, v, mask, 8.0, need_lse=True), 0)

    return run


# ---------------------------------------------------------------------------------------------- without running


@pytest.mark.parametrize(
    ("tiles", "rows", "seqlen_k", "splits"),
    [
        (8, 4, 8192, 16), (8, 4, 65536, 16), (8, 4, 1024, 8), (8, 4, 100, 1), (32, 1, 8192, 4), (128, 4, 8192, 1), (150, 4, 8192, 4), (512, 4, 8192, 1), (1024, 4, 2048, 1),
        (2, 16, 8192, 32), (1, 8, 1 << 20, 128),
    ],
)  # fmt: skip
def test_splits_fill_the_device_once_and_leave_little_to_merge(tiles: int, rows: int, seqlen_k: int, splits: int) -> None:
    """Blocks of 8 warps, one on each of 132 multiprocessors."""
    assert decode.split_count(tiles, seqlen_k, 8, 132, rows) == splits


@pytest.mark.parametrize(
    ("arch", "dim", "batch", "page_size", "warps", "slots"),
    [
        ((9, 0), 128, 1, 0, 8, 4), ((9, 0), 128, 1, 16, 8, 4), ((9, 0), 128, 128, 0, 8, 4), ((9, 0), 128, 128, 16, 4, 5), ((9, 0), 64, 16, 0, 8, 8), ((9, 0), 64, 128, 0, 4, 10),
        ((9, 0), 256, 128, 0, 4, 4), ((8, 0), 128, 1, 16, 8, 4), ((8, 6), 128, 1, 0, 4, 5), ((12, 0), 256, 1, 0, 2, 5),
    ],
)  # fmt: skip
def test_a_block_has_a_multiprocessor_for_itself_where_it_has_room_there_and_tiles_are_few(
    arch: tuple[int, int], dim: int, batch: int, page_size: int, warps: int, slots: int
) -> None:
    problem = Problem(DeviceInfo("cuda", "nvidia", arch), "float16", "float16", dim, dim, 32, 8, batch, 1, 8192, page_size=page_size)
    chosen = decode.choose(problem)
    assert (chosen.warps, chosen.slots) == (warps, slots)


@pytest.mark.parametrize(
    ("changes", "serves"),
    [
        ({}, True), ({"seqlen_q": 16}, True), ({"seqlen_q": 32}, False), ({"device": DeviceInfo("cuda", "nvidia", (7, 5))}, False),
        ({"features": frozenset({Feature.VARLEN})}, False), ({"features": frozenset({Feature.PAGED}), "page_size": 16}, True),
        ({"features": frozenset({Feature.PAGED, Feature.VARLEN}), "page_size": 16, "seqlen_q": 64}, True),
    ],
)  # fmt: skip
def test_which_problems_it_is_for(changes: dict[str, Any], serves: bool) -> None:
    problem = dataclasses.replace(Problem(HOPPER, "float16", "float16", 64, 64, 8, 2, 2, 1, 1024), **changes)
    assert decode.serves(problem) == serves


def test_pages_of_an_old_device_are_refused() -> None:
    base = Problem(HOPPER, "float16", "float16", 64, 64, 8, 2, 2, 1, 1024, frozenset({Feature.PAGED, Feature.SEQLENS}), page_size=16)
    assert not backend.check(base) and not backend.check(dataclasses.replace(base, seqlen_q=64))
    (reason,) = backend.check(dataclasses.replace(base, device=DeviceInfo("cuda", "nvidia", (7, 5))))
    assert reason.code == Code.NO_PAGED


def test_scratch_of_captured_launches_is_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(decode_plan, "is_capturing", lambda: capturing)
    monkeypatch.setattr(decode_plan, "lasting", lambda make, index: make())
    monkeypatch.setattr(decode_plan, "_zeros", lambda count, index: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(decode_plan, "_floats", lambda count, index: torch.empty(count))
    monkeypatch.setattr(decode_plan.torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(decode_plan, "_CAPTURED", 100)
    scratch = decode_plan._Scratch()
    scratch.prepare(0)
    first = scratch.take(50, 8, 0, 7)
    assert first is scratch.take(40, 30, 0, 7) and first.tickets_size >= 1024
    others = scratch.take(50, 8, 0, 9), scratch.take(50, 8, 1, 7)
    for partial, tickets in ((70, 8), (10, 5000), (60, 3000)):
        found = scratch.take(partial, tickets, 0, 7)
        assert found.partial_size >= max(partial, 70) and found.tickets_size >= max(tickets, 1024) and not found.tensors[1].any()
    assert found is scratch.take(70, 5000, 0, 7) is not first
    large = [scratch.take(5 << 20, 6000, 0, 7) for _ in range(2)]
    assert large[0].partial_at != large[1].partial_at and large[0].tickets_at == large[1].tickets_at and large[0].tickets_size >= 6000
    assert scratch.take(10, 10, 0, 7).partial_size < 1 << 20
    for stream in range(100, 1000):
        scratch.take(1, 1, 0, stream)
    assert len(scratch._by_stream) <= 64
    found = scratch.take(70, 5000, 0, 7)
    capturing = True
    assert scratch.take(1, 1, 0, 0) is scratch.take(1, 1, 0, 0)  # which is never captured
    taken = [scratch.take(50, 40, 0, 7) for _ in range(4)]  # tickets: two from the store, two beyond it
    for kind in range(2):
        ends = [(x.data_ptr(), x.data_ptr() + 4 * x.shape[0]) for x in (pair.tensors[kind] for pair in (*taken, *others, found, first))]
        assert all(a[1] <= b[0] or b[1] <= a[0] for i, a in enumerate(ends) for b in ends[:i])
    assert all((pair.partial_at, pair.tickets_at) == tuple(x.data_ptr() for x in pair.tensors) for pair in taken)


# ---------------------------------------------------------------------------------------------- on a device

gpu = pytest.mark.gpu


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Splits of the launches of the kernel."""
    found: list[int] = []
    run = DecodePlan._run

    def counted(self: DecodePlan, launch: decode_plan.Launch, *args: Any) -> Any:
        found.append(launch.grid[0] // launch.tiles)
        return run(self, launch, *args)

    monkeypatch.setattr(DecodePlan, "_run", counted)
    runtime.clear()
    yield found
    runtime.clear()


_DIMS = (8, 40, 64, 72, 96, 104, 128, 136, 192, 200, 256)
DEVICE_CASES = [
    *HOST_CASES,
    *(testing.Case("bfloat16", seqlen_q=1, seqlen_k=700, head_dim=dim, q_heads=8, backward=False) for dim in _DIMS),
    *(testing.Case("float16", seqlen_q=6, seqlen_k=500, head_dim=dim, q_heads=8, page_size=64, parts=("causal",), backward=False) for dim in _DIMS),
    *(testing.Case("bfloat16", seqlen_q=2, seqlen_k=500, head_dim=dim, q_heads=4, page_size=page, backward=False) for dim in (64, 128, 256) for page in (1, 16, 24, 256)),
    *(testing.Case("bfloat16", seqlen_q=4, seqlen_k=500, head_dim=dim, softcap=5.0, parts=("alibi", "causal", "window_left"), scale_q=4.0, backward=False) for dim in (64, 128, 256)),
    testing.Case("bfloat16", seqlen_q=16, seqlen_k=900, head_dim=128, q_heads=16, kv_heads=1, parts=("causal", "seqlens"), sinks=True, backward=False),
    testing.Case("bfloat16", seqlen_q=1, seqlen_k=500, head_dim=192, v_head_dim=128, q_heads=4, backward=False),
]  # fmt: skip


@gpu
@pytest.mark.parametrize("case", DEVICE_CASES, ids=str)
def test_conformance(case: testing.Case, launches: list[int]) -> None:
    testing.Check("cuda", "forward", case, None, "cuda").run()
    assert launches


def _exact(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1).nan_to_num(0.0) for x in (k, v))
    hidden = torch.arange(k.shape[2], device=k.device) >= lengths[:, None, None, None]
    return torch.softmax((q.double() @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf")), -1).nan_to_num(0.0) @ v


@gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_pages_of_any_size_are_bitwise_the_contiguous_cache(dim: int, launches: list[int]) -> None:
    q, k, v = torch.randn(3, 8, 1, dim, device="cuda").bfloat16(), *(torch.randn(3, 2, 3000, dim, device="cuda").bfloat16() for _ in range(2))
    lengths = torch.tensor([3000, 17, 2048], dtype=torch.int32, device="cuda")
    behind = (torch.arange(3000, device="cuda") >= lengths[:, None])[:, None].expand(3, 2, 3000)
    k[behind], v[behind] = float("nan"), float("nan")
    out = attnhub.attention(q, kv_cache=attnhub.KVCache(k, v, lengths), backend="cuda")
    assert isinstance(out, Tensor) and (out.double() - _exact(q, k, v, lengths)).abs().max() < 0.02
    for page_size in (1, 5, 16, 64, 256, 3000):
        order = torch.randperm(3 * -(-3000 // page_size), device="cuda").int().view(3, -1)
        cache = attnhub.KVCache(in_pages(k, page_size, order), in_pages(v, page_size, order), lengths, order)
        again = attnhub.attention(q, kv_cache=cache, backend="cuda")
        # The same splits only where a sequence can hold as much.
        assert isinstance(again, Tensor) and (torch.equal(again, out) if 3000 % page_size == 0 else (again - out).abs().max() < 0.02), page_size
    assert max(launches) > 1


@gpu
@pytest.mark.parametrize("page_size", [0, 16])
def test_repeats_streams_threads_and_graphs(page_size: int, launches: list[int]) -> None:
    """Launches side by side, and graphs replayed beside them, do not take each other's tickets."""
    q, k, v = torch.randn(2, 32, 1, 128, device="cuda").bfloat16(), *(torch.randn(2, 8, 4096, 128, device="cuda").bfloat16() for _ in range(2))
    lengths = torch.tensor([4096, 3001], dtype=torch.int32, device="cuda")
    order = torch.randperm(512, device="cuda").int().view(2, 256) if page_size else None
    if order is not None:
        k, v = in_pages(k, 16, order), in_pages(v, 16, order)
    cache = attnhub.KVCache(k, v, lengths, order)

    def run() -> Tensor:
        out = attnhub.attention(q, kv_cache=cache, backend="cuda")
        assert isinstance(out, Tensor)
        return out

    run()
    assert launches[-1] > 1
    graph, captured = beside_graphs(run, times=50, runs=3)
    lengths.copy_(torch.tensor([100, 4000]))
    right = run()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, right)


@gpu
def test_offsets_pass_2_to_the_31() -> None:
    k = torch.empty(1, 40_000, 512, 128, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    q = torch.randn(1, 512, 1, 128, device="cuda").bfloat16()
    out = attnhub.attention(q, k, k, backend="cuda")
    assert isinstance(out, Tensor)
    for head in (0, 511):
        at = slice(head, head + 1)
        exact = torch.softmax(q[:, at].double() @ k[:, at].double().mT * 128**-0.5, -1) @ k[:, at].double()
        assert (out[:, at].double() - exact).abs().max() < 2e-3


@gpu
@pytest.mark.parametrize("mask", [Window(100, 0), Causal() & Window(100)], ids=["window", "sliding"])
def test_slopes_and_windows_of_a_long_cache(mask: Mask) -> None:
    q, k, v = torch.randn(2, 8, 4, 64, device="cuda").half(), *(torch.randn(2, 2, 5000, 64, device="cuda").half() for _ in range(2))
    full = mask & ALiBi(torch.rand(2, 8, device="cuda")) & SeqLens(torch.tensor([5000, 333], device="cuda"))
    mine, right = (attnhub.attention(q, k, v, full, backend=name) for name in ("cuda", "reference"))
    torch.testing.assert_close(mine, right, rtol=2e-3, atol=2e-3)
