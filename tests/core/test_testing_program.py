"""``python -m attnhub.testing`` and `testing.checks`: what is not there is told by the argument, its value and what is allowed; exit code 2."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

from attnhub import cli, testing
from attnhub.device import named
from attnhub.testing import program

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--backend", "cpu", "--device", "foo"], ("--device", "'foo'", "cuda:1")),
        (["--backend", "cpu", "--device", "cuda:99"], ("--device", "'cuda:99'", "torch")),
        (["--backend", "cpu", "--device", "meta"], ("--device", "'meta'", "torch")),
        (["--backend", "nope"], ("--backend", "'nope'", "reference")),
        (["--backend", "reference,nope"], ("--backend", "'nope'", "reference")),
        (["--backend", " ,"], ("--backend", "' ,'", "reference")),
        (["--backend", "reference", "--level", "huge"], ("--level", "'huge'", "quick")),
        (["--backend", "reference", "--jobs", "0"], ("--jobs", "'0'", "above 0")),
        (["--backend", "reference", "--seconds", "-1"], ("--seconds", "'-1'", "at least 0")),
        (["--backend", "reference", "--output", "/dev/null/deep/x.json"], ("--output", "/dev/null/deep", "directory")),
        pytest.param(["--backend", "cpu", "--device", "cuda"], ("--device", "'cuda'", "no cuda device"), marks=NO_CUDA),
    ],
    ids=" ".join,
)
def test_what_is_not_there(args: list[str], told: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(args)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: " in line and all(word in line for word in told)


def test_what_is_there(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--backend", "reference, sdpa", "--level", "tiny", "--seconds", "0.01", "--output", str(tmp_path / "new" / "x.json")]) == 0
    assert "sdpa on cpu" in capsys.readouterr().out and (tmp_path / "new" / "x.json").is_file()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kinds": ("forwards",)}, "kinds=.*'forwards'.*forward, backward"),
        ({"kinds": "forward"}, "kinds='forward'.*tuple"),
        ({"level": "huge"}, "level='huge'.*tiny, quick, full"),
        ({"device": "foo"}, "device='foo'.*cuda:1"),
    ],
    ids=str,
)
def test_checks_of_nothing(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        testing.checks("reference", **wrong)


def test_checks_of_no_backend() -> None:
    with pytest.raises(KeyError, match=r"'nope'.*installed are .*reference"):
        testing.checks("nope")


@pytest.mark.parametrize("command", [["bench", "overhead"], ["bench", "cpu"], ["bench", "models"], ["warmup"]], ids=" ".join)
@pytest.mark.parametrize(("device", "words"), [("foo", "cuda:1"), pytest.param("cuda", "device here", marks=NO_CUDA), ("xpu:77", "device")])
def test_commands_with_devices_that_are_not_there(command: list[str], device: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--device", device]) == 2
    error = capsys.readouterr().err
    assert words in error and (device in error or device == "cuda") and error.startswith(f"attnhub {command[0]}: ")


def test_named_devices() -> None:
    assert named("cpu") == named(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"where='no.*': a device of torch is needed"):
        named("no such device", "where=")
    with pytest.raises(ValueError, match=r"device=1\.5: a device of torch"):
        named(1.5)
