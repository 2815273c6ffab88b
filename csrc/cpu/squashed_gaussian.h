// A sample of soft actor-critic's policy and its log density, from what the network says of a state:
// u = mean + std z, a = tanh(u), log p(a) = sum of log N(u; mean, std) - log(1 - a^2), with log std kept
// within bounds by a tanh of its own.
#pragma once

#include "layers.h"

namespace diffcore {
namespace DIFFCORE_ISA {

using Tanh = ActivationFunction<Activation::tanh, Precision::float32>;

// log(1 + exp(x)) without overflow.
DIFFCORE_INLINE Vec softplus(Vec x) {
  return at_least(zero(), x) + log(broadcast(1.0f) + exp(zero() - abs(x)));
}

static void squashed_gaussian(const SquashedGaussianCall& call) {
  const int A = call.action_dim;
  const Vec half_range = broadcast(0.5f * (call.high - call.low)), low = broadcast(call.low);
  const Vec log_2 = broadcast(0.693147181f), half_log_2_pi = broadcast(0.918938533f);
  for (int64_t row = 0; row < call.batch; ++row) {
    const float *mean = call.raw + row * 2 * A, *raw_log_std = mean + A;
    double log_prob = 0.0;
    for (int n = 0; n < A; n += W) {
      const Vec z = load_some(call.noise + row * A + n, A - n);
      Vec slope;
      const Vec squashed = Tanh::value_and_slope(load_some(raw_log_std + n, A - n), &slope);
      const Vec log_std = fma(half_range, squashed + broadcast(1.0f), low);
      const Vec spread = exp(log_std) * z;
      const Vec u = load_some(mean + n, A - n) + spread;
      store_some(call.action + row * A + n, Tanh::value(u), A - n);
      if (call.saved) {
        store_some(call.saved + row * 2 * A + n, spread, A - n);
        store_some(call.saved + row * 2 * A + A + n, half_range * slope, A - n);
      }
      const Vec gaussian = fnma(broadcast(0.5f) * z, z, zero() - log_std) - half_log_2_pi;
      const Vec half_log_slope = (log_2 - u) - softplus(broadcast(-2.0f) * u);
      float lanes[W];
      store(lanes, fnma(broadcast(2.0f), half_log_slope, gaussian));
      for (int c = 0; c < W && n + c < A; ++c) log_prob += static_cast<double>(lanes[c]);
    }
    call.log_prob[row] = static_cast<float>(log_prob);
  }
}

// With respect to u an action's slope is 1 - a^2, and that of its log density 2 a.
static void squashed_gaussian_backward(const SquashedGaussianBackwardCall& call) {
  const int A = call.action_dim;
  for (int64_t row = 0; row < call.batch; ++row) {
    const float *spread = call.saved + row * 2 * A, *slope = spread + A;
    const Vec grad_log_prob = broadcast(call.grad_log_prob ? call.grad_log_prob[row] : 0.0f);
    for (int n = 0; n < A; n += W) {
      const Vec a = load_some(call.action + row * A + n, A - n);
      const Vec grad_a =
          call.grad_action ? load_some(call.grad_action + row * A + n, A - n) : zero();
      const Vec grad_u = fma(grad_a, fnma(a, a, broadcast(1.0f)), grad_log_prob * (a + a));
      const Vec grad_log_std = fma(grad_u, load_some(spread + n, A - n), zero() - grad_log_prob);
      float* to = call.grad_raw + row * 2 * A + n;
      store_some(to, grad_u, A - n);
      store_some(to + A, grad_log_std * load_some(slope + n, A - n), A - n);
    }
  }
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
