"""Inputs for a tiny model of any transformers class, by the names of the parameters of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor

from attnhub.integrations.huggingface.tiny import IMAGE, PATCH, configs_of, is_int

BATCH, LENGTH = 2, 20


def padding(kind: str) -> Tensor:
    """[BATCH, LENGTH] of 1 for tokens and 0 for padding, at no side, at the left or at the right of the last sequence."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if kind == "left":
        mask[-1, :7] = 0
    if kind == "right":
        mask[-1, -7:] = 0
    return mask


#: What a forward pass may need beside its main input, tried in this order until one runs.
VARIANTS: tuple[tuple[str, ...], ...] = ((), ("pixel_values",), ("input_features",), ("input_values",), ("pixel_values", "input_features"), ("one channel",), ("codebooks",))


def tiny_inputs(model: Any, pad: str, variant: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the model's forward asks for, by the names of its parameters, and what the variant names. Only text can be padded here.

    Raises ValueError for a parameter without a default that has no rule, or a variant that this model has no parameters for.
    """
    generator = torch.Generator().manual_seed(7)
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    main = getattr(model, "main_input_name", "input_ids")
    wanted = list(dict.fromkeys([*required, *([main] if main in parameters else [])]))
    if "input_ids" in parameters and "decoder_input_ids" not in parameters:
        wanted.append("input_ids")
    if any(n in wanted for n in ("input_ids", "inputs_embeds")) and "attention_mask" in parameters:
        wanted.append("attention_mask")
    by_name = ("decoder_input_ids",) if not type(model).__name__.endswith("ForSequenceClassification") else ()
    wanted.extend(n for n in (*by_name, "bbox", "visual_feats", "visual_pos") if n in parameters)
    extra = [n for n in variant if n in _INPUTS]
    if any(n not in parameters for n in extra):
        raise ValueError(f"it takes no {', '.join(extra)}")
    text = torch.randint(3, 100, (BATCH, LENGTH), generator=generator)
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and type(model).__name__.endswith("ForSequenceClassification"):
        # Some read the class at the last of these.
        text = text.masked_fill(text == end, 99)
        text[:, LENGTH // 2] = end
    made: dict[str, Any] = {}
    for name in dict.fromkeys([*wanted, *extra]):
        rule = _INPUTS.get(name)
        if rule is None:
            raise ValueError(f"there is no rule for its argument {name}")
        made[name] = rule(model, text, pad, generator)
    if "grid_thw" in made:
        patch = _first_int(model.config, "in_channels", "num_channels") or 3
        patch *= (_first_int(model.config, "temporal_patch_size") or 1) * (_first_int(model.config, "patch_size") or PATCH) ** 2
        made.update({n: torch.randn(BATCH * 16, patch, generator=generator) for n in ("hidden_states", "pixel_values") if n in made})
    if "one channel" in variant:
        made.update({n: t.unsqueeze(1) for n, t in made.items() if n in ("input_values", "input_features")})
    if "codebooks" in variant:
        books = _first_int(model.config, "num_codebooks", "codebooks", "num_channels") or 1
        made.update({n: t.unsqueeze(-1).expand(*t.shape, books) % 16 for n, t in made.items() if n in ("input_ids", "decoder_input_ids")})
    if type(model).__name__.endswith("ForMultipleChoice"):
        made.update({n: t.unsqueeze(1).repeat(1, 2, *[1] * (t.ndim - 1)) for n, t in made.items()})
    return made


def _first_int(config: Any, *names: str) -> Optional[int]:
    for inner in configs_of(config):
        for name in names:
            if is_int(getattr(inner, name, None)):
                return int(getattr(inner, name))
    return None


def _pixels(model: Any, text: Tensor, pad: str, generator: torch.Generator) -> Tensor:
    config = model.config
    size, channels = IMAGE, 3
    for inner in configs_of(config):
        found = getattr(inner, "image_size", None)
        if found is not None:
            size = found[0] if isinstance(found, (list, tuple)) else found
            size = size if isinstance(size, int) else IMAGE
        channels = getattr(inner, "num_channels", None) or getattr(inner, "in_channels", None) or channels
        if found is not None:
            break
    channels = channels if isinstance(channels, int) else 3
    frames = getattr(config, "num_frames", None)
    lead = (BATCH, int(frames)) if isinstance(frames, int) and getattr(model, "main_input_name", "") == "pixel_values" else (BATCH,)
    return torch.randn(*lead, channels, size, size, generator=generator)


_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")


def _mels(model: Any, text: Tensor, pad: str, generator: torch.Generator) -> Tensor:
    bins, frames = 16, 64
    for inner in configs_of(model.config):
        found = next((v for n in _BINS if is_int(v := getattr(inner, n, None))), None)
        if found is not None:
            bins = found
            positions = getattr(inner, "max_source_positions", None)
            if isinstance(positions, int) and "whisper" in str(getattr(inner, "model_type", "")):
                frames = 2 * positions
            break
    by_frame = getattr(model, "main_input_name", "") == "input_features" and "Whisper" not in type(model).__name__
    return torch.randn((BATCH, frames, bins) if by_frame else (BATCH, bins, frames), generator=generator)


def _sound(model: Any, generator: torch.Generator) -> Tensor:
    """Samples, or for a configuration with mel bins and a length a spectrogram."""
    bins, length = getattr(model.config, "num_mel_bins", None), getattr(model.config, "max_length", None)
    if isinstance(bins, int) and isinstance(length, int):
        return torch.randn(BATCH, length, bins, generator=generator)
    return torch.randn(BATCH, 4000, generator=generator)


def _series(model: Any, generator: torch.Generator, past: bool, features: bool = False) -> Tensor:
    """A time series: of one value a step, of channels, or of the features of its times."""
    config = model.config
    length = (config.context_length + max(getattr(config, "lags_sequence", None) or [0])) if past else config.prediction_length
    if features:
        return torch.randn(BATCH, length, config.num_time_features, generator=generator)
    channels = getattr(config, "num_input_channels", None)
    size = (channels,) if channels else (config.input_size,) if getattr(config, "input_size", 1) > 1 else ()
    return torch.randn(BATCH, length, *size, generator=generator)


Rule = Callable[[Any, Tensor, str, torch.Generator], Union[Tensor, Any]]
_INPUTS: dict[str, Rule] = {
    "input_ids": lambda model, text, pad, g: text,
    "decoder_input_ids": lambda model, text, pad, g: text[:, :7],
    "attention_mask": lambda model, text, pad, g: padding(pad),
    "inputs_embeds": lambda model, text, pad, g: torch.randn(BATCH, LENGTH, model.config.hidden_size, generator=g),
    "hidden_states": lambda model, text, pad, g: torch.randn(BATCH, LENGTH, model.config.hidden_size, generator=g),
    "pixel_values": _pixels,
    "pixel_values_videos": lambda model, text, pad, g: _pixels(model, text, pad, g).unsqueeze(1).repeat(1, getattr(model.config, "num_frames", 4), 1, 1, 1),
    "input_features": _mels,
    "input_values": lambda model, text, pad, g: _sound(model, g),
    "grid_thw": lambda model, text, pad, g: torch.tensor([[1, 4, 4]] * BATCH),
    "past_values": lambda model, text, pad, g: _series(model, g, past=True),
    "past_observed_mask": lambda model, text, pad, g: torch.ones_like(_series(model, g, past=True)),
    "past_time_features": lambda model, text, pad, g: _series(model, g, past=True, features=True),
    "future_time_features": lambda model, text, pad, g: _series(model, g, past=False, features=True),
    "future_values": lambda model, text, pad, g: _series(model, g, past=False),
    "static_categorical_features": lambda model, text, pad, g: torch.zeros(BATCH, getattr(model.config, "num_static_categorical_features", 0), dtype=torch.long),
    "visual_feats": lambda model, text, pad, g: torch.randn(BATCH, 5, model.config.visual_feat_dim, generator=g),
    "visual_pos": lambda model, text, pad, g: torch.rand(BATCH, 5, model.config.visual_pos_dim, generator=g),
    "bbox": lambda model, text, pad, g: torch.tensor([1, 2, 8, 9]).expand(BATCH, LENGTH, 4).clone(),
}
