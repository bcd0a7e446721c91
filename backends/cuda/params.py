"""The portable kernel's one argument: the layout of ``Params`` in kernels/portable/params.cuh, field by field.

One struct and not 40 arguments, because CuPy converts each argument of a launch by itself, in about 1 us.
"""

from __future__ import annotations

import struct

from attnhub.backends.cuda import fields

#: (name, format) in order. Q: pointer, q: 64-bit integer, i: 32-bit integer, f: fp32.
FIELDS: tuple[tuple[str, str], ...] = (
    *((name, "Q") for name in (
        "q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad", "prefix", "sinks", "alibi",
    )),
    *((f"{tensor}_strides.{axis}", "q") for tensor in ("q", "k", "v", "out") for axis in ("batch", "head", "token")),
    *((name, "i") for name in (
        "batch", "q_heads", "heads_per_kv_head", "seqlen_q", "seqlen_k", "q_tiles", "heads_per_section", "longest_first",
        "causal", "top_left", "window_left", "window_right", "chunk", "alibi_batch_stride", "negate_q", "out_aligned",
    )),
    *((name, "f") for name in ("scale_log2", "cap_inner", "cap_outer")),
    ("reserved", "i"),
)  # fmt: skip

#: No padding: the fields come in falling order of size.
LAYOUT = struct.Struct("=" + "".join(code for _, code in FIELDS))


def offsets() -> dict[str, int]:
    """Field -> its offset in bytes."""
    return fields.offsets(FIELDS)
