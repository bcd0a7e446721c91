// Attention forward on mma.sync: one block per tile of query rows, walking over tiles of keys from the last to the first with an online softmax
// in registers (FlashAttention-2, arXiv 2307.08691).
//
// With one stage, a tile of K and one of V are in shared memory: K of the next step is loaded under softmax and P V, V under Q K^T. With two stages
// both are loaded a step ahead, and a step has one barrier.
//
// Masks cost only in the tiles that they cut; tiles that they hide are never loaded. What goes wrong rarely is found at the end, and done again.
//
// Compiled once per variant (variant.py), which defines: ATTNHUB_TURING, ATTNHUB_TYPE, ATTNHUB_HEAD_DIM, ATTNHUB_V_HEAD_DIM, ATTNHUB_WARPS,
// ATTNHUB_PAIRS, ATTNHUB_ROW_TILES, ATTNHUB_KEYS, ATTNHUB_STAGES, ATTNHUB_KEPT, ATTNHUB_SOFTCAP, ATTNHUB_ALIBI.

#include "portable/epilogue.cuh"
#include "portable/schedule.cuh"

namespace attnhub {

using Type = ATTNHUB_TYPE;
constexpr int kRows = ATTNHUB_ROW_TILES * 16 * ATTNHUB_WARPS / (ATTNHUB_PAIRS ? 2 : 1);
constexpr int kKeys = ATTNHUB_KEYS;
constexpr int kStages = ATTNHUB_STAGES;
static_assert(kStages == 1 || (kStages == 2 && !ATTNHUB_TURING), "a tile on its way through registers has no stages");
constexpr bool kRawScores = !ATTNHUB_SOFTCAP && !ATTNHUB_ALIBI;  // the scale is then applied inside the exponent

using QTile = Tile<kRows, ATTNHUB_HEAD_DIM>;
using KTile = Tile<kKeys, ATTNHUB_HEAD_DIM>;
using VTile = Tile<kKeys, ATTNHUB_V_HEAD_DIM>;
using OutTile = Tile<kRows, ATTNHUB_V_HEAD_DIM>;
using Exchange = PairExchange<kRows, kKeys>;

// All of the block have come to one of these. Anywhere: unlike with __syncthreads it may be another one for each warp.
template <bool Anywhere>
static __device__ __forceinline__ void meet() {
    if constexpr (Anywhere) {
        asm volatile("barrier.sync 0;" ::: "memory");
    } else {
        __syncthreads();
    }
}

// Tokens behind the last packed sequence belong to none: out 0, lse -inf.
static __device__ void clear_tail(const Params& params, const Work& work) {
    Element* out = const_cast<Element*>(rows_of(params.out, params.out_strides, 0, work.head, 0));
    for (int row = params.cu_seqlens_q[params.batch] + work.q_tile; row < params.seqlen_q; row += params.q_tiles) {
        for (int column = threadIdx.x; column < ATTNHUB_V_HEAD_DIM; column += kThreads) out[row * params.out_strides.token + column] = 0;
        if (params.lse != nullptr && threadIdx.x == 0) params.lse[static_cast<long long>(work.head) * params.seqlen_q + row] = -kInfinity;
    }
}

// False: nothing was written and the block must be done again, Careful, because its scores are extreme or not numbers (raise_maxima), or
// because a hidden key's V may be Inf or NaN: there a weight of 0 does not hide it.
template <bool Careful>
static __device__ __forceinline__ bool attend(const Params& params, const Work& work, uint32 shared) {
    const Sequence sequence = Sequence::of(params, work.sequence);
    const Mask mask = sequence.mask;
    const int block_row = work.q_tile * kRows;
    const int row_count = min(kRows, sequence.len_q - block_row);
    if (row_count <= 0) return true;

    constexpr bool kPairs = ATTNHUB_PAIRS && !Careful;
    constexpr bool kSkips = !ATTNHUB_PAIRS && !Careful;  // tiles that none of a warp's rows sees
    constexpr int kRowTiles = kRows / 16 / (kPairs ? ATTNHUB_WARPS / 2 : ATTNHUB_WARPS);  // of 16 rows, per warp
    constexpr int kWarpRows = kRowTiles * 16;
    constexpr int kWarpKeys = kPairs ? kKeys / 2 : kKeys, kWarpColumns = kPairs ? VTile::kColumns / 2 : VTile::kColumns;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = (kPairs ? warp / 2 : warp) * kWarpRows;
    const int side = kPairs ? warp % 2 : 0;
    const int my_keys = side * kWarpKeys, my_columns = side * kWarpColumns;  // the first of them in a tile
    const int first_row = block_row + warp_row;
    const int kv_head = work.head / params.heads_per_kv_head;
    const Element* q = rows_of(params.q, params.q_strides, sequence.batch, work.head, static_cast<long long>(sequence.q_token) + block_row);
    const Element* k = rows_of(params.k, params.k_strides, sequence.batch, kv_head, sequence.k_token);
    const Element* v = rows_of(params.v, params.v_strides, sequence.batch, kv_head, sequence.k_token);
    const uint32 q_tile = shared, k_tile = q_tile + QTile::kBytes, v_tile = k_tile + kStages * KTile::kBytes;
    const Exchange exchange(v_tile + kStages * VTile::kBytes, warp_row, side, lane);

    const Span top = mask.keys(block_row), bottom = mask.keys(block_row + row_count - 1);
    const Span some{uniform(top.first), uniform(bottom.last)}, all{uniform(bottom.first), uniform(top.last)};
    const int last_key = (some.last - 1) / kKeys * kKeys;  // of the last tile, if there is one
    const bool has_keys = some.first < some.last;

    TileCopy<kRows, ATTNHUB_HEAD_DIM> q_copy(q, params.q_strides.token);
    TileCopy<kKeys, ATTNHUB_HEAD_DIM> k_copy(k + last_key * params.k_strides.token, params.k_strides.token);
    TileCopy<kKeys, ATTNHUB_V_HEAD_DIM> v_copy(v + last_key * params.v_strides.token, params.v_strides.token);
    // From the last tile to the first, and past it, where there are only zeros: a branch would keep the instructions around it apart.
    const auto load_keys = [&](int key, uint32 tile) { k_copy.start(tile, params.k_strides.token, some.first - key, some.last - key); };
    const auto load_values = [&](int key, uint32 tile) { v_copy.start(tile, params.v_strides.token, some.first - key, some.last - key); };

    Accumulators<kRowTiles, kWarpColumns> out = {};
    RowState<kRowTiles> rows(kNoMaximum<Careful>);
    Query<kRowTiles, QTile, ATTNHUB_KEPT> query(q_tile, warp_row, lane);
    float slope = 0.f;
    if constexpr (ATTNHUB_ALIBI) slope = params.alibi[work.sequence * params.alibi_batch_stride + work.head] * kLog2e;
    const float scale = kRawScores ? params.scale_log2 : 1.f;

    const auto masked = [&](int key) { return key < all.first || key + kKeys > all.last; };
    const auto complete = [&](Scores<kRowTiles, kWarpKeys>& scores, int key) {
        if constexpr (ATTNHUB_SOFTCAP) cap_scores<kRowTiles, kWarpKeys>(scores, params.cap_inner, params.cap_outer);
        if constexpr (ATTNHUB_ALIBI) {
            const float to_log2 = ATTNHUB_SOFTCAP ? 1.f : params.scale_log2;
            add_alibi<kRowTiles, kWarpKeys>(scores, to_log2, slope, first_row + mask.offset, key + my_keys, lane);
        }
        if (masked(key)) {
            const Mask again = Sequence::of(params, work.sequence).mask;
            hide_scores<kRowTiles, kWarpKeys>(scores, again, first_row, key + my_keys, lane);
        }
    };
    const auto negate_q = [&] {
        if (params.negate_q) transform<QTile>(q_tile, [](uint32 x) { return x ^ 0x80008000u; });
    };
    // A warp that skips begins with the last tile that its own rows see: those behind are of other warps, it only copies its part of them.
    const int my_last = warp_row < row_count ? uniform(mask.keys(min(first_row + kWarpRows, block_row + row_count) - 1).last) : some.first;
    int key = last_key;
    Weights<kRowTiles, kKeys> weights;
    // out += P V. Weights of 16 keys are made just before their products; a pair makes all of them before. With one stage K is free by now.
    const auto add_values = [&](const Scores<kRowTiles, kWarpKeys>& scores, uint32 tile) {
        if constexpr (kPairs) {
#pragma unroll
            for (int step = 0; step < kWarpKeys / 16; ++step) {
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    uint32 mine[4];
                    weigh<Type, Careful>(mine, scores, rows, scale, m, step);
                    exchange.put(mine, m, step * 16 + my_keys);
                }
            }
            exchange.meet();
        }
        const uint32 my_part = tile + VTile::offset(0, my_columns);
        multiply_values<Type, VTile, kRowTiles, kKeys, kWarpColumns>(out, weights, my_part, lane, [&](int step) {
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                if constexpr (kPairs) {
                    exchange.get(weights[m][step], m, step);
                } else {
                    weigh<Type, Careful>(weights[m][step], scores, rows, scale, m, step);
                }
            }
            if ((Careful || kStages == 1) && step == 0) load_keys(key - kKeys, k_tile);
        });
    };
    const auto more = [&] { return has_keys && key + kKeys > some.first; };
    const auto not_mine = [&] { return kSkips && key >= my_last; };
    const auto keep_query = [&] {  // Q arrived with the first K
        if constexpr (ATTNHUB_KEPT > 0) {
            __syncthreads();
            query.keep();
        }
    };

    if constexpr (Careful || kStages == 1) {
        if (has_keys) {
            q_copy.start(q_tile, params.q_strides.token, 0, row_count);
            load_keys(last_key, k_tile);
            q_copy.finish(q_tile);
            negate_q();
            keep_query();
        }
        for (; more() && not_mine(); key -= kKeys) {
            k_copy.finish(k_tile);
            meet<kSkips>();
            load_values(key, v_tile);
            v_copy.finish(v_tile);
            meet<kSkips>();
            load_keys(key - kKeys, k_tile);
        }
        for (; more(); key -= kKeys) {
            k_copy.finish(k_tile);
            meet<kSkips>();  // K is here, and nobody reads the last V any more
            Scores<kRowTiles, kWarpKeys> scores;
            multiply_keys<Type, KTile, kRowTiles, kWarpKeys>(scores, query, k_tile + KTile::offset(my_keys, 0), lane, [&](int step) {
                if (step == 0) load_values(key, v_tile);
            });

            v_copy.finish(v_tile);
            bool hazard = false;  // V is here, K is free
            if constexpr (Careful) {
                hazard = __syncthreads_or(masked(key) && has_nonfinite<Type, VTile>(v_tile));
            } else {
                meet<kSkips>();
            }
            complete(scores, key);
            raise_maxima<Careful, kPairs>(scores, rows, out, scale, exchange);
            if constexpr (Careful) {
                if (hazard) {
                    const Mask again = Sequence::of(params, work.sequence).mask;
                    add_nonfinite_values<Type, VTile, kRowTiles, kKeys>(out, v_tile, lane, again, first_row, key);
                    __syncthreads();
                    transform<VTile>(v_tile, [](uint32 x) { return Type::finite(x); });
                    __syncthreads();
                }
            }
            add_values(scores, v_tile);
        }
    } else {
        if (has_keys) {
            q_copy.start(q_tile, params.q_strides.token, 0, row_count);
            load_keys(last_key, k_tile);
            load_values(last_key, v_tile);
            q_copy.finish(q_tile);
            negate_q();
            keep_query();
        }
        uint32 stage = 0;
        for (; more() && not_mine(); key -= kKeys) {
            k_copy.finish(k_tile);
            meet<kSkips>();
            stage ^= 1;
            load_keys(key - kKeys, k_tile + stage * KTile::kBytes);
            load_values(key - kKeys, v_tile + stage * VTile::kBytes);
        }
        for (; more(); key -= kKeys) {
            k_copy.finish(k_tile);
            meet<kSkips>();  // K and V are here, and nobody reads those before any more
            const uint32 this_k = k_tile + stage * KTile::kBytes, this_v = v_tile + stage * VTile::kBytes;
            stage ^= 1;
            Scores<kRowTiles, kWarpKeys> scores;
            multiply_keys<Type, KTile, kRowTiles, kWarpKeys>(scores, query, this_k + KTile::offset(my_keys, 0), lane, [&](int step) {
                if (step == 0) load_keys(key - kKeys, k_tile + stage * KTile::kBytes);
                if (step == 1 || QTile::kColumns == 16) load_values(key - kKeys, v_tile + stage * VTile::kBytes);
            });
            complete(scores, key);
            raise_maxima<Careful, kPairs>(scores, rows, out, scale, exchange);
            add_values(scores, this_v);
        }
    }

    k_copy.finish(k_tile);  // of zeros: the epilogue's tile lies over all others
    if constexpr (!Careful) {
        float taint = 0.f;  // stays 0 as long as all of out is finite
        if (some.first < all.first || some.last > all.last) {
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
                for (int n = 0; n < kWarpColumns / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) taint = fmaf(out[m][n][i], 0.f, taint);
                }
            }
        }
        if (__syncthreads_or(needs_care(rows) || taint != 0.f)) return false;
    }

    if constexpr (kPairs) exchange.add_sums(rows);
    // Looked up again rather than kept, as for the masks above: every register counts in the loop.
    const Sequence target = Sequence::of(params, work.sequence);
    const long long first_token = static_cast<long long>(target.q_token) + work.q_tile * kRows;
    const int count = min(kRows, target.len_q - work.q_tile * kRows);
    float* lse = params.lse == nullptr ? nullptr : params.lse + (target.batch * params.q_heads + work.head) * params.seqlen_q + first_token;
    if (side == 1) lse = nullptr;
    normalise<kRowTiles, kWarpColumns>(
        out, rows, Careful ? scale : 1.f, params.sinks == nullptr ? nullptr : params.sinks + work.head, lse, warp_row, count, lane);
    Element* out_rows = const_cast<Element*>(rows_of(params.out, params.out_strides, target.batch, work.head, first_token));
    store_out<Type, OutTile>(out_rows, params.out_strides.token, out, shared, warp_row, my_columns, count, params.out_aligned, lane);
    return true;
}

// A function of its own, whose registers are not the first pass's.
static __device__ __noinline__ void attend_again(const Params& params, uint32 shared) {
    attend<true>(params, Work::of(params, blockIdx.x, (params.batch + (params.cu_seqlens_q != nullptr)) * params.q_heads), shared);
}

}  // namespace attnhub

extern "C" __global__ void __launch_bounds__(attnhub::kThreads, 1) attnhub_forward(const __grid_constant__ attnhub::Params params) {
    extern __shared__ __align__(16) unsigned char shared[];
    const bool packed = params.cu_seqlens_q != nullptr;
    const int sequences = params.batch + packed;  // the last one of a packed batch stands for the tokens behind it
    const attnhub::Work work = attnhub::Work::of(params, blockIdx.x, sequences * params.q_heads);
    if (packed && work.sequence == params.batch) {
        attnhub::clear_tail(params, work);
    } else if (!attnhub::attend<false>(params, work, attnhub::shared_address(shared))) {
        attnhub::attend_again(params, attnhub::shared_address(shared));
    }
}
