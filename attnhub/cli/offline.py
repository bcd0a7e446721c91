"""No command may wait for a network."""

from __future__ import annotations


def forbid_hub() -> None:
    """From here on huggingface_hub raises instead of asking its servers, as if HF_HUB_OFFLINE had been set when it was imported."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
