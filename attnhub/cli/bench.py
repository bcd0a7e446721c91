"""``attnhub bench``: peers side by side, with a progress bar, a table, a JSON file and a picture."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any, Optional

from attnhub.bench import models as bench_models
from attnhub.bench import presets as bench_presets
from attnhub.bench.cases import Case
from attnhub.cli import CommandError, console, files, progress
from attnhub.cli.devices import asked
from attnhub.cli.values import names as _names
from attnhub.cli.values import numbers as _numbers

_PEERS = ("naive", "sdpa", "flash", "cudnn", "efficient", "flex", "v1", "portable", "onnxruntime", "onnxruntime-mha", "onnxruntime-graph")

#: Cases up to which a picture is drawn without being asked: it grows with every one of them.
_DRAWN = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", choices=("cpu", "gpu", "models", "overhead", "plot", "judge"),
                        help="models times whole models; plot draws --input again, judge holds it against the targets of its processor; neither measures")  # fmt: skip
    presets = "; ".join(f"{name}: {preset.text}" for name, preset in bench_presets.PRESETS.items())
    of_models = "; ".join(f"{name}: {preset.text}" for name, preset in bench_models.PRESETS.items())
    parser.add_argument("--preset", choices=(*bench_presets.PRESETS, *bench_models.PRESETS), default=None,
                        help=f"default: standard. {presets}. Of the suite models, default: cpu. {of_models}")  # fmt: skip
    parser.add_argument("--lengths", type=_numbers, default=(), help="keep only the cases with these numbers of keys")
    parser.add_argument("--dtypes", type=_names, default=(), help="time every case in these dtypes instead of its own")
    parser.add_argument("--modes", type=_names, default=(), help="keep only forward, backward or training cases")
    parser.add_argument("--peers", type=_names, default=None, help=f"joined by commas: {', '.join(_PEERS)}; of models: {', '.join(bench_models.PEERS)}, as files: {', '.join(bench_models.ONNX_PEERS)}; default: the preset's")
    parser.add_argument("--backends", type=_names, default=None, help="attnhub backends (auto is the automatic choice); default: the preset's, or all that accept")
    parser.add_argument("--only", action="append", default=[], help="keep only the cases whose text (as --list shows it) holds this; may be repeated")
    parser.add_argument("--scale", choices=bench_models.SCALES, default="full", help="models: tiny ones run the whole path in seconds; their figures say nothing")
    parser.add_argument("--list", action="store_true", help="measure nothing; show the cases, who takes part, and about how long it takes")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds, whose median counts; default: the preset's on a GPU, else 3")
    parser.add_argument("--seconds", type=float, default=None, help="length of a peer's turn in a round; default: the preset's on a GPU, else 0.1")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which no further case is begun; what was measured is in the file")
    parser.add_argument("--resume", action="store_true", help="keep the cases that --output has from the same commit and machine, and measure the others")
    parser.add_argument("--jobs", type=int, default=-1, help="processes that compile kernels ahead on a GPU; default: by the processors, 0: none")
    parser.add_argument("--peer-seconds", type=float, default=None,
                        help="what a peer's turns at one case may take: slower ones get fewer rounds; default: 12, of models 60")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch and of ONNX Runtime; part of the result file's name")
    parser.add_argument("--device", default="", help="overhead, models: cpu or cuda; default: cuda where there is one, and the preset's")
    parser.add_argument("--output", default="", help="result file; a folder (ending in /) gets <device>/<suite>-<preset>[-<threads>t].json")
    parser.add_argument("--input", default="", help="plot, judge: a result file")
    parser.add_argument("--plot", default="", help="picture (PNG); with --output the default is beside the result file")


def run(args: argparse.Namespace) -> int:
    if args.suite == "plot":
        return _plot(args)
    if args.suite == "judge":
        return _judge(args)
    if args.suite == bench_models.SUITE:
        from attnhub.cli.bench_models import run as run_models

        return run_models(args)
    args.preset = "standard" if args.preset is None else args.preset
    if args.preset not in bench_presets.PRESETS:
        raise CommandError(f"--preset {args.preset} is one of the suite models; {args.suite} has {', '.join(bench_presets.PRESETS)}")
    import torch

    from attnhub.bench import results
    from attnhub.bench.measure import Settings
    from attnhub.cli import growing

    if args.threads or args.suite == "overhead":
        # Host time is that of one thread: waking a pool for a tiny call would be timed instead.
        torch.set_num_threads(args.threads or 1)
    device = _device(args)
    suggested = bench_presets.PRESETS[args.preset].turns if device.type != "cpu" and args.suite != "overhead" else (3, 0.1)
    settings = growing.settings(args, *suggested, 12.0)
    if args.suite == "overhead":
        # Many short turns: see attnhub/bench/overhead.py.
        settings = Settings(max(settings.rounds, 15), min(settings.round_seconds, 0.02))
        told = {"rounds": settings.rounds, "round_seconds": settings.round_seconds}
        result = results.document(args.suite, device.type, device, told, _overhead(args, device, settings))
        if args.output:
            _write(results.target(args.output, result), result)
        if args.json:
            console.emit_json(result)
        return 0
    result = _cases(args, device, settings)
    if not args.list:
        lines = bench_presets.PRESETS[args.preset].lines
        if args.output:
            path = results.target(args.output, result)
            print(f"written: {path}", file=sys.stderr)
            few = lines or len({str(Case.of(row)) for row in result["rows"]}) <= _DRAWN
            if not args.plot and few and importlib.util.find_spec("matplotlib"):
                args.plot = str(path.with_suffix(".png"))
        if args.plot and any(row.get("speedup") or (lines and "seconds" in row) for row in result["rows"]):
            _draw(result, args.plot)
    if args.json:
        console.emit_json(result)
    return 0


def _write(path: Any, result: dict[str, Any]) -> None:
    files.write_json(path, result)
    print(f"written: {path}", file=sys.stderr)


def _device(args: argparse.Namespace) -> Any:
    import torch

    wanted = args.device or {"cpu": "cpu", "gpu": "cuda"}.get(args.suite) or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.list and wanted == "cuda":
        # The cases of a GPU can be read anywhere.
        return torch.device("cuda", 0)
    return asked(wanted, "`attnhub bench cpu` needs none")


def _cases(args: argparse.Namespace, device: Any, settings: Any) -> dict[str, Any]:
    """Measure the cases of a preset. The result file is written after each of them, so that a stop loses nothing."""
    import torch

    from attnhub.bench import ceilings, pages, peers, precompile, workers
    from attnhub.cli.growing import Growing

    try:
        todo = bench_presets.select(args.preset, device.type, args.lengths, args.dtypes, args.modes, args.only)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not todo:
        raise CommandError("--lengths, --modes and --only leave no case of this preset")
    preset = bench_presets.PRESETS[args.preset]
    preset_peers, preset_backends = preset.who(device.type)
    names = args.peers if args.peers is not None else preset_peers if preset_peers is not None else peers.default_names(device)
    backends = args.backends if args.backends is not None else preset_backends
    if unknown := [name for name in names if name not in _PEERS]:
        raise CommandError(f"--peers: unknown {', '.join(unknown)}; known are {', '.join(_PEERS)}")
    if args.list:
        return _list(args, todo, names, backends, settings)
    limits = ceilings.available(torch.get_num_threads()) if device.type == "cpu" else None
    file = Growing(args, args.suite, args.preset, device, settings)
    todo = file.left(todo, Case.of)
    jobs = workers.jobs() if args.jobs < 0 else args.jobs
    if device.type != "cpu" and jobs and len(todo) > 1:
        with progress.bar(f"compiling for {len(todo)} cases in {jobs} processes", len(todo), args.json) as tick:
            failed = precompile.run(todo, names, backends, jobs, tick, args.limit / 2 if args.limit else 0.0)
        for who, why in failed.items():
            print(f"not compiled ahead: {who}: {why}", file=sys.stderr)
    for text, case in file.cases(todo):
        found = _measured(text, case, device, names, backends, settings, limits, args.json)
        if limits:
            file.result["environment"]["ceilings"] = limits.to_json()
        file.add(found)
        if not args.json:
            console.table(str(case), *pages.table(found), right=pages.NUMERIC)
    file.finish()
    if preset.shown != bench_presets.CASES and not args.json:
        columns, lines = pages.summary(file.result)
        console.table("together", columns, lines, right=pages.right(columns))
    return file.result


def _measured(text: str, case: Any, device: Any, names: tuple[str, ...], backends: Optional[tuple[str, ...]], settings: Any, limits: Any, quiet: bool) -> Any:
    """The rows of one case. Its tensors go with the call."""
    import torch

    from attnhub.bench import measure, peers

    if device.type == "cuda":
        # Who needs much memory is asked for by what is free.
        torch.cuda.empty_cache()
    tensors = peers.inputs(case, device)
    everybody = peers.assemble(case, tensors, names, backends)
    turns = sum(isinstance(p, peers.Peer) for p in everybody) * (settings.rounds + 1)
    with progress.bar(text, turns, quiet) as tick:
        return measure.run_case(case, tensors, everybody, settings, tick, limits)


def _list(args: argparse.Namespace, todo: list[Any], names: tuple[str, ...], backends: Optional[tuple[str, ...]], settings: Any) -> dict[str, Any]:
    """What would be measured: {cases, peers, backends, seconds (an estimate)}."""
    from attnhub.bench import precompile

    took = precompile.estimate(todo, names, backends, settings)
    if not args.json:
        for case in todo:
            console.say(str(case))
        who = ", ".join((*names, *(f"attnhub {name}" for name in (("(all that accept)",) if backends is None else backends))))
        console.say(f"{len(todo)} cases, {who}; about {took:.0f} s with {settings.rounds} rounds of {settings.round_seconds:g} s and kernels compiled ahead")
    return {"cases": [str(case) for case in todo], "peers": list(names), "backends": None if backends is None else list(backends), "seconds": took}


def _overhead(args: argparse.Namespace, device: Any, settings: Any) -> list[dict[str, Any]]:
    from attnhub.bench import overhead, overhead_case, pages

    cases = overhead_case.cases(device.type)
    names = args.backends or (("auto", "sdpa", "cpu") if device.type == "cpu" else ("auto", "sdpa", "triton", "cuda"))
    with progress.bar(f"host time of a {list(cases[0].shape)} call on {device}", len(cases) * (1 + len(names)) * settings.rounds, args.json) as tick:
        rows = overhead.run(device, tuple(names), settings, tick)
    if not args.json:
        console.table("", *pages.overhead_rows(rows), right=("us a call", "ratio", "budget"))
        console.say("ratio: to F.scaled_dot_product_attention in the same rounds; budget: what the design allows (docs/design.md)")
    return rows


def _plot(args: argparse.Namespace) -> int:
    from attnhub.bench import results

    if not args.input or not args.plot:
        raise CommandError("plot needs --input FILE and --plot PICTURE")
    try:
        result = results.load(args.input)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    _draw(result, args.plot)
    if args.json:
        console.emit_json({"plot": args.plot})
    return 0


def _judge(args: argparse.Namespace) -> int:
    """0 if every gate that the file speaks of is met; on a GPU the file must speak of all of them."""
    from attnhub.bench import pages, results, targets

    if not args.input:
        raise CommandError("judge needs --input FILE, a result file of `attnhub bench cpu`, `gpu`, `models` or `overhead`")
    try:
        result = results.load(args.input)
        verdicts, unjudged = targets.judge(result), targets.unjudged(result)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        console.emit_json([verdict.to_json() for verdict in verdicts])
    else:
        console.table("", *pages.verdict_table(verdicts), right=pages.NUMERIC)
    for what in unjudged:
        print(f"incomplete: {what}", file=sys.stderr)
    return 1 if unjudged or any(verdict.word in (targets.MISSED, targets.DISTURBED) for verdict in verdicts) else 0


def _draw(result: dict[str, Any], path: str) -> None:
    try:
        from attnhub.bench.plot import draw

        draw(result, path)
    except ImportError as error:
        raise CommandError(f"drawing needs matplotlib ({error}): pip install 'attnhub[bench]'") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(f"written: {path}", file=sys.stderr)
