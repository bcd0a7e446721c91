"""autocast, vmap, torch.func, forward mode and second derivatives, inference mode, fake and meta tensors, make_fx, copies.

Seen to fail: a batching rule that ignores in_dims of the mask's data, autograd registered with
`torch.library.register_autograd` (torch.func.grad refuses), `once_differentiable` on the eager path (the message of a second
derivative speaks of unused tensors), an autocast rule that casts q only.
"""

from __future__ import annotations

import copy
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import attnhub

Make = Callable[..., tuple[Tensor, Tensor, Tensor]]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attnhub.attention(q, k, v, attnhub.Causal())


# -- autocast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", (False, True))
def test_autocast(qkv: Make, same: Any, gradients: Any, grad: bool) -> None:
    """fp32 and mixed inputs are computed in the autocast dtype; gradients come back in the inputs' dtypes. Bias and sinks stay as they are."""
    q, k, v = qkv(grad=grad)
    bias, sinks = torch.randn(9, 9).requires_grad_(grad), torch.randn(4).requires_grad_(grad)
    low = tuple(t.detach().bfloat16().requires_grad_(grad) for t in (q, k, v))
    for inputs in ((q, k, v), (q, low[1], low[2]), (low[0], k, v), low):
        wanted = attnhub.attention(*low, attnhub.Bias(bias), sinks=sinks)
        with torch.autocast("cpu", torch.bfloat16):
            out = attnhub.attention(*inputs, attnhub.Bias(bias), sinks=sinks)
        assert out.dtype == torch.bfloat16
        same(out, wanted, 1e-2)
        if grad:
            got, right = gradients(out, (*inputs, bias, sinks)), gradients(wanted, (*low, bias, sinks))
            assert [g.dtype for g in got] == [t.dtype for t in (*inputs, bias, sinks)]
            same(tuple(g.float() for g in got), tuple(g.float() for g in right), 5e-2)


def test_mixed_dtypes_without_autocast_are_an_error(qkv: Make) -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="dtype"):
        attnhub.attention(q, k.bfloat16(), v.bfloat16())


def test_autocast_and_compile(qkv: Make) -> None:
    inputs = qkv()
    wanted = causal(*(t.bfloat16() for t in inputs))

    def inside(*args: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return causal(*args)

    for mixed in (inputs, (inputs[0], inputs[1].bfloat16(), inputs[2].bfloat16())):
        assert torch.equal(torch.compile(inside, backend="aot_eager", fullgraph=True)(*mixed), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(torch.compile(causal, backend="aot_eager", fullgraph=True)(*mixed), wanted)


# -- vmap and torch.func ---------------------------------------------------------------------------------------------------


def slices(function: Callable[..., Any], in_dims: tuple[Any, ...], args: tuple[Tensor, ...]) -> Any:
    """What vmap means."""
    count = next(t.shape[d] for t, d in zip(args, in_dims) if d is not None)
    outs = [function(*(t if d is None else t.select(d, i) for t, d in zip(args, in_dims))) for i in range(count)]
    return tuple(torch.stack(o) for o in zip(*outs)) if isinstance(outs[0], tuple) else torch.stack(outs)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, 2), (-1, 3, None), (None, None, 1)], ids=str)
def test_vmap(in_dims: tuple[Any, ...], same: Any) -> None:
    args = tuple(torch.randn(2, 4, 9, 8) if d is None else torch.randn(3, 2, 4, 9, 8).movedim(0, d) for d in in_dims)

    def with_lse(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnhub.attention(q, k, v, attnhub.Causal(), return_lse=True)

    for function in (causal, with_lse):
        same(torch.vmap(function, in_dims)(*args), slices(function, in_dims, args))


def masked(q: Tensor, k: Tensor, v: Tensor, used: Tensor, bias: Tensor, sinks: Tensor) -> Any:
    return attnhub.attention(q, k, v, attnhub.Causal() & attnhub.SeqLens(used) & attnhub.Bias(bias), sinks=sinks)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0, 0, 0), (0, 0, 0, None, None, None), (None, None, None, 1, None, 0), (0, None, 0, None, 2, 1)], ids=str)
