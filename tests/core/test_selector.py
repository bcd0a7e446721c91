"""The choice is pure: made-up devices, made-up backends, no hardware."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import pytest

from attnhub.backend import Backend
from attnhub.backends.cuda import hopper
from attnhub.capability import Capability, DeviceRange
from attnhub.decision import Decision, Policy
from attnhub.problem import DeviceInfo, Feature, Problem, few_tiles
from attnhub.reasons import Accepted, Code, Reason, Rejected
from attnhub.registry import BUILTIN
from attnhub.selector import Candidate, select, select_backward

H200 = DeviceInfo("cuda", "nvidia", (9, 0), "H200")
A100 = DeviceInfo("cuda", "nvidia", (8, 0), "A100")
T4 = DeviceInfo("cuda", "nvidia", (7, 5), "T4")
MI300 = DeviceInfo("cuda", "amd", (9, 4, 2), "MI300")
CPU512 = DeviceInfo("cpu", "x86_64", (), "Xeon", frozenset({"avx2", "fma", "f16c", "avx512"}))
CPU2 = DeviceInfo("cpu", "x86_64", (), "Ryzen", frozenset({"avx2", "fma", "f16c"}))
META = DeviceInfo("meta")

HALVES = frozenset({"float16", "bfloat16"})
ALL = HALVES | {"float32", "float64"}
EVERYTHING = frozenset(Feature)


class Made(Backend):
    def __init__(self, name: str, cost: float, *devices: DeviceRange, automatic: bool = True, isa: str = "", **declared: Any) -> None:
        self.name, self._cost, self._isa, self.automatic = name, cost, isa, automatic
        self.capability = Capability(devices=devices, **declared)

    def cost(self, problem: Problem) -> float:
        return self._cost

    def check(self, problem: Problem) -> tuple[Reason, ...]:
        missing = self._isa and self._isa not in problem.device.isa
        return (Reason(Code.ARCH, f"it needs {self._isa}"),) if missing else ()


def _candidates(**probes: tuple[Reason, ...]) -> dict[str, Candidate]:
    plain = frozenset({Feature.GQA, Feature.CAUSAL_BOTTOM_RIGHT, Feature.LSE})
    made = [
        Made("torch", 1.0, DeviceRange("cpu", dtypes=ALL), DeviceRange("cuda", dtypes=ALL), features=EVERYTHING, backward_features=EVERYTHING),
        Made("hopper", 0.5, DeviceRange("cuda", "nvidia", (9, 0), (9, 0), HALVES), features=plain, head_dims=(64, 128, 64)),
        Made("ampere", 0.8, DeviceRange("cuda", "nvidia", (8, 0), None, HALVES), features=plain | {Feature.WINDOW}, backward_features=plain, align_bytes=16),
        Made("turing", 0.9, DeviceRange("cuda", "nvidia", (7, 5), None, frozenset({"float16"})), features=plain, mixed_dtypes=True),
        Made("rocm", 0.7, DeviceRange("cuda", "amd", (9, 0, 10), None, HALVES), features=plain),
        Made("simd", 0.6, DeviceRange("cpu", dtypes=HALVES | {"float32"}), features=plain | {Feature.PAGED}, isa="avx512", page_sizes=(16,)),
        Made("oracle", 100.0, DeviceRange("cpu", dtypes=ALL), DeviceRange("cuda", dtypes=ALL), automatic=False, features=EVERYTHING, backward_features=EVERYTHING),
    ]  # fmt: skip
    return {m.name: Candidate(m, probes.get(m.name, ())) for m in made}


def _problem(device: DeviceInfo, dtype: str = "float16", *features: Feature, **changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "device": device, "q_dtype": dtype, "kv_dtype": dtype, "head_dim": 64, "v_head_dim": 64, "q_heads": 4, "kv_heads": 4,
        "batch": 2, "seqlen_q": 128, "seqlen_k": 128, "features": frozenset(features),
    }  # fmt: skip
    fields.update(changes)
    return Problem(**fields)


def _codes(decision: Decision, name: str) -> list[Code]:
    verdict = decision.verdicts[name]
    return [r.code for r in verdict.reasons] if isinstance(verdict, Rejected) else []


@pytest.mark.parametrize(
    ("device", "dtype", "order"),
    [
        (H200, "float16", ("hopper", "ampere", "turing", "torch")),
        (H200, "bfloat16", ("hopper", "ampere", "torch")),
        (A100, "float16", ("ampere", "turing", "torch")),
        (T4, "float16", ("turing", "torch")),
        (T4, "bfloat16", ("torch",)),
        (MI300, "bfloat16", ("rocm", "torch")),
        (CPU512, "float32", ("simd", "torch")),
        (CPU2, "float32", ("torch",)),
        (CPU512, "float64", ("torch",)),
        (META, "float32", ()),
    ],
    ids=lambda value: value.name or value.type if isinstance(value, DeviceInfo) else None,
)
def test_auto_ranks_by_cost_whoever_accepts(device: DeviceInfo, dtype: str, order: tuple[str, ...]) -> None:
    decision = select(_problem(device, dtype), Policy(), _candidates())
    assert decision.order == order
    assert decision.chosen == (order[0] if order else None)
    assert set(decision.verdicts) == set(_candidates())
    assert "oracle" not in order and Code.NAME_ONLY in _codes(decision, "oracle")


@pytest.mark.parametrize(
    ("features", "chosen"),
    [((), "sdpa"), ((Feature.CAUSAL_BOTTOM_RIGHT, Feature.GQA, Feature.LSE), "sdpa"), ((Feature.SEQLENS,), "cpu"), ((Feature.CAUSAL_TOP_LEFT, Feature.BIAS), "cpu"),
     ((Feature.WINDOW,), "cpu"), ((Feature.PAGED, Feature.SEQLENS), "cpu")],
    ids=str,
)  # fmt: skip
def test_tiny_calls_are_torchs_where_it_needs_no_mask_that_is_made_first(features: tuple[Feature, ...], chosen: str) -> None:
    """A dense mask costs more than all of the rest, and decode steps with lengths are tiny."""
    epyc = DeviceInfo("cpu", "x86_64", (), "AMD EPYC", frozenset({"avx2", "fma", "f16c", "avx512"}))
    candidates = {name: Candidate(importlib.import_module(f"attnhub.backends.{name}").backend) for name in ("cpu", "sdpa", "reference")}
    for length in (1, 16):
        problem = _problem(epyc, "float32", *features, batch=1, seqlen_q=length, seqlen_k=16, page_size=16 if Feature.PAGED in features else 0)
        assert select(problem, Policy(), candidates).chosen == chosen


def test_every_reason_is_given_at_once() -> None:
    problem = _problem(A100, "float32", Feature.WINDOW, Feature.SOFTCAP, head_dim=96, v_head_dim=1000, kv_dtype="float64", align_bytes=2)
    decision = select(problem, Policy(), _candidates())
    assert _codes(decision, "hopper") == [Code.ARCH, Code.MIXED_DTYPE, Code.HEAD_DIM, Code.HEAD_DIM, Code.NO_SOFTCAP, Code.NO_WINDOW]
    assert _codes(decision, "ampere") == [Code.DTYPE, Code.DTYPE, Code.MIXED_DTYPE, Code.HEAD_DIM, Code.ALIGNMENT, Code.NO_SOFTCAP]
    assert _codes(decision, "rocm")[0] is Code.DEVICE_TYPE
    for verdict in decision.verdicts.values():
        assert isinstance(verdict, Accepted) or all(reason.detail for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("device", "changes", "name", "code"),
    [
        (H200, {"head_dim": 96, "v_head_dim": 96}, "hopper", Code.HEAD_DIM),
        (H200, {"head_dim": 256, "v_head_dim": 64}, "hopper", Code.HEAD_DIM),
        (H200, {"align_bytes": 8}, "ampere", Code.ALIGNMENT),
        (H200, {"kv_dtype": "bfloat16"}, "ampere", Code.MIXED_DTYPE),
        (CPU512, {"page_size": 8, "features": frozenset({Feature.PAGED})}, "simd", Code.PAGE_SIZE),
        (CPU2, {}, "simd", Code.ARCH),
        (CPU512, {}, "hopper", Code.DEVICE_TYPE),
        (MI300, {}, "ampere", Code.DEVICE_TYPE),
        (H200, {}, "rocm", Code.DEVICE_TYPE),
        (DeviceInfo("cuda", "nvidia", (10, 0)), {}, "hopper", Code.ARCH),
        (T4, {}, "ampere", Code.ARCH),
        (DeviceInfo("cuda", "nvidia"), {}, "ampere", Code.ARCH),
    ],
)
def test_each_limit_has_its_code(device: DeviceInfo, changes: dict[str, Any], name: str, code: Code) -> None:
    decision = select(_problem(device, **changes), Policy((name,), "argument"), _candidates())
    assert set(_codes(decision, name)) == {code}


@pytest.mark.parametrize("feature", sorted(EVERYTHING), ids=str)
def test_the_world_is_closed(feature: Feature) -> None:
    """A feature that is not listed is a rejection with its own code; gradients are asked of the backward alone."""
    bare = {"bare": Candidate(Made("bare", 1.0, DeviceRange("cpu", dtypes=ALL), features=frozenset(), backward_features=frozenset()))}
    problem = _problem(CPU2, "float32", feature)
    backward_only = feature in (Feature.BIAS_GRAD, Feature.SINKS_GRAD, Feature.LSE_GRAD)
    assert _codes(select(problem, Policy(), bare), "bare") == ([] if backward_only else [Code(f"no_{feature.value}")])
    _, verdicts = select_backward(problem, "bare", bare)
    assert isinstance(verdicts["bare"], Accepted if feature is Feature.LSE else Rejected)


def test_mixed_dtypes_where_declared() -> None:
    decision = select(_problem(T4, kv_dtype="bfloat16"), Policy(), _candidates())
    assert _codes(decision, "turing") == [Code.DTYPE], "mixed is declared, bfloat16 is not"
    listed = {"both": Candidate(Made("both", 1.0, DeviceRange("cuda", dtypes=HALVES), features=frozenset(), mixed_dtypes=True))}
    assert select(_problem(T4, kv_dtype="bfloat16"), Policy(), listed).chosen == "both"


def test_open_architecture_range_and_several_ranges() -> None:
    future = DeviceInfo("cuda", "nvidia", (12, 1))
    assert select(_problem(future), Policy(), _candidates()).order == ("ampere", "turing", "torch")
    gap = Made("gap", 0.1, DeviceRange("cuda", "nvidia", (7, 0), (7, 9), HALVES), DeviceRange("cuda", "nvidia", (9, 0), None, HALVES), features=frozenset())
    chosen = [select(_problem(d), Policy(), {"gap": Candidate(gap)}).chosen for d in (T4, A100, H200)]
    assert chosen == ["gap", None, "gap"]


def test_equal_costs_are_ranked_by_name() -> None:
    where = DeviceRange("cpu", dtypes=ALL)
    twins = {name: Candidate(Made(name, 1.0, where, features=frozenset())) for name in ("zeta", "alpha", "mid")}
    assert select(_problem(CPU2), Policy(), twins).order == ("alpha", "mid", "zeta")


# -- names -----------------------------------------------------------------------------------------------------------------


def test_one_name_is_that_backend_or_nothing() -> None:
    assert select(_problem(H200), Policy(("turing",), "environment"), _candidates()).order == ("turing",)
    decision = select(_problem(CPU2), Policy(("turing",), "environment"), _candidates())
    assert decision.order == () and decision.chosen is None
    assert "ATTNHUB_BACKEND" in decision.why and "turing" in decision.why


def test_a_list_is_in_the_order_given_not_by_cost() -> None:
    decision = select(_problem(H200), Policy(("torch", "rocm", "hopper"), "argument"), _candidates())
    assert decision.order == ("torch", "hopper")
    assert select(_problem(H200), Policy(("rocm", "turing", "torch"), "argument"), _candidates()).chosen == "turing"


def test_auto_at_the_end_adds_the_rest_by_cost() -> None:
    decision = select(_problem(H200), Policy(("turing", "auto"), "context"), _candidates())
    assert decision.order == ("turing", "hopper", "ampere", "torch")
    rejected_first = select(_problem(H200), Policy(("rocm", "auto"), "context"), _candidates())
    assert rejected_first.order == ("hopper", "ampere", "turing", "torch")
    assert "auto" in rejected_first.why and "attnhub.use" in rejected_first.why


def test_a_repeated_name_counts_once() -> None:
    assert select(_problem(H200), Policy(("torch", "torch", "auto"), "argument"), _candidates()).order == ("torch", "hopper", "ampere", "turing")


def test_name_only_backends_are_chosen_by_name() -> None:
    assert select(_problem(CPU2), Policy(("oracle",), "argument"), _candidates()).order == ("oracle",)
    assert select(_problem(CPU2), Policy(("oracle", "auto"), "argument"), _candidates()).order == ("oracle", "torch")


def test_unknown_names_are_verdicts() -> None:
    decision = select(_problem(CPU2), Policy(("nosuch",), "argument"), _candidates())
    assert decision.order == () and _codes(decision, "nosuch") == [Code.UNKNOWN_NAME]
    assert "torch" in decision.verdicts["nosuch"].reasons[0].detail  # type: ignore[union-attr]
    assert select(_problem(CPU2), Policy(("nosuch", "torch"), "argument"), _candidates()).order == ("torch",)


def test_disabled_even_by_name() -> None:
    off = frozenset({"hopper", "torch"})
    assert select(_problem(H200), Policy(disabled=off), _candidates()).order == ("ampere", "turing")
    decision = select(_problem(H200), Policy(("hopper",), "argument", off), _candidates())
    assert decision.order == () and _codes(decision, "hopper") == [Code.DISABLED]


def test_a_failed_probe_stands_before_the_other_reasons() -> None:
    broken = (Reason(Code.BROKEN, "import raised", "reinstall"),)
    decision = select(_problem(CPU2), Policy(), _candidates(hopper=broken, torch=broken))
    assert _codes(decision, "hopper") == [Code.BROKEN, Code.DEVICE_TYPE]
    assert decision.order == () and "every installed backend" in decision.why


def test_a_plugin_without_backend_keeps_its_reason() -> None:
    candidates = {**_candidates(), "plugin": Candidate(None, (Reason(Code.PLUGIN_ERROR, "raised"),))}
    decision = select(_problem(CPU2), Policy(("plugin",), "argument"), candidates)
    assert decision.order == () and _codes(decision, "plugin") == [Code.PLUGIN_ERROR]


# -- backward --------------------------------------------------------------------------------------------------------------


def _training(device: DeviceInfo, dtype: str = "float16", *features: Feature, **changes: Any) -> Problem:
    return _problem(device, dtype, Feature.LSE, *features, need_backward=True, **changes)


def test_the_forwards_backend_runs_its_own_backward() -> None:
    decision = select(_training(A100), Policy(), _candidates())
    assert (decision.chosen, decision.backward) == ("ampere", "ampere")


def test_another_backward_follows_a_forward_without_one() -> None:
    decision = select(_training(H200), Policy(), _candidates())
    assert (decision.chosen, decision.backward) == ("hopper", "ampere"), "the cheapest automatic one"
    assert [r.code for r in decision.backward_verdicts["hopper"].reasons] == [Code.NO_BACKWARD]  # type: ignore[union-attr]


def test_a_forward_feature_that_the_backward_lacks() -> None:
    decision = select(_training(A100, "float16", Feature.WINDOW), Policy(), _candidates())
    assert (decision.chosen, decision.backward) == ("ampere", "torch")


def test_gradients_of_bias_sinks_and_lse_are_asked_of_the_backward_only() -> None:
    for feature in (Feature.BIAS_GRAD, Feature.SINKS_GRAD, Feature.LSE_GRAD):
        decision = select(_training(A100, "float16", feature), Policy(), _candidates())
        assert (decision.chosen, decision.backward) == ("ampere", "torch")


def test_name_only_backward_only_behind_its_own_forward() -> None:
    named = select(_training(CPU2, "float32"), Policy(("oracle",), "argument"), _candidates())
    assert (named.chosen, named.backward) == ("oracle", "oracle")
    only_oracle = Policy(disabled=frozenset({"torch"}))
    decision = select(_training(CPU512, "float32"), only_oracle, _candidates())
    assert decision.chosen is None and decision.backward is None and "backward" in decision.why


def test_a_list_goes_on_to_the_next_name_where_nobody_can_run_the_backward() -> None:
    """simd serves the forward and nobody its backward; oracle, named next, serves both."""
    policy = Policy(("simd", "oracle"), "argument", frozenset({"torch"}))
    decision = select(_training(CPU512, "float32"), policy, _candidates())
    assert (decision.chosen, decision.backward) == ("oracle", "oracle")


def test_inference_asks_for_no_backward() -> None:
    decision = select(_problem(H200), Policy(disabled=frozenset({"torch", "ampere", "turing"})), _candidates())
    assert decision.chosen == "hopper" and decision.backward is None and not decision.backward_verdicts


# -- the shipped declarations ------------------------------------------------------------------------------------------------


def _shipped() -> dict[str, Candidate]:
    """Every built-in backend as if its dependencies were here."""
    found = {}
    for name, target in BUILTIN.items():
        module, _, attribute = target.partition(":")
        found[name] = Candidate(getattr(importlib.import_module(module), attribute))
    return found


@pytest.mark.parametrize("device", [H200, A100, T4, MI300, CPU512, CPU2, META], ids=lambda d: d.name or d.type)
@pytest.mark.parametrize("dtype", sorted(ALL))
def test_shipped_backends_answer_for_every_device(device: DeviceInfo, dtype: str) -> None:
    decision = select(_problem(device, dtype), Policy(), _shipped())
    assert set(decision.verdicts) == set(BUILTIN)
    if device is META:
        assert decision.chosen is None
    else:
        assert isinstance(decision.verdicts["sdpa"], Accepted), "torch's own attention is always there"
    for name, kind in (("cuda", "nvidia"), ("cpu", "x86_64"), ("onnx", "x86_64")):
        if device.vendor != kind:
            assert _codes(decision, name), f"{name} accepts {device}"
    json.dumps(decision.to_json())


@pytest.mark.parametrize(
    ("sizes", "few"),
    [
        ((1, 66, 128, 1024), True), ((1, 66, 128, 1023), False), ((1, 67, 128, 1024), False), ((2, 33, 128, 1024), True), ((2, 34, 128, 1024), False),
        ((1, 33, 256, 2048), True), ((1, 34, 129, 2048), False), ((1, 66, 1, 8), True),
    ],
)  # fmt: skip
def test_few_tiles_are_the_triton_backends(sizes: tuple[int, ...], few: bool) -> None:
    """Which divides the keys among them; the kernel for Hopper stands back."""
    problem = _problem(H200, **dict(zip(("batch", "q_heads", "seqlen_q", "seqlen_k"), sizes)))
    assert few_tiles(problem) is few
    if problem.seqlen_q > 16:
        cuda, triton, torch = (_shipped()[name].backend.cost(problem) for name in ("cuda", "triton", "sdpa"))  # type: ignore[union-attr]
        assert (triton < torch) is few and (triton < cuda) is few and (cuda == hopper._COST_FEW_TILES) is few


@pytest.mark.parametrize(
    ("sizes", "head_dim", "chosen"),
    [
        ((1, 16, 1, 128), 64, "cuda"), ((64, 16, 1, 128), 64, "cuda"), ((67, 16, 1, 128), 64, "sdpa"), ((67, 16, 1, 512), 64, "cuda"),
        ((1, 16, 2, 128), 64, "triton"), ((256, 32, 16, 512), 128, "triton"), ((1, 16, 2, 1024), 64, "cuda"),
        ((16, 12, 64, 64), 64, "cuda"), ((1, 12, 128, 128), 64, "cuda"), ((1, 12, 64, 64), 128, "cuda"), ((256, 8, 64, 64), 32, "sdpa"),
        ((1, 12, 16, 16), 64, "sdpa"), ((1, 12, 16, 32), 64, "sdpa"), ((1, 12, 16, 64), 64, "triton"),
    ],
)  # fmt: skip
def test_short_problems_go_to_who_launches_fastest(sizes: tuple[int, ...], head_dim: int, chosen: str) -> None:
    """Of short sequences before themselves a backward pass may follow, of which torch's is ahead."""
    shape = {**dict(zip(("batch", "q_heads", "seqlen_q", "seqlen_k"), sizes)), "kv_heads": sizes[1], "head_dim": head_dim, "v_head_dim": head_dim}
    problem = _problem(H200, **shape)

    def cheapest(problem: Problem) -> str:
        costs = {name: _shipped()[name].backend.cost(problem) for name in ("cuda", "triton", "sdpa")}  # type: ignore[union-attr]
        return min(costs, key=costs.__getitem__)

    assert cheapest(problem) == chosen
    assert chosen != "triton" or cheapest(dataclasses.replace(problem, features=frozenset({Feature.BIAS}))) != "triton"
