"""Who takes part: the naive maths, torch's kernels one by one, FlexAttention, ONNX Runtime, and every attnhub backend."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional, Union, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import attnhub
from attnhub.bench import processor
from attnhub.bench.cases import ITEM, Case
from attnhub.bench.parts import dequantised, paged, parts, quantised, torch_dtype
from attnhub.decision import Decision
from attnhub.reasons import Rejected
from attnhub.registry import registry

#: The peer that all ratios refer to.
BASELINE = "F.sdpa"
#: Behind a backend's name: its time without pages, in a case with pages.
CONTIGUOUS = " contiguous"
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


def first_line(error: Exception) -> str:
    """What an error says, as a reason to be absent."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def default_names(device: torch.device) -> tuple[str, ...]:
    """Peers without being asked: on a GPU also each of torch's kernels, and FlexAttention. ONNX Runtime copies and is optional."""
    return ("naive", "sdpa", "flash", "cudnn", "efficient", "flex") if device.type == "cuda" else ("naive", "sdpa")


def inputs(case: Case, device: torch.device) -> Inputs:
    """q, k, v [B, H, S, D], contiguous, normally distributed, the same for every peer. Packed documents lie one behind the other in S."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    shapes = ((case.heads, case.seqlen_q), (case.kv_heads, case.seqlen_k), (case.kv_heads, case.seqlen_k))
    q, k, v = (torch.randn(case.batch, h, s, case.head_dim, generator=generator, device=device).to(dtype) for h, s in shapes)
    if case.fp8:
        q, k, v = (dequantised(*quantised(t, case.kv_heads), dtype) for t in (q, k, v))
    return q, k, v


def assemble(case: Case, tensors: Inputs, peers: tuple[str, ...], backends: Optional[tuple[str, ...]]) -> list[Union[Peer, Absent]]:
    """Everybody for a case. backends: names of attnhub backends; None is every one that accepts the case, by name or not.

    Who reads pages is timed on the same K and V without pages, too, and who reads fp8 on the same values in the case's dtype.
    """
    if case.page_size:
        # The others read no pages and are in the case without them; one stands for them, since only times of one run compare.
        peers = tuple(name for name in peers if name in ("sdpa", "cudnn"))
    found: list[Union[Peer, Absent]] = [_made(name, case, tensors) for name in peers]
    if backends is None or "auto" in backends:
        found.append(_backend("", case, tensors))
    for name in registry.names() if backends is None else (b for b in backends if b != "auto"):
        found.append(_backend(name, case, tensors))
    if case.page_size or case.fp8:
        timed = [peer.name.removeprefix("attnhub ") for peer in found if peer.name.startswith("attnhub ") and (case.fp8 or isinstance(peer, Peer))]
        plain, suffix = dataclasses.replace(case, page_size=0, fp8=False), CONTIGUOUS if case.page_size else f" {case.dtype}"
        found.extend(_backend(name, plain, tensors, f"attnhub {name}{suffix}") for name in timed)
    return found


def _made(name: str, case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    try:
        return _MAKE[name](case, tensors)
    except torch.OutOfMemoryError:
        # A dense mask, say.
        return Absent(name, "there is no memory for it")


# -- peers ---------------------------------------------------------------------------------------------------------------


def _no_room(case: Case, device: torch.device) -> str:
    """Why maths that hold the scores are left out: three score matrices (six with a backward) must fit in half of the free memory."""
    # On a CPU some products of two-byte types are made in fp32.
    item = 4 if device.type == "cpu" else ITEM[case.dtype]
    wide = (3 if case.mode == "forward" else 6) * item * case.scores()
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
    if case.features():
        return Absent("naive", f"it has no {case.features()[0].split()[0]}")
    if why := _no_room(case, tensors[0].device):
        return Absent("naive", why)
    return Peer("naive", lambda q, k, v: naive(q, k, v, case.causal))


def _torch(case: Case, device: torch.device) -> Union[Attend, str]:
    """F.scaled_dot_product_attention at a case, or what it lacks. What is_causal does not say becomes a dense mask."""
    causal, gqa = case.causal and case.seqlen_q > 1, case.heads != case.kv_heads
    if case.softcap or case.sinks:
        return f"it has no {'softcap' if case.softcap else 'sinks'}"
    mask: Optional[Tensor] = None
    if case.features():
        mask, causal = _dense_mask(case, device), False

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)

    return attend


def _dense_mask(case: Case, device: torch.device) -> Tensor:
    """Every part of the mask as one tensor [1, H or 1, Sq, Sk]: bool, or in the inputs' dtype where something is added."""
    found = parts(case, device)
    allowed, bias = found.mask.to_dense(batch=1, q_heads=case.heads, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k, device=device)
    allowed = allowed[:1]
    if found.document_ids is not None:
        allowed = allowed & (found.document_ids[:, None] == found.document_ids[None, :])
    return allowed if bias is None else torch.where(allowed, bias.to(torch_dtype(case)), float("-inf"))


