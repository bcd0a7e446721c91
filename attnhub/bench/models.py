"""Whole models that are timed with and without attnhub: their cases, shapes and presets. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Union

from attnhub.bench.cases import Case
from attnhub.bench.overhead_case import SUITE as OVERHEAD

SUITE = "models"
#: The preset whose models are files that ONNX Runtime runs (onnx_models.py), and who takes part in it: what is exported, and how it is run.
ONNX = "onnx"
ONNX_PEERS = ("sdpa", "eager", "fused", "body")
#: Who a model without attnhub is: the implementations of transformers. The first one is its default, and what ratios are to.
PEERS = ("sdpa", "eager", "flex")
BASELINE = "sdpa"
#: What tiny models are for: the whole path in seconds, on any machine. Their figures say nothing.
TINY = "tiny"
SCALES = ("full", TINY)
#: Rows of a static cache behind its context. A decode loop of so many steps begins again; a multiple of FlexAttention's blocks.
HEADROOM = 128

#: What a second is full of, by task.
UNITS = {"embed": "sentences/s", "encode": "tokens/s", "prefill": "tokens/s", "decode": "tokens/s", "training": "tokens/s"}

#: Configurations of transformers: (class, values). minilm is read from its files.
_LLAMA: dict[str, Any] = {"rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "tie_word_embeddings": False}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("BertConfig", {"max_position_embeddings": 2048}),
    "llama-8-layers": ("LlamaConfig", {
        **_LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
        "vocab_size": 8192,
    }),
    "llama-3-8b": ("LlamaConfig", {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    }),
    "llama-3-1b": ("LlamaConfig", {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": True,
    }),
}  # fmt: skip
_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}


@dataclass(frozen=True)
class ModelCase:
    """A model at a task. embed: text to unit vectors; encode: one pass; prefill: one pass that fills a K/V cache and gives the last
    token's logits; decode: one token for every sequence behind ``length`` tokens in a cache; training: forward and backward of a loss.

    cache: of a decode step, "dynamic" (transformers' default: it grows by copying) or "static". Others have none here.
    """

    model: str
    task: str
    length: int
    batch: int = 1
    dtype: str = "float32"
    cache: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> ModelCase:
        """The case of a row in a result file."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})

    def __str__(self) -> str:
        short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[self.dtype]
        words = [self.model, self.task, short, f"B{self.batch}", f"S{self.length}", *([f"{self.cache} cache"] if self.cache else [])]
        return " ".join(words)

    def units(self) -> int:
        """What one call makes, in the unit of its task."""
        return self.batch * (1 if self.task in ("embed", "decode") else self.length)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ModelPreset:
    """Cases for a type of device, the peers that take part without being asked, and (rounds, seconds of a turn)."""

    text: str
    device: str
    cases: tuple[ModelCase, ...]
    peers: tuple[str, ...]
    turns: tuple[int, float]


PRESETS = {
    "cpu": ModelPreset(
        "MiniLM's sentences, a 12-layer encoder, an 8-layer decoder, and the memory of a training step", "cpu",
        (
            *(ModelCase("minilm", "embed", length, batch) for batch in (1, 32) for length in (32, 128, 256)),
            *(ModelCase("bert-base", "encode", length) for length in (512, 2048)),
            ModelCase("llama-8-layers", "prefill", 2048),
            ModelCase("llama-8-layers", "decode", 2048, cache="dynamic"),
            ModelCase("llama-8-layers", "training", 4096),
        ),
        # Many short turns: what disturbs a shared machine lasts longer than a turn, and then hits all of a round.
        ("sdpa",), (21, 0.05),
    ),
    ONNX: ModelPreset(
        "MiniLM's sentences and the prefill of an 8-layer decoder as files in ONNX Runtime: attnhub's node beside exported graphs", "cpu",
        (ModelCase("minilm", "embed", 256, 8), ModelCase("llama-8-layers", "prefill", 1024)), ONNX_PEERS, (9, 0.25),
    ),
    "gpu": ModelPreset(
        "a Llama of 8B: prefill and decode; a Llama of 1B: a training step; random weights", "cuda",
        (
            ModelCase("llama-3-8b", "prefill", 8192, dtype="bfloat16"),
            *(ModelCase("llama-3-8b", "decode", 2048, batch, "bfloat16", cache) for cache in ("static", "dynamic") for batch in (1, 16, 64)),
            ModelCase("llama-3-1b", "training", 4096, dtype="bfloat16"),
        ),
        ("sdpa", "eager", "flex"), (5, 0.15),
    ),
}  # fmt: skip


def config_of(model: str, scale: str) -> tuple[str, dict[str, Any]]:
    """(class in transformers, values) of a random model."""
    kind, values = SHAPES[model]
    if scale != TINY:
        return kind, dict(values)
    heads = {"num_key_value_heads": 2} if "num_key_value_heads" in values else {}
    return kind, {**values, **_SMALL, **heads}


def select(preset: str, scale: str, only: Iterable[str] = ()) -> list[ModelCase]:
    """Cases of a preset; only: words, of which at least one must be found in a case's text. Tiny ones are an eighth as long, at most 32."""
    cases = list(PRESETS[preset].cases)
    if scale == TINY:
        cases = [dataclasses.replace(c, length=max(8, min(c.length // 8, 32)), batch=min(c.batch, 2)) for c in cases]
    if words := list(only):
        cases = [c for c in cases if any(word in str(c) for word in words)]
    return list(dict.fromkeys(cases))


def case_of(suite: str, row: dict[str, Any]) -> Union[Case, ModelCase, str]:
    """The case of a row in a result file of any suite; of the suite overhead, its mode."""
    if suite == OVERHEAD:
        return str(row["mode"])
    return ModelCase.of(row) if suite == SUITE else Case.of(row)


def peers_of(preset: str) -> tuple[str, ...]:
    """Who can take part in a preset beside attnhub."""
    return ONNX_PEERS if preset == ONNX else PEERS


def left_out(case: ModelCase, peer: str, device: str) -> str:
    """Why a peer takes no part in a case; "" where it does."""
    if peer == "fused" and case.task != "embed":
        return "ONNX Runtime's optimizer is asked for BERT alone"
    if peer == "flex" and device == "cpu":
        return "it is timed on GPUs"
    if peer == "flex" and case.cache == "dynamic":
        return "every length of a growing cache would be compiled anew"
    return ""
