"""The cuda backend's kernel for compute capability 9.0, without a GPU: the launch's argument, tensor maps, and calls that go to the portable kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_launch import Driver, field, launched, packed, tensors

from attnhub.backend import Call, PrepareError
from attnhub.backends.cuda import hopper, hopper_params, hopper_plan, tensor_map
from attnhub.mask import FULL, ALiBi, Causal, Window
from attnhub.reasons import Code


def test_tensor_maps_describe_the_tensors(driver: Driver) -> None:
    q, k, v = tensors(2, 100, 300, dims=(96, 64))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = v[:, :1].expand(2, 2, 300, 64)
    call = Call(q, k, v, FULL, 0.125)
    launch, started = launched(hopper.make("bfloat16", 96, 64), call)
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
    (argument,) = started
    assert [argument[at : at + 8] for at in hopper_params.MAPS_AT] == [x.data_ptr().to_bytes(8, "little") for x in (q, k, v, out)]
    assert [field(argument, name) for name in ("q", "k", "v", "out", "lse", "counters")] == [*(x.data_ptr() for x in (q, k, v, out)), 1001, 1009]
    assert [field(argument, name) for name in ("q_steps", "k_steps", "v_steps", "out_by_map", "heads_per_kv_head")] == [3, 3, 2, 1, 2]
    moved = len(driver.moved)
    launch.start(9, [x.data_ptr() for x in (q, k, v, out)], others)
    assert len(driver.moved) == moved and started[1] == argument  # nothing moved
    other = k.clone()
    launch.start(9, [x.data_ptr() for x in (q, other, v, out)], others)
    assert len(driver.moved) == moved + 1
    for first in (k, other, k):  # the driver makes each map once
        launch.start(9, [x.data_ptr() for x in (q, first, v, out)], others)
        found = [int.from_bytes(started[-1][at : at + 8], "little") for at in hopper_params.MAPS_AT]
        assert found == [x.data_ptr() for x in (q, first, v, out)] and field(started[-1], "k") == first.data_ptr()
    assert len(driver.moved) == moved + 2
    for n in range(1000):
        launch.start(9, [16 * n, *(x.data_ptr() for x in (k, v, out))], others)
    assert int.from_bytes(started[-1][:8], "little") == 16 * 999 and len(launch._maps[0]) <= 64


def test_numbers_of_a_call(driver: Driver) -> None:
    q, k, v = tensors(2, 100, 300)
    mask = Causal() & Window((1 << 31) - 2) & ALiBi(torch.rand(2, 4))
    call = Call(q, k, v, mask, 0.25, softcap=30.0)
    argument, _, launch = packed(call, 128, 128)
    names = ("causal", "top_left", "window_left", "window_right", "chunk", "alibi_batch_stride", "phases", "q_tiles", "tile_total", "head_dim")
    assert [field(argument, name) for name in names] == [1, 0, (1 << 30) - 1, -1, 0, 4, 1, 1, 8, 64]
    assert field(argument, "scale_log2") == pytest.approx(0.25 * 1.442695, rel=1e-5)
    assert field(argument, "cap_inner") == pytest.approx(2 * 1.442695 * 0.25 / 30, rel=1e-5)
    assert field(argument, "cap_outer") == pytest.approx(30 * 1.442695, rel=1e-5)
    assert launch.uneven and launch.grid == (7, 1, 1)
    zero, _, plain = packed(Call(q, k, v, FULL, 0.0), 128, 128)
    assert field(zero, "scale_log2") > 0 and not plain.uneven


def test_what_the_kernel_does_not_serve_goes_to_the_portable_one() -> None:
    q, k, v = tensors(2, 100, 300)
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


def test_a_driver_without_tensor_maps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_map._driver.cache_clear()

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(tensor_map.ctypes, "CDLL", missing)
    with pytest.raises(PrepareError, match=r"libcuda\.so\.1") as caught:
        tensor_map.encode(0, tensors(1, 64, 64)[0], 64)
    assert caught.value.reason.code is Code.NO_DEVICE
    monkeypatch.setattr(tensor_map.ctypes, "CDLL", lambda name: SimpleNamespace())
    with pytest.raises(PrepareError):
        tensor_map.encode(0, tensors(1, 64, 64)[0], 64)


def test_an_unaligned_pointer_is_named(driver: Driver) -> None:
    driver.status = 1
    memory = np.zeros(256, np.uint8)
    x = tensors(1, 64, 64)[0]
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


def test_a_launch_takes_the_thread_s_own_counters_and_a_graph_its_own(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
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
