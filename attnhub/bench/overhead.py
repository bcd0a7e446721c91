"""Host time of one tiny eager call: what attnhub adds before anything is computed, beside F.scaled_dot_product_attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

import attnhub
from attnhub.bench.measure import Settings
from attnhub.bench.overhead_case import OverheadCase, budget, cases


def run(device: torch.device, backends: tuple[str, ...], settings: Settings, tick: Optional[Callable[[str], None]] = None) -> list[dict[str, Any]]:
    """One row for every case and peer. A turn is a batch of calls, timed by the clock; the queue of a GPU is emptied between turns."""
    rows: list[dict[str, Any]] = []
    for case in cases(device.type):
        steps = {name: _step(name, case, device) for name in ("F.sdpa", *(f"attnhub {b}" for b in backends))}
        usable: dict[str, Callable[[], Any]] = {}
        for name, step in steps.items():
            try:
                for _ in range(20):
                    step()
                usable[name] = step
            except attnhub.NoBackendError as error:
                rows.append({"mode": case.mode, "peer": name, "skipped": error.decision.why})
        calls = max(1, int(settings.round_seconds / max(_seconds(usable["F.sdpa"], 200, device), 1e-7)))
        # Turns are short and many: what disturbs a shared machine lasts longer than a turn, and then hits all of a round.
        times: dict[str, list[float]] = {name: [] for name in usable}
        for r in range(settings.rounds):
            order = list(usable)
            for name in order[r % len(order) :] + order[: r % len(order)]:
                if tick:
                    tick(f"{case.mode}: {name}")
                times[name].append(_seconds(usable[name], calls, device))
        base = statistics.median(times["F.sdpa"])
        for name, values in times.items():
            ratios = [mine / theirs for mine, theirs in zip(values, times["F.sdpa"])]
            rows.append(
                {"mode": case.mode, "peer": name, "microseconds": statistics.median(values) * 1e6, "ratio": statistics.median(ratios),
                 "budget": budget(case, device.type) if name != "F.sdpa" else None, "calls": calls, "baseline_microseconds": base * 1e6}
            )  # fmt: skip
    return rows


def _step(name: str, case: OverheadCase, device: torch.device) -> Callable[[], Any]:
    # On a GPU in bf16, which every backend there serves.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(case.shape, device=device, dtype=dtype, requires_grad=case.grad) for _ in range(3))
    chosen = name.removeprefix("attnhub ") if name.startswith("attnhub ") else None
    backend = None if chosen == "auto" else chosen

    def call() -> Tensor:
        if chosen is None:
            return F.scaled_dot_product_attention(q, k, v)
        out = attnhub.attention(q, k, v, backend=backend)
        assert isinstance(out, Tensor)
        return out

    if case.backward:
        ones = torch.ones(case.shape, device=device, dtype=dtype)
        return lambda: torch.autograd.grad(call(), (q, k, v), ones)
    return call


def _seconds(step: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Host seconds a call; the device works behind the queue and is waited for outside of the clock."""
    started = time.perf_counter()
    for _ in range(calls):
        step()
    elapsed = (time.perf_counter() - started) / calls
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return elapsed
