"""Extreme scores, dtypes, units of lse, features and heads (cases 17 to 22)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import Bias, Causal
from attnhub.problem import Feature
from attnhub.reasons import Code
from attnhub.registry import registry


@pytest.mark.parametrize("length", [1, 15, 17, 63, 65, 130])
@pytest.mark.parametrize("level", [-1e4, -300.0, 300.0, 1e4])
@pytest.mark.needs("lse", "causal_bottom_right")
def test_17_very_negative_lse_and_ragged_tiles(on: Any, level: float, length: int) -> None:
    """Keys behind the end of a tile must not count as score 0: against scores of -10000 they would be all there is."""
    q, k, v = on.zeros(1, 2, length, 16), on.randn(1, 2, length, 16) * 0.01, on.randn(1, 2, length, 16)
    q[..., 0], k[..., 0] = math.copysign(math.sqrt(abs(level)), level), math.sqrt(abs(level))
    for mask in (None, Causal()):
        want, want_lse = on.exact(q, k, v, mask, softmax_scale=1.0, return_lse=True)
        out, lse = on.attention(q, k, v, mask, softmax_scale=1.0, return_lse=True)
        on.close(out, want, 20)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-2, rtol=1e-5)
        on.close(on.attention(q, k, v, mask, softmax_scale=1.0), want, 20)


@pytest.mark.parametrize("softcap", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("factor", [1e-6, 1e2, 1e4])
@pytest.mark.needs("softcap", "lse")
def test_18_large_logits_and_softcap(on: Any, factor: float, softcap: float) -> None:
    q, k, v = on.randn(1, 2, 20, 16) * factor, on.randn(1, 2, 37, 16), on.randn(1, 2, 37, 16)
    if not bool(q.isfinite().all()):
        return
    out, lse = on.attention(q, k, v, softcap=softcap, return_lse=True)
    want, want_lse = on.exact(q, k, v, softcap=softcap, return_lse=True)
    # Rounding of a score of size 1e4 * 10 in the working precision moves its probability by so much.
    room = 1.0 + (factor * 0.1 if not softcap else 0.0)
    on.close(out, want, room)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-2, rtol=1e-4)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(on.attention(*leaves, softcap=softcap).float().sum(), leaves))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.needs("bias", "sinks", dtype="bfloat16")
def test_19_wide_bias_and_sinks_beside_narrow_tensors(on: Any, dtype: str) -> None:
    """A fp32 bias is not rounded to q's dtype: 300.5 and 300 are one number in bf16 and 40% in probability."""
    half = getattr(torch, dtype)
    q, k, v = (on.randn(1, 2, n, 16, dtype=half) * 0.1 for n in (3, 8, 8))
    bias = torch.full((1, 1, 1, 8), 300.0, device=on.device)
    bias[..., ::2] += 0.5
    sinks = torch.tensor([300.25, 299.75], device=on.device)
    want = on.exact(q, k, v, Bias(bias), sinks=sinks)
    if on.name != "sdpa":  # F.scaled_dot_product_attention takes a mask of q's dtype only
        torch.testing.assert_close(on.attention(q, k, v, Bias(bias)).double(), on.exact(q, k, v, Bias(bias)), atol=4e-3, rtol=2e-2)
    torch.testing.assert_close(on.attention(q, k, v, Bias(bias), sinks=sinks).double(), want, atol=4e-3, rtol=2e-2)


@pytest.mark.needs()
def test_19_mixed_inputs_are_refused_with_the_fix(on: Any) -> None:
    q, k = on.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16, device=on.device)
    with pytest.raises(ValueError, match=r"bfloat16.*cast"):
        on.attention(q, k, k)


@pytest.mark.needs("lse", "sinks")
def test_20_lse_is_in_base_e(on: Any) -> None:
    q = on.zeros(1, 2, 5, 16)
    for n in (1, 2, 7, 100):
        k = on.zeros(1, 2, n, 16)
        _, lse = on.attention(q, k, k, return_lse=True)
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(n)), atol=1e-4, rtol=1e-4)
        _, lse = on.attention(q, k, k, sinks=torch.tensor([0.0, 2.0], device=on.device), return_lse=True)
        torch.testing.assert_close(lse[0, :, 0].cpu(), torch.tensor([math.log(n + 1), math.log(n + math.exp(2))]), atol=1e-4, rtol=1e-4)


