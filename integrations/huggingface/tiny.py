"""A tiny random model of any transformers class, and inputs for it: sizes by the names that configurations give them.

There is no rule per architecture, so some configurations cannot be made small this way; whoever asks gets the exception.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from attnhub.integrations.huggingface.modules import is_config

BATCH, LENGTH, VOCAB = 2, 20, 128
LAYERS, HEADS, WIDTH, HEAD_DIM = 2, 4, 32, 8
IMAGE, PATCH = 32, 8
#: A class that has more parameters than this after all is not run.
MOST_PARAMETERS = 40_000_000

#: name of a size -> its tiny value. The first pattern that matches the whole name decides; None keeps what is there.
_SIZES: tuple[tuple[str, Optional[int]], ...] = (
    (r".*(token|_id|_ids|index|idx)", None),
    (r".*(bucket|codebook_dim|num_labels|num_channels|in_channels|in_chans|out_channels|kernel.*|stride.*|.*pad.*|dilation.*|pool.*|.*factor.*|.*period.*|.*interval.*)", None),
    (r"(.*_)?vocab_size(_.*)?|type_vocab_size", VOCAB),
    (r".*experts_per_tok.*|.*top_?k(_experts)?|moe_k|n_activated_experts", 2),
    (r".*(num|n)(_local|_routed)?_experts|.*num_experts.*", 2),
    (r"(n_group|topk_group|.*num_groups|n_groups)", 1),
    (r".*(num|n)_shared_experts", 1),
    (r".*(key_value|kv|query)_?(heads|groups)|multi_query_group_num|num_key_value.*", 2),
    (r".*head.*dim.*|d_kv|kv_channels|d_head|.*head_size", HEAD_DIM),
    (r".*heads?|.*num_attention_head.*|n_head.*|num_head.*", HEADS),
    (r".*(lora_rank|_rank)", 16),
    (r".*(num|n|encoder|decoder|prediction|hidden)_?(hidden_)?(layers?|blocks)(_.*)?|.*num_layers|layers|depth|.*_depth|n_layers?|num_.*_layers|.*_layers", LAYERS),
    (r".*max_position_embeddings|n_positions|n_ctx|max_seq(_len|uence_length)|.*max_(source|target)_positions|context_length|block_size", 128),
    (r".*(intermediate|ffn|ff|inner|mlp|feedforward|feed_forward)_?(size|dim|hidden.*)?|d_ff|.*ffn_dim|.*intermediate.*size.*|n_inner|hidden_dim", 48),
    (r".*image_?size.*|img_size|input_size|.*crop_size", IMAGE),
    (r".*patch_?size.*", PATCH),
    (r".*num_mel_bins|.*n_mels|feature_size|input_feat_per_channel|.*num_mels", 16),
    (r".*(hidden|embed|embedding|model|proj|projection|feature|output|input)_?(size|dim|dims)|d_model|.*_dim|dim|n_embd|hidden|width|.*_hidden_size.*|.*embd.*|.*channels|.*_size|.*d_model", WIDTH),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _SIZES)
_TOKEN = re.compile(r".*(token_id|token_ids|token_index|_token|_id|_index|_idx)s?")
#: Lists of numbers that are no sizes of a hierarchy.
_KEPT_LISTS = re.compile(r".*(kernel|stride|pad|dilation|ratio|ids|mean|std|section|scale|range|lengths?|rates?|out_|features|indices|index|pool|grid).*")


def tiny_config(cls: type) -> Any:
    """The default configuration of a configuration class with small sizes, nested ones too, and eager attention."""
    config = cls()
    small = _shrunk(config)
    made = type(config)(**small)
    made._attn_implementation = "eager"
    return made


def _shrunk(config: Any) -> dict[str, Any]:
    """The arguments that make a small configuration: what the default one holds, by its own names."""
    given = {key: value for key, value in config.__dict__.items() if not key.startswith("_") and key not in _DERIVED}
    parameters = _parameters(type(config).__init__) | _fields(type(config))
    known = {key: value for key, value in given.items() if not parameters or key in parameters or is_config(value)}
    layers = next((v for k, v in known.items() if isinstance(v, int) and _value(k) == LAYERS and not isinstance(v, bool)), None)
    tokens = _Tokens()
    made: dict[str, Any] = {}
    for key, value in known.items():
        if is_config(value):
            made[key] = type(value)(**_shrunk(value))
        else:
            made[key] = _small(key, value, layers, tokens)
    for key, value in list(made.items()):
        if key in ("layer_types", "layers_block_type", "mlp_layer_types") and isinstance(value, list):
            made[key] = _each_kind(given[key])
    kinds = [len(made[k]) for k in ("layer_types", "layers_block_type") if isinstance(made.get(k), list)]
    if kinds:
        for key in made:
            if isinstance(given.get(key), int) and not isinstance(given[key], bool) and key in ("num_hidden_layers", "n_layer", "num_layers"):
                made[key] = kinds[0]
    return made


_DERIVED = {
    "transformers_version", "architectures", "model_type", "dtype", "torch_dtype", "id2label", "label2id", "num_labels", "return_dict", "output_attentions",
    "rope_scaling", "problem_type", "attribute_map", "is_composition", "use_bfloat16", "output_hidden_states",
}  # fmt: skip


def _parameters(function: Any) -> set[str]:
    found = inspect.signature(function).parameters
    return {n for n, p in found.items() if n != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _fields(cls: Any) -> set[str]:
    return set(getattr(cls, "__dataclass_fields__", {}))


def _value(key: str) -> Optional[int]:
    for pattern, value in _COMPILED:
        if pattern.fullmatch(key):
            return value
    return None


class _Tokens:
    """Special tokens beyond the tiny vocabulary get numbers at its end, each its own."""

    def __init__(self) -> None:
        self._next = VOCAB - 1
        self._known: dict[int, int] = {}

    def __call__(self, token: int) -> int:
        if token < VOCAB - 16:
            return token
        if token not in self._known:
            self._known[token], self._next = self._next, self._next - 1
        return self._known[token]


def _small(key: str, value: Any, layers: Optional[int], tokens: Callable[[int], int]) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, (float, str)):
        return value
    if isinstance(value, int):
        if _TOKEN.fullmatch(key):
            return tokens(value)
        small = _value(key)
        if key.endswith("position_embeddings") or small is None:
            return value if small is None else min(value, small) if value > 0 else value
        return min(value, small) if value > 0 else value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return type(value)(_small_list(key, list(value), layers, tokens))
    if isinstance(value, (list, tuple)) and layers is not None and len(value) == layers and layers > LAYERS:
        return type(value)(value[:LAYERS])
    if isinstance(value, dict) and value and all(isinstance(k, str) for k in value) and "rope" not in key:
        return {k: _small(k, v, layers, tokens) for k, v in value.items()}
    return value


def _small_list(key: str, value: list[int], layers: Optional[int], tokens: Callable[[int], int]) -> list[int]:
    if _TOKEN.fullmatch(key):
        return [tokens(v) for v in value]
    if "depth" in key or key in ("layers", "num_blocks", "block_repeats"):
        return [min(v, 1) for v in value]
    if re.fullmatch(r".*heads?.*", key):
        return [min(v, 2) for v in value]
    if re.fullmatch(r".*(image|img|crop)_?size.*", key):
        return [IMAGE] * len(value)
    if re.fullmatch(r".*patch_?size.*", key):
        return [min(v, PATCH) for v in value]
    if _KEPT_LISTS.fullmatch(key):
        return value
    if layers is not None and len(value) == layers and layers > LAYERS:
        return value[:LAYERS]
    if re.fullmatch(r".*(hidden|embed|dim|channel|width|size).*", key) and max(value) >= 32:
        smallest = min(v for v in value if v > 0)
        return [max(1, round(v / smallest)) * 16 if v > 0 else v for v in value]
    return value


def _each_kind(kinds: list[Any]) -> list[Any]:
    """Two layers, or one of each kind if there are more."""
    first = list(dict.fromkeys(kinds))
    return first if len(first) >= LAYERS else (kinds * LAYERS)[:LAYERS]


# -- models ----------------------------------------------------------------------------------------------------------------


def tiny_model(cls: Any, seed: int = 1) -> Any:
    """A model of the class in eval mode with eager attention, and weights so large that attention is far from uniform."""
    config = tiny_config(cls.config_class)
    with torch.device("meta"):
        count = sum(p.numel() for p in _made(cls, config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"its tiny configuration still has {count:,} parameters")
    torch.manual_seed(seed)
    model = _made(cls, tiny_config(cls.config_class)).eval()
    enlarge(model)
    return model


def _made(cls: Any, config: Any) -> Any:
    return cls._from_config(config, attn_implementation="eager", torch_dtype=torch.float32) if hasattr(cls, "_from_config") else cls(config)


def enlarge(model: nn.Module) -> None:
    """Weights of unit gain. transformers' own initialisation makes all keys look alike, and then any attention is right."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and parameter.numel() and "embed" not in name and "lm_head" not in name and parameter.is_floating_point():
                # All but the first dimension are summed over: in a linear layer, in a convolution, and in a product with heads.
                parameter.normal_(0.0, 1.3 / (parameter.numel() / parameter.shape[0]) ** 0.5, generator=generator)
            elif "sink" in name or "relative_attention_bias" in name:
                parameter.normal_(generator=generator)


