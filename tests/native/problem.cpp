#include "problem.h"

#include <algorithm>
#include <cstdio>

#include "coverage.h"
#include "reference.h"

namespace native {
namespace {

class Maker {
 public:
  Maker(uint64_t seed, bool backward, double max_work)
      : r_(seed), backward_(backward), max_work_(max_work), made_(new Problem), p_(*made_) {
    p_.seed = seed;
  }

  std::unique_ptr<Problem> make() {
    std::memset(&p_.call, 0, sizeof p_.call);
    std::memset(&p_.mask, 0, sizeof p_.mask);
    std::memset(&p_.gradients, 0, sizeof p_.gradients);
    p_.mask.window_left = p_.mask.window_right = -1;
    attnhub_cpu_call &c = p_.call;
    c.abi_version = ATTNHUB_CPU_ABI_VERSION;
    c.dtype = r_.between(0, 2);
    tight_ = r_.chance(0.5);
    sizes();
    lengths();
    scalars();
    interval_parts();
    pair_parts();
    operands();
    if (backward_) gradients();
    if (!plain_ || r_.chance(0.2)) c.mask = &p_.mask;
    describe();
    return std::move(made_);
  }

 private:
  // -- sizes

  int64_t some_length(int64_t largest) {
    static const int64_t edges[] = {0,  1,  2,  3,  4,  5,  7,  8,  15, 16,  17,  31,  32,  33, 47,
                                    48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257};
    const double kind = r_.uniform();
    int64_t n = kind < 0.5 ? r_.between(1, 24) : kind < 0.75 ? r_.pick(edges) : kind < 0.9 ? r_.between(1, 130) : r_.between(1, 300);
    return std::min(n, largest);
  }

  int64_t some_dim() {
    static const int64_t usual[] = {16, 32, 40, 48, 64, 80, 96, 112, 128};
    const double kind = r_.uniform();
    if (kind < 0.45) return r_.between(0, 20) * 2 + 1;
    if (kind < 0.75) return r_.pick(usual);
    return kind < 0.93 ? r_.between(1, 256) : r_.between(257, 512);
  }

  double work() const {
    const attnhub_cpu_call &c = p_.call;
    const int64_t heads = std::max<int64_t>(c.batch, 1) * c.q_heads;
    return static_cast<double>(heads * (c.head_dim + c.v_head_dim)) * static_cast<double>(len_q_ * len_k_);
  }

  void sizes() {
    attnhub_cpu_call &c = p_.call;
    c.head_dim = some_dim();
    c.v_head_dim = r_.chance(0.6) ? c.head_dim : some_dim();
    c.batch = r_.chance(0.02) ? 0 : r_.between(1, 3);
    c.kv_heads = r_.between(1, 3);
    static const int64_t groups[] = {1, 1, 1, 2, 2, 3, 4, 5, 8};
    c.q_heads = c.kv_heads * r_.pick(groups);
    const double kind = r_.uniform();
    packed_ = kind < 0.25;
    paged_ = kind >= 0.17 && kind < 0.45 && !backward_;  // below 0.25 both: packed queries over pages
    len_q_ = some_length(300);
    len_k_ = some_length(300);
    if (r_.chance(0.25)) len_q_ = r_.between(1, 3);
    if (r_.chance(0.08)) {  // more than one block of keys
      len_q_ = r_.between(1, 130);
      len_k_ = r_.between(257, 700);
    }
    if (r_.chance(0.1)) {  // few rows against many keys, which are split
      len_q_ = r_.between(1, 16);
      len_k_ = r_.between(513, 2600);
    }
    while (work() > max_work_) {
      int64_t *const members[] = {&c.batch, &len_q_, &len_k_, &c.q_heads, &c.head_dim, &c.v_head_dim};
      const int which = static_cast<int>(r_.between(0, 5));
      int64_t &n = *members[which];
      if (which == 3) {
        c.kv_heads = (c.kv_heads + 1) / 2;
        n = c.kv_heads * r_.between(1, 2);
      } else if (n > 2) {
        n = (n + 1) / 2 + r_.between(0, 1);
      }
    }
  }

  // -- where sequences begin and end

