"""What an installation must hold. `make test-wheel` runs this against an installed wheel, from a folder that is not the checkout."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import attnhub
from attnhub import registry, testing
from attnhub.cli.new_backend import skeleton

INSTALLED = os.environ.get("ATTNHUB_TEST_INSTALLED") == "1"
CHECKOUT = pathlib.Path(__file__).resolve().parent.parent


def test_attnhub_comes_from_where_it_should() -> None:
    sources = {CHECKOUT / name for name in ("attnhub", "backends", "integrations")}
    assert pathlib.Path(attnhub.__file__).is_file()
    if INSTALLED:
        homes = {pathlib.Path(attnhub.__file__).resolve().parent}
        homes |= {pathlib.Path(str(importlib.resources.files(f"attnhub.{name}"))).resolve() for name in ("backends", "integrations")}
        assert not sources & homes, "the wheel is not what is tested"


def test_top_level_packages_are_ours_alone() -> None:
    """`backends` and `integrations` are packages of attnhub, never of the environment."""
    done = subprocess.run([sys.executable, "-c", "import backends"], cwd="/", capture_output=True, text=True, check=False, env=_elsewhere())
    assert done.returncode == 1 or not INSTALLED


def _elsewhere() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} if INSTALLED else dict(os.environ)


def test_entry_points_are_the_built_in_backends() -> None:
    if not INSTALLED:
        pytest.skip("a checkout on the path declares no entry points")
    found = {e.name: e.value for e in importlib.metadata.entry_points(group=registry.GROUP) if e.dist and e.dist.name == "attnhub"}
    assert found == registry.BUILTIN
    assert {e.name for e in importlib.metadata.entry_points(group="attnhub.integrations")} >= {"huggingface", "mha"}


def test_every_backend_loads_and_native_libraries_are_there() -> None:
    found = attnhub.backends()
    assert set(registry.BUILTIN) <= set(found)
    for name, entry in found.items():
        codes = {reason["code"] for reason in entry["reasons"]}
        assert not codes & {"plugin_error", "not_built"}, f"{name}: {entry['reasons']}"


def test_files_that_are_not_python_are_there() -> None:
    assert skeleton("mine")["pyproject.toml"]
    assert importlib.resources.files("attnhub.backends.triton").joinpath("tune.json").is_file()
    kernels = importlib.resources.files("attnhub.backends.cuda") / "kernels"
    assert any(p.name.endswith((".cu", ".cuh")) for p in kernels.iterdir())


@pytest.mark.parametrize("name", ["sdpa", "cpu"])
def test_a_part_of_the_conformance_suite(name: str) -> None:
    todo = testing.checks(name, "cpu", "tiny")
    for check in todo[:: max(1, len(todo) // 12)]:
        check.run()


#: Distributions that onnxruntime brings, by what they put beside it.
RUNTIME = ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging")


def test_serving_needs_neither_torch_nor_onnx(tmp_path: pathlib.Path) -> None:
    """An environment of its own that holds attnhub, numpy and onnxruntime: a file runs by the native kernel there."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    import numpy
    import onnx

    from attnhub.backends.onnx.model import one_node
    from attnhub.backends.onnx.node import Form

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    command = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    site = pathlib.Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    for package in RUNTIME:
        found = [pathlib.Path(module.__file__).parent.parent / package for module in (numpy, runtime) if module.__file__]
        for source in [path for path in found if path.exists()][:1]:
            (site / package).symlink_to(source)
    unwanted = shutil.ignore_patterns("__pycache__", "backends", "integrations")
    shutil.copytree(pathlib.Path(attnhub.__file__).parent, site / "attnhub", ignore=unwanted)
    # Of an editable installation the libraries lie in a folder of their own.
    for folder in importlib.import_module("attnhub.backends").__path__:
        shutil.copytree(folder, site / "attnhub/backends", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)

    q, k, v = (torch.randn(2, heads, 9, 16) for heads in (4, 2, 2))
    onnx.save(one_node(Form(is_causal=True), onnx.TensorProto.FLOAT), tmp_path / "model.onnx")
    numpy.savez(tmp_path / "inputs.npz", Q=q.numpy(), K=k.numpy(), V=v.numpy())
    program = """if True:
        import importlib.util, numpy, onnxruntime
        import attnhub.onnx
        assert not [name for name in ("torch", "onnx", "onnxscript", "rich", "transformers") if importlib.util.find_spec(name)]
        options = attnhub.onnx.register(attnhub.onnx.register())
        found = onnxruntime.InferenceSession("model.onnx", options).run(None, dict(numpy.load("inputs.npz")))
        assert attnhub.onnx.native_calls() == 1 and attnhub.onnx.library_path().endswith(".so")
        numpy.save("out.npy", found[0])
    """
    # Nothing of this process's environment, through which another attnhub could be found.
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    subprocess.run([python, "-c", program], check=True, cwd=tmp_path, env=environment)
    want = attnhub.attention(q, k, v, attnhub.Causal(), backend="reference")
    torch.testing.assert_close(torch.from_numpy(numpy.load(tmp_path / "out.npy")), want, rtol=0, atol=2e-6)
    done = subprocess.run([python, "-m", "attnhub", "doctor"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert "Traceback" not in done.stdout + done.stderr and "torch" in done.stdout


def test_training_works() -> None:
    q, k, v = (torch.randn(1, 4, 24, 32, requires_grad=True) for _ in range(3))
    out = attnhub.attention(q, k, v, attnhub.Causal())
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for mine, theirs in zip(grads, torch.autograd.grad(want.square().sum(), (q, k, v))):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_compiled_and_eager_agree() -> None:
    q = torch.randn(1, 4, 24, 32)
    compiled = torch.compile(lambda x: attnhub.attention(x, x, x, attnhub.Causal()), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q), attnhub.attention(q, q, q, attnhub.Causal()))


def test_stand_ins_and_the_layer_are_there() -> None:
    q = torch.randn(1, 6, 2, 8)
    with attnhub.install_as_flash_attn(), attnhub.replace_sdpa(strict=True) as report:
        out = importlib.import_module("flash_attn").flash_attn_func(q, q, q, causal=True)
        same = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3, is_causal=True)
    assert report.calls == 1
    torch.testing.assert_close(out, same.transpose(1, 2))
    torch.testing.assert_close(attnhub.nn.CachedAttention(2, head_dim=8, max_seqlen=8)(q, q, q), out)


def test_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "attnhub", "doctor", "--json"], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["attnhub"]["version"] == attnhub.__version__
    if INSTALLED:
        script = pathlib.Path(sys.executable).with_name("attnhub")
        assert subprocess.run([script, "explain", "--device", "h200"], capture_output=True, check=False).returncode == 0
