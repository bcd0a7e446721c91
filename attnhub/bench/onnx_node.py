"""A model of one node, or a few, in ONNX's format, without the onnx package: a machine that runs ONNX Runtime need not have it. Torch-free.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

FLOAT, INT32 = 1, 6
#: (name, element type, number of dimensions, all of them free)
Value = tuple[str, int, int]
#: (operator, domain, names of inputs, names of outputs, attributes)
Node = tuple[str, str, Sequence[str], Sequence[str], Mapping[str, Union[int, Sequence[int]]]]
#: (name, sizes, bytes of its float32 elements)
Constant = tuple[str, Sequence[int], bytes]


def model(op_type: str, domain: str, inputs: Sequence[Value], outputs: Sequence[Value], attributes: Mapping[str, int]) -> bytes:
    """A serialized ModelProto whose graph is this node."""
    return graph([(op_type, domain, [name for name, _, _ in inputs], [name for name, _, _ in outputs], attributes)], inputs, outputs)


def graph(nodes: Sequence[Node], inputs: Sequence[Value], outputs: Sequence[Value], constants: Sequence[Constant] = ()) -> bytes:
    """A serialized ModelProto of operator set 18, and of version 1 of each other domain that its nodes name."""
    made = b"".join(_field(1, _node(number, *node)) for number, node in enumerate(nodes)) + _field(2, "graph")
    made += b"".join(_field(5, _tensor(*constant)) for constant in constants)
    made += b"".join([*(_field(11, _value(v)) for v in inputs), *(_field(12, _value(v)) for v in outputs)])
    domains = sorted({domain for _, domain, _, _, _ in nodes} - {""})
    opsets = _field(8, _field(1, "") + _field(2, 18)) + b"".join(_field(8, _field(1, domain) + _field(2, 1)) for domain in domains)
    return _field(1, 10) + _field(7, made) + opsets


def _node(
    number: int, op_type: str, domain: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, Union[int, Sequence[int]]]
) -> bytes:
    return b"".join([
        *(_field(1, name) for name in inputs), *(_field(2, name) for name in outputs), _field(3, f"node_{number}"), _field(4, op_type),
        *(_field(5, _attribute(name, value)) for name, value in attributes.items()), _field(7, domain),
    ])  # fmt: skip


def _tensor(name: str, sizes: Sequence[int], data: bytes) -> bytes:
    return b"".join(_field(1, size) for size in sizes) + _field(2, FLOAT) + _field(8, name) + _field(9, data)


def _attribute(name: str, value: Union[int, Sequence[int]]) -> bytes:
    if isinstance(value, int):
        return _field(1, name) + _field(3, value) + _field(20, 2)  # type 2: INT
    return _field(1, name) + b"".join(_field(8, item) for item in value) + _field(20, 7)  # type 7: INTS


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
