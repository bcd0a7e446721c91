"""The torch operators ``attnhub::forward``, ``attnhub::backward`` and ``attnhub::append_kv``.

The backend is chosen inside the operator when it runs (late binding), so one traced graph serves all lengths and obeys the
policy of the moment. The operators are defined with `torch.library.Library` (the ``custom_op`` object costs 24 us a call
against 5), autograd is registered on the operator (an autograd.Function around it would lose gradients after export) by
kernels of our own (those of `torch.library.register_autograd` refuse `torch.func.grad`), and the backward is once
differentiable. The flat arguments are those of `attnhub.spec`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from attnhub import batching, runtime
from attnhub import spec as flat
from attnhub.backend import Call, Needs, Repeat
from attnhub.layouts import empty_out, lse_dtype
from attnhub.memory import has_memory, need_memory
from attnhub.rotary import apply_rotary

_SCHEMA_TAIL = "Tensor[] data, str spec, SymInt[] sizes, float softmax_scale"

lib = torch.library.Library("attnhub", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, *((torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else ()))
lib.define(
    f"forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, {_SCHEMA_TAIL}, bool need_lse, bool need_backward, str backend)"
    " -> (Tensor out, Tensor lse)",
    tags=_TAGS,
)
lib.define(
    "backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor out, Tensor lse, "
    f"{_SCHEMA_TAIL}, bool[] needs, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    tags=_TAGS,
)
lib.define(
    "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, Tensor? block_table, "
    "Tensor? cos, Tensor? sin, bool interleaved) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
forward_op = torch.ops.attnhub.forward.default
backward_op = torch.ops.attnhub.backward.default
append_kv = torch.ops.attnhub.append_kv.default


# -- forward -----------------------------------------------------------------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor], data: Sequence[Tensor], spec: str,
    sizes: Sequence[int], softmax_scale: float, need_lse: bool, need_backward: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        # `attention` has checked the shapes; a rank's part of unevenly sharded heads has not been.
        raise ValueError(f"attnhub::forward: q has {q.shape[1]} heads and k {k.shape[1]}; the heads of q must be a multiple of those of k")
    if in_context_parallel():
        raise RuntimeError(
            "attnhub.attention inside torch's context_parallel: q, k and v are this rank's part of the sequence, and attnhub would attend to that part "
            "alone. Use F.scaled_dot_product_attention there (attnhub.unpatch the model, no replace_sdpa), or attend outside of the block"
        )
    need_memory((("q", q), ("k", k), ("v", v), ("bias", bias), ("sinks", sinks), *(("a tensor of the call", t) for t in data or ())))
    q, k, v = map(_rows, (q, k, v))
    call = flat.decode(q, k, v, bias, sinks, data or (), spec, sizes or (), softmax_scale, need_lse or need_backward)
    out, lse = runtime.forward(call, backend, need_backward)
    like = empty_out(q, v.shape[3])
    if out.stride() != like.stride():
        out = like.copy_(out)
    return out, q.new_empty(0, dtype=lse_dtype(q.dtype)) if lse is None else lse.contiguous()


def _rows(t: Tensor) -> Tensor:
    """With rows of head_dim in memory, as `attention` makes them: what torch makes of zeros without memory is one zero, expanded."""
    return t if t.stride(3) == 1 else t.contiguous()


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor], data: Sequence[Tensor], spec: str,
    sizes: Sequence[int], softmax_scale: float, need_lse: bool, need_backward: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = q.shape[:3] if need_lse or need_backward else (0,)
    return empty_out(q, v.shape[3]), q.new_empty(shape, dtype=lse_dtype(q.dtype))


# -- backward ----------------------------------------------------------------------------------------------------------


def _saved(tensors: Sequence[Optional[Tensor]]) -> list[Any]:
    """(q, k, v, bias, sinks, out, lse, *data) as kernels may read them: saved_tensors_hooks bring tensors back in any memory, of any dtype and shape."""
    q, k, v, _, _, out, lse = tensors[:7]
    assert q is not None and k is not None and v is not None and out is not None and lse is not None
    if not (q.dtype is k.dtype is v.dtype is out.dtype and lse.dtype is lse_dtype(q.dtype) and q.shape[:3] == out.shape[:3] == lse.shape and k.shape[:3] == v.shape[:3]):
        found = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v), ("out", out), ("lse", lse)))
        raise RuntimeError(f"attnhub.attention: saved_tensors_hooks brought other dtypes or shapes back than were saved ({found}): unpack has to undo what pack did")
    return [None if t is None else t if t.is_contiguous() and not t.is_neg() else _readable(t) for t in tensors]


def _readable(t: Tensor) -> Tensor:
    t = t.resolve_neg()
    # Kernels know the strides of all but the last dimension.
    return t if t.ndim == 4 and (t.stride(3) == 1 or t.shape[3] == 1) else t.contiguous()


def _backward(
    grad_out: Tensor, grad_lse: Optional[Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor],
    out: Tensor, lse: Tensor, data: Sequence[Tensor], spec: str, sizes: Sequence[int], softmax_scale: float, needs: Sequence[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_memory((("grad_out", grad_out), ("q", q), ("k", k), ("v", v), ("out", out), ("lse", lse)))
    q, k, v, bias, sinks, out, lse, *data = _saved((q, k, v, bias, sinks, out, lse, *(data or ())))
    q, k, v, out = map(_rows, (q, k, v, out))
    call = flat.decode(q, k, v, bias, sinks, data, spec, sizes or (), softmax_scale, True)
    found = runtime.backward(call, backend, grad_out, grad_lse, out, lse, Needs(*needs))
    grads = []
    for need, tensor, grad in zip(needs, (q, k, v, bias, sinks), found):
        if not need or tensor is None:
            grads.append(q.new_empty(0))
        else:
            assert grad is not None
            grads.append(grad.to(tensor.dtype).contiguous())
    return tuple(grads)  # type: ignore[return-value]


def _fake_backward(
    grad_out: Tensor, grad_lse: Optional[Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor],
    out: Tensor, lse: Tensor, data: Sequence[Tensor], spec: str, sizes: Sequence[int], softmax_scale: float, needs: Sequence[bool], backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        q.new_empty(0) if not need or t is None else t.new_empty(t.shape) for need, t in zip(needs, (q, k, v, bias, sinks))
    )  # fmt: skip


def has_tangent(t: Optional[Tensor]) -> bool:
    """Whether t is a dual number at the level of autograd that is at work."""
    return t is not None and t.is_floating_point() and forward_ad.unpack_dual(t, level=0).tangent is not None


def no_forward_mode() -> RuntimeError:
    return RuntimeError("attnhub.attention has no forward-mode derivative: use reverse mode, or torch's math SDPA for dual numbers")


def _below_autograd(op: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    """Run the op below autograd. Under a functorch transform the next level down may differentiate too, in either mode, so that stays enabled for it."""
    with torch._C._AutoDispatchBelowAutograd():
        if _in_functorch():
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _with_lists(args: tuple[Any, ...], data: int) -> tuple[Any, ...]:
    """The arguments with [] for data and sizes that are None: packages of AOTInductor pass empty lists so. data: where data stands."""
    if args[data] is None or args[data + 2] is None:
        return (*args[:data], args[data] or [], args[data + 1], args[data + 2] or [], *args[data + 3 :])
    return args


class _Function(_SingleLevelFunction):
    """What compiled autograd asks of a function beside `_SingleLevelFunction`."""

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:
        return (ctx._autograd_function_id,)


class _Attention(_Function):
    """The derivative of ``attnhub::forward``. One per autograd level: see `_apply`."""

    @staticmethod
    def forward(
        ctx: Any, keyset: Any, static: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor],
        *data: Tensor,
    ) -> Any:  # fmt: skip
        out, lse = _below_autograd(forward_op, keyset, (q, k, v, bias, sinks, list(data), *static))
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, *data)
        spec, sizes, softmax_scale, need_lse, need_backward, backend = static
        ctx.static = (spec, list(sizes), softmax_scale, backend or _names_in_force(), need_lse or need_backward)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Optional[Tensor], grad_lse: Optional[Tensor]) -> Any:
        q, k, v, bias, sinks, out, lse, *data = ctx.saved_tensors
        spec, sizes, softmax_scale, backend, has_lse = ctx.static
        if grad_out is None and grad_lse is None:
            return (None,) * (7 + len(data))
        if not has_lse:
            # Traced without need_backward (under no_grad, say) and trained nevertheless: make lse now.
            with torch.no_grad():
                out, lse = forward_op(q, k, v, bias, sinks, data, spec, sizes, softmax_scale, True, True, backend)
            grad_lse = None
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = list(ctx.needs_input_grad[2:7])
        grads = backward_op(grad_out, grad_lse, q, k, v, bias, sinks, out, lse, data, spec, sizes, softmax_scale, needs, backend)
        return (None, None, *(grad if need else None for need, grad in zip(needs, grads)), *(None for _ in data))


class _AttentionBackward(_Function):
    """``attnhub::backward`` has no derivative: asking for one is an error that says so."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, static: tuple[Any, ...], data: list[Tensor], *tensors: Optional[Tensor]) -> Any:
        return _below_autograd(backward_op, keyset, (*tensors, data, *static))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "attnhub.attention is once differentiable: its backward has no derivative. For second derivatives call it, eagerly and without a transform, under "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) with backend='sdpa' and without return_lse, softcap, sinks, dropout_p, varlen or "
            "kv_cache: torch's math attention differentiates twice"
        )


