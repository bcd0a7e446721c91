"""Attention written out: MatMul, scale, softcap, masks, Softmax, MatMul, as torch's exporters (both) and optimum write it.

The walk begins at a Softmax and goes both ways; nothing is changed until all of it is understood. Whatever is not one of the steps
below ends it with a reason. K is taken as the transpose of what the first product multiplies with, so that no way of making it has to
be known; known ways save the transposition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Optional

import onnx_ir as ir

from attnhub.backends.onnx.rewrite.graph import (
    FLOATS,
    NotRecognised,
    is_op,
    rank,
    same_size,
    scalar,
)

#: A value that is written over, or added to, masked scores: exp of it is 0 beside any other score.
FILL = -1e4
_PASS = ("Identity", "Cast")


@dataclass
class Written:
    """What was found around one Softmax."""

    softmax: ir.Node
    product: ir.Node  # probabilities @ V
    q: ir.Value
    k_transposed: ir.Value
    v: ir.Value
    scale: float = 1.0
    runtime_scales: list[tuple[str, ir.Value]] = field(default_factory=list)  # Mul or Div of the scores by a value that is not known
    softcap: float = 0.0
    is_causal: bool = False
    added: list[ir.Value] = field(default_factory=list)
    kept: list[tuple[ir.Value, bool]] = field(default_factory=list)  # (condition, whether True keeps)
    scores_shape: Optional[ir.Value] = None  # 3-D products whose scores were reshaped to 4 dimensions: the shape asked for
    notes: list[str] = field(default_factory=list)


def find(softmax: ir.Node) -> Written:
    """The attention around a Softmax. Raises `NotRecognised` with the step that is none of an attention."""
    out = softmax.outputs[0]
    dims = rank(out)
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    if axis != -1 and (dims is None or axis != dims - 1):
        raise NotRecognised(f"Softmax over axis {axis} of {dims or 'an unknown number of'} dimensions, not over the last")
    product, reshaped = _down(out)
    scores = softmax.inputs[0]
    assert scores is not None
    other = product.inputs[1]
    assert other is not None
    found = Written(softmax, product, scores, scores, other)
    _up(found, scores, reshaped)
    _scaled_inputs(found)
    _check_types(found)
    return found


def _only_use(value: ir.Value, what: str) -> ir.Node:
    if value.is_graph_output():
        raise NotRecognised(f"{what} are an output of the graph")
    users = [use.node for use in value.uses()]
    if len(users) != 1:
        raise NotRecognised(f"{what} are read by {len(users)} nodes: {', '.join(sorted(user.op_type for user in users)) or 'none'}")
    return users[0]


def _down(value: ir.Value) -> tuple[ir.Node, bool]:
    """(product with V, whether the probabilities they were reshaped on the way)."""
    reshaped = False
    while True:
        users = {use.node.op_type: use.node for use in value.uses()}
        if set(users) == {"IsNaN", "Where"} and len(value.uses()) == 2:
            guard = users["Where"]
            if is_op(guard.inputs[0], "IsNaN") and scalar(guard.inputs[1]) == 0.0 and guard.inputs[2] is value:
                value = guard.outputs[0]
                continue
        user = _only_use(value, "the probabilities")
        if user.op_type in _PASS or (user.op_type == "Dropout" and _is_off(user)):
            value = user.outputs[0]
        elif user.op_type == "Reshape" and not reshaped:
            value, reshaped = user.outputs[0], True
        elif user.op_type == "MatMul" and user.inputs[0] is value:
            return user, reshaped
        else:
            raise NotRecognised(f"the probabilities go to {user.op_type}, not to a MatMul with V")


def _is_off(dropout: ir.Node) -> bool:
    training = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    unused = len(dropout.outputs) < 2 or not dropout.outputs[1].uses()
    return unused and (training is None or scalar(training) == 0.0)


def _up(found: Written, value: ir.Value, reshaped: bool) -> None:
    """From the Softmax's input to the first product."""
    capped: Optional[float] = None  # the factor behind a Tanh that has still to come
    scaled = False  # a factor behind which no mask may stand
    while True:
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            raise NotRecognised(
                f"the scores come from {'an input' if node is None else node.domain + '::' + node.op_type}, not from a MatMul"
            )
        op = node.op_type
        _only_use(value, "the scores")
        if op in _PASS:
            value = input_of(node, 0)
        elif op == "MatMul":
            if capped is not None:
                found.scale *= capped
            found.q, found.k_transposed = input_of(node, 0), input_of(node, 1)
            if reshaped and found.scores_shape is None:
                raise NotRecognised("the probabilities are reshaped and the scores are not")
            return
        elif op == "Reshape" and found.scores_shape is None and reshaped:
            # [B * H, S, T] -> [B, H, S, T] for the mask, and back: the way back may come first.
            inner = input_of(node, 0)
            if rank(inner) == 3 and rank(value) == 4:
                found.scores_shape = input_of(node, 1)
            elif not (rank(inner) == 4 and rank(value) == 3):
                raise NotRecognised("the scores are reshaped to something other than [B, H, S, T]")
            value = inner
        elif op == "Reshape" and rank(value) == 3 and rank(input_of(node, 0)) == 4:
            reshaped, value = True, input_of(node, 0)
        elif op in ("Mul", "Div"):
            value, factor, other = _factor(node)
            if factor is None:
                if capped is not None:
                    raise NotRecognised(f"{op} of the scores by a value that is not known, behind a Tanh")
                found.runtime_scales.append((op, other))
            elif is_op(value, "Tanh"):
                capped = (capped or 1.0) * factor
            else:
                found.scale *= (capped or 1.0) * factor
                capped = None
            scaled = True
        elif op == "Tanh":
            value = _softcap(found, node, 1.0 if capped is None else capped)
            capped, scaled = None, True
        elif scaled and op in ("Add", "Where"):
            raise NotRecognised(f"{op} before the scale: a mask would be scaled with the scores")
        elif op == "Add":
            value = _mask_added(found, node)
        elif op == "Where":
            value = _mask_selected(found, node)
        else:
            raise NotRecognised(f"{op} between the products is no step of an attention")


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise NotRecognised(f"{node.op_type} {node.name} lacks input {index}")
    return value


