"""The cuda backend's portable kernel on the host, lane by lane (cuda_on_host.py): each way of dividing a tile among warps and of loading, with what is done
again in the end: Inf and NaN that a mask hides, scores that are extreme."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnhub.backend import Call
from attnhub.backends.cuda import launcher, variant
from attnhub.backends.cuda.variant import Variant
from attnhub.dense import allowed_pairs
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Causal, Chunk, LeftPad, Mask, SeqLens, Window

_spec = importlib.util.spec_from_file_location("cuda_on_host", Path(__file__).with_name("cuda_on_host.py"))
assert _spec is not None and _spec.loader is not None
cuda_on_host: Any = importlib.util.module_from_spec(_spec)
sys.modules["cuda_on_host"] = cuda_on_host
_spec.loader.exec_module(cuda_on_host)

Run = Callable[..., tuple[Tensor, Tensor]]


def _made(arch: str, dim: int, v_dim: int, seqlen_q: int = 1 << 20) -> Variant:
    return variant.make(arch=arch, turing=False, dtype="float16", head_dim=dim, v_head_dim=v_dim, seqlen_q=seqlen_q)


#: Two stages with all of Q kept; one stage; 8 warps; pairs of warps; few queries.
VARIANTS = {
    "two-stages": _made("sm_90", 64, 64),
    "one-stage": _made("sm_86", 64, 40),
    "eight-warps": _made("sm_86", 72, 136),
    "pairs": _made("sm_80", 136, 56),
    "few": _made("sm_80", 72, 64, seqlen_q=64),
}


def test_the_variants_are_what_they_are_here_for() -> None:
    found = {name: (v.warps, v.stages, v.pairs) for name, v in VARIANTS.items()}
    assert found == {"two-stages": (4, 2, False), "one-stage": (4, 1, False), "eight-warps": (8, 1, False), "pairs": (8, 1, True), "few": (4, 1, False)}
    assert VARIANTS["two-stages"].kept == 4 and VARIANTS["few"].rows == 64


@pytest.fixture(scope="module", params=VARIANTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run(q, k, v, mask, **call)``: (out, lse) by one variant."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    chosen = VARIANTS[request.param]
    library = cuda_on_host.build(tmp_path_factory.mktemp("portable"), chosen)
    plan = launcher.CudaPlan(chosen, "")

    def function(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[np.void], shared_bytes: int, stream: Any) -> None:
        packed = np.frombuffer(arguments[0].tobytes(), np.uint8)
        library.run(packed.ctypes.data_as(cuda_on_host.ctypes.c_void_p), grid[0], block[0], shared_bytes)

    plan._function = lambda index: function  # type: ignore[method-assign]

    def launch(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **more: Any) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "raw_stream", lambda index: 0)
            out, lse = plan._launch(Call(q, k, v, mask, more.pop("scale", q.shape[3] ** -0.5), need_lse=True, **more), 0)
        assert lse is not None
        return out, lse

    launch.variant = chosen  # type: ignore[attr-defined]
    return launch


def _tensors(run: Run, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen: Variant = run.variant  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(rows + keys)
    q, k, v = (
        torch.randn(1, 2, n, dim, generator=generator).half()
        for n, dim in ((rows, chosen.head_dim), (keys, chosen.head_dim), (keys, chosen.v_head_dim))
    )
    return q, k, v


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and which query sees which key."""
    pairs = allowed_pairs(mask, 1, q.shape[2], k.shape[2], (0, q.shape[2]), q.device).reshape(-1, q.shape[2], k.shape[2])[0]
    scores = (q.double() @ k.double().mT * (q.shape[3] ** -0.5 if scale is None else scale)).masked_fill(~pairs, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v.double(), scores.logsumexp(-1), pairs


MASKS = {
    "full": (FULL, 70, 150), "causal": (Causal(), 150, 180), "rows-without-keys": (Causal(), 140, 60), "window": (Window(30, 10), 130, 130),
    "chunk": (Causal() & Chunk(50), 140, 140), "padded": (SeqLens(torch.tensor([90])) & LeftPad(torch.tensor([7])), 30, 130),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, run: Run) -> None:
    mask, rows, keys = MASKS[name]
    q, k, v = _tensors(run, rows, keys)
    exact, exact_lse, pairs = _exact(q, k, v, mask)
    hidden = ~pairs.any(0)
    k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
    out, lse = run(q, k, v, mask)
    assert (out.double() - exact).abs().max() < 2e-3
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=2e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_rows_that_see_it(poison: float, run: Run) -> None:
    q, k, v = _tensors(run, 150, 150)
    exact, _, pairs = _exact(q, k, v, Causal())
    v[0, 0, [20, 70, 149], 5], k[0, 1, 90] = poison, float("nan")
    out, _ = run(q, k, v, Causal())
    assert torch.equal(out[0, 0, :, 5].isfinite(), ~pairs[:, [20, 70, 149]].any(1))
    assert torch.equal(out[0, 1].isnan().any(1), pairs[:, 90]) and torch.equal(out[0, 1].isnan().all(1), pairs[:, 90])
    seen = out.isfinite()
    assert (out.double() - exact)[seen].abs().max() < 2e-3


@pytest.mark.parametrize("mask", [FULL, Causal()], ids=["full", "causal"])
def test_extreme_scores(mask: Mask, run: Run) -> None:
    """High, low, and of some keys only; a row's maximum may be extreme in the tiles that come first and ordinary in the end."""
    q, k, v = _tensors(run, 140, 200)
    q[:, :, ::3], k[:, :, :50:4], k[:, :, -40:] = q[:, :, ::3] * 2.0**12, k[:, :, :50:4] * 2.0**10, k[:, :, -40:] * 2.0**5
    out, lse = run(q, k, v, mask)
    exact, exact_lse, _ = _exact(q, k, v, mask)
    assert (out.double() - exact).abs().max() < 5e-3
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-3)
    down = torch.full_like(q, -64.0)  # all scores of all rows below -2^14
    low, low_lse = run(down, k.abs() * 8, v, mask)
    exact, exact_lse, _ = _exact(down, k.abs() * 8, v, mask)
    assert (low.double() - exact).abs().max() < 5e-3
    torch.testing.assert_close(low_lse.double(), exact_lse, rtol=1e-5, atol=2e-3)


def test_sinks_packed_sequences_and_a_negative_scale(run: Run) -> None:
    q, k, v = _tensors(run, 170, 170)
    ends = torch.tensor([0, 90, 90, 160], dtype=torch.int32)
    sinks = torch.tensor([0.5, -3.0])
    out, lse = run(q, k, v, Causal(), scale=-0.1, sinks=sinks, varlen=Varlen(ends, ends, 90, 90))
    assert not out[:, :, 160:].any() and lse[:, :, 160:].isneginf().all()
    for a, b in ((0, 90), (90, 160)):
        exact, exact_lse, _ = _exact(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], Causal(), -0.1)
        total = torch.logaddexp(exact_lse, sinks.double()[:, None])
        torch.testing.assert_close(lse[:, :, a:b].double(), total, rtol=0, atol=2e-3)
        assert (out[:, :, a:b].double() - exact * (exact_lse - total).exp()[..., None]).abs().max() < 2e-3
