"""torch's own modules: nn.MultiheadAttention, and with it nn.TransformerEncoderLayer, nn.TransformerDecoderLayer and what holds them.

See docs/mha.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional

from attnhub.patching import ModuleReport


class MhaIntegration:
    """Swaps the class of every nn.MultiheadAttention for a subclass whose forward calls attnhub."""

    name = "mha"

    def matches(self, model: Any) -> bool:
        """Whether the model is, or holds, an nn.MultiheadAttention."""
        from torch import nn

        return isinstance(model, nn.Module) and any(isinstance(module, nn.MultiheadAttention) for module in model.modules())

    def patch(self, model: Any, *, only: Optional[Callable[[str, Any], bool]] = None, **options: Any) -> list[ModuleReport]:
        """Route what can be routed; modules that were patched before keep their report and their counts."""
        from torch import nn

        from attnhub.integrations.calls import reports
        from attnhub.integrations.mha.attention import MultiheadAttentionMixin
        from attnhub.integrations.mha.layers import EncoderLayerMixin
        from attnhub.integrations.swap import swap

        result = []
        for name, module in model.named_modules():
            if not isinstance(module, nn.MultiheadAttention):
                continue
            report = reports.get(module)
            if report is None:
                reason = _obstacle(module)
                if not reason and only is not None and not only(name, module) and not isinstance(module, MultiheadAttentionMixin):
                    reason = "left out by only="
                report = ModuleReport(name, type(module).__name__, self.name, not reason, reason)
                if not reason:
                    swap(module, MultiheadAttentionMixin)
                    reports[module] = report
            result.append(report)
        for module in model.modules():
            # An adapter (PEFT's) may lie around the attention: torch's fused layer would call neither.
            if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, MultiheadAttentionMixin) for m in module.self_attn.modules()):
                swap(module, EncoderLayerMixin)
        return result

    def unpatch(self, model: Any) -> int:
        """Give every module its class back; how many attention modules had another."""
        from torch import nn

        from attnhub.integrations.calls import reports
        from attnhub.integrations.swap import unswap

        restored = 0
        for module in model.modules():
            if unswap(module) and isinstance(module, nn.MultiheadAttention):
                restored += 1
                reports.pop(module, None)
        return restored


def _obstacle(module: Any) -> str:
    import torch
    from torch import nn

    from attnhub.integrations.mha.attention import MultiheadAttentionMixin

    cls = type(module)
    if isinstance(module, MultiheadAttentionMixin):
        return ""
    if "forward" in module.__dict__:
        return "a forward was set on the module itself, which goes before that of any class"
    if cls.forward is not nn.MultiheadAttention.forward:
        owner = next(base for base in cls.__mro__ if "forward" in vars(base))
        return f"{owner.__name__} computes attention in a forward of its own"
    for name, weight in _weights(module):
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            kind = str(weight.dtype) if isinstance(weight, torch.Tensor) else "no tensor"
            return f"{name} is {kind}: quantised weights are read by the module that holds them, and attention asks none for its product"
    return ""


def _weights(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the weights that its products take."""
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if (weight := getattr(module, name, None)) is not None:
            yield name, weight
    yield "out_proj.weight", getattr(module.out_proj, "weight", None)


integration = MhaIntegration()
