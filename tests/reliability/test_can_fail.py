"""A suite that cannot fail proves nothing: backends that are wrong in one way each, and the conformance suite finds every one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import runtime, testing
from attnhub.backend import Backend, Call, Gradients, Needs, Plan
from attnhub.backends.reference import EVERYTHING, FLOATS, ReferencePlan, maths
from attnhub.capability import Capability, DeviceRange
from attnhub.kv_cache import KVCache, append_first
from attnhub.problem import Feature, Problem
from attnhub.testing.checks import ConformanceError

Result = tuple[Tensor, Optional[Tensor]]
Forward = Callable[[Call], Result]
Change = Callable[[Forward, Call], Result]


def _with(call: Call, **changes: Any) -> Call:
    fields = {name: getattr(call, name) for name in Call.__slots__}
    return Call(**{**fields, **changes})


def _mask(call: Call, **changes: Any) -> Call:
    return _with(call, mask=dataclasses.replace(call.mask, **changes))


def _padding_read(run: Forward, call: Call) -> Result:
    """Adds 0 * (sum of all of v), as a kernel does that multiplies what it should select."""
    out, lse = run(call)
    return out + 0 * call.v.sum().to(out.dtype), lse


def _interleaved(run: Forward, call: Call) -> Result:
    """Query head h reads K/V head h % Hk instead of h // group."""
    heads, kv_heads = call.q.shape[1], call.k.shape[1]
    order = torch.arange(heads) % kv_heads
    return run(_with(call, k=call.k[:, order], v=call.v[:, order]))


def _no_tile(run: Forward, call: Call) -> Result:
    """The last 16 keys are never visited."""
    if call.varlen is not None or call.block_table is not None or call.k.shape[2] <= 16:
        return run(call)
    seen = torch.ones(1, 1, 1, call.k.shape[2], dtype=torch.bool)
    seen[..., -16:] = False
    return run(_mask(call, bool_mask=seen if call.mask.bool_mask is None else call.mask.bool_mask & seen))


def _transposed_strides(run: Forward, call: Call) -> Result:
    """Reads q as if it were dense, whatever its strides."""
    q = call.q
    dense = torch.as_strided(q, q.shape, torch.empty(q.shape).stride(), q.storage_offset()) if q.storage_offset() + q.numel() <= q.untyped_storage().size() // q.element_size() else q
    return run(_with(call, q=dense))


def _out(change: Callable[[Tensor], Tensor]) -> Change:
    """A change of the output alone."""

    def changed(run: Forward, call: Call) -> Result:
        out, lse = run(call)
        return change(out), lse

    return changed


def _lse_in_base_2(run: Forward, call: Call) -> Result:
    out, lse = run(call)
    return out, None if lse is None else lse / math.log(2)


def _factors(change: Callable[[Tensor], Optional[Tensor]], of: str = "qkv") -> Change:
    """A change of the factors of fp8 inputs."""

    def changed(run: Forward, call: Call) -> Result:
        if call.descale is None:
            return run(call)
        some = {name: change(t) for name, t in call.descale._asdict().items() if name in of and t is not None}
        return run(_with(call, descale=call.descale._replace(**some)))

    return changed


BROKEN: dict[str, Change] = {
    "mask dropped": lambda run, call: run(_with(call, mask=attnhub.mask.FULL)),
    "causal dropped": lambda run, call: run(_mask(call, causal=False)),
    "top left instead of bottom right": lambda run, call: run(_mask(call, align="top_left")),
    "window off by one": lambda run, call: run(_mask(call, window=(call.mask.window[0] + 1, call.mask.window[1]) if call.mask.window[0] >= 0 else call.mask.window)),
    "window one short": lambda run, call: run(_mask(call, window=(call.mask.window[0], call.mask.window[1] - 1) if call.mask.window[1] > 0 else call.mask.window)),
    "segments dropped": lambda run, call: run(_mask(call, segments=None)),
    "lengths one too many": lambda run, call: run(_mask(call, seqused_k=None if call.mask.seqused_k is None else call.mask.seqused_k + 1)),
    "left padding dropped": lambda run, call: run(_mask(call, leftpad=None)),
    "bias dropped": lambda run, call: run(_mask(call, bias=None)),
    "alibi with the wrong sign": lambda run, call: run(_mask(call, alibi=None if call.mask.alibi is None else -call.mask.alibi)),
    "scale 1.5x": lambda run, call: run(_with(call, softmax_scale=1.5 * call.softmax_scale)),
    "scale 1% off": lambda run, call: run(_with(call, softmax_scale=1.01 * call.softmax_scale)),
    "softcap dropped": lambda run, call: run(_with(call, softcap=0.0)),
    "sinks dropped": lambda run, call: run(_with(call, sinks=None)),
    "dropout dropped": lambda run, call: run(_with(call, dropout_p=0.0, rng=None)),
    "dropout with another key": lambda run, call: run(_with(call, rng=None if call.rng is None else call.rng + 1)),
    "tile of keys skipped": _no_tile,
    "zeros": _out(torch.zeros_like),
    "lse in base 2": _lse_in_base_2,
    "NaN from padding": _padding_read,
    "wrong GQA interleave": _interleaved,
    "strides ignored": _transposed_strides,
    "NaN in rows without keys": _out(lambda out: torch.where(out.abs().sum(-1, keepdim=True) == 0, math.nan, out)),
    "one bf16 rounding of fp32": _out(lambda out: out.bfloat16().to(out.dtype)),
}  # fmt: skip

