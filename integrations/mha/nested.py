"""Nested tensors as packed tokens, in both layouts that torch has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnhub.layouts import Varlen


@dataclass(frozen=True)
class Lengths:
    """How packed tokens make up a nested tensor. cu: [N + 1] int32 offsets; longest: of all sequences; jagged: torch's newer layout."""

    cu: Tensor
    longest: int
    jagged: bool

    def with_keys(self, keys: Lengths) -> Varlen:
        return Varlen(self.cu, keys.cu, self.longest, keys.longest)

    def rows(self) -> Tensor:
        """bool [N, longest]: where a padded batch holds tokens."""
        return torch.arange(self.longest, device=self.cu.device) < self.cu.diff()[:, None]


def to_packed(nested: Any) -> tuple[Tensor, Lengths]:
    """(tokens [T, E], lengths) of a nested [N, *, E]. Reads the lengths, which a strided nested tensor holds on the host anyway."""
    if nested.layout == torch.jagged:
        tokens = torch.cat(list(nested.unbind())) if nested.lengths() is not None else nested.values()
        sizes = nested.lengths() if nested.lengths() is not None else nested.offsets().diff()
        cu = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
        return tokens, Lengths(cu, int(sizes.max()) if sizes.numel() else 0, True)
    parts = nested.unbind()
    sizes = [part.shape[0] for part in parts]
    cu = torch.tensor([0, *sizes]).cumsum(0).to(device=nested.device, dtype=torch.int32)
    return torch.cat(parts), Lengths(cu, max(sizes, default=0), False)


def to_padded(tokens: Tensor, rows: Tensor) -> Tensor:
    """Packed tokens [T, H, D] as [N, H, L, D], zeros behind each sequence; rows: `Lengths.rows`."""
    padded = tokens.new_zeros(*rows.shape, *tokens.shape[1:])
    return padded.index_put((rows,), tokens).transpose(1, 2)


def from_packed(tokens: Tensor, lengths: Lengths) -> Tensor:
    """The nested tensor of packed tokens [T, E], in the layout that the lengths came from."""
    if lengths.jagged:
        made: Tensor = torch.nested.nested_tensor_from_jagged(tokens, lengths.cu.to(torch.int64))
        return made
    sizes = lengths.cu.diff().tolist()
    return torch.nested.as_nested_tensor(list(torch.split(tokens, sizes)))
