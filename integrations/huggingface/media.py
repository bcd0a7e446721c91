"""What the parameters of a model's forward hold, for a tiny model: a rule for each name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub.integrations.huggingface.tiny import IMAGE, PATCH, configs_of, is_int

BATCH, LENGTH = 2, 20
#: Patches of an image in a row, and an image's.
_SIDE, PATCHES = 4, 16


def padding(kind: str) -> Tensor:
    """[BATCH, LENGTH] of 1 for tokens and 0 for padding, at no side, at the left or at the right of the last sequence."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if kind == "left":
        mask[-1, :7] = 0
    if kind == "right":
        mask[-1, -7:] = 0
    return mask


def first_int(config: Any, *names: str) -> Optional[int]:
    """The first of these numbers that a configuration, or one inside it, has."""
    for inner in configs_of(config):
        for name in names:
            found = getattr(inner, name, None)
            if isinstance(found, (list, tuple)) and found:
                found = found[0]
            if isinstance(found, int) and is_int(found):
                return found
    return None


def _width(config: Any, *names: str) -> int:
    return first_int(config, *names, "hidden_size", "d_model") or 32


# -- images ----------------------------------------------------------------------------------------------------------------


def pixels(model: Any, generator: torch.Generator) -> Tensor:
    config = model.config
    size, channels = IMAGE, 3
    if ratios := getattr(config, "scaled_images_ratios", None):
        return torch.randn(BATCH, 3, *[int(config.patch_size / min(ratios))] * 2, generator=generator)
    for inner in configs_of(config):
        found = getattr(inner, "image_size", None)
        if found is not None:
            size = found[-1] if isinstance(found, (list, tuple)) and found else found
            size = size if isinstance(size, int) else IMAGE
        channels = getattr(inner, "num_channels", None) or getattr(inner, "in_channels", None) or channels
        if found is not None:
            break
    channels = channels if isinstance(channels, int) else 3
    frames = getattr(config, "num_frames", None)
    lead = (BATCH, int(frames)) if isinstance(frames, int) and getattr(model, "main_input_name", "") == "pixel_values" else (BATCH,)
    return torch.randn(*lead, channels, size, size, generator=generator)


def patch(config: Any, frames: bool) -> int:
    """Numbers of a patch."""
    time = (first_int(config, "temporal_patch_size", "patch_temporal") or 1) if frames else 1
    return (first_int(config, "in_channels", "num_channels") or 3) * time * (first_int(config, "patch_size") or PATCH) ** 2


#: Parameters that say where the patches of images are.
GRIDS = {"grid_thw", "image_grid_thw", "pixel_position_ids", "image_position_ids", "spatial_shapes"}


def grid() -> Tensor:
    return torch.tensor([[1, _SIDE, _SIDE]] * BATCH)


def images(model: Any, generator: torch.Generator, names: Any) -> Tensor:
    """Rows of patches: of all images one after the other, where a model takes grids; else [images, patches, ...]."""
    if {"grid_thw", "image_grid_thw"} & set(names):
        return torch.randn(BATCH * PATCHES, patch(model.config, True), generator=generator)
    return torch.randn(BATCH, PATCHES, patch(model.config, False), generator=generator)


