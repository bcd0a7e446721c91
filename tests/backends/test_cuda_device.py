"""The cuda backend's kernels on a device, each by the same means: the same bits 300 times while another stream disturbs, graphs replayed with changed
inputs, streams and threads side by side, another device current, offsets past 2^31. `make gpu-check` runs it.

Without a device: that the samples are served by the kernels that they are for, and that what judges here can fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import cuda_samples as samples
import pytest
import torch
from filelock import FileLock
from torch import Tensor

import attnhub
from attnhub.backend import Call, Plan
from attnhub.backends.cuda import decode, hopper, loading
from attnhub.backends.cuda.loading import CubinPlan
from attnhub.backends.reference import backend as reference
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Causal, Mask, SeqLens, Window

_FILE = Path(__file__).with_name("cuda_samples.py")

REPEATS = 300

_HERE = torch.cuda.is_available()
_WHY_NOT = "needs CuPy" if importlib.util.find_spec("cupy") is None else ""


def _kernels(*names: str) -> Any:
    """Kernels, those that cannot run on this device marked."""
    hopper_here = _HERE and torch.cuda.get_device_capability() == (9, 0)
    decode_here = _HERE and torch.cuda.get_device_capability() >= (8, 0)
    why = {"hopper": "" if hopper_here else "needs a Hopper GPU", "decode": "" if decode_here else "needs compute capability 8.0"}
    return [pytest.param(name, marks=pytest.mark.skipif(bool(_HERE and why.get(name)), reason=why.get(name, ""))) for name in names]


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT or "-")(test))


@pytest.fixture
def each(request: pytest.FixtureRequest) -> Iterator[list[tuple[Any, Call, Plan]]]:
    """(sample, call, plan) of one kernel's samples."""
    found = []
    for sample in samples.SAMPLES:
        if sample.kernel == request.param:
            call = sample.call("cuda")
            found.append((sample, call, sample.plan(call)))
    yield found


each_kernel = pytest.mark.parametrize("each", _kernels(*samples.KERNELS), indirect=True)


# ---------------------------------------------------------------------------------------------- what judges


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def differing(run: Callable[[], tuple[Tensor, ...]], count: int, disturb: Callable[[int], None]) -> list[int]:
    """Which of ``count`` further runs give other bits than the first. Nothing is waited for but now and then, so that launches meet the disturbance
    wherever they are."""
    first = [_bits(x.clone()) for x in run()]
    found = []
    for i in range(count):
        disturb(i)
        found.append(torch.stack([(_bits(x) != before).any() for x, before in zip(run(), first, strict=True)]).any())
        if i % 25 == 0 and _HERE:
            torch.cuda.synchronize()
    return torch.stack(found).nonzero().flatten().tolist()


def disturbance() -> Callable[[int], None]:
    """Now and then something on a stream of its own: matrix products and copies, from those that take a few multiprocessors for microseconds to those
    that take all of them, or the memory, for longer than a launch."""
    choice, stream = random.Random(0), torch.cuda.Stream()
    squares = [torch.randn(n, n, device="cuda").bfloat16() for n in (128, 512, 1024, 2048, 3072)]
    buffers = [[torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2)] for size in (1 << 10, 1 << 20, 1 << 25, 1 << 27)]
    host = torch.zeros(1 << 22, dtype=torch.uint8).pin_memory()
    here = torch.empty_like(host, device="cuda")
    torch.cuda.synchronize()

    def disturb(i: int) -> None:
        kind = choice.randrange(5)
        with torch.cuda.stream(stream):
            if kind == 0:
                square = choice.choice(squares)
                torch.mm(square, square)
            elif kind == 1:
                for _ in range(choice.randrange(1, 20)):
                    torch.mm(squares[0], squares[0])
            elif kind == 2:
                target, source = choice.choice(buffers)
                target.copy_(source)
            elif kind == 3:
                here.copy_(host, non_blocking=True)

    return disturb


def _forward(plan: Plan, call: Call) -> tuple[Tensor, Tensor]:
    out, lse = plan.forward(call)
    assert lse is not None
    return out, lse


def _same(mine: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(_bits(x), _bits(y)) for x, y in zip(mine, right, strict=True))


