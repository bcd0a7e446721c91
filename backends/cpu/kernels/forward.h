// The tiled forward pass: one task computes a block of rows against its keys, block of keys by block of keys. K and V are
// packed once per block and shared by all rows of the task; scores live for kSubRows rows at a time.
#pragma once

#include "decode.h"

namespace attnhub_cpu {
namespace {

constexpr int64_t kSubRows = W >= 16 ? 96 : 48;  // scores of 96 x 256 floats: 96 KiB, a tenth of a 1 MiB L2

template <class T>
class TiledTask {
  using Units = typename TileUnitsOf<T>::type;
  using Unit = typename Units::Unit;
  using Tiles = Products<Units>;
  static constexpr int64_t kPer = Units::kPerUnit;
  static constexpr int64_t kRows = Tiles::kRows;  // that share one span of keys
  static_assert(kSubRows % kRows == 0, "sub-blocks are whole tiles");

 public:
  TiledTask(const Job &job, const Sequence &seq, int64_t kv_head, int64_t first_row, int64_t rows)
      : job_(job), seq_(seq), kv_head_(kv_head), first_row_(first_row), rows_(rows), scores_(job, seq), dropout_(job) {
    const attnhub_cpu_call &c = job.call;
    unit_ = job.predicated ? 1.0f : static_cast<float>(c.softmax_scale);
    block_keys_ = job.block_keys;
    q_units_ = round_up((c.head_dim + kPer - 1) / kPer, Units::kDepth);
    ldq_ = round_up(q_units_, W);
    lds_ = block_keys_ + Tiles::kScorePad;
    ldo_ = round_up(c.v_head_dim, W);
  }

  int32_t run(int64_t split) {
    if (!allocate()) return ATTNHUB_CPU_NO_MEMORY;
    [[maybe_unused]] const typename Tiles::Session session;
    const Interval all = start_rows();
    const int64_t begin = split * job_.split_keys, limit = min64(begin + job_.split_keys, seq_.len_k);
    // Whole steps, so that what a group of rows meets of V does not depend on which other rows are in the task.
    const int64_t end = min64(limit, round_up(all.high, Tiles::kKeyStep));
    for (int64_t j0 = max64(begin, all.low / block_keys_ * block_keys_); j0 < end; j0 += block_keys_) {
      block(j0, min64(block_keys_, end - j0));
    }
    for (int64_t r = 0; r < rows_; ++r) end_row<T>(job_, seq_, kv_head_, split, first_row_ + r, o_ + r * ldo_, state_[r], unit_);
    return ATTNHUB_CPU_OK;
  }

 private:
  bool allocate() {
    const int64_t panels = block_keys_ / kTileColumns, chunks = (ldo_ + kTileColumns - 1) / kTileColumns;
    const int64_t k_units = panels * q_units_ * kTileColumns, v_units = chunks * v_chunk_stride();
    const int64_t subs = (rows_ + kSubRows - 1) / kSubRows, rows = round_up(rows_, Tiles::kRowStep);
    // The units of Q, K and V, scores and O are all 4 bytes wide; what needs 8 comes first.
    const size_t bytes = static_cast<size_t>(rows_ + subs) * sizeof(Interval) + static_cast<size_t>(2 * block_keys_) * sizeof(void *) +
                         static_cast<size_t>(rows_) * sizeof(RowState) +
                         4 * static_cast<size_t>(k_units + v_units + rows * (ldq_ + ldo_) + kSubRows * lds_) + 9 * 64;
    char *at = static_cast<char *>(scratch(kTaskScratch, bytes));
    if (!at) return false;
    const auto take = [&at](auto *&p, int64_t count) {
      p = reinterpret_cast<decltype(+p)>(at);
      at += round_up(count * static_cast<int64_t>(sizeof *p), 64);
    };
    take(k_, k_units);
    take(v_, v_units);
    take(s_, kSubRows * lds_);
    take(o_, rows * ldo_);
    take(q_, rows * ldq_);
    take(keys_, rows_);
    take(sub_keys_, subs);
    take(state_, rows_);
    take(k_rows_, block_keys_);
    take(v_rows_, block_keys_);
    return true;
  }

  int64_t v_chunk_stride() const { return block_keys_ / kPer * kTileColumns; }
  int64_t query(int64_t r) const { return (first_row_ + r) / job_.group; }
  int64_t head(int64_t r) const { return kv_head_ * job_.group + (first_row_ + r) % job_.group; }

