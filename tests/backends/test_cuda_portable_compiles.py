"""The cuda backend's portable kernel, without a GPU: every variant compiles for every architecture, without spills in loops."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from cuda_compiled import check_layout, compiled, disassembled, needs_nvrtc

from attnhub.backends.cuda import params, variant


@needs_nvrtc
def test_the_struct_is_laid_out_as_python_packs_it() -> None:
    check_layout("portable/params.cuh", params.LAYOUT.size, params.offsets())


#: Shared memory of one block, in KiB (CUDA C++ programming guide, technical specifications per compute capability).
LIMITS = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99}


def _made(arch: str, dtype: str, head_dim: int, v_head_dim: int = 0, **more: Any) -> variant.Variant:
    return variant.make(arch=arch, turing=arch == "sm_75", dtype=dtype, head_dim=head_dim, v_head_dim=v_head_dim or head_dim, **more)


def _variants() -> list[variant.Variant]:
    """Both paths, both dtypes, tile sizes from the smallest to the largest, each optional part, exact and padded head dims."""
    found = [_made("sm_75", "float16", *dims) for dims in ((1, 1), (64, 64), (100, 100), (112, 112), (128, 128), (192, 128), (256, 256))]
    found += [_made(arch, dtype, d) for arch in ("sm_80", "sm_86", "sm_89", "sm_90") for d in (64, 128, 256) for dtype in ("float16", "bfloat16")]
    for softcap, alibi in ((True, False), (False, True), (True, True)):
        found += [_made(arch, "bfloat16", d, softcap=softcap, alibi=alibi) for arch in ("sm_80", "sm_86", "sm_90") for d in (64, 128, 256)]
        found.append(_made("sm_75", "float16", 256, softcap=softcap, alibi=alibi))
    for dims in ((7, 7), (72, 72), (96, 96), (112, 112), (160, 160), (192, 128), (224, 224), (256, 16), (16, 256)):
        found += [_made(arch, "bfloat16", *dims) for arch in ("sm_80", "sm_86", "sm_90")]
    found += [_made(arch, "float16", d, seqlen_q=16) for arch in ("sm_80", "sm_86", "sm_90") for d in (64, 128, 256)]
    return list(dict.fromkeys(found))


def _name(v: variant.Variant) -> str:
    parts = [v.arch, v.dtype, f"D{v.head_dim}x{v.v_head_dim}", f"{v.rows}x{v.keys}x{v.stages}", "softcap" * v.softcap, "alibi" * v.alibi]
    return "-".join(part for part in parts if part)


def _spilled(log: str) -> int:
    """Bytes of the kernel itself; the function that does blocks again is not counted."""
    ((stores, loads),) = re.findall(r"properties for attnhub_forward\s+ptxas[^\n]* (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return max(int(stores), int(loads))


def _memory_in_loop(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Loads and stores of local memory in the loop over keys, the tiles of keys that a mask cuts included."""
    code, labels = disassembled(cubin, folder, "attnhub_forward")
    ends = [(labels.get(m[1], 1 << 30), i) for i, line in enumerate(code) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))]
    loops = [code[a:b] for a, b in ends if a < b and all(any(word in line for line in code[a:b]) for word in ("HMMA", "MUFU.EX2"))]
    loop = loops[0]  # the first in the code: the kernel's own
    return sum(bool(re.search(r"\bLDL\b", line)) for line in loop), sum(bool(re.search(r"\bSTL\b", line)) for line in loop)


def _check(v: variant.Variant, folder: Path) -> None:
    cubin, log = compiled(v)
    assert cubin[:4] == b"\x7fELF"
    assert "warning" not in log.lower(), log
    assert v.shared_bytes <= LIMITS[v.arch] * 1024
    # A few numbers that only masks and the end need may wait in memory. In the loop they are read, of thousands of instructions, and never written.
    assert _spilled(log) <= 40, log
    if _spilled(log):
        loads, stores = _memory_in_loop(cubin, folder)
        assert loads <= 6 and stores == 0


_QUICK = [_made("sm_90", "bfloat16", d) for d in (64, 128, 256)]


@needs_nvrtc
@pytest.mark.parametrize("v", [*_QUICK, *(pytest.param(v, marks=pytest.mark.long) for v in _variants() if v not in _QUICK)], ids=_name)
def test_variants_compile_without_spills_in_loops(v: variant.Variant, tmp_path: Path) -> None:
    _check(v, tmp_path)


@needs_nvrtc
def test_the_compiler_says_when_registers_spill(tmp_path: Path) -> None:
    """The check above can fail: a tile too large for the registers does spill."""
    with pytest.raises(AssertionError):
        _check(dataclasses.replace(_made("sm_80", "float16", 128), keys=96), tmp_path)


@pytest.mark.parametrize("arch", LIMITS)
def test_tiles_fit_every_pair_of_head_dims(arch: str) -> None:
    for head_dim in range(1, 257, 5):
        for v_head_dim in range(1, 257, 5):
            for more in ({}, {"softcap": True}, {"seqlen_q": 64}, {"seqlen_q": 100}):
                v = _made(arch, "float16", head_dim, v_head_dim, **more)
                assert v.shared_bytes <= LIMITS[arch] * 1024
                assert v.keys % 16 == 0 and v.keys % (v.warps * 2) == 0 and (v.keys >= 32 or arch == "sm_75")
                assert 16 * v.kept <= head_dim + 15 and (not v.pairs or -(-v.v_head_dim // 16) % 2 == 0)
    assert _made(f"{arch}a", "float16", 128) == dataclasses.replace(_made(arch, "float16", 128), arch=f"{arch}a") or arch == "sm_75"
