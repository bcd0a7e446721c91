"""The onnx backend: the node against the definition, natively and by its function body; export; registration; errors."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import attnhub
from attnhub import testing
from attnhub.backend import Plan
from attnhub.problem import Problem
from attnhub.registry import registry

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument  # noqa: E402

from attnhub.backends.onnx import OnnxBackend, backend, library  # noqa: E402
from attnhub.backends.onnx.body import OPSETS, function_body  # noqa: E402
from attnhub.backends.onnx.launcher import OnnxPlan  # noqa: E402
from attnhub.backends.onnx.model import one_node  # noqa: E402
from attnhub.backends.onnx.node import Form  # noqa: E402
from attnhub.backends.onnx.session import run_all  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT
KERNELS = pathlib.Path(library.__file__).parent / "kernels"


#: A runtime refuses operator sets newer than itself; 22 came with 1.21.
RUNTIME_OPSETS = OPSETS if tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 21) else OPSETS[:2]


class BodyBackend(OnnxBackend):
    """The function body in plain ONNX Runtime, as a backend of its own."""

    name = "onnx-body"

    def prepare(self, problem: Problem) -> Plan:
        return OnnxPlan(native=False)


@pytest.fixture
def body_backend() -> Iterator[None]:
    registry.register(BodyBackend())
    yield
    registry.unregister("onnx-body")


# -- the node against the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("check", testing.checks("onnx", kinds=("forward", "repeat", "reject")), ids=str)
def test_native(check: testing.Check) -> None:
    before = backend.native_calls()
    check.run()
    assert check.kind != "forward" or not check.case.seqlen_q * check.case.seqlen_k or backend.native_calls() > before


@pytest.mark.parametrize("check", testing.checks("onnx", level="tiny", kinds=("forward",)), ids=str)
def test_body(check: testing.Check, body_backend: None) -> None:
    before = backend.native_calls()
    dataclasses.replace(check, backend="onnx-body").run()
    assert backend.native_calls() == before


# -- one file, both ways ---------------------------------------------------------------------------------------------------


def session(model: Any, native: bool, threads: int = 2) -> Any:
    options = attnhub.onnx.register() if native else ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model if isinstance(model, (bytes, str)) else model.SerializeToString(), options)


def tensors(form: Form, sizes: tuple[int, ...] = (2, 4, 2, 5, 7, 8, 6), dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of a form. sizes: batch, q_heads, kv_heads, seqlen_q, seqlen_k, head_dim, v_head_dim. The past has 3 keys."""
    torch.manual_seed(1)
    b, h, hk, sq, sk, d, dv = sizes
    total = sk + (3 if form.past else 0)
    made = {
        "Q": torch.randn(b, h, sq, d),
        "K": torch.randn(b, hk, sk, d),
        "V": torch.randn(b, hk, sk, dv),
        "past_key": torch.randn(b, hk, 3, d),
        "past_value": torch.randn(b, hk, 3, dv),
        "attn_mask": torch.rand(b, 1, sq, total) > 0.3 if form.mask == "bool" else torch.randn(1, h, sq, total),
        "sinks": torch.randn(h),
        "alibi_slopes": torch.rand(h),
        "nonpad_kv_seqlen": torch.arange(b) * 3,
        "leftpad": torch.arange(b) * 2,
    }
    halves = ("Q", "K", "V", "past_key", "past_value", "attn_mask")
    return {n: made[n].to(dtype) if n in halves and made[n].is_floating_point() else made[n] for n in form.inputs() if n}


