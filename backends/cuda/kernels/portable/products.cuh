// The two matrix products of a warp: scores = Q K^T and out += P V.
//
// A warp owns RowTiles x 16 query rows. In an accumulator block [16 x 8] lane l holds rows l / 4 and l / 4 + 8, columns
// 2 (l % 4) and the next one. Two neighbouring score blocks are, converted, just the left operand [16 x 16] of P V.
#pragma once

#include "portable/mask.cuh"
#include "portable/tile.cuh"

namespace attnhub {

template <int RowTiles, int Keys>
using Scores = float[RowTiles][Keys / 8][4];
template <int RowTiles, int Keys>
using Weights = uint32[RowTiles][Keys / 16][4];
template <int RowTiles, int Columns>
using Accumulators = float[RowTiles][Columns / 8][4];

// The warp's rows of Q, as left operands: those of the first Kept steps of 16 columns stay in registers, the others are read again for each tile
// of keys.
template <int RowTiles, class QTile, int Kept>
struct Query {
    static_assert(Kept <= QTile::kColumns / 16, "there are no more steps");
    uint32 address;
    uint32 kept[Kept ? Kept : 1][RowTiles][4];

    __device__ __forceinline__ explicit Query(uint32 tile, int first_row, int lane)
        : address(tile + QTile::offset(first_row + lane % 16, lane / 16 * 8)) {}

    __device__ __forceinline__ void read(uint32 (&a)[RowTiles][4], int step) const {
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) load_blocks(a[m], address + QTile::offset(m * 16, step * 16));
    }

    // After Q has arrived.
    __device__ __forceinline__ void keep() {
#pragma unroll
        for (int step = 0; step < Kept; ++step) read(kept[step], step);
    }

    __device__ __forceinline__ void get(uint32 (&a)[RowTiles][4], int step) const {
        if (step >= Kept) return read(a, step);
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[m][i] = kept[step][m][i];
        }
    }
};

// Calls between(step) after the products of each step of 16 columns.
template <class Type, class KTile, int RowTiles, int Keys, class Q, class F>
static __device__ __forceinline__ void multiply_keys(Scores<RowTiles, Keys>& scores, const Q& query, uint32 k_tile, int lane, F between) {
    // In this order of blocks the two registers of one operand are neighbours, as HMMA wants them.
    const uint32 k = k_tile + KTile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.f;
        }
    }
#pragma unroll
    for (int step = 0; step < KTile::kColumns / 16; ++step) {
        uint32 a[RowTiles][4];
        query.get(a, step);
#pragma unroll
        for (int n = 0; n < Keys / 16; ++n) {
            uint32 b[4];
            load_blocks(b, k + KTile::offset(n * 16, step * 16));
#pragma unroll
            for (int m = 0; m < RowTiles; ++m) {
                Type::mma(scores[m][2 * n], a[m], b[0], b[1]);
                Type::mma(scores[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
        between(step);
    }
}

// Calls before(step) before the products of each step of 16 keys.
template <class Type, class VTile, int RowTiles, int Keys, int Columns, class F>
static __device__ __forceinline__ void multiply_values(
    Accumulators<RowTiles, Columns>& out, const Weights<RowTiles, Keys>& weights, uint32 v_tile, int lane, F before) {
    const uint32 v = v_tile + VTile::offset(lane % 16, lane / 16 * 8);
#pragma unroll
    for (int step = 0; step < Keys / 16; ++step) {
        before(step);
#pragma unroll
        for (int n = 0; n < Columns / 16; ++n) {
            uint32 b[4];
            load_blocks_transposed(b, v + VTile::offset(step * 16, n * 16));
#pragma unroll
            for (int m = 0; m < RowTiles; ++m) {
                Type::mma(out[m][2 * n], weights[m][step], b[0], b[1]);
                Type::mma(out[m][2 * n + 1], weights[m][step], b[2], b[3]);
            }
        }
    }
}

// For a masked tile whose V holds Inf or NaN. There a weight of 0 does not hide a key, as 0 * NaN is NaN: so Inf and NaN are
// added here to the rows that see their key (as with any weight above 0), and multiply_values() must then find them cleared.
template <class Type, class VTile, int RowTiles, int Keys>
static __device__ __forceinline__ void add_nonfinite_values(
    Accumulators<RowTiles, VTile::kColumns>& out, uint32 v_tile, int lane, const Mask& mask, int first_row, int first_key) {
    Span spans[RowTiles][2];
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) spans[m][half] = mask.keys(first_row + m * 16 + lane / 4 + half * 8);
    }
#pragma unroll 1
    for (int key = 0; key < Keys; ++key) {
        const uint32 address = v_tile + VTile::offset(key, lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < VTile::kColumns / 8; ++n) {
            const uint32 pair = load_word(address + n * 16);
            if (Type::finite(pair) == pair) continue;
            const float low = Type::nonfinite(pair & 0xffffu), high = Type::nonfinite(pair >> 16);
#pragma unroll
            for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool visible = spans[m][half].holds(first_key + key);
                    out[m][n][half * 2] += visible ? low : 0.f;
                    out[m][n][half * 2 + 1] += visible ? high : 0.f;
                }
            }
        }
    }
}

}  // namespace attnhub
