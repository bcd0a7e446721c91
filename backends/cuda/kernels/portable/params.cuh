// What the host tells the kernel: one struct, passed by value. `params.py` holds the same layout; a test compares them.
#pragma once

#include "tensor.cuh"

namespace attnhub {

struct Params {
    const Element* q;
    const Element* k;
    const Element* v;
    Element* out;
    float* lse;            // [B, Hq, Sq] natural logarithm, or null
    const int* cu_seqlens_q;  // [batch + 1], or null unless the sequences are packed
    const int* cu_seqlens_k;
    const int* seqused_k;  // [batch], or null
    const int* leftpad;    // [batch], or null
    const int* prefix;     // [batch], or null
    const float* sinks;    // [Hq], or null
    const float* alibi;    // slopes, read at [b * alibi_batch_stride + h]
    Strides q_strides, k_strides, v_strides, out_strides;
    int batch;             // number of sequences
    int q_heads;
    int heads_per_kv_head;
    int seqlen_q;          // rows of the tensors: the longest sequence, or all tokens when packed
    int seqlen_k;
    int q_tiles;           // tiles of query rows per sequence
    int heads_per_section; // query heads that walk through their tiles together, see schedule.cuh
    int longest_first;
    int causal;
    int top_left;          // alignment of positions; else bottom right
    int window_left;       // -1 is unlimited
    int window_right;
    int chunk;             // 0 is off
    int alibi_batch_stride;
    int negate_q;          // softmax_scale is negative: the kernel flips the sign of q instead
    int out_aligned;       // every row of out starts at a multiple of 16 bytes
    float scale_log2;      // |softmax_scale| * log2(e)
    float cap_inner;       // softcap: 2 * log2(e) * |softmax_scale| / c
    float cap_outer;       // softcap: c * log2(e)
    int reserved;          // keeps the size a multiple of 8
};

}  // namespace attnhub
