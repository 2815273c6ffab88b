// MLPs forward, and backward for their input, weights and biases: one or several of the same shape
// on the same rows (twin critics, ensembles).
//
// Forward and the way back to the input go tile by tile through all layers, as in the other ops; the
// sums over the batch that weights want come last, see weight_gradient.h.
//
// In bfloat16 both sides of every product are rounded: the input, every layer's activation, the
// weights, and on the way back the deltas. Sums, biases, slopes and all results are float32.
#pragma once

#include "operand.h"
#include "team.h"
#include "weight_gradient.h"

namespace diffcore {
namespace DIFFCORE_ISA {

template <class Operand>
static void carve_mlp(const MlpParameters& p, Carver* memory, MlpPack* pack, Packer packer) {
  pack->layer_count = p.layer_count;
  pack->precision = p.precision;
  for (int l = 0; l < p.layer_count; ++l) {
    const LinearParameters& layer = p.layers[l];
    const bool backward = p.backward && (l > 0 || p.backward_to_input);
    pack->activations[l] = p.activations[l];
    pack->forward[l] = {nullptr, nullptr, layer.in, layer.out};
    pack->backward[l] = {nullptr, nullptr, layer.out, layer.in};
    if (p.forward) {
      pack->forward[l] =
          pack_linear<Operand>(layer, 0, layer.in, Direction::forward, true, packer, memory);
    }
    if (backward) {
      pack->backward[l] =
          pack_linear<Operand>(layer, 0, layer.in, Direction::backward, false, packer, memory);
    }
  }
}

static void carve_mlp(const MlpParameters& p, Carver* memory, MlpPack* pack, Packer packer) {
  with_operand(p.precision,
               [&](auto operand) { carve_mlp<decltype(operand)>(p, memory, pack, packer); });
}

static int64_t mlp_pack_bytes(const MlpParameters& p) {
  MlpPack pack;
  return bytes_of([&](Carver* memory) { carve_mlp(p, memory, &pack, Packer()); });
}

static void pack_mlp(const MlpParameters& p, void* block, MlpPack* pack) {
  pack_by_team(p.layers[0].threads, mlp_pack_bytes(p), 0, block, pack,
               [&](Carver* memory, MlpPack* pieces, Team* team, Carver) {
                 carve_mlp(p, memory, pieces, team->packer());
               });
}

// Distance of two rows of what a layer saves: whole vectors on every instruction set, since
// torch.compile keeps the shape in graphs on disk.
static int saved_stride(const PackedLinear& layer) { return round_up(layer.out, line); }

// Floats of `values` rounded activations or of as many floats.
static int64_t saved_floats(const MlpPack& pack, int64_t values) {
  return pack.precision == Precision::bfloat16 ? values / 2 : values;
}

// Floats a row of what a forward pass saves.
static int mlp_saved_width(const MlpPack& pack) {
  int total = 0;
  for (int l = 0; l < pack.layer_count; ++l) {
    const int stride = saved_stride(pack.forward[l]);
    if (l + 1 < pack.layer_count) total += static_cast<int>(saved_floats(pack, stride));
    if (pack.activations[l] != Activation::identity) total += stride;
  }
  return total;
}

// What a network's forward pass leaves for its backward pass: every layer's activation, which is the
// next one's input, and its slope. The first layer's input is the caller's to set.
template <class Operand>
struct MlpSaved {
  using Input = typename Operand::Input;
  Rows<Input> input[max_layers];
  Rows<float> slope[max_layers];

  // In memory of mlp_saved_width() floats a row; without any, nowhere.
  static MlpSaved at(const MlpPack& pack, float* base, int64_t rows) {
    MlpSaved s;
    s.input[0] = {nullptr, 0};
    for (int l = 0; l < pack.layer_count; ++l) {
      const ptrdiff_t stride = saved_stride(pack.forward[l]);
      if (l + 1 < pack.layer_count) {
        s.input[l + 1] = {reinterpret_cast<Input*>(base), stride};
        if (base) base += saved_floats(pack, rows * stride);
      }
      s.slope[l] = {nullptr, 0};
      if (pack.activations[l] == Activation::identity) continue;
      s.slope[l] = {base, stride};
      if (base) base += rows * stride;
    }
    return s;
  }

