"""FlexAttention as a peer: each part of a mask as the function that its users write, compiled for the case's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor

from attnhub.bench.cases import SPARSE_BLOCK, Case
from attnhub.bench.parts import Parts, parts
from attnhub.bench.peers import Absent, Inputs, Peer, first_line

LABEL = "FlexAttention"


def peer(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    """The peer, compiled, or why it is absent."""
    device = tensors[0].device
    try:
        import torch._functorch.config as functorch

        # Dynamo compiles one function for a few shapes only and then runs it uncompiled: each case starts afresh.
        torch.compiler.reset()
        # A backward pass is timed again and again on one graph, which buffers given away would not survive.
        functorch.donated_buffer = False
        attend = _compiled(case, parts(case, device), device)
        with torch.no_grad():
            attend(*tensors)
    except Exception as error:
        # No compiler, no Triton, a shape that its templates lack: each has its own exception.
        return Absent(LABEL, first_line(error))
    return Peer(LABEL, attend)


def _compiled(case: Case, found: Parts, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    keep, score = _mask_mod(case, found), _score_mod(case, found)
    block_mask = None if keep is None else create_block_mask(keep, None, None, case.seqlen_q, case.seqlen_k, device=str(device))
    gqa, sinks = case.heads != case.kv_heads, found.sinks
    compiled: Any = torch.compile(flex_attention if sinks is None else _with_sinks, dynamic=False)  # type: ignore[call-overload]
    if sinks is None:
        return lambda q, k, v: compiled(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=gqa)
    return lambda q, k, v: compiled(q, k, v, sinks, block_mask, gqa)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, block_mask: Any, gqa: bool) -> Tensor:
    """The sink is one more term of the denominator: the output shrinks by the part that it takes."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    found: Any = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
    out, aux = found
    scaled: Tensor = out * torch.sigmoid(aux.lse - sinks[None, :, None])[..., None].to(out.dtype)
    return scaled


def _mask_mod(case: Case, found: Parts) -> Optional[Callable[..., Tensor]]:
    """The function (b, h, i, j) that says which pairs attend; None if all do."""
    causal, window, prefix, ids, kept = case.causal and case.seqlen_q > 1, case.window, case.prefix, found.document_ids, found.mask.block_sparse
    if kept is not None:
        blocks = kept[0, 0]

        def sparse(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return blocks[i // SPARSE_BLOCK, j // SPARSE_BLOCK]

        return sparse
    if ids is not None:
        return lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j) if causal else ids[i] == ids[j]
    if window:
        return lambda b, h, i, j: (i >= j) & (i - j < window)
    if prefix:
        return lambda b, h, i, j: (i >= j) | (j < prefix)
    return (lambda b, h, i, j: i >= j) if causal else None


def _score_mod(case: Case, found: Parts) -> Optional[Callable[..., Tensor]]:
    """The function (score, b, h, i, j) that gives another score; None if none changes."""
    if case.softcap:
        cap = case.softcap
        return lambda score, b, h, i, j: cap * torch.tanh(score / cap)
    if found.mask.alibi is not None:
        slopes = found.mask.alibi
        if case.causal:
            # No key lies behind its query.
            return lambda score, b, h, i, j: score + slopes[h] * (j - i)
        return lambda score, b, h, i, j: score - slopes[h] * (j - i).abs()
    if found.mask.bias is not None:
        bias = found.mask.bias[0]
        return lambda score, b, h, i, j: score + bias[h, i, j]
    return None
