"""``python -m attnhub.testing``: the conformance suite as a program, with a result file."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Optional

import torch

from attnhub import device as devices
from attnhub.registry import registry
from attnhub.testing.checks import Check, checks


def _commit() -> Optional[str]:
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _run(check: Check) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": check.backend, "check": str(check)}
    started = time.perf_counter()
    try:
        outcome = check.run()
        row.update(passed=True, worst=round(outcome.worst, 4), errors={k: round(v, 4) for k, v in outcome.errors.items()})
    except Exception as error:
        row.update(passed=False, error=f"{type(error).__name__}: {error}"[:2000])
    row["seconds"] = round(time.perf_counter() - started, 4)
    return row


def _rows(todo: list[Check], jobs: int) -> Iterator[dict[str, Any]]:
    """One row a check, in order."""
    if jobs <= 1:
        yield from map(_run, todo)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_run, check) for check in todo]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of at least 0 is needed")
    return value


def _processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number above 0 is needed")
    return int(text)


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attnhub.testing", description=__doc__)
    parser.add_argument("--backend", required=True, help="names, joined by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--level", default="quick", choices=("tiny", "quick", "full"), help="cases; default: quick")
    parser.add_argument("--output", help="result file (JSON), written atomically")
    parser.add_argument("--seconds", type=_seconds, default=0.0, help="stop after so many seconds a backend and say how many checks were left; 0 is no limit")
    parser.add_argument("--jobs", type=_processes, default=1, help="processes; kernels that compile at their first call want many")
    args = parser.parse_args(argv)
    backends = [name.strip() for name in args.backend.split(",") if name.strip()]
    unknown = [name for name in backends if name not in registry.names()]
    if unknown or not backends:
        parser.error(f"argument --backend: {(unknown or [args.backend])[0]!r}: names of installed backends are needed: {', '.join(registry.names())}")
    try:
        device = devices.named(args.device, "argument --device: ")
    except ValueError as error:
        parser.error(str(error))
    if args.output:
        folder = os.path.dirname(os.path.abspath(args.output))
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --output: {args.output!r}: {folder} cannot be made: {error.strerror}; a file in a directory is needed")
    rows: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for name in backends:
        probe = registry.candidates()[name].probe
        if probe:
            rows.append({"backend": name, "check": "probe", "passed": False, "error": "; ".join(map(str, probe)), "seconds": 0.0})
            print(f"{name}: not available: {rows[-1]['error']}")
            continue
        todo = checks(name, args.device, args.level)
        if not any(check.case for check in todo):
            why = f"it declares nothing that could be checked on {args.device}; `attnhub matrix` lists its devices"
            rows.append({"backend": name, "check": "declaration", "passed": False, "error": why, "seconds": 0.0})
            print(f"{name}: {why}")
            continue
        started = time.perf_counter()
        done = 0
        for row in _rows(todo, args.jobs):
            rows.append(row)
            done += 1
            if not row["passed"]:
                print(f"FAILED {name} {row['check']}: {row['error'][:600]}", flush=True)
            if args.seconds and time.perf_counter() - started > args.seconds:
                break
        if done < len(todo):
            left_out[name] = len(todo) - done
        mine = [r for r in rows if r["backend"] == name]
        worst = max((r.get("worst", 0.0) for r in mine), default=0.0)
        print(
            f"{name} on {args.device}: {sum(r['passed'] for r in mine)} passed, {sum(not r['passed'] for r in mine)} failed, "
            f"{left_out.get(name, 0)} not run; largest error {worst:.2f} of the allowed; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    if args.output:
        info = devices.describe(torch.device("cuda", 0) if args.device == "cuda" else device)
        result = {
            "suite": "conformance", "level": args.level, "device": info.to_json(), "commit": _commit(),
            "environment": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
            "passed": sum(r["passed"] for r in rows), "failed": sum(not r["passed"] for r in rows), "not_run": left_out, "rows": rows,
        }  # fmt: skip
        temporary = f"{args.output}.{os.getpid()}.tmp"
        with open(temporary, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
        os.replace(temporary, args.output)
    return 0 if rows and all(r["passed"] for r in rows) else 1
