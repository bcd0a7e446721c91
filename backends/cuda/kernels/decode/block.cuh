// Blocks of 16 keys in the shared memory of one warp, and their way there: from a tensor, or from pages of any size.
#pragma once

#include "decode/mask.cuh"
#include "element.cuh"
#include "shared.cuh"

namespace attnhub {

constexpr int kBlock = 16;  // keys

// 16 rows of Dim elements, in 128-byte pieces of rows whose eight 16-byte pieces are permuted by the row's number: neither copies nor
// ldmatrix meet bank conflicts. Columns up to a multiple of 16 are zeros.
template <int Dim>
struct Block {
    static constexpr int kSteps = (Dim + 15) / 16;  // of a product over its columns
    static constexpr int kColumns = 16 * kSteps;
    static constexpr int kPieces = 2 * kSteps;
    static constexpr int kPitch = (kSteps + 3) / 4 * 128;  // bytes
    static constexpr int kBytes = kBlock * kPitch;
    static constexpr int kPasses = kBlock * kPieces / 32;

    static __device__ __forceinline__ uint32 offset(int row, int piece) { return row * kPitch + ((piece ^ (row & 7)) << 4); }

    // Calls f(row, piece) for each 16 bytes that this lane copies.
    template <int Together = kPasses, class F> static __device__ __forceinline__ void for_each_piece(int lane, F f) {
#pragma unroll Together
        for (int i = 0; i < kPasses; ++i) {
            const int at = lane + 32 * i;
            f(at / kPieces, at % kPieces);
        }
    }

    // Elements of a piece that exist. Compared with constants: see portable/tile.cuh.
    static __device__ __forceinline__ int present(int piece) { return piece < Dim / 8 ? 8 : piece == Dim / 8 ? Dim % 8 : 0; }
};

// Starts the copy of 16 bytes of a row; zeros if there is none. anywhere: an address that may be named then.
template <class B>
static __device__ __forceinline__ void copy_piece(const Element* row_start, const Element* anywhere, uint32 target, int row, int piece, bool exists) {
    const int bytes = exists ? B::present(piece) * 2 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(target + B::offset(row, piece)), "l"(bytes > 0 ? row_start + 8 * piece : anywhere), "r"(bytes) : "memory");
}

// Starts the copy of 4 bytes.
static __device__ __forceinline__ void copy_word(const int* source, uint32 target) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(target), "l"(source) : "memory");
}

enum Pages { kContiguous, kWholePages, kAnyPages };  // kWholePages: of a multiple of 16 keys, so that a block lies in one page

// Where the keys of one sequence and K/V head lie. Appends: the last ones are not read from the cache, where this launch puts them.
template <int Paging, bool Appends>
struct Cache {
    const Element* k;
    const Element* v;
    Span some;  // keys that are read at all
    const Element* new_k;
    const Element* new_v;
    int old;    // keys that the cache holds; only if Appends

    static __device__ __forceinline__ Cache of(const Params& params, int batch, int kv_head, const Span& some) {
        const long long from = Paging == kContiguous ? batch : 0;
        Cache cache{params.k + from * params.k_strides.batch + kv_head * params.k_strides.head,
                    params.v + from * params.v_strides.batch + kv_head * params.v_strides.head, some};
        if constexpr (Appends) {
            cache.new_k = params.new_k + batch * params.new_k_strides.batch + kv_head * params.new_k_strides.head;
            cache.new_v = params.new_v + batch * params.new_v_strides.batch + kv_head * params.new_v_strides.head;
            cache.old = params.seqused_k[batch];
        }
        return cache;
    }

    // Whether keys of a block are new.
    __device__ __forceinline__ bool has_new(int block) const { return Appends && (block + 1) * kBlock > old; }

    // Entries of a block in `block_table`: one, or one for each key, which lanes take in turn.
    static constexpr int kEntries = Paging == kContiguous ? 0 : Paging == kWholePages ? 1 : kBlock;

    // Where this lane's entry for a block is, or null if the table has none. It must not ask how many keys there are: behind them it is anything.
    static __device__ __forceinline__ const int* entry(const Params& params, int batch, int block, int lane) {
        if (Paging == kContiguous || lane >= kEntries) return nullptr;
        const int key = block * kBlock + lane;
        return key < params.seqlen_k ? params.block_table + static_cast<long long>(batch) * params.pages + params.page_size.quotient(key) : nullptr;
    }

    // Starts the copies of a block's keys, or of its values. Keys outside of `some` become zeros and are not read. entries: the block's, in shared memory.
    template <class B>
    __device__ __forceinline__ void start(const Params& params, bool values, int block, uint32 entries, uint32 target, int lane) const {
        int page = 0;
        if constexpr (Paging != kContiguous) page = static_cast<int>(load_word(entries + lane % kEntries * 4));
        const Element* x = values ? v : k;
        const long long page_stride = values ? params.v_strides.batch : params.k_strides.batch;
        const long long stride = values ? params.v_strides.token : params.k_strides.token;
        const int key = block * kBlock;
        int slot = key;
        if constexpr (Paging == kWholePages) params.page_size.divide(slot);
        if constexpr (Paging == kAnyPages) {
            slot += lane % kBlock;
            params.page_size.divide(slot);
            if (!some.holds(key + lane % kBlock)) page = 0;
        }
        if constexpr (Paging != kAnyPages) x += page * page_stride + slot * stride;
        constexpr int kTogether = Paging == kAnyPages && B::kPasses > 8 ? 4 : B::kPasses;  // wide rows leave no registers for more
        B::template for_each_piece<kTogether>(lane, [&](int row, int piece) {
            const Element* source;
            if constexpr (Paging == kAnyPages) {
                const long long row_page = __shfl_sync(0xffffffffu, page, row), row_slot = __shfl_sync(0xffffffffu, slot, row);
                source = x + row_page * page_stride + row_slot * stride;
            } else {
                source = x + row * stride;
            }
            if constexpr (Appends) {
                const long long new_stride = values ? params.new_v_strides.token : params.new_k_strides.token;
                if (key + row >= old) source = (values ? new_v : new_k) + (key + row - old) * new_stride;
            }
            copy_piece<B>(source, x, target, row, piece, some.holds(key + row));
        });
    }
};

static __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending> static __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(Pending) : "memory"); }

}  // namespace attnhub
