"""One call through ONNX Runtime: a session per form of the node, inputs and outputs bound without copies."""

from __future__ import annotations

import functools
from typing import Any, Optional

import onnxruntime
import torch
from torch import Tensor

from attnhub import dense
from attnhub.backend import Call, Plan
from attnhub.backends.onnx.library import register
from attnhub.backends.onnx.model import one_node
from attnhub.backends.onnx.node import Form
from attnhub.backends.onnx.session import onnx_type, run
from attnhub.layouts import empty_out


class OnnxPlan(Plan):
    """The node by the native kernel, or by its function body (``native=False``, for tests of exported files' fallback)."""

    def __init__(self, native: bool = True) -> None:
        self._native = native

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        mask = call.mask
        inputs = {"Q": call.q, "K": call.k, "V": call.v}
        written = _dense_mask(call)
        if written is not None:
            inputs["attn_mask"] = written
        keys = call.k.shape[2]
        dense.check_lengths(mask, keys)
        if mask.seqused_k is not None:
            inputs["nonpad_kv_seqlen"] = mask.seqused_k.long()
        if mask.leftpad is not None:
            # The node is strict about a number that `LeftPad` gives a meaning.
            inputs["leftpad"] = mask.leftpad.long().clamp(0, keys)
        if call.sinks is not None:
            inputs["sinks"] = call.sinks.float()
        if mask.alibi is not None:
            inputs["alibi_slopes"] = mask.alibi
        form = Form(
            is_causal=mask.causal,
            alignment=mask.align,
            scale=call.softmax_scale,
            softcap=call.softcap,
            window_left=mask.window[0],
            window_right=mask.window[1],
            chunk=mask.chunk,
            mask="" if written is None else "bool" if written.dtype == torch.bool else "float",
            nonpad_kv_seqlen=mask.seqused_k is not None,
            sinks=call.sinks is not None,
            leftpad=mask.leftpad is not None,
            alibi=mask.alibi is not None,
            lse=call.need_lse,
        )
        session = _session(
            form,
            onnx_type(call.q.dtype),
            onnx_type(written.dtype) if form.mask == "float" and written is not None else 0,
            mask.alibi.ndim if mask.alibi is not None else 1,
            self._native,
            torch.get_num_threads(),
        )
        return _run(session, {name: tensor.detach().contiguous() for name, tensor in inputs.items()}, call)

    def describe(self) -> dict[str, Any]:
        return {"kernel": "native" if self._native else "function body", "onnxruntime": onnxruntime.__version__}


def _dense_mask(call: Call) -> Optional[Tensor]:
    """The one mask that the node takes: bool, or float with -inf where a boolean mask beside it is False."""
    allowed, bias = call.mask.bool_mask, call.mask.bias
    if bias is None:
        return allowed
    if bias.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        bias = bias.float()
    return bias if allowed is None else torch.where(allowed, bias, float("-inf"))


@functools.lru_cache(maxsize=128)
def _session(form: Form, dtype: int, mask_dtype: int, alibi_rank: int, native: bool, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Between two calls the pool's threads would spin, beside torch's own.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if native:
        register(options)
    model = one_node(form, dtype, mask_dtype=mask_dtype, alibi_rank=alibi_rank)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor], call: Call) -> tuple[Tensor, Optional[Tensor]]:
    out = empty_out(call.q, call.v.shape[3])
    outputs = {"Y": out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)}
    if call.need_lse:
        outputs["lse"] = torch.empty(out.shape[:3], dtype=torch.float32)
    run(session, inputs, outputs)
    if outputs["Y"] is not out:
        out.copy_(outputs["Y"])
    return out, outputs.get("lse")
