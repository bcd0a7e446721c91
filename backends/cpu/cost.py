"""Declared cost: time relative to torch's scaled_dot_product_attention, from interleaved measurements.

Measured on an AMD Zen 5 CPU (AVX-512, avx512_bf16, no AMX) with torch 2.13, head_dim 64 and 128: README.md has the
figures. Below 1 only there and where it was seen: torch's wheel takes another path of its matrix library on Intel CPUs,
and its bf16 products run on AMX where that is. The cost is that of the forward: torch's own backward kernel runs from our lse,
and the choice must be the same with and without gradients.
"""

from __future__ import annotations

from attnhub.problem import Feature, Problem

#: dtype -> relative time of (full, causal, decoding) with AVX-512 on AMD, rounded up from the medians.
_AVX512 = {"float32": (0.5, 0.4, 0.85), "bfloat16": (0.3, 0.25, 0.4), "float16": (0.25, 0.2, 0.15)}
#: Multiply-adds below which the work takes less than a call: torch's own is then as short, and shorter when it trains.
_TINY = 1 << 17
_CAUSAL = frozenset({Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT})


def cost(problem: Problem) -> float:
    device = problem.device
    avx512 = "avx512" in device.isa
    if not avx512 and not device.isa >= {"avx2", "fma", "f16c"}:
        return 2.0  # the portable path: 1.5 to 2.4 measured
    if not avx512 or "AMD" not in device.name:
        return 3.0 if "amx_bf16" in device.isa and problem.q_dtype == "bfloat16" and problem.seqlen_q > 16 else 1.05
    if problem.batch * problem.q_heads * problem.seqlen_q * problem.seqlen_k * problem.head_dim < _TINY:
        return 1.05
    full, causal, decoding = _AVX512.get(problem.q_dtype, (1.05, 1.05, 1.05))
    if problem.seqlen_q <= 16:
        return decoding
    return causal if problem.features & _CAUSAL else full
