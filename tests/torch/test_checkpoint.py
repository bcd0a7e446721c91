"""Activation checkpointing: gradients, dropout and the choice are the same in the forward and in its recomputation.

Seen to fail: dropout seeded outside of torch's generators, a cost that rises where lse is kept for the backward alone, a context
that keeps q outside of save_for_backward (ctx.q = q).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attnhub
from attnhub import runtime
from attnhub.problem import Feature, Problem
from attnhub.registry import registry

Make = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
@pytest.mark.parametrize("reentrant", (False, True))
def test_gradients(qkv: Make, same: Any, reentrant: bool, dropout_p: float) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnhub.attention(q * 2, k, v, attnhub.Causal(), dropout_p=dropout_p)

    grads = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=reentrant)):
        inputs = qkv(kv_heads=2, grad=True)
        torch.manual_seed(3)
        out = run(*inputs)
        torch.randn(7)  # what happens to the generator between forward and recomputation must not matter
        out.square().sum().backward()
        grads.append((out.detach(), *(t.grad for t in inputs)))
    same(grads[1], grads[0])


@pytest.mark.parametrize("reentrant", (False, True))
def test_recomputation_is_served_by_the_same_backend(qkv: Make, reentrant: bool) -> None:
    served = []

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out = attnhub.attention(q * 2, k, v, attnhub.Causal())
        decision = attnhub.last_decision()
        served.append(decision.chosen if decision else None)
        return out.sin()  # needs the output, so that non-reentrant checkpointing recomputes it

    with attnhub.use("reference"):
        checkpoint(layer, *qkv(grad=True), use_reentrant=reentrant).sum().backward()
    assert served == ["reference", "reference"]


class Rival(attnhub.Backend):
    """Between torch's kernel and the tiled maths in declared cost, so that it wins where a cost changes."""

    name = "rival"
    capability = attnhub.Capability(
        devices=(attnhub.DeviceRange("cpu", dtypes=frozenset({"float32"})),), features=frozenset(Feature), backward_features=frozenset(Feature)
    )

    def cost(self, problem: Problem) -> float:
        return 2.0


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": attnhub.Causal()},
    "window": {"mask": attnhub.Causal() & attnhub.Window(3)},
    "bool": {"mask": attnhub.BoolMask(torch.ones(9, 9, dtype=torch.bool))},
    "bias": {"mask": attnhub.Bias(torch.zeros(9, 9))},
    "lengths": {"mask": attnhub.SeqLens(torch.tensor([3, 9]))},
    "segments": {"mask": attnhub.Segments(torch.zeros(2, 9, dtype=torch.int32))},
    "alibi": {"mask": attnhub.ALiBi(torch.ones(4))},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.zeros(4)},
    "dropout": {"dropout_p": 0.1},
    "lse": {"return_lse": True},
}


@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize("name", CALLS)
def test_the_choice_does_not_depend_on_grad_mode(qkv: Make, monkeypatch: pytest.MonkeyPatch, name: str, kv_heads: int) -> None:
    """Reentrant checkpointing runs the forward without gradients and the recomputation with them, on one problem."""
    monkeypatch.setenv("ATTNHUB_DISABLE", "cpu")
    registry.register(Rival())
    try:
        inputs = qkv(kv_heads=kv_heads, grad=True)
        with torch.no_grad():
            without = attnhub.explain(*inputs, **CALLS[name])
        assert without.chosen == attnhub.explain(*inputs, **CALLS[name]).chosen
    finally:
        registry.unregister("rival")


@pytest.mark.parametrize("save", (True, False))
def test_selective_checkpointing(qkv: Make, gradients: Any, same: Any, save: bool) -> None:
    """A policy can name the operator: saved, it runs once; recomputed, twice."""
    runs = []

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        chosen = op is torch.ops.attnhub.forward.default and save
        if op is torch.ops.attnhub.forward.default:
            runs.append(op)
        return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.MUST_RECOMPUTE

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnhub.attention(q * 2, k, v, attnhub.Causal()).sin()

    inputs = qkv(grad=True)
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    calls = _count_forwards()
    with calls:
        out = checkpoint(layer, *inputs, use_reentrant=False, context_fn=context)
        got = gradients(out, inputs)
    assert runs and calls.count == (1 if save else 2)
    same(got, gradients(layer(*inputs), inputs))


class _count_forwards:  # noqa: N801 - a context manager
    """Counts runs of plans' forwards, whichever way they are reached."""

    count = 0

    def __enter__(self) -> None:
        self._forward = runtime.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self._forward(*args, **kwargs)

        runtime.forward = counted

    def __exit__(self, *exc: object) -> None:
        runtime.forward = self._forward


def test_selective_checkpointing_compiled(qkv: Make, gradients: Any, same: Any) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnhub.attention(q * 2, k, v, attnhub.Causal()).sin()

    context = functools.partial(create_selective_checkpoint_contexts, [torch.ops.attnhub.forward.default])
    inputs = qkv(grad=True)
    compiled = torch.compile(lambda *args: checkpoint(layer, *args, use_reentrant=False, context_fn=context), backend="aot_eager", fullgraph=True)
    same(gradients(compiled(*inputs), inputs), gradients(layer(*inputs), inputs))


@pytest.mark.parametrize("backend", ("reference", "sdpa"))
@pytest.mark.parametrize("through_the_operator", (False, True))
def test_nothing_but_saved_tensors_keeps_inputs_alive(qkv: Make, backend: str, through_the_operator: bool) -> None:
    alive = []

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        q = q * 2
        alive.append(weakref.ref(q))
        with torch.autocast("cpu", torch.bfloat16, enabled=through_the_operator):  # nothing to cast: it only takes the longer way
            return attnhub.attention(q, k, v, attnhub.Bias(torch.zeros(9, 9)), backend=backend)

    checkpointed = checkpoint(layer, *qkv(grad=True, dtype=torch.bfloat16), use_reentrant=False)
    assert alive[-1]() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        offloaded = layer(*qkv(grad=True, dtype=torch.bfloat16))
    assert alive[-1]() is None
    del checkpointed, offloaded
