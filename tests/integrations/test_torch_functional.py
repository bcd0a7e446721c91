"""F.scaled_dot_product_attention replaced: the same meaning as torch's, calls counted, what is left to torch said, scopes that end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.autograd import forward_ad

import attnhub
from attnhub.backend import Backend, Call, Plan
from attnhub.integrations.torch_functional import NotServedError, report
from attnhub.problem import Problem
from attnhub.registry import registry

TORCH = F.scaled_dot_product_attention
Q = torch.randn(2, 4, 6, 8)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert not attnhub.uninstall_as_sdpa(), "a test left it installed"
    assert F.scaled_dot_product_attention is TORCH


# -- meaning -----------------------------------------------------------------------------------------------------------------------------

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
CALLS: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "plain": (((2, 4, 6, 8),) * 3, {}),
    "scale": (((2, 4, 6, 8),) * 3, {"scale": 0.3}),
    "causal": (((2, 4, 6, 8),) * 3, {"is_causal": True}),
    "causal_top_left": (((2, 4, 3, 8), (2, 4, 9, 8), (2, 4, 9, 8)), {"is_causal": True}),
    "causal_more_queries": (((2, 4, 9, 8), (2, 4, 3, 8), (2, 4, 3, 8)), {"is_causal": True}),
    "gqa": (((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)), {"enable_gqa": True}),
    "gqa_causal": (((2, 6, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8)), {"enable_gqa": True, "is_causal": True}),
    "dv": (((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 12)), {}),
    "two_dims": (((6, 8), (5, 8), (5, 8)), {}),
    "three_dims": (((4, 6, 8), (4, 5, 8), (4, 5, 8)), {"is_causal": True}),
    "five_dims": (((2, 3, 4, 6, 8),) * 3, {}),
    "bool": (((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {"attn_mask": ("bool", (6, 5))}),
    "bool_batch": (((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {"attn_mask": ("bool", (2, 1, 1, 5))}),
    "float": (((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {"attn_mask": ("float", (2, 4, 6, 5))}),
    "float_five_dims": (((2, 3, 4, 6, 8),) * 3, {"attn_mask": ("float", (3, 1, 6, 6))}),
    "float_gqa": (((2, 4, 6, 8), (2, 2, 5, 8), (2, 2, 5, 8)), {"attn_mask": ("float", (6, 5)), "enable_gqa": True}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CALLS)
def test_as_torch(case: str, dtype: torch.dtype) -> None:
    """Result, memory order and gradients, that of a floating mask included. Every row keeps a key."""
    shapes, given = CALLS[case]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    options = dict(given)
    if "attn_mask" in options:
        kind, shape = options["attn_mask"]
        mask = torch.rand(shape) < 0.5 if kind == "bool" else torch.randn(shape, dtype=dtype, requires_grad=True)
        if kind == "bool":
            mask[..., 0] = True
        else:
            tensors.append(mask)
        options["attn_mask"] = mask
    want = TORCH(*tensors[:3], **options)
    with attnhub.replace_sdpa(strict=True) as served:
        out = F.scaled_dot_product_attention(*tensors[:3], **options)
    assert served.calls == 1 and not served.to_torch
    bound = 1e-5 if dtype == torch.float32 else 4e-2
    assert out.dtype == dtype
    torch.testing.assert_close(out, want, rtol=bound, atol=bound)
    weight = torch.linspace(-1, 1, want.numel()).view(want.shape)
    for mine, theirs in zip(torch.autograd.grad((out * weight).sum(), tensors), torch.autograd.grad((want * weight).sum(), tensors)):
        torch.testing.assert_close(mine, theirs, rtol=10 * bound, atol=10 * bound)


def test_positions_keywords_and_autocast() -> None:
    mask = torch.ones(6, 6, dtype=torch.bool)
    with attnhub.replace_sdpa(strict=True):
        torch.testing.assert_close(F.scaled_dot_product_attention(Q, Q, Q, mask, 0.0, False, scale=0.5), TORCH(Q, Q, Q, scale=0.5))
        torch.testing.assert_close(F.scaled_dot_product_attention(query=Q, key=Q, value=Q, is_causal=True), TORCH(Q, Q, Q, is_causal=True))
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(Q, Q, Q, None, 0.0, False, 0.5)  # type: ignore[call-arg]
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(Q, Q, Q).dtype == TORCH(Q, Q, Q).dtype == torch.bfloat16


def test_dropout() -> None:
    with attnhub.replace_sdpa(strict=True):
        torch.manual_seed(3)
        out = F.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(out, attnhub.attention(Q, Q, Q, dropout_p=0.5))  # type: ignore[arg-type]
    assert not torch.allclose(out, TORCH(Q, Q, Q))


@pytest.mark.parametrize("how", ["scale", "zeros", "mask"])
def test_a_wrong_backend_would_be_seen(how: str, broken: Callable[[str], str]) -> None:
    with attnhub.replace_sdpa(), attnhub.use(broken(how)):
        assert not torch.allclose(F.scaled_dot_product_attention(Q, Q, Q, is_causal=True), TORCH(Q, Q, Q, is_causal=True), atol=1e-2)


# -- what is left to torch -----------------------------------------------------------------------------------------------------------------


class _Mine(Tensor):
    """A subclass whose __torch_function__ may mean something."""


def _dual(call: Callable[..., Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(Q, torch.ones_like(Q)), Q, Q)


LEFT: dict[str, tuple[Callable[[Callable[..., Tensor]], Any], str]] = {
    "nested": (lambda f: f(*[torch.nested.nested_tensor([torch.ones(2, 3, 4), torch.ones(2, 5, 4)])] * 3), "nested"),
    "meta": (lambda f: f(*[torch.empty(1, 2, 3, 4, device="meta")] * 3).shape, "meta device"),
    "dtype": (lambda f: f(*[torch.ones(1, 2, 3, 4, dtype=torch.complex64)] * 3), "complex64"),
    "mask_dtype": (lambda f: f(Q, Q, Q, torch.ones(6, 6, dtype=torch.int32)), "attn_mask is torch.int32"),
    "mask_and_causal": (lambda f: f(Q, Q, Q, torch.ones(6, 6, dtype=torch.bool), is_causal=True), "attn_mask is given and is_causal"),
    "dropout": (lambda f: f(Q, Q, Q, dropout_p=1.0), "dropout_p=1.0"),
    "dropout_none": (lambda f: f(Q, Q, Q, None, None), "dropout_p is a NoneType"),
    "causal_kind": (lambda f: f(Q, Q, Q, None, 0.0, "yes"), "is_causal is a str"),
    "sparse": (lambda f: f(Q.to_sparse(), Q, Q), "layout torch.sparse_coo"),
    "subclass": (lambda f: f(Q.as_subclass(_Mine), Q, Q), "_Mine"),
    "no_tensor": (lambda f: f(None, Q, Q), "query is a NoneType"),
    "head_dim": (lambda f: f(Q, Q[..., :4], Q), "head_dim of q is 8 and of k 4"),
    "mask_shape": (lambda f: f(Q, Q, Q, torch.ones(5, 5, dtype=torch.bool)), "bool_mask has shape"),
    "forward_mode": (_dual, "forward-mode"),
    "traced": (lambda f: torch.jit.trace(lambda x: f(x, x, x), Q, check_trace=False)(Q), "torch.jit.trace"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LEFT)
def test_left_to_torch_with_the_reason(case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's result, or torch's own error; with strict an error of ours that names the reason."""
    call, words = LEFT[case]
    monkeypatch.setattr(report, "_said", set())

    def outcome(function: Callable[..., Tensor]) -> Any:
        try:
            return call(function)
        except Exception as error:
            return type(error), str(error)

    want = outcome(TORCH)
    with attnhub.replace_sdpa() as served, caplog.at_level(logging.WARNING, "attnhub"):
        found = [outcome(F.scaled_dot_product_attention) for _ in range(2)]
    for one in found:
        if isinstance(want, Tensor) and not want.is_nested:
            torch.testing.assert_close(one, want)
        elif isinstance(want, tuple):
            assert one == want
    assert served.calls == 0 and sum(served.to_torch.values()) >= 2
    assert all(words in reason for reason in served.to_torch)
    assert words in caplog.text and caplog.text.count("left to torch") == len(served.to_torch), "said once"
    assert words in str(served) and served.to_json()["to_torch"] == served.to_torch
    with attnhub.replace_sdpa(strict=True), pytest.raises(NotServedError, match="strict=False"):
        call(F.scaled_dot_product_attention)


