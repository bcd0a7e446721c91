"""torch's own checks of the operators (schema, autograd registration, fake tensors, AOT dispatch), with opaque kernels.

Seen to fail: a fake forward with contiguous strides, a fake backward with another dtype, an append that writes into its input k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import ops, spec
from attnhub.mask import FULL

Make = Callable[..., tuple[Tensor, Tensor, Tensor]]


def arguments(name: str, qkv: Make, backend: str, *, grad: bool = True, need_lse: bool = False) -> tuple[Any, ...]:
    """Arguments of attnhub::forward for a named kind of call."""
    q, k, v = (t.detach() for t in qkv(heads=4, kv_heads=2, length=6, length_k=8, dim=8))
    mask, sinks, softcap, varlen, descale = FULL, None, 0.0, None, None
    if name == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif name == "expanded":
        k, v = (t[:, :1].expand(-1, 2, -1, -1) for t in (k, v))
    elif name == "causal":
        mask = attnhub.Causal() & attnhub.Window(4)
    elif name == "lengths":
        mask = attnhub.SeqLens(torch.tensor([3, 8])) & attnhub.LeftPad(torch.tensor([1, 0]))
    elif name == "bias":
        mask = attnhub.Bias(torch.randn(1, 4, 6, 8).requires_grad_(grad))
    elif name == "sinks":
        sinks = torch.randn(4).requires_grad_(grad)
    elif name == "softcap":
        softcap = 5.0
    elif name == "varlen":
        q, k, v = (t.transpose(1, 2).reshape(1, -1, t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
        varlen = attnhub.Varlen(torch.tensor([0, 5, 12]), torch.tensor([0, 7, 16]), 7, 9)
    elif name == "fp8":
        q, k, v = (t.to(torch.float8_e4m3fn) for t in (q, k, v))
        descale = attnhub.Descale(None, torch.rand(2, 2), torch.rand(()).expand(2, 2))
    words, sizes, data = spec.encode(mask, softcap, 0.0, None, varlen, None, descale)
    q, k, v = (t.requires_grad_(grad) for t in (q, k, v))
    return q, k, v, mask.bias, sinks, data, words, sizes, 0.3, need_lse, grad, backend


KINDS = ("plain", "bshd", "expanded", "causal", "lengths", "bias", "sinks", "softcap", "varlen")


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind: str, qkv: Make, blackbox: str) -> None:
    torch.library.opcheck(ops.forward_op, arguments(kind, qkv, blackbox, need_lse=kind in ("plain", "sinks", "bias")))


@pytest.mark.parametrize("kind", ("plain", "bias", "varlen"))
def test_forward_without_gradients(kind: str, qkv: Make, blackbox: str) -> None:
    torch.library.opcheck(ops.forward_op, arguments(kind, qkv, blackbox, grad=False))


@pytest.mark.parametrize("need_lse", (False, True))
def test_forward_in_fp8(qkv: Make, blackbox: str, need_lse: bool) -> None:
    """All but torch's check of the schema, which compares the inputs by arithmetic that fp8 has not."""
    args = arguments("fp8", qkv, blackbox, grad=False, need_lse=need_lse)
    torch.library.opcheck(ops.forward_op, args, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_forward_of_the_native_kernel(qkv: Make) -> None:
    if not attnhub.backends()["cpu"]["available"]:
        pytest.skip("the cpu backend's library is not built here")
    for kind in ("bshd", "bias", "varlen"):
        torch.library.opcheck(ops.forward_op, arguments(kind, qkv, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_backward(kind: str, qkv: Make, blackbox: str) -> None:
    q, k, v, bias, sinks, data, words, sizes, scale, _, _, backend = arguments(kind, qkv, blackbox, grad=False)
    out, lse = ops.forward_op(q, k, v, bias, sinks, data, words, sizes, scale, True, True, backend)
    needs = [True, True, kind != "plain", bias is not None, sinks is not None]
    grad_out = torch.randn(out.shape)
    grad_lse = torch.randn(lse.shape) if kind in ("sinks", "varlen") else None
    torch.library.opcheck(ops.backward_op, (grad_out, grad_lse, q, k, v, bias, sinks, out, lse, data, words, sizes, scale, needs, backend))


@pytest.mark.parametrize("paged", (False, True))
def test_append_kv(paged: bool) -> None:
    cache = attnhub.KVCache.empty(2, 3, 16, 8, page_size=4 if paged else 0)
    k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    cos, sin = torch.randn(16, 2), torch.randn(16, 2)
    for rotary in ((None, None), (cos, sin)):
        args = (cache.k_cache, cache.v_cache, k, v, cache.cache_seqlens, cache.block_table, *rotary, False)
        torch.library.opcheck(ops.append_kv, args)


@pytest.mark.parametrize("backend", ("cpu", "sdpa", "reference", "blackbox"))
@pytest.mark.parametrize("kind", (*KINDS, "fp8"))
def test_strides_are_those_of_the_fake_kernel(kind: str, backend: str, qkv: Make, blackbox: str) -> None:
    if kind == "fp8" and backend in ("cpu", "sdpa"):
        pytest.skip(f"{backend} has no fp8")
    if backend == "cpu" and not attnhub.backends()["cpu"]["available"]:
        pytest.skip("the cpu backend's library is not built here")
    for need_lse in (False, True):
        args = arguments(kind, qkv, backend, grad=False, need_lse=need_lse)
        real = ops.forward_op(*args)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = ops.forward_op(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args))
        for got, said in zip(real, fake):
            assert (got.shape, got.stride(), got.dtype) == (said.shape, said.stride(), said.dtype)
