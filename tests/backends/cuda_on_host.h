// What a CUDA kernel needs to run on the host, one block after the other: the lanes of a block are fibers that take turns at collective instructions.
// A copy (cp.async) happens when it is waited for, not before, so that what is read too early is seen to be old.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __align__(n)
#define __launch_bounds__(...)
using std::max;
using std::min;

struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x; };

namespace host {

struct Copy { unsigned target; const void* source; int bytes; unsigned size = 16; };

struct Meeting { int count = 0; unsigned long generation = 0; };

struct Lane {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Warp { Meeting meeting; uint64_t slots[32][12]; };

inline std::vector<unsigned char> shared;
inline std::vector<std::unique_ptr<Lane>> lanes;
inline std::vector<Warp> warps;
inline Meeting block_meeting, pair_meetings[16];
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;
inline bool backwards;                       // the last block first
inline std::string failure;                  // what a lane asserted; nothing runs after it
inline std::map<void*, int> stores;          // of 16 bytes, by address, in one launch

inline void run_lane() {
    body();
    lanes[current]->done = true;
    swapcontext(&lanes[current]->context, &scheduler);
}

inline void meet(Meeting& m, int size) {
    const auto generation = m.generation;
    if (++m.count == size) {
        m.count = 0;
        ++m.generation;
        return;
    }
    while (m.generation == generation) swapcontext(&lanes[current]->context, &scheduler);
}

inline Warp& warp() { return warps[current / 32]; }
inline void meet_warp() { meet(warp().meeting, 32); }
inline void meet_pair(int barrier) { meet(pair_meetings[barrier], 64); }

[[noreturn]] inline void fail(const std::string& message) {
    failure = message;
    for (;;) swapcontext(&lanes[current]->context, &scheduler);
}

// All of the block, at one place of the source.
inline void meet_block(const std::string& place) {
    static std::string first;
    if (block_meeting.count == 0) first = place;
    if (place != first) fail("some threads are at " + first + " and others at " + place);
    meet(block_meeting, static_cast<int>(lanes.size()));
}
inline void meet_anywhere() { meet_block("barrier.sync"); }

// Gives every lane's words to every lane of the warp: f(words of all).
template <class T, class F> auto exchange(const T& mine, F f) {
    static_assert(sizeof(T) <= sizeof(Warp::slots[0]));
    std::memcpy(warp().slots[current % 32], &mine, sizeof(T));
    meet_warp();
    const auto found = f([](int lane) { T x; std::memcpy(&x, warp().slots[lane], sizeof(T)); return x; });
    meet_warp();
    return found;
}

inline unsigned char* at(unsigned address, int bytes) {
    if (address % bytes || address + bytes > shared.size()) std::abort();
    return shared.data() + address;
}
template <class T> T read(unsigned address) { T x; std::memcpy(&x, at(address, sizeof(T)), sizeof(T)); return x; }
template <class T> void write(unsigned address, const T& x) { std::memcpy(at(address, sizeof(T)), &x, sizeof(T)); }

inline float as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned as_word(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }

struct BFloat16 {
    static float widen(unsigned x) { return as_float(x << 16); }
    static unsigned narrow(float x) {
        if (x != x) return 0x7fff;
        const unsigned w = as_word(x);
        return (w + 0x7fff + (w >> 16 & 1)) >> 16;
    }
};
struct Half {
    static float widen(unsigned x) { const uint16_t bits = static_cast<uint16_t>(x); _Float16 y; std::memcpy(&y, &bits, 2); return static_cast<float>(y); }
    static unsigned narrow(float x) { const _Float16 y = static_cast<_Float16>(x); uint16_t bits; std::memcpy(&bits, &y, 2); return bits; }
};

// Instructions, with the operands in the order of the asm statement.

inline void cp_async(unsigned target, const void* source, int bytes) { lanes[current]->open.push_back({target, source, bytes}); }
inline void copy_word(unsigned target, const void* source) { lanes[current]->open.push_back({target, source, 4, 4}); }
inline void draw(int& before, int* ticket) { before = (*ticket)++; }
inline void cp_async_commit() {
    auto& lane = *lanes[current];
    lane.groups.push_back(std::move(lane.open));
    lane.open.clear();
}
inline void cp_async_wait(int pending) {
    auto& groups = lanes[current]->groups;
    while (static_cast<int>(groups.size()) > pending) {
        for (const Copy& copy : groups.front()) {
            if (copy.bytes && reinterpret_cast<uintptr_t>(copy.source) % copy.size) std::abort();
            unsigned char* target = at(copy.target, copy.size);
            std::memset(target, 0, copy.size);
            std::memcpy(target, copy.source, static_cast<size_t>(copy.bytes));
        }
        groups.erase(groups.begin());
    }
}

inline void cp_async_wait_all() {
    cp_async_commit();
    cp_async_wait(0);
}

inline void load4(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned address) {
    const auto x = read<uint4>(address);
    a = x.x, b = x.y, c = x.z, d = x.w;
}
inline void store4(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) { write(address, uint4{a, b, c, d}); }
inline void load1(unsigned& a, unsigned address) { a = read<unsigned>(address); }
inline void store1(unsigned address, unsigned a) { write(address, a); }
inline void store_global4(void* target, unsigned a, unsigned b, unsigned c, unsigned d) {
    if (reinterpret_cast<uintptr_t>(target) % 16) std::abort();
    const unsigned all[4] = {a, b, c, d};
    std::memcpy(target, all, 16);
    ++stores[target];
}
inline void store_global2(void* target, unsigned a, unsigned b) {
    if (reinterpret_cast<uintptr_t>(target) % 8) std::abort();
    const unsigned both[2] = {a, b};
    std::memcpy(target, both, 8);
}

template <bool Transposed> void blocks(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned address) {
    unsigned* out[4] = {&a, &b, &c, &d};
    const int lane = current % 32;
    exchange(address, [&](auto all) {
        for (int i = 0; i < 4; ++i) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
                const int row = Transposed ? lane % 4 * 2 + e : lane / 4, column = Transposed ? lane / 4 : lane % 4 * 2 + e;
                std::memcpy(&pair[e], at(all(8 * i + row), 16) + 2 * column, 2);
            }
            *out[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
        }
        return 0;
    });
}

template <class Type>
void mma(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    struct Words { unsigned a[4], b[2]; };
    float* d[4] = {&d0, &d1, &d2, &d3};
    const int lane = current % 32;
    exchange(Words{{a0, a1, a2, a3}, {b0, b1}}, [&](auto all) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) {
                const Words left = all(row * 4 + k % 8 / 2), right = all(column * 4 + k % 8 / 2);
                const unsigned a = left.a[i / 2 + 2 * (k / 8)] >> (k % 2 * 16) & 0xffff, b = right.b[k / 8] >> (k % 2 * 16) & 0xffff;
                *d[i] += Type::widen(a) * Type::widen(b);
            }
        }
        return 0;
    });
}