def test_a_choice_that_was_made_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name: the error. With nothing left by default: torch, with the reason."""
    with attnhub.replace_sdpa() as served:
        with attnhub.use("cuda"), pytest.raises(attnhub.NoBackendError):
            F.scaled_dot_product_attention(Q, Q, Q)
        monkeypatch.setenv("ATTNHUB_DISABLE", ",".join(registry.names()))
        torch.testing.assert_close(F.scaled_dot_product_attention(Q, Q, Q), TORCH(Q, Q, Q))
        assert served.calls == 0 and [reason for reason in served.to_torch if "no backend can serve it" in reason]
    with attnhub.replace_sdpa(strict=True), pytest.raises(NotServedError, match="no backend"):
        F.scaled_dot_product_attention(Q, Q, Q)


class _AsksTorch(Backend):
    """A backend of somebody's that itself calls F.scaled_dot_product_attention."""

    name = "asks_torch"
    automatic = False

    def __init__(self) -> None:
        self.capability = registry.get("sdpa").capability

    def prepare(self, problem: Problem) -> Plan:
        class Asking(Plan):
            def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
                return F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.softmax_scale), None

        return Asking()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_backend_that_calls_it_gets_torchs(compiled: bool, register: Callable[[Backend], Backend]) -> None:
    register(_AsksTorch())

    def call(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    torch._dynamo.reset()
    with attnhub.replace_sdpa() as served, attnhub.use("asks_torch"):
        torch.testing.assert_close((torch.compile(call, backend="eager") if compiled else call)(Q), TORCH(Q, Q, Q))
    assert served.backends == {"asks_torch": 1}


# -- scopes --------------------------------------------------------------------------------------------------------------------------------


def test_blocks_nest_and_end() -> None:
    with attnhub.replace_sdpa() as outer:
        F.scaled_dot_product_attention(Q, Q, Q)
        with pytest.raises(NotServedError), attnhub.replace_sdpa(strict=True) as inner:
            F.scaled_dot_product_attention(Q, Q, Q)
            F.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.0)
        assert F.scaled_dot_product_attention is not TORCH
        F.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.0)
        assert (inner.calls, outer.calls) == (1, 2) and not inner.to_torch and sum(outer.to_torch.values()) == 1
        kept = F.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is TORCH
    torch.testing.assert_close(kept(Q, Q, Q), TORCH(Q, Q, Q))
    assert outer.calls == 2, "a reference that was kept is torch's function outside"


