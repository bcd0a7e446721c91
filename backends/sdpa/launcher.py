"""Plans on F.scaled_dot_product_attention, and on tiled maths for what it cannot express."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from attnhub import dense
from attnhub.backend import Call, Gradients, Needs, Plan, Repeat
from attnhub.backends.reference import maths
from attnhub.backends.sdpa.backward import all_heads, flash_backward, torch_deterministic
from attnhub.backends.sdpa.blocks import BLOCK_ELEMENTS, MOST_HEADS, row_blocks, without_padding
from attnhub.layouts import in_order, lse_dtype, out_strides
from attnhub.problem import Feature, Problem

#: torch's own F.scaled_dot_product_attention, whoever may have put a function of theirs there (`attnhub.replace_sdpa` does).
torch_sdpa = torch._C._nn.scaled_dot_product_attention
#: Beyond F.scaled_dot_product_attention: softcap and sinks change the maths, dropout there draws its own random numbers
#: (ours is shared by all backends), and packed or paged K/V are layouts that it lacks.
_NOT_EXPRESSIBLE = frozenset({Feature.SOFTCAP, Feature.SINKS, Feature.DROPOUT, Feature.VARLEN, Feature.PAGED})
#: Expressible without a dense mask.
_MASKLESS = frozenset({Feature.GQA, Feature.DV_DIFFERS, Feature.CAUSAL_TOP_LEFT, Feature.CAUSAL_BOTTOM_RIGHT, Feature.DETERMINISTIC})

#: Far below any score, and far enough above the smallest number for a factor of log2(e). fp16 masks are not that small.
_LEAST_BIAS = -1e30

#: Mask parts that torch's kernels take as a dense mask only.
WRITTEN_OUT = frozenset(
    {Feature.SEQLENS, Feature.LEFTPAD, Feature.WINDOW, Feature.CHUNK, Feature.PREFIX, Feature.SEGMENTS, Feature.ALIBI, Feature.BLOCK_SPARSE}
)


def expressible(problem: Problem) -> bool:
    """Whether torch's kernel serves the forward."""
    if _too_many_heads(problem):
        return False
    return not problem.features & (_NOT_EXPRESSIBLE | {Feature.LSE}) or _has_lse_kernel(problem)


def _too_many_heads(problem: Problem) -> bool:
    return problem.device.type == "cuda" and problem.batch * problem.q_heads > MOST_HEADS


def plan(problem: Problem) -> Plan:
    """The plan for a problem class."""
    if problem.features & _NOT_EXPRESSIBLE or _too_many_heads(problem):
        return TiledPlan(problem)
    # torch's autograd asks torch's own switch alone whether a backward has to be repeatable; `TiledPlan.backward` can set it.
    own_backward = problem.features & {Feature.BIAS_GRAD, Feature.LSE_GRAD} or _repeatable(problem)
    if problem.need_backward and not own_backward:
        return TrainingPlan(problem)
    if Feature.LSE in problem.features:
        return LsePlan(problem) if _has_lse_kernel(problem) else TiledPlan(problem)
    return TorchPlan(problem)


def _contiguous(call: Call) -> bool:
    return call.q.is_contiguous() and call.k.is_contiguous() and call.v.is_contiguous()


def _repeatable(problem: Problem) -> bool:
    """Whether repeatable results were asked for where torch's kernels do not give them anyway."""
    return Feature.DETERMINISTIC in problem.features and problem.device.type != "cpu"


class TiledPlan(Plan):
    """The definition over blocks of rows: memory linear in the sequence length."""

    def __init__(self, problem: Problem) -> None:
        self._repeatable = _repeatable(problem)

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        return maths.forward(call, _block_rows(call), torch.promote_types(call.q.dtype, torch.float32), exact_nan=False)

    def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
        with torch_deterministic() if self._repeatable else nullcontext():
            fast = flash_backward(call, grad_out, grad_lse, out, lse, needs)
        if fast is not None:
            return fast
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        return maths.backward(call, grad_out, grad_lse, out, lse, needs, _block_rows(call), dtype)

    def describe(self) -> dict[str, Any]:
        return {"kernel": "tiled torch maths, fp32"}


