"""The triton backend's short ways to a launch against Triton's own, without a GPU: the driver and the compiler are stand-ins.

What is compared of a launch is all that decides its result: what the kernel was specialised on, the grid, the stream, and every
argument that is not compiled in, with addresses replaced by the names of what lies there.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_calls import again, backward_of, backward_variants, calls, forward_of, randn
from triton_gpu import MARKS, Gpu, by_triton, plan, sized_kernel

from attnhub.backend import Call
from attnhub.backends.triton import launch
from attnhub.backends.triton.kernels import forward
from attnhub.backends.triton.tiles import Tiles
from attnhub.mask import FULL

pytestmark = MARKS


@pytest.mark.parametrize("way", ["replay", "compiled"])
def test_forward_launches_what_triton_would(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any], way: str) -> None:
    """In any order, each call of one plan is launched as by a plan of its own that takes Triton's way."""
    found, shared = calls(), plan()
    order = [*found] * 3
    random.Random(0).shuffle(order)
    for name in order:
        run = forward_of(gpu, again(found[name]))
        assert run(shared if way == "replay" else plan()) == by_triton(monkeypatch, run, "bfloat16"), name
    assert len(replays) == (len(order) - len(shared._recordings) if way == "replay" else 0)


def test_one_tensor_in_two_places_is_two_arguments(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    q = randn(2, 2, 33, 64)
    shared = plan()
    for k, v in ((q, q), (randn(2, 2, 33, 64), q), (q, randn(2, 2, 33, 64))):
        run = forward_of(gpu, Call(q, k, v, FULL, 0.125))
        assert run(shared) == by_triton(monkeypatch, run, "bfloat16")
    assert len(replays) == 2


def test_backward_launches_what_triton_would(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    shared = plan()
    order = [(name, call, kind) for name, call in calls().items() if "paged" not in name for kind in backward_variants(call) if kind == "plain" or name in ("plain", "sinks")] * 2
    random.Random(1).shuffle(order)
    for name, call, kind in order:
        same = again(call)
        run = backward_of(gpu, same, *backward_variants(same)[kind])
        assert run(shared) == by_triton(monkeypatch, run, "bfloat16"), (name, kind)
    assert len(replays) == len(order) - len(shared._recordings) >= len(order) // 2


class OnSecondDevice(Tensor):
    def get_device(self) -> int:
        return 1


def test_devices_and_streams(gpu: Gpu, replays: list[Any]) -> None:
    """A kernel is loaded on one device; the stream is the current one of the tensors' device at each launch."""
    shared = plan()
    call = calls()["plain"]
    for _ in range(2):
        shared.forward(call)
    gpu.streams[-1] = 9
    shared.forward(call)
    assert [stream for _, _, stream, *_ in gpu.launched] == [7, 7, 9]
    functions = {kernel.function for kernel, *_ in gpu.launched}
    gpu.launched.clear()
    gpu.device = 1
    second = Call(*(x.as_subclass(OnSecondDevice) for x in (call.q, call.k, call.v)), FULL, 0.125)  # type: ignore[arg-type]
    for _ in range(2):
        shared.forward(second)
    assert [stream for _, _, stream, *_ in gpu.launched] == [8, 8]
    assert functions.isdisjoint(kernel.function for kernel, *_ in gpu.launched) and len(replays) == 3


def test_a_profilers_hook_sees_every_launch(gpu: Gpu, replays: list[Any]) -> None:
    shared, call, calls_of_hook = plan(), calls()["token, many keys"], []
    for _ in range(2):
        shared.forward(call)
    assert len(replays) == 1 and shared.repeat(call) is not None

    def hook(metadata: Any) -> None:
        calls_of_hook.append(metadata)

    hooks: Any = launch._hooks
    chain = hasattr(hooks.launch_enter_hook, "add")
    hooks.launch_enter_hook.add(hook) if chain else setattr(hooks, "launch_enter_hook", hook)
    try:
        repeat = shared.repeat(call)
        assert repeat is not None and repeat(call.q, call.k, call.v) is None
        shared.forward(call)
        assert len(calls_of_hook) == 2 and len(replays) == 1
    finally:
        hooks.launch_enter_hook.remove(hook) if chain else setattr(hooks, "launch_enter_hook", None)
    shared.forward(call)
    assert len(calls_of_hook) == 2 and len(replays) == 2


def test_threads_do_not_mix_their_tensors(gpu: Gpu) -> None:
    shared = plan()
    mine: dict[int, list[tuple[int, ...]]] = {}
    start = threading.Barrier(4)

    def work() -> None:
        own = mine.setdefault(threading.get_ident(), [])
        start.wait()
        for _ in range(300):
            q, k, v = (randn(1, 4, 20, 64) for _ in range(3))
            own.append((q.data_ptr(), k.data_ptr(), v.data_ptr(), shared.forward(Call(q, k, v, FULL, 0.125))[0].data_ptr()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    launched: dict[int, list[tuple[int, ...]]] = {}
    for _, _, _, args, thread_id in gpu.launched:
        launched.setdefault(thread_id, []).append(tuple(x if isinstance(x, int) else x.data_ptr() for x in args[:4]))
    assert forward.forward_kernel.arg_names[:4] == ["q", "k", "v", "out"]
    assert launched == mine
    # A recording is not changed by being replayed.
    for recording in shared._recordings.values():
        assert [step.arguments[position] for step in recording._steps for position, _ in step.pointers] == [None] * 4


def test_a_compiled_kernel_is_found_by_all_that_triton_specialises_on(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    values: list[Any] = [
        0, 1, 2, 16, 17, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, -1, -16, -(2**31), -(2**31) - 1, 0.0, 1.0, 2.5, True, False, None,
        x, x[1:], x[4:], x.half(), x.int(), x.bfloat16()[1:], x.bool(),
    ]  # fmt: skip
    tiles = [Tiles(0, 0, 4, 1), Tiles(0, 0, 8, 1), Tiles(0, 0, 4, 2)]

    def specialised(value: Any, constant: int, choice: Tiles, runtime: bool) -> Any:
        launch.launch(sized_kernel, 1, choice, x=None if runtime else value, size=value if runtime else 7, constant=constant)
        return gpu.launched.pop()[0].specialised

    def by_triton(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_DIRECT", False)
            return specialised(*args)

    order = [*itertools.product(values, (1, 2), tiles, (False, True))] * 2
    random.Random(3).shuffle(order)
    for args in order:
        assert specialised(*args) == by_triton(*args)
    # One kernel serves all even numbers of 32 bits, say.
    assert len(launch._compiled) < 12 * len(values)


def test_an_unknown_triton_launches_its_own_way(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, replays: list[Any]) -> None:
    monkeypatch.setattr(launch, "_DIRECT", False)
    shared, call = plan(), calls()["plain"]
    for _ in range(3):
        shared.forward(call)
    assert len(gpu.launched) == 3 and not replays and not launch._compiled and shared.repeat(call) is None
