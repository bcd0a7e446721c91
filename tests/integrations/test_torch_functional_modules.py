"""Modules that call F.scaled_dot_product_attention: one written here, torch's own, transformers', timm's, diffusers'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnhub
from attnhub.integrations.torch_functional import SdpaReport


class Block(nn.Module):
    """A ViT block as timm writes it: packed projection, F.scaled_dot_product_attention, MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self, depth: int = 3, dim: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.ModuleList(Block(dim, 4) for _ in range(depth))
        self.head = nn.Linear(dim, 5)

    def forward(self, images: Tensor, again: bool = False) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return self.head(x.mean(1))


def _agree(model: nn.Module, run: Callable[[], Tensor], calls: int, bound: float = 2e-5) -> SdpaReport:
    """Outputs and parameter gradients, replaced and not."""
    found = []
    for replaced in (False, True):
        model.zero_grad()
        served = SdpaReport()
        if replaced:
            with attnhub.replace_sdpa(strict=True) as served:
                out = run()
                (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        else:
            out = run()
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert served.calls == calls
    for mine, theirs in zip(found[1], found[0]):
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound)
    return served


@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointed"])
def test_a_vision_transformer(again: bool) -> None:
    model, images = Vit(), torch.randn(2, 3, 24, 24)
    _agree(model, lambda: model(images, again), 6 if again else 3)


def test_torchs_own_modules() -> None:
    model = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    _agree(model, lambda: model(torch.ones(2, 7, 32) * torch.arange(7.0)[:, None] / 7), 1)


def test_a_transformers_model_that_is_not_patched() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, ids, mask = transformers.BertModel(config), torch.randint(0, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    _agree(model, lambda: model(ids, attention_mask=mask).last_hidden_state, 2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224"])
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = 4 * (14 if "patch14" in name else 16)
    model = timm.create_model(name, img_size=size, num_classes=5, depth=2) if "deit" not in name else timm.create_model(name, img_size=size, num_classes=5)
    model.eval()
    images = torch.randn(2, 3, size, size)
    _agree(model, lambda: model(images), len(model.blocks), 1e-4)


@pytest.mark.parametrize("name", ["unet", "transformer", "vae"])
def test_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if name == "unet":
        model = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, norm_num_groups=8,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        run = lambda: model(torch.ones(2, 4, 8, 8), 3, torch.linspace(-1, 1, 2 * 5 * 24).view(2, 5, 24)).sample  # noqa: E731
        calls = 8
    elif name == "transformer":
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2, norm_num_groups=8, num_embeds_ada_norm=10
        )
        x = torch.randn(2, 4, 8, 8)
        run = lambda: model(x, torch.tensor([3, 3]), torch.tensor([1, 2])).sample  # noqa: E731
        calls = 2
    else:
        model = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4)
        x = torch.randn(1, 3, 16, 16)
        run = lambda: model(x).sample  # noqa: E731
        calls = 2
    model.eval()
    _agree(model, run, calls, 1e-4)
