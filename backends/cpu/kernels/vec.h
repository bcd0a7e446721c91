// Vectors of W floats, W fixed by the flags that this unit is compiled with. GCC's and Clang's vector extensions carry the
// arithmetic (a * b + c contracts to one FMA); intrinsics stand where they are measurably better or do what C++ cannot say.
//
// Included by exactly one instruction-set unit at a time; everything is in an anonymous namespace, see job.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(ATTNHUB_NEON)  // given to isa_neon.cpp alone: aarch64 defines __ARM_NEON for the portable unit, too
#include <arm_neon.h>
#endif

#define ATTNHUB_INLINE inline __attribute__((always_inline))

namespace attnhub_cpu {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int kTileVectors = 4;  // 6 x 64 tile: 24 accumulators, 4 columns, 1 broadcast of 32 registers
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kTileVectors = 2;  // 6 x 16 tile: 12 accumulators, 2 columns, 1 broadcast of 16 registers
#elif defined(ATTNHUB_NEON)
constexpr int W = 4;
constexpr int kTileVectors = 4;  // 6 x 16 tile: 24 accumulators, 4 columns, 1 broadcast of 32 registers
#else
constexpr int W = 4;
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;
constexpr int kTileColumns = kTileVectors * W;

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <class To, class From>
ATTNHUB_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class T>
ATTNHUB_INLINE V read(const T *p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

ATTNHUB_INLINE F splat(float x) { return x - F{}; }
ATTNHUB_INLINE F vmax(F a, F b) {  // NaN where b is; where only a is, as the instruction has it: b on x86, NaN on aarch64
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(ATTNHUB_NEON)
  return (F)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a > b ? a : b;
#endif
}

// -- loads and stores: memory of any dtype on one side, floats on the other

ATTNHUB_INLINE F load(const float *p) { return read<F>(p); }
ATTNHUB_INLINE F load(const Bf16 *p) {
#if defined(ATTNHUB_NEON)  // one instruction, where GCC 12 widens lane by lane
  return bit_cast<F>(vshll_n_u16(read<uint16x4_t>(p), 16));
#else
  return bit_cast<F>(__builtin_convertvector(read<H>(p), U) << 16);
#endif
}
ATTNHUB_INLINE F load(const Fp16 *p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(ATTNHUB_NEON)
  return (F)vcvt_f32_f16(read<float16x4_t>(p));
#else
  // The exponent is rebiased by one exact multiplication, subnormals included; Inf and NaN keep an exponent of all ones.
  const U h = __builtin_convertvector(read<H>(p), U);
  const U magnitude = (h & 0x7fffu) << 13;
  const U special = bit_cast<U>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  const U value = bit_cast<U>(bit_cast<F>(magnitude) * splat(0x1p112f));
  return bit_cast<F>(value | special | ((h & 0x8000u) << 16));
#endif
}

ATTNHUB_INLINE void store(float *p, F v) { __builtin_memcpy(p, &v, sizeof v); }
ATTNHUB_INLINE H to_bf16(F v) {
#if defined(__AVX512BF16__)
  return (H)_mm512_cvtneps_pbh((__m512)v);
#else
  const U bits = bit_cast<U>(v);
  const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const U quiet = bits | 0x400000u;
  const U nan = bit_cast<U>(v != v);
  return __builtin_convertvector(((rounded & ~nan) | (quiet & nan)) >> 16, H);
#endif
}
ATTNHUB_INLINE void store(Bf16 *p, F v) {
  const H h = to_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
ATTNHUB_INLINE void store_two(Bf16 *p, F first, F second) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
  store(p, first);
  store(p + W, second);
#endif
}
ATTNHUB_INLINE void store(Fp16 *p, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(ATTNHUB_NEON)
  const float16x4_t h = vcvt_f16_f32((float32x4_t)v);
  __builtin_memcpy(p, &h, sizeof h);
#else
  const U bits = bit_cast<U>(v);
  const U sign = (bits >> 16) & 0x8000u;
  const U abs = bits & 0x7fffffffu;
  const U normal = (abs - (112u << 23) + 0xfffu + ((abs >> 13) & 1u)) >> 13;
  // Below 2^-14 a half counts units of 2^-24, which is what adding 0.5 rounds a float to.
  const U subnormal = bit_cast<U>(bit_cast<F>(abs) + splat(0.5f)) - 0x3f000000u;
  const U infinite = U{} + 0x7c00u;
  const U nan = U{} + 0x7e00u;
  U half = abs < 0x38800000u ? subnormal : normal;
  half = abs >= 0x47800000u ? infinite : half;
  half = abs > 0x7f800000u ? nan : half;
  const H h = __builtin_convertvector(half | sign, H);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

// The first n of W elements; what lies behind is neither read nor written.
template <class T>
ATTNHUB_INLINE F load_part(const T *p, int n) {
  T tmp[W] = {};
  std::memcpy(tmp, p, static_cast<size_t>(n) * sizeof(T));
  return load(tmp);
}
template <class T>
ATTNHUB_INLINE void store_part(T *p, F v, int n) {
  T tmp[W];
  store(tmp, v);
  std::memcpy(p, tmp, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
ATTNHUB_INLINE float to_float(T x) {
  return load_part(&x, 1)[0];
}
template <>
ATTNHUB_INLINE float to_float(float x) {
  return x;
}

// -- reductions and transposition

// Lane e of the result is lane index[e] of a and b laid end to end.
ATTNHUB_INLINE F shuffle(F a, F b, I index) {
#if defined(__clang__)
  F out;
  for (int e = 0; e < W; ++e) out[e] = index[e] < W ? a[index[e]] : b[index[e] - W];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

template <int S>
ATTNHUB_INLINE F rotate(F v) {  // lane e gets lane e ^ S
  I index;
  for (int e = 0; e < W; ++e) index[e] = e ^ S;
  return shuffle(v, v, index);
}
ATTNHUB_INLINE float reduce_add(F v) {
#if defined(ATTNHUB_NEON)
  return vaddvq_f32((float32x4_t)v);
#else
#if defined(__AVX512F__)
  v += rotate<8>(v);
#endif
#if defined(__AVX2__)
  v += rotate<4>(v);
#endif
  v += rotate<2>(v);
  v += rotate<1>(v);
  return v[0];
#endif
}
ATTNHUB_INLINE float reduce_max(F v) {
#if defined(ATTNHUB_NEON)
  return vmaxvq_f32((float32x4_t)v);
#else
#if defined(__AVX512F__)
  v = vmax(v, rotate<8>(v));
#endif
#if defined(__AVX2__)
  v = vmax(v, rotate<4>(v));
#endif
  v = vmax(v, rotate<2>(v));
  v = vmax(v, rotate<1>(v));
  return v[0];
#endif
}

template <int S>
ATTNHUB_INLINE void exchange(F *r) {  // swaps the S x S blocks off the diagonal of every 2S x 2S block
  I low, high;
  for (int e = 0; e < W; ++e) {
    low[e] = e & S ? W + e - S : e;
    high[e] = e & S ? W + e : e + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const F a = r[i], b = r[i + S];
    r[i] = shuffle(a, b, low);
    r[i + S] = shuffle(a, b, high);
  }
}
ATTNHUB_INLINE void transpose(F *r) {  // r[i][j] <-> r[j][i], W x W
  exchange<1>(r);
  exchange<2>(r);
#if defined(__AVX2__)
  exchange<4>(r);
#endif
#if defined(__AVX512F__)
  exchange<8>(r);
#endif
}

// r[i] = the two vectors that exchange<S> makes of r[2 i] and r[2 i + 1], joined: their sum, or their maximum.
template <int S, int N, class Join>
ATTNHUB_INLINE void fold(F *r, Join join) {
  I low, high;
  for (int e = 0; e < W; ++e) {
    low[e] = e & S ? W + e : e;
    high[e] = (e & S ? W + e : e) ^ S;
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) r[i] = join(shuffle(r[2 * i], r[2 * i + 1], low), shuffle(r[2 * i], r[2 * i + 1], high));
}
template <class Join>
ATTNHUB_INLINE F folded(F *r, Join join) {  // lane e is r[e] joined, in half the shuffles of a transposition; destroys r
  fold<1, W / 2>(r, join);
  fold<2, W / 4>(r, join);
#if defined(__AVX2__)
  fold<4, W / 8>(r, join);
#endif
#if defined(__AVX512F__)
  fold<8, W / 16>(r, join);
#endif
  return r[0];
}
ATTNHUB_INLINE F sums(F *r) {
#if defined(ATTNHUB_NEON)
  const float32x4_t low = vpaddq_f32((float32x4_t)r[0], (float32x4_t)r[1]), high = vpaddq_f32((float32x4_t)r[2], (float32x4_t)r[3]);
  return (F)vpaddq_f32(low, high);
#else
  return folded(r, [](F a, F b) { return a + b; });
#endif
}
ATTNHUB_INLINE F maxima(F *r) {
  return folded(r, [](F a, F b) { return vmax(a, b); });
}

// -- functions

constexpr float kLog2E = 1.44269504088896340736f;

// A polynomial of degree 6 (2e-9 before rounding), or of degree 4 (3e-6) for weights that are rounded to 8 bits anyway.
enum Precision { kExact, kRounded };

// 2^(a * b) for a * b <= 127; exactly 0 below -126 (-Inf included), so that no subnormal slows the products that follow; NaN for NaN.
// A polynomial, minimax in relative error on [-1/2, 1/2], times a power of two. Where there is FMA the product is not rounded before
// its whole part is subtracted: at an exponent of 20 half a unit is 2^-20 of the weight.
template <Precision kPrecision = kExact>
ATTNHUB_INLINE F exp2v(F a, F b = splat(1.0f)) {
  const F x = a * b;
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  if constexpr (kPrecision == kRounded) {
    // On [0, 1) instead, exact at 0: one instruction subtracts the floor, and scalef takes the floor by itself.
    const F f = (F)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    F p = splat(1.342733391e-02f);
    p = p * f + splat(5.224135518e-02f);
    p = p * f + splat(2.412807196e-01f);
    p = p * f + splat(6.930448413e-01f);
    p = p * f + splat(1.0f);
    return (F)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)x);
  }
  const F n = (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F f = a * b - n;
#elif defined(ATTNHUB_NEON)
  const F n = (F)vrndnq_f32((float32x4_t)vmax(splat(-127.0f), x));
  const F f = x < splat(-126.0f) ? F{} : a * b - n;
#else
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = vmax(splat(-127.0f), x) + magic;
  const F n = shifted - magic;
  const F f = x < splat(-126.0f) ? F{} : a * b - n;
#endif
  F p;
  if constexpr (kPrecision == kExact) {
    p = splat(1.53533722e-04f);
    p = p * f + splat(1.33988808e-03f);
    p = p * f + splat(9.61843692e-03f);
    p = p * f + splat(5.55033237e-02f);
    p = p * f + splat(2.40226477e-01f);
    p = p * f + splat(6.93147182e-01f);
  } else {
    p = splat(9.58283804e-03f);
    p = p * f + splat(5.59064634e-02f);
    p = p * f + splat(2.40240991e-01f);
    p = p * f + splat(6.93124175e-01f);
  }
  p = p * f + splat(1.0f);
#if defined(__AVX512F__)
  return (F)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#elif defined(ATTNHUB_NEON)
  return p * (F)vshlq_n_s32(vaddq_s32(vcvtq_s32_f32((float32x4_t)n), vdupq_n_s32(127)), 23);
#else
  const U exponent = (bit_cast<U>(shifted) - bit_cast<U>(magic) + 127u) << 23;  // 0, and so the float 0, for n = -127
  return p * bit_cast<F>(exponent);
#endif
}

// tanh: its series below 0.4 (next term 4e-9 of the value), 1 - 2 / (e^2x + 1) above.
ATTNHUB_INLINE F tanhv(F x) {
  const F z = x * x;
  F s = splat(21844.0f / 6081075.0f);
  s = s * z + splat(-1382.0f / 155925.0f);
  s = s * z + splat(62.0f / 2835.0f);
  s = s * z + splat(-17.0f / 315.0f);
  s = s * z + splat(2.0f / 15.0f);
  s = s * z + splat(-1.0f / 3.0f);
  s = s * z * x + x;
  const F top = splat(20.0f);  // tanh is 1 in fp32 from 9 on
  F y = x > top ? top : x;
  y = y < -top ? -top : y;
  const F large = 1.0f - 2.0f / (exp2v(y * (2.0f * kLog2E)) + 1.0f);
  return z < splat(0.16f) ? s : large;
}

}  // namespace
}  // namespace attnhub_cpu
