// Elementwise functions on vectors: exp, log, sin/cos, and the activations with their derivatives.
//
// V is a Vec, or Vecs to be taken side by side.
//
// Polynomials are those of the Cephes library (S. Moshier), whose float versions stay within about
// 2 ulp, where nothing else is said; NaN in gives NaN out everywhere.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// Added to |v| < 2^22, this rounds v to an integer, which then stands in the sum's lowest bits.
constexpr float integer_in_low_bits = 12582912.0f;  // 1.5 * 2^23

// exp(x) = 2^(n / 2^bits) (1 + expm1), n the integer in i's lowest bits.
template <class V>
struct ReducedExp {
  V i, n, expm1;
};

// How ln 2 is subtracted n times: at once with what float32 rounds of it, which leaves a relative error of
// 2.8e-9 |x| in exp(x), where one product isn't rounded; or without any loss.
enum class Reduction { one_step, two_steps };

// For x in [-87, 88], where exp(x) is finite and normal. The more bits of the fraction are taken out, the
// fewer terms has the rest.
template <int bits, Reduction reduction = Reduction::two_steps, class V>
DIFFCORE_INLINE ReducedExp<V> reduce_exp(V x) {
  constexpr float parts = 1 << bits;
  const V i = fma(x, broadcast(1.44269504f * parts), broadcast(integer_in_low_bits));
  const V n = i - broadcast(integer_in_low_bits);
  V r;
  if constexpr (reduction == Reduction::one_step && fma_rounds_once) {
    r = fnma(n, broadcast(0.693147182f / parts), x);
  } else {
    // ln 2 in two parts, the first exact in few bits, so that n * ln 2 is subtracted without loss.
    r = fnma(n, broadcast(0.693359375f / parts), x);
    r = fnma(n, broadcast(-2.12194440e-4f / parts), r);
  }
  V q;
  if constexpr (bits == 0) {
    // The polynomial of this degree with the least error of exp(r) over |r| <= 0.347: 3.1e-9 of it.
    q = broadcast(1.381961396e-3f);
    q = fma(q, r, broadcast(8.368694223e-3f));
    q = fma(q, r, broadcast(4.166828096e-2f));
    q = fma(q, r, broadcast(1.666652113e-1f));
    q = fma(q, r, broadcast(4.999999404e-1f));
  } else {
    // Taylor's, whose next term is below 1e-8.
    static_assert(bits == 3 || bits == 4);
    q = broadcast(1.666666716e-1f);
    if constexpr (bits == 3) q = fma(r, broadcast(4.166666791e-2f), q);
    q = fma(q, r, broadcast(0.5f));
  }
  return {i, n, fma(q, r * r, r)};
}

constexpr float lowest_exponent = -87.0f;

template <class V>
DIFFCORE_INLINE V limit_exponent(V x) {
  return clamp(x, broadcast(lowest_exponent), broadcast(88.0f));
}

// Where the result is rounded to bfloat16, which keeps 2^-9 of it, to 2^-13 only: 2^f as a cubic, f
// between -1/2 and 1/2.
template <Precision precision = Precision::float32, Reduction reduction = Reduction::two_steps,
          class V>
DIFFCORE_INLINE V exp_in_range(V x) {
  if constexpr (precision == Precision::float32) {
    const ReducedExp<V> e = reduce_exp<power_bits, reduction>(x);
    const V power = power_of_2(e.i);
    return fma(power, e.expm1, power);
  } else {
    const V doublings = x * broadcast(1.44269504f);
    const V n = round_nearest(doublings), f = doublings - n;
    V p = broadcast(5.51716685e-2f);
    p = fma(p, f, broadcast(2.42611125e-1f));
    p = fma(p, f, broadcast(6.93260968e-1f));
    p = fma(p, f, broadcast(9.99928057e-1f));
    return scale_by_power_of_2(p, n);
  }
}

// exp(x), with x limited to [-87, 88].
template <Precision precision = Precision::float32, class V>
DIFFCORE_INLINE V exp(V x) {
  return exp_in_range<precision>(limit_exponent(x));
}

// 1/x for positive normal x, no more exact than the value needs either.
template <Precision precision, class V>
DIFFCORE_INLINE V inverse(V x) {
  return precision == Precision::float32 ? broadcast(1.0f) / x : rough_reciprocal(x);
}

