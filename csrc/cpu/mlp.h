// MLPs forward, and backward for their input, weights and biases: one or several of the same shape
// on the same rows (twin critics, ensembles).
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
    const bool backward = p.backward && (l > 0 || p.backward_to_input);
    pack->activations[l] = p.activations[l];
    pack->forward[l] = {nullptr, nullptr, layer.in, layer.out};
    pack->backward[l] = {nullptr, nullptr, layer.out, layer.in};
    if (p.forward) {
      pack->forward[l] =
          pack_linear<Float32Operand>(layer, 0, layer.in, Direction::forward, true, memory);
    }
    if (backward) {
      pack->backward[l] =
          pack_linear<Float32Operand>(layer, 0, layer.in, Direction::backward, false, memory);
    }
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

// What a network's forward pass leaves for its backward pass: every layer's activation, which is the
// next one's input, and its slope. The first layer's input is the caller's.
struct MlpSaved {
  Rows<float> input[max_layers];
  Rows<float> slope[max_layers];

  // The same on every instruction set: torch.compile keeps the shape in graphs on disk.
  static int stride_of(const PackedLinear& layer) { return round_up(layer.out, line); }

  // Floats a row.
  static int width(const MlpPack& pack) {
    int total = 0;
    for (int l = 0; l < pack.layer_count; ++l) {
      const int stride = stride_of(pack.forward[l]);
      if (l + 1 < pack.layer_count) total += stride;
      if (pack.activations[l] != Activation::identity) total += stride;
    }
    return total;
  }

  static MlpSaved at(const MlpPack& pack, Rows<float> x, float* base, int64_t rows) {
    MlpSaved s;
    s.input[0] = x;
    for (int l = 0; l < pack.layer_count; ++l) {
      const ptrdiff_t stride = stride_of(pack.forward[l]);
      if (l + 1 < pack.layer_count) {
        s.input[l + 1] = {base, stride};
        base += rows * stride;
      }
      s.slope[l] = {nullptr, 0};
      if (pack.activations[l] == Activation::identity) continue;
      s.slope[l] = {base, stride};
      base += rows * stride;
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

static int mlp_saved_width(const MlpPack& pack) { return MlpSaved::width(pack); }

// y = network(saved.input[0]); slopes are kept where the backward pass will want them.
DIFFCORE_INLINE void mlp_forward_tile(const MlpPack& pack, int rows, const MlpSaved& saved,
                                      Rows<float> y, bool keep_slopes) {
  const int last = pack.layer_count - 1;
  for (int l = 0; l <= last; ++l) {
    linear_activate<Float32Operand, Float32Operand>(
        saved.input[l], rows, pack.forward[l], bias_only(pack.forward[l]),
        activate_function<Float32Operand>(pack.activations[l]), l == last ? y : saved.input[l + 1],
        keep_slopes ? saved.slope[l] : Rows<float>{nullptr, 0});
  }
}

static void mlp_forward(const MlpCall& call) {
  const MlpPack& shape = *call.networks[0];
  const int in = shape.forward[0].in, out = shape.forward[shape.layer_count - 1].out;
  const int64_t width = MlpSaved::width(shape);
  const int64_t tiles = tile_count(call.batch, call.threads);
  const int threads = tiles < call.threads ? static_cast<int>(tiles) : call.threads;
  const int most_rows = tile_span(call.batch, tiles, 0).rows;
  const Rows<float> x = {const_cast<float*>(call.x), in};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // Without `saved` a tile's rows live in the thread's own memory.
    Carver sizes{nullptr};
    sizes.take<float>(static_cast<int64_t>(sizeof(float)) * most_rows * width);
    take_rows<float>(&sizes, most_rows, out);
    Carver memory{thread_scratch(Scratch::tile, sizes.used)};
    float* own = memory.take<float>(static_cast<int64_t>(sizeof(float)) * most_rows * width);
    const Rows<float> y = take_rows<float>(&memory, most_rows, out);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Span span = tile_span(call.batch, tiles, tile);
      for (int q = 0; q < call.network_count; ++q) {
        const MlpPack& pack = *call.networks[q];
        const MlpSaved saved =
            call.saved ? MlpSaved::at(pack, x, call.saved + q * call.batch * width, call.batch)
                             .from(span.first, pack.layer_count)
                       : MlpSaved::at(pack, rows_from(x, span.first), own, most_rows);
        mlp_forward_tile(pack, span.rows, saved, y, call.saved != nullptr);
        write_rows(y, span.rows, out, call.y + (q * call.batch + span.first) * out);
      }
    }
  }
}

// ---- backward --------------------------------------------------------------------------------

// delta[l]: gradient at layer l's output before its activation.
struct MlpDeltas {
  Rows<float> delta[max_layers];

