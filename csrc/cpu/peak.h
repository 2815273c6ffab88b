// The machine's float32 ceiling, for benchmarks: multiply-adds on registers, nothing else.
#pragma once

#include <time.h>

#include "simd.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// As many independent sums as the register tile has: enough to hide the FMA's latency.
constexpr int peak_sums = 2 * max_tile_rows;

DIFFCORE_INLINE double monotonic_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// 2 * iterations * peak_sums * width operations. The result and the empty statement keep the
// compiler from leaving any of them out, or from running one call for many.
static __attribute__((noinline)) float multiply_adds(int iterations) {
  asm volatile("" ::: "memory");
  const Vec factor = broadcast(0.999f), addend = broadcast(1e-3f);
  Vec sum[peak_sums];
#pragma GCC unroll 32
  for (int j = 0; j < peak_sums; ++j) sum[j] = broadcast(static_cast<float>(j));
  for (int i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < peak_sums; ++j) sum[j] = fma(sum[j], factor, addend);
  }
  Vec total = zero();
#pragma GCC unroll 32
  for (int j = 0; j < peak_sums; ++j) total = total + sum[j];
  float lanes[Vec::width];
  store(lanes, total);
  return lanes[0];
}

// Floating-point operations per second of `threads` threads together, over about `seconds`.
static double fma_peak(int threads, double seconds) {
  constexpr int iterations = 20000;  // well under a millisecond
  double rate = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : rate)
  {
    volatile float sink = multiply_adds(iterations);  // wakes the core's wide units
    double operations = 0.0, elapsed = 0.0;
#pragma omp barrier
    const double start = monotonic_seconds();
    do {
      sink = multiply_adds(iterations);
      operations += 2.0 * iterations * peak_sums * Vec::width;
      elapsed = monotonic_seconds() - start;
    } while (elapsed < seconds);
    (void)sink;
    rate += operations / elapsed;
  }
  return rate;
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