// a / b likewise. Where a product that is added rounds twice it is taken by the reciprocal, with which mish,
// and a chain that magnifies its last digit, stays nearer to what torch computes.
template <Precision precision, class V>
DIFFCORE_INLINE V quotient(V a, V b) {
  return precision == Precision::float32 && fma_rounds_once ? a / b : a * inverse<precision>(b);
}

// 2 / b likewise, where nothing asks for that quotient's very bits: within 1e-7 of it.
template <Precision precision, class V>
DIFFCORE_INLINE V twice_inverse(V b) {
  const V two = broadcast(2.0f);
  if (precision == Precision::bfloat16 || divides_quickly) return quotient<precision>(two, b);
  const V r = rough_reciprocal(b), twice = r + r;
  return fma(twice, fnma(b, r, V(broadcast(1.0f))), twice);
}

// exp(x) - 1 without cancellation near 0.
DIFFCORE_INLINE Vec expm1(Vec x) {
  const ReducedExp<Vec> e = reduce_exp<0>(limit_exponent(x));  // whose powers of 2 are exact
  const Vec power = scale_by_power_of_2(broadcast(1.0f), e.n);
  return fma(power, e.expm1, power - broadcast(1.0f));
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

// (sin(r) - r) / r^3 and (cos(r) - 1 + r^2 / 2) / r^4 for |r| up to a little over pi / 4.
DIFFCORE_INLINE Vec sine_polynomial(Vec r2) {
  Vec p = broadcast(-1.9515295891e-4f);
  p = fma(p, r2, broadcast(8.3321608736e-3f));
  return fma(p, r2, broadcast(-1.6666654611e-1f));
}
DIFFCORE_INLINE Vec cosine_polynomial(Vec r2) {
  Vec p = broadcast(2.443315711809948e-5f);
  p = fma(p, r2, broadcast(-1.388731625493765e-3f));
  return fma(p, r2, broadcast(4.166664568298827e-2f));
}

// sin(n pi / 2 + r) from the sine and cosine of r, with n in the low bits of `quarters`. For cos, the
// sine a quarter turn on, n is one more.
DIFFCORE_INLINE Vec sine_from_quarter(Vec quarters, Vec sine, Vec cosine) {
  return flip_by_bit_1(select(bit_0(quarters), cosine, sine), quarters);
}

// sin and cos of 2 pi u for u in [0, 1). The quadrant is taken off exactly, before the
// multiplication by 2 pi, so no accuracy is lost to range reduction.
DIFFCORE_INLINE void sincos_of_turns(Vec u, Vec* sine, Vec* cosine) {
  const Vec quarters = fma(u, broadcast(4.0f), broadcast(integer_in_low_bits));
  const Vec n = quarters - broadcast(integer_in_low_bits);
  const Vec r = fnma(n, broadcast(0.25f), u) * broadcast(6.28318531f);
  const Vec r2 = r * r;
  const Vec s = fma(sine_polynomial(r2) * r2, r, r);
  const Vec c = fma(cosine_polynomial(r2), r2 * r2, fnma(broadcast(0.5f), r2, broadcast(1.0f)));
  *sine = sine_from_quarter(quarters, s, c);
  *cosine = sine_from_quarter(quarters + broadcast(1.0f), s, c);
}

struct SineCosine {
  Vec sine, cosine;
};

// For any x, number by number in double precision.
static __attribute__((noinline)) SineCosine sincos_in_double(Vec x) {
  float sine[Vec::width], cosine[Vec::width], values[Vec::width];
  store(values, x);
  for (int l = 0; l < Vec::width; ++l) {
    sine[l] = static_cast<float>(__builtin_sin(static_cast<double>(values[l])));
    cosine[l] = static_cast<float>(__builtin_cos(static_cast<double>(values[l])));
  }
  return {load(sine), load(cosine)};
}

// x - n pi / 2 = high + low, where low is what high rounds away, for |n| up to 2^13 and the n nearest
// to x / (pi / 2). pi / 2 is a sum of four parts, the first three of 11 bits: their products with n
// are exact, with or without an fma, and so are the differences.
DIFFCORE_INLINE void subtract_quarters(Vec n, Vec x, Vec* high, Vec* low) {
  const Vec r = fnma(n, broadcast(0x1.fb4p-12f), fnma(n, broadcast(0x1.92p+0f), x));
  const Vec third = n * broadcast(0x1.444p-24f);
  *high = r - third;
  *low = fnma(n, broadcast(0x1.68c234p-39f), (r - *high) - third);
}

// sin and cos of x, within 1 ulp for every x; NaN for infinities. Beyond `longest_reduction`, which is
// 2^13 quarter turns, it takes about a hundred times as long.
constexpr float longest_reduction = 12867.0f;

DIFFCORE_INLINE void sincos(Vec x, Vec* sine, Vec* cosine) {
  const Vec quarters = fma(x, broadcast(0.636619772f), broadcast(integer_in_low_bits));
  const Vec n = quarters - broadcast(integer_in_low_bits);
  Vec r, low;
  subtract_quarters(n, x, &r, &low);
  // sin(r + low) and cos(r + low), each a large term plus a small sum, so that only the last addition
  // rounds much: sin = r + (r^3 p + low cos r), cos = w + (what w = 1 - r^2 / 2 rounds away + ...).
  const Vec r2 = r * r, half = broadcast(0.5f) * r;
  const Vec w = fnma(half, r, broadcast(1.0f));
  const Vec s = r + fma(sine_polynomial(r2) * r2, r, low * w);
  const Vec rounded_away = fnma(low, r, fnma(half, r, broadcast(1.0f) - w));
  const Vec c = w + fma(cosine_polynomial(r2), r2 * r2, rounded_away);
  *sine = sine_from_quarter(quarters, s, c);
  *cosine = sine_from_quarter(quarters + broadcast(1.0f), s, c);
  const Mask near = less(abs(x), broadcast(longest_reduction));
  if (__builtin_expect(!all(near), 0)) {
    const SineCosine far = sincos_in_double(x);
    *sine = select(near, *sine, far.sine);
    *cosine = select(near, *cosine, far.cosine);
  }
}

// Whether an activation's value is written for Vecs, too: where it is a long chain of operations that wait
// for each other, with few registers of its own.
template <Activation kind>
constexpr bool side_by_side = kind == Activation::silu || kind == Activation::mish;

// `precision` is what the value is kept in.
template <Activation kind, Precision precision>
struct ActivationFunction;

template <Precision precision>
struct ActivationFunction<Activation::identity, precision> {
  DIFFCORE_INLINE Vec value(Vec x) { return x; }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    *slope = broadcast(1.0f);
    return x;
  }
};

