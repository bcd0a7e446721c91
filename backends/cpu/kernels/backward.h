// The tiled backward pass (arXiv 2307.08691, section 3.1.2): P is made again from lse, block by block.
//
// With S = scale * Q K^T, P = exp(S - lse), delta = rowsum(dO * O) - dlse, dP = dO V^T and dS = P * (dP - delta):
//   dV = P^T dO, dQ = scale * dS K, dK = scale * dS^T Q.
// One task owns a range of keys of one K/V head and walks over its blocks of keys; for each it visits all rows, so that dK and dV
// are finished by one task in one order. dQ collects over the tasks of a head: in the task's own memory if there is one,
// else in one buffer a task, summed in their order. No atomics, and the same bits for any number of threads.
//
// dK and dV are collected transposed, [columns, keys]: then P and dS are operands just as the row-wise softmax leaves them.
#pragma once

#include "forward.h"
#include "gradients.h"

namespace attnhub_cpu {
namespace {

template <class T>
class BackwardTask {
  using Units = typename TileUnitsOf<T>::type;
  using Unit = typename Units::Unit;
  using Tiles = Products<Units>;
  using Transposed = TransposedOperand<Units>;
  static constexpr int64_t kRows = Tiles::kRows;  // that share one span of keys
  static constexpr int64_t kPer = Units::kPerUnit;

 public:
  BackwardTask(const Job &job, const Sequence &seq, int64_t kv_head)
      : job_(job), grads_(*job.gradients), seq_(seq), kv_head_(kv_head), rows_(seq.len_q * job.group), scores_(job, seq), dropout_(job) {
    const attnhub_cpu_call &c = job.call;
    scale_ = static_cast<float>(c.softmax_scale);
    keep_factor_ = static_cast<float>(1.0 / (1.0 - c.dropout_p));
    block_keys_ = job.block_keys;
    lds_ = block_keys_ + W;  // rows of P and dS are read as columns: a power of two would crowd a few sets of the cache
    q_units_ = round_up((c.head_dim + kPer - 1) / kPer, Units::kDepth);
    v_units_ = round_up((c.v_head_dim + kPer - 1) / kPer, Units::kDepth);
    ldq_ = round_up(q_units_, W);
    ldv_ = round_up(v_units_, W);
    ldd_ = round_up(c.head_dim, W);
    ldo_ = round_up(c.v_head_dim, W);
  }

  // Gradients from the keys of one split: dK and dV of them, and their part of dQ.
  int32_t run(int64_t split) {
    const bool own_dq = job_.splits == 1;
    if (!allocate(own_dq ? padded_rows() * ldd_ : 0)) return ATTNHUB_CPU_NO_MEMORY;
    [[maybe_unused]] const typename Tiles::Session session;
    if (!own_dq) dq_ = job_.partial + ((seq_.index * job_.call.kv_heads + kv_head_) * job_.splits + split) * job_.partial_stride;
    if (rows_ > 0) std::memset(dq_, 0, static_cast<size_t>(padded_rows() * ldd_) * sizeof(float));
    with_bias_ = job_.bias_gradient == kBiasInTask;
    find_keys();
    const int64_t begin = split * job_.split_keys, end = min64(begin + job_.split_keys, seq_.len_k);
    for (int64_t j0 = begin; j0 < end; j0 += block_keys_) {
      const int64_t count = min64(block_keys_, end - j0);
      start_block(j0, count);
      for (int64_t r = 0; r < rows_; r += kSubRows) sub_block(r, min64(rows_, r + kSubRows), j0, count);
      finish_block(j0, count);
    }
    if (split == job_.splits - 1) clear_unused_keys();
    if (own_dq && grads_.grad_q) {
      for (int64_t r = 0; r < rows_; ++r) write_scaled(query_row<T>(grads_.grad_q, grads_.grad_q_strides, r), dq_ + r * ldd_, job_.call.head_dim, scale_);
    }
    return ATTNHUB_CPU_OK;
  }

  // The gradient of the bias alone, from queries [i0, i1) and keys [begin, end).
  int32_t run_bias(int64_t i0, int64_t i1, int64_t begin, int64_t end) {
    if (!allocate(0)) return ATTNHUB_CPU_NO_MEMORY;
    [[maybe_unused]] const typename Tiles::Session session;
    with_bias_ = bias_only_ = true;
    find_keys();
    end = min64(end, seq_.len_k);
    for (int64_t j0 = begin; j0 < end; j0 += block_keys_) {
      const int64_t count = min64(block_keys_, end - j0), last = min64(rows_, i1 * job_.group);
      start_block(j0, count);
      for (int64_t r = i0 * job_.group; r < last; r += kSubRows) sub_block(r, min64(last, r + kSubRows), j0, count);
    }
    return ATTNHUB_CPU_OK;
  }

