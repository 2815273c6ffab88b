// One step of a sampler, number by number.
//
// Budget: 256 threads, up to 40 registers, no spills, no shared memory. Roofline: 8 multiply-adds,
// 16 FLOPs, for up to 24 bytes a number, so memory limits it: on an H100 (3.35 TB/s) 140 M numbers
// a millisecond; batch 4096 with 6 actions, 0.6 MB, 0.2 us. Below about 400,000 numbers the launch,
// some 3 us, takes longer than the work. No GPU has measured it yet.
#include "kernels.h"
#include "platform.cuh"
#include "solver_step.cuh"

namespace diffcore {
namespace cuda {

namespace {

constexpr int threads = 256;

template <class T>
__device__ __forceinline__ T read(const float* p, int64_t i, T absent) {
  return p ? reinterpret_cast<const T*>(p)[i] : absent;
}

__device__ __forceinline__ SolverStep solver_step(const ReverseStepCall& call) {
  return call.coefficients ? SolverStep(call.coefficients, call.noise_scale, call.clip)
                           : SolverStep(call.coefficient_values, call.noise_scale, call.clip);
}

__global__ void __launch_bounds__(threads) reverse_step_by_one(ReverseStepCall call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= call.count) return;
  const SolverStep step = solver_step(call);
  call.next[i] = step.next(call.x[i], call.eps[i], read(call.noise, i, 0.0f),
                           read(call.x0_previous, i, 0.0f), &call.x0[i]);
}

// Four numbers a thread, for arrays on 16 bytes; the rest is left to the last thread.
__global__ void __launch_bounds__(threads) reverse_step_by_four(ReverseStepCall call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t quads = call.count / 4;
  const SolverStep step = solver_step(call);
  if (i < quads) {
    const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float4 x = read(call.x, i, none), eps = read(call.eps, i, none);
    const float4 z = read(call.noise, i, none), before = read(call.x0_previous, i, none);
    float4 next, x0;
    next.x = step.next(x.x, eps.x, z.x, before.x, &x0.x);
    next.y = step.next(x.y, eps.y, z.y, before.y, &x0.y);
    next.z = step.next(x.z, eps.z, z.z, before.z, &x0.z);
    next.w = step.next(x.w, eps.w, z.w, before.w, &x0.w);
    reinterpret_cast<float4*>(call.next)[i] = next;
    reinterpret_cast<float4*>(call.x0)[i] = x0;
  } else if (i == quads) {
    for (int64_t j = 4 * quads; j < call.count; ++j)
      call.next[j] = step.next(call.x[j], call.eps[j], read(call.noise, j, 0.0f),
                               read(call.x0_previous, j, 0.0f), &call.x0[j]);
  }
}

bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

const char* reverse_step(const ReverseStepCall& call) {
  const bool by_four = on_16_bytes(call.x) && on_16_bytes(call.eps) && on_16_bytes(call.noise) &&
                       on_16_bytes(call.x0_previous) && on_16_bytes(call.next) &&
                       on_16_bytes(call.x0);
  const int64_t work = by_four ? call.count / 4 + 1 : call.count;
  const Launch how = {static_cast<unsigned>((work + threads - 1) / threads), threads, 0,
                      call.stream};
  return launch(how, by_four ? reverse_step_by_four : reverse_step_by_one, call);
}

}  // namespace cuda
}  // namespace diffcore
