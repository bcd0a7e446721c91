"""An explicit choice is that backend or an error that explains itself; falling back happens before launch only, and says so."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Backend, Call, Code, NoBackendError, Plan, PrepareError, Problem, Reason
from attnhub.backends.reference import EVERYTHING, FLOATS, ReferencePlan
from attnhub.capability import Capability, DeviceRange
from attnhub.reasons import Rejected
from attnhub.registry import registry

Register = Callable[[Backend], Backend]


class Fails(Backend):
    """Accepts everything, cheaper than any other, and cannot prepare."""

    automatic = True

    def __init__(self, name: str = "fails", own_backward: bool = False, cost: float = 0.001, code: Code = Code.COMPILE_FAILED) -> None:
        self.name, self._cost, self._code, self.prepared = name, cost, code, 0
        self.capability = Capability((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING, backward_features=EVERYTHING if own_backward else None)

    def cost(self, problem: Problem) -> float:
        return self._cost

    def prepare(self, problem: Problem) -> Plan:
        self.prepared += 1
        raise PrepareError(Reason(self._code, "the made-up compiler says no"))


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 6, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)


def _raised(call: Callable[[], object]) -> NoBackendError:
    with pytest.raises(NoBackendError) as caught:
        call()
    return caught.value


# -- strictness ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nosuch", "triton", "cuda", "nosuch,cuda"])
def test_a_name_that_cannot_serve_is_one_error_with_everything(name: str, qkv: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" in name and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("under the interpreter triton serves CPU tensors")
    monkeypatch.setenv("ATTNHUB_BACKEND", name)
    error = _raised(lambda: attnhub.attention(*qkv, attnhub.Causal()))
    text = str(error)
    assert "ATTNHUB_BACKEND" in text
    for installed in registry.names():
        assert installed in text
    decision = error.decision
    assert decision.chosen is None and set(registry.names()) <= set(decision.verdicts)
    for who, verdict in decision.verdicts.items():
        if isinstance(verdict, Rejected):
            for reason in verdict.reasons:
                assert reason.code.value in text, (who, reason)
                assert reason.detail in text, (who, reason)
    if "nosuch" in name:
        assert "unknown_name" in text
    assert "attnhub explain" in text and f"--backend {name}" in text
    assert error.__cause__ is None and error.__context__ is None, "one error, not a chain"


@pytest.mark.parametrize(("name", "grad"), [("nosuch", False), ("cuda", True)])
def test_the_command_in_the_error_works(name: str, grad: bool, qkv: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_BACKEND", name)
    q, k, v = qkv
    q.requires_grad_(grad)
    error = _raised(lambda: attnhub.attention(q, k, v[..., :8], attnhub.Causal() & attnhub.Window(3), softcap=5.0, sinks=torch.zeros(4)))
    command = str(error).strip().splitlines()[-1].partition("To see this again: ")[2]
    words = shlex.split(command)
    assert words[:2] == ["attnhub", "explain"]
    environment = {k: v for k, v in os.environ.items() if k != "ATTNHUB_BACKEND"}
    found = subprocess.run([sys.executable, "-m", "attnhub", *words[1:], "--json"], capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 1, found.stderr
    again = json.loads(found.stdout)
    told = error.decision.to_json()
    assert again["chosen"] is None
    for who, verdict in told["verdicts"].items():
        assert [r["code"] for r in again["verdicts"][who]["reasons"]] == [r["code"] for r in verdict["reasons"]], who
    for field in ("q_dtype", "head_dim", "v_head_dim", "q_heads", "kv_heads", "batch", "seqlen_q", "seqlen_k", "features", "need_backward"):
        assert again["problem"][field] == told["problem"][field], field


def test_a_list_runs_the_first_that_accepts(qkv: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    last = "cpu" if not registry.candidates()["cpu"].probe else "sdpa"
    monkeypatch.setenv("ATTNHUB_BACKEND", f"cuda,{last}")
    attnhub.attention(*qkv)
    decision = attnhub.last_decision()
    assert decision is not None and decision.chosen == last
    assert isinstance(decision.verdicts["cuda"], Rejected) and "first of" in decision.why
    monkeypatch.setenv("ATTNHUB_BACKEND", "cuda,nosuch,auto")
    attnhub.attention(*qkv)
    assert attnhub.last_decision().chosen is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_every_way_to_choose_is_strict(how: str, qkv: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> object:
        if how == "argument":
            return attnhub.attention(*qkv, backend="cuda")
        if how == "context":
            with attnhub.use("cuda"):
                return attnhub.attention(*qkv)
        monkeypatch.setenv("ATTNHUB_BACKEND", "cuda")
        return attnhub.attention(*qkv)

    for _ in range(2):  # an error is not cached into a success
        assert _raised(call).decision.policy.source == how


def test_strict_in_training_compile_and_the_backward(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    q.requires_grad_()
    _raised(lambda: attnhub.attention(q, k, v, backend="cuda"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _raised(lambda: attnhub.attention(q, k, v, backend="cuda"))


def test_strict_for_calls_of_zero_size(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    _raised(lambda: attnhub.attention(q[:0], k[:0], v[:0], backend="nosuch"))


def test_explain_never_raises_for_no_backend(qkv: tuple[Tensor, ...]) -> None:
    decision = attnhub.explain(*qkv, backend="nosuch")
    assert decision.chosen is None and "unknown_name" in str(decision)


# -- fallback before launch -------------------------------------------------------------------------------------------------------


def test_automatic_fallback_says_so_once(qkv: tuple[Tensor, ...], register: Register, caplog: pytest.LogCaptureFixture) -> None:
    failing = register(Fails())
    assert isinstance(failing, Fails)
    expected = attnhub.attention(*qkv, backend="reference")
    with caplog.at_level(logging.WARNING, logger="attnhub"):
        for length in (9, 8, 5, 9):  # three classes of lengths: prepared anew, said once
            out = attnhub.attention(qkv[0], qkv[1][:, :, :length], qkv[2][:, :, :length])
    assert failing.prepared >= 1
    decision = attnhub.last_decision()
    assert decision is not None and decision.chosen not in (None, "fails")
    assert [r.code for r in decision.verdicts["fails"].reasons] == [Code.COMPILE_FAILED]  # type: ignore[union-attr]
    assert "compile_failed" in decision.why
    torch.testing.assert_close(out, expected)
    warnings = [r.getMessage() for r in caplog.records if "falling back" in r.getMessage()]
    assert len(warnings) == 1 and "fails" in warnings[0] and "compile_failed" in warnings[0] and str(decision.chosen) in warnings[0]


def test_a_failure_is_remembered_by_the_cached_decision(qkv: tuple[Tensor, ...], register: Register) -> None:
    failing = register(Fails())
    assert isinstance(failing, Fails)
    for _ in range(5):
        attnhub.attention(*qkv)
    assert failing.prepared == 1


def test_two_in_a_row_fail(qkv: tuple[Tensor, ...], register: Register) -> None:
    register(Fails("fails", cost=0.001))
    register(Fails("fails_too", cost=0.002, code=Code.OUT_OF_RESOURCES))
    attnhub.attention(*qkv)
    decision = attnhub.last_decision()
    assert decision is not None and decision.chosen in registry.names()
    assert [r.code for r in decision.verdicts["fails_too"].reasons] == [Code.OUT_OF_RESOURCES]  # type: ignore[union-attr]


def test_a_strict_name_that_cannot_prepare_is_an_error(qkv: tuple[Tensor, ...], register: Register, caplog: pytest.LogCaptureFixture) -> None:
    register(Fails())
    with caplog.at_level(logging.WARNING, logger="attnhub"):
        error = _raised(lambda: attnhub.attention(*qkv, backend="fails"))
    assert "compile_failed" in str(error) and "the made-up compiler says no" in str(error)
    assert not [r for r in caplog.records if "falling back" in r.getMessage()]
    attnhub.attention(*qkv, backend="fails,reference")
    assert attnhub.last_decision().chosen == "reference"  # type: ignore[union-attr]


@pytest.mark.parametrize("own_backward", [False, True])
def test_the_backward_follows_the_backend_that_really_ran(own_backward: bool, qkv: tuple[Tensor, ...], register: Register) -> None:
    register(Fails(own_backward=own_backward))
    leaves = [t.requires_grad_() for t in qkv]
    out, lse = attnhub.attention(*leaves, attnhub.Causal(), softcap=5.0, return_lse=True)
    decision = attnhub.last_decision()
    assert decision is not None and decision.backward not in (None, "fails")
    found = torch.autograd.grad(out.sum() + lse.clamp_min(-9).sum(), leaves)
    out, lse = attnhub.attention(*leaves, attnhub.Causal(), softcap=5.0, return_lse=True, backend="reference")
    for got, want in zip(found, torch.autograd.grad(out.sum() + lse.clamp_min(-9).sum(), leaves)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


class ForwardOnly(Backend):
    """Serves the forward by the reference; its backward is somebody else's."""

    name = "forward_only"
    capability = Capability((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING)

    def cost(self, problem: Problem) -> float:
        return 0.0005

    def prepare(self, problem: Problem) -> Plan:
        return ReferencePlan()


def test_a_backward_that_cannot_prepare_falls_back_too(qkv: tuple[Tensor, ...], register: Register) -> None:
    """The cheapest backward fails to compile: another one runs, since nothing was launched."""
    register(ForwardOnly())
    register(Fails(own_backward=True))
    q, k, v = qkv
    q.requires_grad_()
    out = attnhub.attention(q, k, v, softcap=5.0)
    assert attnhub.last_decision().chosen == "forward_only"  # type: ignore[union-attr]
    (found,) = torch.autograd.grad(out.sum(), q)
    (want,) = torch.autograd.grad(attnhub.attention(q, k, v, softcap=5.0, backend="reference").sum(), q)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


class Faults(ForwardOnly):
    """Prepares, and fails when it runs."""

    name = "faults"

    def cost(self, problem: Problem) -> float:
        return 0.0001

    def prepare(self, problem: Problem) -> Plan:
        class FaultingPlan(Plan):
            def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
                raise RuntimeError("device fault")

        return FaultingPlan()


def test_a_fault_at_run_time_is_never_papered_over(qkv: tuple[Tensor, ...], register: Register) -> None:
    register(Faults())
    with pytest.raises(RuntimeError, match="device fault"):
        attnhub.attention(*qkv)


# -- registering ---------------------------------------------------------------------------------------------------------------


def test_registering_takes_effect_at_the_next_call(qkv: tuple[Tensor, ...], register: Register) -> None:
    attnhub.attention(*qkv)
    before = attnhub.last_decision().chosen  # type: ignore[union-attr]
    register(ForwardOnly())
    attnhub.attention(*qkv)
    assert attnhub.last_decision().chosen == "forward_only"  # type: ignore[union-attr]
    registry.unregister("forward_only")
    attnhub.attention(*qkv)
    assert attnhub.last_decision().chosen == before  # type: ignore[union-attr]


def test_a_probe_that_raises_is_a_reason(qkv: tuple[Tensor, ...], register: Register) -> None:
    class Broken(ForwardOnly):
        name = "broken"

        def probe(self) -> tuple[Reason, ...]:
            raise OSError("libmissing.so")

    register(Broken())
    verdict = attnhub.explain(*qkv).verdicts["broken"]
    assert isinstance(verdict, Rejected) and verdict.reasons[0].code is Code.BROKEN and "libmissing.so" in verdict.reasons[0].detail


def test_registry_get_names_what_is_installed() -> None:
    with pytest.raises(KeyError, match="reference"):
        registry.get("nosuch")
