"""From a normalised call to a running plan: the key of its class, the decision cache, and fallback before launch.

A key holds all that a choice may depend on: metadata of the tensors in classes (never exact lengths, so that a decode loop
hits), the policy as the argument, the context and the environment state it now, and the generation of the registry.
Hence a cached decision cannot outlive a change of any of them.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub import config, device
from attnhub.backend import Call, Gradients, Needs, Plan, PrepareError, Repeat
from attnhub.decision import Decision, NoBackendError, Policy
from attnhub.mask import FULL
from attnhub.policy import in_force
from attnhub.problem import Feature, Problem, seqlen_class, size_bucket
from attnhub.reasons import Reason
from attnhub.registry import registry
from attnhub.selector import Candidate, select, select_backward

log = logging.getLogger("attnhub")

_context: ContextVar[Optional[tuple[str, ...]]] = ContextVar("attnhub_backend", default=None)
_LIMIT = 4096
#: Names in ATTNHUB_DISABLE that no backend has, each said once.
_unknown: set[str] = set()

#: Bits of `flags` in a key; each is a feature of the problem.
_SOFTCAP, _SINKS, _DROPOUT, _VARLEN, _PAGED, _LSE, _DETERMINISTIC, _BACKWARD, _BIAS_GRAD, _SINKS_GRAD, _LSE_GRAD = (1 << i for i in range(11))
_FLAG_FEATURES = {
    _SOFTCAP: Feature.SOFTCAP, _SINKS: Feature.SINKS, _DROPOUT: Feature.DROPOUT, _VARLEN: Feature.VARLEN, _PAGED: Feature.PAGED,
    _LSE: Feature.LSE, _DETERMINISTIC: Feature.DETERMINISTIC, _BIAS_GRAD: Feature.BIAS_GRAD, _SINKS_GRAD: Feature.SINKS_GRAD,
    _LSE_GRAD: Feature.LSE_GRAD,
}  # fmt: skip


class use(ContextDecorator):  # noqa: N801 - reads as a verb: `with attnhub.use("triton"):`
    """Choose backends inside a ``with`` block or a decorated function; strict, like ``ATTNHUB_BACKEND``.

    names: one name, or several in order of preference (``use("cuda", "auto")``, ``use("triton,cpu")``). It holds for this
    thread and for tasks that it starts. A compiled graph obeys the context in which it runs, not the one in which it was
    traced; entering the context inside compiled code breaks the graph.
    """

    def __init__(self, *names: str) -> None:
        self._names = config.parse_names(",".join(map(_name, names)), "attnhub.use")
        self._tokens: list[Token[Optional[tuple[str, ...]]]] = []

    def _recreate_cm(self) -> use:
        # A decorated function may run in several threads at once, and a token belongs to the context that made it.
        return use(*self._names)

    def __enter__(self) -> use:
        self._tokens.append(_context.set(self._names))
        return self

    def __exit__(self, *exc: object) -> None:
        _context.reset(self._tokens.pop())


def _name(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"attnhub.use({value!r}): names of backends are strings")
    return value


def policy(backend: str = "") -> Policy:
    """The policy in force here and now."""
    found = in_force(backend, _context.get())
    for name in found.disabled - registry.candidates().keys() - _unknown:
        # Nothing to refuse: no call could be served by it. But somebody may have meant another name.
        _unknown.add(name)
        log.warning("ATTNHUB_DISABLE names %r, and no backend has that name; installed are %s", name, ", ".join(registry.names()))
    return found


#: Calls by exact metadata; see `attnhub.repeats`.
seen: dict[tuple[Any, ...], Seen] = {}
#: The last of these, by all but their tensors, each behind its check of tensors and with whether they want a gradient.
recent: dict[tuple[Any, ...], tuple[tuple[Callable[..., bool], Seen, bool], ...]] = {}


class Prepared:
    """A decision with its plan; the backward's plan is made at the first backward."""

    __slots__ = ("_backward", "backend", "decision", "differentiable", "forward", "plan")

    def __init__(self, decision: Decision, plan: Plan) -> None:
        self.decision = decision
        self.backend = decision.order[0]
        self.plan = plan
        self.forward = plan.forward
        self.differentiable = plan.differentiable
        self._backward: Optional[Plan] = None

    def backward_plan(self) -> Plan:
        """The plan of the backward pass; a backend that cannot prepare is passed over for the next, as in the forward."""
        # In a local: another thread whose backward failed may take it away again.
        plan = self._backward
        while plan is None:
            name, problem = self.decision.backward, self.decision.problem
            if name is None:
                raise NoBackendError(dataclasses.replace(self.decision, order=(), why="no backend can run its backward pass"))
            try:
                plan = self._backward = self.plan if name == self.backend else _plan(name, problem)
            except PrepareError as error:
                self.backward_failed(error)
        return plan

    def backward_failed(self, error: PrepareError) -> None:
        """The backward's backend failed before it launched anything: choose the next one."""
        name, policy = self.decision.backward, self.decision.policy
        assert name is not None
        _failed[name, self.decision.problem, "backward"] = error.reason
        following, verdicts = select_backward(self.decision.problem, self.backend, _candidates(self.decision.problem, "backward"), policy.disabled)
        self.decision = dataclasses.replace(self.decision, backward=following, backward_verdicts=verdicts)
        self._backward = None
        _say_once(name, following or "none", error)


