"""The conformance suite on what the backend declares, and its discovery."""

from __future__ import annotations

import pytest
import torch

import attnhub
from attnhub import testing


@pytest.mark.parametrize("check", testing.checks("toy", device="cpu"), ids=str)
def test_conformance(check: testing.Check) -> None:
    check.run()


def test_it_is_found_by_its_entry_point() -> None:
    found = attnhub.backends()["toy"]
    assert found["available"], found["reasons"]
    assert found["distribution"] == "attnhub-toy"


def test_chosen_by_name_and_explained() -> None:
    q = torch.randn(1, 4, 16, 32)
    decision = attnhub.explain(q, q, q, attnhub.Causal(), backend="toy")
    assert decision.chosen == "toy"
    assert attnhub.attention(q, q, q, attnhub.Causal(), backend="toy").shape == q.shape
    assert attnhub.last_decision().chosen == "toy"


def test_what_is_not_declared_is_rejected_with_a_reason() -> None:
    q = torch.randn(1, 4, 16, 32)
    with pytest.raises(attnhub.NoBackendError, match="no_softcap"):
        attnhub.attention(q, q, q, softcap=20.0, backend="toy")
