"""torch.compile: one graph without breaks for all lengths, late choice of the backend, training.

`fullgraph=True` makes a graph break an error, and the counter says how many graphs that hold attention were made.
Seen to fail: `torch._dynamo.graph_break()` in `attention`, the window printed into the spec (a graph per window), the names of
`use` put into the operator's arguments while tracing (late binding), dq scaled by 1.5, an append that writes into a copy, a
backward that looks whether a batch of unknown size is empty, functions without a key for compiled autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attnhub
from attnhub import runtime

Make = Callable[..., tuple[Tensor, Tensor, Tensor]]
LENGTHS = (9, 17, 33, 40)


class Compiled:
    """A function compiled whole and for dynamic shapes; ``graphs`` is how many of its graphs call the operator."""

    def __init__(self, function: Callable[..., Any], backend: str = "aot_eager") -> None:
        self._counter = CompileCounterWithBackend(backend)
        self._function = torch.compile(function, backend=self._counter, fullgraph=True, dynamic=True)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    @property
    def graphs(self) -> int:
        return sum(any(n.target is torch.ops.attnhub.forward.default for n in g.graph.nodes) for g in self._counter.graphs)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attnhub.attention(q, k, v, attnhub.Causal())


@pytest.mark.parametrize("kv_heads", (4, 2, 1))
@pytest.mark.parametrize("grad", (False, True))
def test_one_graph_for_all_lengths(qkv: Make, same: Any, gradients: Any, grad: bool, kv_heads: int) -> None:
    compiled = Compiled(causal)
    for batch, length in zip((3, 5, 6, 7), LENGTHS):  # sizes equal at the first call would be one symbol
        inputs = qkv(batch=batch, length=length, kv_heads=kv_heads, grad=grad)
        out, wanted = compiled(*inputs), attnhub.attention(*inputs, attnhub.Causal(), backend="reference")
        same(out, wanted)
        assert out.stride() == wanted.stride()
        if grad:
            same(gradients(out, inputs), gradients(wanted, inputs))
    assert compiled.graphs == 1


def test_inductor(qkv: Make, same: Any, gradients: Any) -> None:
    compiled = Compiled(causal, "inductor")
    for length in LENGTHS:
        inputs = qkv(length=length, kv_heads=2, grad=True)
        out, wanted = compiled(*inputs), attnhub.attention(*inputs, attnhub.Causal(), backend="reference")
        same(out, wanted)
        same(gradients(out, inputs), gradients(wanted, inputs))
    assert compiled.graphs == 1


@pytest.mark.long
def test_inductor_with_work_around_it(qkv: Make, same: Any, gradients: Any) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnhub.attention(q * 2, k, v.transpose(2, 3).contiguous().transpose(2, 3), attnhub.Causal()).transpose(1, 2).reshape(q.shape[0], -1, 64).sin()

    compiled = Compiled(layer, "inductor")
    for length in LENGTHS:
        inputs = qkv(length=length, kv_heads=2, grad=True)
        out, wanted = compiled(*inputs), layer(*inputs)
        same(out, wanted)
        same(gradients(out, inputs), gradients(wanted, inputs))
    assert compiled.graphs == 1


def _inside(q: Tensor, k: Tensor, v: Tensor, used: Tensor, slopes: Tensor) -> Tensor:
    mask = attnhub.Causal() & attnhub.Window(5) & attnhub.SeqLens(used) & attnhub.ALiBi(slopes)
    return attnhub.attention(q, k, v, mask, softcap=20.0)


def test_mask_built_inside(qkv: Make, same: Any) -> None:
    compiled = Compiled(_inside)
    for length in LENGTHS:
        inputs = (*qkv(length=length), torch.tensor([length - 4, length]), torch.linspace(0.1, 1, 4))
        same(compiled(*inputs), _inside(*inputs))
    assert compiled.graphs == 1


MASKS: dict[str, Callable[[int], attnhub.Mask]] = {
    "lengths": lambda n: attnhub.Causal() & attnhub.SeqLens(torch.tensor([n - 3, n])),
    "left_padding": lambda n: attnhub.LeftPad(torch.tensor([3, 0])),
    "bool": lambda n: attnhub.BoolMask(torch.rand(2, 1, n, n, generator=torch.Generator().manual_seed(n)) > 0.3),
    "bias": lambda n: attnhub.Bias(torch.randn(4, n, n, generator=torch.Generator().manual_seed(n))),
    "prefix": lambda n: attnhub.Causal() & attnhub.Prefix(torch.tensor([4, 2])),
    "segments": lambda n: attnhub.Segments(torch.arange(n).expand(2, n) // 4),
    "block_sparse": lambda n: attnhub.BlockSparse(torch.rand(-(-n // 4), -(-n // 4), generator=torch.Generator().manual_seed(n)) > 0.3, (4, 4)),
    "window": lambda n: attnhub.Causal() & attnhub.Window(3),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_passed_in(name: str, qkv: Make, same: Any) -> None:
    compiled = Compiled(attnhub.attention)
    for length in LENGTHS:
        inputs, mask = qkv(length=length, kv_heads=2), MASKS[name](length)
        same(compiled(*inputs, mask), attnhub.attention(*inputs, mask, backend="reference"))
    assert compiled.graphs == 1


def test_mask_passed_in_and_combined_inside(qkv: Make, same: Any, gradients: Any) -> None:
    def combined(q: Tensor, k: Tensor, v: Tensor, mask: attnhub.Mask) -> Tensor:
        return attnhub.attention(q, k, v, mask & attnhub.Causal())

    compiled = Compiled(combined)
    for length in LENGTHS:
        inputs, bias = qkv(length=length, grad=True), torch.randn(length, length).requires_grad_()
        out, wanted = compiled(*inputs, attnhub.Bias(bias)), combined(*inputs, attnhub.Bias(bias))
        same(out, wanted)
        same(gradients(out, (*inputs, bias)), gradients(wanted, (*inputs, bias)))
    assert compiled.graphs == 1


@pytest.mark.parametrize("inside", (False, True))
def test_packed_sequences(same: Any, gradients: Any, inside: bool) -> None:
    def packed(q: Tensor, k: Tensor, v: Tensor, varlen: attnhub.Varlen) -> Tensor:
        return attnhub.attention(q, k, v, attnhub.Causal(), varlen=varlen)

    def built(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        return packed(q, k, v, attnhub.Varlen(cu, cu, longest, longest))

    compiled = Compiled(built if inside else packed)
    for lengths in ((9, 5), (17, 3, 4), (33, 2), (4, 40, 3)):
        varlen = attnhub.Varlen.from_lengths(torch.tensor(lengths))
        inputs = tuple(torch.randn(sum(lengths), 4, 16).requires_grad_() for _ in range(3))
        wanted = attnhub.attention(*inputs, attnhub.Causal(), varlen=varlen, backend="reference")
        out = compiled(*inputs, varlen.cu_seqlens_q, max(lengths)) if inside else compiled(*inputs, varlen)
        same(out, wanted)
        same(gradients(out, inputs), gradients(wanted, inputs))
    assert compiled.graphs == 1


@pytest.mark.parametrize("page_size", (0, 4))
def test_kv_cache(qkv: Make, same: Any, page_size: int) -> None:
    @torch.no_grad()
    def step(q: Tensor, k: Tensor, v: Tensor, cache: attnhub.KVCache) -> Any:
        return attnhub.attention(q, k, v, attnhub.Causal(), kv_cache=cache)

    compiled, cache = Compiled(step), attnhub.KVCache.empty(2, 2, 64, 16, page_size=page_size)
    keys, values = [], []
    for length in (9, 3, 5, 7):
        q, k, v = qkv(length=length, kv_heads=2)
        keys.append(k)
        values.append(v)
        same(compiled(q, k, v, cache), attnhub.attention(q, torch.cat(keys, 2), torch.cat(values, 2), attnhub.Causal(), backend="reference"))
        cache.advance(length)
    assert compiled.graphs == 1


def test_everything_with_gradients(qkv: Make, same: Any, gradients: Any) -> None:
    """Dropout (the same random numbers), sinks, bias, lse and its gradient."""

    def full(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor) -> Any:
        return attnhub.attention(q, k, v, attnhub.Causal() & attnhub.Bias(bias), sinks=sinks, dropout_p=0.3, return_lse=True)

    compiled = Compiled(full)
    for length in LENGTHS:
        inputs = (*qkv(length=length, grad=True), torch.randn(4).requires_grad_(), torch.randn(4, length, length).requires_grad_())
        torch.manual_seed(length)
        got = compiled(*inputs)
        torch.manual_seed(length)
        wanted = full(*inputs)
        same(got, wanted)
        same(gradients(got, inputs), gradients(wanted, inputs), 1e-4)
    assert compiled.graphs == 1


def chosen() -> str:
    decision = attnhub.last_decision()
    assert decision is not None and decision.chosen is not None
    return decision.chosen


@pytest.mark.parametrize("grad", (False, True))
def test_the_policy_of_the_moment_holds(qkv: Make, monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    """ATTNHUB_BACKEND and attnhub.use(...) changed after compilation decide the next call of the same graph."""
    compiled, inputs = Compiled(causal), qkv(grad=grad)
    compiled(*inputs)
    default = chosen()
    monkeypatch.setenv("ATTNHUB_BACKEND", "reference")
    compiled(*inputs)
    assert chosen() == "reference"
    monkeypatch.setenv("ATTNHUB_BACKEND", "sdpa")
    compiled(*inputs)
    assert chosen() == "sdpa"
    with attnhub.use("reference"):
        compiled(*inputs)
        assert chosen() == "reference"
    monkeypatch.delenv("ATTNHUB_BACKEND")
    compiled(*inputs)
    assert chosen() == default
    monkeypatch.setenv("ATTNHUB_BACKEND", "cuda")
    with pytest.raises(attnhub.NoBackendError):
        compiled(*inputs)
    assert compiled.graphs == 1


def test_a_graph_traced_in_a_context_does_not_keep_it(qkv: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, compiled, named, backward = qkv(grad=True), Compiled(causal), [], runtime.backward

    def watched(call: Any, backend: str, *args: Any, **kwargs: Any) -> Any:
        named.append(backend)
        return backward(call, backend, *args, **kwargs)

    monkeypatch.setattr(runtime, "backward", watched)
    for name in ("reference", "sdpa"):
        with attnhub.use(name):
            compiled(*inputs).sum().backward()
        assert chosen() == name
    assert named == ["", ""]
    assert compiled.graphs == 1


def test_the_backend_argument_is_part_of_the_graph(qkv: Make) -> None:
    compiled = Compiled(lambda q, k, v, backend: attnhub.attention(q, k, v, attnhub.Causal(), backend=backend))
    for name in ("sdpa", "reference"):
        with attnhub.use("sdpa"):
            compiled(*qkv(), name)
        assert chosen() == name


def test_symbolic_is_causal(qkv: Make, same: Any) -> None:
    compiled = Compiled(lambda q, k, v: attnhub.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1))
    for length in (9, 17, 1, 33, 1):
        inputs = qkv(length=length, length_k=40)
        same(compiled(*inputs), F.scaled_dot_product_attention(*inputs, is_causal=length > 1))
    assert compiled.graphs == 2  # one causal, one for a single query


def test_symbolic_window(qkv: Make, same: Any) -> None:
    def given(q: Tensor, k: Tensor, v: Tensor, left: int) -> Any:
        return attnhub.attention(q, k, v, attnhub.Causal() & attnhub.Window(left))

    def derived(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return given(q, k, v, k.shape[2] // 2)

    one, other = Compiled(given), Compiled(derived)
    for length, left in zip(LENGTHS, (3, 5, 4, 11)):
        inputs = qkv(length=length)
        wanted = attnhub.attention(*inputs, attnhub.Causal() & attnhub.Window(left), backend="reference")
        same(one(*inputs, left), wanted)
        same(other(*inputs), given(*inputs, length // 2))
    assert one.graphs == 1 and other.graphs == 1


def test_func_grad_inside_a_graph(qkv: Make, same: Any) -> None:
    def derivative(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.func.grad(lambda q, k, v: causal(q, k, v).square().sum(), argnums=(0, 1, 2))(q, k, v)

    inputs = qkv()
    same(torch.compile(derivative, backend="aot_eager", fullgraph=True)(*inputs), derivative(*inputs))


def test_a_batch_of_data_dependent_size_trains(qkv: Make, same: Any, gradients: Any) -> None:
    def chosen(keep: Tensor, *inputs: Tensor) -> Any:
        rows = keep.nonzero()[:, 0]
        return attnhub.attention(*(t[rows] for t in inputs), attnhub.Causal(), return_lse=True)

    compiled = Compiled(chosen)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in (3, 5):
            inputs, keep = qkv(batch=6, grad=True), torch.arange(6) < count
            out, wanted = compiled(keep, *inputs), chosen(keep, *inputs)
            same(out, wanted)
            same(gradients(out, inputs), gradients(wanted, inputs))
    assert compiled.graphs == 1


@pytest.mark.parametrize("backend", ("cpu", "auto"))
@pytest.mark.parametrize("autocast", (False, True))
def test_compiled_autograd_of_eager_calls(qkv: Make, same: Any, backend: str, autocast: bool) -> None:
    """Its graph of the backward is traced whole, for both of our autograd functions."""
    from torch._dynamo import compiled_autograd

    captures = 0

    def compiler(graph: Any) -> Any:
        nonlocal captures
        captures += 1
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    for length in (9, 12):
        inputs = (*qkv(length=length, grad=True), torch.randn(1, 4, 1, length, requires_grad=True), torch.randn(4, requires_grad=True))

        def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                window = attnhub.attention(q, k, v, attnhub.Causal() & attnhub.Window(4), backend=backend)
                out, lse = attnhub.attention(q, k, v, attnhub.Causal() & attnhub.Bias(bias), sinks=sinks, return_lse=True, backend=backend)
            return (out.float().square() + window.float()).sum() + lse.sum()

        wanted = torch.autograd.grad(loss(*inputs), inputs)
        with compiled_autograd._enable(compiler):
            loss(*inputs).backward()
        same([t.grad for t in inputs], list(wanted), 2e-2 if autocast else 2e-5)
    assert captures <= 2  # the second one for any length
