"""ONNX Runtime on CPU as peers: its own attention nodes, and the graph that exporters write.

``onnxruntime`` is the better of its nodes: GroupQueryAttention where the case is causal or grouped, else MultiHeadAttention. ``-mha`` is
MultiHeadAttention always, ``-graph`` MatMul, Softmax, MatMul with a constant mask. As fair as can be: tensors are bound beforehand in the
layout that each wants, nothing is copied or allocated around a call, and its pool has as many threads as torch's.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Union

import torch
from torch import Tensor

from attnhub.bench import onnx_node
from attnhub.bench.cases import Case
from attnhub.bench.peers import Absent, Inputs, Peer, first_line

Kind = Literal["grouped", "multi-head", "graph"]
LABEL = "ONNX Runtime"
LABELS: dict[str, str] = {"": LABEL, "mha": f"{LABEL} MultiHeadAttention", "graph": f"{LABEL} graph"}
_NUMPY = {torch.float32: "float32", torch.int32: "int32"}


def peer(case: Case, tensors: Inputs, which: str = "") -> Union[Peer, Absent]:
    """The peer, or why it is absent. which: "" (the better node), "mha" or "graph"."""
    label = LABELS[which]
    if tensors[0].device.type != "cpu" or case.dtype != "float32":
        return Absent(label, "timed in fp32 on CPU only")
    if case.mode != "forward":
        return Absent(label, "it has no backward")
    if case.causal and case.seqlen_q != case.seqlen_k:
        return Absent(label, "it is timed in causal prefill only")
    grouped = case.heads != case.kv_heads
    if not which and grouped and not case.causal:
        return Absent(label, "its grouped-query node is timed in causal prefill only")
    if which and grouped:
        return Absent(label, "it is timed with as many heads of K as of Q")
    kind: Kind = "graph" if which == "graph" else "grouped" if not which and (case.causal or grouped) else "multi-head"
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its threads may spin while it works, not into the next peer's turn, which would then share the processor with them.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(_model(case, kind), options, providers=["CPUExecutionProvider"])
        call = _Bound(session, case, tensors, kind)
    except Exception as error:
        return Absent(label, first_line(error))
    node = {"grouped": "GroupQueryAttention", "multi-head": "MultiHeadAttention", "graph": "MatMul, Softmax, MatMul"}[kind]
    return Peer(label, call, facts={"node": node, "onnxruntime": onnxruntime.__version__}, differentiable=False)


class _Bound:
    """A session with its inputs and outputs bound; a call runs it and gives its output as [B, H, S, D]."""

    def __init__(self, session: Any, case: Case, tensors: Inputs, kind: Kind) -> None:
        self._session = session
        self._binding = session.io_binding()
        # Kept alive here: the binding holds addresses.
        self._inputs = _feeds(case, tensors, kind)
        joined, apart = (case.batch, case.seqlen_q, case.heads * case.head_dim), (case.batch, case.heads, case.seqlen_q, case.head_dim)
        self._outputs = {"out": torch.empty(apart if kind == "graph" else joined)}
        if kind == "grouped":
            present = (case.batch, case.kv_heads, case.seqlen_k, case.head_dim)
            self._outputs.update(present_key=torch.empty(present), present_value=torch.empty(present))
        for name, tensor in self._inputs.items():
            self._binding.bind_input(name, "cpu", 0, _numpy_type(tensor), tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in self._outputs.items():
            self._binding.bind_output(name, "cpu", 0, _numpy_type(tensor), tuple(tensor.shape), tensor.data_ptr())
        out = self._outputs["out"]
        self._out = out if kind == "graph" else out.view(case.batch, case.seqlen_q, case.heads, case.head_dim).transpose(1, 2)
        # The first call finds out what the node does not take.
        session.run_with_iobinding(self._binding)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same tensors at every call, by the binding."""
        self._session.run_with_iobinding(self._binding)
        return self._out


def _numpy_type(tensor: Tensor) -> Any:
    import numpy

    return numpy.dtype(_NUMPY[tensor.dtype]).type


def _feeds(case: Case, tensors: Inputs, kind: Kind) -> dict[str, Tensor]:
    if kind == "graph":
        return {name: t.contiguous() for name, t in zip("qkv", tensors)}
    feeds = {name: t.transpose(1, 2).flatten(2).contiguous() for name, t in zip("qkv", tensors)}
    if kind == "grouped":
        past = torch.zeros(case.batch, case.kv_heads, 0, case.head_dim)
        last = torch.full((case.batch,), case.seqlen_k - 1, dtype=torch.int32)
        feeds.update(past_key=past, past_value=past, seqlens_k=last, total=torch.tensor(case.seqlen_k, dtype=torch.int32))
    return feeds


def _model(case: Case, kind: Kind) -> bytes:
    if kind == "graph":
        return _graph(case)
    values = [(name, onnx_node.FLOAT, 3) for name in "qkv"]
    outputs = [("out", onnx_node.FLOAT, 3)]
    attributes = {"num_heads": case.heads}
    if kind == "multi-head":
        return onnx_node.model("MultiHeadAttention", "com.microsoft", values, outputs, {**attributes, "unidirectional": int(case.causal)})
    values += [(name, onnx_node.FLOAT, 4) for name in ("past_key", "past_value")]
    values += [("seqlens_k", onnx_node.INT32, 1), ("total", onnx_node.INT32, 0)]
    outputs += [(name, onnx_node.FLOAT, 4) for name in ("present_key", "present_value")]
    attributes["kv_num_heads"] = case.kv_heads
    return onnx_node.model("GroupQueryAttention", "com.microsoft", values, outputs, attributes)


def _graph(case: Case) -> bytes:
    """What torch's exporter makes of F.scaled_dot_product_attention: both sides times the root of the scale, a mask that is added."""
    nodes: list[onnx_node.Node] = []

    def add(op: str, output: str, *inputs: str, **attributes: Any) -> str:
        nodes.append((op, "", inputs, [output], attributes))
        return output

    constants: list[onnx_node.Constant] = [("root", (), torch.tensor(math.sqrt(case.head_dim**-0.5)).numpy().tobytes())]
    keys = add("Mul", "keys", add("Transpose", "turned", "k", perm=(0, 1, 3, 2)), "root")
    scores = add("MatMul", "scores", add("Mul", "queries", "q", "root"), keys)
    if case.causal:
        mask = torch.zeros(case.seqlen_q, case.seqlen_k).masked_fill(torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool).triu(1), -math.inf)
        constants.append(("mask", tuple(mask.shape), mask.numpy().tobytes()))
        scores = add("Add", "masked", scores, "mask")
    add("MatMul", "out", add("Softmax", "weights", scores), "v")
    return onnx_node.graph(nodes, [(name, onnx_node.FLOAT, 4) for name in "qkv"], [("out", onnx_node.FLOAT, 4)], constants)
