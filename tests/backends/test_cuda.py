"""The cuda backend's declaration, and what it says of what is missing here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_compiled import needs_nvrtc

from attnhub.backend import PrepareError
from attnhub.backends.cuda import backend, nvrtc, probe
from attnhub.problem import DeviceInfo, Feature, Problem
from attnhub.reasons import Code

HOPPER = DeviceInfo("cuda", "nvidia", (9, 0), "H100")


def _problem(**changes: Any) -> Problem:
    base = Problem(HOPPER, "float16", "float16", 64, 64, 4, 4, 2, 128, 128)
    return dataclasses.replace(base, **changes)


def _codes(problem: Problem) -> set[Code]:
    return {reason.code for reason in (*backend.capability.check(problem), *backend.check(problem))}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"q_dtype": "float32", "kv_dtype": "float32"}, Code.DTYPE),
        ({"kv_dtype": "bfloat16"}, Code.MIXED_DTYPE),
        ({"head_dim": 257, "v_head_dim": 257}, Code.HEAD_DIM),
        ({"align_bytes": 8}, Code.ALIGNMENT),
        ({"device": DeviceInfo("cpu", "x86_64")}, Code.DEVICE_TYPE),
        ({"device": DeviceInfo("cuda", "amd", (9, 4, 2))}, Code.DEVICE_TYPE),
        ({"device": DeviceInfo("cuda", "nvidia", (7, 0))}, Code.ARCH),
        ({"device": DeviceInfo("cuda", "nvidia", (7, 5)), "q_dtype": "bfloat16", "kv_dtype": "bfloat16"}, Code.DTYPE),
        ({"device": DeviceInfo("cuda", "nvidia", (7, 5)), "features": frozenset({Feature.PAGED}), "page_size": 16}, Code.NO_PAGED),
        ({"features": frozenset({Feature.DROPOUT})}, Code.NO_DROPOUT),
        ({"features": frozenset({Feature.BOOL_MASK})}, Code.NO_BOOL_MASK),
        ({"seqlen_k": 1 << 31}, Code.TOO_LARGE),
        ({"batch": 1 << 16, "q_heads": 64, "seqlen_q": 1 << 16}, Code.TOO_LARGE),
    ],
)
def test_what_is_outside_is_rejected_with_its_code(changes: dict[str, Any], code: Code) -> None:
    assert code in _codes(_problem(**changes))


def test_what_is_declared_is_accepted() -> None:
    for device, dtype in (((7, 5), "float16"), ((8, 6), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "float16")):
        problem = _problem(device=DeviceInfo("cuda", "nvidia", device), q_dtype=dtype, kv_dtype=dtype, features=backend.capability.features - {Feature.PAGED})
        assert not _codes(problem)


def test_every_verdict_about_the_backward_says_that_there_is_none() -> None:
    assert [r.code for r in backend.capability.check_backward(_problem())] == [Code.NO_BACKWARD]


# ---------------------------------------------------------------------------------------------- probe


def test_probe_names_the_missing_package_and_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    reasons = {reason.code: reason for reason in probe.probe()}
    assert "attnhub[cuda12]" in reasons[Code.NOT_INSTALLED].hint


def test_probe_reports_a_broken_cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')\n")
    monkeypatch.delitem(__import__("sys").modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = [reason for reason in probe.probe() if reason.code is Code.BROKEN]
    assert broken and "libcudart.so.99" in broken[0].detail


def test_probe_and_prepare_report_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find", lambda major=None: None)
    assert Code.NO_COMPILER in {reason.code for reason in probe.probe()}
    with pytest.raises(PrepareError) as caught:
        backend.prepare(_problem())
    assert caught.value.reason.code is Code.NO_COMPILER


@needs_nvrtc
def test_a_kernel_that_does_not_compile_is_a_prepare_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNHUB_CACHE_DIR", str(tmp_path))
    with pytest.raises(PrepareError) as caught:
        backend.prepare(_problem(device=DeviceInfo("cuda", "nvidia", (99, 9))))
    assert caught.value.reason.code is Code.COMPILE_FAILED
    assert not list(tmp_path.rglob("*.cubin"))
