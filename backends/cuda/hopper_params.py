"""The Hopper kernel's one argument: the layout of ``Params`` in kernels/hopper/params.cuh, field by field."""

from __future__ import annotations

import struct

from attnhub.backends.cuda import fields

#: (name, format) in order. 128s: a tensor map, Q: pointer, q: 64-bit integer, i: 32-bit integer, f: fp32.
FIELDS: tuple[tuple[str, str], ...] = (
    *((f"{name}_map", "128s") for name in ("q", "k", "v", "out")),
    *((name, "Q") for name in (
        "q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad", "prefix", "sinks", "alibi", "counters",
    )),
    *((f"{tensor}_strides.{axis}", "q") for tensor in ("q", "k", "v", "out") for axis in ("batch", "head", "token")),
    *((name, "i") for name in (
        "sequences", "q_heads", "heads_per_kv_head", "seqlen_q", "seqlen_k", "head_dim", "v_head_dim", "q_tiles", "tile_total",
        "heads_per_section", "phases", "top_left", "causal", "window_left", "window_right", "chunk", "alibi_batch_stride", "out_by_map",
        "q_steps", "k_steps", "v_steps",
    )),
    *((name, "f") for name in ("scale_log2", "cap_inner", "cap_outer")),
)  # fmt: skip

_ALIGNMENT = 64  # of a tensor map, and so of the struct
_FORMAT = "=" + "".join(code for _, code in FIELDS)
#: No padding but at the end: the fields come in falling order of size.
LAYOUT = struct.Struct(f"{_FORMAT}{-struct.calcsize(_FORMAT) % _ALIGNMENT}x")


def offsets() -> dict[str, int]:
    """Field -> its offset in bytes."""
    return fields.offsets(FIELDS)


_AT = offsets()
#: What differs between calls that agree in shapes: the pointers, from ``q`` to ``counters``.
POINTERS = struct.Struct("=" + "Q" * sum(code == "Q" for _, code in FIELDS))
POINTERS_AT = _AT["q"]
MAPS_AT = tuple(_AT[f"{name}_map"] for name in ("q", "k", "v", "out"))
