"""The environment: every variable, bad values, and that a change takes effect at the next call."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import logging
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch

import attnhub
from attnhub import config, runtime
from attnhub.registry import registry

Q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))


def _served() -> str:
    attnhub.attention(Q, Q, Q)
    decision = attnhub.last_decision()
    assert decision is not None and decision.chosen is not None
    return decision.chosen


def test_variables_are_described_once_each() -> None:
    names = [v.name for v in config.VARIABLES]
    assert len(set(names)) == len(names)
    for variable in config.VARIABLES:
        assert variable.allowed and variable.meaning and dataclasses.asdict(variable)["name"].isupper()


def _reads_environment(source: str) -> bool:
    """Whether ``os.environ`` or ``os.getenv`` is used in any way but to set a variable."""
    tree = ast.parse(source)
    set_only = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and id(node) not in set_only:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and {"environ", "getenv"} & {alias.name for alias in node.names}:
            return True
    return False


def test_config_is_the_only_reader_of_the_environment() -> None:
    assert _reads_environment("import os\nos.environ.get('A')") and _reads_environment("if 'A' in os.environ: pass") and not _reads_environment("os.environ['A'] = '1'")
    root = pathlib.Path(attnhub.__file__).parent
    readers = []
    for folder in (root, *(pathlib.Path(p) / name for p in attnhub.__path__ for name in ("backends", "integrations"))):
        for path in folder.rglob("*.py"):
            if path != root / "config.py" and _reads_environment(path.read_text()):
                readers.append(str(path))
    assert not readers


def test_a_child_has_the_same_environment_but_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_TUNE", "now")
    assert config.tune() == "now" and config.child_environment(A="1") == {**{k: v for k, v in os.environ.items() if k != "ATTNHUB_TUNE"}, "A": "1"}
    monkeypatch.setenv("ATTNHUB_TUNE", "mine.json")
    assert config.child_environment()["ATTNHUB_TUNE"] == "mine.json"


# -- ATTNHUB_BACKEND ---------------------------------------------------------------------------------------------------------


def test_a_change_of_the_environment_holds_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = _served()
    for _ in range(2):  # the second round meets cached decisions only
        monkeypatch.setenv("ATTNHUB_BACKEND", "reference")
        assert _served() == "reference"
        monkeypatch.setenv("ATTNHUB_BACKEND", "sdpa")
        assert _served() == "sdpa"
        monkeypatch.delenv("ATTNHUB_BACKEND")
        assert _served() == automatic
        os.environ["ATTNHUB_BACKEND"] = " reference , sdpa "
        assert _served() == "reference"
        os.putenv("ATTNHUB_BACKEND", "ignored: os.putenv does not reach os.environ")
        del os.environ["ATTNHUB_BACKEND"]


def test_an_empty_value_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = _served()
    for value in ("", " ", "auto", ","):
        monkeypatch.setenv("ATTNHUB_BACKEND", value)
        assert _served() == automatic
        assert runtime.policy().names == ("auto",)


def test_argument_beats_context_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_BACKEND", "sdpa")
    assert runtime.policy().source == "environment"
    with attnhub.use("reference"):
        assert _served() == "reference" and runtime.policy().source == "context"
        attnhub.attention(Q, Q, Q, backend="sdpa")
        assert attnhub.last_decision().chosen == "sdpa" and attnhub.last_decision().policy.source == "argument"  # type: ignore[union-attr]
        assert runtime.policy("auto").names == ("auto",)
    assert _served() == "sdpa"


@pytest.mark.parametrize("value", ["auto,sdpa", "sdpa,auto,reference"])
def test_auto_must_end_a_list(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with pytest.raises(ValueError, match="auto"):
        attnhub.attention(Q, Q, Q, backend=value)
    with pytest.raises(ValueError, match=r"attnhub\.use"):
        attnhub.use(*value.split(","))
    _served()
    monkeypatch.setenv("ATTNHUB_BACKEND", value)
    for _ in range(2):
        with pytest.raises(ValueError, match="ATTNHUB_BACKEND"):
            attnhub.attention(Q, Q, Q)


# -- ATTNHUB_DISABLE, ATTNHUB_DETERMINISTIC -------------------------------------------------------------------------------------


def test_disable_takes_effect_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = _served()
    monkeypatch.setenv("ATTNHUB_DISABLE", f" {automatic} ,")
    assert _served() != automatic
    with pytest.raises(attnhub.NoBackendError, match="disabled"):
        attnhub.attention(Q, Q, Q, backend=automatic)
    monkeypatch.delenv("ATTNHUB_DISABLE")
    assert _served() == automatic


def test_disabling_a_name_that_nobody_has_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(runtime, "_unknown", set())
    monkeypatch.setenv("ATTNHUB_DISABLE", "cudaa,cuda")
    with caplog.at_level("WARNING", "attnhub"):
        for length in (3, 5, 1):
            attnhub.attention(*(torch.randn(1, 1, length, 8),) * 3)
    assert caplog.text.count("ATTNHUB_DISABLE names 'cudaa'") == 1 and "'cuda'" not in caplog.text


def test_disabling_everything_is_an_error_with_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_DISABLE", ",".join(registry.names()))
    with pytest.raises(attnhub.NoBackendError) as caught:
        attnhub.attention(Q, Q, Q)
    for name, verdict in caught.value.decision.verdicts.items():
        assert attnhub.Code.DISABLED in [r.code for r in verdict.reasons], name  # type: ignore[union-attr]


def test_deterministic_is_a_feature_of_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attnhub.Feature.DETERMINISTIC not in attnhub.explain(Q, Q, Q).problem.features
    monkeypatch.setenv("ATTNHUB_DETERMINISTIC", "1")
    assert attnhub.Feature.DETERMINISTIC in attnhub.explain(Q, Q, Q).problem.features
    _served()
    assert attnhub.Feature.DETERMINISTIC in attnhub.last_decision().problem.features  # type: ignore[union-attr]
    monkeypatch.setenv("ATTNHUB_DETERMINISTIC", "0")
    _served()
    assert attnhub.Feature.DETERMINISTIC not in attnhub.last_decision().problem.features  # type: ignore[union-attr]
    monkeypatch.setenv("ATTNHUB_DETERMINISTIC", "yes")
    with pytest.raises(ValueError, match="ATTNHUB_DETERMINISTIC"):
        _served()


def test_torchs_deterministic_switch_counts_too() -> None:
    _served()
    torch.use_deterministic_algorithms(True)
    try:
        _served()
        assert attnhub.Feature.DETERMINISTIC in attnhub.last_decision().problem.features  # type: ignore[union-attr]
    finally:
        torch.use_deterministic_algorithms(False)
    _served()
    assert attnhub.Feature.DETERMINISTIC not in attnhub.last_decision().problem.features  # type: ignore[union-attr]


# -- the others ----------------------------------------------------------------------------------------------------------------


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("ATTNHUB_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert config.cache_dir() == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    monkeypatch.delenv("ATTNHUB_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_dir() == tmp_path / "xdg" / "attnhub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert config.cache_dir() == tmp_path / "home" / ".cache" / "attnhub"


def test_log_level_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.log_level() == "WARNING"
    monkeypatch.setenv("ATTNHUB_LOG", "Debug")
    assert config.log_level() == "DEBUG"
    monkeypatch.setenv("ATTNHUB_LOG", "loud")
    with pytest.raises(ValueError, match=r"ATTNHUB_LOG='loud'.*debug, info, warning, error"):
        config.log_level()


def test_log_level_reaches_the_logger() -> None:
    code = "import attnhub, torch, logging; q = torch.zeros(1, 1, 2, 4); attnhub.attention(q, q, q); print(logging.getLogger('attnhub').getEffectiveLevel())"
    for value, level in (("debug", logging.DEBUG), ("error", logging.ERROR)):
        found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ATTNHUB_LOG": value}, capture_output=True, text=True, check=True)
        assert int(found.stdout) == level


def test_cpu_isa_and_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_CPU_ISA", " AVX2 ")
    assert config.cpu_isa() == "avx2"
    for value, on in (("1", True), ("0", False), ("", False), ("true", True)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert config.triton_interpret() is on


def test_snapshot_without_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHUB_BACKEND", "sdpa")
    fast = config.snapshot()
    monkeypatch.setattr(config, "_FAST", False)
    assert config.snapshot() == fast == (b"sdpa", None, None)


# -- use ------------------------------------------------------------------------------------------------------------------------


def test_use_nests_and_restores() -> None:
    automatic = _served()
    with attnhub.use("reference"):
        assert _served() == "reference"
        with attnhub.use("sdpa"):
            assert _served() == "sdpa"
            with attnhub.use("auto"):
                assert _served() == automatic
            assert _served() == "sdpa"
        assert _served() == "reference"
    assert _served() == automatic


def test_use_restores_after_an_exception_and_can_be_entered_again() -> None:
    automatic = _served()
    chosen = attnhub.use("reference")
    with pytest.raises(KeyError), chosen:
        raise KeyError
    assert _served() == automatic
    with chosen, chosen:
        assert _served() == "reference"
    assert _served() == automatic


def test_use_takes_lists() -> None:
    with attnhub.use("nosuch", "sdpa"):
        assert _served() == "sdpa"
    with attnhub.use("nosuch,reference", "auto"):
        assert _served() == "reference"
    with attnhub.use():
        assert runtime.policy().names == ("auto",)


def test_use_as_decorator() -> None:
    @attnhub.use("reference")
    def inside() -> str:
        return _served()

    automatic = _served()
    assert inside() == "reference" and _served() == automatic


def test_use_holds_for_its_thread_only() -> None:
    automatic, seen = _served(), {}
    with attnhub.use("reference"):
        thread = threading.Thread(target=lambda: seen.update(other=_served()))
        thread.start()
        thread.join()
        assert _served() == "reference"
    assert seen == {"other": automatic}


def test_threads_with_different_choices_do_not_mix() -> None:
    wrong: list[tuple[str, str]] = []
    start = threading.Barrier(4)

    def work(name: str) -> None:
        start.wait()
        for _ in range(30):
            with attnhub.use(name):
                found = _served()
            if found != name:
                wrong.append((name, found))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "sdpa", "reference", "sdpa")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_decorated_function_in_two_threads_at_once() -> None:
    """They leave in the order in which they came, which one shared stack of tokens cannot serve."""
    both_inside, first_left = threading.Barrier(2, timeout=20), threading.Event()
    failures: list[BaseException] = []
    automatic = _served()

    @attnhub.use("reference")
    def inside(last: bool) -> None:
        both_inside.wait()
        if last:
            first_left.wait(20)
        assert _served() == "reference"

    def work(last: bool) -> None:
        try:
            inside(last)
            assert _served() == automatic
        except BaseException as error:
            failures.append(error)
        finally:
            first_left.set()

    threads = [threading.Thread(target=work, args=(last,)) for last in (False, True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_tasks_inherit_the_context_that_starts_them() -> None:
    async def one(name: str) -> str:
        with attnhub.use(name):
            await asyncio.sleep(0.001)
            return await asyncio.create_task(asyncio.to_thread(_served))

    async def both() -> list[str]:
        return await asyncio.gather(one("reference"), one("sdpa"), one("reference"))

    assert asyncio.run(both()) == ["reference", "sdpa", "reference"]


def test_a_generator_that_stays_inside_use() -> None:
    automatic = _served()

    def chunks() -> object:
        with attnhub.use("reference"):
            yield _served()

    generator = chunks()
    assert next(generator) == "reference"  # type: ignore[call-overload]
    generator.close()  # type: ignore[attr-defined]
    assert _served() == automatic
