// Tensors in device memory.
#pragma once

namespace attnhub {

using uint32 = unsigned int;
using uint64 = unsigned long long;
using Element = unsigned short;  // storage of one fp16 or bf16 number

struct Strides {  // in elements; the stride inside a token is always 1
    long long batch, head, token;
};

static __device__ __forceinline__ const Element* rows_of(const Element* tensor, const Strides& strides, long long batch, int head, long long token) {
    return tensor + batch * strides.batch + head * strides.head + token * strides.token;
}

}  // namespace attnhub
