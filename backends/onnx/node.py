"""The node ``attnhub::FlashAttention``, version 1, as data: names, types, attributes. docs/onnx.md specifies it.

Importable without torch, onnx and onnxruntime.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

DOMAIN = "attnhub"
VERSION = 1
OP = "FlashAttention"
#: ``attnhub``, ``attnhub.2``, ... ``attnhub.32``: names of one operator, for bodies of several forms in one file (bodies.py).
MAX_DOMAINS = 32

#: In the order of ai.onnx Attention-24, then ours.
INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen", "sinks", "leftpad", "alibi_slopes")
REQUIRED_INPUTS = 3
OUTPUTS = ("Y", "present_key", "present_value", "lse")

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
#: Type variable -> types. Q, K, V, past and present share T; the mask has its own.
TYPES = {"T": FLOATS, "M": ("tensor(bool)", *FLOATS), "I": ("tensor(int64)",), "F": ("tensor(float)",)}
INPUT_TYPES = {"attn_mask": "M", "nonpad_kv_seqlen": "I", "sinks": "F", "leftpad": "I", "alibi_slopes": "F"}
OUTPUT_TYPES = {"lse": "F"}

#: attribute -> default. ``scale`` has none in the file: a missing one means 1 / sqrt(head_dim).
DEFAULTS: dict[str, Any] = {
    "is_causal": 0,
    "alignment": "bottom_right",
    "scale": None,
    "softcap": 0.0,
    "window_left": -1,
    "window_right": -1,
    "chunk": 0,
}


def domain_of(number: int) -> str:
    """The domain of the number-th form of a file, from 0."""
    return DOMAIN if number == 0 else f"{DOMAIN}.{number + 1}"


_DOMAINS = frozenset(domain_of(number) for number in range(MAX_DOMAINS))


def is_ours(domain: str, op_type: str) -> bool:
    """Whether this is the node, under any of its domains."""
    return op_type == OP and domain in _DOMAINS


@dataclass(frozen=True)
class Form:
    """Everything about a node that is not data: its attributes, which inputs and outputs it has, and what its mask is.

    Two nodes of one form share one function body, and `overload` is its name.
    mask: "" (none), "bool" or "float". present: past and new keys and values are outputs.
    """

    is_causal: bool = False
    alignment: str = "bottom_right"
    scale: Optional[float] = None
    softcap: float = 0.0
    window_left: int = -1
    window_right: int = -1
    chunk: int = 0
    mask: str = ""
    past: bool = False
    nonpad_kv_seqlen: bool = False
    sinks: bool = False
    leftpad: bool = False
    alibi: bool = False
    present: bool = False
    lse: bool = False

    def __post_init__(self) -> None:
        # As the file holds them: float32. A form made from a model and one read back from its file are then equal.
        object.__setattr__(self, "softcap", _float32(self.softcap))
        if self.scale is not None:
            object.__setattr__(self, "scale", _float32(self.scale))
        if self.alignment not in ("bottom_right", "top_left"):
            raise ValueError(f"alignment={self.alignment!r}: allowed are 'bottom_right' and 'top_left'")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale}: it must be finite")
        if not 0.0 <= self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap}: it must be at least 0 (off)")
        if self.window_left < -1 or self.window_right < -1:
            raise ValueError(f"window ({self.window_left}, {self.window_right}): each must be -1 (unlimited) or at least 0")
        if self.chunk < 0:
            raise ValueError(f"chunk={self.chunk}: it must be at least 1, or 0 (off)")
        if self.mask not in ("", "bool", "float"):
            raise ValueError(f"mask={self.mask!r}: allowed are '', 'bool' and 'float'")
        if self.past and self.nonpad_kv_seqlen:
            raise ValueError("nonpad_kv_seqlen and past_key cannot be given together")

    @classmethod
    def of_node(cls, attributes: Mapping[str, Any], inputs: frozenset[str], outputs: frozenset[str], mask_is_bool: bool) -> Form:
        """The form of a node with these attributes and these inputs and outputs present (names as in `INPUTS`, `OUTPUTS`)."""
        known = {name: attributes.get(name, default) for name, default in DEFAULTS.items()}
        known["is_causal"] = bool(known["is_causal"])
        return cls(
            **known,
            mask="" if "attn_mask" not in inputs else "bool" if mask_is_bool else "float",
            past="past_key" in inputs,
            nonpad_kv_seqlen="nonpad_kv_seqlen" in inputs,
            sinks="sinks" in inputs,
            leftpad="leftpad" in inputs,
            alibi="alibi_slopes" in inputs,
            present=bool(outputs & {"present_key", "present_value"}),
            lse="lse" in outputs,
        )

    def attributes(self) -> dict[str, Any]:
        """The node's attributes: those that differ from their default."""
        found = {name: getattr(self, name) for name, default in DEFAULTS.items() if getattr(self, name) != default}
        if "is_causal" in found:
            found["is_causal"] = 1
        return found

    def inputs(self) -> tuple[str, ...]:
        """The node's inputs in order, "" for an absent one, without absent ones at the end."""
        have = {
            "attn_mask": bool(self.mask),
            "past_key": self.past,
            "past_value": self.past,
            "nonpad_kv_seqlen": self.nonpad_kv_seqlen,
            "sinks": self.sinks,
            "leftpad": self.leftpad,
            "alibi_slopes": self.alibi,
        }
        return _trim(tuple(name if have.get(name, True) else "" for name in INPUTS))

    def outputs(self) -> tuple[str, ...]:
        """The node's outputs in order, "" for one that is not asked for, without those at the end."""
        have = {"present_key": self.present, "present_value": self.present, "lse": self.lse}
        return _trim(tuple(name if have.get(name, True) else "" for name in OUTPUTS))

    def overload(self) -> str:
        """A readable name that only this form has, e.g. ``causal.window_127_0.scale_0.125.bool_mask``."""
        words = []
        if self.is_causal:
            words.append("causal")
        if self.alignment == "top_left":
            words.append("top_left")
        if (self.window_left, self.window_right) != (-1, -1):
            words.append(f"window_{self.window_left}_{self.window_right}")
        if self.chunk:
            words.append(f"chunk_{self.chunk}")
        if self.softcap:
            words.append(f"softcap_{self.softcap:.9g}")
        if self.scale is not None:
            words.append(f"scale_{self.scale:.9g}")
        if self.mask:
            words.append(f"{self.mask}_mask")
        words.extend(name for name in ("past", "nonpad_kv_seqlen", "sinks", "leftpad", "alibi", "present", "lse") if getattr(self, name))
        return ".".join(words) or "plain"


def _float32(value: float) -> float:
    """The nearest float32; 9 decimal digits tell any two of them apart."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _trim(names: tuple[str, ...]) -> tuple[str, ...]:
    while names and not names[-1]:
        names = names[:-1]
    return names
