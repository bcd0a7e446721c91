// What the host tells the kernel: one struct, passed by value. `decode_params.py` holds the same layout; a test compares them.
#pragma once

#include "tensor.cuh"

namespace attnhub {

// Division by a number that the host knows, of 0 <= n < 2^31 (Granlund and Montgomery, 1994): a division in the device's own way takes as long as 30
// multiplications, and the first copies wait for all of them.
struct Divisor {
    uint32 number, multiplier, shift;  // multiplier = ceil(2^(31 + l) / number), shift = 31 + l, for the least l with 2^l >= number

    __device__ __forceinline__ int quotient(int n) const {
        return static_cast<int>(static_cast<unsigned long long>(static_cast<uint32>(n)) * multiplier >> shift);
    }
    // The quotient; n becomes the remainder.
    __device__ __forceinline__ int divide(int& n) const {
        const int found = quotient(n);
        n -= found * static_cast<int>(number);
        return found;
    }
};

struct Params {
    const Element* q;
    const Element* k;
    const Element* v;
    Element* out;
    float* lse;               // [B, Hq, Sq] natural logarithm, or null
    const int* cu_seqlens_q;  // [sequences + 1], or null unless the queries are packed
    const int* seqused_k;     // [sequences], or null
    const int* leftpad;       // [sequences], or null
    const int* prefix;        // [sequences], or null
    const int* block_table;   // [sequences, pages], or null
    const float* sinks;       // [Hq], or null
    const float* alibi;       // slopes, read at [b * alibi_batch_stride + h]
    float* partial;           // what splits leave for each other, see merge.cuh; null if there is one
    int* tickets;             // a zero for each row of tiles, left as zero; null if there is one split
    const Element* new_k;     // [sequences, Hk, new_tokens, D], or null: what the kernel appends to the cache, see append.cuh
    const Element* new_v;
    const void* cos;          // [rotary_positions, rotary_half] fp32, or Element if narrow_angles
    const void* sin;
    Strides q_strides, k_strides, v_strides, out_strides;  // batch of k and v: from page to page, if there are pages
    Strides new_k_strides, new_v_strides;
    long long angle_stride;   // from position to position, in cos and in sin
    int sequences;
    int q_heads;
    int heads_per_kv_head;
    int seqlen_q;             // rows of the tensors: of each sequence, or all tokens when packed
    int seqlen_k;             // what a sequence can hold
    int pages;                // entries of a sequence in block_table
    int tile_rows;            // rows that a tile can have
    int causal;
    int top_left;             // alignment of positions; else bottom right
    int window_left;          // -1 is unlimited
    int window_right;
    int chunk;                // 0 is off
    int alibi_batch_stride;
    int negate_q;             // softmax_scale is negative: the kernel flips the sign of q instead
    int out_aligned;          // every row of out starts at a multiple of 8 bytes and has whole groups of 4 columns
    int new_tokens;           // of each sequence, behind the seqused_k that the cache holds; 0: nothing is appended
    int cache_rows;           // sequences or pages of the cache
    int rotary_half;          // pairs of columns that are turned, an even number
    int rotary_positions;
    int interleaved;          // column 2 d is turned with 2 d + 1, else d with d + rotary_half
    int one_position;         // all queries of a sequence stand at seqused_k, else query i at seqused_k + i
    int narrow_angles;
    Divisor kv_heads, page_size;
    Divisor row_tiles;        // tiles of 16 rows for a K/V head: its query heads' queries, of the longest sequence
    Divisor splits;           // blocks that share the keys of a tile of rows
    float scale_log2;         // |softmax_scale| * log2(e)
    float cap_inner;          // softcap: 2 * log2(e) * |softmax_scale| / c
    float cap_outer;          // softcap: c * log2(e)
};

}  // namespace attnhub
