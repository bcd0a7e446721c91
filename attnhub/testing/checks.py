"""Running a case against a backend, and judging the result by the error rule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from attnhub import api, arguments, runtime
from attnhub import device as devices
from attnhub.backend import Call, Descale, Needs
from attnhub.decision import NoBackendError, Policy
from attnhub.kv_cache import KVCache
from attnhub.layouts import lse_dtype, out_dtype
from attnhub.problem import FORWARD_ONLY, DeviceInfo, Feature, Problem
from attnhub.reasons import Code, Rejected
from attnhub.registry import registry
from attnhub.rotary import apply_rotary
from attnhub.selector import select
from attnhub.testing.case import Case, Inputs
from attnhub.testing.cases import cases

#: lse of 8- and 16-bit inputs is fp32 work, up to the exponential that a kernel chooses for probabilities it rounds to 8 or 11 bits.
_LSE_UNIT = {torch.float8_e4m3fn: 2.0**-12, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-12}


KINDS = ("forward", "backward", "repeat", "reject")


@dataclass(frozen=True)
class Outcome:
    """A passed check with its figures: the largest error, as a fraction of what the rule allows (1.0 is the limit)."""

    worst: float
    errors: dict[str, float]


class ConformanceError(AssertionError):
    """A check failed; the message holds a line that reproduces it."""


@dataclass(frozen=True)
class Check:
    """One check: `run` returns the figures or raises `ConformanceError`."""

    backend: str
    kind: str
    case: Optional[Case]
    feature: Optional[Feature]
    device: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.case or (self.feature.value if self.feature else '')}"

    def run(self) -> Outcome:
        if self.kind == "reject":
            return self._reject()
        assert self.case is not None
        run = {"forward": _append if self.case.new_tokens else _forward, "backward": _backward, "repeat": _repeat}[self.kind]
        try:
            errors = run(self.backend, self.case, self.device)
        except NoBackendError as error:
            raise ConformanceError(f"{self.backend} declares all that this case needs and rejects it.\n{error}\n{self._again()}") from error
        worst = max(errors.values(), default=0.0)
        if not worst <= 1.0:
            shown = ", ".join(f"{name} {value:.3g}" for name, value in errors.items())
            raise ConformanceError(f"errors as a fraction of the allowed: {shown}\n{self._again()}")
        return Outcome(worst, errors)

    def _again(self) -> str:
        return f"again: attnhub.testing.Check({self.backend!r}, {self.kind!r}, attnhub.testing.{self.case!r}, None, {self.device!r}).run()"

    def _reject(self) -> Outcome:
        """An undeclared feature is refused with its own code, by a choice by name."""
        feature = self.feature
        assert feature is not None
        backend = registry.get(self.backend)
        info = next(r for r in backend.capability.devices if r.type == torch.device(self.device).type)
        dtype = "float32" if "float32" in info.dtypes else sorted(info.dtypes)[0]
        made_up = DeviceInfo(info.type, info.vendor, info.min_arch, "made up")
        problem = Problem(made_up, dtype, dtype, 64, 64, 2, 2, 2, 64, 64, features=frozenset({feature}))
        decision = select(problem, Policy((self.backend,), "argument"), registry.candidates())
        verdict = decision.verdicts[self.backend]
        codes = {reason.code for reason in verdict.reasons} if isinstance(verdict, Rejected) else set()
        if Code(f"no_{feature.value}") not in codes or decision.chosen is not None:
            raise ConformanceError(f"{self.backend} does not declare {feature.value}, and a problem with it is answered {verdict}")
        return Outcome(0.0, {})


def checks(backend: str, device: str = "cpu", level: str = "quick", kinds: tuple[str, ...] = KINDS) -> list[Check]:
    """Every check of a backend on a device. Backends without a backward are checked with the one that `select` pairs them with.

    A GPU that is there gets the cases of its own architecture, one that is not there those of all. Raises KeyError for a backend that is not
    installed, ValueError for a level, a kind or a device that there is not.
    """
    if isinstance(kinds, str) or (unknown := [kind for kind in kinds if kind not in KINDS]):
        raise ValueError(f"kinds={kinds!r}: " + ("a tuple is needed, " if isinstance(kinds, str) else f"there is no {unknown[0]!r}; ") + f"of {', '.join(KINDS)}")
    capability = registry.get(backend).capability
    try:
        device_type = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device={device!r}: a device of torch is needed: cpu, cuda, cuda:1, xpu or mps") from None
    if device_type == "cuda" and torch.cuda.is_available():
        here = devices.describe(torch.device(device))
        ranges = tuple(r for r in capability.devices if r.type != device_type or (r.matches_kind(here) and r.matches_arch(here)))
        capability = dataclasses.replace(capability, devices=ranges)
    found: list[Check] = []
    for case in cases(capability, device_type, level):
        found.append(Check(backend, "forward", case, None, device))
        if case.differentiable and Feature.LSE in capability.features:
            found.append(Check(backend, "backward", case, None, device))
    if Feature.DETERMINISTIC in capability.features:
        some = [c for c in cases(capability, device_type, "tiny") if c.parts in ((), ("causal",)) and c.differentiable][:6]
        some += [c for c in cases(capability, device_type, "tiny") if c.dtype in FORWARD_ONLY][:1]
        found.extend(Check(backend, "repeat", case, None, device) for case in some)
    forward_only = {Feature.BIAS_GRAD, Feature.SINKS_GRAD, Feature.LSE_GRAD}
    found.extend(Check(backend, "reject", None, feature, device) for feature in sorted(frozenset(Feature) - capability.features - forward_only))
    return [check for check in found if check.kind in kinds]


def _call_of(inputs: Inputs, dtype: torch.dtype, rng: Optional[Tensor]) -> Call:
    """The call with its floating inputs in ``dtype``, for the definition."""

    def wide(t: Optional[Tensor]) -> Optional[Tensor]:
        return None if t is None else t.detach().to(dtype)

    mask, kwargs = inputs.mask, dict(inputs.kwargs)
    if mask.bias is not None:
        mask = dataclasses.replace(mask, bias=wide(mask.bias))
    if mask.alibi is not None and dtype == torch.float64:  # slopes are fp32 whatever q is
        mask = dataclasses.replace(mask, alibi=wide(mask.alibi))
    cache = kwargs.pop("kv_cache", None)
    descale = Descale(*(wide(kwargs.pop(f"{name}_descale", None)) for name in "qkv"))
    sinks, softcap, dropout_p, varlen = (kwargs.pop(name, default) for name, default in (("sinks", None), ("softcap", 0.0), ("dropout_p", 0.0), ("varlen", None)))
    q, k, v = (wide(t) for t in (inputs.q, inputs.k, inputs.v))
    assert q is not None and k is not None and v is not None
    table = None
    if cache is not None:
        k, v, mask, table = arguments.cached(cache, mask, 0)
        k, v = k.to(dtype), v.to(dtype)
    call = arguments.normalise(q, k, v, mask, inputs.q.shape[-1] ** -0.5, softcap, None, 0.0, varlen, None, True, "bhsd", table)
    call.sinks, call.dropout_p, call.rng = wide(sinks), dropout_p, rng
    call.descale = descale if any(t is not None for t in descale) else None
    return call


def _attention(backend: str, inputs: Inputs, return_lse: bool, append: bool = False) -> Any:
    k, v = (inputs.k, inputs.v) if append or "kv_cache" not in inputs.kwargs else (None, None)
    runtime._served.chosen = None  # a decision of the case before would do for `_served_by`
    return api.attention(inputs.q, k, v, inputs.mask, backend=backend, return_lse=return_lse, **inputs.kwargs)


def _rng_of(case: Case, device: str) -> Optional[Tensor]:
    """The (seed, offset) that `attention` will draw next from the generator seeded with the case's seed."""
    if not case.dropout_p:
        return None
    torch.manual_seed(case.seed)
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def _packed(t: Tensor, inputs: Inputs) -> Tensor:
    """A result of the definition, [1, H, T, ...], in the shape that `attention` returns."""
    return t[0].transpose(0, 1) if t.ndim == 4 and "varlen" in inputs.kwargs else t[0] if "varlen" in inputs.kwargs else t


