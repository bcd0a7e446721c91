"""Documents: generated pages are fresh, links lead somewhere, examples run, and claims about backends are what is declared."""

from __future__ import annotations

import functools
import importlib
import pathlib
import re
from typing import Any

import pytest
import torch

import attnhub
from attnhub.cli.docs import fill, pages, reasons
from attnhub.cli.files import checkout
from attnhub.cli.matrix import builtin
from attnhub.config import VARIABLES, triton_interpret
from attnhub.decision import explain_command
from attnhub.reasons import DESCRIPTIONS, Code

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("backends/*/README.md")])


@pytest.mark.skipif(triton_interpret(), reason="TRITON_INTERPRET changes what the triton backend declares")
def test_generated_pages_are_fresh() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in pages(checkout(ROOT)).items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    assert not stale, f"run `attnhub docs`: {', '.join(stale)}"


def test_every_code_is_described_and_has_its_anchor() -> None:
    assert set(DESCRIPTIONS) == set(Code)
    text = reasons()
    for code in Code:
        assert f"\n## {code.value}\n" in text


def test_no_variable_is_read_that_is_not_documented() -> None:
    named = set()
    for path in [*(ROOT / "attnhub").rglob("*.py"), *(ROOT / "backends").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]:
        named |= set(re.findall(r"\bATTNHUB_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    build_options = {"ATTNHUB_INPLACE"}
    c_names = {name for name in named if name.startswith("ATTNHUB_CPU_") and name != "ATTNHUB_CPU_ISA"}
    assert named - build_options - c_names <= {v.name for v in VARIABLES}


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file.read_text(encoding="utf-8")), f"{page.name} links to {target}, which has no such heading"


def _blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_example_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (block,) = _blocks("README.md")
    model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    namespace: dict[str, Any] = {"model": model, "inputs": (torch.randn(2, 8, 32),)}
    exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["out"].shape == (1, 32, 1024, 64) and namespace["report"].patched
    assert "chosen: " in capsys.readouterr().out
    assert (tmp_path / "model.onnx").is_file()


def test_the_quickstart_examples_run() -> None:
    call, cache, layer, eight, parts = _blocks("docs/quickstart.md")[:5]
    namespace: dict[str, Any] = {}
    exec(compile(call, "quickstart.md", "exec"), namespace)
    assert namespace["lse"].shape == (2, 16, 1024)
    exec(compile(cache, "quickstart.md", "exec"), namespace)
    assert namespace["cache"].cache_seqlens.tolist() == [11, 11]
    exec(compile(layer, "quickstart.md", "exec"), namespace)
    assert namespace["layer"].position.tolist() == [9, 9]
    exec(compile(eight, "quickstart.md", "exec"), namespace)
    wanted = attnhub.attention(namespace["q"], namespace["k"], namespace["v"], backend="sdpa")
    assert namespace["out"].dtype == torch.bfloat16
    torch.testing.assert_close(namespace["out"].float(), wanted, rtol=0.1, atol=0.1)
    exec(compile(parts, "quickstart.md", "exec"), namespace)
    torch.testing.assert_close(namespace["out"], wanted, rtol=1e-5, atol=1e-6)


def _missing(name: str) -> str:
    """The first part of a dotted name that is neither an attribute of what stands before it nor a module."""
    found, path = importlib.import_module("attnhub"), "attnhub"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
        except ImportError:
            return path
    return ""


def test_names_in_the_documents_exist() -> None:
    """`attnhub.x.y` in any page is a name that attnhub has (or says is planned)."""
    planned = {"attnhub.replay", "attnhub.backends.x"}
    for page in PAGES:
        for name in set(re.findall(r"(?<![\w./:])attnhub(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8"))) - planned:
            assert not _missing(name), f"{page.name} speaks of {name}"


def _inline(page: pathlib.Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))


