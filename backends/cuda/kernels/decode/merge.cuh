// Parts of a softmax over disjoint keys become one: of the warps of a block through shared memory, of the splits through device memory, where
// the warp that comes last to a row does it. The order of sums is that of warps and splits, whoever comes last.
#pragma once

#include "decode/rows.cuh"

namespace attnhub {

// A part of a row: weights are relative to 2^(scale * maximum).
struct Part {
    float maximum, sum;
};

// What a part's sums are multiplied by. highest: the largest maximum of all parts.
static __device__ __forceinline__ float part_factor(float maximum, float highest, float scale) {
    return maximum == -kInfinity ? 0.f : exp2_fast((maximum - highest) * scale);
}

// `partial`: sums [rows of tiles][splits][Pitch], and behind them parts [rows of tiles][splits].
template <int Pitch>
struct Partial {
    float4* sums;  // of one row
    Part* parts;

    static __device__ __forceinline__ Partial of(const Params& params, int tile, int row) {
        const long long rows = static_cast<long long>(gridDim.x) * params.tile_rows;  // with those of all splits
        const long long first = (static_cast<long long>(tile) * params.tile_rows + row) * params.splits.number;
        return {reinterpret_cast<float4*>(params.partial + first * Pitch), reinterpret_cast<Part*>(params.partial + rows * Pitch) + first};
    }
};

static __device__ __forceinline__ void add(float4& sums, float factor, const float4& x) {
    sums.x = fmaf(factor, x.x, sums.x);
    sums.y = fmaf(factor, x.y, sums.y);
    sums.z = fmaf(factor, x.z, sums.z);
    sums.w = fmaf(factor, x.w, sums.w);
}

// 4 columns of a finished row of out; with the first of them lse.
template <class C>
static __device__ __forceinline__ void write_row(
    const Params& params, const Queries& queries, const Row& row, int group, const Part& part, const float4& sums, float scale) {
    using Type = typename C::Type;
    float scaled = part.maximum == -kInfinity ? -kInfinity : part.maximum * scale, sum = part.sum, factor = 1.f;
    if (params.sinks != nullptr) {  // add_sink, of which the compiler makes other code here
        const float sink = params.sinks[row.head] * kLog2e;
        const float anchor = fmaxf(scaled, sink);
        if (anchor != -kInfinity) {  // else there is neither a key nor a sink
            factor = exp2f(scaled - anchor);
            sum = sum * factor + exp2f(sink - anchor);
            scaled = anchor;
        }
    }
    const float inverse = sum == 0.f ? 0.f : factor * reciprocal_fast(sum);
    const uint32 low = Type::pack(sums.x * inverse, sums.y * inverse), high = Type::pack(sums.z * inverse, sums.w * inverse);
    Element* out = params.out + queries.batch * params.out_strides.batch + row.head * params.out_strides.head +
                   (queries.token + row.query) * params.out_strides.token + 4 * group;
    if (params.out_aligned) {
        if (4 * group < C::kWidth) asm volatile("st.global.v2.b32 [%0], {%1,%2};" :: "l"(out), "r"(low), "r"(high) : "memory");
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (4 * group + i < C::kWidth) out[i] = static_cast<Element>((i < 2 ? low : high) >> (i % 2 * 16));
        }
    }
    if (params.lse != nullptr && group == 0) {
        params.lse[(static_cast<long long>(queries.batch) * params.q_heads + row.head) * params.seqlen_q + queries.token + row.query] =
            lse_of(scaled, sum);
    }
}

// The ticket's number. Whoever draws later sees what was written before.
static __device__ __forceinline__ int draw(int* ticket) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
    return before;
}

// Tokens behind the last packed sequence belong to none: out 0, lse -inf. By the blocks of a K/V head and tile of rows.
template <class C>
static __device__ __forceinline__ void clear_tail(const Params& params, int kv_head, int row_tile) {
    for (int token = params.cu_seqlens_q[params.sequences] + row_tile; token < params.seqlen_q; token += params.row_tiles.number) {
        for (int head = kv_head * params.heads_per_kv_head; head < (kv_head + 1) * params.heads_per_kv_head; ++head) {
            Element* out = params.out + head * params.out_strides.head + token * params.out_strides.token;
            for (int column = threadIdx.x; column < C::kWidth; column += 32 * C::kWarps) out[column] = 0;
            if (params.lse != nullptr && threadIdx.x == 0) params.lse[static_cast<long long>(head) * params.seqlen_q + token] = -kInfinity;
        }
    }
}

// Of a block's warps. Everything that outlives the copies of keys lies behind them; the sums of a warp lie over its keys.
template <class C>
struct Merge {
    static constexpr int kColumns = Block<C::kWidth>::kColumns;
    static constexpr int kPitch = kColumns + 8;  // of a warp's sums: no bank conflicts
    static constexpr int kGroups = kColumns / 4;
    static constexpr int kPasses = (kGroups + 31) / 32;  // of a warp's lanes over a row
    static constexpr int kPartsBytes = C::kWarps * 16 * sizeof(Part), kFactorsBytes = C::kWarps * C::kMostSplits * 4;
    static constexpr int kBytes = kPartsBytes + kFactorsBytes;
    static constexpr int kBatch = C::kWidth <= 128 ? 16 : 8;  // splits; as many as there are registers for
    static_assert(16 * kPitch * 4 <= C::kWarpBytes, "the sums of a warp do not fit where its keys were");

    float* sums;       // [warps][kWarpBytes / 4]
    Part* parts;       // [warps][16]
    float* factors;    // [warps][kMostSplits]

