"""Patched models in the hands of PEFT and accelerate, whichever comes first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnhub

ORDERS = ["patched first", "patched last"]
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0), 2)


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max().clamp_min(1.0))


def with_adapters(model: nn.Module, order: str, targets: list[str]) -> tuple[Any, Any]:
    """(the model in PEFT's hands, the patch report; None where order is "")."""
    peft = pytest.importorskip("peft")
    report = attnhub.patch(model, strict=True) if order == "patched first" else None
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False, lora_dropout=0.0))
    return adapted, attnhub.patch(adapted, strict=True) if order == "patched last" else report


@pytest.mark.parametrize("order", ORDERS)
def test_lora_of_a_transformers_model(order: str) -> None:
    """Loss and the adapters' gradients as with eager attention; merged, the model stays patched, and unpatching restores it."""
    found = []
    for how in ("", order):
        model, report = with_adapters(llama(), how, ["q_proj", "v_proj", "o_proj"])
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        found.append((loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])))
    assert gap(found[1][0], found[0][0]) <= 5e-6 and len(found[1][1]) == 12
    assert all(gap(ours, theirs) <= 2e-5 and theirs.abs().max() > 1e-3 for ours, theirs in zip(found[1][1], found[0][1]))
    assert [m.calls for m in report.modules] == [1, 1]
    with torch.no_grad():
        adapted = model.eval()(input_ids=IDS).logits
        merged = model.merge_and_unload()
        assert gap(merged(input_ids=IDS).logits, adapted) <= 5e-6 and report.calls == 6
    assert attnhub.unpatch(merged) == 2 and merged.config._attn_implementation == "eager"


@pytest.mark.parametrize("order", ORDERS)
def test_lora_of_torch_layers(order: str) -> None:
    """PEFT puts a module around nn.MultiheadAttention. In eval mode torch's fused layer would pass it by, adapters and all."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    theirs, _ = with_adapters(encoder(), "", ["self_attn"])
    with torch.enable_grad():
        right = theirs.train()(x)
    ours, report = with_adapters(encoder(), order, ["self_attn"])
    with torch.no_grad():
        assert gap(ours.eval()(x), right) <= 5e-6 and [m.calls for m in report.modules] == [1, 1]
    out = ours.train()(x)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    for mine, wanted in zip(torch.autograd.grad((out**2).sum(), trained[0]), torch.autograd.grad((right**2).sum(), trained[1])):
        assert gap(mine, wanted) <= 2e-5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_a_patched_model(precision: str, order: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    losses: dict[str, list[float]] = {}
    for how in ("", order):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        accelerator, model = accelerate.Accelerator(cpu=True, mixed_precision=precision), llama()
        report = attnhub.patch(model, strict=True) if how == "patched first" else None
        model, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        report = attnhub.patch(model, strict=True) if how == "patched last" else report
        losses[how] = []
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            optimiser.step()
            optimiser.zero_grad()
            losses[how].append(loss.item())
    assert report is not None and report.calls == 6
    assert losses[order] == pytest.approx(losses[""], rel=1e-5 if precision == "no" else 1e-2) and losses[""][2] < losses[""][0]


@pytest.mark.parametrize("order", ORDERS)
def test_accelerate_offloads_a_patched_model(order: str) -> None:
    """Weights come to each module by hooks that accelerate sets as the module's own forward."""
    accelerate = pytest.importorskip("accelerate")
    model = llama().eval()
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
        report = attnhub.patch(model, strict=True) if order == "patched first" else None
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        report = attnhub.patch(model, strict=True) if order == "patched last" else report
        ours = model(input_ids=IDS).logits
    assert report is not None and report.calls == 2 and next(model.parameters()).device.type == "meta"
    assert gap(ours, theirs) <= 5e-6
