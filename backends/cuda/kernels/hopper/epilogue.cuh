// Accumulators to out and lse.
#pragma once

#include "hopper/careful.cuh"
#include "hopper/handout.cuh"
#include "hopper/products.cuh"

namespace attnhub {

// Completes the denominators, sink included, normalises out and writes lse. `row` and row + 8 are this lane's.
template <class C>
static __device__ __forceinline__ void normalise(
    float (&out)[C::kColumns / 2], RowState& rows, const Params& params, const Work& work, int row, float scale, int lane) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = across_row(rows.sum[half], [](float a, float b) { return a + b; });
        float scaled = rows.maximum[half] == -kInfinity ? -kInfinity : rows.maximum[half] * scale;
        float factor = 1.f;
        if (params.sinks != nullptr) {
            const float sink = params.sinks[work.head] * kLog2e;
            const float anchor = fmaxf(scaled, sink);
            if (anchor != -kInfinity) {  // else there is neither a key nor a sink
                factor = exp2f(scaled - anchor);
                sum = sum * factor + exp2f(sink - anchor);
                scaled = anchor;
            }
        }
        inverse[half] = sum == 0.f ? 0.f : factor / sum;
        if (params.lse != nullptr && lane % 4 == 0 && row + 8 * half < work.len_q) {
            float* lse = params.lse + (static_cast<long long>(work.batch) * params.q_heads + work.head) * params.seqlen_q + work.q_token + row + 8 * half;
            *lse = sum == 0.f ? -kInfinity : (scaled + log2f(sum)) * kLn2;
        }
    }
#pragma unroll
    for (int i = 0; i < C::kColumns / 2; ++i) out[i] *= inverse[i >> 1 & 1];
}

// A warp's 16 rows of accumulators into a tile.
template <class Type, class OutTile, int N>
static __device__ __forceinline__ void write_tile(uint32 tile, const float (&out)[N], int warp, int lane) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        store_blocks(
            tile + OutTile::offset(warp * 16 + (lane & 15), 2 * j + (lane >> 4)), Type::pack(out[8 * j], out[8 * j + 1]),
            Type::pack(out[8 * j + 2], out[8 * j + 3]), Type::pack(out[8 * j + 4], out[8 * j + 5]), Type::pack(out[8 * j + 6], out[8 * j + 7]));
    }
}

// `count` rows by the threads of a warpgroup: what the tile holds, or zeros. For what the copy engine must not or can not write.
template <class OutTile, bool Zeros>
static __device__ __forceinline__ void write_rows(const Params& params, const Work& work, int row, int count, uint32 tile, int thread) {
    const int pieces = (params.v_head_dim + 7) / 8;
    Element* out = params.out + work.batch * params.out_strides.batch + work.head * params.out_strides.head;
    for (int i = thread; i < count * pieces; i += 128) {
        const int r = i / pieces, piece = i - r * pieces;
        uint32 words[4] = {0, 0, 0, 0};
        if constexpr (!Zeros) {
            asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(tile + OutTile::offset(r, piece)) : "memory");
        }
        Element* target = out + (static_cast<long long>(work.q_token) + row + r) * params.out_strides.token + 8 * piece;
        if (params.out_by_map && 8 * piece + 8 <= params.v_head_dim) {
            asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};"
                         :: "l"(target), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (8 * piece + e < params.v_head_dim) target[e] = static_cast<Element>(words[e / 2] >> (e % 2 * 16));
            }
        }
    }
}

// Rows without a key: out 0, lse -inf or, with a sink, that. Tokens behind the last packed sequence belong to none: -inf.
template <class OutTile>
static __device__ __forceinline__ void write_empty(const Params& params, const Work& work, int row, int thread) {
    const int count = min(64, work.len_q - row);
    write_rows<OutTile, true>(params, work, row, count, 0, thread);
    if (params.lse != nullptr && thread < count) {
        const bool sink = params.sinks != nullptr && work.sequence < params.sequences;
        params.lse[(static_cast<long long>(work.batch) * params.q_heads + work.head) * params.seqlen_q + work.q_token + row + thread] =
            sink ? params.sinks[work.head] : -kInfinity;
    }
}

}  // namespace attnhub