def test_the_same_block_again() -> None:
    block = attnhub.replace_sdpa()
    for _ in range(2):
        with block, block:
            F.scaled_dot_product_attention(Q, Q, Q)
    assert block.report.calls == 4, "each call counts in both of the blocks that it is in"


def test_decorated_functions() -> None:
    replacement = attnhub.replace_sdpa()

    @replacement
    def attend(depth: int) -> Tensor:
        """Recursive."""
        return F.scaled_dot_product_attention(Q, Q, Q) if depth == 0 else attend(depth - 1)

    @replacement
    async def attend_later() -> Tensor:
        await asyncio.sleep(0)
        return F.scaled_dot_product_attention(Q, Q, Q)

    attend(0)
    assert replacement.report.calls == 1 and attend.__doc__ == "Recursive." and F.scaled_dot_product_attention is TORCH
    asyncio.run(attend_later())
    assert replacement.report.calls == 2
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attend, [0] * 40))
    assert replacement.report.calls == 42
    with pytest.raises(TypeError, match="generator"):
        replacement(lambda: (yield))


def test_tasks_do_not_see_each_others_blocks() -> None:
    async def attend(replaced: bool) -> int:
        if not replaced:
            for _ in range(3):
                await asyncio.sleep(0)
                F.scaled_dot_product_attention(Q, Q, Q)
            return 0
        with attnhub.replace_sdpa() as served:
            for _ in range(3):
                F.scaled_dot_product_attention(Q, Q, Q)
                await asyncio.sleep(0)
        return served.calls

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(attend(i % 2 == 0) for i in range(4)))

    assert asyncio.run(all_of_them()) == [3, 0, 3, 0]


def test_threads_have_their_own_blocks() -> None:
    """One thread inside a block, one outside, at the same time; a global installation holds for both."""
    inside, done = threading.Event(), threading.Event()
    found: dict[str, int] = {}

    def within() -> None:
        with attnhub.replace_sdpa() as served:
            F.scaled_dot_product_attention(Q, Q, Q)
            inside.set()
            done.wait(20)
            found["within"] = served.calls

    thread = threading.Thread(target=within)
    thread.start()
    assert inside.wait(20)
    torch.testing.assert_close(F.scaled_dot_product_attention(Q, Q, Q), TORCH(Q, Q, Q))
    done.set()
    thread.join()
    assert found == {"within": 1}
    served = attnhub.install_as_sdpa()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: F.scaled_dot_product_attention(Q, Q, Q), range(40)))
    finally:
        attnhub.uninstall_as_sdpa()
    assert served.calls == 40


