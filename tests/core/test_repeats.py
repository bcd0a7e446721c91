"""Calls like the last ones are known by one check of their tensors; whatever differs is noticed, however it came to differ."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnhub
from attnhub import Backend, Call, KVCache, Plan, Problem, repeats, runtime
from attnhub.backend import Repeat
from attnhub.backends.reference import EVERYTHING, FLOATS, ReferencePlan
from attnhub.capability import Capability, DeviceRange
from attnhub.problem import Feature
from attnhub.registry import registry

Register = Callable[[Backend], Backend]


class Short(Backend):
    """The reference with a shorter way, which serves only tensors like those that it was made for."""

    name = "short"
    capability = Capability((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING, head_dims=(1, 1 << 20, 1), backward_features=EVERYTHING)

    def __init__(self) -> None:
        self.short = 0

    def cost(self, problem: Problem) -> float:
        return 1e-6

    def prepare(self, problem: Problem) -> Plan:
        plan, backend = ReferencePlan(), self
        plan.differentiable = False

        def repeat(call: Call) -> Repeat:
            held = [call.q, call.k, call.v, *(t for t in (call.mask.seqused_k, call.block_table) if t is not None)]
            like = [_metadata(t) for t in held]

            def again(*tensors: Tensor) -> tuple[Tensor, Optional[Tensor]]:
                assert [_metadata(t) for t in tensors] == like and not any(t.data_ptr() % 16 for t in tensors)
                assert not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
                backend.short += 1
                mask = call.mask if len(tensors) == 3 else attnhub.SeqLens(tensors[3]) & call.mask
                table = tensors[4] if len(tensors) == 5 else None
                same = Call(*tensors[:3], mask, call.softmax_scale, call.softcap, block_table=table, need_lse=call.need_lse)
                return ReferencePlan().forward(same)

            return again

        plan.repeat = repeat  # type: ignore[method-assign]
        return plan


def _metadata(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device, t.is_neg(), isinstance(t, Strange)


class Strange(Tensor):
    pass


@pytest.fixture
def short(register: Register) -> Short:
    backend = register(Short())
    assert isinstance(backend, Short)
    return backend


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by every tensor that is looked at because it was not known by the check."""
    found: list[int] = []
    real = repeats.is_usual_tensor
    monkeypatch.setattr(repeats, "is_usual_tensor", lambda t: found.append(1) or real(t))
    return found


def _tensors(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for shape in shapes)


def _qkv() -> tuple[Tensor, Tensor, Tensor]:
    return _tensors((2, 4, 5, 8), (2, 2, 12, 8), (2, 2, 12, 8))  # type: ignore[return-value]


def _off(t: Tensor) -> Tensor:
    return torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]] = {
    "nothing": lambda q, k, v: (q, k, v),
    "more queries": lambda q, k, v: (torch.cat((q, q), 2), k, v),
    "fewer keys": lambda q, k, v: (q, k[:, :, :7].contiguous(), v[:, :, :7].contiguous()),
    "strides": lambda q, k, v: (q, k.transpose(1, 2).contiguous().transpose(1, 2), v),
    "dtype": lambda q, k, v: (q.double(), k.double(), v.double()),
    "unaligned": lambda q, k, v: (q, _off(k), v),
    "one tensor twice": lambda q, k, v: (q, k, k),
    "negative": lambda q, k, v: (torch._neg_view(q), k, v),
    "subclass": lambda q, k, v: (q, k, v.as_subclass(Strange)),
    "parameter": lambda q, k, v: (q, torch.nn.Parameter(k, requires_grad=False), v),
    "grad": lambda q, k, v: (q, k, v.requires_grad_()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_tensor_is_noticed(name: str, short: Short, looked_up: list[int]) -> None:
    q, k, v = _qkv()
    for n in range(4):
        looked_up.clear()
        attnhub.attention(*(t.clone() for t in (q, k, v)))
        assert bool(looked_up) == (n < 2) and short.short == n  # the first makes the plan, the second the check
    looked_up.clear()
    changed = CHANGES[name](*(t.clone() for t in (q, k, v)))
    out = attnhub.attention(*changed)
    assert isinstance(out, Tensor) and bool(looked_up) == (name != "nothing")
    torch.testing.assert_close(out.detach().as_subclass(Tensor), attnhub.attention(*(t.detach() for t in changed), backend="reference"))
    if name == "grad":
        assert torch.autograd.grad(out.sum(), changed[2])[0].shape == v.shape


@contextlib.contextmanager
def _environment(patch: pytest.MonkeyPatch) -> Any:
    with patch.context() as inner:
        inner.setenv("ATTNHUB_BACKEND", "reference")
        yield


@contextlib.contextmanager
def _deterministic(patch: pytest.MonkeyPatch) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class _Seen(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


STATES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "environment": _environment, "context": lambda patch: attnhub.use("reference"), "deterministic": _deterministic,
    "autocast": lambda patch: torch.autocast("cpu"), "function mode": lambda patch: _Seen(), "fake": lambda patch: torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
    "dual level": lambda patch: torch.autograd.forward_ad.dual_level(),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_another_state_is_noticed(name: str, short: Short, looked_up: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv()
    for _ in range(3):
        attnhub.attention(q, k, v)
    before = short.short
    for n in range(3):
        with STATES[name](monkeypatch):
            attnhub.attention(q, k, v)
        decision = attnhub.last_decision()
        assert decision is not None and decision.chosen == ("reference" if name in ("environment", "context") else "short")
        assert (Feature.DETERMINISTIC in decision.problem.features) == (name == "deterministic")
        assert short.short == before + (n if name == "deterministic" else 0)  # which is another class of calls
    before = short.short
    looked_up.clear()
    attnhub.attention(q, k, v)
    assert short.short == before + 1 and not looked_up
    registry.unregister("short")
    attnhub.attention(q, k, v)
    assert runtime.last_backend() != "short"


@pytest.mark.parametrize("modes", [(torch.no_grad, torch.inference_mode, torch.enable_grad), (torch.no_grad, torch.enable_grad, torch.no_grad)], ids=["inference", "no_grad"])
def test_each_mode_of_autograd_is_known(modes: Any, short: Short, looked_up: list[int]) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv())
    for mode in modes:
        for _ in range(3):
            looked_up.clear()
            with mode():
                out = attnhub.attention(q, k, v)
        assert isinstance(out, Tensor) and not looked_up and out.requires_grad == (mode is torch.enable_grad)
        if out.requires_grad:
            wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum(), (q, k, v))
            torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), wanted)


