// Scores to weights: softcap, ALiBi, mask and the online softmax (arXiv 2205.14135, 2307.08691) in base 2.
#pragma once

#include "element.cuh"
#include "hopper/mask.cuh"
#include "row.cuh"
#include "warp.cuh"

namespace attnhub {

// What a lane knows of its 2 rows. The maximum is of scores and the same in the 4 lanes of a row; the sum is this lane's part.
struct RowState {
    float maximum[2], sum[2], shrink[2];
    float extreme;  // largest magnitude of a product of maximum and scale
};

constexpr float kExtreme = 1 << 14;  // see softmax_step
constexpr float kMostGrowth = 8.f;

template <int N>
static __device__ __forceinline__ void cap_scores(float (&scores)[N], float inner, float outer) {
#pragma unroll
    for (int i = 0; i < N; ++i) scores[i] = capped(scores[i], inner, outer);
}

// score * scale - slope * |p - j|; slope is in units of log2. distance: p - j of this lane's first row and column.
template <int N>
static __device__ __forceinline__ void add_alibi(float (&scores)[N], float scale, float slope, int distance) {
    const float first = static_cast<float>(distance);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float away = first + static_cast<float>((i >> 1 & 1) * 8 - (i / 4 * 8 + (i & 1)));
        scores[i] = fmaf(-slope, fabsf(away), scores[i] * scale);
    }
}

// Scores of keys outside of the rows' spans become -inf. spans: of this lane's rows, 8 apart; key: of its first column.
template <bool Left, int N>
static __device__ __forceinline__ void hide_scores(float (&scores)[N], const Span (&spans)[2], int key) {
    const int last[2] = {spans[0].last - key, spans[1].last - key}, first[2] = {spans[0].first - key, spans[1].first - key};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int column = i / 4 * 8 + (i & 1), half = i >> 1 & 1;
        bool hidden = column >= last[half];
        if constexpr (Left) hidden = hidden || column < first[half];
        if (hidden) scores[i] = -kInfinity;
    }
}

// Replaces the scores by 2^(scale * (score - maximum)); `shrink` is what everything summed under the old maximum must be multiplied by.
// Masked: scores may be -inf, and all of a row's may have been so far. Returns whether the maximum of one of the warp's rows changed. It stays, and with
// it out, while its weights grow by no more than 2^kMostGrowth: then the largest is not exactly 1, and is rounded as a weight, but not in
// the sum. That is half a unit of out's last place at most, and within the conformance suite's rule on scores of every spread that was tried.
//
// An exponent is one instruction, score * scale - (maximum * scale, rounded): what the rounding moves, the largest weight from 1 to 2^e, cancels in
// out / sum, as long as e is small. Rows whose scores are beyond kExtreme (e up to 2^-10: to bf16 that weight is still 1) are told, and done again,
// Careful: the maximum is subtracted first.
template <bool Masked, bool First, bool Careful, int N>
static __device__ __forceinline__ bool softmax_step(float (&scores)[N], RowState& rows, float scale) {
    float top[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        top[half][0] = scores[2 * half];
        top[half][1] = scores[2 * half + 1];
    }
#pragma unroll
    for (int i = 4; i < N; i += 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half][0] = fmaxf(top[half][0], scores[i + 2 * half]);
            top[half][1] = fmaxf(top[half][1], scores[i + 2 * half + 1]);
        }
    }
    float highest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        highest[half] = across_row(fmaxf(top[half][0], top[half][1]), [](float a, float b) { return fmaxf(a, b); });
    }
    bool changed = true;
    if constexpr (First) {
#pragma unroll
        for (int half = 0; half < 2; ++half) rows.maximum[half] = highest[half];
    } else {
        if constexpr (!Careful) {
            // By row: what a row's neighbours are does not move its rounding.
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if ((highest[half] - rows.maximum[half]) * scale <= kMostGrowth) highest[half] = rows.maximum[half];
            }
            changed = __any_sync(0xffffffffu, highest[0] > rows.maximum[0] || highest[1] > rows.maximum[1]);
        }
        if (changed) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float maximum = fmaxf(rows.maximum[half], highest[half]);
                // A row without a key so far: -inf - -inf must not be computed.
                const float anchor = Masked && maximum == -kInfinity ? 0.f : maximum;
                // Both products rounded, as in the weights: 1 where the maximum stays.
                rows.shrink[half] = exp2_fast(
                    Careful ? (rows.maximum[half] - anchor) * scale : __fsub_rn(__fmul_rn(rows.maximum[half], scale), __fmul_rn(anchor, scale)));
                rows.maximum[half] = maximum;
                rows.sum[half] *= rows.shrink[half];
            }
        }
    }
    float anchor[2], scaled[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        anchor[half] = Masked && rows.maximum[half] == -kInfinity ? 0.f : rows.maximum[half];
        scaled[half] = __fmul_rn(anchor[half], scale);
    }
    if constexpr (!Careful) {
        const float extreme = fmaxf(fabsf(scaled[0]), fabsf(scaled[1]));
        rows.extreme = First ? extreme : fmaxf(rows.extreme, extreme);
    }
    float sums[2][2] = {{0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        scores[i] = exp2_fast(Careful ? (scores[i] - anchor[i >> 1 & 1]) * scale : fmaf(scores[i], scale, -scaled[i >> 1 & 1]));
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i >> 1 & 1][i & 1] += scores[i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = sums[half][0] + sums[half][1];
        rows.sum[half] = First ? sum : rows.sum[half] + sum;
    }
    return changed;
}

template <class Type, int N>
static __device__ __forceinline__ void to_weights(uint32 (&weights)[N / 2], const float (&scores)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) weights[i] = Type::pack(scores[2 * i], scores[2 * i + 1]);
}

template <int N>
static __device__ __forceinline__ void shrink_rows(float (&out)[N], const RowState& rows) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] *= rows.shrink[i >> 1 & 1];
}

}  // namespace attnhub