def _close(mine: tuple[Tensor, Tensor], call: Call) -> None:
    """To the reference, in its own dtype."""
    out, lse = reference.prepare(samples.problem(call)).forward(call)
    torch.testing.assert_close(mine[0], out, rtol=0.02, atol=0.02)
    torch.testing.assert_close(mine[1], lse, rtol=2e-3, atol=2e-3)


def test_a_run_that_differs_is_found() -> None:
    x, runs = torch.randn(4, 8).bfloat16(), iter(range(1000))

    def run() -> tuple[Tensor, ...]:
        again = x.clone()
        if next(runs) in (3, 17):
            again[2, 5] = torch.nextafter(again[2, 5], torch.tensor(9.0).bfloat16())
        return again, torch.full((4,), float("-inf"))

    assert differing(run, 20, lambda i: None) == [2, 16]


# ---------------------------------------------------------------------------------------------- samples, without a device


@pytest.mark.parametrize("sample", (*samples.SAMPLES, *samples.SMALL), ids=str)
def test_the_samples_are_for_their_kernels(sample: Any) -> None:
    call = sample.call("meta" if sample.batch * sample.seqlen_k > 10_000 else "cpu")
    found = dataclasses.replace(samples.problem(call), device=samples.HOPPER)
    serves = "decode" if decode.serves(found) else "hopper" if hopper.serves(found) else "portable"
    assert not attnhub.backends.cuda.backend.capability.check(found) and not attnhub.backends.cuda.backend.check(found)
    if sample.kernel in ("hopper", "decode"):
        assert serves == sample.kernel
        if sample.kernel == "hopper" and call.q.device.type == "cpu":
            from attnhub.backends.cuda import hopper_plan

            assert hopper_plan.serves(hopper.choose(found), call)
    else:
        chosen = sample.variant(found)
        assert chosen.turing == (sample.kernel == "turing") and not found.page_size and (not chosen.turing or found.q_dtype == "float16")


@pytest.mark.parametrize("sample", samples.SMALL, ids=str)
def test_other_values_have_the_same_shapes(sample: Any) -> None:
    call, other = sample.call("cpu"), sample.call("cpu", 1)
    plan = sample.plan(call)
    before, right = _forward(plan, call), _forward(plan, other)
    kept = samples.tensors(call)
    samples.fill(call, other)
    assert all(x is y for x, y in zip(kept, samples.tensors(call)))
    assert _same(_forward(plan, call), right) and not _same(before, right)
    assert len(kept) > 3 or not (sample.padded or sample.packed or sample.page_size)


