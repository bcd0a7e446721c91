"""The mask object that travels through a transformers model: structure instead of an Sq x Sk tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnhub.mask import Mask


class CompactMask:
    """What attnhub's mask function hands to a model in place of a dense ``[B, 1, Sq, Sk]`` tensor.

    mask: holds for the first ``keys`` keys; the keys behind them (the unused rest of a static cache) are invisible to every
    query, so the attention function cuts them off. batch, seqlen_q, seqlen_k: the size of the dense mask that this stands for.

    Models mostly pass their mask through untouched. One that does look inside (indexing, ``.shape``, ``torch.cat``) gets the
    dense bool tensor that transformers would have made for its sdpa attention: correct, and as slow as before.
    """

    def __init__(self, mask: Mask, batch: int, seqlen_q: int, seqlen_k: int, keys: int, device: Any) -> None:
        self.mask = mask
        self.batch = batch
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.keys = keys
        self.device = device

    def dense(self) -> Tensor:
        """bool [B, 1, Sq, Sk]; True means attend."""
        allowed, _ = self.mask.to_dense(batch=self.batch, q_heads=1, seqlen_q=self.seqlen_q, seqlen_k=self.keys, device=self.device)
        if self.keys != self.seqlen_k:
            allowed = torch.nn.functional.pad(allowed, (0, self.seqlen_k - self.keys))
        return allowed.expand(self.batch, 1, self.seqlen_q, self.seqlen_k)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, 1, self.seqlen_q, self.seqlen_k))

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """On another device still compact (accelerate moves the arguments of each layer); any other conversion is of the dense tensor."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None or device is None:
            return self.dense().to(*args, **kwargs)
        if device == torch.device(self.device):
            return self
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(device), self.mask)
        return CompactMask(moved, self.batch, self.seqlen_q, self.seqlen_k, self.keys, device)

    def contiguous(self) -> CompactMask:
        """Itself: generate() asks this of every mask that it makes for a static cache."""
        return self

    def __repr__(self) -> str:
        return f"CompactMask({self.mask!r}, batch={self.batch}, seqlen_q={self.seqlen_q}, seqlen_k={self.seqlen_k}, keys={self.keys})"

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that this class lacks. Private ones belong to copy, pickle and inspection protocols.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __len__(self) -> int:
        return self.batch

    def __invert__(self) -> Tensor:
        return ~self.dense()

    def __and__(self, other: Any) -> Any:
        return self.dense() & other

    def __or__(self, other: Any) -> Any:
        return self.dense() | other

    def __rand__(self, other: Any) -> Any:
        return other & self.dense()

    def __ror__(self, other: Any) -> Any:
        return other | self.dense()
