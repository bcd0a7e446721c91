"""The cuda backend's kernel for a few queries over a long cache, without a GPU: every variant compiles, without spills."""

from __future__ import annotations

import re

import pytest
from cuda_compiled import check_layout, compiled, needs_nvrtc

from attnhub.backends.cuda import decode, decode_params
from attnhub.backends.cuda.decode import DecodeVariant


@needs_nvrtc
def test_the_struct_is_laid_out_as_python_packs_it() -> None:
    check_layout("decode/params.cuh", decode_params.SIZE, decode_params.offsets())


def _variants() -> list[DecodeVariant]:
    dims = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 72), (7, 9), (256, 16), (16, 256))
    found = [decode.make("sm_90", "bfloat16", *dim, paging) for dim in dims for paging in range(3)]
    found += [decode.make("sm_90", "bfloat16", dim, dim, 1, softcap, alibi) for dim in (64, 128, 256) for softcap, alibi in ((True, False), (False, True), (True, True))]
    found += [decode.make("sm_90", "bfloat16", *dim, paging, append=append) for dim in dims for paging in range(3) for append in (1, 2)]
    found += [decode.make("sm_90", "bfloat16", 128, 128, 1, True, True, append=2)]
    found += [decode.make("sm_90", "bfloat16", dim, dim, paging, append=append, alone=False) for dim in (64, 128, 256) for paging in (1, 2) for append in range(3)]
    return found + [decode.make(arch, "float16", dim, dim, 1, append=append, alone=arch == "sm_80") for arch in ("sm_80", "sm_86", "sm_89") for dim in (64, 128, 256) for append in range(3)]


def _name(v: DecodeVariant) -> str:
    return "-".join((v.arch, v.dtype, f"D{v.head_dim}x{v.v_head_dim}", f"paging{v.paging}", "softcap" * v.softcap, "alibi" * v.alibi, f"append{v.append}" if v.append else "", f"warps{v.warps}")).strip("-")


def _spilled(v: DecodeVariant) -> int:
    log = compiled(v).log
    assert "warning" not in log.lower(), log
    return max(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))


_QUICK = [
    decode.make("sm_90", "bfloat16", 128, 128, 1), decode.make("sm_80", "float16", 64, 64, 0), decode.make("sm_90", "bfloat16", 128, 128, 2, append=2),
    *(decode.make(arch, "float16", 64, 64, 1, append=2, alone=arch == "sm_80") for arch in ("sm_80", "sm_86", "sm_89")),
]  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize("v", [*_QUICK, *(pytest.param(v, marks=pytest.mark.long) for v in _variants() if v not in _QUICK)], ids=_name)
def test_variants_compile_without_spills(v: DecodeVariant) -> None:
    # At 192 columns and more out and q take the registers: a few numbers of the whole call wait in memory there, of new tokens too.
    most = 0 if v.head_dim + v.v_head_dim < 384 else 32
    assert _spilled(v) <= (most if not v.append or v.head_dim + v.v_head_dim <= 256 else 48)
    alone = v.warps * (1 if max(v.head_dim, v.v_head_dim) <= 128 else 2) == 8
    assert v.shared_bytes <= (163 if alone else 99) * 1024 and v.slots >= 3


@needs_nvrtc
def test_the_compiler_says_when_registers_spill() -> None:
    """The check above can fail."""
    assert _spilled(decode.make("sm_80", "bfloat16", 320, 320)) > 16
