"""Where keys lie that are kept in pages: a block table gives the page of every PAGE_SIZE keys of a sequence."""

# Triton compiles this Python: constants are upper case, and an `if` over constants must stay a statement.
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def run_columns(columns, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where in its run each key of a tile lies. A run is a power of two of keys, from a multiple of it on, that lie in one page at any page size."""
    if PAGE_SIZE // BLOCK * BLOCK != PAGE_SIZE:
        columns = columns % (PAGE_SIZE & -PAGE_SIZE)
    return columns


@triton.jit
def load_pages(table, n, stop, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Pages of the keys from n on, one for each run; a scalar if a tile of BLOCK keys is one run. Runs from key stop on have page 0."""
    if PAGE_SIZE // BLOCK * BLOCK == PAGE_SIZE:
        first = n
        entry = n // PAGE_SIZE
    else:
        RUN: tl.constexpr = PAGE_SIZE & -PAGE_SIZE
        run = tl.arange(0, BLOCK // RUN)
        first = n + run * RUN
        entry = n // PAGE_SIZE + run if RUN == PAGE_SIZE else first // PAGE_SIZE
    return tl.load(table + entry, mask=first < stop, other=0)


@triton.jit
def spread(x, BLOCK: tl.constexpr, RUN: tl.constexpr):
    """What is known of every run, for every key: [BLOCK, 1]."""
    return tl.reshape(tl.broadcast_to(x[:, None], (BLOCK // RUN, RUN)), (BLOCK, 1))


@triton.jit
def paged_rows(x, pages, n, stride_b, stride_s, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to the rows where the run of each of the keys from n on begins, [BLOCK, 1]; a scalar if there is one run."""
    if PAGE_SIZE // BLOCK * BLOCK == PAGE_SIZE:
        rows = x + pages.to(tl.int64) * stride_b + (n % PAGE_SIZE).to(tl.int64) * stride_s
    else:
        RUN: tl.constexpr = PAGE_SIZE & -PAGE_SIZE
        # Spread first and multiplied then: so the compiler sees what the product is a multiple of.
        rows = x + spread(pages, BLOCK, RUN).to(tl.int64) * stride_b
        if RUN != PAGE_SIZE:
            slot = spread((n + tl.arange(0, BLOCK // RUN) * RUN) % PAGE_SIZE, BLOCK, RUN)
            # WIDE: 256 rows may lie 2^31 elements apart.
            if WIDE or PAGE_SIZE > 256:
                slot = slot.to(tl.int64)
            rows += slot * stride_s
    return rows
