// The two element types as operations on pairs packed into 32 bits. Inline PTX, so that no CUDA header is needed.
#pragma once

namespace attnhub {

using uint32 = unsigned int;
using Element = unsigned short;  // storage of one fp16 or bf16 number

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
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
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
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }

    static __device__ __forceinline__ uint32 pack(float low, float high) {
        uint32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }

    static __device__ __forceinline__ uint32 finite(uint32 pair) { return finite_pair(pair, 0x7f80u); }

    static __device__ __forceinline__ float nonfinite(uint32 x) { return (x & 0x7f80u) == 0x7f80u ? __uint_as_float(x << 16) : 0.f; }

    static __device__ __forceinline__ uint32 taint(uint32 taint, uint32 pair) {
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(taint) : "r"(pair), "r"(0u));
        return taint;
    }
};

// Four 8 x 8 blocks of 16-bit elements from shared memory; lane l gives the address of row l % 8 of block l / 8.
static __device__ __forceinline__ void load_blocks(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

static __device__ __forceinline__ void load_blocks_transposed(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

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

// A value that is the same in the whole warp, in a form that the compiler knows to be so: it then takes a uniform register,
// of which there are enough, and not one of the 255 of each thread.
static __device__ __forceinline__ int uniform(int x) {
#if ATTNHUB_TURING
    return x;
#else
    return __reduce_max_sync(0xffffffffu, x);
#endif
}

static __device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

}  // namespace attnhub
