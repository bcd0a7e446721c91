"""Sharded attention: how `attnhub.attention` runs on DTensors.

Attention is independent over the batch and over K/V heads. Inputs that are sharded there stay where they are, and each rank
computes its part without communication; any other sharding is gathered first, by DTensor. `import attnhub` does not import
torch.distributed.tensor: `register` runs by itself at the first call that meets a DTensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from attnhub.spec import WORDS, parse

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

_BATCH, _HEADS = 0, 1

#: word -> dimension of its tensors that is the batch, and that is the heads. Absent: it has none. -1 is the last.
_BATCH_DIM = {"prefix": 0, "segments": 0, "blocks": 0, "seqused_k": 0, "leftpad": 0, "bool_mask": 0, "block_sparse": 0, "alibi": 0, "block_table": 0,
              "q_descale": 0, "k_descale": 0, "v_descale": 0}  # fmt: skip
_HEADS_DIM = {"bool_mask": 1, "block_sparse": 1, "alibi": -1, "q_descale": 1, "k_descale": 1, "v_descale": 1}
#: Of these a dimension of size 1 is shared by all ranks.
_BROADCAST = {"bool_mask", "block_sparse", "q_descale", "k_descale", "v_descale"}


@functools.lru_cache(maxsize=1)
def register() -> None:
    """Teach DTensor the attention operators. Needed by hand only where a DTensor is first met inside compiled code or inference_mode.

    Sharded over the batch: any call but packed (varlen) ones. Sharded over heads: wherever every rank gets whole groups of
    query heads with their K/V head (or there is one K/V head, which every rank then holds). Calls with dropout are not
    sharded: the mask of dropout is one for the whole tensor.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for op, strategies in ((torch.ops.attnhub.forward.default, _forward_shardings), (torch.ops.attnhub.backward.default, _backward_shardings)):
        register_sharding(op)(strategies)
        # register_sharding caches by tensors alone; here the strings and flags decide the outputs too.
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)


def in_context_parallel(module: Any) -> bool:
    """Whether a `context_parallel` block is open. module: torch's, whose way of telling is private and changes; unknown is no."""
    from torch.distributed.tensor import DTensor

    usual = getattr(module, "existing_custom_ops", None)
    changed = usual is not None and getattr(DTensor._op_dispatcher, "_custom_op_handlers", usual) is not usual
    # With the other mode the sharded tensors are DTensors and plain ones are whole.
    return changed and getattr(getattr(module, "_dispatch_mode", None), "name", "") == "MONKEY_PATCH"


def prepare(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the forward operator, whose q is a DTensor, with every plain tensor of the mask as a replicated DTensor.

    Masks are made of positions and lengths that every rank knows, often by code that knows of no mesh.
    """
    from torch.distributed.tensor import DTensor, Replicate

    register()
    mesh = args[0].device_mesh

    def replicated(t: Optional[Tensor]) -> Optional[Tensor]:
        if t is None or isinstance(t, DTensor):
            return t
        return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)

    q, k, v, bias, sinks, data, *static = args
    return (q, k, v, replicated(bias), replicated(sinks), [replicated(t) for t in data], *static)


def _forward_shardings(
    q: Any, k: Any, v: Any, bias: Any, sinks: Any, data: Sequence[Any], spec: str, sizes: Sequence[int], softmax_scale: float,
    need_lse: bool, need_backward: bool, backend: str,
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    found = []
    for over in _ways(q, k, spec):
        q_, k_, bias_, sinks_, data_ = _placements(over, q, k, bias, sinks, data, spec)
        lse = q_ if need_lse or need_backward else _replicate()
        found.append(([q_, lse], [q_, k_, k_, bias_, sinks_, *data_, *(None,) * 6]))
    return found


def _backward_shardings(
    grad_out: Any, grad_lse: Any, q: Any, k: Any, v: Any, bias: Any, sinks: Any, out: Any, lse: Any, data: Sequence[Any], spec: str,
    sizes: Sequence[int], softmax_scale: float, needs: Sequence[bool], backend: str,
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    found = []
    for over in _ways(q, k, spec):
        q_, k_, bias_, sinks_, data_ = _placements(over, q, k, bias, sinks, data, spec)
        # What every rank holds whole gets from each the gradient of its own part: their sum is the gradient.
        grads = [_gradient(p, over) if need and p is not None else _replicate() for p, need in zip((q_, k_, k_, bias_, sinks_), needs)]
        found.append((grads, [q_, None if grad_lse is None else q_, q_, k_, k_, bias_, sinks_, q_, q_, *data_, *(None,) * 5]))
    return found


def _ways(q: Any, k: Any, spec: str) -> list[Optional[int]]:
    """The dimensions of q over which the call may be sharded; None is not at all."""
    words = [name for name, _ in parse(spec)]
    if "dropout" in words:
        return [None]
    ways: list[Optional[int]] = [None]
    if "varlen" not in words:
        ways.append(_BATCH)
    q_heads, kv_heads = q.shape[_HEADS], k.shape[_HEADS]
    if kv_heads in (1, q_heads) or all(kv_heads % ranks == 0 for ranks in q.mesh.shape):
        ways.append(_HEADS)
    return ways


def _placements(over: Optional[int], q: Any, k: Any, bias: Any, sinks: Any, data: Sequence[Any], spec: str) -> tuple[Any, Any, Any, Any, list[Any]]:
    """(q, k and v, bias, sinks, data): a placement for each tensor, None for an absent one."""
    from torch.distributed.tensor import Shard

    q_ = _replicate() if over is None else Shard(over)
    paged = any(name == "block_table" for name, _ in parse(spec))
    shared = (over == _BATCH and paged) or (over == _HEADS and k.shape[_HEADS] == 1 and q.shape[_HEADS] > 1)
    k_ = _replicate() if shared else q_
    bias_ = None if bias is None else _replicate() if over is None or bias.shape[over] == 1 else Shard(over)
    sinks_ = None if sinks is None else Shard(0) if over == _HEADS else _replicate()
    return q_, k_, bias_, sinks_, _data_placements(over, data, spec)


def _data_placements(over: Optional[int], data: Sequence[Any], spec: str) -> list[Any]:
    from torch.distributed.tensor import Shard

    names = [name for name, _ in parse(spec) for _ in range(WORDS[name][1])]
    dims = _BATCH_DIM if over == _BATCH else _HEADS_DIM if over == _HEADS else {}
    found: list[Any] = []
    for name, tensor in zip(names, data):
        dim = dims.get(name)
        if name == "alibi" and over == _BATCH and tensor.ndim == 1:
            dim = None
        if dim is not None:
            dim %= tensor.ndim
        found.append(_replicate() if dim is None or (tensor.shape[dim] == 1 and name in _BROADCAST) else Shard(dim))
    return found


def _gradient(placement: Placement, over: Optional[int]) -> Placement:
    from torch.distributed.tensor import Partial

    return Partial() if over is not None and placement.is_replicate() else placement


def _replicate() -> Placement:
    from torch.distributed.tensor import Replicate

    return Replicate()
