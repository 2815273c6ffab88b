// The loss that trains a denoiser, mean over all entries of (z - eps(x_t, state, t))^2 with
// x_t = sqrt(abar_t) a + sqrt(1 - abar_t) z, each times its row's weight, together with its gradients.
//
// The loss is a scalar, so its gradients are known up to a factor as soon as it is: a tile of rows
// goes forward and straight back again, while its activations are in cache. Losses of rows are summed
// up later, with factors that nobody knows yet: they are had without gradients first, and in a second
// call, in which the factors are the rows' weights, with them.
#pragma once

#include "mlp.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// What rows leave behind. Weight gradients want that of all rows; without any, a tile's is its own.
template <class Operand>
struct DenoisingRows {
  using Input = typename Operand::Input;
  Rows<Input> embedding;    // the time MLP's input
  Rows<Input> trunk_input;  // [x_t, time features, state]
  MlpSaved<Operand> time_saved, trunk_saved;
  MlpDeltas<Operand> time_deltas, trunk_deltas;

  static DenoisingRows take(const DenoisingLossCall& call, int64_t rows, Carver* memory) {
    const MlpPack &time = *call.time_mlp, &trunk = *call.trunk;
    const auto saved = [&](const MlpPack& pack, Rows<Input> x) {
      const int64_t bytes = static_cast<int64_t>(sizeof(float)) * rows * mlp_saved_width(pack);
      auto s = MlpSaved<Operand>::at(pack, memory->take<float>(bytes), rows);
      s.input[0] = x;
      return s;
    };
    DenoisingRows r;
    r.embedding = take_rows<Input>(memory, rows, time.forward[0].in);
    r.trunk_input = take_rows<Input>(memory, rows, trunk.forward[0].in);
    r.time_saved = saved(time, r.embedding);
    r.trunk_saved = saved(trunk, r.trunk_input);
    r.time_deltas = MlpDeltas<Operand>::take(time, rows, memory);
    r.trunk_deltas = MlpDeltas<Operand>::take(trunk, rows, memory);
    return r;
  }

  DenoisingRows from(const DenoisingLossCall& call, int64_t row) const {
    const int time = call.time_mlp->layer_count, trunk = call.trunk->layer_count;
    return {rows_from(embedding, row),   rows_from(trunk_input, row),
            time_saved.from(row, time),  trunk_saved.from(row, trunk),
            time_deltas.from(row, time), trunk_deltas.from(row, trunk)};
  }
};

template <class Operand>
struct DenoisingTile {
  DenoisingRows<Operand> rows;  // without weight gradients
  Rows<float> time_features, trunk_input, eps, grad_input;

  static DenoisingTile take(const DenoisingLossCall& call, int rows, Carver* memory) {
    const int in = call.trunk->forward[0].in;
    DenoisingTile t;
    t.rows = DenoisingRows<Operand>::take(call, call.grad_weights ? 0 : rows, memory);
    t.time_features = take_rows<float>(memory, rows, call.time_dim);
    t.trunk_input = take_rows<float>(memory, rows, in);
    t.eps = take_rows<float>(memory, rows, call.action_dim);
    t.grad_input = take_rows<float>(memory, rows, in);
    return t;
  }
};

// The number of entries whose squares' mean is a loss.
static double entries_of_loss(const DenoisingLossCall& call) {
  return static_cast<double>(call.per_row ? 1 : call.batch) * call.action_dim;
}

