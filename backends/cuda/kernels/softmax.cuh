// Scores to weights: softcap, ALiBi, mask, and the online softmax (arXiv 2205.14135, 2307.08691) in base 2.
#pragma once

#include "products.cuh"

namespace attnhub {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

// What a lane knows of its 2 * RowTiles rows. The maximum is of raw scores and the same in the 4 lanes of a row; the sum
// is this lane's part.
template <int RowTiles>
struct RowState {
    float maximum[RowTiles][2], sum[RowTiles][2];

    __device__ __forceinline__ RowState() {
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
            maximum[m][0] = maximum[m][1] = -kInfinity;
            sum[m][0] = sum[m][1] = 0.f;
        }
    }
};

// Combines the 4 lanes that share a row.
template <class F>
static __device__ __forceinline__ float across_row(float x, F combine) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// c * tanh(score / c) in units of log2, as c * (1 - 2 / (exp(2 x) + 1)): tanh.approx has 11 bits, too few for c = 50.
template <int RowTiles, int Keys>
static __device__ __forceinline__ void cap_scores(Scores<RowTiles, Keys>& scores, float inner, float outer) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[m][n][i] = outer - 2.f * outer * reciprocal_fast(exp2_fast(scores[m][n][i] * inner) + 1.f);
            }
        }
    }
}

// Adds -slope * |p - j|; slope, like the scores, is in units of log2.
template <int RowTiles, int Keys>
static __device__ __forceinline__ void add_alibi(
    Scores<RowTiles, Keys>& scores, float scale, float slope, int position, int first_key, int lane) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int distance = position + m * 16 + lane / 4 + i / 2 * 8 - (first_key + n * 8 + lane % 4 * 2 + i % 2);
                scores[m][n][i] = scores[m][n][i] * scale - slope * static_cast<float>(abs(distance));
            }
        }
    }
}

template <int RowTiles, int Keys>
static __device__ __forceinline__ void hide_scores(
    Scores<RowTiles, Keys>& scores, const Mask& mask, int first_row, int first_key, int lane) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Span span = mask.keys(first_row + m * 16 + lane / 4 + half * 8);
#pragma unroll
            for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int key = first_key + n * 8 + lane % 4 * 2 + i;
                    if (!span.holds(key)) scores[m][n][half * 2 + i] = -kInfinity;
                }
            }
        }
    }
}

constexpr float kExtreme = 1 << 14;
constexpr float kNan = __builtin_bit_cast(float, 0x7fffffff);

// Replaces the scores by 2^(scale * (score - maximum)) and rescales what was accumulated under the old maximum.
//
// An exponent is one instruction, score * scale - (maximum * scale, rounded): what the rounding moves, the largest weight from 1 to 2^e, cancels in
// out / sum, as long as e is small. Rows whose scores are beyond kExtreme (e up to 2^-10: to bf16 that weight is still 1) get a sum
// that is not a number, and are done again, Careful: the maximum is subtracted first.
template <bool Careful, int RowTiles, int Keys, int Columns>
static __device__ __forceinline__ void softmax_step(
    Scores<RowTiles, Keys>& scores, RowState<RowTiles>& rows, Accumulators<RowTiles, Columns>& out, float scale) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float maximum = rows.maximum[m][half];
#pragma unroll
            for (int n = 0; n < Keys / 8; ++n) maximum = fmaxf(maximum, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
            maximum = across_row(maximum, [](float a, float b) { return fmaxf(a, b); });
            // A row without a key so far: its weights are 2^-inf = 0, and -inf - -inf must not be computed.
            const float anchor = maximum == -kInfinity ? 0.f : maximum, scaled = __fmul_rn(anchor, scale);
            // Both products rounded, as in the weights: 1 where the maximum stays.
            float rescale = exp2_fast(
                Careful ? (rows.maximum[m][half] - anchor) * scale : __fsub_rn(__fmul_rn(rows.maximum[m][half], scale), scaled));
            if (!Careful && fabsf(scaled) > kExtreme) rescale = kNan;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    scores[m][n][i] = exp2_fast(Careful ? (scores[m][n][i] - anchor) * scale : fmaf(scores[m][n][i], scale, -scaled));
                    sum += scores[m][n][i];
                }
            }
            rows.maximum[m][half] = maximum;
            rows.sum[m][half] = rows.sum[m][half] * rescale + sum;
            // Always, though often by 1: a branch around it cost 2 to 9% on an H200, as nothing is scheduled across it.
#pragma unroll
            for (int n = 0; n < Columns / 8; ++n) {
                out[m][n][half * 2] *= rescale;
                out[m][n][half * 2 + 1] *= rescale;
            }
        }
    }
}

}  // namespace attnhub