 private:
  bool allocate(int64_t dq_floats) {
    const attnhub_cpu_call &c = job_.call;
    const int64_t panels = (block_keys_ + kTileColumns - 1) / kTileColumns;
    const int64_t counts[] = {panels * q_units_ * kTileColumns, panels * v_units_ * kTileColumns, key_chunks() * key_chunk_stride(),
                              kSubRows * ldq_, kSubRows * ldv_, Transposed::size(ldd_, kSubRows), Transposed::size(ldo_, kSubRows),
                              kSubRows * lds_, kSubRows * lds_, kPer == 1 ? 0 : kSubRows * lds_ / kPer,
                              round_up(c.head_dim, W) * lds_, round_up(c.v_head_dim, W) * lds_, lds_ + W, dq_floats};
    size_t bytes = static_cast<size_t>(max64(rows_, 1)) * sizeof(Interval) + static_cast<size_t>(2 * (block_keys_ + W + kSubRows)) * sizeof(void *) + 64 * 20;
    for (int64_t n : counts) bytes += static_cast<size_t>(n) * 4;
    char *at = static_cast<char *>(scratch(kTaskScratch, bytes));
    if (!at) return false;
    const auto take = [&at](auto *&p, int64_t count) {
      p = reinterpret_cast<decltype(+p)>(at);
      at += round_up(count * static_cast<int64_t>(sizeof *p), 64);
    };
    take(k_panels_, counts[0]);
    take(v_panels_, counts[1]);
    take(k_columns_, counts[2]);
    take(q_, counts[3]);
    take(do_, counts[4]);
    take(q_columns_, counts[5]);
    take(do_columns_, counts[6]);
    take(s_, counts[7]);
    take(dp_, counts[8]);
    take(ds_rows_, counts[9]);
    take(dk_, counts[10]);
    take(dv_, counts[11]);
    take(slope_, counts[12]);
    take(dq_, counts[13]);
    take(keys_, max64(rows_, 1));
    take(k_rows_, block_keys_ + W);
    take(v_rows_, block_keys_ + W);
    take(q_rows_, kSubRows);
    take(do_rows_, kSubRows);
    return true;
  }

  int64_t padded_rows() const { return round_up(rows_, Tiles::kRowStep); }
  int64_t key_chunks() const { return (ldd_ + kTileColumns - 1) / kTileColumns; }
  int64_t key_chunk_stride() const { return (block_keys_ + kPer - 1) / kPer * kTileColumns; }
  int64_t query(int64_t r) const { return r / job_.group; }
  int64_t head(int64_t r) const { return kv_head_ * job_.group + r % job_.group; }
  int64_t lse_index(int64_t r) const { return (seq_.batch * job_.call.q_heads + head(r)) * job_.call.seqlen_q + seq_.q_begin + query(r); }

  template <class Element, class Pointer>
  Element *query_row(Pointer *data, const int64_t *strides, int64_t r) const {
    return static_cast<Element *>(data) + seq_.batch * strides[0] + head(r) * strides[1] + (seq_.q_begin + query(r)) * strides[2];
  }
  template <class Pointer>
  T *key_row(Pointer *data, const int64_t *strides, int64_t j) const {
    return static_cast<T *>(data) + seq_.batch * strides[0] + kv_head_ * strides[1] + (seq_.k_begin + j) * strides[2];
  }

  // A row whose softmax saw no key has no gradient, whatever the mask says.
  void find_keys() {
    Intervals intervals(job_, seq_);
    for (int64_t r = 0; r < rows_; ++r) keys_[r] = job_.call.lse[lse_index(r)] == -INFINITY ? Interval{0, 0} : intervals.of(query(r));
  }

