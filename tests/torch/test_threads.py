"""Calls from several threads while the policy changes, and the race of first calls.

Seen to fail: the lock around prepare removed (several prepares of one key), the key without the context's names (a thread
is served by another's choice).
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import attnhub
from attnhub import runtime
from attnhub.problem import Feature, Problem
from attnhub.registry import registry


def test_every_thread_is_served_by_its_own_choice(qkv: Any, same: Any, gradients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [qkv(length=length, kv_heads=2, grad=True) for length in (5, 9, 17)]
    wanted = [attnhub.attention(*one, attnhub.Causal(), backend="reference") for one in inputs]
    grads = [gradients(out, one) for out, one in zip(wanted, inputs)]
    stop = threading.Event()

    def work(name: str) -> int:
        count = 0
        with attnhub.use(name):
            for _ in range(40):
                for one, right, right_grads in zip(inputs, wanted, grads):
                    out = attnhub.attention(*one, attnhub.Causal())
                    decision = attnhub.last_decision()
                    assert decision is not None and decision.chosen == name
                    same(out, right)
                    same(gradients(out, one), right_grads)
                    count += 1
        return count

    def unsettle() -> None:
        names = ("reference", "sdpa", "sdpa,reference", "reference,auto")
        turn = 0
        while not stop.is_set():
            monkeypatch.setenv("ATTNHUB_BACKEND", names[turn % len(names)])
            if turn % 7 == 0:
                runtime.clear()
            turn += 1

    unsettling = threading.Thread(target=unsettle)
    unsettling.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, ("reference", "sdpa", "reference", "sdpa"))) == [120] * 4
    finally:
        stop.set()
        unsettling.join()


def test_one_prepare_per_key(qkv: Any, same: Any) -> None:
    prepared: list[Problem] = []

    class Slow(attnhub.Backend):
        name = "slow"
        capability = attnhub.Capability(devices=(attnhub.DeviceRange("cpu", dtypes=frozenset({"float32"})),), features=frozenset(Feature))

        def prepare(self, problem: Problem) -> attnhub.Plan:
            prepared.append(problem)
            time.sleep(0.05)
            return registry.get("reference").prepare(problem)

    registry.register(Slow())
    try:
        inputs, barrier = qkv(), threading.Barrier(8)
        wanted = attnhub.attention(*inputs, backend="reference")

        def first(_: int) -> torch.Tensor:
            barrier.wait()
            out = attnhub.attention(*inputs, backend="slow")
            assert isinstance(out, torch.Tensor)
            return out

        with ThreadPoolExecutor(8) as pool:
            for out in pool.map(first, range(8)):
                same(out, wanted)
        assert len(prepared) == 1
    finally:
        registry.unregister("slow")


def test_a_backward_in_another_thread_keeps_the_choice(qkv: Any) -> None:
    """On accelerators the autograd engine runs the backward in threads of its own, which do not see the context of `use`."""
    seen: list[str] = []

    class Watched(attnhub.Backend):
        name = "watched"
        automatic = False
        capability = registry.get("reference").capability

        def prepare(self, problem: Problem) -> attnhub.Plan:
            inner = registry.get("reference").prepare(problem)

            class Watching(attnhub.Plan):
                def forward(self, call: Any) -> Any:
                    return inner.forward(call)

                def backward(self, *args: Any) -> Any:
                    seen.append("watched")
                    return inner.backward(*args)

            return Watching()

    registry.register(Watched())
    try:
        for through_the_operator in (False, True):
            with attnhub.use("watched"), torch.autocast("cpu", torch.bfloat16, enabled=through_the_operator):
                out = attnhub.attention(*qkv(grad=True))
            assert isinstance(out, torch.Tensor)
            thread = threading.Thread(target=out.float().sum().backward)
            thread.start()
            thread.join()
        assert seen == ["watched", "watched"]
    finally:
        registry.unregister("watched")
