// Few rows against many keys (decoding): bound by reading K and V once, so nothing is packed. Scores are dot products of a
// few keys and rows at a time, the output sums rows of V; both stream memory rows with software prefetch.
#pragma once

#include "softmax.h"

namespace attnhub_cpu {
namespace {

constexpr int64_t kDecodeRows = 8;
constexpr int64_t kDecodeKeys = 256;
static_assert(kDecodeKeys <= kMostBlockKeys, "the room of drop_weights");
constexpr int64_t kPrefetchRows = 16;
constexpr int kRowsAtOnce = W >= 16 ? 4 : 2;
// A block of keys is read as this many streams, a row or two of each in turn, and prefetched into the second-level cache only. Measured
// on a Zen 4 with pages of 4 KiB: one stream, prefetched into the first level, took half as long again, on one thread nearly twice as long.
// Hardware prefetchers stop at the end of a page, and a core can wait for fewer lines of its first level than of its second.
constexpr int64_t kStreams = 4;

template <class T>
ATTNHUB_INLINE void prefetch_row(const T *row, int64_t n) {
  const char *p = reinterpret_cast<const char *>(row);
  for (int64_t x = 0; x < n * static_cast<int64_t>(sizeof(T)); x += 64) __builtin_prefetch(p + x, 0, 2);
}

// s[g * lds + x] = q[g] . rows[x] for Rows rows of q and W / Rows keys of n elements: W sums, folded into one vector.
template <class Units, class T, int Rows>
ATTNHUB_INLINE void dots(const typename Units::Unit *q, int64_t ldq, const T *const *rows, int64_t n, float *s, int64_t lds) {
  constexpr int kKeys = W / Rows;
  constexpr int64_t kStep = W * Units::kPerUnit;
  F acc[W] = {};
  int64_t d = 0;
  for (; d + kStep <= n; d += kStep) {
    decltype(Units::columns(q)) qs[Rows];
#pragma GCC unroll 4
    for (int g = 0; g < Rows; ++g) qs[g] = Units::columns(q + g * ldq + d / Units::kPerUnit);
#pragma GCC unroll 16
    for (int x = 0; x < kKeys; ++x) {
      const auto k = Units::lanes(load_units<Units>(rows[x], d / Units::kPerUnit, n));
#pragma GCC unroll 4
      for (int g = 0; g < Rows; ++g) acc[g * kKeys + x] = Units::accumulate(acc[g * kKeys + x], qs[g], k);
    }
  }
  if (d < n) {
    for (int x = 0; x < kKeys; ++x) {
      const auto k = Units::lanes(load_units<Units>(rows[x], d / Units::kPerUnit, n));
      for (int g = 0; g < Rows; ++g) {
        acc[g * kKeys + x] = Units::accumulate(acc[g * kKeys + x], Units::columns(q + g * ldq + d / Units::kPerUnit), k);
      }
    }
  }
  float lanes[W];
  store(lanes, sums(acc));
#pragma GCC unroll 4
  for (int g = 0; g < Rows; ++g) std::memcpy(s + g * lds, lanes + g * kKeys, kKeys * sizeof(float));
}

// One key unit of v, columns [column, column + Vectors * W) as vectors of units. tail: elements of the last vector when it
// is not whole, else 0 (then Vectors is 1).
template <class Units, int Vectors, class T, class Column>
ATTNHUB_INLINE void load_columns(const T *const *rows, int64_t column, int tail, Column *v) {
  if constexpr (Units::kPerUnit == 1) {
#pragma GCC unroll 4
    for (int x = 0; x < Vectors; ++x) v[x] = tail ? load_part(rows[0] + column, tail) : load(rows[0] + column + x * W);
#if defined(__AVX512BF16__)
  } else if constexpr (Vectors % 2 == 0) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
#pragma GCC unroll 4
    for (int x = 0; x < Vectors; x += 2) {
      const __m512i even = _mm512_loadu_si512(rows[0] + column + x * W), odd = _mm512_loadu_si512(rows[1] + column + x * W);
      v[x] = (__m512bh)_mm512_permutex2var_epi16(even, low, odd);
      v[x + 1] = (__m512bh)_mm512_permutex2var_epi16(even, high, odd);
    }
#endif
  } else {
    const F even = tail ? load_part(rows[0] + column, tail) : load(rows[0] + column);
    const F odd = tail ? load_part(rows[1] + column, tail) : load(rows[1] + column);
    v[0] = Units::lanes(bit_cast<F>(bit_cast<U>(even) >> 16 | bit_cast<U>(odd)));
  }
}

// The keys of a block [from, from + kStreams * kKeys * count) in the order in which V is read: kKeys of each stream in turn.
struct Visits {
  static constexpr int64_t kKeys = W / 4 < 2 ? 1 : 2;  // a vector of keys is a whole number of rounds, and a pair of bf16 one visit
  static constexpr int64_t kAtOnce = 8;  // whose rows stay in the first-level cache for all rows of weights and all columns
  int64_t from, count, first, last;      // the visits [first, last) of count
  ATTNHUB_INLINE int64_t key(int64_t n) const { return from + (n % kStreams * (count / kStreams) + n / kStreams) * kKeys; }
};

// o[g][0, Vectors * W) += sum over the keys of some visits of p[g][j] * rows[j][column...].
template <class Units, class T, int Rows, int Vectors>
void weighted_sum(const typename Units::Unit *p, int64_t ldp, const T *const *rows, Visits visits, int64_t column, int tail, float *o, int64_t ldo) {
  F acc[Rows][Vectors];
#pragma GCC unroll 4
  for (int g = 0; g < Rows; ++g) {
#pragma GCC unroll 4
    for (int x = 0; x < Vectors; ++x) acc[g][x] = read<F>(o + g * ldo + x * W);
  }
  for (int64_t n = visits.first; n < visits.last; ++n) {
    const int64_t begin = visits.key(n);
#pragma GCC unroll 2
    for (int64_t j = begin; j < begin + Visits::kKeys; j += Units::kPerUnit) {
      decltype(Units::columns(p)) v[Vectors];
      load_columns<Units, Vectors>(rows + j, column, tail, v);
#pragma GCC unroll 4
      for (int g = 0; g < Rows; ++g) {
        const auto weight = Units::broadcast(p + g * ldp + j / Units::kPerUnit);
#pragma GCC unroll 4
        for (int x = 0; x < Vectors; ++x) acc[g][x] = Units::accumulate(acc[g][x], weight, v[x]);
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < Rows; ++g) {
#pragma GCC unroll 4
    for (int x = 0; x < Vectors; ++x) store(o + g * ldo + x * W, acc[g][x]);
  }
}

template <class Units, class T, int Rows>
void weighted_sums(const typename Units::Unit *p, int64_t ldp, const T *const *rows, Visits visits, int64_t n, float *o, int64_t ldo) {
  int64_t c = 0;
  for (; c + 4 * W <= n; c += 4 * W) weighted_sum<Units, T, Rows, 4>(p, ldp, rows, visits, c, 0, o + c, ldo);
  for (; c + W <= n; c += W) weighted_sum<Units, T, Rows, 1>(p, ldp, rows, visits, c, 0, o + c, ldo);
  if (c < n) weighted_sum<Units, T, Rows, 1>(p, ldp, rows, visits, c, static_cast<int>(n - c), o + c, ldo);
}

// The weights of a row, s[from, to) in units, as floats.
template <class Units>
ATTNHUB_INLINE const float *weights_of(const float *line, int64_t from, int64_t to, float *room) {
  if constexpr (Units::kPerUnit == 1) {
    return line;
  } else {
    const Bf16 *rounded = reinterpret_cast<const Bf16 *>(line);
    for (int64_t x = from; x < to; ++x) room[x] = to_float(rounded[x]);
    return room;
  }
}

// The same for values that are not all finite: a pair of weight 0 contributes nothing, whatever its value is.
template <class T>
void select_sum(const float *p, const T *const *rows, int64_t from, int64_t to, int64_t n, float *o, float alpha) {
  for (int64_t c = 0; c < n; ++c) o[c] *= alpha;
  for (int64_t j = from; j < to; ++j) {
    if (p[j] == 0.0f) continue;
    for (int64_t c = 0; c < n; ++c) o[c] += p[j] * to_float(rows[j][c]);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls fn(Count<n>, first row) for groups of as many rows as the registers hold.
template <class Fn>
ATTNHUB_INLINE void for_row_groups(int64_t rows, Fn fn) {
  int64_t r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) fn(Count<kRowsAtOnce>(), r);
  if constexpr (kRowsAtOnce > 2) {
    for (; r + 2 <= rows; r += 2) fn(Count<2>(), r);
  }
  for (; r < rows; ++r) fn(Count<1>(), r);
}

// Raw scores of all rows with keys [from, to) of a block, whole vectors: s[r * kDecodeKeys + j].
template <class Units, class T>
void decode_scores(const typename Units::Unit *q, int64_t ldq, int64_t rows, const T *const *k_rows, int64_t from, int64_t to, int64_t n, float *s) {
  for_row_groups(rows, [&](auto group, int64_t r) {
    constexpr int kRows = decltype(group)::value, kKeys = W / kRows, kParts = kKeys < kStreams ? kKeys : kStreams, kEach = kKeys / kParts;
    const int64_t part = (to - from) / kParts;
    for (int64_t i = from; i < from + part; i += kEach) {
      const T *some[kKeys];
      float raw[W];
#pragma GCC unroll 16
      for (int x = 0; x < kKeys; ++x) some[x] = k_rows[i + x / kEach * part + x % kEach];
      for (int x = 0; r == 0 && x < kKeys; ++x) prefetch_row(k_rows[i + x / kEach * part + x % kEach + kPrefetchRows], n);
      dots<Units, T, kRows>(q + r * ldq, ldq, some, n, raw, kKeys);
#pragma GCC unroll 4
      for (int g = 0; g < kRows; ++g) {
#pragma GCC unroll 16
        for (int x = 0; x < kKeys; ++x) s[(r + g) * kDecodeKeys + i + x / kEach * part + x % kEach] = raw[g * kKeys + x];
      }
    }
  });
}

// o += P V over keys [from, to) of a block, whole vectors.
template <class Units, class T>
void decode_output(const float *s, int64_t rows, const T *const *v_rows, int64_t from, int64_t to, int64_t n, float *o, int64_t ldo) {
  Visits visits{from, (to - from) / Visits::kKeys, 0, 0};
  for (; visits.first < visits.count; visits.first = visits.last) {
    visits.last = min64(visits.first + Visits::kAtOnce, visits.count);
    for (int64_t x = visits.first; x < visits.last; ++x) {
      for (int64_t j = 0; j < Visits::kKeys; ++j) prefetch_row(v_rows[visits.key(x) + j + kPrefetchRows], n);
    }
    for_row_groups(rows, [&](auto group, int64_t r) {
      weighted_sums<Units, T, decltype(group)::value>(reinterpret_cast<const typename Units::Unit *>(s + r * kDecodeKeys), kDecodeKeys, v_rows, visits, n,
                                                      o + r * ldo, ldo);
    });
  }
}

template <class T>
int32_t decode_task(const Job &job, const Sequence &seq, int64_t kv_head, int64_t split) {
  using Units = typename UnitsOf<T>::type;
  using Unit = typename Units::Unit;
  constexpr int64_t kPer = Units::kPerUnit;
  const attnhub_cpu_call &c = job.call;
  const int64_t rows = seq.len_q * job.group, D = c.head_dim, Dv = c.v_head_dim;
  const int64_t ldq = round_up((D + kPer - 1) / kPer, W), ldo = round_up(Dv, W);
  constexpr int64_t kPointers = kDecodeKeys + kPrefetchRows + W;
  const size_t bytes = sizeof(float) * static_cast<size_t>(kDecodeRows * (ldq + 2 * ldo + kDecodeKeys)) + 2 * kPointers * sizeof(void *);
  Unit *q = static_cast<Unit *>(scratch(kTaskScratch, bytes));
  if (!q) return ATTNHUB_CPU_NO_MEMORY;
  float *o = reinterpret_cast<float *>(q + kDecodeRows * ldq), *before = o + kDecodeRows * ldo, *s = before + kDecodeRows * ldo;
  const T **k_rows = reinterpret_cast<const T **>(s + kDecodeRows * kDecodeKeys), **v_rows = k_rows + kPointers;

  const float unit = job.predicated ? 1.0f : static_cast<float>(c.softmax_scale);
  const Scores scores(job, seq);
  const Dropout dropout(job);
  RowState state[kDecodeRows];
  Interval keys[kDecodeRows];
  Interval all{seq.len_k, 0};
  Intervals intervals(job, seq);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = r / job.group, head = kv_head * job.group + r % job.group;
    const T *row = static_cast<const T *>(c.q) + seq.batch * c.q_strides[0] + head * c.q_strides[1] + (seq.q_begin + i) * c.q_strides[2];
    pack_q<Units>(row, D, q + r * ldq);
    state[r] = {-INFINITY, 0.0f, 1.0f};
    keys[r] = intervals.of(i);
    if (keys[r].low < keys[r].high) all = {min64(all.low, keys[r].low), max64(all.high, keys[r].high)};
  }
  std::memset(o, 0, static_cast<size_t>(rows * ldo) * sizeof(float));

  const int64_t begin = split * job.split_keys, end = min64(min64(begin + job.split_keys, seq.len_k), all.high);
  const KeyRows<T> k_source(job, seq, kv_head, c.k, c.k_strides), v_source(job, seq, kv_head, c.v, c.v_strides);
  for (int64_t j0 = max64(begin, all.low / kDecodeKeys * kDecodeKeys); j0 < end; j0 += kDecodeKeys) {
    const int64_t low = max64(0, all.low - j0), high = min64(kDecodeKeys, end - j0);
    const int64_t from = low / W * W, to = round_up(high, W);
    const int64_t ahead = min64(high + kPrefetchRows, seq.len_k - j0);
    k_source.fill(k_rows, j0, ahead);
    v_source.fill(v_rows, j0, ahead);
    for (int64_t x = ahead; x < kPointers; ++x) {  // prefetched or computed and dropped, never used
      k_rows[x] = k_rows[high - 1];
      v_rows[x] = v_rows[high - 1];
    }
    for (int64_t x = 0; x < low; ++x) v_rows[x] = v_rows[low];  // met with weight 0
    decode_scores<Units>(q, ldq, rows, k_rows, from, to, D, s);
    for (int64_t r = 0; r < rows; ++r) {
      float *line = s + r * kDecodeKeys;
      const int64_t a = max64(0, keys[r].low - j0), b = min64(high, keys[r].high - j0);
      const int64_t first = a / W * W;
      if (job.predicated && a < b) scores.finish(line + first, b - first, r / job.group, kv_head * job.group + r % job.group, j0 + first);
      softmax_row<Units>(line, a, b, from, to, unit, state[r]);
      if (c.dropout_p > 0) drop_weights<Units>(job, dropout, seq, line, a, b, r / job.group, kv_head * job.group + r % job.group, j0);
    }
    std::memcpy(before, o, static_cast<size_t>(rows * ldo) * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      if (state[r].alpha == 1.0f) continue;
      for (int64_t x = 0; x < ldo; x += W) store(o + r * ldo + x, read<F>(o + r * ldo + x) * state[r].alpha);
    }
    decode_output<Units>(s, rows, v_rows, from, to, Dv, o, ldo);
    for (int64_t r = 0; r < rows; ++r) {
      F poison = {};
      for (int64_t x = 0; x < ldo; x += W) poison += read<F>(o + r * ldo + x) * 0.0f;
      if (reduce_add(poison) == 0.0f) continue;
      std::memcpy(o + r * ldo, before + r * ldo, static_cast<size_t>(ldo) * sizeof(float));
      float room[kDecodeKeys];
      select_sum(weights_of<Units>(s + r * kDecodeKeys, from, to, room), v_rows, low, high, Dv, o + r * ldo, state[r].alpha);
    }
  }
  for (int64_t r = 0; r < rows; ++r) end_row<T>(job, seq, kv_head, split, r, o + r * ldo, state[r], unit);
  return ATTNHUB_CPU_OK;
}

}  // namespace
}  // namespace attnhub_cpu
