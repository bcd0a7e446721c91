"""The presets of the cuda backend: what they time, how a file of theirs is judged and shown, and the peers that only they have."""

from __future__ import annotations

import json
import pathlib
from typing import Any, Optional

import pytest
import torch

from attnhub import cli
from attnhub.backend import Call, Plan
from attnhub.backends.reference import maths
from attnhub.bench import aten_peers, flashinfer, measure, overhead_case, pages, peers, portable_peer, precompile, results, targets, workers
from attnhub.bench.cases import Case
from attnhub.bench.presets import PORTABLE, PRESETS, RATIOS
from attnhub.reasons import Code, Reason
from attnhub.registry import registry

CPU = torch.device("cpu")
NAMES = ("cuda-grid", "cuda-sustained", "cuda-features", "cuda-decode", "cuda-few", "cuda-short", "cuda-portable")
ERROR = "max error, of the others' largest"


def _file(preset: str, rows: list[dict[str, Any]], card: str = "NVIDIA H100 80GB HBM3", **more: Any) -> dict[str, Any]:
    rounds, seconds = PRESETS[preset].turns
    device = {"type": "cuda", "vendor": "nvidia", "arch": [9, 0], "name": card, "isa": []}
    environment = {"device": device, "threads": 1, "torch": "2.11.0"}
    made = {"schema": results.SCHEMA, "suite": "gpu", "preset": preset, "environment": environment, "commit": None, "rows": rows}
    return {**made, "settings": {"rounds": rounds, "round_seconds": seconds}, **more}


def _row(case: Case, peer: str, seconds: float, **figures: Any) -> dict[str, Any]:
    made = {**case.to_json(), "peer": peer, "seconds": seconds, "seconds_rounds": [seconds] * 3, "speedup": None, "tflops": 1.0, "tokens_per_s": 1.0}
    return {**made, "kv_gb_per_s": case.kv_bytes() / seconds / 1e9 if case.is_decode() else None, "extra_mib": 1.0, "max_error": 0.005, **figures}


def _peers(preset: str, case: Case) -> list[str]:
    """Who stands beside the judged peer where nobody is absent."""
    names = {"sdpa": "F.sdpa", "flash": "aten flash" if case.window or case.documents else "F.sdpa flash", "cudnn": "aten cuDNN" if case.documents else "F.sdpa cuDNN"}
    asked = [name for name in PRESETS[preset].gpu_peers or () if name != "portable" and (name == "flex" or not case.softcap)]
    return [names.get(name, "FlexAttention") for name in asked]


def _rows(preset: str, ratio: float = 2.0, cases: Optional[list[Case]] = None) -> list[dict[str, Any]]:
    """Rows in which the judged peer is so many times as fast as every other, which takes 8 us."""
    found = []
    for case in PRESETS[preset].make("cuda") if cases is None else cases:
        found += [_row(case, name, 8e-6) for name in _peers(preset, case)]
        found.append(_row(case, PRESETS[preset].judged, 8e-6 / ratio))
    return found


def _words(file: dict[str, Any]) -> dict[str, str]:
    return {verdict.target.name: verdict.word for verdict in targets.judge(file) if verdict.word != targets.ABSENT}


# -- what is timed -------------------------------------------------------------------------------------------------------


