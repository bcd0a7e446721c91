// Attention forward for compute capability 9.0 (sm_90a): FlashAttention-3's division of labour (arXiv 2407.08608), in plain CUDA.
//
// One block per multiprocessor works through tiles of 64 query rows per computing warpgroup. Its first warpgroup gives its registers away:
// one thread hands out tiles, one copies Q, K and V through rings of stages (TMA). In a computing warpgroup the scores of the next tile of keys and the
// product of the last weights with V run together, and the softmax runs under the latter; scores, weights and out never leave the
// registers. Keys are walked from the last tile to the first, so that a causal tile meets its masked tiles at the start.
//
// Compiled once per variant (hopper.py), which defines ATTNHUB_*: see Config.

#include "hopper/epilogue.cuh"

namespace attnhub {

struct Config {
    using Type = ATTNHUB_TYPE;
    static constexpr int kDepth = ATTNHUB_HEAD_DIM, kColumns = ATTNHUB_V_HEAD_DIM;  // as the tiles hold them
    static constexpr int kConsumers = ATTNHUB_CONSUMERS, kRows = 64 * kConsumers;
    static constexpr int kKeys = ATTNHUB_KEYS, kStages = ATTNHUB_STAGES;
    static constexpr bool kKeepQuery = ATTNHUB_KEEP_QUERY;      // Q in registers
    static constexpr bool kOutDirect = ATTNHUB_OUT_DIRECT;      // out leaves from the registers; else through shared memory, by the copy engine
    static constexpr bool kTakeTurns = ATTNHUB_TAKE_TURNS;      // warpgroups start their products one after the other
    static constexpr bool kLeft = ATTNHUB_LEFT, kRight = ATTNHUB_RIGHT;  // a mask may cut there, beside the keys' end
    static constexpr bool kHalves = kRight && kKeys % 16 == 0;  // half a tile of keys is a tile, too
    static constexpr bool kHides = ATTNHUB_HIDES;               // pairs may be masked out whose key and value are in memory
    static constexpr bool kSoftcap = ATTNHUB_SOFTCAP, kAlibi = ATTNHUB_ALIBI;
    static constexpr bool kRawScores = !kSoftcap && !kAlibi;    // the scale is then applied inside the exponent
    using Mask = attnhub::Mask<kLeft, kRight>;
};

// Shared memory of a block, in this order.
struct Layout {
    using C = Config;
    using QTile = Tile<64, C::kDepth>;
    using OutTile = Tile<64, C::kColumns>;
    using KTile = Tile<C::kKeys, C::kDepth>;
    using VTile = Tile<C::kKeys, C::kColumns>;
    static constexpr uint32 kQ = 0;
    static constexpr uint32 kOut = C::kConsumers * QTile::kBytes;
    static constexpr uint32 kK = kOut + (C::kOutDirect ? 0 : C::kConsumers * OutTile::kBytes);
    static constexpr uint32 kV = kK + C::kStages * KTile::kBytes;
    static constexpr uint32 kBarriers = kV + C::kStages * VTile::kBytes;

    uint32 q, out, k, v;
    Ring<C::kConsumers> q_ring;  // a "stage" for each warpgroup's rows
    Ring<C::kStages> k_ring, v_ring;
    Slot slot;

    explicit __device__ __forceinline__ Layout(uint32 base)
        : q(base + kQ), out(base + kOut), k(base + kK), v(base + kV), q_ring{base + kBarriers + Slot::kBytes},
          k_ring{q_ring.address + q_ring.kBytes}, v_ring{k_ring.address + k_ring.kBytes},
          slot{base + kBarriers, {v_ring.address + v_ring.kBytes}} {}

