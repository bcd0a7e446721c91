"""What is timed: problems, and the presets that hold them. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Optional

#: torch's name -> bytes of an element
ITEM = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


#: Rows and keys of a block of a block-sparse case.
SPARSE_BLOCK = 128


@dataclass(frozen=True)
class Case:
    """One problem. mode ``backward`` times the backward pass alone, the forward was run before; ``training`` times both.

    The fields behind mode are off at 0 or False. Result files hold them only where they are on.
    """

    seqlen_q: int
    seqlen_k: int = 0
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = False
    mode: str = "forward"
    #: Keys that a causal query sees, itself included.
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    #: Packed sequences of different lengths, seqlen_q tokens together; batch is 1.
    documents: int = 0
    #: Keys that every query sees, before the causal ones.
    prefix: int = 0
    #: The part of all blocks of SPARSE_BLOCK rows and keys that is kept.
    density: float = 0.0
    sinks: bool = False
    #: A bias for every head and pair, [1, H, Sq, Sk], without gradient.
    bias: bool = False
    #: attnhub reads K and V from pages of so many tokens in random order; who has no pages reads them contiguous.
    page_size: int = 0
    #: attnhub reads q, k and v in float8_e4m3fn with a factor for each sequence and K/V head; the same values lie in dtype for the others.
    fp8: bool = False
    #: Timed by replaying a CUDA graph of several calls, so that the host's part is left out.
    graph: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seqlen_k", self.seqlen_k or self.seqlen_q)
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if self.causal and self.seqlen_q not in (1, self.seqlen_k):
            raise ValueError(f"{self}: a causal case needs Sq == Sk or Sq == 1, where torch's alignment and ours agree or no key is masked")

        if (self.window or self.documents or self.prefix or self.density) and self.seqlen_q != self.seqlen_k:
            raise ValueError(f"{self}: a window, documents, a prefix and block-sparsity are timed with Sq == Sk")
        if self.documents and self.batch != 1:
            raise ValueError(f"{self}: packed documents are one batch of tokens; batch={self.batch} must be 1")
        if self.fp8 and (self.mode != "forward" or self.page_size):
            raise ValueError(f"{self}: fp8 is timed in forward passes without pages")
        if self.page_size and (self.seqlen_q != 1 or self.seqlen_k % self.page_size):
            raise ValueError(f"{self}: pages are timed in decode steps, with a whole number of them")

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        """The case of a row in a result file; files made before a field existed leave it out."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})

    def features(self) -> list[str]:
        """What is on besides the shape, as words: ``window 1024``, ``alibi``."""
        values = {name: getattr(self, name) for name in _FEATURES}
        return [name if value is True else f"{name} {value:g}" for name, value in values.items() if value]

    def __str__(self) -> str:
        lengths = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}:{self.seqlen_k}"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        words = [self.mode, _SHORT[self.dtype], f"B{self.batch}", f"H{heads}", f"S{lengths}", f"D{self.head_dim}", "causal" if self.causal else "full"]
        words += [*self.features(), *([f"page {self.page_size}"] if self.page_size else []), *(["fp8"] if self.fp8 else []), *(["graph"] if self.graph else [])]
        return " ".join(words)

    def flops(self) -> int:
        """4 D for each pair of query and key that attend: B H Sq Sk of them, half of it if causal with Sq == Sk; 2.5 times that for a
        backward (five products instead of two), 3.5 for both passes."""
        forward = 4 * self.batch * self.heads * self._pairs() * self.head_dim
        return forward * {"forward": 2, "backward": 5, "training": 7}[self.mode] // 2

    def _pairs(self) -> int:
        """Pairs that attend, of one head."""
        if self.documents:
            return sum(n * n for n in self.document_lengths()) // (2 if self.causal else 1)
        if self.density:
            return int(self.seqlen_q * self.seqlen_k * self.density) // (2 if self.causal else 1)
        pairs = self.seqlen_q * self.seqlen_k
        if self.causal and self.seqlen_q > 1:
            hidden = max(0, self.seqlen_q - self.window) if self.window else 0
            pairs = (pairs - hidden * hidden + self.prefix * self.prefix) // 2
        return pairs

    def document_lengths(self) -> list[int]:
        """Lengths of the packed sequences, from 1 to about twice the mean; together seqlen_q."""
        weights = [1 + (n * 7919) % (2 * self.documents) for n in range(1, self.documents + 1)]
        ends = [sum(weights[: n + 1]) * self.seqlen_q // sum(weights) for n in range(self.documents)]
        return [end - start for start, end in zip([0, *ends], ends)]

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
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value or name not in _OPTIONAL}


