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
// How many blocks ahead of the one whose keys are used the next copy is.
constexpr int kAhead = Config::kSlots / 2;
// Of a warp's entries of the block table, for as many blocks: those that are copied, and those whose entries are on their way.
constexpr int kTableBlocks = kAhead < 3 ? 4 : kAhead < 7 ? 8 : 16;
static_assert(kTableBlocks > kAhead + 1, "too few");
constexpr int kEntryBytes = 4 * Cache<Config::kPaging, Config::kAppends>::kEntries, kTableBytes = kTableBlocks * kEntryBytes;
constexpr int kTableAt = Config::kWarps * Config::kWarpBytes + Merge<Config>::kBytes;
static_assert(kTableAt + Config::kWarps * kTableBytes <= ATTNHUB_SHARED_BYTES, "the launch asks for ATTNHUB_SHARED_BYTES");

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
    int entries[kAhead];
    const auto ask = [&](int first) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int* entry = Keys::entry(params, sequence, first + turn + i * step, lane);
            entries[i] = entry != nullptr ? *entry : 0;
        }
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
    const int block = first_block + turn;  // this warp's first

    const auto cache = Keys::of(params, sequence, kv_head, some);
    const uint32 slots = shared_address(shared) + warp * C::kWarpBytes;
    const uint32 spare = slots + (C::kSlots - 1) * C::kSlotBytes;
    if constexpr (C::kAppends) {  // the last warps have the fewest keys
        const int number = row_tile * step + step - 1 - turn;
        append<C>(params, cache, sequence, slots, number, params.row_tiles.number * step, lane);
    }
    // The table's entries of block i (of this warp's) come together with the keys of block i - kAhead: a read of its own would wait for all copies
    // that were asked for before it.
    const uint32 table = shared_address(shared) + kTableAt + warp * kTableBytes;
    const auto entries_of = [&](int i) { return table + i % kTableBlocks * kEntryBytes; };
    if constexpr (C::kPaging != kContiguous) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (lane < Keys::kEntries) store_word(entries_of(i) + lane * 4, entries[i]);
        }
        __syncwarp();
    }
    // Copy c is of the keys (even c) or of the values (odd c) of block c / 2, and goes to slot c % kSlots.
    const auto copy = [&](bool values, int i, uint32 slot) {
        const int number = block + i * step;
        if (number >= stop) return;
        if (C::kPaging != kContiguous && !values && number + kAhead * step < stop) {
            const int* entry = Keys::entry(params, sequence, number + kAhead * step, lane);
            if (entry != nullptr) copy_word(entry, entries_of(i + kAhead) + lane * 4);
        }
        if constexpr (C::kDepth == C::kWidth) {
            cache.template start<Block<C::kDepth>>(params, values, number, entries_of(i), slot, lane);
        } else if (values) {
            cache.template start<Block<C::kWidth>>(params, true, number, entries_of(i), slot, lane);
        } else {
            cache.template start<Block<C::kDepth>>(params, false, number, entries_of(i), slot, lane);
        }
    };
#pragma unroll 1
    for (int c = 0; c < C::kSlots - 1; ++c) {
        copy(c % 2, c / 2, slots + c * C::kSlotBytes);
        if (c == 0) {  // the queries come with the first keys
#pragma unroll 1
            for (int at = lane; at < count * Block<C::kDepth>::kPieces; at += 32) {
                const int row = at / Block<C::kDepth>::kPieces, piece = at % Block<C::kDepth>::kPieces;
                const Element* start = Row::of(params, queries, kv_head, from + row).start(params, queries);
                copy_piece<Block<C::kDepth>>(start, start, spare, row, piece, true);
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
    // While copy c is used, copy c + kSlots - 1 is started: of a block kAhead behind, its values first if the number of slots is even. A group of copies is
    // committed where there is nothing to copy, too, so that the number of the pending ones is known.
    constexpr int kValuesFirst = C::kSlots % 2 == 0;
    uint32 slot = slots;
    const auto next = [&](bool values, int i) {
        wait_copies<C::kSlots - 2>();
        __syncwarp();  // all lanes' copies are here, and all are done with the slot before
        copy(values, i, slot == slots ? spare : slot - C::kSlotBytes);
        commit_copies();
        const uint32 found = slot;
        slot = slot == spare ? slots : slot + C::kSlotBytes;
        return found;
    };
#pragma unroll 1
    for (int i = 0; block + i * step < stop; ++i) {
        const int key = (block + i * step) * kBlock;
        const bool masked = key < all.first || key + kBlock > all.last;
        const uint32 k = next(kValuesFirst, i + kAhead - kValuesFirst);
        if constexpr (C::kRotary) {
            if (cache.has_new(block + i * step)) {
                turn_rows<C>(params, k, max(0, cache.old - key), min(kBlock, mask.len_k - key), [&](int row) { return key + row; }, lane);
                __syncwarp();
            }
        }
        rows.weigh(params, mask, key, k, masked, lane);
        const uint32 v = next(!kValuesFirst, i + kAhead);
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