def test_vmap_with_data(in_dims: tuple[Any, ...], same: Any) -> None:
    shapes = ((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8), (2,), (4, 9, 9), (4,))
    full = [torch.randn(3, *s) if len(s) > 1 or s[0] != 2 else torch.randint(1, 10, (3, 2)) for s in shapes]
    args = tuple(t[0] if d is None else t.movedim(0, d) for t, d in zip(full, in_dims))
    same(torch.vmap(masked, in_dims)(*args), slices(masked, in_dims, args))


def test_vmap_of_a_mask(same: Any) -> None:
    """A Mask is a pytree: vmap maps over the tensors in it."""
    q, k, v = (torch.randn(3, 2, 4, 9, 8) for _ in range(3))
    used = torch.randint(1, 10, (3, 2), dtype=torch.int32)
    leaves, structure = torch.utils._pytree.tree_flatten(attnhub.Causal() & attnhub.SeqLens(used[0]))
    assert len(leaves) == 1
    mask = torch.utils._pytree.tree_unflatten([used], structure)
    got = torch.vmap(attnhub.attention)(q, k, v, mask)
    same(got, torch.stack([attnhub.attention(*t[:3], attnhub.Causal() & attnhub.SeqLens(t[3])) for t in zip(q, k, v, used)]))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, 1, 1, None), (None, 0, 2, 0)], ids=str)
def test_vmap_over_caches(in_dims: tuple[Any, ...], same: Any) -> None:
    """Each slice appends to a cache of its own, in place."""

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, used: Tensor) -> Tensor:
        out = attnhub.attention(q, q[:, :2], q[:, 2:], attnhub.Causal(), kv_cache=attnhub.KVCache(k_cache, v_cache, used))
        assert isinstance(out, Tensor)
        return out

    full = [torch.randn(3, 2, 4, 1, 8), torch.randn(3, 2, 2, 16, 8), torch.randn(3, 2, 2, 16, 8), torch.randint(1, 15, (3, 2), dtype=torch.int32)]
    args, again = ([t[0].clone() if d is None else t.clone().movedim(0, d) for t, d in zip(full, in_dims)] for _ in range(2))
    same(torch.vmap(step, in_dims)(*args), slices(step, in_dims, again))
    same(args, again)
    assert not torch.equal(args[1].movedim(in_dims[1], 0), full[1])
    with pytest.raises(ValueError, match="the cache is not"):
        torch.vmap(step, (0, None, None, None))(full[0], *(t[0] for t in full[1:]))


def test_vmap_of_calls_that_need_gradients(same: Any, gradients: Any) -> None:
    inputs = tuple(torch.randn(3, 2, 4, 9, 8).requires_grad_() for _ in range(3))
    same(gradients(torch.vmap(causal)(*inputs), inputs), gradients(slices(causal, (0, 0, 0), inputs), inputs))


def test_vmap_within_vmap(same: Any) -> None:
    args = tuple(torch.randn(2, 3, 1, 4, 9, 8) for _ in range(3))
    same(torch.vmap(torch.vmap(causal))(*args), torch.stack([slices(causal, (0, 0, 0), t) for t in zip(*args)]))


@pytest.mark.parametrize("randomness", ("same", "different"))
def test_vmap_of_dropout(randomness: str) -> None:
    x = torch.randn(1, 2, 40, 8).expand(3, 1, 2, 40, 8)
    torch.manual_seed(0)
    outs = torch.vmap(lambda q: attnhub.attention(q, q, q, dropout_p=0.5), randomness=randomness)(x)
    assert torch.equal(outs[0], outs[1]) == (randomness == "same")