def _positions() -> Tensor:
    """[BATCH, patches, 2]: column and row of each patch."""
    at = torch.arange(PATCHES)
    return torch.stack((at % _SIDE, at // _SIDE), -1).expand(BATCH, -1, -1).clone()


def _flattened(model: Any, generator: torch.Generator) -> Tensor:
    """[BATCH, LENGTH, 2 + numbers of a patch]: row, column and pixels, as a text's tokens are padded."""
    at = torch.arange(LENGTH)
    where = 1.0 + torch.stack((at // _SIDE, at % _SIDE), -1).expand(BATCH, -1, -1)
    return torch.cat((where, torch.randn(BATCH, LENGTH, patch(model.config, False), generator=generator)), -1)


def _some_patches(model: Any) -> Tensor:
    """Every second patch of each image, or of each tube of frames."""
    config = model.config
    size, side = first_int(config, "image_size") or IMAGE, first_int(config, "patch_size") or PATCH
    count = (size // side) ** 2
    if frames := first_int(config, "num_frames"):
        count *= frames // (first_int(config, "tubelet_size") or 1)
    return (torch.arange(count) % 2 == 0).expand(BATCH, -1).clone()


# -- sound -----------------------------------------------------------------------------------------------------------------

_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size")
_STEPS = 64


def _mels(model: Any, generator: torch.Generator) -> Tensor:
    bins, frames = 16, _STEPS
    for inner in configs_of(model.config):
        found = next((v for n in _BINS if is_int(v := getattr(inner, n, None))), None)
        if found is not None:
            bins = found * (first_int(inner, "num_stacked_frames") or 1)
            positions = getattr(inner, "max_source_positions", None)
            if isinstance(positions, int) and "whisper" in str(getattr(inner, "model_type", "")):
                frames = 2 * positions
            break
    return torch.randn((BATCH, frames, bins) if _is_by_frame(model) else (BATCH, bins, frames), generator=generator)


def _is_by_frame(model: Any) -> bool:
    return getattr(model, "main_input_name", "") == "input_features" and "Whisper" not in type(model).__name__


def _all_frames(model: Any, generator: torch.Generator) -> Tensor:
    """The mask of features that holds all of them."""
    return torch.ones(BATCH, _mels(model, generator).shape[1 if _is_by_frame(model) else 2], dtype=torch.long)


def sound(model: Any, generator: torch.Generator) -> Tensor:
    """Samples, or for a configuration with mel bins and a length a spectrogram."""
    bins, length = getattr(model.config, "num_mel_bins", None), getattr(model.config, "max_length", None)
    if isinstance(bins, int) and isinstance(length, int):
        return torch.randn(BATCH, length, bins, generator=generator)
    return torch.randn(BATCH, 4000, generator=generator)


def _codes(model: Any, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 16, (BATCH, first_int(model.config, "num_quantizers", "num_codebooks") or 1, LENGTH), generator=generator)


# -- series ----------------------------------------------------------------------------------------------------------------


def _series(model: Any, generator: torch.Generator, past: bool, features: bool = False) -> Tensor:
    """A time series: of one value a step, of channels, or of the features of its times."""
    config = model.config
    length = (config.context_length + max(getattr(config, "lags_sequence", None) or [0])) if past else config.prediction_length
    if features:
        return torch.randn(BATCH, length, config.num_time_features, generator=generator)
    channels = getattr(config, "num_input_channels", None)
    size = (channels,) if channels else (config.input_size,) if getattr(config, "input_size", 1) > 1 else ()
    return torch.randn(BATCH, length, *size, generator=generator)


def steps(model: Any, generator: torch.Generator, *names: str) -> Tensor:
    return torch.randn(BATCH, LENGTH, *((_width(model.config, *names),) if names else ()), generator=generator)


# -- all of them -----------------------------------------------------------------------------------------------------------

Rule = Callable[[Any, Tensor, str, torch.Generator], Any]
#: Parameters that are given wherever another one is, if the model takes them.
BESIDE: dict[str, tuple[str, ...]] = {
    "pixel_values": ("image_grid_thw", "image_position_ids", "pixel_attention_mask", "spatial_shapes", "aspect_ratio_ids", "aspect_ratio_mask", "image_sizes", "image_embeds_position_mask", "target_sizes", "image_attention_mask"),
    "input_features": ("input_features_mask", "feature_attention_mask"),
    "input_ids": ("context_input_ids", "context_attention_mask", "doc_scores", "decoder_input_values"),
    "entity_ids": ("entity_attention_mask", "entity_position_ids", "entity_start_positions", "entity_end_positions"),
    "query_embeds": ("encoder_hidden_states",),
    "input_values": ("decoder_input_values",),
    "states": ("actions", "rewards", "returns_to_go", "timesteps"),
    "boxes": ("labels", "mask"),
    "flattened_patches": ("attention_mask",),
}
INPUTS: dict[str, Rule] = {
    "input_ids": lambda model, text, pad, g: text,
    "decoder_input_ids": lambda model, text, pad, g: text[:, :7],
    "attention_mask": lambda model, text, pad, g: padding(pad),
    "qformer_input_ids": lambda model, text, pad, g: text,
    "inputs_embeds": lambda model, text, pad, g: steps(model, g, "hidden_size"),
    "inputs": lambda model, text, pad, g: text,
    "context_input_ids": lambda model, text, pad, g: text.repeat(first_int(model.config, "n_docs") or 1, 1),
    "context_attention_mask": lambda model, text, pad, g: torch.ones_like(text.repeat(first_int(model.config, "n_docs") or 1, 1)),
    "doc_scores": lambda model, text, pad, g: torch.rand(BATCH, first_int(model.config, "n_docs") or 1, generator=g),
    "entity_ids": lambda model, text, pad, g: text[:, :2] % 16,
    "entity_attention_mask": lambda model, text, pad, g: torch.ones(BATCH, 2, dtype=torch.long),
    "entity_position_ids": lambda model, text, pad, g: torch.tensor([[[2, 3], [5, 6]]] * BATCH),
    "entity_start_positions": lambda model, text, pad, g: torch.tensor([[2, 5]] * BATCH),
    "entity_end_positions": lambda model, text, pad, g: torch.tensor([[3, 6]] * BATCH),
    "image_embeds_position_mask": lambda model, text, pad, g: (torch.arange(LENGTH) < (first_int(model.config, "latent_query_num") or 1)).long().expand(BATCH, -1),
    "image_attention_mask": lambda model, text, pad, g: torch.ones(BATCH, LENGTH, 2, dtype=torch.long),
    "target_sizes": lambda model, text, pad, g: grid()[:, 1:].int(),
    "hidden_states": lambda model, text, pad, g: steps(model, g, "input_dim"),
    "task_inputs": lambda model, text, pad, g: text,
    "encoder_hidden_states": lambda model, text, pad, g: steps(model, g, "encoder_hidden_size"),
    "decoder_input_values": lambda model, text, pad, g: steps(model, g, "num_mel_bins"),
    "query_embeds": lambda model, text, pad, g: steps(model, g, "hidden_size"),
    "codebook_idx": lambda model, text, pad, g: 1,
    "codes": lambda model, text, pad, g: _codes(model, g),
    # Images
    "pixel_values": lambda model, text, pad, g: pixels(model, g),
    "prompt_pixel_values": lambda model, text, pad, g: pixels(model, g),
    "prompt_masks": lambda model, text, pad, g: pixels(model, g),
    "pixel_values_videos": lambda model, text, pad, g: pixels(model, g).unsqueeze(1).repeat(1, getattr(model.config, "num_frames", 4), 1, 1, 1),
    "grid_thw": lambda model, text, pad, g: grid(),
    "image_grid_thw": lambda model, text, pad, g: grid(),
    "merge_sizes": lambda model, text, pad, g: torch.ones(BATCH, dtype=torch.long),
    "pixel_position_ids": lambda model, text, pad, g: _positions(),
    "image_position_ids": lambda model, text, pad, g: _positions(),
    "pixel_attention_mask": lambda model, text, pad, g: torch.ones(BATCH, PATCHES, dtype=torch.long),
    "spatial_shapes": lambda model, text, pad, g: grid()[:, 1:],
    "image_sizes": lambda model, text, pad, g: torch.tensor([[first_int(model.config, "image_size") or IMAGE] * 2] * BATCH),
    "aspect_ratio_ids": lambda model, text, pad, g: torch.ones(BATCH, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda model, text, pad, g: torch.ones(BATCH, 1, 1, dtype=torch.long),
    "flattened_patches": lambda model, text, pad, g: _flattened(model, g),
    "bool_masked_pos": lambda model, text, pad, g: _some_patches(model),
    "visual_feats": lambda model, text, pad, g: torch.randn(BATCH, 5, model.config.visual_feat_dim, generator=g),
    "visual_pos": lambda model, text, pad, g: torch.rand(BATCH, 5, model.config.visual_pos_dim, generator=g),
    "bbox": lambda model, text, pad, g: torch.tensor([1, 2, 8, 9]).expand(BATCH, LENGTH, 4).clone(),
    "boxes": lambda model, text, pad, g: torch.tensor([1, 2, 8, 9]).expand(BATCH, LENGTH, 4).clone(),
    # Sound
    "input_features": lambda model, text, pad, g: _mels(model, g),
    "input_features_mask": lambda model, text, pad, g: _all_frames(model, g),
    "feature_attention_mask": lambda model, text, pad, g: _all_frames(model, g),
    "input_values": lambda model, text, pad, g: sound(model, g),
    "spectrogram": lambda model, text, pad, g: steps(model, g, "model_in_dim"),
    "mel_spectrogram": lambda model, text, pad, g: steps(model, g, "mel_dim").transpose(1, 2),
    "audio_mel": lambda model, text, pad, g: torch.randn(BATCH, _STEPS, first_int(model.config, "input_feat_size") or 16, generator=g),
    "audio_mel_mask": lambda model, text, pad, g: torch.zeros(BATCH, _STEPS, dtype=torch.bool),
    "latents": lambda model, text, pad, g: steps(model, g, "hidden_size").transpose(1, 2),
    "audio_input_ids": lambda model, text, pad, g: _codes(model, g).transpose(1, 2),
    "chunk_sample_lengths": lambda model, text, pad, g: torch.full((BATCH,), _STEPS * 160),
    "spkr_id": lambda model, text, pad, g: torch.zeros(BATCH, 1, dtype=torch.long),
    "lang_id": lambda model, text, pad, g: torch.zeros(BATCH, 1, dtype=torch.long),
    # Masks of what is no text
    "mask": lambda model, text, pad, g: torch.ones(BATCH, LENGTH, dtype=torch.bool),
    "labels": lambda model, text, pad, g: torch.zeros(BATCH, LENGTH, dtype=torch.long),
    # Series, decisions
    "past_values": lambda model, text, pad, g: _series(model, g, past=True),
    "past_values_padding": lambda model, text, pad, g: torch.zeros_like(_series(model, g, past=True), dtype=torch.long),
    "freq": lambda model, text, pad, g: torch.zeros(BATCH, 1, dtype=torch.long),
    "past_observed_mask": lambda model, text, pad, g: torch.ones_like(_series(model, g, past=True)),
    "past_time_features": lambda model, text, pad, g: _series(model, g, past=True, features=True),
    "future_time_features": lambda model, text, pad, g: _series(model, g, past=False, features=True),
    "future_values": lambda model, text, pad, g: _series(model, g, past=False),
    "static_categorical_features": lambda model, text, pad, g: torch.zeros(BATCH, getattr(model.config, "num_static_categorical_features", 0), dtype=torch.long),
    "states": lambda model, text, pad, g: steps(model, g, "state_dim"),
    "actions": lambda model, text, pad, g: steps(model, g, "act_dim"),
    "rewards": lambda model, text, pad, g: steps(model, g).unsqueeze(-1),
    "returns_to_go": lambda model, text, pad, g: steps(model, g).unsqueeze(-1),
    "timesteps": lambda model, text, pad, g: torch.arange(LENGTH).expand(BATCH, -1),
    "state": lambda model, text, pad, g: torch.randn(BATCH, first_int(model.config, "max_state_dim") or 32, generator=g),
    "action_embeds": lambda model, text, pad, g: steps(model, g, "hidden_size"),
    "noise_embeds": lambda model, text, pad, g: steps(model, g, "hidden_size"),
    "context_hidden_states": lambda model, text, pad, g: steps(model, g, "hidden_size").repeat(1, 1, len(getattr(model.config, "target_layer_ids", None) or [0])),
    "marks": lambda model, text, pad, g: torch.tensor([[3, 7]]),
    "num_options": lambda model, text, pad, g: torch.tensor([[2, 2]]),
    "question_type_ids": lambda model, text, pad, g: torch.tensor([[0, 1]]),
}  # fmt: skip
