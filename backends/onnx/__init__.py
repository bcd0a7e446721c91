"""The onnx backend: the node ``attnhub::FlashAttention``, run by ONNX Runtime with attnhub's native kernel.

It serves a call only when it is named: its use is to hold the exported node to the same tests as every other backend, and
to be the home of `attnhub.onnx`. Importing this module imports neither torch nor onnx nor onnxruntime.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any, Optional

from attnhub.backend import Backend, Plan
from attnhub.backends.onnx import library
from attnhub.capability import Capability, DeviceRange
from attnhub.problem import Feature, Problem
from attnhub.reasons import Code, Reason

if TYPE_CHECKING:
    import onnxruntime

    from attnhub.backends.onnx.export import ExportReport
    from attnhub.backends.onnx.inspect import Problem as FileProblem
    from attnhub.backends.onnx.rewrite.convert import ConversionReport


class OnnxBackend(Backend):
    """ONNX Runtime as a backend, and the functions behind `attnhub.onnx`."""

    name = "onnx"
    automatic = False
    extra = "onnx"
    capability = Capability(
        devices=(DeviceRange("cpu", dtypes=frozenset({"float32", "float16", "bfloat16"})),),
        features=frozenset({
            Feature.GQA, Feature.DV_DIFFERS, Feature.CAUSAL_BOTTOM_RIGHT, Feature.CAUSAL_TOP_LEFT, Feature.WINDOW, Feature.CHUNK,
            Feature.SEQLENS, Feature.LEFTPAD, Feature.BOOL_MASK, Feature.BIAS, Feature.ALIBI, Feature.SOFTCAP, Feature.SINKS, Feature.LSE,
            Feature.DETERMINISTIC,
        }),
    )  # fmt: skip

    def probe(self) -> tuple[Reason, ...]:
        reasons = []
        for package in ("onnx", "onnxruntime"):
            try:
                importlib.import_module(package)
            except ModuleNotFoundError as error:
                reasons.append(Reason(Code.NOT_INSTALLED, str(error), "pip install 'attnhub[onnx]'"))
            except Exception as error:
                reasons.append(Reason(Code.BROKEN, f"importing {package} raised {type(error).__name__}: {error}", "reinstall it"))
        try:
            library.library_path()
        except FileNotFoundError as error:
            reasons.append(Reason(Code.NOT_BUILT, str(error)))
        return tuple(reasons)

    def cost(self, problem: Problem) -> float:
        return 1.0

    def prepare(self, problem: Problem) -> Plan:
        from attnhub.backends.onnx.launcher import OnnxPlan

        return OnnxPlan()

    def versions(self) -> dict[str, str]:
        found = {}
        for package in ("onnx", "onnxruntime", "onnxscript"):
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def library_path(self) -> str:
        """See `attnhub.onnx.library_path`."""
        return library.library_path()

    def register(
        self, session_options: Optional[onnxruntime.SessionOptions] = None, *, backend: Optional[str] = None, device: Optional[str] = None
    ) -> onnxruntime.SessionOptions:
        """See `attnhub.onnx.register`."""
        return library.register(session_options, backend=backend, device=device)

    def native_calls(self) -> int:
        """See `attnhub.onnx.native_calls`."""
        return library.native_calls()

    def export(self, *args: Any, **kwargs: Any) -> ExportReport:
        """See `attnhub.onnx.export`."""
        from attnhub.backends.onnx.export import export

        return export(*args, **kwargs)

    def check_file(self, *args: Any, **kwargs: Any) -> tuple[FileProblem, ...]:
        """See `attnhub.onnx.check`."""
        from attnhub.backends.onnx.inspect import check

        return check(*args, **kwargs)

    def convert(self, *args: Any, **kwargs: Any) -> ConversionReport:
        """See `attnhub.onnx.convert`."""
        from attnhub.backends.onnx.rewrite.convert import convert

        return convert(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> ConversionReport:
        """See `attnhub.onnx.lower`."""
        from attnhub.backends.onnx.rewrite.lowering import lower

        return lower(*args, **kwargs)


backend = OnnxBackend()
