// Attention of a few queries over a long cache: the keys of each K/V head are divided among blocks (arXiv 2311.01282), and a block's among its
// warps. Query heads that share a K/V head are rows of one tile, so that keys and values are read once for all of them.
//
// A warp copies blocks of 16 keys and values through stages of its own (cp.async), ahead of what it computes, and meets the other warps only at
// the end. Out, maxima and sums stay in its registers until then.
//
// Compiled once per variant (decode.py), which defines ATTNHUB_*: see Config.

#include "decode/merge.cuh"

namespace attnhub {

struct Config {
    using Type = ATTNHUB_TYPE;
    static constexpr int kDepth = ATTNHUB_HEAD_DIM, kWidth = ATTNHUB_V_HEAD_DIM;
    static constexpr int kWarps = ATTNHUB_WARPS, kStages = ATTNHUB_STAGES;
    static constexpr int kPaging = ATTNHUB_PAGING;  // see Pages
    static constexpr int kMostSplits = ATTNHUB_MOST_SPLITS;
    static constexpr bool kAppends = ATTNHUB_APPEND > 0, kRotary = ATTNHUB_APPEND > 1;
    static constexpr bool kSoftcap = ATTNHUB_SOFTCAP, kAlibi = ATTNHUB_ALIBI;
    static constexpr bool kRawScores = !kSoftcap && !kAlibi;  // the scale is then applied inside the exponent
    static constexpr int kStageBytes = Block<kDepth>::kBytes + Block<kWidth>::kBytes, kWarpBytes = kStages * kStageBytes;
};
static_assert(Config::kWarps * Config::kWarpBytes + Merge<Config>::kBytes <= ATTNHUB_SHARED_BYTES, "the launch asks for ATTNHUB_SHARED_BYTES");

static __device__ __forceinline__ void attend(const Params& params, unsigned char* shared) {
    using C = Config;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_tile = blockIdx.x % params.row_tiles, rest = blockIdx.x / params.row_tiles;
    const int split = rest % params.splits, pair = rest / params.splits;
    const int sequence = pair / params.kv_heads, kv_head = pair % params.kv_heads;
    if (sequence == params.sequences) {  // of packed queries: what lies behind all others
        if (split == 0) clear_tail<C>(params, kv_head, row_tile);
        return;
    }
    const Queries queries = Queries::of(params, sequence);
    const int count = min(16, params.heads_per_kv_head * queries.count - row_tile * 16);
    if (count <= 0) return;

    if constexpr (C::kAppends) {
        if (!fits<C>(params, params.seqused_k[sequence], queries.count)) return;
    }

    // Splits, and their warps, take blocks in turn, so that the first pages of each can be asked for before a length is known.
    using Keys = Cache<C::kPaging, C::kAppends>;
    const int turn = split * C::kWarps + warp, step = params.splits * C::kWarps;
    const auto ask = [&](int (&pages)[C::kStages], int first) {
#pragma unroll
        for (int i = 0; i < C::kStages; ++i) pages[i] = Keys::look_up(params, sequence, first + turn + i * step, lane);
    };
    int pages[C::kStages];
    ask(pages, 0);

    const Mask mask = Mask::of(params, sequence, queries.count);
    // The first and the last query of the tile, which may go on from one head to the next.
    const int from = row_tile * 16, to = from + count - 1;
    const bool one_head = from / queries.count == to / queries.count;
    const Span first = mask.keys(params, one_head ? from % queries.count : 0), last = mask.keys(params, one_head ? to % queries.count : queries.count - 1);
    const Span some{first.first, last.last}, all{last.first, first.last};
    const int first_block = some.first / kBlock, stop = some.first < some.last ? (some.last + kBlock - 1) / kBlock : 0;
    if (first_block > 0) ask(pages, first_block);
    int block = first_block + turn;

    const auto cache = Keys::of(params, sequence, kv_head, some);
    const uint32 stages = shared_address(shared) + warp * C::kWarpBytes;
    const uint32 spare = stages + (C::kStages - 1) * C::kStageBytes;  // filled by the loop only
    if constexpr (C::kAppends) {  // the last warps have the fewest keys
        const int number = row_tile * step + step - 1 - turn;
        append<C>(params, cache, spare, number, params.row_tiles * step, lane);
    }
    if constexpr (C::kRotary) {
        Block<C::kDepth>::for_each_piece(lane, [&](int row, int piece) {
            const Row own = Row::of(params, queries, kv_head, from + row);
            copy_piece<Block<C::kDepth>>(own.start(params, queries), params.q, spare, row, piece, own.exists);
        });
        commit_copies();
    }
    const auto copy = [&](int ahead, int page, int stage) {
        const uint32 k = stages + stage * C::kStageBytes;
        if (ahead < stop) cache.template start<Block<C::kDepth>, Block<C::kWidth>>(params, ahead, page, k, k + Block<C::kDepth>::kBytes, lane);
        commit_copies();  // an empty group too, so that the number of the pending ones is known
    };
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) copy(block + i * step, pages[i], i);
    int ahead = block + (C::kStages - 1) * step, page = pages[C::kStages - 1];

