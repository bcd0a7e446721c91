"""Inputs for a tiny model of any transformers class, by the names of the parameters of its forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from attnhub.integrations.huggingface.media import BATCH, BESIDE, GRIDS, INPUTS, LENGTH, images
from attnhub.integrations.huggingface.shapes import SHAPES

#: What a forward pass may need beside its main input, tried in this order until one runs: names of inputs, and of `SHAPES`.
VARIANTS: tuple[tuple[str, ...], ...] = (
    ("pixel_values", "placeholders"), ("pixel_values", "many images", "placeholders"),
    (), ("pixel_values",), ("input_features",), ("input_values",), ("pixel_values", "input_features"),
    ("one channel",), ("codebooks",), ("features turned",), ("codebooks of the decoder",), ("codebooks in the batch",),
    ("pixel_values", "patches"), ("pixel_values", "many images"), ("input_ids",), ("input_ids", "many images"),
    ("frames in the batch",), ("tiles",), ("larger images",), ("patches of images",),
    ("input_features", "features turned", "one channel"), ("input_features", "features of every token"), ("features turned beside one channel",),
    ("inputs_embeds",), ("entity_ids",), ("marked",), ("inputs of sound",), ("inputs of pixels",), ("inputs of floats",),
    ("states of pixels",), ("states of sound",), ("longer sound",), ("longer features",),
)  # fmt: skip


def tiny_inputs(model: Any, pad: str, variant: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the model's forward asks for, by the names of its parameters, and what the variant names. Only text can be padded here.

    Raises ValueError for a parameter without a default that has no rule, or a variant that changes nothing for this model.
    """
    generator = torch.Generator().manual_seed(7)
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    main = getattr(model, "main_input_name", "input_ids")
    extra = [n for n in variant if n in INPUTS]
    if any(n not in parameters for n in extra):
        raise ValueError(f"it takes no {', '.join(extra)}")
    wanted = list(dict.fromkeys([*required, *(n for n in ([main] if isinstance(main, str) else main) if n in parameters)]))
    if "input_ids" in parameters and "decoder_input_ids" not in parameters and "inputs" not in wanted:
        wanted.append("input_ids")
    if "inputs_embeds" in extra:
        wanted = [n for n in wanted if n != "input_ids"]
    if any(n in (*wanted, *extra) for n in ("input_ids", "inputs_embeds")) and "attention_mask" in parameters:
        wanted.append("attention_mask")
    by_name = ("decoder_input_ids",) if not type(model).__name__.endswith("ForSequenceClassification") else ()
    beside = [n for w in (*wanted, *extra) for n in BESIDE.get(w, ())]
    wanted.extend(n for n in (*by_name, "bbox", "visual_feats", "visual_pos", *beside) if n in parameters)
    text = torch.randint(3, _tokens(model), (BATCH, LENGTH), generator=generator)
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and type(model).__name__.endswith("ForSequenceClassification"):
        # Some read the class at the last of these.
        text = text.masked_fill(text == end, 99)
        text[:, LENGTH // 2] = end
    made: dict[str, Any] = {}
    for name in dict.fromkeys([*wanted, *extra]):
        rule = INPUTS.get(name)
        if rule is None:
            raise ValueError(f"there is no rule for its argument {name}")
        made[name] = rule(model, text, pad, generator)
    made |= {n: images(model, generator, made) for n in ("hidden_states", "pixel_values") if n in made and GRIDS & set(made)}
    for name in variant:
        if name in SHAPES:
            changed = SHAPES[name](model, made, generator)
            if not changed:
                raise ValueError(f"its inputs have no variant {name}")
            made |= changed
    if type(model).__name__.endswith("ForMultipleChoice"):
        made.update({n: t.unsqueeze(1).repeat(1, 2, *[1] * (t.ndim - 1)) for n, t in made.items()})
    return made


def _tokens(model: Any) -> int:
    """Tokens below this have an embedding, and are no special ones in a vocabulary that was made small."""
    try:
        rows = int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        rows = getattr(model.config, "vocab_size", None) or 0
    return min(100, rows) if rows > 8 else 100
