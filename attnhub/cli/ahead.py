"""Kernels of the cuda backend compiled into its cache on disk, for `attnhub warmup`: of a model, of given shapes, for a device that need not be here."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from attnhub import config
from attnhub.cli import CommandError, console, devices, progress
from attnhub.cli.devices import CLASSES
from attnhub.problem import DeviceInfo, Feature, Problem, seqlen_class, size_bucket
from attnhub.reasons import Reason

_MODEL = "attnhub.integrations.huggingface.problems"
#: A model is loaded, made small and run in so many seconds at most.
_PATIENCE = 600.0
#: Classes of query lengths from a short prompt on; up to the last, since tiles differ with them.
_PROMPTS = (16, *(1 << n for n in range(5, 18)))
_NEXT_TOKENS = (1, 16)
#: Sequences of a large batch, for which the cuda backend's kernel for few queries may have other tiles.
_MANY = 1024
_ONLY_LONG = frozenset({Feature.WINDOW, Feature.CHUNK})


def jobs(args: argparse.Namespace) -> int:
    """Processes: as many as processors, if none are named."""
    return int(args.jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def run(args: argparse.Namespace) -> int:
    """0 if all that was asked for is served by the backend and compiled."""
    from attnhub.backends.cuda import nvrtc
    from attnhub.backends.cuda.launcher import toolkit_major

    started = time.monotonic()
    library = nvrtc.find(toolkit_major())
    if library is None:
        raise CommandError("NVRTC (libnvrtc.so) is not found; pip install 'attnhub[cuda13]' (or cuda12) brings it")
    info = target(args)
    told: dict[str, Any] = {"device": info.to_json(), "nvrtc": ".".join(map(str, library.version)), "directory": str(_directory())}
    if args.model:
        found = _ask_model(args)
        told["model"], told["note"] = found["model"], found["note"]
        problems = of_model([Problem.from_json(p) for p in found["problems"]], info, args.dtype or found["dtype"] or "float32", args.page_size, args.packed)
    else:
        problems = of_shapes(args, info)
    served, refused = sort(problems)
    told["kernels"] = _compile(asked(served, args.append), jobs(args), args.json)
    told["refused"], told["seconds"] = refused, round(time.monotonic() - started, 1)
    if args.json:
        console.emit_json(told)
    else:
        _show(told)
    return 1 if refused or not told["kernels"] or any("error" in row for row in told["kernels"]) else 0


def compile_chosen(args: argparse.Namespace, device: Any) -> None:
    """Before calls of many shapes on a device that is here: kernels side by side, that the calls would compile one after the other. What fails here is
    told by its call."""
    from attnhub import runtime
    from attnhub.device import describe

    info = describe(device)
    if info.type == "cuda" and info.vendor == "nvidia":
        by = runtime.policy(args.backend)
        problems = [p for p in of_shapes(args, info) if runtime.decide(p, by).chosen == "cuda"]
        _compile(asked(problems, args.append), jobs(args), args.json)


def asked(problems: Iterable[Problem], append: str) -> list[tuple[Problem, str]]:
    """With every problem of a few queries what its calls need that append to a cache, as those of `attnhub.CachedAttention`, flash_attn_with_kvcache and
    transformers' generate_batch do: as named, or over pages either, since nobody reads pages who does not append to them."""
    from attnhub.backends.cuda import ahead

    found = []
    for p in problems:
        more = () if not ahead.appends(p) else (append,) if append else ahead.APPEND[1:] if p.page_size else ()
        found += [(p, kind) for kind in ("", *more)]
    return found


