// Sine and cosine at once, of arguments as large as Fourier features have them.
#pragma once

#include "platform.cuh"

namespace diffcore {
namespace cuda {

// (sin(r) - r) / r^3 and (cos(r) - 1 + r^2 / 2) / r^4 for |r| up to a little over pi / 4; the Cephes
// library's polynomials (S. Moshier).
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

// 2^13 quarter turns.
constexpr float longest_reduction = 12867.0f;

// sin and cos of x: within 1 ulp up to `longest_reduction`, as the CPU kernel has it; beyond, CUDA's
// own, within 2 ulp by its documentation. NaN for infinities.
__device__ __forceinline__ void sine_cosine(float x, float* sine, float* cosine) {
  if (!(fabsf(x) < longest_reduction)) return sincosf(x, sine, cosine);
  const float quarters = fmaf(x, 0.636619772f, integer_in_low_bits);
  const float n = quarters - integer_in_low_bits;
  // x - n pi / 2 = r + low, where low is what r rounds away. pi / 2 is a sum of four parts, the first
  // three of 11 bits: their products with n are exact, and so are the differences.
  const float nearly = fmaf(-n, 0x1.fb4p-12f, fmaf(-n, 0x1.92p+0f, x));
  const float third = n * 0x1.444p-24f;
  const float r = nearly - third;
  const float low = fmaf(-n, 0x1.68c234p-39f, (nearly - r) - third);
  // sin(r + low) and cos(r + low), each a large term plus a small sum, so that only the last addition
  // rounds much: sin = r + (r^3 p + low cos r), cos = w + (what w = 1 - r^2 / 2 rounds away + ...).
  const float r2 = r * r, half = 0.5f * r;
  const float w = fmaf(-half, r, 1.0f);
  const float s = r + fmaf(sine_polynomial(r2) * r2, r, low * w);
  const float rounded_away = fmaf(-low, r, fmaf(-half, r, 1.0f - w));
  const float c = w + fmaf(cosine_polynomial(r2), r2 * r2, rounded_away);
  const unsigned quarter = __float_as_uint(quarters);
  *sine = sine_from_quarter(quarter, s, c);
  *cosine = sine_from_quarter(quarter + 1, s, c);
}

}  // namespace cuda
}  // namespace diffcore
