"""Recordings of launches: what they hold, what they must not hold, which calls share one, and the bits that a GPU computes by them."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton.tools.tensor_descriptor import TensorDescriptor
from triton_calls import calls, randn
from triton_gpu import MARKS, Gpu, copy_kernel, plan

from attnhub.backend import Call, Descale, Needs
from attnhub.backends.triton import arguments, launch, launcher
from attnhub.backends.triton.tiles import Tiles
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Mask

pytestmark = MARKS


def test_every_part_of_a_call_is_in_the_key() -> None:
    """A new field of Call or Mask must be put into `_key` or `_inputs`, and here. `deterministic` changes nothing: all kernels are repeatable.
    `append` never comes: the plans do not say that they take it.
    """
    assert set(Call.__slots__) == {
        "q", "k", "v", "mask", "softmax_scale", "softcap", "sinks", "dropout_p", "rng", "varlen", "block_table", "need_lse", "descale", "deterministic", "append",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(Mask)} == {
        "causal", "align", "window", "chunk", "prefix", "segments", "blocks", "seqused_k", "leftpad", "bool_mask", "bias", "alibi",
        "block_sparse", "block_size",
    }  # fmt: skip
    q = randn(2, 4, 80, 64)
    sparse = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    keys = {}
    for name, call in {
        # Ids and tables are made contiguous first; and which of the tensors are the same one is no matter.
        **{name: call for name, call in calls().items() if name not in ("segments, sliced", "paged, sliced table", "k is v")},
        "dropout": Call(q, q, q, FULL, 0.125, dropout_p=0.1, rng=torch.zeros(2, dtype=torch.int64)),
        "more dropout": Call(q, q, q, FULL, 0.125, dropout_p=0.2, rng=torch.zeros(2, dtype=torch.int64)),
        "factor of q": Call(q, q, q, FULL, 0.125, descale=Descale(q=torch.ones(2, 4))),
        "factor of k": Call(q, q, q, FULL, 0.125, descale=Descale(k=torch.ones(2, 4))),
        "one factor": Call(q, q, q, FULL, 0.125, descale=Descale(k=torch.ones(1, 1).expand(2, 4))),
        "block sparse": Call(q, q, q, Mask(block_sparse=sparse, block_size=(16, 16)), 0.125),
        "block sparse, other blocks": Call(q, q, q, Mask(block_sparse=sparse, block_size=(12, 16)), 0.125),
    }.items():
        key = launcher.call_key(call, arguments.kernel_inputs(call))[0]
        assert key not in keys, f"{name} has the key of {keys.get(key)}"
        keys[key] = name


def test_a_replay_finds_counters_at_zero(gpu: Gpu) -> None:
    """Programs that draw their tiles from a counter leave it past the last one."""
    q = randn(1, 2, 8, 16)
    recorder = launch.Recorder({"q": q})
    recorder.buffer("out", torch.empty_like(q))
    counter = recorder.zeros("counter", torch.full((1,), 7, dtype=torch.int32))
    assert counter.item() == 0
    recording = recorder.recording()
    assert recording is not None
    for _ in range(2):
        found = recording.replay(q, [q.data_ptr()])["counter"]
        assert found.item() == 0
        found.fill_(9)


def test_no_tensor_is_kept(gpu: Gpu, replays: list[Any]) -> None:
    """Neither by recordings nor by what finds compiled kernels."""
    shared = plan()
    call = calls()["lengths and left padding"]
    held = [weakref.ref(x) for x in (call.q, call.k, call.v, *call.mask.held)]
    out, lse = shared.forward(call)
    call.need_lse = True
    out, lse = shared.forward(call)
    assert lse is not None
    held += [weakref.ref(out), weakref.ref(lse)]
    shared.backward(call, torch.empty_like(out), None, out, lse, Needs())
    gpu.launched.clear()
    del call, out, lse
    gc.collect()
    assert [ref for ref in held if ref() is not None] == []


def test_what_cannot_be_repeated_is_not_recorded(gpu: Gpu) -> None:
    """A tensor that neither came with the call nor was announced as a buffer."""
    x = torch.randn(32)
    recorder = launch.Recorder({"x": x})
    recorder.launch(copy_kernel, 1, Tiles(0, 0, 4, 1), x=recorder.inputs["x"], out=recorder.buffer("out", torch.empty(32)))
    assert recorder.recording() is not None
    recorder.launch(copy_kernel, 1, Tiles(0, 0, 4, 1), x=recorder.inputs["x"], out=torch.empty(32))
    assert recorder.recording() is None
    recorder = launch.Recorder({"x": x})
    # A view of an input may lie anywhere.
    recorder.launch(copy_kernel, 1, Tiles(0, 0, 4, 1), x=recorder.inputs["x"][4:], out=recorder.buffer("out", torch.empty(32)))
    assert recorder.recording() is None


def test_tensor_descriptors_describe_the_new_tensor(gpu: Gpu) -> None:
    def recorded(shape: tuple[int, int], block: list[int]) -> Optional[launch.Recording]:
        recorder = launch.Recorder({"x": torch.randn(shape)})
        described = TensorDescriptor.from_tensor(recorder.inputs["x"], block)
        recorder.launch(copy_kernel, 1, Tiles(0, 0, 4, 1), x=described, out=recorder.buffer("out", torch.empty(shape)))
        return recorder.recording()

    recording = recorded((32, 64), [16, 32])
    assert recording is not None
    x = torch.randn(32, 64)
    gpu.launched.clear()
    buffers = recording.replay(x, [x.data_ptr()])
    ((kernel, _, _, (described, out), _),) = gpu.launched
    assert described.base.data_ptr() == x.data_ptr() and (tuple(described.shape), tuple(described.strides)) == ((32, 64), (64, 1))
    assert described.block_shape == [16, 32] and out == buffers["out"].data_ptr()
    recorded((48, 64), [16, 32])
    assert gpu.launched[-1][0] is kernel
    recorded((48, 64), [16, 64])
    assert gpu.launched[-1][0] is not kernel and len(launch._compiled) == 2
    assert not [x for x in gc.get_referrers(x) if isinstance(x, (dict, TensorDescriptor))]


def moved(call: Call, device: str) -> Call:
    """The same call on a device, in the same layout."""

    def on(x: Any) -> Any:
        if isinstance(x, tuple) and isinstance(x[0], Tensor):
            return tuple(map(on, x))
        if not isinstance(x, Tensor):
            return x
        # All that is reached through the strides, at the same distance from an aligned address.
        offset = x.data_ptr() % 16 // x.element_size()
        flat = x.as_strided((sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1,), (1,))
        room = torch.empty(flat.numel() + offset, dtype=x.dtype, device=device)
        room[offset:].copy_(flat)
        return room[offset:].as_strided(x.shape, x.stride())

    mask, varlen = call.mask, call.varlen
    if mask is not FULL:
        mask = dataclasses.replace(mask, **{field.name: on(getattr(mask, field.name)) for field in dataclasses.fields(mask)})
    if varlen is not None:
        varlen = Varlen(on(varlen.cu_seqlens_q), on(varlen.cu_seqlens_k), varlen.max_seqlen_q, varlen.max_seqlen_k)
    return Call(
        on(call.q), on(call.k), on(call.v), mask, call.softmax_scale, call.softcap, on(call.sinks), call.dropout_p, on(call.rng), varlen,
        on(call.block_table), call.need_lse,
    )  # fmt: skip


def same_bits(got: Any, want: Any) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.gpu
@pytest.mark.parametrize("name", calls())
def test_replayed_on_a_gpu(name: str, replays: list[Any]) -> None:
    """The same bits as the first time: elsewhere in memory, on another stream, in a CUDA graph, in the backward."""
    call = calls()[name]
    shared = plan()
    with torch.cuda.device(0):
        first = shared.forward(moved(call, "cuda"))
        assert same_bits(shared.forward(moved(call, "cuda")), first) and len(replays) == 1
        here = moved(call, "cuda")
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            there = shared.forward(here)
        side.synchronize()
        assert same_bits(there, first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = shared.forward(here)
        for x in captured:
            if x is not None:
                x.fill_(7)
        graph.replay()
        assert same_bits(captured, first) and len(replays) == 3
        if name.startswith("paged"):
            return
        call.need_lse = True
        grads = []
        for _ in range(3):
            here = moved(call, "cuda")
            out, lse = shared.forward(here)
            assert lse is not None
            grads.append(shared.backward(here, torch.ones_like(out), None, out, lse, Needs(sinks=call.sinks is not None)))
        assert same_bits(grads[1], grads[0]) and same_bits(grads[2], grads[0]) and len(replays) >= 3 + 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_replayed_on_the_other_gpu() -> None:
    call, shared = calls()["lse"], plan()
    with torch.cuda.device(0):
        first = shared.forward(moved(call, "cuda:0"))
        for _ in range(2):
            other = shared.forward(moved(call, "cuda:1"))
            assert all(x is not None and x.device.index == 1 for x in other)
            assert torch.cuda.current_device() == 0
            assert same_bits([x.to("cuda:0") for x in other if x is not None], first)
        assert same_bits(shared.forward(moved(call, "cuda:0")), first)
