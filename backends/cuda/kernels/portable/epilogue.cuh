// Accumulators to out and lse.
#pragma once

#include "portable/softmax.cuh"

namespace attnhub {

// Completes the denominators, sink included, normalises out and writes lse. `lse` points at the block's first row. scale: from rows.maximum to log2.
template <int RowTiles, int Columns>
static __device__ __forceinline__ void normalise(
    Accumulators<RowTiles, Columns>& out, RowState<RowTiles>& rows, float scale, const float* sink, float* lse,
    int first_row, int row_count, int lane) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = across_row(rows.sum[m][half], [](float a, float b) { return a + b; });
            float scaled = sum == 0.f ? -kInfinity : rows.maximum[m][half] * scale;
            float factor = 1.f;
            if (sink != nullptr) add_sink(scaled, sum, factor, *sink);
            const float inverse = sum == 0.f ? 0.f : factor / sum;
#pragma unroll
            for (int n = 0; n < Columns / 8; ++n) {
                out[m][n][half * 2] *= inverse;
                out[m][n][half * 2 + 1] *= inverse;
            }
            const int row = first_row + m * 16 + lane / 4 + half * 8;
            if (lse != nullptr && lane % 4 == 0 && row < row_count) lse[row] = lse_of(scaled, sum);
        }
    }
}

template <class Layout>
static __device__ __forceinline__ void store_chunk(Element* row, int column, uint4 x, bool aligned) {
    if (aligned && Layout::whole(column)) {
        asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" :: "l"(row + column), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
        return;
    }
    const uint32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
        if (i < Layout::present(column)) row[column + i] = static_cast<Element>(words[i / 2] >> (i % 2 * 16));
    }
}

// Through shared memory, so that a row goes out in contiguous 16-byte pieces. `out` points at the block's first row.
template <class Type, class OutTile, int RowTiles, int Blocks>
static __device__ __forceinline__ void store_out(
    Element* out, long long token_stride, const float (&accumulators)[RowTiles][Blocks][4], uint32 tile, int warp_row, int first_column,
    int row_count, bool aligned, int lane) {
    __syncthreads();  // the tile lies over Q, K and V
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < Blocks; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32 address = tile + OutTile::offset(warp_row + m * 16 + lane / 4 + half * 8, first_column + n * 8 + lane % 4 * 2);
                store_word(address, Type::pack(accumulators[m][n][half * 2], accumulators[m][n][half * 2 + 1]));
            }
        }
    }
    __syncthreads();
    const uint32 source = OutTile::thread_chunk(tile);
    OutTile::for_each_chunk([&](int row, int column, int, int, uint32 offset) {
        if (row < row_count) {
            store_chunk<OutTile>(out + row * token_stride, column, load_shared(source + offset), aligned);
        }
    });
}

}  // namespace attnhub
