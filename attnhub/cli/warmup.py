"""``attnhub warmup``: compile and load the kernels for given shapes, so that the first request of a server waits for none of it.

With ``--model`` or ``--arch`` it calls nothing and needs no device: it compiles the cuda backend's kernels into the cache on disk (`attnhub.cli.ahead`).
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any, Optional

from attnhub.cli import CommandError, console, devices, progress
from attnhub.cli.explain import DTYPES
from attnhub.cli.values import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several = "; several joined by commas, all of which are combined"
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, xpu; default: cuda where there is one, else cpu")
    parser.add_argument("--arch", default="", help="only compile the cuda backend's kernels, for this architecture, here or not: sm_90a, sm_80, h100, ...")
    parser.add_argument("--model", default="", metavar="FOLDER", help="only compile the cuda backend's kernels, for prompts and decoding of this HuggingFace model")
    parser.add_argument("--jobs", type=size, default=0, help="processes that compile CUDA kernels; default: as many as processors")
    parser.add_argument("--dtype", choices=DTYPES, default="", help="default: bfloat16, or the model's own")
    parser.add_argument("--batch", type=_sizes, default=(1,), help="sequences" + several)
    parser.add_argument("--heads", type=size, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=size, default=0, help="key and value heads; default: as many as query heads")
    parser.add_argument("--seqlen-q", type=_sizes, default=(1024,), help="query tokens" + several)
    parser.add_argument("--seqlen-k", type=_sizes, default=(), help="keys; default: as --seqlen-q" + several)
    parser.add_argument("--head-dim", type=size, default=64)
    parser.add_argument("--v-head-dim", type=size, default=0, help="of v, where it differs")
    parser.add_argument("--causal", action="store_true", help="aligned bottom right")
    parser.add_argument("--window", type=size, default=0, help="keys that a query sees at most, itself included, of those before it")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--sinks", action="store_true")
    parser.add_argument("--alibi", action="store_true")
    parser.add_argument("--descale", default="", help="which of q, k and v come with factors, as in qkv; with float8_e4m3fn")
    parser.add_argument("--packed", action="store_true", help="sequences one behind the other, with cu_seqlens")
    parser.add_argument("--page-size", type=size, default=0, help="tokens in a page of a paged K/V cache; default: not paged")
    parser.add_argument("--append", choices=("tokens", "rotary"), default="", help="the queries' keys are appended to a K/V cache by the call; rotary: rotated")
    parser.add_argument("--layout", choices=("bhsd", "bshd"), default="bhsd")
    parser.add_argument("--lse", action="store_true", help="lse is returned")
    parser.add_argument("--backward", action="store_true", help="a backward pass follows")
    parser.add_argument("--backend", default="", help="a name or a list in order of preference, as in ATTNHUB_BACKEND")


def run(args: argparse.Namespace) -> int:
    """0 if every combination is served; the first that is not ends with 1 and its reasons."""
    from attnhub.cli import ahead

    if args.arch or args.model:
        return ahead.run(args)
    import torch

    import attnhub

    dtype = getattr(torch, args.dtype or "bfloat16")
    shapes = list(itertools.product(args.batch, args.seqlen_q, args.seqlen_k or (0,)))
    decisions = []
    if args.device:
        devices.asked(args.device, "--device cpu needs none")
    several = len(shapes) > 1 or args.append or args.page_size
    if several and torch.cuda.is_available() and args.device.partition(":")[0] in ("", "cuda"):
        ahead.compile_chosen(args, torch.device(args.device or "cuda"))
    with progress.bar("warming up", len(shapes), args.json) as tick:
        for batch, seqlen_q, seqlen_k in shapes:
            if tick:
                tick(f"{batch} x {seqlen_q}:{seqlen_k or seqlen_q}")
            try:
                decision = attnhub.warmup(
                    q_heads=args.heads, head_dim=args.head_dim, seqlen_q=seqlen_q, seqlen_k=seqlen_k or None, batch=batch, kv_heads=args.kv_heads or None,
                    v_head_dim=args.v_head_dim or None, dtype=dtype, device=args.device or None, mask=_mask(args), softcap=args.softcap, sinks=args.sinks,
                    descale=args.descale, packed=args.packed, page_size=args.page_size, append=args.append, return_lse=args.lse, layout=args.layout,
                    need_backward=args.backward, backend=args.backend or None,
                )  # fmt: skip
            except attnhub.NoBackendError as error:
                console.say(str(error))
                return 1
            except (ValueError, RuntimeError, AssertionError) as error:
                # A device that is not there is one of the latter two in torch.
                raise CommandError(str(error).splitlines()[0]) from error
            decisions.append(decision)
    if args.json:
        console.emit_json([decision.to_json() for decision in decisions])
        return 0
    rows = []
    for (batch, seqlen_q, seqlen_k), decision in zip(shapes, decisions):
        first, following = decision.plan["first_call_seconds"], decision.plan["next_call_seconds"]
        rows.append((batch, seqlen_q, seqlen_k or seqlen_q, decision.chosen, decision.backward or "", f"{first:.3g} s", f"{following * 1e3:.3g} ms"))
    columns = ("batch", "seqlen_q", "seqlen_k", "backend", "backward by", "first call", "next call")
    console.table("", columns, rows, right=("batch", "seqlen_q", "seqlen_k", "first call", "next call"))
    return 0


def _mask(args: argparse.Namespace) -> Optional[Any]:
    import torch

    from attnhub.mask import FULL, ALiBi, Causal, Window

    mask = Causal() if args.causal else FULL
    if args.window:
        mask = mask & Window(args.window - 1)
    if args.alibi:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        mask = mask & ALiBi(torch.ones(args.heads, device=device))
    return mask


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(size(part) for part in text.split(",") if part.strip())
