"""What became of the calls: who served them, and which went to torch, with the reason."""

from __future__ import annotations

import logging
import threading
from typing import Any

log = logging.getLogger("attnhub")

_said: set[str] = set()


class NotServedError(RuntimeError):
    """``strict=True``, and attnhub cannot serve a call of F.scaled_dot_product_attention."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"attnhub cannot serve this call of F.scaled_dot_product_attention: {reason}; strict=False leaves such calls to torch")
        self.reason = reason


class SdpaReport:
    """Calls since the replacement began, kept up to date from any thread. Calls inside a compiled graph are not seen.

    backends: name -> calls that attnhub served by it. to_torch: reason -> calls that went to torch's own function.
    """

    def __init__(self) -> None:
        self.backends: dict[str, int] = {}
        self.to_torch: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def calls(self) -> int:
        """Calls that attnhub served."""
        return sum(self.backends.values())

    def count(self, backend: str) -> None:
        with self._lock:
            self.backends[backend] = self.backends.get(backend, 0) + 1

    def count_torch(self, reason: str) -> None:
        with self._lock:
            self.to_torch[reason] = self.to_torch.get(reason, 0) + 1

    def to_json(self) -> dict[str, Any]:
        return {"calls": self.calls, "backends": dict(self.backends), "to_torch": dict(self.to_torch)}

    def __str__(self) -> str:
        served = ", ".join(f"{name} x{count}" for name, count in sorted(self.backends.items())) or "none yet"
        lines = [f"F.scaled_dot_product_attention: {self.calls} calls served by attnhub ({served}), {sum(self.to_torch.values())} left to torch"]
        return "\n".join([*lines, *(f"  torch x{count}: {reason}" for reason, count in sorted(self.to_torch.items()))])


def say_once(reason: str) -> None:
    """Tell of a reason when it is first met in this process."""
    if reason not in _said:
        _said.add(reason)
        log.warning("a call of F.scaled_dot_product_attention is left to torch: %s", reason)
