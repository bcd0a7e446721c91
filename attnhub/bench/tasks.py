"""What a model is asked to do in a case: inputs and caches that all peers share, and the call that is timed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnhub.bench.models import HEADROOM, ModelCase
from attnhub.bench.zoo import token_ids

Step = Callable[[], Tensor]


class Task:
    """``step(model)`` gives the call that is timed, ``check(model)`` what is compared between peers."""

    def __init__(self, case: ModelCase, model: Any, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.config = model.config

    def step(self, model: Any) -> Step:
        raise NotImplementedError

    def check(self, model: Any) -> Tensor:
        return self.step(model)()

    def ids(self, length: int) -> Tensor:
        return token_ids((self.case.batch, length), self.config.vocab_size, self.device)


class Embed(Task):
    """English text to unit vectors, the mean over tokens. Timed with rows that are full; compared with rows of different lengths."""

    def __init__(self, case: ModelCase, model: Any, device: torch.device) -> None:
        super().__init__(case, model, device)
        from transformers import AutoTokenizer

        from attnhub.cli.demo import SENTENCES, model_folder

        tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
        # Each row begins with another sentence; 40 of them are more than 256 tokens.
        texts = [" ".join((SENTENCES[i % len(SENTENCES) :] + SENTENCES) * 2) for i in range(case.batch)]
        tokens = tokenizer(texts, truncation=True, max_length=case.length, return_tensors="pt")
        self.batch = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        lengths = torch.linspace(max(2, case.length // 2), case.length, case.batch, device=device).long().flip(0)
        padded = (torch.arange(case.length, device=device) < lengths[:, None]).long()
        self.padded = {"input_ids": self.batch["input_ids"] * padded, "attention_mask": padded}

    def step(self, model: Any) -> Step:
        return lambda: _embedding(model, self.batch)

    def check(self, model: Any) -> Tensor:
        return torch.cat([_embedding(model, self.batch), _embedding(model, self.padded)])


@torch.no_grad()
def _embedding(model: Any, batch: dict[str, Tensor]) -> Tensor:
    hidden, weights = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


class Encode(Task):
    """One pass over random tokens without padding."""

    def step(self, model: Any) -> Step:
        ids = self.ids(self.case.length)

        def encode() -> Tensor:
            with torch.no_grad():
                hidden: Tensor = model(input_ids=ids).last_hidden_state
                return hidden

        return encode


class Prefill(Task):
    """One pass over random tokens that fills transformers' K/V cache, and the last token's logits."""

    def step(self, model: Any) -> Step:
        ids = self.ids(self.case.length)

        def prefill() -> Tensor:
            with torch.no_grad():
                logits: Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
                return logits

        return prefill


class Decode(Task):
    """One token behind ``length`` others. The cache is one for all peers; who is next finds it as it was, and after HEADROOM steps
    a loop begins again."""

    def __init__(self, case: ModelCase, model: Any, device: torch.device) -> None:
        super().__init__(case, model, device)
        transformers: Any = importlib.import_module("transformers")
        text = self.config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (case.batch, text.num_key_value_heads, case.length, head_dim)
        static = {"max_cache_len": case.length + HEADROOM}
        self.cache: Any = transformers.StaticCache(config=text, **static) if case.cache == "static" else transformers.DynamicCache(config=text)
        generator = torch.Generator(device).manual_seed(1)
        for n in range(text.num_hidden_layers):
            k, v = (torch.randn(shape, generator=generator, device=device, dtype=model.dtype) for _ in range(2))
            self.cache.update(k, v, n)
        self.before = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.taken = 0

    def rewind(self) -> None:
        """As it was before the first step."""
        self.taken = 0
        for layer, (k, v) in zip(self.cache.layers, self.before):
            if self.case.cache == "static":
                # A static cache counts in a tensor, and in place.
                layer.cumulative_length.fill_(self.case.length)
            else:
                layer.keys, layer.values = k, v

    def step(self, model: Any) -> Step:
        ids = self.ids(1)
        # The argument was called past_key_values until transformers 5.2x.
        cache = {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": self.cache}

        def decode() -> Tensor:
            if self.taken == HEADROOM:
                self.rewind()
            self.taken += 1
            with torch.no_grad():
                logits: Tensor = model(input_ids=ids, use_cache=True, **cache).logits
                return logits

        return decode

    def check(self, model: Any) -> Tensor:
        self.rewind()
        return self.step(model)()


class Training(Task):
    """Forward and backward of the loss of predicting the next token. Its gradients are dropped at the end of every call."""

    def step(self, model: Any) -> Step:
        ids = self.ids(self.case.length)

        def train() -> Tensor:
            model.train()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            # Every layer's attention has a part in it.
            grad = model.get_input_embeddings().weight.grad
            for parameter in model.parameters():
                parameter.grad = None
            found: Tensor = grad
            return found

        return train


TASKS: dict[str, type[Task]] = {"embed": Embed, "encode": Encode, "prefill": Prefill, "decode": Decode, "training": Training}
