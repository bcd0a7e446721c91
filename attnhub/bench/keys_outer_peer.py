"""The first FlashAttention schedule in Triton as a peer, "triton v1": what users of comparisons of v1 and v2 want to see beside both."""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor

from attnhub import config
from attnhub.bench.cases import Case
from attnhub.bench.peers import Absent, Inputs, Peer

LABEL = "triton v1"
_DTYPES = ("float16", "bfloat16", "float32")
_LARGEST_HEAD_DIM = 128
_WARPS = 4


def peer(case: Case, tensors: Inputs) -> Union[Peer, Absent]:
    """The peer, or why it is absent."""
    if case.mode != "forward":
        return Absent(LABEL, "it has no backward")
    if case.heads != case.kv_heads or case.head_dim > _LARGEST_HEAD_DIM or case.dtype not in _DTYPES or case.seqlen_q == 1:
        return Absent(LABEL, f"it takes prefill of ungrouped heads, head_dim up to {_LARGEST_HEAD_DIM}, {', '.join(_DTYPES)}")
    if tensors[0].device.type != "cuda" and not config.triton_interpret():
        return Absent(LABEL, "it runs on GPUs")
    try:
        import triton.language  # noqa: F401
    except Exception as error:
        return Absent(LABEL, f"importing triton fails: {error!r}")
    return Peer(LABEL, lambda q, k, v: attend(q, k, v, case.causal), differentiable=False)


def blocks(head_dim: int, item: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N). In fp32 the operands of the products live in registers, so that blocks are small."""
    if item == 4:
        return (32, 32) if head_dim <= 64 else (16, 32)
    return 64, 64


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for contiguous q, k, v [B, H, S, D] of fp16, bf16 or fp32, D at most 128; causal needs Sq == Sk."""
    from attnhub.backends.triton import arguments
    from attnhub.backends.triton.kernels.keys_outer import keys_outer_kernel
    from attnhub.backends.triton.tiles import padded

    batch, heads, seqlen_q, head_dim = q.shape
    interpreted = config.triton_interpret()
    block_m, block_n = (16, 16) if interpreted else blocks(head_dim, q.element_size())
    out = torch.empty_like(q)
    running_out = out if q.dtype == torch.float32 else torch.empty(q.shape, dtype=torch.float32, device=q.device)
    running: Any = torch.empty(2, batch * heads, seqlen_q, dtype=torch.float32, device=q.device)
    tf32 = arguments.precision(q, head_dim, (seqlen_q, k.shape[2])) == "tf32"
    keys_outer_kernel[(batch * heads,)](
        q, k, v, out, running_out, running[0], running[1], head_dim**-0.5, seqlen_q, k.shape[2],
        HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal,
        PRECISION="tf32" if tf32 else "ieee", UPCAST=interpreted and q.dtype == torch.bfloat16, num_warps=_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out
