"""A process of its own that says what one model file needs of memory in ONNX Runtime: ``python -m attnhub.bench.onnx_memory``.

Asked by one line of JSON: {model, native, threads, small, full}, the last two being .npz files of inputs. The baseline is the resident set
once the file is loaded and has run the small inputs, so that code, threads and weights are there; the peak is that of `_RUNS` runs of the full
ones, outputs included. Everything that the runtime, its arena and attnhub's kernel take for them counts. Needs neither torch nor onnx.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Optional

from attnhub import config
from attnhub.bench import resident

#: The runtime plans its memory anew once it has seen a shape.
_RUNS = 3


def measure(model: str, native: bool, threads: int, small: str, full: str) -> dict[str, Optional[float]]:
    """{extra_mib, peak_mib}: the peak above the baseline, and the whole resident set at the peak. None where Linux does not tell.

    RuntimeError, with the last line that it wrote, if the process fails.
    """
    asked = {"model": model, "native": native, "threads": threads, "small": small, "full": full}
    environment = config.child_environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = (sys.executable, "-m", __name__)
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    found: dict[str, Optional[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def session(model: str, native: bool, threads: int) -> Any:
    """The file in ONNX Runtime with all its optimisations, as it is timed and as its memory is measured. native: with attnhub's library."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its threads may spin while it works, not into the next peer's turn, which would then share the processor with them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if native:
        import attnhub.onnx

        attnhub.onnx.register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(asked: dict[str, Any]) -> dict[str, Optional[float]]:
    import numpy

    small, full = (dict(numpy.load(asked[name])) for name in ("small", "full"))
    opened = session(asked["model"], asked["native"], asked["threads"])
    opened.run(None, small)
    before = resident.begin()
    if before is None:
        return {"extra_mib": None, "peak_mib": None}
    for _ in range(_RUNS):
        opened.run(None, full)
    peak = resident.peak()
    return {"extra_mib": (peak - before) / 2**10, "peak_mib": peak / 2**10}


if __name__ == "__main__":
    print(json.dumps(_run(json.load(sys.stdin))))
