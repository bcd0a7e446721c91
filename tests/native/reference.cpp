#include "reference.h"

#include <algorithm>

namespace native {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

int64_t position(const attnhub_cpu_call &call, const Span &span, int64_t i) {
  return call.flags & ATTNHUB_CPU_TOP_LEFT ? i : i + span.len_k - span.len_q;
}

double bias_at(const attnhub_cpu_mask &m, int64_t s, int64_t h, int64_t i, int64_t j) {
  return element(m.bias, m.bias_dtype, s * m.bias_strides[0] + h * m.bias_strides[1] + i * m.bias_strides[2] + j * m.bias_strides[3]);
}

// A pair's share: what backward needs again.
struct Pair {
  int64_t j;
  double score;        // final
  double size;         // the magnitude of the terms that make it
  double slope;        // d score / d (q . k * scale)
  double keep;         // 0, or 1 / (1 - dropout_p)
  double probability;  // softmax, before dropout
};

class Reference {
 public:
  Reference(const attnhub_cpu_call &call, const attnhub_cpu_mask &mask, const attnhub_cpu_gradients *gradients, const int64_t *bias_shape)
      : c_(call), m_(mask), g_(gradients), bias_shape_(bias_shape) {
    const int64_t rows = c_.batch * c_.q_heads * c_.seqlen_q, keys = c_.batch * c_.kv_heads * c_.seqlen_k;
    r_.out.resize(rows * c_.v_head_dim);
    r_.lse.resize(rows);
    r_.lse.value.assign(static_cast<size_t>(rows), -kInfinity);
    if (!g_) return;
    r_.grad_q.resize(rows * c_.head_dim);
    r_.grad_k.resize(keys * c_.head_dim);
    r_.grad_v.resize(keys * c_.v_head_dim);
    r_.grad_sinks.resize(c_.q_heads);
    if (bias_shape_) r_.grad_bias.resize(bias_shape_[0] * bias_shape_[1] * bias_shape_[2] * bias_shape_[3]);
  }

  Results compute(int64_t sequences) {
    const int64_t group = c_.q_heads / c_.kv_heads;
    for (int64_t s = 0; s < sequences; ++s) {
      const Span span = span_of(c_, m_, s);
      for (int64_t kv = 0; kv < c_.kv_heads; ++kv) {
        k_ = rows_of(c_.k, c_.k_strides, span, kv, c_.head_dim);
        v_ = rows_of(c_.v, c_.v_strides, span, kv, c_.v_head_dim);
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
          for (int64_t i = 0; i < span.len_q; ++i) row(span, kv, h, i);
        }
      }
    }
    return std::move(r_);
  }

 private:
  std::vector<double> rows_of(const void *data, const int64_t *strides, const Span &span, int64_t kv, int64_t dim) const {
    std::vector<double> rows(static_cast<size_t>(span.len_k * dim));
    for (int64_t j = 0; j < span.len_k; ++j) {
      const int64_t at = key_offset(c_, m_, span, strides, kv, j);
      for (int64_t d = 0; d < dim; ++d) rows[static_cast<size_t>(j * dim + d)] = element(data, c_.dtype, at + d);
    }
    return rows;
  }

  std::vector<double> row_of(const void *data, int64_t at, int64_t dim) const {
    std::vector<double> row(static_cast<size_t>(dim));
    for (int64_t d = 0; d < dim; ++d) row[static_cast<size_t>(d)] = element(data, c_.dtype, at + d);
    return row;
  }

  const double *key(int64_t j) const { return k_.data() + j * c_.head_dim; }
  const double *value(int64_t j) const { return v_.data() + j * c_.v_head_dim; }

  Pair pair_of(const Span &span, const std::vector<double> &q, int64_t h, int64_t i, int64_t j) const {
    double dot = 0, size = 0;
    for (int64_t d = 0; d < c_.head_dim; ++d) {
      const double term = q[static_cast<size_t>(d)] * key(j)[d];
      dot += term;
      size += std::fabs(term);
    }
    Pair pair{j, dot * c_.softmax_scale, size * std::fabs(c_.softmax_scale), 1, 1, 0};
    if (c_.softcap > 0) {
      const double t = std::tanh(pair.score / c_.softcap);
      pair.score = c_.softcap * t;
      pair.slope = 1 - t * t;
    }
    if (m_.bias) {
      const double b = bias_at(m_, span.index, h, i, j);
      pair.score += b;
      pair.size += std::fabs(b);
    }
    if (m_.alibi) {
      const double slope = m_.alibi[span.index * m_.alibi_strides[0] + h * m_.alibi_strides[1]];
      const double b = slope * static_cast<double>(std::llabs(position(c_, span, i) - j));
      pair.score -= b;
      pair.size += std::fabs(b);
    }
    if (c_.dropout_p > 0) {
      const uint32_t head = static_cast<uint32_t>(span.index * c_.q_heads + h), offset = static_cast<uint32_t>(c_.dropout_offset);
      const uint32_t quad = static_cast<uint32_t>(j >> 2), row = static_cast<uint32_t>(i);
      const uint32_t word = philox(quad, row, head, offset, c_.dropout_seed, static_cast<int>(j & 3));
      pair.keep = static_cast<double>(word) >= std::floor(c_.dropout_p * 0x1p32) ? 1 / (1 - c_.dropout_p) : 0;
    }
    return pair;
  }

