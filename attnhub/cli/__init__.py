"""The command line: ``attnhub`` and ``python -m attnhub``. One file per command; none touches the network.

A command's module is imported only when it is asked for, and none imports torch at the top, so that ``attnhub doctor``
works where torch does not.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Optional

from attnhub import config

#: command -> (module in this package, one line of help)
COMMANDS = {
    "doctor": ("doctor", "versions, devices, and what every backend says of this machine"),
    "explain": ("explain", "which backend serves a problem, and every reason why the others do not"),
    "matrix": ("matrix", "the support matrix, generated from the backends' declarations"),
    "warmup": ("warmup", "compile and load the kernels for given shapes before they are asked for"),
    "bench": ("bench", "time attnhub beside its peers: cpu, gpu, whole models, or the overhead of one call"),
    "tune": ("tune", "measure tile sizes of the triton backend on this GPU and write them into a table"),
    "export": ("export", "export a model to ONNX with one attention node per layer"),
    "onnx": ("onnx", "ONNX files: convert their attention into attnhub's node, lower it to a runtime's own operators, check"),
    "demo": ("demo", "a real model, patched, generated from and exported, every step checked"),
    "coverage": ("coverage", "try every model class of the installed transformers by eager attention and by attnhub, and write the page"),
    "new-backend": ("new_backend", "write a new backend as a distribution that works and passes conformance"),
    "docs": ("docs", "write the generated pages of a checkout, or check that they are fresh"),
}


class CommandError(Exception):
    """A request that cannot be served; the message says what to change. Exit code 2."""


def _parser(command: Optional[str]) -> argparse.ArgumentParser:
    """The parser; only the arguments of the command that was asked for are filled in."""
    from attnhub import __version__

    parser = argparse.ArgumentParser(prog="attnhub", description="One attention call; every kernel that can serve it; the reason why, as data.")
    parser.add_argument("--version", action="version", version=f"attnhub {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            loaded = importlib.import_module(f"attnhub.cli.{module}")
            loaded.add_arguments(sub)
            sub.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
            sub.set_defaults(run=loaded.run)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command. Returns the exit code: 0 good, 1 something did not hold, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command in COMMANDS and command != "doctor":
        # The core reads it when it is first imported, which nobody here could catch. `doctor` tells of it in its report.
        try:
            config.log_level()
        except ValueError as error:
            print(f"attnhub {command}: {error}", file=sys.stderr)
            return 2
    parsed = _parser(command).parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except CommandError as error:
        print(f"attnhub {parsed.command}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"attnhub {parsed.command}: {type(error).__name__}: {error}; `attnhub doctor` shows what is here", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python flushes stdout again at exit, which must not fail.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        return 0
