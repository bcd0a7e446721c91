"""Declared cost: time relative to torch's scaled_dot_product_attention, from interleaved measurements.

Below 1 only for the processors that were measured (README.md names the result files), and rounded up from their medians over
head_dim 64 and 128: torch's wheel takes one path of its matrix library on AMD, another on Intel, and bf16 products on AMX where that
is. The cost is that of the forward: the choice must be the same with and without gradients, and no backward here is further behind
torch's than its forward.
"""

from __future__ import annotations

from attnhub.problem import Feature, Problem

#: kind of processor -> dtype -> relative time of (full, causal, decoding). Of the two generations of AMD's AVX-512 the slower one.
_MEASURED = {
    "amd avx512": {"float32": (0.9, 0.75, 0.5), "bfloat16": (0.5, 0.45, 0.1), "float16": (0.9, 0.75, 0.5)},
    "intel amx": {"float32": (0.95, 0.8, 0.4), "bfloat16": (0.8, 0.7, 0.5), "float16": (0.9, 0.8, 0.5)},
}
#: Multiply-adds below which the work takes less than a call: torch's own is then as short, and shorter when it trains ...
_TINY = 1 << 17
#: ... where it is given nothing but these. A mask that has to be made first costs sdpa ten calls and more.
_TORCHS_OWN = frozenset({
    Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT, Feature.GQA, Feature.DV_DIFFERS, Feature.LSE, Feature.LSE_GRAD, Feature.DETERMINISTIC,
})  # fmt: skip
_CAUSAL = frozenset({Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT})


def cost(problem: Problem) -> float:
    device = problem.device
    if "avx512" not in device.isa and not device.isa >= {"avx2", "fma", "f16c"}:
        return 2.0  # the portable path: 1.5 to 2.4 measured
    kind = ""
    if "avx512" in device.isa:
        kind = "amd avx512" if "AMD" in device.name else "intel amx" if "amx_bf16" in device.isa else ""
    tiny = problem.batch * problem.q_heads * problem.seqlen_q * problem.seqlen_k * problem.head_dim < _TINY
    if tiny and problem.features <= _TORCHS_OWN:
        return 1.05
    full, causal, decoding = _MEASURED.get(kind, {}).get(problem.q_dtype, (1.05, 1.05, 1.05))
    if problem.seqlen_q <= 16:
        return decoding
    return causal if problem.features & _CAUSAL else full
