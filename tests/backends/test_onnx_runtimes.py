"""One file everywhere: onnx.reference, and ONNX Runtime 1.20, 1.23, 1.27 and the newest, with the library and without it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnhub

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from attnhub.backends.onnx.model import one_node  # noqa: E402
from attnhub.backends.onnx.node import Form  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT
VERSIONS = ("1.20.1", "1.23.2", "1.27.0", "")  # "" is the newest
FORMS = [
    Form(),
    Form(is_causal=True, alignment="top_left", softcap=5.0, scale=0.3),
    Form(is_causal=True, window_left=3, sinks=True, lse=True),
    Form(window_left=1, window_right=1, chunk=4, mask="float"),
    Form(mask="bool", nonpad_kv_seqlen=True),
    Form(is_causal=True, leftpad=True, alibi=True),
    Form(is_causal=True, past=True, present=True),
]


def feeds(form: Form) -> dict[str, Tensor]:
    """Inputs of small sizes, with a past of 3 keys."""
    torch.manual_seed(3)
    total = 7 + (3 if form.past else 0)
    made = {
        "Q": torch.randn(2, 4, 5, 8), "K": torch.randn(2, 2, 7, 8), "V": torch.randn(2, 2, 7, 6), "past_key": torch.randn(2, 2, 3, 8),
        "past_value": torch.randn(2, 2, 3, 6), "attn_mask": torch.rand(2, 1, 5, total) > 0.3 if form.mask == "bool" else torch.randn(1, 4, 5, total),
        "sinks": torch.randn(4), "alibi_slopes": torch.rand(4), "nonpad_kv_seqlen": torch.tensor([0, 3]), "leftpad": torch.tensor([0, 2]),
    }  # fmt: skip
    return {name: made[name] for name in form.inputs() if name}


def by_torch(form: Form, inputs: dict[str, Tensor]) -> Tensor:
    """Y by torch alone: the scores, the masks and the softmax written out in fp64, 0 for rows without keys."""
    k, v = (
        torch.cat([inputs[past], inputs[name]], 2) if past in inputs else inputs[name]
        for name, past in (("K", "past_key"), ("V", "past_value"))
    )
    q, k, v = inputs["Q"].double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    scores = q @ k.transpose(2, 3) * (form.scale or q.shape[3] ** -0.5)
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    length = inputs["nonpad_kv_seqlen"] if form.nonpad_kv_seqlen else torch.full((2,), k.shape[2])
    j, i = torch.arange(k.shape[2]), torch.arange(q.shape[2])[:, None]
    p = i + (length[:, None, None, None] - q.shape[2] if form.alignment == "bottom_right" else 0)
    allowed = (j < length[:, None, None, None]).expand(2, 1, q.shape[2], -1).clone()
    if form.is_causal:
        allowed &= j <= p
    if form.window_left >= 0:
        allowed &= j >= p - form.window_left
    if form.window_right >= 0:
        allowed &= j <= p + form.window_right
    if form.chunk:
        allowed &= p.div(form.chunk, rounding_mode="floor") == j.div(form.chunk, rounding_mode="floor")
    if form.leftpad:
        allowed &= j >= inputs["leftpad"][:, None, None, None]
    if form.mask == "bool":
        allowed = allowed & inputs["attn_mask"]
    elif form.mask == "float":
        scores = scores + inputs["attn_mask"].double()
    if form.alibi:
        scores = scores - inputs["alibi_slopes"].double()[:, None, None] * (p - j).abs()
    scores = scores.masked_fill(~allowed, -torch.inf)
    if form.sinks:
        scores = torch.cat([scores, inputs["sinks"].double()[:, None, None].expand(2, 4, q.shape[2], 1)], -1)
    return torch.softmax(scores, -1).nan_to_num(0.0)[..., : k.shape[2]] @ v


@pytest.mark.parametrize("form", FORMS, ids=Form.overload)
def test_in_onnx_reference(form: Form) -> None:
    inputs = feeds(form)
    found = ReferenceEvaluator(one_node(form, FLOAT)).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found[0]).double(), by_torch(form, inputs), atol=1e-6, rtol=0)


class Several(torch.nn.Module):
    """Three forms in one model, two of them with the same inputs: the wrong body would be wrong numbers, not an error."""

    def forward(self, q: Tensor, k: Tensor, keep: Tensor) -> Any:
        causal = attnhub.attention(q, k, k, attnhub.Causal())
        return causal, attnhub.attention(q, k, k), attnhub.attention(q, k, k, attnhub.BoolMask(keep)), attnhub.attention(q, -k, k)


def several(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any], tuple[Tensor, ...]]:
    """(the file, inputs of other sizes than it was exported with, torch's results)."""
    pytest.importorskip("onnxscript")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    sizes = {"q": {0: batch, 2: length}, "k": {0: batch, 2: length}, "keep": {0: batch, 2: length, 3: length}}
    example = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.rand(2, 1, 5, 5) > 0.3)
    path = folder / "several.onnx"
    attnhub.onnx.export(Several().eval(), example, path, dynamic_shapes=sizes, report=False)
    q, k, keep = torch.randn(3, 4, 9, 8), torch.randn(3, 2, 9, 8), torch.rand(3, 1, 9, 9) > 0.3
    attend = torch.nn.functional.scaled_dot_product_attention
    wide = k.repeat_interleave(2, 1)
    want = (attend(q, wide, wide, is_causal=True), attend(q, wide, wide), attend(q, wide, wide, attn_mask=keep), attend(q, -wide, wide))
    return path, {"q": q.numpy(), "k": k.numpy(), "keep": keep.numpy()}, want


