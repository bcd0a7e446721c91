// What the mask says about a row: one interval of keys (sequence lengths, left padding, causal, window, chunk, prefix and the
// extent of a segment are intervals), and for the rest a pass over the scores inside it.
#pragma once

#include "job.h"
#include "pack.h"

namespace attnhub_cpu {
namespace {

struct Interval {
  int64_t low;   // first key that may be attended to
  int64_t high;  // one behind the last; low >= high: none
};

// Finds the intervals of the rows of one task, in ascending order of i.
class Intervals {
 public:
  Intervals(const Job &job, const Sequence &seq) : job_(job), seq_(seq) {
    const attnhub_cpu_mask &m = job.mask;
    first_key_ = m.leftpad ? max64(0, m.leftpad[seq.index]) : 0;
    causal_ = (job.call.flags & ATTNHUB_CPU_CAUSAL) && !m.block_q;
    prefix_ = m.prefix ? m.prefix[seq.index] : 0;
  }

  Interval of(int64_t i) {
    const attnhub_cpu_mask &m = job_.mask;
    const int64_t p = i + seq_.offset;
    Interval keys{first_key_, seq_.len_k};
    if (causal_) keys.high = min64(keys.high, max64(p + 1, prefix_));
    if (m.window_left >= 0) keys.low = max64(keys.low, p - m.window_left);
    if (m.window_right >= 0) keys.high = min64(keys.high, p + m.window_right + 1);
    if (m.chunk > 0) {
      const int64_t begin = (p >= 0 ? p / m.chunk : -((m.chunk - 1 - p) / m.chunk)) * m.chunk;
      keys.low = max64(keys.low, begin);
      keys.high = min64(keys.high, begin + m.chunk);
    }
    if (m.segment_q) {
      const Interval extent = segment(m.segment_q[seq_.index * m.segment_q_strides[0] + i * m.segment_q_strides[1]]);
      keys.low = max64(keys.low, extent.low);
      keys.high = min64(keys.high, extent.high);
    }
    if (keys.low >= keys.high) keys = {0, 0};
    return keys;
  }

 private:
  // From the first to the last key of a segment. Neighbouring rows are mostly of one segment: the last answer is kept.
  Interval segment(int32_t id) {
    if (known_ && id == id_) return extent_;
    const attnhub_cpu_mask &m = job_.mask;
    const int32_t *ids = m.segment_k + seq_.index * m.segment_k_strides[0];
    const int64_t stride = m.segment_k_strides[1];
    Interval extent{0, seq_.len_k};
    while (extent.low < extent.high && ids[extent.low * stride] != id) ++extent.low;
    while (extent.high > extent.low && ids[(extent.high - 1) * stride] != id) --extent.high;
    known_ = true;
    id_ = id;
    extent_ = extent;
    return extent;
  }

  const Job &job_;
  const Sequence &seq_;
  int64_t first_key_;
  int64_t prefix_;
  bool causal_;
  bool known_ = false;
  int32_t id_ = 0;
  Interval extent_{0, 0};
};

// The part of a pointer-and-strides operand that one row reads: element j at data[j * stride].
template <class T>
struct Line {
  const T *data;
  int64_t stride;
};

template <class T>
ATTNHUB_INLINE Line<T> line_of(const void *data, const int64_t *strides, int64_t b, int64_t h, int64_t i) {
  return {static_cast<const T *>(data) + b * strides[0] + h * strides[1] + i * strides[2], strides[3]};
}

template <class T>
ATTNHUB_INLINE F gather(Line<T> line, int64_t j, int n) {
  if (line.stride == 0) return splat(to_float(line.data[0]));
  if (line.stride == 1) return n == W ? load(line.data + j) : load_part(line.data + j, n);
  T tmp[W] = {};
  for (int e = 0; e < n; ++e) tmp[e] = line.data[(j + e) * line.stride];
  return load(tmp);
}

// Turns raw products s[0, n) of query (i, head) with keys from j0 on into final scores, -Inf where the pair is removed.
class Scores {
 public:
  Scores(const Job &job, const Sequence &seq)
      : job_(job), seq_(seq), scale_(static_cast<float>(job.call.softmax_scale)), cap_(static_cast<float>(job.call.softcap)) {}