def fraction(got: Tensor, exact: Tensor, plain: Tensor, unit: float, floor: float = 1e-3) -> float:
    """Largest error over the largest that the rule allows. Non-finite values must agree exactly. ``floor``: least size of the values
    that the rounding unit is taken of."""
    got, exact, plain = got.detach().double(), exact.detach().double(), plain.detach().double()
    if got.shape != exact.shape:
        raise ConformanceError(f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    odd = ~torch.isfinite(exact)
    if not torch.equal(got.isnan() & odd, exact.isnan() & odd) or not torch.equal(got[odd].nan_to_num(7.0), exact[odd].nan_to_num(7.0)):
        return float("inf")
    got, exact, plain = got[~odd], exact[~odd], plain[~odd]
    if exact.numel() == 0:
        return 0.0
    if not got.isfinite().all():
        return float("inf")
    allowed = 2 * (plain - exact).abs().nan_to_num(0.0).max() + unit * exact.abs().max().clamp_min(floor)
    return float((got - exact).abs().max() / allowed)


def _unit(dtype: torch.dtype) -> float:
    """One rounding unit. For fp64 the definition is no more exact than what it judges, so both may be a few units off."""
    return torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)


def _expected(inputs: Inputs, rng: Optional[Tensor]) -> tuple[Call, Tensor, Tensor, Call, Tensor, Tensor]:
    """(exact call, out, lse; call in the inputs' dtype, out, lse) by the definition in fp64 and in that dtype.

    fp8 is a format of operands, in which torch computes nothing. Its plain maths are those of a kernel all of whose products have fp8
    operands: fp32, with the weights in e4m3 where they meet v, and out in bf16.
    """
    from attnhub.backends.reference import maths

    exact = _call_of(inputs, torch.float64, rng)
    out, lse = maths.forward(exact, None, torch.float64, exact_nan=True)
    if inputs.q.dtype == torch.float8_e4m3fn:
        plain = _call_of(inputs, torch.float32, rng)
        plain_out, plain_lse = maths.forward(plain, None, torch.float32, exact_nan=True, rounded=_in_e4m3)
        plain_out = plain_out.to(torch.bfloat16)
    else:
        plain = _call_of(inputs, inputs.q.dtype, rng)
        plain_out, plain_lse = maths.forward(plain, None, inputs.q.dtype, exact_nan=True)
    assert lse is not None and plain_lse is not None
    return exact, out, lse, plain, plain_out, plain_lse