def test_several_forms(tmp_path: pathlib.Path) -> None:
    """The most frequent form keeps the domain attnhub, others have one each; every way of running finds the right body."""
    path, inputs, want = several(tmp_path)
    model = onnx.load(str(path))
    nodes = [node for node in model.graph.node if node.op_type == "FlashAttention"]
    assert [nodes[1].domain, nodes[3].domain] == ["attnhub"] * 2 and {nodes[0].domain, nodes[2].domain} == {"attnhub.2", "attnhub.3"}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18, "attnhub": 1, "attnhub.2": 1, "attnhub.3": 1}
    assert attnhub.onnx.check(path) == ()
    before = attnhub.onnx.native_calls()
    native = ort.InferenceSession(str(path), attnhub.onnx.register()).run(None, inputs)
    assert attnhub.onnx.native_calls() == before + 4
    for found in (ReferenceEvaluator(model).run(None, inputs), ort.InferenceSession(str(path)).run(None, inputs), native):
        for got, exact in zip(found, want):
            torch.testing.assert_close(torch.from_numpy(got), exact, atol=1e-6, rtol=0)
    # Bodies are made anew where a file is changed: the lowered file has none, one that is converted again the same.
    report = attnhub.onnx.lower(path, tmp_path / "lowered.onnx")
    lowered = onnx.load(str(tmp_path / "lowered.onnx"))
    assert len(report.converted) == 4 and not lowered.functions and {entry.domain for entry in lowered.opset_import} == {""}
    report = attnhub.onnx.convert(tmp_path / "lowered.onnx", tmp_path / "again.onnx")
    assert len(report.converted) == 4 and report.checked is not None and report.checked.native_difference is not None


#: Runs in an environment that holds onnxruntime and numpy only. Arguments: the library, a folder of models and inputs.
PROGRAM = """
    import ctypes, json, pathlib, sys
    import numpy, onnxruntime

    library, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    calls = ctypes.CDLL(library).attnhub_onnx_calls
    calls.restype = ctypes.c_uint64
    found = {"version": onnxruntime.__version__, "native": {}, "body": {}}
    for model in sorted(folder.glob("*.onnx")):
        inputs = dict(numpy.load(model.with_suffix(".npz")))
        for way in ("native", "body"):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            if way == "native":
                options.register_custom_ops_library(library)
                options.register_custom_ops_library(library)  # twice is harmless
            session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            before = calls()
            outputs = session.run(None, inputs)
            found[way][model.stem] = calls() - before
            numpy.savez(folder / f"{model.stem}.{way}.out.npz", *outputs)
    print(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version or "newest")
def test_in_onnx_runtime(version: str, tmp_path: pathlib.Path) -> None:
    """The same files natively and by their bodies, within 1e-6 of torch; the kernel's own count says which of the two ran."""
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    package = f"onnxruntime=={version}" if version else "onnxruntime"
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", package], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip install {package}: {done.stderr.splitlines()[-1:]}")
    wants: dict[str, tuple[Tensor, ...]] = {}
    for number, form in enumerate(FORMS):
        inputs = feeds(form)
        onnx.save(one_node(form, FLOAT), tmp_path / f"form_{number}.onnx")
        np.savez(tmp_path / f"form_{number}.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
        wants[f"form_{number}"] = (by_torch(form, inputs),)
    path, arrays, want = several(tmp_path)
    np.savez(path.with_suffix(".npz"), **arrays)
    wants["several"] = want
    command = [python, "-I", "-c", textwrap.dedent(PROGRAM), attnhub.onnx.library_path(), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == version or not version
    assert found["native"] == {name: 4 if name == "several" else 1 for name in wants}
    assert found["body"] == dict.fromkeys(wants, 0)
    for name, exact in wants.items():
        for way in ("native", "body"):
            with np.load(tmp_path / f"{name}.{way}.out.npz") as outputs:
                for number, (got, one) in enumerate(zip(outputs.values(), exact)):
                    difference = float((torch.from_numpy(got).double() - one.double()).abs().max())
                    assert difference <= 1e-6, f"{name}, output {number}, {way}: {difference}"
