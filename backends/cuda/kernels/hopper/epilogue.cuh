// Accumulators to out and lse.
#pragma once

#include "hopper/careful.cuh"
#include "hopper/handout.cuh"
#include "hopper/products.cuh"

namespace attnhub {

// Completes the denominators, sink included: what out is to be multiplied by. Writes lse. `row` and row + 8 are this lane's.
static __device__ __forceinline__ void finish_rows(
    float (&factors)[2], const RowState& rows, const Params& params, const Work& work, int row, float scale, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = across_row(rows.sum[half], [](float a, float b) { return a + b; });
        float scaled = rows.maximum[half] == -kInfinity ? -kInfinity : rows.maximum[half] * scale;
        float factor = 1.f;
        if (params.sinks != nullptr) add_sink(scaled, sum, factor, params.sinks[work.head]);
        // A sum is 0 or at least the weight of its maximum: far from where the fast reciprocal, which is within one unit in the last place, underflows.
        factors[half] = sum == 0.f ? 0.f : factor * reciprocal_fast(sum);
        if (params.lse != nullptr && lane % 4 == 0 && row + 8 * half < work.len_q) {
            float* lse = params.lse + (static_cast<long long>(work.batch) * params.q_heads + work.head) * params.seqlen_q + work.q_token + row + 8 * half;
            *lse = lse_of(scaled, sum);
        }
    }
}

// Accumulators times the factors of a lane's rows, as pairs of elements; words 2 i belong to its first row, words 2 i + 1 to its second.
template <class Type, int N>
static __device__ __forceinline__ void to_words(uint32 (&words)[N], const float (&out)[2 * N], const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = Type::pack(out[2 * i] * factors[i & 1], out[2 * i + 1] * factors[i & 1]);
}

// A warp's 16 rows into a tile.
template <class OutTile, int N>
static __device__ __forceinline__ void write_tile(uint32 tile, const uint32 (&words)[N], int warp, int lane) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        store_blocks(tile + OutTile::offset(warp * 16 + (lane & 15), 2 * j + (lane >> 4)), words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3]);
    }
}

// The rows of a warp, from its registers. The 4 lanes of a row trade words, so that each has 16 bytes in one piece of every fourth block of 8 columns.
template <int N>
static __device__ __forceinline__ void write_direct(const Params& params, const Work& work, uint32 (&words)[N], int row, int lane) {
    const bool odd = lane & 1, high = lane & 2;
#pragma unroll
    for (int i = 0; i < N; i += 8) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32 &a = words[i + half], &b = words[i + 2 + half], &c = words[i + 4 + half], &d = words[i + 6 + half];
            const uint32 ab = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1), cd = __shfl_xor_sync(0xffffffffu, odd ? c : d, 1);
            (odd ? a : b) = ab;
            (odd ? c : d) = cd;
            const uint32 first = __shfl_xor_sync(0xffffffffu, high ? a : c, 2), second = __shfl_xor_sync(0xffffffffu, high ? b : d, 2);
            (high ? a : c) = first;
            (high ? b : d) = second;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Element* out = params.out + work.batch * params.out_strides.batch + work.head * params.out_strides.head +
                       (static_cast<long long>(work.q_token) + row + 8 * half) * params.out_strides.token + lane % 4 * 8;
        const int columns = row + 8 * half < work.len_q ? params.v_head_dim - lane % 4 * 8 : 0;
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            // Without a branch, as in Barrier::arrive_once.
            asm volatile("{\n.reg .pred exists;\nsetp.gt.s32 exists, %5, %6;\n@exists st.global.v4.b32 [%0], {%1,%2,%3,%4};\n}"
                         :: "l"(out + 4 * i), "r"(words[i + half]), "r"(words[i + 2 + half]), "r"(words[i + 4 + half]), "r"(words[i + 6 + half]),
                            "r"(columns), "r"(4 * i) : "memory");
        }
    }
}

// The rows of a warp once more, see careful.cuh. Not inline: the way of all others does not lead around it.
template <class C, class OutTile>
static __device__ __noinline__ void write_carefully(const Params& params, Work work, int own_row, float scale, uint32 out_tile) {
    const int row = work.row + own_row, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const typename C::Mask mask{work.len_k, work.offset, work.leftpad, work.prefix};
    const Span spans[2] = {mask.keys(params, row), mask.keys(params, row + 8)};
    float slope = 0.f;
    if constexpr (C::kAlibi) slope = params.alibi[work.sequence * params.alibi_batch_stride + work.head] * kLog2e;
    float out[C::kColumns / 2], factors[2];
    RowState rows;
    attend_carefully<C>(out, rows, params, work, spans, row, slope, scale, lane);
    finish_rows(factors, rows, params, work, row, scale, lane);
    uint32 words[C::kColumns / 4];
    to_words<typename C::Type>(words, out, factors);
    if constexpr (C::kOutDirect) {
        write_direct(params, work, words, row, lane);
    } else {
        write_tile<OutTile>(out_tile, words, warp, lane);
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

// Sends a warpgroup's tile to device memory.
template <class OutTile>
static __device__ __forceinline__ void send_tile(const Params& params, const Work& work, int row, uint32 tile, int thread) {
    const int count = min(64, work.len_q - row);
    // The engine stops at the tensor's end, but not at a packed sequence's.
    if (params.out_by_map && (params.cu_seqlens_q == nullptr || count == 64)) {
        if (thread == 0 && count > 0) OutTile::store(&params.out_map, tile, work.q_token + row, work.head, work.batch);
        __syncwarp();
    } else if (count > 0) {
        write_rows<OutTile, false>(params, work, row, count, tile, thread);
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
