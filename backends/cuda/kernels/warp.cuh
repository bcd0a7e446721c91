// What the lanes of a warp find out together.
#pragma once

#include "element.cuh"

namespace attnhub {

// A value that is the same in the whole warp, in a form that the compiler knows to be so: it then takes a uniform register,
// of which there are enough, and not one of the 255 of each thread.
static __device__ __forceinline__ int uniform(int x) {
#if ATTNHUB_TURING
    return x;
#else
    return __reduce_max_sync(0xffffffffu, x);
#endif
}

// Combines the 4 lanes that share a row of accumulators.
template <class F>
static __device__ __forceinline__ float across_row(float x, F combine) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <class F>
static __device__ __forceinline__ float across_warp(float x, F combine) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

}  // namespace attnhub
