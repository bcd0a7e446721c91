// New tokens of a call. One warp of all that serve their K/V head writes them to the cache, and nobody reads them from there in this launch: whoever
// attends to them takes them from the inputs. Keys, and queries, are turned by their positions (rotary embedding, arXiv 2104.09864) in shared memory, where
// their rows are blocks; the writer and the readers of a key compute the same bits, which are rounded once.
#pragma once

#include "decode/block.cuh"

extern "C" __device__ __attribute__((noreturn)) void __assertfail(const char* message, const char* file, unsigned line, const char* function, size_t char_size);

namespace attnhub {

// As where torch's indexing meets an index out of range: nothing is read back, so that the host cannot ask before.
static __device__ __forceinline__ void fail(const char* message) { __assertfail(message, "attnhub", 0, "decode", 1); }

template <class Type>
static __device__ __forceinline__ float angle(const void* table, long long at, int narrow) {
    return narrow ? Type::widen(static_cast<const Element*>(table)[at]) : static_cast<const float*>(table)[at];
}

// (a, b) turned by an angle, every operation rounded as torch rounds it.
static __device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
    const float x = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
    b = __fadd_rn(__fmul_rn(a, sin), __fmul_rn(b, cos));
    a = x;
}

// Turns rows from <= row < to of a warp's block by the angles of position(row), in place. What other lanes wrote must be visible.
template <class C, class F>
static __device__ __forceinline__ void turn_rows(const Params& params, uint32 block, int from, int to, F position, int lane) {
    using Type = typename C::Type;
    const int pairs = params.rotary_half / 2;  // of angles: two neighbouring columns lie in one word
#pragma unroll 2
    for (int at = lane; at < (to - from) * pairs; at += 32) {
        const int row = from + at / pairs, first_angle = at % pairs * 2;
        const int column = params.interleaved ? 2 * first_angle : first_angle, other = column + (params.interleaved ? 2 : params.rotary_half);
        const uint32 addresses[2] = {block + Block<C::kDepth>::offset(row, column / 8) + column % 8 * 2,
                                     block + Block<C::kDepth>::offset(row, other / 8) + other % 8 * 2};
        uint32 x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) x[i] = load_word(addresses[i]);
        float a[2][2];  // [word][half]
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            a[i][0] = Type::widen(static_cast<Element>(x[i] & 0xffffu));
            a[i][1] = Type::widen(static_cast<Element>(x[i] >> 16));
        }
        const long long place = position(row) * params.angle_stride + first_angle;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float cos = angle<Type>(params.cos, place + i, params.narrow_angles), sin = angle<Type>(params.sin, place + i, params.narrow_angles);
            if (params.interleaved) {
                turn(a[i][0], a[i][1], cos, sin);
            } else {
                turn(a[0][i], a[1][i], cos, sin);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) store_word(addresses[i], Type::pack(a[i][0], a[i][1]));
    }
}

// Whether all that the sequence's new tokens need is there. The same for all threads of a block.
template <class C>
static __device__ __forceinline__ bool fits(const Params& params, int old, int queries) {
    if (old < 0 || old > params.seqlen_k - params.new_tokens) {  // the sum might not be an int
        if (threadIdx.x == 0) fail("cache_seqlens: below 0, or the new tokens behind it pass what the cache holds");
        return false;
    }
    if (C::kRotary && old + max(params.new_tokens, params.one_position ? 1 : queries) > params.rotary_positions) {
        if (threadIdx.x == 0) fail("rotary: a position behind cache_seqlens is beyond the table of cos and sin");
        return false;
    }
    return true;
}

// Starts the copies of rows of the inputs to a block.
template <class B>
static __device__ __forceinline__ void fetch_rows(const Element* x, long long stride, uint32 block, int rows, int lane) {
#pragma unroll 1
    for (int at = lane; at < rows * B::kPieces; at += 32) copy_piece<B>(x + at / B::kPieces * stride, x, block, at / B::kPieces, at % B::kPieces, true);
}

// Rows of a block to the cache, where the first of them is key `first`.
template <class C, class B>
static __device__ __forceinline__ void store_rows(
    const Params& params, int batch, const Element* x, const Strides& strides, uint32 block, int first, int rows, int lane) {
#pragma unroll 1
    for (int at = lane; at < rows * B::kPieces; at += 32) {
        const int row = at / B::kPieces, piece = at % B::kPieces, present = B::present(piece);
        int page = 0, slot = first + row;
        if constexpr (C::kPaging != kContiguous) {
            const int place = params.page_size.divide(slot);
            page = params.block_table[static_cast<long long>(batch) * params.pages + place];
            if (page < 0 || page >= params.cache_rows) {
                fail("block_table: a page that the cache does not have");
                continue;
            }
        }
        Element* target = const_cast<Element*>(x) + page * strides.batch + slot * strides.token + 8 * piece;
        const uint4 found = load_shared(block + B::offset(row, piece));
        if (present == 8) {
            asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" :: "l"(target), "r"(found.x), "r"(found.y), "r"(found.z), "r"(found.w) : "memory");
        } else {
            const uint32 words[4] = {found.x, found.y, found.z, found.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i < present) target[i] = static_cast<Element>(words[i / 2] >> (i % 2 * 16));
            }
        }
    }
}

// Writes the new tokens of a sequence and K/V head, 16 at a time, each by one warp of the `warps` that ask with their number. block: room for keys and
// values in shared memory that no copy is on its way to.
template <class C>
static __device__ __forceinline__ void append(
    const Params& params, const Cache<C::kPaging, C::kAppends>& cache, int batch, uint32 block, int warp, int warps, int lane) {
    using KBlock = Block<C::kDepth>;
    using VBlock = Block<C::kWidth>;
    const uint32 values = block + KBlock::kBytes;
    for (int from = warp * kBlock; from < params.new_tokens; from += warps * kBlock) {
        const int rows = min(kBlock, params.new_tokens - from);
        fetch_rows<KBlock>(cache.new_k + from * params.new_k_strides.token, params.new_k_strides.token, block, rows, lane);
        fetch_rows<VBlock>(cache.new_v + from * params.new_v_strides.token, params.new_v_strides.token, values, rows, lane);
        commit_copies();
        wait_copies<0>();
        __syncwarp();
        if constexpr (C::kRotary) {
            turn_rows<C>(params, block, 0, rows, [&](int row) { return cache.old + from + row; }, lane);
            __syncwarp();
        }
        store_rows<C, KBlock>(params, batch, cache.k, params.k_strides, block, cache.old + from, rows, lane);
        store_rows<C, VBlock>(params, batch, cache.v, params.v_strides, values, cache.old + from, rows, lane);
        __syncwarp();
    }
}

}  // namespace attnhub
