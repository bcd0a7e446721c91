"""Standing in for others: `import flash_attn` and F.scaled_dot_product_attention served by attnhub. Opt-in, and undone exactly.

A facade, as `attnhub.patching` is: the integrations are found by name when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnhub.registry import load

if TYPE_CHECKING:
    from attnhub.integrations.flash_attn.install import Installation
    from attnhub.integrations.torch_functional import SdpaReport
    from attnhub.integrations.torch_functional import replace_sdpa as _Replacement


def install_as_flash_attn(*, force: bool = False, **options: Any) -> Installation:
    """Make ``import flash_attn`` give attnhub's functions, for code that is not ours. docs/flash-attn.md.

    force: though the real flash-attn is imported or installed (else RuntimeError). version: what callers are told it is.
    Returns a handle; ``with attnhub.install_as_flash_attn():`` uninstalls at the end.
    """
    found: Installation = load("attnhub.integrations.flash_attn:install_as_flash_attn")(force=force, **options)
    return found


def uninstall_as_flash_attn() -> bool:
    """Undo `install_as_flash_attn`; whether it was installed."""
    done: bool = load("attnhub.integrations.flash_attn:uninstall_as_flash_attn")()
    return done


def replace_sdpa(*, strict: bool = False) -> _Replacement:
    """F.scaled_dot_product_attention by attnhub inside a block or a decorated function: docs/torch-functional.md.

    ``with attnhub.replace_sdpa() as report:`` or ``@attnhub.replace_sdpa()``. strict: an error instead of torch's own function
    for calls that attnhub cannot serve.
    """
    found: _Replacement = load("attnhub.integrations.torch_functional:replace_sdpa")(strict=strict)
    return found


def install_as_sdpa(*, strict: bool = False) -> SdpaReport:
    """F.scaled_dot_product_attention by attnhub in the whole process; returns the report of calls, which is kept up to date."""
    found: SdpaReport = load("attnhub.integrations.torch_functional:install_as_sdpa")(strict=strict)
    return found


def uninstall_as_sdpa() -> bool:
    """Undo `install_as_sdpa`; whether it was installed."""
    done: bool = load("attnhub.integrations.torch_functional:uninstall_as_sdpa")()
    return done
