"""``attnhub bench models``: whole models with and without attnhub, side by side."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, Optional

from attnhub.bench import models
from attnhub.cli import CommandError, console, progress
from attnhub.cli.devices import asked
from attnhub.cli.offline import forbid_hub


def run(args: argparse.Namespace) -> int:
    """Time the cases of a preset. The result file is written after each of them, so that a stop loses nothing."""
    names, todo = _chosen(args)
    if args.list:
        return _list(args, names, todo)
    if importlib.util.find_spec("transformers") is None:
        raise CommandError("models are those of transformers: pip install 'attnhub[hf]'")
    import torch

    from attnhub.bench import pages
    from attnhub.bench.zoo import Zoo
    from attnhub.cli import growing

    forbid_hub()
    if args.threads:
        torch.set_num_threads(args.threads)
    preset = models.PRESETS[args.preset]
    # A tiny gpu preset runs anywhere.
    device = asked(args.device or preset.device, "`attnhub bench models --preset cpu` needs none")
    settings = growing.settings(args, *((1, 0.001) if args.scale == models.TINY else preset.turns), 60.0)
    # Figures of tiny models must not lie where those of real ones do.
    name = args.preset if args.scale == "full" else f"{args.preset}-{args.scale}"
    file = growing.Growing(args, models.SUITE, name, device, settings, scale=args.scale)
    file.result["environment"]["transformers"] = importlib.import_module("transformers").__version__
    todo = file.left(todo, models.ModelCase.of)
    run_case = _runner(args.preset, file.result)
    zoo = Zoo(device, args.scale)
    for text, case in file.cases(todo):
        began = time.monotonic()
        with progress.bar(text, len(names) * (settings.rounds + 1), args.json) as tick:
            rows = run_case(case, zoo, names, settings, tick)
        file.add(rows)
        if not args.json:
            console.table(f"{case} ({time.monotonic() - began:.0f} s)", *pages.model_table(rows), right=pages.NUMERIC)
    if file.finish():
        print(f"written: {file.path}", file=sys.stderr)
    if args.json:
        console.emit_json(file.result)
    return 0


def _runner(preset: str, result: dict[str, Any]) -> Callable[..., list[dict[str, Any]]]:
    """Who measures a case of the preset. The environment tells what it needs besides torch."""
    if preset != models.ONNX:
        from attnhub.bench.model_runs import run_case

        return run_case
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"files of models need {', '.join(missing)}: pip install 'attnhub[onnx]'")
    result["environment"]["onnxruntime"] = importlib.import_module("onnxruntime").__version__
    from attnhub.bench.onnx_models import run_case as run_file

    return run_file


def _chosen(args: argparse.Namespace) -> tuple[tuple[str, ...], list[models.ModelCase]]:
    """(peers, cases). The baseline and attnhub always take part."""
    if args.preset is None:
        args.preset = "gpu" if args.device.startswith("cuda") else "cpu"
    if args.preset not in models.PRESETS:
        raise CommandError(f"--preset {args.preset} is none of the suite models; it has {', '.join(models.PRESETS)}")
    if args.lengths or args.dtypes or args.modes:
        raise CommandError("--lengths, --dtypes and --modes are of single calls; --only chooses among the cases of models")
    known = models.peers_of(args.preset)
    wanted = models.PRESETS[args.preset].peers if args.peers is None else args.peers
    if unknown := [name for name in wanted if name not in known]:
        raise CommandError(f"--peers: unknown {', '.join(unknown)}; models know {', '.join(known)}")
    if args.preset == models.ONNX and (args.backends or args.device not in ("", "cpu")):
        raise CommandError("--backends, --device: files run by attnhub's native library, and that on the CPU")
    ours = ["attnhub" if name == "auto" else f"attnhub {name}" for name in args.backends or ("auto",)]
    names = tuple(dict.fromkeys((models.BASELINE, *wanted, *ours)))
    todo = models.select(args.preset, args.scale, args.only)
    if not todo:
        raise CommandError("--only leaves no case of this preset")
    return names, todo


def _list(args: argparse.Namespace, names: tuple[str, ...], todo: list[models.ModelCase]) -> int:
    if args.json:
        console.emit_json({"cases": [str(case) for case in todo], "peers": list(names)})
        return 0
    for case in todo:
        absent: Optional[str] = ", ".join(name for name in names if models.left_out(case, name, models.PRESETS[args.preset].device))
        console.say(f"{case}{f' (without {absent})' if absent else ''}")
    console.say(f"{len(todo)} cases, {', '.join(names)}")
    return 0
