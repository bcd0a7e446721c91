// Shared memory, by its own addresses.
#pragma once

#include "tensor.cuh"

namespace attnhub {

static __device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

static __device__ __forceinline__ uint32 load_word(uint32 address) {
    uint32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
static __device__ __forceinline__ void store_word(uint32 address, uint32 x) { asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(x) : "memory"); }

static __device__ __forceinline__ uint4 load_shared(uint32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}
static __device__ __forceinline__ void store_shared(uint32 address, uint4 x) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" :: "r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Four 8 x 8 blocks of 16-bit elements; lane l gives the address of row l % 8 of block l / 8.
static __device__ __forceinline__ void load_blocks(uint32& a, uint32& b, uint32& c, uint32& d, uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address) : "memory");
}
static __device__ __forceinline__ void load_blocks(uint32 (&r)[4], uint32 address) { load_blocks(r[0], r[1], r[2], r[3], address); }
static __device__ __forceinline__ void load_blocks_transposed(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

}  // namespace attnhub