  void start_block(int64_t j0, int64_t count) {
    const attnhub_cpu_call &c = job_.call;
    KeyRows<T>(job_, seq_, kv_head_, c.k, c.k_strides).fill(k_rows_, j0, count);
    KeyRows<T>(job_, seq_, kv_head_, c.v, c.v_strides).fill(v_rows_, j0, count);
    for (int64_t x = count; x < count + W; ++x) {  // computed by short_scores and dropped
      k_rows_[x] = k_rows_[count - 1];
      v_rows_[x] = v_rows_[count - 1];
    }
    for (int64_t j = 0; j < count; j += kTileColumns) {
      pack_k<Units>(k_rows_ + j, min64(kTileColumns, count - j), c.head_dim, k_panels_ + j * q_units_);
      pack_k<Units>(v_rows_ + j, min64(kTileColumns, count - j), c.v_head_dim, v_panels_ + j * v_units_);
    }
    if (bias_only_) return;
    k_finite_ = pack_v<Units>(k_rows_, count, c.head_dim, k_columns_, key_chunk_stride());
    std::memset(dk_, 0, static_cast<size_t>(ldd_ * lds_) * sizeof(float));
    std::memset(dv_, 0, static_cast<size_t>(ldo_ * lds_) * sizeof(float));
  }

  void finish_block(int64_t j0, int64_t count) {
    const attnhub_cpu_call &c = job_.call;
    if (grads_.grad_k)
      write_transposed(key_row(grads_.grad_k, grads_.grad_k_strides, j0), grads_.grad_k_strides[2], dk_, lds_, count, c.head_dim, scale_);
    if (grads_.grad_v)
      write_transposed(key_row(grads_.grad_v, grads_.grad_v_strides, j0), grads_.grad_v_strides[2], dv_, lds_, count, c.v_head_dim, keep_factor_);
  }

  // Keys behind the used length of a sequence get gradients of 0.
  void clear_unused_keys() {
    const attnhub_cpu_call &c = job_.call;
    const int32_t *cu = job_.mask.cu_seqlens_k;
    const int64_t capacity = cu ? cu[seq_.index + 1] - seq_.k_begin : c.seqlen_k;
    for (int64_t j = seq_.len_k; j < capacity; ++j) {
      if (grads_.grad_k) std::memset(key_row(grads_.grad_k, grads_.grad_k_strides, j), 0, static_cast<size_t>(c.head_dim) * sizeof(T));
      if (grads_.grad_v) std::memset(key_row(grads_.grad_v, grads_.grad_v_strides, j), 0, static_cast<size_t>(c.v_head_dim) * sizeof(T));
    }
  }

  // Keys [from, to) of a block that the rows of a tile need, multiples of kKeyStep; empty: from == to.
  struct Span {
    int64_t from;
    int64_t to;
  };

  // Rows [r0, r1) against the block of keys [j0, j0 + count).
  void sub_block(int64_t r0, int64_t r1, int64_t j0, int64_t count) {
    Span spans[kSubRows / kRows], all{count, 0};
    for (int64_t r = r0, g = 0; r < r1; r += kRows, ++g) {
      int64_t low = count, high = 0;
      for (int64_t x = r; x < min64(r1, r + kRows); ++x) {
        const int64_t a = max64(0, keys_[x].low - j0), b = min64(count, keys_[x].high - j0);
        if (a < b) {
          low = min64(low, a);
          high = max64(high, b);
        }
      }
      spans[g] = low < high ? Span{low / Tiles::kKeyStep * Tiles::kKeyStep, round_up(high, Tiles::kKeyStep)} : Span{0, 0};
      if (low < high) all = {min64(all.from, spans[g].from), max64(all.to, spans[g].to)};
    }
    if (all.from >= all.to) return;
    if (job_.mask.block_sparse && !any_block_kept(job_, seq_, kv_head_, r0, r1, j0 + all.from, j0 + min64(all.to, count))) return;
    all.from = all.from / kTileColumns * kTileColumns;
    pack_rows(r0, r1);
    if (rows_ <= kDecodeRows) {
      short_scores(q_, ldq_, k_rows_, job_.call.head_dim, s_, count);
      short_scores(do_, ldv_, v_rows_, job_.call.v_head_dim, dp_, count);
    } else {
      scores(q_, ldq_, q_units_, k_panels_, s_, r1 - r0, count, spans);
      scores(do_, ldv_, v_units_, v_panels_, dp_, r1 - r0, count, spans);
    }
    for (int64_t r = r0; r < r1; ++r) {
      float *s = s_ + (r - r0) * lds_, *dp = dp_ + (r - r0) * lds_;
      const int64_t a = max64(0, keys_[r].low - j0), b = min64(count, keys_[r].high - j0);
      if (a < b) {
        gradient_of_row(s, dp, a, b, r, j0);
        std::memset(s + all.from, 0, static_cast<size_t>(a - all.from) * 4);
        std::memset(dp + all.from, 0, static_cast<size_t>(a - all.from) * 4);
        std::memset(s + b, 0, static_cast<size_t>(all.to - b) * 4);
        std::memset(dp + b, 0, static_cast<size_t>(all.to - b) * 4);
      } else {
        std::memset(s + all.from, 0, static_cast<size_t>(all.to - all.from) * 4);
        std::memset(dp + all.from, 0, static_cast<size_t>(all.to - all.from) * 4);
      }
    }
    if (bias_only_) return;
    if (!k_finite_ || !rows_finite_) return select(r0, r1, count, spans);
    if constexpr (kPer == 2) round_to_pairs(r1 - r0, all);
    product_dq(r0, r1, count, spans);
    constexpr bool kPacked = Transposed::kPacked;
    if (grads_.grad_v) product_transposed(dv_, job_.call.v_head_dim, kPacked ? do_columns_ : do_, kPacked ? Transposed::ld(ldo_, kSubRows) : ldv_, s_, r1 - r0, all, spans);
    if (grads_.grad_k) product_transposed(dk_, job_.call.head_dim, kPacked ? q_columns_ : q_, kPacked ? Transposed::ld(ldd_, kSubRows) : ldq_, dp_, r1 - r0, all, spans);
  }

