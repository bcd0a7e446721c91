"""deterministic=True: repeatable results for one call, whatever torch's switch says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

import attnhub
from attnhub import DeviceInfo, Feature, runtime
from attnhub.backends.sdpa import launcher
from attnhub.backends.sdpa.backward import torch_deterministic
from attnhub.registry import registry

Q = torch.randn(1, 2, 5, 8)


def _asked() -> bool:
    decision = attnhub.last_decision()
    assert decision is not None
    return Feature.DETERMINISTIC in decision.problem.features


def test_of_one_call_alone() -> None:
    for mask in (None, attnhub.Causal()):
        attnhub.attention(Q, Q, Q, mask, deterministic=True)
        assert _asked()
        attnhub.attention(Q, Q, Q, mask)
        assert not _asked()
    assert Feature.DETERMINISTIC in attnhub.explain(Q, Q, Q, deterministic=True).problem.features
    assert Feature.DETERMINISTIC not in attnhub.explain(Q, Q, Q).problem.features


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_of_its_backward(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    true_backward = runtime.backward
    monkeypatch.setattr(runtime, "backward", lambda call, *args: asked.append(call.deterministic) or true_backward(call, *args))

    def loss(q: torch.Tensor, deterministic: bool) -> torch.Tensor:
        # With return_lse, no backend leaves the backward to torch's own autograd.
        out, lse = attnhub.attention(q, q, q, deterministic=deterministic, return_lse=True)
        return out.sum() + lse.sum()

    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    for deterministic in (True, False):
        q = Q.clone().requires_grad_()
        run(q, deterministic).backward()
    assert asked == [True, False]


def test_a_backend_that_promises_nothing_is_refused(register: Callable[[attnhub.Backend], attnhub.Backend]) -> None:
    class Careless(attnhub.Backend):
        name = "careless"
        automatic = False
        capability = dataclasses.replace(registry.get("sdpa").capability, features=registry.get("sdpa").capability.features - {Feature.DETERMINISTIC})

    register(Careless())
    with pytest.raises(attnhub.NoBackendError, match="no_deterministic"):
        attnhub.attention(Q, Q, Q, deterministic=True, backend="careless")


def test_sdpa_on_a_gpu_does_not_leave_the_backward_to_torchs_autograd() -> None:
    """torch's autograd asks torch's own switch, which this call does not set."""
    problem = attnhub.Problem(
        DeviceInfo("cuda", "nvidia", (9, 0)), "bfloat16", "bfloat16", 64, 64, 4, 4, 1, 16, 16, frozenset({Feature.LSE}), need_backward=True
    )
    assert launcher.plan(problem).differentiable
    repeatable = launcher.plan(dataclasses.replace(problem, features=problem.features | {Feature.DETERMINISTIC}))
    assert not repeatable.differentiable and isinstance(repeatable, launcher.LsePlan) and repeatable._repeatable


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_torchs_switch_is_put_back(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with pytest.raises(KeyError), torch_deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            raise KeyError
        assert (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) == before
    finally:
        torch.use_deterministic_algorithms(False)
