"""float8_e4m3fn through torch's machinery: compile, export, vmap, autocast, FLOP counts, DTensor placements.

Seen to fail: factors left out of the operator's words, a cast of fp8 by the autocast rule, placements that shard a factor of one K/V
head, and such that leave those of several whole.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import attnhub
from attnhub import distributed

Make = Callable[..., tuple[Tensor, Tensor, Tensor]]


def eight(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Any:
    return attnhub.attention(q, k, v, attnhub.Causal(), q_descale=a, v_descale=b, backend="reference")


@pytest.fixture
def inputs(qkv: Make) -> Callable[..., tuple[Tensor, ...]]:
    def make(batch: int = 2, length: int = 9) -> tuple[Tensor, ...]:
        return (*(t.to(torch.float8_e4m3fn) for t in qkv(batch=batch, kv_heads=2, length=length)), torch.rand(batch, 2), torch.rand(batch, 2))

    return make


def test_one_graph_for_all_lengths(inputs: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eight, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((3, 9), (5, 17), (6, 33)):
        args = inputs(batch, length)
        got = compiled(*args)
        assert got.dtype == torch.bfloat16 and torch.equal(got, eight(*args))
    assert counter.frame_count == 1


def test_inductor(inputs: Any) -> None:
    args = inputs()
    assert torch.equal(torch.compile(eight, fullgraph=True)(*args), eight(*args))


def test_export_save_load(inputs: Any) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Any:
            return eight(q, k, v, a, b)

    batch, length = Dim("batch"), Dim("length")
    shapes = (*({0: batch, 2: length},) * 3, {0: batch}, {0: batch})
    program = torch.export.export(Model(), inputs(3, 7), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module()):
        args = inputs(4, 12)
        assert torch.equal(exported(*args), eight(*args))


def test_vmap(inputs: Any) -> None:
    args = inputs(batch=6)
    folded = [t.unflatten(0, (3, 2)) for t in args]
    assert torch.equal(torch.vmap(eight)(*folded).flatten(0, 1), eight(*args))
    assert torch.equal(torch.vmap(eight, in_dims=(0, 0, 0, None, 0))(*folded[:3], args[3][:2], folded[4])[0], eight(*(t[:2] for t in args)))


@pytest.mark.parametrize("compiled", (False, True))
def test_autocast_leaves_it_alone(inputs: Any, compiled: bool) -> None:
    args = inputs()
    function = torch.compile(eight, backend="aot_eager", fullgraph=True) if compiled else eight
    with torch.autocast("cpu", torch.float16):
        got = function(*args)
    assert got.dtype == torch.bfloat16 and torch.equal(got, eight(*args))


def test_flops_are_those_of_any_dtype(inputs: Any) -> None:
    q, k, v, a, b = inputs()
    with FlopCounterMode(display=False) as counter:
        eight(q, k, v, a, b)
    assert counter.get_total_flops() == 4 * 2 * 4 * 9 * 9 * 16


@pytest.mark.parametrize(("kv_heads", "over", "wanted"), [(2, 0, "S(0)"), (2, 1, "S(1)"), (1, 0, "S(0)"), (1, 1, "R"), (2, None, "R")])
def test_factors_are_sharded_like_what_they_belong_to(kv_heads: int, over: int, wanted: str) -> None:
    pytest.importorskip("torch.distributed.tensor")
    shape = SimpleNamespace(shape=(4, kv_heads), ndim=2)
    found = distributed._data_placements(over, [shape, shape], "causal k_descale v_descale")
    assert ["R" if p.is_replicate() else f"S({p.dim})" for p in found] == [wanted, wanted]
