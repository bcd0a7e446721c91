"""ONNX Runtime's own attention nodes on CPU, as a peer: MultiHeadAttention, and GroupQueryAttention where it is causal or grouped.

As fair as can be: its tensors are bound beforehand in the layout that the nodes want ([B, S, H * D]), nothing is copied or
allocated around a call, and its pool has as many threads as torch's.
"""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor

from attnhub.bench import onnx_node
from attnhub.bench.cases import Case
from attnhub.bench.peers import Absent, Inputs, Peer

LABEL = "ONNX Runtime"
_NUMPY = {torch.float32: "float32", torch.int32: "int32"}


def peer(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    """The peer, or why it is absent."""
    if tensors[0].device.type != "cpu" or case.dtype != "float32":
        return Absent(LABEL, "timed in fp32 on CPU only")
    if case.mode != "forward":
        return Absent(LABEL, "it has no backward")
    grouped = case.causal or case.heads != case.kv_heads
    if grouped and (not case.causal or case.seqlen_q != case.seqlen_k):
        return Absent(LABEL, "its grouped-query node is timed in causal prefill only")
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its threads may spin while it works, not into the next peer's turn, which would then share the processor with them.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(_model(case, grouped), options, providers=["CPUExecutionProvider"])
        call = _Bound(session, case, tensors, grouped)
    except Exception as error:
        return Absent(LABEL, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    facts = {"node": "GroupQueryAttention" if grouped else "MultiHeadAttention", "onnxruntime": onnxruntime.__version__}
    return Peer(LABEL, call, facts=facts, differentiable=False)


class _Bound:
    """A session with its inputs and outputs bound; a call runs it and gives its output as [B, H, S, D]."""

    def __init__(self, session: Any, case: Case, tensors: Inputs, grouped: bool) -> None:
        self._session = session
        self._binding = session.io_binding()
        # Kept alive here: the binding holds addresses.
        self._inputs = _feeds(case, tensors, grouped)
        self._outputs = {"out": torch.empty(case.batch, case.seqlen_q, case.heads * case.head_dim)}
        if grouped:
            present = (case.batch, case.kv_heads, case.seqlen_k, case.head_dim)
            self._outputs.update(present_key=torch.empty(present), present_value=torch.empty(present))
        for name, tensor in self._inputs.items():
            self._binding.bind_input(name, "cpu", 0, _numpy_type(tensor), tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in self._outputs.items():
            self._binding.bind_output(name, "cpu", 0, _numpy_type(tensor), tuple(tensor.shape), tensor.data_ptr())
        self._out = self._outputs["out"].view(case.batch, case.seqlen_q, case.heads, case.head_dim).transpose(1, 2)
        # The first call finds out what the node does not take.
        session.run_with_iobinding(self._binding)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same tensors at every call, by the binding."""
        self._session.run_with_iobinding(self._binding)
        return self._out


def _numpy_type(tensor: Tensor) -> Any:
    import numpy

    return numpy.dtype(_NUMPY[tensor.dtype]).type


def _feeds(case: Case, tensors: Inputs, grouped: bool) -> dict[str, Tensor]:
    feeds = {name: t.transpose(1, 2).flatten(2).contiguous() for name, t in zip("qkv", tensors)}
    if grouped:
        past = torch.zeros(case.batch, case.kv_heads, 0, case.head_dim)
        last = torch.full((case.batch,), case.seqlen_k - 1, dtype=torch.int32)
        feeds.update(past_key=past, past_value=past, seqlens_k=last, total=torch.tensor(case.seqlen_k, dtype=torch.int32))
    return feeds


def _model(case: Case, grouped: bool) -> bytes:
    values = [(name, onnx_node.FLOAT, 3) for name in "qkv"]
    outputs = [("out", onnx_node.FLOAT, 3)]
    attributes = {"num_heads": case.heads}
    if grouped:
        values += [(name, onnx_node.FLOAT, 4) for name in ("past_key", "past_value")]
        values += [("seqlens_k", onnx_node.INT32, 1), ("total", onnx_node.INT32, 0)]
        outputs += [(name, onnx_node.FLOAT, 4) for name in ("present_key", "present_value")]
        attributes["kv_num_heads"] = case.kv_heads
    return onnx_node.model("GroupQueryAttention" if grouped else "MultiHeadAttention", "com.microsoft", values, outputs, attributes)
