"""Devices, graphs, compilation, checkpointing, repeats, broken installations (cases 23 to 32)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import attnhub
from attnhub import Causal, Problem
from attnhub.decision import Policy
from attnhub.problem import DeviceInfo, Feature
from attnhub.reasons import Code, Rejected
from attnhub.registry import registry
from attnhub.selector import Candidate, select


@pytest.mark.gpu
@pytest.mark.needs()
def test_23_tensors_on_another_device_than_the_current_one(on: Any) -> None:
    if on.device != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.cuda.set_device(0)
    q = torch.randn(2, 2, 40, 64, device="cuda:1").to(on.dtype)
    out = on.attention(q, q, q, Causal())
    assert out.device == q.device and torch.cuda.current_device() == 0
    on.close(out.cpu(), attnhub.attention(*(q.cpu().double(),) * 3, Causal(), backend="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("sq", [1, 40])
@pytest.mark.needs("causal_bottom_right")
def test_24_replay_of_a_captured_graph_reads_new_inputs(on: Any, sq: int) -> None:
    if on.device != "cuda" or on.name == "reference":
        pytest.skip("graphs are captured on CUDA devices, and not by the oracle, which looks at values on the host")
    q, k, v = on.randn(2, 4, sq, 64), on.randn(2, 4, 130, 64), on.randn(2, 4, 130, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            on.attention(q, k, v, Causal())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = on.attention(q, k, v, Causal())
    for _ in range(3):
        for t in (q, k, v):
            t.normal_()
        out.fill_(float("nan"))
        graph.replay()
        on.close(out, on.exact(q, k, v, Causal()))


def _strides(t: Tensor) -> list[int]:
    """Of the dimensions that have more than one element."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("sizes", [(4, 4, 16, 16), (4, 2, 16, 8), (1, 1, 1, 1)], ids=str)
