// The two element types as operations on pairs packed into 32 bits. Inline PTX, so that no CUDA header is needed.
#pragma once

// 1: the path of compute capability 7.5, which the portable kernel alone has.
#ifndef ATTNHUB_TURING
#define ATTNHUB_TURING 0
#endif

#include "tensor.cuh"

namespace attnhub {

static __device__ __forceinline__ uint32 finite_pair(uint32 pair, uint32 exponent) {
    const uint32 low = (pair & exponent) == exponent ? 0u : pair & 0xffffu;
    const uint32 high = (pair >> 16 & exponent) == exponent ? 0u : pair & 0xffff0000u;
    return low | high;
}

struct Half {
    // d += a b for a [16 x 16] row-major and b [16 x 8] column-major, fp32 accumulators.
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
#if ATTNHUB_TURING
        mma_k8(d, a[0], a[1], b0);
        mma_k8(d, a[2], a[3], b1);
#else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
    }

    static __device__ __forceinline__ void mma_k8(float (&d)[4], uint32 a0, uint32 a1, uint32 b) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b));
    }

    static __device__ __forceinline__ uint32 pack(float low, float high) {
        uint32 pair;
#if ATTNHUB_TURING
        asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(pair) : "f"(low), "f"(high));
#else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
        return pair;
    }

    // Both elements, 0 in place of Inf and NaN.
    static __device__ __forceinline__ uint32 finite(uint32 pair) { return finite_pair(pair, 0x7c00u); }

    static __device__ __forceinline__ float widen(Element x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }

    // One element: itself if it is Inf or NaN, else 0.
    static __device__ __forceinline__ float nonfinite(uint32 x) {
        return (x & 0x7c00u) == 0x7c00u ? __uint_as_float((x & 0x8000u) << 16 | 0x7f800000u | (x & 0x3ffu)) : 0.f;
    }

    // taint + 0 * pair: stays 0 exactly as long as every element seen was finite (Inf * 0 and NaN * 0 are NaN).
    static __device__ __forceinline__ uint32 taint(uint32 taint, uint32 pair) {
        asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(taint) : "r"(pair), "r"(0u));
        return taint;
    }
};

struct BFloat16 {
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }

    static __device__ __forceinline__ uint32 pack(float low, float high) {
        uint32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }

    static __device__ __forceinline__ uint32 finite(uint32 pair) { return finite_pair(pair, 0x7f80u); }

    static __device__ __forceinline__ float widen(Element x) { return __uint_as_float(static_cast<uint32>(x) << 16); }

    static __device__ __forceinline__ float nonfinite(uint32 x) { return (x & 0x7f80u) == 0x7f80u ? __uint_as_float(x << 16) : 0.f; }

    static __device__ __forceinline__ uint32 taint(uint32 taint, uint32 pair) {
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(taint) : "r"(pair), "r"(0u));
        return taint;
    }
};

// Eight elements more.
template <class Type>
static __device__ __forceinline__ uint32 taint_all(uint32 taint, const uint4& x) {
    return Type::taint(Type::taint(Type::taint(Type::taint(taint, x.x), x.y), x.z), x.w);
}
static __device__ __forceinline__ bool tainted(uint32 taint) { return (taint & 0x7fff7fffu) != 0; }  // 0 and -0 are both clean

}  // namespace attnhub