  void row(const Span &span, int64_t kv, int64_t h, int64_t i) {
    const int64_t at = (span.batch * c_.q_heads + h) * c_.seqlen_q + span.q_begin + i;
    const double sink = m_.sinks ? m_.sinks[h] : -kInfinity;
    std::vector<Pair> pairs;
    std::vector<double> q;
    double top = sink, factor = 1;
    for (int64_t j = 0; j < span.len_k; ++j) {
      if (!allowed(c_, m_, span, h, i, j)) continue;
      if (q.empty()) q = row_of(c_.q, query_offset(span, c_.q_strides, h, i), c_.head_dim);
      pairs.push_back(pair_of(span, q, h, i, j));
      top = std::max(top, pairs.back().score);
      factor = std::max(factor, 1 + pairs.back().size / 4);
    }
    if (top == -kInfinity) return;
    double sum = std::exp(sink - top);
    for (Pair &pair : pairs) sum += pair.probability = std::exp(pair.score - top);
    for (Pair &pair : pairs) {
      pair.probability /= sum;
      const double weight = pair.probability * pair.keep;
      for (int64_t d = 0; d < c_.v_head_dim; ++d) {
        const double term = weight * value(pair.j)[d];
        r_.out.add(at * c_.v_head_dim + d, term, std::fabs(term) * factor);
      }
    }
    r_.lse.value[static_cast<size_t>(at)] = top + std::log(sum);
    r_.lse.size[static_cast<size_t>(at)] = factor;
    if (g_) row_gradients(span, kv, h, i, at, pairs, q, std::exp(sink - top) / sum, factor);
  }

  void row_gradients(const Span &span, int64_t kv, int64_t h, int64_t i, int64_t at, const std::vector<Pair> &pairs,
                     const std::vector<double> &q, double sink_probability, double factor) {
    const std::vector<double> grad = row_of(g_->grad_out, query_offset(span, g_->grad_out_strides, h, i), c_.v_head_dim);
    // A backward reads `out`, whose rounding is no longer relative below the least normal number.
    const double subnormal = c_.dtype == kFp16 ? 0x1p-14 : 0;
    double delta = 0, delta_size = 0;  // what softmax's derivative subtracts
    for (int64_t d = 0; d < c_.v_head_dim; ++d) {
      const size_t x = static_cast<size_t>(at * c_.v_head_dim + d);
      delta += grad[static_cast<size_t>(d)] * r_.out.value[x];
      delta_size += std::fabs(grad[static_cast<size_t>(d)]) * (r_.out.size[x] / factor + subnormal);
    }
    if (g_->grad_lse) {
      delta -= g_->grad_lse[at];
      delta_size += std::fabs(g_->grad_lse[at]);
    }
    r_.grad_sinks.add(h, -sink_probability * delta, sink_probability * delta_size * factor);
    for (const Pair &pair : pairs) {
      const int64_t key_row = (span.batch * c_.kv_heads + kv) * c_.seqlen_k + span.k_begin + pair.j;
      double along = 0, along_size = 0;
      for (int64_t d = 0; d < c_.v_head_dim; ++d) {
        const double g = grad[static_cast<size_t>(d)], weight = pair.probability * pair.keep;
        r_.grad_v.add(key_row * c_.v_head_dim + d, weight * g, std::fabs(weight * g) * factor);
        along += g * value(pair.j)[d];
        along_size += std::fabs(g * value(pair.j)[d]);
      }
      double ds = pair.probability * (along * pair.keep - delta);
      double size = pair.probability * (along_size * pair.keep + delta_size) * factor;
      if (bias_shape_) {
        const int64_t index[4] = {span.index, h, i, pair.j};
        int64_t to = 0;
        for (int d = 0; d < 4; ++d) to = to * bias_shape_[d] + (bias_shape_[d] == 1 ? 0 : index[d]);
        r_.grad_bias.add(to, ds, size);
      }
      ds *= pair.slope * c_.softmax_scale;
      size *= std::min(1.0, pair.slope + 0.1) * std::fabs(c_.softmax_scale);  // 1 - tanh^2 is off by a rounding of 1
      for (int64_t d = 0; d < c_.head_dim; ++d) {
        const double x = q[static_cast<size_t>(d)], y = key(pair.j)[d];
        r_.grad_q.add(at * c_.head_dim + d, ds * y, size * std::fabs(y));
        r_.grad_k.add(key_row * c_.head_dim + d, ds * x, size * std::fabs(x));
      }
    }
  }

