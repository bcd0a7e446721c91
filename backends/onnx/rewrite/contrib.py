"""com.microsoft MultiHeadAttention and GroupQueryAttention as the node.

Their specification: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. GroupQueryAttention counts keys by
``seqlens_k``; the node stands in for it where every sequence of a batch is as long as ``total_sequence_length`` says: with a batch of
one, which the shapes must show, or where the caller of `convert` says so.
"""

from __future__ import annotations

import itertools
from typing import Optional

import onnx_ir as ir

from attnhub.backends.onnx.node import Form
from attnhub.backends.onnx.rewrite.graph import FLOATS, Builder, NotRecognised, default_scale, rank, same_size
from attnhub.backends.onnx.rewrite.standard import given, number, swap, used

DOMAIN = "com.microsoft"
_MULTI_HEAD = (
    "query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value", "past_sequence_length", "cache_indirection",
)  # fmt: skip
_GROUPED = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache", "position_ids",
    "attention_bias", "head_sink",
)  # fmt: skip


def _all_of(have: dict[str, ir.Value], *names: str) -> None:
    missing = [name for name in names if name not in have]
    if missing:
        raise NotRecognised(f"it lacks its input {', '.join(missing)}")


def _float(value: ir.Value, what: str) -> None:
    if value.dtype not in FLOATS:
        raise NotRecognised(f"{what} is of type {value.dtype}; float, float16 or bfloat16 is needed")


# -- MultiHeadAttention ----------------------------------------------------------------------------------------------------------


def plan_multi_head(node: ir.Node) -> Form:
    """The form of the node. Raises `NotRecognised`."""
    have = given(node, _MULTI_HEAD)
    _all_of(have, "query", *(("past_key", "past_value") if have.keys() & {"past_key", "past_value"} else ()))
    if int(number(node, "num_heads", 0)) < 1:
        raise NotRecognised("it lacks its attribute num_heads")
    for name in ("past_sequence_length", "cache_indirection"):
        if name in have:
            raise NotRecognised(f"input {name}: beam search over a shared buffer")
    if used(node, 3):
        raise NotRecognised("its fourth output, the product of Q and K, is used")
    query, heads = have["query"], int(number(node, "num_heads", 0))
    _float(query, "query")
    packed = rank(query) == 5
    if not packed:
        if "key" not in have or rank(query) != 3:
            raise NotRecognised(f"query of {rank(query) or 'an unknown number of'} dimensions and {'a' if 'key' in have else 'no'} key")
        ranks = rank(have["key"]), rank(have["value"]) if "value" in have else None
        if ranks not in ((3, 3), (4, 4), (5, None)):
            raise NotRecognised(f"key and value of {ranks} dimensions; 3 or 4 each, or 5 packed, are taken")
    if "bias" in have and (packed or rank(have["key"]) != 3):
        raise NotRecognised("bias beside packed or 4-D keys")
    size = have["bias"].shape if "bias" in have else None
    if "bias" in have and (size is None or query.shape is None or not all(isinstance(dim, int) for dim in (size[0], query.shape[-1]))):
        raise NotRecognised("bias of unknown size")
    padding = have.get("key_padding_mask")
    if padding is not None and rank(padding) != 2:
        raise NotRecognised(f"key_padding_mask of {rank(padding) or 'an unknown number of'} dimensions; [batch, keys] is taken")
    if number(node, "unidirectional", 0):
        key = have.get("key")
        square = packed or (
            key is not None
            and query.shape is not None
            and key.shape is not None
            and rank(key) == 3
            and same_size(query.shape[1], key.shape[1])
        )
        if not square:
            raise NotRecognised("unidirectional, and the keys are not known to be as many as the queries")
    head_dim = _head_dim(query, heads, packed)
    scale = float(number(node, "scale", 0.0))
    return Form(
        is_causal=bool(number(node, "unidirectional", 0)),
        scale=default_scale(scale or None, head_dim),
        mask="float" if "attention_bias" in have else "bool" if padding is not None else "",
        past="past_key" in have,
        present=used(node, 1) or used(node, 2),
    )


def _head_dim(query: ir.Value, heads: int, packed: bool) -> Optional[int]:
    width = query.shape[-1] if query.shape is not None else None
    return None if not isinstance(width, int) or not heads else width if packed else width // heads


