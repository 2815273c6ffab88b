// One update of a sampler: x0 = clip(c0 x - c1 eps); x' = c2 x0 + c3 x + c4 eps + c5 z + c6 x0',
// with x0' the x0 of the step before.
#pragma once

#include "activations.cuh"

namespace diffcore {
namespace cuda {

constexpr int table_columns = 7;

struct SolverStep {
  float c0, c1, c2, c3, c4, c5, c6, clip;

  __device__ __forceinline__ SolverStep(const float* c, float noise_scale, float clip_)
      : c0(__ldg(c)),
        c1(__ldg(c + 1)),
        c2(__ldg(c + 2)),
        c3(__ldg(c + 3)),
        c4(__ldg(c + 4)),
        c5(__ldg(c + 5) * noise_scale),
        c6(__ldg(c + 6)),
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
