"""Named lists of cases: what is timed together, who takes part, and how it is judged and shown. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Optional

from attnhub.bench.cases import ITEM, Case

#: The label of the cuda backend's portable kernel among peers.
PORTABLE = "cuda portable"
#: How results are shown.
CASES, ROWS, RATIOS = "cases", "rows", "ratios"


@dataclass(frozen=True)
class Preset:
    """A named list of cases. ``make(device type)`` gives them. peers, backends: who takes part without being asked, on a CPU, and
    gpu_peers, gpu_backends: on a GPU.

    shown: a table for each case (``cases``), or one with a line for each case and peer (``rows``), or one with a line for each case, where the
    judged peer stands beside all others (``ratios``). lines: the picture is TFLOP/s over lengths. judged: whose rows targets are about, on a GPU.
    turns: (rounds, seconds of a turn) on a GPU, where they are chosen so that the whole preset fits into minutes.
    """

    text: str
    make: Callable[[str], list[Case]]
    peers: Optional[tuple[str, ...]] = None
    backends: Optional[tuple[str, ...]] = None
    shown: str = CASES
    gpu_peers: Optional[tuple[str, ...]] = None
    gpu_backends: Optional[tuple[str, ...]] = None
    turns: tuple[int, float] = (3, 0.1)
    judged: str = "attnhub triton"
    lines: bool = False

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


def _steps(device: str) -> list[Case]:
    """Decode steps by plain call over contiguous K/V."""
    sizes = [(1, 1024), (1, 4096), (1, 16384), (4, 4096)] if device == "cpu" else [(1, 8192), (1, 65536), (16, 8192), (64, 8192), (128, 2048)]
    steps = [Case(1, length, batch=batch, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16") for batch, length in sizes]
    return steps if device == "cpu" else [*steps, Case(1, 4096, batch=64, heads=32, head_dim=128, dtype="bfloat16")]


def _decode(device: str) -> list[Case]:
    if device == "cpu":
        return _steps(device)
    # Larger pages differ from those of 16 tokens in the kernel alone.
    how = ((0, False), (0, True), (16, False), (16, True), (64, True), (256, True))
    return [dataclasses.replace(c, page_size=size, graph=graph) for c in _steps(device) for size, graph in how]


def _v1v2(device: str) -> list[Case]:
    shapes = ((1, 256, 64), (2, 512, 64), (4, 1024, 64))
    return [
        Case(length, batch=batch, heads=1, head_dim=dim, dtype=dtype, graph=graph)
        for dtype in ("float16", "float32") for batch, length, dim in shapes for graph in ((False, True) if device != "cpu" else (False,))
    ]  # fmt: skip


def _causal(device: str, dim: int) -> Case:
    """At the grid's 4096 tokens, 16384 in a batch and 2048 columns; less of each on a CPU."""
    if device == "cpu":
        return Case(512, batch=1, heads=256 // dim, head_dim=dim, dtype="float32", causal=True)
    return Case(4096, batch=4, heads=2048 // dim, head_dim=dim, dtype="bfloat16", causal=True)


def _documents(base: Case) -> dict[str, Any]:
    """All of a batch's tokens as 16 documents, one behind the other."""
    tokens = base.batch * base.seqlen_q
    return {"documents": 16, "batch": 1, "seqlen_q": tokens, "seqlen_k": tokens}


def _features(device: str) -> list[Case]:
    """Each feature alone with a causal mask where it goes with one, at the grid's 4096 tokens."""
    cases: list[Case] = []
    for dim in (64, 128):
        base = _causal(device, dim)
        length = base.seqlen_q
        kinds: list[dict[str, Any]] = [{"softcap": 30.0}, {"window": length // 4}, {"alibi": True}, _documents(base)]
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


def _forward(*lengths: int) -> Callable[[str], list[Case]]:
    """The grid's forward passes at these lengths on a GPU (none: at all), and at one on a CPU."""

    def make(device: str) -> list[Case]:
        kept = (512,) if device == "cpu" else lengths
        return [c for c in _grid(device) if c.mode == "forward" and (not kept or c.seqlen_q in kept)]

    return make


def _cuda_features(device: str) -> list[Case]:
    """Each feature alone, forward, at the grid's 4096 tokens: with a causal mask, and without one where it goes without."""
    cases: list[Case] = []
    for dim in (64, 128):
        base = _causal(device, dim)
        both: list[dict[str, Any]] = [{"softcap": 30.0}, _documents(base)]
        both += [{"dtype": "float16"}] if device != "cpu" else []
        # The heads of Llama 3 8B.
        both += [{"heads": 32, "kv_heads": 8}] if dim == 128 else []
        cases.append(dataclasses.replace(base, window=base.seqlen_q // 4))
        cases.extend(dataclasses.replace(base, causal=causal, **kind) for kind in both for causal in (False, True))
    # Packed sequences last: torch's operators are called past its checks there, and what breaks inside one ends the run.
    return sorted(cases, key=lambda c: c.documents)


def _cuda_decode(device: str) -> list[Case]:
    """Contiguous and in pages of 16, and two steps in pages of other sizes."""
    if device == "cpu":
        return _steps(device)
    pages = [(c, size) for c in _steps(device) for size in (0, 16, *((1, 64, 256) if (c.batch, c.seqlen_k) in ((16, 8192), (128, 2048)) else ()))]
    return [dataclasses.replace(c, page_size=size, graph=graph) for c, size in pages for graph in (False, True)]


def _cuda_few(device: str) -> list[Case]:
    """Several queries of each sequence behind a cache, as of drafted tokens or small chunks."""
    shapes = [(1, 8192, 8), (1, 8192, 32), (16, 4096, 8), (64, 2048, 8)] if device != "cpu" else [(1, 1024, 8)]
    return [
        Case(count, length, batch=batch, heads=32, kv_heads=kv_heads, head_dim=128, dtype="bfloat16", graph=device != "cpu")
        for batch, length, kv_heads in shapes for count in (2, 4, 8, 16)
    ]  # fmt: skip


def _cuda_short(device: str) -> list[Case]:
    """Launches count here: a few queries before a few keys, and short sequences, as of windows of an image."""
    queries = [(1, 16, 16, 1, 128, 64), (256, 16, 16, 1, 128, 64), (256, 32, 8, 1, 128, 128), (1, 16, 16, 4, 128, 64), (256, 16, 16, 4, 128, 64)]
    queries += [(16, 32, 8, 16, 512, 128), (256, 32, 8, 16, 512, 128)]
    whole = [(1, 12, 16, 64), (1, 12, 64, 64), (16, 12, 64, 64), (256, 8, 49, 32), (256, 12, 64, 64), (1, 16, 128, 128), (256, 12, 128, 64)]
    shapes = [*queries, *((batch, heads, heads, length, length, dim) for batch, heads, length, dim in whole)]
    return [
        Case(seqlen_q, seqlen_k, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=dim, dtype="bfloat16", causal=causal, graph=device != "cpu")
        for batch, heads, kv_heads, seqlen_q, seqlen_k, dim in shapes for causal in ((False, True) if seqlen_q == seqlen_k == 64 else (False,))
        if device != "cpu" or batch == 1
    ]  # fmt: skip


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
        peers=("sdpa", "onnxruntime", "onnxruntime-mha", "onnxruntime-graph"), backends=("onnx", "cpu"), shown=ROWS,
    ),
    "kylin": Preset(
        "scenarios of the Kylin CPU engine report: 128 to 8192 tokens, batch 1 to 16", _kylin,
        peers=("naive", "sdpa"), backends=("auto",), shown=ROWS,
    ),
    "kuiper": Preset("lengths of the Kuiper integration report: 256 to 8192, GQA, prefill and decode", _kuiper),
    "triton": Preset("the three timed shapes of the Triton v1/v2 document", _triton),
    "v1v2": Preset(
        "those three shapes beside naive maths and the first FlashAttention schedule, by plain calls and by CUDA graph", _v1v2,
        gpu_peers=("naive", "sdpa", "v1"), gpu_backends=_GPU_BACKENDS, turns=(7, 0.03),
    ),
    "grid": Preset(
        "constant tokens over lengths, forward and backward, as in the flash-attention papers", _grid,
        gpu_peers=("sdpa", "flash", "cudnn", "flex"), gpu_backends=_GPU_BACKENDS, turns=(5, 0.04), lines=True,
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
        turns=(3, 0.02), shown=ROWS,
    ),
    "cuda-grid": Preset(
        "the cuda backend's forward on the grid beside cuDNN and flash", _forward(), gpu_peers=("cudnn", "flash"), gpu_backends=("cuda",), turns=(3, 0.1),
        judged="attnhub cuda", shown=RATIOS, lines=True,
    ),
    "cuda-sustained": Preset(
        "that forward at 4096 tokens, back to back for seconds, until the clock has settled", _forward(4096), gpu_peers=("cudnn",), gpu_backends=("cuda",),
        turns=(3, 1.5), judged="attnhub cuda", shown=RATIOS,
    ),
    "cuda-features": Preset(
        "the cuda backend's forward with a window, packed sequences, softcap, grouped heads and fp16, beside whoever has them", _cuda_features,
        gpu_peers=("cudnn", "flash", "flex"), gpu_backends=("cuda",), turns=(3, 0.08), judged="attnhub cuda", shown=RATIOS,
    ),
    "cuda-decode": Preset(
        "the cuda backend's decode steps, contiguous and paged, by plain calls and by CUDA graph", _cuda_decode,
        gpu_peers=("cudnn",), gpu_backends=("cuda", "triton"), turns=(3, 0.05), judged="attnhub cuda", shown=RATIOS,
    ),
    "cuda-few": Preset(
        "2 to 16 queries of each sequence over a long cache, by CUDA graph", _cuda_few,
        gpu_peers=("cudnn", "flash"), gpu_backends=("cuda", "triton"), turns=(3, 0.03), judged="attnhub cuda", shown=RATIOS,
    ),
    "cuda-short": Preset(
        "a few queries before a few keys, and short sequences, by CUDA graph: the automatic choice beside torch's kernels", _cuda_short,
        gpu_peers=("sdpa", "flash", "cudnn"), gpu_backends=("auto", "cuda", "triton"), turns=(3, 0.03), judged="attnhub", shown=RATIOS,
    ),
    "cuda-portable": Preset(
        "the cuda backend's mma.sync kernel for older GPUs, compiled for this one, beside flash", _forward(1024, 4096, 16384),
        gpu_peers=("portable", "flash"), gpu_backends=(), turns=(3, 0.1), judged=PORTABLE, shown=RATIOS, lines=True,
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
