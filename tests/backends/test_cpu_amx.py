"""The cpu backend's AMX path on a processor without AMX: a build that emulates the tiles runs that path's tests of test_cpu.py."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

from attnhub.backends.cpu import backend, library

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]

#: argv: the library, the test file.
_SUITE = """
import pathlib, sys
import pytest
from attnhub.backends.cpu import library
library.library_path = lambda: pathlib.Path(sys.argv[1])
assert library.available_isas()[-1] == "amx_bf16"
sys.exit(pytest.main([sys.argv[2], "-q", "-x", "-p", "no:cacheprovider", "-k", "amx_bf16"]))
"""


def _why_not() -> str:
    if backend.probe():
        return f"the cpu backend cannot run here: {backend.probe()[0]}"
    if not shutil.which("cmake") or not (CHECKOUT / "CMakeLists.txt").is_file():
        return "needs cmake and a checkout"
    if "amx_bf16" in library.available_isas():
        return "this processor has AMX: test_cpu.py tests the path itself"
    return "" if "avx512_bf16" in library.available_isas() else "the emulation computes with avx512_bf16"


@pytest.mark.skipif(bool(_why_not()), reason=_why_not())
def test_amx_path_on_emulated_tiles(tmp_path: pathlib.Path) -> None:
    for command in (
        ["cmake", "-S", str(CHECKOUT), "-B", str(tmp_path), "-DATTNHUB_EMULATE_AMX=ON"],
        ["cmake", "--build", str(tmp_path), "--target", "attnhub_cpu", "--parallel", "2"],
        [sys.executable, "-c", _SUITE, str(tmp_path / "backends/cpu/libattnhub_cpu.so"), str(CHECKOUT / "tests/backends/test_cpu.py")],
    ):
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
