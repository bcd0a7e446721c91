"""Which problems the cuda backend's kernel for compute capability 9.0 is for, with which tiles, and where the backend is chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from cuda_launch import HOPPER

from attnhub.backends.cuda import backend, hopper
from attnhub.problem import DeviceInfo, Feature, Problem
from attnhub.selector import without_gradients


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True), ({"seqlen_q": 16}, False), ({"device": DeviceInfo("cuda", "nvidia", (8, 0))}, False),
        ({"device": DeviceInfo("cuda", "nvidia", (10, 0))}, False), ({"device": DeviceInfo("cuda", "nvidia", (12, 0))}, False),
    ],
)  # fmt: skip
def test_which_problems_it_is_for(changes: dict[str, Any], served: bool) -> None:
    base = Problem(HOPPER, "float16", "float16", 64, 64, 4, 4, 2, 128, 128)
    assert hopper.serves(dataclasses.replace(base, **changes)) is served


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "cuda"), ({"features": frozenset({Feature.LSE}), "need_backward": True}, "cuda"), ({"features": frozenset({Feature.CAUSAL_BOTTOM_RIGHT})}, "cuda"),
        ({"kv_heads": 4, "features": frozenset({Feature.GQA})}, "cuda"), ({"q_dtype": "float16", "kv_dtype": "float16"}, "cuda"),
        ({"seqlen_k": 8192}, "sdpa"), ({"batch": 1, "seqlen_q": 128}, "triton"), ({"batch": 1, "seqlen_q": 128, "features": frozenset({Feature.WINDOW})}, "triton"), ({"head_dim": 80, "v_head_dim": 80}, "sdpa"),
        ({"seqlen_q": 1}, "cuda"), ({"seqlen_q": 16, "seqlen_k": 16}, "sdpa"), ({"seqlen_q": 16}, "cuda"), ({"seqlen_q": 16, "kv_heads": 4, "features": frozenset({Feature.GQA})}, "cuda"),
        ({"seqlen_q": 16, "kv_heads": 4, "batch": 16, "features": frozenset({Feature.GQA})}, "triton"), ({"seqlen_q": 16, "seqlen_k": 128, "kv_heads": 4}, "triton"),
        ({"seqlen_q": 1, "kv_heads": 1, "q_heads": 32, "features": frozenset({Feature.GQA})}, "sdpa"),
        ({"features": frozenset({Feature.SOFTCAP})}, "cuda"), ({"features": frozenset({Feature.VARLEN})}, "cuda"),
        ({"seqlen_q": 1, "page_size": 16, "features": frozenset({Feature.PAGED, Feature.SEQLENS})}, "cuda"),
        ({"device": DeviceInfo("cuda", "nvidia", (8, 0), "A100")}, "sdpa"),
        ({"device": DeviceInfo("cuda", "nvidia", (8, 0), "A100"), "features": frozenset({Feature.SOFTCAP})}, "triton"),
    ],
)  # fmt: skip
def test_it_is_chosen_where_it_was_measured_faster(changes: dict[str, Any], first: str) -> None:
    from attnhub.backends.sdpa import backend as sdpa
    from attnhub.backends.triton import backend as triton

    problem = dataclasses.replace(Problem(HOPPER, "bfloat16", "bfloat16", 128, 128, 16, 16, 4, 4096, 4096), **changes)
    assert min((b.cost(without_gradients(problem)), b.name) for b in (backend, sdpa, triton))[1] == first


@pytest.mark.parametrize(
    ("heads", "length", "causal", "rows"),
    [(8, 2048, False, 128), (8, 4096, False, 128), (32, 2048, False, 192), (8, 2048, True, 128), (8, 4096, True, 192), (64, 1024, False, 128)],
)
def test_tiles_fill_the_last_wave(heads: int, length: int, causal: bool, rows: int) -> None:
    features = frozenset({Feature.CAUSAL_BOTTOM_RIGHT} if causal else ())
    assert hopper.choose(Problem(HOPPER, "bfloat16", "bfloat16", 64, 64, heads, heads, 1, length, length, features)).rows == rows
