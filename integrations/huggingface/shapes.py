"""Inputs in other shapes than those that their names suggest: what some families want of a tiny model's inputs."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnhub.integrations.huggingface.media import BATCH, LENGTH, PATCHES, first_int, grid, patch, pixels, sound, steps
from attnhub.integrations.huggingface.tiny import IMAGE, PATCH

Made = dict[str, Any]
_FEATURES = ("input_values", "input_features")


def _one_channel(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {n: t.unsqueeze(1) for n, t in made.items() if n in _FEATURES}


def _turned(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {n: t.transpose(-1, -2) for n, t in made.items() if n in ("input_features", "spectrogram") and t.ndim > 2}


def _codebooks(model: Any, made: Made, generator: torch.Generator) -> Made:
    books = first_int(model.config, "num_codebooks", "codebooks", "n_codes_total", "num_channels") or 1
    return {n: t.unsqueeze(-1).expand(*t.shape, books) % 16 for n, t in made.items() if n in ("input_ids", "decoder_input_ids")}


def _decoder_codebooks(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {n: t for n, t in _codebooks(model, made, generator).items() if n == "decoder_input_ids"}


def _stacked_codebooks(model: Any, made: Made, generator: torch.Generator) -> Made:
    """[batch * codebooks, length]: of the decoder, if there is one."""
    books = first_int(model.config, "num_codebooks")
    name = "decoder_input_ids" if "decoder_input_ids" in made else "input_ids"
    return {name: made[name].repeat_interleave(books, 0) % 16} if books and name in made else {}


def _flat_patches(model: Any, made: Made, generator: torch.Generator) -> Made:
    """Rows of patches instead of images, of all images in a row where a grid is given."""
    if "pixel_values" not in made or made["pixel_values"].ndim < 4:
        return {}
    count = patch(model.config, False)
    return {"pixel_values": torch.randn(BATCH, PATCHES, count, generator=generator)}


def _many_images(model: Any, made: Made, generator: torch.Generator) -> Made:
    """[batch, images, ...]."""
    return {n: t.unsqueeze(1).repeat(1, 2, 1, 1, 1) for n, t in made.items() if n == "pixel_values" and t.ndim == 4}


def _placeholders(model: Any, made: Made, generator: torch.Generator) -> Made:
    """Tokens that stand for images, as many as the model says that it expects."""
    token = first_int(model.config, "image_token_id", "image_token_index", "video_token_index")
    if token is None or "input_ids" not in made:
        return {}
    try:
        with torch.no_grad():
            model(**made)
    except Exception as error:
        found = re.search(r"tokens: ?(\d+).*features:? ?(\d+)", str(error))
        if not found:
            return {}
        count = math.ceil(int(found[2]) / BATCH)
        text = made["input_ids"].clone()
        if count > LENGTH - 3:
            return {}
        text[:, 2 : 2 + count] = token
        kinds = {"mm_token_type_ids": (text == token).long()} if "mm_token_type_ids" in inspect.signature(model.forward).parameters else {}
        return {"input_ids": text, **kinds}
    return {}


def _marked(model: Any, made: Made, generator: torch.Generator) -> Made:
    """Texts with three separators, or with a question."""
    token = first_int(model.config, "question_token_id", "sep_token_id", "eos_token_id")
    if token is None or "input_ids" not in made:
        return {}
    text = made["input_ids"].masked_fill(made["input_ids"] == token, 99)
    text[:, [4, 9, 10] if first_int(model.config, "question_token_id") is None else [4]] = token
    return {"input_ids": text}


def _in_place_of(name: str, rule: Callable[[Any, torch.Generator], Tensor]) -> Callable[[Any, Made, torch.Generator], Made]:
    return lambda model, made, generator: {name: rule(model, generator)} if name in made else {}


def _of_every_token(model: Any, made: Made, generator: torch.Generator) -> Made:
    """Eight frames of sound for each token."""
    if "input_features" not in made:
        return {}
    return {"input_features": torch.randn(BATCH, min(made["input_features"].shape[1:]), 8 * LENGTH, generator=generator)}


def _turned_beside_one_channel(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {} if not {"input_values", "input_features"} <= set(made) else _turned(model, made, generator) | {"input_values": made["input_values"].unsqueeze(1)}


def _patches_of_images(model: Any, made: Made, generator: torch.Generator) -> Made:
    """[1, patches of all images, channels, height, width], and where they are."""
    if "pixel_values" not in made:
        return {}
    side = first_int(model.config, "patch_size") or PATCH
    return {"pixel_values": torch.randn(1, BATCH * PATCHES, 3, side, side, generator=generator), "grid_thw": grid()}


def _frames_in_the_batch(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {n: t.flatten(0, 1) for n, t in made.items() if n == "pixel_values" and t.ndim == 5}


def _tiles(model: Any, made: Made, generator: torch.Generator) -> Made:
    """[batch, images, tiles, ...]."""
    tiles = first_int(model.config, "max_num_tiles")
    if tiles is None or "aspect_ratio_mask" not in made:
        return {}
    tiled = made["pixel_values"][:, None, None].repeat(1, 1, tiles, 1, 1, 1)
    return {"pixel_values": tiled, "aspect_ratio_mask": torch.ones(BATCH, 1, tiles, dtype=torch.long)}


def _larger_images(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {n: torch.randn(BATCH, t.shape[1], 4 * IMAGE, 4 * IMAGE, generator=generator) for n, t in made.items() if n == "pixel_values" and t.ndim == 4}


def _longer(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {"input_values": torch.randn(BATCH, 32000, generator=generator)} if "input_values" in made else {}


def _longer_features(model: Any, made: Made, generator: torch.Generator) -> Made:
    """As many frames as the model's positions stand for."""
    positions = first_int(model.config, "max_source_positions", "max_position_embeddings")
    if "input_features" not in made or not positions:
        return {}
    bins = min(made["input_features"].shape[-2:])
    return {"input_features": torch.randn(BATCH, bins, 2 * positions, generator=generator)}


SHAPES: dict[str, Callable[[Any, Made, torch.Generator], Made]] = {
    "one channel": _one_channel,
    "features turned": _turned,
    "codebooks": _codebooks,
    "codebooks of the decoder": _decoder_codebooks,
    "codebooks in the batch": _stacked_codebooks,
    "patches": _flat_patches,
    "many images": _many_images,
    "placeholders": _placeholders,
    "features of every token": _of_every_token,
    "features turned beside one channel": _turned_beside_one_channel,
    "patches of images": _patches_of_images,
    "frames in the batch": _frames_in_the_batch,
    "tiles": _tiles,
    "larger images": _larger_images,
    "marked": _marked,
    "inputs of sound": _in_place_of("inputs", sound),
    "inputs of pixels": _in_place_of("inputs", pixels),
    "inputs of floats": _in_place_of("inputs", lambda model, generator: steps(model, generator, "d_model")),
    "states of pixels": _in_place_of("hidden_states", pixels),
    "states of sound": _in_place_of("hidden_states", lambda model, generator: torch.randn(BATCH, 1, 320, generator=generator)),
    "longer sound": _longer,
    "longer features": _longer_features,
}