def test_everywhere_until_uninstalled() -> None:
    first = attnhub.install_as_sdpa()
    assert attnhub.install_as_sdpa(strict=True) is first
    F.scaled_dot_product_attention(Q, Q, Q)
    with pytest.raises(NotServedError):
        F.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.0)
    with attnhub.replace_sdpa() as inner:
        assert attnhub.uninstall_as_sdpa() and not attnhub.uninstall_as_sdpa()
        F.scaled_dot_product_attention(Q, Q, Q)
    assert inner.calls == 1 and F.scaled_dot_product_attention is TORCH


def test_functions_that_others_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before us: what is left to torch goes to theirs. After us: theirs stays."""
    theirs = lambda *args, **kwargs: torch.full((1,), 7.0)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", theirs)
        with attnhub.replace_sdpa():
            assert F.scaled_dot_product_attention(Q, Q, Q).shape == Q.shape
            assert F.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.0).item() == 7.0
        assert F.scaled_dot_product_attention is theirs
    with attnhub.replace_sdpa():
        F.scaled_dot_product_attention = theirs
    assert F.scaled_dot_product_attention is theirs
    F.scaled_dot_product_attention = TORCH


# -- compiled, scripted ----------------------------------------------------------------------------------------------------------------------


def test_compiled_graphs_follow_the_scope() -> None:
    """No breaks; attnhub's operator inside the block, torch's outside, in another thread too; one graph for both lengths."""
    torch._dynamo.reset()
    recorder = EagerAndRecordGraphs()

    @torch.compile(fullgraph=True, backend=recorder, dynamic=True)
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) * 2

    def graphs() -> list[bool]:
        return ["attnhub.forward" in graph.print_readable(print_output=False) for graph in recorder.graphs]

    want = TORCH(Q, Q, Q, is_causal=True) * 2
    torch.testing.assert_close(attend(Q), want)
    with attnhub.replace_sdpa():
        torch.testing.assert_close(attend(Q), want)
        attend(Q[:, :, :5].contiguous())
        assert graphs() == [False, True]
        with ThreadPoolExecutor(1) as pool:
            torch.testing.assert_close(pool.submit(attend, Q).result(), want)
    torch.testing.assert_close(attend(Q), want)
    assert graphs().count(True) == 1, "outside, and in a thread that is outside, the graph is torch's"
    attnhub.install_as_sdpa()
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(attend, Q).result()
    finally:
        attnhub.uninstall_as_sdpa()
    assert graphs().count(True) == 2


def test_compiled_outside_while_another_thread_is_inside() -> None:
    torch._dynamo.reset()
    recorder = EagerAndRecordGraphs()
    attend = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), fullgraph=True, backend=recorder)
    inside, done = threading.Event(), threading.Event()

    def stay() -> None:
        with attnhub.replace_sdpa():
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(20)
    with attnhub.replace_sdpa():
        pass
    attend(Q)
    done.set()
    thread.join()
    assert "attnhub.forward" not in recorder.graphs[0].print_readable(print_output=False)


def test_compiled_calls_that_are_left_to_torch() -> None:
    torch._dynamo.reset()
    recorder = EagerAndRecordGraphs()
    attend = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=1.0), fullgraph=True, backend=recorder)
    with attnhub.replace_sdpa():
        torch.testing.assert_close(attend(Q), TORCH(Q, Q, Q, dropout_p=1.0))
    assert "attnhub.forward" not in recorder.graphs[0].print_readable(print_output=False)
    with attnhub.replace_sdpa(strict=True), pytest.raises(Exception, match=r"dropout_p=1\.0"):
        attend(Q)


def test_compiled_training() -> None:
    torch._dynamo.reset()
    with attnhub.replace_sdpa():
        x = Q.clone().requires_grad_()
        torch.compile(lambda y: F.scaled_dot_product_attention(y, y, y, is_causal=True).square().sum(), fullgraph=True, backend="aot_eager")(x).backward()
    y = Q.clone().requires_grad_()
    TORCH(y, y, y, is_causal=True).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.filterwarnings("ignore")
def test_scripted_code_gets_torchs_operator() -> None:
    with attnhub.replace_sdpa():
        scripted = torch.jit.script(_attend)
    assert "aten::scaled_dot_product_attention" in str(scripted.graph)


def _attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)
