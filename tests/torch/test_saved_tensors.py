"""What autograd saves: torch.autograd.graph.saved_tensors_hooks that bring it back otherwise, and inputs that are changed in between.

Seen to fail: `ops._saved` that gives the tensors as they come (kernels read gaps, wrong signs and fp16 as fp32, beyond their end).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import attnhub

Make = Callable[..., tuple[Tensor, Tensor, Tensor]]
BACKENDS = ("cpu", "reference")


def with_gaps(t: Tensor) -> Tensor:
    return torch.stack((t, torch.full_like(t, 77)), -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.ndim > 1 else t


def negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t) if t.is_floating_point() else t


def call(q: Tensor, k: Tensor, v: Tensor, backend: str, operator: bool) -> Tensor:
    """Every kind of tensor that is saved. operator: through the dispatcher, as under autocast and in graphs."""
    allowed = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    mask = attnhub.BoolMask(allowed) & attnhub.SeqLens(torch.tensor([5, 9], dtype=torch.int32)) & attnhub.Bias(torch.linspace(-1, 1, 9).expand(1, 4, 9, 9))
    with torch.autocast("cpu", torch.bfloat16, enabled=operator):
        out, lse = attnhub.attention(q, k, v, mask, sinks=torch.linspace(-1, 1, 4), return_lse=True, backend=backend)
    return torch.cat((out.flatten(), lse.flatten()))


@pytest.mark.parametrize("operator", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unpack", (with_gaps, transposed, negated, torch.clone))
def test_hooks_bring_other_memory_back(qkv: Make, same: Any, gradients: Any, unpack: Callable[[Tensor], Tensor], backend: str, operator: bool) -> None:
    inputs = qkv(grad=True)
    wanted = gradients(call(*inputs, backend, operator), inputs)
    with saved_tensors_hooks(lambda t: t, unpack):
        out = call(*inputs, backend, operator)
    same(gradients(out, inputs), wanted)
    with save_on_cpu():
        out = call(*inputs, backend, operator)
    same(gradients(out, inputs), wanted)


@pytest.mark.parametrize("operator", (False, True))
@pytest.mark.parametrize("unpack", (torch.Tensor.double, lambda t: t[:1]))
def test_hooks_that_bring_something_else_back_are_an_error(qkv: Make, unpack: Callable[[Tensor], Tensor], operator: bool) -> None:
    """And not memory read beyond its end."""
    inputs = qkv(grad=True)
    with saved_tensors_hooks(lambda t: t, lambda t: unpack(t) if t.shape == (2, 4, 9, 16) and t.data_ptr() != inputs[0].data_ptr() else t):
        out = call(*inputs, "cpu", operator)
    with pytest.raises(RuntimeError, match="saved_tensors_hooks"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ("auto", *BACKENDS))
@pytest.mark.parametrize("which", ("q", "k", "v", "seqused_k"))
def test_an_input_that_was_changed_is_an_error(qkv: Make, which: str, backend: str) -> None:
    q, k, v = (t * 1 for t in qkv(grad=True))
    used = torch.tensor([5, 9], dtype=torch.int32)
    out = attnhub.attention(q, k, v, attnhub.SeqLens(used), backend=backend)
    with torch.no_grad():
        {"q": q, "k": k, "v": v, "seqused_k": used}[which].sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
