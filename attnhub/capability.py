"""Declarations: what a backend can do, as data that is importable without the backend's dependencies.

The world is closed: a feature that is not listed is a rejection with a reason, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from attnhub.problem import FORWARD_ONLY, DeviceInfo, Feature, Problem
from attnhub.reasons import Code, Reason

_BACKWARD_ONLY = frozenset({Feature.BIAS_GRAD, Feature.SINKS_GRAD, Feature.LSE_GRAD})


@dataclass(frozen=True)
class DeviceRange:
    """A range of devices: type, vendor ("" is any), architectures min <= arch <= max (None is open), isa that must be present."""

    type: str
    vendor: str = ""
    min_arch: tuple[int, ...] = ()
    max_arch: Optional[tuple[int, ...]] = None
    dtypes: frozenset[str] = frozenset()
    #: "measured": run and timed on such a device; "untested": expected to work, never run there.
    status: str = "measured"

    def matches_kind(self, device: DeviceInfo) -> bool:
        return self.type == device.type and (not self.vendor or self.vendor == device.vendor)

    def matches_arch(self, device: DeviceInfo) -> bool:
        if not device.arch:
            return not self.min_arch
        return device.arch >= self.min_arch and (self.max_arch is None or device.arch <= self.max_arch)


@dataclass(frozen=True)
class Capability:
    """What a backend declares.

    devices: ranges, each with the dtypes it serves there. head_dims: (smallest, largest, step) for q/k and for v.
    features: what forward serves. backward_features: what its own backward serves, or None if it has none (then another
    backend's backward runs from its lse). align_bytes: what `Problem.align_bytes` must reach. mixed_dtypes: whether k/v
    may differ in dtype from q.
    """

    devices: tuple[DeviceRange, ...]
    features: frozenset[Feature]
    head_dims: tuple[int, int, int] = (1, 512, 1)
    v_head_dims: Optional[tuple[int, int, int]] = None
    backward_features: Optional[frozenset[Feature]] = None
    align_bytes: int = 1
    page_sizes: Optional[tuple[int, ...]] = None
    mixed_dtypes: bool = False

    def check(self, problem: Problem) -> tuple[Reason, ...]:
        """All reasons why a forward of the problem lies outside the declaration."""
        return (*self._check_place(problem), *_missing(problem.features - _BACKWARD_ONLY, self.features, "forward"))

    def check_backward(self, problem: Problem) -> tuple[Reason, ...]:
        """All reasons why a backward of the problem lies outside the declaration."""
        if self.backward_features is None:
            return (Reason(Code.NO_BACKWARD, "it has no backward pass"),)
        if problem.q_dtype in FORWARD_ONLY:
            return (Reason(Code.NO_BACKWARD, f"{problem.q_dtype} has a forward pass only", "call under torch.no_grad()"),)
        return (*self._check_place(problem), *_missing(problem.features - {Feature.LSE}, self.backward_features, "backward"))

    def _check_place(self, problem: Problem) -> tuple[Reason, ...]:
        reasons = []
        device = problem.device
        kinds = [r for r in self.devices if r.matches_kind(device)]
        ranges = [r for r in kinds if r.matches_arch(device)]
        if not kinds:
            served = sorted({r.type + (f" ({r.vendor})" if r.vendor else "") for r in self.devices})
            where = device.type + (f" ({device.vendor})" if device.vendor else "")
            reasons.append(Reason(Code.DEVICE_TYPE, f"tensors on {where}; it serves {', '.join(served)}"))
        elif not ranges:
            reasons.append(Reason(Code.ARCH, f"{device.vendor} {_version(device.arch)}; it serves {' or '.join(_range(r) for r in kinds)}"))
        else:
            dtypes = frozenset().union(*(r.dtypes for r in ranges))
            for dtype in sorted({problem.q_dtype, problem.kv_dtype} - dtypes):
                reasons.append(Reason(Code.DTYPE, f"{dtype}; here it serves {', '.join(sorted(dtypes))}"))
        if problem.q_dtype != problem.kv_dtype and not self.mixed_dtypes:
            reasons.append(Reason(Code.MIXED_DTYPE, f"q is {problem.q_dtype}, k and v are {problem.kv_dtype}"))
        for name, dim, (low, high, step) in (
            ("head_dim", problem.head_dim, self.head_dims),
            ("v's head_dim", problem.v_head_dim, self.v_head_dims or self.head_dims),
        ):
            if not low <= dim <= high or dim % step:
                reasons.append(Reason(Code.HEAD_DIM, f"{name} is {dim}; it serves {low} to {high}" + (f" in steps of {step}" if step > 1 else "")))
        if problem.align_bytes < self.align_bytes:
            reasons.append(Reason(Code.ALIGNMENT, f"pointers and strides are aligned to {problem.align_bytes} bytes; it needs {self.align_bytes}"))
        if problem.page_size and self.page_sizes is not None and problem.page_size not in self.page_sizes:
            reasons.append(Reason(Code.PAGE_SIZE, f"page_size is {problem.page_size}; it serves {self.page_sizes}"))
        return tuple(reasons)


def _missing(asked: frozenset[Feature], served: frozenset[Feature], which: str) -> list[Reason]:
    return [Reason(Code(f"no_{f.value}"), f"the problem has {f.value}; its {which} does not list it") for f in sorted(asked - served)]


def _version(arch: tuple[int, ...]) -> str:
    return ".".join(map(str, arch)) or "of unknown architecture"


def _range(r: DeviceRange) -> str:
    low, high = _version(r.min_arch) if r.min_arch else "any", _version(r.max_arch) if r.max_arch else ""
    return f"{r.vendor or r.type} {low}" + (f" to {high}" if high else " and up")
