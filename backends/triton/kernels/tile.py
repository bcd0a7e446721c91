"""Parts that all kernels share: loading a tile, scores in base 2, and a product that keeps non-finite values apart."""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
INF: tl.constexpr = tl.constexpr(float("inf"))
#: Keys (queries in dK/dV) per step of the careful repetition: few, so that its registers do not add to the fast path's.
CAREFUL: tl.constexpr = tl.constexpr(16)


@triton.jit
def load_tile(pointers, row_ok, column_ok, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A 2-D tile, 0 outside of the rows and columns that exist."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(pointers, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=row_ok[:, None], other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(pointers, mask=column_ok[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_factor(factors, b, h, stride_b, stride_h):
    """What fp8 numbers of sequence b and K/V head h are multiplied by."""
    return tl.load(factors + tl.cast(b, tl.int64) * stride_b + h * stride_h)


@triton.jit
def negated_fp8(x, negate):
    """-x if negate, a scalar, else x: by the sign bit, since fp8 has no arithmetic."""
    bits = x.to(tl.uint8, bitcast=True)
    return tl.where(negate, bits ^ 0x80, bits).to(x.dtype, bitcast=True)


@triton.jit
def store_tile(pointers, tile, row_ok, column_ok):
    """A 2-D tile of fp32 in the memory's dtype, where rows and columns exist."""
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def tanh(x):
    """tanh in fp32 with a relative error of a few 1e-7: the quotient of exponentials alone loses small arguments."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    x2 = x * x
    near = x * (1.0 + x2 * (-0.3333333333 + x2 * (0.1333333333 + x2 * (-0.0539682540 + x2 * (0.0218694885 + x2 * -0.0088632355)))))
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def add_bias(
    s, b, h, i, j, p, len_q, len_k,
    bias, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, alibi, alibi_stride_b, NATURAL: tl.constexpr,
):  # fmt: skip
    """Scores plus bias and ALiBi, in base 2 or, with NATURAL, base e. A bias of -inf gives -inf whatever the score was.

    Bias wants base e: the smallest finite number, which models use as a mask, would become -inf in base 2.
    """
    if bias is not None:
        base = bias + tl.cast(b, tl.int64) * bias_stride_b + tl.cast(h, tl.int64) * bias_stride_h
        value = tl.load(base + i.to(tl.int64) * bias_stride_q + j.to(tl.int64) * bias_stride_k, mask=(i < len_q) & (j < len_k), other=0.0)
        value = value.to(tl.float32)
        s = tl.where(value == -INF, -INF, s + value)
    if alibi is not None:
        slope = tl.load(alibi + b * alibi_stride_b + h) * (1.0 if NATURAL else LOG2_E)
        s = s - slope * tl.abs(p - j).to(tl.float32)
    return s


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """e^x for differences of scores in base e, 2^x for those in base 2."""
    if NATURAL:
        x = x * LOG2_E
    return tl.exp2(x)


@triton.jit
def any_nonfinite(x):
    """Whether a 2-D tile holds NaN or an infinity: a scalar."""
    return tl.max(tl.max(tl.where(tl.abs(x) < INF, 0, 1), 1), 0) > 0


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in fp32. UPCAST: Triton's interpreter keeps bf16 as integers and would multiply those."""
    if UPCAST:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float8e4nv:
        # Hopper's sums of fp8 products keep some 14 bits: each instruction's is added up in fp32.
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_kept(p, keep, x, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + p @ x over the kept pairs only: a NaN or infinity in x reaches a row only through a pair that keep allows.

    p is 0 where keep is False, but 0 * NaN is NaN; so the product sees finite values, and which rows meet which
    non-finite value is a second product, of zeros and ones.
    """
    wide = x.to(tl.float32)
    finite = tl.abs(wide) < INF
    acc = dot(p, tl.where(finite, wide, 0.0).to(x.dtype), acc, PRECISION, UPCAST)
    ones = tl.where(keep, 1.0, 0.0).to(x.dtype)
    # Zeros and ones are exact in tf32.
    MARKS: tl.constexpr = "tf32" if PRECISION == "tf32x3" else PRECISION
    # NaN counts as both infinities: their sum. A loop, so that only one product's registers are alive.
    for sign in tl.range(0, 2):
        special = tl.where(sign == 0, INF, -INF)
        marks = tl.where(finite | (wide == -special), 0.0, 1.0).to(x.dtype)
        acc += tl.where(dot(ones, marks, tl.zeros_like(acc), MARKS, UPCAST) > 0, special, 0.0)
    return acc


@triton.jit
def head_pointer(x, b, h, first, stride_b, stride_h, stride_s):
    """Where row ``first`` of head h of sequence b begins. Products in 64 bits: a tensor may pass 2^31 elements."""
    return x + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h + tl.cast(first, tl.int64) * stride_s
