"""attnhub.nn.CachedAttention against attention over all tokens at once, written out in plain maths."""

from __future__ import annotations

import copy
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attnhub
from attnhub import KVCache
from attnhub.nn import CachedAttention

HEADS, KV, DIM, BATCH = 4, 2, 8, 2


def plain(q: Tensor, k: Tensor, v: Tensor, window: int = -1, softcap: float = 0.0, scale: Optional[float] = None) -> Tensor:
    """Causal attention of [B, S, H, D] in fp64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    allowed = (j <= i) & (j >= i - window if window >= 0 else j >= 0)
    return (torch.softmax(torch.where(allowed, scores, -torch.inf), -1) @ v).transpose(1, 2)


def turned(x: Tensor, base: float, interleaved: bool) -> Tensor:
    """x [B, S, H, D] rotated at its positions as complex numbers, in fp64."""
    half = x.shape[3] // 2
    x = x.double()
    pairs = x.unflatten(3, (half, 2)) if interleaved else torch.stack((x[..., :half], x[..., half:]), -1)
    angles = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[3])
    found = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None])
    return found.flatten(3) if interleaved else torch.cat(found.unbind(-1), -1)


def tokens(length: int, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, length, HEADS, DIM, dtype=dtype), *torch.randn(2, batch, length, KV, DIM, dtype=dtype).unbind(0)  # type: ignore[return-value]


def layer(page_size: int = 0, **options: Any) -> CachedAttention:
    return CachedAttention(HEADS, KV, DIM, batch=BATCH, max_seqlen=16, page_size=page_size, **options)


def steps(made: CachedAttention, qkv: tuple[Tensor, ...], sizes: list[int]) -> Tensor:
    return torch.cat([made(*part) for part in zip(*(t.split(sizes, 1) for t in qkv))], 1)


@pytest.mark.parametrize("page_size", [0, 4, 5])
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 1, 1, 4, 1]], ids=str)
@pytest.mark.parametrize("what", ["plain", "window", "softcap", "scale", "rotary", "rotary_interleaved", "rotary_tables"])
def test_any_division_into_calls_is_one_causal_attention(what: str, sizes: list[int], page_size: int) -> None:
    q, k, v = tokens(12)
    options: dict[str, Any] = {
        "window": {"mask": attnhub.Causal() & attnhub.Window(3)}, "softcap": {"softcap": 2.0}, "scale": {"softmax_scale": 0.2},
        "rotary": {"rotary": 100.0}, "rotary_interleaved": {"rotary": 100.0, "rotary_interleaved": True},
    }.get(what, {})  # fmt: skip
    expected = {"window": {"window": 3}, "softcap": {"softcap": 2.0}, "scale": {"scale": 0.2}}.get(what, {})
    rotated_q, rotated_k = q, k
    if what == "rotary_tables":
        angles = torch.rand(16, 3)
        options = {"rotary": (angles.cos(), angles.sin())}
        positions = torch.arange(12).expand(BATCH, -1)
        rotated_q, rotated_k = (attnhub.apply_rotary(t.transpose(1, 2), *options["rotary"], positions).transpose(1, 2) for t in (q, k))
    elif what.startswith("rotary"):
        rotated_q, rotated_k = (turned(t, 100.0, "interleaved" in what) for t in (q, k))
    made = layer(page_size, **options)
    out = steps(made, (q, k, v), sizes)
    torch.testing.assert_close(out.double(), plain(rotated_q, rotated_k, v, **expected), rtol=2e-5, atol=2e-5)
    assert made.position.tolist() == [12, 12] and sum(made.served.values()) == len(sizes)


def test_projections() -> None:
    """Parameters are Llama's by name and shape, do not train, and the cache is not among them."""
    made = CachedAttention(4, 2, embed_dim=32, batch=BATCH, max_seqlen=16, bias=True, rotary=10000.0)
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == {
        "q_proj.weight": (32, 32), "q_proj.bias": (32,), "k_proj.weight": (16, 32), "k_proj.bias": (16,), "v_proj.weight": (16, 32), "v_proj.bias": (16,),
        "o_proj.weight": (32, 32),
    }  # fmt: skip
    assert set(made.state_dict()) == set(dict(made.named_parameters())) and not any(p.requires_grad for p in made.parameters())
    x = torch.randn(BATCH, 9, 32)
    out = torch.cat([made(part) for part in x.split([6, 1, 2], 1)], 1)
    q, k, v = (projection(x).unflatten(2, (-1, 8)) for projection in (made.q_proj, made.k_proj, made.v_proj))
    want = F.linear(plain(turned(q, 10000.0, False), turned(k, 10000.0, False), v).flatten(2).float(), made.o_proj.weight)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)