_CONTEXT_PARALLEL = "torch.distributed.tensor.experimental._context_parallel._attention"


def in_context_parallel() -> bool:
    """Whether torch's `context_parallel` is at work, in which tensors silently are parts of sequences. Only F.scaled_dot_product_attention knows of it."""
    if _CONTEXT_PARALLEL not in sys.modules:
        return False
    from attnhub import distributed

    return distributed.in_context_parallel(sys.modules[_CONTEXT_PARALLEL])


_flops_counted = False


def _count_flops() -> None:
    """Give torch's FLOP counter our formulas once it is imported: it imports Triton, so that is not for us to do."""
    global _flops_counted
    if not _flops_counted and hasattr(sys.modules.get("torch.utils.flop_counter"), "flop_registry"):
        from attnhub import flops

        flops.register()
        _flops_counted = True


def _names_in_force() -> str:
    """The backends that `attnhub.use` names now, for a backward that may run in another thread, where the context is not set.

    Nothing while a graph is traced: the graph must obey the context in which it runs.
    """
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return ""
    return ",".join(runtime._context.get() or ())


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _apply(function: Any, *args: Any) -> Any:
    """An autograd.Function on the current autograd level alone.

    The dispatcher has brought us to that level, be it the ordinary one or that of a `torch.func.grad`; a plain
    autograd.Function refuses to run there. What lies below is reached by redispatching, as for torch's own operators.
    """
    if _in_functorch():
        with enable_single_level_autograd_function():
            return function.apply(*args)
    return function.apply(*args)