BROKEN_FP8: dict[str, Change] = {
    "factor of q dropped": _factors(lambda t: None, "q"),
    "factor of k dropped": _factors(lambda t: None, "k"),
    "factor of v dropped": _factors(lambda t: None, "v"),
    "factors of the next head": _factors(lambda t: t.roll(1, 1)),
    "factor of v of the next head": _factors(lambda t: t.roll(1, 1), "v"),
    "factors of the next sequence": _factors(lambda t: t.roll(1, 0)),
    "factor of q 1% off": _factors(lambda t: 1.01 * t, "q"),
    "causal dropped": BROKEN["causal dropped"],
    "tile of keys skipped": _no_tile,
    "v in e5m2": lambda run, call: run(_with(call, v=call.v.to(torch.float8_e5m2))),
    "out in e4m3": _out(lambda out: out.to(torch.float8_e4m3fn).to(out.dtype)),
    "out in fp16": _out(torch.Tensor.half),
}

BROKEN_BACKWARD: dict[str, Callable[[Gradients, Needs], Gradients]] = {
    "dq doubled": lambda g, needs: g._replace(q=None if g.q is None else 2 * g.q),
    "dk zero": lambda g, needs: g._replace(k=None if g.k is None else torch.zeros_like(g.k)),
    "dv of the wrong sign": lambda g, needs: g._replace(v=None if g.v is None else -g.v),
    "dbias zero": lambda g, needs: g._replace(bias=None if g.bias is None else torch.zeros_like(g.bias)),
    "dsinks zero": lambda g, needs: g._replace(sinks=None if g.sinks is None else torch.zeros_like(g.sinks)),
}


def _appended(call: Call, **changes: Any) -> Call:
    """By torch operations, with a change: to the new tokens (k, v, rotary), or to the positions (seqused_k)."""
    assert call.append is not None and call.mask.seqused_k is not None
    used = changes.pop("seqused_k", call.mask.seqused_k)
    changed = _mask(_with(call, append=call.append._replace(**changes)), seqused_k=used)
    made = append_first(changed, KVCache(call.k, call.v, used, call.block_table))
    return _mask(made, seqused_k=call.mask.seqused_k + call.append.k.shape[2])


def _moved(call: Call, by: int) -> Call:
    """Tokens are written so many positions away, in what room there is."""
    assert call.append is not None and call.mask.seqused_k is not None
    room = call.k.shape[2] * (1 if call.block_table is None else call.block_table.shape[1]) - call.append.k.shape[2]
    return _appended(call, seqused_k=(call.mask.seqused_k + by).clamp(0, room))


def _turned(call: Call, **changes: Any) -> Call:
    rotary = call.append.rotary if call.append is not None else None
    return _appended(call, rotary=None if rotary is None else rotary._replace(**changes))


def _beside(call: Call) -> Call:
    """The row behind the last new one is written too: of another page, or another sequence, where it is the last."""
    made = _appended(call)
    token = made.k.shape[2] // 2 if made.block_table is not None else min(int(made.mask.seqused_k[-1]), made.k.shape[2] - 1)  # type: ignore[index]
    made.v[-1, -1, token] = 1.0
    return made


def _around(call: Call) -> Call:
    made = _appended(call)
    if made.k.storage_offset():
        torch.as_strided(made.k, (1,), (1,), made.k.storage_offset() - 1).fill_(1.0)
    return made


def _counted(call: Call) -> Call:
    made = _appended(call)
    assert call.mask.seqused_k is not None and call.append is not None
    call.mask.seqused_k.add_(call.append.k.shape[2])
    return made