class Seen:
    """A key's plan, its shorter way (`Plan.repeat`), and a check whether tensors are like those that it was remembered with."""

    __slots__ = ("alike", "chosen", "repeat", "scale")

    def __init__(self, chosen: Prepared, scale: float, repeat: Optional[Repeat]) -> None:
        self.chosen = chosen
        self.scale = scale
        self.repeat = repeat
        self.alike: Optional[Callable[..., bool]] = None


_cache: dict[tuple[Any, ...], Prepared] = {}
_plans: dict[tuple[str, int, Problem], Plan] = {}
_lock = threading.RLock()
#: (backend, problem, "" or "backward") -> why it could not prepare, before anything was launched.
_failed: dict[tuple[str, Problem, str], Reason] = {}
_said: set[tuple[str, str]] = set()


class _Served(threading.local):
    chosen: Optional[Prepared] = None


_served = _Served()


def last_decision() -> Optional[Decision]:
    """The decision behind the last attention call that ran in this thread, or None. Calls of zero size decide nothing."""
    chosen = _served.chosen
    return None if chosen is None else _with_plan(chosen.decision, chosen.plan)


def last_backend() -> Optional[str]:
    """Who served the last attention call that ran in this thread: `last_decision`'s choice, without asking the plan to describe itself."""
    chosen = _served.chosen
    return None if chosen is None else chosen.backend


def _with_plan(decision: Decision, plan: Plan) -> Decision:
    """The decision with its plan as that is now: a plan may know more after its first call."""
    described = {"backend": decision.chosen, **plan.describe()}
    return decision if decision.plan == described else dataclasses.replace(decision, plan=described)


def _facts(call: Call, need_backward: bool, grads: int) -> tuple[int, int, int, int, int]:
    """(batch, Sq, Sk, page size, flags) of a call, packed or paged or not."""
    batch, _, seqlen_q, _ = call.q.shape
    seqlen_k = call.k.shape[2]
    page_size = 0
    flags = grads
    if need_backward:
        flags |= _BACKWARD | _LSE
    elif call.need_lse:
        flags |= _LSE
    if call.softcap:
        flags |= _SOFTCAP
    if call.sinks is not None:
        flags |= _SINKS
    if call.dropout_p:
        flags |= _DROPOUT
    if call.varlen is not None:
        flags |= _VARLEN
        batch, seqlen_q, seqlen_k = call.varlen.cu_seqlens_q.shape[0] - 1, call.varlen.max_seqlen_q, call.varlen.max_seqlen_k
    if call.block_table is not None:
        flags |= _PAGED
        page_size = call.k.shape[2]
        seqlen_k = call.block_table.shape[1] * page_size
    if call.deterministic or torch.are_deterministic_algorithms_enabled():
        flags |= _DETERMINISTIC
    return batch, seqlen_q, seqlen_k, page_size, flags


