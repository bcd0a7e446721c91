"""``attnhub new-backend NAME``: a distribution with a backend that works, is found, and passes the conformance suite.

What it writes is ``skeleton/`` with the name filled in; ``examples/toy-backend`` of the repository is its output for ``toy``.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import string

from attnhub.cli import CommandError, console, files
from attnhub.registry import registry

#: file of the distribution -> file in skeleton/. `$package` and `$name` stand for themselves in both.
FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "$package/__init__.py": "init.py.in",
    "$package/launcher.py": "launcher.py.in",
    "$package/kernels/__init__.py": "kernels_init.py.in",
    "$package/kernels/attention.py": "attention.py.in",
    "$package/tune.json": "tune.json.in",
    "tests/test_$name.py": "test.py.in",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of the backend: lower-case letters, digits and _, as users will write it in backend=")
    parser.add_argument("--output", default="", help="folder of the distribution, new or empty; default: attnhub-NAME here")


def run(args: argparse.Namespace) -> int:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", args.name) or args.name == "auto":
        raise CommandError(f"NAME {args.name!r}: lower-case letters, digits and _, beginning with a letter, and not `auto`")
    if args.name in registry.names():
        raise CommandError(f"NAME {args.name!r} is taken by {registry.distribution(args.name)}; installed are {', '.join(registry.names())}")
    folder = pathlib.Path(args.output or f"attnhub-{args.name}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{folder} exists and is not an empty folder; nothing was written")
    written = skeleton(args.name)
    for path, text in written.items():
        files.write_text(folder / path, text)
    if args.json:
        console.emit_json({"folder": str(folder), "files": sorted(written)})
    else:
        console.say(f"written: {folder} ({len(written)} files)")
        console.say(f"next: pip install -e {folder} && pytest {folder}; then replace attnhub_{args.name}/kernels/attention.py (docs/add-a-backend.md)")
    return 0


def skeleton(name: str) -> dict[str, str]:
    """File -> text of the distribution for a backend of this name."""
    here = pathlib.Path(__file__).parent / "skeleton"
    words = {"name": name, "package": f"attnhub_{name}", "title": "".join(part.capitalize() for part in name.split("_"))}
    return {
        string.Template(path).substitute(words): string.Template((here / source).read_text(encoding="utf-8")).substitute(words)
        for path, source in FILES.items()
    }
