"""A result file as a picture: speed over F.scaled_dot_product_attention for every case and peer, or TFLOP/s over lengths. Needs matplotlib."""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

from attnhub.bench import results
from attnhub.bench.cases import Case
from attnhub.bench.models import SUITE
from attnhub.bench.peers import BASELINE
from attnhub.bench.presets import PRESETS

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def draw(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a PNG: one group of bars a case, one bar a peer, its end the speed relative to F.sdpa (1.0, the line).

    Presets along lengths are lines instead: TFLOP/s over the length, a panel for each pass, head_dim and mask.
    """
    if result["suite"] == SUITE:
        raise ValueError("a file of the suite models is shown as a table (`attnhub docs`), not drawn")
    import matplotlib

    matplotlib.use("Agg")
    figure = _lines(result) if result["preset"] in PRESETS and PRESETS[result["preset"]].lines else _bars(result)
    environment = result["environment"]
    figure.suptitle(f"{results.machine(environment)}, threads: {environment['threads']}, torch {environment['torch']}", fontsize=10)
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    figure.clear()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(picture.getvalue())
    os.replace(temporary, target)


def _lines(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = [(Case.of(row), row) for row in result["rows"] if "seconds" in row and row["peer"] != "naive"]
    if not rows:
        raise ValueError("nothing to draw: no case was timed")
    peers = list(dict.fromkeys(row["peer"] for _, row in rows))
    modes, kinds = (list(dict.fromkeys(found)) for found in ([c.mode for c, _ in rows], sorted({(c.head_dim, c.causal) for c, _ in rows})))
    figure = Figure(figsize=(2.6 * len(kinds) + 0.6, 2.6 * len(modes) + 1.0), layout="constrained")
    panels = figure.subplots(len(modes), len(kinds), squeeze=False, sharex=True)
    for line, mode in zip(panels, modes):
        for axes, (dim, causal) in zip(line, kinds):
            for n, peer in enumerate(peers):
                points = sorted((c.seqlen_q, row["tflops"]) for c, row in rows if (c.mode, c.head_dim, c.causal, row["peer"]) == (mode, dim, causal, peer))
                axes.plot(*zip(*points) if points else ((), ()), marker="o", markersize=3, color=_COLOURS[n % len(_COLOURS)], label=peer)
            axes.set_title(f"{mode}, head_dim {dim}, {'causal' if causal else 'full'}", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("TFLOP/s", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("tokens of a sequence", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(peers), frameon=False)
    return figure


def _bars(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    # The backend behind the automatic choice is drawn once, as that choice; naive and reference would only stretch the axis.
    chosen = {f"attnhub {row['backend']}" for row in result["rows"] if row["peer"] == "attnhub" and "backend" in row}
    left_out = {BASELINE, "naive", "attnhub reference", *(chosen if len(chosen) == 1 else ())}
    rows = [row for row in result["rows"] if row.get("speedup") is not None and row["peer"] not in left_out]
    if not rows:
        raise ValueError("nothing to draw: no row has a ratio to F.sdpa")
    labels = list(dict.fromkeys(_label(row) for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure = Figure(figsize=(9, 0.11 * len(labels) * (len(peers) + 1) + 1.4), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(peers)
    chosen_name = next(iter(chosen)).removeprefix("attnhub ") if len(chosen) == 1 else ""
    for n, peer in enumerate(peers):
        mine = [(labels.index(_label(row)), row["speedup"]) for row in rows if row["peer"] == peer]
        at = [place + (n - (len(peers) - 1) / 2) * height for place, _ in mine]
        # A logarithmic axis has no zero to begin at: bars start at the line, faster to the right, slower to the left.
        axes.barh(at, [s - 1 for _, s in mine], height * 0.9, left=1.0, label=f"{peer} (by {chosen_name})" if peer == "attnhub" and chosen_name else peer, color=_COLOURS[n % len(_COLOURS)])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("speed relative to F.scaled_dot_product_attention, same run (right is faster)")
    figure.legend(fontsize=8, loc="outside lower center", ncols=5, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _label(row: dict[str, Any]) -> str:
    return str(Case.of(row))
