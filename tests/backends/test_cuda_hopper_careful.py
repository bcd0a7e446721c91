"""The slow way of the cuda backend's kernel for compute capability 9.0 (careful.cuh), run on the host: scores of any size, and values that are not
finite behind a mask."""

from __future__ import annotations

import math
import shutil
from typing import Any

import cuda_on_host
import numpy as np
import pytest
import torch
from torch import Tensor

from attnhub.backends.cuda import compile, hopper_params

_ROWS = 128
# One warp for 16 rows of head 1, as the kernel calls it after the fast way has gone wrong.
_MAIN = """
#include "hopper/careful.cuh"
using namespace attnhub;
template <bool Causal> struct Config {
    using Type = BFloat16;
    static constexpr int kColumns = 64, kKeys = 128, kRows = 64;
    static constexpr bool kLeft = false, kRight = Causal, kSoftcap = false, kAlibi = false, kRawScores = true;
    using Mask = attnhub::Mask<kLeft, kRight>;
};
template <bool Causal> static void attend(const Params& params, float* out, float* sums) {
    using C = Config<Causal>;
    const int lane = threadIdx.x, own_row = blockIdx.x % 4 * 16 + lane / 4;
    Work work{static_cast<int>(blockIdx.x) / 4 * 64, 1};
    work.kv_head = 1;
    work.len_q = params.seqlen_q;
    work.len_k = params.seqlen_k;
    work.last_tile = (params.seqlen_k + C::kKeys - 1) / C::kKeys;
    const typename C::Mask mask{work.len_k, work.offset, 0, 0};
    const int row = work.row + own_row;
    const Span spans[2] = {mask.keys(params, row), mask.keys(params, row + 8)};
    float found[32];
    RowState rows;
    attend_carefully<C>(found, rows, params, work, spans, row, 0.f, params.scale_log2, lane);
    for (int i = 0; i < 32; ++i) out[(row + 8 * (i >> 1 & 1)) * 64 + i / 4 * 8 + lane % 4 * 2 + (i & 1)] = found[i];
    for (int half = 0; half < 2; ++half) sums[row + 8 * half] = across_row(rows.sum[half], [](float a, float b) { return a + b; });
}
extern "C" void run(const Params* params, float* out, float* sums) {
    host::launch(params->seqlen_q / 16, 32, 1024, blockIdx, threadIdx,
                 [=] { params->causal ? attend<true>(*params, out, sums) : attend<false>(*params, out, sums); });
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return cuda_on_host.compile_host(tmp_path_factory.mktemp("careful"), compile.sources(), _MAIN, [])


def _attend(library: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    values: dict[str, Any] = {
        "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "sequences": 1, "q_heads": 2, "heads_per_kv_head": 1, "seqlen_q": _ROWS, "seqlen_k": _ROWS,
        "head_dim": 64, "v_head_dim": 64, "causal": causal, "window_left": -1, "window_right": -1, "scale_log2": 0.125 * math.log2(math.e),
        **{f"{name}_strides.{axis}": x.stride(i) for name, x in (("q", q), ("k", k), ("v", v)) for i, axis in enumerate(("batch", "head", "token"))},
    }  # fmt: skip
    packed = hopper_params.LAYOUT.pack(*(values.get(name, {"128s": b"", "f": 0.0}.get(code, 0)) for name, code in hopper_params.FIELDS))
    memory = np.zeros(len(packed) + 64, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + len(packed)] = np.frombuffer(packed, np.uint8)
    out, sums = torch.full((_ROWS, 64), float("nan")), torch.full((_ROWS, 1), float("nan"))
    pointer = cuda_on_host.ctypes.c_void_p
    library.run(pointer(memory.ctypes.data + start), pointer(out.data_ptr()), pointer(sums.data_ptr()))
    return out.double() / sums


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("power", [0, 8, 40])
def test_scores_of_any_size(power: int, causal: bool, library: Any) -> None:
    q, k, v = (torch.randn(1, 2, _ROWS, 64) for _ in range(3))
    q[:, :, ::3], k[:, :, :50:4] = q[:, :, ::3] * 2.0**power, k[:, :, :50:4] * 2.0**power
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    scores = q[0, 1].double() @ k[0, 1].double().T / 8
    if causal:
        scores = scores.masked_fill(~torch.ones(_ROWS, _ROWS, dtype=torch.bool).tril(), float("-inf"))
    assert (_attend(library, q, k, v, causal) - torch.softmax(scores, -1) @ v[0, 1].double()).abs().max() < 1e-3


def test_what_is_not_finite_reaches_only_who_sees_it(library: Any) -> None:
    q, k, v = (torch.randn(1, 2, _ROWS, 64).bfloat16() for _ in range(3))
    v[0, 1, 100, 5], k[0, 1, 120] = float("nan"), float("inf")
    bad = ~torch.isfinite(_attend(library, q, k, v, True))
    expected = torch.zeros(_ROWS, 64, dtype=torch.bool)
    expected[100:, 5] = expected[120:] = True
    assert torch.equal(bad, expected)