def _factor(node: ir.Node) -> tuple[ir.Value, Optional[float], ir.Value]:
    """(the tensor, the number it is multiplied by or None where that is not known, the other operand)."""
    first, second = input_of(node, 0), input_of(node, 1)
    number = scalar(second)
    if number is None and node.op_type == "Mul" and scalar(first) is not None:
        first, second, number = second, first, scalar(first)
    if number is None:
        size = second.shape
        if size is None or any(dim != 1 for dim in size):
            raise NotRecognised(f"{node.op_type} of the scores by a tensor, not by a number")
        return first, None, second
    if not math.isfinite(number) or number == 0.0:
        raise NotRecognised(f"{node.op_type} of the scores by {number}")
    return first, (1.0 / number if node.op_type == "Div" else number), second


def _softcap(found: Written, tanh: ir.Node, behind: float) -> ir.Value:
    """c * tanh(s / c); ``behind`` is the factor that follows."""
    inner = input_of(tanh, 0)
    node = inner.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        raise NotRecognised("Tanh of scores that are not divided by a softcap")
    value, factor, _ = _factor(node)
    if factor is None or found.softcap or abs(factor * behind - 1.0) > 1e-4 or behind <= 0:
        raise NotRecognised("Tanh that is no softcap: the numbers before and behind it are not inverse")
    found.softcap = behind
    return value


def _leads_to_product(value: ir.Value, depth: int = 12) -> bool:
    """Whether the scores come this way."""
    node = value.producer()
    if node is None or depth == 0 or node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "MatMul":
        return True
    if node.op_type in (*_PASS, "Reshape", "Div", "Tanh"):
        return _leads_to_product(input_of(node, 0), depth - 1)
    if node.op_type in ("Mul", "Add", "Where"):
        return any(_leads_to_product(v, depth - 1) for v in node.inputs if v is not None)
    return False


def _mask_added(found: Written, node: ir.Node) -> ir.Value:
    first, second = input_of(node, 0), input_of(node, 1)
    ways = [_leads_to_product(first), _leads_to_product(second)]
    if ways[0] == ways[1]:
        raise NotRecognised("Add of two values that both, or neither, come from a product: which one the scores are is not clear")
    value, mask = (first, second) if ways[0] else (second, first)
    if mask.dtype is not None and mask.dtype not in FLOATS:
        raise NotRecognised(f"a mask of type {mask.dtype} is added")
    dims, size = rank(mask), rank(node.outputs[0])
    if dims is None or dims > 4 or (size is not None and dims > size):
        raise NotRecognised(f"the added mask has {dims or 'an unknown number of'} dimensions")
    if not found.added and not found.kept and _is_causal(mask, node.outputs[0]):
        found.is_causal = True
        return value
    condition = _condition(mask)
    if condition is not None:
        found.kept.append(condition)
        found.notes.append("a query without any key gives 0 (-inf in its whole row gave NaN)")
    else:
        found.added.append(mask)
    return value