def test_a_call_enters_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what a second device needs, without having one."""
    entered: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        yield
        entered.append(-1)

    class Seen(CubinPlan):
        def _launch(self, call: Call, index: int) -> tuple[Tensor, Optional[Tensor]]:
            entered.append(100 + index)
            return call.q, None

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(loading, "current_device", lambda: 0)

    class _On(torch.Tensor):
        def get_device(self) -> int:
            return int(self.shape[0])

    for index, seen in ((1, [1, 101, -1]), (0, [100])):
        entered.clear()
        x = torch.zeros(index, 1).as_subclass(_On)
        Seen("", 0).forward(Call(x, x, x, FULL, 1.0))
        assert entered == seen


# ---------------------------------------------------------------------------------------------- repeats, graphs, streams, threads, devices


@gpu
@pytest.mark.parametrize("sample", samples.SAMPLES, ids=str)
def test_repeats_bitwise(sample: Any) -> None:
    if sample.kernel == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    call = sample.call("cuda")
    plan = sample.plan(call)
    _close(_forward(plan, call), call)
    wrong = differing(lambda: _forward(plan, call), REPEATS, disturbance())
    assert not wrong, f"{len(wrong)} of {REPEATS} runs gave other bits than the first, run {wrong[0]} to begin with"


@gpu
@each_kernel
def test_graphs_replayed_with_changed_inputs(each: list[tuple[Any, Call, Plan]]) -> None:
    """Values, and what says which of them count: lengths, padding, where sequences begin, block tables, sinks, slopes."""
    for sample, call, plan in each:
        before = _forward(plan, call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _forward(plan, call)
        for seed in (1, 2, 0):
            other = sample.call("cuda", seed)
            right = _forward(plan, other)
            samples.fill(call, other)
            for _ in range(3):
                for x in captured:
                    x.fill_(float("nan"))
                graph.replay()
                assert _same(captured, right), f"{sample}, inputs {seed}"
            assert seed == 0 or not _same(captured, before), sample
        assert _same(captured, before), sample


@gpu
@each_kernel
def test_a_graph_of_all_samples_beside_eager_calls(each: list[tuple[Any, Call, Plan]]) -> None:
    """Two replays of a graph in a row, while the same plans are launched on another stream."""
    right = [_forward(plan, call) for _, call, plan in each]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [_forward(plan, call) for _, call, plan in each]
    streams, eager = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(10):
        with torch.cuda.stream(streams[0]):
            graph.replay()
        with torch.cuda.stream(streams[1]):
            eager.append([_forward(plan, call) for _, call, plan in each])
    torch.cuda.synchronize()
    for found in (captured, *eager):
        assert [str(each[i][0]) for i, mine in enumerate(found) if not _same(mine, right[i])] == []


@gpu
@pytest.mark.parametrize(("queries", "mask"), [(1, FULL), (128, Causal())], ids=["decode", "causal"])
def test_graphs_that_torch_compile_makes(queries: int, mask: Mask) -> None:
    """It warms them up with their memory, in which nothing may stay: what is kept for a stream lies elsewhere. The stream is new to the kernels."""
    q, k, v = (torch.randn(1, heads, length, 64, device="cuda").bfloat16() for heads, length in ((8, queries), (2, 4096), (2, 4096)))
    right = attnhub.attention(q, k, v, mask, backend="cuda")
    assert isinstance(right, Tensor)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: attnhub.attention(*tensors, mask, backend="cuda") + 1, mode="reduce-overhead")
    for _ in range(5):
        assert torch.equal(compiled(q, k, v), right + 1)


@gpu
@each_kernel
def test_two_streams_at_once(each: list[tuple[Any, Call, Plan]]) -> None:
    """The same plan, so that what belongs to a launch must not be shared: counters, tickets, tensor maps, partial results."""
    for sample, call, plan in each:
        calls = call, sample.call("cuda", 1)
        right = [_forward(plan, c) for c in calls]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in calls]
        found: list[list[tuple[Tensor, Tensor]]] = [[], []]
        for _ in range(25):
            for mine, c, stream in zip(found, calls, streams):
                with torch.cuda.stream(stream):
                    mine.append(_forward(plan, c))
        torch.cuda.synchronize()
        for n in range(2):
            assert [i for i, x in enumerate(found[n]) if not _same(x, right[n])] == [], f"{sample}, stream {n}"


@gpu
@each_kernel
@pytest.mark.parametrize("streams", ["one stream", "two streams"])
def test_launches_from_two_threads(streams: str, each: list[tuple[Any, Call, Plan]]) -> None:
    """Both begin at once, and were never seen by the plan before."""
    for sample, call, plan in each:
        calls = call, sample.call("cuda", 1)
        right = [_forward(plan, c) for c in calls]
        torch.cuda.synchronize()
        begin, found, failed = threading.Barrier(2), [[], []], []

        def work(n: int, sample: Any = sample, calls: Any = calls, plan: Plan = plan, begin: Any = begin, found: Any = found, failed: Any = failed) -> None:
            try:
                stream = torch.cuda.Stream() if n and streams == "two streams" else torch.cuda.default_stream()
                begin.wait(60)
                with torch.cuda.stream(stream):
                    found[n].extend(_forward(plan, calls[n]) for _ in range(25))
                stream.synchronize()
            except BaseException as error:
                failed.append((str(sample), n, error))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        for n in range(2):
            assert len(found[n]) == 25
            assert [i for i, x in enumerate(found[n]) if not _same(x, right[n])] == [], f"{sample}, thread {n}"


@gpu
@pytest.mark.skipif(_HERE and torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("kernel", _kernels(*samples.KERNELS))
def test_another_device_is_current(kernel: str) -> None:
    """Tensors on one device while the other is current, both ways, by a plan that was made on the first."""
    for sample in (s for s in samples.SAMPLES if s.kernel == kernel):
        with torch.cuda.device(0):
            calls = [sample.call(f"cuda:{n}") for n in range(2)]
            plan = sample.plan(calls[0])
            right = _forward(plan, calls[0])
        for n, current in ((0, 1), (1, 0), (1, 1)):
            with torch.cuda.device(current):
                mine = _forward(plan, calls[n])
                assert torch.cuda.current_device() == current
            assert all(x.get_device() == n for x in mine)
            assert _same(tuple(x.to("cuda:0") for x in mine), right), f"{sample} on {n} while {current} is current"


# ---------------------------------------------------------------------------------------------- offsets past 2^31


@pytest.fixture
def alone() -> Iterator[None]:
    """Tests of one machine that need much memory wait for one another."""
    with FileLock(Path(tempfile.gettempdir()) / "attnhub-tests-large.lock"):
        yield
        torch.cuda.empty_cache()


def _needs_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} GB are free")


def _large(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


_HEADS, _DIM, _WINDOW = 16, 128, 128
_LENGTH = 2**31 // (_HEADS * _DIM) + 5000


@gpu
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "packed"])
@pytest.mark.parametrize("kernel", _kernels("hopper", "portable"))
def test_offsets_past_2_to_the_31(kernel: str, layout: str, alone: None) -> None:
    """Of q, k, v and out: the last rows of the first and of the last head against the same rows alone."""
    _needs_memory(24)
    mask = Causal() & Window(_WINDOW - 1)
    shape = (1, _HEADS, _LENGTH, _DIM) if layout == "heads first" else (1, _LENGTH, _HEADS, _DIM)
    q, k, v = (_large(*shape) if layout == "heads first" else _large(*shape).transpose(1, 2) for _ in range(3))
    assert q.numel() > 2**31
    varlen = None
    if layout == "packed":
        starts = torch.tensor([0, 1000, _LENGTH], dtype=torch.int32, device="cuda")
        varlen = Varlen(starts, starts, _LENGTH - 1000, _LENGTH - 1000)
    call = Call(q, k, v, mask, _DIM**-0.5, varlen=varlen)
    out, _ = samples.Sample(kernel, layout, 0).plan(call).forward(call)
    rows, keys = 300, 300 + _WINDOW
    for head in (0, _HEADS - 1):
        one = slice(head, head + 1)
        right = attnhub.attention(q[:, one, -rows:], *(x[:, one, -keys:] for x in (k, v)), mask, backend="reference")
        assert isinstance(right, Tensor)
        torch.testing.assert_close(out[:, one, -rows:], right, rtol=0.02, atol=0.02)


@gpu
@pytest.mark.parametrize("page_size", [0, 5, 16])
@pytest.mark.parametrize("kernel", _kernels("decode"))
def test_a_cache_past_2_to_the_31(kernel: str, page_size: int, alone: None) -> None:
    """The last sequence, whose keys lie there, against the same alone."""
    _needs_memory(14)
    batch, kv_heads, length = 70, 8, 30720
    q, used = _large(batch, 32, 1, _DIM), torch.full((batch,), length, dtype=torch.int32, device="cuda")
    table = None
    if page_size:
        count = batch * length // page_size
        k, v = (_large(count, kv_heads, page_size, _DIM) for _ in range(2))
        table = torch.arange(count, dtype=torch.int32, device="cuda").view(batch, -1)
        last = [x[table[-1].long()].transpose(0, 1).reshape(1, kv_heads, length, _DIM) for x in (k, v)]
    else:
        k, v = (_large(batch, kv_heads, length, _DIM) for _ in range(2))
        last = [x[-1:] for x in (k, v)]
    assert k.numel() > 2**31
    call = Call(q, k, v, SeqLens(used), _DIM**-0.5, block_table=table)
    out, _ = samples.Sample(kernel, "cache", 1).plan(call).forward(call)
    right = attnhub.attention(q[-1:], *last, backend="reference")
    assert isinstance(right, Tensor)
    torch.testing.assert_close(out[-1:], right, rtol=0.02, atol=0.005)
