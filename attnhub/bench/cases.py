"""What is timed: a problem. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

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
