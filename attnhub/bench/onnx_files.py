"""Models of the preset ``onnx`` as files: by torch's own exporters, with ONNX Runtime's optimizer, and by attnhub.

A `Subject` is what all files of a case have in common: the module, the example that is traced, and the inputs that the files are run with.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import attnhub.onnx
from attnhub.backends.onnx import cached
from attnhub.bench.models import ModelCase
from attnhub.bench.tasks import Embed
from attnhub.bench.zoo import token_ids

OPSET = 18
#: Sizes of what runs before memory is measured.
_SMALL = (1, 8)
Feeds = dict[str, Tensor]


class Subject:
    """names, outputs: of the files. example, shapes: what is traced, and which of its sizes are free. timed: the inputs; checked: those, and
    others that outputs are compared at; small: a few tokens."""

    names: list[str]
    outputs: list[str]
    example: tuple[Any, ...]
    shapes: Any
    timed: Feeds
    checked: list[Feeds]
    small: Feeds

    def __init__(self, case: ModelCase, model: Any) -> None:
        raise NotImplementedError

    def module(self, model: Any) -> nn.Module:
        """What is exported of a model."""
        raise NotImplementedError

    def ours(self, model: Any, path: pathlib.Path) -> int:
        """Write the file of a patched model; the number of its nodes."""
        raise NotImplementedError

    def truth(self, model: Any, feeds: Feeds) -> list[Tensor]:
        """What torch gives, in the order of the file's outputs."""
        raise NotImplementedError


class Sentences(Subject):
    """Tokens of English text to unit vectors; compared with padded rows as well."""

    def __init__(self, case: ModelCase, model: Any) -> None:
        task = Embed(case, model, torch.device("cpu"))
        self.names, self.outputs = ["input_ids", "attention_mask"], ["embeddings"]
        self.timed = {name: task.batch[name] for name in self.names}
        self.checked = [self.timed, {name: task.padded[name] for name in self.names}]
        self.small = {name: tensor[: _SMALL[0], : _SMALL[1]].contiguous() for name, tensor in self.timed.items()}
        self.example = tuple(tensor[:2, :6].contiguous() for tensor in self.timed.values())
        free = {0: torch.export.Dim("batch", min=2, max=4096), 1: torch.export.Dim("length", min=2, max=model.config.max_position_embeddings)}
        self.shapes = (free, free)

    def module(self, model: Any) -> nn.Module:
        return _Embedding(model).eval()

    def ours(self, model: Any, path: pathlib.Path) -> int:
        given = {"dynamic_shapes": self.shapes, "input_names": self.names, "output_names": self.outputs}
        return attnhub.onnx.export(self.module(model), self.example, path, opset=OPSET, report=False, **given).nodes

    def truth(self, model: Any, feeds: Feeds) -> list[Tensor]:
        with torch.no_grad():
            return [self.module(model)(*feeds.values())]


class _Embedding(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden, weights = self.model(input_ids=input_ids, attention_mask=attention_mask)[0], attention_mask[:, :, None].float()
        return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


class Prefill(Subject):
    """Random tokens behind an empty past to logits, keys and values: the file that decodes as well."""

    def __init__(self, case: ModelCase, model: Any) -> None:
        self._vocabulary = model.config.vocab_size
        self._tokens = self._ids(2, 5)
        part = self._part(model)
        self.names, self.outputs, self.example, self.shapes = part.input_names, part.output_names, part.args, part.dynamic_shapes
        self.timed, self.small = self._feeds(case.batch, case.length), self._feeds(*_SMALL)
        self.checked = [self.timed]

    def _ids(self, batch: int, length: int) -> Tensor:
        return token_ids((batch, length), self._vocabulary, torch.device("cpu"))

    def _part(self, model: Any) -> cached.Part:
        return cached.parts(model, (self._tokens, torch.ones_like(self._tokens)), {})[1]

    def _feeds(self, batch: int, length: int) -> Feeds:
        ids = self._ids(batch, length)
        past = [t.new_zeros(batch, t.shape[1], 0, t.shape[3]) for t in pytree.tree_leaves(self.example[2])]
        return dict(zip(self.names, (ids, torch.ones_like(ids), *past)))

    def module(self, model: Any) -> nn.Module:
        return self._part(model).module

    def ours(self, model: Any, path: pathlib.Path) -> int:
        return attnhub.onnx.export(model, (self._tokens, torch.ones_like(self._tokens)), path, kv_cache=True, opset=OPSET, report=False).nodes

    def truth(self, model: Any, feeds: Feeds) -> list[Tensor]:
        ids, mask, *past = feeds.values()
        with torch.no_grad():
            return pytree.tree_leaves(self.module(model)(ids, mask, past))


SUBJECTS: dict[str, type[Subject]] = {"embed": Sentences, "prefill": Prefill}


def write(subject: Subject, model: Any, peer: str, path: pathlib.Path) -> str:
    """Write a peer's file; what computes its attention, for people. model: with the peer's attention."""
    with quiet():
        if peer == "attnhub":
            return f"attnhub::FlashAttention x{subject.ours(model, path)}"
        if peer == "fused":
            return _fused(subject, model, path)
        # The weights stay in the file, as in attnhub's, while they are below the format's 2 GB.
        _torch_export(subject, model, path, dynamo=True, dynamic_shapes=subject.shapes, external_data=False, verbose=False)
        return "MatMul, Softmax, MatMul"


def _torch_export(subject: Subject, model: Any, path: pathlib.Path, **options: Any) -> None:
    with torch.no_grad():
        torch.onnx.export(
            subject.module(model), subject.example, str(path), opset_version=OPSET, input_names=subject.names, output_names=subject.outputs, **options
        )  # fmt: skip


def _fused(subject: Subject, model: Any, path: pathlib.Path) -> str:
    """By torch's former exporter, whose graphs ONNX Runtime's optimizer (onnxruntime.transformers) knows, and then by that. RuntimeError where
    it fuses no attention."""
    from onnxruntime.transformers import optimizer

    axes = {name: {axis: dim.__name__ for axis, dim in free.items()} for name, free in zip(subject.names, subject.shapes)}
    plain = path.with_suffix(".plain.onnx")
    _torch_export(subject, model, plain, dynamo=False, dynamic_axes=axes)
    config = model.config
    made = optimizer.optimize_model(str(plain), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size)
    made.save_model_to_file(str(path))
    plain.unlink()
    fused = {name: count for name, count in made.get_fused_operator_statistics().items() if count}
    if not fused.keys() & {"Attention", "MultiHeadAttention"}:
        raise RuntimeError(f"ONNX Runtime's optimizer fused no attention, but {fused}")
    return ", ".join(f"{name} x{count}" for name, count in fused.items())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Notices of exporters about what does not matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
