"""torch's kernels by their operators, for what F.scaled_dot_product_attention does not hand on to them: windows and packed documents."""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor

from attnhub.bench.cases import Case
from attnhub.bench.parts import parts
from attnhub.bench.peers import Absent, Attend, Inputs, Peer


def flash(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    """FlashAttention-2 with a window or packed documents."""
    varlen = parts(case, tensors[0].device).varlen
    limits = {"window_size_left": case.window - 1, "window_size_right": 0} if case.window else {}
    starts, length = (None, case.seqlen_q) if varlen is None else (varlen.cu_seqlens_q, varlen.max_seqlen_q)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t[0].transpose(0, 1) if starts is not None else t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, length, length, 0.0, case.causal, False, **limits)[0]
        return out.transpose(0, 1)[None] if starts is not None else out.transpose(1, 2)

    return _tried("aten flash", attend, tensors)


def cudnn(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    """cuDNN with packed documents. It takes tokens one behind the other: copies, made beforehand."""
    varlen = parts(case, tensors[0].device).varlen
    assert varlen is not None
    packed = tuple(t[0].transpose(0, 1).contiguous() for t in tensors)
    starts, length = varlen.cu_seqlens_q, varlen.max_seqlen_q

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # q, k and v lie in packed.
        out: Tensor = torch.ops.aten._cudnn_attention_forward(*packed, None, starts, starts, length, length, False, 0.0, case.causal, False)[0]
        return out.transpose(0, 1)[None]

    return _tried("aten cuDNN", attend, tensors)


def _tried(label: str, attend: Attend, tensors: Inputs) -> Union[Peer, Absent]:
    try:
        with torch.no_grad():
            attend(*tensors)
    except (RuntimeError, NotImplementedError) as error:
        return Absent(label, str(error).splitlines()[0])
    return Peer(label, attend)