#: What a plan that appends in its launch makes of a call.
BROKEN_APPEND: dict[str, Callable[[Call], Call]] = {
    "a position too far": lambda call: _moved(call, 1),
    "a position too near": lambda call: _moved(call, -1),
    "not rotated": lambda call: _appended(call, rotary=None),
    "q not rotated": lambda call: _with(_appended(call), q=call.q),
    "other pairs": lambda call: _turned(call, interleaved=True),
    "all queries at one position": lambda call: _turned(call, one_position=True),
    "queries one behind the other": lambda call: _turned(call, one_position=False),
    "rotated backwards": lambda call: _turned(call, sin=-call.append.rotary.sin if call.append is not None and call.append.rotary is not None else None),
    "the next row": _beside,
    "before the cache": _around,
    "lengths counted": _counted,
    "new tokens not seen": lambda call: _mask(_appended(call), seqused_k=call.mask.seqused_k),
    "nothing written": lambda call: _with(_mask(call, seqused_k=call.mask.seqused_k + call.append.k.shape[2]), append=None),  # type: ignore[operator,union-attr]
    "the last token alone": lambda call: _appended(call, **{n: torch.cat((t[:, :, 1:], t[:, :, -1:]), 2) for n, t in zip("kv", call.append[:2])}),  # type: ignore[index]
}  # fmt: skip