  const attnhub_cpu_call &c_;
  const attnhub_cpu_mask &m_;
  const attnhub_cpu_gradients *g_;
  const int64_t *bias_shape_;
  std::vector<double> k_, v_;
  Results r_;
};

}  // namespace

Span span_of(const attnhub_cpu_call &c, const attnhub_cpu_mask &m, int64_t n) {
  Span s{n, n, 0, c.seqlen_q, 0, c.seqlen_k};
  if (m.cu_seqlens_q) {
    s.batch = 0;
    s.q_begin = m.cu_seqlens_q[n];
    s.len_q = m.cu_seqlens_q[n + 1] - s.q_begin;
  }
  if (m.cu_seqlens_k) {
    s.k_begin = m.cu_seqlens_k[n];
    s.len_k = m.cu_seqlens_k[n + 1] - s.k_begin;
  }
  if (m.seqused_k) s.len_k = m.seqused_k[n];
  return s;
}

bool allowed(const attnhub_cpu_call &c, const attnhub_cpu_mask &m, const Span &span, int64_t h, int64_t i, int64_t j) {
  const int64_t s = span.index, p = position(c, span, i);
  const auto two = [s](const int32_t *data, const int64_t *strides, int64_t at) { return data[s * strides[0] + at * strides[1]]; };
  const auto four = [s, h](const uint8_t *data, const int64_t *strides, int64_t row, int64_t key) {
    return data[s * strides[0] + h * strides[1] + row * strides[2] + key * strides[3]];
  };
  if (m.leftpad && j < m.leftpad[s]) return false;
  if (c.flags & ATTNHUB_CPU_CAUSAL) {
    bool causal = j <= p || (m.prefix && j < m.prefix[s]);
    if (m.block_q) {
      const int32_t id = two(m.block_q, m.block_q_strides, i);
      causal = causal || (id >= 0 && id == two(m.block_k, m.block_k_strides, j));
    }
    if (!causal) return false;
  }
  if (m.window_left >= 0 && j < p - m.window_left) return false;
  if (m.window_right >= 0 && j > p + m.window_right) return false;
  if (m.chunk > 0 && floor_div(p, m.chunk) != floor_div(j, m.chunk)) return false;
  if (m.segment_q && two(m.segment_q, m.segment_q_strides, i) != two(m.segment_k, m.segment_k_strides, j)) return false;
  if (m.bool_mask && !four(m.bool_mask, m.bool_mask_strides, i, j)) return false;
  if (m.block_sparse && !four(m.block_sparse, m.block_sparse_strides, i / m.block_sparse_rows, j / m.block_sparse_keys)) return false;
  return !m.bias || bias_at(m, s, h, i, j) != -kInfinity;
}

int64_t key_offset(const attnhub_cpu_call &c, const attnhub_cpu_mask &m, const Span &span, const int64_t *strides, int64_t kv, int64_t j) {
  if (!m.block_table) return span.batch * strides[0] + kv * strides[1] + (span.k_begin + j) * strides[2];
  const int64_t page = m.block_table[span.index * m.block_table_strides[0] + j / c.seqlen_k * m.block_table_strides[1]];
  return page * strides[0] + kv * strides[1] + j % c.seqlen_k * strides[2];
}

int64_t query_offset(const Span &span, const int64_t *strides, int64_t h, int64_t i) {
  return span.batch * strides[0] + h * strides[1] + (span.q_begin + i) * strides[2];
}

Results reference(const attnhub_cpu_call &call, const attnhub_cpu_mask &mask, int64_t sequences) {
  return Reference(call, mask, nullptr, nullptr).compute(sequences);
}

Results reference(const attnhub_cpu_call &call, const attnhub_cpu_mask &mask, int64_t sequences, const attnhub_cpu_gradients &gradients,
                  const int64_t *bias_shape) {
  return Reference(call, mask, &gradients, bias_shape).compute(sequences);
}

}  // namespace native
