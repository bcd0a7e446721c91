"""The policy in force: argument, else context, else environment, else default."""

from __future__ import annotations

from typing import Optional

from attnhub import config
from attnhub.decision import Policy


def in_force(backend: str = "", context: Optional[tuple[str, ...]] = None, argument: str = "backend") -> Policy:
    """backend: names that were given as `argument`, which an error names. context: those of `attnhub.use`."""
    snap = config.snapshot()
    disabled = config.disabled(snap)
    if backend:
        return Policy(config.parse_names(backend, argument), "argument", disabled)
    if context is not None:
        return Policy(context, "context", disabled)
    if snap[0]:
        return Policy(config.parse_names(snap[0].decode(), "ATTNHUB_BACKEND"), "environment", disabled)
    return Policy(disabled=disabled)