def scalar(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return attnhub.attention(q, k, v, attnhub.Causal() & attnhub.Bias(bias)).square().sum()


def test_func_grad(qkv: Make, same: Any) -> None:
    inputs = (*qkv(), torch.randn(9, 9))
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    wanted = torch.autograd.grad(scalar(*leaves), leaves)
    same(torch.func.grad(scalar, argnums=(0, 1, 2, 3))(*inputs), wanted)
    out, back = torch.func.vjp(scalar, *inputs)
    same(back(torch.ones_like(out)), wanted)


def test_vmap_of_grad_and_grad_of_vmap(same: Any) -> None:
    """Per-sample gradients."""
    q, k, v = (torch.randn(3, 1, 4, 9, 8) for _ in range(3))
    bias = torch.randn(9, 9)
    got = torch.vmap(torch.func.grad(scalar, argnums=(0, 3)), in_dims=(0, 0, 0, None))(q, k, v, bias)
    each = [torch.func.grad(scalar, argnums=(0, 3))(*t, bias) for t in zip(q, k, v)]
    same(got, tuple(torch.stack(t) for t in zip(*each)))
    total = torch.func.grad(lambda b: torch.vmap(scalar, in_dims=(0, 0, 0, None))(q, k, v, b).sum())(bias)
    same(total, got[1].sum(0), 1e-4)


def test_ordinary_gradients_flow_through_func_vjp(qkv: Make, same: Any) -> None:
    """The level below a torch.func transform differentiates too."""
    q, k, v = qkv(grad=True)
    out, _ = torch.func.vjp(lambda q: causal(q, k, v), q)
    same(torch.autograd.grad(out.square().sum(), (q, k)), torch.autograd.grad(causal(q, k, v).square().sum(), (q, k)))


@pytest.mark.parametrize("backend", ("sdpa", "cpu", "reference"))
@pytest.mark.parametrize("which", ("out", "lse"))
def test_gradients_that_are_not_plain_memory(qkv: Make, same: Any, which: str, backend: str) -> None:
    """A negative bit, a batch of gradients by autograd's own vmap and by torch.func's: the backward's kernels read pointers."""
    if not attnhub.backends()[backend]["available"]:
        pytest.skip(f"the {backend} backend is not available here")
    inputs = qkv(grad=True)
    out = attnhub.attention(*inputs, attnhub.Causal(), return_lse=True, backend=backend)[which == "lse"]

    def of(seed: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs[:2], seed, retain_graph=True, **options)

    seeds = torch.randn(3, *out.shape)
    each = [of(seed) for seed in seeds]
    same(of(torch._neg_view(seeds[0])), tuple(-g for g in each[0]))
    wanted = tuple(torch.stack(g) for g in zip(*each))
    same(of(seeds, is_grads_batched=True), wanted)
    same(torch.vmap(of)(seeds), wanted)


# -- what has no derivative says so -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ("q", "k", "v", "bias", "sinks"))
@pytest.mark.parametrize("grad", (False, True))
def test_forward_mode_is_an_error(qkv: Make, which: str, grad: bool) -> None:
    with forward_ad.dual_level():
        names = dict(zip("qkv", qkv(grad=grad)), bias=torch.randn(9, 9), sinks=torch.randn(4))
        names[which] = forward_ad.make_dual(names[which], torch.ones_like(names[which]))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            attnhub.attention(names["q"], names["k"], names["v"], attnhub.Bias(names["bias"]), sinks=names["sinks"])


def test_forward_mode_is_an_error_where_the_call_was_seen_before(qkv: Make) -> None:
    q, k, v = qkv()
    for _ in range(2):
        attnhub.attention(q, k, v)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        attnhub.attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)


def test_jvp_is_an_error(qkv: Make) -> None:
    q, k, v = qkv()
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        torch.func.jvp(lambda q: causal(q, k, v), (q,), (q,))