template <Precision precision>
struct ActivationFunction<Activation::relu, precision> {
  DIFFCORE_INLINE Vec value(Vec x) { return at_least(zero(), x); }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    *slope = select(less(zero(), x), broadcast(1.0f), zero());
    return value(x);
  }
};

template <Precision precision>
struct ActivationFunction<Activation::elu, precision> {
  DIFFCORE_INLINE Vec value(Vec x) { return select(less(zero(), x), x, expm1(x)); }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    *slope = select(less(zero(), x), broadcast(1.0f), exp(x));
    return value(x);
  }
};

// Below -87 silu and mish are 0 to float32's last normal digit, but x times an exponential that can't
// get any smaller would not be: x itself stops there.
template <Precision precision>
struct ActivationFunction<Activation::silu, precision> {
  template <class V>
  DIFFCORE_INLINE V sigmoid(V x) {
    return inverse<precision>(broadcast(1.0f) + exp<precision>(zero() - x));
  }
  template <class V>
  DIFFCORE_INLINE V value(V x) {
    return at_least(broadcast(lowest_exponent), x) * sigmoid(x);
  }
  template <class V>
  DIFFCORE_INLINE V value_and_slope(V x, V* slope) {
    const V s = sigmoid(x);
    const V y = at_least(broadcast(lowest_exponent), x) * s;
    *slope = fma(y, broadcast(1.0f) - s, s);
    return y;
  }
};

