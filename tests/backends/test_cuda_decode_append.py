"""New tokens appended, and rotated, by the decode kernel's own launch: its source on the host (cuda_on_host.py) below the plan that also serves devices,
against torch operations followed by attention. What only a device can show is in test_cuda_decode_append_device.py.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import cuda_on_host
import numpy as np
import pytest
import torch
from torch import Tensor

import attnhub
from attnhub import KVCache, Rotary, runtime, testing
from attnhub.backend import Append, Backend, Call, Plan, PrepareError
from attnhub.backends.cuda import backend as cuda_backend
from attnhub.backends.cuda import decode, decode_append, decode_params, decode_plan, loading
from attnhub.backends.cuda.decode import DecodeVariant
from attnhub.backends.cuda.decode_plan import DecodePlan
from attnhub.capability import Capability, DeviceRange
from attnhub.integrations.flash_attn import flash_attn_with_kvcache
from attnhub.mask import FULL, ALiBi, Causal, LeftPad, Mask, Window
from attnhub.problem import DeviceInfo, Problem
from attnhub.reasons import Code, Reason
from attnhub.registry import registry

NAME = "append_on_host"


class Host(Backend):
    """The plan of devices, whose kernel is a library for the host."""

    name = NAME
    automatic = False
    capability = Capability(
        (DeviceRange("cpu", dtypes=frozenset({"float16", "bfloat16"})),), cuda_backend.capability.features, (1, 256, 1), align_bytes=16,
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: dict[DecodeVariant, Any] = {}
        #: Of each launch: `DecodeVariant.append`, splits.
        self.launched: list[int] = []
        self.splits: list[int] = []
        self.backwards = False

    def prepare(self, problem: Problem) -> Plan:
        return self.plan(decode.choose(dataclasses.replace(problem, device=DeviceInfo("cuda", "nvidia", (9, 0), "H100"))))

    def plan(self, variant: DecodeVariant) -> DecodePlan:
        found = DecodePlan(variant, "", self.plan)
        found._kernels[-1] = self.kernel(variant)
        return found

    def kernel(self, variant: DecodeVariant) -> loading.Kernel:
        if variant not in self.libraries:
            self.libraries[variant] = cuda_on_host.build(self.folder / str(len(self.libraries)), variant)
        library = self.libraries[variant]

        def run(argument: Any, blocks: int, threads: int, shared_bytes: int) -> None:
            library.set_backwards(self.backwards)
            library.run(argument, blocks, threads, shared_bytes)
            self.launched.append(variant.append)
            packed = cuda_on_host.ctypes.string_at(argument.value, decode_params.SIZE)
            self.splits.append(int(np.frombuffer(packed, np.int32, 1, decode_params.offsets()["splits.number"])[0]))
            if library.failure():
                raise RuntimeError(library.failure().decode())
            assert library.most_stores() <= 1, "several blocks write the same token"

        return cuda_on_host.kernel(run)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    found = Host(tmp_path_factory.mktemp("host"))
    registry.register(found)
    yield found
    registry.unregister(NAME)


@pytest.fixture
def host(built: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    for module in (decode_plan, loading):
        monkeypatch.setattr(module, "current_device", lambda: -1)
        monkeypatch.setattr(module, "raw_stream", lambda index: 0)
        monkeypatch.setattr(module, "is_capturing", lambda: False)
    monkeypatch.setattr(loading._thread, "bound", {-1}, raising=False)
    monkeypatch.setattr(decode_plan, "slots", lambda index, shared_bytes: 12)
    monkeypatch.setattr(decode_plan, "lasting", lambda make, index: make())
    monkeypatch.setattr(decode_plan, "_zeros", lambda count, index: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(decode_plan, "_floats", lambda count, index: torch.empty(count))
    monkeypatch.setattr(decode_plan, "empty_strided", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    monkeypatch.setattr(decode_plan, "_scratch", decode_plan._Scratch())
    built.backwards = False
    built.launched.clear()
    built.splits.clear()
    runtime.clear()  # plans keep launches, and these their splits
    return built


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (37, 0, 15)
    queries: int = 1
    new: Optional[int] = None  # None: as many as queries
    page: int = 0  # 0: a contiguous cache; -1: one with cache_batch_idx
    rotary: int = 0  # R; 0 is none
    interleaved: bool = False
    one_position: bool = False
    narrow: bool = False
    dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int] = (8, 2)
    mask: Mask = FULL
    layout: str = "bhsd"
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if f.name != "mask" and getattr(self, f.name) != f.default).replace(" ", "") or "plain"


_ODD = {"dims": (40, 72), "dtype": torch.float16, "heads": (4, 2)}
_SMALL = {"dims": (20, 12), "heads": (3, 1)}
CASES = [
    Case(),
    Case(rotary=32),
    Case(rotary=32, interleaved=True, layout="bshd"),
    Case(rotary=10, queries=3, mask=Causal()),
    Case(rotary=8, queries=3, interleaved=True, one_position=True),
    Case(rotary=32, queries=5, mask=Causal() & Window(20), narrow=True, settings=(("softmax_scale", -0.2),)),
    Case((48, 47, 16), rotary=32, queries=16, mask=Causal()),  # 64 rows: four tiles of rows share a K/V head
    Case((80, 3, 9), rotary=32, queries=9, new=2, mask=Causal()),
    Case((80, 3, 9), rotary=32, queries=1, new=16, mask=Window(3, -1, "top_left")),  # keys that no query sees are written all the same
    Case((80, 30, 9), queries=2, new=7, mask=Causal() & LeftPad(torch.tensor([3, 33, 0]))),
    Case(page=16, queries=2, mask=Causal()),
    Case(page=16, rotary=32),
    Case((70, 31, 0), page=32, rotary=16, interleaved=True, queries=4, mask=Causal(), layout="bshd"),
    Case(page=16, rotary=32, queries=20, new=3, mask=Causal()),
    Case(page=5, queries=3, mask=Causal()),
    Case(page=1, rotary=32),
    Case(page=-1, rotary=32, queries=2, interleaved=True),
    Case(page=5, rotary=6, queries=3, interleaved=True, mask=Causal() & ALiBi(torch.tensor([0.5, 0.1, 0.2, 0.3])), settings=(("softcap", 5.0),), **_ODD),
    Case(rotary=20, queries=2, narrow=True, mask=ALiBi(torch.tensor([0.5, 0.1, 0.2, 0.3])), settings=(("softcap", 5.0),), **_ODD),
    Case(rotary=2, queries=2, **_SMALL),
    Case(page=16, rotary=10, **_SMALL),
]  # fmt: skip


@dataclasses.dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    cache: KVCache
    rotary: Optional[Rotary]


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Slots that hold no token are NaN; rows of the inputs have gaps where rows of their length are not aligned."""
    torch.manual_seed(seed)
    batch, (dim, v_dim), (heads, kv_heads), new = len(case.lengths), case.dims, case.heads, case.queries if case.new is None else case.new

    def tensor(*shape: int) -> Tensor:
        swapped = (shape[0], shape[2], shape[1], -(-shape[3] // 8) * 8)
        x = torch.randn(swapped if case.layout == "bshd" else (*shape[:3], swapped[3])).to(case.dtype)[..., : shape[3]]
        return x.transpose(1, 2) if case.layout == "bshd" else x

    capacity = 100
    table = rows = None
    pages, size = batch, capacity
    if case.page > 0:
        per, size = -(-capacity // case.page), case.page
        pages = batch * per + 2
        table = torch.randperm(pages)[: batch * per].view(batch, per).int()
    elif case.page < 0:
        pages, rows = 5, torch.tensor([4, 0, 2], dtype=torch.int32)
    keys, values = (tensor(pages, kv_heads, size, d) for d in case.dims)
    held = torch.zeros(pages, size, dtype=torch.bool)
    for b, length in enumerate(case.lengths):
        for t in range(length):
            row = b if table is None and rows is None else int(table[b, t // size]) if table is not None else int(rows[b])  # type: ignore[index]
            held[row, t % size] = True
    for x in (keys, values):
        x.masked_fill_(~held[:, None, :, None], float("nan"))
    cache = KVCache(keys, values, torch.tensor(case.lengths, dtype=torch.int32), table, rows)
    angles = torch.rand(capacity + 20, case.rotary) * 6
    dtype = case.dtype if case.narrow else torch.float32
    rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype), case.interleaved, case.one_position) if case.rotary else None
    return Inputs(tensor(batch, heads, case.queries, dim), tensor(batch, kv_heads, new, dim), tensor(batch, kv_heads, new, v_dim), cache, rotary)


def copied(cache: KVCache) -> KVCache:
    """With what lies between its rows."""
    keys, values = (x.new_empty(0).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride()) for x in (cache.k_cache, cache.v_cache))
    return dataclasses.replace(cache, k_cache=keys, v_cache=values)


def bits(cache: KVCache) -> list[Tensor]:
    stores = [x.untyped_storage() for x in (cache.k_cache, cache.v_cache)]
    return [torch.empty(0, dtype=torch.int16).set_(store, 0, (store.nbytes() // 2,)) for store in stores]


def same(a: KVCache, b: KVCache) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b)))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_append_and_then_attend(case: Case, splits: int, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache bit for bit as torch operations leave it; out bit for bit as the same kernel reads it from there; whichever block runs first."""
    monkeypatch.setattr(decode, "split_count", lambda *_: splits)
    given = inputs(case)
    settings: dict[str, Any] = {"mask": case.mask, "return_lse": True, **dict(case.settings)}
    right = copied(given.cache)
    want, want_lse = attnhub.attention(given.q, given.k, given.v, kv_cache=right, rotary=given.rotary, backend="reference", **settings)
    for host.backwards in (True, False)[: splits]:
        mine = copied(given.cache)
        host.launched.clear()
        out, lse = attnhub.attention(given.q, given.k, given.v, kv_cache=mine, rotary=given.rotary, backend=NAME, **settings)
        assert host.launched == [decode_append.ROTARY if case.rotary else decode_append.TOKENS]
        assert same(mine, right)
        q, used, new = given.q, mine.cache_seqlens, given.k.shape[2]
        if given.rotary is not None:
            positions = used.long()[:, None] + (torch.zeros(1, case.queries, dtype=torch.int64) if case.one_position else torch.arange(case.queries))
            q = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype).copy_(attnhub.apply_rotary(q, *given.rotary[:2], positions, case.interleaved))
        later = dataclasses.replace(mine, cache_seqlens=used + new)
        again, again_lse = attnhub.attention(q, kv_cache=later, backend=NAME, **settings)
        assert host.launched[1:] == [decode_append.NONE]
        assert torch.equal(out, again) and torch.equal(lse, again_lse)
        assert same(mine, right), "reading writes nothing"
    assert set(host.splits) == {splits}
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)


_OF_THE_SUITE = [
    case for case in testing.cases(Host.capability, "cpu") if case.new_tokens and case.dtype == "bfloat16" and case.head_dim == 64
]  # fmt: skip


@pytest.mark.parametrize("case", _OF_THE_SUITE, ids=str)
def test_conformance(case: testing.Case, host: Host) -> None:
    testing.Check(NAME, "forward", case, None, "cpu").run()
    assert host.launched == [decode_append.ROTARY if case.rotary else decode_append.TOKENS] * 3


_CALLS: dict[str, Any] = {
    "odd_angles": (Case(rotary=5), {}),
    "wide_angles": (Case(rotary=8), {"rotary": lambda r: r._replace(cos=r.cos.double(), sin=r.sin.double())}),
    "strided_angles": (Case(rotary=8), {"rotary": lambda r: r._replace(cos=r.cos.t().contiguous().t())}),
    "other_dtype": (Case(), {"k": Tensor.float, "v": Tensor.float}),
    "other_dtype_of_v": (Case(), {"v": Tensor.half}),
    "unaligned": (Case(), {"k": lambda k: torch.cat((k.flatten()[:1], k.flatten()))[1:].view(k.shape)}),
    "strided": (Case(queries=2), {"v": lambda v: v.repeat_interleave(2, 3)[..., ::2]}),
    "too_many": (Case(queries=17), {}),
    "no_tokens": (Case(new=0, rotary=8), {}),
    "gaps_in_the_cache": (Case(), {"cache": lambda c: dataclasses.replace(c, k_cache=c.k_cache.repeat_interleave(2, 3)[..., ::2])}),
}  # fmt: skip


@pytest.mark.parametrize("name", _CALLS)
def test_what_the_launch_does_not_take_is_appended_before_it(name: str, host: Host) -> None:
    case, changes = _CALLS[name]
    given = inputs(case)
    for field, change in changes.items():
        setattr(given, field, change(getattr(given, field)))
    right, mine = given.cache, copied(given.cache)
    settings: dict[str, Any] = {"mask": Causal(), "rotary": given.rotary}
    want = attnhub.attention(given.q, given.k, given.v, kv_cache=right, backend="reference", **settings)
    out = attnhub.attention(given.q, given.k, given.v, kv_cache=mine, backend=f"{NAME},reference", **settings)
    assert decode_append.TOKENS not in host.launched and decode_append.ROTARY not in host.launched
    assert same(mine, right) and isinstance(want, Tensor) and bool(want.isfinite().all())
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


def test_tokens_that_lie_in_the_cache_itself(host: Host) -> None:
    """Moved from one slot to another: others would read the source while it is written."""
    given = inputs(Case((0, 0, 0), rotary=32))
    given.cache.k_cache.normal_(), given.cache.v_cache.normal_()
    mine, right = copied(given.cache), copied(given.cache)
    for which, cache in ((NAME, mine), ("reference", right)):
        for source in (copied(cache), cache, cache):  # the first call makes the short way for others of its shapes
            k, v = source.k_cache[:, :, :1], source.v_cache[:, :, :1]
            attnhub.attention(given.q, k, v, kv_cache=cache, rotary=given.rotary, backend=which)
    assert host.launched == [decode_append.ROTARY, decode_append.NONE, decode_append.NONE] and same(mine, right)


@pytest.mark.parametrize(("case", "words"), [
    (Case((37, 98, 15), queries=3, rotary=8), "cache_seqlens.*pass what the cache holds"),
    (Case((37, -1, 15)), "cache_seqlens.*below 0"),
    (Case((37, 2**31 - 2, 15), queries=3), "cache_seqlens"),
    (Case((37, 0, 15), rotary=8), "rotary.*beyond the table"),
    (Case((32, 0, 15), queries=7, new=2, rotary=8), "rotary.*beyond the table"),
    (Case((32, 0, 15), page=16), "block_table"),
    (Case((40, 0, 15), page=5, rotary=8), "block_table"),
], ids=str)  # fmt: skip
def test_what_only_the_device_can_see_is_asserted_and_never_written(case: Case, words: str, host: Host) -> None:
    given = inputs(dataclasses.replace(case, lengths=tuple(length if 0 <= length < 90 else 0 for length in case.lengths)))
    cache = dataclasses.replace(given.cache, cache_seqlens=torch.tensor(case.lengths, dtype=torch.int32))
    rotary = given.rotary
    if "table" in words and rotary is not None and not case.page:
        rotary = rotary._replace(cos=rotary.cos[:37], sin=rotary.sin[:37])
    if case.page and cache.block_table is not None:
        cache.block_table[0, case.lengths[0] // case.page] = cache.k_cache.shape[0] if case.rotary else -3
    before, host.backwards = copied(cache), case.lengths[0] < 30
    with pytest.raises(RuntimeError, match=words):
        attnhub.attention(given.q, given.k, given.v, kv_cache=cache, rotary=rotary, backend=NAME)
    if not case.page:  # other sequences may have been served before
        bad = 1 if "seqlens" in words else 0
        assert all(torch.equal(a[bad].nan_to_num(7.0), b[bad].nan_to_num(7.0)) for a, b in ((cache.k_cache, before.k_cache), (cache.v_cache, before.v_cache)))


def test_a_decode_loop_goes_the_short_way(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """CachedAttention by the launch and by torch operations: same cache, one launch a step, arguments looked at once."""
    from attnhub import arguments

    for page in (0, 16):
        made, right = (
            attnhub.nn.CachedAttention(8, 2, 64, batch=2, max_seqlen=64, page_size=page, rotary=100.0, dtype=torch.bfloat16, backend=name) for name in (NAME, "reference")
        )  # fmt: skip
        looked = 0
        normalise = arguments.normalise

        def counted(*args: Any, _normalise: Any = normalise, **kwargs: Any) -> Any:
            nonlocal looked
            looked += 1
            return _normalise(*args, **kwargs)

        host.launched.clear()
        for step in (9, 1, 1, 1, 1):
            qkv = [torch.randn(2, step, heads, 64).bfloat16() for heads in (8, 2, 2)]
            want = right(*qkv)
            with monkeypatch.context() as patch:
                patch.setattr(arguments, "normalise", counted)
                torch.testing.assert_close(made(*qkv), want, rtol=0.02, atol=0.02)
        assert host.launched == [decode_append.ROTARY] * 5 and looked == 2
        assert same(made.cache, right.cache) and made.position.tolist() == [13, 13] and made.served == {NAME: 5}
        assert attnhub.last_decision().plan["append"] == ["new tokens and rotary"]  # type: ignore[union-attr]


def test_the_short_way_tells_rotations_apart(host: Host) -> None:
    given = inputs(Case(rotary=32, queries=3))
    assert given.rotary is not None
    ways = [given.rotary._replace(interleaved=a, one_position=b) for a, b in ((False, False), (True, False), (False, True))]
    for rotary in (*ways, *ways):
        mine, right = copied(given.cache), copied(given.cache)
        out, want = (attnhub.attention(given.q, given.k, given.v, kv_cache=cache, rotary=rotary, backend=name) for cache, name in ((mine, NAME), (right, "reference")))
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
        assert same(mine, right)
    assert host.launched == [decode_append.ROTARY] * 6


def test_a_layer_whose_mask_holds_tensors(host: Host) -> None:
    mask = Causal() & ALiBi(torch.tensor([0.5, 0.1, 0.2, 0.3]))
    made, right = (attnhub.nn.CachedAttention(4, 2, 40, batch=2, max_seqlen=64, mask=mask, dtype=torch.float16, backend=name) for name in (NAME, "reference"))
    for step in (3, 1):
        qkv = [torch.randn(2, step, heads, 40).half() for heads in (4, 2, 2)]
        torch.testing.assert_close(made(*qkv), right(*qkv), rtol=0.02, atol=0.02)
    assert host.launched == [decode_append.TOKENS] * 2 and same(made.cache, right.cache)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_with_kvcache(causal: bool, host: Host) -> None:
    case = Case(page=16, rotary=16, queries=3, layout="bshd")
    angles = torch.rand(120, 16)
    found = []
    for name in (NAME, "reference"):
        given = inputs(case)
        q, k, v, keys, values = (t.transpose(1, 2) for t in (given.q, given.k, given.v, given.cache.k_cache, given.cache.v_cache))
        with attnhub.use(name):
            out, lse = flash_attn_with_kvcache(
                q, keys, values, k, v, angles.cos(), angles.sin(), cache_seqlens=given.cache.cache_seqlens, block_table=given.cache.block_table,
                causal=causal, return_softmax_lse=True,
            )  # fmt: skip
        found.append((given.cache, out, lse))
    assert host.launched == [decode_append.ROTARY] and same(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=0.02, atol=0.02)


def test_graphs_and_compilers(host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that is not there yet is not made while a graph is captured, and one that cannot be made is not asked for again."""
    given = inputs(Case())
    call = Call(given.q, given.cache.k_cache, given.cache.v_cache, attnhub.SeqLens(given.cache.cache_seqlens), 0.1, append=Append(given.k, given.v))
    variant = decode.make("sm_90", "bfloat16", 64, 64)
    plan = host.plan(variant)
    capturing = True
    monkeypatch.setattr(decode_plan, "is_capturing", lambda: capturing)
    assert not plan.appends(call)
    capturing = False
    assert plan.appends(call)
    capturing = True
    assert plan.appends(call)

    asked = []

    def refuse(other: DecodeVariant) -> DecodePlan:
        asked.append(other)
        raise PrepareError(Reason(Code.COMPILE_FAILED, "no room"))

    capturing = False
    plan = DecodePlan(variant, "", refuse)
    assert not plan.appends(call) and not plan.appends(call)
    assert asked == [dataclasses.replace(variant, append=1)] and "no room" in caplog.text
