"""The choice, as a pure function: (problem, policy, backends with their probes) -> Decision.

It runs nothing, imports nothing and reads no environment: tests call it with made-up devices.
Order: what was named, in that order; under ``auto``, by declared cost, then by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Optional

from attnhub.backend import Backend
from attnhub.decision import Decision, Policy
from attnhub.problem import Problem
from attnhub.reasons import Accepted, Code, Reason, Rejected, Verdict


class Candidate(NamedTuple):
    """A backend (None where its entry point failed) and the reasons for which it cannot run on this machine."""

    backend: Optional[Backend]
    probe: tuple[Reason, ...] = ()


def select(problem: Problem, policy: Policy, candidates: Mapping[str, Candidate]) -> Decision:
    """Judge every candidate and rank those that the policy admits."""
    named = frozenset(policy.names)
    verdicts: dict[str, Verdict] = {name: _judge(problem, name, c, policy, name in named) for name, c in candidates.items()}
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
            found, found_verdicts = select_backward(problem, name, candidates, policy.disabled)
            if found is None:
                verdicts[name] = Rejected((Reason(Code.NO_BACKWARD, "it has no backward for this problem, and no other admitted backend has one"),))
                backward_verdicts = backward_verdicts or found_verdicts
            else:
                if not able:
                    backward, backward_verdicts = found, found_verdicts
                able.append(name)
        order = able
    why = _why(policy, order, verdicts)
    return Decision(problem, policy, verdicts, tuple(order), why, backward, backward_verdicts)


def select_backward(
    problem: Problem, forward: str, candidates: Mapping[str, Candidate], disabled: frozenset[str] = frozenset()
) -> tuple[Optional[str], dict[str, Verdict]]:
    """Who runs the backward: the forward's backend if it has one for this problem, else the cheapest automatic one.

    Any backward may follow any forward, because lse, dropout and the treatment of empty rows are one contract.
    """
    verdicts: dict[str, Verdict] = {}
    for name, (backend, probe) in candidates.items():
        reasons = list(probe)
        if name in disabled:
            reasons.append(Reason(Code.DISABLED, "ATTNHUB_DISABLE names it"))
        if backend is not None:
            reasons.extend(backend.capability.check_backward(problem))
            reasons.extend(backend.check(problem))
            if not backend.automatic and name != forward:
                reasons.append(Reason(Code.NAME_ONLY, "it is never chosen automatically"))
        verdicts[name] = Rejected(tuple(reasons)) if reasons or backend is None else Accepted(backend.cost(problem))
    if isinstance(verdicts.get(forward), Accepted):
        return forward, verdicts
    ranked = _by_cost(verdicts)
    return (ranked[0] if ranked else None), verdicts


def _judge(problem: Problem, name: str, candidate: Candidate, policy: Policy, named: bool) -> Verdict:
    backend, probe = candidate
    reasons = list(probe)
    if name in policy.disabled:
        reasons.append(Reason(Code.DISABLED, "ATTNHUB_DISABLE names it", f"unset ATTNHUB_DISABLE or remove {name} from it"))
    if backend is None:
        return Rejected(tuple(reasons))
    reasons.extend(backend.capability.check(problem))
    reasons.extend(backend.check(problem))
    if not backend.automatic and not named:
        reasons.append(Reason(Code.NAME_ONLY, "it is never chosen automatically", f"ATTNHUB_BACKEND={name}"))
    return Rejected(tuple(reasons)) if reasons else Accepted(backend.cost(problem))


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