template <Precision precision>
struct ActivationFunction<Activation::tanh, precision> {
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
template <Precision precision>
struct ActivationFunction<Activation::mish, precision> {
  template <class V>
  DIFFCORE_INLINE V value(V x) {
    x = at_least(broadcast(lowest_exponent), x);
    const V e = exp_in_range<precision, Reduction::one_step>(at_most(broadcast(20.0f), x));
    const V n = fma(e, e, e + e);
    return x * quotient<precision>(n, n + broadcast(2.0f));
  }
  template <class V>
  DIFFCORE_INLINE V value_and_slope(V x, V* slope) {
    x = at_least(broadcast(lowest_exponent), x);
    const V limited = at_most(broadcast(20.0f), x);
    const V e = exp_in_range<precision, Reduction::one_step>(limited);
    const V n = fma(e, e, e + e);
    const V d = n + broadcast(2.0f);
    const V t = quotient<precision>(n, d);  // not n r / 2: value() has these bits
    const V r = twice_inverse<precision>(d);
    // mish'(x) = t + 4 x e (1 + e) / (n + 2)^2, where e (1 + e) = n - e
    *slope = fma(limited * r, (n - e) * r, t);
    return x * t;
  }
};

// square - x x, the rounding error of square = x x.
DIFFCORE_INLINE Vec rounding_of_square(Vec x, Vec square) {
  if constexpr (fma_rounds_once) {
    return fnma(x, x, square);
  } else {  // by halves of x whose products are exact
    const Vec high = round_to_bf16(x), low = x - high;
    return ((square - high * high) - (high + high) * low) - low * low;
  }
}

// gelu(x) = x Phi(x), Phi the normal distribution function. Its tail Phi(-|x|) is exp(-x^2 / 2) times
// a function that is smooth over the whole range, so that small values aren't differences of large
// ones. Beyond 13.19 the exponential is below float32's normal numbers.
template <Precision precision>
struct ActivationFunction<Activation::gelu, precision> {
  struct Parts {
    Vec limited, exponential, distribution;
  };
  DIFFCORE_INLINE Parts parts(Vec x) {
    const Vec limit = broadcast(13.19f);
    const Vec limited = clamp(x, zero() - limit, limit);
    const Vec magnitude = abs(limited);
    // The rounding error of x^2, which the exponential would magnify, is put right afterwards.
    const Vec square = limited * limited;
    Vec e = exp(broadcast(-0.5f) * square);
    e = fma(e * broadcast(0.5f), rounding_of_square(limited, square), e);
    // (|x| + 3) Phi(-|x|) / exp(-x^2 / 2) as a polynomial in (|x| - 3) / (|x| + 3), to 4e-8.
    const Vec share = broadcast(1.0f) / (magnitude + broadcast(3.0f));
    const Vec q = fnma(broadcast(6.0f), share, broadcast(1.0f));
    Vec p = broadcast(-2.725993400e-4f);
    p = fma(p, q, broadcast(-9.120256291e-4f));
    p = fma(p, q, broadcast(1.077569788e-3f));
    p = fma(p, q, broadcast(6.929901894e-3f));
    p = fma(p, q, broadcast(-1.047948003e-2f));
    p = fma(p, q, broadcast(-4.725730047e-2f));
    p = fma(p, q, broadcast(2.300192565e-1f));
    p = fma(p, q, broadcast(-5.093322396e-1f));
    p = fma(p, q, broadcast(7.290836573e-1f));
    const Vec tail = e * (p * share);
    return {limited, e, select(less(x, zero()), tail, broadcast(1.0f) - tail)};
  }
  DIFFCORE_INLINE Vec value(Vec x) {
    return at_least(broadcast(-13.19f), x) * parts(x).distribution;
  }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    const Parts p = parts(x);
    // 1 / sqrt(2 pi)
    *slope = fma(p.limited * broadcast(0.398942280f), p.exponential, p.distribution);
    return at_least(broadcast(-13.19f), x) * p.distribution;
  }
};

template <Precision precision>
struct ActivationFunction<Activation::sin, precision> {
  DIFFCORE_INLINE Vec value(Vec x) {
    Vec slope;
    return value_and_slope(x, &slope);
  }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    Vec sine;
    sincos(x, &sine, slope);
    return sine;
  }
};

template <Precision precision>
struct ActivationFunction<Activation::cos, precision> {
  DIFFCORE_INLINE Vec value(Vec x) {
    Vec sine, cosine;
    sincos(x, &sine, &cosine);
    return cosine;
  }
  DIFFCORE_INLINE Vec value_and_slope(Vec x, Vec* slope) {
    Vec sine, cosine;
    sincos(x, &sine, &cosine);
    *slope = zero() - sine;
    return cosine;
  }
};

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
