// One step of Adam (Kingma and Ba 2015, Algorithm 1), operation by operation as torch's fused kernel
// rounds it.
#pragma once

#include "layers.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// A vector of gradient g, and what lies at its place in a parameter and its moments.
DIFFCORE_INLINE void adam_vector(const AdamScalars& s, Vec g, float* value, float* exp_avg,
                                 float* exp_avg_sq) {
  const Vec before = load(exp_avg);
  const Vec m = fma(broadcast(s.exp_avg_weight), g - before, before);
  const Vec v =
      fma(broadcast(s.exp_avg_sq_weight) * g, g, broadcast(s.exp_avg_sq_decay) * load(exp_avg_sq));
  store(exp_avg, m);
  store(exp_avg_sq, v);
  const Vec denominator = sqrt(v) / broadcast(s.root_correction) + broadcast(s.eps);
  store(value, load(value) - broadcast(s.step_size) * m / denominator);
}

// The same where only the first `count` lanes exist.
static void adam_lanes(const AdamScalars& s, Vec g, float* value, float* exp_avg, float* exp_avg_sq,
                       int count) {
  float* const lanes[3] = {value, exp_avg, exp_avg_sq};
  float copies[3][W] = {};
  const size_t bytes = sizeof(float) * static_cast<size_t>(count);
  for (int i = 0; i < 3; ++i) memcpy(copies[i], lanes[i], bytes);
  adam_vector(s, g, copies[0], copies[1], copies[2]);
  for (int i = 0; i < 3; ++i) memcpy(lanes[i], copies[i], bytes);
}

DIFFCORE_INLINE double sum_of_lanes(Vec a) {
  float lanes[W];
  store(lanes, a);
  double sum = 0.0;
  for (int l = 0; l < W; ++l) sum += static_cast<double>(lanes[l]);
  return sum;
}

constexpr int64_t adam_piece = 4096;  // values that one thread steps at a time

// Values first .. end - 1 of a parameter; returns the sum of their gradients' squares.
static double adam_range(const AdamParameter& p, const float* gradient, int64_t first,
                         int64_t end) {
  Vec squares = zero();
  int64_t i = first;
  for (; i + W <= end; i += W) {
    const Vec g = load(gradient + i);
    squares = fma(g, g, squares);
    adam_vector(p.scalars, g, p.value + i, p.exp_avg + i, p.exp_avg_sq + i);
  }
  if (i < end) {
    const int count = static_cast<int>(end - i);
    const Vec g = load_some(gradient + i, count);
    squares = fma(g, g, squares);
    adam_lanes(p.scalars, g, p.value + i, p.exp_avg + i, p.exp_avg_sq + i, count);
  }
  return sum_of_lanes(squares);
}

// Pieces are summed in float, four vectors side by side, and their sums in double.
static double sum_of_squares(const float* values, int64_t count) {
  double total = 0.0;
  while (count > 0) {
    const int64_t piece = count < adam_piece ? count : adam_piece;
    Vec squares[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * W <= piece; i += 4 * W) {
      for (int v = 0; v < 4; ++v) {
        const Vec value = load(values + i + v * W);
        squares[v] = fma(value, value, squares[v]);
      }
    }
    total += sum_of_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < piece; ++i) total += static_cast<double>(values[i]) * values[i];
    values += piece;
    count -= piece;
  }
  return total;
}

static void adam(const AdamCall& call) {
  const auto pieces_of = [&](int p) {
    return call.gradients[p] ? ceil_div(call.sizes[p], adam_piece) : 0;
  };
  int64_t pieces = 0;
  for (int p = 0; p < call.count; ++p) pieces += pieces_of(p);
  auto* squares = reinterpret_cast<double*>(
      thread_scratch(Scratch::call, static_cast<int64_t>(sizeof(double)) * pieces));
#pragma omp parallel for schedule(static) \
    num_threads(call.threads) if (call.threads > 1 && pieces > 1)
  for (int64_t item = 0; item < pieces; ++item) {
    int p = 0;
    int64_t piece = item;
    while (piece >= pieces_of(p)) piece -= pieces_of(p++);
    const int64_t first = piece * adam_piece, end = first + adam_piece;
    squares[item] = adam_range(call.parameters[p], call.gradients[p], first,
                               end < call.sizes[p] ? end : call.sizes[p]);
  }
  for (int64_t item = 0; item < pieces; ++item) *call.squared_norm += squares[item];
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