#: Fields that are parts of a mask or of the scores.
_FEATURES = ("window", "softcap", "alibi", "documents", "prefix", "density", "sinks", "bias")
_OPTIONAL = (*_FEATURES, "page_size", "fp8", "graph")


@dataclass(frozen=True)
class Preset:
    """A named list of cases. ``make(device type)`` gives them. peers, backends: who takes part without being asked, on a CPU, and
    gpu_peers, gpu_backends: on a GPU.

    one_table: the results are shown in one table, a line for each case and peer. turns: (rounds, seconds of a turn) on a GPU, where they
    are chosen so that the whole preset fits into minutes.
    """

    text: str
    make: Callable[[str], list[Case]]
    peers: Optional[tuple[str, ...]] = None
    backends: Optional[tuple[str, ...]] = None
    one_table: bool = False
    gpu_peers: Optional[tuple[str, ...]] = None
    gpu_backends: Optional[tuple[str, ...]] = None
    turns: tuple[int, float] = (3, 0.1)

    def who(self, device: str) -> tuple[Optional[tuple[str, ...]], Optional[tuple[str, ...]]]:
        """(peers, backends) that take part without being asked; None where the preset leaves it open."""
        return (self.peers, self.backends) if device == "cpu" else (self.gpu_peers, self.gpu_backends)


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


def _onnx(device: str) -> list[Case]:
    """Prefill in fp32: the shape of the target, causal and not, with grouped heads, and shorter ones."""
    shapes = ((32, 2048, 128), (12, 256, 32), (8, 512, 64))
    cases = [Case(length, heads=heads, head_dim=dim, causal=causal) for heads, length, dim in shapes for causal in (True, False)]
    return [*cases, Case(2048, heads=32, kv_heads=8, head_dim=128, causal=True)]


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
    def case(batch: int, length: int, kv_heads: int = 8) -> Case:
        return Case(1, length, batch=batch, heads=32, kv_heads=kv_heads, head_dim=128, dtype="bfloat16")

    if device == "cpu":
        return [case(*size) for size in ((1, 1024), (1, 4096), (1, 16384), (4, 4096))]
    steps = [case(*size) for size in ((1, 8192), (1, 65536), (16, 8192), (64, 8192), (128, 2048), (64, 4096, 32))]
    # Larger pages differ from those of 16 tokens in the kernel alone.
    how = ((0, False), (0, True), (16, False), (16, True), (64, True), (256, True))
    return [dataclasses.replace(c, page_size=size, graph=graph) for c in steps for size, graph in how]


def _v1v2(device: str) -> list[Case]:
    shapes = ((1, 256, 64), (2, 512, 64), (4, 1024, 64))
    return [
        Case(length, batch=batch, heads=1, head_dim=dim, dtype=dtype, graph=graph)
        for dtype in ("float16", "float32") for batch, length, dim in shapes for graph in ((False, True) if device != "cpu" else (False,))
    ]  # fmt: skip


