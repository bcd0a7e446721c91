"""Tensors to kernel arguments, and the launch through CuPy on torch's stream."""

from __future__ import annotations

import threading
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub import config
from attnhub.backend import Call, PrepareError
from attnhub.backends.cuda import compile, decode, hopper, nvrtc
from attnhub.backends.cuda.fields import FAR, LOG2E, SMALLEST_SCALE
from attnhub.backends.cuda.loading import Argument, CubinPlan, pointer, raw_stream
from attnhub.backends.cuda.params import LAYOUT
from attnhub.backends.cuda.variant import Variant, choose
from attnhub.layouts import empty_out
from attnhub.problem import Problem
from attnhub.reasons import Code, Reason

#: K and V of the heads that walk through their tiles together should stay in L2 (40 MB on an A100, 50 MB on an H100).
_SECTION_BYTES = 24 << 20


class _Here(threading.local):
    """Of one thread."""

    def __init__(self) -> None:
        self.argument = Argument(LAYOUT.size)


class CudaPlan(CubinPlan):
    """One compiled variant of the portable kernel."""

    def __init__(self, variant: Variant, cubin: str) -> None:
        super().__init__(cubin, variant.shared_bytes)
        self.variant = variant
        self._here = _Here()
        self._rows = variant.rows  # a computed property, too slow for each launch
        self._block = (variant.warps * 32, 1, 1)
        self._head_bytes = (variant.head_dim + variant.v_head_dim) * 2

    def _launch(self, call: Call, index: int) -> tuple[Tensor, Optional[Tensor]]:
        kernel = self._kernel(index)
        mask, varlen = call.mask, call.varlen
        q, k, v = call.q, call.k, call.v
        batch, q_heads, seqlen_q, _ = q.shape
        kv_heads, seqlen_k = k.shape[1], k.shape[2]
        out = empty_out(q, v.shape[3])
        lse = torch.empty((batch, q_heads, seqlen_q), dtype=torch.float32, device=q.device) if call.need_lse else None

        kept: list[Tensor] = []
        cu_seqlens_q = cu_seqlens_k = 0
        longest_q, blocks_of_heads = seqlen_q, batch * q_heads
        if varlen is not None:
            cu_seqlens_q, cu_seqlens_k = pointer(varlen.cu_seqlens_q, kept), pointer(varlen.cu_seqlens_k, kept)
            batch = varlen.cu_seqlens_q.shape[0] - 1
            longest_q = min(seqlen_q, varlen.max_seqlen_q)
            blocks_of_heads = (batch + 1) * q_heads  # one more for the tokens behind the last sequence
        q_tiles = max(1, -(-longest_q // self._rows))
        group = q_heads // kv_heads
        heads_per_section = 1
        if mask.causal:
            longest_k = seqlen_k if varlen is None else min(seqlen_k, varlen.max_seqlen_k)
            head_bytes = max(1, longest_k * self._head_bytes // group)
            heads_per_section = max(1, min(blocks_of_heads, _SECTION_BYTES // head_bytes))

        scale, softcap, alibi = call.softmax_scale, call.softcap, mask.alibi
        size = abs(scale)
        size = size if size > SMALLEST_SCALE else SMALLEST_SCALE
        # Written out, unlike the other plans' (fields.py): this is done at every call.
        q_strides, k_strides, v_strides, out_strides = q.stride(), k.stride(), v.stride(), out.stride()
        out_pointer = out.data_ptr()
        argument = self._here.argument
        LAYOUT.pack_into(
            argument.buffer, 0, q.data_ptr(), k.data_ptr(), v.data_ptr(), out_pointer, 0 if lse is None else lse.data_ptr(),
            cu_seqlens_q, cu_seqlens_k, pointer(mask.seqused_k, kept), pointer(mask.leftpad, kept), pointer(mask.prefix, kept),
            pointer(call.sinks, kept), pointer(alibi, kept),
            # The stride of a dimension of size 1 is arbitrary, and rows that do not exist still form (unread) addresses.
            q_strides[0], q_strides[1], q_strides[2] if seqlen_q > 1 else 0,
            k_strides[0], k_strides[1], k_strides[2] if seqlen_k > 1 else 0,
            v_strides[0], v_strides[1], v_strides[2] if seqlen_k > 1 else 0,
            out_strides[0], out_strides[1], out_strides[2],
            batch, q_heads, group, seqlen_q, seqlen_k, q_tiles, heads_per_section,
            mask.causal, mask.causal, mask.align == "top_left",
            min(mask.window[0], FAR), min(mask.window[1], FAR), min(mask.chunk, FAR),
            q_heads if alibi is not None and alibi.ndim == 2 else 0,
            scale < 0,
            not (out_strides[0] | out_strides[1] | out_strides[2]) & 7 and not out_pointer & 15,
            size * LOG2E, 2 * LOG2E * size / softcap if softcap else 0.0, softcap * LOG2E,
            0,
        )  # fmt: skip
        kernel.sized((q_tiles * blocks_of_heads, 1, 1), self._block, self._shared_bytes)(raw_stream(index), argument.parameters, 0)
        return out, lse

    def describe(self) -> dict[str, Any]:
        return self.variant.describe()


def toolkit_major() -> Optional[int]:
    """Major version of the CUDA that torch was built for."""
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def prepare(problem: Problem) -> CubinPlan:
    """Compiles (or finds in the cache) the variant for a problem, and loads it on the current device if it is of that kind.

    Raises `PrepareError`.
    """
    if decode.serves(problem):
        from attnhub.backends.cuda.decode_plan import DecodePlan

        def made(few: decode.DecodeVariant) -> DecodePlan:
            plan = DecodePlan(few, _cubin(few), made)
            _loaded(plan, problem)
            return plan

        return made(decode.choose(problem))
    if hopper.serves(problem):
        from attnhub.backends.cuda.hopper_plan import HopperPlan

        variant = hopper.choose(problem)
        return _loaded(HopperPlan(variant, _cubin(variant), lambda: _portable(problem)), problem)
    return _portable(problem)


def _portable(problem: Problem) -> CudaPlan:
    variant = choose(problem)
    plan = CudaPlan(variant, _cubin(variant))
    _loaded(plan, problem)
    return plan


def _cubin(variant: compile.Compilable) -> str:
    library = nvrtc.find(toolkit_major())
    if library is None:
        raise PrepareError(Reason(Code.NO_COMPILER, "NVRTC is not found"))
    try:
        return str(compile.cubin(variant, library, config.cache_dir() / "cuda"))
    except nvrtc.CompileError as error:
        raise PrepareError(Reason(Code.COMPILE_FAILED, str(error))) from error
    except OSError as error:
        raise PrepareError(
            Reason(Code.COMPILE_FAILED, f"the compiled kernel cannot be kept: {error}", "Set ATTNHUB_CACHE_DIR to a writable folder.")
        ) from error


def _loaded(plan: CubinPlan, problem: Problem) -> CubinPlan:
    try:
        if torch.cuda.get_device_capability() == tuple(problem.device.arch):
            plan.load(torch.cuda.current_device())
    except PrepareError:
        raise
    except Exception as error:  # CuPy raises CUDADriverError; its type cannot be named without importing CuPy
        raise PrepareError(Reason(Code.COMPILE_FAILED, f"the compiled kernel does not load: {type(error).__name__}: {error}")) from error
    return plan
