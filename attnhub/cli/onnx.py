"""``attnhub onnx``: existing ONNX files to attnhub's node (convert), back to operators of a runtime (lower), and what is wrong (check)."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, Optional

from attnhub.cli import CommandError, console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    convert = actions.add_parser(
        "convert", help="MatMul-Softmax-MatMul, Attention, MultiHeadAttention and GroupQueryAttention become attnhub's node"
    )
    convert.add_argument(
        "--unpadded", action="store_true", help="all sequences of a batch are always as long as total_sequence_length (GroupQueryAttention)"
    )
    lower = actions.add_parser("lower", help="attnhub's node becomes operators that a runtime brings")
    lower.add_argument("--to", choices=("ai.onnx", "com.microsoft"), default="ai.onnx")
    check = actions.add_parser("check", help="what is wrong with attnhub's nodes in a file")
    check.add_argument("source", help="the ONNX file to read")
    for action in (convert, lower):
        action.add_argument("source", help="the ONNX file to read")
        action.add_argument("target", help="the ONNX file to write")
        action.add_argument("--inputs", help="an .npz file with inputs for the numeric check, by name; made up by default")
        action.add_argument("--no-verify", action="store_true", help="do not run both files in ONNX Runtime and compare")
    for action in (convert, lower, check):
        # Accepted behind the action too. The command's own default must not overwrite it.
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> int:
    """0 if the file was written (check: nothing is wrong); 1 if not, and the report says why."""
    import attnhub.onnx

    if args.action == "check":
        return _check(args)
    options: dict[str, Any] = {"inputs": _inputs(args.inputs), "verify": not args.no_verify}
    try:
        if args.action == "convert":
            report = attnhub.onnx.convert(args.source, args.target, unpadded=args.unpadded, **options)
        else:
            report = attnhub.onnx.lower(args.source, args.target, to=args.to, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        console.emit_json(dataclasses.asdict(report))
    else:
        console.say(str(report))
    return 0 if report.path else 1


def _check(args: argparse.Namespace) -> int:
    import attnhub.onnx

    try:
        problems = attnhub.onnx.check(args.source)
    except OSError as error:
        raise CommandError(str(error)) from error
    if args.json:
        console.emit_json({"source": args.source, "problems": [dataclasses.asdict(problem) for problem in problems]})
    else:
        console.say("\n".join(map(str, problems)) or f"{args.source}: nothing is wrong")
    return 1 if problems else 0


def _inputs(path: Optional[str]) -> Optional[dict[str, Any]]:
    if path is None:
        return None
    import numpy

    try:
        with numpy.load(path) as found:
            return dict(found)
    except (OSError, ValueError) as error:
        raise CommandError(f"--inputs {path}: {error}") from error