  MlpSaved from(int64_t row, int layer_count) const {
    MlpSaved s;
    for (int l = 0; l < layer_count; ++l) {
      s.input[l] = rows_from(input[l], row);
      s.slope[l] = rows_from(slope[l], row);
    }
    return s;
  }
};

// Memory for rows of a network's input. Float32 products read them where the caller has them.
template <class Operand>
DIFFCORE_INLINE Rows<typename Operand::Input> take_input(Carver* memory, int64_t rows, int in) {
  const bool copies = Operand::precision == Precision::bfloat16;
  return take_rows<typename Operand::Input>(memory, copies ? rows : 0, in);
}

// Rows of the caller's x as the first product reads them: as they are, or rounded, in `own`.
template <class Operand>
DIFFCORE_INLINE Rows<typename Operand::Input> input_rows(const float* x, int64_t rows, int in,
                                                         Rows<typename Operand::Input> own) {
  if constexpr (Operand::precision == Precision::float32) {
    (void)rows, (void)own;
    return {const_cast<float*>(x), in};
  } else {
    convert_rows<Operand>(x, in, rows, in, own);
    return own;
  }
}

// y = network(saved.input[0]); slopes are kept where the backward pass will want them.
template <class Operand>
DIFFCORE_INLINE void mlp_forward_tile(const MlpPack& pack, int rows, const MlpSaved<Operand>& saved,
                                      Rows<float> y, bool keep_slopes) {
  const int last = pack.layer_count - 1;
  const Reach reach = keep_slopes ? Reach::far : Reach::near;
  for (int l = 0; l <= last; ++l) {
    const PackedLinear& layer = pack.forward[l];
    const Rows<float> slope = keep_slopes ? saved.slope[l] : Rows<float>{nullptr, 0};
    if (l == last) {
      linear_activate<Operand, Float32Operand>(
          saved.input[l], rows, layer, bias_only(layer),
          activate_function<Float32Operand>(pack.activations[l]), y, slope, reach);
    } else {
      linear_activate<Operand, Operand>(saved.input[l], rows, layer, bias_only(layer),
                                        activate_function<Operand>(pack.activations[l]),
                                        saved.input[l + 1], slope, reach);
    }
  }
}

template <class Operand>
struct MlpTile {
  float* saved;  // where the call keeps none
  Rows<typename Operand::Input> input;
  Rows<float> y;

  static MlpTile take(const MlpCall& call, int rows, Carver* memory) {
    const MlpPack& shape = *call.networks[0];
    const int64_t width = call.saved ? 0 : mlp_saved_width(shape);
    MlpTile t;
    t.saved = memory->take<float>(static_cast<int64_t>(sizeof(float)) * rows * width);
    t.input = take_input<Operand>(memory, rows, shape.forward[0].in);
    t.y = take_rows<float>(memory, rows, shape.forward[shape.layer_count - 1].out);
    return t;
  }
};

template <class Operand>
static void mlp_forward(const MlpCall& call) {
  const MlpPack& shape = *call.networks[0];
  const int in = shape.forward[0].in, out = shape.forward[shape.layer_count - 1].out;
  const int64_t width = mlp_saved_width(shape);
  const Tiles tiles(call.batch, call.threads);
  const auto take = [&](Carver* memory) {
    return MlpTile<Operand>::take(call, tiles.most_rows, memory);
  };
  run_threads(tiles.threads, bytes_of(take), [&](Carver memory) {
    const auto buffers = take(&memory);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Span span = tiles[tile];
      const auto x = input_rows<Operand>(call.x + span.first * in, span.rows, in, buffers.input);
      for (int q = 0; q < call.network_count; ++q) {
        const MlpPack& pack = *call.networks[q];
        auto saved = call.saved ? MlpSaved<Operand>::at(pack, call.saved + q * call.batch * width,
                                                        call.batch)
                                      .from(span.first, pack.layer_count)
                                : MlpSaved<Operand>::at(pack, buffers.saved, tiles.most_rows);
        saved.input[0] = x;
        mlp_forward_tile(pack, span.rows, saved, buffers.y, call.saved != nullptr);
        write_rows(buffers.y, span.rows, out, call.y + (q * call.batch + span.first) * out);
      }
    }
  });
}

static void mlp_forward(const MlpCall& call) {
  with_operand(call.networks[0]->precision,
               [&](auto operand) { mlp_forward<decltype(operand)>(call); });
}

// ---- backward --------------------------------------------------------------------------------

// delta[l]: gradient at layer l's output before its activation.
template <class Operand>
struct MlpDeltas {
  Rows<typename Operand::Input> delta[max_layers];