  // Packs q, finds every row's keys and returns the interval that holds all of them.
  Interval start_rows() {
    const attnhub_cpu_call &c = job_.call;
    Intervals intervals(job_, seq_);
    Interval all{seq_.len_k, 0};
    for (int64_t r = 0; r < rows_; ++r) {
      const T *row = static_cast<const T *>(c.q) + seq_.batch * c.q_strides[0] + head(r) * c.q_strides[1] +
                     (seq_.q_begin + query(r)) * c.q_strides[2];
      pack_q<Units>(row, c.head_dim, q_ + r * ldq_);
      keys_[r] = intervals.of(query(r));
      state_[r] = {-INFINITY, 0.0f, 1.0f};
      Interval &sub = sub_keys_[r / kSubRows];
      if (r % kSubRows == 0) sub = {seq_.len_k, 0};
      if (keys_[r].low < keys_[r].high) {
        sub = {min64(sub.low, keys_[r].low), max64(sub.high, keys_[r].high)};
        all = {min64(all.low, keys_[r].low), max64(all.high, keys_[r].high)};
      }
    }
    const int64_t rows = round_up(rows_, Tiles::kRowStep);
    std::memset(q_ + rows_ * ldq_, 0, static_cast<size_t>((rows - rows_) * ldq_) * sizeof(Unit));
    std::memset(o_, 0, static_cast<size_t>(rows * ldo_) * sizeof(float));
    return all;
  }

  // Columns [from, to) of a block that the rows of a tile need, multiples of kKeyStep; empty: from == to.
  struct Span {
    int64_t from;
    int64_t to;
  };

  // All rows against keys [j0, j0 + count).
  void block(int64_t j0, int64_t count) {
    if constexpr (Tiles::kOverlaps) return overlapped_block(j0, count);
    bool packed = false;
    for (int64_t sub = 0; sub * kSubRows < rows_; ++sub) {
      const int64_t low = max64(sub_keys_[sub].low, j0), high = min64(sub_keys_[sub].high, j0 + count);
      if (low >= high) continue;
      const int64_t r0 = sub * kSubRows, r1 = min64(rows_, r0 + kSubRows);
      if (job_.mask.block_sparse && !any_block_kept(job_, seq_, kv_head_, first_row_ + r0, first_row_ + r1, low, high)) continue;
      if (!packed) pack(j0, count);
      packed = true;
      sub_block(r0, r1, j0, count);
    }
  }

  // The same where products and softmax can run at the same time: beside the softmax of a group of rows, the weights of the group
  // before it meet V, and the rows of the next one meet K. Two buffers of scores take turns.
  struct Group {
    int64_t r0, r1;
    Span span;
    float *s;
  };

  void overlapped_block(int64_t j0, int64_t count) {
    static_assert(kSubRows >= 2 * kRows, "s_ holds the scores of two groups");
    if constexpr (Tiles::kOverlaps) {
      static_assert((kMostBlockKeys + 512) / kTileColumns <= Tiles::Queue::kMost, "the panels of a block of keys, and the chunks of V");
      Group before{0, 0, {0, 0}, nullptr}, now = next_group(0, j0, count, s_);
      if (now.r0 == now.r1) return;
      pack(j0, count);
      multiply_beside(before, now, count, [](auto &) {});
      while (now.r0 < now.r1) {
        const Group next = next_group(now.r1, j0, count, now.s == s_ ? s_ + kRows * lds_ : s_);
        multiply_beside(before, next, count, [&](auto &queue) {
          for (int64_t r = now.r0; r < now.r1; r += W) softmax(now.s, now.r0, r, min64(r + W, now.r1), j0, count, &now.span, &queue);
        });
        for (int64_t r = now.r0; r < now.r1; ++r) scale_row(o_ + r * ldo_, state_[r].alpha);
        before = now;
        now = next;
      }
      multiply_beside(before, now, count, [](auto &) {});
    }
  }

  // The weights of one group times V, then the rows of another times K, as far as there are such groups, while fn takes from the queue.
  template <class Fn>
  void multiply_beside(const Group &weights, const Group &rows, int64_t count, Fn fn) {
    typename Tiles::Queue queue;
    if (weights.r0 < weights.r1) queue_pv(queue, weights, count);
    if (rows.r0 < rows.r1) queue_qk(queue, rows, count);
    queue.start();
    fn(queue);
    queue.finish();
  }

  // The first group from row r on that has keys in the block; r0 == r1: none.
  Group next_group(int64_t r, int64_t j0, int64_t count, float *s) {
    for (; r < rows_; r += kRows) {
      const int64_t r1 = min64(rows_, r + kRows);
      const Span span = span_of(r, r1, j0, count);
      if (span.from == span.to) continue;
      if (job_.mask.block_sparse &&
          !any_block_kept(job_, seq_, kv_head_, first_row_ + r, first_row_ + r1, j0 + span.from, j0 + min64(span.to, count))) {
        continue;
      }
      return {r, r1, span, s};
    }
    return {rows_, rows_, {0, 0}, s};
  }

