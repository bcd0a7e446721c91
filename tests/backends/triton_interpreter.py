"""Tests of kernels that Triton interprets.

Triton decides at import whether kernels are interpreted. The process that pytest was started in keeps real compilation (other tests need
it) and runs the tests marked `interpreted` once more, in a process of their own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from attnhub import config

INTERPRETED = config.triton_interpret()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="runs in the process without TRITON_INTERPRET")


def run_interpreted(*files: pathlib.Path, which: str = "") -> None:
    """which: pytest's -k."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", which, *map(str, files)]
    done = subprocess.run(command, env=environment, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