def _in_e4m3(weights: Tensor) -> Tensor:
    """Rounded to e4m3, the largest of a row being 256: the power of two below the format's largest number, 448."""
    unit = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny) / 256.0
    return (weights / unit).to(torch.float8_e4m3fn).to(weights.dtype) * unit


def _forward(backend: str, case: Case, device: str) -> dict[str, float]:
    inputs = case.build(device)
    rng = _rng_of(case, device)
    _, out, lse, _, plain_out, plain_lse = _expected(inputs, rng)
    dtype = inputs.q.dtype
    unit = _unit(out_dtype(dtype))
    zones = [zone.clone() for zone in inputs.red_zones]
    with torch.no_grad():
        torch.manual_seed(case.seed)
        got = _attention(backend, inputs, return_lse=False)
    if inputs.q.numel() and inputs.k.numel():
        _served_by(backend)
    if got.dtype != out_dtype(dtype):
        raise ConformanceError(f"out is {got.dtype}, and {out_dtype(dtype)} is needed for {dtype} inputs")
    errors = {"out": fraction(got, _packed(out, inputs), _packed(plain_out, inputs), unit)}
    if Feature.LSE in registry.get(backend).capability.features:
        with torch.no_grad():
            torch.manual_seed(case.seed)
            again, got_lse = _attention(backend, inputs, return_lse=True)
        errors["out beside lse"] = fraction(again, _packed(out, inputs), _packed(plain_out, inputs), unit)
        errors["lse"] = _lse_fraction(got_lse, _packed(lse, inputs), _packed(plain_lse, inputs), dtype)
    for before, after in zip(zones, inputs.red_zones):
        if not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
            raise ConformanceError("memory around the inputs was written")
    return errors


