"""Whether a tensor's pointer leads to its values: that of zeros which torch does not store, or of a storage that was freed, leads to nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional

import torch
from torch import Tensor
from torch.nn import Parameter

#: Below it nothing is mapped where programs are position-independent. An address above it is memory; of one below, the storage is asked. In a
#: storage without memory addresses are offsets: that of a view need not be 0.
LOWEST = 1 << 32


def has_memory(t: Tensor) -> bool:
    """Whether a kernel may read what the pointer of a plain tensor leads to. Where no mode or transform is active: torch refuses the pointer there."""
    if t.data_ptr() >= LOWEST or t.numel() == 0:
        return True
    return not only_described(t) and t.untyped_storage().data_ptr() != 0


def only_described(t: Tensor) -> bool:
    """Of a tensor without memory: whether torch knows its values all the same, so that the operator layer makes them real."""
    return t._is_zerotensor() or torch._is_functional_tensor(t)


def freed(t: Tensor, what: str) -> ValueError:
    return ValueError(
        f"{what} of shape {tuple(t.shape)} has no memory: its storage holds {t.untyped_storage().nbytes()} bytes, as after untyped_storage().resize_(0), "
        "by which FSDP, for one, frees parameters between their uses; call while it holds values, or pass a copy made before"
    )


def need_memory(named: Iterable[tuple[str, Optional[Tensor]]]) -> None:
    """Raises ValueError for a tensor whose storage was freed; others whose values are nowhere are for the operator layer to make real."""
    for name, t in named:
        if t is not None and type(t) in (Tensor, Parameter) and (t.is_cpu or t.is_cuda or t.is_xpu) and not has_memory(t) and not only_described(t):
            raise freed(t, name)
