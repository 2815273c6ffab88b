// Elementwise functions on vectors: exp, log, sin/cos, and the activations with their derivatives.
//
// Polynomials are those of the Cephes library (S. Moshier), whose float versions stay within about
// 2 ulp; NaN in gives NaN out everywhere.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace diffcore {
namespace DIFFCORE_ISA {

struct ReducedExp {
  Vec r_plus_r2_q;  // exp(r) - 1
  Vec n;            // exp(x) = 2^n exp(r)
};

// For x in [-87, 88], where exp(x) is finite and normal.
DIFFCORE_INLINE ReducedExp reduce_exp(Vec x) {
  const Vec n = round_nearest(x * broadcast(1.44269504f));
  // ln 2 in two parts, the first exact in few bits, so that n * ln 2 is subtracted without loss.
  Vec r = fnma(n, broadcast(0.693359375f), x);
  r = fnma(n, broadcast(-2.12194440e-4f), r);
  Vec q = broadcast(1.9875691500e-4f);
  q = fma(q, r, broadcast(1.3981999507e-3f));
  q = fma(q, r, broadcast(8.3334519073e-3f));
  q = fma(q, r, broadcast(4.1665795894e-2f));
  q = fma(q, r, broadcast(1.6666665459e-1f));
  q = fma(q, r, broadcast(5.0000001201e-1f));
  return {fma(q, r * r, r), n};
}

constexpr float lowest_exponent = -87.0f;

DIFFCORE_INLINE Vec limit_exponent(Vec x) {
  return clamp(x, broadcast(lowest_exponent), broadcast(88.0f));
}

DIFFCORE_INLINE Vec exp_in_range(Vec x) {
  const ReducedExp e = reduce_exp(x);
  return scale_by_power_of_2(e.r_plus_r2_q + broadcast(1.0f), e.n);
}

// exp(x), with x limited to [-87, 88].
DIFFCORE_INLINE Vec exp(Vec x) { return exp_in_range(limit_exponent(x)); }

// exp(x) - 1 without cancellation near 0.
DIFFCORE_INLINE Vec expm1(Vec x) {
  const ReducedExp e = reduce_exp(limit_exponent(x));
  const Vec power = scale_by_power_of_2(broadcast(1.0f), e.n);
  return fma(e.r_plus_r2_q, power, power - broadcast(1.0f));
}

// Natural logarithm of positive normal x.
DIFFCORE_INLINE Vec log(Vec x) {
  Vec m, e;
  split_exponent(x, &m, &e);
  const Vec f = m - broadcast(1.0f);
  const Vec f2 = f * f;
  Vec p = broadcast(7.0376836292e-2f);
  p = fma(p, f, broadcast(-1.1514610310e-1f));
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  p = fma(p, f, broadcast(3.3333331174e-1f));
  Vec y = p * f * f2;
  y = fma(e, broadcast(-2.12194440e-4f), y);
  y = fnma(broadcast(0.5f), f2, y);
  return fma(e, broadcast(0.693359375f), f + y);
}

// sin and cos of 2 pi u for u in [0, 1). The quadrant is taken off exactly, before the
// multiplication by 2 pi, so no accuracy is lost to range reduction.
DIFFCORE_INLINE void sincos_of_turns(Vec u, Vec* sine, Vec* cosine) {
  const Vec quadrant = round_nearest(u * broadcast(4.0f));
  const Vec x = fnma(quadrant, broadcast(0.25f), u) * broadcast(6.28318531f);
  const Vec x2 = x * x;
  Vec s = broadcast(-1.9515295891e-4f);
  s = fma(s, x2, broadcast(8.3321608736e-3f));
  s = fma(s, x2, broadcast(-1.6666654611e-1f));
  s = fma(s * x2, x, x);
  Vec c = broadcast(2.443315711809948e-5f);
  c = fma(c, x2, broadcast(-1.388731625493765e-3f));
  c = fma(c, x2, broadcast(4.166664568298827e-2f));
  c = fma(c, x2 * x2, fnma(broadcast(0.5f), x2, broadcast(1.0f)));
  // quadrant 0..4: q & 1 swaps the two; the signs follow from the half turn they lie in.
  const Vec half = quadrant * broadcast(0.5f);
  const Mask odd = less(broadcast(0.25f), abs(half - round_nearest(half)));
  const Vec minus_s = zero() - s, minus_c = zero() - c;
  const Mask in_2_3 = less(abs(quadrant - broadcast(2.5f)), broadcast(1.0f));
  const Mask in_1_2 = less(abs(quadrant - broadcast(1.5f)), broadcast(1.0f));
  *sine = select(odd, select(in_2_3, minus_c, c), select(in_2_3, minus_s, s));
  *cosine = select(odd, select(in_1_2, minus_s, s), select(in_1_2, minus_c, c));
}

template <Activation kind>
struct ActivationFunction;

template <>
struct ActivationFunction<Activation::identity> {
  DIFFCORE_INLINE Vec value(Vec x) { return x; }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    *slope = broadcast(1.0f);
    return x;
  }
};

