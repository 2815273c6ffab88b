// One vector type per instruction set, all with the same interface.
//
// This header is compiled once for every instruction set, each time with that set's compiler flags
// and inside its own namespace (DIFFCORE_ISA), so nothing here can leak into code that runs on an
// older CPU. For the same reason nothing compiled here uses inline functions of the C++ library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(DIFFCORE_ISA_AVX512) || defined(DIFFCORE_ISA_AVX2)
#include <immintrin.h>
#elif defined(DIFFCORE_ISA_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define DIFFCORE_INLINE static inline __attribute__((always_inline))

namespace diffcore {
namespace DIFFCORE_ISA {

#if defined(DIFFCORE_ISA_AVX512)

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};
using Mask = __mmask16;

constexpr bool fma_rounds_once = true;
// Rows of the register tile: 12 rows x 2 vectors + 2 weights + 1 input = 27 of 32 registers.
constexpr int max_tile_rows = 12;
constexpr int last_products = 3;  // taken row by row, see tile.h; with their weights 31 registers
// Of the CPUs with AVX-512 AMD's have bfloat16 products and no AMX; Intel's have both, or neither. On Intel's
// two ports do all with long vectors, loads aside, and a division takes one of them for 10 clock ticks.
#if defined(DIFFCORE_NATIVE_BF16) && !defined(DIFFCORE_AMX)
constexpr int max_wide_rows = 3;  // more weren't measured
constexpr bool divides_quickly = true;
#else
constexpr int max_wide_rows = 6;  // of a tile of four vectors
constexpr bool divides_quickly = false;
#endif
constexpr int max_narrow_rows = 6;
constexpr int vectors_at_once = 4;  // that registers hold on their way through an activation

DIFFCORE_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
DIFFCORE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
DIFFCORE_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
DIFFCORE_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
DIFFCORE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
DIFFCORE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// x86 returns the second operand when either is NaN: with the value second, NaN passes through.
DIFFCORE_INLINE Vec at_least(Vec lower, Vec x) { return {_mm512_max_ps(lower.v, x.v)}; }
DIFFCORE_INLINE Vec at_most(Vec upper, Vec x) { return {_mm512_min_ps(upper.v, x.v)}; }
DIFFCORE_INLINE Vec round_nearest(Vec a) { return {_mm512_roundscale_ps(a.v, 0)}; }
DIFFCORE_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
DIFFCORE_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
DIFFCORE_INLINE Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
DIFFCORE_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(m, no.v, yes.v)};
}
DIFFCORE_INLINE bool all(Mask m) { return m == 0xffff; }
// Where the lowest bit of a's representation is set.
DIFFCORE_INLINE Mask bit_0(Vec a) {
  return _mm512_test_epi32_mask(_mm512_castps_si512(a.v), _mm512_set1_epi32(1));
}
// a, with its sign flipped where bit 1 of `by` is set.
DIFFCORE_INLINE Vec flip_by_bit_1(Vec a, Vec by) {
  const __m512i bit = _mm512_and_si512(_mm512_castps_si512(by.v), _mm512_set1_epi32(2));
  return {
      _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_slli_epi32(bit, 30)))};
}
// The `words` 32-bit words at p, again and again through the vector.
template <int words>
DIFFCORE_INLINE Vec repeat(const void* p) {
  if constexpr (words == 2) {
    double pair;
    memcpy(&pair, p, sizeof pair);
    return {_mm512_castpd_ps(_mm512_set1_pd(pair))};
  } else if constexpr (words == 4) {
    return {_mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(p)))};
  } else if constexpr (words == 8) {
    return {_mm512_broadcast_f32x8(_mm256_loadu_ps(static_cast<const float*>(p)))};
  } else {
    return {_mm512_loadu_ps(p)};
  }
}
// The same, but of the words only the first `count` are read, and the others are zero.
template <int words>
DIFFCORE_INLINE Vec repeat_some(const void* p, int count) {
  const auto present = static_cast<__mmask16>((1 << count) - 1);
  if constexpr (words == 2) {
    return {_mm512_castpd_ps(_mm512_broadcastsd_pd(
        _mm_castps_pd(_mm_maskz_loadu_ps(static_cast<__mmask8>(present), p))))};
  } else if constexpr (words == 4) {
    return {_mm512_broadcast_f32x4(_mm_maskz_loadu_ps(static_cast<__mmask8>(present), p))};
  } else if constexpr (words == 8) {
    return {_mm512_broadcast_f32x8(_mm256_maskz_loadu_ps(static_cast<__mmask8>(present), p))};
  } else {
    return {_mm512_maskz_loadu_ps(present, p)};
  }
}
// In the first lanes the sums of groups of so many lanes next to each other; zeros behind them.
template <int lanes>
DIFFCORE_INLINE Vec sum_groups(Vec a) {
  a.v = _mm512_add_ps(a.v, _mm512_permute_ps(a.v, 0xb1));
  if constexpr (lanes > 2) a.v = _mm512_add_ps(a.v, _mm512_permute_ps(a.v, 0x4e));
  if constexpr (lanes > 4) a.v = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0xb1));
  if constexpr (lanes > 8) a.v = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
  constexpr int first = lanes == 2 ? 0x5555 : lanes == 4 ? 0x1111 : lanes == 8 ? 0x0101 : 1;
  return {_mm512_maskz_compress_ps(first, a.v)};
}
// 1 / a to 14 bits at least.
DIFFCORE_INLINE Vec rough_reciprocal(Vec a) { return {_mm512_rcp14_ps(a.v)}; }
// a * 2^n for integral n, where both a and the product are normal numbers, or a is NaN.
DIFFCORE_INLINE Vec scale_by_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// 2^(n / 2^power_bits), a normal number, for the integer n in the lowest bits of i. n << 19 adds whole
// powers to the exponent, and n's lowest 4 bits, k, below it. Those the table takes off again, which has the
// bits of 2^(k / 16) less k << 19.
constexpr int power_bits = 4;
alignas(64) constexpr uint32_t powers_of_2[] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
DIFFCORE_INLINE Vec power_of_2(Vec i) {
  const __m512i bits = _mm512_castps_si512(i.v);
  const __m512i fraction = _mm512_permutexvar_epi32(bits, _mm512_load_si512(powers_of_2));
  return {
      _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_slli_epi32(bits, 23 - power_bits)))};
}
// For positive normal a: mantissa in [sqrt(1/2), sqrt(2)) and the matching exponent.
DIFFCORE_INLINE void split_exponent(Vec a, Vec* mantissa, Vec* exponent) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i shifted = _mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3));
  const __m512i e = _mm512_srai_epi32(shifted, 23);
  *exponent = {_mm512_cvtepi32_ps(e)};
  *mantissa = {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)))};
}
// Round to bfloat16, nearest even, result kept as float; NaN stays NaN,
// whose upper half alone is one, too.
DIFFCORE_INLINE Vec round_to_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_and_si512(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))),
                       _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_add_ps(_mm512_castsi512_ps(rounded), nan, a.v, a.v)};
}
// A vector of bfloat16.
DIFFCORE_INLINE Vec load(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
DIFFCORE_INLINE void store(uint16_t* p, Vec a) {
#if defined(DIFFCORE_NATIVE_BF16)
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i rounded = _mm512_castps_si512(round_to_bf16(a).v);
  const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
// Pairs of bfloat16 in 32-bit words, the first of each in the low half.
DIFFCORE_INLINE Vec load_pairs(const uint32_t* p) {
  return {_mm512_castsi512_ps(_mm512_loadu_si512(p))};
}
DIFFCORE_INLINE Vec broadcast_pair(uint32_t pair) {
  return {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair)))};
}
DIFFCORE_INLINE Vec first_of_pairs(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))};
}
DIFFCORE_INLINE Vec second_of_pairs(Vec a) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

