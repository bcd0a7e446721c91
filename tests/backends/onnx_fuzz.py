"""Broken models and inputs for the native library, as a program: a crash of it must not be a crash of the tests.

python onnx_fuzz.py LIBRARY FIRST COUNT: runs the mutants of these numbers and prints a JSON document as its last line. Before each it writes its
number to stderr, so that the last one is the one that crashed. Needs onnx, onnxruntime and numpy; not torch.
"""

from __future__ import annotations

import collections
import ctypes
import json
import random
import sys
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from attnhub.backends.onnx.model import one_node
from attnhub.backends.onnx.node import DEFAULTS, DOMAIN, INPUTS, OUTPUTS, Form

TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}
INTEGERS = [-(1 << 63), -(1 << 31), -2, -1, 0, 1, 2, 3, 7, 100, 1 << 31, (1 << 63) - 1]
FLOATS = [-1.0, 0.0, 1e-45, 0.5, 1.0, 30.0, 3.4e38, float("inf"), float("-inf"), float("nan")]


def form(random_: random.Random) -> Form:
    """A valid node."""
    past = random_.random() < 0.3
    return Form(
        is_causal=random_.random() < 0.5,
        alignment=random_.choice(["bottom_right", "top_left"]),
        scale=random_.choice([None, 0.3]),
        softcap=random_.choice([0.0, 0.0, 5.0]),
        window_left=random_.choice([-1, -1, 0, 3]),
        window_right=random_.choice([-1, -1, 0, 2]),
        chunk=random_.choice([0, 0, 4]),
        mask=random_.choice(["", "", "bool", "float"]),
        past=past,
        nonpad_kv_seqlen=not past and random_.random() < 0.3,
        sinks=random_.random() < 0.3,
        leftpad=random_.random() < 0.3,
        alibi=random_.random() < 0.3,
        present=random_.random() < 0.3,
        lse=random_.random() < 0.3,
    )


def arrays(random_: random.Random, node: Form, dtype: int) -> dict[str, Any]:
    """Inputs that fit the node."""
    generator = np.random.default_rng(random_.randrange(1 << 30))
    b, hk, g, sq, sk, d, dv = (random_.choice(sizes) for sizes in ([1, 2], [1, 2], [1, 3], [1, 5, 70], [1, 7, 130], [1, 8, 40], [4, 16]))
    past = 3 if node.past else 0
    made = {
        "Q": generator.standard_normal((b, hk * g, sq, d)),
        "K": generator.standard_normal((b, hk, sk, d)),
        "V": generator.standard_normal((b, hk, sk, dv)),
        "attn_mask": generator.standard_normal((random_.choice([1, b]), 1, random_.choice([1, sq]), sk + past)),
        "past_key": generator.standard_normal((b, hk, past, d)),
        "past_value": generator.standard_normal((b, hk, past, dv)),
        "nonpad_kv_seqlen": generator.integers(0, sk + 1, b),
        "sinks": generator.standard_normal(hk * g).astype(np.float32),
        "leftpad": generator.integers(0, sk + 1, b),
        "alibi_slopes": generator.random(hk * g).astype(np.float32),
    }
    for name in ("Q", "K", "V", "past_key", "past_value", "attn_mask"):
        made[name] = made[name].astype(TYPES[dtype])
    if node.mask == "bool":
        made["attn_mask"] = made["attn_mask"].astype(np.float32) > 0
    return {name: made[name] for name in node.inputs() if name}


# -- mutations: each changes the model or the arrays in place ------------------------------------------------------------------


