"""The cuda backend's kernel for compute capability 9.0, without a GPU: every variant compiles, without spills, and its loops are what they should be."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from pathlib import Path

import pytest
from cuda_compiled import check_layout, compiled, disassembled, library, needs_nvrtc

from attnhub.backends.cuda import compile, hopper, hopper_params
from attnhub.backends.cuda.hopper import HopperVariant
from attnhub.problem import Feature


@needs_nvrtc
def test_the_struct_is_laid_out_as_python_packs_it() -> None:
    check_layout("hopper/params.cuh", hopper_params.LAYOUT.size, hopper_params.offsets())


_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
_FEATURES = tuple(map(frozenset, (
    (), (Feature.CAUSAL_BOTTOM_RIGHT,), (Feature.WINDOW,), (Feature.LEFTPAD,), (Feature.VARLEN,), (Feature.SOFTCAP,),
    (Feature.ALIBI, Feature.CAUSAL_BOTTOM_RIGHT), (Feature.SOFTCAP, Feature.CHUNK), (Feature.SOFTCAP, Feature.ALIBI, Feature.WINDOW),
)))  # fmt: skip


def _variants() -> list[HopperVariant]:
    found = [
        hopper.make(dtype, *dims, features, seqlen_q)
        for dtype, dims, features, seqlen_q in itertools.product(("bfloat16", "float16"), _DIMS, _FEATURES, (1024, 16384))
    ]
    return list(dict.fromkeys(found))


def _name(v: HopperVariant) -> str:
    flags = [name for name in ("left", "right", "hides", "softcap", "alibi") if getattr(v, name)]
    return "-".join((v.dtype, f"D{v.head_dim}x{v.v_head_dim}", f"{v.rows}x{v.tiles.keys}", *flags))


def _loops(cubin: bytes, folder: Path) -> list[list[str]]:
    """The instructions of the innermost loops with products."""
    code, labels = disassembled(cubin, folder)
    ends = [(labels.get(m[1], 1 << 30), i) for i, line in enumerate(code) if (m := re.search(r"@!?P\d BRA.*\((\.L_x_\d+)\)", line))]
    # A tile is a loop too: the shortest that do not overlap count.
    spans: list[tuple[int, int]] = []
    for a, b in sorted(ends, key=lambda span: span[1] - span[0]):
        if (
            a < b
            and all(any(word in line for line in code[a:b]) for word in ("HGMMA", "MUFU.EX2"))
            and all(b < c or d < a for c, d in spans)
        ):
            spans.append((a, b))
    return [code[a : b + 1] for a, b in sorted(spans)]


def _check(v: HopperVariant, folder: Path) -> None:
    cubin, log = compiled(v)
    assert not re.search(r"C75\d\d|warning", log), log
    assert v.shared_bytes <= hopper.MOST_SHARED
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(found) == 2, log  # the kernel, and its slow way for what is not finite
    most = max(int(n) for function in found for n in function)
    # A few registers of what is computed once for a tile; never in a loop over keys.
    assert most <= 64, log
    if most:
        loops = _loops(cubin, folder)
        assert loops and not [line for loop in loops for line in loop if re.search(r"\b(LDL|STL)\b", line)]


_QUICK = [hopper.make("bfloat16", d, d, frozenset({Feature.CAUSAL_BOTTOM_RIGHT})) for d in (64, 128, 256)]


@needs_nvrtc
@pytest.mark.parametrize("v", _QUICK, ids=_name)
def test_usual_variants_compile_without_spills(v: HopperVariant, tmp_path: Path) -> None:
    _check(v, tmp_path)


@needs_nvrtc
@pytest.mark.long
@pytest.mark.parametrize("v", [v for v in _variants() if v not in _QUICK], ids=_name)
def test_every_variant_compiles_without_spills(v: HopperVariant, tmp_path: Path) -> None:
    _check(v, tmp_path)


@needs_nvrtc
@pytest.mark.parametrize(("v", "products", "moves"), list(zip(_QUICK, (12, 16, 20), (1, 1, 1))), ids=("D64", "D128", "D256"))
def test_descriptors_stay_in_uniform_registers(v: HopperVariant, products: int, moves: int, tmp_path: Path) -> None:
    """In the hot loops nothing, or little, is moved to where the matrix unit reads its descriptors; a branch too many moves all of them."""
    loops = _loops(compiled(v).cubin, tmp_path)
    assert len(loops) == 2  # masked tiles and full ones
    for loop in loops:
        assert sum("HGMMA" in line for line in loop) == products and sum("R2UR" in line for line in loop) <= moves


@needs_nvrtc
def test_the_compiler_says_when_registers_spill(tmp_path: Path) -> None:
    """The checks above can fail: tiles too large for the registers."""
    v = _QUICK[2]
    with pytest.raises(AssertionError):
        _check(dataclasses.replace(v, tiles=dataclasses.replace(v.tiles, keys=128, stages=1)), tmp_path)


def test_tiles_fit_every_pair_of_head_dims() -> None:
    for head_dim, v_head_dim in itertools.product(range(1, 257, 15), repeat=2):
        for features in _FEATURES:
            v = hopper.make("float16", head_dim, v_head_dim, features, 4096)
            assert v.head_dim >= head_dim and v.v_head_dim >= v_head_dim and v.shared_bytes <= hopper.MOST_SHARED


@needs_nvrtc
def test_what_is_kept_can_be_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v = hopper.make("bfloat16", 64, 64)
    path = compile.cubin(v, library(), tmp_path / "cache")
    monkeypatch.setenv("ATTNHUB_CUDA_KEEP", str(tmp_path / "kept"))
    assert compile.cubin(v, library(), tmp_path / "cache") == path
    (folder,) = (tmp_path / "kept").iterdir()
    assert (folder / "kernel.cubin").read_bytes() == path.read_bytes()
    assert "registers" in (folder / "report.txt").read_text()
    options = (folder / "options.txt").read_text().splitlines()
    assert options[0].startswith("NVRTC ") and tuple(options[1:]) == v.options()
    included = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.cuh")}
    library().compile((folder / v.main).read_text(), v.main, included, tuple(options[1:]))
    before = os.stat(folder / "kernel.cubin").st_mtime_ns
    compile.cubin(v, library(), tmp_path / "cache")
    assert os.stat(folder / "kernel.cubin").st_mtime_ns == before