def definition(form: Form, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(Y, lse) by the reference in fp64, past and new keys joined."""
    joined = {
        n: torch.cat([inputs[past], inputs[n]], 2) if past in inputs else inputs[n] for n, past in (("K", "past_key"), ("V", "past_value"))
    }
    attn_mask = inputs.get("attn_mask")
    mask = attnhub.Mask(
        causal=form.is_causal,
        align=form.alignment,  # type: ignore[arg-type]
        window=(form.window_left, form.window_right),
        chunk=form.chunk,
        seqused_k=None if not form.nonpad_kv_seqlen else inputs["nonpad_kv_seqlen"].int(),
        leftpad=None if not form.leftpad else inputs["leftpad"].int(),
        bool_mask=attn_mask if form.mask == "bool" else None,
        bias=attn_mask.double() if form.mask == "float" and attn_mask is not None else None,
        alibi=inputs["alibi_slopes"] if form.alibi else None,
    )
    q, sinks = inputs["Q"].double(), inputs.get("sinks")
    scale = form.scale if form.scale is not None else q.shape[-1] ** -0.5
    sinks = None if sinks is None else sinks.double()
    k, v = joined["K"].double(), joined["V"].double()
    found = attnhub.attention(q, k, v, mask, softmax_scale=scale, softcap=form.softcap, sinks=sinks, return_lse=True, backend="reference")
    assert isinstance(found, tuple)
    return found


BOTH_WAYS = [
    Form(),
    Form(is_causal=True, alignment="top_left", softcap=5.0, scale=0.3),
    Form(is_causal=True, window_left=3, sinks=True, lse=True),
    Form(window_left=1, window_right=1, chunk=4, mask="float"),
    Form(mask="bool", nonpad_kv_seqlen=True, lse=True),
    Form(is_causal=True, leftpad=True, alibi=True),
    Form(is_causal=True, past=True, present=True, lse=True),
    Form(is_causal=True, past=True, mask="bool"),
    Form(present=True),
]


@pytest.mark.parametrize("form", BOTH_WAYS, ids=Form.overload)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_file_both_ways(form: Form, dtype: torch.dtype) -> None:
    inputs = tensors(form, dtype=dtype)
    want = dict(zip(("Y", "lse"), definition(form, inputs)))
    for name, past, fresh in (("present_key", "past_key", "K"), ("present_value", "past_value", "V")):
        want[name] = (torch.cat([inputs[past], inputs[fresh]], 2) if form.past else inputs[fresh]).double()
    for opset in RUNTIME_OPSETS if dtype == torch.float32 else (18,):
        model = one_node(form, FLOAT if dtype == torch.float32 else onnx.TensorProto.FLOAT16, opset=opset)
        onnx.checker.check_model(model)
        for native in (False, True):
            before = backend.native_calls()
            found = run_all(session(model, native), inputs)
            assert backend.native_calls() - before == int(native)
            for name, got in zip([n for n in form.outputs() if n], found):
                assert got.shape == want[name].shape
                tolerance = 2e-6 if dtype == torch.float32 or name == "lse" else 2e-3
                torch.testing.assert_close(got.double(), want[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "sizes", [(2, 4, 2, 3, 0, 8, 8), (2, 4, 2, 0, 3, 8, 8), (0, 4, 2, 3, 3, 8, 8)], ids=["no keys", "no queries", "no batch"]
)
@pytest.mark.parametrize("native", [False, True])
def test_empty(sizes: tuple[int, ...], native: bool) -> None:
    form = Form(is_causal=True, sinks=True, lse=True)
    inputs = tensors(form, sizes)
    out, lse = run_all(session(one_node(form, FLOAT), native), inputs)
    assert out.shape == (*sizes[:2], sizes[3], 8) and not out.any()
    torch.testing.assert_close(lse, inputs["sinks"][None, :, None].expand(lse.shape))


@pytest.mark.parametrize("native", [False, True])
def test_padding_never_reaches_a_result(native: bool) -> None:
    """NaN behind nonpad_kv_seqlen; and, natively, where the mask removes a pair by value."""
    form = Form(nonpad_kv_seqlen=True, mask="bool")
    inputs = tensors(form)
    inputs["nonpad_kv_seqlen"] = torch.tensor([4, 0])
    inputs["attn_mask"][:, :, :, 1] = False
    want = definition(form, inputs)[0]
    rows = [1, 4, 5, 6] if native else [4, 5, 6]
    for name in ("K", "V"):
        inputs[name][:, :, rows] = float("nan")
    got = run_all(session(one_node(form, FLOAT), native), inputs)[0]
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)
    assert not got[1].any()


def test_threads_of_the_session() -> None:
    """The session's own pool runs the kernel: same bits for any size of it, and from two callers at once."""
    form = Form(is_causal=True)
    inputs = {n: t.numpy() for n, t in tensors(form, (2, 8, 4, 130, 130, 32, 32)).items()}
    model = one_node(form, FLOAT)
    one, two = session(model, True, threads=1), session(model, True, threads=2)
    want = one.run(None, inputs)[0]
    found: list[Any] = []
    callers = [threading.Thread(target=lambda: found.extend(two.run(None, inputs)[0] for _ in range(5))) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 10 and all(np.array_equal(want, got) for got in found)


@pytest.mark.parametrize("native", [False, True])
def test_mask_of_another_type(native: bool) -> None:
    """A float32 mask beside float16 keys is added as float32: 16 bits would lose it."""
    form = Form(mask="float")
    inputs = tensors(form, dtype=torch.float16)
    inputs["attn_mask"] = torch.randn(1, 1, 5, 7) * 100 + 30000.0
    model = one_node(form, onnx.TensorProto.FLOAT16, mask_dtype=FLOAT)
    got = run_all(session(model, native), inputs)[0]
    torch.testing.assert_close(got.double(), definition(form, inputs)[0], atol=5e-3, rtol=0)


def test_forms_are_told_apart() -> None:
    """Every change of a form changes its overload, so that two bodies never share a name; attributes survive a file."""
    changes: dict[str, Any] = {f.name: True for f in dataclasses.fields(Form)}
    changes.update(alignment="top_left", scale=0.3, softcap=2.0, window_left=3, window_right=3, chunk=4, mask="bool")
    forms = [Form(), Form(mask="float"), Form(scale=0.30000001), *(Form(**{name: value}) for name, value in changes.items())]
    assert len({form.overload() for form in forms}) == len(set(forms)) == len(forms) - 1  # 0.3 and 0.30000001 are one float32
    for form in forms:
        node = one_node(form, FLOAT).graph.node[0]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if "alignment" in attributes:
            attributes["alignment"] = attributes["alignment"].decode()
        assert Form.of_node(attributes, frozenset(node.input), frozenset(node.output), form.mask == "bool") == form
        assert function_body(form, 18).overload == node.overload


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"is_causal": 2}, "is_causal is 2"),
        ({"is_causal": 1.0}, "is_causal must be an integer"),
        ({"alignment": "middle"}, "alignment is 'middle'"),
        ({"alignment": 1}, "alignment must be a string"),
        ({"scale": 1}, "scale must be a float"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"softcap": -1.0}, "softcap is -1"),
        ({"window_left": -2}, "window_left is -2"),
        ({"window_right": "3"}, "window_right must be an integer"),
        ({"chunk": -1}, "chunk is -1"),
        ({"version": 2}, "attribute version is 2; this library knows the versions 1 to 1: update attnhub"),
    ],
    ids=str,
)
def test_wrong_attributes(attributes: dict[str, Any], reason: str) -> None:
    model = one_node(Form(), FLOAT, body=False)
    model.graph.node[0].name = "named"
    model.graph.node[0].attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
    with pytest.raises(Exception, match=f"attnhub::FlashAttention 'named': .*{reason}"):
        session(model, True)