def attribute(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    node = model.graph.node[0]
    name = random_.choice([*DEFAULTS, "version", "unknown"])
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    value = random_.choice([*INTEGERS, *FLOATS, "bottom_right", "", "middle", "x" * 5000, [1, 2], [0.5]])
    node.attribute.append(helper.make_attribute(name, value))


def drop_input(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    node = model.graph.node[0]
    if node.input:
        node.input[random_.randrange(len(node.input))] = ""


def swap_inputs(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    node = model.graph.node[0]
    if not node.input:
        return
    i, j = random_.randrange(len(node.input)), random_.randrange(len(node.input))
    node.input[i], node.input[j] = node.input[j], node.input[i]


def more_inputs(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    node = model.graph.node[0]
    while len(node.input) < random_.randrange(4, len(INPUTS) + 3):
        node.input.append(random_.choice(["", "Q", "K", "V", *node.input]))


def fewer_inputs(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    node = model.graph.node[0]
    del node.input[random_.randrange(len(node.input) + 1) :]


def outputs(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    node = model.graph.node[0]
    if node.output and random_.random() < 0.5:
        node.output[random_.randrange(len(node.output))] = ""
    while len(node.output) < random_.randrange(len(OUTPUTS) + 2):
        node.output.append(f"more_{len(node.output)}")


def shape(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    """Other sizes than the node can take: mismatched, empty, of another rank."""
    name = random_.choice(list(feed))
    array = feed[name]
    sizes = list(array.shape)
    kind = random_.randrange(4)
    if kind == 0 and sizes:
        sizes[random_.randrange(len(sizes))] = random_.choice([0, 1, 2, 3, 9, 600])
    elif kind == 1:
        sizes.append(1)
    elif kind == 2 and sizes:
        sizes.pop(random_.randrange(len(sizes)))
    else:
        random_.shuffle(sizes)
    feed[name] = np.resize(array, sizes) if array.size and np.prod(sizes, dtype=np.int64) else np.zeros(sizes, array.dtype)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")


def lengths(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    names = [name for name in ("nonpad_kv_seqlen", "leftpad") if name in feed]
    if names and feed[names[0]].size:
        feed[names[0]].flat[0] = random_.choice(INTEGERS)


def special_values(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    name = random_.choice([name for name in feed if feed[name].dtype.kind not in "bi"])
    with np.errstate(all="ignore"):
        feed[name].flat[: max(1, feed[name].size // 3)] = random_.choice(FLOATS)


def element_type(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    value = random_.choice(list(model.graph.input))
    kind = random_.choice([np.float32, np.float16, np.float64, np.int64, np.int32, np.bool_])
    value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    with np.errstate(all="ignore"):
        feed[value.name] = feed[value.name].astype(np.float32).astype(kind)


def names(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    node = model.graph.node[0]
    setattr(
        node,
        random_.choice(["domain", "op_type", "overload", "name"]),
        random_.choice(["", "attnhub", "FlashAttention", "x" * 3000, "other"]),
    )


def versions(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    entry = random_.choice(list(model.opset_import))
    entry.version = random_.choice([-1, 0, 1, 2, 7, 18, 10000])
    model.ir_version = random_.choice([3, 8, 10, 10, 10, 99])


def body(random_: random.Random, model: Any, feed: dict[str, Any]) -> None:
    """A function body with a step, an input or a name missing."""
    if not model.functions:
        return
    function = model.functions[0]
    kind = random_.randrange(3)
    if kind == 0:
        if not function.node:
            return
        del function.node[random_.randrange(len(function.node))]
    elif kind == 1:
        del function.input[-1:]
    else:
        function.name = "other"


MUTATIONS = [
    attribute, attribute, attribute, drop_input, swap_inputs, more_inputs, fewer_inputs, outputs, shape, shape, shape, lengths, special_values,
    element_type, names, versions, body,
]  # fmt: skip


def mutant(number: int) -> tuple[str, Any, dict[str, Any], bool]:
    """(what was changed, model, inputs, whether the library is to be registered). The same for the same number."""
    random_ = random.Random(number)
    node, dtype = form(random_), random_.choice(list(TYPES))
    model = one_node(node, dtype, body=random_.random() < 0.5)
    feed = arrays(random_, node, dtype)
    chosen = [random_.choice(MUTATIONS) for _ in range(random_.choice([1, 1, 1, 2, 3]))]
    for change in chosen:
        change(random_, model, feed)
    return "+".join(change.__name__ for change in chosen), model, feed, random_.random() < 0.9


def run(library: str, number: int) -> tuple[str, str]:
    """(mutation, outcome): "ran", or the error's first line."""
    label, model, feed, native = mutant(number)
    data = model.SerializeToString()
    if number % 10 == 0:  # bytes of the file that are not what they were
        random_ = random.Random(-number)
        broken = bytearray(data)
        for _ in range(random_.choice([1, 1, 5])):
            broken[random_.randrange(len(broken))] = random_.randrange(256)
        data, label = bytes(broken[: random_.randrange(len(broken))] if random_.random() < 0.3 else broken), "bytes"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    try:
        if native:
            options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        held = []
        for value in session.get_inputs():
            array = np.ascontiguousarray(feed[value.name])
            held.append(array)
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            binding.bind_input(value.name, "cpu", 0, kind, array.shape, array.ctypes.data)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
    except Exception as error:
        return label, (str(error).splitlines() or [type(error).__name__])[0][:300]
    return label, "ran"


def main() -> None:
    library, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    outcomes: collections.Counter[str] = collections.Counter()
    ours: dict[str, str] = {}
    unnamed = []
    for number in range(first, first + count):
        print(number, file=sys.stderr, flush=True)
        label, outcome = run(library, number)
        outcomes["ran" if outcome == "ran" else "error"] += 1
        if f"{DOMAIN}::FlashAttention" in outcome:
            ours[label] = outcome
        elif outcome != "ran" and len(outcome) < 20:
            unnamed.append((number, label, outcome))
    calls = ctypes.CDLL(library).attnhub_onnx_calls
    calls.restype = ctypes.c_uint64
    print("\n" + json.dumps({"outcomes": outcomes, "native": calls(), "ours": ours, "unnamed": unnamed}))


if __name__ == "__main__":
    main()
