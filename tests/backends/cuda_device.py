"""What the cuda backend's tests on a device share."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor


def in_pages(x: Tensor, page_size: int, order: Tensor) -> Tensor:
    """[B, H, S, D] in shuffled pages; slots behind S hold NaN."""
    batch, heads, length, dim = x.shape
    pages = -(-length // page_size)
    padded = torch.full((batch, heads, pages * page_size, dim), float("nan"), dtype=x.dtype, device=x.device)
    padded[:, :, :length] = x
    found = torch.empty(batch * pages, heads, page_size, dim, dtype=x.dtype, device=x.device)
    found[order.flatten().long()] = padded.view(batch, heads, pages, page_size, dim).transpose(1, 2).flatten(0, 1)
    return found


def beside_graphs(run: Callable[[], Tensor], times: int, runs: int = 1) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Three threads run on streams of their own while two graphs, of so many runs each, are replayed on two more: all results have the bits of a run alone.
    Gives one of the graphs, and the result of its first run."""
    expected = run()
    graphs: list[torch.cuda.CUDAGraph] = []
    captured: list[Tensor] = []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.extend(run() for _ in range(runs))
    results: list[Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results.extend(run() for _ in range(times))
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(times):
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(results) == 3 * times and all(torch.equal(x, expected) for x in (*results, *captured))
    return graphs[0], captured[0]
