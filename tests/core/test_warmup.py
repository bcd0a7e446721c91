"""`attnhub.warmup` and ``attnhub warmup``: the plan of a class is made, and the next call of the class finds it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnhub
from attnhub import cli, runtime, warming
from attnhub.backend import Backend, Call, Plan
from attnhub.backends.sdpa import backend as sdpa

QUICK: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "seqlen_q": 8, "dtype": torch.float32, "device": "cpu"}


class _Slow(Backend):
    """sdpa under another name, that counts its plans and its calls."""

    name = "slow"

    def __init__(self) -> None:
        self.capability = sdpa.capability
        self.plans: list[Any] = []
        self.calls: list[Call] = []
        self.appending = False

    def cost(self, problem: Any) -> float:
        return 1e-3

    def prepare(self, problem: Any) -> Plan:
        outer, inner = self, sdpa.prepare(problem)
        self.plans.append(problem)

        class Counting(Plan):
            differentiable = inner.differentiable

            def forward(self, call: Call) -> Any:
                outer.calls.append(call)
                return inner.forward(call) if call.append is None else (call.q, None)

            def appends(self, call: Call) -> bool:
                return outer.appending

            def describe(self) -> dict[str, Any]:
                return {"compile_seconds": 1.5}

        return Counting()


def test_the_first_request_finds_its_plan(register: Callable[[Backend], Backend]) -> None:
    slow = _Slow()
    register(slow)
    decision = attnhub.warmup(**QUICK, batch=2, seqlen_k=32, mask=attnhub.Causal(), softcap=5.0)
    assert decision.chosen == "slow" and len(slow.plans) == 1 and len(slow.calls) == 2
    assert decision.plan["backend"] == "slow" and decision.plan["compile_seconds"] == 1.5
    assert decision.plan["first_call_seconds"] > 0 and decision.plan["next_call_seconds"] > 0
    assert json.loads(json.dumps(decision.to_json()))["plan"]["first_call_seconds"] > 0
    # Another length of the same class.
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 30, 16)
    attnhub.attention(q, k, k, attnhub.Causal(), softcap=5.0)
    assert len(slow.plans) == 1 and len(slow.calls) == 3
    attnhub.attention(q, k, k, attnhub.Causal())
    assert len(slow.plans) == 2


@pytest.mark.parametrize(
    ("more", "shapes", "features"),
    [
        ({}, ((1, 4, 8, 16), (1, 2, 8, 16)), {"gqa"}),
        ({"layout": "bshd", "v_head_dim": 24, "batch": 3}, ((3, 4, 8, 16), (3, 2, 8, 16)), {"gqa", "dv_differs"}),
        ({"packed": True, "batch": 3, "seqlen_k": 20}, ((1, 4, 24, 16), (1, 2, 60, 16)), {"gqa", "varlen"}),
        ({"page_size": 4, "seqlen_k": 16, "batch": 2}, ((2, 4, 8, 16), (8, 2, 4, 16)), {"gqa", "paged", "seqlens"}),
        ({"packed": True, "page_size": 4, "seqlen_k": 16, "batch": 2}, ((1, 4, 16, 16), (8, 2, 4, 16)), {"gqa", "varlen", "paged", "seqlens"}),
        ({"sinks": True, "return_lse": True}, ((1, 4, 8, 16), (1, 2, 8, 16)), {"gqa", "sinks", "lse"}),
        ({"append": "tokens", "seqlen_k": 16, "layout": "bshd"}, ((1, 4, 8, 16), (1, 2, 16, 16)), {"gqa", "seqlens"}),
        ({"append": "rotary", "page_size": 4, "seqlen_k": 16, "batch": 2}, ((2, 4, 8, 16), (8, 2, 4, 16)), {"gqa", "paged", "seqlens"}),
        ({"dropout_p": 0.5}, ((1, 4, 8, 16), (1, 2, 8, 16)), {"gqa", "dropout"}),
    ],
)  # fmt: skip
def test_the_calls_are_of_the_shapes(more: dict[str, Any], shapes: Any, features: set[str], register: Callable[[Backend], Backend]) -> None:
    slow = _Slow()
    register(slow)
    decision = attnhub.warmup(**QUICK, **more)
    assert decision.chosen == "slow", decision
    assert (slow.calls[0].q.shape, slow.calls[0].k.shape) == shapes and {f.value for f in decision.problem.features} == features
    if more.get("layout") == "bshd":
        assert slow.calls[0].q.stride(1) < slow.calls[0].q.stride(2)
    if "seqlens" in features:
        assert slow.calls[0].mask.seqused_k is not None and set(slow.calls[0].mask.seqused_k.tolist()) == {16}


@pytest.mark.parametrize("append", ["tokens", "rotary"])
def test_calls_that_append(append: str, register: Callable[[Backend], Backend]) -> None:
    """By a backend that does so in its launch."""
    slow = _Slow()
    slow.appending = True
    register(slow)
    decision = attnhub.warmup(**{**QUICK, "seqlen_q": 1}, seqlen_k=16, batch=3, append=append)
    assert decision.chosen == "slow" and len(slow.plans) == 1 and len(slow.calls) == 2
    for call in slow.calls:
        assert call.append is not None and call.append.k.shape == (3, 2, 1, 16) and call.mask.seqused_k is not None and call.mask.seqused_k.tolist() == [15] * 3
        assert (call.append.rotary is not None) == (append == "rotary")
        assert call.append.rotary is None or (call.append.rotary.cos.shape == (16, 8) and bool((call.append.rotary.cos == 1).all()))


def test_factors_go_with_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def attention(*args: Any, **named: Any) -> Any:
        given.append(named)
        return attnhub.attention(*args, **named)

    monkeypatch.setattr(warming, "attention", attention)
    decision = attnhub.warmup(**{**QUICK, "dtype": torch.float8_e4m3fn}, batch=2, descale="kv", backend="reference")
    assert decision.chosen == "reference" and len(given) == 2
    assert {name: tuple(x.shape) for name, x in given[0].items() if name.endswith("descale")} == {"k_descale": (2, 2), "v_descale": (2, 2)}


@pytest.mark.parametrize("name", ["cpu", "sdpa", "reference"])
def test_a_backward_pass_is_warmed_up_too(name: str) -> None:
    if not attnhub.backends()[name]["available"]:
        pytest.skip(f"{name} cannot run here")
    decision = attnhub.warmup(**QUICK, need_backward=True, mask=attnhub.Causal(), backend=name)
    assert decision.chosen == name and decision.backward == name and decision.problem.need_backward
    chosen = runtime._served.chosen
    assert chosen is not None and (chosen.differentiable or chosen._backward is not None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"page_size": -1}, "page_size=-1: a whole number above 0"),
        ({"page_size": 2.0}, r"page_size=2\.0: a whole number"),
        ({"page_size": True}, "page_size=True: a whole number"),
        ({"dtype": "float8"}, r"dtype='float8': .*torch\.bfloat16"),
        ({"dtype": torch.int32}, r"dtype=torch\.int32: .*torch\.bfloat16"),
        ({"dtype": [torch.float32]}, "dtype=.*bfloat16"),
        ({"seqlen_q": -1}, "seqlen_q=-1: a whole number above 0"),
        ({"seqlen_k": -8}, "seqlen_k=-8: a whole number above 0"),
        ({"batch": True}, "batch=True: a whole number"),
        ({"kv_heads": 3}, "kv_heads=3: q_heads=4 must be a multiple"),
        ({"kv_heads": 0}, "kv_heads=0: a whole number above 0"),
        ({"layout": "hbsd"}, "layout='hbsd': allowed are 'bhsd'"),
        ({"descale": None}, "descale=None: letters"),
        ({"sinks": torch.zeros(4)}, "sinks is a Tensor: True or False"),
        ({"packed": 1}, "packed is a int: True or False"),
        ({"need_backward": "yes"}, "need_backward is a str: True or False"),
        ({"device": "foo"}, "device='foo': .*cuda:1"),
        ({"device": "cuda:99"}, "device='cuda:99': torch"),
        ({"mask": "causal"}, "mask is a str: an attnhub.Mask"),
    ],
    ids=str,
)
def test_arguments_that_are_none_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        attnhub.warmup(**{**QUICK, **wrong})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--page-size", "-1"], "--page-size: -1"), (["--dtype", "float31"], "--dtype: invalid choice: 'float31'"), (["--heads", "0"], "q_heads=0"),
        (["--seqlen-q", "16,-2"], "--seqlen-q: -2"), (["--heads", "4", "--kv-heads", "3"], "kv_heads=3"), (["--descale", "x"], "descale='x'"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_the_command(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = cli.main(["warmup", "--device", "cpu", *args])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and words in capsys.readouterr().err


def test_what_does_not_fit_is_an_error() -> None:
    for wrong, said in (
        ({"q_heads": 0}, "q_heads=0"), ({"kv_heads": -1}, "kv_heads=-1"), ({"kv_heads": 3}, "multiple"), ({"page_size": 4, "need_backward": True}, "page_size=4: .*no backward"),
        ({"append": "all"}, "append='all': allowed are"), ({"append": "tokens", "packed": True}, "append='tokens': packed"),
        ({"append": "rotary", "need_backward": True}, "append='rotary': .*no backward"), ({"append": "tokens", "seqlen_k": 7}, "seqlen_k=7 must hold seqlen_q=8"),
        ({"layout": "sbhd"}, "allowed are"), ({"seqlen_k": 1.5}, "seqlen_k=1.5"),
        ({"descale": "qx"}, "descale='qx'"), ({"descale": "v"}, "float8_e4m3fn"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            attnhub.warmup(**{**QUICK, **wrong})
    with pytest.raises(attnhub.NoBackendError):
        attnhub.warmup(**QUICK, backend="triton" if not attnhub.backends()["triton"]["available"] else "cuda")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["warmup", "--device", "cpu", "--dtype", "float32", "--heads", "4", "--head-dim", "16", "--seqlen-q", "1", "--seqlen-k", "16,64", "--batch", "1,2"]
    assert cli.main([*command, "--json", "--causal", "--alibi", "--window", "8", "--backend", "reference"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(d["problem"]["batch"], d["problem"]["seqlen_k"], d["chosen"]) for d in told] == [(b, n, "reference") for b in (1, 2) for n in (16, 64)]
    assert set(told[0]["problem"]["features"]) == {"causal_bottom_right", "alibi", "window"}
    assert cli.main([*command, "--append", "rotary", "--json"]) == 0 and "seqlens" in json.loads(capsys.readouterr().out)[0]["problem"]["features"]
    assert cli.main([*command, "--backward"]) == 0 and "first call" in capsys.readouterr().out
    assert cli.main([*command, "--kv-heads", "3"]) == 2 and "multiple" in capsys.readouterr().err
    assert cli.main([*command, "--backend", "nobody"]) == 1 and "nobody" in capsys.readouterr().out
    assert cli.main([*command[:2], "cuda:99", *command[3:]]) == 2


def test_triton_is_warmed_up_under_its_interpreter() -> None:
    pytest.importorskip("triton")
    code = (
        "import attnhub, torch\n"
        "d = attnhub.warmup(q_heads=2, head_dim=16, seqlen_q=20, dtype=torch.float32, device='cpu', need_backward=True, backend='triton')\n"
        "assert d.chosen == d.backward == 'triton' and d.plan['kernel'] == 'triton' and d.plan['first_call_seconds'] > 0, d.plan"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=pathlib.Path(attnhub.__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
