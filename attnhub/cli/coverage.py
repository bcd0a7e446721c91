"""``attnhub coverage``: every model class of the installed transformers, tiny, by eager attention and by attnhub; and the page of it."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import sys
import time
from collections import Counter
from typing import Any, Optional

from attnhub.cli import CommandError, console, files, progress

RESULTS = pathlib.PurePosixPath("docs/huggingface-coverage.json")
PAGE = pathlib.PurePosixPath("docs/huggingface-coverage.md")
PROBE = "attnhub.integrations.huggingface.probe"
#: Findings are written to the file after so many seconds, and at the end.
_WRITE_EVERY = 20.0
#: state -> what it means; the order of the page.
STATES = {
    "routed": "attnhub served every attention module that ran, and the outputs agree",
    "partly": "attnhub served some of them, and the outputs agree",
    "not routed": "attnhub served none; the module's own operations ran, and the outputs are eager attention's",
    "differs": "the outputs are too far from eager attention's: a defect",
    "fails": "the patched model raised an error: a defect",
    "no attention": "the class holds no attention module",
    "not run": "no tiny model of it could be made and run with eager attention",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="REGEX", help="only classes whose name this matches somewhere; the others keep their findings")
    parser.add_argument("--resume", action="store_true", help="keep the findings in the file and try only the classes that have none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side; default: one a processor")
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS", help="a class that takes longer is given up; default: 60")
    parser.add_argument("--output", metavar="FILE", help="write the findings there, and no page; default: the checkout's page and its findings")
    parser.add_argument("--root", help="the checkout; default: the one that holds the current folder")


def run(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise CommandError(f"--jobs {args.jobs}: at least 1 process is needed")
    root = None if args.output else files.checkout(args.root)
    path = pathlib.Path(args.output) if root is None else root / RESULTS
    found = _probe_all(path, args)
    if root is not None:
        files.write_text(root / PAGE, page(found))
    counts = Counter(finding["state"] for finding in found["classes"].values())
    if args.json:
        console.emit_json({"states": counts, "file": str(path)})
    else:
        console.say(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) + f"; written: {path}")
    return 1 if counts["differs"] or counts["fails"] else 0


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The findings in a file; empty ones where there is none."""
    if not os.path.isfile(path):
        return {"classes": {}}
    found: dict[str, Any] = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    return found


def _probe_all(path: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
    from attnhub.bench.workers import ask

    command = (sys.executable, "-m", PROBE)
    (listing,) = ask(command, [None], 1)
    if listing is None:
        raise CommandError("transformers cannot be imported here, or is older than 4.56: pip install 'attnhub[hf]'")
    versions = {"transformers": listing["transformers"], "torch": listing["torch"]}
    before = read(path)
    keeps = (args.resume or args.only) and {k: before.get(k) for k in versions} == versions
    findings: dict[str, Any] = dict(before["classes"]) if keeps else {}
    wanted = [name for name in listing["classes"] if re.search(args.only, name) and not (args.resume and name in findings)]
    written = time.monotonic()

    def heard(n: int, answer: Optional[Any]) -> None:
        nonlocal written
        finding = answer or {"state": "not run", "reason": f"its process ended, or took more than {args.patience:g} seconds"}
        findings.pop(wanted[n], None)
        if finding["state"] != "no model":
            findings[wanted[n]] = {"folder": listing["classes"][wanted[n]], **finding}
        if time.monotonic() - written > _WRITE_EVERY:
            _write(path, {**versions, "classes": findings})
            written = time.monotonic()

    with progress.bar("coverage", len(wanted), quiet=args.json) as tick:
        ask(command, wanted, args.jobs, tick=tick, patience=args.patience, heard=heard)
    found = {**versions, "classes": {name: findings[name] for name in sorted(findings)}}
    _write(path, found)
    return found


def _write(path: pathlib.Path, found: dict[str, Any]) -> None:
    """One line a class: the file is in the repository, and a change of one class is a change of one line."""
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in found.items() if key != "classes")
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(finding)}" for name, finding in found["classes"].items())
    files.write_text(path, "{\n" + head + ' "classes": {\n' + lines + "\n }\n}\n")


# -- the page --------------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """docs/huggingface-coverage.md."""
    classes = found["classes"]
    counts = Counter(finding["state"] for finding in classes.values())
    folders: dict[str, dict[str, Any]] = {}
    for name, finding in classes.items():
        folders.setdefault(finding["folder"], {})[name] = finding
    summary = console.markdown_table(("state", "classes", "meaning"), [(state, str(counts[state]), text) for state, text in STATES.items()])
    ran = {folder: members for folder, members in folders.items() if any("ran" in m for m in members.values())}
    rows = [_row(folder, ran[folder]) for folder in sorted(ran)]
    table = console.markdown_table(("folder", "routed", "partly", "not", "largest difference", "how, and why not"), rows)
    rest = sorted(set(folders) - set(ran))
    without = [f for f in rest if all(m["state"] == "no attention" for m in folders[f].values())]
    unrun = [(f, name, m.get("reason", "")) for f in sorted(folders) for name, m in folders[f].items() if m["state"] == "not run"]
    return (
        "<!-- Generated by `attnhub coverage` from docs/huggingface-coverage.json. Do not edit. -->\n\n"
        "# Which transformers models attnhub routes\n\n"
        f"Measured with transformers {found.get('transformers', '?')} and torch {found.get('torch', '?')} on a CPU, in fp32: each model class that it "
        "exports, made with a tiny random\nconfiguration (a ResNet where the backbone would be timm's), run with eager attention, then patched and run again, without, with left and\nwith right padding where it "
        "takes text, and with images where its text has places for them. Calls are counted in every attention module that\nran. Outputs of valid positions may be 2e-5 apart, "
        "relative to the largest one where that is above 1; a note names models that are compared otherwise.\n`attnhub coverage` measures it again. How routing works: [huggingface.md](huggingface.md).\n\n"
        + summary
        + "\n## Classes that ran\n\nA row is a folder of transformers and counts its classes. *interface*: the attention asks transformers' attention interface. "
        "*own maths*: it\nwrites out the operations, and attnhub reads them while it runs.\n\n"
        + table
        + "\n## Without attention\n\n"
        + (", ".join(f"`{f}`" for f in without) or "None.")
        + "\n\n## Not run\n\nThese say nothing about attnhub: the rules that make configurations and inputs small are general, with hints for some families.\n\n"
        + console.markdown_table(("folder", "class", "why"), [(f, f"`{name}`", _escape(why)) for f, name, why in unrun])
    )


def _row(folder: str, members: dict[str, Any]) -> tuple[str, ...]:
    states = Counter(m["state"] for m in members.values())
    ran = [m for m in members.values() if "ran" in m]
    notes = []
    own = sorted({kind for m in ran for kind in m.get("own", ())})
    if own:
        notes.append("own maths: " + ", ".join(f"`{kind}`" for kind in own))
    if any(m["served"] > 0 and not m.get("own") for m in ran):
        notes.insert(0, "interface")
    notes.extend(sorted({_escape(reason) for m in ran for reason in m.get("reasons", ())}))
    notes.extend(f"`{name}`: {_escape(m['note'])}" for name, m in members.items() if "note" in m)
    notes.extend(f"`{name}` {m['state']}: {_escape(m.get('reason', ''))}" for name, m in members.items() if m["state"] in ("differs", "fails"))
    numbers = [str(states[s]) if states[s] else "" for s in ("routed", "partly", "not routed")]
    return (folder, *numbers, f"{max(m['difference'] for m in ran):.1e}", "; ".join(notes))


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