class Wrapped(Backend):
    """The reference with one change to its forward or backward."""

    name = "broken"
    automatic = False
    capability = Capability((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING, head_dims=(1, 1 << 20, 1), backward_features=EVERYTHING)

    def __init__(self, change: Optional[Change] = None, backward: Optional[Callable[[Gradients, Needs], Gradients]] = None) -> None:
        self._change, self._backward = change, backward

    def prepare(self, problem: Problem) -> Plan:
        change, wrong = self._change, self._backward

        class Changed(ReferencePlan):
            def forward(self, call: Call) -> Result:
                return super().forward(call) if change is None else change(super().forward, call)

            def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
                found = super().backward(call, grad_out, grad_lse, out, lse, needs)
                return found if wrong is None else wrong(found, needs)

        return Changed()


class Appending(Wrapped):
    """Whose plans append by themselves."""

    def __init__(self, change: Callable[[Call], Call] = _appended) -> None:
        self._made = change

    def prepare(self, problem: Problem) -> Plan:
        change = self._made

        class Changed(ReferencePlan):
            def appends(self, call: Call) -> bool:
                return True

            def forward(self, call: Call) -> Result:
                return super().forward(call if call.append is None else change(call))

        return Changed()


class WrappedFp8(Wrapped):
    capability = Capability((DeviceRange("cpu", dtypes=frozenset({"float8_e4m3fn"})),), EVERYTHING, head_dims=(1, 1 << 20, 1))


#: What the name of a check that should notice holds: those are tried first, to save time.
_HINTS = {
    "window": "window", "segments": "segments", "lengths": "seqlens", "left padding": "leftpad", "bias": "bias", "alibi": "alibi", "softcap": "softcap",
    "sinks": "sinks", "dropout": "dropout", "padding": "page", "GQA": "H4:2", "strides": "strided", "causal": "causal", "inputs": "strided",
    "append": "new",
}  # fmt: skip


def _first_failure(kind: str, name: str = "") -> str:
    """Name of the first check found to fail, or "". Checks are tried until one does."""
    hint = next((word for key, word in _HINTS.items() if key in name), "")
    for check in sorted(testing.checks("broken", level="quick", kinds=(kind,)), key=lambda check: hint not in str(check)):
        try:
            check.run()
        except ConformanceError:
            return str(check)
    return ""


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_forward_fails(name: str, register: Any) -> None:
    register(Wrapped(BROKEN[name]))
    assert _first_failure("forward", name), f"the suite does not notice: {name}"


@pytest.mark.parametrize("name", BROKEN_APPEND)
def test_a_wrong_append_fails(name: str, register: Any) -> None:
    register(Appending(BROKEN_APPEND[name]))
    assert "new" in _first_failure("forward", "append"), f"the suite does not notice: {name}"


@pytest.mark.parametrize("name", BROKEN_FP8)
def test_a_wrong_forward_in_fp8_fails(name: str, register: Any) -> None:
    register(WrappedFp8(BROKEN_FP8[name]))
    assert _first_failure("forward", name), f"the suite does not notice: {name}"


@pytest.mark.parametrize("name", BROKEN_BACKWARD)
def test_a_wrong_backward_fails(name: str, register: Any) -> None:
    register(Wrapped(backward=BROKEN_BACKWARD[name]))
    assert _first_failure("backward", name), f"the suite does not notice: {name}"


def test_results_that_differ_from_run_to_run_fail(register: Any) -> None:
    runs = iter(range(10**6))
    register(Wrapped(_out(lambda out: out * (1 + 1e-6 * (next(runs) % 2)))))
    assert _first_failure("repeat")


def test_an_undeclared_feature_that_is_taken_fails(register: Any) -> None:
    """A backend whose declaration admits what it did not list."""

    class Open(Capability):
        def check(self, problem: Problem) -> tuple[attnhub.Reason, ...]:
            return ()

    class Lax(Wrapped):
        capability = Open((DeviceRange("cpu", dtypes=FLOATS),), EVERYTHING - {Feature.SOFTCAP}, backward_features=EVERYTHING)

    register(Lax())
    assert _first_failure("reject") == "reject-softcap"


def test_a_declaration_that_promises_too_much_fails(register: Any) -> None:
    class Picky(Wrapped):
        def check(self, problem: Problem) -> tuple[attnhub.Reason, ...]:
            return (attnhub.Reason(attnhub.Code.STRIDE, "not today"),) if Feature.WINDOW in problem.features else ()

    register(Picky())
    assert "window" in _first_failure("forward", "window")


def test_writing_around_the_inputs_fails(register: Any) -> None:
    def scribble(run: Forward, call: Call) -> Result:
        out = run(call)
        k = call.k.detach()
        if k.stride(2) == 2 * k.shape[3] and k.stride(1) == k.shape[2] * k.stride(2):  # rows with room behind them
            torch.as_strided(k, (1,), (1,), k.storage_offset() + k.shape[3]).fill_(1.0)
        return out

    register(Wrapped(scribble))
    assert "strided" in _first_failure("forward", "around the inputs")


def test_nothing_fails_where_nothing_is_broken(register: Any) -> None:
    """The wrapper itself passes, on the small level."""
    register(Wrapped())
    todo = testing.checks("broken", level="tiny", kinds=("forward",))
    for check in todo[::3]:
        check.run()
    register(Appending())
    for check in todo:
        if check.case is not None and check.case.new_tokens:
            check.run()


def test_the_decision_of_the_case_before_is_not_taken_for_this_one(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register(Wrapped())
    check = next(c for c in testing.checks("broken", level="tiny", kinds=("forward",)))
    check.run()
    real = attnhub.api.attention

    def undecided(*args: Any, **kwargs: Any) -> Any:
        before = runtime._served.chosen
        result = real(*args, **kwargs)
        runtime._served.chosen = before
        return result

    monkeypatch.setattr(attnhub.api, "attention", undecided)
    with pytest.raises(ConformanceError, match="served by None"):
        check.run()


def test_a_case_without_queries_needs_no_decision(register: Any) -> None:
    register(Wrapped())
    empty = [c for c in testing.checks("broken", level="full", kinds=("forward",)) if "varlen0,0;" in str(c)]
    assert empty
    for check in empty:
        runtime._served.chosen = None
        check.run()


def test_fp8_weights_are_within_the_rule(register: Any) -> None:
    """A kernel with e4m3 weights rounds those of a tile of keys by the maximum up to that tile, which need not be the row's."""

    class Rounded(WrappedFp8):
        def prepare(self, problem: Problem) -> Plan:
            class Changed(ReferencePlan):
                def forward(self, call: Call) -> Result:
                    return maths.forward(call, None, torch.float32, exact_nan=True, rounded=_rounded_by_tiles)

            return Changed()

    register(Rounded())
    for check in testing.checks("broken", level="quick", kinds=("forward",)):
        check.run()


def _rounded_by_tiles(weights: Tensor, size: int = 16) -> Tensor:
    top = torch.stack([tile.amax(-1) for tile in weights.split(size, -1)], -1).cummax(-1).values
    unit = top.clamp_min(1e-30).repeat_interleave(size, -1)[..., : weights.shape[-1]] / 256
    return (weights / unit).to(torch.float8_e4m3fn).to(weights.dtype) * unit


def test_a_failure_prints_a_line_that_reproduces_it(register: Any) -> None:
    register(Wrapped(BROKEN["scale 1.5x"]))
    check = testing.checks("broken", kinds=("forward",))[0]
    with pytest.raises(ConformanceError) as caught:
        check.run()
    line = next(row for row in str(caught.value).splitlines() if row.startswith("again: "))
    with pytest.raises(ConformanceError):
        eval(line.removeprefix("again: "), {"attnhub": attnhub})
