"""The cpu backend: conformance on every instruction-set path of this processor, and what is its own."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from attnhub import testing
from attnhub.backend import Call
from attnhub.backends.cpu import backend, library
from attnhub.backends.reference import maths
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Bias, BlockSparse, BoolMask, Causal, LeftPad, Mask, Prefix, Segments, SeqLens, Window
from attnhub.problem import DeviceInfo, Problem
from attnhub.reasons import Code
from attnhub.testing.checks import fraction

if backend.probe():
    pytest.skip(f"the cpu backend cannot run here: {backend.probe()[0]}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

ISAS = library.available_isas()
BEST = ISAS[-1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _plan(dtype: str = "float32") -> Any:
    return backend.prepare(Problem(DeviceInfo("cpu"), dtype, dtype, 64, 64, 1, 1, 1, 1, 1))


def _qkv(shape_q: tuple[int, ...], shape_k: tuple[int, ...], v_dim: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    shape_v = (*shape_k[:-1], v_dim or shape_k[-1])
    return tuple(torch.randn(shape, generator=rng).to(dtype) for shape in (shape_q, shape_k, shape_v))


def _widened(call: Call, dtype: torch.dtype) -> Call:
    mask = call.mask
    if mask.bias is not None:
        mask = Mask(**{name: getattr(mask, name) for name in Mask.__dataclass_fields__} | {"bias": mask.bias.to(dtype)})
    return Call(call.q.to(dtype), call.k.to(dtype), call.v.to(dtype), mask, call.softmax_scale, call.softcap,
                None if call.sinks is None else call.sinks.to(dtype), 0.0, None, call.varlen, call.block_table, True)  # fmt: skip


def _judge(call: Call, out: Tensor, lse: Optional[Tensor] = None) -> None:
    """The suite's error rule, against the definition in fp64 and in the inputs' dtype."""
    dtype = call.q.dtype
    exact, exact_lse = maths.forward(_widened(call, torch.float64), None, torch.float64, exact_nan=True)
    plain, plain_lse = maths.forward(_widened(call, dtype), None, dtype, exact_nan=True)
    assert fraction(out, exact, plain, torch.finfo(dtype).eps) <= 1.0
    if lse is not None:
        # Weights that are rounded to bf16 come from a shorter polynomial, which lse feels: 3e-6.
        rough, unit = (plain_lse, 2.0**-23) if dtype == torch.float32 else (exact_lse, 2.0**-18)
        assert fraction(lse, exact_lse, rough, unit) <= 1.0


# -- conformance

# The best path gets every check; the others share its driver and get the short list, besides the tests below.
_LEVELS = [(i, check, level) for i in ISAS for level in ("tiny", "quick") for check in testing.checks("cpu", "cpu", level)]
_CONFORMANCE = [
    pytest.param(i, check, id=f"{i}-{check}")
    for i, check, level in _LEVELS
    if (check.kind in ("forward", "backward") and level == ("quick" if i == BEST else "tiny"))
    or (level == "quick" and check.kind in ("repeat", "reject") and i == BEST)
]  # fmt: skip


@pytest.mark.parametrize(("isa", "check"), _CONFORMANCE, indirect=["isa"])
def test_conformance(isa: str, check: testing.Check) -> None:
    check.run()


# -- every path, tails of every tile

# (q heads, kv heads, Sq, Sk, D, Dv): decoding below and above one split, tiles and panels with tails, row blocks, long chains
_SHAPES = [
    (1, 1, 8, 8, 16, 16), (4, 2, 33, 65, 64, 64), (2, 1, 100, 300, 40, 72), (3, 3, 1, 1100, 64, 64), (8, 2, 2, 1500, 80, 33),
    (4, 1, 16, 1300, 64, 64), (2, 2, 5, 3, 7, 9), (1, 1, 70, 270, 256, 512), (8, 1, 1, 700, 128, 128), (8, 1, 1, 515, 65, 5),
    (1, 1, 97, 129, 1, 130), (2, 1, 60, 90, 12, 1), (2, 1, 260, 520, 32, 48),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_tails(isa: str, dtype: str) -> None:
    plan = _plan(dtype)
    for q_heads, kv_heads, len_q, len_k, dim, v_dim in _SHAPES:
        q, k, v = _qkv((1, q_heads, len_q, dim), (1, kv_heads, len_k, dim), v_dim, DTYPES[dtype])
        for mask in (FULL, Causal(), Window(10, 3, "top_left")):
            call = Call(q, k, v, mask, dim**-0.5, need_lse=True)
            _judge(call, *plan.forward(call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("len_q", [1, 40])
def test_nan_behind_a_mask_reaches_nothing(isa: str, dtype: str, len_q: int) -> None:
    """Other rows may attend to the same NaN key, so that it is packed and multiplied: only they may see it."""
    q, k, v = _qkv((1, 4, len_q, 64), (1, 2, 300, 64), dtype=DTYPES[dtype])
    keep = torch.rand(1, 4, len_q, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    bad = torch.arange(0, 300, 7)
    keep[:, :, :, bad] = False
    clean = _plan(dtype).forward(Call(q, k, v, BoolMask(keep), 0.125))[0]
    k[:, :, bad], v[:, :, bad] = math.nan, math.inf
    v[:, :, bad[::2]] = math.nan
    got = _plan(dtype).forward(Call(q, k, v, BoolMask(keep), 0.125))[0]
    assert torch.equal(clean, got) or (clean - got).abs().max() < 1e-2 * clean.abs().max()
    assert got.isfinite().all()
    keep[:, 1, -1, bad[0]] = True
    poisoned = _plan(dtype).forward(Call(q, k, v, BoolMask(keep), 0.125))[0]
    assert poisoned[:, 1, -1].isnan().all()
    poisoned[:, 1, -1] = got[:, 1, -1]
    assert torch.equal(poisoned, got)


def test_nan_in_q_stays_in_its_row() -> None:
    q, k, v = _qkv((1, 2, 40, 64), (1, 2, 40, 64))
    clean = _plan().forward(Call(q, k, v, FULL, 0.125))[0]
    q[0, 1, 7] = math.nan
    got = _plan().forward(Call(q, k, v, FULL, 0.125))[0]
    assert got[0, 1, 7].isnan().all()
    got[0, 1, 7] = clean[0, 1, 7]
    assert torch.equal(clean, got)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_extreme_scores(isa: str) -> None:
    q, k, v = _qkv((1, 2, 20, 32), (1, 2, 50, 32))
    lowest = torch.zeros(1, 1, 20, 50)
    lowest[..., :5, :] = torch.finfo(torch.float32).min  # every key of a row equally hopeless: their mean, and never NaN
    lowest[..., 5:8, 20:] = torch.finfo(torch.float32).min
    lowest[..., 9, :] = -math.inf
    plan = _plan()
    for call in (
        Call(q, k, v, Bias(lowest), 0.125, need_lse=True),
        Call(q * 300, k, v, FULL, 0.125, need_lse=True),
        Call(q * 300, k, v, FULL, 0.125, softcap=30.0, need_lse=True),
        Call(q, k, v, FULL, -0.3, need_lse=True),
        Call(q, k, v, FULL, 0.0, need_lse=True),
        Call(q, k, v, FULL, 0.125, sinks=torch.tensor([80.0, -math.inf]), need_lse=True),
    ):
        _judge(call, *plan.forward(call))
    out, lse = plan.forward(Call(q, k, v, Bias(lowest), 0.125, need_lse=True))
    assert (out[:, :, 9] == 0).all() and lse is not None and lse[:, :, 9].isneginf().all()


def test_masked_tiles_are_skipped() -> None:
    """Windows and dropped blocks cost what they keep: a window of 64 keys over 6144 is far below the full time."""
    q, k, v = _qkv((1, 1, 6144, 64), (1, 1, 6144, 64))
    plan = _plan()

    def seconds(mask: Mask) -> float:
        import time

        plan.forward(Call(q, k, v, mask, 0.125))
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            plan.forward(Call(q, k, v, mask, 0.125))
            best = min(best, time.perf_counter() - start)
        return best

    blocks = torch.zeros(1, 1, 48, 48, dtype=torch.bool)
    blocks[..., :2] = True
    full = seconds(FULL)
    assert seconds(Window(32, 32)) < full / 3
    assert seconds(BlockSparse(blocks, (128, 128))) < full / 3


# -- layouts


@pytest.mark.parametrize("page_size", [1, 3, 16, 100])
@pytest.mark.parametrize("len_q", [1, 30])
def test_pages_equal_contiguous_bit_for_bit(page_size: int, len_q: int) -> None:
    used = torch.tensor([70, 0, 131], dtype=torch.int32)
    q, k, v = _qkv((3, 4, len_q, 32), (3, 2, 131, 32))
    count = -(-131 // page_size)
    order = torch.randperm(3 * count, generator=torch.Generator().manual_seed(0)).reshape(3, count)
    pages = [torch.full((3 * count, 2, page_size, 32), math.nan) for _ in "kv"]
    for b in range(3):
        for j in range(int(used[b])):
            for page, source in zip(pages, (k, v)):
                page[order[b, j // page_size], :, j % page_size] = source[b, :, j]
    mask = Causal() & SeqLens(used)
    table = order.to(torch.int32)
    table[1] = 1 << 30  # the entries of an empty sequence are never read
    plan = _plan()
    got, lse = plan.forward(Call(q, pages[0], pages[1], mask, 0.2, block_table=table, need_lse=True))
    want, want_lse = plan.forward(Call(q, k, v, mask, 0.2, need_lse=True))
    assert torch.equal(got, want) and torch.equal(lse, want_lse)
    assert (got[1] == 0).all()


def test_packed_sequences_equal_single_ones_bit_for_bit() -> None:
    lengths_q, lengths_k = [5, 0, 40, 1], [9, 4, 300, 0]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (lengths_q, lengths_k))
    q, k, v = _qkv((1, 4, 50, 32), (1, 2, 320, 32))
    plan = _plan()
    out, lse = plan.forward(Call(q, k, v, Causal(), 0.2, varlen=Varlen(cu_q, cu_k, 40, 300), need_lse=True))
    assert lse is not None
    for n in (0, 2):
        at_q, at_k = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        single, single_lse = plan.forward(Call(q[:, :, at_q], k[:, :, at_k], v[:, :, at_k], Causal(), 0.2, need_lse=True))
        assert torch.equal(out[:, :, at_q], single) and torch.equal(lse[:, :, at_q], single_lse)
    assert (out[:, :, 45:] == 0).all() and lse[:, :, 45:].isneginf().all()


def _everything(dtype: torch.dtype = torch.float32) -> Call:
    """Many parts at once, on views with odd strides inside buffers of NaN."""
    rng = torch.Generator().manual_seed(3)

    def odd(*shape: int) -> Tensor:
        room = torch.full((shape[0], shape[2] + 2, shape[1] + 1, shape[3] + 3), math.nan, dtype=dtype)
        view = room[:, 1:-1, :-1, 1:-2].transpose(1, 2)
        return view.copy_(torch.randn(shape, generator=rng))

    mask = (
        Causal() & Window(90) & SeqLens(torch.tensor([150, 97])) & LeftPad(torch.tensor([0, 11])) & Prefix(torch.tensor([20, 0]))
        & Segments(torch.randint(0, 2, (2, 77), generator=rng), torch.randint(0, 2, (2, 150), generator=rng))
        & BoolMask(torch.rand(1, 6, 1, 150, generator=rng) < 0.9) & Bias(torch.randn(2, 1, 77, 150, generator=rng)[..., ::1])
        & ALiBi(torch.rand(6, generator=rng) * 0.1) & BlockSparse(torch.rand(1, 1, 5, 8, generator=rng) < 0.8, (16, 20))
    )  # fmt: skip
    return Call(odd(2, 6, 77, 40), odd(2, 2, 150, 40), odd(2, 2, 150, 24), mask, 0.2, 15.0, torch.randn(6, generator=rng), need_lse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_everything_at_once(isa: str, dtype: str) -> None:
    call = _everything(DTYPES[dtype])
    out, lse = _plan(dtype).forward(call)
    _judge(call, out)
    assert lse is not None and torch.equal(lse.isneginf(), torch.zeros_like(lse, dtype=torch.bool))


# -- threads


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    plan = _plan()
    cases = [
        ((1, 2, 700, 64), (1, 2, 900, 64), Causal()), ((1, 8, 1, 64), (1, 2, 9000, 64), FULL), ((1, 3, 16, 32), (1, 1, 5000, 32), Causal()),
        ((2, 4, 300, 128), (2, 1, 300, 128), Window(50, 20)),
    ]  # fmt: skip
    for shape_q, shape_k, mask in cases:
        call = Call(*_qkv(shape_q, shape_k), mask, 0.125, need_lse=True)
        torch.set_num_threads(1)
        want = plan.forward(call)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            got = plan.forward(call)
            assert all(torch.equal(a, b) for a, b in zip(want, got)), (shape_q, threads)


def test_bits_of_rows_beside_nan_do_not_depend_on_threads() -> None:
    """Threads decide which rows share a task; a task whose V holds NaN for its later rows must not compute the earlier ones otherwise."""
    q, k, v = _qkv((1, 2, 200, 32), (1, 1, 200, 32))
    v[:, :, 150] = math.nan
    call = Call(q, k, v, Causal(), 0.2, need_lse=True)
    torch.set_num_threads(1)
    want = _plan().forward(call)[0]
    assert want[:, :, :150].isfinite().all() and want[:, :, 150:].isnan().all()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(_plan().forward(call)[0][:, :, :150], want[:, :, :150])


def test_python_threads_at_once() -> None:
    plan = _plan()
    calls = [Call(*_qkv((1, 2, 30 + 60 * n, 32), (1, 2, 200 + n, 32), seed=n), Causal(), 0.2) for n in range(4)] + [_everything()]
    want = [plan.forward(call)[0] for call in calls]
    wrong: list[int] = []

    def work(n: int) -> None:
        wrong.extend(n for _ in range(20) if not torch.equal(plan.forward(calls[n])[0], want[n]))

    threads = [threading.Thread(target=work, args=(n % len(calls),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- the C interface

_NAMES = (
    "abi_version", "dtype", "isa", "flags", "threads", "q", "k", "v", "out", "lse", "batch", "q_heads", "kv_heads", "seqlen_q", "seqlen_k",
    "head_dim", "v_head_dim", *(f"{t}{d}" for t in ("qs", "ks", "vs", "os") for d in range(3)), "scale", "softcap",
    "dropout_p", "dropout_seed", "dropout_offset", "mask", "parallel_for", "ctx",
)  # fmt: skip


class _Direct:
    """A valid call of the C interface whose members a test changes."""

    def __init__(self, len_q: int = 9, len_k: int = 12) -> None:
        self.q, self.k, self.v = _qkv((2, 4, len_q, 16), (2, 2, len_k, 16))
        self.room = torch.full((2, 4, len_q + 2, 20), math.nan)
        self.out = self.room[:, :, 1:-1, 2:18]
        self.members: dict[str, Any] = dict.fromkeys(_NAMES, 0)
        self.members.update(abi_version=library.ABI_VERSION, threads=1, batch=2, q_heads=4, kv_heads=2, seqlen_q=len_q, seqlen_k=len_k,
                            head_dim=16, v_head_dim=16, scale=0.25, softcap=0.0, dropout_p=0.0)  # fmt: skip
        for letter, tensor in (("q", self.q), ("k", self.k), ("v", self.v), ("o", self.out)):
            self.members["out" if letter == "o" else letter] = tensor.data_ptr()
            self.members.update({f"{letter}s{d}": tensor.stride(d) for d in range(3)})

    def run(self, mask: Optional[dict[str, Any]] = None, **changes: Any) -> tuple[int, str]:
        parts = library.Mask(window_left=-1, window_right=-1, **(mask or {}))
        values = self.members | changes
        if mask is not None:
            values["mask"] = ctypes.addressof(parts)
        lib = library.load()
        status = lib.attnhub_cpu_forward(library.CALL.pack(*(values[name] for name in _NAMES)))
        return status, lib.attnhub_cpu_last_error().decode()


def test_c_call_writes_only_its_output() -> None:
    direct = _Direct()
    status, _ = direct.run()
    assert status == library.OK
    want, _ = _plan().forward(Call(direct.q, direct.k, direct.v, FULL, 0.25))
    assert torch.equal(direct.out, want)
    direct.out.fill_(math.nan)
    assert direct.room.isnan().all()


def test_c_struct_matches_the_header() -> None:
    assert library.CALL.size == 37 * 8 and library.GRADIENTS.size == 23 * 8 and library.BLOCKS.size == 6 * 8
    assert ctypes.sizeof(library.Mask) % 8 == 0 and all(size.size % 8 == 0 for name, _ in library.Mask._fields_ for size in [getattr(library.Mask, name)])


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _rejections() -> list[tuple[str, dict[str, Any], Optional[dict[str, Any]]]]:
    bad_cu, good_cu, late_cu = _ints(0, 5, 3), _ints(0, 5, 9), _ints(0, 5, 100)
    keep = (bad_cu, good_cu, late_cu, _ints(3, 13), _ints(-1, 3), _ints(7, 7), _ints(0, 99))
    cu = {"cu_seqlens_k": good_cu.data_ptr(), "num_sequences": 2}
    _rejections.keep = keep  # type: ignore[attr-defined]
    return [
        ("abi_version", {"abi_version": 99}, None), ("dtype", {"dtype": 7}, None), ("isa", {"isa": 77}, None), ("flags", {"flags": 64}, None),
        ("threads", {"threads": 0}, None), ("head_dim", {"head_dim": 0}, None), ("head_dim", {"head_dim": 513}, None),
        ("v_head_dim", {"v_head_dim": 4096}, None), ("multiple of kv_heads", {"q_heads": 3}, None), ("multiple of kv_heads", {"kv_heads": 0}, None),
        ("batch", {"batch": -1}, None), ("seqlen_q", {"seqlen_q": -5}, None), ("seqlen_k", {"seqlen_k": 1 << 40}, None),
        ("softmax_scale", {"scale": math.nan}, None), ("softcap", {"softcap": -1.0}, None), ("softcap", {"softcap": math.inf}, None),
        ("dropout_p", {"dropout_p": 1.0}, None), ("dropout_p", {"dropout_p": -0.1}, None), ("dropout_p", {"dropout_p": math.nan}, None),
        ("q is null", {"q": 0}, None), ("k is null", {"k": 0}, None), ("v is null", {"v": 0}, None), ("out is null", {"out": 0}, None),
        ("q is not aligned", {"q": keep[0].data_ptr() + 1}, None), ("chunk", {}, {"chunk": -4}),
        ("segment_q and segment_k", {}, {"segment_q": keep[0].data_ptr()}), ("block_q and block_k", {}, {"block_k": keep[0].data_ptr()}),
        ("bias_dtype", {}, {"bias": keep[0].data_ptr(), "bias_dtype": 9}), ("block_sparse", {}, {"block_sparse": keep[0].data_ptr()}),
        ("go together", {}, cu), ("packed sequences need 1", {}, cu | {"cu_seqlens_q": good_cu.data_ptr()}),
        ("decreases", {"batch": 1}, cu | {"cu_seqlens_q": bad_cu.data_ptr()}), ("only 9 tokens", {"batch": 1}, cu | {"cu_seqlens_q": late_cu.data_ptr()}),
        ("it must be 0", {"batch": 1}, cu | {"cu_seqlens_q": keep[5].data_ptr()}),
        ("seqused_k[1] is 13", {}, {"seqused_k": keep[3].data_ptr()}), ("seqused_k[0] is -1", {}, {"seqused_k": keep[4].data_ptr()}),
        ("needs seqused_k", {}, {"block_table": keep[0].data_ptr(), "max_pages": 1, "num_pages": 1}),
        ("block_table[1, 0] is 99", {}, {"block_table": keep[6].data_ptr(), "block_table_strides": (1, 1), "max_pages": 1, "num_pages": 2,
                                         "seqused_k": keep[5].data_ptr()}),
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "changes", "mask"), _rejections(), ids=lambda x: x if isinstance(x, str) else "")
def test_c_call_rejects(text: str, changes: dict[str, Any], mask: Optional[dict[str, Any]]) -> None:
    direct = _Direct()
    status, error = direct.run(mask, **changes)
    assert status == library.INVALID and text in error
    assert direct.room.isnan().all()


def test_c_call_serves_empty_sizes() -> None:
    assert _Direct().run(batch=0)[0] == library.OK
    assert _Direct().run(seqlen_q=0, q=0, out=0)[0] == library.OK
    direct = _Direct()
    assert direct.run(seqlen_k=0, k=0, v=0)[0] == library.OK
    assert (direct.out == 0).all()


def test_null_call() -> None:
    assert library.load().attnhub_cpu_forward(None) == library.INVALID


def test_caller_brings_the_threads() -> None:
    """A parallel_for of the caller gets at most `threads` units and may run them in any order on one thread."""
    direct, seen = _Direct(400, 400), []
    task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, task, ctypes.c_void_p)
    def backwards(ctx: Optional[int], count: int, fn: Any, arg: int) -> None:
        seen.append((ctx, count))
        for i in reversed(range(count)):
            fn(arg, i)

    status, _ = direct.run(threads=3, parallel_for=ctypes.cast(backwards, ctypes.c_void_p).value, ctx=123)
    assert status == library.OK and seen == [(123, 3)]
    assert torch.equal(direct.out, _plan().forward(Call(direct.q, direct.k, direct.v, FULL, 0.25))[0])


# -- declaration and choice


def test_unknown_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="ATTNHUB_CPU_ISA"):
        _plan()


def test_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    library.load.cache_clear()
    monkeypatch.setattr(library, "FILE", "libnothing.so")
    try:
        (reason,) = backend.probe()
        assert reason.code is Code.NOT_BUILT and "cmake" in reason.hint
    finally:
        library.load.cache_clear()


@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("mask", [FULL, Causal(), Causal("top_left"), Window(5, 3) & Causal()], ids=str)
@pytest.mark.parametrize("order", ["heads", "tokens", "expanded", "fused"])
def test_a_repeated_call_is_the_call(order: str, mask: Mask, need_lse: bool) -> None:
    """Other tensors of the same layout, by the shorter way: the same bits in the same strides, with any number of threads."""
    plan = _plan()

    def call(seed: int, v_dim: int = 32) -> Call:
        q, k, v = _qkv((2, 4, 21, 32), (2, 2, 33, 32), v_dim, seed=seed)
        if order == "tokens":
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        elif order == "expanded":
            q = q[:, :1].expand(2, 4, 21, 32)
        elif order == "fused":
            q, k, v = torch.randn(2, 33, 3, 4, 32, generator=torch.Generator().manual_seed(seed)).permute(2, 0, 3, 1, 4)
        return Call(q, k, v, mask, 0.3, 2.0, need_lse=need_lse)

    for v_dim in (32, 24):
        again = plan.repeat(call(0, v_dim))
        assert again is not None
        for seed, threads in ((0, 1), (1, 2), (2, 1)):
            torch.set_num_threads(threads)
            other = call(seed, v_dim)
            (out, lse), (want, want_lse) = again(other.q, other.k, other.v), plan.forward(other)
            assert torch.equal(out, want) and out.stride() == want.stride() and (lse is None) == (want_lse is None)
            assert lse is None or torch.equal(lse, want_lse)


def test_calls_with_a_cache_are_not_repeated() -> None:
    q, k, v = _qkv((1, 2, 4, 16), (1, 2, 4, 16))
    assert _plan().repeat(Call(q, k, v, SeqLens(torch.tensor([3], dtype=torch.int32)), 0.25)) is None
    assert _plan().repeat(Call(q, k, v, FULL, 0.25, block_table=torch.zeros(1, 1, dtype=torch.int32))) is None


def test_launcher_turns_errors_into_exceptions() -> None:
    q, k, v = _qkv((1, 2, 4, 16), (1, 2, 4, 16))
    with pytest.raises(ValueError, match=r"seqused_k\[0\] is 9"):
        _plan().forward(Call(q, k, v, SeqLens(torch.tensor([9])), 0.25))


def test_subnormals_survive_loading() -> None:
    """A library linked with -ffast-math would flush them in the whole process."""
    assert (torch.tensor(1e-40) * 1.0).item() != 0.0