@pytest.mark.parametrize(
    ("form", "changes", "reason"),
    [
        (Form(), {"Q": (4, 5, 8)}, r"Q must have the 4 dimensions \[batch, q_heads, seqlen_q, head_dim\], got shape \[4, 5, 8\]"),
        (Form(), {"K": (2, 3, 7, 8), "V": (2, 3, 7, 6)}, "4 heads of Q must be a multiple of the 3 heads of K and V"),
        (Form(), {"K": (2, 0, 7, 8), "V": (2, 0, 7, 6)}, "must be a multiple of the 0 heads"),
        (Form(), {"K": (1, 2, 7, 8)}, "K must agree with Q in batch and head_dim"),
        (Form(), {"K": (2, 2, 7, 9)}, "K must agree with Q in batch and head_dim"),
        (Form(), {"V": (2, 2, 6, 6)}, "V must agree with K in batch, kv_heads and seqlen_k"),
        (Form(), {"Q": (2, 4, 5, 520), "K": (2, 2, 7, 520)}, "head_dim is 520"),
        (Form(mask="bool"), {"attn_mask": (1, 1, 5, 6)}, r"attn_mask of shape \[1, 1, 5, 6\] does not broadcast"),
        (Form(mask="float"), {"attn_mask": (1, 1, 1, 1, 1)}, "does not broadcast"),
        (Form(sinks=True), {"sinks": (3,)}, r"sinks must have shape \[4\], got \[3\]"),
        (Form(alibi=True), {"alibi_slopes": (2, 3)}, "alibi_slopes must have shape"),
        (Form(nonpad_kv_seqlen=True), {"nonpad_kv_seqlen": (3,)}, r"nonpad_kv_seqlen must have shape \[2\]"),
        (Form(past=True), {"past_key": (2, 4, 3, 8)}, "past_key must have shape"),
        (Form(past=True), {"past_value": (2, 2, 4, 6)}, "past_value must have shape"),
    ],
    ids=str,
)
def test_wrong_shapes(form: Form, changes: dict[str, tuple[int, ...]], reason: str) -> None:
    inputs = tensors(form)
    for name, shape in changes.items():
        inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    model = one_node(form, FLOAT, body=False)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match=reason):
        run_all(session(model, True), inputs)


