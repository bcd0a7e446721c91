// What keeps the warps in step: barriers in shared memory (mbarrier) between the copying warp and the computing warpgroups, named barriers
// among the latter, and cursors that walk through a ring of stages.
#pragma once

#include "shared.cuh"

namespace attnhub {

// The 8 bytes of an mbarrier. A phase ends when `arrivals` threads arrived and all expected bytes did.
struct Barrier {
    uint32 address;

    __device__ __forceinline__ void init(int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive() const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address) : "memory");
    }
    // Once for a whole warp. Without a branch: after one the compiler takes what follows for divergent, and descriptors leave the uniform
    // registers.
    __device__ __forceinline__ void arrive_once(int lane) const {
        asm volatile("{\n.reg .pred first;\nsetp.eq.s32 first, %1, 0;\n@first mbarrier.arrive.shared::cta.b64 _, [%0];\n}"
                     :: "r"(address), "r"(lane) : "memory");
    }
    // Arrives, and makes the phase wait for the bytes of copies.
    __device__ __forceinline__ void expect(uint32 bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address), "r"(bytes) : "memory");
    }
    // Until the phase of this parity has ended. Of a fresh barrier the phase of parity 1 counts as ended.
    __device__ __forceinline__ void wait(uint32 parity) const {
        asm volatile(
            "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra ended;\nbra again;\nended:\n}"
            :: "r"(address), "r"(parity) : "memory");
    }
};

// Barriers of a ring of stages, all full ones first.
template <int Stages>
struct Ring {
    uint32 address;
    static constexpr uint32 kBytes = 16 * Stages;

    __device__ __forceinline__ Barrier full(int stage) const { return {address + 8 * stage}; }
    __device__ __forceinline__ Barrier empty(int stage) const { return {address + 8 * (Stages + stage)}; }
    __device__ __forceinline__ void init(int producers, int consumers) const {
        for (int stage = 0; stage < Stages; ++stage) {
            full(stage).init(producers);
            empty(stage).init(consumers);
        }
    }
};

// Where one side is in a ring. Producers wait for parity 1 first, consumers for 0.
template <int Stages>
struct Cursor {
    int stage;
    uint32 parity;

    static __device__ __forceinline__ Cursor producer() { return {0, 1}; }
    static __device__ __forceinline__ Cursor consumer() { return {0, 0}; }
    __device__ __forceinline__ void advance() {
        if (++stage == Stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// After the barriers' init: visible to the copy engine too, once all threads have met.
static __device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers: 0 is __syncthreads.
constexpr int kTurnBarrier = 2;       // + warpgroup: its turn to start products
constexpr int kWarpgroupBarrier = 8;  // + warpgroup: its 128 threads meet

static __device__ __forceinline__ void barrier_sync(int name, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(name), "r"(threads) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(name), "r"(threads) : "memory");
}

template <int Count> static __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(Count));
}
template <int Count> static __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(Count));
}

}  // namespace attnhub