def _dual_gradient(f: Callable[[Tensor], Tensor], q: Tensor) -> Any:
    """The gradient whose own seed is a dual number."""
    with forward_ad.dual_level():
        leaf = q.clone().requires_grad_()
        out = f(leaf)
        return torch.autograd.grad(out, leaf, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize(
    "derive",
    [
        lambda f, x: torch.func.hessian(lambda t: f(t).square().sum())(x),
        lambda f, x: torch.func.jvp(torch.func.grad(lambda t: f(t).square().sum()), (x,), (x,)),
        lambda f, x: torch.func.jacfwd(torch.func.jacrev(lambda t: f(t).sum()))(x),
        _dual_gradient,
    ],
    ids=("hessian", "jvp of grad", "jacfwd of jacrev", "dual seed"),
)
@pytest.mark.parametrize("which", ("q", "bias"))
def test_forward_over_reverse_is_an_error(qkv: Make, derive: Any, which: str, backend: str) -> None:
    """Not a Hessian of zeros: the tangents are those of another level than the innermost one's."""
    q, k, v = qkv(1, 2, length=3, dim=4)

    def f(x: Tensor) -> Any:
        return attnhub.attention(x if which == "q" else q, k, v, attnhub.Bias(x) if which == "bias" else None, backend=backend)

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        derive(f, q if which == "q" else torch.randn(3, 3))


@pytest.mark.parametrize("softcap", (0.0, 5.0))
@pytest.mark.parametrize("through_the_operator", (False, True))
def test_second_derivatives_are_an_error(qkv: Make, through_the_operator: bool, softcap: float) -> None:
    inputs = qkv(grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=through_the_operator):
        for mask in (attnhub.Causal(), attnhub.Causal() & attnhub.Bias(torch.zeros(9, 9))):
            out = attnhub.attention(*inputs, mask, softcap=softcap, backend="reference")
            (grad,) = torch.autograd.grad(out.float().square().sum(), inputs[:1], create_graph=True)
            with pytest.raises(RuntimeError, match="once differentiable"):
                torch.autograd.grad(grad.sum(), inputs)


@pytest.mark.parametrize("kv_heads", (1, 2))
@pytest.mark.parametrize(
    "mask",
    (
        None, attnhub.Causal(), attnhub.Causal("top_left"), attnhub.Window(1, 1), attnhub.Bias(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)),
        attnhub.SeqLens(torch.tensor([3], dtype=torch.int32)),
    ),
    ids=("full", "causal", "top_left", "window", "bias", "lengths"),
)  # fmt: skip
def test_what_the_error_names_differentiates_twice(mask: Any, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 3, 4), (1, kv_heads, 4, 4), (1, kv_heads, 4, 4))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return attnhub.attention(q, k, v, mask, backend="sdpa")

    for _ in range(2):
        assert torch.autograd.gradgradcheck(twice, inputs)
    out = attnhub.attention(*inputs, mask, backend="reference")
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"SDPBackend\.MATH\) with backend='sdpa'"):
        torch.autograd.grad(grad.sum(), inputs)