def _autograd_forward(keyset: Any, *args: Any) -> Any:
    _count_flops()
    args = _with_lists(args, 5)
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is not None and isinstance(args[0], dtensor):
        from attnhub import distributed

        args = distributed.prepare(args)
    q, k, v, bias, sinks, data = args[:6]
    if forward_ad._current_level >= 0 and any(map(has_tangent, (q, k, v, bias, sinks, *data))):
        # Asked at every level of transforms: under forward-over-reverse (torch.func.hessian) the tangents are not those of the innermost.
        raise no_forward_mode()
    if torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, bias, sinks):
        return _apply(_Attention, keyset, args[6:], q, k, v, bias, sinks, *data)
    return _below_autograd(forward_op, keyset, args)


def _autograd_backward(keyset: Any, *args: Any) -> Any:
    args = _with_lists(args, 9)
    tensors, data, static = args[:9], args[9], args[10:]
    if forward_ad._current_level >= 0 and any(map(has_tangent, tensors)):
        raise no_forward_mode()
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        return _apply(_AttentionBackward, keyset, static, data, *tensors)
    return _below_autograd(backward_op, keyset, args)


# -- append_kv ---------------------------------------------------------------------------------------------------------


def _append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Optional[Tensor],
    cos: Optional[Tensor], sin: Optional[Tensor], interleaved: bool,
) -> None:  # fmt: skip
    if (cos is None) != (sin is None):
        raise ValueError("append_kv(rotary=): cos and sin are both needed; without rotation leave rotary out")
    batch, _, new, _ = k.shape
    if new == 0 or batch == 0:
        return
    need_memory((("append_kv: k_cache", k_cache), ("append_kv: v_cache", v_cache), ("append_kv: k", k), ("append_kv: v", v)))
    positions = cache_seqlens.long()[:, None] + torch.arange(new, device=k.device)
    length = k_cache.shape[2]
    capacity = length if block_table is None else block_table.shape[1] * length
    if k.device.type == "cpu":
        _check_positions(positions, capacity, length, k_cache.shape[0], block_table, cos)
    if cos is not None and sin is not None:
        k = apply_rotary(k, cos, sin, positions, interleaved)
    if block_table is None:
        rows, slots = torch.arange(batch, device=k.device)[:, None].expand_as(positions), positions
    else:
        rows, slots = block_table.long().gather(1, positions // length), positions % length
    k_cache.transpose(1, 2).index_put_((rows, slots), k.transpose(1, 2).to(k_cache.dtype))
    v_cache.transpose(1, 2).index_put_((rows, slots), v.transpose(1, 2).to(v_cache.dtype))


def _check_positions(
    positions: Tensor, capacity: int, length: int, rows: int, block_table: Optional[Tensor], cos: Optional[Tensor]
) -> None:
    """On CPU a bad index would be read from the end, as Python does; other devices assert it themselves."""
    if int(positions.min()) < 0 or int(positions.max()) >= capacity:
        raise ValueError(
            f"append_kv: the new tokens' positions go from {int(positions.min())} to {int(positions.max())}, outside the cache's capacity of {capacity}; "
            "allocate a longer cache (or more pages a sequence)"
        )
    if block_table is not None:
        pages = block_table.long().gather(1, positions // length)
        if int(pages.min()) < 0 or int(pages.max()) >= rows:
            raise ValueError(f"append_kv: block_table names pages {int(pages.min())} to {int(pages.max())}; the cache has pages 0 to {rows - 1}")
    if cos is not None and int(positions.max()) >= cos.shape[0]:
        raise ValueError(f"append_kv: position {int(positions.max())} is beyond the rotary table of {cos.shape[0]} positions")


def _fake_append_kv(*args: Any) -> None:
    return None


# -- autocast -----------------------------------------------------------------------------------------------------------


def _register_autocast(device_type: str) -> None:
    key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        rest = _with_lists(rest, 2)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            # fp8 stands for other numbers, by factors that a cast would lose.
            return forward_op(*(t if t.dtype in (dtype, torch.float64, torch.float8_e4m3fn) else t.to(dtype) for t in (q, k, v)), *rest)

    forward_op.py_impl(getattr(torch._C.DispatchKey, key))(cast_forward)
    lib.impl("forward", cast_forward, key)


for _name, _real, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward), ("append_kv", _append_kv, _fake_append_kv)):
    lib.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnhub::{_name}", _fake, lib=lib)
