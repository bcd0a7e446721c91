// AMX tiles: the few instructions that the products use. All tiles are 16 rows of 16 units of 4 bytes (floats, or pairs of bf16).
//
// With ATTNHUB_EMULATE_AMX the same functions compute on memory of the thread, so that everything built on them can be tested on
// a processor without AMX. The instructions are written out: compilers' intrinsics take literal tile numbers only, and GCC 12's
// loads do not tell it that they read memory.
#pragma once

#include <cstdlib>

#include "vec.h"

namespace attnhub_cpu {
namespace {

constexpr int64_t kAmxSide = 16;  // rows of a tile, and units in a row

#if defined(ATTNHUB_EMULATE_AMX)

struct AmxState {
  bool configured;
  uint32_t tile[8][kAmxSide][kAmxSide];
};
thread_local AmxState amx_state;

inline uint32_t (*amx_tile(int tile))[kAmxSide] {
  if (!amx_state.configured) std::abort();  // the instructions fault
  return amx_state.tile[tile];
}
inline void amx_configure() { amx_state = {true, {}}; }
inline void amx_release() { amx_state.configured = false; }

template <int kTile>
void amx_zero() {
  std::memset(amx_tile(kTile), 0, sizeof amx_state.tile[kTile]);
}
template <int kTile, class T>
void amx_load(const T *from, int64_t ld) {
  for (int64_t i = 0; i < kAmxSide; ++i) std::memcpy(amx_tile(kTile)[i], from + i * ld, sizeof amx_state.tile[kTile][i]);
}
template <int kTile>
void amx_store(float *to, int64_t ld) {
  for (int64_t i = 0; i < kAmxSide; ++i) std::memcpy(to + i * ld, amx_tile(kTile)[i], sizeof amx_state.tile[kTile][i]);
}
// C[m][n] += A[m][k].low * B[k][n].low, then the same with .high: one rounding for each sum, subnormals taken for zeros.
template <int kC, int kA, int kB>
void amx_dot() {
  const auto flush = [](F v) {
    const U bits = bit_cast<U>(v);
    return bit_cast<F>((bits & 0x7f800000u) == 0u ? bits & 0x80000000u : bits);
  };
  static_assert(W == kAmxSide, "a row of a tile is one vector");
  for (int64_t m = 0; m < kAmxSide; ++m) {
    F c = read<F>(amx_tile(kC)[m]);
    for (int64_t k = 0; k < kAmxSide; ++k) {
      const U a = U{} + amx_tile(kA)[m][k], b = read<U>(amx_tile(kB)[k]);
      c = flush(flush(bit_cast<F>(a << 16)) * flush(bit_cast<F>(b << 16)) + c);
      c = flush(flush(bit_cast<F>(a & 0xffff0000u)) * flush(bit_cast<F>(b & 0xffff0000u)) + c);
    }
    std::memcpy(amx_tile(kC)[m], &c, sizeof c);
  }
}

#else

ATTNHUB_INLINE void amx_configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof config == 64, "the layout that ldtilecfg reads");
  asm volatile("ldtilecfg %0" ::"m"(config));
}
ATTNHUB_INLINE void amx_release() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
ATTNHUB_INLINE void amx_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile, class T>
ATTNHUB_INLINE void amx_load(const T *from, int64_t ld) {
  static_assert(sizeof(T) == 4, "rows are counted in units");
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(ld * 4) : "memory");
}
template <int kTile>
ATTNHUB_INLINE void amx_store(float *to, int64_t ld) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(ld * 4) : "memory");
}
template <int kC, int kA, int kB>
ATTNHUB_INLINE void amx_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#endif

// Holds the tiles of this thread. The thread belongs to a pool that others use: nothing is left behind.
class AmxTiles {
 public:
  AmxTiles() { amx_configure(); }
  ~AmxTiles() { amx_release(); }
  AmxTiles(const AmxTiles &) = delete;
  AmxTiles &operator=(const AmxTiles &) = delete;
};

}  // namespace
}  // namespace attnhub_cpu
