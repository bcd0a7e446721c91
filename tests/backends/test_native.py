"""The native libraries are there: other test files skip without them, and an install without a compiler succeeds silently."""

from __future__ import annotations

import shutil

import pytest

from attnhub.registry import registry


@pytest.mark.parametrize("name", ["cpu", "onnx"])
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="this machine has no C++ compiler")
def test_the_native_libraries_are_built(name: str) -> None:
    assert registry.candidates()[name].probe == ()
