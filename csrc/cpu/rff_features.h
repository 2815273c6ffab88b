// Random Fourier features, scale * f(x omega^T + bias) with f = sin, cos or both, and their gradients.
//
// Forward, a block of arguments is turned into features while it lies in L1. What the way back needs
// is the slope, scale * f'(argument), which costs little beside the feature itself; for the pair of
// cosine and sine the features are each other's slopes.
#pragma once

#include "team.h"
#include "weight_gradient.h"

namespace diffcore {
namespace DIFFCORE_ISA {

static PackedLinear carve_layer(const LinearParameters& layer, bool transposed, Packer packer,
                                Carver* memory) {
  return pack_linear<Float32Operand>(layer, 0, layer.in,
                                     transposed ? Direction::backward : Direction::forward,
                                     !transposed && layer.bias, packer, memory);
}

static int64_t layer_pack_bytes(const LinearParameters& layer, bool transposed) {
  return bytes_of([&](Carver* memory) { carve_layer(layer, transposed, Packer(), memory); });
}

static void pack_layer(const LinearParameters& layer, bool transposed, void* block,
                       PackedLinear* pack) {
  pack_by_team(layer.threads, layer_pack_bytes(layer, transposed), 0, block, pack,
               [&](Carver* memory, PackedLinear* packed, Team* team, Carver) {
                 *packed = carve_layer(layer, transposed, team->packer(), memory);
               });
}

static void rff_features(const RffCall& call) {
  const PackedLinear& layer = *call.layer;
  const int features = layer.out;
  const int width = call.kind == RffKind::cos_sin ? 2 * features : features;
  const Vec scale = broadcast(call.scale), minus_scale = broadcast(-call.scale);
  const Tiles tiles(call.batch, call.threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(tiles.threads) if (tiles.threads > 1)
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const Span span = tiles[tile];
    const Rows<float> features_out = {call.y + span.first * width, width};
    const Rows<float> slope_out = {call.slope ? call.slope + span.first * features : nullptr,
                                   features};
    linear<Float32Operand>(
        call.x + span.first * layer.in, layer.in, span.rows, layer, bias_only(layer),
        [&](int row, int count, int column, int columns) {
          prefetch_block(features_out, row, count, column, columns);
          prefetch_block(slope_out, row, count, column, columns);
        },
        [&](int row, int count, int column, int columns, const float* sums, ptrdiff_t stride) {
          for (int i = 0; i < count; ++i) {
            float* y = features_out.row(row + i) + column;
            float* slope = slope_out.data ? slope_out.row(row + i) + column : nullptr;
            for (int n = 0; n < columns && column + n < features; n += W) {
              const int left = features - column - n;
              Vec sine, cosine;
              sincos(load(sums + i * stride + n), &sine, &cosine);
              if (call.kind == RffKind::cos_sin) {
                store_some(y + n, scale * cosine, left);
                store_some(y + features + n, scale * sine, left);
              } else if (call.kind == RffKind::sin) {
                store_some(y + n, scale * sine, left);
                if (slope) store_some(slope + n, scale * cosine, left);
              } else {
                store_some(y + n, scale * cosine, left);
                if (slope) store_some(slope + n, minus_scale * sine, left);
              }
            }
          }
        });
  }
}

// Gradient at the arguments: grad_y times the slope, for the pair g_sin y_cos - g_cos y_sin.
DIFFCORE_INLINE void rff_argument_gradient(const RffBackwardCall& call, Span span,
                                           Rows<float> delta) {
  const int features = call.features;
  const bool pair = call.kind == RffKind::cos_sin;
  const int width = pair ? 2 * features : features;
  for (int64_t r = span.first; r < span.first + span.rows; ++r) {
    const float* g = call.grad_y + r * width;
    const float* s = call.saved + r * width;
    for (int n = 0; n < features; n += W) {
      const int left = features - n;
      Vec d;
      if (pair) {
        d = load_some(g + features + n, left) * load_some(s + n, left) -
            load_some(g + n, left) * load_some(s + features + n, left);
      } else {
        d = load_some(g + n, left) * load_some(s + n, left);
      }
      store(delta.row(r) + n, d);
    }
  }
}

static void rff_features_backward(const RffBackwardCall& call) {
  const int in = call.in, features = call.features;
  const Tiles tiles(call.batch, call.threads);
  const auto take_delta = [&](Carver* m) { return take_rows<float>(m, call.batch, features); };
  Carver memory{thread_scratch(Scratch::call, bytes_of(take_delta))};
  const Rows<float> delta = take_delta(&memory);
  const Rows<float> x = {const_cast<float*>(call.x), in};
  const WeightGradient<float> omega = {delta, x, in, features, call.grad_omega, call.grad_bias};

  const auto take = [&](Carver* own) { return take_rows<float>(own, tiles.most_rows, in); };
  const int64_t own_bytes = larger(bytes_of(take), weight_gradient_bytes<float>(call.batch));
  run_threads(tiles.threads, own_bytes, [&](const Carver own) {
    Carver of_tiles = own;
    const Rows<float> grad_x = take(&of_tiles);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Span span = tiles[tile];
      rff_argument_gradient(call, span, delta);
      if (!call.grad_x) continue;
      linear_store<Float32Operand>(rows_from(delta, span.first), span.rows, *call.layer,
                                   bias_only(*call.layer), grad_x);
      write_rows(grad_x, span.rows, in, call.grad_x + span.first * in);
    }
    if (call.grad_omega) weight_gradients(&omega, 1, call.batch, tiles.threads, own);
  });
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
