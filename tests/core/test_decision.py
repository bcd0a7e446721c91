"""Decisions as data: JSON out and back, text, the command that explains."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import attnhub
from attnhub.decision import Policy, explain_command
from attnhub.reasons import DESCRIPTIONS, Accepted, Code, Rejected
from attnhub.registry import registry

Q, K = torch.zeros(2, 4, 20, 16), torch.zeros(2, 2, 100, 16)


def _decisions() -> dict[str, attnhub.Decision]:
    leaf = Q.clone().requires_grad_()
    return {
        "plain": attnhub.explain(Q, K, K),
        "training": attnhub.explain(leaf, K, K[..., :8], attnhub.Causal() & attnhub.Window(3), softcap=2.0, sinks=torch.zeros(4, requires_grad=True)),
        "named": attnhub.explain(Q, K, K, backend="cuda,reference"),
        "nobody": attnhub.explain(Q, K, K, backend="nosuch"),
        "paged": attnhub.explain(Q[:, :, :1], kv_cache=attnhub.KVCache.empty(2, 2, 64, 16, page_size=16)),
        "varlen": attnhub.explain(*(torch.zeros(7, 2, 8) for _ in range(3)), varlen=attnhub.Varlen.from_lengths(torch.tensor([3, 0, 4])), dropout_p=0.1),
    }


@pytest.mark.parametrize("name", sorted(_decisions()))
def test_json_round_trip(name: str) -> None:
    decision = _decisions()[name]
    told = decision.to_json()
    assert json.loads(json.dumps(told)) == told, "nothing but what JSON has"
    assert told["chosen"] == decision.chosen and told["order"] == list(decision.order) and told["why"] == decision.why
    assert set(told["verdicts"]) == set(decision.verdicts)
    for who, verdict in decision.verdicts.items():
        row = told["verdicts"][who]
        assert row["accepted"] == isinstance(verdict, Accepted)
        if isinstance(verdict, Rejected):
            assert [Code(r["code"]) for r in row["reasons"]] == [r.code for r in verdict.reasons] and verdict.reasons
    problem = told["problem"]
    again = attnhub.Problem(**{
        **problem, "features": frozenset(map(attnhub.Feature, problem["features"])),
        "device": attnhub.DeviceInfo(**{**problem["device"], "arch": tuple(problem["device"]["arch"]), "isa": frozenset(problem["device"]["isa"])}),
    })  # fmt: skip
    assert again == decision.problem and hash(again) == hash(decision.problem)
    policy = told["policy"]
    assert Policy(tuple(policy["names"]), policy["source"], frozenset(policy["disabled"])) == decision.policy


def test_json_of_a_served_call_has_its_plan() -> None:
    attnhub.attention(Q, K, K)
    decision = attnhub.last_decision()
    assert decision is not None
    told = json.loads(json.dumps(decision.to_json()))
    assert told["plan"]["backend"] == decision.chosen


@pytest.mark.parametrize("name", sorted(_decisions()))
def test_text_names_every_backend_and_every_code(name: str) -> None:
    decision = _decisions()[name]
    text = str(decision)
    for who, verdict in decision.verdicts.items():
        assert who in text
        if isinstance(verdict, Rejected):
            assert all(reason.code.value in text and reason.detail in text for reason in verdict.reasons)
    assert f"chosen: {decision.chosen or 'none'}" in text and decision.why in text


def test_problem_of_a_call() -> None:
    problem = _decisions()["training"].problem
    assert (problem.q_dtype, problem.kv_dtype, problem.head_dim, problem.v_head_dim, problem.q_heads, problem.kv_heads) == ("float32", "float32", 16, 8, 4, 2)
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k, problem.need_backward) == (2, 32, 128, True)
    assert {f.value for f in problem.features} == {"gqa", "dv_differs", "causal_bottom_right", "window", "softcap", "sinks", "sinks_grad", "lse"}
    problem = _decisions()["varlen"].problem
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (4, 16, 4) and attnhub.Feature.VARLEN in problem.features
    problem = _decisions()["paged"].problem
    assert problem.page_size == 16 and problem.seqlen_k == 64 and {attnhub.Feature.PAGED, attnhub.Feature.SEQLENS} <= problem.features


def test_command() -> None:
    problem = _decisions()["training"].problem
    command = explain_command(problem, Policy(("cuda", "triton"), "argument"))
    for part in ("--dtype float32", "--heads 4 --kv-heads 2", "--v-head-dim 8", "--features", "--backward", "--backend cuda,triton"):
        assert part in command
    assert "gqa" not in command and "--backend" not in explain_command(problem)


def test_every_code_is_described_and_every_feature_has_one() -> None:
    assert set(DESCRIPTIONS) == set(Code)
    for code, (meaning, remedy) in DESCRIPTIONS.items():
        assert meaning.endswith(".") and remedy.endswith("."), code
    for feature in attnhub.Feature:
        assert Code(f"no_{feature.value}") in DESCRIPTIONS


def test_listing_of_backends() -> None:
    from attnhub import api

    listed: dict[str, Any] = api.backends()
    assert set(listed) == set(registry.names())
    assert listed["sdpa"]["available"] and listed["reference"]["available"] and not listed["reference"]["automatic"]
    json.dumps(listed)