  void pack_rows(int64_t r0, int64_t r1) {
    const attnhub_cpu_call &c = job_.call;
    for (int64_t r = r0; r < r1; ++r) {
      q_rows_[r - r0] = query_row<const T>(c.q, c.q_strides, r);
      do_rows_[r - r0] = query_row<const T>(grads_.grad_out, grads_.grad_out_strides, r);
      pack_q<Units>(q_rows_[r - r0], c.head_dim, q_ + (r - r0) * ldq_);
      pack_q<Units>(do_rows_[r - r0], c.v_head_dim, do_ + (r - r0) * ldv_);
    }
    if (bias_only_) return;
    rows_finite_ = all_finite(q_rows_, r1 - r0, c.head_dim) && all_finite(do_rows_, r1 - r0, c.v_head_dim);
    if constexpr (Transposed::kPacked) {
      Transposed::pack(q_rows_, r1 - r0, c.head_dim, ldd_, q_columns_, Transposed::ld(ldd_, kSubRows));
      Transposed::pack(do_rows_, r1 - r0, c.v_head_dim, ldo_, do_columns_, Transposed::ld(ldo_, kSubRows));
    }
  }

  // c[row, key] = rows of a . panel of keys, where the spans want it: raw scores, and dP.
  void scores(const Unit *a, int64_t lda, int64_t units, const Unit *panels, float *c, int64_t rows, int64_t count, const Span *spans) {
    for (int64_t j = 0; j < count; j += kTileColumns) {
      const int64_t last = min64(j + kTileColumns, round_up(count, W));  // what is packed
      for (int64_t r = 0, g = 0; r < rows; r += kRows, ++g) {
        const int64_t width = min64(spans[g].to, last) - j;
        if (width <= 0 || spans[g].from >= last) continue;
        Tiles::write(a + r * lda, lda, panels + j * units, kTileColumns, c + r * lds_ + j, lds_, min64(kRows, rows - r), width, units);
      }
    }
  }

  // The same for few rows, added up in the order of decode_task: P = exp(S - lse) feels any other rounding than the forward's.
  void short_scores(const Unit *a, int64_t lda, const T *const *rows, int64_t n, float *c, int64_t count) {
    for_row_groups(rows_, [&](auto group, int64_t r) {
      constexpr int kRows = decltype(group)::value, kKeys = W / kRows;
      for (int64_t j = 0; j < count; j += kKeys) dots<Units, T, kRows>(a + r * lda, lda, rows + j, n, c + r * lds_ + j, lds_);
    });
  }

