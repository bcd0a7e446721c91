"""ai.onnx Attention, versions 23 to 25, as the node. Its specification: https://onnx.ai/onnx/operators/onnx__Attention.html

Where it differs from the node, the difference is stated or the node stays as it is: causal is aligned by the number of keys that stand
before the queries, which is what alignment says here.
"""

from __future__ import annotations

from typing import Any, Optional

import onnx_ir as ir

from attnhub.backends.onnx.node import Form
from attnhub.backends.onnx.rewrite.graph import FLOATS, Builder, NotRecognised, default_scale, rank, replace_value, same_size

_INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")


def given(node: ir.Node, names: tuple[str, ...]) -> dict[str, ir.Value]:
    """The inputs that are there, by their names in a specification."""
    return {name: value for name, value in zip(names, node.inputs) if value is not None}


def number(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or the default. Raises `NotRecognised` for one that is neither a number nor a text."""
    value = node.attributes[name].value if name in node.attributes else default
    numeric = not isinstance(default, (str, bytes))
    if (value is not default and isinstance(value, (str, bytes)) == numeric) or isinstance(value, (tuple, list)):
        raise NotRecognised(f"attribute {name} is {value!r}, of the wrong type")
    return value


def used(node: ir.Node, index: int) -> bool:
    """Whether the graph reads an output."""
    if index >= len(node.outputs):
        return False
    output = node.outputs[index]
    return bool(output.uses()) or output.is_graph_output()


def plan(node: ir.Node) -> tuple[Form, int, int]:
    """(form, q_heads, kv_heads) with 0 heads for 4-D inputs. Raises `NotRecognised`."""
    have = given(node, _INPUTS)
    missing = [name for name in ("Q", "K", "V") if name not in have]
    if missing:
        raise NotRecognised(f"it lacks its input {', '.join(missing)}")
    q, k = have["Q"], have["K"]
    if any(used(node, i) for i in (3,)):
        raise NotRecognised("its fourth output, the product of Q and K, is used; the node does not have one")
    if any(value.dtype not in FLOATS for value in (q, k, have["V"])) or len({q.dtype, k.dtype, have["V"].dtype}) != 1:
        raise NotRecognised(
            f"Q, K and V are of the types {q.dtype}, {k.dtype}, {have['V'].dtype}; one of float, float16, bfloat16 is needed"
        )
    ranks = {rank(have[name]) for name in ("Q", "K", "V")}
    if len(ranks) != 1 or next(iter(ranks)) not in (3, 4):
        raise NotRecognised("the numbers of dimensions of Q, K and V are not known to be 3 or 4 each")
    flat = ranks == {3}
    if ("past_key" in have) != ("past_value" in have):
        raise NotRecognised("one of past_key and past_value without the other")
    heads = (int(number(node, "q_num_heads", 0)), int(number(node, "kv_num_heads", 0))) if flat else (0, 0)
    if flat and (min(heads) < 1 or heads[0] % heads[1]):
        raise NotRecognised(f"3-D inputs, and q_num_heads={heads[0]} is no multiple of kv_num_heads={heads[1]}")
    causal, past = bool(number(node, "is_causal", 0)), "past_key" in have
    alignment = "bottom_right"
    if causal and past:
        axis = 1 if flat else 2
        if q.shape is None or k.shape is None or not same_size(q.shape[axis], k.shape[axis]):
            raise NotRecognised("is_causal with a past, and K is not known to be as long as Q: where the queries stand is not clear")
    elif causal and "nonpad_kv_seqlen" not in have:
        alignment = "top_left"
    mask = have.get("attn_mask")
    if mask is not None and mask.dtype is None:
        raise NotRecognised("the type of attn_mask is not known")
    if mask is not None and mask.dtype not in (ir.DataType.BOOL, *FLOATS):
        raise NotRecognised(f"attn_mask is {mask.dtype}")
    scale = number(node, "scale", None)
    head_dim = q.shape[-1] if q.shape is not None else None
    if flat and isinstance(head_dim, int):
        head_dim //= heads[0]
    form = Form(
        is_causal=causal,
        alignment=alignment,
        scale=default_scale(None if scale is None else float(scale), head_dim),
        softcap=float(number(node, "softcap", 0.0)),
        mask="" if mask is None else "bool" if mask.dtype == ir.DataType.BOOL else "float",
        past=past,
        nonpad_kv_seqlen="nonpad_kv_seqlen" in have,
        present=used(node, 1) or used(node, 2),
    )
    return form, *heads


def replace(node: ir.Node, form: Form, q_heads: int, kv_heads: int, names: set[str]) -> None:
    """Put the node in the place of an Attention that `plan` found to be one."""
    b = Builder(node, names)
    tensors: dict[str, Optional[ir.Value]] = dict(given(node, _INPUTS))
    if q_heads:
        for name, heads in (("Q", q_heads), ("K", kv_heads), ("V", kv_heads)):
            tensors[name] = b.split_heads(tensors[name], heads)  # type: ignore[arg-type]
    made = b.attention(form, tensors)
    out = b.join_heads(made.outputs[0]) if q_heads else made.outputs[0]
    swap(node, [out, *made.outputs[1:3]])


def swap(node: ir.Node, values: list[ir.Value]) -> None:
    """Let everything that read the outputs of a node read these values."""
    for old, new in zip(node.outputs, values):
        replace_value(old, new)


def notes(node: ir.Node) -> list[str]:
    found = ["a query without any key gives 0, as the specification has it since onnx 1.23; runtimes before gave NaN"]
    if "attn_mask" in given(node, _INPUTS):
        found.append("an attn_mask shorter than the keys is an error, not padded")
    return found