def test_the_presets_hold_what_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: PRESETS[name].make("cuda") for name in NAMES}
    grid = {(c.head_dim, c.causal, c.seqlen_q) for c in made["cuda-grid"]}
    assert grid == {(d, causal, 2**n) for d in (64, 128, 256) for causal in (False, True) for n in range(9, 15)} and len(made["cuda-grid"]) == 36
    for case in (*made["cuda-grid"], *made["cuda-sustained"], *made["cuda-portable"]):
        assert (case.batch * case.seqlen_q, case.heads * case.head_dim, case.dtype, case.mode) == (16384, 2048, "bfloat16", "forward")
    assert {c.seqlen_q for c in made["cuda-sustained"]} == {4096} and len(made["cuda-sustained"]) == 6 and PRESETS["cuda-sustained"].turns == (3, 1.5)
    assert {c.seqlen_q for c in made["cuda-portable"]} == {c.seqlen_q for c in PRESETS["standard"].make("cuda")} and len(made["cuda-portable"]) == 18
    decode = made["cuda-decode"]
    assert {(c.batch, c.seqlen_k, c.kv_heads) for c in decode if c.page_size == 0} == set(flashinfer.RATES) == {
        (c.batch, c.seqlen_k, c.kv_heads) for c in decode if c.page_size == 16
    }  # fmt: skip
    assert {c.page_size for c in decode} == {0, 1, 16, 64, 256} and sum(c.graph for c in decode) * 2 == len(decode)
    kinds = {f"{c.dtype} {c.heads}/{c.kv_heads} {' '.join(c.features())}" for c in made["cuda-features"] if c.head_dim == 128}
    assert kinds == {
        "bfloat16 16/16 window 1024", "bfloat16 16/16 softcap 30", "bfloat16 16/16 documents 16", "float16 16/16 ", "bfloat16 32/8 ",
    }  # fmt: skip
    monkeypatch.setattr(workers, "jobs", lambda: 12)
    for name in NAMES:
        preset = PRESETS[name]
        assert preset.turns[0] == 3 and preset.shown == RATIOS
        names, backends = preset.who("cuda")
        assert precompile.estimate(made[name], names or (), backends, measure.Settings(*preset.turns)) < 150
        assert all(any(target.holds(case) for target in targets.GPU[name] if target.name != ERROR) for case in made[name]), name


