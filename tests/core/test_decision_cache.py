"""Decisions and plans are made once a class of calls: a decode loop prepares nothing new."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Backend, Call, Gradients, KVCache, Needs, Plan, Problem, runtime
from attnhub.backend import Repeat
from attnhub.backends.reference import EVERYTHING, FLOATS, ReferencePlan, maths
from attnhub.capability import Capability, DeviceRange
from attnhub.mask import FULL
from attnhub.problem import Feature
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


class Shortened(Counting):
    """Its plans offer a shorter way, which counts the calls that take it and refuses them on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.refuses = 0, False

    def prepare(self, problem: Problem) -> Plan:
        plan, shortened = super().prepare(problem), self
        # Else its torch operations are differentiated, and no backward of the plan's.
        plan.differentiable = False

        def repeat(call: Call) -> Repeat:
            def again(q: Tensor, k: Tensor, v: Tensor) -> Optional[tuple[Tensor, Optional[Tensor]]]:
                if shortened.refuses:
                    return None
                assert [(x.shape, x.stride(), x.dtype) for x in (q, k, v)] == [(x.shape, x.stride(), x.dtype) for x in (call.q, call.k, call.v)]
                assert all(x.data_ptr() % 16 == 0 for x in (q, k, v))
                shortened.short += 1
                same = Call(q, k, v, call.mask, call.softmax_scale, call.softcap, need_lse=call.need_lse)
                return ReferencePlan().forward(same)

            return again

        plan.repeat = repeat  # type: ignore[method-assign]
        return plan


def _some_calls() -> dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]]:
    """Calls of one class that differ in one thing each."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    off = torch.randn(q.numel() + 1, generator=generator)[1:].view(q.shape)
    bshd = q.transpose(1, 2).contiguous().transpose(1, 2)
    causal = attnhub.Causal()
    lengths = torch.tensor([3, 9])
    return {
        "plain": ((q, k, v), {}), "lse": ((q, k, v), {"return_lse": True}), "scale": ((q, k, v), {"softmax_scale": 0.1}),
        "softcap": ((q, k, v), {"softcap": 2.0}), "causal": ((q, k, v), {"mask": causal}), "top left": ((q, k, v), {"mask": attnhub.Causal("top_left")}),
        "window": ((q, k, v), {"mask": attnhub.Window(2, 3)}), "another window": ((q, k, v), {"mask": attnhub.Window(2, 4)}),
        "chunk": ((q, k, v), {"mask": attnhub.Chunk(5)}), "another chunk": ((q, k, v), {"mask": attnhub.Chunk(4)}),
        "off": ((off, k, v), {}), "bshd": ((bshd, k, v), {}), "fewer keys": ((q, k[:, :, :9], v[:, :, :9]), {}), "fewer queries": ((q[:, :, :11], k, v), {}),
        "lengths": ((q, k, v), {"mask": attnhub.SeqLens(lengths)}), "other lengths": ((q, k, v), {"mask": attnhub.SeqLens(lengths.flip(0))}),
        "both": ((q, k, v), {"mask": attnhub.SeqLens(lengths) & causal}), "padding": ((q, k, v), {"mask": attnhub.LeftPad(lengths)}),
        "bias": ((q, k, v), {"mask": attnhub.Bias(torch.randn(12, 12, generator=generator))}),
        "bias of a row": ((q, k, v), {"mask": attnhub.Bias(torch.randn(1, 12, generator=generator))}),
    }  # fmt: skip


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_plans_shorter_way_serves_only_its_own_call(register: Register, refuses: bool, grad: bool) -> None:
    backend = Shortened()
    register(backend)
    backend.refuses = refuses
    calls = _some_calls()
    order = [*calls] * 4
    random.Random(0).shuffle(order)
    for name in order:
        tensors, kwargs = calls[name]
        # The same values elsewhere, in the same layout. Allocations are aligned, and so is what lies one element behind them not.
        tensors = tuple(_elsewhere(x).requires_grad_(grad) for x in tensors)  # type: ignore[assignment]
        got = attnhub.attention(*tensors, **kwargs)
        decision = attnhub.last_decision()
        assert decision is not None and decision.problem == attnhub.explain(*tensors, **kwargs).problem, name
        want = attnhub.attention(*(x.detach() for x in tensors), backend="reference", **kwargs)
        for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
            torch.testing.assert_close(a.detach(), b)
            if grad and a is got:
                for mine, theirs in zip(torch.autograd.grad(a.sum(), tensors), _reference_grads(tensors, kwargs)):
                    torch.testing.assert_close(mine, theirs)
    structural = [name for name in calls if name not in ("off", "lengths", "other lengths", "both", "padding", "bias", "bias of a row")]
    # The first call of each is not short.
    assert backend.short == (0 if refuses else 3 * len(structural))


def _elsewhere(x: Tensor) -> Tensor:
    offset = x.data_ptr() % 16 // x.element_size()
    room = torch.empty(sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1 + offset)
    return room[offset:].as_strided(x.shape, x.stride()).copy_(x)


def _reference_grads(tensors: Any, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Torch's own derivatives of the definition, without any backward of ours."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    call = Call(q, k, v, kwargs.get("mask", FULL), kwargs.get("softmax_scale", q.shape[3] ** -0.5), kwargs.get("softcap", 0.0))
    return torch.autograd.grad(maths.forward(call, None, torch.float64, False)[0].sum(), (q, k, v))


def test_a_mask_whose_bias_needs_a_gradient_gets_one(counting: Counting) -> None:
    """Though the same mask was served without one before, from what was seen."""
    q = torch.randn(1, 2, 6, 8)
    bias = torch.randn(6, 6)
    mask = attnhub.Bias(bias)
    for _ in range(3):
        attnhub.attention(q, q, q, mask)
    bias.requires_grad_()
    mask = attnhub.Bias(bias)
    for _ in range(2):
        out = attnhub.attention(q, q, q, mask)
        decision = attnhub.last_decision()
        assert decision is not None and Feature.BIAS_GRAD in decision.problem.features
        assert isinstance(out, Tensor)
        (grad,) = torch.autograd.grad(out.square().sum(), bias)
        assert grad.abs().sum() > 0


def test_a_masks_tensors_are_saved_as_tensors_are(register: Register) -> None:
    """Changed in place between forward and backward, they are an error, as for every operation of torch."""
    register(Shortened())
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    q = torch.randn(2, 2, 6, 8, requires_grad=True)
    for _ in range(2):
        out = attnhub.attention(q, q, q, attnhub.SeqLens(lengths))
        assert isinstance(out, Tensor)
        lengths.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            own = torch.tensor([3, 4], dtype=torch.int32)
            kept, out = weakref.ref(own), attnhub.attention(q, q, q, attnhub.SeqLens(own))
            del own
        assert isinstance(out, Tensor) and kept() is None
        out.sum().backward()


def test_a_mask_that_does_not_fit_is_refused_after_one_that_did(counting: Counting) -> None:
    q = torch.randn(2, 2, 6, 8)
    for _ in range(2):
        attnhub.attention(q, q, q, attnhub.SeqLens(torch.tensor([3, 4])))
    with pytest.raises(ValueError, match="seqused_k has 3 entries"):
        attnhub.attention(q, q, q, attnhub.SeqLens(torch.tensor([3, 4, 5])))
    with pytest.raises(ValueError, match="move it to"):
        attnhub.attention(q, q, q, attnhub.SeqLens(torch.empty(2, dtype=torch.int32, device="meta")))


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
