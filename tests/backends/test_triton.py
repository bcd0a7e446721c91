"""The triton backend: the conformance suite under Triton's interpreter, its declaration, and how plans come to their tiles."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

from triton_interpreter import INTERPRETED, compiled, interpreted, run_interpreted
from triton_reference import problem, tensors

from attnhub import testing
from attnhub.backend import PrepareError
from attnhub.backends.triton import TritonBackend, tiles
from attnhub.problem import DeviceInfo
from attnhub.reasons import Code


@compiled
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["test_conformance", "not test_conformance"])
def test_interpreted(which: str) -> None:
    """Every test that is marked `interpreted`, here and in the files that run no process of their own: in two parts, that two processors can share."""
    here = pathlib.Path(__file__).resolve()
    texts = {path: path.read_text(encoding="utf-8") for path in here.parent.glob("test_triton_*.py")}
    others = [path for path, text in sorted(texts.items()) if "\n@interpreted\n" in text and "def test_interpreted" not in text]
    run_interpreted(here, *others, which=which)


@interpreted
@pytest.mark.parametrize("check", testing.checks("triton", device="cpu", level="tiny") if INTERPRETED else [], ids=str)
def test_conformance(check: testing.Check) -> None:
    check.run()


@interpreted
def test_cpu_tensors_are_served_but_never_preferred() -> None:
    q, k, v = tensors(1, (2, 2), (4, 4), (16, 16), torch.float32)
    backend = TritonBackend()
    assert backend.capability.check(problem(q, k, v)) == () and backend.probe() == ()
    assert backend.cost(problem(q, k, v)) > 1e5


@compiled
def test_declaration() -> None:
    backend = TritonBackend()
    q, k, v = tensors(1, (2, 2), (4, 4), (16, 16), torch.float32)
    assert [r.code for r in backend.capability.check(problem(q, k, v))] == [Code.DEVICE_TYPE]
    assert backend.capability.check(problem(q, k, v, DeviceInfo("cuda", "nvidia", (9, 0)))) == ()
    assert [r.code for r in backend.capability.check(problem(q, k, v, DeviceInfo("cuda", "nvidia", (7, 0))))] == [Code.ARCH]
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        assert [r.code for r in backend.probe()] == [Code.NO_DEVICE]
    eighth = tensors(1, (2, 2), (4, 4), (16, 16), torch.float8_e4m3fn)
    for arch, reasons in (((8, 0), [Code.DTYPE]), ((8, 6), [Code.DTYPE]), ((8, 9), []), ((9, 0), []), ((12, 0), [])):
        assert [r.code for r in backend.capability.check(problem(*eighth, DeviceInfo("cuda", "nvidia", arch)))] == reasons
    wide = tensors(1, (2, 2), (4, 4), (577, 512), torch.float32)
    assert Code.HEAD_DIM in {r.code for r in backend.capability.check(problem(*wide, DeviceInfo("cuda", "nvidia", (9, 0))))}


def test_importing_the_declaration_imports_no_triton() -> None:
    code = "import sys, attnhub.backends.triton as t; assert t.backend.name == 'triton'; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2])


def test_smaller_tiles_after_a_refusal() -> None:
    """A device that refuses the first tiles gets smaller ones, and at last a reason; nothing has run until then."""
    from triton.runtime.errors import OutOfResources

    from attnhub.backends.triton.launcher import TritonPlan

    q, k, v = tensors(1, (2, 2), (4, 4), (128, 128), torch.float16)
    plan = TritonPlan(problem(q, k, v, DeviceInfo("cuda", "nvidia", (9, 0))))
    plan._tiles = {"forward": tiles.choices("forward", 128, 128, 2, 232448)}
    offered = []

    def launch(choice: tiles.Tiles) -> None:
        offered.append(choice)
        if len(offered) < 3:
            raise OutOfResources(100, 50, "shared memory")

    plan._try("forward", launch)
    assert len(offered) == 3
    assert plan._tiles["forward"][0] is offered[-1]
    sizes = [tiles.estimate("forward", t, 256, 2) for t in offered]
    assert sizes == sorted(sizes, reverse=True)

    def refuse(choice: tiles.Tiles) -> None:
        raise OutOfResources(100, 50, "shared memory")

    with pytest.raises(PrepareError) as error:
        plan._try("forward", refuse)
    assert error.value.reason.code is Code.OUT_OF_RESOURCES


def test_tiles_that_another_thread_has_given_up() -> None:
    """It deletes them first; whoever fails with them too goes on to the next ones, although these are the last."""
    from triton.runtime.errors import OutOfResources

    from attnhub.backends.triton.launcher import TritonPlan

    q, k, v = tensors(1, (2, 2), (4, 4), (128, 128), torch.float16)
    plan = TritonPlan(problem(q, k, v, DeviceInfo("cuda", "nvidia", (9, 0))))
    large, small = tiles.Tiles(64, 64, 4, 3), tiles.Tiles(64, 64, 4, 2)
    plan._tiles = {"forward": [large, small]}
    served = []

    def launch(choice: tiles.Tiles) -> None:
        if choice is large:
            plan._tiles["forward"].remove(large)
            raise OutOfResources(100, 50, "shared memory")
        served.append(choice)

    plan._try("forward", launch)
    assert served == [small]


def test_split_count() -> None:
    assert tiles.split_count(1000, 64, 132) == 1
    assert tiles.split_count(8, 1, 132) == 1
    for programs, key_tiles in ((8, 128), (1, 1000), (64, 16)):
        splits = tiles.split_count(programs, key_tiles, 132)
        assert 1 < splits <= max(1, key_tiles // 2)


def test_widths_of_three_products() -> None:
    """Up to 64 in one part, above in two."""
    cut = {64: (64, 0), 65: (64, 64), 128: (64, 64), 129: (128, 64), 192: (128, 64), 200: (128, 128), 256: (128, 128)}
    for dim, parts in cut.items():
        width = tiles.widths(dim, dim, most=tiles.TF32X3_PART)
        assert (width.main, width.rest) == (width.v_main, width.v_rest) == parts