  static MlpDeltas take(const MlpPack& pack, int64_t rows, Carver* memory) {
    MlpDeltas d;
    for (int l = 0; l < pack.layer_count; ++l)
      d.delta[l] = take_rows<typename Operand::Input>(memory, rows, pack.forward[l].out);
    return d;
  }

  MlpDeltas from(int64_t row, int layer_count) const {
    MlpDeltas d;
    for (int l = 0; l < layer_count; ++l) d.delta[l] = rows_from(delta[l], row);
    return d;
  }
};

// From the gradient at the network's output to every layer's delta and, where `grad_x` has memory, to
// the gradient at the input.
template <class Operand>
DIFFCORE_INLINE void mlp_backward_tile(const MlpPack& pack, int rows,
                                       const MlpSaved<Operand>& saved, const float* grad_y,
                                       ptrdiff_t grad_y_stride, const MlpDeltas<Operand>& d,
                                       Rows<float> grad_x) {
  const int last = pack.layer_count - 1;
  convert_rows<Operand>(grad_y, grad_y_stride, rows, pack.forward[last].out, d.delta[last],
                        saved.slope[last]);
  for (int l = last; l >= 1; --l) {
    linear_multiply<Operand, Operand>(d.delta[l], rows, pack.backward[l], saved.slope[l - 1],
                                      d.delta[l - 1]);
  }
  if (grad_x.data) {
    linear_store<Operand>(d.delta[0], rows, pack.backward[0], bias_only(pack.backward[0]), grad_x);
  }
}

template <class Operand>
struct MlpBackwardTile {
  Rows<float> grad_x;
  MlpDeltas<Operand> deltas;  // without weight gradients, which want those of all rows