  template <class Queue>
  void queue_qk(Queue &queue, const Group &group, int64_t count) {
    const int64_t rows = round_up(group.r1 - group.r0, Tiles::kRowStep);
    for (int64_t j = group.span.from / kTileColumns * kTileColumns; j < count; j += kTileColumns) {
      const int64_t width = min64(group.span.to, min64(j + kTileColumns, round_up(count, W))) - j;
      if (width <= 0) continue;
      queue.add(q_ + group.r0 * ldq_, ldq_, k_ + j * q_units_, kTileColumns, group.s + j, lds_, rows, width, q_units_, false);
    }
  }

  template <class Queue>
  void queue_pv(Queue &queue, const Group &group, int64_t count) {
    if (!finite(group.span, count)) return select_rows(group.r0, group.r1, group.s, group.span, count, false);
    const int64_t rows = round_up(group.r1 - group.r0, Tiles::kRowStep), from = group.span.from / kPer;
    const int64_t to = min64(group.span.to, round_up(count, kPer * Units::kDepth)) / kPer;
    const Unit *p = reinterpret_cast<const Unit *>(group.s), *v = v_;
    for (int64_t c = 0; c < ldo_; c += kTileColumns, v += v_chunk_stride()) {
      const int64_t width = min64(kTileColumns, ldo_ - c);
      queue.add(p + from, lds_, v + from * width, width, o_ + group.r0 * ldo_ + c, ldo_, rows, width, to - from, true);
    }
  }

  void scale_row(float *o, float alpha) const {
    if (alpha == 1.0f) return;
    for (int64_t x = 0; x < ldo_; x += W) store(o + x, read<F>(o + x) * alpha);
  }

  void pack(int64_t j0, int64_t count) {
    const attnhub_cpu_call &c = job_.call;
    KeyRows<T>(job_, seq_, kv_head_, c.k, c.k_strides).fill(k_rows_, j0, count);
    KeyRows<T>(job_, seq_, kv_head_, c.v, c.v_strides).fill(v_rows_, j0, count);
    for (int64_t j = 0; j < count; j += kTileColumns) {
      pack_k<Units>(k_rows_ + j, min64(kTileColumns, count - j), c.head_dim, k_ + j * q_units_);
    }
    v_finite_ = pack_v<Units>(v_rows_, count, c.v_head_dim, v_, v_chunk_stride());
    for (int64_t j = 0; !v_finite_ && j < count; ++j) key_finite_[j] = all_finite(v_rows_ + j, 1, c.v_head_dim);
  }

  // Whether V of the keys that a group of rows is multiplied with is free of Inf and NaN. Where it is not, pairs are selected by their
  // weight, since 0 * NaN would poison rows that mask it out.
  bool finite(Span span, int64_t count) const {
    for (int64_t j = span.from; !v_finite_ && j < min64(span.to, count); ++j) {
      if (!key_finite_[j]) return false;
    }
    return true;
  }

  Span span_of(int64_t r0, int64_t r1, int64_t j0, int64_t count) const {
    int64_t low = count, high = 0;
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t a = max64(0, keys_[r].low - j0), b = min64(count, keys_[r].high - j0);
      if (a < b) {
        low = min64(low, a);
        high = max64(high, b);
      }
    }
    return low < high ? Span{low / Tiles::kKeyStep * Tiles::kKeyStep, round_up(high, Tiles::kKeyStep)} : Span{0, 0};
  }

  void sub_block(int64_t r0, int64_t r1, int64_t j0, int64_t count) {
    Span spans[kSubRows / kRows];
    for (int64_t r = r0, g = 0; r < r1; r += kRows, ++g) spans[g] = span_of(r, min64(r1, r + kRows), j0, count);
    products_qk(r0, r1, count, spans);
    for (int64_t r = r0; r < r1; r += W) softmax(s_, r0, r, min64(r + W, r1), j0, count, spans);
    for (int64_t r = r0, g = 0; r < r1; r += kRows, ++g) {
      if (finite(spans[g], count)) continue;
      select_rows(r, min64(r1, r + kRows), s_ + (r - r0) * lds_, spans[g], count, true);
      spans[g] = {0, 0};
    }
    products_pv(r0, r1, count, spans);
  }

  // Rows [r, end): raw products to weights. s and spans are those of the rows from r0 on.
  template <class Work = NoWork>
  void softmax(float *s, int64_t r0, int64_t r, int64_t end, int64_t j0, int64_t count, const Span *spans, Work *work = nullptr) {
    ScoreRow rows[W];
    for (int64_t x = r; x < end; ++x) {
      const Span span = spans[(x - r0) / kRows];
      float *line = s + (x - r0) * lds_;
      const int64_t a = max64(0, keys_[x].low - j0), b = max64(a, min64(count, keys_[x].high - j0));
      const int64_t first = a / W * W;
      if (job_.predicated && a < b) scores_.finish(line + first, b - first, query(x), head(x), j0 + first);
      rows[x - r] = {line, a, b, span.from, span.to};
    }
    softmax_rows<Units>(rows, static_cast<int>(end - r), unit_, state_ + r, work);
    if (job_.call.dropout_p == 0) return;
    for (int64_t x = r; x < end; ++x) {
      const ScoreRow &row = rows[x - r];
      drop_weights<Units>(job_, dropout_, seq_, row.s, row.low, row.high, query(x), head(x), j0);
    }
  }

