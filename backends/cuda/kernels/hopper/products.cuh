// The two products on the warpgroup's matrix unit (wgmma). Accumulators of a 64 x N product: lane l of warp w holds, in d[4 j + 2 h + i],
// row 16 w + l / 4 + 8 h, column 8 j + 2 (l % 4) + i. The same registers, packed in pairs, are a left operand of 16 columns of K.
//
// A product is asynchronous from start to `wait_products`; registers that take part must not be touched meanwhile. Before a chain
// that uses registers which other code has written: `fence_products`, and `hold` so that the compiler moves nothing across.
#pragma once

#include "hopper/tile.cuh"
#include "hopper/wgmma.cuh"  // written by wgmma.py: struct Wgmma<N>

namespace attnhub {

static __device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending> static __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(Pending) : "memory");
}

template <int N> static __device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i]) :: "memory");
}
template <int N> static __device__ __forceinline__ void hold(uint32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i]) :: "memory");
}

// Descriptor of a tile with 128-byte swizzle: address and strides in units of 16 bytes. 8 rows are 1024 bytes apart; `leading` is what
// lies between chunks of 64 columns where the columns are the product's N (V), and not used where they are its K (Q, K).
static __device__ __forceinline__ uint64 describe_tile(uint32 address, uint32 leading) {
    return static_cast<uint64>((address & 0x3ffff) >> 4) | static_cast<uint64>(leading >> 4) << 16 | static_cast<uint64>(1024 >> 4) << 32 |
           1ull << 62;
}

// The descriptor, which is the same in the whole warp, made anew at this place. What is derived from it is then not kept for all rounds of a
// loop: the many steps of a wide tile do not fit the uniform registers, and moving each to them costs more than computing it there.
static __device__ __forceinline__ uint64 uniform_here(uint64 descriptor) {
    uint32 low;
    asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(low) : "r"(static_cast<uint32>(descriptor)));
    return (descriptor & 0xffffffff00000000ull) | low;
}

// Step of a descriptor to columns 16 k to 16 k + 15 of a tile.
template <class T> static __device__ __forceinline__ constexpr uint64 columns_step(int k) {
    return static_cast<uint64>(k / 4 * (T::kChunkBytes / 16) + k % 4 * 2);
}

// scores = q k^T, q in shared memory.
template <class QTile, class KTile, int Depth, int Keys>
static __device__ __forceinline__ void multiply_keys(float (&scores)[Keys / 2], uint64 q, uint64 k) {
    Wgmma<Keys>::template from_shared<false>(scores, q, k);
#pragma unroll
    for (int i = 1; i < Depth / 16; ++i) {
        Wgmma<Keys>::template from_shared<true>(scores, q + columns_step<QTile>(i), k + columns_step<KTile>(i));
    }
}

// scores = q k^T, q in registers.
template <class KTile, int Depth, int Keys>
static __device__ __forceinline__ void multiply_keys(float (&scores)[Keys / 2], const uint32 (&q)[Depth / 4], uint64 k) {
    Wgmma<Keys>::template from_registers<false, false, 0>(scores, q[0], q[1], q[2], q[3], k);
#pragma unroll
    for (int i = 1; i < Depth / 16; ++i) {
        Wgmma<Keys>::template from_registers<true, false, 0>(scores, q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3], k + columns_step<KTile>(i));
    }
}

// out += weights v. One instruction covers whole chunks of 64 columns; what is left of the last chunk is one of its own.
template <class VTile, int Keys, int Columns>
static __device__ __forceinline__ void multiply_values(float (&out)[Columns / 2], const uint32 (&weights)[Keys / 4], uint64 v) {
    constexpr int kWhole = Columns / 64 * 64, kRest = Columns - kWhole;
#pragma unroll
    for (int i = 0; i < Keys / 16; ++i) {
        const uint64 rows = v + i * (2048 / 16);
        if constexpr (kWhole > 0) {
            Wgmma<kWhole>::template from_registers<true, true, 0>(out, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3], rows);
        }
        if constexpr (kRest > 0) {
            Wgmma<kRest>::template from_registers<true, true, kWhole / 2>(
                out, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3], rows + kWhole / 64 * (VTile::kChunkBytes / 16));
        }
    }
}

// This warp's 16 rows of a tile as left operands.
template <class QTile, int Depth>
static __device__ __forceinline__ void load_rows(uint32 (&q)[Depth / 4], uint32 tile, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < Depth / 16; ++i) {
        load_blocks(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3], tile + QTile::offset(warp * 16 + (lane & 15), 2 * i + (lane >> 4)));
    }
}

}  // namespace attnhub