  Buffer ints(const std::vector<int64_t> &values) {
    Freedom freedom;
    freedom.last_is_dense = true;
    freedom.tight = tight_;
    Buffer b(r_, kInt32, {{1, 1, 1, static_cast<int64_t>(values.size())}}, freedom);
    b.set_each([&](int64_t, int64_t, int64_t, int64_t i) { return static_cast<double>(values[static_cast<size_t>(i)]); });
    return b;
  }

  void lengths() {
    attnhub_cpu_call &c = p_.call;
    attnhub_cpu_mask &m = p_.mask;
    std::vector<int64_t> rooms;
    if (packed_) {
      plain_ = false;
      const int64_t count = r_.chance(0.05) ? 0 : r_.between(1, std::max<int64_t>(c.batch, 1) + 1);
      std::vector<int64_t> cu_q{0}, cu_k{0};
      for (int64_t n = 0; n < count; ++n) {
        cu_q.push_back(cu_q.back() + (r_.chance(0.2) ? 0 : r_.between(0, len_q_)));
        rooms.push_back(r_.chance(0.2) ? 0 : r_.between(0, len_k_));
        cu_k.push_back(cu_k.back() + rooms.back());
        max_q_ = std::max(max_q_, cu_q.back() - cu_q[cu_q.size() - 2]);
      }
      c.batch = 1;
      c.seqlen_q = cu_q.back() + (r_.chance(0.4) ? r_.between(1, 6) : 0);
      c.seqlen_k = cu_k.back() + (r_.chance(0.4) ? r_.between(1, 6) : 0);
      p_.cu_seqlens_q = ints(cu_q);
      m.cu_seqlens_q = p_.cu_seqlens_q.as<int32_t>();
      if (!paged_) {
        p_.cu_seqlens_k = ints(cu_k);
        m.cu_seqlens_k = p_.cu_seqlens_k.as<int32_t>();
      }
      m.num_sequences = p_.sequences = count;
    } else {
      c.seqlen_q = max_q_ = len_q_;
      c.seqlen_k = len_k_;
      p_.sequences = c.batch;
      rooms.assign(static_cast<size_t>(c.batch), len_k_);
    }
    if (paged_) pages(rooms);
    max_k_ = 0;
    for (int64_t n : rooms) max_k_ = std::max(max_k_, n);
    if (paged_ || r_.chance(packed_ ? 0.2 : 0.3)) {
      plain_ = false;
      std::vector<int64_t> used;
      for (int64_t room : rooms) used.push_back(paged_ ? room : r_.chance(0.1) ? 0 : r_.between(0, room));
      p_.seqused_k = ints(used);
      m.seqused_k = p_.seqused_k.as<int32_t>();
    }
  }

  // A shuffled table over pages that lie anywhere; what no sequence uses names no page at all. Turns rooms into lengths.
  void pages(std::vector<int64_t> &rooms) {
    attnhub_cpu_call &c = p_.call;
    attnhub_cpu_mask &m = p_.mask;
    static const int64_t sizes[] = {1, 2, 3, 5, 8, 16, 17, 64, 100};
    c.seqlen_k = r_.pick(sizes);
    m.max_pages = (len_k_ + c.seqlen_k - 1) / c.seqlen_k + r_.between(0, 1);
    int64_t wanted = 0;
    for (int64_t &n : rooms) {
      n = r_.chance(0.1) ? 0 : r_.between(0, len_k_);
      wanted += (n + c.seqlen_k - 1) / c.seqlen_k;
    }
    m.num_pages = wanted + r_.between(0, 3);
    std::vector<int64_t> free;
    for (int64_t n = 0; n < m.num_pages; ++n) free.push_back(n);
    for (size_t n = free.size(); n > 1; --n) std::swap(free[n - 1], free[static_cast<size_t>(r_.between(0, static_cast<int64_t>(n) - 1))]);
    Freedom freedom;
    freedom.tight = tight_;
    p_.block_table = Buffer(r_, kInt32, {{1, 1, static_cast<int64_t>(rooms.size()), m.max_pages}}, freedom);
    p_.block_table.set_each([&](int64_t, int64_t, int64_t, int64_t) { return static_cast<double>(r_.between(-5, 1 << 30)); });
    for (int64_t b = 0; b < static_cast<int64_t>(rooms.size()); ++b) {
      for (int64_t page = 0; page * c.seqlen_k < rooms[static_cast<size_t>(b)]; ++page) {
        const bool shared = b > 0 && page == 0 && rooms[0] > 0 && r_.chance(0.2);  // a common prefix
        p_.block_table.set(0, 0, b, page, shared ? p_.block_table.get(0, 0, 0, 0) : static_cast<double>(free.back()));
        if (!shared) free.pop_back();
      }
    }
    m.block_table = p_.block_table.as<int32_t>();
    std::copy(p_.block_table.strides() + 2, p_.block_table.strides() + 4, m.block_table_strides);
    plain_ = false;
  }

