// From the thread that schedules to the copying warp and the computing warpgroups: one slot in shared memory, so that a tile is handed out
// as late as possible, when it turns out who is free first.
#pragma once

#include "hopper/pipeline.cuh"
#include "hopper/schedule.cuh"
#include "warp.cuh"

namespace attnhub {

struct Slot {
    uint32 words;  // address of kBytes
    Ring<1> ring;
    static constexpr uint32 kBytes = 64;

    __device__ __forceinline__ void publish(Cursor<1>& at, const Work& work) const {
        const int fields[16] = {work.row, work.head, work.kv_head, work.sequence, work.batch, work.q_token, work.k_token, work.len_q,
                                work.len_k, work.offset, work.leftpad, work.prefix, work.first_tile, work.last_tile};
        ring.empty(0).wait(at.parity);
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            asm volatile("st.shared.v4.s32 [%0], {%1,%2,%3,%4};"
                         :: "r"(words + 4 * i), "r"(fields[i]), "r"(fields[i + 1]), "r"(fields[i + 2]), "r"(fields[i + 3]) : "memory");
        }
        ring.full(0).arrive();
        at.advance();
    }

    // What was published last, for a whole warp, which must release it.
    __device__ __forceinline__ Work read(Cursor<1>& at) const {
        ring.full(0).wait(at.parity);
        at.advance();
        int f[16];
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            asm volatile("ld.shared.v4.s32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(f[i]), "=r"(f[i + 1]), "=r"(f[i + 2]), "=r"(f[i + 3]) : "r"(words + 4 * i) : "memory");
        }
#pragma unroll
        for (int i = 0; i < 14; ++i) f[i] = uniform(f[i]);
        __syncwarp();
        return {f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9], f[10], f[11], f[12], f[13]};
    }
    __device__ __forceinline__ void release(int lane) const { ring.empty(0).arrive_once(lane); }
};

}  // namespace attnhub
