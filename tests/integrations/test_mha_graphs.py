"""Patched nn.MultiheadAttention under torch.func, checkpointing, torch.export and torch.compile."""

from __future__ import annotations

import pytest
import torch
from mha_modules import BATCH, EMBED, LEN_Q, MASKS, TOLERANCE, encoder, gap, inputs, module
from torch import Tensor, nn

import attnhub


def test_transforms_checkpoints_and_exports() -> None:
    made = module("plain").eval()
    (query, _, _), _ = inputs(made, "none", "self")
    parameters = dict(made.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(made, values, (x, x, x), {"need_weights": False})[0] ** 2).sum()

    theirs = torch.func.grad(loss)(parameters, query), torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, query[:, None])
    report = attnhub.patch(made)
    assert not made.load_state_dict(made.state_dict(), strict=True).missing_keys
    ours = torch.func.grad(loss)(parameters, query), torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, query[:, None])
    for mine, right in zip(ours, theirs):
        assert all(gap(mine[name], right[name]) <= 4 * TOLERANCE for name in parameters)
    leaf = query.clone().requires_grad_()
    for reentrant in (True, False):
        torch.utils.checkpoint.checkpoint(lambda x: (made(x, x, x, need_weights=False)[0] ** 2).sum(), leaf, use_reentrant=reentrant).backward()
        assert gap(made.in_proj_weight.grad, theirs[0]["in_proj_weight"]) <= 4 * TOLERANCE
        made.zero_grad()
    assert report.calls > 0

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = made

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    program = torch.export.export(Whole(), (query,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))
    longer = torch.randn(BATCH, 2 * LEN_Q, EMBED)
    assert gap(program.module()(longer), Whole()(longer)) <= TOLERANCE


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_compiles_into_one_graph(mask: str, need_weights: bool) -> None:
    made = module("bias_kv_zero_attn" if mask in ("padding", "none") else "plain").eval()
    tensors, arguments = inputs(made, mask, "self" if "causal" in mask else "memory")
    theirs = made(*tensors, need_weights=need_weights, **arguments)
    report = attnhub.patch(made)
    torch._dynamo.reset()
    ours = torch.compile(made, backend="aot_eager", fullgraph=True)(*tensors, need_weights=need_weights, **arguments)
    assert gap(ours[0], theirs[0]) <= TOLERANCE and gap(ours[1], theirs[1]) <= TOLERANCE and report.calls == 0
    want, got = (torch.autograd.grad((out[0] ** 2).sum(), made.out_proj.weight)[0] for out in (theirs, ours))
    assert gap(got, want) <= 4 * TOLERANCE


def test_compiles_into_one_graph() -> None:
    model = encoder()
    x = torch.randn(BATCH, LEN_Q, EMBED)
    padding = torch.zeros(BATCH, LEN_Q, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        theirs = model(x, src_key_padding_mask=padding)
        report = attnhub.patch(model)
        torch._dynamo.reset()
        ours = torch.compile(model, backend="aot_eager", fullgraph=True)(x, src_key_padding_mask=padding)
    assert gap(ours[~padding], theirs[~padding]) <= TOLERANCE
    assert report.calls == 0, "calls are counted outside tracing"
