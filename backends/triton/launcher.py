"""From a call to kernel launches: arguments, tiles, grids, and smaller tiles where the first choice does not fit."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources

from attnhub import config
from attnhub.backend import Call, Gradients, Needs, Plan, PrepareError
from attnhub.backends.triton import tiles as tiling
from attnhub.backends.triton.block_sparse import block_sparse
from attnhub.backends.triton.kernels.backward import delta_kernel, grad_kv_kernel, grad_q_kernel
from attnhub.backends.triton.kernels.combine import combine_kernel
from attnhub.backends.triton.kernels.forward import forward_kernel
from attnhub.backends.triton.kernels.grad_bias import grad_bias_kernel
from attnhub.backends.triton.launch import launch
from attnhub.backends.triton.tiles import Tiles
from attnhub.layouts import empty_out
from attnhub.mask import Mask
from attnhub.problem import Problem
from attnhub.reasons import Code, Reason

#: Queries up to this length are packed: all heads of a K/V head's group in one block of rows.
_PACKED_SEQLEN_Q = 16
_COMBINE_ROWS = 4
_DELTA_ROWS = 16
_LARGEST = 2**30
_Arguments = dict[str, Any]
#: For kernels that work row by row: only the warps and stages count.
_ROW_TILES = Tiles(0, 0, 4, 3)


class TritonPlan(Plan):
    """Kernels for one class of problems. Tiles shrink, once and for good, where the device turns out too small for them."""

    def __init__(self, problem: Problem) -> None:
        self._interpreted = config.triton_interpret()
        if self._interpreted:
            self._tiles = tiling.interpreted()
        else:
            item = 4 if problem.q_dtype == "float32" else 2
            limit = tiling.shared_memory(problem.device.vendor, problem.device.arch)
            self._tiles = {role: tiling.choices(role, problem.head_dim, problem.v_head_dim, item, limit) for role in tiling.ROLES}

    def describe(self) -> dict[str, Any]:
        return {"kernel": "triton", **{role: vars(choices[0]) for role, choices in self._tiles.items() if choices}}

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        q = call.q
        with _on_device(q):
            out = empty_out(q, call.v.shape[-1])
            lse = q.new_empty(q.shape[:3], dtype=torch.float32) if call.need_lse else None
            arguments = _arguments(call, self._interpreted)
            del arguments["negated"]
            group = arguments["GROUP"]
            pack = group > 1 and arguments["max_q"] <= _PACKED_SEQLEN_Q
            rows = arguments["max_q"] * (group if pack else 1)
            role = "decode" if rows <= 64 else "forward"
            self._try(role, lambda tiles: self._forward(call, arguments, tiles, pack, rows, out, lse))
        return out, lse

    def _forward(self, call: Call, arguments: _Arguments, tiles: Tiles, pack: bool, rows: int, out: Tensor, lse: Optional[Tensor]) -> None:
        block_m = tiles.block_m
        if rows <= 64 and not self._interpreted:
            block_m = max(block_m, min(tiling.padded(rows), 64 if arguments["BLOCK_DV"] < 512 else 32))
        heads = arguments["Q_HEADS"] // (arguments["GROUP"] if pack else 1)
        programs = _cdiv(rows, block_m) * heads * (arguments["sequences"] + (arguments["cu_q"] is not None))
        splits = 1
        if rows <= 64 or pack:
            splits = tiling.split_count(programs, _cdiv(arguments["max_k"], tiles.block_n), _processors(call.q.device, self._interpreted))
        target, target_lse = out, lse
        if splits > 1:
            target = out.new_empty((splits, *out.shape), dtype=torch.float32)
            target_lse = out.new_empty((splits, *out.shape[:3]), dtype=torch.float32)
        block_table = call.block_table
        arguments = {**arguments, **block_sparse(call.mask, arguments, block_m, tiles.block_n, group=arguments["GROUP"] if pack else 1)}
        launch(
            forward_kernel, programs * splits, tiles,
            **arguments,
            out=target, lse=target_lse, sinks=call.sinks, **_strides("out", target[0] if splits > 1 else target),
            block_table=block_table, table_stride=0 if block_table is None else block_table.stride(0),
            splits=splits, PAGE_SIZE=0 if block_table is None else call.k.shape[2], PACK=pack, SPLIT=splits > 1,
            BLOCK_M=block_m, BLOCK_N=tiles.block_n,
        )  # fmt: skip
        if splits > 1:
            count = math.prod(out.shape[:3])
            launch(
                combine_kernel, _cdiv(count, _COMBINE_ROWS), _ROW_TILES,
                partial_out=target, partial_lse=target_lse, out=out, lse=lse, sinks=call.sinks, **_strides("out", out),
                rows=count, splits=splits, tokens_q=arguments["tokens_q"],
                Q_HEADS=arguments["Q_HEADS"], V_HEAD_DIM=arguments["V_HEAD_DIM"], BLOCK_DV=tiling.padded(arguments["V_HEAD_DIM"]), BLOCK_R=_COMBINE_ROWS,
            )  # fmt: skip

    def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
        q, k, v = call.q, call.k, call.v
        with _on_device(q):
            grad_out, out, lse = _last_dense(grad_out), _last_dense(out), lse.contiguous()
            if grad_lse is not None:
                grad_lse = grad_lse.to(torch.float32).contiguous()
            arguments = _arguments(call, self._interpreted)
            negated = arguments.pop("negated")
            delta = torch.empty_like(lse)
            count = lse.numel()
            launch(
                delta_kernel, _cdiv(count, _DELTA_ROWS), _ROW_TILES,
                out=out, grad_out=grad_out, grad_lse=grad_lse, delta=delta, **_strides("out", out), **_strides("grad", grad_out),
                rows=count, tokens_q=arguments["tokens_q"],
                Q_HEADS=arguments["Q_HEADS"], V_HEAD_DIM=arguments["V_HEAD_DIM"], BLOCK_DV=tiling.padded(arguments["V_HEAD_DIM"]), BLOCK_R=_DELTA_ROWS,
            )  # fmt: skip
            arguments.update(grad_out=grad_out, lse=lse, delta=delta, softmax_scale=abs(float(call.softmax_scale)), **_strides("grad_out", grad_out))
            grad_q = grad_k = grad_v = grad_bias = grad_sinks = None
            if needs.k or needs.v:
                grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
                outputs = {"grad_k": grad_k, "grad_v": grad_v, **_strides("grad_k", grad_k), **_strides("grad_v", grad_v)}
                self._try("grad_kv", functools.partial(_grad_kv, call.mask, {**arguments, **outputs}))
            if needs.q:
                grad_q = torch.empty_like(q)
                outputs = {"grad_q": grad_q, **_strides("grad_q", grad_q)}
                self._try("grad_q", functools.partial(_grad_q, call.mask, {**arguments, **outputs}))
                if negated:
                    grad_q.neg_()
            if needs.bias and call.mask.bias is not None:
                grad_bias = torch.empty(call.mask.bias.shape, dtype=call.mask.bias.dtype, device=q.device)
                self._try("grad_bias", functools.partial(_grad_bias, call.mask, {**arguments, **_dense("grad_bias", "grad_bias", grad_bias)}))
            if needs.sinks and call.sinks is not None:
                # The sink is a key with value 0: dS = P * (0 - delta). Tokens outside of all sequences have lse -inf.
                share = torch.exp(call.sinks[None, :, None] - lse)
                grad_sinks = -torch.where(lse == -math.inf, 0.0, share * delta).sum((0, 2)).to(call.sinks.dtype)
        return Gradients(grad_q, grad_k if needs.k else None, grad_v if needs.v else None, grad_bias, grad_sinks)

    def _try(self, role: str, launch: Callable[[Tiles], None]) -> None:
        """Launch with the role's tiles. Triton compiles, and finds out what does not fit, before anything runs."""
        choices = self._tiles[role]
        while choices:
            tiles = choices[0]
            try:
                launch(tiles)
                return
            except OutOfResources as error:
                if len(choices) == 1:
                    raise PrepareError(Reason(Code.OUT_OF_RESOURCES, f"{role} kernel with its smallest tiles: {error}")) from error
                if choices[0] is tiles:
                    del choices[0]
            except CompilationError as error:
                raise PrepareError(Reason(Code.COMPILE_FAILED, f"{role} kernel: {error}")) from error
        raise PrepareError(Reason(Code.OUT_OF_RESOURCES, f"{role} kernel: even the smallest tiles pass this device's shared memory"))