def _served_by(backend: str) -> None:
    decision = runtime.last_decision()
    if decision is None or decision.chosen != backend:
        raise ConformanceError(f"asked for {backend}, served by {decision.chosen if decision else None}")


def _lse_fraction(got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """`fraction` of lse, for inputs of ``dtype``."""
    unit = _LSE_UNIT.get(dtype)
    return fraction(got, exact, plain, _unit(dtype)) if unit is None else fraction(got, exact, exact, unit)


def _append(backend: str, case: Case, device: str) -> dict[str, float]:
    """New tokens in the call: attention over a cache that holds them, and that cache bit for bit, whoever writes there."""
    inputs = case.build(device)
    before, dtype = inputs.kwargs["kv_cache"], inputs.q.dtype
    after = _copied(before)
    q = _settle(after, inputs)
    kwargs = {name: value for name, value in inputs.kwargs.items() if name != "rotary"}
    kwargs["kv_cache"] = dataclasses.replace(after, cache_seqlens=after.cache_seqlens + case.new_tokens)
    _, out, lse, _, plain_out, plain_lse = _expected(dataclasses.replace(inputs, q=q, kwargs=kwargs), None)
    given = [_bits(t).clone() for t in (inputs.q, inputs.k, inputs.v)]
    errors = {}
    # Calls after the first of their shapes may go a shorter way.
    for label, with_lse in (("out", False), ("out again", False), ("out beside lse", True)):
        if with_lse and Feature.LSE not in registry.get(backend).capability.features:
            continue
        mine = _copied(before)
        with torch.no_grad():
            found = _attention(backend, dataclasses.replace(inputs, kwargs={**inputs.kwargs, "kv_cache": mine}), with_lse, append=True)
        _served_by(backend)
        for name in ("k_cache", "v_cache", "cache_seqlens"):
            wrong = int((_bits(getattr(mine, name)) != _bits(getattr(after, name))).sum())
            if wrong:
                raise ConformanceError(f"{name} differs in {wrong} bytes from one to which the new tokens were appended one by one")
        if not all(torch.equal(_bits(t), bits) for t, bits in zip((inputs.q, inputs.k, inputs.v), given)):
            raise ConformanceError("the call's own q, k or v was written")
        errors[label] = fraction(found[0] if with_lse else found, out, plain_out, _unit(out_dtype(dtype)))
        if with_lse:
            errors["lse"] = _lse_fraction(found[1], lse, plain_lse, dtype)
    return errors


def _settle(cache: KVCache, inputs: Inputs) -> Tensor:
    """Writes a case's new tokens into a cache, one by one, and gives the queries that attend to it afterwards."""
    q, k, v = inputs.q, inputs.k, inputs.v
    starts, rotary = cache.cache_seqlens.long()[:, None], inputs.kwargs.get("rotary")
    positions = starts + torch.arange(k.shape[2], device=k.device)
    if rotary is not None:
        of_queries = starts.expand(-1, q.shape[2]) if rotary.one_position else starts + torch.arange(q.shape[2], device=q.device)
        q, k = (apply_rotary(t, rotary.cos, rotary.sin, at, rotary.interleaved) for t, at in ((q, of_queries), (k, positions)))
    table, (keys, values) = cache.block_table, cache.heads_first()
    for b, row in enumerate(positions.tolist()):
        for i, position in enumerate(row):
            page, slot = (b, position) if table is None else (int(table[b, position // keys.shape[2]]), position % keys.shape[2])
            keys[page, :, slot], values[page, :, slot] = k[b, :, i], v[b, :, i]
    return q


def _copied(cache: KVCache) -> KVCache:
    """With all that lies between and around its rows."""
    keys, values = (t.new_empty(0).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride()) for t in (cache.k_cache, cache.v_cache))
    return dataclasses.replace(cache, k_cache=keys, v_cache=values, cache_seqlens=cache.cache_seqlens.clone())


def _bits(t: Tensor) -> Tensor:
    """Every byte of a tensor's memory."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def _backward(backend: str, case: Case, device: str) -> dict[str, float]:
    from attnhub.backends.reference import maths

    inputs = case.build(device)
    rng = _rng_of(case, device)
    exact, out, lse, plain, plain_out, plain_lse = _expected(inputs, rng)
    dtype = inputs.q.dtype
    # One unit for the gradient, and one for the stored lse that it is made from: P = exp(s - lse) carries lse's absolute rounding
    # as a relative one.
    # Rows that a bias of the smallest finite number masks are left out: their lse would allow anything.
    sizes = lse.abs()[lse.abs() < 1e6]
    largest = float(sizes.max()) if sizes.numel() else 0.0
    unit = _unit(dtype) + torch.finfo(lse_dtype(dtype)).eps * max(1.0, largest)
    random_ = torch.Generator().manual_seed(case.seed + 1)
    grad_out = torch.randn(out.shape, generator=random_, dtype=torch.float64).to(dtype).to(device)
    grad_lse = torch.randn(lse.shape, generator=random_, dtype=torch.float64).to(device)
    grad_lse = torch.where(lse == float("-inf"), torch.zeros_like(grad_lse), grad_lse).to(torch.float32)
    needs = Needs(True, True, True, "bias" in inputs.leaves, "sinks" in inputs.leaves)
    leaves = {name: inputs.leaves[name] for name in ("q", "k", "v", "bias", "sinks") if name in inputs.leaves}
    packed_grad = _packed(grad_out, inputs)
    if packed_grad.ndim == 4:
        packed_grad = packed_grad.transpose(1, 2).contiguous().transpose(1, 2)  # gradients come in any strides
    errors = {}
    for lse_too, label in ((True, ""), (False, " of out alone")):
        seeds_lse = grad_lse if lse_too else None
        want = maths.backward(exact, grad_out.double(), None if seeds_lse is None else seeds_lse.double(), out, lse, needs, None, torch.float64)
        naive = maths.backward(plain, grad_out, None if seeds_lse is None else seeds_lse.to(plain_lse.dtype), plain_out, plain_lse, needs, None, dtype)
        torch.manual_seed(case.seed)
        got = _attention(backend, inputs, return_lse=lse_too)
        targets, seeds = ([*got], [packed_grad, _packed(seeds_lse, inputs).to(got[1].dtype)]) if seeds_lse is not None else ([got], [packed_grad])
        for name, grad in zip(leaves, torch.autograd.grad(targets, list(leaves.values()), seeds)):
            right, rough = getattr(want, name), getattr(naive, name)
            if name in ("q", "k", "v"):
                right, rough = _packed(right, inputs), _packed(rough, inputs)
            # Gradients are differences of numbers of up to 3 (inputs have unit variance), also where they cancel to 0.
            errors[f"d{name}{label}"] = fraction(grad, right, rough, unit, floor=3.0)
    return errors


def _repeat(backend: str, case: Case, device: str, times: int = 3) -> dict[str, float]:
    inputs = case.build(device)
    first: Optional[list[Tensor]] = None
    for _ in range(times):
        torch.manual_seed(case.seed)
        with torch.set_grad_enabled(case.differentiable):
            out, lse = _attention(backend, inputs, return_lse=True)
        found = [out.detach(), lse.detach()]
        if case.differentiable:
            found.extend(torch.autograd.grad(out.float().sum() + lse.clamp_min(-1e4).sum(), [inputs.leaves[n] for n in ("q", "k", "v")]))
        if first is not None and not all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, found)):
            raise ConformanceError("two runs of one call differ in their bits")
        first = first or found
    return {}
