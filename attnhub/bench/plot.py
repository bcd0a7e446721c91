"""A result file as a picture: speed over F.scaled_dot_product_attention for every case and peer. Needs matplotlib."""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

from attnhub.bench import results
from attnhub.bench.cases import Case
from attnhub.bench.peers import BASELINE

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def draw(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a PNG: one group of bars a case, one bar a peer, its end the speed relative to F.sdpa (1.0, the line)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The backend behind the automatic choice is drawn once, as that choice; naive and reference would only stretch the axis.
    chosen = {f"attnhub {row['backend']}" for row in result["rows"] if row["peer"] == "attnhub" and "backend" in row}
    left_out = {BASELINE, "naive", "attnhub reference", *(chosen if len(chosen) == 1 else ())}
    rows = [row for row in result["rows"] if row.get("speedup") is not None and row["peer"] not in left_out]
    if not rows:
        raise ValueError("nothing to draw: no row has a ratio to F.sdpa")
    labels = list(dict.fromkeys(_label(row) for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.11 * len(labels) * (len(peers) + 1) + 1.4), layout="constrained")
    height = 0.8 / len(peers)
    chosen_name = next(iter(chosen)).removeprefix("attnhub ") if len(chosen) == 1 else ""
    for n, peer in enumerate(peers):
        mine = [(labels.index(_label(row)), row["speedup"]) for row in rows if row["peer"] == peer]
        at = [place + (n - (len(peers) - 1) / 2) * height for place, _ in mine]
        # A logarithmic axis has no zero to begin at: bars start at the line, faster to the right, slower to the left.
        axes.barh(at, [s - 1 for _, s in mine], height * 0.9, left=1.0, label=f"{peer} (by {chosen_name})" if peer == "attnhub" and chosen_name else peer, color=_COLOURS[n % len(_COLOURS)])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("speed relative to F.scaled_dot_product_attention, same run (right is faster)")
    environment = result["environment"]
    axes.set_title(f"{results.machine(environment)}, threads: {environment['threads']}, torch {environment['torch']}", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=5, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(picture.getvalue())
    os.replace(temporary, target)


def _label(row: dict[str, Any]) -> str:
    return str(Case.of(row))