def _grad_kv(mask: Mask, arguments: _Arguments, tiles: Tiles) -> None:
    sequences = arguments["sequences"] + (arguments["cu_q"] is not None)
    programs = _cdiv(arguments["max_k"], tiles.block_n) * (arguments["Q_HEADS"] // arguments["GROUP"]) * sequences
    arguments = {**arguments, **block_sparse(mask, arguments, tiles.block_m, tiles.block_n, by_keys=True)}
    launch(grad_kv_kernel, programs, tiles, **arguments, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n)


def _grad_q(mask: Mask, arguments: _Arguments, tiles: Tiles) -> None:
    sequences = arguments["sequences"] + (arguments["cu_q"] is not None)
    programs = _cdiv(arguments["max_q"], tiles.block_m) * arguments["Q_HEADS"] * sequences
    arguments = {**arguments, **block_sparse(mask, arguments, tiles.block_m, tiles.block_n)}
    launch(grad_q_kernel, programs, tiles, **arguments, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n)


def _grad_bias(mask: Mask, arguments: _Arguments, tiles: Tiles) -> None:
    batch, heads, rows, keys = arguments["grad_bias"].shape
    one = {"ONE_B": batch == 1, "ONE_H": heads == 1, "ONE_Q": rows == 1, "ONE_K": keys == 1}
    programs = batch * heads * _cdiv(rows, tiles.block_m) * _cdiv(keys, tiles.block_n)
    arguments = {**arguments, **block_sparse(mask, arguments, tiles.block_m, tiles.block_n)}
    launch(grad_bias_kernel, programs, tiles, **arguments, **one, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n)


def _arguments(call: Call, interpreted: bool) -> _Arguments:
    """What all kernels take: tensors, strides, lengths, the mask in the form that `kernels.mask` reads."""
    q, k, v, mask, varlen = call.q, call.k, call.v, call.mask, call.varlen
    heads, head_dim = q.shape[1], q.shape[3]
    scale = float(call.softmax_scale)
    negated = scale < 0
    if negated:
        # The kernels take the largest score before scaling it.
        q, scale = -q, -scale
    if varlen is None:
        sequences, max_q, max_k = q.shape[0], q.shape[2], k.shape[2]
    else:
        sequences, max_q, max_k = varlen.cu_seqlens_q.shape[0] - 1, varlen.max_seqlen_q, varlen.max_seqlen_k
    if call.block_table is not None:
        max_k = call.block_table.shape[1] * k.shape[2]

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
    strides = {**_strides("q", q), **_strides("k", k), **_strides("v", v)}
    width = tiling.widths(head_dim, v.shape[3])
    return {
        "negated": negated, "q": q, "k": k, "v": v, **strides,
        "scale": scale if call.softcap or mask.bias is not None else scale * math.log2(math.e), "softcap": float(call.softcap),
        "cu_q": None if varlen is None else varlen.cu_seqlens_q,
        "cu_k": None if varlen is None or call.block_table is not None else varlen.cu_seqlens_k,
        "seqused_k": mask.seqused_k, "leftpad": mask.leftpad, "prefix": prefix,
        "sequences": sequences, "max_q": max_q, "max_k": max_k, "tokens_q": q.shape[2], "tokens_k": k.shape[2],
        "left": min(left, _LARGEST), "right": min(right, _LARGEST), "chunk": min(mask.chunk, _LARGEST),
        **_ids("segments", mask.segments), **_ids("blocks", blocks),
        **_dense("bool", "bool_mask", None if mask.bool_mask is None else mask.bool_mask.view(torch.uint8)),
        **_dense("bias", "bias", mask.bias),
        "alibi": mask.alibi, "alibi_stride_b": 0 if mask.alibi is None or mask.alibi.ndim == 1 or mask.alibi.shape[0] == 1 else mask.alibi.stride(0),
        **_dropout(call),
        "Q_HEADS": heads, "GROUP": heads // k.shape[1], "HEAD_DIM": head_dim, "V_HEAD_DIM": v.shape[3],
        "BLOCK_D": width.main, "REST_D": width.rest, "BLOCK_DV": width.v_main, "REST_DV": width.v_rest,
        "LEFT": left >= 0, "RIGHT": right >= 0, "CHUNK": mask.chunk > 0, "CAUSAL": widened, "TOP_LEFT": mask.align == "top_left",
        "LEFT_PHASE": not mask_all and (left >= 0 or mask.chunk > 0 or mask.leftpad is not None), "MASK_ALL": mask_all, "MASK_VALUES": mask_all or limited, "SOFTCAP": call.softcap != 0.0, "NATURAL": mask.bias is not None,
        "WIDE": max(strides.values()) >= 2**23, "PRECISION": _precision(q), "UPCAST": interpreted and q.dtype == torch.bfloat16,
    }  # fmt: skip


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """Strides of batch, head and token. That of a dimension of size 1 is arbitrary in torch, and 0 here."""
    return {f"{name}_stride_{axis}": x.stride(dim) if x.shape[dim] > 1 else 0 for dim, axis in enumerate("bhs")}


def _ids(name: str, ids: Optional[tuple[Tensor, Tensor]]) -> _Arguments:
    q, k = (None, None) if ids is None else (ids[0].contiguous(), ids[1].contiguous())
    return {
        f"{name}_q": q, f"{name}_k": k,
        f"{name}_q_stride": 0 if q is None or q.shape[0] == 1 else q.stride(0), f"{name}_k_stride": 0 if k is None or k.shape[0] == 1 else k.stride(0),
    }  # fmt: skip


def _dense(name: str, argument: str, x: Optional[Tensor]) -> _Arguments:
    """A tensor that broadcasts to [B, Hq, Sq, Sk], with stride 0 where it does."""
    strides = {f"{name}_stride_{axis}": 0 if x is None or x.shape[dim] == 1 else x.stride(dim) for dim, axis in enumerate("bhqk")}
    return {argument: x, **strides}


def _dropout(call: Call) -> _Arguments:
    """What `kernels.dropout` takes. The threshold, 32 bits unsigned, goes as the int32 of the same bits: one type whatever p is."""
    if not call.dropout_p:
        return {"rng": None, "drop_below": 0, "keep_scale": 1.0}
    below = int(call.dropout_p * 2**32)
    return {"rng": call.rng, "drop_below": below if below < 2**31 else below - 2**32, "keep_scale": 1.0 / (1.0 - call.dropout_p)}


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _precision(q: Tensor) -> str:
    """How fp32 operands are multiplied: exactly, unless torch's own matrix products may use tf32 on this device."""
    if q.dtype != torch.float32 or q.device.type != "cuda" or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device, interpreted: bool) -> int:
    """Multiprocessors of the device. The interpreter pretends to a few, so that short queries are split there too."""
    if interpreted:
        return 8
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' own."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    if x.device.type == "xpu":
        return torch.xpu.device(x.device)
    return contextlib.nullcontext()
