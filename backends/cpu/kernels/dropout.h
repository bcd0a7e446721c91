// Dropout's mask: Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"), W counters at once.
// attnhub_cpu_call says which word of which counter a pair uses.
#pragma once

#include "job.h"
#include "vec.h"

namespace attnhub_cpu {
namespace {

class Dropout {
 public:
  explicit Dropout(const Job &job)
      : threshold_(static_cast<uint32_t>(job.call.dropout_p * 4294967296.0)),
        key_{static_cast<uint32_t>(job.call.dropout_seed), static_cast<uint32_t>(job.call.dropout_seed >> 32)},
        offset_(static_cast<uint32_t>(job.call.dropout_offset)) {}

  // Words that `masks` writes for n keys from any j0: whole groups of 4 W, and what lies before j0 in the first.
  static constexpr int64_t room(int64_t n) { return n + 8 * W; }

  // All ones for pairs (row, j0 + x) that are kept, zeros for others. row_of_heads: b * q_heads + h. Returns the first.
  const int32_t *masks(int64_t row_of_heads, int64_t i, int64_t j0, int64_t n, int32_t *room) const {
    const int64_t begin = j0 / 4, end = (j0 + n + 3) / 4;
    I lane;
    for (int e = 0; e < W; ++e) lane[e] = e;
    int32_t *to = room;
    for (int64_t c = begin; c < end; c += W, to += 4 * W) {
      U word[4] = {bit_cast<U>(lane) + static_cast<uint32_t>(c), U{} + static_cast<uint32_t>(i), U{} + static_cast<uint32_t>(row_of_heads),
                   U{} + offset_};
      rounds(word);
      // Word w of lane l belongs to key 4 l + w: two rounds of zipping.
      const U even_low = zip<false>(word[0], word[2]), even_high = zip<true>(word[0], word[2]);
      const U odd_low = zip<false>(word[1], word[3]), odd_high = zip<true>(word[1], word[3]);
      put(to, zip<false>(even_low, odd_low));
      put(to + W, zip<true>(even_low, odd_low));
      put(to + 2 * W, zip<false>(even_high, odd_high));
      put(to + 3 * W, zip<true>(even_high, odd_high));
    }
    return room + (j0 - begin * 4);
  }

 private:
  typedef uint64_t L __attribute__((vector_size(4 * W)));

  static ATTNHUB_INLINE L multiply_even(L a, uint32_t m) {  // the low halves of a times m
#if defined(__AVX512F__)
    return (L)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    return (L)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(ATTNHUB_NEON)  // there is no product of 64-bit lanes
    return (L)vmull_n_u32(vmovn_u64((uint64x2_t)a), m);
#else
    return (a & 0xffffffffu) * m;
#endif
  }
  static ATTNHUB_INLINE void multiply(U a, uint32_t m, U &low, U &high) {
    const L even = multiply_even(bit_cast<L>(a), m), odd = multiply_even(bit_cast<L>(a) >> 32, m);
    low = bit_cast<U>((even & 0xffffffffu) | odd << 32);
    high = bit_cast<U>(even >> 32 | (odd & ~uint64_t(0xffffffffu)));
  }
  ATTNHUB_INLINE void rounds(U *c) const {
    uint32_t k0 = key_[0], k1 = key_[1];
    for (int round = 0; round < 10; ++round) {
      U low0, high0, low1, high1;
      multiply(c[0], 0xD2511F53u, low0, high0);
      multiply(c[2], 0xCD9E8D57u, low1, high1);
      c[0] = high1 ^ c[1] ^ k0;
      c[1] = low1;
      c[2] = high0 ^ c[3] ^ k1;
      c[3] = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
  template <bool kHigh>
  static ATTNHUB_INLINE U zip(U a, U b) {  // a0 b0 a1 b1 ... of the lower or upper halves
    I index;
    for (int e = 0; e < W; ++e) index[e] = (e & 1 ? W : 0) + e / 2 + (kHigh ? W / 2 : 0);
    return bit_cast<U>(shuffle(bit_cast<F>(a), bit_cast<F>(b), index));
  }
  ATTNHUB_INLINE void put(int32_t *to, U words) const {
    const I kept = bit_cast<I>(words >= U{} + threshold_);
    __builtin_memcpy(to, &kept, sizeof kept);
  }

  uint32_t threshold_;
  uint32_t key_[2];
  uint32_t offset_;
};

}  // namespace
}  // namespace attnhub_cpu
