"""The operators of `attnhub.ops` under vmap, torch.func's and autograd's own (``is_grads_batched``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import unwrap_batched


def vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _loop(torch.ops.attnhub.forward.default, info, in_dims, args)


def vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _loop(torch.ops.attnhub.backward.default, info, in_dims, args)


def vmap_append_kv(*args: Any) -> None:
    """One call a slice. (`register_vmap` has no place for operators that return nothing.)"""
    interpreter = retrieve_current_functorch_interpreter()
    unwrapped, in_dims = unwrap_batched(args, interpreter.level())
    if in_dims[0] is None or in_dims[1] is None:
        raise ValueError("append_kv under vmap: the new tokens or their positions are batched and the cache is not; give vmap a cache for each of them (in_dims)")
    with interpreter.lower():
        for i in range(unwrapped[0].shape[in_dims[0]]):
            torch.ops.attnhub.append_kv.default(*(a if d is None else a.select(d, i) for a, d in zip(unwrapped, in_dims)))


def _loop(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Batching rule. Plain problems fold the new dimension into the batch; those with data fall back to one call a slice."""

    def take(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return [take(a, d, i) for a, d in zip(arg, dim)]
        return arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg

    batched = [i for i, d in enumerate(in_dims) if isinstance(d, int)]
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    plain = all(not (isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)) for a in args)
    foldable = op is torch.ops.attnhub.forward.default and plain and args[3] is None and args[4] is None and set(batched) <= set(tensors)
    if foldable:
        n = info.batch_size
        moved = [args[i].movedim(in_dims[i], 0) if i in batched else args[i].expand(n, *args[i].shape) for i in (0, 1, 2)]
        out, lse = op(*(t.flatten(0, 1) for t in moved), *args[3:])
        split = [out.unflatten(0, (n, -1)), lse.unflatten(0, (n, -1)) if lse.numel() else lse.new_empty(n, 0)]
        return tuple(split), (0, 0)
    slices = [op(*(take(a, d, i) for a, d in zip(args, in_dims))) for i in range(info.batch_size)]
    return tuple(torch.stack(parts) for parts in zip(*slices)), (0,) * len(slices[0])


def batched_backward(*args: Any) -> tuple[Tensor, ...]:
    """The same for autograd's own vmap (``is_grads_batched``, gradcheck's batched gradients), one call a slice."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    flat = [*args[:9], *args[9]]
    one = next(t for t in flat if t is not None and batched(t))
    # A batch of another level stays one.
    level = next((n for n in range(1, 65) if not batched(torch._remove_batch_dim(one, n, 1, 0))), None)
    if level is None:
        raise RuntimeError("attnhub.attention: batched gradients (is_grads_batched) inside one another are not served; use torch.func.vmap")
    size = torch._remove_batch_dim(one, level, 1, 0).shape[0]
    physical = [torch._remove_batch_dim(t, level, size, 0) if t is not None and batched(t) else t for t in flat]
    wide = [new is not old for new, old in zip(physical, flat)]
    slices = []
    for i in range(size):
        each = [t.select(0, i) if is_wide else t for t, is_wide in zip(physical, wide)]
        slices.append(torch.ops.attnhub.backward.default(*each[:9], each[9:], *args[10:]))
    return tuple(torch._add_batch_dim(torch.stack(parts), 0, level) for parts in zip(*slices))
