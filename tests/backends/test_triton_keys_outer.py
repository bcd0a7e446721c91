"""The kernel behind the peer "triton v1": interpreted against the definition in fp64, and compiled for a GPU that is not here."""

from __future__ import annotations

import pathlib

import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_interpreter import INTERPRETED, compiled, interpreted, run_interpreted

from attnhub.bench import keys_outer_peer, peers
from attnhub.bench.cases import Case


@compiled
def test_interpreted() -> None:
    """The tests below that are marked `interpreted`, in their own process."""
    run_interpreted(pathlib.Path(__file__).resolve())


@interpreted
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("lengths", "causal"), [((33, 33), True), ((48, 48), True), ((20, 50), False), ((40, 16), False), ((1, 1), True)])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_agrees_with_the_definition(dtype: str, lengths: tuple[int, int], causal: bool, head_dim: int) -> None:
    """At most twice the error of plain maths in the inputs' dtype, plus one rounding unit."""
    case = Case(*lengths, batch=2, heads=3, head_dim=head_dim, dtype=dtype, causal=causal)
    q, k, v = peers.inputs(case, torch.device("cpu"))
    want = peers.naive(q.double(), k.double(), v.double(), causal)
    plain = peers.naive(q, k, v, causal)
    out = keys_outer_peer.attend(q, k, v, causal)
    assert out.dtype == q.dtype
    error, allowed = (out.double() - want).abs().max(), 2 * (plain.double() - want).abs().max() + torch.finfo(q.dtype).eps * want.abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@interpreted
def test_large_scores_do_not_overflow() -> None:
    q, k, v = (torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(2)) for _ in range(3))
    q = q * 100
    assert (keys_outer_peer.attend(q, k, v, True) - peers.naive(q.double(), k.double(), v.double(), True)).abs().max() < 1e-4


def test_who_takes_part() -> None:
    def why(case: Case) -> str:
        (found,) = peers.assemble(case, peers.inputs(case, torch.device("cpu")), ("v1",), ())
        return found.why if isinstance(found, peers.Absent) else ""

    assert "no backward" in why(Case(32, mode="backward"))
    assert "ungrouped" in why(Case(32, heads=4, kv_heads=2)) and "up to 128" in why(Case(32, head_dim=256))
    assert why(Case(32, dtype="float16")) == ("" if INTERPRETED else "it runs on GPUs")


@compiled
@pytest.mark.parametrize(("dtype", "head_dim"), [("fp16", 64), ("fp32", 128)])
def test_compiles_for_a_gpu_that_is_not_here(dtype: str, head_dim: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attnhub.backends.triton.kernels.keys_outer import keys_outer_kernel

    block_m, block_n = keys_outer_peer.blocks(head_dim, 4 if dtype == "fp32" else 2)
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": block_m, "BLOCK_N": block_n, "CAUSAL": True, "PRECISION": "ieee", "UPCAST": False,
    }  # fmt: skip
    types = {"scale": "fp32", "seqlen_q": "i32", "seqlen_k": "i32", **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")}
    signature = {p.name: "constexpr" if p.name in constants else types.get(p.name, "*fp32") for p in keys_outer_kernel.params}
    source = ASTSource(keys_outer_kernel, signature, {(n,): constants[p.name] for n, p in enumerate(keys_outer_kernel.params) if p.name in constants})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
    assert 0 < made.metadata.shared <= 101376