  // s[a, b): raw scores -> P, dropped by dropout; dp[a, b): dP -> dS. Row r, keys from j0 on.
  void gradient_of_row(float *s, float *dp, int64_t a, int64_t b, int64_t r, int64_t j0) {
    const int64_t index = lse_index(r), first = a / W * W, last = round_up(b, W);
    const float lse = job_.call.lse[index], delta = job_.delta[index];
    const bool capped = job_.call.softcap > 0;
    if (job_.predicated) scores_.finish(s + a, b - a, query(r), head(r), j0 + a, capped ? slope_ + a : nullptr);
    const float factor = job_.predicated ? 1.0f : scale_;
    int32_t room[Dropout::room(kMostBlockKeys)];
    const int32_t *kept = nullptr;
    if (job_.call.dropout_p > 0) kept = dropout_.masks(seq_.index * job_.call.q_heads + head(r), query(r), j0 + first, last - first, room);
    for (int64_t j = first; j < last; j += W) {
      const F x = read<F>(s + j), p = exp2v(x * factor - lse, splat(kLog2E));
      F gradient = read<F>(dp + j);
      if (kept) gradient = read<I>(kept + j - first) ? gradient * keep_factor_ : F{};
      // A removed pair has weight 0, and its dP may be anything.
      const F ds = p * (gradient - delta);
      store(dp + j, p == F{} ? F{} : ds);
      store(s + j, p);
    }
    if (with_bias_) add_to_bias(dp + a, b - a, query(r), head(r), j0 + a);
    if (capped) {
      for (int64_t j = a; j < b; ++j) dp[j] = dp[j] == 0.0f ? 0.0f : dp[j] * slope_[j];
    }
    if (kept) {
      for (int64_t j = first; j < last; j += W) store(s + j, read<I>(kept + j - first) ? read<F>(s + j) : F{});
    }
  }

  void add_to_bias(const float *ds, int64_t n, int64_t i, int64_t head, int64_t j0) {
    const int64_t *strides = grads_.grad_bias_strides;
    float *to = grads_.grad_bias + seq_.index * strides[0] + head * strides[1] + i * strides[2];
    if (strides[3] == 0) {
      float sum = 0.0f;
      for (int64_t x = 0; x < n; ++x) sum += ds[x];
      *to += sum;
    } else {
      to += j0 * strides[3];
      for (int64_t x = 0; x < n; ++x) to[x * strides[3]] += ds[x];
    }
  }

  // P and dS in fp32 -> P and dS as pairs of rows (in place, in the even rows), and dS as rows of pairs of keys.
  void round_to_pairs(int64_t rows, Span all) {
    for (int64_t r = 0; r < round_up(rows, 2 * Units::kDepth); r += 2) {
      const bool even = r < rows, odd = r + 1 < rows;
      for (int64_t j = all.from; j < all.to; j += W) {
        float *p = s_ + r * lds_ + j, *ds = dp_ + r * lds_ + j;
        const F ds0 = even ? read<F>(ds) : F{}, ds1 = odd ? read<F>(ds + lds_) : F{};
        Bf16 *row = reinterpret_cast<Bf16 *>(ds_rows_ + r * (lds_ / kPer)) + j;
        store(row, ds0);
        store(row + lds_, ds1);
        put_pair(p, even ? read<F>(p) : F{}, odd ? read<F>(p + lds_) : F{});
        put_pair(ds, ds0, ds1);
      }
    }
  }
  static ATTNHUB_INLINE void put_pair(float *to, F low, F high) {
    const U pair = __builtin_convertvector(to_bf16(low), U) | __builtin_convertvector(to_bf16(high), U) << 16;
    std::memcpy(to, &pair, sizeof pair);
  }

  // dQ += dS K, a part of K at a time as in the forward.
  void product_dq(int64_t r0, int64_t r1, int64_t count, const Span *spans) {
    if (!grads_.grad_q) return;
    static constexpr Ones<kRows> kOnes;
    const Unit *ds = kPer == 1 ? reinterpret_cast<const Unit *>(dp_) : ds_rows_;
    const Unit *k = k_columns_;
    const int64_t units = round_up(count, kPer * Units::kDepth) / kPer;
    for (int64_t c = 0; c < ldd_; c += kTileColumns, k += key_chunk_stride()) {
      const int64_t width = min64(kTileColumns, ldd_ - c);
      for (int64_t part = 0; part < units; part += kChain) {
        for (int64_t r = r0, g = 0; r < r1; r += kRows, ++g) {
          const int64_t from = max64(spans[g].from / kPer, part), to = min64(min64(spans[g].to / kPer, units), part + kChain);
          if (from >= to) continue;
          Tiles::add(ds + (r - r0) * (lds_ / kPer) + from, lds_ / kPer, k + from * width, width, dq_ + r * ldd_ + c, ldd_, min64(kRows, r1 - r), width,
                     to - from, kOnes.factor);
        }
      }
    }
  }