def prepared(call: Call, backend: str, need_backward: bool, grads: int = 0) -> Prepared:
    """The plan for a call. ``grads``: bits of _BIAS_GRAD, _SINKS_GRAD, _LSE_GRAD that its backward must serve."""
    facts = batch, seqlen_q, seqlen_k, page_size, flags = _facts(call, need_backward, grads)
    q, k, mask = call.q, call.k, call.mask
    align = alignment(q, k, call.v)
    key = (
        q.dtype, k.dtype, q.device, q.shape[1], k.shape[1], q.shape[3], call.v.shape[3], (batch - 1).bit_length(),
        seqlen_q if seqlen_q <= 1 else 16 if seqlen_q <= 16 else -(seqlen_q - 1).bit_length(), (seqlen_k - 1).bit_length(),
        None if mask is FULL else mask.features(), flags, align, page_size, backend, _context.get(), config.snapshot(), registry.generation,
    )  # fmt: skip
    found = _cache.get(key)
    if found is None:
        with _lock:
            found = _cache.get(key)
            if found is None:
                found = prepare(_problem(call, facts, align), policy(backend))
                while len(_cache) >= _LIMIT:
                    del _cache[next(iter(_cache))]
                _cache[key] = found
    return found


def alignment(*tensors: Tensor) -> int:
    """The largest power of two, at most 16, that divides every pointer and stride (in bytes) of dimensions above size 1."""
    bits = 16
    for t in tensors:
        item = t.element_size()
        bits |= t.data_ptr()
        for size, stride in zip(t.shape[:-1], t.stride()[:-1]):
            if size > 1:
                bits |= stride * item
    return bits & -bits


def _problem(call: Call, facts: tuple[int, int, int, int, int], align: int) -> Problem:
    batch, seqlen_q, seqlen_k, page_size, flags = facts
    features = set(call.mask.features())
    features.update(feature for flag, feature in _FLAG_FEATURES.items() if flags & flag)
    if config.deterministic(config.snapshot()):
        features.add(Feature.DETERMINISTIC)
    q, k, v = call.q, call.k, call.v
    if q.shape[1] != k.shape[1]:
        features.add(Feature.GQA)
    if q.shape[3] != v.shape[3]:
        features.add(Feature.DV_DIFFERS)
    return Problem(
        device=device.describe(q.device), q_dtype=str(q.dtype)[6:], kv_dtype=str(k.dtype)[6:], head_dim=q.shape[3], v_head_dim=v.shape[3],
        q_heads=q.shape[1], kv_heads=k.shape[1], batch=size_bucket(batch), seqlen_q=seqlen_class(seqlen_q), seqlen_k=size_bucket(seqlen_k),
        features=frozenset(features), align_bytes=align, page_size=page_size, need_backward=bool(flags & _BACKWARD),
    )  # fmt: skip


def explain(call: Call, backend: str, need_backward: bool, grads: int) -> Decision:
    """The decision for a call, without running or preparing it; with its plan if the call's class has been prepared before."""
    problem = _problem(call, _facts(call, need_backward, grads), alignment(call.q, call.k, call.v))
    decision = decide(problem, policy(backend))
    plan = None if decision.chosen is None else _plans.get((decision.chosen, registry.generation, problem))
    return decision if plan is None else _with_plan(decision, plan)


def problems() -> list[Problem]:
    """The classes of the calls so far that are remembered, in the order in which they were first met."""
    return list(dict.fromkeys(found.decision.problem for found in _cache.values()))


def decide(problem: Problem, chosen_by: Policy) -> Decision:
    """The decision for a problem with the installed backends, without preparing anything."""
    return select(problem, chosen_by, _candidates(problem))


def prepare(problem: Problem, chosen_by: Policy) -> Prepared:
    """Decide and make the plan. A backend that cannot prepare is passed over, once and with a message, if the policy has another."""
    decision = select(problem, chosen_by, _candidates(problem), thorough=False)
    why = decision.why
    while decision.order:
        name = decision.order[0]
        try:
            plan = _plan(name, problem)
        except PrepareError as error:
            _failed[name, problem, ""] = error.reason
            decision = select(problem, chosen_by, _candidates(problem), thorough=False)
            why = f"{name} accepted the call and could not prepare ({error.reason.code.value})"
            if decision.chosen is not None:
                why = f"{name} could not prepare ({error.reason.code.value}), {decision.chosen} is next"
                _say_once(name, decision.chosen, error)
            continue
        return Prepared(_with_plan(dataclasses.replace(decision, why=why), plan), plan)
    raise NoBackendError(dataclasses.replace(decision, why=why))


def launch_failed(chosen: Prepared, error: PrepareError) -> None:
    """A plan found out at its first call, before it launched anything, that it cannot run (some compilers work that late)."""
    with _lock:
        _failed[chosen.backend, chosen.decision.problem, ""] = error.reason
        registry.generation += 1  # every cached decision is looked up anew
    _say_once(chosen.backend, "the next backend", error)