@pytest.mark.parametrize("name", ("leftpad", "nonpad_kv_seqlen"))
@pytest.mark.parametrize("number", (-1, 8, -(2**31), 2**31, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)))
def test_numbers_that_are_no_lengths(name: str, number: int) -> None:
    """An error of the native kernel, also where the low 32 bits would do; in the body, which cannot fail, what docs/onnx.md says."""
    form = Form(is_causal=True, alignment="top_left", **{name: True})  # type: ignore[arg-type]
    inputs = tensors(form)
    inputs[name] = torch.tensor([3, number])
    with pytest.raises(InvalidArgument, match=rf"{name}\[1\] is {number}; it must lie between 0 and the number of keys, 7"):
        session(one_node(form, FLOAT, body=False), True).run(None, {n: t.numpy() for n, t in inputs.items()})
    found = run_all(session(one_node(form, FLOAT), False), inputs)
    inputs[name] = torch.tensor([3, min(max(number, 0), 7)])
    for got, want in zip(found, run_all(session(one_node(form, FLOAT), False), inputs)):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))


@pytest.mark.parametrize("leftpad", (-1, -(2**31), 8, 2**31 - 1))
@pytest.mark.parametrize("backend", ("onnx", "cpu", "sdpa"))
def test_leftpad_out_of_range_means_what_it_means_elsewhere(leftpad: int, backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 7, 16) for _ in range(3))
    mask = attnhub.Causal() & attnhub.LeftPad(torch.tensor([leftpad, 2], dtype=torch.int32))
    torch.testing.assert_close(attnhub.attention(q, k, v, mask, backend=backend), attnhub.attention(q, k, v, mask, backend="reference"))


@pytest.mark.parametrize("used", (-1, 8, 2**31 - 1))
def test_lengths_out_of_range_are_an_error_of_the_call(used: int) -> None:
    q, k, v = (torch.randn(2, 2, 7, 16) for _ in range(3))
    with pytest.raises(ValueError, match=rf"seqused_k\[0\] is {used} .*0 to 7 is needed"):
        attnhub.attention(q, k, v, attnhub.SeqLens(torch.tensor([used, 2], dtype=torch.int32)), backend="onnx")


def test_wrong_lengths_and_missing_partners() -> None:
    inputs = tensors(Form(nonpad_kv_seqlen=True))
    inputs["nonpad_kv_seqlen"] = torch.tensor([3, 8])
    with pytest.raises(Exception, match=r"nonpad_kv_seqlen\[1\] is 8; it must lie between 0 and the number of keys, 7"):
        run_all(session(one_node(Form(nonpad_kv_seqlen=True), FLOAT, body=False), True), inputs)
    model = one_node(Form(past=True), FLOAT, body=False)
    model.graph.node[0].input[5] = ""
    with pytest.raises(Exception, match="past_key and past_value must be given together"):
        run_all(session(model, True), tensors(Form(past=True)))
    with pytest.raises(ValueError, match="cannot be given together"):
        Form(past=True, nonpad_kv_seqlen=True)