  // -- numbers

  void scalars() {
    attnhub_cpu_call &c = p_.call;
    const double unit = 1 / std::sqrt(static_cast<double>(c.head_dim)), kind = r_.uniform();
    c.softmax_scale = kind < 0.6 ? unit : kind < 0.92 ? unit * (0.1 + 2 * r_.uniform()) : kind < 0.97 ? -unit * r_.uniform() : 0;
    if (r_.chance(0.2)) c.softcap = 0.5 + 20 * r_.uniform();
    if (r_.chance(0.25)) {
      c.dropout_p = r_.chance(0.9) ? r_.uniform() : 0x1p-20 * r_.uniform();
      c.dropout_seed = r_.bits();
      c.dropout_offset = r_.bits();
    }
    if (r_.chance(0.3)) c.flags |= ATTNHUB_CPU_TOP_LEFT;
    if (r_.chance(0.45)) c.flags |= ATTNHUB_CPU_CAUSAL;
    everything_ = r_.chance(0.04);
  }

  bool has(double p) {
    const bool yes = everything_ || r_.chance(p);
    plain_ = plain_ && !yes;
    return yes;
  }

  void interval_parts() {
    attnhub_cpu_mask &m = p_.mask;
    const int64_t most = std::max<int64_t>(max_k_, 1);
    if (has(0.12)) m.window_left = r_.chance(0.05) ? int64_t(1) << 50 : r_.between(0, most);
    if (has(0.12)) m.window_right = r_.chance(0.05) ? int64_t(1) << 50 : r_.between(0, most);
    if (has(0.08)) m.chunk = r_.chance(0.05) ? int64_t(1) << 50 : r_.between(1, most + 3);
    const auto per_sequence = [&](Buffer &b, int64_t top) {
      std::vector<int64_t> values;
      for (int64_t n = 0; n < p_.sequences; ++n) values.push_back(r_.between(0, top));
      b = ints(values);
      return b.as<int32_t>();
    };
    if (has(0.12)) m.leftpad = per_sequence(p_.leftpad, r_.chance(0.2) ? most + 3 : most / 2);
    if (has(0.12)) m.prefix = per_sequence(p_.prefix, most + 3);
    if (has(0.1)) ids(p_.segment_q, p_.segment_k, m.segment_q, m.segment_k, m.segment_q_strides, m.segment_k_strides, 0);
    if (has(0.1)) ids(p_.block_q, p_.block_k, m.block_q, m.block_k, m.block_q_strides, m.block_k_strides, -1);
  }

  // Ids of queries and keys: in runs, as documents lie, or all mixed.
  void ids(Buffer &q, Buffer &k, const int32_t *&to_q, const int32_t *&to_k, int64_t *q_strides, int64_t *k_strides, int64_t lowest) {
    const bool runs = r_.chance(0.7);
    const int64_t count = r_.between(1, 4);
    const auto one = [&](Buffer &b, int64_t length, const int32_t *&to, int64_t *strides) {
      Freedom freedom;
      freedom.tight = tight_;
      freedom.zeros = true;
      b = Buffer(r_, kInt32, {{1, 1, p_.sequences, length}}, freedom);
      const double step = runs ? static_cast<double>(count) / static_cast<double>(std::max<int64_t>(length, 1)) : 1;
      double id = static_cast<double>(lowest);
      b.set_each([&](int64_t, int64_t, int64_t, int64_t i) {
        if (i == 0) id = static_cast<double>(lowest);
        if (!runs) return static_cast<double>(r_.between(lowest, lowest + count));
        if (r_.chance(step)) id += 1;
        return id;
      });
      to = b.as<int32_t>();
      std::copy(b.strides() + 2, b.strides() + 4, strides);
    };
    one(q, max_q_, to_q, q_strides);
    one(k, max_k_, to_k, k_strides);
  }

