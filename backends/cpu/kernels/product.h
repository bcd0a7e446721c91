// The register tile: C[rows, columns] = alpha * C + A[rows, k] B[k, columns], for both products of attention.
//
// Operands are streams of 4-byte units: one float, or a pair of bf16 along k for vdpbf16ps. One template serves both.
#pragma once

#include "vec.h"

namespace attnhub_cpu {
namespace {

struct FloatUnits {
  static constexpr int kPerUnit = 1;
  static constexpr int64_t kDepth = 1;  // units along k that a product needs a multiple of: what is packed is padded with zeros
  using Unit = float;
  static ATTNHUB_INLINE F broadcast(const float *a) { return splat(*a); }
  static ATTNHUB_INLINE F columns(const float *b) { return read<F>(b); }
  static ATTNHUB_INLINE F lanes(F v) { return v; }
  static ATTNHUB_INLINE F accumulate(F c, F a, F b) { return a * b + c; }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  static constexpr int kPerUnit = 2;
  static constexpr int64_t kDepth = 1;
  using Unit = uint32_t;
  static ATTNHUB_INLINE __m512bh broadcast(const uint32_t *a) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)); }
  static ATTNHUB_INLINE __m512bh columns(const uint32_t *b) { return (__m512bh)_mm512_loadu_si512(b); }
  static ATTNHUB_INLINE __m512bh lanes(F v) { return (__m512bh)v; }
  static ATTNHUB_INLINE F accumulate(F c, __m512bh a, __m512bh b) { return (F)_mm512_dpbf16_ps((__m512)c, a, b); }
};
#endif

// What is done beside the softmax, for another unit of the processor: nothing. AmxQueue is something.
struct NoWork {
  static constexpr bool kAny = false;
};

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

// Factors that change nothing.
template <int64_t kCount>
struct Ones {
  float factor[kCount];
  constexpr Ones() : factor() {
    for (float &x : factor) x = 1.0f;
  }
};

// The products of a tiled task, up to kRows rows and kTileColumns columns of C at a time. This is how register tiles do them.
template <class Units>
struct Products {
  using Unit = typename Units::Unit;
  static constexpr int64_t kRows = kTileRows;
  static constexpr int64_t kRowStep = 1;    // rows of A and C exist up to a multiple of this
  static constexpr int64_t kKeyStep = W;    // columns of scores are computed, and weights summed, in multiples of this
  static constexpr int64_t kScorePad = 0;   // floats between rows of scores
  static constexpr bool kOverlaps = false;  // whether a unit of its own multiplies, beside the softmax: see AmxQueue
  struct Session {};                        // what a thread holds while it multiplies

  // C = A B
  static ATTNHUB_INLINE void write(const Unit *a, int64_t lda, const Unit *b, int64_t ldb, float *c, int64_t ldc, int64_t rows,
                                   int64_t columns, int64_t k) {
    static constexpr Ones<kTileRows> kOnes;
    const Tile<Units> tile = tile_of<Units>(static_cast<int>(rows), static_cast<int>(columns / W));
    for (int64_t u = 0; u < k; u += kChain) {
      tile(a + u, lda, b + u * ldb, ldb, c, ldc, k - u < kChain ? k - u : kChain, u ? kOnes.factor : nullptr);
    }
  }

  // C = alpha C + A B, one factor per row
  static ATTNHUB_INLINE void add(const Unit *a, int64_t lda, const Unit *b, int64_t ldb, float *c, int64_t ldc, int64_t rows,
                                 int64_t columns, int64_t k, const float *alpha) {
    tile_of<Units>(static_cast<int>(rows), static_cast<int>(columns / W))(a, lda, b, ldb, c, ldc, k, alpha);
  }

  // C += A B for any number of rows, A as a TransposedOperand
  static void add_transposed(const Unit *a, int64_t lda, const Unit *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns, int64_t k) {
    static constexpr Ones<kTileRows> kOnes;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t left = rows - i < kTileRows ? rows - i : kTileRows;
      tile_of<Units, kTransposed>(static_cast<int>(left), static_cast<int>(columns / W))(a + i, lda, b, ldb, c + i * ldc, ldc, k, kOnes.factor);
    }
  }
};

// Which units the products of a tiled task run on; decoding takes UnitsOf everywhere.
template <class T>
struct TileUnitsOf : UnitsOf<T> {};

}  // namespace
}  // namespace attnhub_cpu
