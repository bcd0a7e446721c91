"""transformers models, through the two interfaces that transformers has for it: no patch per architecture.

Importing this module imports nothing of transformers; only a model that comes from it does. See docs/huggingface.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Optional

from attnhub.patching import ModuleReport


class HuggingFaceIntegration:
    """Routes every attention module that asks transformers' AttentionInterface, reads the operations of those that do not, and
    reports the others with the reason."""

    name = "huggingface"

    def matches(self, model: Any) -> bool:
        """Whether the model is, or holds, a transformers model."""
        modeling = sys.modules.get("transformers.modeling_utils")
        if modeling is None or not hasattr(model, "modules"):
            return False
        return any(isinstance(module, modeling.PreTrainedModel) for module in model.modules())

    def patch(self, model: Any, *, only: Optional[Callable[[str, Any], bool]] = None, **options: Any) -> list[ModuleReport]:
        """Route what can be routed. Modules that were patched before keep their report and their counts, and are routed anew where another
        implementation was set since."""
        from attnhub.integrations.calls import reports
        from attnhub.integrations.huggingface.modules import find_attention
        from attnhub.integrations.huggingface.own import take_over
        from attnhub.integrations.huggingface.routing import route, was_switched

        reason = register()
        found = find_attention(model)
        result, routed = [], []
        for entry in found:
            report = reports.get(entry.module)
            if report is None:
                why = reason or ("" if entry.own else entry.reason)
                if not why and only is not None and not only(entry.name, entry.module):
                    why = "left out by only="
                report = ModuleReport(entry.name, type(entry.module).__name__, self.name, not why, why)
                if not why:
                    reports[entry.module] = report
                    if entry.own:
                        take_over(entry.module, entry.reason if entry.asks else "")
                    else:
                        routed.append(entry.module)
            elif report.patched and was_switched(entry.module):
                routed.append(entry.module)
            result.append(report)
        # What computes attention itself reads the masks that its model makes for it.
        chosen = {id(module) for module in routed}
        rest = [e.module for e in found if id(e.module) in chosen or e.own or e.module not in reports]
        route(model, rest, routed)
        return result

    def unpatch(self, model: Any) -> int:
        """Put the configs back, with what was set in them since; how many attention modules were routed."""
        from attnhub.integrations.calls import reports
        from attnhub.integrations.huggingface.own import give_back
        from attnhub.integrations.huggingface.routing import restore

        ours = [module for module in model.modules() if module in reports and reports[module].integration == self.name]
        for module in ours:
            del reports[module]
            give_back(module)
        restore(model)
        return len(ours)


def register() -> str:
    """Make ``attn_implementation="attnhub"`` known to transformers; "" or the reason why this version cannot.

    `attnhub.patch` does it by itself. Call it to load a model with that name from the start:
    ``AutoModel.from_pretrained(..., attn_implementation="attnhub")``.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError:
        import transformers

        return f"transformers {transformers.__version__} has no AttentionMaskInterface; 4.56 or newer is needed"
    from attnhub.integrations.huggingface.attention import attention_forward
    from attnhub.integrations.huggingface.masks import attnhub_mask
    from attnhub.integrations.huggingface.routing import NAME

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attnhub_mask)
    return ""


integration = HuggingFaceIntegration()