  // [sequences, q_heads, rows, keys], any of them broadcast.
  Buffer square(int64_t kind, int64_t rows, int64_t keys, bool may_broadcast_all) {
    Freedom freedom;
    freedom.tight = tight_;
    freedom.zeros = !backward_;  // an expanded bias is one element with one gradient: broadcast says so, expansion does not
    for (int d = 0; d < (may_broadcast_all ? 4 : 2); ++d) freedom.broadcast[d] = r_.chance(0.3);
    freedom.last_is_dense = !freedom.broadcast[3] && r_.chance(0.6);
    return Buffer(r_, kind, {{p_.sequences, p_.call.q_heads, rows, keys}}, freedom);
  }

  void pair_parts() {
    attnhub_cpu_mask &m = p_.mask;
    if (has(0.12)) {
      p_.bool_mask = square(kByte, max_q_, max_k_, true);
      const double keep = r_.chance(0.2) ? 0.2 : 0.85;
      p_.bool_mask.set_each([&](int64_t, int64_t, int64_t, int64_t) {
        return r_.chance(keep) ? static_cast<double>(r_.between(1, 255)) : 0;
      });
      m.bool_mask = p_.bool_mask.as<uint8_t>();
      std::copy(p_.bool_mask.strides(), p_.bool_mask.strides() + 4, m.bool_mask_strides);
    }
    if (has(backward_ ? 0.35 : 0.2)) {
      m.bias_dtype = r_.between(0, 2);
      p_.bias = square(m.bias_dtype, max_q_, max_k_, true);
      const double removed = r_.chance(0.5) ? 0.15 : 0;
      p_.bias.set_each([&](int64_t, int64_t, int64_t, int64_t) { return r_.chance(removed) ? -kInfinity : 2 * r_.normal(); });
      m.bias = p_.bias.data();
      std::copy(p_.bias.strides(), p_.bias.strides() + 4, m.bias_strides);
    }
    if (has(0.12)) {
      Freedom freedom;
      freedom.tight = tight_;
      freedom.zeros = true;
      freedom.broadcast[2] = r_.chance(0.5);
      p_.alibi = Buffer(r_, kFp32, {{1, 1, p_.sequences, p_.call.q_heads}}, freedom);
      p_.alibi.set_each([&](int64_t, int64_t, int64_t, int64_t) { return 0.3 * r_.uniform() - 0.05; });
      m.alibi = p_.alibi.as<float>();
      std::copy(p_.alibi.strides() + 2, p_.alibi.strides() + 4, m.alibi_strides);
    }
    if (has(0.1)) {
      m.block_sparse_rows = r_.between(1, r_.chance(0.5) ? 8 : 100);
      m.block_sparse_keys = r_.between(1, r_.chance(0.5) ? 8 : 300);
      p_.block_sparse = square(kByte, (max_q_ + m.block_sparse_rows - 1) / m.block_sparse_rows,
                               (max_k_ + m.block_sparse_keys - 1) / m.block_sparse_keys, false);
      p_.block_sparse.set_each([&](int64_t, int64_t, int64_t, int64_t) { return r_.chance(0.6); });
      m.block_sparse = p_.block_sparse.as<uint8_t>();
      std::copy(p_.block_sparse.strides(), p_.block_sparse.strides() + 4, m.block_sparse_strides);
    }
    if (has(backward_ ? 0.3 : 0.15)) {
      Freedom freedom;
      freedom.last_is_dense = true;
      freedom.tight = tight_;
      p_.sinks = Buffer(r_, kFp32, {{1, 1, 1, p_.call.q_heads}}, freedom);
      p_.sinks.set_each([&](int64_t, int64_t, int64_t, int64_t) { return r_.chance(0.1) ? -kInfinity : 2 * r_.normal(); });
      m.sinks = p_.sinks.as<float>();
    }
  }

  // -- q, k, v and out

  Buffer tensor(int64_t batch, int64_t heads, int64_t length, int64_t dim, bool zeros, int64_t *strides) {
    Freedom freedom;
    freedom.last_is_dense = true;
    freedom.zeros = zeros;
    freedom.tight = tight_ && zeros;
    Buffer b(r_, p_.call.dtype, {{batch, heads, length, dim}}, freedom);
    std::copy(b.strides(), b.strides() + 3, strides);
    return b;
  }

