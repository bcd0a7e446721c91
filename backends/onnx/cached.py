"""HuggingFace decoders and encoder-decoders as modules whose K/V cache is a flat list of inputs and outputs.

Names are those of optimum's files: ``past_key_values.0.key``, ``present.0.key``. An encoder-decoder becomes two files: the encoder
gives the keys and values of every cross attention (they never change while decoding), the decoder takes them as inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from attnhub.backends.onnx.verify import Trial

_BATCH = "batch"


@dataclass(frozen=True)
class Part:
    """What one file is exported from. dims: input name -> {axis: what the file calls that size}. trials: further inputs."""

    module: nn.Module
    args: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]
    dims: dict[str, dict[int, str]]
    trials: tuple[Trial, ...] = ()


def parts(model: Any, inputs: Union[Tensor, Sequence[Any], Mapping[str, Any]], kwargs: Mapping[str, Any]) -> tuple[Optional[Part], Part]:
    """(encoder or None, decoder). inputs: token ids, or the arguments of ``model.forward`` in its order or by name.

    Raises ValueError for what is not a transformers model with a plain K/V cache.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(
            f"kv_cache=True: {type(model).__name__} is not a transformers model. "
            "Make past keys and values inputs and outputs of your own module, and export that without kv_cache"
        )
    named = _by_name(model, inputs, kwargs)
    with torch.no_grad():
        return _encoder_decoder(model, named) if config.is_encoder_decoder else (None, _decoder(model, named))


