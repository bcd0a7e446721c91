// Which tile of which head a block computes.
//
// Blocks start in the order of their index. Without a causal mask the tiles of one head are neighbours, so that its K and
// V stay in L2. With one, tiles differ in length, and the longest go first, so that no long tile is left for the end; the
// heads of a section, few enough for L2, take turns.
#pragma once

#include "portable/params.cuh"

namespace attnhub {

struct Work {
    int sequence, head, q_tile;

    static __device__ __forceinline__ Work of(const Params& params, int block, int heads) {
        const int section_blocks = params.heads_per_section * params.q_tiles;
        const int section = block / section_blocks, inside = block - section * section_blocks;
        const int first_head = section * params.heads_per_section;
        const int section_heads = min(params.heads_per_section, heads - first_head);
        const int tile = inside / section_heads;
        const int head = first_head + inside - tile * section_heads;
        return {head / params.q_heads, head % params.q_heads, params.longest_first ? params.q_tiles - 1 - tile : tile};
    }
};

}  // namespace attnhub
