// Packing: rows of q, k and v, at any strides or pages, into the units and the order that the register tiles stream.
#pragma once

#include "product.h"

namespace attnhub_cpu {
namespace {

ATTNHUB_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
ATTNHUB_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
ATTNHUB_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// W units of a row along the head dimension, starting at unit u of n elements in all; zeros behind the end.
template <class Units, class T>
ATTNHUB_INLINE F load_units(const T *row, int64_t u, int64_t n) {
  const int64_t first = u * Units::kPerUnit;
  const int64_t left = n - first;
  if constexpr (Units::kPerUnit == 1) {
    return left >= W ? load(row + first) : load_part(row + first, static_cast<int>(left));
  } else {
    if (left >= 2 * W) return read<F>(row + first);
    T tmp[2 * W] = {};
    std::memcpy(tmp, row + first, static_cast<size_t>(left) * sizeof(T));
    return read<F>(tmp);
  }
}

// One row of q: ceil(n / kPerUnit) units, rounded up to whole vectors.
template <class Units, class T>
void pack_q(const T *row, int64_t n, typename Units::Unit *to) {
  const int64_t units = (n + Units::kPerUnit - 1) / Units::kPerUnit;
  for (int64_t u = 0; u < units; u += W) {
    const F v = load_units<Units>(row, u, n);
    std::memcpy(to + u, &v, sizeof v);
  }
}

// A panel of k: keys rows of n elements -> to[unit][kTileColumns], transposed. Keys up to the next whole vector are zeros.
template <class Units, class T>
void pack_k(const T *const *rows, int64_t keys, int64_t n, typename Units::Unit *to) {
  const int64_t units = (n + Units::kPerUnit - 1) / Units::kPerUnit;
  for (int64_t j = 0; j < keys; j += W) {
    const int valid = static_cast<int>(min64(W, keys - j));
    for (int64_t u = 0; u < units; u += W) {
      F r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = i < valid ? load_units<Units>(rows[j + i], u, n) : F{};
      transpose(r);
      const int64_t whole = min64(W, units - u);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i < whole) std::memcpy(to + (u + i) * kTileColumns + j, &r[i], sizeof r[i]);
      }
    }
  }
}

// A block of v: keys rows of n elements -> for every chunk of kTileColumns columns (the last one narrower, a whole number
// of vectors), to[key unit][columns]. Chunks lie chunk_stride units apart. Returns whether all values are finite.
template <class Units, class T>
bool pack_v(const T *const *rows, int64_t keys, int64_t n, typename Units::Unit *to, int64_t chunk_stride) {
  F poison = {};  // 0 * Inf and 0 * NaN are NaN
  for (int64_t c = 0; c < n; c += kTileColumns, to += chunk_stride) {
    const int64_t width = min64(kTileColumns, round_up(n - c, W));
    for (int64_t j = 0; j < keys; j += Units::kPerUnit) {
      typename Units::Unit *line = to + j / Units::kPerUnit * width;
      for (int64_t x = 0; x < width; x += W) {
        const int64_t left = n - c - x;
        const int part = static_cast<int>(left);
        const T *even = rows[j] + c + x;
        const F first = left >= W ? load(even) : load_part(even, part);
        poison += first * 0.0f;
        if constexpr (Units::kPerUnit == 1) {
          store(line + x, first);
        } else {
          F second = {};
          if (j + 1 < keys) {
            const T *odd = rows[j + 1] + c + x;
            second = left >= W ? load(odd) : load_part(odd, part);
          }
          poison += second * 0.0f;
          const U pair = bit_cast<U>(first) >> 16 | bit_cast<U>(second);
          std::memcpy(line + x, &pair, sizeof pair);
        }
      }
    }
  }
  return reduce_add(poison) == 0.0f;
}

}  // namespace
}  // namespace attnhub_cpu