  // c[n, keys] += a^T b: a is a TransposedOperand of q or dO, b the rows of dS or P, both in units along the rows.
  void product_transposed(float *c, int64_t n, const Unit *a, int64_t lda, const float *b, int64_t rows, Span all, const Span *spans) {
    for (int64_t j = all.from; j < all.to; j += kTileColumns) {
      const int64_t width = min64(kTileColumns, all.to - j);
      int64_t first = rows, last = 0;
      for (int64_t r = 0, g = 0; r < rows; r += kRows, ++g) {
        if (spans[g].from >= j + width || spans[g].to <= j) continue;
        first = min64(first, r);
        last = min64(rows, r + kRows);
      }
      if (first >= last) continue;
      const int64_t units = round_up((last - first + kPer - 1) / kPer, Units::kDepth);
      const Unit *panel = reinterpret_cast<const Unit *>(b + first * lds_ + j);
      Tiles::add_transposed(Transposed::kByColumn ? a + first / kPer : a + first / kPer * lda, lda, panel, kPer * lds_, c + j, lds_, n, width, units);
    }
  }

  // An operand holds Inf or NaN: pairs are selected by their weight, since 0 * NaN would poison what the mask keeps apart.
  void select(int64_t r0, int64_t r1, int64_t count, const Span *spans) {
    const attnhub_cpu_call &c = job_.call;
    for (int64_t r = r0; r < r1; ++r) {
      const Span span = spans[(r - r0) / kRows];
      const float *p = s_ + (r - r0) * lds_, *ds = dp_ + (r - r0) * lds_;
      for (int64_t j = span.from; j < min64(span.to, count); ++j) {
        if (ds[j] != 0.0f) {
          for (int64_t x = 0; x < c.head_dim; ++x) {
            dq_[r * ldd_ + x] += ds[j] * to_float(k_rows_[j][x]);
            dk_[x * lds_ + j] += ds[j] * to_float(q_rows_[r - r0][x]);
          }
        }
        if (p[j] != 0.0f) {
          for (int64_t x = 0; x < c.v_head_dim; ++x) dv_[x * lds_ + j] += p[j] * to_float(do_rows_[r - r0][x]);
        }
      }
    }
  }

