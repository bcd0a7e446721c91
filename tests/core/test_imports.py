"""What importing costs: names are resolved lazily, and the core needs torch and the standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import attnhub

_HEAVY = ("torch", "numpy", "transformers", "triton", "cupy", "onnx", "onnxruntime", "onnxscript", "matplotlib", "rich")


def _run(code: str) -> Any:
    program = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.strip().splitlines()[-1])


def test_importing_attnhub_imports_no_torch() -> None:
    loaded = _run("""
import json, attnhub, attnhub.config, attnhub.problem, attnhub.reasons, attnhub.capability, attnhub.backend, attnhub.decision, attnhub.selector
import attnhub.registry, attnhub.onnx, attnhub.patching, attnhub.cli
for name in attnhub.registry.BUILTIN:
    attnhub.registry.load(attnhub.registry.BUILTIN[name])
dir(attnhub), attnhub.Backend, attnhub.Code, attnhub.Capability
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
""")
    assert "attnhub" in loaded
    assert not set(_HEAVY) & set(loaded)


def test_attention_imports_torch_and_the_standard_library_only() -> None:
    found = _run("""
import json, torch, torch.utils._pytree, torch.autograd.forward_ad
before = set(sys.modules)
import attnhub
attnhub.attention, attnhub.merge_states, attnhub.KVCache, attnhub.patch, attnhub.explain
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"attnhub", "torch"}
print(json.dumps(sorted(new)))
""")
    assert found == []


def test_every_public_name_resolves() -> None:
    for name in attnhub.__all__:
        assert getattr(attnhub, name) is not None
    assert set(attnhub.__all__) <= set(dir(attnhub))
    with pytest.raises(AttributeError, match=r"attnhub.*no attribute 'atention'"):
        attnhub.atention  # noqa: B018


def test_public_names_stay_what_they_are_after_use() -> None:
    """Importing a subpackage sets an attribute of its parent: `attnhub.backends` stays callable nevertheless."""
    found = _run("""
import json, torch, attnhub
first = {name: callable(getattr(attnhub, name)) for name in attnhub.__all__}
before = attnhub.backends()
q = torch.zeros(1, 1, 2, 4)
attnhub.attention(q, q, q)
import attnhub.backends.sdpa
changed = [name for name, kind in first.items() if callable(getattr(attnhub, name)) != kind]
print(json.dumps({"changed": changed, "same": attnhub.backends() == before, "names": sorted(before)}))
""")
    assert found["changed"] == [] and found["same"] and {"reference", "sdpa", "cpu"} <= set(found["names"])


def test_the_command_line_works_without_torch() -> None:
    """Half a stack: torch cannot be imported at all."""
    code = """
import json
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is broken here")
sys.meta_path.insert(0, Blocked())
import attnhub.cli, io, contextlib
told = io.StringIO()
with contextlib.redirect_stdout(told):
    code = attnhub.cli.main(["doctor", "--json"])
print(json.dumps({"code": code, "told": json.loads(told.getvalue())}))
"""
    found = _run(code)
    assert "torch is broken here" in json.dumps(found["told"])
