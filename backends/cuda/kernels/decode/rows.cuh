// A warp's work on one block of keys: 16 rows of queries x 16 keys, by mma.sync m16n8k16. In an accumulator [16 x 8] lane l holds rows l / 4 and
// l / 4 + 8, columns 2 (l % 4) and the next one. Two neighbouring score accumulators are, converted, the left operand [16 x 16] of P V.
#pragma once

#include "decode/append.cuh"
#include "row.cuh"
#include "warp.cuh"

namespace attnhub {

// Row r of a K/V head is query r % Sq of its query head r / Sq, for the Sq queries of the sequence.
struct Row {
    int head, query;
    bool exists;

    static __device__ __forceinline__ Row of(const Params& params, const Queries& queries, int kv_head, int r) {
        const int group = queries.count == 1 ? r : r / queries.count;
        return {kv_head * params.heads_per_kv_head + group, r - group * queries.count, group < params.heads_per_kv_head};
    }

    // In q.
    __device__ __forceinline__ const Element* start(const Params& params, const Queries& queries) const {
        return params.q + queries.batch * params.q_strides.batch + head * params.q_strides.head + (queries.token + query) * params.q_strides.token;
    }
};

template <class C>
struct Rows {
    using Type = typename C::Type;
    using KBlock = Block<C::kDepth>;
    using VBlock = Block<C::kWidth>;

    Row own[2];  // 8 rows apart
    Span spans[2];
    float slope[2];
    uint32 q[KBlock::kSteps][4];
    float out[VBlock::kColumns / 8][4];
    float maximum[2], sum[2];  // the sum is this lane's part
    float s[2][4];             // scores of a block, then weights

    // q_block: the rows, in shared memory. Those that do not exist are anything there, and 0 here, lest their maxima grow.
    __device__ __forceinline__ Rows(
        const Params& params, const Mask& mask, const Queries& queries, int sequence, int kv_head, int tile, uint32 q_block, int lane) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            own[half] = Row::of(params, queries, kv_head, tile * 16 + lane / 4 + 8 * half);
            spans[half] = mask.keys(params, own[half].query);
            maximum[half] = -kInfinity;
            sum[half] = slope[half] = 0.f;
            if constexpr (C::kAlibi) {
                if (own[half].exists) slope[half] = params.alibi[sequence * params.alibi_batch_stride + own[half].head] * kLog2e;
            }
        }
        const uint32 flip = params.negate_q ? 0x80008000u : 0u;
#pragma unroll
        for (int step = 0; step < KBlock::kSteps; ++step) {
            load_blocks(q[step], q_block + KBlock::offset(lane % 16, 2 * step + lane / 16));
#pragma unroll
            for (int i = 0; i < 4; ++i) q[step][i] = own[i % 2].exists ? q[step][i] ^ flip : 0u;
        }
#pragma unroll
        for (int n = 0; n < VBlock::kColumns / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] = 0.f;
        }
    }

    // Weights of a block of keys. masked: rows see parts of it.
    __device__ __forceinline__ void weigh(const Params& params, const Mask& mask, int key, uint32 k, bool masked, int lane) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
        }
        const uint32 k_row = lane % 8 + lane / 16 * 8, k_piece = lane / 8 % 2;
#pragma unroll
        for (int step = 0; step < KBlock::kSteps; ++step) {
            uint32 b[4];
            load_blocks(b, k + KBlock::offset(k_row, 2 * step + k_piece));
            Type::mma(s[0], q[step], b[0], b[1]);
            Type::mma(s[1], q[step], b[2], b[3]);
        }
        adjust(params, mask, key, lane);
        if (masked) hide(key, lane);
        softmax(C::kRawScores ? params.scale_log2 : 1.f);
    }

    // The weighed values of the block. differ: not all rows see the same part of it.
    __device__ __forceinline__ void add_values(int key, uint32 v, bool differ, int lane) {
        if (differ) keep_nonfinite_apart(key, v, lane);
        const uint32 weights[4] = {Type::pack(s[0][0], s[0][1]), Type::pack(s[0][2], s[0][3]), Type::pack(s[1][0], s[1][1]), Type::pack(s[1][2], s[1][3])};
#pragma unroll
        for (int n = 0; n < VBlock::kColumns / 16; ++n) {
            uint32 b[4];
            load_blocks_transposed(b, v + VBlock::offset(lane % 16, 2 * n + lane / 16));
            Type::mma(out[2 * n], weights, b[0], b[1]);
            Type::mma(out[2 * n + 1], weights, b[2], b[3]);
        }
    }