  void operands() {
    attnhub_cpu_call &c = p_.call;
    const int64_t k_batch = paged_ ? p_.mask.num_pages : c.batch;
    p_.q = tensor(c.batch, c.q_heads, c.seqlen_q, c.head_dim, true, c.q_strides);
    p_.k = tensor(k_batch, c.kv_heads, c.seqlen_k, c.head_dim, true, c.k_strides);
    p_.v = tensor(k_batch, c.kv_heads, c.seqlen_k, c.v_head_dim, true, c.v_strides);
    p_.out = tensor(c.batch, c.q_heads, c.seqlen_q, c.v_head_dim, false, c.out_strides);
    c.q = p_.q.data();
    c.k = p_.k.data();
    c.v = p_.v.data();
    c.out = p_.out.data();
    if (backward_ || r_.chance(0.9)) {
      Freedom dense;
      dense.last_is_dense = true;
      p_.lse = Buffer(r_, kFp32, {{1, 1, 1, c.batch * c.q_heads * c.seqlen_q}}, dense);
      c.lse = p_.lse.as<float>();
    }
    const double size_q = r_.chance(0.1) ? 6 : 1, size_v = r_.chance(0.1) ? 30 : 1;
    poison_ = r_.chance(0.5);
    // Memory is NaN to begin with: when poisoned, only what some row may see becomes a number.
    const auto random_row = [&](const void *data, int64_t at, int64_t n, double size) {
      for (int64_t d = 0; d < n; ++d) set_element(const_cast<void *>(data), c.dtype, at + d, size * r_.normal());
    };
    const auto odd_row = [&](const void *data, int64_t at, int64_t n) {  // what padding may hold besides NaN
      for (int64_t d = 0; d < n; ++d) set_element(const_cast<void *>(data), c.dtype, at + d, r_.chance(0.5) ? kInfinity : -kInfinity);
    };
    if (!poison_) {
      p_.q.set_each([&](int64_t, int64_t, int64_t, int64_t) { return size_q * r_.normal(); });
      p_.k.set_each([&](int64_t, int64_t, int64_t, int64_t) { return r_.normal(); });
      p_.v.set_each([&](int64_t, int64_t, int64_t, int64_t) { return size_v * r_.normal(); });
      return;
    }
    seen_rows_.assign(static_cast<size_t>(c.batch * c.q_heads * c.seqlen_q), false);
    const int64_t group = c.q_heads / c.kv_heads;
    const bool infinite = r_.chance(0.3);
    for (int pass = infinite ? 0 : 1; pass < 2; ++pass) {
      for (int64_t s = 0; s < p_.sequences; ++s) {
        const Span span = span_of(c, p_.mask, s);
        for (int64_t h = 0; h < c.q_heads; ++h) {
          for (int64_t i = 0; i < span.len_q; ++i) {
            bool any = false;
            for (int64_t j = 0; j < span.len_k; ++j) {
              const bool seen = allowed(c, p_.mask, span, h, i, j);
              any = any || seen;
              if (seen != (pass == 1)) continue;
              const int64_t at_k = key_offset(c, p_.mask, span, c.k_strides, h / group, j);
              const int64_t at_v = key_offset(c, p_.mask, span, c.v_strides, h / group, j);
              if (pass == 0) {
                odd_row(c.k, at_k, c.head_dim);
                odd_row(c.v, at_v, c.v_head_dim);
              } else if (!std::isfinite(element(c.k, c.dtype, at_k)) || !std::isfinite(element(c.v, c.dtype, at_v))) {
                random_row(c.k, at_k, c.head_dim, 1);
                random_row(c.v, at_v, c.v_head_dim, size_v);
              }
            }
            if (any) seen_rows_[static_cast<size_t>((span.batch * c.q_heads + h) * c.seqlen_q + span.q_begin + i)] = true;
            if (any && pass == 1) random_row(c.q, query_offset(span, c.q_strides, h, i), c.head_dim, size_q);
          }
        }
      }
    }
  }

  // -- gradients

