"""The cuda backend's kernel for compute capability 9.0, without a GPU: its own schedule.cuh, compiled for the host, hands out each tile once."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from cuda_launch import Driver, packed, tensors
from torch import Tensor

from attnhub.backend import Call
from attnhub.backends.cuda import compile, hopper_plan
from attnhub.dense import allowed_pairs
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Causal, Chunk, LeftPad, Mask, Prefix, SeqLens, Window

_SHIM = """
#include <algorithm>
#include <iterator>
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;
#include "hopper/schedule.cuh"
template <bool Left, bool Right> struct Config {
    static constexpr int kRows = 32, kKeys = 16;
    using Mask = attnhub::Mask<Left, Right>;
};
template <bool Left, bool Right> static void look(const attnhub::Params& params, int index, int* out) {
    using C = Config<Left, Right>;
    const attnhub::Work work = attnhub::place_tile<C>(params, index);
    const typename C::Mask mask{work.len_k, work.offset, work.leftpad, work.prefix};
    const int last = std::min(work.row + 31, work.len_q - 1), first = std::min(work.row, last);
    const attnhub::Span full = mask.template full_tiles<16>(params, first, last - first + 1);
    const int found[] = {work.row, work.head, work.kv_head, work.sequence, work.batch, work.q_token, work.k_token, work.len_q,
                         work.first_tile, work.last_tile, full.first, full.last};
    std::copy(std::begin(found), std::end(found), out);
}
extern "C" void look(const attnhub::Params* params, int left, int right, int index, int* out) {
    (left ? right ? look<true, true> : look<true, false> : right ? look<false, true> : look<false, false>)(*params, index, out);
}
"""


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The device's own schedule.cuh, compiled for the host."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "shim.cpp").write_text(_SHIM)
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-I", compile.KERNELS, folder / "shim.cpp", "-o", folder / "shim.so"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "shim.so")).look


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


_MASKS: dict[str, Mask] = {
    "full": FULL, "causal": Causal(), "top left": Causal("top_left"), "window": Window(37, 5), "sliding": Causal() & Window(20),
    "chunk": Causal() & Chunk(24), "lengths": SeqLens(_ints(130, 0, 77)) & Causal(), "left padding": LeftPad(_ints(40, 0, 129)) & Causal(),
    "prefix": Causal() & Prefix(_ints(50, 0, 100)),
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(200, 130), (64, 130), (131, 130)], ids=str)
@pytest.mark.parametrize("name", _MASKS)
def test_each_tile_is_handed_out_once_and_meets_the_keys_that_its_rows_see(
    name: str, lengths: tuple[int, int], look: Any, driver: Driver
) -> None:
    mask, (length_q, length_k) = _MASKS[name], lengths
    call = Call(*tensors(3, length_q, length_k), mask, 0.125)  # type: ignore[arg-type]
    data = tuple(0 if t is None else t.data_ptr() for t in (None, None, mask.seqused_k, mask.leftpad, mask.prefix, None, None))
    argument, v, launch = packed(call, 32, 16, data)
    pairs = allowed_pairs(mask, 3, length_q, length_k, (0, length_q), torch.device("cpu")).expand(3, 1, length_q, length_k)[:, 0].numpy()
    total = 12 * -(-length_q // 32)
    found = np.zeros(12, np.int32)
    seen, length_before, phases = set(), None, 0
    for index in range(total):
        look(argument, int(v.left), int(v.right), index, found.ctypes.data_as(ctypes.c_void_p))
        row, head, kv_head, sequence, batch, q_token, k_token, len_q, first, last, full_first, full_last = found.tolist()
        seen.add((sequence, head, row))
        assert (kv_head, batch, q_token, k_token, len_q) == (head // 2, sequence, 0, 0, length_q)
        allowed = pairs[sequence, row : row + 32]
        some, every = (np.add.reduceat(x, range(0, length_k, 16)) for x in (allowed.any(0), ~allowed.all(0)))
        assert not [n for n in np.flatnonzero(some) if not first <= n < last]
        assert not [n for n in range(max(full_first, first), min(full_last, last)) if every[n]]
        if not allowed.any():
            assert first >= last
        if name == "causal":
            phases += length_before is not None and last > length_before
            length_before = last
    assert len(seen) == total and launch.grid[0] == 7
    assert phases <= 3  # longest first, but for sections that start again


@pytest.mark.parametrize("phases", [True, False])
def test_long_causal_tiles_come_first(phases: bool, look: Any, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """In phases, where sequences are long: the lower half of all heads in sections, then half of the rest, and so on; short tiles are left for
    the end. Else a section of heads after the other.
    """
    monkeypatch.setattr(hopper_plan, "_LONG", 512 if phases else 513)
    monkeypatch.setattr(hopper_plan, "_SECTION_BYTES" if phases else "_SHORT_SECTION_BYTES", 3 * 512 * 64 * 2)
    call = Call(*tensors(2, 512, 512), Causal(), 0.125)  # type: ignore[arg-type]
    argument, _, _ = packed(call, 32, 16)
    found = np.zeros(12, np.int32)
    order = []
    for index in range(8 * 16):
        look(argument, 0, 1, index, found.ctypes.data_as(ctypes.c_void_p))
        order.append((int(found[3]) * 4 + int(found[1]), int(found[0]) // 32))
    assert len(set(order)) == 128
    assert order[:4] == [(0, 15), (1, 15), (2, 15), (0, 14)]
    if phases:
        assert {tile for _, tile in order[:64]} == set(range(8, 16)) and [tile for _, tile in order[-8:]] == [0] * 8
    else:
        assert {head for head, _ in order[:48]} == {0, 1, 2} and order[47] == (2, 0) and order[-1] == (7, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_have_a_slot_for_each_tile(causal: bool, look: Any, driver: Driver) -> None:
    lengths = [0, 5, 0, 32, 33, 64, 31, 0, 100, 1]
    starts_q = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    starts_k = torch.tensor([0, *itertools.accumulate(n // 2 for n in lengths)], dtype=torch.int32)
    tokens = int(starts_q[-1]) + 45
    mask = Causal() if causal else FULL
    call = Call(*tensors(1, tokens, int(starts_k[-1]) + 3), mask, 0.125, varlen=Varlen(starts_q, starts_k, 100, 50))  # type: ignore[arg-type]
    argument, v, _ = packed(call, 32, 16, (starts_q.data_ptr(), starts_k.data_ptr(), 0, 0, 0, 0, 0))
    found = np.zeros(12, np.int32)
    seen = []
    for index in range(4 * (tokens // 32 + len(lengths) + 1)):
        look(argument, int(v.left), int(v.right), index, found.ctypes.data_as(ctypes.c_void_p))
        row, head, _, sequence, batch, q_token, k_token, len_q, first, last, _, _ = found.tolist()
        if row >= len_q:
            continue
        seen.append((sequence, head, row))
        last_one = sequence == len(lengths)
        assert batch == 0 and q_token == starts_q[sequence] and len_q == (45 if last_one else lengths[sequence])
        assert last_one or k_token == starts_k[sequence]
        keys = 0 if last_one else lengths[sequence] // 2
        if causal:
            keys = max(0, min(keys, row + 32 + keys - len_q))
        assert (first, last) == (0, -(-keys // 16)) or (keys == 0 and first >= last)
    wanted = [(b, h, row) for b, n in enumerate([*lengths, 45]) for h in range(4) for row in range(0, n, 32)]
    assert sorted(seen) == sorted(wanted)