  static MlpDeltas take(const MlpPack& pack, int64_t rows, Carver* memory) {
    MlpDeltas d;
    for (int l = 0; l < pack.layer_count; ++l)
      d.delta[l] = take_rows<float>(memory, rows, pack.forward[l].out);
    return d;
  }

  MlpDeltas from(int64_t row, int layer_count) const {
    MlpDeltas d;
    for (int l = 0; l < layer_count; ++l) d.delta[l] = rows_from(delta[l], row);
    return d;
  }
};

DIFFCORE_INLINE void multiply_rows(Rows<float> a, Rows<float> b, int rows, int columns) {
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < columns; n += W)
      store(a.row(i) + n, load(a.row(i) + n) * load(b.row(i) + n));
}

// From the gradient at the network's output, in the last layer's delta, to every layer's delta and,
// where `grad_x` has memory, to the gradient at the input.
DIFFCORE_INLINE void mlp_backward_tile(const MlpPack& pack, int rows, const MlpSaved& saved,
                                       const MlpDeltas& d, Rows<float> grad_x) {
  const int last = pack.layer_count - 1;
  if (saved.slope[last].data)
    multiply_rows(d.delta[last], saved.slope[last], rows, padded(pack.forward[last].out));
  for (int l = last; l >= 1; --l) {
    linear_multiply<Float32Operand>(d.delta[l], rows, pack.backward[l], saved.slope[l - 1],
                                    d.delta[l - 1]);
  }
  if (grad_x.data)
    linear_multiply<Float32Operand>(d.delta[0], rows, pack.backward[0], {nullptr, 0}, grad_x);
}

// A layer's weight [out, in] and bias gradient: sums over the batch of delta^T input and of delta.
struct WeightGradient {
  Rows<float> delta;
  Rows<float> input;
  int in;
  int out;
  float* weight;
  float* bias;  // or null
};

// Rows that are summed in registers before they join the total: few enough that rounding errors
// don't pile up along the batch and that a panel of inputs stays in L1.
constexpr int batch_chunk = 128;
// What is copied side by side, so that it is fetched once and then read from L1 and L2: rows,
// panels of inputs, and the deltas of some register blocks of outputs.
constexpr int rows_at_once = 2 * batch_chunk;
constexpr int panels_at_once = 8;
constexpr int blocks_at_once = 8;
constexpr int delta_stride = (blocks_at_once * max_tile_rows + W - 1) / W * W;

struct WeightGradientBuffers {
  float* inputs;  // [panel][row][panel_width]
  float* deltas;  // [row][delta_stride]

  static WeightGradientBuffers take(int64_t batch, Carver* memory) {
    const int64_t rows = batch < rows_at_once ? batch : rows_at_once;
    const int64_t floats = static_cast<int64_t>(sizeof(float)) * rows;
    WeightGradientBuffers b;
    b.inputs = memory->take<float>(floats * panels_at_once * panel_width);
    b.deltas = memory->take<float>(floats * delta_stride);
    return b;
  }
};

// Columns [column, column + columns) of `depth` rows, panel by panel; zeros fill the last one.
DIFFCORE_INLINE void copy_inputs(Rows<float> input, int depth, int column, int columns, float* to) {
  for (int k = 0; k < depth; ++k, to += panel_width) {
    const float* from = input.row(k) + column;
    float* panel = to;
    for (int c = 0; c < columns; c += panel_width, panel += depth * panel_width) {
      if (columns - c >= panel_width) {
        memcpy(panel, from + c, sizeof(float) * panel_width);
      } else {
        for (int i = 0; i < panel_width; ++i) panel[i] = c + i < columns ? from[c + i] : 0.0f;
      }
    }
  }
}

// Columns [n, n + columns) of `depth` rows. Up to a vector more is read: delta's rows are padded.
DIFFCORE_INLINE void copy_deltas(Rows<float> delta, int depth, int n, int columns, float* to) {
  for (int k = 0; k < depth; ++k, to += delta_stride)
    for (int i = 0; i < columns; i += W) store(to + i, load(delta.row(k) + n + i));
}

// `rows` rows and up to a panel of columns of the weight's gradient: set, or `more` added to it.
DIFFCORE_INLINE void store_gradient(const float* sums, int rows, int columns, bool more, float* to,
                                    ptrdiff_t stride) {
  for (int i = 0; i < rows; ++i, sums += panel_width, to += stride) {
    if (columns == panel_width) {
      for (int v = 0; v < panel_width; v += W)
        store(to + v, more ? load(to + v) + load(sums + v) : load(sums + v));
    } else {
      for (int v = 0; v < columns; ++v) to[v] = more ? to[v] + sums[v] : sums[v];
    }
  }
}

