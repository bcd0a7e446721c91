"""Broken files and inputs: an error that names node and reason, never a crash; and what `attnhub.onnx.check` sees in a file."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import attnhub

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from attnhub import cli  # noqa: E402
from attnhub.backends.onnx.model import one_node  # noqa: E402
from attnhub.backends.onnx.node import Form  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT
PROGRAM = pathlib.Path(__file__).with_name("onnx_fuzz.py")
CHECKOUT = PROGRAM.parents[2]


# -- mutants ---------------------------------------------------------------------------------------------------------------------


def fuzz(library: str, first: int, count: int, **environment: str) -> dict[str, Any]:
    """Run mutants in a process of their own. A crash is reported with the number of the mutant."""
    path = os.pathsep.join([str(pathlib.Path(attnhub.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(PROGRAM), library, str(first), str(count)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"mutant {[line for line in done.stderr.splitlines() if line.isdigit()][-1:]}: {done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["outcomes"]["ran"] + found["outcomes"]["error"] == count
    assert not found["unnamed"]
    # The corpus reaches the kernel and its checks.
    assert found["native"] > count // 10 and found["outcomes"]["error"] > count // 3
    return found


def test_mutants() -> None:
    found = fuzz(attnhub.onnx.library_path(), 0, 200)
    assert all("attnhub::FlashAttention 'FlashAttention': " in reason or "INVALID_GRAPH" in reason for reason in found["ours"].values())


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_mutants_under_sanitizers(tmp_path: pathlib.Path) -> None:
    """A thousand, through a library built with the address and undefined-behaviour sanitizers."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None or not (CHECKOUT / "CMakeLists.txt").is_file():
        pytest.skip("needs g++, cmake and a checkout")
    preload = [
        subprocess.run([compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(os.path.isabs(path) for path in preload):
        pytest.skip("g++ comes without its sanitizers")
    options = ["-DATTNHUB_SANITIZE=address,undefined", f"-DCMAKE_CXX_COMPILER={compiler}"]
    subprocess.run(["cmake", "-S", CHECKOUT, "-B", tmp_path, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", tmp_path, "-j2", "--target", "attnhub_onnx"], check=True, stdout=subprocess.DEVNULL)
    fuzz(
        str(tmp_path / "backends/onnx/libattnhub_onnx.so"), 0, 1000, LD_PRELOAD=":".join(preload),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:abort_on_error=1", UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [onnx.TensorProto.DOUBLE, onnx.TensorProto.INT32])
def test_a_dtype_that_is_not_served(dtype: int) -> None:
    """With the library, a file of another dtype is turned away by node and input; also float64, which the body alone would run."""
    model = one_node(Form(), dtype)
    model.graph.node[0].name = "layer.0"
    name = {onnx.TensorProto.DOUBLE: "double", onnx.TensorProto.INT32: "int32"}[dtype]
    with pytest.raises(Exception, match=rf"tensor\({name}\)' of input parameter \(Q\) of operator \(FlashAttention\) in node \(layer.0\) is invalid"):
        ort.InferenceSession(model.SerializeToString(), attnhub.onnx.register())


SOURCES = [
    """<ir_version: 10, opset_import: ["" : 18]>
    graph (float[B, 4, S, 8] q, float[B, 2, T, 8] k, float[B, 2, T, 8] v, float[B, 1, S, T] m) => (float[B, 4, S, 8] y) {
        one = Constant <value = int64[1] {2}> () k5 = Unsqueeze (k, one) v5 = Unsqueeze (v, one)
        to = Constant <value = int64[5] {1, 1, 2, 1, 1}> () ke = Expand (k5, to) ve = Expand (v5, to)
        shape = Constant <value = int64[4] {0, 4, -1, 8}> () kr = Reshape (ke, shape) vr = Reshape (ve, shape)
        kt = Transpose <perm = [0, 1, 3, 2]> (kr) f = Constant <value_float = 0.3> () qs = Mul (q, f)
        s = MatMul (qs, kt) x = Add (s, m) p = Softmax <axis = -1> (x) y = MatMul (p, vr) }""",
    """<ir_version: 10, opset_import: ["" : 23]>
    graph (float[B, S, 32] q, float[B, T, 16] k, float[B, T, 16] v, bool[S, T] m) => (float[B, S, 32] y) {
        y = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1> (q, k, v, m) }""",
    """<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
    graph (float[1, S, 64] q, float[1, S, 32] k, float[1, S, 32] v, int32[1] s, int32 t, float[9, 8] c) => (float[1, S, 64] y) {
        y = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1> (q, k, v, , , s, t, c, c) }""",
    """<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
    graph (float[B, S, 64] q, float[B, T, 64] k, float[B, T, 64] v, int32[B, T] m) => (float[B, S, 64] y) {
        y = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, , m) }""",
]


def damage(model: Any, random_: random.Random) -> None:
    """Take something from a model, or put something wrong in its place."""
    graph = model.graph
    node = random_.choice(graph.node)
    kind = random_.randrange(7)
    if kind == 0 and node.input:
        node.input[random_.randrange(len(node.input))] = random_.choice(["", "nowhere", *(value.name for value in graph.input)])
    elif kind == 1:
        del node.input[random_.randrange(len(node.input) + 1) :]
    elif kind == 2 and node.attribute:
        del node.attribute[random_.randrange(len(node.attribute))]
    elif kind == 3:
        node.op_type = random_.choice(["Softmax", "MatMul", "Where", "Transpose", "Reshape", "Attention", "Exp"])
    elif kind == 4 and node.attribute:
        name = node.attribute[0].name
        del node.attribute[0]
        node.attribute.append(onnx.helper.make_attribute(name, random_.choice([-3, 0, 7, 0.5, "text", [1, 0], [0, 1, 2, 9]])))
    elif kind == 5:
        random_.choice(graph.input).type.tensor_type.ClearField("shape")
    elif len(graph.node) > 1:
        graph.node.remove(node)


def test_converting_mutants(tmp_path: pathlib.Path) -> None:
    """Files of others that are damaged: a report, or an error that says what is wrong; never one of Python's own."""
    source = tmp_path / "source.onnx"
    outcomes = {"converted": 0, "left": 0, "error": 0}
    for number in range(240):
        random_ = random.Random(number)
        model = onnx.parser.parse_model(SOURCES[number % len(SOURCES)].replace("graph (", "attention ("))
        for _ in range(random_.choice([0, 1, 1, 2])):
            damage(model, random_)
        onnx.save(model, source)
        try:
            report = attnhub.onnx.convert(source, tmp_path / "target.onnx", verify=False)
        except ValueError as error:
            assert "node" in str(error) or "ONNX model" in str(error), f"mutant {number}: {error}"
            outcomes["error"] += 1
        else:
            outcomes["converted" if report.path else "left"] += 1
    assert min(outcomes.values()) > 20, outcomes


# -- check ---------------------------------------------------------------------------------------------------------------------


def _attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: model.graph.node[0].attribute.append(onnx.helper.make_attribute(name, value))


def _input(index: int, name: str) -> Callable[[Any], None]:
    return lambda model: model.graph.node[0].input.__setitem__(index, name)


def _value(name: str, kind: int, shape: list[int]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        value = next(value for value in model.graph.input if value.name == name)
        value.CopyFrom(onnx.helper.make_tensor_value_info(name, kind, shape))

    return change


def _both(*changes: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for one in changes:
            one(model)

    return change


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        (Form(), _attribute("future", 1), "attribute future is not known; there are is_causal"),
        (Form(), _attribute("version", 2), "attribute version is 2; this attnhub knows the versions 1 to 1: update attnhub"),
        (Form(), _attribute("scale", 1), "attribute scale is 1, of the wrong type"),
        (Form(), _attribute("chunk", -3), "attribute chunk=-3: it must be at least 1"),
        (Form(), _attribute("is_causal", 3), "attribute is_causal is 3; it must be 0 or 1"),
        (Form(), _attribute("alignment", "middle"), "alignment='middle'"),
        (Form(), lambda model: setattr(model.opset_import[1], "version", 2), "operator set attnhub 2; this attnhub knows 1"),
        (Form(), lambda model: setattr(model.graph.node[0], "op_type", "FlashDecoding"), "operator attnhub::FlashDecoding is not known; there is attnhub::FlashAttention"),
        (Form(), lambda model: setattr(model.graph.node[0], "overload", "causal"), "it has no function body: attnhub causal is not among attnhub plain"),
        (Form(), lambda model: model.graph.node[0].input.pop(), "without V"),
        (Form(), lambda model: model.graph.node[0].input.extend(["Q"] * 9), "12 inputs; there are 10"),
        (Form(), lambda model: model.graph.node[0].output.extend(list("abcd")), "5 outputs; there are 4"),
        (Form(past=True), _input(5, ""), "past_key and past_value must be given together"),
        (Form(), _value("Q", onnx.TensorProto.DOUBLE, [1, 2, 3, 4]), "Q is DOUBLE; allowed are FLOAT, FLOAT16, BFLOAT16"),
        (Form(), _value("Q", FLOAT, [1, 2, 3]), "Q has 3 dimensions, not 4"),
        (Form(), _value("K", onnx.TensorProto.FLOAT16, [1, 2, 3, 4]), "Q, K, V and the past are of 2 types: FLOAT, FLOAT16"),
        (Form(leftpad=True), _value("leftpad", onnx.TensorProto.INT32, [1]), "leftpad is INT32; allowed are INT64"),
        (Form(), _both(_value("Q", FLOAT, [1, 4, 3, 8]), _value("K", FLOAT, [1, 3, 3, 8])), "the 4 heads of Q must be a multiple of the 3 heads of K"),
        (Form(), _both(_value("Q", FLOAT, [1, 4, 3, 8]), _value("K", FLOAT, [1, 2, 3, 9])), "the head_dim of Q and K differ: 8 and 9"),
    ],
)  # fmt: skip
def test_check(form: Form, change: Callable[[Any], None], reason: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of mistake, among them those that a runtime passes over; the file without it is in order."""
    path = tmp_path / "model.onnx"
    model = one_node(form, FLOAT)
    model.graph.node[0].name = "layer.0"
    onnx.save(model, path)
    assert attnhub.onnx.check(path) == ()
    change(model)
    onnx.save(model, path)
    found = attnhub.onnx.check(path)
    assert any(reason in str(problem) for problem in found), found
    assert all(problem.node == "layer.0" or "operator set" in problem.reason for problem in found)
    assert cli.main(["onnx", "check", str(path)]) == 1 and reason in capsys.readouterr().out.replace("\n", " ")


def test_check_of_weights(tmp_path: pathlib.Path) -> None:
    """Weights beside the model that are cut off, or not there; a file that is no model."""
    path = tmp_path / "model.onnx"
    model = one_node(Form(), FLOAT)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1000, np.float32), "weight.0"))
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    assert attnhub.onnx.check(path) == () and cli.main(["onnx", "check", str(path)]) == 0
    os.truncate(tmp_path / "weights", 100)
    assert "weight weight.0: weights holds 100 bytes; bytes 0 to 4000 are needed" in str(attnhub.onnx.check(path)[0])
    (tmp_path / "weights").unlink()
    assert "weight weight.0: its file weights is not there" in str(attnhub.onnx.check(path)[0])
    path.write_bytes(b"not a model")
    assert "it is no ONNX model" in str(attnhub.onnx.check(path)[0])
    with pytest.raises(FileNotFoundError):
        attnhub.onnx.check(tmp_path / "none.onnx")
