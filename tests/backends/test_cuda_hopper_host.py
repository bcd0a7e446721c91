"""The cuda backend's kernel for compute capability 9.0, without a GPU: tiles are handed out once, the launch's argument, errors."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnhub.backend import Call, PrepareError
from attnhub.backends.cuda import backend, compile, decode, decode_plan, hopper, hopper_params, hopper_plan, launcher, loading, tensor_map
from attnhub.backends.cuda.hopper import HopperVariant
from attnhub.backends.cuda.variant import make as make_portable
from attnhub.dense import allowed_pairs
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Causal, Chunk, LeftPad, Mask, Prefix, SeqLens, Window
from attnhub.problem import DeviceInfo, Feature, Problem
from attnhub.reasons import Code
from attnhub.selector import without_gradients

HOPPER = DeviceInfo("cuda", "nvidia", (9, 0), "H100")


# ---------------------------------------------------------------------------------------------- schedule

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
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-I",
        str(compile.KERNELS),
        str(folder / "shim.cpp"),
        "-o",
        str(folder / "shim.so"),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "shim.so")).look


class _Driver:
    """Keeps what the driver is asked for; a map is the tensor's address and zeros."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.encoded: list[dict[str, Any]] = []
        self.moved: list[tuple[int, int]] = []

    def cuTensorMapEncodeTiled(  # noqa: N802
        self, target: int, dtype: int, rank: int, address: int, dims: Any, strides: Any, box: Any, steps: Any, *rest: int
    ) -> int:
        assert not target % 64
        ctypes.memmove(target, address.to_bytes(8, "little"), 8)
        self.encoded.append(
            {
                "dtype": dtype,
                "rank": rank,
                "dims": tuple(dims),
                "strides": tuple(strides),
                "box": tuple(box),
                "steps": tuple(steps),
                "rest": rest,
            }
        )
        return self.status

    def cuTensorMapReplaceAddress(self, target: int, address: int) -> int:  # noqa: N802
        ctypes.memmove(target, address.to_bytes(8, "little"), 8)
        self.moved.append((target, address))
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> _Driver:
    fake = _Driver()
    monkeypatch.setattr(tensor_map, "_driver", lambda: fake)
    return fake


def _tensors(batch: int, length_q: int, length_k: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (64, 64)) -> list[Tensor]:
    shapes = ((heads[0], length_q, dims[0]), (heads[1], length_k, dims[0]), (heads[1], length_k, dims[1]))
    return [torch.randn(batch, *shape).bfloat16() for shape in shapes]


def _features(call: Call) -> frozenset[Feature]:
    found = set(call.mask.features())
    found |= {Feature.VARLEN} if call.varlen is not None else set()
    return frozenset(found)


def _launch(variant: Any, call: Call, blocks: int = 132) -> tuple[hopper_plan.Launch, list[bytes]]:
    """And the arguments of what it launches, as the driver reads them."""
    started: list[bytes] = []

    def launch(*numbers: int) -> None:
        assert numbers == (5, *found.grid, variant.threads, 1, 1, variant.shared_bytes, 9, numbers[-2], 0)
        started.append(ctypes.string_at(ctypes.c_void_p.from_address(numbers[-2]).value, hopper_params.LAYOUT.size))

    found = hopper_plan.Launch(variant, call, 0, blocks, loading.Kernel(SimpleNamespace(ptr=5), launch))
    return found, started


