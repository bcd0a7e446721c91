"""The attention problems that a transformers model poses, found by running it: its own heads and masks, a few layers, no weights.

``python -m attnhub.integrations.huggingface.problems`` answers a line of JSON (``{"folder": ...}``) by ``{"model", "dtype", "problems", "note"}`` or ``{"error"}``:
a process of its own, since loading a model may take memory and print.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any, Optional

import torch
from torch.overrides import TorchFunctionMode

import attnhub
from attnhub import runtime
from attnhub.bench.workers import answer
from attnhub.cli.offline import forbid_hub
from attnhub.integrations.huggingface.inputs import VARIANTS, tiny_inputs
from attnhub.integrations.huggingface.tiny import configs_of, is_int

#: Layers that are run where a configuration does not name the kinds of its layers.
_LAYERS = 2
_LAYER_COUNTS = re.compile(r"num_hidden_layers|(num_)?(encoder|decoder)_layers|num_layers|n_layers?|depth")
_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")
#: name -> its largest value here. Widths of feed-forward layers and vocabularies say nothing about attention; windows are to be shorter than a prompt.
_SIZES = (
    (re.compile(r"(.*_)?intermediate_size|(encoder_|decoder_)?ffn_dim|d_ff|n_inner"), 64),
    (re.compile(r"vocab_size"), 512),
    (re.compile(r"sliding_window|attention_chunk_size"), 8),
)
_TOKENS = re.compile(r"(pad|bos|eos|sep|cls|decoder_start)_token_id")
_NEW_TOKENS = 2
_DRAWS = re.compile(r"(normal|uniform|trunc_normal|kaiming_uniform|kaiming_normal|xavier_uniform|xavier_normal|orthogonal)_")


def problems(folder: str) -> dict[str, Any]:
    """What the model in a folder asks of attention: ``model`` (its class), ``dtype`` ("" if its configuration names none), and ``problems``, as JSON, of
    a prompt without and with padding and of the tokens after it; ``note`` says what was left out. They are those of a CPU in fp32 and of short lengths."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    name = (getattr(config, "architectures", None) or [""])[0]
    cls = getattr(transformers, name, None)
    reduce(config)
    model = _built(cls, config).eval()
    attnhub.patch(model)
    runtime.clear()
    note = _run(model)
    found = [problem.to_json() for problem in runtime.problems()]
    return {"model": type(model).__name__, "dtype": str(dtype or "").removeprefix("torch."), "problems": found, "note": note}


def reduce(config: Any) -> None:
    """Leaves of a configuration one layer of each kind that it names, else a few, and narrow feed-forward layers; heads stay as they are."""
    for inner in list(configs_of(config)):
        values = dict(inner.__dict__)
        kinds = next((list(values[key]) for key in _LAYER_KINDS if isinstance(values.get(key), (list, tuple)) and values[key]), None)
        for key, count in values.items():
            if not is_int(count) or not _LAYER_COUNTS.fullmatch(key):
                continue
            kept = list(range(min(count, _LAYERS)))
            if kinds is not None and len(kinds) == count:
                kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
            for name, value in values.items():
                if isinstance(value, (list, tuple)) and len(value) == count > len(kept):
                    setattr(inner, name, type(value)(value[i] for i in kept))
            setattr(inner, key, len(kept))
        for key, value in values.items():
            for pattern, most in _SIZES:
                if is_int(value) and pattern.fullmatch(key) and value > most:
                    setattr(inner, key, most)
            if is_int(value) and _TOKENS.fullmatch(key) and value >= 512:
                setattr(inner, key, 0 if key.startswith("pad") else 1)


def _built(cls: Optional[Any], config: Any) -> Any:
    import transformers

    with _NothingDrawn():
        if cls is None:
            return transformers.AutoModel.from_config(config, attn_implementation="eager", dtype=torch.float32)
        return cls._from_config(config, attn_implementation="eager", dtype=torch.float32)


class _NothingDrawn(TorchFunctionMode):
    """Parameters stay as they were allocated, which takes no memory until somebody writes there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _DRAWS.fullmatch(getattr(func, "__name__", "")):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _run(model: Any) -> str:
    """A prompt for each padding, and tokens behind it where the model generates; why it did not, or "". Raises what the first of `VARIANTS` raised, if
    none of them runs."""
    first: Optional[Exception] = None
    for variant in VARIANTS:
        try:
            inputs = tiny_inputs(model, "none", variant)
            model(**inputs)
            break
        except Exception as error:
            first = first or error
    else:
        assert first is not None
        raise first
    padded = "attention_mask" in inputs
    generates = model.can_generate()
    for pad in ("right",) * padded + ("left",) * (padded and not generates):
        model(**tiny_inputs(model, pad, variant))
    if not generates:
        return ""
    settings = {"min_new_tokens": _NEW_TOKENS, "max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    if getattr(model.config, "is_encoder_decoder", False):
        settings["decoder_start_token_id"] = 0
    try:
        for pad in ("none", "left") if padded else ("none",):
            given = {k: v for k, v in tiny_inputs(model, pad, variant).items() if k != "decoder_input_ids"}
            model.generate(**given, **settings)
    except Exception as error:
        return f"it was not made to generate: {_line(error)}"
    return ""


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()[:300]


def _answer(question: Any) -> Any:
    try:
        return problems(question["folder"])
    except Exception as error:
        return {"error": _line(error)}


def main() -> None:
    forbid_hub()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answer(_answer)


if __name__ == "__main__":
    main()