    if constexpr (C::kRotary) {
        wait_copies<C::kStages - 1>();
        __syncwarp();
        const auto position = [&](int row) { return cache.old + (params.one_position ? 0 : Row::of(params, queries, kv_head, from + row).query); };
        turn_rows<C>(params, spare, 0, count, position, lane);
        __syncwarp();
    }
    Rows<C> rows(params, mask, queries, sequence, kv_head, row_tile, spare, lane);
    int stage = 0;
#pragma unroll 1
    for (; block < stop; block += step) {
        wait_copies<C::kStages - 2>();
        __syncwarp();  // all lanes' copies are here, and all are done with the stage before
        copy(ahead, page, stage == 0 ? C::kStages - 1 : stage - 1);
        ahead += step;
        page = Keys::look_up(params, sequence, ahead, lane);
        const int key = block * kBlock;
        const bool masked = key < all.first || key + kBlock > all.last;
        const uint32 k = stages + stage * C::kStageBytes;
        if constexpr (C::kRotary) {
            if (cache.has_new(block)) {
                turn_rows<C>(params, k, max(0, cache.old - key), min(kBlock, mask.len_k - key), [&](int row) { return key + row; }, lane);
                __syncwarp();
            }
        }
        rows.attend(params, mask, key, k, k + Block<C::kDepth>::kBytes, masked, masked && queries.count > 1, lane);
        stage = stage + 1 == C::kStages ? 0 : stage + 1;
    }
    wait_copies<0>();
    __syncwarp();

    Merge<C> merge(shared);
    const float scale = C::kRawScores ? params.scale_log2 : 1.f;
    merge.leave(rows, count, warp, lane);
    __syncthreads();
    const int tile = pair * params.row_tiles + row_tile;
    const auto partial = Partial<Merge<C>::kColumns>::of(params, tile);
    for (int at = threadIdx.x; at < count * Merge<C>::kGroups; at += 32 * C::kWarps) {
        const int row = at / Merge<C>::kGroups, group = at % Merge<C>::kGroups;
        float4 sums;
        const Part part = merge.take(row, group, scale, sums);
        if (params.splits == 1) {
            write_row<C>(params, queries, Row::of(params, queries, kv_head, row_tile * 16 + row), group, part, sums, scale);
        } else {
            reinterpret_cast<float4*>(partial.sums + (split * 16 + row) * Merge<C>::kColumns)[group] = sums;
            if (group == 0) partial.parts[split * 16 + row] = part;
        }
    }
    if (params.splits == 1 || !merge.comes_last(params, tile)) return;
    for (int row = warp; row < count; row += C::kWarps) {
        merge.merge_splits(params, partial, queries, Row::of(params, queries, kv_head, row_tile * 16 + row), row, scale, warp, lane);
    }
}

}  // namespace attnhub

extern "C" __global__ void __launch_bounds__(32 * attnhub::Config::kWarps, 1) attnhub_forward(const __grid_constant__ attnhub::Params params) {
    extern __shared__ __align__(128) unsigned char shared[];
    attnhub::attend(params, shared);
}
