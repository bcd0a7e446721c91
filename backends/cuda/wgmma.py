"""Writes kernels/hopper/wgmma.cuh: the warpgroup products as C++ functions.

The instruction names each of its accumulators, up to 128, as an operand of its own, which neither templates nor macros can count.
"""

from __future__ import annotations

from collections.abc import Iterable

NAME = "hopper/wgmma.cuh"

_HEAD = """\
// Written by wgmma.py. d (64 x N, fp32) = a (64 x 16) b (16 x N) [+ d if Accumulate], the accumulators from d[First] on. Right operands are
// descriptors of tiles in shared memory; Transposed: their rows are K, not N.
#pragma once

namespace attnhub {

template <int N> struct Wgmma;
"""


def _product(columns: int, dtype: str) -> str:
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[First + {i}])' for i in range(count))
    shape = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype}"
    b, flag, transposed = (f"%{count + i}" for i in (4, 5, 6))
    left = ", ".join(f"%{count + i}" for i in range(4))
    return f'''
template <> struct Wgmma<{columns}> {{
    template <bool Accumulate, int First = 0, int Size>
    static __device__ __forceinline__ void from_shared(float (&d)[Size], unsigned long long a, unsigned long long b) {{
        asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
            "{shape} {{{registers}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}\\n"
            : {operands}
            : "l"(a), "l"(b), "n"(Accumulate ? 1 : 0));
    }}
    template <bool Accumulate, bool Transposed, int First, int Size>
    static __device__ __forceinline__ void from_registers(
        float (&d)[Size], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b) {{
        asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {flag}, 0;\\n"
            "{shape} {{{registers}}}, {{{left}}}, {b}, p, 1, 1, {transposed};\\n}}\\n"
            : {operands}
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(Accumulate ? 1 : 0), "n"(Transposed ? 1 : 0));
    }}
}};
'''


def header(columns: Iterable[int], dtype: str) -> str:
    """The header for products of these N. dtype: ``bfloat16`` or ``float16``."""
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    return _HEAD + "".join(_product(n, short) for n in sorted(set(columns))) + "\n}  // namespace attnhub\n"
