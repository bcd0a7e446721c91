"""GELU in the order of products that ONNX Runtime knows.

torch's exporter writes ``x * (0.5 * (1 + erf(x / sqrt(2))))``, which no runtime so far takes for a GELU. As ``(x * 0.5) * (1 + erf(...))`` ONNX
Runtime fuses it, and the bias before it (onnxruntime/core/optimizer/gelu_fusion.h): one pass over the largest tensors of an encoder instead
of six. The value is the same to the last bit: a factor 0.5 is exact on either side, but where results are subnormal.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import onnx_ir


def reorder_gelu(model: onnx_ir.Model) -> int:
    """Change every GELU of the model; how many there were."""
    return sum(_reordered(node) for node in list(model.graph.all_nodes()) if node.op_type == "Mul" and not node.domain)


def _reordered(outer: Any) -> bool:
    for place, x in enumerate(outer.inputs):
        inner = _made_by(outer.inputs[1 - place], "Mul")
        if inner is None or len(inner.outputs[0].uses()) != 1 or inner.outputs[0].is_graph_output():
            continue
        for half, shifted in (inner.inputs, inner.inputs[::-1]):
            if _constant(half) == 0.5 and _is_one_plus_erf(shifted, x):
                inner.replace_input_with(inner.inputs.index(shifted), x)
                outer.replace_input_with(place, shifted)
                return True
    return False


def _is_one_plus_erf(value: Any, x: Any) -> bool:
    """Whether it is 1 + erf(x / sqrt(2))."""
    add = _made_by(value, "Add")
    for one, error in () if add is None else (add.inputs, add.inputs[::-1]):
        erf = _made_by(error, "Erf")
        div = None if erf is None else _made_by(erf.inputs[0], "Div")
        root = None if div is None or div.inputs[0] is not x else _constant(div.inputs[1])
        # Constants have the precision of the model's dtype.
        if _constant(one) == 1.0 and root is not None and math.isclose(root, math.sqrt(2.0), rel_tol=1e-3):
            return True
    return False


def _made_by(value: Any, op_type: str) -> Any:
    """The node that makes a value, if it is a standard one of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and not node.domain else None


def _constant(value: Any) -> Optional[float]:
    """The number that a value always is."""
    tensor = None if value is None else onnx_ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None