  void products_qk(int64_t r0, int64_t r1, int64_t count, const Span *spans) {
    for (int64_t j = 0; j < count; j += kTileColumns) {
      const int64_t last = min64(j + kTileColumns, round_up(count, W));  // what is packed
      for (int64_t r = r0, g = 0; r < r1; r += kRows, ++g) {
        const int64_t width = min64(spans[g].to, last) - j;
        if (width <= 0 || spans[g].from >= last) continue;
        const int64_t rows = min64(kRows, r1 - r);
        Tiles::write(q_ + r * ldq_, ldq_, k_ + j * q_units_, kTileColumns, s_ + (r - r0) * lds_ + j, lds_, rows, width, q_units_);
      }
    }
  }

  // A part of V that the first-level cache holds serves all rows before the next one.
  void products_pv(int64_t r0, int64_t r1, int64_t count, const Span *spans) {
    static constexpr Ones<kRows> kOnes;
    const Unit *p = reinterpret_cast<const Unit *>(s_);
    const Unit *v = v_;
    const int64_t units = round_up(count, kPer * Units::kDepth) / kPer;
    for (int64_t c = 0; c < ldo_; c += kTileColumns, v += v_chunk_stride()) {
      const int64_t width = min64(kTileColumns, ldo_ - c);
      for (int64_t part = 0; part < units; part += kChain) {
        for (int64_t r = r0, g = 0; r < r1; r += kRows, ++g) {
          const int64_t begin = spans[g].from / kPer, from = max64(begin, part), to = min64(min64(spans[g].to / kPer, units), part + kChain);
          if (from >= to) continue;
          const int64_t rows = min64(kRows, r1 - r);
          float alpha[kRows];
          for (int64_t i = 0; i < rows; ++i) alpha[i] = state_[r + i].alpha;
          Tiles::add(p + (r - r0) * lds_ + from, lds_, v + from * width, width, o_ + r * ldo_ + c, ldo_, rows, width, to - from,
                     from == begin ? alpha : kOnes.factor);
        }
      }
    }
  }

  void select_rows(int64_t r0, int64_t r1, const float *s, Span span, int64_t count, bool scale) {
    float weights[kMostBlockKeys];
    for (int64_t r = r0; r < r1 && span.from < span.to; ++r) {
      const float *line = weights_of<Units>(s + (r - r0) * lds_, span.from, span.to, weights);
      select_sum(line, v_rows_, span.from, min64(span.to, count), job_.call.v_head_dim, o_ + r * ldo_, scale ? state_[r].alpha : 1.0f);
    }
  }

  const Job &job_;
  const Sequence &seq_;
  const int64_t kv_head_, first_row_, rows_;
  const Scores scores_;
  const Dropout dropout_;
  float unit_;
  int64_t block_keys_, q_units_, ldq_, lds_, ldo_;
  Unit *k_ = nullptr, *v_ = nullptr, *q_ = nullptr;
  float *s_ = nullptr, *o_ = nullptr;
  Interval *keys_ = nullptr, *sub_keys_ = nullptr;
  RowState *state_ = nullptr;
  const T **k_rows_ = nullptr, **v_rows_ = nullptr;
  bool v_finite_ = true;              // of the block
  bool key_finite_[kMostBlockKeys];  // of a key, where the block is not
};

// One task. The last row blocks come first: under a causal mask they are the longest.
template <class T>
int32_t forward_task(const Job &job, int64_t index) {
  const int64_t split = index % job.splits;
  index /= job.splits;
  const int64_t kv_head = index % job.call.kv_heads;
  index /= job.call.kv_heads;
  const Sequence seq = sequence_of(job, index % job.sequences);
  const int64_t first_row = (job.row_blocks - 1 - index / job.sequences) * job.block_rows;
  const int64_t rows = min64(job.block_rows, seq.len_q * job.group - first_row);
  if (rows <= 0) return ATTNHUB_CPU_OK;
  // Decided by the sequence and not by the block, so that a row's arithmetic never depends on how rows are cut into blocks.
  if (seq.len_q * job.group <= kDecodeRows) return decode_task<T>(job, seq, kv_head, split);
  return TiledTask<T>(job, seq, kv_head, first_row, rows).run(split);
}

}  // namespace
}  // namespace attnhub_cpu