def test_transforms_go_the_long_way(short: Short) -> None:
    q, k, v = _qkv()
    for _ in range(3):
        attnhub.attention(q, k, v)
    before = short.short
    batched = torch.func.vmap(lambda x: attnhub.attention(x, k, v))(torch.stack((q, q)))
    grad = torch.func.grad(lambda x: attnhub.attention(x, k, v).sum())(q)  # type: ignore[union-attr]
    assert batched.shape == (2, *q.shape) and grad.shape == q.shape and short.short == before


def test_heads_must_agree_for_sdpa_whatever_attention_has_seen(short: Short, looked_up: list[int]) -> None:
    q, k, v = _qkv()
    for _ in range(3):
        attnhub.attention(q, k, v)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broadcast"):
            attnhub.scaled_dot_product_attention(q, k, v)
    for _ in range(3):
        looked_up.clear()
        out = attnhub.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert not looked_up
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    with pytest.raises(RuntimeError, match="broadcast"):
        attnhub.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("count", [repeats._RECENT_LIMIT, repeats._RECENT_LIMIT + 2])
def test_shapes_in_turn(count: int, short: Short, looked_up: list[int]) -> None:
    calls = [(torch.randn(1, 2, n, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)) for n in range(1, count + 1)]
    for n in range(4):
        looked_up.clear()
        for call in calls:
            torch.testing.assert_close(attnhub.attention(*call), F.scaled_dot_product_attention(*call))
        assert n < 2 or bool(looked_up) == (count > repeats._RECENT_LIMIT)
        assert all(len(entries) <= repeats._RECENT_LIMIT for entries in runtime.recent.values())
    assert short.short == 3 * count


