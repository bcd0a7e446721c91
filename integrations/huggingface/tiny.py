"""A tiny random model of any transformers class: sizes by the names that configurations give them.

There is no rule per architecture, so some configurations cannot be made small this way; whoever asks gets the exception.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

import torch
from torch import nn

from attnhub.integrations.huggingface.hints import HINTS, OF_CLASSES
from attnhub.integrations.huggingface.modules import is_config

VOCAB = 128
LAYERS, HEADS, WIDTH, HEAD_DIM = 2, 4, 32, 8
IMAGE, PATCH = 32, 8
#: A class that has more parameters than this after all is not run.
MOST_PARAMETERS = 120_000_000
#: How a configuration is made small. narrow: every size by its name. scaled: all widths by the same factor, as some hang together in ways that
#: no name tells. shallow: widths as they are. The last two also make layers, experts, tokens and pixels few.
WAYS = ("narrow", "scaled", "shallow")
SCALE = 4
#: Pixels that patches of 14 and 16, windows of 7 and a stride of 32 divide.
PIXELS = 224

#: name of a size -> its tiny value. The first pattern that matches the whole name decides; None keeps what is there.
_SIZES: tuple[tuple[str, Optional[int]], ...] = (
    (r".*(token|_id|_ids|index|idx)", None),
    (r".*layer_offset", 1),
    (r".*(bucket|codebook_dim|num_labels|num_channels|in_channels|in_chans|out_channels|kernel.*|stride.*|.*pad.*|dilation.*|pool.*|.*factor.*|.*interval.*)", None),
    (r"(.*_)?vocab_size(_.*)?|type_vocab_size", VOCAB),
    (r".*experts_per_tok.*|.*top_?k(_experts)?|moe_k|n_activated_experts", 2),
    (r".*(num|n)(_local|_routed)?_experts|.*num_experts.*", 2),
    (r"(n_group|topk_group|.*num_groups|n_groups)", 1),
    (r".*(num|n)_shared_experts", 1),
    (r".*(key_value|kv|query)_?(heads|groups)|multi_query_group_num|num_key_value.*", 2),
    (r".*layer_period", 2),
    (r"window_size", 4),
    (r"num_latents", 16),
    (r"num_pos_feats", WIDTH // 2),
    (r"num_queries", 4),
    (r"coordinate_size", 5),
    (r"shape_size", 6),
    (r"d_latents", WIDTH),
    (r"rotary.*dim|.*rope_dim", HEAD_DIM // 2),
    (r".*head.*dim.*|d_kv|kv_channels|d_head|.*head_size", HEAD_DIM),
    (r".*heads?|.*num_attention_head.*|n_head.*|num_head.*", HEADS),
    (r".*(lora_rank|_rank)", 16),
    (r".*(num|n|encoder|decoder|prediction|hidden)_?(hidden_)?(layers?|blocks)(_.*)?|.*num_layers|layers|depth|.*_depth|n_layers?|num_.*_layers|.*_layers", LAYERS),
    (r".*max_position_embeddings|n_positions|n_ctx|max_seq(_len|uence_length)|.*max_(source|target)_positions|context_length|block_size", 128),
    (r".*(intermediate|ffn|ff|inner|mlp|feedforward|feed_forward)_?(size|dim|hidden.*)?|d_ff|.*ffn_dim|.*intermediate.*size.*|n_inner|hidden_dim", 48),
    (r".*image_?size.*|img_size|input_size|.*crop_size", IMAGE),
    (r".*patch_?size.*", PATCH),
    (r".*num_mel_bins|.*n_mels|input_feat_per_channel|.*num_mels", 16),
    (r".*(hidden|embed|embedding|model|proj|projection|feature|output|input)_?(size|dim|dims)|bottleneck_features|d_model|.*_dim|dim|n_embd|hidden|width|(.*_)?hidden_size.*|.*embd.*|.*channels|.*_size|.*d_model", WIDTH),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _SIZES)
_COUNTS = re.compile(r".*(vocab|expert|layer|block|depth|top_?k|n_group|num_queries).*")
_PIXELS = re.compile(r".*(image|img|crop)_?size.*")
_TOKEN = re.compile(r".*(token_id|token_ids|token_index|_token|_id|_index|_idx)s?")
#: Lists of numbers that are no sizes of a hierarchy.
_KEPT_LISTS = re.compile(r".*(kernel|stride|pad|dilation|ratio|ids|mean|std|section|scale|range|lengths?|rates?|out_(features|ind)|features|indices|index|pool|grid).*")


class TooLargeError(ValueError):
    """A tiny configuration that is none."""


def tiny_config(cls: type, way: str = "narrow", model: str = "", implementation: str = "eager") -> Any:
    """The default configuration of a configuration class with small sizes, nested ones too, for a model class of this name.

    implementation: of attention; "default" leaves it to transformers."""
    config = cls()
    given = _shrunk(config, way)
    for key, value in OF_CLASSES.get(model, {}).items():
        given[key] = type(given[key])(**_shrunk(getattr(config, key), way) | value) if isinstance(value, dict) and is_config(given.get(key)) else value
    made = type(config)(**given)
    for inner in configs_of(made):
        if "pad_token_id" in inner.__dict__ and inner.pad_token_id is None:
            inner.pad_token_id = 0
        rope = inner.__dict__.get("rope_parameters") if way == "narrow" else None
        if isinstance(rope, dict) and "rope_type" in rope and "mrope_section" not in rope:
            # The default of those that divide a head by time, height and width is that of a head of 128; others do not look.
            rope["mrope_section"] = _rope("mrope_section", [0, 0, 0])
    if implementation != "default":
        made._attn_implementation = "eager"
    return made


def _shrunk(config: Any, way: str) -> dict[str, Any]:
    """The arguments that make a small configuration: what the default one holds, by its own names."""
    given = {key: value for key, value in config.__dict__.items() if not key.startswith("_") and key not in _DERIVED}
    stages = getattr(config, "out_indices", None) if "_out_indices" in config.__dict__ else None
    if isinstance(stages, (list, tuple)) and len(stages) > 1:
        given["out_indices"] = list(stages)
    parameters = _parameters(type(config).__init__) | _fields(type(config))
    known = {key: value for key, value in given.items() if not parameters or key in parameters or is_config(value) or key == "out_indices"}
    hierarchy = next((v for k, v in given.items() if k in _HIERARCHY and isinstance(v, (list, tuple)) and v), ())
    before = next((v for k, v in known.items() if is_int(v) and _value(k) == LAYERS and "layer" in k), 0)
    kinds = next((_each_kind(v) for k, v in known.items() if k in _KINDS and isinstance(v, (list, tuple)) and v), [])
    indices = [v for k, v in known.items() if k.endswith("out_indices") and isinstance(v, (list, tuple)) and len(v) > 1]
    layers = max(LAYERS, len(kinds), *(len(v) for v in indices), 0)
    tokens = _Tokens()
    made: dict[str, Any] = {}
    for key, value in known.items():
        if is_config(value):
            made[key] = _resnet(value) if value.model_type == "timm_backbone" else type(value)(**_shrunk(value, way))
        elif key == "attention_types" and isinstance(value, list) and value and isinstance(value[0], (list, tuple)):
            made[key] = [[list(value[0][0])[:layers], 1]]
        elif key in _KINDS and isinstance(value, (list, tuple)) and value:
            made[key] = (_each_kind(value) * layers)[:layers]
        elif key.endswith("out_indices") and isinstance(value, (list, tuple)) and indices and not hierarchy:
            made[key] = type(value)(range(layers - len(value) + 1, layers + 1) if key == "out_indices" and "_out_indices" in config.__dict__ else range(len(value)))
        elif hierarchy and value == len(hierarchy) and re.match(r"num_.*(blocks|stages)", key):
            made[key] = value
        elif isinstance(value, (list, tuple)) and before > layers and len(value) == before:
            made[key] = type(value)(_small(key, v, tokens, way) if is_int(v) else v for v in value[:layers])
        else:
            made[key] = _small(key, value, tokens, way)
            if is_int(value) and _value(key) == LAYERS and made[key] == LAYERS:
                made[key] = min(value, layers)
    if way == "narrow":
        _agree(made, known)
        made |= HINTS.get(config.model_type or getattr(config, "base_config_key", ""), {})
    return made


def _resnet(backbone: Any) -> Any:
    """A backbone of the same stages that needs no timm."""
    from transformers import ResNetConfig

    stages = list(getattr(backbone, "out_indices", None) or [4])
    stages = [n if n >= 0 else 5 + n for n in stages]
    return ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], out_indices=stages)  # type: ignore[call-arg]


_INSTEAD_OF_NONE = {"head_dim": HEAD_DIM, "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "top_k_experts": 2, "moe_intermediate_size": 48, "vocab_size": VOCAB}


def _agree(made: dict[str, Any], before: dict[str, Any]) -> None:
    """Sizes that depend on one another, where more than one family has them."""
    heads = [k for k in ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads") if is_int(made.get(k))]
    kv_heads = [k for k in ("num_key_value_heads", "num_kv_heads", "n_kv_heads") if is_int(made.get(k))]
    for kv in kv_heads:
        if heads and (before[kv] == before[heads[0]] or "kv_lora_rank" in made):
            made[kv] = made[heads[0]]
    for key, value in _INSTEAD_OF_NONE.items():
        if key in made and made[key] is None:
            made[key] = value
    if heads and made.get("num_key_value_heads", 0) is None:
        made["num_key_value_heads"] = made[heads[0]]
    if made.get("layer_types", 0) is None:
        # Hybrids that make no choice by themselves.
        made["layer_types"] = ["mamba", "attention"] if "mamba_n_heads" in made else ["conv", "full_attention"] if "conv_L_cache" in made else None
    if "attn_layer_indices" in made and not made["attn_layer_indices"]:
        made["attn_layer_indices"] = [1]
    if "mamba_d_ssm" in made and "mamba_n_heads" in made:
        made["mamba_d_ssm"] = made["mamba_n_heads"] * HEAD_DIM
    if "qk_head_dim" in made and {"qk_nope_head_dim", "qk_rope_head_dim"} <= set(made):
        made["qk_head_dim"] = made["qk_nope_head_dim"] + made["qk_rope_head_dim"]
    if made.get("default_language", 0) is None and made.get("languages"):
        made["default_language"] = made["languages"][0]
    # State space layers: heads times their size is the width times its expansion.
    for prefix, count, expand in (("mamba_n_heads", "mamba_d_head", "mamba_expand"), ("mamba_num_heads", "mamba_head_dim", "expand"), ("num_heads", "head_dim", "expand")):
        if all(k in made for k in (prefix, count, expand)) and made[expand]:
            made[count], made[prefix] = HEAD_DIM, int(made[expand] * made.get("hidden_size", WIDTH)) // HEAD_DIM
    for key in ("prediction_length", "context_length"):
        if key in made and "lags_sequence" in made:
            made[key] = 4
    if made.get("codebook_dim") and "quantizer" in "".join(made) + "".join(map(str, before.get("architectures") or ())):
        made["codebook_dim"] = made.get("hidden_size", made["codebook_dim"])


#: Layers of each stage of a hierarchy.
_HIERARCHY = ("depths", "depth", "stage_num_blocks", "layers", "num_blocks", "block_repeats", "encoder_blocks", "block_configs", "stage_configs")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "layer_type_list", "block_types", "attention_types_per_layer")
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


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _small(key: str, value: Any, tokens: Callable[[int], int], way: str) -> Any:
    if is_int(value):
        if _TOKEN.fullmatch(key):
            return tokens(value)
        small = _value(key) if key != "window_size" or value < IMAGE else None  # Larger ones are in pixels.
        if small is None or value <= 0:
            return value
        if way == "narrow" or _COUNTS.fullmatch(key):
            return min(value, small)
        if _PIXELS.fullmatch(key):
            return min(value, PIXELS)
        return _scaled(value) if way == "scaled" and small in _WIDTHS else value
    if isinstance(value, (list, tuple)) and value and all(is_int(v) for v in value):
        # Some models append to a list of the checkpoint, and their own default is a tuple.
        return (type(value) if way == "narrow" else list)(_small_list(key, list(value), tokens, way))
    if isinstance(value, dict) and value and all(isinstance(k, str) for k in value):
        if "rope" in key or "rotary" in key:
            return {k: _small(key, v, tokens, way) if isinstance(v, dict) else _rope(k, v, way) for k, v in value.items()}
        return {k: _small(k, v, tokens, way) for k, v in value.items()}
    return value


_WIDTHS = {WIDTH, 48, 16, HEAD_DIM, HEAD_DIM // 2}


def _scaled(value: int) -> int:
    return value // SCALE if value >= 32 and value % SCALE == 0 else value


def _rope(key: str, value: Any, way: str = "narrow") -> Any:
    """Sections of a head's pairs of dimensions (time, height, width)."""
    if "section" in key and isinstance(value, (list, tuple)) and value:
        if way != "narrow":
            return type(value)(v // SCALE for v in value) if way == "scaled" else value
        half = HEAD_DIM // 2
        return type(value)([half - len(value) + 1, *[1] * (len(value) - 1)])
    return value


def _small_list(key: str, value: list[int], tokens: Callable[[int], int], way: str) -> list[int]:
    if _TOKEN.fullmatch(key):
        return [tokens(v) for v in value]
    if "depth" in key or key in ("layers", "num_blocks", "block_repeats"):
        return [min(v, 1) for v in value]
    if way == "shallow":
        return [min(v, PIXELS) for v in value] if _PIXELS.fullmatch(key) else value
    if way == "scaled" and _PIXELS.fullmatch(key):
        return [min(v, PIXELS) for v in value]
    if way == "narrow" and (small := _narrow_list(key, value)) is not None:
        return small
    if not _KEPT_LISTS.fullmatch(key) and re.fullmatch(r".*(hidden|embed|dim|channel|width|size).*", key) and max(value) >= 32:
        # A hierarchy keeps its ratios, also to other lists; the channels of an image stay.
        return [max(4, v // SCALE) if v > 4 else v for v in value]
    return value


def _narrow_list(key: str, value: list[int]) -> Optional[list[int]]:
    if re.fullmatch(r".*heads?.*", key):
        return [min(v, 2) for v in value]
    if key in ("attn_layer_indices", "axial_pos_embds_dim"):
        return [1] if key == "attn_layer_indices" else [WIDTH // len(value)] * len(value)
    if _PIXELS.fullmatch(key):
        return [IMAGE] * len(value)
    return [min(v, PATCH) for v in value] if re.fullmatch(r".*patch_?size.*", key) else None


def _each_kind(kinds: Union[list[Any], tuple[Any, ...]]) -> list[Any]:
    """Two layers, or one of each kind if there are more."""
    first = list(dict.fromkeys(kinds))
    return first if len(first) >= LAYERS else (first * LAYERS)[:LAYERS]


# -- models ----------------------------------------------------------------------------------------------------------------


def tiny_model(cls: Any, implementation: str = "eager", way: str = "narrow") -> Any:
    """A model of the class in eval mode, and weights so large that attention is far from uniform."""
    with torch.device("meta"):
        count = sum(p.numel() for p in _made(cls, implementation, way).parameters())
    if count > MOST_PARAMETERS:
        raise TooLargeError(f"its tiny configuration still has {count:,} parameters")
    torch.manual_seed(1)
    model = _made(cls, implementation, way).eval()
    enlarge(model)
    return model


def _made(cls: Any, implementation: str, way: str) -> Any:
    config = tiny_config(cls.config_class, way, cls.__name__, implementation)
    asked = {} if implementation == "default" else {"attn_implementation": implementation}
    return cls._from_config(config, dtype=torch.float32, **asked)


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


def configs_of(config: Any) -> Iterator[Any]:
    yield config
    for value in config.__dict__.values():
        if is_config(value):
            yield from configs_of(value)