class TorchPlan(TiledPlan):
    """F.scaled_dot_product_attention, over blocks of rows where the mask is structure that has to be made dense."""

    def __init__(self, problem: Problem) -> None:
        TiledPlan.__init__(self, problem)
        self._maskless = problem.features <= _MASKLESS | {Feature.LSE}
        # enable_gqa reads K/V at 2 to 16% of the read bandwidth in decode on CPU; the same heads as rows of one K/V head are 2-12 times faster.
        # On an H200 it is the other way round, several times at batch 1: torch's CUDA kernels split long K/V for single rows only.
        self._fold_heads = Feature.GQA in problem.features and problem.seqlen_q == 1 and problem.device.type == "cpu"
        self._gqa = Feature.GQA in problem.features
        self._dv_differs = Feature.DV_DIFFERS in problem.features
        self._top_left = Feature.CAUSAL_TOP_LEFT in problem.features
        self._as_they_are = not self._gqa and not self._dv_differs
        # On CPU torch's kernel keeps the contract's memory order where it gets the tensors as they are.
        self._in_order = problem.device.type == "cpu" and self._as_they_are
        self._heads_as_batch = False

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        q, k, v, mask = call.q, call.k, call.v, call.mask
        if self._maskless:
            causal = mask.causal
            if causal and not self._top_left and q.shape[2] == 1:
                causal = False
            if not causal or self._top_left or q.shape[2] == k.shape[2]:
                if self._in_order:
                    return torch_sdpa(q, k, v, None, 0.0, causal, scale=call.softmax_scale), None
                if self._heads_as_batch and _contiguous(call):
                    return self._by_heads(q, k, v, causal, call.softmax_scale), None
                out = self._torch(q, k, v, None, causal, call.softmax_scale)
                if out.stride() == out_strides(q, v.shape[3]):
                    return out, None
                self._heads_as_batch = self._as_they_are
                return in_order(out, q), None
        return in_order(self._masked(call), q), None

    def repeat(self, call: Call) -> Optional[Repeat]:
        """Where forward is one call of torch's function with the call's own tensors."""
        causal, seqlen_q = call.mask.causal, call.q.shape[2]
        if not self._maskless or self._fold_heads or self._dv_differs:
            return None
        if causal and not self._top_left:
            if seqlen_q not in (1, call.k.shape[2]):
                return None
            causal = seqlen_q > 1
        scale, gqa = call.softmax_scale, self._gqa
        if self._heads_as_batch and _contiguous(call):
            return lambda q, k, v: (self._by_heads(q, k, v, causal, scale), None)
        strides = out_strides(call.q, call.v.shape[3])

        def again(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Optional[Tensor]]:
            out = torch_sdpa(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=gqa)
            return out if out.stride() == strides else in_order(out, q), None

        return again

    def describe(self) -> dict[str, Any]:
        return {"kernel": "F.scaled_dot_product_attention" + ("" if self._maskless else ", dense mask by blocks of rows")}

    def _torch(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor], causal: bool, scale: float) -> Tensor:
        if self._dv_differs:
            return self._padded(q, k, v, attn_mask, causal, scale)
        if not self._gqa:
            return torch_sdpa(q, k, v, attn_mask, 0.0, causal, scale=scale)
        if self._fold_heads and (attn_mask is None or attn_mask.shape[1] == 1):
            # With one query row, causal (either alignment) is decided by the caller; top-left sees the first key alone.
            batch, heads, _, dim = q.shape
            grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
            if causal:
                k, v = k[:, :, :1], v[:, :, :1]
            return torch_sdpa(grouped, k, v, attn_mask, scale=scale).reshape(batch, heads, 1, v.shape[3])
        return torch_sdpa(q, k, v, attn_mask, 0.0, causal, scale=scale, enable_gqa=True)

    def _by_heads(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        """Each head a sequence of its own. torch's flash kernels write the heads of a token side by side, wherever q has them: of one head nothing is left
        to be copied into q's order.
        """
        batch, heads, seqlen_q, dim = q.shape
        pairs, seqlen_k = batch * heads, k.shape[2]
        out = torch_sdpa(q.view(pairs, 1, seqlen_q, dim), k.view(pairs, 1, seqlen_k, dim), v.view(pairs, 1, seqlen_k, dim), None, 0.0, causal, scale=scale)
        return out.reshape(batch, heads, seqlen_q, dim)

    def _padded(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor], causal: bool, scale: float) -> Tensor:
        """torch's flash kernels want one head_dim: zeros in q and k change no score, and zeros in v are cut off again."""
        width = max(q.shape[3], v.shape[3])
        q, k = F.pad(q, (0, width - q.shape[3])), F.pad(k, (0, width - k.shape[3]))
        out = torch_sdpa(
            q, k, F.pad(v, (0, width - v.shape[3])), attn_mask, 0.0, causal, scale=scale, enable_gqa=self._gqa
        )  # fmt: skip
        return out[..., : v.shape[3]]

    def _masked(self, call: Call) -> Tensor:
        q, mask = call.q, call.mask
        batch, q_heads, seqlen_q, _ = q.shape
        k, v = without_padding(call)
        seqlen_k = k.shape[2]
        outs = []
        for rows, (first, last) in row_blocks(call):
            allowed = dense.allowed_pairs(mask, batch, seqlen_q, seqlen_k, rows, q.device)[..., first:last]
            bias = dense.added_bias(mask, q_heads, seqlen_q, seqlen_k, rows, q.device, torch.promote_types(q.dtype, torch.float32))
            some = allowed.any(-1, keepdim=True)
            if first == last:
                outs.append(q.new_zeros((batch, q_heads, rows[1] - rows[0], v.shape[3])))
                continue
            # Rows without keys come back as NaN, 0 or the mean of v, by kernel and version, and their gradient as NaN: let them see
            # every key and select 0 for them afterwards, which makes their gradient 0 too.
            allowed = allowed | ~some
            attn_mask = allowed
            if bias is not None:
                # Models mask with the smallest finite number; kernels that work in base 2 would make it -inf.
                bias = torch.where(some, bias, torch.zeros((), dtype=bias.dtype, device=bias.device)).clamp_min(_LEAST_BIAS)
                # On CPU torch adds an fp32 mask to 16-bit scores as it is; elsewhere the mask has q's dtype.
                dtype = bias.dtype if q.is_cpu else q.dtype
                attn_mask = torch.where(allowed, bias[..., first:last] if bias.shape[3] > 1 else bias, float("-inf")).to(dtype)
            out = self._torch(q[:, :, rows[0] : rows[1]], k[:, :, first:last], v[:, :, first:last], attn_mask, False, call.softmax_scale)
            outs.append(torch.where(some, out, torch.zeros((), dtype=out.dtype, device=out.device)))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


