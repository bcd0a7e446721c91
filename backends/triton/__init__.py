"""The triton backend: forward, backward and decode kernels in Triton. This module only declares; triton is imported by
``probe`` and ``prepare``."""

from __future__ import annotations

from attnhub import config
from attnhub.backend import Backend, Plan, PrepareError
from attnhub.capability import Capability, DeviceRange
from attnhub.problem import Feature, Problem, few_tiles
from attnhub.reasons import Code, Reason

_ALL = frozenset({"float16", "bfloat16", "float32"})
_FP8 = frozenset({"float8_e4m3fn"})
_GPUS = (
    DeviceRange("cuda", "nvidia", (8, 0), (8, 9), _ALL, status="untested"),
    DeviceRange("cuda", "nvidia", (9, 0), (9, 0), _ALL),
    DeviceRange("cuda", "nvidia", (10, 0), None, _ALL, status="untested"),
    DeviceRange("cuda", "nvidia", (8, 9), (8, 9), _FP8, status="untested"),
    DeviceRange("cuda", "nvidia", (9, 0), (9, 0), _FP8),
    DeviceRange("cuda", "nvidia", (10, 0), None, _FP8, status="untested"),
    DeviceRange("cuda", "amd", (), None, _ALL, status="untested"),
    DeviceRange("xpu", "intel", (), None, _ALL, status="untested"),
)
_INTERPRETER = DeviceRange("cpu", "", (), None, _ALL | _FP8)
_BOTH_WAYS = frozenset({
    Feature.GQA, Feature.DV_DIFFERS, Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT, Feature.WINDOW, Feature.CHUNK,
    Feature.PREFIX, Feature.SEGMENTS, Feature.SEQLENS, Feature.LEFTPAD, Feature.BOOL_MASK, Feature.BIAS, Feature.ALIBI,
    Feature.SOFTCAP, Feature.SINKS, Feature.VARLEN, Feature.DETERMINISTIC, Feature.DROPOUT, Feature.BLOCK_SPARSE,
})  # fmt: skip


#: What steps of a few queries were measured with: docs/results.md, cuda short.
_STEP_FEATURES = frozenset({
    Feature.GQA, Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT, Feature.SEQLENS, Feature.LSE, Feature.DETERMINISTIC,
})  # fmt: skip


def _is_step(problem: Problem) -> bool:
    """Whether a few queries stand before several times as many keys, as in steps of generation. Short sequences before themselves, at which it is as fast, are
    trained too: the choice is the same with a gradient, and there torch's backward pass is ahead.
    """
    return 1 < problem.seqlen_q <= 16 and problem.seqlen_k >= 4 * problem.seqlen_q and problem.features <= _STEP_FEATURES


class TritonBackend(Backend):
    """Triton kernels for GPUs; for CPU tensors only under Triton's interpreter (TRITON_INTERPRET=1), as a test of them."""

    name = "triton"
    extra = "triton"

    def __init__(self) -> None:
        # Triton decides once, when a kernel is defined, whether it is interpreted; so does the declaration.
        self.capability = Capability(
            devices=(*_GPUS, _INTERPRETER) if config.triton_interpret() else _GPUS,
            features=_BOTH_WAYS | {Feature.LSE, Feature.PAGED},
            head_dims=(1, 576, 1),
            v_head_dims=(1, 512, 1),
            backward_features=_BOTH_WAYS | {Feature.LSE_GRAD, Feature.SINKS_GRAD, Feature.BIAS_GRAD},
        )

    def probe(self) -> tuple[Reason, ...]:
        try:
            import triton.language  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name == "triton":
                return (Reason(Code.NOT_INSTALLED, "the package triton is not installed", "pip install 'attnhub[triton]'"),)
            return (Reason(Code.BROKEN, f"importing triton fails: {error!r}"),)
        except Exception as error:  # An installed package can fail in any way.
            return (Reason(Code.BROKEN, f"importing triton fails: {error!r}"),)
        if config.triton_interpret():
            return ()
        import torch

        if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
            return ()
        return (Reason(Code.NO_DEVICE, "torch sees no CUDA, ROCm or XPU device", "TRITON_INTERPRET=1 interprets the kernels on CPU tensors"),)

    def cost(self, problem: Problem) -> float:
        if problem.device.type == "cpu":
            return 1e6
        # Geometric means against the faster of torch's flash and cuDNN kernels: the kernels for Hopper on an H100 at 512 to 16384 tokens, the
        # general ones on an H200; the whole tables: docs/results.md.
        widest, device = max(problem.head_dim, problem.v_head_dim), problem.device
        if device.vendor == "nvidia" and device.arch == (9, 0) and problem.q_dtype in ("float16", "bfloat16") and widest <= 256:
            # Keys are divided then: faster than torch on an H200 for 32 and for 128 queries of 32 heads before 4096 keys, by CUDA graph, in no result file.
            if not problem.need_backward and problem.seqlen_q > 16 and few_tiles(problem):
                return 0.75
            # Several queries before many keys, too, for which cuDNN takes several times as long: docs/results.md, cuda few.
            if not problem.need_backward and 1 < problem.seqlen_q <= 16 and problem.seqlen_k >= 1024:
                return 0.8
            if not problem.need_backward and _is_step(problem):
                return 0.8
            return 1.15 if not problem.need_backward else 1.1 if widest <= 128 else 1.4
        return 1.8 if problem.need_backward else 1.4

    def prepare(self, problem: Problem) -> Plan:
        try:
            from attnhub.backends.triton.launcher import TritonPlan
        except ImportError as error:
            raise PrepareError(Reason(Code.BROKEN, f"importing the kernels fails: {error!r}")) from error
        return TritonPlan(problem)

    def versions(self) -> dict[str, str]:
        try:
            import triton
        except Exception:  # doctor reports what probe says of it.
            return {}
        return {"triton": str(triton.__version__)}


backend = TritonBackend()
