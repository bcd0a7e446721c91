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
constexpr float kSlack = ATTNHUB_SLACK;

// The larger one; a NaN where exp2_computed() would swallow it.
static __device__ __forceinline__ float larger(float a, float b) {
#if ATTNHUB_COMPUTED
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return fmaxf(a, b);
#endif
}

// Each row's maximum over this tile of keys and those before, and what was accumulated under an older one rescaled. Fills `origin`, which exponents are
// relative to: the maximum, times `scale` unless Careful; 0 for a row without a key so far, where -inf - -inf must not be computed.
//
// With a slack of at least 0 a maximum stays while the weights grow by no more than 2^kSlack: the sums stay far from overflow, and out / sum is the
// same whatever both are relative to. Then most tiles rescale nothing, which the warp decides at a place where it waits for the maxima anyway.
//
// An exponent is one instruction, score * scale - (maximum * scale, rounded): what the rounding moves, the largest weight from 1 to 2^e, cancels in
// out / sum, as long as e is small. Rows whose scores are beyond kExtreme (e up to 2^-10: to bf16 that weight is still 1) get a sum
// that is not a number, and are done again, Careful: the maximum is subtracted first.
template <bool Careful, int RowTiles, int Keys, int Columns>
static __device__ __forceinline__ void raise_maxima(
    const Scores<RowTiles, Keys>& scores, RowState<RowTiles>& rows, Accumulators<RowTiles, Columns>& out, float scale, float (&origin)[RowTiles][2]) {
    constexpr bool kAlways = Careful || kSlack < 0.f;
    float maxima[RowTiles][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float maximum = kAlways ? rows.maximum[m][half] : -kInfinity;
#pragma unroll
            for (int n = 0; n < Keys / 8; ++n) maximum = larger(maximum, larger(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
            maxima[m][half] = across_row(maximum, larger);
            // Not below is also NaN; a row without a key has -inf on both sides.
            grown = grown || !(maxima[m][half] * scale <= fmaf(rows.maximum[m][half], scale, kSlack));
        }
    }
    if (kAlways || __any_sync(0xffffffffu, grown)) {
#pragma unroll
        for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float maximum = kAlways ? maxima[m][half] : larger(maxima[m][half], rows.maximum[m][half]);
                const float anchor = maximum == -kInfinity ? 0.f : maximum, scaled = __fmul_rn(anchor, scale);
                // Both products rounded, as in the weights: 1 where the maximum stays.
                float rescale = exp2_fast(
                    Careful ? (rows.maximum[m][half] - anchor) * scale : __fsub_rn(__fmul_rn(rows.maximum[m][half], scale), scaled));
                if (!Careful && !(fabsf(scaled) <= kExtreme)) rescale = kNan;
                rows.maximum[m][half] = maximum;
                rows.sum[m][half] *= rescale;
#pragma unroll
                for (int n = 0; n < Columns / 8; ++n) {
                    out[m][n][half * 2] *= rescale;
                    out[m][n][half * 2 + 1] *= rescale;
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < RowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float anchor = rows.maximum[m][half] == -kInfinity ? 0.f : rows.maximum[m][half];
            origin[m][half] = Careful ? anchor : __fmul_rn(anchor, scale);
        }
    }
}

// Weights 2^(scale * score - origin) of one block of scores, [16 x 8], to sums and to the left operand of P V. ATTNHUB_COMPUTED eighths of them take the
// units for multiply-adds and not the one for exponentials, which is narrower.
template <class Type, bool Careful, int RowTiles, int Keys>
static __device__ __forceinline__ void weigh(
    Weights<RowTiles, Keys>& weights, const Scores<RowTiles, Keys>& scores, RowState<RowTiles>& rows, const float (&origin)[RowTiles][2], float scale,
    int m, int n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float p[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float score = scores[m][n][half * 2 + i];
            const float x = Careful ? (score - origin[m][half]) * scale : fmaf(score, scale, -origin[m][half]);
            const bool computed = !Careful && (n * 2 + i) * ATTNHUB_COMPUTED % 8 + ATTNHUB_COMPUTED >= 8;
            p[i] = computed ? exp2_computed<Type>(x) : exp2_fast(x);
            rows.sum[m][half] += p[i];
        }
        weights[m][n / 2][n % 2 * 2 + half] = Type::pack(p[0], p[1]);
    }
}

}  // namespace attnhub