def _packed(call: Call, rows: int, keys: int, data: tuple[int, ...] = (0,) * 7) -> tuple[bytes, HopperVariant, hopper_plan.Launch]:
    """The argument of a call for tiles of these sizes."""
    v = hopper.make("bfloat16", call.q.shape[3], call.v.shape[3], _features(call), call.q.shape[2])
    sized = SimpleNamespace(
        rows=rows, tiles=dataclasses.replace(v.tiles, keys=keys), left=v.left, right=v.right, threads=v.threads, shared_bytes=v.shared_bytes
    )
    launch, started = _launch(sized, call, 7)
    launch.start(9, [x.data_ptr() for x in (call.q, call.k, call.v, torch.empty_like(call.q))], (0, *data, 0))
    (found,) = started
    return found, v, launch


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
    name: str, lengths: tuple[int, int], look: Any, driver: _Driver
) -> None:
    mask, (length_q, length_k) = _MASKS[name], lengths
    call = Call(*_tensors(3, length_q, length_k), mask, 0.125)  # type: ignore[arg-type]
    data = tuple(0 if t is None else t.data_ptr() for t in (None, None, mask.seqused_k, mask.leftpad, mask.prefix, None, None))
    packed, v, launch = _packed(call, 32, 16, data)
    pairs = allowed_pairs(mask, 3, length_q, length_k, (0, length_q), torch.device("cpu")).expand(3, 1, length_q, length_k)[:, 0].numpy()
    total = 12 * -(-length_q // 32)
    found = np.zeros(12, np.int32)
    seen, length_before, phases = set(), None, 0
    for index in range(total):
        look(packed, int(v.left), int(v.right), index, found.ctypes.data_as(ctypes.c_void_p))
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
def test_long_causal_tiles_come_first(phases: bool, look: Any, driver: _Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """In phases, where sequences are long: the lower half of all heads in sections, then half of the rest, and so on; short tiles are left for
    the end. Else a section of heads after the other.
    """
    monkeypatch.setattr(hopper_plan, "_LONG", 512 if phases else 513)
    monkeypatch.setattr(hopper_plan, "_SECTION_BYTES" if phases else "_SHORT_SECTION_BYTES", 3 * 512 * 64 * 2)
    call = Call(*_tensors(2, 512, 512), Causal(), 0.125)  # type: ignore[arg-type]
    packed, _, _ = _packed(call, 32, 16)
    found = np.zeros(12, np.int32)
    order = []
    for index in range(8 * 16):
        look(packed, 0, 1, index, found.ctypes.data_as(ctypes.c_void_p))
        order.append((int(found[3]) * 4 + int(found[1]), int(found[0]) // 32))
    assert len(set(order)) == 128
    assert order[:4] == [(0, 15), (1, 15), (2, 15), (0, 14)]
    if phases:
        assert {tile for _, tile in order[:64]} == set(range(8, 16)) and [tile for _, tile in order[-8:]] == [0] * 8
    else:
        assert {head for head, _ in order[:48]} == {0, 1, 2} and order[47] == (2, 0) and order[-1] == (7, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_have_a_slot_for_each_tile(causal: bool, look: Any, driver: _Driver) -> None:
    lengths = [0, 5, 0, 32, 33, 64, 31, 0, 100, 1]
    starts_q = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    starts_k = torch.tensor([0, *itertools.accumulate(n // 2 for n in lengths)], dtype=torch.int32)
    tokens = int(starts_q[-1]) + 45
    mask = Causal() if causal else FULL
    call = Call(*_tensors(1, tokens, int(starts_k[-1]) + 3), mask, 0.125, varlen=Varlen(starts_q, starts_k, 100, 50))  # type: ignore[arg-type]
    packed, v, _ = _packed(call, 32, 16, (starts_q.data_ptr(), starts_k.data_ptr(), 0, 0, 0, 0, 0))
    found = np.zeros(12, np.int32)
    seen = []
    for index in range(4 * (tokens // 32 + len(lengths) + 1)):
        look(packed, int(v.left), int(v.right), index, found.ctypes.data_as(ctypes.c_void_p))
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


# ---------------------------------------------------------------------------------------------- launch


def _field(packed: bytes, name: str) -> Any:
    code = dict(hopper_params.FIELDS)[name]
    return hopper_params.struct.unpack_from("=" + code, packed, hopper_params.offsets()[name])[0]


def test_tensor_maps_describe_the_tensors(driver: _Driver) -> None:
    q, k, v = _tensors(2, 100, 300, dims=(96, 64))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = v[:, :1].expand(2, 2, 300, 64)
    call = Call(q, k, v, FULL, 0.125)
    launch, started = _launch(hopper.make("bfloat16", 96, 64), call)
    shapes = [(e["dims"], e["strides"], e["box"]) for e in driver.encoded]
    assert shapes == [
        ((96, 100, 4, 2), (192, 19200, 76800), (64, 64, 1, 1)),
        ((96, 300, 2, 2), (384, 192, 115200), (64, 128, 1, 1)),
        ((64, 300, 1, 2), (128, 128, 76800), (64, 128, 1, 1)),
        ((64, 100, 4, 2), (128, 12800, 51200), (64, 64, 1, 1)),
    ]
    assert all((e["dtype"], e["rank"], e["steps"], e["rest"]) == (9, 4, (1, 1, 1, 1), (0, 3, 3, 0)) for e in driver.encoded)
    out = torch.empty(2, 4, 100, 64, dtype=torch.bfloat16)
    others = tuple(range(1001, 1010))
    launch.start(9, [x.data_ptr() for x in (q, k, v, out)], others)
    (packed,) = started
    assert [packed[at : at + 8] for at in hopper_params.MAPS_AT] == [x.data_ptr().to_bytes(8, "little") for x in (q, k, v, out)]
    assert [_field(packed, name) for name in ("q", "k", "v", "out", "lse", "counters")] == [x.data_ptr() for x in (q, k, v, out)] + [
        1001,
        1009,
    ]
    assert [_field(packed, name) for name in ("q_steps", "k_steps", "v_steps", "out_by_map", "heads_per_kv_head")] == [3, 3, 2, 1, 2]
    moved = len(driver.moved)
    launch.start(9, [x.data_ptr() for x in (q, k, v, out)], others)
    assert len(driver.moved) == moved and started[1] == packed  # nothing moved
    other = k.clone()
    launch.start(9, [x.data_ptr() for x in (q, other, v, out)], others)
    assert len(driver.moved) == moved + 1
    for first in (k, other, k):  # the driver makes each map once
        launch.start(9, [x.data_ptr() for x in (q, first, v, out)], others)
        found = [int.from_bytes(started[-1][at : at + 8], "little") for at in hopper_params.MAPS_AT]
        assert found == [x.data_ptr() for x in (q, first, v, out)] and _field(started[-1], "k") == first.data_ptr()
    assert len(driver.moved) == moved + 2
    for n in range(1000):
        launch.start(9, [16 * n, *(x.data_ptr() for x in (k, v, out))], others)
    assert int.from_bytes(started[-1][:8], "little") == 16 * 999 and len(launch._maps[0]) <= 64


def test_numbers_of_a_call(driver: _Driver) -> None:
    q, k, v = _tensors(2, 100, 300)
    mask = Causal() & Window((1 << 31) - 2) & ALiBi(torch.rand(2, 4))
    call = Call(q, k, v, mask, 0.25, softcap=30.0)
    packed, _, launch = _packed(call, 128, 128)
    names = (
        "causal",
        "top_left",
        "window_left",
        "window_right",
        "chunk",
        "alibi_batch_stride",
        "phases",
        "q_tiles",
        "tile_total",
        "head_dim",
    )
    assert [_field(packed, name) for name in names] == [1, 0, (1 << 30) - 1, -1, 0, 4, 1, 1, 8, 64]
    assert _field(packed, "scale_log2") == pytest.approx(0.25 * 1.442695, rel=1e-5)
    assert _field(packed, "cap_inner") == pytest.approx(2 * 1.442695 * 0.25 / 30, rel=1e-5)
    assert _field(packed, "cap_outer") == pytest.approx(30 * 1.442695, rel=1e-5)
    assert launch.uneven and launch.grid == (7, 1, 1)
    zero, _, plain = _packed(Call(q, k, v, FULL, 0.0), 128, 128)
    assert _field(zero, "scale_log2") > 0 and not plain.uneven


def test_what_the_kernel_does_not_serve_goes_to_the_portable_one() -> None:
    q, k, v = _tensors(2, 100, 300)
    variant, wide = hopper.make("bfloat16", 64, 64), hopper.make("bfloat16", 256, 256)
    assert hopper_plan.serves(variant, Call(q, k, v, FULL, 0.125)) and hopper_plan.serves(wide, Call(q, k, v, FULL, 0.125))
    odd = torch.empty(2, 2, 300, 136).bfloat16()[..., :132]
    assert hopper_plan.serves(variant, Call(q, k, odd, FULL, 0.125)) and not hopper_plan.serves(wide, Call(q, k, odd, FULL, 0.125))
    for call in (
        Call(q, k, v, FULL, -0.125), Call(q, k, v, FULL, 0.125, softcap=2000.0), Call(q, k[:, :, :1].expand(2, 2, 300, 64), v, FULL, 0.125),
        Call(q.new_empty(q.numel() + 8).view(-1)[1:-7].view(q.shape), k, v, FULL, 0.125), Call(q, k, torch.empty(2, 2, 300, 68).bfloat16()[..., :64], FULL, 0.125),
    ):  # fmt: skip
        assert not hopper_plan.serves(variant, call)
        made: list[Call] = []
        portable = SimpleNamespace(forward=lambda c, made=made: made.append(c) or ("out", None))
        plan = hopper_plan.HopperPlan(variant, "", lambda portable=portable: portable)  # type: ignore[misc]
        assert plan._launch(call, 0) == ("out", None) and made == [call]


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
        ({"seqlen_q": 16, "kv_heads": 4, "batch": 16, "features": frozenset({Feature.GQA})}, "triton"), ({"seqlen_q": 16, "seqlen_k": 128, "kv_heads": 4}, "sdpa"),
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



# ---------------------------------------------------------------------------------------------- errors


def test_a_driver_without_tensor_maps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_map._driver.cache_clear()

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(tensor_map.ctypes, "CDLL", missing)
    with pytest.raises(PrepareError, match=r"libcuda\.so\.1") as caught:
        tensor_map.encode(0, _tensors(1, 64, 64)[0], 64)
    assert caught.value.reason.code is Code.NO_DEVICE
    monkeypatch.setattr(tensor_map.ctypes, "CDLL", lambda name: SimpleNamespace())
    with pytest.raises(PrepareError):
        tensor_map.encode(0, _tensors(1, 64, 64)[0], 64)


def test_an_unaligned_pointer_is_named(driver: _Driver) -> None:
    driver.status = 1
    memory = np.zeros(256, np.uint8)
    x = _tensors(1, 64, 64)[0]
    unaligned = x.new_empty(x.numel() + 8).view(-1)[1:-7].view(x.shape)
    target = memory.ctypes.data + -memory.ctypes.data % 64
    with pytest.raises(PrepareError, match="multiple of 16 bytes") as caught:
        tensor_map.encode(target, unaligned, 64)
    assert caught.value.reason.code is Code.ALIGNMENT
    with pytest.raises(PrepareError) as caught:
        tensor_map.encode(target, x, 64)
    assert caught.value.reason.code is Code.STRIDE
    with pytest.raises(PrepareError, match="multiples of 16 bytes"):
        tensor_map.move(target, 8)


class _Kernel:
    kernel = "the function"

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")


def _fake_cupy(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    runtime = SimpleNamespace(setDevice=lambda index: None)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=module, cuda=SimpleNamespace(runtime=runtime)))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "device", lambda index: __import__("contextlib").nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launcher, "_cubin", lambda variant: "kernel.cubin")


_PROBLEM = Problem(HOPPER, "bfloat16", "bfloat16", 128, 128, 4, 4, 2, 128, 128)


def test_too_little_shared_memory_is_a_prepare_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_cupy(monkeypatch, lambda path: SimpleNamespace(get_function=lambda name: _Kernel()))
    with pytest.raises(PrepareError, match="197120 bytes of shared memory") as caught:
        backend.prepare(_PROBLEM)
    assert caught.value.reason.code is Code.OUT_OF_RESOURCES


def test_a_cubin_that_does_not_load_is_a_prepare_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> Any:
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available")

    _fake_cupy(monkeypatch, fail)
    with pytest.raises(PrepareError, match="NO_BINARY_FOR_GPU") as caught:
        backend.prepare(_PROBLEM)
    assert caught.value.reason.code is Code.COMPILE_FAILED


def test_a_launch_takes_the_thread_s_own_counters_and_a_graph_its_own(monkeypatch: pytest.MonkeyPatch, driver: _Driver) -> None:
    """Whoever may run beside another launch has other counters."""
    made: list[int] = []
    monkeypatch.setattr(hopper_plan.torch, "zeros", lambda *shape, **kwargs: made.append(1) or object())
    monkeypatch.setattr(hopper_plan, "lasting", lambda make, index: make())
    monkeypatch.setattr(hopper_plan, "_memory", hopper_plan._Memory())
    capturing = [False]
    monkeypatch.setattr(hopper_plan, "is_capturing", lambda: capturing[0])
    first = hopper_plan._counters(0, 1)
    assert hopper_plan._counters(0, 1) is first and hopper_plan._counters(0, 2) is not first and hopper_plan._counters(1, 1) is not first
    capturing[0] = True
    captured = [hopper_plan._counters(0, 1) for _ in range(2)]
    assert first is not captured[0] is not captured[1] and len(made) == 5


@pytest.fixture(params=["hopper", "decode", "portable"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, driver: _Driver) -> tuple[loading.CubinPlan, Call, list[tuple[int, ...]]]:
    """A plan for tensors of the host, a call of it, and what its kernel's launch is called with."""
    for module in (loading, hopper_plan, decode_plan, launcher):
        for name, found in (("current_device", lambda: -1), ("raw_stream", lambda index: 9), ("is_capturing", lambda: False), ("lasting", lambda make, index: make())):
            monkeypatch.setattr(module, name, found, raising=False)
        monkeypatch.setattr(module, "empty_strided", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype), raising=False)
    monkeypatch.setattr(loading, "_bind_thread", lambda index: None)
    monkeypatch.setattr(hopper_plan, "processors", lambda index: 132)
    monkeypatch.setattr(hopper_plan, "_memory", hopper_plan._Memory())
    monkeypatch.setattr(decode_plan, "slots", lambda index, shared_bytes: 132)
    monkeypatch.setattr(decode_plan, "_scratch", decode_plan._Scratch())
    monkeypatch.setattr(decode_plan, "_zeros", lambda count, index: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(decode_plan, "_floats", lambda count, index: torch.empty(count))
    call = Call(*_tensors(1, 1 if request.param == "decode" else 200, 1000), FULL, 0.125)  # type: ignore[arg-type]
    plan: loading.CubinPlan
    if request.param == "hopper":
        plan = hopper_plan.HopperPlan(hopper.make("bfloat16", 64, 64), "", lambda: pytest.fail("not served"))
    elif request.param == "decode":
        plan = decode_plan.DecodePlan(decode.choose(dataclasses.replace(_PROBLEM, head_dim=64, v_head_dim=64, seqlen_q=1)), "")
    else:
        plan = launcher.CudaPlan(make_portable(arch="sm_90", turing=False, dtype="bfloat16", head_dim=64, v_head_dim=64), "")
    calls: list[tuple[int, ...]] = []
    plan._kernels[-1] = loading.Kernel(SimpleNamespace(ptr=5), lambda *numbers: calls.append(numbers))
    return plan, call, calls


def test_each_thread_has_an_argument_of_its_own(started: Any) -> None:
    """CuPy lets another thread run while the driver reads it."""
    plan, call, calls = started

    def run() -> list[bool]:
        found = []
        for _ in range(3):
            assert plan.forward(call)[0].shape == call.q.shape
            found.append(again is not None and again(call.q, call.k, call.v) is not None)
        return found

    plan.forward(call)
    again = plan.repeat(call)
    mine = run()
    own = {numbers[-2] for numbers in calls}
    calls.clear()
    if again is not None:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(again, call.q, call.k, call.v).result() is None and not calls  # a thread's first call goes the long way
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() == mine
    theirs = {numbers[-2] for numbers in calls}
    assert len(own) == len(theirs) == 1 and own != theirs
    (where,) = theirs
    assert all(numbers[0] == 5 and numbers[-3:] == (9, where, 0) for numbers in calls)


def test_an_error_of_a_launch_is_the_driver_s(started: Any) -> None:
    plan, call, _ = started

    def fail(*numbers: int) -> None:
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")

    plan._kernels[-1] = loading.Kernel(SimpleNamespace(ptr=5), fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
            plan.forward(call)


def test_the_driver_copies_from_where_an_argument_lies() -> None:
    arguments = [loading.Argument(size) for size in (8, 800, 833)]
    for n, argument in enumerate(arguments):
        argument.buffer[:] = bytes([n + 1]) * len(argument.buffer)
    for n, argument in enumerate(arguments):
        address = ctypes.c_void_p.from_address(argument.parameters).value
        assert address == argument.address and address % 64 == 0
        assert ctypes.string_at(address, len(argument.buffer)) == bytes([n + 1]) * len(argument.buffer)


def test_what_lasts_is_made_by_another_thread_on_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"stream of {index}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: setattr(current, "stream", stream) or contextlib.nullcontext())

    def make() -> Any:
        return threading.get_ident(), current.stream

    thread, stream = loading.lasting(make, 3)  # type: ignore[misc]
    assert thread != threading.get_ident() and stream == "stream of 3"
    with pytest.raises(ZeroDivisionError):
        loading.lasting(lambda: 1 // 0, 3)  # type: ignore[arg-type, return-value]


def test_raw_stream_is_torch_s() -> None:
    assert loading.raw_stream is getattr(torch._C, "_cuda_getCurrentRawStream", loading._public_stream)