def test_what_is_remembered_is_bounded(short: Short, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_SEEN_LIMIT", 5)
    q, k, v = _qkv()
    for n in range(1, 20):
        for _ in range(3):
            attnhub.attention(q, k, v, softmax_scale=float(n))
        assert len(runtime.seen) <= 5 and len(runtime.recent) <= 5
    runtime.clear()
    assert not runtime.recent


def test_a_torch_without_the_check(short: Short, looked_up: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_Guards", None)
    q, k, v = _qkv()
    for n in range(4):
        looked_up.clear()
        attnhub.attention(q, k, v)
        assert looked_up and short.short == n


def _raises(*tensors: Tensor, **kwargs: Any) -> Any:
    raise TypeError("other arguments")


@pytest.mark.parametrize("guards", [_raises, lambda *t, **kw: SimpleNamespace(check=lambda *t: True), lambda *t, **kw: SimpleNamespace(check=lambda *t: False), None])
def test_a_check_that_is_another_one_is_not_used(guards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeats._tensor_guards() is repeats._Guards is not None
    monkeypatch.setattr(torch._C._dynamo, "guards", SimpleNamespace(TensorGuards=guards))
    assert repeats._tensor_guards() is None


# ---------------------------------------------------------------------------------------------- caches


def _cache(page_size: int, layout: str = "bhsd") -> KVCache:
    cache = KVCache.empty(2, 2, 12, 8, page_size=page_size)
    cache.k_cache.normal_()
    cache.v_cache.normal_()
    cache.cache_seqlens.copy_(torch.tensor([12, 5]))
    if layout == "bshd":
        keys, values = (t.transpose(1, 2).contiguous() for t in (cache.k_cache, cache.v_cache))
        cache = KVCache(keys, values, cache.cache_seqlens, cache.block_table, layout="bshd")
    return cache


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[KVCache], None]:
    return lambda cache: object.__setattr__(cache, name, change(getattr(cache, name)))


INSIDE: dict[str, Callable[[KVCache], Any]] = {
    "nothing": lambda cache: None,
    "values": lambda cache: cache.k_cache.mul_(0.5),
    "lengths": lambda cache: cache.cache_seqlens.fill_(3),
    "another k_cache": _replace("k_cache", torch.randn_like),
    "other memory": lambda cache: cache.k_cache.set_(torch.randn_like(cache.k_cache)),
    "other strides": _replace("v_cache", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "fewer columns of the table": lambda cache: cache.block_table is not None and (cache.block_table.resize_(2, 2), cache.cache_seqlens.clamp_(max=8)),
    "fewer pages": lambda cache: [t.resize_(5, *t.shape[1:]) for t in (cache.k_cache, cache.v_cache)] if cache.block_table is not None else None,
    "unaligned": _replace("k_cache", _off),
    "subclass": _replace("v_cache", lambda t: t.as_subclass(Strange)),
    "grad": lambda cache: cache.v_cache.requires_grad_(),
}


@pytest.mark.parametrize(("page_size", "layout"), [(0, "bhsd"), (4, "bhsd"), (4, "bshd")])
@pytest.mark.parametrize("name", INSIDE)
def test_a_cache_that_changed_is_noticed(name: str, page_size: int, layout: str, short: Short, looked_up: list[int]) -> None:
    cache, q = _cache(page_size, layout), torch.randn(2, 4, 1, 8)
    for n in range(4):
        looked_up.clear()
        attnhub.attention(q.clone(), kv_cache=cache)
        assert bool(looked_up) == (n < 2) and short.short == n
    looked_up.clear()
    before = [_metadata(t) for t in (cache.k_cache, cache.v_cache)] + [cache.block_table is not None and cache.block_table.shape]
    INSIDE[name](cache)
    after = [_metadata(t) for t in (cache.k_cache, cache.v_cache)] + [cache.block_table is not None and cache.block_table.shape]
    for n in range(4):
        out = attnhub.attention(q.clone(), kv_cache=cache)
        assert isinstance(out, Tensor)
        assert name == "unaligned" or n or bool(looked_up) == (before != after or name == "grad")
        with torch.no_grad():
            want = attnhub.attention(q, kv_cache=cache, backend="reference")
        torch.testing.assert_close(out.detach().as_subclass(Tensor), want.as_subclass(Tensor))  # type: ignore[union-attr]
    if name == "grad":
        assert torch.autograd.grad(out.sum(), cache.v_cache)[0].abs().sum() > 0


def test_caches_in_turn(short: Short, looked_up: list[int]) -> None:
    """Of settings that are the same, with other tensors and other numbers of them."""
    caches, q = [_cache(0), _cache(4), _cache(4, "bshd"), _cache(0, "bshd")], torch.randn(2, 4, 1, 8)
    rows = KVCache(*(torch.randn(3, 2, 12, 8) for _ in range(2)), torch.tensor([3, 7], dtype=torch.int32), cache_batch_idx=torch.tensor([2, 0]))
    want = [attnhub.attention(q, kv_cache=cache, backend="reference") for cache in (*caches, rows)]
    for n in range(4):
        looked_up.clear()
        for cache, right in zip((*caches, rows), want):
            torch.testing.assert_close(attnhub.attention(q, kv_cache=cache), right)
        assert bool(looked_up) == (n < 2)
    new = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    attnhub.attention(q, *new, kv_cache=rows)  # tokens more are tensors more
    torch.testing.assert_close(rows.k_cache[2, :, 3], new[0][0, :, 0])
    torch.testing.assert_close(rows.v_cache[0, :, 7], new[1][1, :, 0])


def test_what_is_remembered_of_a_cache_is_no_part_of_it(short: Short) -> None:
    cache, q = _cache(4, "bshd"), torch.randn(2, 4, 1, 8)
    for _ in range(3):
        want = attnhub.attention(q, kv_cache=cache)
    assert "_kept" in vars(cache)
    for other in (pickle.loads(pickle.dumps(cache)), copy.copy(cache), copy.deepcopy(cache)):
        assert vars(other).keys() == {name for name in vars(cache) if name != "_kept"}
        torch.testing.assert_close(attnhub.attention(q, kv_cache=other), want)


def test_tensors_without_strides_are_no_such_calls() -> None:
    """In a process of its own, which torch's check of a nested tensor would end."""
    source = """
import torch, attnhub
q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
for _ in range(3):
    attnhub.attention(q, k, v)
    attnhub.attention(q, kv_cache=attnhub.KVCache(k, v, torch.full((2,), 8, dtype=torch.int32)))
cache = attnhub.KVCache(k, v, torch.full((2,), 8, dtype=torch.int32))
nested = torch.nested.nested_tensor([torch.randn(4, 8, 16), torch.randn(4, 9, 16)])
for odd in (nested, q.to_sparse(), q.to_mkldnn()):
    for call in (lambda: attnhub.attention(odd, k, v), lambda: attnhub.attention(q, k, odd), lambda: attnhub.attention(odd, kv_cache=cache)):
        try:
            call()
        except (TypeError, ValueError) as error:
            print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and len(done.stdout.split()) == 9, done.stdout + done.stderr[-2000:]
