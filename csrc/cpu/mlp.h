// An MLP forward, and backward for its input, weights and biases.
//
// Forward and the way back to the input go tile by tile through all layers, as in the other ops. A
// weight's gradient is a sum over the whole batch, so there the work is cut by weights, not by rows:
// every element is summed by one thread in one order, and the result doesn't depend on their number.
#pragma once

#include "layers.h"

namespace diffcore {
namespace DIFFCORE_ISA {

static void carve_mlp(const MlpParameters& p, Carver* memory, MlpPack* pack) {
  pack->layer_count = p.layer_count;
  for (int l = 0; l < p.layer_count; ++l) {
    const LinearParameters& layer = p.layers[l];
    pack->activations[l] = p.activations[l];
    pack->forward[l] =
        pack_linear<Float32Operand>(layer, 0, layer.in, Direction::forward, true, memory);
    pack->backward[l] =
        pack_linear<Float32Operand>(layer, 0, layer.in, Direction::backward, false, memory);
  }
}

static int64_t mlp_pack_bytes(const MlpParameters& p) {
  Carver memory{nullptr};
  MlpPack pack;
  carve_mlp(p, &memory, &pack);
  return memory.used;
}

static void pack_mlp(const MlpParameters& p, void* block, MlpPack* pack) {
  Carver memory{static_cast<char*>(block)};
  carve_mlp(p, &memory, pack);
}

// What the forward pass leaves for the backward pass: every layer's input and its activation's
// slope. `input[l]` feeds layer l; `slope[l]` belongs to its output. All of a row lies together.
struct MlpSaved {
  Rows<float> input[max_layers];
  Rows<float> slope[max_layers];

  // Floats a row. An odd number of vectors, so that rows fall into different cache sets.
  static int width(const MlpPack& pack) {
    int total = 0;
    for (int l = 0; l < pack.layer_count; ++l) {
      total += padded(pack.forward[l].in);
      if (pack.activations[l] != Activation::identity) total += padded(pack.forward[l].out);
    }
    return total / W % 2 ? total : total + W;
  }

  static MlpSaved at(const MlpPack& pack, float* base) {
    MlpSaved s;
    const ptrdiff_t stride = width(pack);
    for (int l = 0; l < pack.layer_count; ++l) {
      s.input[l] = {base, stride};
      base += padded(pack.forward[l].in);
      s.slope[l] = {nullptr, 0};
      if (pack.activations[l] == Activation::identity) continue;
      s.slope[l] = {base, stride};
      base += padded(pack.forward[l].out);
    }
    return s;
  }
};

static int mlp_saved_width(const MlpPack& pack) { return MlpSaved::width(pack); }

DIFFCORE_INLINE Rows<float> rows_from(Rows<float> r, int64_t first) {
  return {r.data ? r.row(first) : nullptr, r.stride};
}

static void mlp_forward(const MlpCall& call) {
  const MlpPack& pack = *call.pack;
  const int last = pack.layer_count - 1;
  const int in = pack.forward[0].in, out = pack.forward[last].out;
  const int64_t tiles = tile_count(call.batch, call.threads);
  const int threads = tiles < call.threads ? static_cast<int>(tiles) : call.threads;
  const int most_rows = tile_span(call.batch, tiles, 0).rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // Without `saved` a tile's rows live in the thread's own memory.
    Carver sizes{nullptr};
    sizes.take<float>(static_cast<int64_t>(sizeof(float)) * most_rows * MlpSaved::width(pack));
    take_rows<float>(&sizes, most_rows, out);
    Carver memory{thread_scratch(Scratch::tile, sizes.used)};
    float* own =
        memory.take<float>(static_cast<int64_t>(sizeof(float)) * most_rows * MlpSaved::width(pack));
    const Rows<float> y = take_rows<float>(&memory, most_rows, out);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Span span = tile_span(call.batch, tiles, tile);
      const MlpSaved rows =
          MlpSaved::at(pack, call.saved ? call.saved + span.first * MlpSaved::width(pack) : own);
      copy_rows(call.x + span.first * in, in, span.rows, in, rows.input[0]);
      for (int l = 0; l <= last; ++l) {
        linear_activate<Float32Operand, Float32Operand>(
            rows.input[l], span.rows, pack.forward[l], bias_only(pack.forward[l]),
            activate_function<Float32Operand>(pack.activations[l]),
            l == last ? y : rows.input[l + 1],
            call.saved ? rows.slope[l] : Rows<float>{nullptr, 0});
      }
      write_rows(y, span.rows, out, call.y + span.first * out);
    }
  }
}

