"""``attnhub explain``: the choice for a problem, without tensors and, for device classes, without the device."""

from __future__ import annotations

import argparse
from typing import Any

from attnhub import config
from attnhub.cli import CommandError, console, values
from attnhub.cli.devices import CLASSES, resolve
from attnhub.decision import Decision
from attnhub.policy import in_force
from attnhub.problem import Feature, Problem, seqlen_class, size_bucket
from attnhub.reasons import Accepted, Code
from attnhub.registry import registry
from attnhub.selector import Candidate, select

DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn")
_SHORT = {
    "fp8": "float8_e4m3fn", "e4m3": "float8_e4m3fn", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32",
    "fp64": "float64", "double": "float64",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments are those that `attnhub.decision.explain_command` prints."""
    parser.add_argument("--device", default="cpu", help=f"cpu, cuda, xpu, mps (of this machine), or a class: {', '.join(CLASSES)}")
    parser.add_argument("--dtype", default="float32", help=f"of q: {', '.join(DTYPES)}")
    parser.add_argument("--kv-dtype", default="", help="of k and v, where it differs")
    parser.add_argument("--batch", type=values.size, default=1)
    parser.add_argument("--heads", type=values.size, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=values.size, default=0, help="key and value heads; default: as many as query heads")
    parser.add_argument("--seqlen-q", type=values.size, default=1024)
    parser.add_argument("--seqlen-k", type=values.size, default=0, help="default: as --seqlen-q")
    parser.add_argument("--head-dim", type=values.size, default=64)
    parser.add_argument("--v-head-dim", type=values.size, default=0, help="of v, where it differs")
    parser.add_argument("--page-size", type=values.size, default=16, help="of a paged K/V cache, with --features paged")
    parser.add_argument("--features", default="", help=f"joined by commas: {', '.join(f.value for f in Feature)}")
    parser.add_argument("--backward", action="store_true", help="a backward pass follows")
    parser.add_argument("--backend", default="", help="a name or a list in order of preference, as in ATTNHUB_BACKEND")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if a backend serves the problem, else 1."""
    decision, assumed = decide(args)
    if args.json:
        console.emit_json({**decision.to_json(), "device_assumed": assumed})
    else:
        show(decision, assumed)
    return 0 if decision.chosen else 1


def decide(args: argparse.Namespace) -> tuple[Decision, bool]:
    """(decision, whether the device is a class that this machine need not have)."""
    device, here = resolve(args.device)
    candidates = registry.candidates()
    if not here:
        # What this machine lacks says nothing about the machine that is asked about; a backend that does not load stays out.
        candidates = {name: c if c.backend is None else Candidate(c.backend) for name, c in candidates.items()}
    try:
        return select(problem(args, device), in_force(args.backend, argument="--backend"), candidates), not here
    except ValueError as error:
        raise CommandError(str(error)) from error


def problem(args: argparse.Namespace, device: Any) -> Problem:
    """The problem that the arguments describe."""
    known = {f.value: f for f in Feature}
    wanted = values.names(args.features)
    if unknown := [name for name in wanted if name not in known]:
        raise CommandError(f"--features: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    features = {known[name] for name in wanted}
    q_dtype = _dtype("--dtype", args.dtype)
    kv_dtype = _dtype("--kv-dtype", args.kv_dtype) if args.kv_dtype else q_dtype
    kv_heads, v_head_dim, seqlen_k = args.kv_heads or args.heads, args.v_head_dim or args.head_dim, args.seqlen_k or args.seqlen_q
    if args.heads % kv_heads:
        raise CommandError(f"--heads {args.heads} is not a multiple of --kv-heads {kv_heads}")
    if kv_heads != args.heads:
        features.add(Feature.GQA)
    if v_head_dim != args.head_dim:
        features.add(Feature.DV_DIFFERS)
    if Feature.PAGED in features:
        features.add(Feature.SEQLENS)
    if args.backward:
        features.add(Feature.LSE)
    if config.deterministic(config.snapshot()):
        features.add(Feature.DETERMINISTIC)
    return Problem(
        device=device, q_dtype=q_dtype, kv_dtype=kv_dtype, head_dim=args.head_dim, v_head_dim=v_head_dim, q_heads=args.heads, kv_heads=kv_heads,
        batch=size_bucket(args.batch), seqlen_q=seqlen_class(args.seqlen_q), seqlen_k=size_bucket(seqlen_k), features=frozenset(features),
        page_size=args.page_size if Feature.PAGED in features else 0, need_backward=args.backward,
    )  # fmt: skip


def show(decision: Decision, assumed: bool) -> None:
    """The decision as a table: every backend, accepted with its cost or with all its reasons."""
    console.say(str(decision).split("\n")[0])
    if assumed:
        console.say("As on a machine with this device and everything that the backends need; probes of this machine are left out.")
    rows = []
    for name, verdict in decision.verdicts.items():
        if isinstance(verdict, Accepted):
            place = f"choice {decision.order.index(name) + 1}" if name in decision.order else "accepts, not asked for"
            rows.append((name, "chosen" if name == decision.chosen else place, f"{verdict.cost:g}", ""))
        else:
            rows.append((name, "rejects", "", "\n".join(map(str, verdict.reasons))))
    console.table("", ("backend", "verdict", "cost", "reasons"), rows, right=("cost",))
    console.say(f"chosen: {decision.chosen or 'none'} ({decision.why})", "bold green" if decision.chosen else "bold red")
    if decision.problem.need_backward:
        console.say(f"backward: {decision.backward or 'none'}")
        for name, verdict in decision.backward_verdicts.items():
            if not isinstance(verdict, Accepted):
                told = [str(reason) for reason in verdict.reasons if reason.code is not Code.NAME_ONLY]
                if told:
                    console.say(f"  no backward by {name}: " + "; ".join(told))
    console.say("cost: declared time relative to torch's own attention; a code's meaning and remedy: docs/reasons.md")


def _dtype(option: str, value: str) -> str:
    name = _SHORT.get(value, value).removeprefix("torch.")
    if name not in DTYPES:
        raise CommandError(f"{option} {value}: allowed are {', '.join(DTYPES)}")
    return name
