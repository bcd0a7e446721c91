"""What kernels are told of a call: its tensors under the names that kernels give them, all other arguments, and what tells two calls apart."""

from __future__ import annotations

import functools
import math
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.backend import Call, Descale
from attnhub.backends.triton import tiles as tiling
from attnhub.mask import FULL

_LARGEST = 2**30
Arguments = dict[str, Any]


def negated(call: Call) -> Call:
    """The same call with a scale that is positive: the kernels take the largest score before scaling it."""
    return Call(
        -call.q, call.k, call.v, call.mask, -call.softmax_scale, call.softcap, call.sinks, call.dropout_p, call.rng, call.varlen, call.block_table,
        call.need_lse,
    )  # fmt: skip


def kernel_inputs(call: Call) -> dict[str, Tensor]:
    """The call's tensors as kernels take them, by the names that kernels give them."""
    inputs = {"q": call.q, "k": call.k, "v": call.v}
    mask, varlen = call.mask, call.varlen
    if mask.held:
        for name in ("seqused_k", "leftpad", "bias", "alibi", *(("prefix",) if mask.causal else ())):
            x = getattr(mask, name)
            if x is not None:
                # A bias is read by its strides, the others as if dense.
                inputs[name] = x if name == "bias" else x.contiguous()
        for name in ("segments", *(("blocks",) if mask.causal else ())):
            ids = getattr(mask, name)
            if ids is not None:
                inputs[name + "_q"], inputs[name + "_k"] = ids[0].contiguous(), ids[1].contiguous()
        if mask.bool_mask is not None:
            inputs["bool_mask"] = mask.bool_mask.view(torch.uint8)
        if mask.block_sparse is not None:
            inputs["block_sparse"] = mask.block_sparse.contiguous().view(torch.uint8)
    if call.descale is not None:
        inputs.update((f"{name}_descale", x) for name, x in call.descale._asdict().items() if x is not None)
    if call.sinks is not None:
        inputs["sinks"] = call.sinks.contiguous()
    if call.rng is not None:
        inputs["rng"] = call.rng
    if varlen is not None:
        inputs["cu_q"] = varlen.cu_seqlens_q.contiguous()
        if call.block_table is None:
            inputs["cu_k"] = varlen.cu_seqlens_k.contiguous()
    if call.block_table is not None:
        inputs["block_table"] = call.block_table.contiguous()
    return inputs


def call_key(call: Call, inputs: dict[str, Tensor]) -> tuple[tuple[Any, ...], list[int]]:
    """(all that the launches of a call depend on, but for the addresses of its tensors; those addresses)."""
    q, mask, varlen = call.q, call.mask, call.varlen
    key: list[Any] = [
        q.get_device(), precision(q, call.v.shape[3], max_lengths(call)), call.need_lse, call.softmax_scale, call.softcap, call.dropout_p,
        None if mask is FULL else mask.structure,
        None if varlen is None else (varlen.max_seqlen_q, varlen.max_seqlen_k),
    ]  # fmt: skip
    addresses = []
    for name, x in inputs.items():
        address = x.data_ptr()
        addresses.append(address)
        # Of a contiguous tensor, the shape says the strides (of dimensions above size 1; others are read nowhere).
        key += (name, x.dtype, x.shape, x.is_contiguous() or x.stride(), address % 16 == 0)
    return tuple(key), addresses


