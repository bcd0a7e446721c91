"""Result files: what was measured, where, with what, from which commit. Torch is imported only to describe a live machine."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
from typing import Any, Optional

import attnhub
from attnhub.bench import processor
from attnhub.registry import registry

SCHEMA = "attnhub.bench/1"
#: Where committed results are, in a checkout: <device>/<suite>-<preset>.json, or <suite>-<preset>-<threads>t.json.
FOLDER = "benchmarks/results"
#: Behind a commit: the checkout had changes on top of it.
CHANGED = "+changes"


def environment(device: Any) -> dict[str, Any]:
    """The machine and the software. device: a torch.device."""
    import torch

    from attnhub.device import describe

    info = describe(device)
    return {
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": info.to_json(),
        **({"cpu": processor.facts()} if device.type == "cpu" else {}),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "attnhub": attnhub.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "backends": {n: c.backend.versions() for n, c in registry.candidates().items() if c.backend is not None and not c.probe},
    }


def commit() -> Optional[str]:
    """The commit of the checkout that runs, with ``+changes`` if it has any; None for an installed package."""
    here = pathlib.Path(attnhub.__file__).resolve().parent.parent
    if not (here / "attnhub" / "reasons.py").is_file() or not (here / ".git").exists():
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        # Results and pages made from them may change without the code being another.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "attnhub", "backends", "integrations")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (CHANGED if changed else "")


def document(
    suite: str, preset: str, device: Any, settings: dict[str, Any], rows: list[dict[str, Any]], ceilings: Optional[dict[str, Any]] = None
) -> dict[str, Any]:
    """The content of a result file. ceilings: what the machine reached between the cases (ceilings.py)."""
    described = {**environment(device), **({"ceilings": ceilings} if ceilings else {})}
    return {"schema": SCHEMA, "suite": suite, "preset": preset, "environment": described, "commit": commit(), "settings": settings, "rows": rows}


def slug(name: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200``: a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def machine(environment: dict[str, Any]) -> str:
    """The device's name for people. Where it names no model (`AMD EPYC`), what tells generations apart follows."""
    name: str = environment["device"]["name"]
    return f"{name} ({words})" if (words := _model_words(environment)) else name


def folder(environment: dict[str, Any]) -> str:
    """The folder of a machine's results: ``nvidia-h200``, ``amd-epyc-family-25-model-17``."""
    name = environment["device"]["name"]
    if environment["device"]["type"] == "cpu":
        name = _PLAIN.sub(" ", name)
    return slug(f"{name} {_model_words(environment)}")


#: What a CPU's name holds besides its name.
_PLAIN = re.compile(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", re.IGNORECASE)


def _model_words(environment: dict[str, Any]) -> str:
    if "cpu" not in environment or re.search(r"\d", _PLAIN.sub(" ", environment["device"]["name"])):
        return ""
    return processor.model_words(environment["cpu"])


def target(output: str, result: dict[str, Any]) -> pathlib.Path:
    """The file for ``--output``: as given, or inside it if it is a folder."""
    path = pathlib.Path(output)
    if output.endswith(("/", os.sep)) or path.is_dir():
        # A number of threads that was asked for is part of the name: files of 1 and of 16 threads lie side by side.
        threads = f"-{result['settings']['threads']}t" if result["settings"].get("threads") else ""
        path = path / folder(result["environment"]) / f"{result['suite']}-{result['preset']}{threads}.json"
    return path


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A result file. ValueError if it is none of ours."""
    data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result file of `attnhub bench` (schema {SCHEMA})")
    return data


def continued(path: str | os.PathLike[str], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result file that a run with the document ``now`` may add to. ValueError where they are another machine's or code's."""
    before = load(path)
    facts = ("device", "torch", "cuda", "cudnn", "backends")
    differ = [name for name in facts if before["environment"].get(name) != now["environment"].get(name)]
    differ += [name for name in ("commit", "settings", "preset") if before[name] != now[name]]
    if differ:
        raise ValueError(f"--resume: {path} was measured with another {', '.join(differ)}; measure it anew without --resume")
    if str(now["commit"]).endswith(CHANGED):
        raise ValueError(f"--resume: {path} was measured with changes on top of a commit, which may be others by now; commit them, and measure anew")
    rows: list[dict[str, Any]] = before["rows"]
    return rows


def committed(root: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """(path within the checkout, content) of its benchmark results, in order of path."""
    found = []
    for path in sorted((root / FOLDER).glob("*/*.json")):
        try:
            found.append((path.relative_to(root).as_posix(), load(path)))
        except ValueError:
            continue  # the conformance suite keeps its results beside these
    return found


def conformance(root: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """(path within the checkout, content) of the committed results of ``python -m attnhub.testing``."""
    found = []
    for path in sorted((root / FOLDER).glob("*/*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("suite") == "conformance":
            found.append((path.relative_to(root).as_posix(), data))
    return found
