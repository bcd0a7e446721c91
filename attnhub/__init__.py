"""attnhub: one attention call, every kernel that can serve it, and the reason why, as data.

Names are resolved when they are first used, so that `attnhub.onnx.register` and ``attnhub doctor`` work without torch.
"""

from __future__ import annotations

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING, Any

# A bare checkout on PYTHONPATH: `backends` and `integrations` stand beside this package and not inside it.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "backends")) and _os.path.isdir(_os.path.join(_os.path.dirname(_here), "backends")):
    __path__.append(_os.path.dirname(_here))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attnhub import nn, onnx, testing
    from attnhub.api import attention, backends, explain, scaled_dot_product_attention
    from attnhub.backend import Append, Backend, Call, Descale, Gradients, Needs, Plan, PrepareError
    from attnhub.capability import Capability, DeviceRange
    from attnhub.decision import Decision, NoBackendError, Policy
    from attnhub.kv_cache import KVCache, append_kv
    from attnhub.layouts import Varlen
    from attnhub.mask import ALiBi, Bias, BlockSparse, BoolMask, Causal, Chunk, LeftPad, Mask, Prefix, Segments, SeqLens, Window
    from attnhub.patching import PatchReport, patch, unpatch
    from attnhub.problem import DeviceInfo, Feature, Problem
    from attnhub.reasons import Accepted, Code, Reason, Rejected
    from attnhub.replacing import install_as_flash_attn, install_as_sdpa, replace_sdpa, uninstall_as_flash_attn, uninstall_as_sdpa
    from attnhub.rotary import Rotary, apply_rotary
    from attnhub.runtime import last_decision, use
    from attnhub.states import merge_states
    from attnhub.warming import warmup

_HOME = {
    name: module
    for module, names in {
        "api": ("attention", "backends", "explain", "scaled_dot_product_attention"),
        "backend": ("Append", "Backend", "Call", "Descale", "Gradients", "Needs", "Plan", "PrepareError"),
        "capability": ("Capability", "DeviceRange"),
        "decision": ("Decision", "NoBackendError", "Policy"),
        "kv_cache": ("KVCache", "append_kv"),
        "layouts": ("Varlen",),
        "mask": ("ALiBi", "Bias", "BlockSparse", "BoolMask", "Causal", "Chunk", "LeftPad", "Mask", "Prefix", "Segments", "SeqLens", "Window"),
        "patching": ("PatchReport", "patch", "unpatch"),
        "problem": ("DeviceInfo", "Feature", "Problem"),
        "reasons": ("Accepted", "Code", "Reason", "Rejected"),
        "replacing": ("install_as_flash_attn", "install_as_sdpa", "replace_sdpa", "uninstall_as_flash_attn", "uninstall_as_sdpa"),
        "rotary": ("Rotary", "apply_rotary"),
        "runtime": ("last_decision", "use"),
        "states": ("merge_states",),
        "warming": ("warmup",),
    }.items()
    for name in names
}
_MODULES = ("nn", "onnx", "testing")

__all__ = [
    "ALiBi",
    "Accepted",
    "Append",
    "Backend",
    "Bias",
    "BlockSparse",
    "BoolMask",
    "Call",
    "Capability",
    "Causal",
    "Chunk",
    "Code",
    "Decision",
    "Descale",
    "DeviceInfo",
    "DeviceRange",
    "Feature",
    "Gradients",
    "KVCache",
    "LeftPad",
    "Mask",
    "Needs",
    "NoBackendError",
    "PatchReport",
    "Plan",
    "Policy",
    "Prefix",
    "PrepareError",
    "Problem",
    "Reason",
    "Rejected",
    "Rotary",
    "Segments",
    "SeqLens",
    "Varlen",
    "Window",
    "append_kv",
    "apply_rotary",
    "attention",
    "backends",
    "explain",
    "install_as_flash_attn",
    "install_as_sdpa",
    "last_decision",
    "merge_states",
    "nn",
    "onnx",
    "patch",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "testing",
    "uninstall_as_flash_attn",
    "uninstall_as_sdpa",
    "unpatch",
    "use",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(_importlib.import_module(f"attnhub.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = _importlib.import_module(f"attnhub.{name}")
    else:
        raise AttributeError(f"module 'attnhub' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
