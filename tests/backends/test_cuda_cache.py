"""The cuda backend's cache of cubins: compiled once, when something that goes in has changed, and never half written."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from attnhub.backends.cuda import compile, nvrtc, variant


class _Counting:
    """An NVRTC that compiles nothing and counts."""

    version = (13, 0)

    def __init__(self) -> None:
        self.compiled = 0

    def compile(self, *args: Any) -> nvrtc.Compiled:
        self.compiled += 1
        return nvrtc.Compiled(b"cubin of " + repr(args[3]).encode(), "")


SMALL = variant.make(arch="sm_80", turing=False, dtype="float16", head_dim=64, v_head_dim=64)


def test_a_cubin_is_compiled_once_and_kept(tmp_path: Path) -> None:
    fake: Any = _Counting()
    first = compile.cubin(SMALL, fake, tmp_path)
    assert compile.cubin(SMALL, fake, tmp_path) == first and fake.compiled == 1
    compile.cubin(dataclasses.replace(SMALL, keys=32), fake, tmp_path)
    assert fake.compiled == 2
    fake.version = (13, 1)
    compile.cubin(SMALL, fake, tmp_path)
    assert fake.compiled == 3 and len(list(tmp_path.glob("*.cubin"))) == 3


def test_a_changed_source_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = _Counting()
    compile.cubin(SMALL, fake, tmp_path)
    changed = {**compile.sources(), "portable/mask.cuh": compile.sources()["portable/mask.cuh"] + "\n"}
    monkeypatch.setattr(compile, "sources", lambda: changed)
    compile.cubin(SMALL, fake, tmp_path)
    assert fake.compiled == 2


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(compile.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        compile.write_atomically(tmp_path / "x.cubin", b"data")
    assert not list(tmp_path.iterdir())


def _write_many(path: str, byte: int) -> None:
    for _ in range(50):
        compile.write_atomically(Path(path), bytes([byte]) * 100_000)


def test_processes_that_write_one_file_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "x.cubin"
    writers = [multiprocessing.get_context("spawn").Process(target=_write_many, args=(str(path), byte)) for byte in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_bytes() in (b"\1" * 100_000, b"\2" * 100_000)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["x.cubin"]
