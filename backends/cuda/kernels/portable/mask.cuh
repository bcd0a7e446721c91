// Sequences, and the spans of keys (span.cuh) that their queries see.
#pragma once

#include "portable/params.cuh"
#include "span.cuh"

namespace attnhub {

struct Mask {
    int len_k;
    int offset;  // position of query row 0 on the key axis
    int leftpad;
    int prefix;
    int causal, window_left, window_right, chunk;

    __device__ __forceinline__ Span keys(int row) const { return span_of(*this, row + offset, len_k, leftpad, prefix); }
};

// One sequence of the batch: where it lies in the tensors, and its mask.
struct Sequence {
    long long batch;             // index of its batch entry
    int q_token, k_token;        // its first token there
    int len_q;
    Mask mask;

    static __device__ __forceinline__ Sequence of(const Params& params, int b) {
        Sequence s;
        int len_k = params.seqlen_k;
        s.batch = b;
        s.q_token = s.k_token = 0;
        s.len_q = params.seqlen_q;
        if (params.cu_seqlens_q != nullptr) {
            s.batch = 0;
            s.q_token = params.cu_seqlens_q[b];
            s.k_token = params.cu_seqlens_k[b];
            s.len_q = params.cu_seqlens_q[b + 1] - s.q_token;
            len_k = params.cu_seqlens_k[b + 1] - s.k_token;
        }
        const int stated = params.seqused_k != nullptr ? params.seqused_k[b] : len_k;  // positions follow it even past the keys there are
        s.mask.len_k = max(0, min(len_k, stated));
        s.mask.offset = params.top_left ? 0 : stated - s.len_q;
        s.mask.leftpad = params.leftpad != nullptr ? max(0, params.leftpad[b]) : 0;
        s.mask.prefix = params.prefix != nullptr ? params.prefix[b] : 0;
        s.mask.causal = params.causal;
        s.mask.window_left = params.window_left;
        s.mask.window_right = params.window_right;
        s.mask.chunk = params.chunk;
        return s;
    }
};

}  // namespace attnhub
