"""Dropout's mask inside a tile: the definition of `attnhub.philox`, four neighbouring keys from one counter."""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, SIM108
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_by_dropout(rng, below, b, h, i, first_key, Q_HEADS: tl.constexpr, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """True where dropout keeps the pair: [rows, KEYS], or [KEYS, rows] with KEYS_FIRST, for keys first_key (a multiple of 4) onwards.

    i and h are 2-D ([rows, 1], or [1, rows] with KEYS_FIRST), or h a scalar; b and i are local to the sequence. rng: pointer to
    (seed, offset), int64. below: the bits of the unsigned threshold floor(p * 2^32) as int32.
    """
    quads = first_key // 4 + tl.arange(0, KEYS // 4)
    quads = quads[:, None] if KEYS_FIRST else quads[None, :]
    # Triton's own generator is the same Philox4x32-10.
    w0, w1, w2, w3 = tl.philox(tl.load(rng), quads, i, b * Q_HEADS + h, tl.load(rng + 1).to(tl.uint32))
    least = below.to(tl.uint32, bitcast=True)
    # [..., a, b] holds word 2 * a + b, the lowest part of a key's index.
    kept = tl.join(tl.join(w0 >= least, w2 >= least), tl.join(w1 >= least, w3 >= least))
    if KEYS_FIRST:
        kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), (KEYS, i.shape[1]))
    else:
        kept = tl.reshape(kept, (i.shape[0], KEYS))
    return kept
