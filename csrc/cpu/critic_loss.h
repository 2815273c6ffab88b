// The loss that trains critics, the sum over networks of mean((q_n(x) - target)^2), each square times
// its row's weight, together with its gradients. As in denoising_loss.h a tile of rows goes forward and
// straight back again.
#pragma once

#include "mlp.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// What rows leave behind: a network's inputs of layers and deltas. Weight gradients want those of all
// rows; without any, a tile's are its own.
template <class Operand>
struct CriticRows {
  MlpSaved<Operand> saved;
  MlpDeltas<Operand> deltas;

  static CriticRows take(const MlpPack& shape, int64_t rows, Carver* memory) {
    using Input = typename Operand::Input;
    CriticRows r{};
    for (int l = 1; l < shape.layer_count; ++l)
      r.saved.input[l] = take_rows<Input>(memory, rows, shape.forward[l].in);
    r.deltas = MlpDeltas<Operand>::take(shape, rows, memory);
    return r;
  }

  CriticRows from(int64_t row, int layer_count) const {
    return {saved.from(row, layer_count), deltas.from(row, layer_count)};
  }
};

template <class Operand>
struct CriticTile {
  // Without weight gradients: for one network after the other.
  Rows<typename Operand::Input> input;
  CriticRows<Operand> rows;
  Rows<float> slope[max_layers];
  Rows<float> q, grad_x;

  static CriticTile take(const CriticLossCall& call, int rows, Carver* memory) {
    const MlpPack& shape = *call.networks[0];
    const int last = shape.layer_count - 1, own_rows = call.grad_weights ? 0 : rows;
    CriticTile t;
    t.input = take_input<Operand>(memory, own_rows, shape.forward[0].in);
    t.rows = CriticRows<Operand>::take(shape, own_rows, memory);
    for (int l = 0; l <= last; ++l) {
      t.slope[l] = {nullptr, 0};
      if (shape.activations[l] != Activation::identity)
        t.slope[l] = take_rows<float>(memory, rows, shape.forward[l].out);
    }
    t.q = take_rows<float>(memory, rows, shape.forward[last].out);
    t.grad_x = take_rows<float>(memory, rows, shape.forward[0].in);
    return t;
  }
};

// Network n on some rows, whose input is `x`, forward and back.
template <class Operand>
static void critic_loss_tile(const CriticLossCall& call, int n, Span span,
                             Rows<typename Operand::Input> x, const CriticRows<Operand>& rows,
                             const CriticTile<Operand>& tile, double* row_loss) {
  const MlpPack& pack = *call.networks[n];
  const int in = pack.forward[0].in, out = pack.forward[pack.layer_count - 1].out;
  MlpSaved<Operand> saved;
  for (int l = 0; l < pack.layer_count; ++l) {
    saved.input[l] = l == 0 ? x : rows.saved.input[l];
    saved.slope[l] = tile.slope[l];
  }
  const bool backward = call.grad_weights || call.grad_x;
  mlp_forward_tile(pack, span.rows, saved, tile.q, backward);

  write_rows(tile.q, span.rows, out, call.q + (n * call.batch + span.first) * out);
  squared_errors(tile.q, span, out, call.target, call.row_weight,
                 static_cast<double>(call.batch) * out, row_loss);
  if (!backward) return;

  mlp_backward_tile(pack, span.rows, saved, tile.q.data, tile.q.stride, rows.deltas,
                    call.grad_x ? tile.grad_x : Rows<float>{nullptr, 0});
  if (call.grad_x) add_rows(tile.grad_x, span.rows, in, n > 0, call.grad_x + span.first * in);
}

template <class Operand>
static void critic_loss(const CriticLossCall& call) {
  using Gradient = WeightGradient<typename Operand::Input>;
  const MlpPack& shape = *call.networks[0];
  const int layers = shape.layer_count;
  const int in = shape.forward[0].in, out = shape.forward[layers - 1].out;
  const bool keeps_rows = call.grad_weights != nullptr;
  CriticRows<Operand> rows[max_networks];
  Rows<typename Operand::Input> own_input;
  double* row_loss;  // [network][row]
  const auto take = [&](Carver* memory) {
    const int64_t kept = keeps_rows ? call.batch : 0;
    for (int n = 0; n < call.network_count; ++n)
      rows[n] = CriticRows<Operand>::take(shape, kept, memory);
    own_input = take_input<Operand>(memory, kept, in);
    row_loss = memory->take<double>(static_cast<int64_t>(sizeof(double)) * call.network_count *
                                    call.batch);
  };
  Carver memory{thread_scratch(Scratch::call, bytes_of(take))};
  take(&memory);
  const auto input = input_rows<Operand>(call.x, 0, in, own_input);  // filled tile by tile

  Gradient list[max_networks * max_layers];
  int gradients = 0;
  for (int n = 0; n < call.network_count && call.grad_weights; ++n) {
    rows[n].saved.input[0] = input;
    gradients += list_gradients(shape, rows[n].saved, rows[n].deltas, call.grad_weights + gradients,
                                call.grad_biases + gradients, list + gradients);
  }

  const Tiles tiles(call.batch, call.threads);
  const auto take_tile = [&](Carver* own) {
    return CriticTile<Operand>::take(call, tiles.most_rows, own);
  };
  const int64_t own_bytes =
      larger(bytes_of(take_tile), weight_gradient_bytes<typename Operand::Input>(call.batch));
  run_threads(tiles.threads, own_bytes, [&](const Carver own) {
    Carver of_tiles = own;
    const auto buffers = take_tile(&of_tiles);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Span span = tiles[tile];
      const auto x =
          input_rows<Operand>(call.x + span.first * in, span.rows, in,
                              keeps_rows ? rows_from(own_input, span.first) : buffers.input);
      for (int n = 0; n < call.network_count; ++n) {
        critic_loss_tile(call, n, span, x,
                         keeps_rows ? rows[n].from(span.first, layers) : buffers.rows, buffers,
                         row_loss + n * call.batch + span.first);
      }
    }
    if (call.grad_weights) weight_gradients(list, gradients, call.batch, tiles.threads, own);
  });

  float total = 0.0f;
  for (int n = 0; n < call.network_count; ++n) {
    double sum = 0.0;
    for (int64_t row = 0; row < call.batch; ++row) sum += row_loss[n * call.batch + row];
    total += static_cast<float>(sum / (static_cast<double>(call.batch) * out));
  }
  *call.loss = total;
}

static void critic_loss(const CriticLossCall& call) {
  with_operand(call.networks[0]->precision,
               [&](auto operand) { critic_loss<decltype(operand)>(call); });
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
