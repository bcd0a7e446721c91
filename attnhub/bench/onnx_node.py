"""A model of one node in ONNX's format, without the onnx package: a machine that runs ONNX Runtime need not have it. Torch-free.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

FLOAT, INT32 = 1, 6
#: (name, element type, number of dimensions, all of them free)
Value = tuple[str, int, int]


def model(op_type: str, domain: str, inputs: Sequence[Value], outputs: Sequence[Value], attributes: Mapping[str, int]) -> bytes:
    """A serialized ModelProto whose graph is this node."""
    node = b"".join([
        *(_field(1, name) for name, _, _ in inputs), *(_field(2, name) for name, _, _ in outputs),
        _field(3, "node"), _field(4, op_type), *(_field(5, _attribute(name, value)) for name, value in attributes.items()), _field(7, domain),
    ])  # fmt: skip
    graph = _field(1, node) + _field(2, "graph") + b"".join([*(_field(11, _value(v)) for v in inputs), *(_field(12, _value(v)) for v in outputs)])
    opsets = _field(8, _field(1, "") + _field(2, 18)) + _field(8, _field(1, domain) + _field(2, 1))
    return _field(1, 10) + _field(7, graph) + opsets


def _attribute(name: str, value: int) -> bytes:
    return _field(1, name) + _field(3, value) + _field(20, 2)  # type 2: INT


def _value(value: Value) -> bytes:
    name, element, rank = value
    shape = b"".join(_field(1, _field(2, f"{name}_{d}")) for d in range(rank))
    return _field(1, name) + _field(2, _field(1, _field(1, element) + _field(2, shape)))


def _field(number: int, value: Union[int, str, bytes]) -> bytes:
    """One field of a message: a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
