// Tiles in shared memory, and their copies by the engine (TMA).
//
// A tile of Rows x Columns lies as [Columns / 64][Rows][64]: 128 bytes a row, whose eight 16-byte pieces are permuted by the
// row's number (128-byte swizzle), so that neither copies nor products meet bank conflicts. A box of the engine is one chunk of 64
// columns. What lies outside of the tensor arrives as zeros and is not written.
#pragma once

#include "hopper/params.cuh"
#include "hopper/pipeline.cuh"

namespace attnhub {

template <int Rows, int Columns>
struct Tile {
    static constexpr int kChunks = (Columns + 63) / 64;
    static constexpr uint32 kChunkBytes = Rows * 128;
    static constexpr uint32 kBytes = kChunks * kChunkBytes;

    // Byte offset of the 16 bytes that hold columns 8 * piece to 8 * piece + 7 of a row.
    static __device__ __forceinline__ uint32 offset(int row, int piece) {
        return (piece >> 3) * kChunkBytes + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
    }

    // Starts the copy of a whole tile; `full` has been told to expect kBytes.
    static __device__ __forceinline__ void load(uint32 tile, const TensorMap* map, Barrier full, int token, int head, int batch) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            asm volatile(
                "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                :: "r"(tile + chunk * kChunkBytes), "l"(reinterpret_cast<uint64>(map)), "r"(full.address), "r"(chunk * 64), "r"(token),
                   "r"(head), "r"(batch) : "memory");
        }
    }

    static __device__ __forceinline__ void store(const TensorMap* map, uint32 tile, int token, int head, int batch) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                         :: "l"(reinterpret_cast<uint64>(map)), "r"(tile + chunk * kChunkBytes), "r"(chunk * 64), "r"(token), "r"(head),
                            "r"(batch) : "memory");
        }
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
};

// Until the engine has read what this thread's stores send: the tile may be written again.
static __device__ __forceinline__ void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
static __device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What this thread wrote to shared memory becomes visible to the engine and to products.
static __device__ __forceinline__ void publish_to_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// As load_blocks.
static __device__ __forceinline__ void store_blocks(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

}  // namespace attnhub