template <>
struct ActivationFunction<Activation::relu> {
  DIFFCORE_INLINE Vec value(Vec x) { return at_least(zero(), x); }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    *slope = select(less(zero(), x), broadcast(1.0f), zero());
    return value(x);
  }
};

template <>
struct ActivationFunction<Activation::elu> {
  DIFFCORE_INLINE Vec value(Vec x) { return select(less(zero(), x), x, expm1(x)); }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    *slope = select(less(zero(), x), broadcast(1.0f), exp(x));
    return value(x);
  }
};

// Below -87 silu and mish are 0 to float32's last normal digit, but x times an exponential that can't
// get any smaller would not be: x itself stops there.
template <>
struct ActivationFunction<Activation::silu> {
  DIFFCORE_INLINE Vec sigmoid(Vec x) { return reciprocal(broadcast(1.0f) + exp(zero() - x)); }
  DIFFCORE_INLINE Vec value(Vec x) { return at_least(broadcast(lowest_exponent), x) * sigmoid(x); }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    const Vec s = sigmoid(x);
    const Vec y = at_least(broadcast(lowest_exponent), x) * s;
    *slope = fma(y, broadcast(1.0f) - s, s);
    return y;
  }
};

template <>
struct ActivationFunction<Activation::tanh> {
  DIFFCORE_INLINE Vec value(Vec x) {
    // Odd polynomial below 0.625, 1 - 2 / (exp(2|x|) + 1) with the sign put back above.
    const Vec x2 = x * x;
    Vec p = broadcast(-5.70498872745e-3f);
    p = fma(p, x2, broadcast(2.06390887954e-2f));
    p = fma(p, x2, broadcast(-5.37397155531e-2f));
    p = fma(p, x2, broadcast(1.33314422036e-1f));
    p = fma(p, x2, broadcast(-3.33332819422e-1f));
    const Vec small = fma(p * x2, x, x);
    const Vec magnitude = abs(x);
    const Vec e = exp(magnitude + magnitude);
    const Vec big = broadcast(1.0f) - broadcast(2.0f) / (e + broadcast(1.0f));
    const Vec signed_big = select(less(x, zero()), zero() - big, big);
    return select(less(magnitude, broadcast(0.625f)), small, signed_big);
  }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    const Vec y = value(x);
    *slope = fnma(y, y, broadcast(1.0f));
    return y;
  }
};

// mish(x) = x tanh(log(1 + e^x)). With e = exp(x) and n = e (e + 2), tanh(log(1 + e)) = n / (n + 2):
// no logarithm is needed. Above 20 the quotient is 1 in float32.
template <>
struct ActivationFunction<Activation::mish> {
  DIFFCORE_INLINE Vec value(Vec x) {
    x = at_least(broadcast(lowest_exponent), x);
    const Vec e = exp_in_range(at_most(broadcast(20.0f), x));
    const Vec n = fma(e, e, e + e);
    return x * (n * reciprocal(n + broadcast(2.0f)));
  }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    x = at_least(broadcast(lowest_exponent), x);
    const Vec limited = at_most(broadcast(20.0f), x);
    const Vec e = exp_in_range(limited);
    const Vec n = fma(e, e, e + e);
    const Vec r = reciprocal(n + broadcast(2.0f));
    const Vec t = n * r;
    // mish'(x) = t + 4 x e (1 + e) / (n + 2)^2
    *slope = fma(limited * r * broadcast(4.0f), fma(e, e, e) * r, t);
    return x * t;
  }
};

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
