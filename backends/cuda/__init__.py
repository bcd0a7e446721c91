"""Raw CUDA C++ kernels on tensor cores (mma.sync), compiled by NVRTC at run time and launched through CuPy.

This module is the declaration: it imports neither CuPy nor NVRTC.
"""

from __future__ import annotations

from attnhub.backend import Backend, Plan
from attnhub.capability import Capability, DeviceRange
from attnhub.problem import Feature, Problem
from attnhub.reasons import Code, Reason

_BOTH = frozenset({"float16", "bfloat16"})
_MAX_LENGTH = 1 << 30
_MAX_BLOCKS = (1 << 31) - (1 << 16)  # a tile's number plus a grid is a 32-bit integer
_FEWEST_ROWS = 64  # of a block


def _nvidia(low: tuple[int, int], high: tuple[int, int] | None, dtypes: frozenset[str], status: str) -> DeviceRange:
    return DeviceRange("cuda", "nvidia", low, high, dtypes, status)


class CudaBackend(Backend):
    """Forward for fp16 and bf16; its lse lets another backend run the backward."""

    name = "cuda"
    extra = "cuda13"
    capability = Capability(
        devices=(
            _nvidia((7, 5), (7, 5), frozenset({"float16"}), "untested"),  # Turing's matrix unit has no bf16
            _nvidia((8, 0), (8, 9), _BOTH, "untested"),
            _nvidia((9, 0), (9, 0), _BOTH, "measured"),
            _nvidia((10, 0), None, _BOTH, "untested"),
        ),
        features=frozenset({
            Feature.GQA, Feature.DV_DIFFERS, Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT, Feature.WINDOW, Feature.CHUNK,
            Feature.PREFIX, Feature.SEQLENS, Feature.LEFTPAD, Feature.ALIBI, Feature.SOFTCAP, Feature.SINKS, Feature.LSE, Feature.VARLEN,
            Feature.DETERMINISTIC, Feature.PAGED,
        }),
        head_dims=(1, 256, 1),
        align_bytes=16,
    )  # fmt: skip

    def probe(self) -> tuple[Reason, ...]:
        from attnhub.backends.cuda.probe import probe

        return probe()

    def check(self, problem: Problem) -> tuple[Reason, ...]:
        reasons = []
        longest = max(problem.seqlen_q, problem.seqlen_k)
        if longest > _MAX_LENGTH:
            reasons.append(Reason(Code.TOO_LARGE, f"a length may reach {longest}; positions are 32-bit integers and serve {_MAX_LENGTH}"))
        blocks = problem.batch * problem.q_heads * -(-problem.seqlen_q // _FEWEST_ROWS)
        if blocks > _MAX_BLOCKS:
            reasons.append(
                Reason(Code.TOO_LARGE, f"up to {blocks} tiles of queries; their numbers are 32-bit integers and serve {_MAX_BLOCKS}")
            )
        if problem.page_size:
            from attnhub.backends.cuda import decode

            if not decode.serves(problem):
                reasons.append(Reason(Code.NO_PAGED, "pages are served from compute capability 8.0 on"))
        return tuple(reasons)

    def cost(self, problem: Problem) -> float:
        """Measured on an H200 against torch's default there, which is cuDNN: README.md."""
        from attnhub.backends.cuda import decode, hopper

        if hopper.runs_on(problem.device):
            return decode.cost(problem) if decode.serves(problem) else hopper.cost(problem)
        # The portable kernel, measured there too; other devices were not measured. For few queries nothing was, but on 9.0.
        if problem.seqlen_q <= 16 or problem.page_size:
            return 5.0
        return 1.7 if problem.v_head_dim <= 64 else 2.0 if problem.v_head_dim <= 128 else 3.0

    def prepare(self, problem: Problem) -> Plan:
        from attnhub.backends.cuda.launcher import prepare

        return prepare(problem)

    def versions(self) -> dict[str, str]:
        from attnhub.backends.cuda.probe import versions

        return versions()


backend = CudaBackend()