  // slope, if given, gets the derivative of the soft cap at each score. Whole vectors are written: in a buffer of lines without
  // slack, s must begin on a multiple of W of its line, or the last vector reaches into the next line.
  void finish(float *s, int64_t n, int64_t i, int64_t head, int64_t j0, float *slope = nullptr) const {
    const attnhub_cpu_mask &m = job_.mask;
    const float scale = cap_ > 0 ? scale_ / cap_ : scale_;
    for (int64_t x = 0; x < n; x += W) {
      F v = read<F>(s + x) * scale;
      if (cap_ > 0) {
        v = tanhv(v);
        if (slope) store(slope + x, 1.0f - v * v);
        v *= cap_;
      }
      store(s + x, v);
    }
    if (m.bias) {
      if (m.bias_dtype == ATTNHUB_CPU_FP32) add_bias<float>(s, n, i, head, j0);
      if (m.bias_dtype == ATTNHUB_CPU_BF16) add_bias<Bf16>(s, n, i, head, j0);
      if (m.bias_dtype == ATTNHUB_CPU_FP16) add_bias<Fp16>(s, n, i, head, j0);
    }
    if (m.alibi) {
      const float slope = m.alibi[seq_.index * m.alibi_strides[0] + head * m.alibi_strides[1]];
      const int64_t p = i + seq_.offset - j0;
      for (int64_t x = 0; x < n; ++x) s[x] -= slope * static_cast<float>(p > x ? p - x : x - p);
    }
    if (m.bool_mask) {
      const Line<uint8_t> line = line_of<uint8_t>(m.bool_mask, m.bool_mask_strides, seq_.index, head, i);
      const uint8_t *keep = line.data + j0 * line.stride;
      if (line.stride == 1) {
        for (int64_t x = 0; x < n; ++x) s[x] = keep[x] ? s[x] : -INFINITY;
      } else {
        for (int64_t x = 0; x < n; ++x) s[x] = keep[x * line.stride] ? s[x] : -INFINITY;
      }
    }
    if (m.segment_q) {
      const int32_t id = m.segment_q[seq_.index * m.segment_q_strides[0] + i * m.segment_q_strides[1]];
      const int64_t stride = m.segment_k_strides[1];
      const int32_t *ids = m.segment_k + seq_.index * m.segment_k_strides[0] + j0 * stride;
      for (int64_t x = 0; x < n; ++x) s[x] = ids[x * stride] == id ? s[x] : -INFINITY;
    }
    if (m.block_q && (job_.call.flags & ATTNHUB_CPU_CAUSAL)) widen_causal(s, n, i, j0);
    if (m.block_sparse) {
      const Line<uint8_t> line = line_of<uint8_t>(m.block_sparse, m.block_sparse_strides, seq_.index, head, i / m.block_sparse_rows);
      for (int64_t x = 0; x < n;) {
        const int64_t block = (j0 + x) / m.block_sparse_keys;
        const int64_t end = min64(n, (block + 1) * m.block_sparse_keys - j0);
        if (line.data[block * line.stride]) x = end;
        for (; x < end; ++x) s[x] = -INFINITY;
      }
    }
  }

 private:
  template <class T>
  void add_bias(float *s, int64_t n, int64_t i, int64_t head, int64_t j0) const {
    const Line<T> line = line_of<T>(job_.mask.bias, job_.mask.bias_strides, seq_.index, head, i);
    for (int64_t x = 0; x < n; x += W) {
      const F b = gather(line, j0 + x, static_cast<int>(min64(W, n - x)));
      const F sum = read<F>(s + x) + b;
      store(s + x, b == splat(-INFINITY) ? b : sum);  // a NaN score under a bias of -Inf is removed, too
    }
  }

  void widen_causal(float *s, int64_t n, int64_t i, int64_t j0) const {
    const attnhub_cpu_mask &m = job_.mask;
    const int32_t id = m.block_q[seq_.index * m.block_q_strides[0] + i * m.block_q_strides[1]];
    const int64_t stride = m.block_k_strides[1];
    const int32_t *ids = m.block_k + seq_.index * m.block_k_strides[0] + j0 * stride;
    const int64_t p = i + seq_.offset - j0;
    const int64_t prefix = m.prefix ? m.prefix[seq_.index] - j0 : 0;
    for (int64_t x = 0; x < n; ++x) {
      const bool keep = x <= p || x < prefix || (id >= 0 && ids[x * stride] == id);
      s[x] = keep ? s[x] : -INFINITY;
    }
  }

  const Job &job_;
  const Sequence &seq_;
  float scale_;
  float cap_;
};

// Whether any block of a block-sparse mask is kept among rows [r0, r1) and keys [j0, j1).
ATTNHUB_INLINE bool any_block_kept(const Job &job, const Sequence &seq, int64_t kv_head, int64_t r0, int64_t r1, int64_t j0, int64_t j1) {
  const attnhub_cpu_mask &m = job.mask;
  const int64_t *strides = m.block_sparse_strides;
  const uint8_t *at = m.block_sparse + seq.index * strides[0];
  for (int64_t g = 0; g < job.group; ++g) {
    for (int64_t y = r0 / job.group / m.block_sparse_rows; y <= (r1 - 1) / job.group / m.block_sparse_rows; ++y) {
      for (int64_t x = j0 / m.block_sparse_keys; x <= (j1 - 1) / m.block_sparse_keys; ++x) {
        if (at[(kv_head * job.group + g) * strides[1] + y * strides[2] + x * strides[3]]) return true;
      }
    }
  }
  return false;
}

// Pointers to the rows of k or v of one K/V head, contiguous or paged.
template <class T>
class KeyRows {
 public:
  KeyRows(const Job &job, const Sequence &seq, int64_t kv_head, const void *data, const int64_t *strides)
      : token_stride_(strides[2]), page_stride_(strides[0]) {
    const attnhub_cpu_mask &m = job.mask;
    base_ = static_cast<const T *>(data) + kv_head * strides[1];
    if (m.block_table) {
      pages_ = m.block_table + seq.index * m.block_table_strides[0];
      table_stride_ = m.block_table_strides[1];
      page_size_ = job.call.seqlen_k;
    } else {
      base_ += seq.batch * strides[0] + seq.k_begin * token_stride_;
    }
  }

  // rows[x] = row j + x for x < n
  void fill(const T **rows, int64_t j, int64_t n) const {
    if (!pages_) {
      for (int64_t x = 0; x < n; ++x) rows[x] = base_ + (j + x) * token_stride_;
      return;
    }
    for (int64_t x = 0; x < n;) {
      const int64_t inside = (j + x) % page_size_;
      const T *page = base_ + static_cast<int64_t>(pages_[(j + x) / page_size_ * table_stride_]) * page_stride_;
      for (int64_t t = inside; t < page_size_ && x < n; ++t) rows[x++] = page + t * token_stride_;
    }
  }

 private:
  const T *base_;
  const int32_t *pages_ = nullptr;
  int64_t token_stride_;
  int64_t page_stride_;
  int64_t table_stride_ = 0;
  int64_t page_size_ = 0;
};

}  // namespace
}  // namespace attnhub_cpu