def multi_head_notes(node: ir.Node) -> list[str]:
    if "key_padding_mask" not in given(node, _MULTI_HEAD):
        return []
    fill = float(number(node, "mask_filter_value", -10000.0))
    return [f"key_padding_mask removes keys ({fill:g} was added to their scores): a query without any key gives 0"]


def replace_multi_head(node: ir.Node, form: Form, names: set[str]) -> None:
    b = Builder(node, names)
    have = given(node, _MULTI_HEAD)
    heads, query = int(number(node, "num_heads", 0)), have["query"]
    if rank(query) == 5:  # [B, S, H, 3, D]
        q, k, v = (b("Transpose", b("Gather", query, i, axis=3), perm=[0, 2, 1, 3]) for i in range(3))
    else:
        key, value = have["key"], have.get("value")
        if "bias" in have:
            query, key, value = _biased(b, query, key, value, have["bias"])  # type: ignore[arg-type]
        q = b.split_heads(query, heads)
        if rank(have["key"]) == 5:  # [B, L, H, 2, D]
            k, v = (b("Transpose", b("Gather", key, i, axis=3), perm=[0, 2, 1, 3]) for i in range(2))
        elif rank(have["key"]) == 4:
            assert value is not None
            k, v = key, value
        else:
            assert value is not None
            k, v = b.split_heads(key, heads), b.split_heads(value, heads)
    mask = have.get("attention_bias")
    if "key_padding_mask" in have:
        allowed = b("Unsqueeze", b("Cast", have["key_padding_mask"], to=ir.DataType.BOOL.value), [1, 2])
        mask = allowed if mask is None else b("Where", allowed, mask, b("CastLike", float("-inf"), mask))
    tensors: dict[str, Optional[ir.Value]] = {
        "Q": q, "K": k, "V": v, "attn_mask": mask, "past_key": have.get("past_key"), "past_value": have.get("past_value"),
    }  # fmt: skip
    made = b.attention(form, tensors)
    swap(node, [b.join_heads(made.outputs[0]), *made.outputs[1:3]])