# -- inputs ----------------------------------------------------------------------------------------------------------------


def padding(kind: str) -> Tensor:
    """[BATCH, LENGTH] of 1 for tokens and 0 for padding, at no side, at the left or at the right of the last sequence."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if kind == "left":
        mask[-1, :7] = 0
    if kind == "right":
        mask[-1, -7:] = 0
    return mask


def tiny_inputs(model: Any, pad: str) -> dict[str, Any]:
    """What the model's forward asks for, by the names of its parameters. Only text can be padded here.

    Raises ValueError for a parameter without a default that has no rule.
    """
    generator = torch.Generator().manual_seed(7)
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    main = getattr(model, "main_input_name", "input_ids")
    wanted = list(dict.fromkeys([*required, *([main] if main in parameters else [])]))
    if "input_ids" in parameters and "input_ids" not in wanted and "decoder_input_ids" not in parameters:
        wanted.append("input_ids")
    if any(n in wanted for n in ("input_ids", "inputs_embeds")) and "attention_mask" in parameters:
        wanted.append("attention_mask")
    if "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    if "bbox" in parameters:
        wanted.append("bbox")
    text = torch.randint(3, 100, (BATCH, LENGTH), generator=generator)
    made: dict[str, Any] = {}
    for name in dict.fromkeys(wanted):
        rule = _INPUTS.get(name)
        if rule is None:
            raise ValueError(f"there is no rule for its argument {name}")
        made[name] = rule(model, text, pad, generator)
    return made


def _pixels(model: Any, text: Tensor, pad: str, generator: torch.Generator) -> Tensor:
    config = model.config
    size, channels = IMAGE, 3
    for inner in _configs(config):
        found = getattr(inner, "image_size", None)
        if found is not None:
            size = found[0] if isinstance(found, (list, tuple)) else found
            size = size if isinstance(size, int) else IMAGE
        channels = getattr(inner, "num_channels", None) or getattr(inner, "in_channels", None) or channels
        if found is not None:
            break
    channels = channels if isinstance(channels, int) else 3
    return torch.randn(BATCH, channels, size, size, generator=generator)


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in config.__dict__.values():
        if is_config(value):
            yield from _configs(value)


def _mels(model: Any, text: Tensor, pad: str, generator: torch.Generator) -> Tensor:
    bins, frames = 16, 64
    for inner in _configs(model.config):
        found = getattr(inner, "num_mel_bins", None) or getattr(inner, "input_feat_per_channel", None)
        if isinstance(found, int):
            bins = found
            positions = getattr(inner, "max_source_positions", None)
            if isinstance(positions, int) and "whisper" in str(getattr(inner, "model_type", "")):
                frames = 2 * positions
            break
    by_frame = getattr(model, "main_input_name", "") == "input_features" and "Whisper" not in type(model).__name__
    return torch.randn((BATCH, frames, bins) if by_frame else (BATCH, bins, frames), generator=generator)


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
    "input_values": lambda model, text, pad, g: torch.randn(BATCH, 4000, generator=g),
    "bbox": lambda model, text, pad, g: torch.tensor([1, 2, 8, 9]).expand(BATCH, LENGTH, 4).clone(),
}
