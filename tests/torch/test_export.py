"""torch.export: dynamic batch and length, masks as inputs, saving, and training what was exported.

Seen to fail: the operator's autograd kernel not registered (no gradients after export), the recomputation of lse left out of
its backward (what was exported under no_grad cannot be trained), empty lists that stay None (packages of AOTInductor).
"""

from __future__ import annotations

import io
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import attnhub

WIDTH, HEADS = 32, 4


class Layer(nn.Module):
    """Self-attention with sinks, causal and whatever mask is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, mask: attnhub.Mask | None = None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mask = attnhub.Causal() if mask is None else attnhub.Causal() & mask
        out = attnhub.attention(q, k, v, mask, sinks=self.sinks, softmax_scale=0.2)
        assert isinstance(out, Tensor)
        return self.out(out.transpose(1, 2).reshape(batch, length, WIDTH))


def parameter_gradients(module: nn.Module, *args: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(module(*args).square().sum(), list(module.parameters()))


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("grad", (True, False))
def test_export_run_train_save_load(grad: bool, strict: bool, same: Callable[..., None]) -> None:
    layer = Layer()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(layer, (torch.randn(3, 7, WIDTH),), dynamic_shapes={"x": {0: Dim("batch"), 1: Dim("length")}}, strict=strict)
    assert sum(n.target is torch.ops.attnhub.forward.default for n in program.graph.nodes) == 1
    for exported in (program.module(), saved_and_loaded(program).module(), program.run_decompositions().module()):
        for batch, length in ((2, 5), (4, 9), (2, 33)):
            x = torch.randn(batch, length, WIDTH)
            same(exported(x), layer(x))
            wanted = parameter_gradients(layer, x)
            assert all(g.abs().max() > 0 for g in wanted)
            same(parameter_gradients(exported, x), wanted, 1e-4)


@pytest.mark.parametrize("strict", (False, True))
def test_a_mask_is_an_input(strict: bool, same: Callable[..., None]) -> None:
    layer, batch, length = Layer(), Dim("batch"), Dim("length")
    mask = attnhub.SeqLens(torch.tensor([3, 7, 5]))
    shapes = torch.utils._pytree.tree_map(lambda leaf: None if leaf is None else {0: batch}, mask)
    leaves = torch.utils._pytree.tree_leaves(shapes, is_leaf=lambda leaf: leaf is None or isinstance(leaf, dict))
    program = torch.export.export(layer, (torch.randn(3, 7, WIDTH), mask), dynamic_shapes={"x": {0: batch, 1: length}, "mask": leaves}, strict=strict)
    for exported in (program.module(), saved_and_loaded(program).module()):
        x, mask = torch.randn(2, 11, WIDTH), attnhub.SeqLens(torch.tensor([11, 4]))
        same(exported(x, mask), layer(x, mask))
        assert not torch.allclose(exported(x, mask), layer(x), atol=1e-3)


def test_the_exported_program_obeys_the_policy_of_the_moment() -> None:
    exported = torch.export.export(Layer(), (torch.randn(2, 7, WIDTH),)).module()
    for name in ("reference", "sdpa"):
        with attnhub.use(name):
            exported(torch.randn(2, 7, WIDTH))
        decision = attnhub.last_decision()
        assert decision is not None and decision.chosen == name


class Served(nn.Module):
    """A call with no tensors of a mask, one with no numbers, and one that appends to a cache."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, used: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, ...]:
        plain = attnhub.attention(q, k, v, attnhub.Causal() & attnhub.Window(3))
        padded, lse = attnhub.attention(q, k, v, attnhub.SeqLens(used), return_lse=True)
        cached = attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=attnhub.KVCache(k_cache, v_cache, used))
        assert isinstance(plain, Tensor) and isinstance(cached, Tensor)
        return plain, padded, lse, cached


def served_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    random_ = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, heads, length, 8, generator=random_) for heads in (4, 2, 2))
    return q, k, v, torch.arange(1, batch + 1, dtype=torch.int32), *(torch.zeros(batch, 2, 64, 8) for _ in range(2))


@pytest.mark.long
def test_packages_of_aot_inductor(tmp_path: pathlib.Path, same: Callable[..., None]) -> None:
    batch, length = Dim("batch"), Dim("length", max=32)
    tokens, rows = {0: batch, 2: length}, {0: batch}
    with torch.no_grad():
        program = torch.export.export(Served(), served_inputs(3, 7), dynamic_shapes=(tokens, tokens, tokens, rows, rows, rows))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "served.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for inputs in (served_inputs(2, 5), served_inputs(4, 17)):
        caches = [t.clone() for t in inputs[4:]]
        wanted = Served()(*inputs[:4], *caches)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            own = [t.clone() for t in inputs[4:]]
            with context():
                same(package(*inputs[:4], *own), wanted)
            same(own, caches)
    torch.save((inputs, wanted), tmp_path / "data.pt")
    program = f"""
import torch, attnhub.ops
inputs, wanted = torch.load({str(tmp_path / "data.pt")!r})
torch.testing.assert_close(torch._inductor.aoti_load_package({path!r})(*inputs), wanted, rtol=2e-5, atol=2e-5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
