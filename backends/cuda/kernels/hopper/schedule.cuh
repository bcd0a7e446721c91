// Which tiles a block computes, in which order, and what there is to know of each. One thread works it out ahead of time and passes it to
// the copying warp and the computing warpgroups through slots in shared memory.
//
// Without a mask by positions the tiles of one head are neighbours, so that its K and V stay in L2. With one, tiles differ in length: the
// longest go first, and the heads of a section, few enough for L2, take turns. Blocks that walk over many tiles take them in reverse order at
// every other turn, so that who had one of the longer tiles gets one of the shorter.
#pragma once

#include "hopper/mask.cuh"
#include "hopper/pipeline.cuh"

namespace attnhub {

struct Work {
    int row;       // first query row of the tile in its sequence; -1: there is no more work
    int head, kv_head, sequence;
    int batch;              // index of the sequence in the tensors: 0 if packed
    int q_token, k_token;   // of the sequence's first row and key there
    int len_q;
    int len_k, offset, leftpad, prefix;  // see Mask
    int first_tile, last_tile;           // tiles of keys to walk through, [first, last)

    static constexpr int kBytes = 64;

    __device__ __forceinline__ bool has_keys() const { return first_tile < last_tile; }

    __device__ __forceinline__ void write(uint32 slot) const {
        const int words[16] = {row, head, kv_head, sequence, batch, q_token, k_token, len_q, len_k, offset, leftpad, prefix, first_tile, last_tile};
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            asm volatile("st.shared.v4.s32 [%0], {%1,%2,%3,%4};"
                         :: "r"(slot + 4 * i), "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]) : "memory");
        }
    }
    // The next tile, for a whole warp.
    static __device__ __forceinline__ Work take(const Ring<2>& ring, Cursor<2>& at, uint32 slots, int lane) {
        ring.full(at.stage).wait(at.parity);
        int words[16];
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            asm volatile("ld.shared.v4.s32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                         : "r"(slots + at.stage * kBytes + 4 * i) : "memory");
        }
#pragma unroll
        for (int i = 0; i < 14; ++i) words[i] = uniform(words[i]);
        __syncwarp();
        if (lane == 0) ring.empty(at.stage).arrive();
        at.advance();
        return {words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7], words[8], words[9], words[10], words[11],
                words[12], words[13]};
    }
};

// Tile number `index`. Tiles without rows may come up; `row >= len_q` tells.
template <class C>
static __device__ __forceinline__ Work place_tile(const Params& params, int index) {
    Work work;
    int tile;
    if (params.cu_seqlens_q == nullptr) {
        const int section_tiles = params.heads_per_section * params.q_tiles;
        const int section = index / section_tiles, inside = index - section * section_tiles;
        const int first_head = section * params.heads_per_section;
        const int section_heads = min(params.heads_per_section, params.sequences * params.q_heads - first_head);
        tile = inside / section_heads;
        const int pair = first_head + inside - tile * section_heads;
        if (params.longest_first) tile = params.q_tiles - 1 - tile;
        work.sequence = pair / params.q_heads;
        work.head = pair - work.sequence * params.q_heads;
        work.q_token = work.k_token = 0;
        work.len_q = params.seqlen_q;
        work.len_k = params.seqlen_k;
    } else {
        // Packed sequence b has the slots from cu[b] / rows + b on, enough for its tiles wherever it begins. The last sequence is what lies
        // behind all others: it has no keys.
        const int slot = index / params.q_heads;
        work.head = index - slot * params.q_heads;
        int low = 0, high = params.sequences + 1;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (params.cu_seqlens_q[middle] / C::kRows + middle <= slot) {
                low = middle;
            } else {
                high = middle;
            }
        }
        work.sequence = low;
        work.q_token = params.cu_seqlens_q[low];
        tile = slot - (work.q_token / C::kRows + low);
        work.len_q = params.seqlen_q - work.q_token;
        work.len_k = work.k_token = 0;
        if (low < params.sequences) {
            work.len_q = params.cu_seqlens_q[low + 1] - work.q_token;
            work.k_token = params.cu_seqlens_k[low];
            work.len_k = params.cu_seqlens_k[low + 1] - work.k_token;
        }
    }
    work.row = tile * C::kRows;
    work.kv_head = work.head / params.heads_per_kv_head;
    work.batch = params.cu_seqlens_q == nullptr ? work.sequence : 0;
    work.leftpad = work.prefix = 0;
    int stated = work.len_k;  // positions follow it even past the keys there are
    if (work.sequence < params.sequences) {
        if (params.seqused_k != nullptr) stated = params.seqused_k[work.sequence];
        if (params.leftpad != nullptr) work.leftpad = max(0, params.leftpad[work.sequence]);
        if (params.prefix != nullptr) work.prefix = params.prefix[work.sequence];
    }
    work.len_k = max(0, min(work.len_k, stated));
    work.offset = params.top_left ? 0 : stated - work.len_q;
    const typename C::Mask mask{work.len_k, work.offset, work.leftpad, work.prefix};
    const Span tiles = mask.template seen_tiles<C::kKeys>(params, work.row, max(1, min(C::kRows, work.len_q - work.row)));
    work.first_tile = tiles.first;
    work.last_tile = tiles.last;
    return work;
}

// Number of the tile at a block's turn, or a number too large.
static __device__ __forceinline__ int tile_of_turn(int turn, int block, int blocks) {
    return turn * blocks + (turn & 1 ? blocks - 1 - block : block);
}

}  // namespace attnhub
