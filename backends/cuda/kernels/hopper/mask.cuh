// The spans of keys (span.cuh) that a sequence's queries see, and tiles of keys.
#pragma once

#include "hopper/params.cuh"
#include "span.cuh"

namespace attnhub {

// What positions allow the rows of one sequence. Left, Right: whether a mask may cut there, beside the keys' end.
template <bool Left, bool Right>
struct Mask {
    int len_k;
    int offset;  // position of query row 0 on the key axis
    int leftpad, prefix;

    // Not span_of: half of it is left out in most variants, and the order is this kernel's own.
    __device__ __forceinline__ Span keys(const Params& params, int row) const {
        Span span{0, len_k};
        const int p = row + offset;
        if constexpr (Left) {
            span.first = leftpad;
            if (params.window_left >= 0) span.first = max(span.first, p - params.window_left);
        }
        if constexpr (Right) {
            if (params.causal) span.last = min(span.last, max(p + 1, prefix));
            if (params.window_right >= 0) span.last = min(span.last, p + params.window_right + 1);
        }
        if constexpr (Left && Right) {
            if (params.chunk > 0) {
                const int remainder = p % params.chunk;
                const int start = p - remainder - (remainder < 0 ? params.chunk : 0);  // floor, for p < 0 as well
                span.first = max(span.first, start);
                span.last = min(span.last, start + params.chunk);
            }
        }
        return span;
    }

    // Tiles of keys, [first, last), that some of `count` rows from `row` on see; first >= last if they see no key.
    template <int Keys>
    __device__ __forceinline__ Span seen_tiles(const Params& params, int row, int count) const {
        const int first = max(0, keys(params, row).first), last = keys(params, row + count - 1).last;
        if (first >= last) return {0, 0};
        return {first / Keys, (last + Keys - 1) / Keys};
    }

    // Tiles of keys, [first, last), that all of them see whole.
    template <int Keys>
    __device__ __forceinline__ Span full_tiles(const Params& params, int row, int count) const {
        const int first = max(0, keys(params, row + count - 1).first), last = max(0, keys(params, row).last);
        return {(first + Keys - 1) / Keys, last / Keys};
    }
};

}  // namespace attnhub