def _condition(mask: ir.Value) -> Optional[tuple[ir.Value, bool]]:
    """(condition, whether True keeps) of Where(condition, 0, -inf). A finite fill stays a number that is added: exact in every row."""
    if not is_op(mask, "Where"):
        return None
    node = mask.producer()
    assert node is not None
    on, off = scalar(node.inputs[1]), scalar(node.inputs[2])
    if (on, off) == (0.0, -math.inf):
        return input_of(node, 0), True
    if (on, off) == (-math.inf, 0.0):
        return input_of(node, 0), False
    return None


def _is_causal(mask: ir.Value, scores: ir.Value) -> bool:
    """Whether a mask is a lower triangle of exactly the scores' size, however it is filled: torch's is_causal."""
    if not is_op(mask, "Where") or mask.shape is None or scores.shape is None or len(mask.shape) != 2:
        return False
    if not all(same_size(a, b) for a, b in zip(mask.shape, scores.shape[-2:])):
        return False
    node = mask.producer()
    assert node is not None
    on, off = scalar(node.inputs[1]), scalar(node.inputs[2])
    condition = node.inputs[0]
    if is_op(condition, "Equal"):  # Equal(triangle of ones, 0): True is above the diagonal
        equal = condition.producer()  # type: ignore[union-attr]
        if scalar(equal.inputs[1]) != 0.0:  # type: ignore[union-attr]
            return False
        condition, on, off = equal.inputs[0], off, on  # type: ignore[union-attr]
    while is_op(condition, *_PASS):
        condition = condition.producer().inputs[0]  # type: ignore[union-attr]
    if on != 0.0 or off is None or off > FILL or not is_op(condition, "Trilu"):
        return False
    trilu = condition.producer()  # type: ignore[union-attr]
    offset = trilu.inputs[1] if len(trilu.inputs) > 1 else None  # type: ignore[union-attr]
    upper = trilu.attributes["upper"].as_int() if "upper" in trilu.attributes else 1  # type: ignore[union-attr]
    ones = trilu.inputs[0]  # type: ignore[union-attr]
    while is_op(ones, *_PASS, "Expand"):
        ones = ones.producer().inputs[0]  # type: ignore[union-attr]
    filled = is_op(ones, "ConstantOfShape") and _fill_of(ones.producer()) == 1.0  # type: ignore[union-attr, arg-type]
    return upper == 0 and (offset is None or scalar(offset) == 0.0) and (filled or scalar(ones) == 1.0)


def _fill_of(node: ir.Node) -> Optional[float]:
    value = node.attributes.get("value")
    return float(value.as_tensor().numpy().reshape(-1)[0]) if value is not None else 0.0


def _mask_selected(found: Written, node: ir.Node) -> ir.Value:
    condition, yes, no = (input_of(node, i) for i in range(3))
    for value, fill, keeps in ((yes, scalar(no), True), (no, scalar(yes), False)):
        if fill is None:
            continue
        if fill > FILL:
            raise NotRecognised(f"Where writes {fill} over scores: too large to be a mask")
        if (rank(condition) or 5) > 4:
            raise NotRecognised(f"the mask has {rank(condition) or 'an unknown number of'} dimensions")
        found.kept.append((condition, keeps))
        found.notes.append(
            f"a query without any key gives 0 ({fill:.3g} in its whole row gave {'NaN' if math.isinf(fill) else 'the mean of V'})"
        )
        return value
    raise NotRecognised("Where between the products writes no constant over masked scores")


def _scaled_inputs(found: Written) -> None:
    """Factors on Q and K become part of the scale where they are numbers; others stay where they are."""
    for name in ("q", "k_transposed"):
        value: ir.Value = getattr(found, name)
        while is_op(value, "Mul", "Div"):
            try:
                inner, factor, _ = _factor(value.producer())  # type: ignore[arg-type]
            except NotRecognised:
                break
            if factor is None:
                break
            found.scale *= factor
            value = inner
        setattr(found, name, value)


def _check_types(found: Written) -> None:
    kinds = {found.q.dtype, found.k_transposed.dtype, found.v.dtype}
    if len(kinds) != 1 or next(iter(kinds)) not in FLOATS:
        raise NotRecognised(
            f"Q, K and V are of the types {', '.join(sorted(str(kind) for kind in kinds))}; one of float, float16, bfloat16 is needed"
        )
    ranks = [rank(found.q), rank(found.k_transposed), rank(found.v)]
    if ranks not in ([4, 4, 4], [3, 3, 3]):
        raise NotRecognised(f"Q, K and V have {ranks} dimensions; 3 or 4 each are needed, and known")
    if ranks[0] == 4 and found.scores_shape is not None:
        raise NotRecognised("4-D scores are reshaped")
    if ranks[0] == 3 and found.scores_shape is None and any((rank(v) or 0) > 3 for v in [*found.added, *(c for c, _ in found.kept)]):
        raise NotRecognised("a mask of 4 dimensions beside 3-D scores")
