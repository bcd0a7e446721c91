// What the host tells the kernel: one struct, passed by value. `hopper_params.py` holds the same layout; a test compares them.
#pragma once

#include "tensor.cuh"

namespace attnhub {

struct alignas(64) TensorMap {  // what the driver encodes and the copy engine reads: [B, H, S, D] as (D, S, H, B)
    unsigned char bytes[128];
};

struct Params {
    TensorMap q_map, k_map, v_map, out_map;
    const Element* q;
    const Element* k;
    const Element* v;
    Element* out;
    float* lse;               // [B, Hq, Sq] natural logarithm, or null
    const int* cu_seqlens_q;  // [sequences + 1], or null unless the sequences are packed
    const int* cu_seqlens_k;
    const int* seqused_k;     // [sequences], or null
    const int* leftpad;       // [sequences], or null
    const int* prefix;        // [sequences], or null
    const float* sinks;       // [Hq], or null
    const float* alibi;       // slopes, read at [b * alibi_batch_stride + h]
    int* counters;            // two zeros of this launch's own: tiles handed out, blocks done; null: tiles are dealt out in turn
    Strides q_strides, k_strides, v_strides, out_strides;
    int sequences;
    int q_heads;
    int heads_per_kv_head;
    int seqlen_q;             // rows of the tensors: the longest sequence, or all tokens when packed
    int seqlen_k;
    int head_dim;
    int v_head_dim;
    int q_tiles;              // tiles of query rows per sequence (not if packed)
    int tile_total;
    int heads_per_section;    // query heads that walk through their tiles together, see schedule.cuh
    int phases;               // see schedule.cuh; 0: the tiles of one head are neighbours
    int top_left;             // alignment of positions; else bottom right
    int causal;
    int window_left;          // -1 is unlimited
    int window_right;
    int chunk;                // 0 is off
    int alibi_batch_stride;
    int out_by_map;           // the copy engine can write out: its strides are multiples of 16 bytes
    int q_steps, k_steps, v_steps;  // 1: heads differ, 2: sequences differ; a dimension of stride 0 is not in the map
    float scale_log2;         // softmax_scale * log2(e)
    float cap_inner;          // softcap: 2 * log2(e) * softmax_scale / c
    float cap_outer;          // softcap: c * log2(e)
};

}  // namespace attnhub
