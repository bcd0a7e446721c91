"""``attnhub tune``: measure tile sizes of the triton backend on this GPU and write them into a table."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from typing import Any

from attnhub.cli import CommandError, console, progress, values

_ROLES = ("forward", "decode", "grad_kv", "grad_q")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--roles", type=values.names, default=_ROLES, help=f"joined by commas: {', '.join(_ROLES)}; default: all")
    parser.add_argument("--head-dims", type=values.numbers, default=(64, 128, 256), help="joined by commas; default: 64,128,256")
    parser.add_argument("--dtypes", type=values.names, default=("bfloat16", "float32"), help="of 2 and of 4 bytes; default: bfloat16,float32")
    parser.add_argument("--output", default="", help="table to write or to add to; default: the one that this checkout ships (backends/triton/tune.json)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, whose median counts")
    parser.add_argument("--seconds", type=float, default=0.015, help="length of a candidate's turn in a round")
    parser.add_argument("--margin", type=float, default=0.02, help="how much faster than the present tiles others must be to replace them")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which no further group is begun; what was measured is in the table")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile the candidates; default: by the processors")
    parser.add_argument("--list", action="store_true", help="measure nothing; show the groups and how many candidates each has")


def run(args: argparse.Namespace) -> int:
    """0 if every group that was asked for is in the table."""
    from attnhub.backends.triton import table, tiles

    output = pathlib.Path(args.output) if args.output else table.SHIPPED
    if not args.output and not _in_checkout(output):
        raise CommandError("--output FILE is needed: this attnhub is installed, and its own table is not yours to change; name the file in ATTNHUB_TUNE later")
    if args.rounds < 1 or args.seconds <= 0 or args.limit < 0 or args.jobs < 0 or not 0 <= args.margin < 1:
        raise CommandError("--rounds must be at least 1, --seconds above 0, --limit and --jobs not below 0, --margin from 0 to 1")
    if unknown := [name for name in args.roles if name not in _ROLES]:
        raise CommandError(f"--roles: unknown {', '.join(unknown)}; known are {', '.join(_ROLES)}")
    if unknown := [name for name in args.dtypes if name not in ("float16", "bfloat16", "float32")]:
        raise CommandError(f"--dtypes: unknown {', '.join(unknown)}; allowed are float16, bfloat16, float32")
    if wrong := [dim for dim in args.head_dims if not 1 <= dim <= 256]:
        raise CommandError(f"--head-dims: {', '.join(map(str, wrong))}; allowed are 1 to 256")
    try:
        data = table.load(output) if output.exists() else table.empty()
    except ValueError as error:
        raise CommandError(str(error)) from error
    from attnhub.backends.triton import tune
    from attnhub.bench import workers
    from attnhub.bench.cases import ITEM

    device, info = _device(args)
    name, limit = table.device_class(info), tiles.shared_memory(info.vendor, info.arch)
    work = {}
    for group in tune.groups(args.roles, args.dtypes, args.head_dims):
        item, width = ITEM[group.dtype], tiles.padded(group.head_dim)
        present = table.find(data, name, group.role, item, width, group.kind)
        work[group] = group.candidates(limit, present, exact=item == 4 and not tiles.tf32x3(info.vendor, info.arch, width, width))
    if args.list:
        shown = [{"group": str(group), "candidates": len(candidates)} for group, candidates in work.items()]
        if args.json:
            console.emit_json(shown)
        else:
            console.table("", ("group", "candidates"), [(row["group"], row["candidates"]) for row in shown], right=("candidates",))
        return 0

    started = time.monotonic()
    total = sum(map(len, work.values()))
    jobs = args.jobs or workers.jobs()
    with progress.bar(f"compiling {total} candidates in {jobs} processes", total, args.json) as tick:
        # Half of the time at most: what is not compiled by then is not timed.
        good = tune.compile_ahead(work, jobs, tick, args.limit / 2)
    settings = tune.Settings(args.rounds, args.seconds, args.margin)
    facts = tune.environment(device)
    rows: list[dict[str, Any]] = []
    with progress.bar("timing", len(work), args.json) as tick:
        for group, candidates in good.items():
            if tick:
                tick(str(group))
            if args.limit and time.monotonic() - started > args.limit:
                rows.append({"group": str(group), "unmeasured": "the time limit had passed"})
                continue
            outcome = tune.run(group, candidates, device, settings) if candidates else None
            if outcome is None:
                rows.append({"group": str(group), "unmeasured": f"none of {len(work[group])} candidates ran"})
                continue
            table.put(data, name, group.role, ITEM[group.dtype], tiles.padded(group.head_dim), group.kind, outcome.entry())
            data["devices"][name]["environment"] = facts
            table.write(output, data)
            refused = len(work[group]) - len(outcome.times)
            rows.append({"group": str(group), **outcome.entry(), "before": list(vars(work[group][0]).values()), "refused": refused})
    _show(args, rows, output)
    return 1 if any("unmeasured" in row for row in rows) else 0


def _show(args: argparse.Namespace, rows: list[dict[str, Any]], output: pathlib.Path) -> None:
    if args.json:
        console.emit_json({"table": str(output), "groups": rows})
        return
    shown = [
        (row["group"], "", "", "", "", row["unmeasured"]) if "unmeasured" in row
        else (row["group"], *(str(row[key]) for key in ("before", "tiles")), f"{row['gain']:.2f}x", str(row["timed"]), str(row["refused"]))
        for row in rows
    ]  # fmt: skip
    console.table("", ("group", "before", "tiles", "gain", "timed", "refused"), shown, right=("gain", "timed"))
    console.say("tiles: [block_m, block_n, num_warps, num_stages]; refused: did not run, or did not agree with the definition")
    print(f"written: {output}", file=sys.stderr)


def _in_checkout(path: pathlib.Path) -> bool:
    root = path.parent.parent.parent
    return (root / "pyproject.toml").is_file() and (root / "attnhub" / "reasons.py").is_file()


def _device(args: argparse.Namespace) -> tuple[Any, Any]:
    """(the GPU, or under Triton's interpreter the CPU; its description)."""
    import torch

    from attnhub import config
    from attnhub.device import describe

    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    elif config.triton_interpret() or args.list:
        device = torch.device("cpu")
    else:
        raise CommandError("torch finds no CUDA device here; tile sizes are measured on the device that they are for")
    return device, describe(device)