    static constexpr uint32 kBytes = kBarriers + Slot::kBytes + Ring<C::kConsumers>::kBytes + 2 * Ring<C::kStages>::kBytes + Ring<1>::kBytes;
};
static_assert(Layout::kBytes <= ATTNHUB_SHARED_BYTES, "the launch asks for ATTNHUB_SHARED_BYTES");

template <bool V> struct Bool { static constexpr bool value = V; };

// One thread: hands out the block's tiles.
static __device__ __forceinline__ void schedule(const Params& params, const Slot& slot) {
    auto at = Cursor<1>::producer();
    int index = blockIdx.x;
    while (index < params.tile_total) {
        const Work work = place_tile<Config>(params, index);
        if (work.row < work.len_q) slot.publish(at, work);
        if (params.counters == nullptr) {
            index += gridDim.x;
        } else {
            slot.ring.empty(0).wait(at.parity);  // asked for as late as possible, a tile goes to the block that is first
            index = atomicAdd(params.counters, 1) + gridDim.x;
        }
    }
    slot.publish(at, {-1});
    if (params.counters != nullptr) {
        __threadfence();
        if (atomicAdd(params.counters + 1, 1) == gridDim.x - 1) {  // the last block leaves zeros for the next launch
            params.counters[0] = 0;
            params.counters[1] = 0;
        }
    }
}

// One warp, of which a lane does it: tiles of Q, K and V into shared memory, as far ahead as there is room.
static __device__ __forceinline__ void copy(const Params& params, const Layout& shared, int lane) {
    using C = Config;
    auto slot_at = Cursor<1>::consumer();
    auto k_at = Cursor<C::kStages>::producer(), v_at = k_at;
    uint32 q_parity = 1;
    const auto start = [&](auto tile_type, uint32 tile, const TensorMap* map, Barrier full, Barrier empty, uint32 parity, int token, int head, int batch) {
        using T = decltype(tile_type);
        empty.wait(parity);
        if (lane == 0) {
            full.expect(T::kBytes);
            T::load(tile, map, full, token, head, batch);
        }
        __syncwarp();
    };
    while (true) {
        const Work work = shared.slot.read(slot_at);
        if (work.row < 0) break;
        if (!work.has_keys()) {
            shared.slot.release(lane);
            continue;
        }

        const int q_head = params.q_steps & 1 ? work.head : 0, q_batch = params.q_steps & 2 ? work.batch : 0;
        const int k_head = params.k_steps & 1 ? work.kv_head : 0, k_batch = params.k_steps & 2 ? work.batch : 0;
        const int v_head = params.v_steps & 1 ? work.kv_head : 0, v_batch = params.v_steps & 2 ? work.batch : 0;
#pragma unroll
        for (int group = 0; group < C::kConsumers; ++group) {
            start(Layout::QTile{}, shared.q + group * Layout::QTile::kBytes, &params.q_map, shared.q_ring.full(group), shared.q_ring.empty(group),
                  q_parity, work.q_token + work.row + group * 64, q_head, q_batch);
        }
        q_parity ^= 1;
        // The keys of a step are needed before the values of the one before.
        for (int tile = work.last_tile - 1; tile >= work.first_tile - 1; --tile) {
            // The next tile is asked for when little of this one is left to copy.
            if (tile == work.first_tile) shared.slot.release(lane);
            if (tile >= work.first_tile) {
                start(Layout::KTile{}, shared.k + k_at.stage * Layout::KTile::kBytes, &params.k_map, shared.k_ring.full(k_at.stage),
                      shared.k_ring.empty(k_at.stage), k_at.parity, work.k_token + tile * C::kKeys, k_head, k_batch);
                k_at.advance();
            }
            if (tile < work.last_tile - 1) {
                start(Layout::VTile{}, shared.v + v_at.stage * Layout::VTile::kBytes, &params.v_map, shared.v_ring.full(v_at.stage),
                      shared.v_ring.empty(v_at.stage), v_at.parity, work.k_token + (tile + 1) * C::kKeys, v_head, v_batch);
                v_at.advance();
            }
        }
    }
}

// A tile, and what a lane's rows and its warpgroup's see there. Made while the tile before is still at work.
struct Task {
    using C = Config;
    Work work;
    Span spans[2];  // of the lane's rows, 8 apart
    Span full;      // tiles of keys that all rows of the warpgroup see whole
    int end;        // of the keys that some of them see
    float slope;    // ALiBi, in units of log2

