// One update of a sampler: x0 = clip(c0 x - c1 eps); x' = c2 x0 + c3 x + c4 eps + c5 z + c6 x0',
// with x0' the x0 of the step before.
#pragma once

#include "layers.h"

namespace diffcore {
namespace DIFFCORE_ISA {

constexpr int table_columns = 7;

struct SolverStep {
  Vec c0, c1, c2, c3, c4, c5, c6, lower, upper;

  SolverStep(const float* c, float noise_scale, float clip)
      : c0(broadcast(c[0])),
        c1(broadcast(c[1])),
        c2(broadcast(c[2])),
        c3(broadcast(c[3])),
        c4(broadcast(c[4])),
        c5(broadcast(c[5] * noise_scale)),
        c6(broadcast(c[6])),
        lower(broadcast(-clip)),
        upper(broadcast(clip)) {}

  __attribute__((always_inline)) Vec next(Vec x, Vec eps, Vec z, Vec x0_previous, Vec* x0) const {
    *x0 = clamp(fnma(c1, eps, c0 * x), lower, upper);
    Vec sum = fma(c3, x, c2 * *x0);
    sum = fma(c4, eps, sum);
    sum = fma(c5, z, sum);
    return fma(c6, x0_previous, sum);
  }
};

static void reverse_step(const ReverseStepCall& call) {
  const SolverStep step(call.coefficients, call.noise_scale, call.clip);
  for (int64_t i = 0; i < call.count; i += W) {
    const int64_t left = call.count - i;
    Vec x0;
    const Vec next =
        step.next(load_some(call.x + i, left), load_some(call.eps + i, left),
                  call.noise ? load_some(call.noise + i, left) : zero(),
                  call.x0_previous ? load_some(call.x0_previous + i, left) : zero(), &x0);
    store_some(call.next + i, next, left);
    store_some(call.x0 + i, x0, left);
  }
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
