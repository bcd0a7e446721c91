"""The models of the suite ``models``: made once, on the device, and lent to every peer with its own attention and the same weights."""

from __future__ import annotations

import copy
import gc
import importlib
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import attnhub
from attnhub.bench.models import ModelCase, config_of
from attnhub.patching import PatchReport

_DRAWS = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"}


@dataclass(frozen=True, eq=False)
class Lent:
    """A model as a peer runs it. report: of attnhub's patch; None without attnhub."""

    model: Any
    report: Optional[PatchReport]


class Zoo:
    """Holds one model at a time: a model of 8B leaves no room for others."""

    def __init__(self, device: torch.device, scale: str) -> None:
        self.device = device
        self.scale = scale
        self._held: Optional[tuple[str, str]] = None
        self._plain: Any = None
        self._lent: dict[str, Lent] = {}

    def lend(self, case: ModelCase, peer: str) -> Lent:
        """The case's model with a peer's attention. ``attnhub`` patches; other names are implementations of transformers."""
        if self._held != (case.model, case.dtype):
            self.clear()
            self._plain = build(case.model, self.device, getattr(torch, case.dtype), self.scale)
            self._held = case.model, case.dtype
        if peer not in self._lent:
            model: Any = sharing_weights(self._plain)
            report = None
            if peer.startswith("attnhub"):
                report = attnhub.patch(model, strict=True)
            else:
                model.set_attn_implementation({"flex": "flex_attention"}.get(peer, peer))
            self._lent[peer] = Lent(model, report)
        return self._lent[peer]

    def clear(self) -> None:
        """Forget the model, and give its memory back."""
        self._plain, self._held = None, None
        self._lent.clear()
        self.tidy()

    def tidy(self) -> None:
        """Drop what a step that failed left behind: gradients, cycles, and memory that nobody uses."""
        if self._plain is not None:
            for parameter in self._plain.parameters():
                parameter.grad = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy with a config of its own and the same parameters and buffers."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def build(model: str, device: torch.device, dtype: torch.dtype, scale: str) -> Any:
    """MiniLM with its own weights, or a random model: drawn once, on the device, in its dtype."""
    transformers: Any = importlib.import_module("transformers")
    if model == "minilm":
        from attnhub.cli.demo import model_folder

        transformers.utils.logging.disable_progress_bar()
        return transformers.AutoModel.from_pretrained(model_folder(), dtype=dtype, local_files_only=True).eval().to(device)
    kind, values = config_of(model, scale)
    config = getattr(transformers, kind)(**values)
    cls = transformers.LlamaForCausalLM if kind == "LlamaConfig" else transformers.BertModel
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device), _NothingDrawn():
            made = cls(config) if kind == "LlamaConfig" else cls(config, add_pooling_layer=False)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                # Scores of about 1. With the small weights that transformers draws, every key weighs the same: wrong scores would pass.
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return made.eval()


class _NothingDrawn(TorchFunctionMode):
    """While modules are made, parameters stay as they were allocated: torch would draw them, and transformers again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def token_ids(shape: tuple[int, int], vocabulary: int, device: torch.device, seed: int = 0) -> Tensor:
    """Random tokens, the same for every peer."""
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(device)
