"""The CPU kernels behind their C interface, without Python or torch: tests/native, built and run here in every way that counts.

The driver makes seeded random problems with every part of the interface, and judges them in double precision inside red zones of
NaN. That it can fail was tried, one fault at a time: the causal mask dropped, the scale times 1.5 and times 1.001, a tile skipped,
sinks, dropout or its offset ignored, nine rounds of Philox, NaN multiplied instead of selected, a window off by one, block sizes
that depend on the threads, one element too many written, `grad_lse` forgotten, a check of the arguments removed, a counter that is
not atomic (ThreadSanitizer), one element too many read (AddressSanitizer): each was seen. `test_faults_are_seen` repeats some.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Optional

import pytest

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
BUILD = CHECKOUT / "build" / "native"
#: A processor that CMakeLists.txt does not know gets the portable path alone, in a third of the time.
PORTABLE = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=any")


def _tool(name: str) -> Optional[str]:
    """A program of PATH, of this environment's own folder, or of the package of its name."""
    found = shutil.which(name) or shutil.which(name, path=str(pathlib.Path(sys.executable).parent))
    if not found:
        with contextlib.suppress(ImportError, AttributeError):
            package = __import__(name)
            found = shutil.which(name, path=getattr(package, "BIN_DIR", None) or package.CMAKE_BIN_DIR)
    return found


def _why_not() -> str:
    if not (CHECKOUT / "tests" / "native" / "CMakeLists.txt").is_file() or not (CHECKOUT / "CMakeLists.txt").is_file():
        return "needs a checkout"
    if not _tool("cmake"):
        return "needs cmake"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return "needs a C++ compiler"
    return "" if _tool("ninja") or shutil.which("make") else "needs ninja or make"


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Several test processes may want the same build."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(name: str, *options: str, source: pathlib.Path = CHECKOUT, folder: Optional[pathlib.Path] = None) -> str:
    """The driver's path. Kept under build/, where the next run finds what has not changed."""
    folder = folder or BUILD / name
    cmake = _tool("cmake")
    assert cmake
    ninja = _tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    with _alone(folder):
        _call([cmake, "-S", str(source), "-B", str(folder), "-DATTNHUB_NATIVE_TESTS=ON", *generator, *options])
        _call([cmake, "--build", str(folder), "--target", "attnhub_cpu_test", "--parallel", "2"])
    return str(folder / "tests" / "native" / "attnhub_cpu_test")


