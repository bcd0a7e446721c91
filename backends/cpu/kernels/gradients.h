// What the backward needs beside the forward's parts: the transposed operands of dK and dV, and how gradients are written.
#pragma once

#include "pack.h"

namespace attnhub_cpu {
namespace {

// The transposed operand of dK^T = Q^T dS and dV^T = dO^T P: rows of q or dO in units along the rows. For floats it is what pack_q
// makes. Pairs are made anew: for register tiles [pair of rows][columns], for AMX, which takes operands by rows, [column][pairs].
template <class Units>
struct TransposedOperand {
  using Unit = typename Units::Unit;
  static constexpr bool kPacked = Units::kPerUnit == 2;
  static constexpr bool kByColumn = Units::kDepth > 1;
  static_assert(!kByColumn || Units::kDepth == W, "a unit of depth is one transposition");

  // Units between two pairs of rows, or between two columns. columns: a multiple of W.
  static int64_t ld(int64_t columns, int64_t most_rows) { return kByColumn ? most_rows / Units::kPerUnit : columns; }
  static int64_t size(int64_t columns, int64_t most_rows) { return kPacked ? columns * most_rows / Units::kPerUnit : 0; }

  // Rows up to a multiple of kDepth pairs, and columns behind n, are zeros.
  template <class T>
  static void pack(const T *const *rows, int64_t count, int64_t n, int64_t columns, Unit *to, int64_t ld) {
    for (int64_t first = 0; first < count; first += 2 * Units::kDepth) {
      for (int64_t x = 0; x < columns; x += W) {
        F pairs[Units::kDepth];
#pragma GCC unroll 16
        for (int e = 0; e < Units::kDepth; ++e) pairs[e] = pair(rows, first + 2 * e, count, x, n);
        if constexpr (kByColumn) {
          transpose(pairs);
#pragma GCC unroll 16
          for (int e = 0; e < W; ++e) std::memcpy(to + (x + e) * ld + first / 2, &pairs[e], sizeof pairs[e]);
        } else {
          std::memcpy(to + first / 2 * ld + x, &pairs[0], sizeof pairs[0]);
        }
      }
    }
  }

 private:
  template <class T>
  static ATTNHUB_INLINE F pair(const T *const *rows, int64_t r, int64_t count, int64_t x, int64_t n) {
    const F low = columns_of(rows, r, count, x, n), high = columns_of(rows, r + 1, count, x, n);
    return bit_cast<F>(bit_cast<U>(low) >> 16 | (bit_cast<U>(high) & 0xffff0000u));
  }
  template <class T>
  static ATTNHUB_INLINE F columns_of(const T *const *rows, int64_t r, int64_t count, int64_t x, int64_t n) {
    if (r >= count || x >= n) return F{};
    return n - x >= W ? load(rows[r] + x) : load_part(rows[r] + x, static_cast<int>(n - x));
  }
};

template <class T>
ATTNHUB_INLINE void write_scaled(T *to, const float *from, int64_t n, float factor) {
  int64_t x = 0;
  for (; x + W <= n; x += W) store(to + x, read<F>(from + x) * factor);
  if (x < n) store_part(to + x, read<F>(from + x) * factor, static_cast<int>(n - x));
}

// to[j * stride + c] = factor * from[c * ld + j]: a gradient that was collected transposed. ld and the rows of `from` are padded
// to whole vectors.
template <class T>
void write_transposed(T *to, int64_t stride, const float *from, int64_t ld, int64_t keys, int64_t n, float factor) {
  for (int64_t j = 0; j < keys; j += W) {
    for (int64_t c = 0; c < n; c += W) {
      F r[W];
#pragma GCC unroll 16
      for (int e = 0; e < W; ++e) r[e] = read<F>(from + (c + e) * ld + j) * factor;
      transpose(r);
      const int part = static_cast<int>(min64(W, n - c));
      for (int e = 0; e < min64(W, keys - j); ++e) {
        T *row = to + (j + e) * stride + c;
        if (part == W) {
          store(row, r[e]);
        } else {
          store_part(row, r[e], part);
        }
      }
    }
  }
}

}  // namespace
}  // namespace attnhub_cpu
