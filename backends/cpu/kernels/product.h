// The register tile: C[rows, columns] = alpha * C + A[rows, k] B[k, columns], for both products of attention.
//
// Operands are streams of 4-byte units: one float, or a pair of bf16 along k for vdpbf16ps. One template serves both.
#pragma once

#include "vec.h"

namespace attnhub_cpu {
namespace {

struct FloatUnits {
  static constexpr int kPerUnit = 1;
  using Unit = float;
  static ATTNHUB_INLINE F broadcast(const float *a) { return splat(*a); }
  static ATTNHUB_INLINE F columns(const float *b) { return read<F>(b); }
  static ATTNHUB_INLINE F lanes(F v) { return v; }
  static ATTNHUB_INLINE F accumulate(F c, F a, F b) { return a * b + c; }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  static constexpr int kPerUnit = 2;
  using Unit = uint32_t;
  static ATTNHUB_INLINE __m512bh broadcast(const uint32_t *a) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)); }
  static ATTNHUB_INLINE __m512bh columns(const uint32_t *b) { return (__m512bh)_mm512_loadu_si512(b); }
  static ATTNHUB_INLINE __m512bh lanes(F v) { return (__m512bh)v; }
  static ATTNHUB_INLINE F accumulate(F c, __m512bh a, __m512bh b) { return (F)_mm512_dpbf16_ps((__m512)c, a, b); }
};
#endif

// Which units the products of a dtype run on in this instruction set.
template <class T>
struct UnitsOf {
  using type = FloatUnits;
};
#if defined(__AVX512BF16__)
template <>
struct UnitsOf<Bf16> {
  using type = Bf16Pairs;
};
#endif

// Units along k that one tile adds up before it touches C. Shorter chains round less: 512 products in one chain lose three
// times what PyTorch's product loses. Without FMA every product rounds, too.
#if defined(__FMA__) || defined(ATTNHUB_NEON)
constexpr int64_t kChain = 128;
#else
constexpr int64_t kChain = 32;
#endif

// Operand A as it lies in memory: [rows, k], or, transposed, [k, rows].
enum Orientation { kRowMajor, kTransposed };

// alpha: one factor per row of C, or null when C is only written.
template <class Units, Orientation kA, int Rows, int Vectors>
void tile(const typename Units::Unit *a, int64_t lda, const typename Units::Unit *b, int64_t ldb, float *c, int64_t ldc, int64_t k,
          const float *alpha) {
  F acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) acc[i][j] = F{};
  }
  for (int64_t x = 0; x < k; ++x) {
    decltype(Units::columns(b)) column[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) column[j] = Units::columns(b + x * ldb + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const auto row = Units::broadcast(kA == kRowMajor ? a + i * lda + x : a + x * lda + i);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) acc[i][j] = Units::accumulate(acc[i][j], row, column[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) {
      float *to = c + i * ldc + j * W;
      store(to, alpha ? splat(alpha[i]) * read<F>(to) + acc[i][j] : acc[i][j]);
    }
  }
}

template <class Units>
using Tile = void (*)(const typename Units::Unit *, int64_t, const typename Units::Unit *, int64_t, float *, int64_t, int64_t, const float *);

template <class Units, Orientation kA, int Rows>
Tile<Units> tile_of_width(int vectors) {
  if constexpr (kTileVectors > 2) {
    if (vectors == 4) return tile<Units, kA, Rows, 4>;
    if (vectors == 3) return tile<Units, kA, Rows, 3>;
  }
  return vectors == 2 ? tile<Units, kA, Rows, 2> : tile<Units, kA, Rows, 1>;
}

// The tile of 1 to kTileRows rows and 1 to kTileVectors vectors of columns.
template <class Units, Orientation kA = kRowMajor>
Tile<Units> tile_of(int rows, int vectors) {
  switch (rows) {
    case 1:
      return tile_of_width<Units, kA, 1>(vectors);
    case 2:
      return tile_of_width<Units, kA, 2>(vectors);
    case 3:
      return tile_of_width<Units, kA, 3>(vectors);
    case 4:
      return tile_of_width<Units, kA, 4>(vectors);
    case 5:
      return tile_of_width<Units, kA, 5>(vectors);
    default:
      return tile_of_width<Units, kA, 6>(vectors);
  }
}

}  // namespace
}  // namespace attnhub_cpu
