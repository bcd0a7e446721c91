"""ONNX Runtime's own attention nodes on CPU, as a peer: MultiHeadAttention, and GroupQueryAttention where it is causal or grouped."""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor

from attnhub.bench.cases import Case
from attnhub.bench.peers import Absent, Inputs, Peer

LABEL = "ONNX Runtime"


def peer(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    """The peer, or why it is absent. fp32 on CPU; tokens go in and out as [B, S, H * D], which is this node's layout."""
    if tensors[0].device.type != "cpu" or case.dtype != "float32":
        return Absent(LABEL, "timed in fp32 on CPU only")
    grouped = case.causal or case.heads != case.kv_heads
    if grouped and (not case.causal or case.seqlen_q != case.seqlen_k):
        return Absent(LABEL, "its grouped-query node is timed in causal prefill only")
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(_model(case, grouped), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return Absent(LABEL, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    feeds = _feeds(case, tensors, grouped)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.from_numpy(session.run(["out"], feeds)[0])
        return out.view(case.batch, case.seqlen_q, case.heads, case.head_dim).transpose(1, 2)

    return Peer(LABEL, attend, facts={"node": "GroupQueryAttention" if grouped else "MultiHeadAttention"}, differentiable=False)


def _feeds(case: Case, tensors: Inputs, grouped: bool) -> dict[str, Any]:
    feeds = {name: t.transpose(1, 2).flatten(2).contiguous().numpy() for name, t in zip("qkv", tensors)}
    if grouped:
        past = torch.zeros(case.batch, case.kv_heads, 0, case.head_dim).numpy()
        last = torch.full((case.batch,), case.seqlen_k - 1, dtype=torch.int32).numpy()
        feeds.update(past_key=past, past_value=past, seqlens_k=last, total=torch.tensor(case.seqlen_k, dtype=torch.int32).numpy())
    return feeds


def _model(case: Case, grouped: bool) -> bytes:
    from onnx import TensorProto, helper

    floats, ints = TensorProto.FLOAT, TensorProto.INT32
    values = [helper.make_tensor_value_info(name, floats, [None, None, None]) for name in "qkv"]
    outputs = [helper.make_tensor_value_info("out", floats, [None, None, None])]
    if grouped:
        values += [helper.make_tensor_value_info(name, floats, [None, case.kv_heads, None, case.head_dim]) for name in ("past_key", "past_value")]
        values += [helper.make_tensor_value_info("seqlens_k", ints, [None]), helper.make_tensor_value_info("total", ints, [])]
        outputs += [helper.make_tensor_value_info(name, floats, [None] * 4) for name in ("present_key", "present_value")]
        node = helper.make_node(
            "GroupQueryAttention", [v.name for v in values], [o.name for o in outputs], domain="com.microsoft",
            num_heads=case.heads, kv_num_heads=case.kv_heads,
        )  # fmt: skip
    else:
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft", num_heads=case.heads)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "attention", values, outputs), opset_imports=opsets, ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized
