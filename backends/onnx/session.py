"""ONNX Runtime sessions on torch tensors of any dtype, bfloat16 included, which numpy lacks."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.bool: onnx.TensorProto.BOOL,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.int16: onnx.TensorProto.INT16,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
}


def onnx_type(dtype: torch.dtype) -> int:
    """`onnx.TensorProto`'s number for a torch dtype. Raises ValueError for one that ONNX Runtime does not take."""
    if dtype not in _TYPES:
        raise ValueError(f"{dtype} has no counterpart in ONNX Runtime; cast the tensor to one of {', '.join(map(str, _TYPES))}")
    return int(_TYPES[dtype])


def run(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Run into tensors that the caller made: contiguous, on the CPU, of the right shapes. Nothing is copied."""
    binding = session.io_binding()
    _bind_inputs(binding, inputs)
    for name, tensor in outputs.items():
        binding.bind_output(name, "cpu", 0, onnx_type(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())
    session.run_with_iobinding(binding)


def run_all(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Run with inputs anywhere, of any strides; all outputs of the session in their order."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in inputs.items()}
    binding = session.io_binding()
    _bind_inputs(binding, held)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    return [_to_torch(value) for value in binding.get_outputs()]


def _bind_inputs(binding: onnxruntime.IOBinding, inputs: Mapping[str, Tensor]) -> None:
    for name, tensor in inputs.items():
        binding.bind_input(name, "cpu", 0, onnx_type(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())


def _to_torch(value: onnxruntime.OrtValue) -> Tensor:
    if value.element_type() == onnx.TensorProto.BFLOAT16:
        return from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(value.numpy())
