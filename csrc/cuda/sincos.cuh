// Sine and cosine at once, of arguments as large as Fourier features have them.
#pragma once

#include "platform.cuh"

namespace diffcore {
namespace cuda {

// (sin(r) - r) / r^3 and (cos(r) - 1 + r^2 / 2) / r^4 for |r| up to a little over pi / 4; the
// Cephes library's polynomials (S. Moshier).
__device__ __forceinline__ float sine_polynomial(float r2) {
  float p = -1.9515295891e-4f;
  p = fmaf(p, r2, 8.3321608736e-3f);
  return fmaf(p, r2, -1.6666654611e-1f);
}
__device__ __forceinline__ float cosine_polynomial(float r2) {
  float p = 2.443315711809948e-5f;
  p = fmaf(p, r2, -1.388731625493765e-3f);
  return fmaf(p, r2, 4.166664568298827e-2f);
}

// Added to |v| < 2^22, this rounds v to an integer, which then stands in the sum's lowest bits.
constexpr float integer_in_low_bits = 12582912.0f;  // 1.5 * 2^23

// The sine of n quarter turns and r, from the sine and cosine of r.
__device__ __forceinline__ float sine_from_quarter(unsigned n, float sine, float cosine) {
  const float magnitude = n & 1 ? cosine : sine;
  return __uint_as_float(__float_as_uint(magnitude) ^ (n & 2) << 30);
}

// x = n pi / 2 + r + low with |r| <= pi / 4, where low is what r rounds away, and n in the low bits
// of `quarter`.
struct ReducedAngle {
  float r, low;
  unsigned quarter;
};

// For |x| up to 2^13 quarter turns.
constexpr float longest_reduction = 12867.0f;

__device__ __forceinline__ ReducedAngle reduce_angle(float x) {
  const float quarters = fmaf(x, 0.636619772f, integer_in_low_bits);
  const float n = quarters - integer_in_low_bits;
  // pi / 2 is a sum of four parts, the first three of 11 bits: their products with n are exact, and
  // so are the differences.
  const float nearly = fmaf(-n, 0x1.fb4p-12f, fmaf(-n, 0x1.92p+0f, x));
  const float third = n * 0x1.444p-24f;
  const float r = nearly - third;
  return {r, fmaf(-n, 0x1.68c234p-39f, (nearly - r) - third), __float_as_uint(quarters)};
}

// 2 / pi after 32 zero bits.
__constant__ const uint32_t two_over_pi[9] = {0,           0xa2f9836eu, 0x4e441529u,
                                              0xfc2757d1u, 0xf534ddc0u, 0xdb629599u,
                                              0x3c439041u, 0xfe5163abu, 0xdebbc561u};

// For any larger x (Payne & Hanek, "Radian reduction for trigonometric functions", 1983): x is an
// integer m of 24 bits times 2^s. Of 2 / pi, bits are left out that times 2^s are multiples of 4,
// whole turns; the next 96 times m are the quarter, 2 bits, and its fraction to more than 60.
__device__ __forceinline__ ReducedAngle reduce_long_angle(float x) {
  const uint32_t bits = __float_as_uint(x);
  const int exponent = static_cast<int>(bits >> 23 & 255);
  if (exponent == 255) return {x - x, x - x, 0};  // NaN
  const uint64_t m = (bits & 0x7fffffu) | 0x800000u;
  const int first = exponent - 120;  // s + 30, the place in the table
  const uint32_t* words = two_over_pi + first / 32;
  const auto window = [&](int i) {
    const uint64_t both = static_cast<uint64_t>(words[i]) << 32 | words[i + 1];
    return both << first % 32 >> 32;
  };
  const uint64_t lower = m * window(2);
  const uint64_t middle = m * window(1) + (lower >> 32);
  const uint64_t upper = m * window(0) + (middle >> 32);
  const auto top = static_cast<uint32_t>(upper), next = static_cast<uint32_t>(middle);
  const auto last = static_cast<uint32_t>(lower);
  const uint64_t fraction = (static_cast<uint64_t>(top) << 32 | next) << 2 | last >> 30;
  // To the nearest quarter: a fraction of a half or more is a negative number of the next one.
  const unsigned quarter = (top >> 30) + static_cast<unsigned>(fraction >> 63);
  const double angle = static_cast<double>(static_cast<int64_t>(fraction)) * 8.515303950216386e-20;
  const auto r = static_cast<float>(angle), low = static_cast<float>(angle - r);
  return x < 0.0f ? ReducedAngle{-r, -low, 0u - quarter} : ReducedAngle{r, low, quarter};
}

// sin and cos of x, within 1 ulp for every x; NaN for infinities.
__device__ __forceinline__ void sine_cosine(float x, float* sine, float* cosine) {
  const ReducedAngle angle = fabsf(x) < longest_reduction ? reduce_angle(x) : reduce_long_angle(x);
  const float r = angle.r, low = angle.low;
  // sin(r + low) and cos(r + low), each a large term plus a small sum, so that only the last
  // addition rounds much: sin = r + (r^3 p + low cos r), cos = w + (what w = 1 - r^2 / 2 rounds
  // away + ...).
  const float r2 = r * r, half = 0.5f * r;
  const float w = fmaf(-half, r, 1.0f);
  const float s = r + fmaf(sine_polynomial(r2) * r2, r, low * w);
  const float rounded_away = fmaf(-low, r, fmaf(-half, r, 1.0f - w));
  const float c = w + fmaf(cosine_polynomial(r2), r2 * r2, rounded_away);
  *sine = sine_from_quarter(angle.quarter, s, c);
  *cosine = sine_from_quarter(angle.quarter + 1, s, c);
}

}  // namespace cuda
}  // namespace diffcore