// A weight gradient cut into pieces of whole register blocks: `row_parts` x `column_parts`.
struct GradientGrid {
  int64_t blocks;  // of outputs
  int64_t panels;  // of inputs
  int64_t row_parts;
  int64_t column_parts;

  int64_t parts() const { return row_parts * column_parts; }
  static GradientGrid of(const WeightGradient& g) {
    const int64_t blocks = ceil_div(g.out, max_tile_rows), panels = ceil_div(g.in, panel_width);
    return {blocks, panels, 1, ceil_div(panels, panels_at_once)};
  }
};

static void weight_gradient_part(const WeightGradient& g, int64_t batch, const GradientGrid& grid,
                                 int64_t part, const WeightGradientBuffers& buffers) {
  alignas(64) float sums[max_tile_rows * panel_width];
  const Span blocks = tile_span(grid.blocks, grid.row_parts, part / grid.column_parts);
  const Span panels = tile_span(grid.panels, grid.column_parts, part % grid.column_parts);
  const int first_column = static_cast<int>(panels.first) * panel_width;
  const int end_column = first_column + panels.rows * panel_width;
  const int columns = (end_column < g.in ? end_column : g.in) - first_column;
  const int64_t end_block = blocks.first + blocks.rows;
  const auto limited = [&](int64_t block) { return block < end_block ? block : end_block; };
  const auto output = [&](int64_t block) {
    return static_cast<int>(tile_span(g.out, grid.blocks, block).first);
  };
  const Rows<float> gradient = {g.weight + first_column, g.in};
  for (int64_t start = 0; start < batch; start += rows_at_once) {
    const int depth = batch - start < rows_at_once ? static_cast<int>(batch - start) : rows_at_once;
    const Rows<float> delta = rows_from(g.delta, start);
    copy_inputs(rows_from(g.input, start), depth, first_column, columns, buffers.inputs);
    for (int64_t group = blocks.first; group < end_block; group += blocks_at_once) {
      const int64_t next = limited(group + blocks_at_once);
      const int n = output(group), after = output(next);
      copy_deltas(delta, depth, n, after - n, buffers.deltas);
      const int fetched = after / line * line, fetch_end = output(limited(next + blocks_at_once));
      Prefetcher fetch(delta.data + fetched, delta.stride, depth, fetch_end - fetched,
                       static_cast<int>(next - group) * panels.rows);
      for (int64_t block = group; block < next; ++block) {
        const int row = output(block), rows = output(block + 1) - row;
        for (int c = 0; c < columns; c += panel_width) {
          const int present = columns - c < panel_width ? columns - c : panel_width;
          prefetch_block(gradient, row, rows, c, present);
          fetch();
          const float* inputs = buffers.inputs + static_cast<ptrdiff_t>(c) * depth;
          for (int k = 0; k < depth; k += batch_chunk) {
            const int left = depth - k < batch_chunk ? depth - k : batch_chunk;
            outer_function(rows)(buffers.deltas + k * delta_stride + (row - n), delta_stride,
                                 inputs + k * panel_width, left, sums, k > 0);
          }
          store_gradient(sums, rows, present, start > 0, gradient.row(row) + c, g.in);
        }
      }
    }
  }
}

static void bias_gradient(const WeightGradient& g, int64_t batch) {
  for (int n = 0; n < g.out; n += W) {
    Vec total = zero();
    for (int64_t start = 0; start < batch; start += batch_chunk) {
      const int64_t end = batch - start < batch_chunk ? batch : start + batch_chunk;
      Vec sum = zero();
      for (int64_t k = start; k < end; ++k) sum = sum + load(g.delta.row(k) + n);
      total = total + sum;
    }
    float lanes[W];
    store(lanes, total);
    for (int c = 0; c < W && n + c < g.out; ++c) g.bias[n + c] = lanes[c];
  }
}

// Enters a network's layers in a list; returns their number.
static int list_gradients(const MlpPack& shape, const MlpSaved& saved, const MlpDeltas& deltas,
                          float* const* weights, float* const* biases, WeightGradient* list) {
  for (int l = 0; l < shape.layer_count; ++l) {
    list[l] = {deltas.delta[l],      saved.input[l], shape.forward[l].in,
               shape.forward[l].out, weights[l],     biases[l]};
  }
  return shape.layer_count;
}

