"""``torch.ops.attnhub.forward`` as one ONNX node, for torch.onnx's exporter.

What the node has an attribute or an input for goes there. The other parts of a mask (segments, image blocks, prefixes,
block-sparse) become one dense boolean mask, made by standard operators in the graph, so that lengths stay symbolic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Optional

import onnx
from onnx.defs import OpSchema
from onnxscript import ir, opset18
from onnxscript.values import Op, Opset

from attnhub import spec as flat
from attnhub.backend import Call
from attnhub.backends.onnx import node as schema
from attnhub.backends.onnx.node import DEFAULTS, DOMAIN, INPUTS, OP, OUTPUTS, VERSION, Form

#: Records standard operators in the graph under construction. (Its annotations tell values by type, which tracing does not.)
op: Any = opset18
#: Words of a spec that the node cannot express -> (what it is, what to do instead).
UNSUPPORTED = {
    "dropout": ("dropout", "export the model after model.eval(), or call attention with dropout_p=0"),
    "varlen": (
        "packed sequences (Varlen)",
        "pad the sequences and pass their lengths as mask=SeqLens(...), or their ids as mask=Segments(...)",
    ),
    "block_table": ("a paged K/V cache", "pass the past keys and values as inputs and concatenate them with the new ones"),
}
#: The operator append_kv: what it is, what to do instead.
IN_PLACE_CACHE = ("an in-place K/V cache (kv_cache=, append_kv)", UNSUPPORTED["block_table"][1])
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


class UnsupportedInOnnx(ValueError):  # noqa: N818 - it is raised to users, who read it as a sentence
    """The node cannot express what the model asks of attention. The message names the feature and the fix."""

    def __init__(self, feature: str, fix: str) -> None:
        super().__init__(f"ONNX export: attnhub::FlashAttention cannot express {feature}; {fix}")


def translate_forward(
    q: Any, k: Any, v: Any, bias: Any, sinks: Any, data: Sequence[Any], spec: str, sizes: Sequence[Any], softmax_scale: Any,
    need_lse: bool, need_backward: bool, backend: str,
) -> tuple[Any, Any]:  # fmt: skip
    """(out, lse) of the operator as outputs of one node. Arguments are those of the operator, tensors as ONNX values."""
    call = _decode(q, k, v, bias, sinks, data, spec, sizes, softmax_scale)
    mask = call.mask
    dense = _dense_mask(call)
    widened = mask.causal and (mask.prefix is not None or mask.blocks is not None)
    form = Form(
        is_causal=mask.causal and not widened,
        alignment=mask.align,
        scale=float(softmax_scale),
        softcap=call.softcap,
        window_left=mask.window[0],
        window_right=mask.window[1],
        chunk=mask.chunk,
    )
    inputs = {
        "Q": q,
        "K": k,
        "V": v,
        "attn_mask": dense,
        "nonpad_kv_seqlen": _int64(mask.seqused_k),
        "sinks": _float32(sinks),
        "leftpad": _int64(mask.leftpad),
        "alibi_slopes": _float32(mask.alibi),
    }
    arguments = [inputs.get(name) for name in INPUTS]
    while arguments[-1] is None:
        arguments.pop()
    if not need_lse and not need_backward:
        # The operator's second output is then an empty tensor that nobody reads.
        return _node(1)(*arguments, **form.attributes()), op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [0], []))
    outputs = _node(len(OUTPUTS))(*arguments, **form.attributes())
    return outputs[0], outputs[OUTPUTS.index("lse")]


@functools.lru_cache(maxsize=2)
def _node(outputs: int) -> Op:
    """The node with its first outputs, as a callable that records it in the graph under construction."""
    parameter, option = OpSchema.FormalParameter, OpSchema.FormalParameterOption
    recorded = OpSchema(
        OP,
        DOMAIN,
        VERSION,
        inputs=[
            parameter(
                name,
                schema.INPUT_TYPES.get(name, "T"),
                param_option=option.Single if i < schema.REQUIRED_INPUTS else option.Optional,
            )
            for i, name in enumerate(INPUTS)
        ],
        outputs=[
            parameter(name, schema.OUTPUT_TYPES.get(name, "T"), param_option=option.Optional if i else option.Single)
            for i, name in enumerate(OUTPUTS[:outputs])
        ],
        type_constraints=[(variable, list(types), "") for variable, types in schema.TYPES.items()],
        attributes=[OpSchema.Attribute(name, _attribute_type(name), "", required=False) for name in DEFAULTS],
    )
    return Op(Opset(DOMAIN, VERSION), OP, recorded)


def _attribute_type(name: str) -> OpSchema.AttrType:
    default = DEFAULTS[name]
    kinds = {int: OpSchema.AttrType.INT, str: OpSchema.AttrType.STRING}
    return kinds.get(type(default), OpSchema.AttrType.FLOAT)


def _decode(
    q: Any, k: Any, v: Any, bias: Any, sinks: Any, data: Sequence[Any], spec: str, sizes: Sequence[Any], softmax_scale: Any
) -> Call:
    """The call, or `UnsupportedInOnnx` for what has no place in the node."""
    for word, _ in flat.parse(spec):
        if word in UNSUPPORTED:
            raise UnsupportedInOnnx(*UNSUPPORTED[word])
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dtype not in _FLOATS:
            raise UnsupportedInOnnx(f"{name} of dtype {value.dtype}", "cast the model to float32, float16 or bfloat16")
    if not isinstance(softmax_scale, (int, float)) or any(not isinstance(size, int) for size in sizes):
        raise UnsupportedInOnnx(
            "a window, chunk, block size or softmax_scale that depends on a tensor's size",
            "pass it as a plain number, fixed when the model is exported",
        )
    return flat.decode(q, k, v, bias, sinks, data, spec, sizes, softmax_scale, False)


def _int64(value: Any) -> Any:
    return None if value is None else op.Cast(value, to=onnx.TensorProto.INT64)


def _float32(value: Any) -> Any:
    return value if value is None or value.dtype == ir.DataType.FLOAT else op.Cast(value, to=onnx.TensorProto.FLOAT)


def _typed(value: Any, dtype: ir.DataType) -> Any:
    """A value whose type later steps can see: the form of a node depends on its mask's."""
    value.dtype = dtype
    return value


