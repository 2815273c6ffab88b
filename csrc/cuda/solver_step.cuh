// One update of a sampler: x0 = clip(c0 x - c1 eps); x' = c2 x0 + c3 x + c4 eps + c5 z + c6 x0',
// with x0' the x0 of the step before.
#pragma once

#include "activations.cuh"

namespace diffcore {
namespace cuda {

constexpr int table_columns = 7;

struct SolverStep {
  float c0, c1, c2, c3, c4, c5, c6, clip;

  // From a row of the table, by a pointer or an array.
  template <class Row>
  __device__ __forceinline__ SolverStep(const Row& c, float noise_scale, float clip_)
      : c0(c[0]),
        c1(c[1]),
        c2(c[2]),
        c3(c[3]),
        c4(c[4]),
        c5(c[5] * noise_scale),
        c6(c[6]),
        clip(clip_) {}

  __device__ __forceinline__ float clamp(float x) const {
    return at_most(clip, at_least(-clip, x));
  }

  __device__ __forceinline__ float next(float x, float eps, float z, float x0_previous,
                                        float* x0) const {
    *x0 = clamp(fmaf(-c1, eps, c0 * x));
    float sum = fmaf(c3, x, c2 * *x0);
    sum = fmaf(c4, eps, sum);
    sum = fmaf(c5, z, sum);
    return fmaf(c6, x0_previous, sum);
  }
};

}  // namespace cuda
}  // namespace diffcore