def test_neither_body_nor_library() -> None:
    with pytest.raises(Exception, match=r"FlashAttention.* is not a registered function/op"):
        session(one_node(Form(), FLOAT, body=False), False)


# -- registration ------------------------------------------------------------------------------------------------------------


def test_registering_twice_is_harmless() -> None:
    options = attnhub.onnx.register()
    assert attnhub.onnx.register(options) is options
    options.register_custom_ops_library(attnhub.onnx.library_path())
    model = one_node(Form(), FLOAT, body=False).SerializeToString()
    feed = {n: t.numpy() for n, t in tensors(Form()).items()}
    before = attnhub.onnx.native_calls()
    for _ in range(2):  # the same options serve several sessions
        ort.InferenceSession(model, options).run(None, feed)
    assert attnhub.onnx.native_calls() == before + 2


@pytest.mark.parametrize("form", BOTH_WAYS, ids=Form.overload)
@pytest.mark.parametrize("backend_name", ["reference", "auto"])
def test_a_backend_called_back(form: Form, backend_name: str, calls: list[str]) -> None:
    """The node by attnhub's dispatcher: every feature, on memory of ONNX Runtime's that is not copied, the native kernel not run."""
    inputs = tensors(form)
    want = dict(zip(("Y", "lse"), definition(form, inputs)))
    options = attnhub.onnx.register(backend=backend_name)
    options.log_severity_level = 4
    session = ort.InferenceSession(one_node(form, FLOAT, body=False).SerializeToString(), options)
    calls.clear()
    before = attnhub.onnx.native_calls()
    found = dict(zip([n for n in form.outputs() if n], run_all(session, inputs)))
    assert attnhub.onnx.native_calls() == before and calls == [backend_name]
    for name in found.keys() & want.keys():
        torch.testing.assert_close(found[name].double(), want[name], atol=2e-6, rtol=2e-6)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends that `attnhub.attention` was asked for by the callback, in order; q must lie in ONNX Runtime's memory."""
    from attnhub.backends.onnx import callback

    found: list[str] = []
    right = callback.attention

    def counted(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["backend"])
        return right(q, *args, **kwargs)

    monkeypatch.setattr(callback, "attention", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_backend_called_back_in_16_bits(dtype: torch.dtype) -> None:
    form = Form(is_causal=True, alibi=True)
    inputs = tensors(form, dtype=dtype)
    kind = onnx.TensorProto.FLOAT16 if dtype == torch.float16 else onnx.TensorProto.BFLOAT16
    found = run_all(
        ort.InferenceSession(one_node(form, kind, body=False).SerializeToString(), attnhub.onnx.register(backend="cpu")), inputs
    )
    torch.testing.assert_close(found[0].double(), definition(form, inputs)[0], atol=2e-2, rtol=2e-2)


def test_a_callback_copies_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnhub.backends.onnx import callback

    seen: list[int] = []

    def only_look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.extend(t.data_ptr() for t in (q, k, v))
        return torch.zeros(q.shape[:3] + v.shape[3:])

    monkeypatch.setattr(callback, "attention", only_look)
    inputs = tensors(Form())
    run_all(ort.InferenceSession(one_node(Form(), FLOAT).SerializeToString(), attnhub.onnx.register(backend="reference")), inputs)
    assert seen == [inputs[name].data_ptr() for name in "QKV"]


def test_a_callback_that_fails() -> None:
    """What Python raised is the session's error, with the node's name; options keep the backend that they have."""
    model = one_node(Form(lse=True), FLOAT, body=False)
    model.graph.node[0].name = "layer.0"
    session = ort.InferenceSession(model.SerializeToString(), attnhub.onnx.register(backend="triton"))
    with pytest.raises(Exception, match=r"attnhub::FlashAttention 'layer.0': .*triton"):
        run_all(session, tensors(Form()))
    with pytest.raises(ValueError, match="backend='none': none unknown; there are auto, "):
        attnhub.onnx.register(backend="none")
    with pytest.raises(ValueError, match="device='cuda' without backend"):
        attnhub.onnx.register(device="cuda")
    options = attnhub.onnx.register(attnhub.onnx.register(backend="cpu"), backend="cpu")
    with pytest.raises(ValueError, match="registered with another backend"):
        attnhub.onnx.register(options)
    options = ort.SessionOptions()
    options.add_session_config_entry("attnhub.callback", "12345")
    with pytest.raises(Exception, match=r"attnhub.callback is '12345', which attnhub_onnx_add_callback did not give"):
        options.register_custom_ops_library(attnhub.onnx.library_path())


def test_serving_without_torch(tmp_path: pathlib.Path) -> None:
    """A process that cannot import torch, nor onnx, registers the library and runs a file by the native kernel."""
    form = Form(is_causal=True)
    onnx.save(one_node(form, FLOAT), tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", **{n: t.numpy() for n, t in tensors(form).items()})
    program = """
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "onnx", "onnxscript", "transformers"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Absent())
        import numpy, onnxruntime
        import attnhub.onnx

        folder = sys.argv[1]
        assert attnhub.onnx.library_path().endswith(".so")
        session = onnxruntime.InferenceSession(folder + "/model.onnx", attnhub.onnx.register())
        out = session.run(None, dict(numpy.load(folder + "/inputs.npz")))[0]
        assert attnhub.onnx.native_calls() == 1 and "torch" not in sys.modules
        numpy.save(folder + "/out.npy", out)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], check=True, env=dict(os.environ))
    want = definition(form, tensors(form))[0]
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")).double(), want, atol=2e-6, rtol=0)


def _headers_and_compiler() -> tuple[str, str]:
    """The folder of onnxruntime_c_api.h, and a C++ compiler; skips where one is missing."""
    folders = [os.environ.get("ATTNHUB_ORT_INCLUDE", ""), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    found = next((f for f in folders if f and os.path.exists(os.path.join(f, "onnxruntime_c_api.h"))), None)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None or compiler is None:
        pytest.skip("needs a C++ compiler and onnxruntime_c_api.h (libonnxruntime-dev, or ATTNHUB_ORT_INCLUDE naming its folder)")
    return found, compiler


def test_the_interface_is_the_official_one() -> None:
    """Our declaration of ONNX Runtime's C interface against its header, where that is installed."""
    found, compiler = _headers_and_compiler()
    subprocess.run([compiler, "-std=c++17", "-fsyntax-only", "-isystem", found, str(KERNELS / "abi_check.cpp")], check=True)


def test_from_cpp(tmp_path: pathlib.Path) -> None:
    """The example, built against the runtime of the Python package and run without Python."""
    found, compiler = _headers_and_compiler()
    source = pathlib.Path(__file__).resolve().parents[2] / "examples/onnx-cpp/main.cpp"
    runtime = next(pathlib.Path(ort.__file__).parent.glob("capi/libonnxruntime.so.1*"), None)
    if runtime is None:
        pytest.skip("this onnxruntime package holds no libonnxruntime.so")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(runtime)
    link = [f"-L{tmp_path}", "-lonnxruntime", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run([compiler, "-std=c++17", "-Wall", "-isystem", found, str(source), *link, "-o", str(tmp_path / "main")], check=True)
    form = Form(is_causal=True)
    onnx.save(one_node(form, FLOAT, body=False), tmp_path / "model.onnx")  # without the library it would not load
    command = [tmp_path / "main", tmp_path / "model.onnx", attnhub.onnx.library_path()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    got = torch.tensor([float(line) for line in done.stdout.split()]).view(1, 2, 5, 8)
    x = (0.01 * torch.arange(80, dtype=torch.float32)).view(1, 2, 5, 8)
    torch.testing.assert_close(got.double(), definition(form, {"Q": x, "K": x, "V": x})[0], atol=2e-6, rtol=0)
    assert subprocess.run([*command[:1], "none.onnx", command[2]], capture_output=True, check=False).returncode == 1
