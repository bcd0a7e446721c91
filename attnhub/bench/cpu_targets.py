"""What the cpu backend is held to. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from attnhub.bench import overhead_case as overhead
from attnhub.bench.cases import Case
from attnhub.bench.target import Target, figure, one, over


def _prefill(dtype: str, causal: Optional[bool] = None, dim: Optional[int] = None) -> Callable[[Case], bool]:
    return lambda c: (
        c.mode == "forward" and c.dtype == dtype and c.seqlen_q == c.seqlen_k > 1
        and (causal is None or c.causal == causal) and (dim is None or c.head_dim == dim)
    )  # fmt: skip


def _decode(dtype: str) -> Callable[[Case], bool]:
    return lambda c: c.is_decode() and c.dtype == dtype


def _training(dtype: str) -> Callable[[Case], bool]:
    return lambda c: c.mode == "training" and c.dtype == dtype


_SDPA = over("F.sdpa")
_PEAK, _READ, _MEMORY = figure("peak_fraction"), figure("bandwidth_fraction"), figure("extra_mib")

#: Targets that hold on every processor: fractions of what it reached in the same run, and memory.
_EVERYWHERE = (
    Target("fp32 prefill D128 full, of FMA peak", 0.70, 0.85, _PEAK, _prefill("float32", False, 128), "{:.0%}", fraction=True),
    Target("fp32 prefill D64 full, of FMA peak", 0.60, 0.78, _PEAK, _prefill("float32", False, 64), "{:.0%}", fraction=True),
    Target("extra memory at 8192 tokens", 64, 64, _MEMORY, lambda c: c.mode == "forward" and c.seqlen_q == 8192, "{:.1f} MiB", at_most=True),
)
#: x86 without AMX, where torch's bf16 runs on vdpbf16ps at best.
AVX = (
    Target("fp32 prefill full over F.sdpa", 1.8, 2.2, _SDPA, _prefill("float32", False)),
    Target("fp32 prefill causal over F.sdpa", 2.2, 3.0, _SDPA, _prefill("float32", True)),
    Target("bf16 prefill full over F.sdpa", 3.5, 4.2, _SDPA, _prefill("bfloat16", False)),
    Target("bf16 prefill causal over F.sdpa", 4.5, 6.0, _SDPA, _prefill("bfloat16", True)),
    Target("fp16 prefill over F.sdpa", 4.0, 8.0, _SDPA, _prefill("float16")),
    Target("fp32 decode over F.sdpa", 4.0, 4.0, _SDPA, _decode("float32")),
    Target("bf16 decode over F.sdpa", 30.0, 30.0, _SDPA, _decode("bfloat16")),
    Target("fp32 decode, of read rate", 0.70, 0.85, _READ, _decode("float32"), "{:.0%}", fraction=True),
    Target("bf16 decode, of read rate", 0.70, 0.85, _READ, _decode("bfloat16"), "{:.0%}", fraction=True),
    Target("fp32 training over F.sdpa", 1.7, 2.2, _SDPA, _training("float32")),
    Target("bf16 training over F.sdpa", 1.7, 2.5, _SDPA, _training("bfloat16")),
    Target("bf16 prefill D128 full, of vdpbf16ps peak", 0.70, 0.85, _PEAK, _prefill("bfloat16", False, 128), "{:.0%}", fraction=True),
    Target("bf16 prefill D64 full, of vdpbf16ps peak", 0.60, 0.78, _PEAK, _prefill("bfloat16", False, 64), "{:.0%}", fraction=True),
    Target("over ONNX Runtime's GroupQueryAttention", 1.3, 2.0, over("ONNX Runtime"), one(Case(2048, heads=32, head_dim=128, causal=True))),
    *_EVERYWHERE,
)
#: x86 with AMX, which torch's bf16 uses, too.
AMX = (
    Target("bf16 prefill full over F.sdpa", 1.2, 1.8, _SDPA, _prefill("bfloat16", False)),
    Target("bf16 prefill causal over F.sdpa", 1.5, 2.2, _SDPA, _prefill("bfloat16", True)),
    Target("fp32 prefill full over F.sdpa", 1.1, 1.3, _SDPA, _prefill("float32", False)),
    Target("fp32 prefill causal over F.sdpa", 1.6, 2.0, _SDPA, _prefill("float32", True)),
    Target("fp32 decode over F.sdpa", 4.0, 4.0, _SDPA, _decode("float32")),
    Target("bf16 decode over F.sdpa", 3.0, 3.0, _SDPA, _decode("bfloat16")),
    *_EVERYWHERE,
)
#: Host time, of the automatic choice.
OVERHEAD = tuple(
    Target(f"{case.mode}: host time of F.sdpa's", most, most, figure("ratio"), lambda c, mode=case.mode: c == mode, "{:.2f}", at_most=True)  # type: ignore[misc]
    for case in overhead.cases("cpu") if (most := overhead.budget(case, "cpu"))
)  # fmt: skip
