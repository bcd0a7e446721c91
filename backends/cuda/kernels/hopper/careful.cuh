// The same rows again, slowly, where the fast way may have gone wrong. A value that is not finite reached them, perhaps through a pair that is masked
// out: in a product its weight is 0, and 0 * NaN is NaN. Here pairs are selected. Or their scores are extreme, see softmax_step.
#pragma once

#include "hopper/schedule.cuh"
#include "hopper/softmax.cuh"

namespace attnhub {

// Columns `column` and the next of a row in device memory, 0 behind its end.
static __device__ __forceinline__ uint32 load_pair(const Element* row, int column, int end) {
    const uint32 low = column < end ? row[column] : 0, high = column + 1 < end ? row[column + 1] : 0;
    return low | high << 16;
}

// Scores of a lane before the mask, in the units that `scale` of the softmax expects. distance: p - j of its first row and column.
template <class C, int N>
static __device__ __forceinline__ void adjust_scores(float (&scores)[N], const Params& params, float slope, int distance) {
    if constexpr (C::kSoftcap) cap_scores(scores, params.cap_inner, params.cap_outer);
    if constexpr (C::kAlibi) add_alibi(scores, C::kSoftcap ? 1.f : params.scale_log2, slope, distance);
}

// out, rows.maximum and rows.sum of a warp's 16 rows; `row` and row + 8 are this lane's.
template <class C>
static __device__ __forceinline__ void attend_carefully(
    float (&out)[C::kColumns / 2], RowState& rows, const Params& params, const Work& work, const Span (&spans)[2], int row, float slope,
    float scale, int lane) {
    using Type = typename C::Type;
    const int column = lane % 4 * 2;
    const Element* q[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int present = min(row + 8 * half, work.len_q - 1);
        q[half] = rows_of(params.q, params.q_strides, work.batch, work.head, static_cast<long long>(work.q_token) + present);
        rows.maximum[half] = -kInfinity;
        rows.sum[half] = 0.f;
    }
    const Element* k = rows_of(params.k, params.k_strides, work.batch, work.kv_head, work.k_token);
    const Element* v = rows_of(params.v, params.v_strides, work.batch, work.kv_head, work.k_token);
#pragma unroll
    for (int i = 0; i < C::kColumns / 2; ++i) out[i] = 0.f;

    const int end = min(work.last_tile * C::kKeys, work.len_k);
#pragma unroll 1
    for (int key = work.first_tile * C::kKeys; key < end; key += 16) {
        float products[2][4] = {};
#pragma unroll 1
        for (int depth = 0; depth < params.head_dim; depth += 16) {
            const int at = depth + column;
            const uint32 a[4] = {load_pair(q[0], at, params.head_dim), load_pair(q[1], at, params.head_dim),
                                 load_pair(q[0], at + 8, params.head_dim), load_pair(q[1], at + 8, params.head_dim)};
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                const Element* keys = k + min(key + group * 8 + lane / 4, end - 1) * params.k_strides.token;
                Type::mma(products[group], a, load_pair(keys, at, params.head_dim), load_pair(keys, at + 8, params.head_dim));
            }
        }
        float scores[8] = {products[0][0], products[0][1], products[0][2], products[0][3],
                           products[1][0], products[1][1], products[1][2], products[1][3]};
        adjust_scores<C>(scores, params, slope, row + work.offset - (key + column));
        hide_scores<C::kLeft>(scores, spans, key + column);
        softmax_step<true, false, true>(scores, rows, scale);
        shrink_rows(out, rows);
#pragma unroll 1
        for (int i = 0; i < 16 && key + i < end; ++i) {
            float weight[2];
            bool seen[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float even = i & 8 ? scores[4 + 2 * half] : scores[2 * half], odd = i & 8 ? scores[5 + 2 * half] : scores[1 + 2 * half];
                weight[half] = __shfl_sync(0xffffffffu, i & 1 ? odd : even, (lane & 28) + (i & 7) / 2);
                seen[half] = key + i >= spans[half].first && key + i < spans[half].last;
            }
            const Element* values = v + (key + i) * params.v_strides.token;
#pragma unroll
            for (int j = 0; j < C::kColumns / 8; ++j) {
                if (j % 4 == 0) asm volatile("" ::: "memory");  // few loads at a time: registers
                const uint32 pair = load_pair(values, 8 * j + column, params.v_head_dim);
                const float low = Type::widen(static_cast<Element>(pair)), high = Type::widen(static_cast<Element>(pair >> 16));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (seen[half]) {
                        out[4 * j + 2 * half] = fmaf(weight[half], low, out[4 * j + 2 * half]);
                        out[4 * j + 2 * half + 1] = fmaf(weight[half], high, out[4 * j + 2 * half + 1]);
                    }
                }
            }
        }
    }
}

// Whether a row that exists holds a value that is not finite in this lane; words as of `to_words`.
template <class Type, int N>
static __device__ __forceinline__ bool any_nonfinite(const uint32 (&words)[N], int row, int len_q) {
    uint32 taint[4] = {};  // sums of their own do not wait for each other
#pragma unroll
    for (int i = 0; i < N; ++i) taint[i & 3] = Type::taint(taint[i & 3], words[i]);
    return (tainted(taint[0] | taint[2]) && row < len_q) || (tainted(taint[1] | taint[3]) && row + 8 < len_q);
}

}  // namespace attnhub
