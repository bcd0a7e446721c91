"""compute-sanitizer on small samples of each kernel of the cuda backend: memcheck, racecheck, synccheck. `make gpu-check` runs it.

Without a device: that its output is read as it should be, and that what it would watch runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Optional

import cuda_samples as samples
import pytest
import torch

import attnhub

_FILE = Path(__file__).with_name("cuda_samples.py")

ROOT = Path(attnhub.__file__).resolve().parents[1]

#: What each tool can judge. memcheck: accesses to device and shared memory, with gaps between allocations; copies by the engine and operands of wgmma too,
#: in versions that know them. synccheck: barriers met by the wrong threads, wgmma by part of a warpgroup. racecheck: shared memory alone, ordered by
#: __syncthreads, __syncwarp and groups of cp.async. The kernel for 9.0 is left out of racecheck: there tiles are written and read by the engine and
#: the matrix unit, ordered by mbarriers in inline PTX, named barriers of part of a block and proxy fences, none of which it follows to the end; races
#: between launches, or in device memory (tickets, partial results), no tool sees: the repeats above are for these.
_SANITIZED = [
    *(("memcheck", kernel) for kernel in samples.KERNELS),
    *(("racecheck", kernel) for kernel in samples.KERNELS if kernel != "hopper"),
    *(("synccheck", kernel) for kernel in samples.KERNELS),
    *((tool, "") for tool in samples.BROKEN),
]
_OPTIONS = {"memcheck": ("--padding", "256", "--report-api-errors", "no"), "racecheck": (), "synccheck": ("--num-cuda-barriers", "64")}
#: Of an mbarrier: its last phases end with the block, and nobody is left to wait for them.
_EXPECTED = {"hopper": r"Missing wait"}


def reported(tool: str, kernel: str, text: str) -> list[str]:
    """The tool's reports that count; of racecheck the errors, its warnings are warned of. Raises AssertionError where there is no summary."""
    summary = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)" if tool == "racecheck" else r"ERROR SUMMARY: (\d+) errors?", text)
    assert summary is not None, f"no summary:\n{text[-3000:]}"
    if tool == "racecheck" and int(summary[2]):
        warnings.warn(f"racecheck, {kernel}: {summary[0]}", stacklevel=2)
    found = re.findall(r"^=+ ((?:Invalid|Misaligned|Barrier error|Warpgroup MMA|Error:|Program hit|Potential|Internal).*)$", text, re.MULTILINE)
    counted = [line for line in found if not (kernel in _EXPECTED and re.search(_EXPECTED[kernel], line))]
    if int(summary[1]) and not counted and not found:
        return [summary[0]]
    return counted if int(summary[1]) else []


@pytest.mark.parametrize(
    ("tool", "kernel", "text", "count"),
    [
        ("memcheck", "decode", "done\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("memcheck", "decode", "========= Invalid __global__ write of size 4 bytes\n=========     at x\n========= ERROR SUMMARY: 1 error\n", 1),
        ("memcheck", "decode", "========= Something new\n========= ERROR SUMMARY: 2 errors\n", 1),
        ("racecheck", "portable", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("racecheck", "portable", "========= Error: Race reported between Write access at a\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", 1),
        ("synccheck", "hopper", "========= Barrier error detected. Missing wait.\n========= ERROR SUMMARY: 1 error\n", 0),
        ("synccheck", "portable", "========= Barrier error detected. Missing wait.\n========= ERROR SUMMARY: 1 error\n", 1),
        ("synccheck", "hopper", "========= Barrier error detected. Missing wait.\n========= Barrier error detected. Divergent thread(s) in warp\n========= ERROR SUMMARY: 2 errors\n", 1),
    ],
)  # fmt: skip
def test_reports_are_read(tool: str, kernel: str, text: str, count: int) -> None:
    assert len(reported(tool, kernel, text)) == count


def test_an_output_without_a_summary_is_no_success() -> None:
    with pytest.raises(AssertionError, match="no summary"):
        reported("memcheck", "decode", "all ran\n")
    with pytest.warns(UserWarning, match="3 warnings"):
        assert not reported("racecheck", "decode", "========= RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)")


@pytest.mark.parametrize("kernel", samples.KERNELS)
def test_the_small_samples_run_as_a_program(kernel: str) -> None:
    done = subprocess.run([sys.executable, str(_FILE), kernel, "--device", "cpu"], env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines() == [f"ran {s}" for s in samples.SMALL if s.kernel == kernel] + ["done"], done.stderr[-3000:]


def _environment() -> dict[str, str]:
    """Each tensor an allocation of its own, so that memcheck knows where it ends."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}


def _tool() -> Optional[str]:
    return shutil.which("compute-sanitizer") or next((str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None)


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
@pytest.mark.skipif(_tool() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(("tool", "kernel"), _SANITIZED, ids=lambda x: x or "broken")
def test_sanitizer(tool: str, kernel: str) -> None:
    """The small samples give no report; a kernel with a fault (no name) gives one."""
    if kernel == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    port = 49152 + 20 * _SANITIZED.index((tool, kernel))
    command = [str(_tool()), "--tool", tool, *_OPTIONS[tool], "--kernel-name", "kns=attnhub_forward", "--target-processes", "application-only", "--launch-timeout", "120", "--port", str(port)]
    command += [sys.executable, str(_FILE), *([kernel] if kernel else ["--broken", tool])]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False, timeout=280)
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device")
    found = reported(tool, kernel, text)
    if not kernel:
        assert found and "launched" in text, f"the fault was not found:\n{text[-3000:]}"
        return
    assert not found, "\n".join([*found[:10], text[-2000:]])
    ran = re.findall(r"^ran (\S+)$", done.stdout, re.MULTILINE)
    whole = ran == [str(s) for s in samples.SMALL if s.kernel == kernel] and "done" in done.stdout
    if not whole and kernel in _EXPECTED and re.search(_EXPECTED[kernel], text):
        pytest.skip(f"{tool} ended a launch at what it takes for an error ({_EXPECTED[kernel]}), after {len(ran)} samples")
    assert whole, text[-3000:]