def _features(device: str) -> list[Case]:
    """Each feature alone with a causal mask where it goes with one, at the grid's 4096 tokens."""
    gpu = device != "cpu"
    length, tokens, width = (4096, 16384, 2048) if gpu else (512, 512, 256)
    cases: list[Case] = []
    for dim in (64, 128):
        base = Case(length, batch=tokens // length, heads=width // dim, head_dim=dim, dtype="bfloat16" if gpu else "float32", causal=True)
        kinds: list[dict[str, Any]] = [
            {"softcap": 30.0}, {"window": length // 4}, {"alibi": True}, {"documents": 16, "batch": 1, "seqlen_q": tokens, "seqlen_k": tokens},
        ]  # fmt: skip
        if dim == 128:
            kinds += [
                {"kv_heads": base.heads // 4 or 1}, {"prefix": length // 4}, {"density": 0.25, "causal": False}, {"sinks": True},
                {"bias": True, "causal": False},
            ]  # fmt: skip
        cases.extend(dataclasses.replace(base, mode=mode, **kind) for kind in kinds for mode in ("forward", "backward"))
    return cases


def _fp8(device: str) -> list[Case]:
    """A part of the grid's forward passes."""
    lengths = (1024, 4096, 16384) if device != "cpu" else (512,)
    return [dataclasses.replace(c, fp8=True) for c in _grid(device) if c.mode == "forward" and c.seqlen_q in lengths]


def _memory(device: str) -> list[Case]:
    """One batch over lengths, forward and both passes: what is compared is the peak of memory."""
    lengths = [2**n for n in range(9, 17 if device != "cpu" else 12)]
    dtype = "bfloat16" if device != "cpu" else "float32"
    return [Case(length, dtype=dtype, mode=mode) for mode in ("forward", "training") for length in lengths]


_GPU_BACKENDS = ("auto", "triton")
PRESETS = {
    "quick": Preset("a minute: one small shape in two dtypes, a decode step, a backward", _quick),
    "standard": Preset("the shapes that decide between backends on this kind of device", _standard),
    "limits": Preset(
        "what CPU kernels are held to: prefill, decode and training steps beside torch, ONNX Runtime and the machine's ceilings", _limits,
        peers=("sdpa", "onnxruntime"), backends=("auto",),
    ),
    "onnx": Preset(
        "attnhub's node in ONNX Runtime beside its own attention nodes and the exported graph, fp32 on CPU", _onnx,
        peers=("sdpa", "onnxruntime", "onnxruntime-mha", "onnxruntime-graph"), backends=("onnx", "cpu"), one_table=True,
    ),
    "kylin": Preset(
        "scenarios of the Kylin CPU engine report: 128 to 8192 tokens, batch 1 to 16", _kylin,
        peers=("naive", "sdpa"), backends=("auto",), one_table=True,
    ),
    "kuiper": Preset("lengths of the Kuiper integration report: 256 to 8192, GQA, prefill and decode", _kuiper),
    "triton": Preset("the three timed shapes of the Triton v1/v2 document", _triton),
    "v1v2": Preset(
        "those three shapes beside naive maths and the first FlashAttention schedule, by plain calls and by CUDA graph", _v1v2,
        gpu_peers=("naive", "sdpa", "v1"), gpu_backends=_GPU_BACKENDS, turns=(7, 0.03),
    ),
    "grid": Preset(
        "constant tokens over lengths, forward and backward, as in the flash-attention papers", _grid,
        gpu_peers=("sdpa", "flash", "cudnn", "flex"), gpu_backends=_GPU_BACKENDS, turns=(5, 0.04),
    ),
    "features": Preset(
        "what FlexAttention needs a function for: softcap, window, ALiBi, documents, and the other parts of a mask", _features,
        gpu_peers=("sdpa", "flash", "flex"), gpu_backends=("triton",), turns=(5, 0.04),
    ),
    "decode": Preset(
        "one query token, grouped heads, long K/V, contiguous and paged", _decode,
        gpu_peers=("sdpa", "flash", "cudnn", "flex"), gpu_backends=_GPU_BACKENDS, turns=(5, 0.03),
    ),
    "fp8": Preset(
        "forward in float8_e4m3fn beside the same values in two bytes", _fp8, peers=("sdpa",), gpu_peers=("sdpa", "flash", "cudnn", "flex"),
        gpu_backends=("triton",), turns=(5, 0.04),
    ),
    "memory": Preset(
        "peak of memory of one call over lengths, beside naive maths", _memory, gpu_peers=("naive", "sdpa"), gpu_backends=("triton",),
        turns=(3, 0.02), one_table=True,
    ),
}


def select(
    preset: str, device: str, lengths: Iterable[int] = (), dtypes: Iterable[str] = (), modes: Iterable[str] = (), only: Iterable[str] = ()
) -> list[Case]:
    """Cases of a preset; ``lengths`` (of keys) and ``modes`` keep a part of them, ``dtypes`` replaces theirs.

    only: words, of which at least one must be found in a case's text, where spaces of a word are those of the text.
    """
    cases = PRESETS[preset].make(device)
    if wanted := set(lengths):
        cases = [c for c in cases if c.seqlen_k in wanted]
    if chosen := set(modes):
        cases = [c for c in cases if c.mode in chosen]
    if replaced := list(dtypes):
        if unknown := [name for name in replaced if name not in ITEM]:
            raise ValueError(f"dtype {', '.join(unknown)}: allowed are {', '.join(ITEM)}")
        cases = [dataclasses.replace(c, dtype=dtype) for dtype in replaced for c in cases]
    if words := list(only):
        cases = [c for c in cases if any(word in str(c) for word in words)]
    return list(dict.fromkeys(cases))