#elif defined(DIFFCORE_ISA_AVX2)

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};
struct Mask {
  __m256 v;
};

constexpr bool fma_rounds_once = true;
// 6 rows x 2 vectors + 2 weights + 1 input = 15 of 16 registers.
constexpr int max_tile_rows = 6;
constexpr int last_products = 0;  // too few registers
constexpr int max_wide_rows = 3;
constexpr bool divides_quickly = true;
constexpr int max_narrow_rows = 3;
constexpr int vectors_at_once = 2;

DIFFCORE_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
DIFFCORE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
DIFFCORE_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
DIFFCORE_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
DIFFCORE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
DIFFCORE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
DIFFCORE_INLINE Vec at_least(Vec lower, Vec x) { return {_mm256_max_ps(lower.v, x.v)}; }
DIFFCORE_INLINE Vec at_most(Vec upper, Vec x) { return {_mm256_min_ps(upper.v, x.v)}; }
DIFFCORE_INLINE Vec round_nearest(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
DIFFCORE_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
DIFFCORE_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
DIFFCORE_INLINE Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
DIFFCORE_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
DIFFCORE_INLINE bool all(Mask m) { return _mm256_movemask_ps(m.v) == 0xff; }
DIFFCORE_INLINE Mask bit_0(Vec a) {  // in the sign, which is all that select and all look at
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 31))};
}
DIFFCORE_INLINE Vec flip_by_bit_1(Vec a, Vec by) {
  const __m256i bit = _mm256_and_si256(_mm256_castps_si256(by.v), _mm256_set1_epi32(2));
  return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(bit, 30)))};
}
template <int words>
DIFFCORE_INLINE Vec repeat(const void* p) {
  if constexpr (words == 2) {
    double pair;
    memcpy(&pair, p, sizeof pair);
    return {_mm256_castpd_ps(_mm256_set1_pd(pair))};
  } else if constexpr (words == 4) {
    return {_mm256_broadcast_ps(static_cast<const __m128*>(p))};
  } else {
    return load(static_cast<const float*>(p));
  }
}
template <int words>
DIFFCORE_INLINE Vec repeat_some(const void* p, int count) {
  const float* values = static_cast<const float*>(p);
  const __m256i present =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  if constexpr (words == 8) {
    return {_mm256_maskload_ps(values, present)};
  } else {
    const __m128 some = _mm_maskload_ps(values, _mm256_castsi256_si128(present));
    if constexpr (words == 2) return {_mm256_castpd_ps(_mm256_broadcastsd_pd(_mm_castps_pd(some)))};
    return {_mm256_set_m128(some, some)};
  }
}
template <int lanes>
DIFFCORE_INLINE Vec sum_groups(Vec a) {
  a.v = _mm256_add_ps(a.v, _mm256_permute_ps(a.v, 0xb1));
  if constexpr (lanes > 2) a.v = _mm256_add_ps(a.v, _mm256_permute_ps(a.v, 0x4e));
  if constexpr (lanes > 4) a.v = _mm256_add_ps(a.v, _mm256_permute2f128_ps(a.v, a.v, 1));
  const __m256i firsts = _mm256_setr_epi32(0, lanes, 2 * lanes, 3 * lanes, 0, 0, 0, 0);
  constexpr int others = 0xff & ~((1 << 8 / lanes) - 1);
  return {_mm256_blend_ps(_mm256_permutevar8x32_ps(a.v, firsts), _mm256_setzero_ps(), others)};
}
DIFFCORE_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponent))};
}
constexpr int power_bits = 3;
alignas(32) constexpr uint32_t powers_of_2[] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
DIFFCORE_INLINE Vec power_of_2(Vec i) {
  const __m256i bits = _mm256_castps_si256(i.v);
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(powers_of_2));
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(table, bits),
                                               _mm256_slli_epi32(bits, 23 - power_bits)))};
}
DIFFCORE_INLINE void split_exponent(Vec a, Vec* mantissa, Vec* exponent) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i shifted = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));
  const __m256i e = _mm256_srai_epi32(shifted, 23);
  *exponent = {_mm256_cvtepi32_ps(e)};
  *mantissa = {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)))};
}
DIFFCORE_INLINE Vec round_to_bf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_and_si256(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))),
                       _mm256_set1_epi32(static_cast<int>(0xffff0000)));
  return {_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_add_ps(a.v, a.v),
                           _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
DIFFCORE_INLINE Vec load(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
DIFFCORE_INLINE void store(uint16_t* p, Vec a) {
  const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(round_to_bf16(a).v), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
DIFFCORE_INLINE Vec load_pairs(const uint32_t* p) {
  return {_mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
DIFFCORE_INLINE Vec broadcast_pair(uint32_t pair) {
  return {_mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair)))};
}
DIFFCORE_INLINE Vec first_of_pairs(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 16))};
}
DIFFCORE_INLINE Vec second_of_pairs(Vec a) {
  return {_mm256_castsi256_ps(
      _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
}

#elif defined(DIFFCORE_ISA_NEON)

struct Vec {
  static constexpr int width = 4;
  float32x4_t v;
};
struct Mask {
  uint32x4_t v;
};

constexpr bool fma_rounds_once = true;
constexpr int max_tile_rows = 8;
constexpr int last_products = 0;  // not measured
constexpr int max_wide_rows = 3;
constexpr bool divides_quickly = true;
constexpr int max_narrow_rows = 6;
constexpr int vectors_at_once = 4;

DIFFCORE_INLINE Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
DIFFCORE_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
DIFFCORE_INLINE void store(float* p, Vec a) { vst1q_f32(p, a.v); }
DIFFCORE_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
DIFFCORE_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
DIFFCORE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
DIFFCORE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
DIFFCORE_INLINE Vec at_least(Vec lower, Vec x) { return {vmaxq_f32(lower.v, x.v)}; }  // NaN stays
DIFFCORE_INLINE Vec at_most(Vec upper, Vec x) { return {vminq_f32(upper.v, x.v)}; }
DIFFCORE_INLINE Vec round_nearest(Vec a) { return {vrndnq_f32(a.v)}; }
DIFFCORE_INLINE Vec sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
DIFFCORE_INLINE Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
DIFFCORE_INLINE Mask less(Vec a, Vec b) { return {vcltq_f32(a.v, b.v)}; }
DIFFCORE_INLINE Vec select(Mask m, Vec yes, Vec no) { return {vbslq_f32(m.v, yes.v, no.v)}; }
DIFFCORE_INLINE bool all(Mask m) { return vminvq_u32(m.v) != 0; }
DIFFCORE_INLINE Mask bit_0(Vec a) {
  return {vtstq_u32(vreinterpretq_u32_f32(a.v), vdupq_n_u32(1))};
}
DIFFCORE_INLINE Vec flip_by_bit_1(Vec a, Vec by) {
  const uint32x4_t bit = vandq_u32(vreinterpretq_u32_f32(by.v), vdupq_n_u32(2));
  return {vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a.v), vshlq_n_u32(bit, 30)))};
}
template <int words>
DIFFCORE_INLINE Vec repeat(const void* p) {
  const float* values = static_cast<const float*>(p);
  if constexpr (words == 2) {
    const float32x2_t pair = vld1_f32(values);
    return {vcombine_f32(pair, pair)};
  } else {
    return load(values);
  }
}
template <int lanes>
DIFFCORE_INLINE Vec sum_groups(Vec a) {
  const float32x2_t pairs = vpadd_f32(vget_low_f32(a.v), vget_high_f32(a.v)), none = vdup_n_f32(0);
  return {vcombine_f32(lanes == 2 ? pairs : vset_lane_f32(vaddv_f32(pairs), none, 0), none)};
}
DIFFCORE_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  const int32x4_t exponent = vshlq_n_s32(vcvtnq_s32_f32(n.v), 23);
  return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v), exponent))};
}
constexpr int power_bits = 0;
DIFFCORE_INLINE Vec power_of_2(Vec i) {
  const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(i.v), 23);
  return {vreinterpretq_f32_s32(vaddq_s32(vdupq_n_s32(0x3f800000), exponent))};
}
DIFFCORE_INLINE void split_exponent(Vec a, Vec* mantissa, Vec* exponent) {
  const int32x4_t bits = vreinterpretq_s32_f32(a.v);
  const int32x4_t e = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3f3504f3)), 23);
  *exponent = {vcvtq_f32_s32(e)};
  *mantissa = {vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(e, 23)))};
}
DIFFCORE_INLINE Vec round_to_bf16(Vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded =
      vandq_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), vdupq_n_u32(0xffff0000u));
  return {vbslq_f32(vceqq_f32(a.v, a.v), vreinterpretq_f32_u32(rounded), vaddq_f32(a.v, a.v))};
}
DIFFCORE_INLINE Vec load(const uint16_t* p) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16))};
}
DIFFCORE_INLINE void store(uint16_t* p, Vec a) {
  vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_f32(round_to_bf16(a).v), 16));
}
DIFFCORE_INLINE Vec load_pairs(const uint32_t* p) { return {vreinterpretq_f32_u32(vld1q_u32(p))}; }
DIFFCORE_INLINE Vec broadcast_pair(uint32_t pair) {
  return {vreinterpretq_f32_u32(vdupq_n_u32(pair))};
}
DIFFCORE_INLINE Vec first_of_pairs(Vec a) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a.v), 16))};
}
DIFFCORE_INLINE Vec second_of_pairs(Vec a) {
  return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v), vdupq_n_u32(0xffff0000u)))};
}

