"""The resident set of this process, as Linux tells it. Of the standard library alone: a process that measures a file's memory holds nothing else."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Optional


def begin() -> Optional[int]:
    """KiB that are resident, once what was freed has gone back to the system and the peak is forgotten; None where Linux does not tell."""
    # glibc keeps blocks, and a call that reuses them would seem to need nothing. With another C library the figure may be too small by what that keeps.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # Linux forgets the peak when 5 is written there (man 5 proc_pid_clear_refs).
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return status("VmRSS")
    except OSError:
        return None


def peak() -> int:
    """The most KiB since `begin`."""
    return status("VmHWM")


def status(name: str) -> int:
    """A line of /proc/self/status. OSError where there is none."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