def target(args: argparse.Namespace) -> DeviceInfo:
    """The device that kernels are for: an architecture or a device class by name, else the one that is here."""
    name = args.arch
    if name in CLASSES:
        info = CLASSES[name]
    elif match := re.fullmatch(r"sm_(\d+)(\d)[af]?", name):
        info = DeviceInfo("cuda", "nvidia", (int(match[1]), int(match[2])), name)
    elif name:
        raise CommandError(f"--arch {name}: an architecture is needed, as in sm_80 or sm_90a, or one of {', '.join(_nvidia())}")
    else:
        import torch

        from attnhub.device import describe

        if not torch.cuda.is_available():
            raise CommandError("torch finds no CUDA device here; name the architecture that the kernels are for: --arch sm_90a")
        info = describe(devices.asked(args.device or "cuda", "--arch sm_90a needs none"))
    if info.vendor != "nvidia":
        raise CommandError(f"{info.name or name} is no NVIDIA GPU; the cuda backend compiles for {', '.join(_nvidia())}")
    return info


def _nvidia() -> list[str]:
    return [name for name, info in CLASSES.items() if info.vendor == "nvidia"]


def of_shapes(args: argparse.Namespace, info: DeviceInfo) -> list[Problem]:
    """The problems that the arguments describe."""
    kv_heads, v_head_dim, dtype = args.kv_heads or args.heads, args.v_head_dim or args.head_dim, args.dtype or "bfloat16"
    if args.heads % kv_heads:
        raise CommandError(f"--heads {args.heads} is not a multiple of --kv-heads {kv_heads}")
    if args.append and args.packed:
        raise CommandError(f"--append {args.append}: packed queries append nothing; leave out --packed")
    given = {
        Feature.GQA: kv_heads != args.heads, Feature.DV_DIFFERS: v_head_dim != args.head_dim, Feature.CAUSAL_BOTTOM_RIGHT: args.causal,
        Feature.WINDOW: args.window, Feature.SOFTCAP: args.softcap, Feature.SINKS: args.sinks, Feature.ALIBI: args.alibi, Feature.VARLEN: args.packed,
        Feature.PAGED: args.page_size, Feature.SEQLENS: args.page_size or args.append, Feature.LSE: args.lse or args.backward,
    }  # fmt: skip
    features = frozenset(feature for feature, there in given.items() if there)
    return [
        Problem(
            info, dtype, dtype, args.head_dim, v_head_dim, args.heads, kv_heads, size_bucket(batch), seqlen_class(seqlen_q), size_bucket(seqlen_k or seqlen_q),
            features, _alignment(args.head_dim, v_head_dim), args.page_size,
        )
        for batch in args.batch for seqlen_q in args.seqlen_q for seqlen_k in args.seqlen_k or (0,)
    ]  # fmt: skip


def of_model(found: Iterable[Problem], info: DeviceInfo, dtype: str, page_size: int = 0, packed: bool = False) -> list[Problem]:
    """What a model asks at any length, from what a small run of it asked: prompts and tokens after them; masks of long prompts with and without their
    window, which short ones do not fill; with page_size over pages too, and with packed as sequences one behind the other."""
    made = []
    for p in found:
        base = dataclasses.replace(
            p, device=info, q_dtype=dtype, kv_dtype=dtype, batch=1, seqlen_k=_PROMPTS[-1], align_bytes=_alignment(p.head_dim, p.v_head_dim), need_backward=False,
        )  # fmt: skip
        for features in dict.fromkeys((p.features, p.features - _ONLY_LONG)):
            ways = [(features, 0)]
            if packed:
                ways.append(((features - {Feature.SEQLENS, Feature.LEFTPAD}) | {Feature.VARLEN}, 0))
            if page_size:
                ways.append(((features - {Feature.LEFTPAD}) | {Feature.PAGED, Feature.SEQLENS}, page_size))
            for way, size in ways:
                lengths = _NEXT_TOKENS if p.seqlen_q <= 1 else _PROMPTS
                made += [
                    dataclasses.replace(base, seqlen_q=n, features=way, page_size=size, batch=batch)
                    for n in lengths for batch in ((1, _MANY) if n in _NEXT_TOKENS else (1,))
                ]  # fmt: skip
    return list(dict.fromkeys(made))


def _alignment(*dims: int) -> int:
    """Of rows of 2-byte values."""
    return min(16, *((2 * dim) & -(2 * dim) for dim in dims))