_EFFECTS: dict[str, Any] = {
    "causal_bottom_right": lambda on: {"mask": Causal()},
    "causal_top_left": lambda on: {"mask": Causal("top_left")},
    "window": lambda on: {"mask": attnhub.Window(2, 1)},
    "chunk": lambda on: {"mask": attnhub.Chunk(4)},
    "prefix": lambda on: {"mask": Causal() & attnhub.Prefix(on.ints(9, 9)), "beside": {"mask": Causal()}},
    "segments": lambda on: {"mask": attnhub.Segments(on.ints(*range(12)).view(2, 6) % 2, on.ints(*range(22)).view(2, 11) % 2)},
    "seqlens": lambda on: {"mask": attnhub.SeqLens(on.ints(5, 8))},
    "leftpad": lambda on: {"mask": attnhub.LeftPad(on.ints(3, 2))},
    "bool_mask": lambda on: {"mask": attnhub.BoolMask((torch.rand(2, 4, 6, 11) < 0.5).to(on.device))},
    "bias": lambda on: {"mask": Bias(on.randn(2, 4, 6, 11))},
    "alibi": lambda on: {"mask": attnhub.ALiBi(torch.rand(4).to(on.device) + 0.5)},
    "block_sparse": lambda on: {"mask": attnhub.BlockSparse(torch.tensor([[True, False], [False, True]], device=on.device), (4, 8))},
    "softcap": lambda on: {"softcap": 0.3},
    "sinks": lambda on: {"sinks": torch.ones(4, device=on.device)},
}


@pytest.mark.parametrize("feature", _EFFECTS)
@pytest.mark.needs()
def test_21_no_feature_is_silently_ignored(on: Any, feature: str) -> None:
    """Each feature changes the result as defined, or the backend refuses it with that feature's code."""
    q, k, v = on.randn(2, 4, 6, 16), on.randn(2, 4, 11, 16), on.randn(2, 4, 11, 16)
    kwargs = _EFFECTS[feature](on)
    beside = kwargs.pop("beside", {})
    if Feature(feature) not in registry.get(on.name).capability.features:
        with pytest.raises(attnhub.NoBackendError) as caught:
            on.attention(q, k, v, **kwargs)
        assert Code(f"no_{feature}") in [r.code for r in caught.value.decision.verdicts[on.name].reasons]  # type: ignore[union-attr]
        return
    got, plain = on.attention(q, k, v, **kwargs), on.attention(q, k, v, **beside)
    assert float((got - plain).abs().max()) > 0.05, "the feature has an effect"
    on.close(got, on.exact(q, k, v, **kwargs))


@pytest.mark.needs()
def test_21_scale_dropout_and_lse_are_not_ignored(on: Any) -> None:
    q, k, v = on.randn(2, 4, 6, 16), on.randn(2, 4, 11, 16), on.randn(2, 4, 11, 16)
    on.close(on.attention(q, k, v, softmax_scale=1.5), on.exact(q, k, v, softmax_scale=1.5), 10)
    on.close(on.attention(q, k, v, softmax_scale=0.0), v.double().mean(2, keepdim=True).expand(2, 4, 6, 16))
    features = registry.get(on.name).capability.features
    if Feature.DROPOUT in features:
        assert not torch.equal(on.attention(q, k, v, dropout_p=0.5), on.attention(q, k, v))
    else:
        with pytest.raises(attnhub.NoBackendError, match="no_dropout"):
            on.attention(q, k, v, dropout_p=0.5)
    if Feature.LSE not in features:
        with pytest.raises(attnhub.NoBackendError, match="no_lse"):
            on.attention(q, k, v, return_lse=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (8, 1), (6, 3), (12, 4)])
@pytest.mark.parametrize("sq", [1, 5, 40])
@pytest.mark.needs("gqa", "causal_bottom_right")
def test_22_query_heads_are_grouped_not_interleaved(on: Any, heads: int, kv_heads: int, sq: int) -> None:
    """Query head h reads K/V head h // (Hq / Hk): v holds the number of its head."""
    q, k = on.randn(2, heads, sq, 16), on.randn(2, kv_heads, 45, 16)
    v = torch.arange(kv_heads, dtype=on.dtype, device=on.device)[None, :, None, None].expand(2, kv_heads, 45, 16)
    out = on.attention(q, k, v, Causal())
    want = (torch.arange(heads) // (heads // kv_heads)).to(out)[None, :, None, None].expand_as(out)
    on.close(out, want)
    leaves: list[Tensor] = [on.randn(2, n, s, 16).requires_grad_() for n, s in ((heads, sq), (kv_heads, 45), (kv_heads, 45))]
    grads = torch.autograd.grad(on.attention(*leaves, Causal()).float().sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    full = [wide[0], *(t.repeat_interleave(heads // kv_heads, 1) for t in wide[1:])]
    for a, b in zip(grads, torch.autograd.grad(attnhub.attention(*full, Causal(), backend="reference").sum(), wide)):
        on.close(a, b, 10)


@pytest.mark.needs()
def test_22_heads_that_do_not_divide(on: Any) -> None:
    for heads, kv_heads in ((4, 3), (2, 4), (5, 2)):
        with pytest.raises(ValueError, match=rf"{heads} heads and k {kv_heads}.*multiple"):
            on.attention(on.zeros(1, heads, 2, 16), on.zeros(1, kv_heads, 2, 16), on.zeros(1, kv_heads, 2, 16))