def _sdpa(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    attend = _torch(case, tensors[0].device)
    return Absent(BASELINE, attend) if isinstance(attend, str) else Peer(BASELINE, attend)


def _kernel(label: str, member: str) -> Callable[[Case, Inputs], Union[Peer, Absent]]:
    def make(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attend = _torch(case, tensors[0].device)
        if isinstance(attend, str):
            return Absent(label, attend)
        backend = getattr(SDPBackend, member)
        try:
            with torch.no_grad(), sdpa_kernel(backend):
                attend(*tensors)
        except RuntimeError as error:
            return Absent(label, str(error).splitlines()[0])
        return Peer(label, attend, lambda: sdpa_kernel(backend))

    return make


_FLASH, _CUDNN = _kernel("F.sdpa flash", "FLASH_ATTENTION"), _kernel("F.sdpa cuDNN", "CUDNN_ATTENTION")


def _flash(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    if not case.window and not case.documents:
        return _FLASH(case, tensors)
    from attnhub.bench import aten_peers

    return aten_peers.flash(case, tensors)


def _cudnn(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    if not case.documents or case.mode != "forward":
        return _CUDNN(case, tensors)
    from attnhub.bench import aten_peers

    return aten_peers.cudnn(case, tensors)


def _flex(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    from attnhub.bench.flex_peer import peer

    return peer(case, tensors)


def _onnxruntime(which: str) -> Callable[[Case, Inputs], Union[Peer, Absent]]:
    def made(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
        from attnhub.bench.onnxruntime_peer import peer

        return peer(case, tensors, which)

    return made


def _keys_outer(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    from attnhub.bench.keys_outer_peer import peer

    return peer(case, tensors)


def _portable(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    from attnhub.bench.portable_peer import peer

    return peer(case, tensors)


_MAKE: dict[str, Callable[[Case, Inputs], Union[Peer, Absent]]] = {
    "naive": _naive, "sdpa": _sdpa, "flash": _flash, "cudnn": _cudnn,
    "efficient": _kernel("F.sdpa efficient", "EFFICIENT_ATTENTION"), "flex": _flex, "v1": _keys_outer, "portable": _portable, "onnxruntime": _onnxruntime(""),
    "onnxruntime-mha": _onnxruntime("mha"), "onnxruntime-graph": _onnxruntime("graph"),
}  # fmt: skip


# -- attnhub -------------------------------------------------------------------------------------------------------------


def _backend(name: str, case: Case, tensors: Inputs, label: str = "") -> Union[Peer, Absent]:
    label = label or (f"attnhub {name}" if name else "attnhub")
    q, k, v = tensors if case.mode == "forward" else tuple(t.detach().requires_grad_() for t in tensors)
    try:
        attend, explain = _ours(case, tensors, name or None)
        decision: Decision = explain(q, k, v)
    except (TypeError, ValueError) as error:
        return Absent(label, str(error).splitlines()[0])
    if decision.chosen is None:
        verdict = decision.verdicts.get(name)
        codes = ", ".join(r.code.value for r in verdict.reasons) if isinstance(verdict, Rejected) else decision.why
        return Absent(label, codes)
    if name == "reference" and (why := _no_room(case, q.device)):
        return Absent(label, why)
    return Peer(label, attend, facts={"backend": decision.chosen, "backward_by": decision.backward})


def _ours(case: Case, tensors: Inputs, backend: Optional[str]) -> tuple[Attend, Callable[[Tensor, Tensor, Tensor], Decision]]:
    """(attnhub.attention at a case, attnhub.explain of the same call)."""
    found = parts(case, tensors[0].device)
    mask = found.mask
    settings: dict[str, Any] = {"softcap": case.softcap, "sinks": found.sinks, "varlen": found.varlen, "backend": backend}
    if case.page_size:
        cache = paged(tensors[1], tensors[2], case.page_size)

        def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # k and v lie in the cache.
            return cast(Tensor, attnhub.attention(q, mask=mask, kv_cache=cache, **settings))

        return step, lambda q, k, v: attnhub.explain(q, mask=mask, kv_cache=cache, **settings)
    if case.fp8:
        pairs = [quantised(t, case.kv_heads) for t in tensors]
        settings.update({f"{name}_descale": factor for name, (_, factor) in zip("qkv", pairs)})
        q8, k8, v8 = (small for small, _ in pairs)
        return (
            lambda q, k, v: cast(Tensor, attnhub.attention(q8, k8, v8, mask, **settings)),
            lambda q, k, v: attnhub.explain(q8, k8, v8, mask, **settings),
        )
    if found.varlen is not None:

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = cast(Tensor, attnhub.attention(_tokens(q), _tokens(k), _tokens(v), mask, **settings))
            return out.transpose(0, 1)[None]

        return packed, lambda q, k, v: attnhub.explain(_tokens(q), _tokens(k), _tokens(v), mask, **settings)
    if case.softcap or case.sinks:
        return (
            lambda q, k, v: cast(Tensor, attnhub.attention(q, k, v, mask, **settings)),
            lambda q, k, v: attnhub.explain(q, k, v, mask, **settings),
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cast(Tensor, attnhub.attention(q, k, v, mask, backend=backend))

    return attend, lambda q, k, v: attnhub.explain(q, k, v, mask, backend=backend)


def _tokens(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H, D], a view."""
    return x[0].transpose(0, 1)
