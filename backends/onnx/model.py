"""Models of one node: what the backend runs, and the smallest complete example of a file with a function body."""

from __future__ import annotations

import os
import pathlib
from typing import Union

import onnx
from onnx import TensorProto, helper

from attnhub.backends.onnx.body import function_body
from attnhub.backends.onnx.node import DOMAIN, OP, VERSION, Form

#: Newer defaults of the onnx package do not load in ONNX Runtime; 10 is the first that has overloads of functions.
IR_VERSION = 10
#: Weights beyond this many bytes go to a file beside the model: protobuf ends at 2 GiB.
EXTERNAL_BYTES = 1_500_000_000

_RANKS = {"nonpad_kv_seqlen": 1, "sinks": 1, "leftpad": 1, "lse": 3}
_SIZES = {
    "Q": ("batch", "q_heads", "seqlen_q", "head_dim"),
    "K": ("batch", "kv_heads", "seqlen_k", "head_dim"),
    "V": ("batch", "kv_heads", "seqlen_k", "v_head_dim"),
    "Y": ("batch", "q_heads", "seqlen_q", "v_head_dim"),
}


def output_file(name: str, path: Union[str, os.PathLike[str]]) -> pathlib.Path:
    """The path of a file that will be written; what is in the way is said before the work. name: of the argument."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} is a {type(path).__name__}: the path of the file to write is needed")
    target = pathlib.Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{name}={str(target)!r} is a folder: the path of the file to write is needed")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{name}={str(target)!r}: there is no folder {target.parent}; make it first")
    return target


def one_node(form: Form, dtype: int, *, opset: int = 18, body: bool = True, mask_dtype: int = 0, alibi_rank: int = 1) -> onnx.ModelProto:
    """A model whose inputs and outputs are those of one node of this form, named as in the specification, of any sizes.

    dtype: `onnx.TensorProto.FLOAT`, FLOAT16 or BFLOAT16, of Q, K, V, Y. mask_dtype: of a float mask, default ``dtype``.
    """
    types: dict[str, int] = {"nonpad_kv_seqlen": TensorProto.INT64, "leftpad": TensorProto.INT64}
    types.update(dict.fromkeys(("sinks", "alibi_slopes", "lse"), TensorProto.FLOAT))
    types["attn_mask"] = TensorProto.BOOL if form.mask == "bool" else mask_dtype or dtype
    ranks = {**_RANKS, "alibi_slopes": alibi_rank}

    def declare(name: str) -> onnx.ValueInfoProto:
        sizes = _SIZES.get(name) or [f"{name}_{axis}" for axis in range(ranks.get(name, 4))]
        return helper.make_tensor_value_info(name, types.get(name, dtype), sizes)

    node = helper.make_node(OP, form.inputs(), form.outputs(), name=OP, domain=DOMAIN, overload=form.overload(), **form.attributes())
    graph = helper.make_graph([node], "attention", [declare(n) for n in form.inputs() if n], [declare(n) for n in form.outputs() if n])
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function_body(form, opset)] if body else [],
        ir_version=IR_VERSION,
    )