  void gradients() {
    attnhub_cpu_call &c = p_.call;
    attnhub_cpu_gradients &g = p_.gradients;
    Freedom dense;
    dense.last_is_dense = true;
    p_.grad_out = tensor(c.batch, c.q_heads, c.seqlen_q, c.v_head_dim, true, g.grad_out_strides);
    // Rows without keys are not read: nothing may come of what stands there. (With a sink, their lse is one and has a gradient.)
    const auto unread = [&](int64_t row) { return poison_ && !p_.sinks && !seen_rows_[static_cast<size_t>(row)]; };
    p_.grad_out.set_each([&](int64_t b, int64_t h, int64_t i, int64_t) {
      return unread((b * c.q_heads + h) * c.seqlen_q + i) && dense_grad_out() ? std::nan("") : r_.normal();
    });
    g.grad_out = p_.grad_out.data();
    if (r_.chance(0.4)) {
      p_.grad_lse = Buffer(r_, kFp32, p_.lse.shape(), dense);
      p_.grad_lse.set_each([&](int64_t, int64_t, int64_t, int64_t i) { return unread(i) ? std::nan("") : r_.normal(); });
      g.grad_lse = p_.grad_lse.as<float>();
    }
    const auto wanted = [&](Buffer &b, const Buffer &of, int64_t *strides, void *&to) {
      if (r_.chance(0.1)) return;
      const Shape s = of.shape();
      b = tensor(s.size[0], s.size[1], s.size[2], s.size[3], false, strides);
      to = b.data();
    };
    wanted(p_.grad_q, p_.q, g.grad_q_strides, g.grad_q);
    wanted(p_.grad_k, p_.k, g.grad_k_strides, g.grad_k);
    wanted(p_.grad_v, p_.v, g.grad_v_strides, g.grad_v);
    if (p_.bias && r_.chance(0.9)) {
      Freedom like_bias;
      for (int d = 0; d < 4; ++d) like_bias.broadcast[d] = p_.mask.bias_strides[d] == 0;
      like_bias.positive = true;
      p_.grad_bias = Buffer(r_, kFp32, {{p_.sequences, c.q_heads, max_q_, max_k_}}, like_bias);
      g.grad_bias = p_.grad_bias.as<float>();
      std::copy(p_.grad_bias.strides(), p_.grad_bias.strides() + 4, g.grad_bias_strides);
    }
    if (p_.sinks && r_.chance(0.9)) {
      p_.grad_sinks = Buffer(r_, kFp32, p_.sinks.shape(), dense);
      g.grad_sinks = p_.grad_sinks.as<float>();
    }
  }

  // No two rows of grad_out share memory.
  bool dense_grad_out() const {
    for (int d = 0; d < 3; ++d) {
      if (p_.gradients.grad_out_strides[d] == 0 && p_.grad_out.shape().size[d] > 1) return false;
    }
    return true;
  }

  void describe() {
    static const char *const dtypes[] = {"fp32", "bf16", "fp16"};
    const attnhub_cpu_call &c = p_.call;
    char line[200];
    std::snprintf(line, sizeof line, "%s batch %lld heads %lld/%lld lengths %lld/%lld dims %lld/%lld scale %.3g%s:", dtypes[c.dtype],
                  (long long)c.batch, (long long)c.q_heads, (long long)c.kv_heads, (long long)c.seqlen_q, (long long)c.seqlen_k,
                  (long long)c.head_dim, (long long)c.v_head_dim, c.softmax_scale, poison_ ? " poisoned" : "");
    p_.text = line;
    Coverage coverage;
    count_parts(p_, coverage);
    for (const auto &part : coverage.parts) {
      if (part.second) p_.text += " " + part.first;
    }
  }

  Random r_;
  bool backward_;
  double max_work_;
  std::unique_ptr<Problem> made_;
  Problem &p_;
  bool tight_ = false, packed_ = false, paged_ = false, everything_ = false, plain_ = true, poison_ = false;
  std::vector<bool> seen_rows_;  // of a poisoned problem: [batch, q_heads, seqlen_q], has any key
  int64_t len_q_ = 0, len_k_ = 0;  // wanted
  int64_t max_q_ = 0, max_k_ = 0;  // of the longest sequence
};

}  // namespace

std::vector<const Buffer *> Problem::inputs() const {
  std::vector<const Buffer *> all;
  for (const Buffer *b : {&q, &k, &v, &seqused_k, &leftpad, &prefix, &segment_q, &segment_k, &block_q, &block_k, &bool_mask, &bias, &alibi,
                          &block_sparse, &sinks, &cu_seqlens_q, &cu_seqlens_k, &block_table, &grad_out, &grad_lse}) {
    if (*b) all.push_back(b);
  }
  return all;
}

std::unique_ptr<Problem> make_problem(uint64_t seed, bool backward, double max_work) { return Maker(seed, backward, max_work).make(); }

}  // namespace native
