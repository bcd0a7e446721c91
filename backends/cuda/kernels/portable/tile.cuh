// Tiles of rows in shared memory, and their way there from global memory.
//
// A row is padded with zeros to a multiple of 16 elements (one step of the matrix product), and the pitch of rows is 16
// bytes more, an odd number of 16-byte chunks, so that the 8 rows of an ldmatrix block lie in different banks.
#pragma once

#include "element.cuh"
#include "shared.cuh"

namespace attnhub {

constexpr int kThreads = ATTNHUB_WARPS * 32;
constexpr int kChunk = 8;  // elements in 16 bytes

template <int Rows, int HeadDim>
struct Tile {
    static constexpr int kColumns = (HeadDim + 15) / 16 * 16;
    static constexpr int kPitch = kColumns + kChunk;         // elements
    static constexpr int kBytes = Rows * kPitch * 2;
    static constexpr int kLanesPerRow = Rows % (kThreads / 8) == 0 ? 8 : 16;  // 128 or 256 contiguous bytes per row and pass
    static constexpr int kRowsPerPass = kThreads / kLanesPerRow;
    static constexpr int kColumnsPerPass = kLanesPerRow * kChunk;
    static constexpr int kRowPasses = Rows / kRowsPerPass;
    static constexpr int kColumnPasses = (kColumns + kColumnsPerPass - 1) / kColumnsPerPass;
    static_assert(Rows % kRowsPerPass == 0, "passes cover all rows");

    static __device__ __forceinline__ int thread_row() { return threadIdx.x / kLanesPerRow; }
    static __device__ __forceinline__ int thread_column() { return threadIdx.x % kLanesPerRow * kChunk; }

    // Where this thread's first chunk lies in the tile.
    static __device__ __forceinline__ uint32 thread_chunk(uint32 tile) { return tile + offset(thread_row(), thread_column()); }

    // Calls f(row, column, i, j, offset) for each 16-byte chunk of the tile that belongs to this thread: row pass i, column
    // pass j, offset (a constant) from this thread's first chunk.
    template <class F>
    static __device__ __forceinline__ void for_each_chunk(F f) {
#pragma unroll
        for (int i = 0; i < kRowPasses; ++i) {
#pragma unroll
            for (int j = 0; j < kColumnPasses; ++j) {
                const int column = thread_column() + j * kColumnsPerPass;
                if (kColumns % kColumnsPerPass == 0 || column < kColumns) {
                    f(thread_row() + i * kRowsPerPass, column, i, j, offset(i * kRowsPerPass, j * kColumnsPerPass));
                }
            }
        }
    }

    static __device__ __forceinline__ uint32 offset(int row, int column) { return (row * kPitch + column) * 2; }

    // Whether all of a chunk exists, and how many of its 8 elements do. Compared with constants and not by min and max: ptxas
    // 13.0 miscompiles max(0, min(HeadDim - column, 8)) == 8 for sm_90.
    static __device__ __forceinline__ bool whole(int column) { return HeadDim % kColumnsPerPass == 0 || column + kChunk <= HeadDim; }
    static __device__ __forceinline__ int present(int column) { return whole(column) ? kChunk : column < HeadDim ? HeadDim % kChunk : 0; }
};

// A copy of one tile that runs while the warps compute. Rows outside [first, last) and columns past HeadDim become 0.
// start() may write to the tile at once, so that nobody may be reading it; after finish() a thread sees its own chunks,
// and after a barrier everyone's.
template <int Rows, int HeadDim>
struct TileCopy {
    using Layout = Tile<Rows, HeadDim>;
    const Element* next;  // this thread's first chunk of it

#if ATTNHUB_TURING  // no asynchronous copy: the tile waits in registers, and start() writes nothing
    uint4 staged[Layout::kRowPasses * Layout::kColumnPasses];

    static __device__ __forceinline__ uint4 load_chunk(const Element* chunk, int column) {
        if (Layout::whole(column)) return __ldg(reinterpret_cast<const uint4*>(chunk));
        uint32 words[4] = {0, 0, 0, 0};
        if (column < HeadDim) {
#pragma unroll
            for (int i = 0; i < HeadDim % kChunk; ++i) words[i / 2] |= static_cast<uint32>(chunk[i]) << (i % 2 * 16);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
#endif

    // Row 0 of the tile that is copied first.
    __device__ __forceinline__ TileCopy(const Element* source, long long token_stride)
        : next(source + Layout::thread_row() * token_stride + Layout::thread_column()) {}

    // The tile of rows before is copied next.
    __device__ __forceinline__ void start(uint32 tile, long long token_stride, int first, int last) {
        const Element* source = next;
        const uint32 target = Layout::thread_chunk(tile);
        Layout::for_each_chunk([&](int row, int column, int i, int j, uint32 offset) {
            if (i > 0 && j == 0) source += Layout::kRowsPerPass * token_stride;
            const bool exists = row >= first && row < last;
            const Element* chunk = source + j * Layout::kColumnsPerPass;
#if ATTNHUB_TURING
            staged[i * Layout::kColumnPasses + j] = exists ? load_chunk(chunk, column) : make_uint4(0, 0, 0, 0);
#else
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(target + offset), "l"(chunk), "r"(exists ? Layout::present(column) * 2 : 0) : "memory");
#endif
        });
        next -= Rows * token_stride;
    }

    __device__ __forceinline__ void finish(uint32 tile) {
#if ATTNHUB_TURING
        const uint32 target = Layout::thread_chunk(tile);
        Layout::for_each_chunk([&](int, int, int i, int j, uint32 offset) {
            store_shared(target + offset, staged[i * Layout::kColumnPasses + j]);
        });
#else
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }
};

// Whether one of this thread's own chunks holds Inf or NaN.
template <class Type, class Layout>
static __device__ __forceinline__ bool has_nonfinite(uint32 tile) {
    uint32 taint = 0;
    const uint32 source = Layout::thread_chunk(tile);
    Layout::for_each_chunk([&](int, int, int, int, uint32 offset) {
        taint = taint_all<Type>(taint, load_shared(source + offset));
    });
    return tainted(taint);
}

// Replaces each pair of elements x of this thread's own chunks by f(x).
template <class Layout, class F>
static __device__ __forceinline__ void transform(uint32 tile, F f) {
    const uint32 chunk = Layout::thread_chunk(tile);
    Layout::for_each_chunk([&](int, int, int, int, uint32 offset) {
        const uint4 x = load_shared(chunk + offset);
        store_shared(chunk + offset, make_uint4(f(x.x), f(x.y), f(x.z), f(x.w)));
    });
}

}  // namespace attnhub
