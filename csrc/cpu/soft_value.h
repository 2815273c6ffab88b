// What lies between the networks of soft_value, whose calls are made in csrc/python/module.cpp: the
// critics' input, the value min_n q_n - temperature log p with the policy's loss, its negative mean, and
// the loss's slopes.
#pragma once

#include "layers.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// Row by row [a, b].
static void join_columns(const float* a, int a_width, const float* b, int b_width, int64_t rows,
                         float* out) {
  for (int64_t i = 0; i < rows; ++i, a += a_width, b += b_width, out += a_width + b_width) {
    memcpy(out, a, sizeof(float) * static_cast<size_t>(a_width));
    memcpy(out + a_width, b, sizeof(float) * static_cast<size_t>(b_width));
  }
}

// The last `count` of a row's `width` columns.
static void last_columns(const float* from, int width, int count, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    memcpy(out + i * count, from + i * width + (width - count),
           sizeof(float) * static_cast<size_t>(count));
}

static void soft_value(const SoftValueCall& call) {
  const int64_t B = call.batch;
  const float temperature = *call.temperature;
  const float slope = static_cast<float>(-1.0 / static_cast<double>(B));
  double sum = 0.0;
  for (int64_t i = 0; i < B; ++i) {
    float least = call.q[i];
    int ties = 1;
    for (int n = 1; n < call.network_count; ++n) {
      const float q = call.q[n * B + i];
      ties = q < least ? 1 : ties + (q == least);
      least = q < least || q != q ? q : least;  // NaN stays
    }
    call.value[i] = least - temperature * call.log_prob[i];
    sum += static_cast<double>(call.value[i]);
    if (!call.grad_q) continue;
    for (int n = 0; n < call.network_count; ++n) {
      const float q = call.q[n * B + i];
      // As torch does: the smallest share it.
      const float share = q == least ? slope / static_cast<float>(ties) : 0.0f;
      call.grad_q[n * B + i] = least != least ? least : share;
    }
    call.grad_log_prob[i] = -slope * temperature;
  }
  *call.loss = static_cast<float>(-sum / static_cast<double>(B));
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
