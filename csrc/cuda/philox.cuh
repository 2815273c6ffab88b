// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and
// standard normals from it by Box-Muller. The counter is (column / 4, row, step, row >> 32), the
// key the seed: the same numbers as csrc/cpu/philox.h and diffcore/ops/_philox.py, to rounding.
#pragma once

#include "kernels.h"
#include "sincos.cuh"

namespace diffcore {
namespace cuda {

__device__ __forceinline__ uint64_t read_seed(const Seed& seed) {
  return seed.address ? static_cast<uint64_t>(*seed.address) : seed.value;
}

// sin and cos of 2 pi u for u in [0, 1). The quadrant is taken off exactly, before the
// multiplication by 2 pi, so no accuracy is lost to range reduction.
__device__ __forceinline__ void sine_cosine_of_turns(float u, float* sine, float* cosine) {
  const float quarters = fmaf(u, 4.0f, integer_in_low_bits);
  const float n = quarters - integer_in_low_bits;
  const float r = fmaf(-n, 0.25f, u) * 6.28318531f;
  const float r2 = r * r;
  const float s = fmaf(sine_polynomial(r2) * r2, r, r);
  const float c = fmaf(cosine_polynomial(r2), r2 * r2, fmaf(-0.5f, r2, 1.0f));
  const unsigned quarter = __float_as_uint(quarters);
  *sine = sine_from_quarter(quarter, s, c);
  *cosine = sine_from_quarter(quarter + 1, s, c);
}

// Two words give two normals: sqrt(-2 ln u1) (cos, sin)(2 pi u2), with u1 in (0, 1], u2 in [0, 1),
// both multiples of 2^-24.
__device__ __forceinline__ float2 box_muller(uint32_t a, uint32_t b) {
  const float u1 = static_cast<float>((a >> 8) + 1) * 0x1p-24f;
  const float u2 = static_cast<float>(b >> 8) * 0x1p-24f;
  float sine, cosine;
  sine_cosine_of_turns(u2, &sine, &cosine);
  const float radius = sqrtf(-2.0f * logf(u1));
  return {radius * cosine, radius * sine};
}

// The normals of columns 4 * block .. 4 * block + 3 of a row at one step.
__device__ __forceinline__ float4 normals(uint64_t seed, uint32_t block, int64_t row,
                                          uint32_t step) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = block, c1 = static_cast<uint32_t>(row), c2 = step;
  uint32_t c3 = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const float2 first = box_muller(c0, c1), second = box_muller(c2, c3);
  return {first.x, first.y, second.x, second.y};
}

}  // namespace cuda
}  // namespace diffcore
