"""Philox4x32-10 by its published vectors and by an independent implementation; dropout made of it."""

from __future__ import annotations

import math

import pytest
import torch

import attnhub
from attnhub.philox import keep_mask, philox

#: Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def _plain(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in Python's integers, as the paper writes it: bump the key before every round but the first."""
    c, k = list(counter), list(key)
    for round_ in range(10):
        if round_:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(c[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


def _seed(key: tuple[int, int]) -> torch.Tensor:
    value = key[0] | key[1] << 32
    return torch.tensor(value - 2**64 if value >= 2**63 else value)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor(c) for c in counter), _seed(key))  # type: ignore[arg-type]
    assert [int(w) for w in words] == list(result) == _plain(counter, key)


def test_against_the_independent_one() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        counter = tuple(torch.randint(0, 2**32, (4,), generator=generator).tolist())
        key = tuple(torch.randint(0, 2**32, (2,), generator=generator).tolist())
        assert [int(w) for w in philox(tuple(torch.tensor(c) for c in counter), _seed(key))] == _plain(counter, key)  # type: ignore[arg-type]


@pytest.mark.parametrize("first_batch", [0, 3])
def test_keep_mask_pair_by_pair(first_batch: int) -> None:
    batch, heads, rows, sk, p = 2, 3, (2, 5), 7, 0.37
    seed, offset = 0x0123456789ABCDEF, (5 << 32) | 77
    kept = keep_mask(torch.tensor([seed, offset]), p, batch, heads, rows, sk, first_batch)
    assert kept.shape == (batch, heads, 3, sk) and kept.dtype == torch.bool
    for b in range(batch):
        for h in range(heads):
            for i in range(*rows):
                for j in range(sk):
                    word = _plain((j >> 2, i, (first_batch + b) * heads + h, offset % 2**32), (seed % 2**32, seed >> 32))[j & 3]
                    assert bool(kept[b, h, i - rows[0], j]) == (word >= math.floor(p * 2**32))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_of_what_is_dropped(p: float) -> None:
    kept = keep_mask(torch.tensor([11, 22]), p, 4, 4, (0, 64), 256)
    n = kept.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 4.5 * math.sqrt(p * (1 - p) / n)
    for dim in range(4):
        other = [d for d in range(4) if d != dim]
        per_slice = n / kept.shape[dim]
        assert (kept.double().mean(other) - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / per_slice)
    neighbours = (kept[..., 1:] ^ kept[..., :-1]).double().mean().item()
    assert abs(neighbours - 2 * p * (1 - p)) < 0.02, "neighbours are independent"


# -- dropout through attention --------------------------------------------------------------------------------------------------------


def _uniform(sq: int = 16, sk: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every key weighs 1 / sk and v is the identity: the output is the kept pairs."""
    return torch.zeros(2, 2, sq, sk), torch.zeros(2, 2, sk, sk), torch.eye(sk).expand(2, 2, sk, sk)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_dropout_in_attention_is_the_mask(backend: str) -> None:
    q, k, v = _uniform()
    torch.manual_seed(3)
    rng = torch.randint(0, 2**62, (2,), dtype=torch.int64)
    torch.manual_seed(3)
    out, lse = attnhub.attention(q, k, v, dropout_p=0.25, backend=backend, return_lse=True)
    kept = keep_mask(rng, 0.25, 2, 2, (0, 16), 32)
    torch.testing.assert_close(out, kept.float() / 32 / 0.75)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(32)))  # lse is without dropout


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_backward_drops_what_the_forward_dropped(backend: str) -> None:
    q, k, _ = _uniform()
    v = torch.randn(2, 2, 32, 32).requires_grad_()
    out = attnhub.attention(q, k, v, dropout_p=0.5, backend=backend)
    grad = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, grad)
    torch.testing.assert_close((dv * v).sum(), (out * grad).sum(), rtol=1e-4, atol=1e-3)  # out is linear in v
    torch.manual_seed(5)
    probe = attnhub.attention(q, k, torch.eye(32).expand(2, 2, 32, 32), dropout_p=0.5, backend=backend)
    torch.manual_seed(5)
    (dv,) = torch.autograd.grad(attnhub.attention(q, k, v, dropout_p=0.5, backend=backend), v, torch.ones(2, 2, 16, 32))
    torch.testing.assert_close(dv[..., 0], probe.sum(2))  # column sums of the dropped probabilities


def test_dropout_follows_torchs_generator() -> None:
    q, k, v = _uniform()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attnhub.attention(q, k, v, dropout_p=0.5))
    again = attnhub.attention(q, k, v, dropout_p=0.5)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2]) and not torch.equal(outs[2], again)


def test_no_dropout_draws_nothing() -> None:
    q, k, v = _uniform()
    torch.manual_seed(1)
    attnhub.attention(q, k, v)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(()))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_mean_over_many_masks_is_no_dropout(backend: str) -> None:
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    mean = torch.stack([attnhub.attention(q, k, v, dropout_p=0.3, backend=backend) for _ in range(100)]).mean(0)
    torch.testing.assert_close(mean, attnhub.attention(q, k, v), atol=0.25, rtol=0)


def test_dropout_of_packed_sequences_is_local() -> None:
    """i and j count inside the sequence and b is its index: packing changes no pair."""
    sk = 12
    q, k, v = torch.zeros(2, 2, 5, sk), torch.zeros(2, 2, sk, sk), torch.eye(sk).expand(2, 2, sk, sk)
    torch.manual_seed(9)
    dense = attnhub.attention(q, k, v, dropout_p=0.4, backend="reference")
    packed = [t.transpose(1, 2).reshape(-1, 2, t.shape[-1]) for t in (q, k, v)]
    torch.manual_seed(9)
    out = attnhub.attention(*packed, varlen=attnhub.Varlen.from_lengths(torch.tensor([5, 5]), torch.tensor([sk, sk])), dropout_p=0.4, backend="reference")
    torch.testing.assert_close(out, dense.transpose(1, 2).reshape(-1, 2, sk))
