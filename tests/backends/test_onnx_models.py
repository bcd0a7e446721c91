"""Whole models as files: decoders and encoder-decoders with a flat K/V cache, vision, float16, weights beside the model."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

import attnhub

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

from attnhub.backends.onnx import cached  # noqa: E402
from attnhub.backends.onnx import export as exporting  # noqa: E402
from attnhub.backends.onnx.session import run_all  # noqa: E402
from attnhub.backends.onnx.verify import Trial, feeds_of  # noqa: E402

NATIVE, BODY = "native", "body"


def open_session(path: pathlib.Path, way: str) -> Any:
    return ort.InferenceSession(str(path), attnhub.onnx.register() if way == NATIVE else ort.SessionOptions())


def run(session: Any, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip([o.name for o in session.get_outputs()], run_all(session, feeds)))


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97,
        max_position_embeddings=256, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, vocab_size=99, max_source_positions=50, max_target_positions=64, num_mel_bins=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_llama_decodes(tmp_path: pathlib.Path) -> None:
    """Prefill 9, then +1, +1, +3 tokens of a left-padded batch through one file: torch's logits of the whole, unpatched."""
    model = llama()
    ids = torch.randint(0, 97, (2, 14))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
    attnhub.patch(model)
    path = tmp_path / "llama.onnx"
    report = attnhub.onnx.export(model, (ids, mask), path, kv_cache=True)
    assert report.nodes == 2 and report.native_calls == 8 and len(report.verified) == 4
    assert report.native_difference is not None and report.native_difference < 1e-5
    graph = onnx.load(str(path)).graph
    assert [v.name for v in graph.input][:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert [v.name for v in graph.output] == ["logits", *(f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value"))]
    sizes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input[1:3], graph.output[1])]
    assert sizes == [["batch", "past + length"], ["batch", 2, "past", 16], ["batch", 2, "past + length", 16]]
    for way in (NATIVE, BODY):
        session = open_session(path, way)
        past = {f"{i}.{kind}": torch.zeros(2, 2, 0, 16) for i in range(2) for kind in ("key", "value")}
        logits, done = [], 0
        for step in (9, 1, 1, 3):
            feeds = {"input_ids": ids[:, done : done + step], "attention_mask": mask[:, : done + step]}
            found = run(session, {**feeds, **{f"past_key_values.{name}": t for name, t in past.items()}})
            logits.append(found.pop("logits"))
            past = {name.removeprefix("present."): tensor for name, tensor in found.items()}
            done += step
        kept = mask.bool()
        torch.testing.assert_close(torch.cat(logits, 1)[kept], want[kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [whisper, pytest.param(t5, marks=pytest.mark.long)])
def test_encoder_decoder_decodes(make: Any, tmp_path: pathlib.Path) -> None:
    """Two files: the encoder's keys and values once, then the decoder in steps; the logits of torch at once."""
    model = make()
    tokens = torch.randint(3, 99, (2, 7))
    if make is whisper:
        source = {"input_features": torch.randn(2, 8, 100)}
    else:
        source = {"input_ids": torch.randint(3, 99, (2, 11)), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
        source["attention_mask"][0, 6:] = 0
    with torch.no_grad():
        want = model(**source, decoder_input_ids=tokens).logits
    attnhub.patch(model)
    path = tmp_path / "decoder.onnx"
    report = attnhub.onnx.export(model, {**source, "decoder_input_ids": tokens}, path, kv_cache=True)
    assert report.encoder is not None and report.encoder.nodes == 2 and report.nodes == 4
    assert "decoder.encoder.onnx" in report.encoder.path and "decoder.encoder.onnx" in str(report)
    for way in (NATIVE, BODY):
        cross = run(open_session(pathlib.Path(report.encoder.path), way), source)
        session = open_session(path, way)
        names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
        past = {name: torch.zeros(2, model.config.num_attention_heads, 0, cross["cross.0.key"].shape[3]) for name in names}
        padded = {"attention_mask": source["attention_mask"]} if "attention_mask" in source else {}
        logits, done = [], 0
        for step in (4, 1, 2):
            found = run(session, {"decoder_input_ids": tokens[:, done : done + step], **padded, **past, **cross})
            logits.append(found.pop("logits"))
            past = {name.replace("present", "past_key_values"): tensor for name, tensor in found.items()}
            done += step
        torch.testing.assert_close(torch.cat(logits, 1), want, atol=1e-5, rtol=0)


class Logits(torch.nn.Module):
    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = self.model(*args, **self.options)[0]
        return out


@pytest.mark.long
def test_encoder_decoder_as_one_file(tmp_path: pathlib.Path) -> None:
    model = whisper()
    features, tokens = torch.randn(2, 8, 100), torch.randint(3, 99, (2, 7))
    wrapped = Whole(model)
    with torch.no_grad():
        want = wrapped(features, tokens)
    attnhub.patch(model)
    batch = torch.export.Dim("batch")
    shapes = ({0: batch}, {0: batch, 1: torch.export.Dim("length", max=64)})
    report = attnhub.onnx.export(wrapped.eval(), (features, tokens), tmp_path / "whisper.onnx", dynamic_shapes=shapes)
    assert report.nodes == 6 and report.native_calls == 12
    for way in (NATIVE, BODY):
        (found,) = run(open_session(tmp_path / "whisper.onnx", way), {"features": features, "tokens": tokens}).values()
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


class Whole(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits
        return logits


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def test_vit(tmp_path: pathlib.Path) -> None:
    model, pixels = vit(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        want = model(pixels).last_hidden_state
    attnhub.patch(model)
    report = attnhub.onnx.export(
        Logits(model).eval(), (pixels,), tmp_path / "vit.onnx", dynamic_shapes=(({0: torch.export.Dim("batch")},),)
    )
    assert report.nodes == 2 and len(report.verified) == 2
    name = onnx.load(str(tmp_path / "vit.onnx")).graph.input[0].name
    for way in (NATIVE, BODY):
        (found,) = run(open_session(tmp_path / "vit.onnx", way), {name: pixels}).values()
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


def test_fp16(tmp_path: pathlib.Path) -> None:
    """A float16 copy; the model itself stays as it was."""
    model = vit()
    attnhub.patch(model)
    report = attnhub.onnx.export(Logits(model).eval(), (torch.randn(2, 3, 32, 32),), tmp_path / "vit.onnx", fp16=True)
    assert next(model.parameters()).dtype == torch.float32
    graph = onnx.load(str(tmp_path / "vit.onnx")).graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT16}
    assert {t.data_type for t in graph.initializer} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert report.native_difference is not None and report.native_difference < 2e-2 and report.body_difference is not None


def test_weights_beside_the_model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "EXTERNAL_BYTES", 10_000)
    model = vit()
    attnhub.patch(model)
    report = attnhub.onnx.export(Logits(model).eval(), (torch.randn(2, 3, 32, 32),), tmp_path / "vit.onnx")
    assert report.external_data == "vit.onnx.data" and "weights in vit.onnx.data" in str(report)
    assert (tmp_path / "vit.onnx").stat().st_size < 200_000 < (tmp_path / "vit.onnx.data").stat().st_size + 200_000
    assert report.native_difference is not None and report.native_difference < 1e-5
    # A file that was cut off in a copy is named by the error, and nothing runs.
    with open(tmp_path / "vit.onnx.data", "r+b") as data:
        data.truncate(1000)
    for way in (NATIVE, BODY):
        with pytest.raises(Exception, match=r"External initializer: .* out of bounds"):
            open_session(tmp_path / "vit.onnx", way)


def parts_of(name: str) -> tuple[Any, ...]:
    """Models as torch's own exporter takes them."""
    if name == "vit":
        return (cached.Part(Logits(vit()), (torch.randn(2, 3, 32, 32),), (({0: torch.export.Dim("batch")},),), ["pixels"], ["out"], {}),)
    if name == "llama":
        ids = torch.randint(0, 97, (2, 5))
        return (cached.parts(llama(), (ids, torch.ones_like(ids)), {})[1],)
    tokens = torch.randint(3, 99, (2, 4))
    return cached.parts(whisper(), {"input_features": torch.randn(2, 8, 100), "decoder_input_ids": tokens}, {})


@pytest.mark.parametrize("name", ["vit", pytest.param("llama", marks=pytest.mark.long), pytest.param("whisper", marks=pytest.mark.long)])
def test_converted(name: str, tmp_path: pathlib.Path) -> None:
    """Files of torch's exporter, without attnhub: every attention becomes a node, all trials as before (a K/V cache's among them) and as in torch."""
    nodes = 0
    for part in parts_of(name):
        source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
        with torch.no_grad():
            program = torch.onnx.export(
                part.module, part.args, source, dynamo=True, dynamic_shapes=part.dynamic_shapes, input_names=part.input_names,
                output_names=part.output_names, opset_version=18, verbose=False,
            )  # fmt: skip
        assert program is not None
        report = attnhub.onnx.convert(source, target)
        assert not report.left and {node.op_type for node in onnx.load(str(target)).graph.node}.isdisjoint({"Softmax"}), str(report)
        nodes += len(report.converted)
        for trial in (Trial(part.args, {}), *part.trials):
            feeds = feeds_of(program, trial.args, {})
            with torch.no_grad():
                want = part.module(*trial.args)
            exact = want if isinstance(want, Tensor) else want[0] if isinstance(want[0], Tensor) else want[0][0]
            kept = torch.ones(exact.shape[:2], dtype=torch.bool)
            if name == "llama":  # queries that are padding have no key, where the source and torch differ
                kept = feeds["attention_mask"][:, -exact.shape[1] :].bool()
            before = run_all(ort.InferenceSession(str(source)), feeds)
            for way in (NATIVE, BODY):
                after = run_all(open_session(target, way), feeds)
                for got, was in zip(after, before):
                    torch.testing.assert_close(got, was, atol=1e-5, rtol=0)
                torch.testing.assert_close(after[0][kept], exact[kept], atol=1e-5, rtol=0)
    assert nodes == (6 if name == "whisper" else 2)


@pytest.mark.long
@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16e9, reason="needs 16 GB of memory")
def test_weights_beyond_two_gigabytes(tmp_path: pathlib.Path) -> None:
    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(560_000, 1024)

        def forward(self, ids: Tensor) -> Tensor:
            q = self.table(ids).unflatten(2, (16, 64)).transpose(1, 2)
            out = attnhub.attention(q, q, q, attnhub.Causal())
            assert isinstance(out, Tensor)
            return out

    report = attnhub.onnx.export(Large().eval(), torch.randint(0, 560_000, (2, 5)), tmp_path / "large.onnx")
    assert (tmp_path / report.external_data).stat().st_size > 1 << 31
    assert report.native_difference is not None and report.native_difference < 1e-5


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        ((torch.ones(1, 4, dtype=torch.long),), {"dynamic_shapes": ()}, "kv_cache=True makes dynamic_shapes itself"),
        ({"attention_mask": torch.ones(1, 4)}, {}, "a decoder takes input_ids"),
    ],
)
def test_wrong_requests_for_a_cache(inputs: Any, options: dict[str, Any], reason: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=reason):
        attnhub.onnx.export(llama(), inputs, tmp_path / "model.onnx", kv_cache=True, **options)
    with pytest.raises(ValueError, match="is not a transformers model"):
        attnhub.onnx.export(torch.nn.Linear(3, 3), torch.randn(2, 3), tmp_path / "model.onnx", kv_cache=True)


def test_the_command_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from attnhub import cli

    llama().save_pretrained(tmp_path / "llama")
    command = [
        "export",
        str(tmp_path / "llama"),
        str(tmp_path / "llama.onnx"),
        "--auto-class",
        "AutoModelForCausalLM",
        "--kv-cache",
        "--json",
    ]
    assert cli.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nodes"] == 2 and len(report["verified"]) == 4 and report["native_difference"] < 1e-5
