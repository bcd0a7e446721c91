// Arithmetic of a row's softmax, in base 2.
#pragma once

namespace attnhub {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;

static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Softcap: c * tanh(score / c) in units of log2, as c * (1 - 2 / (exp(2 x) + 1)): tanh.approx has 11 bits, too few for c = 50.
static __device__ __forceinline__ float capped(float score, float inner, float outer) {
    return fmaf(-2.f * outer, reciprocal_fast(exp2_fast(score * inner) + 1.f), outer);
}

// A sink joins a row: its sum and its maximum, which is in units of log2. factor: what it makes of what was summed under the old maximum.
static __device__ __forceinline__ void add_sink(float& maximum, float& sum, float& factor, float sink) {
    const float sink_log2 = sink * kLog2e;
    const float anchor = fmaxf(maximum, sink_log2);
    if (anchor != -kInfinity) {  // else there is neither a key nor a sink
        factor = exp2f(maximum - anchor);
        sum = sum * factor + exp2f(sink_log2 - anchor);
        maximum = anchor;
    }
}

// The natural logarithm of a row's sum.
static __device__ __forceinline__ float lse_of(float maximum, float sum) { return sum == 0.f ? -kInfinity : (maximum + log2f(sum)) * kLn2; }

}  // namespace attnhub