template <class Operand>
static void denoising_loss_tile(const DenoisingLossCall& call, Span span,
                                const DenoisingRows<Operand>& rows,
                                const DenoisingTile<Operand>& tile, double* row_loss,
                                bool backward) {
  const MlpPack &time = *call.time_mlp, &trunk = *call.trunk;
  const int A = call.action_dim, E = call.time_dim, S = call.state_dim;
  const auto bytes = [](int floats) { return sizeof(float) * static_cast<size_t>(floats); };

  for (int i = 0; i < span.rows; ++i) {
    convert_rows<Operand>(call.embedding + call.t[span.first + i] * E, E, 1, E,
                          rows_from(rows.embedding, i));
  }
  mlp_forward_tile(time, span.rows, rows.time_saved, tile.time_features, backward);

  for (int i = 0; i < span.rows; ++i) {
    const int64_t row = span.first + i;
    const float* level = call.levels + 2 * call.t[row];
    float* input = tile.trunk_input.row(i);
    for (int n = 0; n < A; ++n)
      input[n] = level[0] * call.action[row * A + n] + level[1] * call.noise[row * A + n];
    memcpy(input + A, tile.time_features.row(i), bytes(E));
    memcpy(input + A + E, call.state + row * S, bytes(S));
  }
  convert_rows<Operand>(tile.trunk_input.data, tile.trunk_input.stride, span.rows, A + E + S,
                        rows.trunk_input);
  mlp_forward_tile(trunk, span.rows, rows.trunk_saved, tile.eps, backward);

  squared_errors(tile.eps, span, A, call.noise, call.weight, entries_of_loss(call), row_loss);
  if (!backward) return;

  mlp_backward_tile(trunk, span.rows, rows.trunk_saved, tile.eps.data, tile.eps.stride,
                    rows.trunk_deltas, tile.grad_input);
  for (int i = 0; i < span.rows; ++i) {
    const int64_t row = span.first + i;
    const float* grad_input = tile.grad_input.row(i);
    if (call.grad_state) memcpy(call.grad_state + row * S, grad_input + A + E, bytes(S));
    if (call.grad_action) {
      const float level = call.levels[2 * call.t[row]];
      for (int n = 0; n < A; ++n) call.grad_action[row * A + n] = level * grad_input[n];
    }
  }
  mlp_backward_tile(time, span.rows, rows.time_saved, tile.grad_input.data + A,
                    tile.grad_input.stride, rows.time_deltas, {nullptr, 0});
}

template <class Operand>
static void denoising_loss(const DenoisingLossCall& call) {
  const bool keeps_rows = call.grad_weights != nullptr;
  double* row_loss;
  const auto take = [&](Carver* memory) {
    row_loss = memory->take<double>(static_cast<int64_t>(sizeof(double)) * call.batch);
    return DenoisingRows<Operand>::take(call, keeps_rows ? call.batch : 0, memory);
  };
  Carver memory{thread_scratch(Scratch::call, bytes_of(take))};
  const auto all = take(&memory);

  WeightGradient<typename Operand::Input> list[2 * max_layers];
  int gradients = 0;
  if (call.grad_weights) {
    gradients = list_gradients(*call.time_mlp, all.time_saved, all.time_deltas, call.grad_weights,
                               call.grad_biases, list);
    gradients += list_gradients(*call.trunk, all.trunk_saved, all.trunk_deltas,
                                call.grad_weights + gradients, call.grad_biases + gradients,
                                list + gradients);
  }
  const bool backward = call.grad_weights || call.grad_state || call.grad_action;
  const Tiles tiles(call.batch, call.threads);
  const auto take_tile = [&](Carver* own) {
    return DenoisingTile<Operand>::take(call, tiles.most_rows, own);
  };
  const int64_t own_bytes =
      larger(bytes_of(take_tile), weight_gradient_bytes<typename Operand::Input>(call.batch));
  run_threads(tiles.threads, own_bytes, [&](const Carver own) {
    Carver of_tiles = own;
    const auto buffers = take_tile(&of_tiles);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Span span = tiles[tile];
      denoising_loss_tile(call, span, keeps_rows ? all.from(call, span.first) : buffers.rows,
                          buffers, row_loss + span.first, backward);
    }
    if (call.grad_weights) weight_gradients(list, gradients, call.batch, tiles.threads, own);
  });
  const double entries = entries_of_loss(call);
  if (call.per_row) {
    for (int64_t row = 0; row < call.batch; ++row)
      call.loss[row] = static_cast<float>(row_loss[row] / entries);
    return;
  }
  double sum = 0.0;
  for (int64_t row = 0; row < call.batch; ++row) sum += row_loss[row];
  *call.loss = static_cast<float>(sum / entries);
}

static void denoising_loss(const DenoisingLossCall& call) {
  with_operand(call.trunk->precision,
               [&](auto operand) { denoising_loss<decltype(operand)>(call); });
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