@pytest.mark.needs("gqa", "dv_differs")
def test_25_fake_and_real_strides(on: Any, sizes: tuple[int, int, int, int], layout: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    heads, kv_heads, dim, v_dim = sizes
    shapes = [(2, heads, 5, dim), (2, kv_heads, 9, dim), (2, kv_heads, 9, v_dim)]
    real = [on.randn(*s) if layout == "bhsd" else on.randn(s[0], s[2], s[1], s[3]) for s in shapes]
    out = on.attention(*real, layout=layout)
    with FakeTensorMode() as mode:
        fake = attnhub.attention(*(mode.from_tensor(t) for t in real), backend=on.name, layout=layout)
    assert (fake.shape, fake.dtype, fake.device) == (out.shape, out.dtype, out.device)
    assert _strides(fake) == _strides(out)
    leaves = [t.clone().requires_grad_() for t in real]
    trained = on.attention(*leaves, layout=layout)
    assert _strides(trained) == _strides(out), "training and inference give one layout"


@pytest.mark.needs("causal_top_left")
def test_26_symbolic_is_causal(on: Any) -> None:
    """``is_causal=q.shape[2] > 1`` is a SymBool under dynamic shapes."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def call(q: Tensor, k: Tensor) -> Tensor:
        return attnhub.scaled_dot_product_attention(q, k, k, is_causal=q.shape[2] > 1)

    k = on.randn(1, 2, 12, 16)
    with attnhub.use(on.name):
        for sq in (7, 5, 1, 12):
            q = on.randn(1, 2, sq, 16)
            on.close(call(q, k), on.exact(q, k, k, Causal("top_left") if sq > 1 else None))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_27_checkpointing_recomputes_what_ran(reentrant: bool, dropout_p: float) -> None:
    """Same gradients with and without a checkpoint, dropout included; without reentry also the same backend both times."""
    seen: list[str] = []

    def block(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out = attnhub.attention(q, k, v, Causal(), dropout_p=dropout_p)
        seen.append(attnhub.last_decision().chosen)  # type: ignore[union-attr, arg-type]
        return out

    leaves = [torch.randn(2, 2, 9, 16, requires_grad=True) for _ in range(3)]
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(11)
        with set_checkpoint_early_stop(False):  # else the recomputation ends inside attention, before it is seen
            out = checkpoint(block, *leaves, use_reentrant=reentrant) if wrapped else block(*leaves)
        grads.append(torch.autograd.grad(out.square().sum(), leaves) if not (wrapped and reentrant) else _backward(out, leaves))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert len(seen) == 3
    if not reentrant:
        assert len(set(seen)) == 1


def _backward(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Reentrant checkpoints work with ``backward()`` only."""
    out.square().sum().backward()
    found = tuple(t.grad for t in leaves if t.grad is not None)
    for t in leaves:
        t.grad = None
    return found


def test_27_a_choice_inside_the_block_holds_in_the_recomputation() -> None:
    seen: list[str] = []

    def block(q: Tensor) -> Any:
        with attnhub.use("reference"):
            out = attnhub.attention(q, q, q, Causal())
        seen.append(attnhub.last_decision().chosen)  # type: ignore[union-attr, arg-type]
        return out

    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    with set_checkpoint_early_stop(False):
        checkpoint(block, q, use_reentrant=False).sum().backward()
    assert seen == ["reference", "reference"]


def test_27_a_choice_around_the_forward_holds_in_its_backward() -> None:
    """The backward belongs to the forward that ran, whatever the policy says by then."""
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    with attnhub.use("reference"):
        out = attnhub.attention(q, q, q, Causal(), softcap=3.0)
    with attnhub.use("nosuch"):
        out.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("sq", [1, 40])
@pytest.mark.needs("deterministic", "causal_bottom_right", "gqa")
def test_28_bitwise_equal_repeats(on: Any, sq: int) -> None:
    q, k, v = on.randn(2, 4, sq, 32), on.randn(2, 2, 150, 32), on.randn(2, 2, 150, 32)
    first = on.attention(q, k, v, Causal())
    for _ in range(10 if on.slow or on.name == "reference" else 250):
        assert torch.equal(on.attention(q, k, v, Causal()), first)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    grads = None
    for _ in range(2 if on.slow or on.name == "reference" else 25):
        found = torch.autograd.grad(on.attention(*leaves, Causal()).float().square().sum(), leaves)
        assert grads is None or all(torch.equal(a, b) for a, b in zip(grads, found))
        grads = found


def test_29_the_choice_is_the_same_on_every_rank() -> None:
    """It depends on the problem and the policy: not on the order of discovery, on what ran before, or on the process."""
    candidates = registry.candidates()
    for device in (DeviceInfo("cuda", "nvidia", (9, 0)), DeviceInfo("cuda", "amd", (9, 4, 2)), DeviceInfo("cpu", "x86_64", (), "", frozenset({"avx2"}))):
        for features in (frozenset(), frozenset({Feature.CAUSAL_BOTTOM_RIGHT, Feature.LSE, Feature.GQA})):
            problem = Problem(device, "bfloat16", "bfloat16", 128, 128, 8, 8, 2, 1024, 1024, features, need_backward=Feature.LSE in features)
            everywhere = {name: Candidate(c.backend) for name, c in candidates.items()}
            turned = dict(reversed(everywhere.items()))
            a, b = select(problem, Policy(), everywhere), select(problem, Policy(), turned)
            assert (a.order, a.backward, a.why) == (b.order, b.backward, b.why)
    q = torch.zeros(2, 4, 33, 16)
    told = attnhub.explain(q, q, q, Causal())
    code = "import json, torch, attnhub; q = torch.zeros(2, 4, 33, 16); print(json.dumps(attnhub.explain(q, q, q, attnhub.Causal()).to_json()))"
    program = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["order"] == list(told.order)


@pytest.mark.parametrize("arch", [(3, 5), (6, 1), (7, 0)], ids=str)
def test_30_an_architecture_without_kernels_is_a_reason(arch: tuple[int, ...]) -> None:
    """Kernels for newer devices refuse an old one by name of its architecture; torch's attention still serves it."""
    candidates = {name: Candidate(c.backend) for name, c in registry.candidates().items()}
    problem = Problem(DeviceInfo("cuda", "nvidia", arch, "old"), "float16", "float16", 64, 64, 2, 2, 2, 64, 64)
    decision = select(problem, Policy(), candidates)
    assert decision.chosen == "sdpa"
    for name in ("cuda", "triton"):
        verdict = decision.verdicts[name]
        assert isinstance(verdict, Rejected) and Code.ARCH in [r.code for r in verdict.reasons]
        assert ".".join(map(str, arch)) in str(verdict.reasons[0])


def test_31_importable_but_broken_libraries(tmp_path: pathlib.Path) -> None:
    """Each is a reason of its backend with the error in it; everything else serves."""
    for package, source in {
        "triton": "raise RuntimeError('driver is too old')",
        "cupy": "raise OSError('libcudart.so.13: cannot open shared object file')",
        "onnxruntime": "import a_module_that_is_not_there",
        "onnx": "raise AttributeError('module onnx has no attribute')",
    }.items():
        (tmp_path / f"{package}.py").write_text(source)
    program = f"""
import sys; sys.path[:] = {[str(tmp_path), *sys.path]!r}
import json, torch, attnhub
from attnhub.registry import registry
q = torch.randn(1, 2, 4, 8)
attnhub.attention(q, q, q)
told = {{name: [r.to_json() for r in c.probe] for name, c in registry.candidates().items()}}
print(json.dumps({{"served": attnhub.last_decision().chosen, "probes": told}}))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.strip().splitlines()[-1])
    assert told["served"] in ("cpu", "sdpa")
    assert told["probes"]["sdpa"] == told["probes"]["reference"] == []
    for name, words in (("triton", "driver is too old"), ("onnx", "has no attribute"), ("cuda", "")):
        reasons = told["probes"][name]
        assert reasons and words in json.dumps(reasons), (name, reasons)
    assert {r["code"] for r in told["probes"]["triton"]} == {"broken"}
    assert "broken" in {r["code"] for r in told["probes"]["onnx"]}


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 192, 256, 512])
@pytest.mark.needs("causal_bottom_right")
def test_32_large_tiles_fit_or_are_refused(on: Any, dim: int) -> None:
    """Too little shared memory is a reason before the launch, never a failed launch."""
    if on.device != "cuda":
        pytest.skip("shared memory is a GPU's")
    q = on.randn(1, 2, 70, dim)
    try:
        out = on.attention(q, q, q, Causal())
    except attnhub.NoBackendError as error:
        codes = {r.code for r in error.decision.verdicts[on.name].reasons}  # type: ignore[union-attr]
        assert codes & {Code.HEAD_DIM, Code.OUT_OF_RESOURCES, Code.DTYPE}
        return
    on.close(out, on.exact(q, q, q, Causal()))


def test_32_out_of_resources_is_passed_over(register: Any) -> None:
    """The same on any machine: prepare says so, and the next backend serves."""
    from attnhub.backend import Backend, Plan, PrepareError
    from attnhub.capability import Capability, DeviceRange

    class Hungry(Backend):
        name = "hungry"
        capability = Capability((DeviceRange("cpu", dtypes=frozenset({"float32"})),), frozenset())

        def cost(self, problem: Problem) -> float:
            return 1e-6

        def prepare(self, problem: Problem) -> Plan:
            raise PrepareError(attnhub.Reason(Code.OUT_OF_RESOURCES, "needs 300 KiB of shared memory, the device has 99"))

    register(Hungry())
    q = torch.randn(1, 2, 9, 16)
    attnhub.attention(q, q, q)
    decision = attnhub.last_decision()
    assert decision is not None and decision.chosen != "hungry"
    assert [r.code for r in decision.verdicts["hungry"].reasons] == [Code.OUT_OF_RESOURCES]  # type: ignore[union-attr]
    assert dataclasses.asdict(decision.problem)["head_dim"] == 16
