// What a core can do at best, for benchmarks: multiply-adds on registers alone, and reads of memory. A kernel's speed as a
// fraction of these says how much is left, on any machine.
#pragma once

#include "job.h"
#include "product.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace attnhub_cpu {
namespace {

// As many accumulators as the register tile of product.h has: enough to hide an instruction's latency, few enough to stay in registers.
constexpr int kAccumulators = kTileRows * kTileVectors;

ATTNHUB_INLINE void fill(F *acc) {
  // Read as volatile, so that nothing can be computed beforehand.
  const volatile float seed = 1.0f;
#pragma GCC unroll 32
  for (int i = 0; i < kAccumulators; ++i) acc[i] = splat(seed + static_cast<float>(i));
}

// `rounds` rounds of independent multiply-adds; returns their number of operations. `sum` takes what they made.
double flops_fma(int64_t rounds, float *sum) {
  F acc[kAccumulators];
  fill(acc);
  // x = x / 2 + 1 tends to 2: every product waits for its own accumulator only, and no value overflows or gets subnormal.
  const volatile float factor = 0.5f, term = 1.0f;
  const F a = splat(factor), b = splat(term);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) acc[i] = acc[i] * a + b;
  }
  F total = acc[0];
  for (int i = 1; i < kAccumulators; ++i) total += acc[i];
  *sum = reduce_add(total);
  return 2.0 * W * kAccumulators * static_cast<double>(rounds);
}

#if defined(__AMX_BF16__)
// Four 16 x 16 tiles of C, two of A and two of B: the largest product that the eight tiles hold.
double flops_bf16(int64_t rounds, float *sum) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) uint16_t ones[16 * 32];
  alignas(64) float c[16 * 16];
  for (uint16_t &x : ones) x = 0x3f80;
  // GCC's tile intrinsics do not say that they read all of this memory; without the barrier its stores may be left out.
  asm volatile("" : : "r"(&config), "r"(ones) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_release();
  *sum = c[0];
  return 4 * 2.0 * 16 * 16 * 32 * static_cast<double>(rounds);
}
#elif defined(__AVX512BF16__)
double flops_bf16(int64_t rounds, float *sum) {
  F acc[kAccumulators];
  fill(acc);
  const volatile float one = 1.0f;
  const auto a = Bf16Pairs::lanes(splat(one)), b = Bf16Pairs::lanes(splat(one));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) acc[i] = Bf16Pairs::accumulate(acc[i], a, b);
  }
  F total = acc[0];
  for (int i = 1; i < kAccumulators; ++i) total += acc[i];
  *sum = reduce_add(total);
  return 4.0 * W * kAccumulators * static_cast<double>(rounds);
}
#else
double flops_bf16(int64_t rounds, float *sum) { return flops_fma(rounds, sum); }
#endif

// Reads `count` floats once, a multiple of 512; returns their sum, so that no read can be left out. In four streams: where pages are
// small, a processor's prefetcher stops at the end of each, and the others go on; one stream reads at two thirds of the rate.
float read_all(const float *data, int64_t count) {
  constexpr int kStreams = 4, kSums = 8;
  constexpr int64_t kStep = 128;
  const int64_t part = count / kStreams;
  F acc[kSums];
  for (F &x : acc) x = F{};
  for (int64_t i = 0; i + kStep <= part; i += kStep) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const float *from = data + stream * part + i;
#pragma GCC unroll 32
      for (int64_t v = 0; v < kStep / W; ++v) acc[v % kSums] += read<F>(from + v * W);
    }
  }
  F total = acc[0];
  for (int v = 1; v < kSums; ++v) total += acc[v];
  return reduce_add(total);
}

constexpr Ceiling kCeiling = {{flops_fma, flops_bf16, flops_fma}, read_all};  // fp16 is computed in fp32

}  // namespace
}  // namespace attnhub_cpu
