"""Writing the node in the place of an attention that `pattern` has found."""

from __future__ import annotations

import math
from typing import Optional

import onnx_ir as ir

from attnhub.backends.onnx.node import Form
from attnhub.backends.onnx.rewrite.graph import Builder, constant, default_scale, is_op, rank, replace_value, same_size, typed
from attnhub.backends.onnx.rewrite.pattern import Written, input_of


def replace(found: Written, used: set[str]) -> Form:
    """Put the node in the place of the second product."""
    b = Builder(found.product, used)
    q, k, v = found.q, _k(b, found.k_transposed), found.v
    if rank(found.q) == 4:
        k, v = _ungrouped(k, v)
    for op, factor in found.runtime_scales:
        q = b(op, q, b("CastLike", factor, q))
        typed(q, found.q.dtype)
    mask = _mask(b, found)
    if rank(found.q) == 3:
        q, k, v, mask = _four(b, found, q, k, v, mask)
    for value in (q, k, v):
        typed(value, found.q.dtype)
    head_dim = found.q.shape[-1] if found.q.shape is not None else None
    form = Form(
        is_causal=found.is_causal,
        alignment="top_left" if found.is_causal else "bottom_right",
        scale=default_scale(found.scale, head_dim),
        softcap=found.softcap,
        mask="" if mask is None else "bool" if mask.dtype == ir.DataType.BOOL else "float",
    )
    out = b.attention(form, {"Q": q, "K": k, "V": v, "attn_mask": mask}).outputs[0]
    old = found.product.outputs[0]
    if rank(found.q) == 3:
        out = b("Reshape", out, b("Concat", [-1], b("Shape", out, start=2), axis=0))
    replace_value(old, out)
    return form


def _k(b: Builder, transposed: ir.Value) -> ir.Value:
    """K from what the scores were made with, [..., D, T]."""
    swap = [*range((rank(transposed) or 4) - 2), -1, -2]
    swap = [axis % (rank(transposed) or 4) for axis in swap]
    node = transposed.producer()
    if node is not None and is_op(transposed, "Transpose") and "perm" in node.attributes:
        perm = list(node.attributes["perm"].as_ints())
        together = [perm[axis] for axis in swap]
        inner = input_of(node, 0)
        made = inner if together == sorted(together) else b("Transpose", inner, perm=together)
        typed(made, transposed.dtype)
        return made
    before = _through_three_dimensions(transposed)
    if before is not None:
        return before
    made = b("Transpose", transposed, perm=swap)
    typed(made, transposed.dtype)
    if transposed.shape is not None:
        made.shape = ir.Shape([transposed.shape[axis] for axis in swap])
    return made


def _perm(value: ir.Value) -> list[int]:
    """The order of axes of the Transpose that makes a value, [] for the reversed one that is the default."""
    attribute = value.producer().attributes.get("perm")  # type: ignore[union-attr]
    return [] if attribute is None else list(attribute.as_ints())


def _through_three_dimensions(value: ir.Value) -> Optional[ir.Value]:
    """torch's way of swapping two axes: Reshape to 3-D, Transpose, Reshape. The value before it, if the sizes prove that."""
    if not is_op(value, "Reshape"):
        return None
    transpose = value.producer().inputs[0]  # type: ignore[union-attr]
    if transpose is None or not is_op(transpose, "Transpose") or _perm(transpose) != [0, 2, 1]:
        return None
    flat = transpose.producer().inputs[0]  # type: ignore[union-attr]
    if not is_op(flat, "Reshape"):
        return None
    inner = flat.producer().inputs[0]  # type: ignore[union-attr]
    if inner is None or inner.shape is None or value.shape is None or len(inner.shape) != 4 or len(value.shape) != 4:
        return None
    if flat.shape is None or not all(same_size(a, b) for a, b in zip(flat.shape[-2:], inner.shape[-2:])):  # type: ignore[union-attr]
        return None
    swapped = [value.shape[0], value.shape[1], value.shape[3], value.shape[2]]
    return inner if all(same_size(a, b) for a, b in zip(inner.shape, swapped)) else None


def _ungrouped(k: ir.Value, v: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys and values before their heads were repeated for the queries' heads, where both were."""
    before = _before_repeat(k), _before_repeat(v)
    return (before[0], before[1]) if before[0] is not None and before[1] is not None else (k, v)


def _before_repeat(value: ir.Value) -> Optional[ir.Value]:
    """x of Reshape(Expand(Unsqueeze(x, 2))), [B, Hk, T, D]: the repeated heads stand side by side."""
    if not is_op(value, "Reshape") or not is_op(value.producer().inputs[0], "Expand"):  # type: ignore[union-attr]
        return None
    single = value.producer().inputs[0].producer().inputs[0]  # type: ignore[union-attr]
    if not is_op(single, "Unsqueeze"):
        return None
    node = single.producer()  # type: ignore[union-attr]
    axes = constant(node.inputs[1])  # type: ignore[union-attr]
    inner = node.inputs[0]  # type: ignore[union-attr]
    if axes is None or axes.reshape(-1).tolist() != [2] or inner is None or inner.shape is None or value.shape is None:
        return None
    if len(inner.shape) != 4 or len(value.shape) != 4:
        return None
    # With all other sizes kept, a row-major Reshape can only have joined the heads with their copies.
    kept = all(same_size(inner.shape[axis], value.shape[axis]) for axis in (0, 2, 3))
    typed(inner, inner.dtype or value.dtype)
    return inner if kept else None


def _mask(b: Builder, found: Written) -> Optional[ir.Value]:
    """The one mask: bool, or float with -inf where a condition does not keep a pair."""
    allowed: Optional[ir.Value] = None
    for condition, keeps in found.kept:
        known = condition if condition.dtype == ir.DataType.BOOL else b("Cast", condition, to=ir.DataType.BOOL.value)
        one = known if keeps else b("Not", known)
        allowed = one if allowed is None else b("And", allowed, one)
    total: Optional[ir.Value] = None
    for value in found.added:
        if total is None:
            total = value
            continue
        kind = total.dtype
        total = b("Add", total, b("CastLike", value, total))
        typed(total, kind)
    if total is None:
        if allowed is not None:
            allowed.dtype = ir.DataType.BOOL
        return allowed
    typed(total, total.dtype or found.softmax.inputs[0].dtype)  # type: ignore[union-attr]
    if allowed is not None:
        kind = total.dtype
        total = b("Where", allowed, total, b("CastLike", -math.inf, total))
        typed(total, kind)
    return total


def _four(
    b: Builder, found: Written, q: ir.Value, k: ir.Value, v: ir.Value, mask: Optional[ir.Value]
) -> tuple[ir.Value, ir.Value, ir.Value, Optional[ir.Value]]:
    """3-D products as 4-D ones: [N, S, D] -> [N, 1, S, D], or [B, H, S, D] where the mask was added in that form."""
    if found.scores_shape is None:
        kind = None if mask is None else mask.dtype
        masks = [*found.added, *(condition for condition, _ in found.kept)]
        if mask is not None and max(rank(value) or 0 for value in masks) == 3:
            mask = b("Unsqueeze", mask, [1])
            typed(mask, kind)
        return b("Unsqueeze", q, [1]), b("Unsqueeze", k, [1]), b("Unsqueeze", v, [1]), mask
    lead = b("Slice", found.scores_shape, [0], [2])
    made = [b("Reshape", t, b("Concat", lead, b("Shape", t, start=1), axis=0)) for t in (q, k, v)]
    return made[0], made[1], made[2], mask
