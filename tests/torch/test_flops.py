"""FLOP counts: torch's rules, through torch's counter. Seen to fail: the registration removed (0), Sq used for Sk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import attnhub

Make = Callable[..., tuple[Tensor, Tensor, Tensor]]


def counted(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("grad", (False, True))
def test_forward_and_backward(qkv: Make, grad: bool) -> None:
    inputs = qkv(batch=2, heads=4, kv_heads=2, length=6, length_k=10, dim=16, grad=grad)
    pairs = 2 * 4 * 6 * 10

    def run() -> None:
        out = attnhub.attention(*inputs, attnhub.Causal())
        if grad:
            out.sum().backward()

    assert counted(run) == 4 * pairs * 16 + (10 * pairs * 16 if grad else 0)


def test_as_torch_counts_its_own(qkv: Make) -> None:
    inputs = qkv(grad=True)

    def theirs() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(*inputs, is_causal=True).sum().backward()

    ours = counted(lambda: attnhub.attention(*inputs, attnhub.Causal()).sum().backward())
    assert ours == counted(theirs) or counted(theirs) == 0  # some versions have no formula for the CPU's kernel


def test_values_of_another_width() -> None:
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 24)
    assert counted(lambda: attnhub.attention(q, k, v)) == 2 * 2 * 5 * 7 * (8 + 24)


def test_packed_sequences_count_their_own_pairs() -> None:
    varlen = attnhub.Varlen.from_lengths(torch.tensor([3, 5]), torch.tensor([4, 9]))
    q, k = torch.randn(8, 2, 16), torch.randn(13, 2, 16)
    assert counted(lambda: attnhub.attention(q, k, k, attnhub.Causal() & attnhub.Window(2), varlen=varlen)) == 4 * 2 * (3 * 4 + 5 * 9) * 16


def test_paged_cache() -> None:
    cache = attnhub.KVCache.empty(2, 2, 32, 16, page_size=8)
    cache.cache_seqlens.fill_(5)
    q = torch.randn(2, 4, 1, 16)
    assert counted(lambda: attnhub.attention(q, kv_cache=cache)) == 4 * 2 * 4 * 32 * 16


def test_a_counter_imported_after_attnhub_counts_its_first_call() -> None:
    """And attnhub does not import it: that module imports Triton."""
    program = (
        "import sys, torch, attnhub\n"
        "q = torch.randn(1, 2, 4, 8)\n"
        "attnhub.attention(q, q, q, backend='reference')\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter: attnhub.attention(q, q, q)\n"
        "assert counter.get_total_flops() == 4 * 2 * 4 * 4 * 8, counter.get_total_flops()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
