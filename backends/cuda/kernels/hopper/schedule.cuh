// Which tiles there are, in which order they are handed out, and what there is to know of each.
//
// Without a mask by positions the tiles of one head are neighbours, so that its K and V stay in L2. With one, tiles differ in length by up to
// their number. The heads of a section, few enough for L2, take turns, the longest tiles first. Long sequences, which are bound by the products,
// go in phases: the lower half of the rows of all heads, then half of what is left, and so on: short tiles, of which more heads fit, fill the gaps
// at the end. Short sequences have one phase: the memory is what bounds them, and each phase reads K and V again.
#pragma once

#include "hopper/mask.cuh"

namespace attnhub {

struct Work {
    int row;                // first query row of the tile in its sequence; -1: there is no more work
    int head, kv_head, sequence;
    int batch;              // index of the sequence in the tensors: 0 if packed
    int q_token, k_token;   // of the sequence's first row and key there
    int len_q;
    int len_k, offset, leftpad, prefix;  // see Mask
    int first_tile, last_tile;           // tiles of keys to walk through, [first, last)

    __device__ __forceinline__ bool has_keys() const { return first_tile < last_tile; }
};

struct Place {
    int pair, tile;  // pair: sequence * q_heads + head
};

// Tile number `index` of sequences that are not packed.
static __device__ __forceinline__ Place place_dense(const Params& params, int index) {
    if (params.phases == 0) return {index / params.q_tiles, index % params.q_tiles};
    const int pairs = params.sequences * params.q_heads;
    int top = params.q_tiles, bottom = 0, section = min(params.heads_per_section, pairs), inside = index;
    for (int left = params.phases; left > 1; --left) {
        bottom = top / 2;
        const int tiles = (top - bottom) * pairs;
        if (inside < tiles) break;
        inside -= tiles;
        top = bottom;
        bottom = 0;
        section = min(2 * section, pairs);
    }
    const int section_tiles = section * (top - bottom), part = inside / section_tiles, rest = inside - part * section_tiles;
    const int first = part * section, size = min(section, pairs - first), step = rest / size;
    return {first + rest - step * size, top - 1 - step};
}

// Tile number `index` of packed sequences. Sequence b has the slots from cu[b] / rows + b on, enough for its tiles wherever it begins. The last
// sequence is what lies behind all others.
template <int Rows>
static __device__ __forceinline__ Place place_packed(const Params& params, int index) {
    const int slot = index / params.q_heads;
    int low = 0, high = params.sequences + 1;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (params.cu_seqlens_q[middle] / Rows + middle <= slot) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return {low * params.q_heads + index - slot * params.q_heads, slot - (params.cu_seqlens_q[low] / Rows + low)};
}

// The work of a tile. Tiles without rows may come up: row >= len_q.
template <class C>
static __device__ __forceinline__ Work place_tile(const Params& params, int index) {
    const bool packed = params.cu_seqlens_q != nullptr;
    const Place place = packed ? place_packed<C::kRows>(params, index) : place_dense(params, index);
    Work work{place.tile * C::kRows};
    work.sequence = place.pair / params.q_heads;
    work.head = place.pair - work.sequence * params.q_heads;
    work.kv_head = work.head / params.heads_per_kv_head;
    work.len_q = params.seqlen_q;
    work.len_k = params.seqlen_k;
    const bool exists = work.sequence < params.sequences;
    if (packed) {
        work.q_token = params.cu_seqlens_q[work.sequence];
        work.len_q -= work.q_token;
        work.len_k = 0;
        if (exists) {
            work.len_q = params.cu_seqlens_q[work.sequence + 1] - work.q_token;
            work.k_token = params.cu_seqlens_k[work.sequence];
            work.len_k = params.cu_seqlens_k[work.sequence + 1] - work.k_token;
        }
    } else {
        work.batch = work.sequence;
    }
    int stated = work.len_k;  // positions follow it even past the keys there are
    if (exists) {
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

}  // namespace attnhub