def _dense_mask(call: Call) -> Optional[Any]:
    """The one mask input: None, bool, or float with -inf where a pair is not allowed."""
    mask = call.mask
    conditions = [] if mask.bool_mask is None else [mask.bool_mask]
    if mask.segments is not None:
        conditions.append(_same(*mask.segments))
    if mask.block_sparse is not None:
        conditions.append(_block_sparse(call))
    if mask.causal and (mask.prefix is not None or mask.blocks is not None):
        conditions.append(_widened_causal(call))
    allowed: Any = None
    for condition in conditions:
        allowed = condition if allowed is None else op.And(allowed, condition)
    bias: Any = mask.bias
    if bias is None:
        return None if allowed is None else _typed(allowed, ir.DataType.BOOL)
    if bias.dtype not in _FLOATS:
        bias = _typed(op.Cast(bias, to=onnx.TensorProto.FLOAT), ir.DataType.FLOAT)
    if allowed is None:
        return bias
    minus_infinity = op.CastLike(op.Constant(value_float=float("-inf")), bias)
    return _typed(op.Where(allowed, bias, minus_infinity), bias.dtype)


def _size(value: Any, axis: int) -> Any:
    """The length of an axis, int64 [1]."""
    return op.Shape(value, start=axis, end=axis + 1)


def _range(value: Any, axis: int) -> Any:
    """0, 1, ... along an axis, int64."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Range(zero, op.Squeeze(_size(value, axis), op.Constant(value_ints=[0])), one)


def _unsqueeze(value: Any, axes: list[int]) -> Any:
    return op.Unsqueeze(value, op.Constant(value_ints=axes))


def _same(ids_q: Any, ids_k: Any) -> Any:
    """[B, 1, Sq, Sk]: pairs of one segment."""
    return op.Equal(_unsqueeze(ids_q, [1, 3]), _unsqueeze(ids_k, [1, 2]))


def _block_sparse(call: Call) -> Any:
    """The block mask with every block spread over its pairs."""
    rows, keys = call.mask.block_size
    block_of_i = op.Div(_range(call.q, 2), op.Constant(value_int=rows))
    block_of_j = op.Div(_range(call.k, 2), op.Constant(value_int=keys))
    return op.Gather(op.Gather(call.mask.block_sparse, block_of_i, axis=2), block_of_j, axis=3)


def _widened_causal(call: Call) -> Any:
    """Causal, or inside the prefix, or inside one image block: [B, 1, Sq, Sk]."""
    mask = call.mask
    p, j = _unsqueeze(_range(call.q, 2), [1]), _range(call.k, 2)
    if mask.align == "bottom_right":
        length = _size(call.k, 2) if mask.seqused_k is None else _unsqueeze(_int64(mask.seqused_k), [1, 2, 3])
        p = op.Add(p, op.Sub(length, _size(call.q, 2)))
    allowed = op.LessOrEqual(j, p)
    if mask.prefix is not None:
        allowed = op.Or(allowed, op.Less(j, _unsqueeze(_int64(mask.prefix), [1, 2, 3])))
    if mask.blocks is not None:
        ids_q, ids_k = (_int64(ids) for ids in mask.blocks)
        in_block = op.GreaterOrEqual(_unsqueeze(ids_q, [1, 3]), op.Constant(value_int=0))
        allowed = op.Or(allowed, op.And(_same(ids_q, ids_k), in_block))
    return allowed
