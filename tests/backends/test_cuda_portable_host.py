"""The cuda backend's portable kernel on the host, lane by lane (cuda_on_host.py): each way of dividing a tile among warps and of loading, with what is done
again in the end: Inf and NaN that a mask hides, scores that are extreme."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_on_host
import pytest
import torch
from torch import Tensor

from attnhub.backend import Call
from attnhub.backends.cuda import launcher, variant
from attnhub.backends.cuda.variant import Variant
from attnhub.dense import allowed_pairs
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Causal, Chunk, LeftPad, Mask, SeqLens, Window

Run = Callable[..., tuple[Tensor, Tensor]]


def _made(arch: str, dim: int, v_dim: int, **more: Any) -> Variant:
    return variant.make(arch=arch, turing=False, dtype="float16", head_dim=dim, v_head_dim=v_dim, **more)


#: Two stages with all of Q kept; one stage; 8 warps of one row tile; pairs of warps; few queries.
VARIANTS = {
    "two-stages": _made("sm_90", 64, 64),
    "one-stage": _made("sm_86", 64, 40),
    "eight-warps": _made("sm_86", 72, 136),
    "pairs": _made("sm_80", 136, 56),
    "few": _made("sm_80", 72, 64, seqlen_q=64),
}


def test_the_variants_are_what_they_are_here_for() -> None:
    found = {name: (v.warps, v.stages, v.pairs) for name, v in VARIANTS.items()}
    assert found == {"two-stages": (4, 2, False), "one-stage": (4, 1, False), "eight-warps": (8, 2, False), "pairs": (8, 1, True), "few": (4, 1, False)}
    assert VARIANTS["two-stages"].kept == 4 and VARIANTS["few"].rows == 64


def _on_host(chosen: Variant, folder: Path) -> Run:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    library = cuda_on_host.build(folder, chosen)
    plan = launcher.CudaPlan(chosen, "")
    plan._kernel = lambda index: cuda_on_host.kernel(library.run)  # type: ignore[method-assign]

    def launch(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **more: Any) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "raw_stream", lambda index: 0)
            out, lse = plan._launch(Call(q, k, v, mask, more.pop("scale", q.shape[3] ** -0.5), need_lse=True, **more), 0)
        assert lse is not None
        return out, lse

    launch.variant = chosen  # type: ignore[attr-defined]
    return launch


@pytest.fixture(scope="module", params=VARIANTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run(q, k, v, mask, **call)``: (out, lse) by one variant."""
    return _on_host(VARIANTS[request.param], tmp_path_factory.mktemp("portable"))


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
    "full": (FULL, 20, 150), "causal": (Causal(), 140, 150), "rows-without-keys": (Causal(), 90, 60), "window-chunk": (Window(30, 10) & Chunk(50), 135, 135),
    "padded": (SeqLens(torch.tensor([90])) & LeftPad(torch.tensor([7])), 30, 130),
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
    q, k, v = _tensors(run, 135, 135)
    exact, _, pairs = _exact(q, k, v, Causal())
    v[0, 0, [20, 70, 134], 5], k[0, 1, 90] = poison, float("nan")
    out, _ = run(q, k, v, Causal())
    assert torch.equal(out[0, 0, :, 5].isfinite(), ~pairs[:, [20, 70, 134]].any(1))
    assert torch.equal(out[0, 1].isnan().any(1), pairs[:, 90]) and torch.equal(out[0, 1].isnan().all(1), pairs[:, 90])
    seen = out.isfinite()
    assert (out.double() - exact)[seen].abs().max() < 2e-3


def test_extreme_scores(run: Run) -> None:
    """High, low, and of some keys only; a row's maximum may be extreme in the tiles that come first and ordinary in the end."""
    q, k, v = _tensors(run, 40, 140)
    q[:, :, ::3], k[:, :, :50:4] = q[:, :, ::3].clamp(-1.9, 1.9) * 2.0**15, k[:, :, :50:4].clamp(-1.9, 1.9) * 2.0**15
    k[:, :, -40:] = k[:, :, -40:] * 2.0**5
    down = torch.full_like(q, -64.0)[:, :, :9]  # all scores of all rows below -2^14
    for rows, keys, mask in ((q, k, FULL), (q, k, Causal()), (down, k.abs() * 8, FULL)):
        out, lse = run(rows, keys, v, mask)
        exact, exact_lse, _ = _exact(rows, keys, v, mask)
        assert (out.double() - exact).abs().max() < 5e-3
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-3)


def test_sinks_packed_sequences_and_a_negative_scale(run: Run) -> None:
    q, k, v = _tensors(run, 130, 130)
    ends = torch.tensor([0, 75, 75, 120], dtype=torch.int32)
    sinks = torch.tensor([0.5, -3.0])
    out, lse = run(q, k, v, Causal(), scale=-0.1, sinks=sinks, varlen=Varlen(ends, ends, 75, 75))
    assert not out[:, :, 120:].any() and lse[:, :, 120:].isneginf().all()
    for a, b in ((0, 75), (75, 120)):
        exact, exact_lse, _ = _exact(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], Causal(), -0.1)
        total = torch.logaddexp(exact_lse, sinks.double()[:, None])
        torch.testing.assert_close(lse[:, :, a:b].double(), total, rtol=0, atol=2e-3)
        assert (out[:, :, a:b].double() - exact * (exact_lse - total).exp()[..., None]).abs().max() < 2e-3


@pytest.mark.parametrize("dims", [(64, 64), (136, 64)], ids=["two-stages", "pairs"])
def test_softcap_and_alibi(dims: tuple[int, int], tmp_path: Path) -> None:
    """With the first tiles of keys so far away that ALiBi alone is extreme there."""
    chosen = _made("sm_90", *dims, softcap=True, alibi=True)
    assert chosen.pairs == (dims[0] > 128)
    run = _on_host(chosen, tmp_path)
    q, k, v = _tensors(run, 70, 300)
    slopes = torch.tensor([0.25, 2000.0])
    out, lse = run(q, k, v, ALiBi(slopes), softcap=3.0)
    distance = (torch.arange(70)[:, None] + 230 - torch.arange(300)).abs()
    scores = 3 * torch.tanh(q.double() @ k.double().mT * dims[0] ** -0.5 / 3) - slopes.double()[:, None, None] * distance
    assert (out.double() - torch.softmax(scores, -1) @ v.double()).abs().max() < 2e-3
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=2e-3)
