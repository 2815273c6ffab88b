// Activations and their slopes, by the formulas of csrc/cpu/activations.h: no cancellation for
// small arguments, no overflow for large ones, NaN in gives NaN out. expf, expm1f and tanhf are
// CUDA's, which documents at most 2 ulp for each; no fast-math flag may be on.
#pragma once

#include "kernels.h"
#include "sincos.cuh"

namespace diffcore {
namespace cuda {

// Below this exp(x) is subnormal.
constexpr float lowest_exponent = -87.0f;

// fmaxf and fminf return the number where the other argument is NaN; these return NaN.
__device__ __forceinline__ float at_least(float lower, float x) { return x < lower ? lower : x; }
__device__ __forceinline__ float at_most(float upper, float x) { return x > upper ? upper : x; }

struct ValueAndSlope {
  float value, slope;
};

// Below -87 silu and mish are 0 to float32's last normal digit, but x times an exponential that
// can't get any smaller would not be: x itself stops there.
__device__ __forceinline__ ValueAndSlope silu(float x) {
  x = at_least(lowest_exponent, x);
  const float sigmoid = reciprocal(1.0f + expf(-x));
  const float y = x * sigmoid;
  return {y, fmaf(y, 1.0f - sigmoid, sigmoid)};
}

// mish(x) = x tanh(log(1 + e^x)). With e = exp(x) and n = e (e + 2), tanh(log(1 + e)) is
// n / (n + 2): no logarithm is needed. Above 20 the quotient is 1 in float32.
__device__ __forceinline__ ValueAndSlope mish(float x) {
  x = at_least(lowest_exponent, x);
  const float limited = at_most(20.0f, x);
  const float e = expf(limited);
  const float n = fmaf(e, e, e + e);
  const float r = reciprocal(n + 2.0f);
  const float t = n * r;
  // mish'(x) = t + 4 x e (1 + e) / (n + 2)^2
  return {x * t, fmaf(limited * r * 4.0f, fmaf(e, e, e) * r, t)};
}

// gelu(x) = x Phi(x), Phi the normal distribution function. Its tail Phi(-|x|) is exp(-x^2 / 2)
// times a function that is smooth over the whole range, so that small values aren't differences of
// large ones. Beyond 13.19 the exponential is below float32's normal numbers.
__device__ __forceinline__ ValueAndSlope gelu(float x) {
  constexpr float limit = 13.19f;
  const float limited = at_most(limit, at_least(-limit, x));
  const float magnitude = fabsf(limited);
  // The rounding error of x^2, which the exponential would magnify, is put right afterwards.
  const float square = limited * limited;
  float e = expf(-0.5f * square);
  e = fmaf(e * 0.5f, fmaf(-limited, limited, square), e);
  // (|x| + 3) Phi(-|x|) / exp(-x^2 / 2) as a polynomial in (|x| - 3) / (|x| + 3), to 4e-8.
  const float inverse = reciprocal(magnitude + 3.0f);
  const float q = fmaf(-6.0f, inverse, 1.0f);
  float p = -2.725993400e-4f;
  p = fmaf(p, q, -9.120256291e-4f);
  p = fmaf(p, q, 1.077569788e-3f);
  p = fmaf(p, q, 6.929901894e-3f);
  p = fmaf(p, q, -1.047948003e-2f);
  p = fmaf(p, q, -4.725730047e-2f);
  p = fmaf(p, q, 2.300192565e-1f);
  p = fmaf(p, q, -5.093322396e-1f);
  p = fmaf(p, q, 7.290836573e-1f);
  const float tail = e * (p * inverse);
  const float phi = x < 0.0f ? tail : 1.0f - tail;
  return {at_least(-limit, x) * phi, fmaf(limited * 0.398942280f, e, phi)};  // 1 / sqrt(2 pi)
}

// The activations that are long or rare: not inlined, for each kernel would contain them many
// times.
static __device__ __noinline__ ValueAndSlope uncommon_activation(Activation kind, float x) {
  ValueAndSlope r = {x, 1.0f};
  switch (kind) {
    case Activation::elu: r = {x > 0.0f ? x : expm1f(x), x > 0.0f ? 1.0f : expf(x)}; break;
    case Activation::tanh:
      r.value = tanhf(x);
      r.slope = fmaf(-r.value, r.value, 1.0f);
      break;
    case Activation::gelu: r = gelu(x); break;
    case Activation::sin: sine_cosine(x, &r.value, &r.slope); break;
    case Activation::cos:
      sine_cosine(x, &r.slope, &r.value);
      r.slope = -r.slope;
      break;
    default: break;
  }
  return r;
}

__device__ __forceinline__ ValueAndSlope value_and_slope(Activation kind, float x) {
  switch (kind) {
    case Activation::mish: return mish(x);
    case Activation::silu: return silu(x);
    case Activation::relu: return {at_least(0.0f, x), x > 0.0f ? 1.0f : 0.0f};
    case Activation::identity: return {x, 1.0f};
    default: return uncommon_activation(kind, x);
  }
}

// The values alone; what only slopes need is left out by the compiler. Two at a time, so that the
// branch is taken once.
__device__ __forceinline__ float2 activate(Activation kind, float2 x) {
  switch (kind) {
    case Activation::mish: return make_float2(mish(x.x).value, mish(x.y).value);
    case Activation::silu: return make_float2(silu(x.x).value, silu(x.y).value);
    case Activation::relu: return make_float2(at_least(0.0f, x.x), at_least(0.0f, x.y));
    case Activation::identity: return x;
    default:
      return make_float2(uncommon_activation(kind, x.x).value,
                         uncommon_activation(kind, x.y).value);
  }
}

}  // namespace cuda
}  // namespace diffcore