private:
    static __device__ __forceinline__ int column(int n, int i, int lane) { return n * 8 + lane % 4 * 2 + i % 2; }

    // Softcap, and ALiBi: - slope * |p - j|.
    __device__ __forceinline__ void adjust(const Params& params, const Mask& mask, int key, int lane) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& x = s[n][i];
                if constexpr (C::kSoftcap) x = capped(x, params.cap_inner, params.cap_outer);
                if constexpr (C::kAlibi) {
                    const int away = own[i / 2].query + mask.offset - (key + column(n, i, lane));
                    x = fmaf(-slope[i / 2], fabsf(static_cast<float>(away)), C::kSoftcap ? x : x * params.scale_log2);
                }
            }
        }
    }

    __device__ __forceinline__ void hide(int key, int lane) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (!spans[i / 2].holds(key + column(n, i, lane))) s[n][i] = -kInfinity;
            }
        }
    }

    // Scores to 2^(scale * (score - maximum)). The maximum is subtracted first: exact for scores of any size, and instructions are not what is short.
    __device__ __forceinline__ void softmax(float scale) {
        float top[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half] = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
            top[half] = fmaxf(maximum[half], across_row(top[half], [](float a, float b) { return fmaxf(a, b); }));
        }
        float anchor[2];  // a row without a key so far: -inf - -inf must not be computed
#pragma unroll
        for (int half = 0; half < 2; ++half) anchor[half] = top[half] == -kInfinity ? 0.f : top[half];
        if (__any_sync(0xffffffffu, top[0] > maximum[0] || top[1] > maximum[1])) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shrink = exp2_fast((maximum[half] - anchor[half]) * scale);
                maximum[half] = top[half];
                sum[half] *= shrink;
#pragma unroll
                for (int n = 0; n < VBlock::kColumns / 8; ++n) {
                    out[n][2 * half] *= shrink;
                    out[n][2 * half + 1] *= shrink;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] = exp2_fast((s[n][i] - anchor[i / 2]) * scale);
                sum[i / 2] += s[n][i];
            }
        }
    }

    // A weight of 0 does not hide a key whose value is Inf or NaN, as 0 * NaN is NaN. So these are added to the rows that see their key, and cleared.
    __device__ __forceinline__ void keep_nonfinite_apart(int key, uint32 v, int lane) {
        uint32 taint = 0;
        VBlock::for_each_piece(lane, [&](int row, int piece) {
            taint = taint_all<Type>(taint, load_shared(v + VBlock::offset(row, piece)));
        });
        if (!__any_sync(0xffffffffu, tainted(taint))) return;
#pragma unroll 1
        for (int row = 0; row < kBlock; ++row) {
#pragma unroll
            for (int n = 0; n < VBlock::kColumns / 8; ++n) {
                const uint32 pair = load_word(v + VBlock::offset(row, n) + lane % 4 * 4);
                const float low = Type::nonfinite(pair & 0xffffu), high = Type::nonfinite(pair >> 16);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool seen = spans[half].holds(key + row);
                    out[n][2 * half] += seen ? low : 0.f;
                    out[n][2 * half + 1] += seen ? high : 0.f;
                }
            }
        }
        __syncwarp();
        VBlock::for_each_piece(lane, [&](int row, int piece) {
            const uint32 address = v + VBlock::offset(row, piece);
            const uint4 x = load_shared(address);
            store_shared(address, make_uint4(Type::finite(x.x), Type::finite(x.y), Type::finite(x.z), Type::finite(x.w)));
        });
        __syncwarp();
    }
};

}  // namespace attnhub