// ---- backward --------------------------------------------------------------------------------

// delta[l]: gradient at layer l's output before its activation.
struct MlpDeltas {
  Rows<float> delta[max_layers];
  Rows<float> grad_x;

  static MlpDeltas take(const MlpPack& pack, int64_t rows, Carver* memory) {
    MlpDeltas d;
    for (int l = 0; l < pack.layer_count; ++l)
      d.delta[l] = take_rows<float>(memory, rows, pack.forward[l].out);
    d.grad_x = take_rows<float>(memory, rows, pack.forward[0].in);
    return d;
  }
};

DIFFCORE_INLINE void multiply_rows(Rows<float> a, Rows<float> b, int rows, int columns) {
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < columns; n += W)
      store(a.row(i) + n, load(a.row(i) + n) * load(b.row(i) + n));
}

static void mlp_backward_tile(const MlpBackwardCall& call, Span span, const MlpSaved& saved,
                              const MlpDeltas& d) {
  const MlpPack& pack = *call.pack;
  const int last = pack.layer_count - 1;
  const int out = pack.forward[last].out;
  const Rows<float> top = rows_from(d.delta[last], span.first);
  copy_rows(call.grad_y + span.first * out, out, span.rows, out, top);
  if (saved.slope[last].data)
    multiply_rows(top, rows_from(saved.slope[last], span.first), span.rows, padded(out));
  for (int l = last; l >= 1; --l) {
    const Rows<float> below = rows_from(d.delta[l - 1], span.first);
    linear_store<Float32Operand>(rows_from(d.delta[l], span.first), span.rows, pack.backward[l],
                                 bias_only(pack.backward[l]), below);
    if (saved.slope[l - 1].data) {
      multiply_rows(below, rows_from(saved.slope[l - 1], span.first), span.rows,
                    padded(pack.forward[l - 1].out));
    }
  }
  if (!call.grad_x) return;
  const int in = pack.forward[0].in;
  const Rows<float> grad_x = rows_from(d.grad_x, span.first);
  linear_store<Float32Operand>(rows_from(d.delta[0], span.first), span.rows, pack.backward[0],
                               bias_only(pack.backward[0]), grad_x);
  write_rows(grad_x, span.rows, in, call.grad_x + span.first * in);
}

// A share of a layer's weight gradient: outputs first .. first + count - 1.
constexpr int weight_outputs = 4 * max_tile_rows;
constexpr int batch_chunk = 256;  // rows summed in registers before they join the total

DIFFCORE_INLINE int weight_blocks(const PackedLinear& layer) {
  return (layer.out + weight_outputs - 1) / weight_outputs;
}

