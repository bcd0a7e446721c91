"""Why a backend cannot serve a problem: typed codes, never bare booleans.

Every check in attnhub returns *all* its reasons. ``docs/reasons.md`` is generated from this file, one anchor per code.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Union


class Code(str, enum.Enum):
    """One code per way in which a backend can be unable to serve a problem."""

    # The backend itself is not usable here (probe).
    NOT_INSTALLED = "not_installed"
    BROKEN = "broken"
    NO_DEVICE = "no_device"
    NO_COMPILER = "no_compiler"
    NOT_BUILT = "not_built"
    PLUGIN_ERROR = "plugin_error"
    # The policy keeps it out.
    UNKNOWN_NAME = "unknown_name"
    DISABLED = "disabled"
    NAME_ONLY = "name_only"
    # The hardware or the tensors do not fit its declaration.
    DEVICE_TYPE = "device_type"
    ARCH = "arch"
    DTYPE = "dtype"
    MIXED_DTYPE = "mixed_dtype"
    HEAD_DIM = "head_dim"
    ALIGNMENT = "alignment"
    STRIDE = "stride"
    PAGE_SIZE = "page_size"
    TOO_LARGE = "too_large"
    # A feature of the problem that it does not list.
    NO_GQA = "no_gqa"
    NO_DV_DIFFERS = "no_dv_differs"
    NO_CAUSAL_BOTTOM_RIGHT = "no_causal_bottom_right"
    NO_CAUSAL_TOP_LEFT = "no_causal_top_left"
    NO_WINDOW = "no_window"
    NO_CHUNK = "no_chunk"
    NO_PREFIX = "no_prefix"
    NO_SEGMENTS = "no_segments"
    NO_SEQLENS = "no_seqlens"
    NO_LEFTPAD = "no_leftpad"
    NO_BOOL_MASK = "no_bool_mask"
    NO_BIAS = "no_bias"
    NO_BIAS_GRAD = "no_bias_grad"
    NO_ALIBI = "no_alibi"
    NO_BLOCK_SPARSE = "no_block_sparse"
    NO_SOFTCAP = "no_softcap"
    NO_SINKS = "no_sinks"
    NO_SINKS_GRAD = "no_sinks_grad"
    NO_DROPOUT = "no_dropout"
    NO_LSE = "no_lse"
    NO_LSE_GRAD = "no_lse_grad"
    NO_VARLEN = "no_varlen"
    NO_PAGED = "no_paged"
    NO_DETERMINISTIC = "no_deterministic"
    NO_BACKWARD = "no_backward"
    # It accepted, and then failed before anything was launched.
    COMPILE_FAILED = "compile_failed"
    OUT_OF_RESOURCES = "out_of_resources"


#: code -> (what it means, what a user can do). The source of ``docs/reasons.md``.
DESCRIPTIONS: dict[Code, tuple[str, str]] = {
    Code.NOT_INSTALLED: ("A package that the backend needs is not installed.", "Install the extra that the hint names."),
    Code.BROKEN: ("A package that the backend needs is installed, and importing or initialising it fails.", "Read the detail; reinstall that package. `attnhub doctor` shows the whole error."),
    Code.NO_DEVICE: ("No device that the backend can use is present.", "Run where the device is, or choose another backend."),
    Code.NO_COMPILER: ("The backend compiles at run time and its compiler is not found.", "Install the compiler package that the hint names."),
    Code.NOT_BUILT: ("The backend's native library was not built when attnhub was installed.", "Install a C++17 compiler and reinstall attnhub."),
    Code.PLUGIN_ERROR: ("A backend's entry point raised when it was loaded.", "Fix or uninstall the distribution that the detail names."),
    Code.UNKNOWN_NAME: ("No installed backend has this name.", "Choose one of the names listed by `attnhub doctor`."),
    Code.DISABLED: ("The backend is named in `ATTNHUB_DISABLE`.", "Remove it from the variable."),
    Code.NAME_ONLY: ("The backend is never chosen automatically.", "Name it: `backend=`, `attnhub.use(...)` or `ATTNHUB_BACKEND`."),
    Code.DEVICE_TYPE: ("The tensors are on a kind of device that the backend does not serve.", "Move the tensors, or choose a backend for this device."),
    Code.ARCH: ("The device's architecture is outside the backend's range.", "Choose another backend on this device."),
    Code.DTYPE: ("The backend has no kernel for this dtype on this device.", "Cast q, k and v to a dtype that the detail lists."),
    Code.MIXED_DTYPE: ("q and k/v differ in dtype and the backend wants one.", "Cast them to one dtype."),
    Code.HEAD_DIM: ("head_dim of q/k or of v is outside the backend's range.", "Choose another backend."),
    Code.ALIGNMENT: ("A pointer or stride is not aligned as the backend's loads need.", "Make the tensor contiguous, or pad head_dim to a multiple of 8."),
    Code.STRIDE: ("The strides of a tensor are ones that the backend cannot read.", "Make the tensor contiguous."),
    Code.PAGE_SIZE: ("The page size of the K/V cache is not supported.", "Use a page size that the detail lists."),
    Code.TOO_LARGE: ("A size passes what the kernel's index arithmetic or launch grid can express.", "Split the batch, or choose another backend."),
    Code.NO_GQA: ("Fewer K/V heads than query heads (GQA, MQA) are not supported.", "Choose another backend, or repeat the K/V heads."),
    Code.NO_DV_DIFFERS: ("A head_dim of v that differs from that of q and k is not supported.", "Choose another backend."),
    Code.NO_CAUSAL_BOTTOM_RIGHT: ("Causal masks aligned at the bottom right are not supported.", "Choose another backend."),
    Code.NO_CAUSAL_TOP_LEFT: ("Causal masks aligned at the top left are not supported.", "Use bottom-right alignment (the same when Sq == Sk), or another backend."),
    Code.NO_WINDOW: ("Sliding windows are not supported.", "Choose another backend."),
    Code.NO_CHUNK: ("Chunked attention is not supported.", "Choose another backend."),
    Code.NO_PREFIX: ("Bidirectional prefixes are not supported.", "Choose another backend."),
    Code.NO_SEGMENTS: ("Segment ids (packed documents, image blocks) are not supported.", "Choose another backend, or use Varlen."),
    Code.NO_SEQLENS: ("Per-sequence K/V lengths are not supported.", "Choose another backend."),
    Code.NO_LEFTPAD: ("Per-sequence left padding is not supported.", "Choose another backend."),
    Code.NO_BOOL_MASK: ("Dense boolean masks are not supported.", "Choose another backend, or express the mask by its structure."),
    Code.NO_BIAS: ("Additive biases are not supported.", "Choose another backend."),
    Code.NO_BIAS_GRAD: ("The gradient of the additive bias is not supported.", "Choose another backend for the backward pass."),
    Code.NO_ALIBI: ("ALiBi slopes are not supported.", "Choose another backend."),
    Code.NO_BLOCK_SPARSE: ("Block-sparse masks are not supported.", "Choose another backend."),
    Code.NO_SOFTCAP: ("Soft-capped scores are not supported.", "Choose another backend."),
    Code.NO_SINKS: ("Attention sinks are not supported.", "Choose another backend."),
    Code.NO_SINKS_GRAD: ("The gradient of the sinks is not supported.", "Choose another backend for the backward pass."),
    Code.NO_DROPOUT: ("Dropout is not supported.", "Choose another backend, or call with dropout_p=0."),
    Code.NO_LSE: ("The backend cannot return lse, which this call needs.", "Choose another backend, or call without return_lse."),
    Code.NO_LSE_GRAD: ("The gradient through lse is not supported.", "Choose another backend for the backward pass."),
    Code.NO_VARLEN: ("Packed sequences (cu_seqlens) are not supported.", "Choose another backend, or pad."),
    Code.NO_PAGED: ("Paged K/V caches (block tables) are not supported.", "Choose another backend."),
    Code.NO_DETERMINISTIC: ("Bitwise repeatable results were asked for, which the backend does not promise.", "Choose another backend, or allow nondeterminism."),
    Code.NO_BACKWARD: ("The backend has no backward pass.", "Nothing to do: another backend runs the backward from this one's lse."),
    Code.COMPILE_FAILED: ("The kernel did not compile for this device.", "Read the detail; report it with the output of `attnhub doctor --json`."),
    Code.OUT_OF_RESOURCES: ("The kernel needs more shared memory, registers or workspace than this device has.", "Choose another backend on this device."),
}


@dataclass(frozen=True)
class Reason:
    """One reason: a code, what was found here, and what would fix it."""

    code: Code
    detail: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.code.value}: {self.detail}" + (f" ({self.hint})" if self.hint else "")

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code.value, "detail": self.detail, "hint": self.hint}


@dataclass(frozen=True)
class Accepted:
    """The backend can serve the problem; ``cost`` is its declared time relative to torch's own attention."""

    cost: float

    def to_json(self) -> dict[str, Any]:
        return {"accepted": True, "cost": self.cost, "reasons": []}


@dataclass(frozen=True)
class Rejected:
    """The backend cannot serve the problem, for all of these reasons."""

    reasons: tuple[Reason, ...]

    def to_json(self) -> dict[str, Any]:
        return {"accepted": False, "cost": None, "reasons": [r.to_json() for r in self.reasons]}


Verdict = Union[Accepted, Rejected]
