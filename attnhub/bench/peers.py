"""Who takes part: the naive maths, torch's kernels one by one, FlexAttention, ONNX Runtime, and every attnhub backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

import attnhub
from attnhub.bench import processor
from attnhub.bench.cases import Case
from attnhub.decision import Decision
from attnhub.mask import FULL, Causal
from attnhub.reasons import Rejected
from attnhub.registry import registry

#: The peer that all ratios refer to.
BASELINE = "F.sdpa"
Inputs = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Peer:
    """Somebody who can be timed. facts: what belongs in its result row (the backend chosen, say)."""

    name: str
    attend: Attend
    context: Callable[[], Any] = contextlib.nullcontext
    facts: dict[str, Any] = field(default_factory=dict)
    #: Whether autograd runs through ``attend``.
    differentiable: bool = True


@dataclass
class Absent:
    """Somebody who does not take part, and why."""

    name: str
    why: str


#: Names for ``--peers``.
NAMES = ("naive", "sdpa", "flash", "cudnn", "efficient", "flex", "v1", "onnxruntime")


def default_names(device: torch.device) -> tuple[str, ...]:
    """Peers without being asked: on a GPU also each of torch's kernels, and FlexAttention. ONNX Runtime copies and is optional."""
    return ("naive", "sdpa", "flash", "cudnn", "efficient", "flex") if device.type == "cuda" else ("naive", "sdpa")


def inputs(case: Case, device: torch.device) -> Inputs:
    """q, k, v [B, H, S, D], contiguous, normally distributed, the same for every peer."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    shapes = ((case.heads, case.seqlen_q), (case.kv_heads, case.seqlen_k), (case.kv_heads, case.seqlen_k))
    q, k, v = (torch.randn(case.batch, h, s, case.head_dim, generator=generator, device=device).to(dtype) for h, s in shapes)
    return q, k, v


def assemble(case: Case, tensors: Inputs, peers: tuple[str, ...], backends: Optional[tuple[str, ...]]) -> list[Union[Peer, Absent]]:
    """Everybody for a case. backends: names of attnhub backends; None is every one that accepts the case, by name or not."""
    found: list[Union[Peer, Absent]] = [_MAKE[name](case, tensors) for name in peers]
    if backends is None or "auto" in backends:
        found.append(_backend("", case, tensors))
    for name in registry.names() if backends is None else (b for b in backends if b != "auto"):
        found.append(_backend(name, case, tensors))
    return found


# -- peers ---------------------------------------------------------------------------------------------------------------


def _no_room(case: Case, device: torch.device) -> str:
    """Why maths that hold the scores are left out: three score matrices must fit in half of the free memory."""
    wide = 3 * 4 * case.scores()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else processor.available_memory()
    return f"its scores need about {wide / 2**30:.1f} GiB" if wide > free / 2 else ""


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with the scores in memory, in the inputs' dtype."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    if causal and q.shape[2] > 1:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1) @ v


def _naive(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    if why := _no_room(case, tensors[0].device):
        return Absent("naive", why)
    return Peer("naive", lambda q, k, v: naive(q, k, v, case.causal))


def _torch(case: Case) -> Attend:
    causal, gqa = case.causal and case.seqlen_q > 1, case.heads != case.kv_heads
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)


def _sdpa(case: Case, tensors: Inputs) -> Peer:
    return Peer(BASELINE, _torch(case))


def _kernel(label: str, member: str) -> Callable[[Case, Inputs], Union[Peer, Absent]]:
    def make(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attend = _torch(case)
        backend = getattr(SDPBackend, member)
        try:
            with torch.no_grad(), sdpa_kernel(backend):
                attend(*tensors)
        except RuntimeError as error:
            return Absent(label, str(error).splitlines()[0])
        return Peer(label, attend, lambda: sdpa_kernel(backend))

    return make


def _flex(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    label = "FlexAttention"
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # Dynamo compiles one function for a few shapes only and then runs it uncompiled: each case starts afresh.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        device = str(tensors[0].device)
        block_mask = None
        if case.causal and case.seqlen_q > 1:
            block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.seqlen_q, case.seqlen_k, device=device)
        gqa = case.heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)
            return out

        with torch.no_grad():
            attend(*tensors)
    except Exception as error:
        # No compiler, no Triton, a shape that its templates lack: each has its own exception.
        return Absent(label, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return Peer(label, attend)


def _onnxruntime(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    from attnhub.bench.onnxruntime_peer import peer

    return peer(case, tensors)


def _keys_outer(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    from attnhub.bench.keys_outer_peer import peer

    return peer(case, tensors)


_MAKE: dict[str, Callable[[Case, Inputs], Union[Peer, Absent]]] = {
    "naive": _naive, "sdpa": _sdpa, "flash": _kernel("F.sdpa flash", "FLASH_ATTENTION"), "cudnn": _kernel("F.sdpa cuDNN", "CUDNN_ATTENTION"),
    "efficient": _kernel("F.sdpa efficient", "EFFICIENT_ATTENTION"), "flex": _flex, "v1": _keys_outer, "onnxruntime": _onnxruntime,
}  # fmt: skip


# -- attnhub -------------------------------------------------------------------------------------------------------------


def _backend(name: str, case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    label = f"attnhub {name}" if name else "attnhub"
    mask = Causal() if case.causal and case.seqlen_q > 1 else FULL
    q, k, v = tensors if case.mode == "forward" else tuple(t.detach().requires_grad_() for t in tensors)
    decision: Decision = attnhub.explain(q, k, v, mask, backend=name or None)
    if decision.chosen is None:
        verdict = decision.verdicts.get(name)
        codes = ", ".join(r.code.value for r in verdict.reasons) if isinstance(verdict, Rejected) else decision.why
        return Absent(label, codes)
    if name == "reference" and (why := _no_room(case, q.device)):
        return Absent(label, why)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attnhub.attention(q, k, v, mask, backend=name or None)
        assert isinstance(out, Tensor)
        return out

    return Peer(label, attend, facts={"backend": decision.chosen, "backward_by": decision.backward})
