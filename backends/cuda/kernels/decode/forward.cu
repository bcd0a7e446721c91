// Attention of a few queries over a long cache: the keys of each K/V head are divided among blocks (arXiv 2311.01282), and a block's among its
// warps. Query heads that share a K/V head are rows of one tile, so that keys and values are read once for all of them.
//
// A warp copies blocks of 16 keys and values through slots of its own (cp.async), ahead of what it computes, and meets the other warps only at
// the end. Out, maxima and sums stay in its registers until then.
//
// Compiled once per variant (decode.py), which defines ATTNHUB_*: see Config.

#include "decode/merge.cuh"

namespace attnhub {

struct Config {
    using Type = ATTNHUB_TYPE;
    static constexpr int kDepth = ATTNHUB_HEAD_DIM, kWidth = ATTNHUB_V_HEAD_DIM;
    static constexpr int kWarps = ATTNHUB_WARPS, kSlots = ATTNHUB_SLOTS;
    static constexpr int kPaging = ATTNHUB_PAGING;  // see Pages
    static constexpr int kMostSplits = ATTNHUB_MOST_SPLITS;
    static constexpr bool kAppends = ATTNHUB_APPEND > 0, kRotary = ATTNHUB_APPEND > 1;
    static constexpr bool kSoftcap = ATTNHUB_SOFTCAP, kAlibi = ATTNHUB_ALIBI;
    static constexpr bool kRawScores = !kSoftcap && !kAlibi;  // the scale is then applied inside the exponent
    // A warp's keys and values take turns in its slots. Appending needs room for both, and one slot is filled by the loop only.
    static constexpr int kSlotBytes = Block<(kDepth > kWidth ? kDepth : kWidth)>::kBytes, kWarpBytes = kSlots * kSlotBytes;
    static_assert(kSlots >= (kAppends ? 3 : 2), "too few slots");
};
static_assert(Config::kWarps * Config::kWarpBytes + Merge<Config>::kBytes <= ATTNHUB_SHARED_BYTES, "the launch asks for ATTNHUB_SHARED_BYTES");

// How many blocks ahead of the one whose keys are used the next copy is.
constexpr int kAhead = Config::kSlots / 2;

static __device__ __forceinline__ void attend(const Params& params, unsigned char* shared) {
    using C = Config;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int row_tile = blockIdx.x;
    int split = params.row_tiles.divide(row_tile);
    const int pair = params.splits.divide(split);
    int kv_head = pair;
    const int sequence = params.kv_heads.divide(kv_head);
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
    const int turn = split * C::kWarps + warp, step = params.splits.number * C::kWarps;
    int pages[kAhead + 2];  // of the next blocks
    const auto ask = [&](int first) {
#pragma unroll
        for (int i = 0; i < kAhead + 2; ++i) pages[i] = Keys::look_up(params, sequence, first + turn + i * step, lane);
    };
    ask(0);

    const Mask mask = Mask::of(params, sequence, queries.count);
    // The first and the last query of the tile, which may go on from one head to the next.
    const int from = row_tile * 16, to = from + count - 1;
    const int first_head = queries.count == 1 ? from : from / queries.count, last_head = queries.count == 1 ? to : to / queries.count;
    const bool one_head = first_head == last_head;
    const Span first = mask.keys(params, one_head ? from - first_head * queries.count : 0);
    const Span last = queries.count == 1 ? first : mask.keys(params, one_head ? to - last_head * queries.count : queries.count - 1);
    const Span some{first.first, last.last}, all{last.first, first.last};
    const int first_block = some.first / kBlock, stop = some.first < some.last ? (some.last + kBlock - 1) / kBlock : 0;
    if (first_block > 0) ask(first_block);
    int block = first_block + turn;

    const auto cache = Keys::of(params, sequence, kv_head, some);
    const uint32 slots = shared_address(shared) + warp * C::kWarpBytes;
    const uint32 spare = slots + (C::kSlots - 1) * C::kSlotBytes;
    if constexpr (C::kAppends) {  // the last warps have the fewest keys
        const int number = row_tile * step + step - 1 - turn;
        append<C>(params, cache, sequence, slots, number, params.row_tiles.number * step, lane);
    }
    // Copy c is of the keys (even c) or of the values (odd c) of this warp's block c / 2, and goes to slot c % kSlots. A group of copies is committed
    // where there is nothing to copy, too, so that the number of the pending ones is known.
    const auto copy = [&](bool values, int block, int page, uint32 slot) {
        if (block < stop) {
            if constexpr (C::kDepth == C::kWidth) {
                cache.template start<Block<C::kDepth>>(params, values, block, page, slot, lane);
            } else if (values) {
                cache.template start<Block<C::kWidth>>(params, true, block, page, slot, lane);
            } else {
                cache.template start<Block<C::kDepth>>(params, false, block, page, slot, lane);
            }
        }
    };
#pragma unroll 1
    for (int c = 0; c < C::kSlots - 1; ++c) {
        int page = pages[0];
#pragma unroll
        for (int i = 1; i <= (C::kSlots - 2) / 2; ++i) page = c / 2 == i ? pages[i] : page;
        copy(c % 2, block + c / 2 * step, page, slots + c * C::kSlotBytes);
        if (c == 0) {  // the queries come with the first keys
#pragma unroll 1
            for (int at = lane; at < count * Block<C::kDepth>::kPieces; at += 32) {
                const int row = at / Block<C::kDepth>::kPieces, piece = at % Block<C::kDepth>::kPieces;
                const Element* start = Row::of(params, queries, kv_head, from + row).start(params, queries);
                copy_piece<Block<C::kDepth>>(start, start, spare, row, piece, true, cache.policy);
            }
        }
        commit_copies();
    }
    wait_copies<C::kSlots - 2>();
    __syncwarp();
    if constexpr (C::kRotary) {
        const auto position = [&](int row) { return cache.old + (params.one_position ? 0 : Row::of(params, queries, kv_head, from + row).query); };
        turn_rows<C>(params, spare, 0, count, position, lane);
        __syncwarp();
    }
    Rows<C> rows(params, mask, queries, sequence, kv_head, row_tile, spare, lane);
    // While copy c is used, copy c + kSlots - 1 is started: of the block that is kAhead ahead, its values first if the number of slots is even.
    constexpr bool kValuesFirst = C::kSlots % 2 == 0;
    int page = pages[kAhead - kValuesFirst], next_page = pages[kAhead], later_page = pages[kAhead + 1];
    uint32 slot = slots;
    const auto next = [&](bool values, int block, int page) {
        wait_copies<C::kSlots - 2>();
        __syncwarp();  // all lanes' copies are here, and all are done with the slot before
        copy(values, block, page, slot == slots ? spare : slot - C::kSlotBytes);
        commit_copies();
        const uint32 found = slot;
        slot = slot == spare ? slots : slot + C::kSlotBytes;
        return found;
    };
#pragma unroll 1
    for (; block < stop; block += step) {
        const int key = block * kBlock, ahead = block + kAhead * step;
        const bool masked = key < all.first || key + kBlock > all.last;
        const int found_page = Keys::look_up(params, sequence, ahead + 2 * step, lane);  // this block's work must not wait for it, nor the next one's
        const uint32 k = kValuesFirst ? next(true, ahead - step, page) : next(false, ahead, next_page);
        if constexpr (C::kRotary) {
            if (cache.has_new(block)) {
                turn_rows<C>(params, k, max(0, cache.old - key), min(kBlock, mask.len_k - key), [&](int row) { return key + row; }, lane);
                __syncwarp();
            }
        }
        rows.weigh(params, mask, key, k, masked, lane);
        const uint32 v = kValuesFirst ? next(false, ahead, next_page) : next(true, ahead, next_page);
        page = next_page;
        next_page = later_page;
        later_page = found_page;
        rows.add_values(key, v, masked && queries.count > 1, lane);
    }
    wait_copies<0>();
    __syncwarp();

    Merge<C> merge(shared);
    merge.leave(rows, count, warp, lane);
    __syncthreads();
    merge.finish(params, queries, kv_head, row_tile, pair * params.row_tiles.number + row_tile, split, count, C::kRawScores ? params.scale_log2 : 1.f, warp, lane);
}

}  // namespace attnhub

extern "C" __global__ void __launch_bounds__(32 * attnhub::Config::kWarps, 1) attnhub_forward(const __grid_constant__ attnhub::Params params) {
    extern __shared__ __align__(128) unsigned char shared[];
    attnhub::attend(params, shared);
}