  const Job &job_;
  const attnhub_cpu_gradients &grads_;
  const Sequence &seq_;
  const int64_t kv_head_, rows_;
  const Scores scores_;
  const Dropout dropout_;
  float scale_, keep_factor_;
  int64_t block_keys_, lds_, q_units_, v_units_, ldq_, ldv_, ldd_, ldo_;
  Unit *k_panels_ = nullptr, *v_panels_ = nullptr, *k_columns_ = nullptr, *q_ = nullptr, *do_ = nullptr, *q_columns_ = nullptr, *do_columns_ = nullptr,
       *ds_rows_ = nullptr;
  float *s_ = nullptr, *dp_ = nullptr, *dk_ = nullptr, *dv_ = nullptr, *slope_ = nullptr, *dq_ = nullptr;
  Interval *keys_ = nullptr;
  const T **k_rows_ = nullptr, **v_rows_ = nullptr, **q_rows_ = nullptr, **do_rows_ = nullptr;
  bool k_finite_ = true, rows_finite_ = true, with_bias_ = false, bias_only_ = false;
};

// delta of the rows of one head of one sequence, and its part of the sink's gradient. Index: sequence * q_heads + head.
template <class T>
int32_t delta_task(const Job &job, int64_t index) {
  const attnhub_cpu_call &c = job.call;
  const attnhub_cpu_gradients &g = *job.gradients;
  const int64_t head = index % c.q_heads;
  const Sequence seq = sequence_of(job, index / c.q_heads);
  double sink = 0.0;
  for (int64_t i = 0; i < seq.len_q; ++i) {
    const int64_t at = (seq.batch * c.q_heads + head) * c.seqlen_q + seq.q_begin + i;
    const T *out = static_cast<const T *>(c.out) + seq.batch * c.out_strides[0] + head * c.out_strides[1] + (seq.q_begin + i) * c.out_strides[2];
    const T *grad = static_cast<const T *>(g.grad_out) + seq.batch * g.grad_out_strides[0] + head * g.grad_out_strides[1] +
                    (seq.q_begin + i) * g.grad_out_strides[2];
    if (c.lse[at] == -INFINITY) {
      job.delta[at] = 0.0f;
      continue;
    }
    F sum = {};
    int64_t x = 0;
    for (; x + W <= c.v_head_dim; x += W) sum += load(out + x) * load(grad + x);
    if (x < c.v_head_dim) sum += load_part(out + x, static_cast<int>(c.v_head_dim - x)) * load_part(grad + x, static_cast<int>(c.v_head_dim - x));
    const float delta = reduce_add(sum) - (g.grad_lse ? g.grad_lse[at] : 0.0f);
    job.delta[at] = delta;
    if (job.sink_parts) sink -= static_cast<double>(expf(job.mask.sinks[head] - c.lse[at])) * static_cast<double>(delta);
  }
  if (job.sink_parts) job.sink_parts[index] = sink;
  return ATTNHUB_CPU_OK;
}

// The key split first, so that under a causal mask the longest tasks (early keys) start first.
template <class T>
int32_t backward_task(const Job &job, int64_t index) {
  const int64_t kv_head = index % job.call.kv_heads;
  index /= job.call.kv_heads;
  const Sequence seq = sequence_of(job, index % job.sequences);
  return BackwardTask<T>(job, seq, kv_head).run(index / job.sequences);
}

// Sums the parts of dQ of kReduceRows rows. Index: (sequence, kv head, block of rows).
template <class T>
int32_t reduce_dq(const Job &job, int64_t index) {
  const attnhub_cpu_call &c = job.call;
  const attnhub_cpu_gradients &g = *job.gradients;
  const int64_t blocks = (job.max_len_q * job.group + kReduceRows - 1) / kReduceRows, owner = index / blocks, ldd = round_up(c.head_dim, W);
  const int64_t kv_head = owner % c.kv_heads;
  const Sequence seq = sequence_of(job, owner / c.kv_heads);
  const int64_t first = index % blocks * kReduceRows, last = min64(seq.len_q * job.group, first + kReduceRows);
  for (int64_t r = first; r < last; ++r) {
    float *sum = job.partial + owner * job.splits * job.partial_stride + r * ldd;
    for (int64_t s = 1; s < job.splits; ++s) {
      const float *part = sum + s * job.partial_stride;
      for (int64_t x = 0; x < ldd; x += W) store(sum + x, read<F>(sum + x) + read<F>(part + x));
    }
    const int64_t head = kv_head * job.group + r % job.group;
    T *to = static_cast<T *>(g.grad_q) + seq.batch * g.grad_q_strides[0] + head * g.grad_q_strides[1] + (seq.q_begin + r / job.group) * g.grad_q_strides[2];
    write_scaled(to, sum, c.head_dim, static_cast<float>(c.softmax_scale));
  }
  return ATTNHUB_CPU_OK;
}

// One part of the bias's gradient whose elements no other task adds to: every sequence, head and key that the bias is broadcast
// over is visited here, one after another.
template <class T>
int32_t bias_task(const Job &job, int64_t index) {
  const int64_t *strides = job.gradients->grad_bias_strides;
  const BiasParts &parts = job.bias_parts;
  const int64_t key_part = index % parts.keys, row_part = index / parts.keys % parts.rows, rest = index / (parts.keys * parts.rows);
  const int64_t head_part = rest % parts.heads, sequence_part = rest / parts.heads;
  const int64_t first = strides[0] ? sequence_part : 0, last = strides[0] ? first + 1 : job.sequences;
  const int64_t h0 = strides[1] ? head_part : 0, h1 = strides[1] ? h0 + 1 : job.call.kv_heads;
  const int64_t i0 = row_part * parts.queries, i1 = parts.rows == 1 ? job.max_len_q : i0 + parts.queries;
  const int64_t j0 = key_part * job.block_keys, j1 = parts.keys == 1 ? job.max_len_k : j0 + job.block_keys;
  for (int64_t n = first; n < last; ++n) {
    const Sequence seq = sequence_of(job, n);
    for (int64_t h = h0; h < h1; ++h) {
      const int32_t status = BackwardTask<T>(job, seq, h).run_bias(i0, i1, j0, j1);
      if (status != ATTNHUB_CPU_OK) return status;
    }
  }
  return ATTNHUB_CPU_OK;
}

}  // namespace
}  // namespace attnhub_cpu