def test_torchs_own_error_is_told_by_the_docs(qkv: Make) -> None:
    inputs = qkv(grad=True)
    (grad,) = torch.autograd.grad(causal_sdpa(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented") as told:
        torch.autograd.grad(grad.sum(), inputs)
    page = pathlib.Path(__file__).parents[2] / "docs" / "troubleshooting.md"
    assert not page.is_file() or str(told.value) in page.read_text(encoding="utf-8")


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attnhub.attention(q, k, v, attnhub.Causal(), backend="sdpa")


def test_second_derivatives_of_func_are_an_error(qkv: Make) -> None:
    q, k, v = qkv()
    first = torch.func.grad(lambda q: causal(q, k, v).square().sum())
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.func.grad(lambda q: first(q).square().sum())(q)


# -- modes ------------------------------------------------------------------------------------------------------------------


def test_inference_mode_and_no_grad(qkv: Make, same: Any) -> None:
    inputs = qkv(grad=True)
    wanted = causal(*inputs).detach()
    with torch.no_grad():
        out = causal(*inputs)
    assert not out.requires_grad
    same(out, wanted)
    with torch.inference_mode():
        out = causal(*inputs)
        assert out.is_inference()
        same(out, wanted)
        own = qkv()
        cache = attnhub.KVCache.empty(2, 4, 32, 16)
        same(attnhub.attention(*own, attnhub.Causal(), kv_cache=cache), wanted)
    same(causal(*own), wanted)  # inference tensors outside of the mode


def test_fake_tensors(qkv: Make) -> None:
    real = attnhub.attention(*qkv(grad=True), attnhub.Causal(), return_lse=True, backend="reference")
    with FakeTensorMode():
        inputs = qkv(grad=True)
        out, lse = attnhub.attention(*inputs, attnhub.Causal(), return_lse=True)
        assert (out.shape, out.stride()) == (real[0].shape, real[0].stride())
        assert (lse.shape, lse.dtype) == (real[1].shape, real[1].dtype)
        assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [t.shape for t in inputs]


def test_meta_device(qkv: Make) -> None:
    real = attnhub.attention(*qkv(), backend="reference")
    inputs = tuple(t.to("meta") for t in qkv())
    for out in (causal(*inputs), attnhub.attention(*inputs), attnhub.scaled_dot_product_attention(*inputs)):
        assert out.is_meta and (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert [g.shape for g in torch.autograd.grad(causal(*leaves).sum(), leaves)] == [t.shape for t in leaves]
    cache = attnhub.KVCache.empty(2, 4, 32, 16, device="meta")
    with torch.no_grad():
        assert attnhub.attention(*leaves, kv_cache=cache).is_meta


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
def test_make_fx(qkv: Make, same: Any, gradients: Any, mode: str) -> None:
    traced = make_fx(causal, tracing_mode=mode)(*qkv())
    assert [n.target for n in traced.graph.nodes if n.op == "call_function" and "attnhub" in str(n.target)] == [torch.ops.attnhub.forward.default]
    fresh = tuple(t + 1 for t in qkv())
    same(traced(*fresh), causal(*fresh))

    def derivative(*inputs: Tensor) -> Any:
        return torch.autograd.grad(causal(*inputs).square().sum(), inputs)

    traced = make_fx(derivative, tracing_mode=mode)(*qkv(grad=True))
    assert torch.ops.attnhub.backward.default in [n.target for n in traced.graph.nodes]
    leaves = tuple(t.requires_grad_() for t in fresh)
    same(traced(*leaves), derivative(*leaves), 1e-4)


# -- copies -----------------------------------------------------------------------------------------------------------------


def _objects() -> list[Any]:
    mask = attnhub.Causal() & attnhub.Window(3) & attnhub.SeqLens(torch.tensor([1, 2])) & attnhub.Segments(torch.arange(6).view(2, 3))
    cache = attnhub.KVCache.empty(2, 2, 8, 4, page_size=4)
    return [mask, attnhub.Varlen.from_lengths(torch.tensor([3, 4]), torch.tensor([5, 6])), cache]


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("duplicate", (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("copy", "deepcopy", "pickle"))
def test_copies(index: int, duplicate: Callable[[Any], Any]) -> None:
    original = _objects()[index]
    if isinstance(original, attnhub.Mask):
        original.features()  # what is computed once must not be in the way
    twin = duplicate(original)
    assert type(twin) is type(original) and twin is not original
    (leaves, structure), (twins, other) = (torch.utils._pytree.tree_flatten(o) for o in (original, twin))
    assert structure == other
    for a, b in zip(leaves, twins):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        if isinstance(a, Tensor) and duplicate is not copy.copy:
            assert a.data_ptr() != b.data_ptr()
    if isinstance(original, attnhub.Mask):
        assert twin.features() == original.features()
