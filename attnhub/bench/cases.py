"""What is timed: problems, and the presets that hold them. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Optional

#: torch's name -> bytes of an element
ITEM = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Case:
    """One problem. mode ``backward`` times the backward pass alone, the forward was run before; ``training`` times both."""

    seqlen_q: int
    seqlen_k: int = 0
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = False
    mode: str = "forward"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seqlen_k", self.seqlen_k or self.seqlen_q)
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if self.causal and self.seqlen_q not in (1, self.seqlen_k):
            raise ValueError(f"{self}: a causal case needs Sq == Sk or Sq == 1, where torch's alignment and ours agree or no key is masked")

    def __str__(self) -> str:
        lengths = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}:{self.seqlen_k}"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        words = [self.mode, _SHORT[self.dtype], f"B{self.batch}", f"H{heads}", f"S{lengths}", f"D{self.head_dim}", "causal" if self.causal else "full"]
        return " ".join(words)

    def flops(self) -> int:
        """4 B H Sq Sk D, half of it if causal with Sq == Sk; 2.5 times that for a backward (five products instead of two), 3.5 for both passes."""
        forward = 4 * self.batch * self.heads * self.seqlen_q * self.seqlen_k * self.head_dim
        forward = forward // 2 if self.causal and self.seqlen_q > 1 else forward
        return forward * {"forward": 2, "backward": 5, "training": 7}[self.mode] // 2

    def is_decode(self) -> bool:
        """Whether it is one query token, whose time is that of reading K and V."""
        return self.seqlen_q == 1 and self.mode == "forward"

    def kv_bytes(self) -> int:
        """Bytes of K and V: what a decode step has to read."""
        return 2 * self.batch * self.kv_heads * self.seqlen_k * self.head_dim * ITEM[self.dtype]

    def scores(self) -> int:
        """Elements of the score matrix that the naive maths hold."""
        return self.batch * self.heads * self.seqlen_q * self.seqlen_k

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Preset:
    """A named list of cases. ``make(device type)`` gives them. peers, backends: who takes part without being asked, on a CPU.

    one_table: the results are shown in one table, a line for each case and peer.
    """

    text: str
    make: Callable[[str], list[Case]]
    peers: Optional[tuple[str, ...]] = None
    backends: Optional[tuple[str, ...]] = None
    one_table: bool = False


def _quick(device: str) -> list[Case]:
    cases = [Case(256, dtype=t, causal=c) for t in ("float32", "bfloat16") for c in (False, True)]
    return [*cases, Case(1, 1024, heads=8, kv_heads=2, dtype="bfloat16"), Case(256, mode="backward", causal=True)]


def _standard(device: str) -> list[Case]:
    """The shapes by which torch's kernels were judged when this project began, per device type."""
    if device != "cpu":
        return [c for c in _grid(device) if c.head_dim == 128 and c.seqlen_q in (1024, 4096, 16384)]
    cases: list[Case] = []
    for dtype in ("float32", "bfloat16"):
        for heads, length, dim in ((8, 512, 64), (8, 1024, 64), (16, 2048, 128)):
            cases.extend(Case(length, heads=heads, head_dim=dim, dtype=dtype, causal=causal) for causal in (False, True))
        cases.append(Case(1024, heads=32, kv_heads=8, head_dim=128, dtype=dtype, causal=True))
        cases.append(Case(1, 4096, heads=32, kv_heads=8, head_dim=128, dtype=dtype))
    cases.append(Case(1024, heads=8, dtype="float16", causal=True))
    cases.extend(Case(1024, heads=8, causal=causal, mode="backward") for causal in (False, True))
    return cases


_PREFILL = ((8, 512, 64), (8, 1024, 64), (16, 2048, 128), (32, 4096, 128))