def test_a_turn_is_as_long_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call alone takes ten times as long as one of many."""
    monkeypatch.setattr(measure, "time_turn", lambda step, calls, device: ((1e-3 if calls == 1 else 1e-4), None))
    assert measure.plan(lambda: None, CPU, measure.Settings(3, 1.5)) == (3, 15000)


# -- judging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
@pytest.mark.parametrize("preset", NAMES)
def test_a_complete_file_is_judged(preset: str, card: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = _file(preset, _rows(preset), card), _file(preset, _rows(preset, 0.99), card)
    assert set(_words(good).values()) == {targets.AIM} and not targets.unjudged(good)
    words = _words(bad)
    # The small steps of this made-up file take 8 us, whatever they are compared with.
    missed = {name for name, word in words.items() if word == targets.MISSED}
    assert set(words) - missed == {n for n in words if n == ERROR or "time" in n or (preset == "cuda-portable" and n.startswith("D"))}
    for made, code in ((good, 0), (bad, 1), ({**good, "rows": good["rows"][:-1]}, 1)):
        file = tmp_path / "x.json"
        file.write_text(json.dumps(made))
        assert cli.main(["bench", "judge", "--input", str(file)]) == code
    assert "not measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dim", "causal", "length", "ratio", "word"),
    [
        (128, True, 1024, 1.17, targets.MISSED), (128, True, 1024, 1.19, targets.AIM), (128, True, 4096, 1.19, targets.MISSED),
        (128, True, 16384, 1.16, targets.GATE), (128, False, 1024, 1.07, targets.MISSED), (128, False, 4096, 1.07, targets.AIM),
        (64, False, 4096, 1.11, targets.MISSED), (64, False, 16384, 1.14, targets.GATE), (64, True, 4096, 1.07, targets.MISSED),
        (64, True, 16384, 1.14, targets.MISSED), (256, True, 4096, 1.04, targets.MISSED), (256, False, 512, 0.99, targets.MISSED),
        (256, False, 8192, 1.0, targets.AIM),
    ],
)  # fmt: skip
def test_points_of_the_grid(dim: int, causal: bool, length: int, ratio: float, word: str) -> None:
    case = next(c for c in PRESETS["cuda-grid"].make("cuda") if (c.head_dim, c.causal, c.seqlen_q) == (dim, causal, length))
    rows = [_row(case, "attnhub cuda", 1.0), _row(case, "F.sdpa cuDNN", ratio), _row(case, "F.sdpa flash", 0.1), _row(case, "attnhub triton", 0.1)]
    words = _words(_file("cuda-grid", rows))
    assert len(words) == 2 and words.pop(ERROR) == targets.AIM and set(words.values()) == {word}
    (name,) = words
    assert name.startswith(f"D{dim} {'causal' if causal else 'full'}") and str(length) in name


def test_the_fastest_other_counts() -> None:
    made = PRESETS["cuda-features"].make("cuda")
    window, packed, soft = (next(c for c in made if word in str(c)) for word in ("window", "documents", "softcap"))
    grouped = next(c for c in made if c.kv_heads == 8)
    half = next(c for c in made if c.dtype == "float16")

    def word(case: Case, seconds: dict[str, float], **more: dict[str, Any]) -> Optional[str]:
        rows = [_row(case, name, taken, **more.get(name.split()[0], {})) for name, taken in {"attnhub cuda": 1.0, **seconds}.items()]
        found = [w for name, w in _words(_file("cuda-features", rows)).items() if name != ERROR]
        return found[0] if found else None

    assert word(window, {"aten flash": 1.1, "FlexAttention": 1.0}) == targets.AIM
    assert word(window, {"aten flash": 1.1, "FlexAttention": 1.2, "F.sdpa cuDNN": 0.9}) == targets.MISSED
    assert word(packed, {"aten flash": 1.1, "FlexAttention": 0.99}) == targets.MISSED and word(soft, {"FlexAttention": 0.99}) == targets.MISSED
    # Who may be the fastest has to be there.
    assert word(window, {"FlexAttention": 1.2}) is None and word(packed, {"aten cuDNN": 1.2}) is None and word(grouped, {"F.sdpa flash": 2.0}) is None
    assert word(grouped, {"F.sdpa flash": 2.0, "F.sdpa cuDNN": 1.0}) == word(half, {"F.sdpa flash": 2.0, "F.sdpa cuDNN": 1.0}) == targets.AIM
    # Who computes something else is no peer, and neither is another backend of ours.
    assert word(packed, {"aten flash": 1.1, "FlexAttention": 1.0, "aten cuDNN": 0.5}, aten={"max_error": 0.004}) == targets.MISSED
    wrong = [_row(packed, "attnhub cuda", 1.0), _row(packed, "aten flash", 1.1), _row(packed, "FlexAttention", 1.0), _row(packed, "attnhub triton", 0.1)]
    wrong.append(_row(packed, "aten cuDNN", 0.5, max_error=0.8))
    assert _words(_file("cuda-features", wrong))["documents over the fastest other, every point"] == targets.AIM
    without = _file("cuda-features", [row for row in _rows("cuda-features") if row["peer"] != "FlexAttention"])
    assert sum("nothing to compare with" in why for why in targets.unjudged(without)) == sum(bool(c.features()) for c in made) + sum(c.softcap > 0 for c in made)


def test_decode_is_compared_with_the_better_one() -> None:
    case = next(c for c in PRESETS["cuda-decode"].make("cuda") if (c.batch, c.seqlen_k, c.kv_heads, c.page_size, c.graph) == (64, 8192, 8, 16, True))
    theirs = flashinfer.seconds(case)
    assert theirs == pytest.approx(499e-6, rel=0.01) and flashinfer.seconds(Case(64, 64)) is None

    def words(mine: float, cudnn: float, card: str = "NVIDIA H200") -> dict[str, str]:
        rows = [_row(case, "attnhub cuda", mine), _row(case, "F.sdpa cuDNN", cudnn), _row(case, "attnhub cuda contiguous", 0.1 * mine)]
        found = _words(_file("cuda-decode", rows, card))
        found.pop(ERROR)
        return found

    name = "pages of 16 over the better of cuDNN and FlashInfer's rate, by CUDA graph, every point"
    assert words(theirs / 1.06, theirs * 2) == {name: targets.AIM}
    assert words(theirs / 1.04, theirs * 2) == words(theirs / 1.06, theirs / 1.02) == {name: targets.MISSED}
    assert words(theirs / 1.04, theirs * 2, "NVIDIA H100") == {"pages of 16 over cuDNN, by CUDA graph, every point": targets.AIM}


@pytest.mark.parametrize(("seconds", "word"), [(14.1e-6, targets.MISSED), (13.9e-6, targets.AIM)])
def test_the_smallest_step_has_a_time(seconds: float, word: str) -> None:
    made = [c for c in PRESETS["cuda-decode"].make("cuda") if (c.batch, c.seqlen_k) == (1, 8192)]
    assert len(made) == 4
    for case in made:
        found = _words(_file("cuda-decode", [_row(case, "attnhub cuda", seconds), _row(case, "F.sdpa cuDNN", 1.0)]))
        assert found.get("1 x 8192 by CUDA graph, time") == (word if case.graph else None)


@pytest.mark.parametrize("preset", NAMES)
def test_errors_and_short_turns_are_seen(preset: str) -> None:
    rows = _rows(preset)
    mine = next(row for row in reversed(rows) if row["peer"] == PRESETS[preset].judged)
    mine["max_error"] = 0.0101
    assert _words(_file(preset, rows))[ERROR] == targets.MISSED
    mine["max_error"] = 0.0099
    assert _words(_file(preset, rows))[ERROR] == targets.AIM
    mine["max_error"] = None
    assert any(ERROR in why for why in targets.unjudged(_file(preset, rows)))
    rounds, seconds = PRESETS[preset].turns
    for told in ({"rounds": rounds - 1, "round_seconds": seconds}, {"rounds": rounds, "round_seconds": seconds / 2}):
        assert any("the preset has 3" in why for why in targets.unjudged(_file(preset, _rows(preset), settings=told)))


@pytest.mark.parametrize("wrong", [{"turn_seconds": 1.1}, {"seconds_rounds": [1.0, 1.0]}])
def test_a_sustained_load_lasts(wrong: dict[str, Any]) -> None:
    rows = [{**row, "turn_seconds": 1.4} for row in _rows("cuda-sustained")]
    assert not targets.unjudged(_file("cuda-sustained", rows))
    rows[-2].update(wrong)
    (why,) = targets.unjudged(_file("cuda-sustained", rows))
    assert why.startswith(f"{Case.of(rows[-2])}: F.sdpa cuDNN: its turns")


def test_the_portable_kernel_is_judged_by_the_mean() -> None:
    rows = _rows("cuda-portable", 1.02)
    slow = [row for row in rows if row["peer"] == PORTABLE and row["head_dim"] == 256]
    for row in slow:
        row["seconds"] *= 1.04
    words = _words(_file("cuda-portable", rows))
    assert words["the grid's geometric mean over flash"] == targets.AIM and words["D256 over flash"] == targets.BELOW
    for row in slow:
        row["seconds"] *= 1.05
    assert _words(_file("cuda-portable", rows))["the grid's geometric mean over flash"] == targets.MISSED


@pytest.mark.parametrize(("ratio", "code"), [(0.99, 0), (1.01, 1)])
def test_host_time_is_judged(ratio: float, code: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"mode": case.mode, "peer": peer, "microseconds": 20.0 * value, "ratio": value, "budget": overhead_case.budget(case, "cuda")}
        for case in overhead_case.cases("cuda")
        for peer, value in (("F.sdpa", 1.0), ("attnhub auto", 3.0), ("attnhub cuda", 1.5 if case.grad else ratio))
    ]
    made = {**_file("cuda-grid", rows), "preset": "cuda", "suite": "overhead"}
    words = _words(made)
    assert words.pop("grad: host time of F.sdpa's") == targets.BELOW
    assert set(words) == {f"{mode}: host time of F.sdpa's" for mode in ("no grad", "no grad, 128 tokens")}
    assert set(words.values()) == {targets.AIM if code == 0 else targets.MISSED}
    file = tmp_path / "overhead-cuda.json"
    file.write_text(json.dumps(made))
    assert cli.main(["bench", "judge", "--input", str(file)]) == code
    file.write_text(json.dumps({**made, "rows": [row for row in rows if row["mode"] != "no grad, 128 tokens"]}))
    assert cli.main(["bench", "judge", "--input", str(file)]) == 1 and "no grad, 128 tokens: not measured" in capsys.readouterr().err
    on_cpu = {**made, "environment": {**made["environment"], "device": {"type": "cpu", "name": "x", "isa": []}}}
    assert _words(on_cpu) == {f"{mode}: host time of F.sdpa's": targets.MISSED for mode in ("no grad", "grad")}


# -- how it is shown -----------------------------------------------------------------------------------------------------


def test_a_line_for_each_case(tmp_path: pathlib.Path) -> None:
    one, two, three = PRESETS["cuda-grid"].make("cuda")[:3]
    rows = [
        _row(one, "F.sdpa cuDNN", 3e-3, tflops=500.0), _row(one, "attnhub cuda", 2e-3, tflops=750.0), {**one.to_json(), "peer": "F.sdpa flash", "skipped": "no kernel"},
        _row(two, "F.sdpa cuDNN", 1e-3), _row(two, "F.sdpa flash", 2e-3), _row(two, "attnhub cuda", 1e-3, max_error=None),
        _row(three, "F.sdpa cuDNN", 1e-3), {**three.to_json(), "peer": "attnhub cuda", "skipped": "not_installed"},
    ]  # fmt: skip
    columns, shown = pages.summary(_file("cuda-grid", rows))
    assert columns == ["case", "attnhub cuda", "TFLOP/s", "over F.sdpa cuDNN", "over F.sdpa flash", "max error", "notes"]
    assert shown[0] == [str(one), "2 ms", "750", "1.50x", "", "5.0e-03", "F.sdpa flash: no kernel"]
    assert shown[1][3:] == ["1.00x", "2.00x", "", ""] and shown[2] == [str(three), "", "", "", "", "", "attnhub cuda: not_installed"]
    assert pages.right(columns) == tuple(columns[1:-1])
    steps = [c for c in PRESETS["cuda-decode"].make("cuda") if c.page_size][:1]
    columns, shown = pages.summary(_file("cuda-decode", _rows("cuda-decode", 2.0, steps)))
    assert columns[2] == "K/V GB/s" and shown[0][2] == f"{steps[0].kv_bytes() / 4e-6 / 1e9:.4g}"
    folder = tmp_path / results.FOLDER / "nvidia-h100"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / f"gpu-{name}.json").write_text(json.dumps(_file(name, _rows(name))))
    text = pages.page(tmp_path)
    for name in NAMES:
        assert f"## NVIDIA H100 80GB HBM3: gpu {name}\n" in text
        assert all(f"| {target.name} |" in text for target in targets.GPU[name])
    assert "| case | attnhub cuda | K/V GB/s | over F.sdpa cuDNN | max error | notes |\n| --- | ---: | ---: | ---: | ---: | --- |" in text
    assert "| case | cuda portable | TFLOP/s | over F.sdpa flash |" in text and "3 rounds, turns of 1.5 s" in text


def test_a_grid_without_a_baseline_is_drawn(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    from attnhub.bench import plot

    plot.draw(_file("cuda-grid", _rows("cuda-grid")), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_shows_what_it_measured(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "commit", lambda: "c0ffee")
    file = tmp_path / "x.json"
    command = ["bench", "cpu", "--preset", "cuda-decode", "--only", "B1 H32/8 S1:1024", "--peers", "sdpa,portable", "--backends", "auto"]
    command += ["--rounds", "1", "--seconds", "0.0001", "--output", str(file)]
    assert cli.main(command) == 0
    assert "together" in capsys.readouterr().out
    rows = results.load(file)["rows"]
    assert [row["peer"] for row in rows] == ["F.sdpa", PORTABLE, "attnhub"] and rows[1]["skipped"] == "it runs on GPUs"
    assert all(row["turn_seconds"] >= row["seconds"] for row in rows if "seconds" in row)
    assert rows[2]["plan"]["backend"] == rows[2]["backend"] and "plan" not in rows[0]
    assert cli.main([*command, "--resume"]) == 0 and results.load(file)["rows"] == rows


# -- peers ---------------------------------------------------------------------------------------------------------------


class _Reference(Plan):
    """What a plan of the cuda backend gives, by the definition."""

    def forward(self, call: Call) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        return maths.forward(call, call.q.shape[2], torch.float32, False)[0], None


@pytest.mark.parametrize(
    "case",
    [
        Case(48, batch=2, heads=4, kv_heads=2, head_dim=16, dtype="float16", causal=True), Case(48, heads=4, head_dim=16, dtype="bfloat16", softcap=2.0),
        Case(48, heads=4, head_dim=16, dtype="bfloat16", causal=True, documents=3), Case(48, heads=4, head_dim=16, dtype="float16", causal=True, window=9),
    ],
    ids=str,
)  # fmt: skip
def test_the_portable_peer_computes_the_case(case: Case) -> None:
    tensors = peers.inputs(case, CPU)
    peer = peers.Peer(PORTABLE, portable_peer.caller(case, _Reference(), CPU), differentiable=False)
    (row,) = measure.run_case(case, tensors, [peer], measure.Settings(1, 1e-4))
    assert row["max_error"] < (0.02 if case.dtype == "bfloat16" else 0.003)


def test_the_portable_kernel_is_compiled_for_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    from attnhub.backends.cuda import nvrtc

    if nvrtc.find() is None:
        pytest.skip("NVRTC is not found")
    monkeypatch.setenv("ATTNHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    case = Case(1024, head_dim=64, dtype="bfloat16")
    found = portable_peer.plan(case, torch.device("cuda")).describe()
    assert (found["arch"], found["product"]) == ("sm_90", "m16n8k16")
    assert len(list((tmp_path / "cuda").glob("*.cubin"))) == 1


def test_why_the_portable_kernel_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(case: Case, device: str = "cpu") -> str:
        found = portable_peer.peer(case, (torch.empty(0, device=device),) * 3)
        assert isinstance(found, peers.Absent) and found.name == PORTABLE
        return found.why

    half = Case(64, dtype="float16")
    assert why(Case(64)) == why(Case(1, 64, dtype="float16", page_size=16)) == "it takes forward passes in fp16 and bf16 without pages"
    assert why(half) == "it runs on GPUs" and why(Case(64, dtype="float16", bias=True)) == "it is timed without bias"
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda", 0)})()
    cuda = registry.candidates()["cuda"]
    monkeypatch.setattr(registry, "candidates", lambda: {"cuda": type(cuda)(cuda.backend, probe=(Reason(Code.NOT_INSTALLED, "no CuPy"),))})
    found = portable_peer.peer(half, (on_gpu, on_gpu, on_gpu))
    assert isinstance(found, peers.Absent) and found.why == "not_installed"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_torch_kernels_get_packed_documents(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are the GPU's: here a stand-in takes their arguments."""
    case = Case(96, heads=4, kv_heads=2, head_dim=16, causal=causal, documents=5)
    tensors = peers.inputs(case, CPU)
    (absent,) = peers.assemble(case, tensors, (name,), ())
    assert isinstance(absent, peers.Absent) and absent.name == {"flash": "aten flash", "cudnn": "aten cuDNN"}[name]

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, is_causal: bool) -> tuple[torch.Tensor]:
        assert longest == max(case.document_lengths()) and is_causal == causal and q.shape == (96, 4, 16)
        parts = zip(*(torch.split(t, case.document_lengths()) for t in (q, k, v)))
        assert starts.tolist()[-1] == 96
        outs = [peers.naive(*(t.transpose(0, 1)[None] for t in part), causal)[0].transpose(0, 1) for part in parts]
        return (torch.cat(outs),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", lambda q, k, v, a, b, m, n, p, c, d: packed(q, k, v, a, m, c))
    monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", lambda q, k, v, bias, a, b, m, n, lse, p, c, d: packed(q, k, v, a, m, c))
    (peer,) = peers.assemble(case, tensors, (name,), ())
    assert isinstance(peer, peers.Peer) and (name == "flash" or aten_peers.cudnn(case, tensors).name == peer.name)
    (row,) = measure.run_case(case, tensors, [peer], measure.Settings(1, 1e-4))
    assert row["max_error"] < 1e-5
