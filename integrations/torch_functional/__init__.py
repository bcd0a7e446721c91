"""torch.nn.functional.scaled_dot_product_attention served by attnhub, in a block, in a function or everywhere; undone exactly.

See docs/torch-functional.md.
"""

from __future__ import annotations

from attnhub.integrations.torch_functional.replacement import install_as_sdpa, replace_sdpa, uninstall_as_sdpa
from attnhub.integrations.torch_functional.report import NotServedError, SdpaReport

__all__ = ["NotServedError", "SdpaReport", "install_as_sdpa", "replace_sdpa", "uninstall_as_sdpa"]
