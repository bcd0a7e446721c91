"""Kernels compiled ahead, in processes side by side: compiling one case after the other would take most of a GPU run's time.

Each process calls the peers that compile (FlexAttention, and what is written in Triton and CUDA) once at a case. Inductor and Triton keep what
they make on disk, where the process that measures finds it. ``python -m attnhub.bench.precompile`` is such a process.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

from attnhub.bench import workers
from attnhub.bench.cases import Case

if TYPE_CHECKING:
    from attnhub.bench.measure import Settings

#: Peers and backends that compile at their first call.
_PEERS, _BACKENDS = ("flex", "v1", "portable"), ("auto", "triton", "cuda")
_PATIENT_TRIES = 6


def run(
    cases: list[Case], names: tuple[str, ...], backends: Optional[tuple[str, ...]], count: int, tick: Optional[Callable[[str], None]] = None,
    limit: float = 0.0, command: tuple[str, ...] = (sys.executable, "-m", "attnhub.bench.precompile"),
) -> dict[str, str]:  # fmt: skip
    """Compile for the cases in ``count`` processes; a time limit in seconds, 0 is none. Returns what went wrong, {case: why}: a
    failure here costs time later and nothing else."""
    chosen = [name for name in names if name in _PEERS], [name for name in (_BACKENDS if backends is None else backends) if name in _BACKENDS]
    # The same shapes compile the same kernels, whether a graph is replayed or not. Backward passes, which take long, are not left for the end.
    distinct = sorted(dict.fromkeys(dataclasses.replace(case, graph=False) for case in cases), key=lambda c: c.mode == "forward")
    answers = workers.ask(command, [{"case": case.to_json(), "peers": chosen[0], "backends": chosen[1]} for case in distinct], count, tick, limit)
    failed = {str(case): "no answer" for case, answer in zip(distinct, answers) if answer is None}
    for case, answer in zip(distinct, answers):
        failed.update({f"{case}: {name}": why for name, why in (answer or {}).items()})
    return failed


def estimate(cases: list[Case], names: tuple[str, ...], backends: Optional[tuple[str, ...]], settings: Settings) -> float:
    """Seconds that a GPU run takes, about: rounds, first calls, and what FlexAttention traces even where its kernels are on disk."""
    mine = 4 if backends is None else len(backends)
    # Who reads pages or fp8 is timed without them as well.
    turns = sum(len(names) + mine * (2 if case.page_size or case.fp8 else 1) for case in cases)
    flex = "flex" in names
    compiling = 20.0 + len(cases) * (10.0 if flex else 3.0) / workers.jobs()
    return turns * (settings.rounds * settings.round_seconds + 0.1) + len(cases) * (1.8 if flex else 0.3) + compiling


def _compile(asked: dict[str, Any]) -> dict[str, str]:
    """Call everybody once. Returns what failed: {peer: why}."""
    import torch

    from attnhub.bench.peers import first_line

    for _ in range(_PATIENT_TRIES):
        try:
            return _call_everybody(Case.of(asked["case"]), tuple(asked["peers"]), tuple(asked["backends"]))
        except torch.OutOfMemoryError:
            # The other processes hold the rest of it, for seconds.
            time.sleep(3.0)
        except Exception as error:
            return {"": first_line(error)}
        finally:
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
    return {"": "out of memory"}


def _call_everybody(case: Case, names: tuple[str, ...], backends: tuple[str, ...]) -> dict[str, str]:
    import torch

    from attnhub.bench import peers

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tensors = peers.inputs(case, device)
    failed = {}
    for peer in peers.assemble(case, tensors, names, backends):
        if isinstance(peer, peers.Absent):
            continue
        try:
            with peer.context():
                if case.mode == "forward":
                    with torch.no_grad():
                        peer.attend(*tensors)
                elif peer.differentiable:
                    leaves = tuple(t.detach().requires_grad_() for t in tensors)
                    out = peer.attend(*leaves)
                    torch.autograd.grad(out, leaves, torch.ones_like(out))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failed[peer.name] = peers.first_line(error)
    return failed


if __name__ == "__main__":
    workers.answer(_compile)
