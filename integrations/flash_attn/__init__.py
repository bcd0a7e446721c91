"""flash-attn 2's public functions, served by attnhub: same names, argument order, defaults, layouts, results and in-place updates.

See docs/flash-attn.md.
"""

from __future__ import annotations

from attnhub.integrations.flash_attn.install import install_as_flash_attn, uninstall_as_flash_attn
from attnhub.integrations.flash_attn.interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from attnhub.integrations.flash_attn.kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_as_flash_attn",
    "uninstall_as_flash_attn",
]