#else  // baseline: GCC/Clang vector extensions, any CPU

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

struct Vec {
  static constexpr int width = 4;
  Float4 v;
};
struct Mask {
  Int4 v;
};

constexpr bool fma_rounds_once = false;
constexpr int max_tile_rows = 4;
constexpr int last_products = 0;  // too few registers
constexpr int max_wide_rows = 3;
constexpr bool divides_quickly = true;
constexpr int max_narrow_rows = 3;
constexpr int vectors_at_once = 2;

DIFFCORE_INLINE Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
DIFFCORE_INLINE Vec load(const float* p) {
  Vec a;
  memcpy(&a.v, p, sizeof a.v);
  return a;
}
DIFFCORE_INLINE void store(float* p, Vec a) { memcpy(p, &a.v, sizeof a.v); }
DIFFCORE_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
DIFFCORE_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
DIFFCORE_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
DIFFCORE_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
DIFFCORE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
DIFFCORE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
DIFFCORE_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {(Float4)(((Int4)yes.v & m.v) | ((Int4)no.v & ~m.v))};
}
DIFFCORE_INLINE Mask less(Vec a, Vec b) { return {a.v < b.v}; }
DIFFCORE_INLINE bool all(Mask m) { return (m.v[0] & m.v[1] & m.v[2] & m.v[3]) != 0; }
DIFFCORE_INLINE Mask bit_0(Vec a) { return {((Int4)a.v & 1) != 0}; }
DIFFCORE_INLINE Vec flip_by_bit_1(Vec a, Vec by) {
  return {(Float4)((Word4)a.v ^ ((Word4)by.v & 2u) << 30)};
}
template <int words>
DIFFCORE_INLINE Vec repeat(const void* p) {
  Vec a;
  for (int i = 0; i < 4; i += words)
    memcpy(reinterpret_cast<char*>(&a.v) + 4 * i, p, sizeof(float) * words);
  return a;
}
template <int lanes>
DIFFCORE_INLINE Vec sum_groups(Vec a) {
  const float first = a.v[0] + a.v[1], second = a.v[2] + a.v[3];
  return {lanes == 2 ? Float4{first, second, 0, 0} : Float4{first + second, 0, 0, 0}};
}
DIFFCORE_INLINE Vec at_least(Vec lower, Vec x) { return select(less(x, lower), lower, x); }
DIFFCORE_INLINE Vec at_most(Vec upper, Vec x) { return select(less(upper, x), upper, x); }
DIFFCORE_INLINE Vec abs(Vec a) { return {(Float4)((Int4)a.v & 0x7fffffff)}; }
DIFFCORE_INLINE Vec round_nearest(Vec a) {
  // Adding 1.5 * 2^23 pushes the fraction out of the mantissa; callers stay below 2^22.
  const Float4 magic = Float4{} + 12582912.0f;
  return {(a.v + magic) - magic};
}
DIFFCORE_INLINE Vec sqrt(Vec a) {
  for (int i = 0; i < 4; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
DIFFCORE_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  return {(Float4)((Word4)a.v + ((Word4) __builtin_convertvector(n.v, Int4) << 23))};
}
constexpr int power_bits = 0;
DIFFCORE_INLINE Vec power_of_2(Vec i) { return {(Float4)(((Word4)i.v << 23) + 0x3f800000u)}; }
DIFFCORE_INLINE void split_exponent(Vec a, Vec* mantissa, Vec* exponent) {
  const Int4 bits = (Int4)a.v, e = (bits - 0x3f3504f3) >> 23;
  *exponent = {__builtin_convertvector(e, Float4)};
  *mantissa = {(Float4)((Word4)bits - ((Word4)e << 23))};
}
DIFFCORE_INLINE Vec round_to_bf16(Vec a) {
  const Word4 bits = (Word4)a.v;
  const Word4 rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) & 0xffff0000u;
  return select({a.v == a.v}, {(Float4)rounded}, a + a);
}
DIFFCORE_INLINE Vec load(const uint16_t* p) {
  Half4 bits;
  memcpy(&bits, p, sizeof bits);
  return {(Float4)(__builtin_convertvector(bits, Word4) << 16)};
}
DIFFCORE_INLINE void store(uint16_t* p, Vec a) {
  const Half4 bits = __builtin_convertvector((Word4)round_to_bf16(a).v >> 16, Half4);
  memcpy(p, &bits, sizeof bits);
}
DIFFCORE_INLINE Vec load_pairs(const uint32_t* p) {
  Vec a;
  memcpy(&a.v, p, sizeof a.v);
  return a;
}
DIFFCORE_INLINE Vec broadcast_pair(uint32_t pair) {
  return {(Float4)Word4{pair, pair, pair, pair}};
}
DIFFCORE_INLINE Vec first_of_pairs(Vec a) { return {(Float4)((Word4)a.v << 16)}; }
DIFFCORE_INLINE Vec second_of_pairs(Vec a) { return {(Float4)((Word4)a.v & 0xffff0000u)}; }

