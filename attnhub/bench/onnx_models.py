"""A case of the preset ``onnx`` of whole models: files in ONNX Runtime, their outputs compared with torch's, timed in interleaved rounds, and
the memory of each measured in a process of its own (onnx_memory.py).

Peers: ``sdpa`` and ``eager`` are the graphs that torch's exporter makes of those implementations of transformers, run with all of ONNX Runtime's
optimisations; ``fused`` is what ONNX Runtime's own optimizer makes of such a graph. ``attnhub`` is attnhub's file with its library, ``body`` the
same file without.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any, Optional

import numpy
import torch

import attnhub.onnx
from attnhub.bench import measure, onnx_memory, zoo
from attnhub.bench.model_runs import Peer, difference
from attnhub.bench.models import BASELINE, UNITS, ModelCase, left_out
from attnhub.bench.onnx_files import SUBJECTS, Feeds, quiet, write
from attnhub.bench.peers import first_line

_CPU = torch.device("cpu")


def run_case(
    case: ModelCase, models: zoo.Zoo, names: tuple[str, ...], settings: measure.Settings, tick: Optional[Callable[[str], None]] = None
) -> list[dict[str, Any]]:
    """One row for every peer, absent ones with ``skipped``. ``difference`` is the largest one of any output to torch's: of unit vectors as it
    is, else as a part of the output's largest value."""
    rows: list[dict[str, Any]] = []
    runners: list[measure.Runner] = []
    with tempfile.TemporaryDirectory(prefix="attnhub-bench-") as temporary:
        files = Files(case, models, pathlib.Path(temporary))
        for name in names:
            row: dict[str, Any] = {**case.to_json(), "peer": name}
            rows.append(row)
            if why := left_out(case, name, "cpu"):
                row["skipped"] = why
                continue
            if tick:
                tick(name)
            try:
                path, row["backend"] = files.of(name)
                session = onnx_memory.session(path, name == "attnhub", torch.get_num_threads())
                row["difference"] = files.difference(session, name)
                step = _bound(session, files.subject.timed)
                rounds, calls = measure.plan(step, _CPU, settings)
            except Exception as error:
                # A package that is not there, or no room: a row like any other.
                row["skipped"] = first_line(error)
                continue
            runners.append(measure.Runner(row, Peer(name), step, rounds, calls, step))
        measure.interleave(runners, settings, _CPU, tick)
        for runner in runners:
            row = runner.row
            row.update(files.memory(runner.peer.name))
            if not runner.times:
                runner.turn(_CPU)
            row["seconds"], row["seconds_rounds"] = statistics.median(runner.times), runner.times
            row["rate"], row["unit"] = case.units() / row["seconds"], UNITS[case.task]
    measure.compare(runners, BASELINE)
    return rows


class Files:
    """The files of a case, each written when it is first asked for, and what torch makes of the same inputs."""

    def __init__(self, case: ModelCase, models: zoo.Zoo, folder: pathlib.Path) -> None:
        self._case, self._models, self._folder = case, models, folder
        plain = models.lend(case, BASELINE).model
        with quiet():
            self.subject = SUBJECTS[case.task](case, plain)
            self._truth = [self.subject.truth(plain, feeds) for feeds in self.subject.checked]
        self._written: dict[str, tuple[str, str]] = {}

    def of(self, peer: str) -> tuple[str, str]:
        """(path, what computes its attention)."""
        kind = "attnhub" if peer == "body" else peer
        if kind not in self._written:
            path = self._folder / f"{kind}.onnx"
            model = self._models.lend(self._case, "eager" if kind == "fused" else kind).model
            self._written[kind] = str(path), write(self.subject, model, kind, path)
        path_written, what = self._written[kind]
        return path_written, f"function bodies of {what}" if peer == "body" else what

    def difference(self, session: Any, peer: str) -> float:
        """The largest one to torch. ArithmeticError where an output is not finite, or where attnhub's library did not run as it should."""
        largest = 0.0
        for feeds, right in zip(self.subject.checked, self._truth):
            before = attnhub.onnx.native_calls() if peer in ("attnhub", "body") else 0
            found = dict(zip([output.name for output in session.get_outputs()], session.run(None, _arrays(feeds))))
            ran = attnhub.onnx.native_calls() - before if peer in ("attnhub", "body") else 0
            if (ran > 0) != (peer == "attnhub"):
                raise ArithmeticError(f"attnhub's native kernel ran {ran} times")
            for name, exact in zip(self.subject.outputs, right):
                mine = torch.from_numpy(found[name])
                if not bool(mine.isfinite().all()):
                    raise ArithmeticError(f"its output {name} is not finite")
                largest = max(largest, difference(mine, exact, self._case.task != "embed"))
        return largest

    def memory(self, peer: str) -> dict[str, Optional[float]]:
        """See `onnx_memory.measure`."""
        saved = {}
        for size, feeds in (("small", self.subject.small), ("full", self.subject.timed)):
            saved[size] = str(self._folder / f"{size}.npz")
            numpy.savez(saved[size], **_arrays(feeds))
        return onnx_memory.measure(self.of(peer)[0], peer == "attnhub", torch.get_num_threads(), **saved)


def _arrays(feeds: Feeds) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in feeds.items()}


def _bound(session: Any, feeds: Feeds) -> Callable[[], Any]:
    """A call with the inputs where they are and outputs where the runtime puts them: nothing is copied around it."""
    binding = session.io_binding()
    for name, array in _arrays(feeds).items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)