def _amx_options() -> tuple[str, ...]:
    """Without AMX in the processor its path is emulated."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return () if cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text() else ("-DATTNHUB_EMULATE_AMX=ON",)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot lay out its memory on this kernel")
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    assert done.stdout.endswith("ok\n")
    return done.stdout


def _sanitizer(kind: str, tmp_path: pathlib.Path) -> str:
    """The CMake option, or a skip where the compiler has no such runtime."""
    source = tmp_path / "empty.cpp"
    source.write_text("int main() {}\n")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "clang++"
    command = [compiler, f"-fsanitize={kind}", str(source), "-o", str(tmp_path / "empty")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"this compiler has no -fsanitize={kind}")
    return f"-DATTNHUB_SANITIZE={kind}"


def _coverage(output: str, mode: str) -> dict[str, int]:
    lines = output.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(mode))
    parts = next(line for line in lines[at:] if line.startswith("parts:"))
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", parts)}


def test_every_path_on_random_problems() -> None:
    driver = _build("plain", *_amx_options())
    output = _run([driver, "--count", "300"])
    for mode in ("forward", "backward"):
        never = {name for name, count in _coverage(output, mode).items() if count < 3}
        assert never == ({"paged", "packed_over_pages"} if mode == "backward" else set()), output
    assert all(int(n) > 20 for n in re.findall(r"loops on several threads: (\d+)", output)), output


def test_options_that_mean_nothing_are_refused() -> None:
    driver = _build("plain", *_amx_options())
    for options in (["--isa", "mmx"], ["--mode", "sideways"], ["--count", "0"], ["--count"], ["--colour", "1"]):
        done = subprocess.run([driver, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "attnhub_cpu_test:" in done.stderr


def test_portable_path_under_address_and_undefined_sanitizers(tmp_path: pathlib.Path) -> None:
    driver = _build("sanitized-portable", *PORTABLE, _sanitizer("address,undefined", tmp_path))
    _run([driver, "--count", "200", "--work", "1000000"])


def _emulated_aarch64() -> tuple[str, str]:
    """(cross compiler, emulator)"""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    return compiler, emulator


def _build_aarch64(compiler: str) -> str:
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    return _build("aarch64", *system, f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXE_LINKER_FLAGS=-static")


def test_neon_path_on_an_emulated_processor() -> None:
    compiler, emulator = _emulated_aarch64()
    output = _run([emulator, _build_aarch64(compiler), "--isa", "neon", "--count", "120", "--work", "500000"])
    assert output.count(" neon: 120 problems") == 2


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_aarch64_on_an_emulated_processor() -> None:
    compiler, emulator = _emulated_aarch64()
    output = _run([emulator, _build_aarch64(compiler), "--seed", "1000", "--count", "600", "--work", "1000000"])
    assert output.count(" neon: 600 problems") == output.count(" portable: 600 problems") == 2


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_address_and_undefined_sanitizers(tmp_path: pathlib.Path) -> None:
    driver = _build("address", *_amx_options(), _sanitizer("address,undefined", tmp_path))
    _run([driver, "--count", "2000", "--work", "1000000"])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("callers", [1, 3])
def test_thread_sanitizer(callers: int, tmp_path: pathlib.Path) -> None:
    """The library's threads against one another; and several callers at once, as the header allows."""
    driver = _build("thread", *_amx_options(), _sanitizer("thread", tmp_path))
    _run([driver, "--seed", str(1000 * callers), "--count", "300", "--threads", "4", "--callers", str(callers)])


#: A fault, the file, its text, what replaces it.
_FAULTS = [
    ("causal", "rows.h", "if (causal_) keys.high", "if (false) keys.high"),
    ("scale", "validate.cpp", "  job.group = c.q_heads", "  job.call.softmax_scale *= 1.001;\n  job.group = c.q_heads"),
    ("tile", "forward.h", "if (width <= 0 ||", "if ((j == kTileColumns && g == 1) || width <= 0 ||"),
    ("sinks", "softmax.h", "job.mask.sinks ? job.mask.sinks[head] : -INFINITY", "-INFINITY"),
    ("nan", "forward.h", "if (!key_finite_[j]) return false;", ""),
    ("overrun", "softmax.h", "static_cast<int>(c.v_head_dim - x));", "static_cast<int>(c.v_head_dim - x) + 1);"),
    ("dropout", "dropout.h", "round < 10", "round < 9"),
    ("lse", "backward.h", "- (g.grad_lse ? g.grad_lse[at] : 0.0f)", ""),
]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("file", "text", "instead"), [pytest.param(*fault[1:], id=fault[0]) for fault in _FAULTS])
def test_faults_are_seen(file: str, text: str, instead: str, tmp_path: pathlib.Path) -> None:
    """The driver against kernels that are wrong in one place."""
    copy = tmp_path / "checkout"
    for folder in ("backends/cpu", "tests/native"):
        shutil.copytree(CHECKOUT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(CHECKOUT / "CMakeLists.txt", copy)
    kernel = copy / "backends" / "cpu" / "kernels" / file
    source = kernel.read_text()
    assert source.count(text) == 1, "this fault is to be adapted to the new text"
    kernel.write_text(source.replace(text, instead))
    driver = _build("", *PORTABLE, source=copy, folder=tmp_path / "build")
    done = subprocess.run([driver, "--count", "200", "--work", "1000000"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "FAIL attnhub_cpu_test --mode" in done.stdout, done.stdout
