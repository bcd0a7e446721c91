// Two warps with the same rows. Each multiplies half of a tile's keys by Q, and all weights by half of V's columns: for twice the rows at the
// same number of accumulators, so that each fragment of K and V feeds twice as many products. What they owe each other goes through shared memory.
#pragma once

#include "portable/products.cuh"

namespace attnhub {

// A row's state is defined further down, in softmax.cuh.
template <int RowTiles>
struct RowState;

template <int Rows, int Keys>
struct PairExchange {
    using WeightTile = Tile<Rows, Keys>;
    static constexpr int kBytes = WeightTile::kBytes + Rows * 2 * 4;

    uint32 weights, maxima;  // this warp's rows
    int lane, side, barrier;

    __device__ __forceinline__ PairExchange(uint32 shared, int warp_row, int side, int lane)
        : weights(shared + WeightTile::offset(warp_row, 0)), maxima(shared + WeightTile::kBytes + warp_row * 8), lane(lane), side(side),
          barrier(1 + threadIdx.x / 64) {}

    // The pair has come here.
    __device__ __forceinline__ void meet() const { asm volatile("bar.sync %0, 64;" :: "r"(barrier) : "memory"); }

    // The rows' maxima over the keys of both.
    template <int RowTiles>
    __device__ __forceinline__ void raise(float (&values)[RowTiles][2]) const {
        swap(values, [](float a, float b) { return fmaxf(a, b); });
    }

    // Sums over the keys of both, left in one lane of each row.
    template <int RowTiles>
    __device__ __forceinline__ void add_sums(RowState<RowTiles>& rows) const {
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& x = rows.sum[m][half];
                x += __shfl_xor_sync(0xffffffffu, x, 1);
                x += __shfl_xor_sync(0xffffffffu, x, 2);
            }
        }
        swap(rows.sum, [](float a, float b) { return a + b; });
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
            if (lane % 4 != 0) rows.sum[m][0] = rows.sum[m][1] = 0.f;
        }
    }

    __device__ __forceinline__ void put(const uint32 (&mine)[4], int m, int key) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32 address = weights + WeightTile::offset(m * 16 + i % 2 * 8 + lane / 4, key + i / 2 * 8 + lane % 4 * 2);
            store_word(address, mine[i]);
        }
    }

    __device__ __forceinline__ void get(uint32 (&both)[4], int m, int step) const {
        load_blocks(both, weights + WeightTile::offset(m * 16 + lane % 16, step * 16 + lane / 16 * 8));
    }

private:
    // A value of each row, the same in its 4 lanes, with that of the other warp. Not twice without a barrier of all between.
    template <int RowTiles, class F>
    __device__ __forceinline__ void swap(float (&values)[RowTiles][2], F combine) const {
        const uint32 mine = maxima + side * RowTiles * 64 + lane / 4 * 4, other = maxima + (1 - side) * RowTiles * 64 + lane / 4 * 4;
#pragma unroll
        for (int i = 0; i < RowTiles * 2; ++i) {
            store_word(mine + i * 32, __float_as_uint(values[i / 2][i % 2]));
        }
        meet();
#pragma unroll
        for (int i = 0; i < RowTiles * 2; ++i) {
            values[i / 2][i % 2] = combine(values[i / 2][i % 2], __uint_as_float(load_word(other + i * 32)));
        }
    }
};

}  // namespace attnhub