def _limits(device: str) -> list[Case]:
    """What CPU kernels are held to, see targets.py. Naive maths have no part in it: they would take most of the time."""
    cases: list[Case] = []
    for dtype in ("float32", "bfloat16", "float16"):
        # In fp16 some of torch's CPU kernels fall to 2 GFLOP/s: minutes for one call of the largest shape.
        shapes = _PREFILL if dtype != "float16" else _PREFILL[:3]
        cases.extend(Case(length, heads=heads, head_dim=dim, dtype=dtype, causal=causal) for heads, length, dim in shapes for causal in (False, True))
        cases.append(Case(1024, heads=32, kv_heads=8, head_dim=128, dtype=dtype, causal=True))
        cases.extend(Case(1, 4096, batch=batch, heads=32, kv_heads=8, head_dim=128, dtype=dtype) for batch in (1, 8))
    cases.append(Case(2048, heads=32, head_dim=128, causal=True))
    for dtype in ("float32", "bfloat16"):
        cases.extend(
            Case(length, heads=heads, head_dim=dim, dtype=dtype, causal=causal, mode="training")
            for heads, length, dim in _PREFILL[:3] for causal in (False, True)
        )  # fmt: skip
    return cases


def _kylin(device: str) -> list[Case]:
    return [Case(length, batch=batch) for batch, length in ((1, 128), (4, 128), (16, 128), (1, 1024), (4, 1024), (1, 4096), (1, 8192))]


def _kuiper(device: str) -> list[Case]:
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    prefill = [Case(length, heads=8, kv_heads=2, causal=True) for length in lengths]
    return [*prefill, *(Case(1, length, heads=8, kv_heads=2) for length in lengths)]


def _triton(device: str) -> list[Case]:
    return [Case(length, batch=batch, heads=1) for batch, length in ((1, 256), (2, 512), (4, 1024))]


def _grid(device: str) -> list[Case]:
    """A constant number of tokens and of H * D, over lengths: the grid of the flash-attention papers (arXiv 2307.08691, 4.1)."""
    gpu = device != "cpu"
    tokens, width, lengths = (16384, 2048, (512, 1024, 2048, 4096, 8192, 16384)) if gpu else (4096, 512, (512, 1024, 2048, 4096))
    return [
        Case(length, batch=tokens // length, heads=width // dim, head_dim=dim, dtype="bfloat16" if gpu else "float32", causal=causal, mode=mode)
        for mode in ("forward", "backward") for dim in ((64, 128, 256) if gpu else (64, 128)) for causal in (False, True) for length in lengths
    ]  # fmt: skip


def _decode(device: str) -> list[Case]:
    sizes = ((1, 8192), (1, 65536), (16, 8192), (64, 8192), (128, 2048)) if device != "cpu" else ((1, 1024), (1, 4096), (1, 16384), (4, 4096))
    return [Case(1, length, batch=batch, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16") for batch, length in sizes]


PRESETS = {
    "quick": Preset("a minute: one small shape in two dtypes, a decode step, a backward", _quick),
    "standard": Preset("the shapes that decide between backends on this kind of device", _standard),
    "limits": Preset(
        "what CPU kernels are held to: prefill, decode and training steps beside torch, ONNX Runtime and the machine's ceilings", _limits,
        peers=("sdpa", "onnxruntime"), backends=("auto",),
    ),
    "kylin": Preset(
        "scenarios of the Kylin CPU engine report: 128 to 8192 tokens, batch 1 to 16", _kylin,
        peers=("naive", "sdpa"), backends=("auto",), one_table=True,
    ),
    "kuiper": Preset("lengths of the Kuiper integration report: 256 to 8192, GQA, prefill and decode", _kuiper),
    "triton": Preset("the three timed shapes of the Triton v1/v2 document", _triton),
    "grid": Preset("constant tokens over lengths, forward and backward, as in the flash-attention papers", _grid),
    "decode": Preset("one query token, grouped heads, long K/V", _decode),
}


def select(preset: str, device: str, lengths: Iterable[int] = (), dtypes: Iterable[str] = (), modes: Iterable[str] = ()) -> list[Case]:
    """Cases of a preset; ``lengths`` (of keys) and ``modes`` keep a part of them, ``dtypes`` replaces theirs."""
    cases = PRESETS[preset].make(device)
    if wanted := set(lengths):
        cases = [c for c in cases if c.seqlen_k in wanted]
    if chosen := set(modes):
        cases = [c for c in cases if c.mode in chosen]
    if replaced := list(dtypes):
        if unknown := [name for name in replaced if name not in ITEM]:
            raise ValueError(f"dtype {', '.join(unknown)}: allowed are {', '.join(ITEM)}")
        cases = [dataclasses.replace(c, dtype=dtype) for dtype in replaced for c in cases]
    return list(dict.fromkeys(cases))