// Sum of `count` floats, lane by lane and then over the lanes.
DIFFCORE_INLINE float sum_of(const float* values, int count) {
  Vec sum = zero();
  int k = 0;
  for (; k + W <= count; k += W) sum = sum + load(values + k);
  float lanes[W];
  store(lanes, sum);
  for (int l = 0; k < count; ++k, ++l) lanes[l] += values[k];
  for (int half = W / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Gradient of `count` outputs' weights and biases: sums over the batch of delta^T input, in chunks
// of rows so that a chunk's operands stay in cache and rounding errors don't pile up along the batch.
static void weight_gradient(const Rows<float> delta, const Rows<float> input, int64_t batch, int in,
                            int first, int count, float* transposed, float* total,
                            float* grad_weight, float* grad_bias) {
  const int columns = padded(in);
  for (int64_t i = 0; i < static_cast<int64_t>(count) * columns; ++i) total[i] = 0.0f;
  for (int n = 0; n < count; ++n) grad_bias[first + n] = 0.0f;
  alignas(64) float sums[max_tile_rows * panel_width];
  const float no_bias[panel_width] = {};
  for (int64_t start = 0; start < batch; start += batch_chunk) {
    const int depth = batch - start < batch_chunk ? static_cast<int>(batch - start) : batch_chunk;
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < count; ++n)
        transposed[n * batch_chunk + k] = delta.row(start + k)[first + n];
    for (int n = 0; n < count; ++n)
      grad_bias[first + n] += sum_of(transposed + n * batch_chunk, depth);
    for (int c = 0; c < columns; c += panel_width) {
      const int vectors = columns - c > W ? 2 : 1;
      const int limit = vectors == 2 ? max_tile_rows : max_narrow_rows;
      for (int n = 0; n < count; n += limit) {
        const int rows = count - n < limit ? count - n : limit;
        const auto function = vectors == 2 ? tile_function<Float32Operand>(rows)
                                           : narrow_function<Float32Operand>(rows);
        function(transposed + n * batch_chunk, batch_chunk, depth, input.row(start) + c,
                 input.stride, {no_bias, nullptr, 0}, sums, vectors * W);
        for (int i = 0; i < rows; ++i) {
          float* t = total + static_cast<int64_t>(n + i) * columns + c;
          for (int v = 0; v < vectors * W; v += W)
            store(t + v, load(t + v) + load(sums + i * vectors * W + v));
        }
      }
    }
  }
  for (int n = 0; n < count; ++n)
    memcpy(grad_weight + static_cast<int64_t>(first + n) * in,
           total + static_cast<int64_t>(n) * columns, sizeof(float) * static_cast<size_t>(in));
}

static void mlp_backward(const MlpBackwardCall& call) {
  const MlpPack& pack = *call.pack;
  const MlpSaved saved = MlpSaved::at(pack, const_cast<float*>(call.saved));
  Carver sizes{nullptr};
  MlpDeltas::take(pack, call.batch, &sizes);
  Carver memory{thread_scratch(Scratch::call, sizes.used)};
  const MlpDeltas deltas = MlpDeltas::take(pack, call.batch, &memory);

  const int64_t tiles = tile_count(call.batch, call.threads);
  int blocks = 0, widest = 0;
  for (int l = 0; l < pack.layer_count; ++l) {
    blocks += weight_blocks(pack.forward[l]);
    widest = pack.forward[l].in > widest ? pack.forward[l].in : widest;
  }
  const int threads = tiles < call.threads ? static_cast<int>(tiles) : call.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile)
      mlp_backward_tile(call, tile_span(call.batch, tiles, tile), saved, deltas);

    if (call.grad_weights) {
      Carver tile_memory{thread_scratch(
          Scratch::tile,
          4 * weight_outputs * (batch_chunk + static_cast<int64_t>(padded(widest))))};
      float* transposed = tile_memory.take<float>(4 * weight_outputs * batch_chunk);
      float* total = tile_memory.take<float>(4 * weight_outputs * padded(widest));
#pragma omp for schedule(dynamic, 1)
      for (int block = 0; block < blocks; ++block) {
        int l = 0, index = block;
        while (index >= weight_blocks(pack.forward[l])) index -= weight_blocks(pack.forward[l++]);
        const int first = index * weight_outputs, left = pack.forward[l].out - first;
        weight_gradient(deltas.delta[l], saved.input[l], call.batch, pack.forward[l].in, first,
                        left < weight_outputs ? left : weight_outputs, transposed, total,
                        call.grad_weights[l], call.grad_biases[l]);
      }
    }
  }
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