def _candidates(problem: Problem, which: str = "") -> dict[str, Candidate]:
    """The installed backends; those that failed to prepare this problem before carry the reason."""
    found = dict(registry.candidates())
    for name, candidate in registry.candidates().items():
        reason = _failed.get((name, problem, which))
        if reason is not None:
            found[name] = candidate.with_reason(reason)
    return found


def _say_once(failed: str, following: str, error: PrepareError) -> None:
    if (failed, error.reason.code.value) not in _said:
        _said.add((failed, error.reason.code.value))
        log.warning("falling back from %s to %s: %s", failed, following, error.reason)


def _plan(name: str, problem: Problem) -> Plan:
    key = (name, registry.generation, problem)
    with _lock:
        plan = _plans.get(key)
        if plan is None:
            plan = registry.get(name).prepare(problem)
            while len(_plans) >= _LIMIT:
                del _plans[next(iter(_plans))]
            _plans[key] = plan
    return plan


def _check_choice(call: Call, backend: str, need_backward: bool, grads: int) -> None:
    """A strict choice that cannot serve the call is an error even where there is nothing to compute."""
    if policy(backend).names != ("auto",):
        decision = explain(call, backend, need_backward, grads)
        if decision.chosen is None:
            raise NoBackendError(decision)


def is_empty(call: Call) -> bool:
    """Whether there is nothing to attend from or to."""
    return call.q.numel() == 0 or call.k.numel() == 0


def empty_result(call: Call) -> tuple[Tensor, Optional[Tensor]]:
    """The result of a problem of zero size: rows without keys."""
    from attnhub.layouts import empty_out, lse_dtype

    q = call.q
    out = empty_out(q, call.v.shape[3]).zero_()
    if not call.need_lse:
        return out, None
    lse = torch.full(q.shape[:3], float("-inf"), dtype=lse_dtype(q.dtype), device=q.device)
    if call.sinks is not None:
        lse.copy_(call.sinks[None, :, None].expand_as(lse))
    return out, lse


def forward(call: Call, backend: str = "", need_backward: bool = False, grads: int = 0) -> tuple[Tensor, Optional[Tensor]]:
    """Choose and run, without autograd."""
    if is_empty(call):
        _check_choice(call, backend, need_backward, grads)
        return empty_result(call)
    while True:
        chosen = _served.chosen = prepared(call, backend, need_backward, grads)
        try:
            return chosen.forward(call)
        except PrepareError as error:
            launch_failed(chosen, error)


def append_in_launch(call: Call, backend: str = "") -> Optional[tuple[Tensor, Optional[Tensor]]]:
    """`forward` of a call with new tokens, or None if whoever serves it does not append in its launch: nothing has run then."""
    assert call.append is not None
    if is_empty(call) or call.append.k.numel() == 0:
        return None
    while True:
        chosen = prepared(call, backend, False)
        if not chosen.plan.appends(call):
            return None
        _served.chosen = chosen
        try:
            return chosen.forward(call)
        except PrepareError as error:
            launch_failed(chosen, error)


def backward(
    call: Call, backend: str, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs, chosen: Optional[Prepared] = None
) -> Gradients:
    """The gradients, by the backend that the forward's decision names."""
    if is_empty(call):
        sinks = None
        if needs.sinks and call.sinks is not None:
            sinks = torch.zeros_like(call.sinks) if grad_lse is None else grad_lse.sum((0, 2)).to(call.sinks.dtype)
        bias = torch.zeros_like(call.mask.bias) if needs.bias and call.mask.bias is not None else None
        return Gradients(torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v), bias, sinks)
    if chosen is None:
        grads = (_BIAS_GRAD if needs.bias else 0) | (_SINKS_GRAD if needs.sinks else 0) | (_LSE_GRAD if grad_lse is not None else 0)
        chosen = prepared(call, backend, True, grads)
    while True:
        try:
            return chosen.backward_plan().backward(call, grad_out, grad_lse, out, lse, needs)
        except PrepareError as error:
            chosen.backward_failed(error)


def clear() -> None:
    """Forget every decision and plan."""
    with _lock:
        _cache.clear()
        _plans.clear()
        seen.clear()
        recent.clear()
        _failed.clear()
        _said.clear()
