// Scores to weights: softcap, ALiBi, mask, and the online softmax (arXiv 2205.14135, 2307.08691) in base 2.
#pragma once

#include "portable/pairs.cuh"
#include "row.cuh"
#include "warp.cuh"

namespace attnhub {

// What a lane knows of its 2 * RowTiles rows. The maximum is the same in the 4 lanes of a row, of raw scores (Careful) or of scores times the scale;
// the sum is this lane's part.
template <int RowTiles>
struct RowState {
    float maximum[RowTiles][2], sum[RowTiles][2];

    __device__ __forceinline__ explicit RowState(float none) {
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
            maximum[m][0] = maximum[m][1] = none;
            sum[m][0] = sum[m][1] = 0.f;
        }
    }
};

// `capped` (row.cuh) of every score, written so that the compiler fuses multiply and add: the same values, other code.
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

constexpr float kExtreme = 1 << 14;  // see raise_maxima
constexpr float kMostGrowth = 8.f;

// What rows.maximum holds before the first key. Careful: nothing is below it. Else a number, so that a row without a key needs no care: its exponents
// are -inf minus that.
template <bool Careful>
constexpr float kNoMaximum = Careful ? -kInfinity : -__builtin_bit_cast(float, 0x7f7fffff);

// -inf - -inf must not be computed.
static __device__ __forceinline__ float anchor_of(float maximum) { return maximum == -kInfinity ? 0.f : maximum; }

// Each row's maximum over this tile of keys and those before, and what was accumulated under an older one rescaled.
//
// A maximum stays while the weights grow by no more than 2^kMostGrowth: the sums stay far from overflow, and out / sum is the same whatever both are
// relative to. So most tiles rescale nothing, which the warp decides together: there it waits for the maxima anyway, while a branch
// further down kept the exponentials and P V apart, whose instructions the compiler mixes (2 to 9% on an H200).
//
// An exponent is one instruction, score * scale - (maximum * scale, rounded): what the rounding moves, the largest weight from 1 to 2^e, cancels in
// out / sum, as long as e is small. Rows that end with a maximum beyond kExtreme (e up to 2^-10: to bf16 that weight is still 1) are done again,
// Careful: the maximum is subtracted first, and is the exact one.
template <bool Careful, bool Pairs, int RowTiles, int KeyBlocks, int OutBlocks, class Exchange>
static __device__ __forceinline__ void raise_maxima(
    const float (&scores)[RowTiles][KeyBlocks][4], RowState<RowTiles>& rows, float (&out)[RowTiles][OutBlocks][4], float scale,
    const Exchange& exchange) {
    float maxima[RowTiles][2];
    bool grown = Careful;
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float maximum = scores[m][0][half * 2];
#pragma unroll
            for (int n = 0; n < KeyBlocks; ++n) maximum = fmaxf(maximum, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
            maximum = across_row(maximum, [](float a, float b) { return fmaxf(a, b); });
            maxima[m][half] = Careful ? maximum : __fmul_rn(maximum, scale);
        }
    }
    if constexpr (Pairs) exchange.raise(maxima);
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
        grown = grown || maxima[m][0] > rows.maximum[m][0] + kMostGrowth || maxima[m][1] > rows.maximum[m][1] + kMostGrowth;
    }
    if (!__any_sync(0xffffffffu, grown)) return;
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float before = rows.maximum[m][half], now = fmaxf(before, maxima[m][half]);
            const float rescale = exp2_fast(Careful ? (before - anchor_of(now)) * scale : before - now);
            rows.maximum[m][half] = now;
            rows.sum[m][half] *= rescale;
#pragma unroll
            for (int n = 0; n < OutBlocks; ++n) {
                out[m][n][half * 2] *= rescale;
                out[m][n][half * 2 + 1] *= rescale;
            }
        }
    }
}

// Whether a row must be done again: its scores are extreme, or one is not a number.
template <int RowTiles>
static __device__ __forceinline__ bool needs_care(const RowState<RowTiles>& rows) {
    bool found = false;
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float maximum = rows.maximum[m][half], sum = rows.sum[m][half];
            found = found || sum != sum || (fabsf(maximum) > kExtreme && maximum != kNoMaximum<false>);
        }
    }
    return found;
}

// Weights of 16 keys, with which they add to the sums, as the left operand of P V.
template <class Type, bool Careful, int RowTiles, int KeyBlocks>
static __device__ __forceinline__ void weigh(
    uint32 (&weights)[4], const float (&scores)[RowTiles][KeyBlocks][4], RowState<RowTiles>& rows, float scale, int m, int step) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float maximum = rows.maximum[m][half];
            float p[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float score = scores[m][2 * step + n][half * 2 + i];
                p[i] = exp2_fast(Careful ? (score - anchor_of(maximum)) * scale : fmaf(score, scale, -maximum));
                rows.sum[m][half] += p[i];
            }
            weights[n * 2 + half] = Type::pack(p[0], p[1]);
        }
    }
}

}  // namespace attnhub
