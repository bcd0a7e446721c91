"""The choice, as a pure function: (problem, policy, backends with their probes) -> Decision.

It runs nothing, imports nothing and reads no environment: tests call it with made-up devices.
Order: what was named, in that order; under ``auto``, by declared cost, then by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Optional, Union

from attnhub.backend import Backend
from attnhub.decision import Decision, Policy
from attnhub.problem import Feature, Problem
from attnhub.reasons import Accepted, Code, Reason, Rejected, Verdict


class Candidate:
    """A backend (None where its entry point failed) and the reasons for which it cannot run on this machine.

    probe: the reasons, or a function that finds them out; it is called once, when they are first asked for, because a probe
    imports what the backend needs.
    """

    def __init__(self, backend: Optional[Backend], probe: Union[tuple[Reason, ...], Callable[[], tuple[Reason, ...]]] = ()) -> None:
        self.backend = backend
        self._probe = probe

    @property
    def probe(self) -> tuple[Reason, ...]:
        if not isinstance(self._probe, tuple):
            self._probe = self._probe()
        return self._probe

    def with_reason(self, reason: Reason) -> Candidate:
        """The same backend, with one more reason against it."""
        return Candidate(self.backend, lambda: (*self.probe, reason))


def select(problem: Problem, policy: Policy, candidates: Mapping[str, Candidate], thorough: bool = True) -> Decision:
    """Judge every candidate and rank those that the policy admits.

    thorough=False does not probe (import) what the declarations rule out already; its verdicts then miss the probe's reasons.
    A choice that fails is always judged thoroughly.
    """
    named = frozenset(policy.names)
    verdicts = {name: _judge(problem, name, c, policy, name in named, thorough) for name, c in candidates.items()}
    for name in policy.names:
        if name != "auto" and name not in candidates:
            detail = f"no backend is named {name!r}; installed are {', '.join(candidates)}"
            verdicts[name] = Rejected((Reason(Code.UNKNOWN_NAME, detail, "`attnhub doctor` lists them"),))
    order: list[str] = []
    for name in policy.names:
        if name == "auto":
            order.extend(n for n in _by_cost(verdicts) if n not in order and n not in named)
        elif isinstance(verdicts[name], Accepted) and name not in order:
            order.append(name)
    backward: Optional[str] = None
    backward_verdicts: dict[str, Verdict] = {}
    if problem.need_backward and order:
        able: list[str] = []
        for name in order:
            found, found_verdicts = select_backward(problem, name, candidates, policy.disabled, thorough)
            if found is None:
                verdicts[name] = Rejected((Reason(Code.NO_BACKWARD, "it has no backward for this problem, and no other admitted backend has one"),))
                backward_verdicts = backward_verdicts or found_verdicts
            else:
                if not able:
                    backward, backward_verdicts = found, found_verdicts
                able.append(name)
        order = able
    if not order and not thorough:
        return select(problem, policy, candidates)
    why = "no backend can run its backward pass" if backward_verdicts and not order else _why(policy, order, verdicts)
    return Decision(problem, policy, verdicts, tuple(order), why, backward, backward_verdicts)


def select_backward(
    problem: Problem, forward: str, candidates: Mapping[str, Candidate], disabled: frozenset[str] = frozenset(), thorough: bool = True
) -> tuple[Optional[str], dict[str, Verdict]]:
    """Who runs the backward: the forward's backend if it has one for this problem, else the cheapest automatic one.

    Any backward may follow any forward, because lse, dropout and the treatment of empty rows are one contract.
    """
    verdicts: dict[str, Verdict] = {}
    for name, candidate in candidates.items():
        backend, reasons = candidate.backend, []
        if name in disabled:
            reasons.append(Reason(Code.DISABLED, "ATTNHUB_DISABLE names it"))
        if backend is not None:
            reasons.extend(backend.capability.check_backward(problem))
            reasons.extend(backend.check(problem))
            if not backend.automatic and name != forward:
                reasons.append(Reason(Code.NAME_ONLY, "it is never chosen automatically"))
        if thorough or not reasons:
            reasons = [*candidate.probe, *reasons]
        verdicts[name] = Rejected(tuple(reasons)) if reasons or backend is None else Accepted(backend.cost(problem))
    if isinstance(verdicts.get(forward), Accepted):
        return forward, verdicts
    ranked = _by_cost(verdicts)
    return (ranked[0] if ranked else None), verdicts


def _judge(problem: Problem, name: str, candidate: Candidate, policy: Policy, named: bool, thorough: bool) -> Verdict:
    backend = candidate.backend
    reasons = []
    if name in policy.disabled:
        reasons.append(Reason(Code.DISABLED, "ATTNHUB_DISABLE names it", f"unset ATTNHUB_DISABLE or remove {name} from it"))
    if backend is None:
        return Rejected((*candidate.probe, *reasons))
    reasons.extend(backend.capability.check(problem))
    reasons.extend(backend.check(problem))
    if not backend.automatic and not named:
        reasons.append(Reason(Code.NAME_ONLY, "it is never chosen automatically", f"ATTNHUB_BACKEND={name}"))
    if thorough or not reasons:
        reasons = [*candidate.probe, *reasons]
    return Rejected(tuple(reasons)) if reasons else Accepted(backend.cost(without_gradients(problem)))


def without_gradients(problem: Problem) -> Problem:
    """The same call under no_grad. Costs are asked for this one: recomputation under checkpointing runs with gradients what ran
    without, and must get the same kernel. lse stays only where the caller asked for it (its gradient then is a feature too)."""
    if not problem.need_backward:
        return problem
    dropped = {Feature.BIAS_GRAD, Feature.SINKS_GRAD, Feature.LSE_GRAD}
    if Feature.LSE_GRAD not in problem.features:
        dropped.add(Feature.LSE)
    return dataclasses.replace(problem, need_backward=False, features=problem.features - dropped)


def _by_cost(verdicts: Mapping[str, Verdict]) -> list[str]:
    accepted = [(verdict.cost, name) for name, verdict in verdicts.items() if isinstance(verdict, Accepted)]
    return [name for _, name in sorted(accepted)]


def _why(policy: Policy, order: list[str], verdicts: Mapping[str, Verdict]) -> str:
    said = {"argument": "backend=", "context": "attnhub.use(...)", "environment": "ATTNHUB_BACKEND", "default": "default"}[policy.source]
    names = ",".join(policy.names)
    if not order:
        return "every installed backend rejects it" if policy.names == ("auto",) else f"{said} asks for {names!r}, and none of these accepts it"
    if order[0] in policy.names:
        return f"{said} names it" if len(policy.names) == 1 else f"first of {names!r} that accepts, by {said}"
    verdict = verdicts[order[0]]
    cost = verdict.cost if isinstance(verdict, Accepted) else float("nan")
    return f"lowest declared cost, {cost:g}" + ("" if policy.names == ("auto",) else f", by `auto` in {said}")