def _ask_model(args: argparse.Namespace) -> dict[str, Any]:
    from attnhub.bench import workers

    if not (pathlib.Path(args.model) / "config.json").is_file():
        raise CommandError(f"--model {args.model}: a folder with a HuggingFace model (config.json) is needed")
    with progress.bar("looking at the model", 1, args.json):
        (answer,) = workers.ask((sys.executable, "-m", _MODEL), [{"folder": str(pathlib.Path(args.model).resolve())}], 1, patience=_PATIENCE)
    why = "its process ended; is transformers installed? (pip install 'attnhub[hf]')" if answer is None else answer.get("error")
    if why or not answer or not answer["problems"]:
        raise CommandError(f"--model {args.model}: {why or 'it asked for no attention'}; give the shapes instead (--heads, --head-dim, --causal, ...)")
    return dict(answer)


def sort(problems: Iterable[Problem]) -> tuple[list[Problem], list[dict[str, Any]]]:
    """(what the backend serves, what it does not: each combination of dimensions, features and reasons once)."""
    from attnhub.backends.cuda import backend

    served: list[Problem] = []
    refused: dict[Any, dict[str, Any]] = {}
    for p in problems:
        reasons: tuple[Reason, ...] = (*backend.capability.check(p), *backend.check(p))
        if not reasons:
            served.append(p)
        else:
            told = [str(reason) for reason in reasons]
            refused.setdefault((p.head_dim, p.v_head_dim, p.features, tuple(told)), {"problem": p.to_json(), "reasons": told})
    return served, list(refused.values())


def _directory() -> pathlib.Path:
    try:
        return config.cache_dir() / "cuda"
    except OSError as error:
        raise CommandError(str(error.strerror)) from error


def _compile(wanted: list[tuple[Problem, str]], count: int, quiet: bool) -> list[dict[str, Any]]:
    from attnhub.backends.cuda import ahead
    from attnhub.backends.cuda.launcher import toolkit_major

    total = len(ahead.distinct(wanted))
    if not total:
        return []
    count = min(count, total)
    with progress.bar(f"compiling {total} kernels in {count} processes", total, quiet) as tick:
        return ahead.compile_all(wanted, _directory(), toolkit_major(), count, tick)


def _show(told: dict[str, Any]) -> None:
    rows = []
    for row in told["kernels"]:
        p, v = Problem.from_json(row["problem"]), row["variant"]
        features = ", ".join(sorted(f.value for f in p.features)) or "none"
        state = "failed" if "error" in row else "was there" if row["cached"] else f"{row['seconds']:.2f} s"
        dims = f"{p.head_dim}" if p.head_dim == p.v_head_dim else f"{p.head_dim}, {p.v_head_dim}"
        kernel = f"{row['kernel']}, {row['append']}" if row["append"] else row["kernel"]
        rows.append((kernel, v["arch"], p.q_dtype, dims, "x".join(map(str, v["tile"])), str(p.seqlen_q), features, state))
    if rows:
        console.table("", ("kernel", "arch", "dtype", "head_dim", "tile", "seqlen_q", "for instance with", "compiled in"), rows, right=("seqlen_q", "compiled in"))
    for row in told["kernels"]:
        if "error" in row:
            console.say(f"{row['kernel']} {row['variant']}: {row['error']}", "bold red")
    for row in told["refused"]:
        p = Problem.from_json(row["problem"])
        console.say(f"not served by cuda: head_dim {p.head_dim}, {', '.join(sorted(f.value for f in p.features)) or 'no features'}: {'; '.join(row['reasons'])}")
    if told.get("note"):
        console.say(f"{told['model']}: {told['note']}")
    failed = sum("error" in row for row in told["kernels"])
    console.say(f"{len(told['kernels']) - failed} of {len(told['kernels'])} kernels in {told['directory']}, by NVRTC {told['nvrtc']}, {told['seconds']} s")
