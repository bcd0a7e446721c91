"""Backends come by entry point; one that cannot be loaded becomes a verdict and never a crash."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import attnhub
from attnhub import registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

_GOOD = """
from attnhub.backend import Backend
from attnhub.backends.reference import ReferencePlan
from attnhub.capability import Capability, DeviceRange

class Third(Backend):
    name = {name!r}
    capability = Capability((DeviceRange("cpu", dtypes=frozenset({{"float32"}})),), frozenset())

    def cost(self, problem):
        return 1e-6

    def prepare(self, problem):
        return ReferencePlan()

backend = Third()
"""

_PROGRAM = """
import json, logging, torch, attnhub
logging.basicConfig()
q = torch.randn(1, 2, 4, 8)
decision = attnhub.explain(q, q, q)
out = attnhub.attention(q, q, q)
print(json.dumps({"decision": decision.to_json(), "served": attnhub.last_decision().chosen, "mean": float(out.mean())}))
"""


def _distribution(folder: pathlib.Path, name: str, entries: dict[str, str], group: str = "attnhub.backends") -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))


def _run(folder: pathlib.Path, program: str = _PROGRAM) -> tuple[dict[str, Any], str]:
    code = f"import sys; sys.path[:0] = {[str(folder), *sys.path]!r}\n{program}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.strip().splitlines()[-1]), found.stderr


_BROKEN = {
    "raises": ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    "missing": ("import module_that_is_not_there", "ModuleNotFoundError"),
    "wrong_type": ("backend = {'name': 'third'}", "dict, not an attnhub.Backend"),
    "a_class": ("from attnhub.backend import Backend as backend", "not an attnhub.Backend instance"),
    "no_attribute": ("other = 1", "AttributeError"),
    "syntax": ("def broken(:", "SyntaxError"),
    "wrong_name": (_GOOD.format(name="another"), "must be equal"),
}


def test_broken_plugins_are_verdicts(tmp_path: pathlib.Path) -> None:
    for name, (source, _) in _BROKEN.items():
        (tmp_path / f"plugin_{name}.py").write_text(source)
        _distribution(tmp_path, f"attnhub_{name}", {name: f"plugin_{name}:backend"})
    found, _ = _run(tmp_path)
    for name, (_, said) in _BROKEN.items():
        verdict = found["decision"]["verdicts"][name]
        assert not verdict["accepted"]
        assert [r["code"] for r in verdict["reasons"]] == ["plugin_error"]
        assert said in verdict["reasons"][0]["detail"] and f"attnhub_{name}" in verdict["reasons"][0]["detail"]
    assert found["served"] in registry.BUILTIN, "the others still serve"


def test_a_third_partys_backend_is_a_first_class_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "third_party.py").write_text(_GOOD.format(name="third"))
    (tmp_path / "usurper.py").write_text(_GOOD.format(name="sdpa"))
    _distribution(tmp_path, "attnhub_third", {"third": "third_party:backend"})
    _distribution(tmp_path, "attnhub_usurper", {"sdpa": "usurper:backend"})
    found, told = _run(tmp_path)
    assert found["decision"]["chosen"] == found["served"] == "third"
    assert set(registry.BUILTIN) <= set(found["decision"]["verdicts"])
    # A name that is taken keeps its first owner.
    assert found["decision"]["verdicts"]["sdpa"]["cost"] >= 1.0
    assert "attnhub_usurper" in told and "ignored" in told


def test_a_broken_integration_is_left_out_with_a_warning(tmp_path: pathlib.Path) -> None:
    (tmp_path / "third_party.py").write_text("raise RuntimeError('no licence')")
    _distribution(tmp_path, "attnhub_third", {"third": "third_party:integration"}, "attnhub.integrations")
    program = """
import json, torch, attnhub
from attnhub.patching import PatchError
try:
    attnhub.patch(torch.nn.Linear(2, 2))
except PatchError as error:
    print(json.dumps({"error": str(error)}))
"""
    found, told = _run(tmp_path, program)
    assert "no attention" in found["error"] and "third" in told and "no licence" in told


def _pyproject() -> dict[str, Any]:
    path = pathlib.Path(__file__).parents[2] / "pyproject.toml"
    return tomllib.loads(path.read_text())  # type: ignore[no-any-return]


def test_builtin_backends_are_the_declared_entry_points() -> None:
    assert _pyproject()["project"]["entry-points"]["attnhub.backends"] == registry.BUILTIN


def test_builtin_integrations_are_the_declared_entry_points() -> None:
    from attnhub import patching

    assert _pyproject()["project"]["entry-points"]["attnhub.integrations"] == patching.BUILTIN


def test_version_is_the_declared_one() -> None:
    assert _pyproject()["project"]["version"] == attnhub.__version__