def test_parameters_that_train_are_an_error() -> None:
    """They would get no gradient; the cache and the position stay as they were."""
    made = CachedAttention(4, 2, embed_dim=32, batch=BATCH, max_seqlen=16).requires_grad_(True)
    x = torch.randn(BATCH, 3, 32)
    with pytest.raises(ValueError, match=r"requires a gradient.*torch\.no_grad"):
        made(x)
    assert made.position.tolist() == [0] * BATCH and not made.cache.k_cache.any()
    with torch.no_grad():
        made(x)
    assert made.position.tolist() == [3] * BATCH and made.cache.k_cache.any()


def test_the_weights_of_a_llama_layer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    model = transformers.LlamaModel(config).eval()
    theirs = model.layers[0].self_attn
    made = CachedAttention(4, 2, embed_dim=32, batch=BATCH, max_seqlen=16, rotary=float(config.rope_parameters["rope_theta"]))
    made.load_state_dict(theirs.state_dict())
    x = torch.randn(BATCH, 7, 32)
    with torch.no_grad():
        causal = torch.full((7, 7), -torch.inf).triu(1)[None, None]
        want = theirs(x, position_embeddings=model.rotary_emb(x, torch.arange(7)[None]), attention_mask=causal)[0]
        torch.testing.assert_close(torch.cat([made(part) for part in x.split([4, 1, 2], 1)], 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [0, 4])
def test_set_position(page_size: int) -> None:
    """Tokens are taken back, begun anew, and dropped after a padded prefill, each sequence by its own length."""
    q, k, v = tokens(10)
    made = layer(page_size, rotary=100.0)
    first = steps(made, (q, k, v), [8, 2])
    made.set_position(8)
    torch.testing.assert_close(made(q[:, 8:], k[:, 8:], v[:, 8:]), first[:, 8:])
    made.set_position(0)
    torch.testing.assert_close(made(q, k, v), first)
    lengths = [4, 7]
    made.set_position(torch.tensor(lengths))
    assert made.position.tolist() == lengths and made.position.dtype == torch.int32
    new = tokens(3)
    out = made(*new)
    for b, length in enumerate(lengths):
        joined = [torch.cat([old[b : b + 1, :length], fresh[b : b + 1]], 1) for old, fresh in zip((q, k, v), new)]
        want = plain(turned(joined[0], 100.0, False), turned(joined[1], 100.0, False), joined[2])[:, length:]
        torch.testing.assert_close(out[b : b + 1].double(), want, rtol=2e-5, atol=2e-5)
    assert made.position.tolist() == [7, 10]


def test_a_cache_of_ones_own() -> None:
    """Pages of a pool in any order."""
    pool = KVCache(torch.zeros(9, 4, KV, DIM), torch.zeros(9, 4, KV, DIM), torch.zeros(BATCH, dtype=torch.int32), torch.randperm(9)[:8].view(2, 4), layout="bshd")
    made = layer()
    made.use_cache(pool)
    qkv = tokens(9)
    torch.testing.assert_close(steps(made, qkv, [4, 1, 4]).double(), plain(*qkv), rtol=2e-5, atol=2e-5)
    assert made.cache is pool and pool.cache_seqlens.tolist() == [9, 9]
    with pytest.raises(ValueError, match=r"3 heads of 8.*2 of 8"):
        made.use_cache(KVCache.empty(2, 3, 16, 8))


# -- who serves ------------------------------------------------------------------------------------------------------------------------------


def test_what_served_and_why() -> None:
    made = layer(backend="cuda,reference,auto")
    decision = made.explain()
    assert decision.chosen == "reference" and isinstance(decision.verdicts["cuda"], attnhub.Rejected) and attnhub.Feature.GQA in decision.problem.features
    assert made.position.tolist() == [0, 0] and not made.served, "explaining runs nothing"
    steps(made, tokens(3), [2, 1])
    assert made.served == {"reference": 2}
    assert attnhub.Feature.PAGED in layer(4).explain(5).problem.features and layer(4).explain(5).problem.seqlen_q == 16


def test_a_strict_choice_is_an_error_that_changes_nothing() -> None:
    made = layer(backend="cuda")
    with pytest.raises(attnhub.NoBackendError, match="cuda"):
        made(*tokens(2))
    assert made.position.tolist() == [0, 0] and not made.served
    made.backend = None
    qkv = tokens(5)
    torch.testing.assert_close(steps(made, qkv, [4, 1]).double(), plain(*qkv), rtol=2e-5, atol=2e-5)


# -- arguments -------------------------------------------------------------------------------------------------------------------------------


def test_a_full_cache() -> None:
    made = layer()
    made(*tokens(15))
    with pytest.raises(ValueError, match=r"2 new tokens behind position 15 pass the 16.*set_position"):
        made(*tokens(2))
    made(*tokens(1))
    assert made.position.tolist() == [16, 16]
    made.set_position(torch.tensor([3, 16]))
    with pytest.raises(ValueError, match="position 16"):
        made(*tokens(1))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: CachedAttention(4, 3, 8), ValueError, "num_heads=4 is not a multiple of kv_heads=3"),
    (lambda: CachedAttention(4, embed_dim=30), ValueError, "head_dim is needed"),
    (lambda: CachedAttention(4), ValueError, "head_dim is needed"),
    (lambda: layer()(torch.zeros(2, 1, 4, 8)), TypeError, "no projections"),
    (lambda: CachedAttention(4, embed_dim=32)(*[torch.zeros(1, 1, 32)] * 3), TypeError, "x alone"),
    (lambda: layer()(*tokens(1, batch=3)), ValueError, r"q has shape \(3, 1, 4, 8\): \[2, 1, 4, 8\]"),
    (lambda: layer()(tokens(1)[0], tokens(2)[1], tokens(1)[2]), ValueError, r"k has shape \(2, 2, 2, 8\)"),
    (lambda: layer().set_position(17), ValueError, "0 to 16"),
    (lambda: layer().set_position(-1), ValueError, "0 to 16"),
    (lambda: layer().set_position(torch.tensor([1, 17])), ValueError, "1 to 17 is outside of 0 to 16"),
    (lambda: layer().set_position(torch.tensor([1])), ValueError, r"integers \[2\]"),
    (lambda: layer()(*(t.requires_grad_() for t in tokens(1))), ValueError, "is for inference"),
])  # fmt: skip
def test_errors(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# -- as a module -----------------------------------------------------------------------------------------------------------------------------


def test_moves_and_copies() -> None:
    mask = attnhub.Causal() & attnhub.ALiBi(torch.rand(HEADS))
    made = layer(4, rotary=100.0, mask=mask)
    made(*tokens(3))
    other = copy.deepcopy(made)
    assert made.bfloat16() is made
    assert made.cache.k_cache.dtype == torch.bfloat16 and made.position.dtype == torch.int32 and made.cache.block_table.dtype == torch.int32
    assert made.rotary[0].dtype == torch.float32 and made.mask.causal
    new = tokens(2)
    torch.testing.assert_close(made(*(t.bfloat16() for t in new)).float(), other(*new), rtol=5e-2, atol=5e-2)
    assert made.position.tolist() == other.position.tolist() == [5, 5]
    other.set_position(0)
    assert made.position.tolist() == [5, 5], "a copy has a cache of its own"
    moved = layer().to("meta")
    assert moved.cache.k_cache.is_meta and moved.position.is_meta
    assert "4/2 heads of 8, cache: 2 x 16, pages of 4" in repr(made) and "contiguous" in repr(layer())


def test_one_graph_for_a_decode_loop() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    made, eager = layer(rotary=100.0), layer(rotary=100.0)
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    for _ in range(6):
        new = tokens(1)
        torch.testing.assert_close(compiled(*new), eager(*new))
    assert counter.frame_count == 1 and made.position.tolist() == [6, 6]


@pytest.mark.parametrize("page_size", (0, 4))
def test_without_memory_and_filled_later(page_size: int) -> None:
    """The way of large models: made on the meta device, `to_empty`, then the weights. Cache and angles are no weights."""
    options: Any = {"embed_dim": 32, "batch": BATCH, "max_seqlen": 16, "page_size": page_size, "rotary": 10000.0}
    usual = CachedAttention(HEADS, KV, **options)
    with torch.device("meta"):
        layer = CachedAttention(HEADS, KV, **options)
        assert layer(torch.randn(BATCH, 3, 32)).shape == (BATCH, 3, 32)
    layer.to_empty(device="cpu").load_state_dict(usual.state_dict())
    for _ in range(2):
        x = torch.randn(BATCH, 3, 32)
        torch.testing.assert_close(layer(x), usual(x))
    assert layer.position.tolist() == [6, 6]
    with torch._subclasses.FakeTensorMode():
        assert CachedAttention(HEADS, KV, **options)(torch.randn(BATCH, 3, 32)).shape == (BATCH, 3, 32)