@functools.cache
def _sources() -> tuple[frozenset[str], frozenset[str]]:
    """(paths of all files and folders, words of all sources)."""
    tops = ("attnhub", "backends", "integrations", "tests", "examples", "benchmarks", "docs")
    paths = [*ROOT.glob("*"), *(path for top in tops for path in (ROOT / top).rglob("*"))]
    suffixes = {".py", ".cpp", ".cc", ".h", ".inc", ".cu", ".cuh", ".map", ".txt", ".toml", ".json"}
    sources = [path for path in paths if path.name == "Makefile" or (path.suffix in suffixes and "results" not in path.parts and path.name != "test_docs.py")]
    words = {path.stem for path in paths}
    for path in sources:
        words.update(re.findall(r"[A-Za-z_]\w*", path.read_text(encoding="utf-8")))
    return frozenset(f"/{path.relative_to(ROOT).as_posix()}" for path in paths), frozenset(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_identifiers_in_the_documents_exist(page: pathlib.Path) -> None:
    """A name of a file may leave out the folders before it. An identifier is one that some source has: renamed ones are noticed, not misused ones."""
    foreign = {"redux", "set_fastpath_enabled", "RegisterCustomOpLibrary", "PODWithPagedKVCacheWrapper", "is_supported"}
    paths, words = _sources()
    for text in _inline(page):
        for word in (word.strip("(),:;'\"").rstrip("/") for word in text.split()):
            if re.fullmatch(r"[\w./-]*\w\.(?:py|md|json|toml|txt|cuh?|cpp|h)|(?:attnhub|backends|integrations|tests|docs|benchmarks|examples)/[\w./-]+", word):
                assert any(path.endswith(f"/{word}") for path in paths), f"{page.name} names the file {word}"
        # (A commit is no identifier.)
        if (identifier := re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", text)) and not re.fullmatch("[0-9a-f]{12}", text):
            assert set(identifier[1].split(".")) <= words | foreign, f"{page.name} speaks of {text}"


def test_the_house_has_every_file_of_the_core() -> None:
    (house,) = re.findall(r"## The house\n\n```\n(.*?)```", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.DOTALL)
    assert set(re.findall(r"\b(\w+\.py)\b", house)) == {path.name for path in (ROOT / "attnhub").glob("[!_]*.py")}


def test_what_the_readme_says_of_backward_passes() -> None:
    without = {name for name, backend in builtin().items() if backend.capability.backward_features is None} if not triton_interpret() else set()
    if triton_interpret():
        pytest.skip("TRITON_INTERPRET changes what the triton backend declares")
    (said,) = re.findall(r"^- The (.+) backends have no backward of their own", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", said)) == without


def test_the_commands_in_the_documents_parse() -> None:
    """Names of commands, whole commands with options, and targets of make."""
    from attnhub.cli import COMMANDS, _parser

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        blocks = re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()] + _inline(page)
        for line in lines:
            if made := re.match(r"make ([a-z][a-z -]*)", line):
                assert set(made[1].split()) <= targets, f"{page.name}: {line}"
            if not (asked := re.match(r"(?:python -m )?attnhub ([a-z][a-z-]*)(.*)", line)):
                continue
            assert asked[1] in COMMANDS, f"{page.name}: {line}"
            words = asked[2].split()
            if words and words[-1].startswith("--"):
                # An option is spoken of, which may want a value.
                (commands,) = _parser(asked[1])._subparsers._group_actions  # type: ignore[union-attr]
                assert words[-1] in commands.choices[asked[1]]._option_string_actions, f"{page.name}: {line}"  # type: ignore[index,call-overload]
            elif " --" in asked[2]:
                try:
                    _parser(asked[1]).parse_args([asked[1], *words])
                except SystemExit:
                    pytest.fail(f"{page.name}: {line}")


def test_blocks_are_filled_between_their_markers() -> None:
    text = "a\n<!-- generated:x -->\nold\n<!-- /generated:x -->\nb"
    assert fill(text, {"x": "new\\1\n"}) == "a\n<!-- generated:x -->\nnew\\1\n<!-- /generated:x -->\nb"
    with pytest.raises(Exception, match="lacks the markers"):
        fill("nothing", {"x": "new"})


def test_typings_show_the_whole_package_to_type_checkers() -> None:
    linked = {p.name: p.resolve() for p in (ROOT / "typings" / "attnhub").iterdir()}
    want = {p.name: p for p in (ROOT / "attnhub").iterdir() if p.name != "__pycache__"}
    want.update(backends=ROOT / "backends", integrations=ROOT / "integrations")
    assert linked == want, "run `make typings`"


def test_explain_command_is_one_that_the_documents_show() -> None:
    decision = attnhub.explain(*(torch.randn(1, 8, 16, 64) for _ in range(3)), attnhub.Causal())
    assert explain_command(decision.problem).startswith("attnhub explain --device cpu --dtype float32")
