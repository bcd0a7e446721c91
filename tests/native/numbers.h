// Seeded random numbers, the elements of every dtype as doubles, and Philox: each written from its definition, sharing nothing
// with the kernels that are tested.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attnhub_cpu.h"

namespace native {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// attnhub_cpu_dtype, and what else operands are made of.
enum Kind { kFp32 = ATTNHUB_CPU_FP32, kBf16 = ATTNHUB_CPU_BF16, kFp16 = ATTNHUB_CPU_FP16, kInt32, kByte };

inline int64_t size_of(int64_t kind) { return kind == kFp32 || kind == kInt32 ? 4 : kind == kByte ? 1 : 2; }

class Random {  // SplitMix64
 public:
  explicit Random(uint64_t seed) : state_(seed) { state_ = bits() ^ 0x243f6a8885a308d3u; }  // hashed: neighbours share no stream

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  bool chance(double p) { return uniform() < p; }
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1)); }
  double normal() {  // near enough: the sum of uniforms, and bounded
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  template <class T, size_t N>
  T pick(const T (&values)[N]) {
    return values[between(0, N - 1)];
  }

 private:
  uint64_t state_;
};

inline double fp16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) value = fraction ? std::nan("") : kInfinity;
  return bits & 0x8000 ? -value : value;
}

inline uint16_t fp16_bits(double x) {  // nearest, ties to even
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (x >= 65520) return sign | 0x7c00;
  int exponent = x == 0 ? -14 : std::ilogb(x);
  if (exponent < -14) exponent = -14;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(x, 10 - exponent)));  // 1024 to 2048 for a normal number
  return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units));                // a carry moves into the exponent, as it must
}

inline double element(const void *data, int64_t kind, int64_t index) {
  const char *p = static_cast<const char *>(data) + index * size_of(kind);
  if (kind == kFp32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  if (kind == kInt32) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return x;
  }
  if (kind == kByte) return static_cast<unsigned char>(*p);
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (kind == kFp16) return fp16_value(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline void set_element(void *data, int64_t kind, int64_t index, double value) {
  char *p = static_cast<char *>(data) + index * size_of(kind);
  if (kind == kFp32) {
    const float x = static_cast<float>(value);
    std::memcpy(p, &x, 4);
  } else if (kind == kInt32) {
    const int32_t x = static_cast<int32_t>(value);
    std::memcpy(p, &x, 4);
  } else if (kind == kByte) {
    *p = static_cast<char>(static_cast<unsigned char>(value));
  } else if (kind == kFp16) {
    const uint16_t bits = fp16_bits(value);
    std::memcpy(p, &bits, 2);
  } else {
    const float x = static_cast<float>(value);
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    if (x == x) wide += 0x7fff + (wide >> 16 & 1);
    const uint16_t bits = static_cast<uint16_t>(wide >> 16);
    std::memcpy(p, &bits, 2);
  }
}

// Philox4x32-10 (Salmon et al., SC 2011): word `word` of a counter under a key.
inline uint32_t philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key, int word) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c0, p1 = uint64_t(0xCD9E8D57) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c0 = n0;
    c1 = static_cast<uint32_t>(p1);
    c2 = n2;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  return words[word];
}

}  // namespace native
