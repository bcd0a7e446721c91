"""The outcome of a choice, as data: what was chosen, why, and what every backend said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from attnhub.problem import Problem
from attnhub.reasons import Accepted, Code, Rejected, Verdict


@dataclass(frozen=True)
class Policy:
    """Which backends may be chosen, and who said so.

    names: in order of preference; ``auto`` (last) admits all automatic backends by cost. source: ``argument``,
    ``context``, ``environment`` or ``default``.
    """

    names: tuple[str, ...] = ("auto",)
    source: str = "default"
    disabled: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "source": self.source, "disabled": sorted(self.disabled)}


@dataclass(frozen=True)
class Decision:
    """What `explain` returns and the error of a failed choice carries.

    order: every backend that may serve the call, best first; the first is ``chosen``, the others are what a failure
    before launch falls back to. backward: who runs the backward pass, when the problem needs one. plan: what the chosen
    backend says of its plan (`Plan.describe`), once there is one: kernels, tiles, and after its first call what compiling took.
    """

    problem: Problem
    policy: Policy
    verdicts: Mapping[str, Verdict]
    order: tuple[str, ...]
    why: str
    backward: Optional[str] = None
    backward_verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> Optional[str]:
        """Name of the backend that serves the call, or None."""
        return self.order[0] if self.order else None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary: problem, policy, chosen, why, verdicts with all reason codes, backward, plan."""
        return {
            "problem": self.problem.to_json(),
            "policy": self.policy.to_json(),
            "chosen": self.chosen,
            "why": self.why,
            "order": list(self.order),
            "verdicts": {name: verdict.to_json() for name, verdict in self.verdicts.items()},
            "backward": self.backward,
            "backward_verdicts": {name: verdict.to_json() for name, verdict in self.backward_verdicts.items()},
            "plan": dict(self.plan),
            "command": explain_command(self.problem, self.policy),
        }

    def __str__(self) -> str:
        problem = self.problem
        features = ", ".join(sorted(problem.features)) or "none"
        lines = [
            f"attention on {problem.device.type} {problem.device.name}".rstrip() + f", {problem.q_dtype}, {problem.q_heads}/{problem.kv_heads} heads, "
            f"head_dim {problem.head_dim}/{problem.v_head_dim}, Sq class {problem.seqlen_q}, Sk class {problem.seqlen_k}, features: {features}",
            f"chosen: {self.chosen or 'none'} ({self.why})" + (f"; backward: {self.backward or 'none'}" if problem.need_backward else ""),
        ]
        width = max((len(name) for name in self.verdicts), default=0)
        for name, verdict in self.verdicts.items():
            if isinstance(verdict, Accepted):
                lines.append(f"  {name:<{width}}  accepted, declared cost {verdict.cost:g}")
            else:
                lines.extend(f"  {name if i == 0 else '':<{width}}  {reason}" for i, reason in enumerate(verdict.reasons))
        return "\n".join(lines)


def _is_unknown(verdict: Optional[Verdict]) -> bool:
    return isinstance(verdict, Rejected) and any(reason.code is Code.UNKNOWN_NAME for reason in verdict.reasons)


class NoBackendError(RuntimeError):
    """No backend may serve the call. ``decision`` holds every verdict."""

    def __init__(self, decision: Decision) -> None:
        unknown = {name for name in decision.policy.names if _is_unknown(decision.verdicts.get(name))}
        super().__init__(
            f"no backend can serve this call: {decision.why}.\n{decision}\n"
            f"installed: {', '.join(name for name in decision.verdicts if name not in unknown)}. To see this again: {explain_command(decision.problem, decision.policy)}"
        )
        self.decision = decision


def explain_command(problem: Problem, policy: Optional[Policy] = None) -> str:
    """The shell command that explains the choice for a problem of this class."""
    parts = [
        "attnhub explain",
        f"--device {problem.device.type} --dtype {problem.q_dtype} --batch {problem.batch}",
        f"--heads {problem.q_heads} --kv-heads {problem.kv_heads} --seqlen-q {problem.seqlen_q} --seqlen-k {problem.seqlen_k}",
        f"--head-dim {problem.head_dim}",
    ]
    if problem.v_head_dim != problem.head_dim:
        parts.append(f"--v-head-dim {problem.v_head_dim}")
    if problem.kv_dtype != problem.q_dtype:
        parts.append(f"--kv-dtype {problem.kv_dtype}")
    derived = {"gqa", "dv_differs", "lse"} if problem.need_backward else {"gqa", "dv_differs"}
    features = sorted(f.value for f in problem.features if f.value not in derived)
    if features:
        parts.append(f"--features {','.join(features)}")
    if problem.need_backward:
        parts.append("--backward")
    if policy is not None and policy.names != ("auto",):
        parts.append(f"--backend {','.join(policy.names)}")
    return " ".join(parts)
