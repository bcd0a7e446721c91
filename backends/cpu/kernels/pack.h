// Packing: rows of q, k and v, at any strides or pages, into the units and the order that the register tiles stream.
#pragma once

#include "product.h"
#if defined(__AMX_BF16__) || defined(ATTNHUB_EMULATE_AMX)
#include "product_amx.h"
#endif

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

// A panel of k: keys rows of n elements -> to[unit][kTileColumns], transposed. Keys up to the next whole vector are zeros, and so
// are units up to a multiple of kDepth.
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
      const int64_t whole = min64(W, round_up(units, Units::kDepth) - u);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i < whole) std::memcpy(to + (u + i) * kTileColumns + j, &r[i], sizeof r[i]);
      }
    }
  }
}

#if defined(__AVX512BF16__)
// pack_v for pairs, on their bits: 32 columns of two keys are zipped by two permutations.
template <class Units>
bool pack_v_pairs(const Bf16 *const *rows, int64_t keys, int64_t n, uint32_t *to, int64_t chunk_stride) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                       34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16)), magnitude = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t c = 0; c < n; c += kTileColumns, to += chunk_stride) {
    const int64_t width = min64(kTileColumns, round_up(n - c, W));
    const int64_t pairs = (keys + 1) / 2;
    for (int64_t x = 0; x < width; x += 2 * W) {
      const int64_t left = n - c - x;
      const __mmask32 columns = left >= 2 * W ? 0xffffffffu : (1u << left) - 1u;
      for (int64_t j = 0; j < pairs; ++j) {
        const __m512i even = _mm512_maskz_loadu_epi16(columns, rows[2 * j] + c + x);
        const __m512i odd = 2 * j + 1 < keys ? _mm512_maskz_loadu_epi16(columns, rows[2 * j + 1] + c + x) : _mm512_setzero_si512();
        largest = _mm512_max_epu16(largest, _mm512_max_epu16(_mm512_and_si512(even, magnitude), _mm512_and_si512(odd, magnitude)));
        _mm512_storeu_si512(to + j * width + x, _mm512_permutex2var_epi16(even, low, odd));
        if (x + W < width) _mm512_storeu_si512(to + j * width + x + W, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
    const int64_t padded = round_up(pairs, Units::kDepth);
    std::memset(to + pairs * width, 0, static_cast<size_t>((padded - pairs) * width) * sizeof *to);
  }
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;  // an exponent of all ones
}
#endif

// A block of v: keys rows of n elements -> for every chunk of kTileColumns columns (the last one narrower, a whole number
// of vectors), to[key unit][columns]. Chunks lie chunk_stride units apart. Returns whether all values are finite.
template <class Units, class T>
bool pack_v(const T *const *rows, int64_t keys, int64_t n, typename Units::Unit *to, int64_t chunk_stride) {
#if defined(__AVX512BF16__)
  if constexpr (Units::kPerUnit == 2) return pack_v_pairs<Units>(rows, keys, n, to, chunk_stride);
#endif
  if constexpr (Units::kPerUnit == 1) {
    F poison = {};  // 0 * Inf and 0 * NaN are NaN
    for (int64_t c = 0; c < n; c += kTileColumns, to += chunk_stride) {
      const int64_t width = min64(kTileColumns, round_up(n - c, W));
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t x = 0; x < width; x += W) {
          const int64_t left = n - c - x;
          const F v = left >= W ? load(rows[j] + c + x) : load_part(rows[j] + c + x, static_cast<int>(left));
          poison += v * 0.0f;
          store(to + j * width + x, v);
        }
      }
    }
    return reduce_add(poison) == 0.0f;
  }
}

template <class T>
bool all_finite(const T *const *rows, int64_t count, int64_t n) {
  F poison = {};  // 0 * Inf and 0 * NaN are NaN
  for (int64_t r = 0; r < count; ++r) {
    int64_t x = 0;
    for (; x + W <= n; x += W) poison += load(rows[r] + x) * 0.0f;
    if (x < n) poison += load_part(rows[r] + x, static_cast<int>(n - x)) * 0.0f;
  }
  return reduce_add(poison) == 0.0f;
}

}  // namespace
}  // namespace attnhub_cpu
