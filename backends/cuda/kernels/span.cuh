// Every mask that the kernels serve (lengths, left padding, causal, window, chunk, prefix) allows a query one span of keys, and both ends of the span
// only grow with the query's position. So a tile of queries needs two look-ups: what some of its queries see (keys outside are not loaded) and what
// all of them see (keys inside need no mask).
#pragma once

namespace attnhub {

struct Span {  // keys first <= j < last; empty if last <= first
    int first, last;

    __device__ __forceinline__ bool holds(int j) const { return j >= first && j < last; }
};

// What a query at position p sees of the keys leftpad <= j < len_k. limits: causal, window_left, window_right and chunk, as in Params.
template <class Limits>
static __device__ __forceinline__ Span span_of(const Limits& limits, int p, int len_k, int leftpad, int prefix) {
    Span span{leftpad, len_k};
    if (limits.causal) span.last = min(span.last, max(p + 1, prefix));
    if (limits.window_left >= 0) span.first = max(span.first, p - limits.window_left);
    if (limits.window_right >= 0) span.last = min(span.last, p + limits.window_right + 1);
    if (limits.chunk > 0) {
        const int remainder = p % limits.chunk;
        const int start = p - remainder - (remainder < 0 ? limits.chunk : 0);  // floor, for p < 0 as well
        span.first = max(span.first, start);
        span.last = min(span.last, start + limits.chunk);
    }
    return span;
}

}  // namespace attnhub