    explicit __device__ __forceinline__ Merge(unsigned char* shared)
        : sums(reinterpret_cast<float*>(shared)), parts(reinterpret_cast<Part*>(shared + C::kWarps * C::kWarpBytes)),
          factors(reinterpret_cast<float*>(shared + C::kWarps * C::kWarpBytes + kPartsBytes)) {}

    // count: rows that exist.
    __device__ __forceinline__ void leave(const Rows<C>& rows, int count, int warp, int lane) {
        float* own = sums + warp * (C::kWarpBytes / 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == 1 && count <= 8) break;
            const float sum = across_row(rows.sum[half], [](float a, float b) { return a + b; });
            const int row = lane / 4 + 8 * half;
            if (row >= count) continue;
            if (lane % 4 == 0) parts[warp * 16 + row] = {rows.maximum[half], sum};
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n) {
                *reinterpret_cast<float2*>(own + row * kPitch + 8 * n + lane % 4 * 2) = make_float2(rows.out[n][2 * half], rows.out[n][2 * half + 1]);
            }
        }
    }

    // What all warps left of a row: with the sums of this lane's groups of 4 columns.
    __device__ __forceinline__ Part take(int row, float scale, float4 (&found)[kPasses], int lane) const {
        Part whole{-kInfinity, 0.f}, own[C::kWarps];
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) {
            own[w] = parts[w * 16 + row];
            whole.maximum = fmaxf(whole.maximum, own[w].maximum);
        }
#pragma unroll
        for (int i = 0; i < kPasses; ++i) found[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) {
            const float factor = part_factor(own[w].maximum, whole.maximum, scale);
            whole.sum = fmaf(factor, own[w].sum, whole.sum);
#pragma unroll
            for (int i = 0; i < kPasses; ++i) {
                const int group = lane + 32 * i;
                if (group < kGroups) add(found[i], factor, *reinterpret_cast<const float4*>(sums + w * (C::kWarpBytes / 4) + row * kPitch + 4 * group));
            }
        }
        return whole;
    }

    // The rows of a tile, each by one warp, from all of the block's; out is written by the warp that comes last of all splits.
    __device__ __forceinline__ void finish(
        const Params& params, const Queries& queries, int kv_head, int row_tile, int tile, int split, int count, float scale, int warp, int lane) {
        const auto target = [&](int row) { return Row::of(params, queries, kv_head, row_tile * 16 + row); };
        float4 found[kPasses];
        for (int row = warp; row < count; row += C::kWarps) {
            const Part part = take(row, scale, found, lane);
            const auto partial = Partial<kColumns>::of(params, tile, row);
            if (params.splits.number > 1 && lane == 0) partial.parts[split] = part;
#pragma unroll
            for (int i = 0; i < kPasses; ++i) {
                const int group = lane + 32 * i;
                if (group >= kGroups) continue;
                if (params.splits.number == 1) {
                    write_row<C>(params, queries, target(row), group, part, found[i], scale);
                } else {
                    partial.sums[split * kGroups + group] = found[i];
                }
            }
        }
        if (params.splits.number == 1 || warp >= count) return;
        // One lane draws for each of the warp's rows, and shows the others what the warp has written: its lanes have shown it to this one.
        __syncwarp();
        bool all = false;
        const int drawn = warp + lane * C::kWarps;
        if (drawn < count) {
            int* ticket = params.tickets + tile * params.tile_rows + drawn;
            all = draw(ticket) == static_cast<int>(params.splits.number) - 1;
            if (all) *ticket = 0;  // for the next launch
        }
        for (int row = warp, i = 0; row < count; row += C::kWarps, ++i) {
            if (__shfl_sync(0xffffffffu, all, i)) merge_splits(params, Partial<kColumns>::of(params, tile, row), queries, target(row), scale, warp, lane);
        }
    }

private:
    // One row of all splits, by a warp.
    __device__ __forceinline__ void merge_splits(
        const Params& params, const Partial<kColumns>& from, const Queries& queries, const Row& target, float scale, int warp, int lane) {
        float* own = factors + warp * C::kMostSplits;
        const int splits = params.splits.number;
        // Reads that wait for each other cost more than all the rest: a batch is asked for at once, the first one before anything depends on it.
        float4 batch[kBatch];
        const auto ask = [&](int first, int group) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (first + i < splits && group < kGroups) batch[i] = __ldcg(from.sums + (first + i) * kGroups + group);
            }
        };
        ask(0, lane);
        const auto part_of = [&](int split) {
            const float2 found = split < splits ? __ldcg(reinterpret_cast<const float2*>(from.parts + split)) : make_float2(-kInfinity, 0.f);
            return Part{found.x, found.y};
        };
        const Part first = part_of(lane);
        Part whole{first.maximum, 0.f};
#pragma unroll 1
        for (int split = lane + 32; split < splits; split += 32) whole.maximum = fmaxf(whole.maximum, part_of(split).maximum);
        whole.maximum = across_warp(whole.maximum, [](float a, float b) { return fmaxf(a, b); });
        Part own_part = first;
#pragma unroll 1
        for (int split = lane; split < splits; split += 32) {
            if (split != lane) own_part = part_of(split);
            const float factor = part_factor(own_part.maximum, whole.maximum, scale);
            own[split] = factor;
            whole.sum = fmaf(factor, own_part.sum, whole.sum);
        }
        whole.sum = across_warp(whole.sum, [](float a, float b) { return a + b; });
        __syncwarp();
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int group = lane + 32 * pass;
            float4 found = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
            for (int first = 0; first < splits; first += kBatch) {
                if (pass + first > 0) ask(first, group);
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    if (first + i < splits) add(found, own[first + i], batch[i]);
                }
            }
            if (group < kGroups) write_row<C>(params, queries, target, group, whole, found, scale);
        }
        __syncwarp();
    }
};

}  // namespace attnhub