lib.impl("forward", _autograd_forward, "Autograd", with_keyset=True)
lib.impl("backward", _autograd_backward, "Autograd", with_keyset=True)
lib.impl("backward", batching.batched_backward, "Batched")
torch.library.register_vmap("attnhub::forward", batching.vmap_forward, lib=lib)
torch.library.register_vmap("attnhub::backward", batching.vmap_backward, lib=lib)
lib.impl("append_kv", batching.vmap_append_kv, "FuncTorchBatched")
_count_flops()
for _device_type in ("cpu", "cuda", "xpu", "mps"):
    if torch._C._is_autocast_available(_device_type):
        _register_autocast(_device_type)


def _has_memory(t: Tensor) -> bool:
    """Whether a kernel may read what a plain tensor's pointer leads to: no negative bit, no batch (is_grads_batched, vmap), no mode at work."""
    return not (
        t.is_neg() or torch._C._functorch.is_legacy_batchedtensor(t) or _in_functorch() or torch._C._len_torch_dispatch_stack() or type(t) is not Tensor
    ) and has_memory(t)  # fmt: skip


# -- eager, without the operator -----------------------------------------------------------------------------------------


class EagerAttention(_Function):
    """What an eager, differentiated call uses instead of the operator: the same plan, at a fifth of the operator's host time."""

    #: No transform is active here, so that `torch.autograd.Function.apply` would look for them in vain, for more than a microsecond.
    apply: ClassVar[Any]

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor], call: Call, chosen: runtime.Prepared, want_lse: bool,
        repeat: Optional[Repeat],
    ) -> Any:  # fmt: skip
        again = None if repeat is None else repeat(q, k, v)
        out, lse = chosen.forward(call) if again is None else again
        mask = call.mask
        # A mask that holds tensors must not be kept: they have to be saved as tensors are.
        if mask.held or call.dropout_p or call.varlen is not None or call.block_table is not None or call.deterministic:
            spec, sizes, data = flat.encode(mask, call.softcap, call.dropout_p, call.rng, call.varlen, call.block_table, None, call.deterministic)
            ctx.save_for_backward(q, k, v, bias, sinks, out, lse, *data)
            ctx.static = (spec, sizes, call.softmax_scale, call.softcap, None, chosen)
        else:
            ctx.save_for_backward(q, k, v, bias, sinks, out, lse)
            ctx.static = (None, None, call.softmax_scale, call.softcap, mask, chosen)
        ctx.set_materialize_grads(False)
        return (out, lse) if want_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: Optional[Tensor], grad_lse: Optional[Tensor] = None) -> Any:
        q, k, v, bias, sinks, out, lse, *data = ctx.saved_tensors
        spec, sizes, softmax_scale, softcap, mask, chosen = ctx.static
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = ctx.needs_input_grad[:5]
        if not torch.compiler.is_compiling() and not (has_memory(q) and has_memory(k) and has_memory(v)):
            need_memory((("q", q), ("k", k), ("v", v)))
        if (
            torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0
            or not (_has_memory(grad_out) and (grad_lse is None or _has_memory(grad_lse)))
        ):  # fmt: skip
            # Compiled autograd traces the operator. create_graph=True, or tangents: the operator's backward tells whoever differentiates again that it has no derivative.
            if mask is not None:
                spec, sizes, data = flat.encode(mask, softcap, 0.0, None, None, None, None, False)
            grads = backward_op(grad_out, grad_lse, q, k, v, bias, sinks, out, lse, data, spec, sizes, softmax_scale, list(needs), chosen.backend)
            return (*(grad if need else None for need, grad in zip(needs, grads)), None, None, None, None)
        q, k, v, bias, sinks, out, lse, *data = _saved((q, k, v, bias, sinks, out, lse, *data))
        if mask is None:
            call = flat.decode(q, k, v, bias, sinks, data, spec, sizes, softmax_scale, True)
        else:
            call = Call(q, k, v, mask, softmax_scale, softcap, sinks, need_lse=True)
        grads = runtime.backward(call, "", grad_out, grad_lse, out, lse, Needs(*needs), chosen)
        return (*grads, None, None, None, None)