    // group_row: first row of the warpgroup in the tile, lane_row: of the lane.
    __device__ __forceinline__ void see(const Params& params, int group_row, int lane_row) {
        const C::Mask mask{work.len_k, work.offset, work.leftpad, work.prefix};
        spans[0] = mask.keys(params, work.row + lane_row);
        spans[1] = mask.keys(params, work.row + lane_row + 8);
        const int last = min(work.row + group_row + 63, work.len_q - 1), first = min(work.row + group_row, last);
        full = mask.template full_tiles<C::kKeys>(params, first, last - first + 1);
        end = mask.keys(params, last).last;
        slope = 0.f;
        if constexpr (C::kAlibi) {
            if (work.row >= 0) slope = params.alibi[work.sequence * params.alibi_batch_stride + work.head] * kLog2e;
        }
    }
};

// A computing warpgroup: 64 rows of every tile.
static __device__ __forceinline__ void compute(const Params& params, const Layout& shared, int group) {
    using C = Config;
    using L = Layout;
    const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31;
    const int own_row = group * 64 + warp * 16 + (lane >> 2), own_column = 2 * (lane & 3);
    const int own_turn = kTurnBarrier + group, next_turn = kTurnBarrier + (group + 1 == C::kConsumers ? 0 : group + 1);
    const uint32 q_tile = shared.q + group * L::QTile::kBytes;
    const uint32 out_tile = shared.out + group * L::OutTile::kBytes;  // if not kOutDirect
    const uint64 q_desc = describe_tile(q_tile, 16), k_desc = describe_tile(shared.k, 16), v_desc = describe_tile(shared.v, L::VTile::kChunkBytes);
    const float scale = C::kRawScores ? params.scale_log2 : 1.f;

    auto slot_at = Cursor<1>::consumer();
    auto k_at = Cursor<C::kStages>::consumer(), v_at = k_at;
    uint32 q_parity = 0;
    if (C::kTakeTurns && group == C::kConsumers - 1) barrier_arrive(kTurnBarrier, 256);

    const auto next = [&] {
        Task task;
        task.work = shared.slot.read(slot_at);
        shared.slot.release(lane);
        task.see(params, group * 64, own_row);
        return task;
    };
    Task task = next();
    while (task.work.row >= 0) {
        const Work& work = task.work;
        const Span(&spans)[2] = task.spans;
        const Span full = task.full;
        const int row = work.row + own_row, group_row = work.row + group * 64;
        if (!work.has_keys()) {
            if (group_row < work.len_q) write_empty<L::OutTile>(params, work, group_row, thread);
            task = next();
            continue;
        }

        float scores[C::kKeys / 2], out[C::kColumns / 2];
        uint32 weights[C::kKeys / 4], q[C::kDepth / 4];  // q: if kKeepQuery
        RowState rows;

        shared.q_ring.full(group).wait(q_parity);
        q_parity ^= 1;
        if constexpr (C::kKeepQuery) {
            load_rows<L::QTile, C::kDepth>(q, q_tile, warp, lane);
            __syncwarp();
            shared.q_ring.empty(group).arrive_once(lane);
        }
        // Of the first keys of the tile, as many as there are scores.
        const auto start_scores = [&](auto& scores) {
            constexpr int kKeys = 2 * sizeof(scores) / sizeof(float);
            const uint64 k = k_desc + k_at.stage * (L::KTile::kBytes / 16);
            fence_products();
            if constexpr (C::kKeepQuery) {
                multiply_keys<L::KTile, C::kDepth, kKeys>(scores, q, k);
            } else {
                multiply_keys<L::QTile, L::KTile, C::kDepth, kKeys>(scores, C::kDepth > 64 ? uniform_here(q_desc) : q_desc, k);
            }
            commit_products();
        };
        const auto start_out = [&] {
            fence_products();
            multiply_values<L::VTile, C::kKeys, C::kColumns>(out, weights, v_desc + v_at.stage * (L::VTile::kBytes / 16));
            commit_products();
        };
        const auto release_keys = [&] {
            shared.k_ring.empty(k_at.stage).arrive_once(lane);
            k_at.advance();
        };
        const auto release_values = [&] {
            shared.v_ring.empty(v_at.stage).arrive_once(lane);
            v_at.advance();
        };
        int tile = work.last_tile - 1;
        const auto adjust = [&](auto& scores, auto masked) {
            const int key = tile * C::kKeys + own_column;
            adjust_scores<C>(scores, params, task.slope, row + work.offset - key);
            if constexpr (decltype(masked)::value) hide_scores<C::kLeft>(scores, spans, key);
        };

        // The last tile of keys, which alone can reach past their end.
        shared.k_ring.full(k_at.stage).wait(k_at.parity);
        if (C::kHalves && task.end <= tile * C::kKeys + C::kKeys / 2) {
            // None of the warpgroup's rows sees more than half of it, as above a diagonal.
            float half[C::kKeys / 4];
            start_scores(half);
            wait_products<0>();
            hold(half);
            release_keys();
            adjust(half, Bool<true>{});
            softmax_step<true, true, false>(half, rows, scale);
            uint32 words[C::kKeys / 8];
            to_weights<C::Type>(words, half);
#pragma unroll
            for (int i = 0; i < C::kKeys / 4; ++i) weights[i] = i < C::kKeys / 8 ? words[i % (C::kKeys / 8)] : 0;
        } else {
            start_scores(scores);
            wait_products<0>();
            hold(scores);
            release_keys();
            // Where a mask cuts on the right, this tile is one that it cuts, as a rule: one code for both is faster.
            if (C::kRight || tile < full.first || tile >= full.last) {
                adjust(scores, Bool<true>{});
                softmax_step<true, true, false>(scores, rows, scale);
            } else {
                adjust(scores, Bool<false>{});
                softmax_step<false, true, false>(scores, rows, scale);
            }
            to_weights<C::Type>(weights, scores);
        }
#pragma unroll
        for (int i = 0; i < C::kColumns / 2; ++i) out[i] = 0.f;
        --tile;

        const auto step = [&](auto masked) {
            shared.k_ring.full(k_at.stage).wait(k_at.parity);
            if constexpr (C::kTakeTurns) barrier_sync(own_turn, 256);
            hold(weights);
            hold(out);
            start_scores(scores);
            shared.v_ring.full(v_at.stage).wait(v_at.parity);
            start_out();
            if constexpr (C::kTakeTurns) barrier_arrive(next_turn, 256);
            wait_products<1>();
            hold(scores);
            release_keys();
            adjust(scores, masked);
            const bool changed = softmax_step<decltype(masked)::value, false, false>(scores, rows, scale);
            wait_products<0>();
            hold(out);
            hold(scores);
            release_values();
            to_weights<C::Type>(weights, scores);
            if (changed) shrink_rows(out, rows);
        };
        if constexpr (C::kRight) {
#pragma unroll 1
            for (const int stop = max(full.last, work.first_tile); tile >= stop; --tile) step(Bool<true>{});
        }
#pragma unroll 1
        for (const int stop = C::kLeft ? max(full.first, work.first_tile) : work.first_tile; tile >= stop; --tile) step(Bool<false>{});
        if constexpr (C::kLeft) {
#pragma unroll 1
            for (; tile >= work.first_tile; --tile) step(Bool<true>{});
        }
        if constexpr (!C::kKeepQuery) shared.q_ring.empty(group).arrive_once(lane);
        shared.v_ring.full(v_at.stage).wait(v_at.parity);
        hold(weights);
        hold(out);
        start_out();
        // Under the last product: what follows, and all of the end that does not need out.
        const Task following = next();
        if constexpr (!C::kOutDirect) {
            if (thread == 0) wait_stores_read();
            __syncwarp();
            barrier_sync(kWarpgroupBarrier + group, 128);
        }
        float factors[2];
        finish_rows(factors, rows, params, work, row, scale, lane);
        wait_products<0>();
        hold(out);
        release_values();

        uint32 words[C::kColumns / 4];
        to_words<C::Type>(words, out, factors);
        bool again = false;
        if constexpr (C::kRawScores) again = rows.extreme > kExtreme;  // else the scale is 1, which rounds nothing
        if constexpr (C::kHides) again = again || any_nonfinite<C::Type>(words, row, work.len_q);
        if (uniform(again) != 0) {
            write_carefully<C, L::OutTile>(params, work, own_row, scale, out_tile);
        } else if constexpr (C::kOutDirect) {
            write_direct(params, work, words, row, lane);
        } else {
            write_tile<L::OutTile>(out_tile, words, warp, lane);
        }
        if constexpr (C::kOutDirect) {
            // Of no use but to the compiler, which then knows that the warps go on together: descriptors stay in uniform registers.
            barrier_sync(kWarpgroupBarrier + group, 128);
        } else {
            publish_to_engine();
            barrier_sync(kWarpgroupBarrier + group, 128);
            send_tile<L::OutTile>(params, work, group_row, out_tile, thread);
        }
        task = following;
    }
    if (thread == 0) wait_stores();
}

}  // namespace attnhub

extern "C" __global__ void __launch_bounds__(128 * (attnhub::Config::kConsumers + 1), 1)
attnhub_forward(const __grid_constant__ attnhub::Params params) {
    using namespace attnhub;
    using C = Config;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Layout shared(shared_address(memory));
    if (threadIdx.x == 0) {
        shared.q_ring.init(1, 4);
        shared.k_ring.init(1, 4 * C::kConsumers);
        shared.v_ring.init(1, 4 * C::kConsumers);
        shared.slot.ring.init(1, 4 * C::kConsumers + 1);
        publish_barriers();
    }
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
    if (warpgroup == 0) {
        fewer_registers<ATTNHUB_PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
        if (warp == 0) {
            copy(params, shared, threadIdx.x);
        } else if (threadIdx.x == 32) {
            schedule(params, shared.slot);
        }
    } else {
        more_registers<ATTNHUB_CONSUMER_REGISTERS>();
        compute(params, shared, warpgroup - 1);
    }
}