def _biased(b: Builder, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    width = int(query.shape[-1])  # type: ignore[index, arg-type]
    parts = [b("Slice", bias, [start], [stop]) for start, stop in ((0, width), (width, 2 * width), (2 * width, 1 << 62))]
    return b("Add", query, parts[0]), b("Add", key, parts[1]), b("Add", value, parts[2])


# -- GroupQueryAttention ---------------------------------------------------------------------------------------------------------


def plan_grouped(node: ir.Node, unpadded: bool) -> Form:
    """The form of the node. unpadded: what the caller of `convert` says. Raises `NotRecognised`."""
    have = given(node, _GROUPED)
    pairs = (("key", "value"), ("past_key", "past_value"))
    _all_of(have, "query", "seqlens_k", "total_sequence_length", *(name for pair in pairs if have.keys() & set(pair) for name in pair))
    query = have["query"]
    _float(query, "query")
    if rank(query) != 3 or query.shape is None:
        raise NotRecognised("query is not known to have 3 dimensions")
    if any(i for i in range(len(_GROUPED), len(node.inputs)) if node.inputs[i] is not None):
        raise NotRecognised("quantised keys and values")
    heads, kv_heads = int(number(node, "num_heads", 0)), int(number(node, "kv_num_heads", 0))
    width = query.shape[-1]
    packed = "key" not in have
    parts = heads + 2 * kv_heads if packed else heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise NotRecognised(f"num_heads={heads} is no multiple of kv_num_heads={kv_heads}")
    if not isinstance(width, int) or width % parts:
        raise NotRecognised(f"the width of query, {width}, is not known to be {parts} heads")
    for name in ("k_quant_type", "v_quant_type"):
        if number(node, name, "NONE") not in ("NONE", b"NONE"):
            raise NotRecognised(f"{name}={number(node, name, '')}: quantised keys and values")
    if number(node, "qk_output", 0) or used(node, 3):
        raise NotRecognised("the product of Q and K is an output")
    if number(node, "smooth_softmax", 0) > 0 and "head_sink" not in have:
        raise NotRecognised("smooth_softmax without head_sink")
    if number(node, "do_rotary", 0) and not ("cos_cache" in have and "sin_cache" in have and isinstance(_rotary(have), int)):
        raise NotRecognised("do_rotary without cos_cache and sin_cache of known width")
    if not unpadded and query.shape[0] != 1:
        raise NotRecognised(
            f"seqlens_k: batch {query.shape[0]} may hold sequences of different lengths, whose keys GroupQueryAttention packs differently; "
            "pass unpadded=True (--unpadded) if all sequences of a batch are always as long as total_sequence_length"
        )
    if "past_key" in have and _is_shared(node, have["past_key"]):
        raise NotRecognised("past and present share one buffer of a fixed length")
    window = int(number(node, "local_window_size", -1))
    scale = float(number(node, "scale", 0.0))
    return Form(
        is_causal=True,
        scale=default_scale(scale or None, width // parts),
        softcap=float(number(node, "softcap", 0.0)),
        window_left=window - 1 if window > 0 else -1,
        mask="float" if "attention_bias" in have else "",
        past="past_key" in have,
        sinks="head_sink" in have,
        present=used(node, 1) or used(node, 2),
    )


def _rotary(have: dict[str, ir.Value]) -> Optional[int]:
    width = have["cos_cache"].shape
    return 2 * width[-1] if width is not None and isinstance(width[-1], int) else None


def _is_shared(node: ir.Node, past: ir.Value) -> bool:
    """Whether the present is declared as long as the past, as for a buffer that is written in place."""
    present = node.outputs[1] if len(node.outputs) > 1 else None
    if present is None or present.shape is None or past.shape is None or len(past.shape) != 4 or len(present.shape) != 4:
        return False
    return same_size(past.shape[2], present.shape[2])


def replace_grouped(node: ir.Node, form: Form, names: set[str]) -> None:
    b = Builder(node, names)
    have = given(node, _GROUPED)
    heads, kv_heads = int(number(node, "num_heads", 0)), int(number(node, "kv_num_heads", 0))
    query = have["query"]
    if "key" in have:
        q, k, v = b.split_heads(query, heads), b.split_heads(have["key"], kv_heads), b.split_heads(have["value"], kv_heads)
    else:
        whole = b.split_heads(query, heads + 2 * kv_heads)
        ends = (0, heads, heads + kv_heads, heads + 2 * kv_heads)
        q, k, v = (b("Slice", whole, [start], [stop], [1]) for start, stop in itertools.pairwise(ends))
    if number(node, "do_rotary", 0):
        q, k = _rotated(b, node, have, q, k)
    sink = have.get("head_sink")
    tensors: dict[str, Optional[ir.Value]] = {
        "Q": q, "K": k, "V": v, "attn_mask": have.get("attention_bias"), "past_key": have.get("past_key"), "past_value": have.get("past_value"),
        "sinks": sink if sink is None or sink.dtype == ir.DataType.FLOAT else b("Cast", sink, to=ir.DataType.FLOAT.value),
    }  # fmt: skip
    made = b.attention(form, tensors)
    swap(node, [b.join_heads(made.outputs[0]), *made.outputs[1:3]])


def _rotated(b: Builder, node: ir.Node, have: dict[str, ir.Value], q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Q and K with rotary embeddings of the caches, in standard operators."""
    if "position_ids" in have:
        positions = have["position_ids"]  # [B, S]
    else:
        first = b.size(have["past_key"], 2) if "past_key" in have else b.constant([0])
        steps = b("Range", 0, b("Squeeze", b.size(q, 2), [0]), 1)
        positions = b("Unsqueeze", b("Add", steps, first), [0])
    cos, sin = (b("Unsqueeze", b("Gather", have[name], positions, axis=0), [1]) for name in ("cos_cache", "sin_cache"))  # [B, 1, S, r / 2]
    turned = _rotary(have)
    assert turned is not None
    return tuple(_rotate(b, t, cos, sin, turned, bool(number(node, "rotary_interleaved", 0))) for t in (q, k))  # type: ignore[return-value]


def _rotate(b: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, turned: int, interleaved: bool) -> ir.Value:
    def part(start: int, stop: int, step: int = 1) -> ir.Value:
        return b("Slice", x, [start], [stop], [-1], [step])

    half = turned // 2
    first, second = (part(0, turned, 2), part(1, turned, 2)) if interleaved else (part(0, half), part(half, turned))
    one = b("Sub", b("Mul", first, cos), b("Mul", second, sin))
    two = b("Add", b("Mul", second, cos), b("Mul", first, sin))
    if interleaved:
        pairs = b("Concat", b("Unsqueeze", one, [-1]), b("Unsqueeze", two, [-1]), axis=-1)
        both = b("Reshape", pairs, [0, 0, 0, turned])
    else:
        both = b("Concat", one, two, axis=-1)
    return b("Concat", both, part(turned, 1 << 62), axis=-1)