#endif

// A vector of 64-bit words, and the products of their lower halves.
typedef uint64_t Words __attribute__((vector_size(4 * Vec::width)));
DIFFCORE_INLINE Words low_products(Words a, Words b) {
#if defined(DIFFCORE_ISA_AVX512)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(DIFFCORE_ISA_AVX2)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(DIFFCORE_ISA_NEON)
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

#if !defined(DIFFCORE_ISA_AVX512)
// Divided: AVX2's and NEON's estimates have fewer bits, and other CPUs none.
DIFFCORE_INLINE Vec rough_reciprocal(Vec a) { return broadcast(1.0f) / a; }
#endif

#if !defined(DIFFCORE_ISA_AVX512) && !defined(DIFFCORE_ISA_AVX2)  // without masked loads
template <int words>
DIFFCORE_INLINE Vec repeat_some(const void* p, int count) {
  float some[words] = {};
  memcpy(some, p, sizeof(float) * static_cast<size_t>(count));
  return repeat<words>(some);
}
#endif

DIFFCORE_INLINE Vec zero() { return broadcast(0.0f); }

// Several vectors, of which every operation takes one after the other: what follows an instruction then
// doesn't wait for it. Of one vector's chain after another CPUs don't look far enough ahead.
template <int n>
struct Vecs {
  Vec part[n];

  Vecs() = default;
  __attribute__((always_inline)) Vecs(Vec same) {
    for (Vec& p : part) p = same;
  }
#define DIFFCORE_VECS(name, parameters, arguments)                                       \
  friend inline __attribute__((always_inline)) Vecs name parameters {                    \
    Vecs result;                                                                         \
    _Pragma("GCC unroll 8") for (int i = 0; i < n; ++i) result.part[i] = name arguments; \
    return result;                                                                       \
  }
#define DIFFCORE_VECS_1(name) DIFFCORE_VECS(name, (Vecs a), (a.part[i]))
#define DIFFCORE_VECS_2(name) DIFFCORE_VECS(name, (Vecs a, Vecs b), (a.part[i], b.part[i]))
#define DIFFCORE_VECS_3(name) \
  DIFFCORE_VECS(name, (Vecs a, Vecs b, Vecs c), (a.part[i], b.part[i], c.part[i]))
  DIFFCORE_VECS_1(round_nearest)
  DIFFCORE_VECS_1(rough_reciprocal)
  DIFFCORE_VECS_1(power_of_2)
  DIFFCORE_VECS_2(operator+)
  DIFFCORE_VECS_2(operator-)
  DIFFCORE_VECS_2(operator*)
  DIFFCORE_VECS_2(operator/)
  DIFFCORE_VECS_2(at_least)
  DIFFCORE_VECS_2(at_most)
  DIFFCORE_VECS_2(scale_by_power_of_2)
  DIFFCORE_VECS_3(fma)
  DIFFCORE_VECS_3(fnma)
#undef DIFFCORE_VECS_3
#undef DIFFCORE_VECS_2
#undef DIFFCORE_VECS_1
#undef DIFFCORE_VECS
};

template <class V>
DIFFCORE_INLINE V clamp(V x, Vec lower, Vec upper) {
  return at_most(V(upper), at_least(V(lower), x));
}
DIFFCORE_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
// Scalar twin of round_to_bf16: the upper 16 bits are the bfloat16.
DIFFCORE_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
