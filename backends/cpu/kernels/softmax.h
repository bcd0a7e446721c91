// The online softmax: one row of a block of scores at a time, and what becomes of a row at the end.
#pragma once

#include "dropout.h"
#include "rows.h"

namespace attnhub_cpu {
namespace {

// The running state of a row. Scores are kept in the unit they come in: `unit` turns them into natural logarithms (the
// softmax scale for raw products, 1 for finished scores).
struct RowState {
  float max;    // -Inf: no key yet
  float sum;    // of exp(unit * (score - max))
  float alpha;  // what the last block multiplied sum and the output by
};

// Weights s[from, to), as Units, become zeros.
template <class Units>
ATTNHUB_INLINE void clear(float *s, int64_t from, int64_t to) {
  if (from < to) std::memset(s + from / Units::kPerUnit, 0, static_cast<size_t>((to - from) / Units::kPerUnit) * 4);
}

// Lanes whose maximum is that of s[low, high); makes whole vectors of it, by -Inf around.
ATTNHUB_INLINE F start_row(float *s, int64_t low, int64_t high) {
  const int64_t first = low / W * W, last = round_up(high, W);
  for (int64_t j = first; j < low; ++j) s[j] = -INFINITY;
  for (int64_t j = high; j < last; ++j) s[j] = -INFINITY;
  F max0 = splat(-INFINITY), max1 = max0;
  int64_t j = first;
  for (; j + 2 * W <= last; j += 2 * W) {
    max0 = vmax(max0, read<F>(s + j));
    max1 = vmax(max1, read<F>(s + j + W));
  }
  if (j < last) max0 = vmax(max0, read<F>(s + j));
  return vmax(max0, max1);
}

// A maximum of -Inf: all scores are removed, or there is NaN that the maximum does not carry.
inline float nan_or(float max, const float *s, int64_t low, int64_t high) {
  for (int64_t x = low; x < high; ++x) {
    if (s[x] != s[x]) max = s[x];
  }
  return max;
}

// Two vectors of scores -> weights in bf16, in place: s[j, j + 2 W) goes to the place of s[j / 2, j / 2 + W).
ATTNHUB_INLINE void weigh_two(float *s, int64_t j, F maximum, F factor, F &sum0, F &sum1) {
  const F p0 = exp2v<kRounded>(read<F>(s + j) - maximum, factor);
  const F p1 = exp2v<kRounded>(read<F>(s + j + W) - maximum, factor);
  store_two(reinterpret_cast<Bf16 *>(s) + j, p0, p1);
  sum0 += p0;
  sum1 += p1;
}

// Replaces scores s[first, last), whole vectors, by weights as Units. Lanes whose sum is that of the weights. A little of the work,
// if there is any, is done every four vectors.
template <class Units, class Work = NoWork>
ATTNHUB_INLINE F weigh(float *s, int64_t first, int64_t last, float max, float to_log2, [[maybe_unused]] Work *work = nullptr) {
  // The difference is taken before the factor: exact where it matters, and a score of -FLT_MAX does not overflow.
  const F maximum = splat(max), factor = splat(to_log2);
  F sum0 = {}, sum1 = {};
  int64_t j = first;
  if constexpr (Units::kPerUnit == 1) {
    for (; j + 2 * W <= last; j += 2 * W) {
      const F p0 = exp2v(read<F>(s + j) - maximum, factor);
      const F p1 = exp2v(read<F>(s + j + W) - maximum, factor);
      store(s + j, p0);
      store(s + j + W, p1);
      sum0 += p0;
      sum1 += p1;
    }
    if (j < last) {
      const F p = exp2v(read<F>(s + j) - maximum, factor);
      store(s + j, p);
      sum0 += p;
    }
  } else {
    Bf16 *p16 = reinterpret_cast<Bf16 *>(s);  // in place: writing never overtakes reading
    if constexpr (Work::kAny) {
      for (; j + 4 * W <= last; j += 4 * W) {
        weigh_two(s, j, maximum, factor, sum0, sum1);
        weigh_two(s, j + 2 * W, maximum, factor, sum0, sum1);
        work->take();
      }
    }
    for (; j + 2 * W <= last; j += 2 * W) weigh_two(s, j, maximum, factor, sum0, sum1);
    if (j < last) {
      const F p = exp2v<kRounded>(read<F>(s + j) - maximum, factor);
      store(p16 + j, p);
      sum0 += p;
    }
  }
  return sum0 + sum1;
}

// Replaces scores s[low, high) by their exponentials, as Units, and updates the row. Units for all of [from, to), which
// holds [low, high) and is bounded by whole vectors, are defined afterwards: zeros outside. Reads nothing outside.
template <class Units>
void softmax_row(float *s, int64_t low, int64_t high, int64_t from, int64_t to, float unit, RowState &row) {
  if (low >= high) {
    clear<Units>(s, from, to);
    row.alpha = 1.0f;
    return;
  }
  const int64_t first = low / W * W, last = round_up(high, W);
  const float block_max = reduce_max(start_row(s, low, high));
  float max = block_max > row.max ? block_max : row.max;
  if (max == -INFINITY) {  // all removed, or NaN that the maximum does not carry
    max = nan_or(max, s, low, high);
    if (max == -INFINITY) {
      clear<Units>(s, from, to);
      row.alpha = 1.0f;
      return;
    }
  }

  const F sum = weigh<Units>(s, first, last, max, unit * kLog2E);
  clear<Units>(s, from, first);
  clear<Units>(s, last, to);

  row.alpha = row.max == -INFINITY ? 0.0f : exp2f((row.max - max) * (unit * kLog2E));
  row.sum = row.sum * row.alpha + reduce_add(sum);
  row.max = max;
}

// Where the scores of a row lie: see softmax_row.
struct ScoreRow {
  float *s;
  int64_t low, high, from, to;
};

// softmax_row for up to W rows at once: their maxima and sums are reduced together, their factors are one exponential. Not inlined:
// the loop over the scores wants the registers for itself.
template <class Units, class Work = NoWork>
__attribute__((noinline)) void softmax_rows(const ScoreRow *rows, int n, float unit, RowState *state, Work *work = nullptr) {
  F part[W], before;
  for (int r = 0; r < W; ++r) {
    const bool any = r < n && rows[r].low < rows[r].high;
    part[r] = any ? start_row(rows[r].s, rows[r].low, rows[r].high) : splat(-INFINITY);
    before[r] = r < n ? state[r].max : -INFINITY;
  }
  const F block = maxima(part);
  F max = block > before ? block : before;
  for (int r = 0; r < n; ++r) {
    if (max[r] == -INFINITY && rows[r].low < rows[r].high) max[r] = nan_or(max[r], rows[r].s, rows[r].low, rows[r].high);
  }
  const F alpha = exp2v((before - max) * splat(unit * kLog2E));
  for (int r = 0; r < W; ++r) part[r] = F{};
  for (int r = 0; r < n; ++r) {
    const ScoreRow &row = rows[r];
    if (max[r] == -INFINITY || row.low >= row.high) {
      clear<Units>(row.s, row.from, row.to);
      continue;
    }
    const int64_t first = row.low / W * W, last = round_up(row.high, W);
    part[r] = weigh<Units>(row.s, first, last, max[r], unit * kLog2E, work);
    clear<Units>(row.s, row.from, first);
    clear<Units>(row.s, last, row.to);
  }
  const F sum = sums(part);
  for (int r = 0; r < n; ++r) {
    if (max[r] == -INFINITY || rows[r].low >= rows[r].high) {
      state[r].alpha = 1.0f;
      continue;
    }
    state[r].alpha = before[r] == -INFINITY ? 0.0f : alpha[r];
    state[r].sum = state[r].sum * state[r].alpha + sum[r];
    state[r].max = max[r];
  }
}

// Removes the weights s[low, high), in Units, of query (i, head) and keys from j0 on that dropout drops.
template <class Units>
void drop_weights(const Job &job, const Dropout &dropout, const Sequence &seq, float *s, int64_t low, int64_t high, int64_t i, int64_t head,
                  int64_t j0) {
  if (low >= high) return;
  int32_t room[Dropout::room(kMostBlockKeys)];
  const int32_t *kept = dropout.masks(seq.index * job.call.q_heads + head, i, j0 + low, high - low, room);
  if constexpr (Units::kPerUnit == 1) {
    for (int64_t j = low; j < high; ++j) s[j] = kept[j - low] ? s[j] : 0.0f;
  } else {
    uint16_t *bits = reinterpret_cast<uint16_t *>(s);
    for (int64_t j = low; j < high; ++j) bits[j] = static_cast<uint16_t>(bits[j] & kept[j - low]);
  }
}

// out and lse of one row from its unnormalised output o, its maximum in natural units and its sum.
template <class T>
void write_row(const Job &job, const Sequence &seq, int64_t i, int64_t head, const float *o, float max, float sum) {
  const attnhub_cpu_call &c = job.call;
  float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  const float sink = job.mask.sinks ? job.mask.sinks[head] : -INFINITY;
  if (sink != -INFINITY) {
    const float top = max > sink ? max : sink;
    const float weight = max == -INFINITY ? 0.0f : expf(max - top);
    sum = sum * weight + expf(sink - top);
    factor = weight / sum;
    max = top;
  }
  if (c.dropout_p > 0) factor *= static_cast<float>(1.0 / (1.0 - c.dropout_p));
  T *out = static_cast<T *>(c.out) + seq.batch * c.out_strides[0] + head * c.out_strides[1] + (seq.q_begin + i) * c.out_strides[2];
  int64_t x = 0;
  for (; x + W <= c.v_head_dim; x += W) store(out + x, read<F>(o + x) * factor);
  if (x < c.v_head_dim) store_part(out + x, read<F>(o + x) * factor, static_cast<int>(c.v_head_dim - x));
  if (c.lse) c.lse[(seq.batch * c.q_heads + head) * c.seqlen_q + seq.q_begin + i] = sum == 0.0f ? -INFINITY : max + logf(sum);
}

// The end of a row in one task: written out, or kept as a partial result where the keys are split.
template <class T>
void end_row(const Job &job, const Sequence &seq, int64_t kv_head, int64_t split, int64_t r, const float *o, const RowState &row, float unit) {
  const int64_t dims = job.call.v_head_dim;
  const float max = row.max == -INFINITY ? row.max : row.max * unit;
  if (job.splits == 1) {
    write_row<T>(job, seq, r / job.group, kv_head * job.group + r % job.group, o, max, row.sum);
    return;
  }
  const int64_t rows = job.max_len_q * job.group;
  float *to = job.partial + (((seq.index * job.call.kv_heads + kv_head) * rows + r) * job.splits + split) * job.partial_stride;
  std::memcpy(to, o, static_cast<size_t>(dims) * sizeof(float));
  to[dims] = max;
  to[dims + 1] = row.sum;
}

// Merges the splits of row `index` of [sequences, kv_heads, max_len_q * group], exactly, in their order.
template <class T>
int32_t combine(const Job &job, int64_t index) {
  const int64_t rows = job.max_len_q * job.group, dims = job.call.v_head_dim;
  const int64_t r = index % rows, kv_head = index / rows % job.call.kv_heads;
  const Sequence seq = sequence_of(job, index / (rows * job.call.kv_heads));
  if (r >= seq.len_q * job.group) return ATTNHUB_CPU_OK;
  const float *part = job.partial + index * job.splits * job.partial_stride;
  float max = -INFINITY, sum = 0.0f;
  for (int64_t s = 0; s < job.splits; ++s) {
    const float m = part[s * job.partial_stride + dims];
    if (m > max) max = m;
  }
  float o[512 + W] = {};
  for (int64_t s = 0; s < job.splits; ++s, part += job.partial_stride) {
    if (part[dims] == -INFINITY) continue;
    const float weight = expf(part[dims] - max);
    sum += weight * part[dims + 1];
    for (int64_t x = 0; x < dims; ++x) o[x] += weight * part[x];
  }
  write_row<T>(job, seq, r / job.group, kv_head * job.group + r % job.group, o, max, sum);
  return ATTNHUB_CPU_OK;
}

}  // namespace
}  // namespace attnhub_cpu