// All of a list's gradients, shared out among the calling team, whose tile memory is taken over.
static void weight_gradients(const WeightGradient* list, int count, int64_t batch, int threads) {
  GradientGrid grids[max_networks * max_layers];
  int64_t parts = 0;
  for (int g = 0; g < count; ++g) parts += (grids[g] = GradientGrid::of(list[g])).parts();
  // Outputs are cut as well where that gives every thread a few parts, none of them tiny.
  const int64_t cuts = ceil_div(4 * threads, parts > 0 ? parts : 1);
  parts = 0;
  for (int g = 0; g < count; ++g) {
    const int64_t most = ceil_div(grids[g].blocks, blocks_at_once);
    grids[g].row_parts = cuts < most ? cuts : most;
    parts += grids[g].parts();
  }

  Carver sizes{nullptr};
  WeightGradientBuffers::take(batch, &sizes);
  Carver memory{thread_scratch(Scratch::tile, sizes.used)};
  const auto buffers = WeightGradientBuffers::take(batch, &memory);
#pragma omp for schedule(dynamic, 1)
  for (int64_t item = 0; item < parts; ++item) {
    int g = 0;
    int64_t part = item;
    while (part >= grids[g].parts()) part -= grids[g++].parts();
    weight_gradient_part(list[g], batch, grids[g], part, buffers);
    if (part == 0 && list[g].bias) bias_gradient(list[g], batch);
  }
}

static void mlp_backward(const MlpBackwardCall& call) {
  const MlpPack& shape = *call.networks[0];
  const int layers = shape.layer_count;
  const int in = shape.forward[0].in, out = shape.forward[layers - 1].out;
  const int64_t width = MlpSaved::width(shape);
  const Rows<float> x = {const_cast<float*>(call.x), in};

  // Every network's deltas and list of gradients, in the order of call.grad_weights.
  Carver sizes{nullptr};
  for (int q = 0; q < call.network_count; ++q) MlpDeltas::take(shape, call.batch, &sizes);
  const auto list_bytes =
      static_cast<int64_t>(sizeof(WeightGradient)) * call.network_count * layers;
  sizes.take<WeightGradient>(list_bytes);
  Carver memory{thread_scratch(Scratch::call, sizes.used)};
  auto* list = memory.take<WeightGradient>(list_bytes);
  const int64_t deltas_bytes = (sizes.used - memory.used) / call.network_count;
  char* const deltas_memory = memory.base + memory.used;
  const auto deltas_of = [&](int q) {
    Carver own{deltas_memory + q * deltas_bytes};
    return MlpDeltas::take(shape, call.batch, &own);
  };
  const auto saved_of = [&](int q) {
    return MlpSaved::at(shape, x, const_cast<float*>(call.saved) + q * call.batch * width,
                        call.batch);
  };
  for (int q = 0; q < call.network_count; ++q) {
    if (call.grad_weights)
      list_gradients(shape, saved_of(q), deltas_of(q), call.grad_weights + q * layers,
                     call.grad_biases + q * layers, list + q * layers);
  }

  const int64_t tiles = tile_count(call.batch, call.threads);
  const int threads = tiles < call.threads ? static_cast<int>(tiles) : call.threads;
  const int most_rows = tile_span(call.batch, tiles, 0).rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver tile_sizes{nullptr};
    take_rows<float>(&tile_sizes, most_rows, in);
    Carver tile_memory{thread_scratch(Scratch::tile, tile_sizes.used)};
    const Rows<float> grad_x = take_rows<float>(&tile_memory, most_rows, in);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Span span = tile_span(call.batch, tiles, tile);
      for (int q = 0; q < call.network_count; ++q) {
        const MlpPack& pack = *call.networks[q];
        const MlpDeltas d = deltas_of(q).from(span.first, layers);
        copy_rows(call.grad_y + (q * call.batch + span.first) * out, out, span.rows, out,
                  d.delta[layers - 1]);
        mlp_backward_tile(pack, span.rows, saved_of(q).from(span.first, layers), d,
                          call.grad_x ? grad_x : Rows<float>{nullptr, 0});
        if (!call.grad_x) continue;
        float* to = call.grad_x + span.first * in;
        if (q == 0) {
          write_rows(grad_x, span.rows, in, to);
        } else {
          for (int i = 0; i < span.rows; ++i)
            for (int n = 0; n < in; ++n) to[i * in + n] += grad_x.row(i)[n];
        }
      }
    }
    if (call.grad_weights) weight_gradients(list, call.network_count * layers, call.batch, threads);
  }
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
