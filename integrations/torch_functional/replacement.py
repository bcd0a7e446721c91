"""The function in torch's place, and the scopes in which it sends calls to attnhub."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, Optional, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnhub import runtime
from attnhub.api import scaled_dot_product_attention as served
from attnhub.decision import NoBackendError
from attnhub.integrations.torch_functional.obstacles import obstacle
from attnhub.integrations.torch_functional.report import NotServedError, SdpaReport, say_once

Function = TypeVar("Function", bound=Callable[..., Any])

_BUILTIN = torch._C._nn.scaled_dot_product_attention
_lock = threading.RLock()
#: Scopes that are open in any thread, and what stood in torch.nn.functional before the first of them.
_open = 0
_before: Callable[..., Tensor] = _BUILTIN


class Scope:
    """One replacement in force: where it counts, and the one around it, which counts too."""

    def __init__(self, report: SdpaReport, strict: bool, outer: Optional[Scope]) -> None:
        self.report, self.strict, self.outer = report, strict, outer


_global: Optional[Scope] = None
_scope: ContextVar[Optional[Scope]] = ContextVar("attnhub_sdpa", default=None)


class _Thread(threading.local):
    #: The same scope where Dynamo can see and guard it: it cannot trace a ContextVar.
    traced: Optional[Scope] = None
    #: Whether a call of ours is under way: a backend that calls F.scaled_dot_product_attention means torch's.
    inside: bool = False


_thread = _Thread()


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Optional[Tensor] = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: Optional[float] = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's function; inside a scope of `replace_sdpa`, or after `install_as_sdpa`, served by attnhub where it can."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if torch.compiler.is_compiling():
        scope = _thread.traced or _global
        if scope is None:
            return _before(query, key, value, attn_mask, dropout_p, is_causal, **options)
        reason = obstacle(query, key, value, attn_mask, dropout_p, is_causal)
        if reason and scope.strict:
            raise NotServedError(reason)
        function = _before if reason else served
        return function(query, key, value, attn_mask, dropout_p, is_causal, **options)
    scope = _scope.get() or _global
    if scope is None or _thread.inside:
        return _before(query, key, value, attn_mask, dropout_p, is_causal, **options)
    reason = obstacle(query, key, value, attn_mask, dropout_p, is_causal)
    if not reason:
        _thread.inside = True
        try:
            out = served(query, key, value, attn_mask, dropout_p, is_causal, **options)
        except NoBackendError as error:
            # A choice that somebody made is never replaced silently.
            if error.decision.policy.source != "default":
                raise
            reason = f"no backend can serve it: {error.decision.why}"
        except (ValueError, TypeError) as error:
            # Refused before anything ran; where torch refuses it too, its own error follows.
            reason = str(error)
        else:
            _count(scope, runtime.last_backend() or "none (nothing to compute)")
            return out
        finally:
            _thread.inside = False
    if scope.strict:
        raise NotServedError(reason)
    say_once(reason)
    _count_torch(scope, reason)
    return _before(query, key, value, attn_mask, dropout_p, is_causal, **options)


functools.update_wrapper(scaled_dot_product_attention, _BUILTIN, assigned=("__doc__",), updated=())
# torch.jit.script compiles the functions it meets; this one stands for torch's operator there.
torch.jit._builtins._register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")


def _count(scope: Optional[Scope], backend: str) -> None:
    while scope is not None:
        scope.report.count(backend)
        scope = scope.outer


def _count_torch(scope: Optional[Scope], reason: str) -> None:
    while scope is not None:
        scope.report.count_torch(reason)
        scope = scope.outer


def _open_one() -> None:
    global _open, _before
    with _lock:
        if _open == 0:
            _before = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
        _open += 1


def _close_one() -> None:
    global _open
    with _lock:
        _open -= 1
        # Whoever put a function of their own over ours keeps it; it finds no scope here and goes on to what was before.
        if _open == 0 and F.scaled_dot_product_attention is scaled_dot_product_attention:
            F.scaled_dot_product_attention = _before


class replace_sdpa:  # noqa: N801 - reads as a verb: `with attnhub.replace_sdpa() as report:`
    """F.scaled_dot_product_attention by attnhub inside a ``with`` block or a decorated function, in this thread and tasks that it starts.

    strict: raise `NotServedError` for calls that attnhub cannot serve; by default they go to torch, and ``report`` says why.
    ``report`` is also what the block is given. Blocks nest: an inner one's calls count in the outer ones too, and its strict holds.
    Enter the block outside compiled code; what is compiled inside it uses attnhub, and is compiled anew outside it.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.report = SdpaReport()
        self._strict = strict
        self._entered: list[Token[Optional[Scope]]] = []

    def __enter__(self) -> SdpaReport:
        scope = Scope(self.report, self._strict, _scope.get() or _global)
        _open_one()
        self._entered.append(_scope.set(scope))
        _thread.traced = scope
        return self.report

    def __exit__(self, *exc: object) -> None:
        _scope.reset(self._entered.pop())
        # What this context sees now, not what the thread saw before: tasks may leave their blocks in any order.
        _thread.traced = _scope.get()
        _close_one()

    def __call__(self, function: Function) -> Function:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"replace_sdpa()({function.__qualname__}): a generator runs while others do; put the block inside it, around the calls")

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapped_async(*args: Any, **kwargs: Any) -> Any:
                with self._again():
                    return await function(*args, **kwargs)

            return wrapped_async  # type: ignore[return-value]

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._again():
                return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    def _again(self) -> replace_sdpa:
        """Another block with the same report: a function may run in several threads at once, and a token belongs to one context."""
        found = replace_sdpa(strict=self._strict)
        found.report = self.report
        return found


def install_as_sdpa(*, strict: bool = False) -> SdpaReport:
    """F.scaled_dot_product_attention by attnhub in every thread, until `uninstall_as_sdpa`. Returns the report of calls.

    Installing again changes only ``strict`` and returns the same report.
    """
    global _global
    with _lock:
        if _global is None:
            _open_one()
            _global = Scope(SdpaReport(), strict, None)
        else:
            _global = Scope(_global.report, strict, None)
        return _global.report


def uninstall_as_sdpa() -> bool:
    """Undo `install_as_sdpa`; whether it was installed. Blocks that are open stay in force."""
    global _global
    with _lock:
        if _global is None:
            return False
        _global = None
        _close_one()
        return True