def _by_name(model: Any, inputs: Union[Tensor, Sequence[Any], Mapping[str, Any]], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        named = {**inputs, **kwargs}
    else:
        args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        named = dict(inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments)
        named = {**named, **named.pop("kwargs", {})}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _layers(cache: Any) -> list[Any]:
    """The layers of a cache, each with keys and values of all tokens."""
    layers = list(getattr(cache, "layers", ()))
    for layer in layers:
        if type(layer).__name__ != "DynamicLayer":
            raise ValueError(
                f"kv_cache=True: the model caches {type(layer).__name__}, not keys and values of all tokens; export it without kv_cache"
            )
    if not layers:
        raise ValueError("kv_cache=True: the model returned no keys and values; it must take use_cache=True")
    return layers


def _flat(cache: Any) -> list[Tensor]:
    return [tensor for layer in _layers(cache) for tensor in (layer.keys, layer.values)]


def _filled(flat: Sequence[Tensor]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(flat) // 2):
        cache.update(flat[2 * layer], flat[2 * layer + 1], layer)
    return cache


def _names(prefix: str, tensors: Sequence[Tensor]) -> list[str]:
    return [f"{prefix}.{layer}.{kind}" for layer in range(len(tensors) // 2) for kind in ("key", "value")]


def _past_like(flat: Sequence[Tensor], batch: int, tokens: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, t.shape[1], tokens, t.shape[3], generator=generator).to(t.dtype) for t in flat]


def _ids(like: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Other tokens from the example's own."""
    generator = torch.Generator().manual_seed(seed)
    return like.flatten()[torch.randint(like.numel(), shape, generator=generator)]


def _free(tensors: Mapping[str, Tensor], second: str) -> dict[str, dict[int, str]]:
    """Which sizes are free: the batch of all, and the length of ids and masks."""
    return {name: {0: _BATCH, 1: second} if not t.is_floating_point() and t.ndim == 2 else {0: _BATCH} for name, t in tensors.items()}


class _Dims(dict[str, Any]):
    """Name of a size -> torch.export's handle of it, one for all inputs."""

    def shapes(self, dims: Mapping[int, str]) -> dict[int, Any]:
        # A size that follows from others ("past + length") is left to the export to relate to them.
        return {
            axis: torch.export.Dim.AUTO if " " in name else self.setdefault(name, torch.export.Dim(name)) for axis, name in dims.items()
        }


# -- decoders ----------------------------------------------------------------------------------------------------------------


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, input_ids: Tensor, attention_mask: Optional[Tensor], past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = _filled(past)
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return found[0], _flat(cache)


def _decoder(model: Any, named: dict[str, Tensor]) -> Part:
    allowed = ("input_ids", "attention_mask")
    unknown = sorted(set(named) - set(allowed))
    if unknown or "input_ids" not in named:
        raise ValueError(f"kv_cache=True: inputs {sorted(named)}; a decoder takes input_ids and, for padded batches, attention_mask")
    ids, masked = named["input_ids"], "attention_mask" in named
    batch, length = ids.shape
    flat = _flat(_prefilled(model, ids))
    past_length = length + 1
    dims = {"input_ids": {0: _BATCH, 1: "length"}}
    if masked:
        dims["attention_mask"] = {0: _BATCH, 1: "past + length"}
    past_names = _names("past_key_values", flat)
    dims.update({name: {0: _BATCH, 2: "past"} for name in past_names})

    def arguments(batch: int, length: int, past: int, seed: int) -> tuple[Any, ...]:
        mask = None
        if masked:
            mask = torch.ones(batch, past + length, dtype=named["attention_mask"].dtype)
            mask[0, : (past + length) // 3] = 0
        return _ids(ids, (batch, length), seed), mask, _past_like(flat, batch, past, seed)

    shared = _Dims()
    shapes: list[Any] = [shared.shapes(dims["input_ids"]), shared.shapes(dims["attention_mask"]) if masked else None]
    trials = (arguments(batch + 1, length + 4, 0, 1), arguments(batch + 2, 1, past_length + 5, 2), arguments(1, 3, 7, 3))
    return Part(
        _Decoder(model),
        arguments(batch, length, past_length, 0),
        (*shapes, [shared.shapes(dims[name]) for name in past_names]),
        list(dims),
        [_output_name(model), *_names("present", flat)],
        dims,
        tuple(Trial(args, {}) for args in trials),
    )


def _prefilled(model: Any, ids: Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def _output_name(model: Any) -> str:
    return "logits" if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None else "last_hidden_state"


# -- encoder-decoders ----------------------------------------------------------------------------------------------------------


class _Encoder(nn.Module):
    """Inputs of the encoder -> keys and values of every cross attention.

    The decoder runs once over one token to make them; an export keeps nothing of that but the projections.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names, self.training = model, tuple(names), model.training

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        inputs = dict(zip(self.names, tensors))
        hidden = self.model.get_encoder()(**inputs)[0]
        cache = _empty_pair()
        token = torch.zeros((hidden.shape[0], 1), dtype=torch.long)
        mask = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
        self.model(encoder_outputs=(hidden,), decoder_input_ids=token, past_key_values=cache, use_cache=True, **mask)
        return _flat(cache.cross_attention_cache)


class _CrossDecoder(nn.Module):
    def __init__(self, model: Any, hidden_size: int) -> None:
        super().__init__()
        self.model, self.hidden_size, self.training = model, hidden_size, model.training

    def forward(
        self, decoder_input_ids: Tensor, attention_mask: Optional[Tensor], past: list[Tensor], cross: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        from transformers import EncoderDecoderCache

        cache = EncoderDecoderCache(_filled(past), _filled(cross))
        for layer in range(len(cross) // 2):
            cache.is_updated[layer] = True
        # The keys and values stand for the encoder's states, of which only the shape is read.
        hidden = torch.zeros((cross[0].shape[0], cross[0].shape[2], self.hidden_size), dtype=cross[0].dtype)
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        found = self.model(encoder_outputs=(hidden,), decoder_input_ids=decoder_input_ids, past_key_values=cache, use_cache=True, **mask)
        return found[0], _flat(cache.self_attention_cache)


def _empty_pair() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _encoder_decoder(model: Any, named: dict[str, Tensor]) -> tuple[Part, Part]:
    encoder_inputs = {name: tensor for name, tensor in named.items() if not name.startswith("decoder_")}
    if "decoder_input_ids" not in named or not encoder_inputs:
        raise ValueError(f"kv_cache=True: inputs {sorted(named)}; an encoder-decoder takes the encoder's inputs and decoder_input_ids")
    mask = encoder_inputs.get("attention_mask")
    encoder = _Encoder(model, list(encoder_inputs))
    cross = encoder(*encoder_inputs.values())
    hidden_size = int(model.get_encoder()(**encoder_inputs)[0].shape[-1])
    dims = _free(encoder_inputs, "source")
    free_source = any(1 in axes for axes in dims.values())
    shared = _Dims()
    made_encoder = Part(
        encoder,
        tuple(encoder_inputs.values()),
        (tuple(shared.shapes(axes) for axes in dims.values()),),
        list(dims),
        _names("cross", cross),
        dims,
    )

    ids = named["decoder_input_ids"]
    batch, length = ids.shape
    past = _flat(_self_cache(model, encoder_inputs, ids))
    past_names, cross_names = _names("past_key_values", past), _names("cross", cross)
    dims = {"decoder_input_ids": {0: _BATCH, 1: "length"}}
    if mask is not None:
        dims["attention_mask"] = {0: _BATCH, 1: "source"}
    dims.update({name: {0: _BATCH, 2: "past"} for name in past_names})
    dims.update({name: {0: _BATCH, 2: "source"} if free_source else {0: _BATCH} for name in cross_names})

    def arguments(batch: int, length: int, past_length: int, source: int, seed: int) -> tuple[Any, ...]:
        source = source if free_source else cross[0].shape[2]
        padded = None
        if mask is not None:
            padded = torch.ones(batch, source, dtype=mask.dtype)
            padded[0, source - source // 3 :] = 0
        return _ids(ids, (batch, length), seed), padded, _past_like(past, batch, past_length, seed), _past_like(cross, batch, source, seed)

    shared, source = _Dims(), cross[0].shape[2]
    made_decoder = Part(
        _CrossDecoder(model, hidden_size),
        arguments(batch, length, length + 1, source, 0),
        (
            shared.shapes(dims["decoder_input_ids"]),
            shared.shapes(dims["attention_mask"]) if mask is not None else None,
            [shared.shapes(dims[name]) for name in past_names],
            [shared.shapes(dims[name]) for name in cross_names],
        ),
        list(dims),
        [_output_name(model), *_names("present", past)],
        dims,
        tuple(
            Trial(arguments(*sizes), {}) for sizes in ((batch + 1, length + 4, 0, source + 3, 1), (batch + 2, 1, length + 6, source + 2, 2))
        ),
    )
    return made_encoder, made_decoder


def _self_cache(model: Any, encoder_inputs: Mapping[str, Tensor], ids: Tensor) -> Any:
    cache = _empty_pair()
    model(**encoder_inputs, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    return cache.self_attention_cache
