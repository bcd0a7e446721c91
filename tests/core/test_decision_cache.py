"""Decisions and plans are made once a class of calls: a decode loop prepares nothing new."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Backend, Call, Gradients, KVCache, Needs, Plan, Problem, runtime
from attnhub.backends.reference import EVERYTHING, FLOATS, ReferencePlan
from attnhub.capability import Capability, DeviceRange
from attnhub.registry import registry

Register = Callable[[Backend], Backend]


class Counting(Backend):
    """The reference, counting what is asked of it."""

    name = "counting"
    capability = Capability((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING, head_dims=(1, 1 << 20, 1), backward_features=EVERYTHING)

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.checks = self.forwards = self.backwards = 0

    def check(self, problem: Problem) -> tuple[Any, ...]:
        self.checks += 1
        return ()

    def cost(self, problem: Problem) -> float:
        return 1e-6

    def prepare(self, problem: Problem) -> Plan:
        self.problems.append(problem)
        counting = self

        class CountingPlan(ReferencePlan):
            def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
                counting.forwards += 1
                return super().forward(call)

            def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
                counting.backwards += 1
                return super().backward(call, grad_out, grad_lse, out, lse, needs)

        return CountingPlan()


@pytest.fixture
def counting(register: Register) -> Counting:
    backend = register(Counting())
    assert isinstance(backend, Counting)
    return backend


def _call(sq: int, sk: int, batch: int = 1, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
    attnhub.attention(torch.zeros(batch, 4, sq, 8, dtype=dtype), torch.zeros(batch, 2, sk, 8, dtype=dtype), torch.zeros(batch, 2, sk, 8, dtype=dtype), **kwargs)


def test_a_decode_loop_prepares_only_at_a_new_bucket(counting: Counting) -> None:
    prepares = []
    for sk in range(1, 130):
        _call(1, sk, mask=attnhub.Causal())
        prepares.append(len(counting.problems))
    assert counting.forwards == 129
    for sk in range(1, 130):
        expected = len({(n - 1).bit_length() for n in range(1, sk + 1)})
        assert prepares[sk - 1] == expected, f"{prepares[sk - 1]} prepares up to Sk={sk}"
    assert [p.seqlen_k for p in counting.problems] == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_a_decode_loop_over_a_cache_prepares_once(counting: Counting) -> None:
    """The capacity of a cache is its class, whatever its sequences' lengths."""
    for page_size in (0, 4):
        cache = KVCache.empty(2, 2, 32, 8, page_size=page_size)
        before = len(counting.problems)
        for _ in range(20):
            attnhub.attention(torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), attnhub.Causal(), kv_cache=cache)
            cache.advance(1)
        assert len(counting.problems) == before + 1


def test_checks_run_once_a_class(counting: Counting) -> None:
    _call(1, 100)
    checks = counting.checks
    for sk in range(65, 129):
        _call(1, sk)
    assert counting.checks == checks


def test_classes_of_query_lengths_and_batches(counting: Counting) -> None:
    for sq in (1, 2, 9, 16, 17, 32, 33):
        _call(sq, 64)
    assert [p.seqlen_q for p in counting.problems] == [1, 16, 32, 64]
    counting.problems.clear()
    for batch in (1, 2, 3, 4, 5, 8):
        _call(1, 64, batch)
    assert [p.batch for p in counting.problems] == [2, 4, 8], "batch 1 was seen above"


def test_what_makes_a_new_class(counting: Counting) -> None:
    _call(4, 8)
    seen = len(counting.problems)
    changes: list[dict[str, Any]] = [
        {"mask": attnhub.Causal()}, {"mask": attnhub.Causal("top_left")}, {"softcap": 3.0}, {"sinks": torch.zeros(4)}, {"dropout_p": 0.5},
        {"return_lse": True}, {"dtype": torch.float64}, {"mask": attnhub.SeqLens(torch.tensor([3]))}, {"mask": attnhub.Bias(torch.zeros(4, 8))},
    ]  # fmt: skip
    for change in changes:
        _call(4, 8, **change)
        seen += 1
        assert len(counting.problems) == seen, change
        _call(3, 7, **{k: (attnhub.Bias(torch.zeros(3, 7)) if k == "mask" and v.bias is not None else v) for k, v in change.items()})
        assert len(counting.problems) == seen, f"{change}: other lengths of the class"
    for same in ({"softmax_scale": 2.0}, {"mask": attnhub.Causal()}, {"softcap": 7.0}, {"backend": "counting"}, {"backend": "auto"}):
        _call(4, 8, **same)
        assert len(counting.problems) == seen, f"{same}: values are no class, and one plan serves every policy"


def test_training_asks_once_for_forward_and_backward(counting: Counting) -> None:
    for sk in (5, 6, 8):
        q, k = torch.zeros(1, 2, 3, 8, requires_grad=True), torch.zeros(1, 2, sk, 8)
        attnhub.attention(q, k, k).sum().backward()
    assert len(counting.problems) == 1 and counting.problems[0].need_backward and counting.backwards == 3
    assert attnhub.Feature.LSE in counting.problems[0].features


def test_one_prepare_for_many_threads(counting: Counting) -> None:
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for sk in (10, 20, 40):
            _call(1, sk)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(counting.problems) == 3 and counting.forwards == 24


def test_clear_forgets(counting: Counting) -> None:
    _call(1, 10)
    runtime.clear()
    _call(1, 10)
    assert len(counting.problems) == 2


def test_caches_are_bounded(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.clear()
    monkeypatch.setattr(runtime, "_LIMIT", 5)
    for dim in range(1, 20):
        q = torch.zeros(1, 1, 1, dim)
        attnhub.attention(q, q, q)
        assert len(runtime._cache) <= 5 and len(runtime._plans) <= 5
    assert len(counting.problems) == 19


def test_a_new_backend_is_seen_by_cached_classes(counting: Counting) -> None:
    _call(1, 10)
    registry.unregister("counting")
    _call(1, 10)
    assert attnhub.last_decision().chosen != "counting"  # type: ignore[union-attr]


def test_last_decision_belongs_to_its_thread(counting: Counting) -> None:
    _call(1, 10)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(attnhub.last_decision()))
    thread.start()
    thread.join()
    assert seen == [None] and attnhub.last_decision().chosen == "counting"  # type: ignore[union-attr]


def test_explain_prepares_nothing(counting: Counting) -> None:
    q = torch.zeros(1, 2, 3, 8)
    assert attnhub.explain(q, q, q).chosen == "counting"
    assert not counting.problems and not counting.forwards


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lse", [False, True])
def test_explain_is_the_decision_of_the_call(grad: bool, lse: bool) -> None:
    q, k = torch.zeros(2, 4, 5, 8, requires_grad=grad), torch.zeros(2, 2, 9, 8)
    arguments: dict[str, Any] = {"mask": attnhub.Causal() & attnhub.Bias(torch.zeros(5, 9, requires_grad=grad)), "softcap": 2.0, "return_lse": lse}
    told = attnhub.explain(q, k, k, **arguments)
    attnhub.attention(q, k, k, **arguments)
    done = attnhub.last_decision()
    assert done is not None
    assert (told.problem, told.policy, told.order, told.why, told.backward) == (done.problem, done.policy, done.order, done.why, done.backward)