template <class Type> void pack(unsigned& pair, float high, float low) { pair = Type::narrow(low) | Type::narrow(high) << 16; }
template <class Type> void taint(unsigned& taint, unsigned pair, unsigned) {
    for (int i = 0; i < 2; ++i) {
        if (!std::isfinite(Type::widen(pair >> (16 * i) & 0xffff))) taint |= 0x7fffu << (16 * i);
    }
}
template <class... T> void unknown(T&&...) { std::abort(); }
inline void exp2(float& y, float x) { y = std::exp2(x); }
inline void widen(float& y, unsigned short x) { y = Half::widen(x); }
inline void reciprocal(float& y, float x) { y = 1.f / x; }

// Runs `blocks` blocks of `threads`.
template <class F> void launch(unsigned blocks, unsigned threads, unsigned shared_bytes, Index& block, Index& thread, F kernel) {
    body = kernel;
    lanes.clear();
    for (unsigned i = 0; i < threads; ++i) {
        lanes.push_back(std::make_unique<Lane>());
        lanes.back()->stack.resize(128 << 10);
    }
    failure.clear();
    stores.clear();
    for (unsigned i = 0; i < blocks; ++i) {
        block.x = backwards ? blocks - 1 - i : i;
        shared.assign(shared_bytes, 0xff);  // NaN
        warps.assign(threads / 32, {});
        block_meeting = {};
        for (Meeting& meeting : pair_meetings) meeting = {};
        for (auto& lane : lanes) {
            getcontext(&lane->context);
            lane->context.uc_stack.ss_sp = lane->stack.data();
            lane->context.uc_stack.ss_size = lane->stack.size();
            lane->context.uc_link = nullptr;
            lane->done = false;
            lane->open.clear();
            lane->groups.clear();
            makecontext(&lane->context, run_lane, 0);
        }
        for (bool running = true; running;) {
            running = false;
            for (current = 0; current < threads; ++current) {
                if (lanes[current]->done) continue;
                running = true;
                thread.x = current;
                swapcontext(&scheduler, &lanes[current]->context);
                if (!failure.empty()) return;
            }
        }
    }
}

}  // namespace host

inline Index blockIdx, threadIdx, gridDim;

template <class T> T __shfl_sync(unsigned, T x, int from) { return host::exchange(x, [&](auto all) { return all(from & 31); }); }
template <class T> T __shfl_xor_sync(unsigned, T x, int step) { return __shfl_sync(0, x, static_cast<int>(host::current % 32) ^ step); }
inline int __any_sync(unsigned, bool x) {
    return host::exchange(x, [&](auto all) { int any = 0; for (int i = 0; i < 32; ++i) any |= all(i); return any; });
}
inline int __reduce_max_sync(unsigned, int x) {
    return host::exchange(x, [&](auto all) { int most = all(0); for (int i = 1; i < 32; ++i) most = max(most, all(i)); return most; });
}
inline void __syncwarp() { host::meet_warp(); }
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { host::meet_block(file + (":" + std::to_string(line))); }
inline int __syncthreads_or(int x, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    static int any;
    if (host::current == 0) any = 0;
    __syncthreads(file, line);
    any |= x;
    __syncthreads(file, line);
    const int found = any;
    __syncthreads(file, line);
    return found;
}
inline void __threadfence() {}
inline int atomicAdd(int* x, int by) { const int before = *x; *x += by; return before; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fadd_rn(float a, float b) { return a + b; }
extern "C" [[noreturn]] inline void __assertfail(const char* message, const char*, unsigned, const char*, size_t) {
    host::fail(message);
}
template <class T> T __ldcg(const T* x) { return *x; }
inline float __uint_as_float(unsigned x) { return host::as_float(x); }
inline unsigned __float_as_uint(float x) { return host::as_word(x); }
inline size_t __cvta_generic_to_shared(const void* x) { return static_cast<size_t>(static_cast<const unsigned char*>(x) - host::shared.data()); }
