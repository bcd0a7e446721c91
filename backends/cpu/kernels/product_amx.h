// Products on AMX tiles: C[rows, columns] = A[rows, k] B[k, columns], or C += A B. Blocks of 2 x 2 tiles of C take each tile of A
// and B for two products: one load each, the least that eight tiles allow. Rows of operands start at multiples of 64 bytes: a load
// that crosses cache lines takes four times as long.
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
void amx_blocks(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns,
                int64_t k) {
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
inline void amx_product(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows,
                        int64_t columns, int64_t k, bool accumulate) {
  (accumulate ? amx_blocks<true> : amx_blocks<false>)(a, lda, b, ldb, c, ldc, rows, columns, k);
}

// Products that wait for their turn, cut into steps of 2 x 2 tiles and 32 along k. Whoever has other work for the processor takes
// them by quarters, one dot each: then the tile unit and the vector units work at the same time. Whole steps in a row would not
// do: they fill the reorder buffer, and the instructions behind them wait.
class AmxQueue {
 public:
  static constexpr bool kAny = true;
  static constexpr int64_t kMost = 16;  // products of one start

  // As amx_product, in the order of the calls.
  void add(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns, int64_t k,
           bool accumulate) {
    products_[count_++] = {a, b, c, lda, ldb, ldc, rows, columns, k, accumulate};
  }

  // No more is added.
  void start() { next_block(); }

  // The next quarter, if any is left.
  ATTNHUB_INLINE void take() {
    if (left_ == 0) return;
    switch (quarter_) {
      case 0:
        amx_load<4>(a_, lda_);
        amx_load<6>(b_, ldb_);
        amx_dot<0, 4, 6>();
        break;
      case 1:
        amx_load<7>(b_ + kAmxSide, ldb_);
        amx_dot<1, 4, 7>();
        break;
      case 2:
        amx_load<5>(a_ + kAmxSide * lda_, lda_);
        amx_dot<2, 5, 6>();
        break;
      default:
        amx_dot<3, 5, 7>();
        end_step();
        return;
    }
    prefetch();
    ++quarter_;
  }

  // What is left, at once.
  void finish() {
    while (left_ != 0) take();
  }

 private:
  struct Product {
    const uint32_t *a, *b;
    float *c;
    int64_t lda, ldb, ldc, rows, columns, k;
    bool accumulate;
  };

  __attribute__((noinline)) void next_block() {
    for (; at_ < count_; ++at_, column_ = 0) {
      const Product &p = products_[at_];
      if (p.rows > kAmxSide && column_ + 2 * kAmxSide <= p.columns) {
        a_ = p.a;
        b_ = p.b + column_;
        c_ = p.c + column_;
        lda_ = p.lda;
        ldb_ = p.ldb;
        ldc_ = p.ldc;
        left_ = p.k;
        column_ += 2 * kAmxSide;
        if (p.accumulate) {
          amx_load<0>(c_, ldc_);
          amx_load<1>(c_ + kAmxSide, ldc_);
          amx_load<2>(c_ + kAmxSide * ldc_, ldc_);
          amx_load<3>(c_ + kAmxSide * ldc_ + kAmxSide, ldc_);
        } else {
          amx_zero<0>();
          amx_zero<1>();
          amx_zero<2>();
          amx_zero<3>();
        }
        return;
      }
      if (column_ < p.columns) {  // less than a block
        amx_product(p.a, p.lda, p.b + column_, p.ldb, p.c + column_, p.ldc, p.rows, p.columns - column_, p.k, p.accumulate);
      }
    }
  }

  // B comes from the second-level cache, since a group of rows meets all of a block's keys before the next group does: its tiles
  // of the next step are fetched in three parts, one after each of the first three dots.
  ATTNHUB_INLINE void prefetch() const {
    const uint32_t *next = b_ + (kAmxSide + 5 * quarter_) * ldb_;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {  // 16 rows, two of them twice
      __builtin_prefetch(next + i * ldb_);
      __builtin_prefetch(next + i * ldb_ + kAmxSide);
    }
  }

  void end_step() {
    quarter_ = 0;
    a_ += kAmxSide;
    b_ += kAmxSide * ldb_;
    left_ -= kAmxSide;
    if (left_ == 0) end_block();
  }

  __attribute__((noinline)) void end_block() {
    amx_store<0>(c_, ldc_);
    amx_store<1>(c_ + kAmxSide, ldc_);
    amx_store<2>(c_ + kAmxSide * ldc_, ldc_);
    amx_store<3>(c_ + kAmxSide * ldc_ + kAmxSide, ldc_);
    next_block();
  }

  const uint32_t *a_ = nullptr, *b_ = nullptr;
  float *c_ = nullptr;
  int64_t lda_ = 0, ldb_ = 0, ldc_ = 0, left_ = 0;  // left_: units along k of the block at hand, 0 at the end of all
  int64_t quarter_ = 0;
  int64_t count_ = 0, at_ = 0, column_ = 0;
  Product products_[kMost];
};

struct AmxPairs : Bf16Pairs {
  static constexpr int64_t kDepth = kAmxSide;
};

template <>
struct Products<AmxPairs> {
  static constexpr int64_t kRows = 2 * kAmxSide;
  static constexpr int64_t kRowStep = kAmxSide;
  static constexpr int64_t kKeyStep = AmxPairs::kDepth * AmxPairs::kPerUnit;
  static constexpr int64_t kScorePad = 16;
  static constexpr bool kOverlaps = true;
  using Queue = AmxQueue;
  using Session = AmxTiles;

  static void write(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns,
                    int64_t k) {
    amx_product(a, lda, b, ldb, c, ldc, (rows + kRowStep - 1) / kRowStep * kRowStep, columns, k, false);
  }

  // Tiles cannot be scaled: rows whose factor is not 1, few after the first blocks of keys, are scaled in memory.
  static void add(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows, int64_t columns,
                  int64_t k, const float *alpha) {
    for (int64_t i = 0; i < rows; ++i) {
      if (alpha[i] == 1.0f) continue;
      for (int64_t j = 0; j < columns; j += W) store(c + i * ldc + j, read<F>(c + i * ldc + j) * alpha[i]);
    }
    amx_product(a, lda, b, ldb, c, ldc, (rows + kRowStep - 1) / kRowStep * kRowStep, columns, k, true);
  }

  static void add_transposed(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int64_t rows,
                             int64_t columns, int64_t k) {
    amx_product(a, lda, b, ldb, c, ldc, (rows + kRowStep - 1) / kRowStep * kRowStep, columns, k, true);
  }
};

template <>
struct TileUnitsOf<Bf16> {
  using type = AmxPairs;
};

}  // namespace
}  // namespace attnhub_cpu
