"""``attnhub export``: a HuggingFace model folder, or an importable module or function, as an ONNX file."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import os
import pathlib
import sys
from typing import Any

from attnhub.cli import CommandError, console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="a folder with a HuggingFace model (config.json), or module:attribute: an nn.Module, a class without arguments, or a function",
    )
    parser.add_argument("output", help="the ONNX file")
    parser.add_argument(
        "--inputs", default="", help="example inputs of module:attribute, as SHAPE[:DTYPE] joined by commas: 1x8x16x64:float32,1x8x16x64"
    )
    parser.add_argument(
        "--auto-class", default="AutoModel", help="transformers' class that loads the folder, AutoModelForCausalLM for instance"
    )
    parser.add_argument("--opset", type=int, default=18)
    parser.add_argument(
        "--kv-cache", action="store_true", help="of a HuggingFace decoder or encoder-decoder: past keys and values as inputs and outputs"
    )
    parser.add_argument("--fp16", action="store_true", help="export a float16 copy of the model")
    parser.add_argument("--static", action="store_true", help="fix all sizes; default: batch and length of a HuggingFace model are free")
    parser.add_argument("--no-verify", action="store_true", help="do not run the file in ONNX Runtime and compare it with torch")


def run(args: argparse.Namespace) -> int:
    import attnhub

    folder = pathlib.Path(args.model)
    if args.kv_cache and (args.static or not (folder / "config.json").is_file()):
        raise CommandError("--kv-cache is for the folder of a HuggingFace model, and without --static")
    if (folder / "config.json").is_file():
        model, inputs, shapes = _huggingface(folder, args)
    elif ":" in args.model:
        model, inputs = _importable(args.model), _tensors(args.inputs)
        shapes = None
    else:
        raise CommandError(f"{args.model}: neither a folder with a config.json nor module:attribute")
    try:
        report = attnhub.onnx.export(
            model,
            inputs,
            args.output,
            dynamic_shapes=shapes,
            opset=args.opset,
            kv_cache=args.kv_cache,
            fp16=args.fp16,
            report=not args.no_verify,
        )
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        console.emit_json(dataclasses.asdict(report))
    else:
        console.say(str(report))
    return 0


def _huggingface(folder: pathlib.Path, args: argparse.Namespace) -> tuple[Any, tuple[Any, ...], Any]:
    """(patched model, example tokens, free sizes). Only the folder is read, never the network."""
    import torch
    import transformers

    import attnhub
    from attnhub.cli.offline import forbid_hub

    forbid_hub()

    loader = getattr(transformers, args.auto_class, None)
    if loader is None:
        raise CommandError(f"--auto-class {args.auto_class}: transformers {transformers.__version__} has no such class")
    try:
        model = loader.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise CommandError(f"{folder}: transformers does not load it: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    report = attnhub.patch(model)
    if report.skipped and not args.json:
        console.say(str(report))
    tokens = torch.arange(2 * 16).reshape(2, 16) % model.config.get_text_config().vocab_size
    inputs: tuple[Any, ...] = (tokens, torch.ones_like(tokens))
    if args.kv_cache:
        return model, _for_cache(model, tokens), None
    if args.static:
        return _first_output(model), inputs, None
    shape = {0: torch.export.Dim("batch", min=2, max=4096), 1: torch.export.Dim("length", min=2, max=_longest(model.config))}
    return _first_output(model), inputs, (shape, shape)


def _for_cache(model: Any, tokens: Any) -> Any:
    """Example inputs of a model that is exported with its K/V cache, by name."""
    import torch

    if not model.config.is_encoder_decoder:
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.main_input_name == "input_ids":
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": tokens}
    if model.main_input_name == "input_features":
        config = model.config
        return {"input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions), "decoder_input_ids": tokens}
    raise CommandError(f"--kv-cache: a model that takes {model.main_input_name} is exported by attnhub.onnx.export(..., kv_cache=True)")


def _longest(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


def _first_output(model: Any) -> Any:
    """A module (input_ids, attention_mask) -> the first output: hidden states, or logits."""
    import torch

    # A K/V cache would become outputs of the file that nobody asked for.
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    class FirstOutput(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)[0]
            return out

    return FirstOutput().eval()


def _importable(target: str) -> Any:
    import torch

    module, _, attribute = target.partition(":")
    # As `python -m` does: what stands in the current folder can be named.
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CommandError(f"{target}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if isinstance(found, type):
        found = found()
    return found.eval() if isinstance(found, torch.nn.Module) else found


def _tensors(text: str) -> tuple[Any, ...]:
    import torch

    if not text:
        raise CommandError("--inputs is needed for module:attribute, e.g. --inputs 1x8x16x64,1x8x16x64,1x8x16x64")
    tensors = []
    for item in text.split(","):
        shape, _, name = item.partition(":")
        dtype = getattr(torch, name or "float32", None)
        try:
            sizes = [int(size) for size in shape.split("x")]
        except ValueError as error:
            raise CommandError(f"--inputs {item}: a shape such as 1x8x16x64 is needed") from error
        if not isinstance(dtype, torch.dtype):
            raise CommandError(f"--inputs {item}: {name} is not a dtype of torch")
        tensors.append(torch.randn(sizes).to(dtype) if dtype.is_floating_point else torch.zeros(sizes, dtype=dtype))
    return tuple(tensors)