class TrainingPlan(TorchPlan):
    """For eager training: torch's own autograd runs through the call. lse is made by the tiled maths when somebody needs it."""

    differentiable = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._lse_plan = LsePlan(problem) if _has_lse_kernel(problem) else TiledPlan(problem)

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        return self._lse_plan.forward(call) if call.need_lse else super().forward(call)


class LsePlan(TiledPlan):
    """torch's flash kernels called by their aten names, which also return lse."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._on_cpu = problem.device.type == "cpu"

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        q, k, v, mask = call.q, call.k, call.v, call.mask
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        if mask.causal and seqlen_q != seqlen_k:
            return super().forward(call)
        k, v = all_heads(call, k, v)
        if self._on_cpu:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask.causal, scale=call.softmax_scale)
        else:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, mask.causal, False, scale=call.softmax_scale)[:2]
        return in_order(out, q), lse.to(lse_dtype(q.dtype))

    def describe(self) -> dict[str, Any]:
        return {"kernel": "aten flash attention with lse (tiled torch maths where causal and Sq != Sk)"}


def _has_lse_kernel(problem: Problem) -> bool:
    """Whether an aten kernel gives (out, lse) for the problem: full or causal, head_dims alike, a dtype that it has."""
    plain = {Feature.LSE, Feature.LSE_GRAD, Feature.GQA, Feature.CAUSAL_TOP_LEFT, Feature.CAUSAL_BOTTOM_RIGHT, Feature.DETERMINISTIC}
    if not problem.features <= plain:
        return False
    if problem.device.type == "cpu":
        return problem.q_dtype in ("float32", "bfloat16", "float16", "float64")
    nvidia = problem.device.vendor == "nvidia" and problem.device.arch >= (8, 0)
    return nvidia and problem.q_dtype in ("float16", "bfloat16") and problem.head_dim <= 256 and problem.head_dim % 8 == 0


def _block_rows(call: Call) -> int:
    seqlen_k = call.k.shape[2] if call.block_table is None else call.block_table.shape[1] * call.k.shape[2]
    if call.varlen is not None and call.block_table is None:
        seqlen_k = call.varlen.max_seqlen_k
    return max(16, BLOCK_ELEMENTS // max(1, call.q.shape[0] * call.q.shape[1] * seqlen_k))