  static MlpBackwardTile take(const MlpBackwardCall& call, int rows, Carver* memory) {
    const MlpPack& shape = *call.networks[0];
    MlpBackwardTile t;
    t.grad_x = take_rows<float>(memory, rows, shape.forward[0].in);
    t.deltas = MlpDeltas<Operand>::take(shape, call.grad_weights ? 0 : rows, memory);
    return t;
  }
};

// Enters a network's layers in a list; returns their number.
template <class Operand>
static int list_gradients(const MlpPack& shape, const MlpSaved<Operand>& saved,
                          const MlpDeltas<Operand>& deltas, float* const* weights,
                          float* const* biases, WeightGradient<typename Operand::Input>* list) {
  for (int l = 0; l < shape.layer_count; ++l) {
    list[l] = {deltas.delta[l],      saved.input[l], shape.forward[l].in,
               shape.forward[l].out, weights[l],     biases[l]};
  }
  return shape.layer_count;
}

template <class Operand>
static void mlp_backward(const MlpBackwardCall& call) {
  using Gradient = WeightGradient<typename Operand::Input>;
  const MlpPack& shape = *call.networks[0];
  const int layers = shape.layer_count;
  const int in = shape.forward[0].in, out = shape.forward[layers - 1].out;
  const int64_t width = mlp_saved_width(shape);

  // The input, every network's deltas, and the list of gradients in the order of call.grad_weights.
  const auto list_bytes = static_cast<int64_t>(sizeof(Gradient)) * call.network_count * layers;
  const int64_t kept = call.grad_weights ? call.batch : 0;
  const int64_t deltas_bytes =
      bytes_of([&](Carver* memory) { MlpDeltas<Operand>::take(shape, kept, memory); });
  Carver sizes{nullptr};
  take_input<Operand>(&sizes, kept, in);
  sizes.take<Gradient>(list_bytes);
  sizes.take<char>(deltas_bytes * call.network_count);
  Carver memory{thread_scratch(Scratch::call, sizes.used)};
  const auto own_input = take_input<Operand>(&memory, kept, in);
  auto* list = memory.take<Gradient>(list_bytes);
  char* const deltas_memory = memory.take<char>(deltas_bytes * call.network_count);

  const auto deltas_of = [&](int q) {
    Carver own{deltas_memory + q * deltas_bytes};
    return MlpDeltas<Operand>::take(shape, kept, &own);
  };
  const auto saved_of = [&](int q) {
    return MlpSaved<Operand>::at(shape, const_cast<float*>(call.saved) + q * call.batch * width,
                                 call.batch);
  };
  for (int q = 0; q < call.network_count; ++q) {
    if (!call.grad_weights) break;
    auto saved = saved_of(q);
    saved.input[0] = input_rows<Operand>(call.x, 0, in, own_input);  // filled tile by tile
    list_gradients(shape, saved, deltas_of(q), call.grad_weights + q * layers,
                   call.grad_biases + q * layers, list + q * layers);
  }

  const Tiles tiles(call.batch, call.threads);
  const auto take = [&](Carver* own) {
    return MlpBackwardTile<Operand>::take(call, tiles.most_rows, own);
  };
  const int64_t own_bytes =
      larger(bytes_of(take), weight_gradient_bytes<typename Operand::Input>(call.batch));
  run_threads(tiles.threads, own_bytes, [&](const Carver own) {
    Carver of_tiles = own;
    const auto buffers = take(&of_tiles);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Span span = tiles[tile];
      if (call.grad_weights) {
        input_rows<Operand>(call.x + span.first * in, span.rows, in,
                            rows_from(own_input, span.first));
      }
      for (int q = 0; q < call.network_count; ++q) {
        const MlpPack& pack = *call.networks[q];
        mlp_backward_tile(
            pack, span.rows, saved_of(q).from(span.first, layers),
            call.grad_y + (q * call.batch + span.first) * out, out,
            call.grad_weights ? deltas_of(q).from(span.first, layers) : buffers.deltas,
            call.grad_x ? buffers.grad_x : Rows<float>{nullptr, 0});
        if (!call.grad_x) continue;
        add_rows(buffers.grad_x, span.rows, in, q > 0, call.grad_x + span.first * in);
      }
    }
    if (call.grad_weights)
      weight_gradients(list, call.network_count * layers, call.batch, tiles.threads, own);
  });
}

static void mlp_backward(const MlpBackwardCall& call) {
  with_operand(call.networks[0]->precision,
               [&](auto operand) { mlp_backward<decltype(operand)>(call); });
}

// ---- squared errors, of which losses are made ---------------------------------------------------

// Each row's |y - target|^2, times its weight (null: 1). Where a loss is their sum by `entries`, its slopes
// at y take y's place.
static void squared_errors(Rows<float> y, Span span, int columns, const float* target,
                           const float* row_weight, double entries, double* row_loss) {
  const float scale = static_cast<float>(2.0 / entries);
  for (int i = 0; i < span.rows; ++i) {
    const int64_t row = span.first + i;
    const float weight = row_weight ? row_weight[row] : 1.0f;
    const float slope = scale * weight;
    double loss = 0.0;
    for (int c = 0; c < columns; ++c) {
      float* const value = y.row(i) + c;
      const float residual = *value - target[row * columns + c];
      loss += static_cast<double>(residual) * residual;
      *value = slope * residual;
    }
    row_loss[i] = weight * loss;
  }
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
