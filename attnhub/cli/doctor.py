"""``attnhub doctor``."""

from __future__ import annotations

import argparse
from typing import Any

from attnhub.cli import console
from attnhub.doctor import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if `attnhub.attention` can work here, else 1."""
    report = examine()
    if args.json:
        console.emit_json(report)
    else:
        show(report)
    return 1 if report["problems"] else 0


def show(report: dict[str, Any]) -> None:
    """The report for people."""
    python, own, torch = report["python"], report["attnhub"], report["torch"]
    console.say(f"attnhub {own['version']} at {own['path']}" + ("" if own["installed"] else " (not installed: a checkout on the path)"), "bold")
    console.say(f"Python {python['version']} ({python['executable']}) on {python['platform']}")
    console.say("packages: " + (", ".join(f"{name} {version}" for name, version in report["packages"].items()) or "none of those that attnhub can use"))
    if torch["version"]:
        build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU only"
        console.say(f"torch {torch['version']} ({build}), {torch['threads']} threads")
    else:
        console.say(f"torch does not import: {torch['error']}", "red")
    rows = [(d["device"], d["name"], ".".join(map(str, d["arch"])) or d["vendor"], ", ".join(d["isa"])) for d in torch["devices"]]
    if rows:
        console.table("Devices", ("device", "name", "architecture", "instruction sets"), rows)
    console.table("Backends", ("backend", "state", "distribution", "versions", "reasons"), [_backend_row(n, e) for n, e in report["backends"].items()])
    console.table(
        "Native libraries", ("backend", "state", "path"),
        [(name, "built" if lib["built"] else "not built", lib["path"] or lib["error"]) for name, lib in report["libraries"].items()],
    )  # fmt: skip
    console.table(
        "Integrations", ("integration", "distribution", "state"),
        [(name, entry["distribution"], "loads" if entry["loads"] else entry["error"]) for name, entry in report["integrations"].items()],
    )  # fmt: skip
    for name, value in report["environment"].items():
        console.say(f"{name}={value}")
    for note in report["notes"]:
        console.say(f"NOTE: {note}", "yellow")
    for problem in report["problems"]:
        console.say(f"PROBLEM: {problem}", "bold red")
    if not report["problems"]:
        console.say("attnhub.attention can work here.", "green")


def _backend_row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    state = "available" + ("" if entry["automatic"] else ", by name only") if entry["available"] else "not available"
    versions = ", ".join(f"{package} {version}" for package, version in entry["versions"].items())
    reasons = "\n".join(f"{r['code']}: {r['detail']}" + (f" ({r['hint']})" if r["hint"] else "") for r in entry["reasons"])
    return name, state, entry["distribution"], versions, reasons
