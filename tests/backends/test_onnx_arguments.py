"""attnhub.onnx with arguments that do not fit: each is named before anything is traced, converted or written."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnhub

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx

from attnhub.backends.onnx.model import one_node
from attnhub.backends.onnx.node import Form

X = torch.zeros(1, 2, 3, 4)


def attend(x: torch.Tensor) -> Any:
    return attnhub.attention(x, x, x)


Call = Callable[[pathlib.Path], Any]
#: id -> (call with a folder that holds node.onnx, error, words)
BAD: dict[str, tuple[Call, type[Exception], tuple[str, ...]]] = {
    "no inputs": (lambda f: attnhub.onnx.export(attend, None, f / "x.onnx"), TypeError, ("inputs is a NoneType", "tuple")),  # type: ignore[arg-type]
    "no model": (lambda f: attnhub.onnx.export(None, X, f / "x.onnx"), TypeError, ("model is a NoneType", "nn.Module")),  # type: ignore[arg-type]
    "no path": (lambda f: attnhub.onnx.export(attend, X, None), TypeError, ("path is a NoneType",)),  # type: ignore[arg-type]
    "path is a folder": (lambda f: attnhub.onnx.export(attend, X, f), IsADirectoryError, ("path=", "is a folder")),
    "no folder": (lambda f: attnhub.onnx.export(attend, X, f / "nowhere" / "x.onnx"), FileNotFoundError, ("path=", "there is no folder", "nowhere")),
    "convert nowhere": (lambda f: attnhub.onnx.convert(f / "node.onnx", f / "nowhere" / "x.onnx"), FileNotFoundError, ("target=", "nowhere", "make it")),
    "lower nowhere": (lambda f: attnhub.onnx.lower(f / "node.onnx", f / "nowhere" / "x.onnx"), FileNotFoundError, ("target=", "nowhere", "make it")),
    "lower to None": (lambda f: attnhub.onnx.lower(f / "node.onnx", None), TypeError, ("target is a NoneType",)),  # type: ignore[arg-type]
    "inputs by other names": (lambda f: attnhub.onnx.lower(f / "node.onnx", f / "x.onnx", inputs={"foo": np.zeros(3)}), ValueError, ("inputs:", "node.onnx", "missing")),
    "inputs of other sizes": (
        lambda f: attnhub.onnx.lower(f / "node.onnx", f / "x.onnx", inputs={n: np.zeros((1, 2, 3, 4 + (n == "K")), np.float32) for n in "QKV"}), ValueError, ("inputs:", "node.onnx")),
    "options": (lambda f: attnhub.onnx.register("sdpa"), TypeError, ("session_options is a str", "backend=")),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name: str, tmp_path: pathlib.Path) -> None:
    call, error, words = BAD[name]
    onnx.save(one_node(Form(), onnx.TensorProto.FLOAT), tmp_path / "node.onnx")
    with pytest.raises(error) as caught:
        call(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["node.onnx"]


def test_a_file_without_attention_is_told(tmp_path: pathlib.Path) -> None:
    onnx.save(one_node(Form(), onnx.TensorProto.FLOAT), tmp_path / "node.onnx")
    assert "no attention in it to rewrite" in str(attnhub.onnx.convert(tmp_path / "node.onnx", tmp_path / "x.onnx"))
