// Products on AMX tiles: C[rows, columns] = A[rows, k] B[k, columns], or C += A B. Blocks of 2 x 2 tiles of C read each tile of A
// and B for two products, which keeps the two loads of a product below its 16 cycles.
#pragma once

#include <type_traits>
#include <utility>

#include "amx.h"
#include "product.h"

namespace attnhub_cpu {
namespace {

template <class Fn, int... N>
ATTNHUB_INLINE void amx_for_each(std::integer_sequence<int, N...>, Fn fn) {
  (fn(std::integral_constant<int, N>()), ...);
}

// Rows x Columns tiles of C: tiles 0 to 3 are C, then those of A, and what is left takes those of B in turn.
template <int Rows, int Columns, bool kAdd>
__attribute__((noinline)) void amx_block(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t k) {
  static_assert(Rows <= 2 && Rows * Columns <= 4, "eight tiles");
  constexpr std::make_integer_sequence<int, Rows * Columns> kTiles;
  amx_for_each(kTiles, [&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    if constexpr (kAdd) {
      amx_load<kTile>(c + kTile / Columns * kAmxSide * ldc + kTile % Columns * kAmxSide, ldc);
    } else {
      amx_zero<kTile>();
    }
  });
  for (int64_t x = 0; x < k; x += kAmxSide) {
    amx_for_each(kTiles, [&](auto tile) {
      constexpr int kTile = decltype(tile)::value, kRow = kTile / Columns, kColumn = kTile % Columns;
      constexpr int kA = 4 + kRow, kB = 4 + Rows + kColumn % (4 - Rows);
      if constexpr (kColumn == 0) amx_load<kA>(a + kRow * kAmxSide * lda + x, lda);
      if constexpr (kRow == 0) amx_load<kB>(b + x * ldb + kColumn * kAmxSide, ldb);
      amx_dot<kTile, kA, kB>();
    });
  }
  amx_for_each(kTiles, [&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    amx_store<kTile>(c + kTile / Columns * kAmxSide * ldc + kTile % Columns * kAmxSide, ldc);
  });
}

template <bool kAdd>
void amx_blocks(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns, int64_t k) {
  int64_t j = 0;
  for (; j + 2 * kAmxSide <= columns; j += 2 * kAmxSide) {
    int64_t i = 0;
    for (; i + 2 * kAmxSide <= rows; i += 2 * kAmxSide) amx_block<2, 2, kAdd>(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, k);
    if (i < rows) amx_block<1, 2, kAdd>(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, k);
  }
  if (j == columns) return;
  int64_t i = 0;
  for (; i + 2 * kAmxSide <= rows; i += 2 * kAmxSide) amx_block<2, 1, kAdd>(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, k);
  if (i < rows) amx_block<1, 1, kAdd>(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, k);
}

// Units are pairs of bf16 along k. rows, columns and k (units) are multiples of kAmxSide; the thread holds AmxTiles.
inline void amx_product(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns,
                        int64_t k, bool accumulate) {
  (accumulate ? amx_blocks<true> : amx_blocks<false>)(a, lda, b, ldb, c, ldc, rows, columns, k);
}

struct AmxPairs : Bf16Pairs {
  static constexpr int64_t kDepth = kAmxSide;
};

template <>
struct Products<AmxPairs> {
  static constexpr int64_t kRows = 2 * kAmxSide;
  static constexpr int64_t kRowStep = kAmxSide;
  static constexpr int64_t kKeyStep = AmxPairs::kDepth * AmxPairs::kPerUnit;
  static constexpr int64_t kScorePad = 16;
  using Session = AmxTiles;

  static void write(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns, int64_t k) {
    amx_product(a, lda, b, ldb, c, ldc, (rows + kRowStep - 1) / kRowStep * kRowStep, columns, k, false);
  }

  // Tiles cannot be scaled: rows whose factor is not 1, few after the first blocks of keys, are scaled in memory.
  static void add(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns, int64_t k,
                  const float *alpha) {
    for (int64_t i = 0; i < rows; ++i) {
      if (alpha[i] == 1.0f) continue;
      for (int64_t j = 0; j < columns; j += W) store(c + i * ldc + j, read<F>(c + i * ldc + j) * alpha[i]);
    }
    amx_product(a, lda, b, ldb, c, ldc, (rows + kRowStep - 1) / kRowStep * kRowStep, columns, k, true);
  }

  static void add_transposed(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns, int64_t k) {
    amx_product(a, lda, b, ldb, c, ldc, (rows + kRowStep - 1) / kRowStep * kRowStep, columns, k, true);
  }
};

template <>
struct TileUnitsOf<Bf16> {
  using type = AmxPairs;
};

}  // namespace
}  // namespace attnhub_cpu