def kernel_arguments(call: Call, interpreted: bool) -> Arguments:
    """What all kernels take: tensors, strides, lengths, the mask in the form that `kernels.mask` reads. softmax_scale is not negative,
    but for fp8.
    """
    q, k, v, mask, varlen = call.q, call.k, call.v, call.mask, call.varlen
    heads, head_dim = q.shape[1], q.shape[3]
    scale = float(call.softmax_scale)
    fp8 = q.dtype == torch.float8_e4m3fn
    sequences = q.shape[0] if varlen is None else varlen.cu_seqlens_q.shape[0] - 1
    max_q, max_k = max_lengths(call)
    left, right = mask.window
    prefix = mask.prefix if mask.causal else None
    blocks = mask.blocks if mask.causal else None
    widened = prefix is not None or blocks is not None
    if mask.causal and not widened:
        right = 0
    if right >= 0 and max_q == 1 and mask.align == "bottom_right":
        # A single query stands at the last key.
        right = -1
    mask_all = mask.segments is not None or blocks is not None or mask.bool_mask is not None or mask.bias is not None
    limited = left >= 0 or right >= 0 or mask.chunk > 0 or widened
    strides = {**strides_of("q", q), **strides_of("k", k), **strides_of("v", v)}
    # The smallest product of fp8 operands takes 32 dimensions.
    product = precision(q, v.shape[3], (max_q, max_k))
    parts = {"most": tiling.TF32X3_PART} if product == "tf32x3" else {}
    width = tiling.widths(head_dim, v.shape[3], 32 if fp8 else 16, 16 if interpreted else tiling.LEAST_REST, **parts)
    return {
        "q": q, "k": k, "v": v, **strides,
        "scale": scale if call.softcap or mask.bias is not None else scale * math.log2(math.e), "softcap": float(call.softcap),
        "cu_q": None if varlen is None else varlen.cu_seqlens_q,
        "cu_k": None if varlen is None or call.block_table is not None else varlen.cu_seqlens_k,
        "seqused_k": mask.seqused_k, "leftpad": mask.leftpad, "prefix": prefix,
        "sequences": sequences, "max_q": max_q, "max_k": max_k, "tokens_q": q.shape[2], "tokens_k": k.shape[2],
        "left": min(left, _LARGEST), "right": min(right, _LARGEST), "chunk": min(mask.chunk, _LARGEST),
        **_ids("segments", mask.segments), **_ids("blocks", blocks),
        **broadcast("bool", "bool_mask", None if mask.bool_mask is None else mask.bool_mask.view(torch.uint8)),
        **broadcast("bias", "bias", mask.bias),
        "alibi": mask.alibi, "alibi_stride_b": 0 if mask.alibi is None or mask.alibi.ndim == 1 or mask.alibi.shape[0] == 1 else mask.alibi.shape[1],
        "block_sparse": None, "block_size": mask.block_size,
        **_dropout(call),
        **_factors(call),
        "Q_HEADS": heads, "GROUP": heads // k.shape[1], "HEAD_DIM": head_dim, "V_HEAD_DIM": v.shape[3],
        "BLOCK_D": width.main, "REST_D": width.rest, "BLOCK_DV": width.v_main, "REST_DV": width.v_rest,
        "LEFT": left >= 0, "RIGHT": right >= 0, "CHUNK": mask.chunk > 0, "CAUSAL": widened, "TOP_LEFT": mask.align == "top_left",
        "LEFT_PHASE": not mask_all and (left >= 0 or mask.chunk > 0 or mask.leftpad is not None),
        "MASK_ALL": mask_all, "MASK_VALUES": mask_all or limited, "SOFTCAP": call.softcap != 0.0, "NATURAL": mask.bias is not None,
        "WIDE": max(strides.values()) >= 2**23, "PRECISION": product, "UPCAST": interpreted and q.dtype == torch.bfloat16,
    }  # fmt: skip


def strides_of(name: str, x: Tensor) -> dict[str, int]:
    """Strides of batch, head and token. That of a dimension of size 1 is arbitrary in torch, and 0 here."""
    return {f"{name}_stride_{axis}": x.stride(dim) if x.shape[dim] > 1 else 0 for dim, axis in enumerate("bhs")}


def _factors(call: Call) -> Arguments:
    """Factors of fp8 inputs, and whether the inputs are in fp8."""
    found: Arguments = {"FP8": call.q.dtype == torch.float8_e4m3fn}
    for name, x in zip(("q_descale", "k_descale", "v_descale"), call.descale or Descale()):
        found[name] = x
        found[f"{name}_stride_b"], found[f"{name}_stride_h"] = (0, 0) if x is None else x.stride()
    return found


def _ids(name: str, ids: Optional[tuple[Tensor, Tensor]]) -> Arguments:
    q, k = (None, None) if ids is None else (ids[0].contiguous(), ids[1].contiguous())
    return {
        f"{name}_q": q, f"{name}_k": k,
        f"{name}_q_stride": 0 if q is None or q.shape[0] == 1 else q.stride(0), f"{name}_k_stride": 0 if k is None or k.shape[0] == 1 else k.stride(0),
    }  # fmt: skip


def broadcast(name: str, argument: str, x: Optional[Tensor]) -> Arguments:
    """A tensor that broadcasts to [B, Hq, Sq, Sk], with stride 0 where it does."""
    strides = {f"{name}_stride_{axis}": 0 if x is None or x.shape[dim] == 1 else x.stride(dim) for dim, axis in enumerate("bhqk")}
    return {argument: x, **strides}


def _dropout(call: Call) -> Arguments:
    """What `kernels.dropout` takes. The threshold, 32 bits unsigned, goes as the int32 of the same bits: one type whatever p is."""
    if not call.dropout_p:
        return {"rng": None, "drop_below": 0, "keep_scale": 1.0}
    below = int(call.dropout_p * 2**32)
    return {"rng": call.rng, "drop_below": below if below < 2**31 else below - 2**32, "keep_scale": 1.0 / (1.0 - call.dropout_p)}


def last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def max_lengths(call: Call) -> tuple[int, int]:
    """(queries, keys) of the longest sequence."""
    varlen = call.varlen
    max_q, max_k = (call.q.shape[2], call.k.shape[2]) if varlen is None else (varlen.max_seqlen_q, varlen.max_seqlen_k)
    return max_q, max_k if call.block_table is None else call.block_table.shape[1] * call.k.shape[2]


def precision(q: Tensor, v_head_dim: int, lengths: tuple[int, int]) -> str:
    """How fp32 operands are multiplied: in tf32 if torch's own products may, else as a sum of three such products, or exactly."""
    if q.dtype != torch.float32 or q.device.type != "cuda" or torch.version.hip:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # The old switch raises once the new one has been used; the new one follows both.
    setting = getattr(matmul, "fp32_precision", None)
    if setting == "tf32" or (setting is None and matmul.allow_tf32):
        return "tf32"
    return "tf32x3" if tiling.tf32x3("nvidia", arch(q.get_device()), q.shape[3], v_head_dim, lengths) else "ieee"


@functools.lru_cache(maxsize=64)
def arch(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
