"""The decode kernel's one argument: the layout of ``Params`` in kernels/decode/params.cuh, field by field."""

from __future__ import annotations

import struct

from attnhub.backends.cuda import fields

#: (name, format) in order. Q: pointer, q: 64-bit integer, i and I: 32-bit integer, f: fp32.
FIELDS: tuple[tuple[str, str], ...] = (
    *((name, "Q") for name in (
        "q", "k", "v", "out", "lse", "cu_seqlens_q", "seqused_k", "leftpad", "prefix", "block_table", "sinks", "alibi", "partial", "tickets",
        "new_k", "new_v", "cos", "sin",
    )),
    *((f"{tensor}_strides.{axis}", "q") for tensor in ("q", "k", "v", "out", "new_k", "new_v") for axis in ("batch", "head", "token")),
    ("angle_stride", "q"),
    *((name, "i") for name in (
        "sequences", "q_heads", "heads_per_kv_head", "seqlen_q", "seqlen_k", "pages", "tile_rows", "causal", "top_left",
        "window_left", "window_right", "chunk", "alibi_batch_stride", "negate_q", "out_aligned",
        "new_tokens", "cache_rows", "rotary_half", "rotary_positions", "interleaved", "one_position", "narrow_angles",
    )),
    *((f"{name}.{part}", "I") for name in ("kv_heads", "page_size", "row_tiles", "splits") for part in ("number", "multiplier", "shift")),
    *((name, "f") for name in ("scale_log2", "cap_inner", "cap_outer")),
)  # fmt: skip

#: What differs between calls that agree in shapes: the pointers, which come first.
POINTERS = struct.Struct("=" + "Q" * sum(code == "Q" for _, code in FIELDS))
_REST = "=" + "".join(code for _, code in FIELDS if code != "Q")
#: No padding: the fields come in falling order of size.
REST = struct.Struct(_REST + "x" * (-(POINTERS.size + struct.calcsize(_REST)) % 8))
SIZE = POINTERS.size + REST.size


def offsets() -> dict[str, int]:
    """Field -> its offset in bytes."""
    return fields.offsets(FIELDS)


def divisor(number: int) -> tuple[int, int, int]:
    """``Divisor`` of params.cuh, for 1 <= number < 2^31."""
    shift = 31 + (number - 1).bit_length()
    return number, -(-(1 << shift) // number), shift
