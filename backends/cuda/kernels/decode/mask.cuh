// The rows of a tile are the same few queries for several heads: look-ups of the first and the last query tell which keys to load and which blocks need
// a mask (span.cuh).
#pragma once

#include "decode/params.cuh"
#include "span.cuh"

namespace attnhub {

// The queries of one sequence: where they lie in the tensors.
struct Queries {
    int batch, token, count;

    static __device__ __forceinline__ Queries of(const Params& params, int sequence) {
        if (params.cu_seqlens_q == nullptr) return {sequence, 0, params.seqlen_q};
        const int first = params.cu_seqlens_q[sequence];
        return {0, first, params.cu_seqlens_q[sequence + 1] - first};
    }
};

struct Mask {
    int len_k;
    int offset;  // position of query 0 on the key axis
    int leftpad, prefix;

    static __device__ __forceinline__ Mask of(const Params& params, int b, int queries) {
        // Positions follow it even past the keys there are.
        const int stated = (params.seqused_k != nullptr ? params.seqused_k[b] : params.seqlen_k) + params.new_tokens;
        return {max(0, min(params.seqlen_k, stated)), params.top_left ? 0 : stated - queries,
                params.leftpad != nullptr ? max(0, params.leftpad[b]) : 0, params.prefix != nullptr ? params.prefix[b] : 0};
    }

    __device__ __forceinline__ Span keys(const Params& params, int query) const {
        return span_of(params, query + offset, len_k, leftpad, prefix);
    }
};

}  // namespace attnhub
