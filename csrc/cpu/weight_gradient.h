// Gradients of weights and biases: a layer's delta^T input, and delta's sum, over the whole batch.
//
// The work is cut by weights, not by rows: every element is summed by one thread in one order, and the
// result doesn't depend on their number.
#pragma once

#include "parallel.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// One layer's: weight [out, in], bias [out].
template <class Input>
struct WeightGradient {
  Rows<Input> delta;
  Rows<Input> input;
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

DIFFCORE_INLINE int copied_rows(int64_t batch) {
  return batch < rows_at_once ? static_cast<int>(batch) : rows_at_once;
}

// The sums of register blocks, over copies of some rows' delta and input. How these lie is up to the
// product; to all of them `n` and `column` count from the first that was copied.
template <class Input>
struct OuterProduct;

template <>
struct OuterProduct<float> {
  static constexpr int block = max_tile_rows;  // outputs
  static constexpr int blocks_at_once = 8;
  static constexpr int delta_stride = (blocks_at_once * block + W - 1) / W * W;
  float* inputs;  // [panel][row][panel_width]
  float* deltas;  // [row][delta_stride]

  void take(int64_t batch, Carver* memory) {
    const int64_t rows = copied_rows(batch);
    const int64_t floats = static_cast<int64_t>(sizeof(float)) * rows;
    inputs = memory->take<float>(floats * panels_at_once * panel_width);
    deltas = memory->take<float>(floats * delta_stride);
  }

  void copy_inputs(Rows<float> input, int rows, int columns) const {
    pack_columns<Float32Operand>(input.data, input.stride, rows, columns, inputs);
  }

  // Up to a vector more is read: delta's rows are padded.
  void copy_deltas(Rows<float> delta, int rows, int outputs) const {
    float* to = deltas;
    for (int k = 0; k < rows; ++k, to += delta_stride)
      for (int n = 0; n < outputs; n += W) store(to + n, load(delta.row(k) + n));
  }

  // sums[i][c] = sum over the rows of delta n + i times input column + c.
  void multiply(int n, int outputs, int column, int rows, float* sums) {
    const float* panel = inputs + static_cast<ptrdiff_t>(column) * rows;
    for (int k = 0; k < rows; k += batch_chunk) {
      const int left = rows - k < batch_chunk ? rows - k : batch_chunk;
      outer_function(outputs)(deltas + k * delta_stride + n, delta_stride, panel + k * panel_width,
                              left, sums, k > 0);
    }
  }
};

// A product of bfloat16 sums along its left side's rows: there the deltas lie transposed.
template <>
struct OuterProduct<uint16_t> {
  using Operand = Bfloat16Operand;
  static constexpr int block = block_rows<Operand>(2);
  static constexpr int blocks_at_once = Operand::whole_tiles ? 2 : 4;
  static constexpr int panels_of_deltas = (blocks_at_once * block + panel_width - 1) / panel_width;
  static constexpr int delta_stride = rows_at_once + line_of<uint16_t>;
  uint32_t* inputs;  // [panel][pair of rows][panel_width]
  uint32_t* pairs;   // [panel][pair of rows][panel_width]: deltas on their way
  uint16_t* deltas;  // [output][row]
  BlockState<Operand> products;

  void take(int64_t batch, Carver* memory) {
    const int depth = Operand::depth(copied_rows(batch));
    const int64_t panel = int64_t{4} * round_up(depth, 4) * panel_width;
    inputs = memory->take<uint32_t>(panels_at_once * panel);
    pairs = memory->take<uint32_t>(panels_of_deltas * panel);
    deltas = memory->take<uint16_t>(int64_t{2} * panels_of_deltas * panel_width * delta_stride);
  }

  void copy_inputs(Rows<uint16_t> input, int rows, int columns) const {
    pack_columns<Operand>(input.data, input.stride, rows, columns, inputs);
  }

  void copy_deltas(Rows<uint16_t> delta, int rows, int outputs) const {
    pack_columns<Operand>(delta.data, delta.stride, rows, outputs, pairs);
    const int depth = Operand::depth(rows);
    for (int n = 0; n < outputs; n += 4) {
      const uint32_t* panel = pairs + n / panel_width * panel_width * depth + n % panel_width;
      // What lies behind the last pair is moved along, to where nobody reads it.
      for (int k = 0; k < depth; k += 4) {
        transpose_4x4(reinterpret_cast<const float*>(panel + k * panel_width), panel_width,
                      reinterpret_cast<float*>(deltas + n * delta_stride + 2 * k),
                      delta_stride / 2);
      }
    }
  }

  void multiply(int n, int outputs, int column, int rows, float* sums) {
    const int depth = Operand::depth(rows);
    block_sums<Operand>(products, outputs, 2, deltas + n * delta_stride, delta_stride, depth,
                        inputs + column * depth, panel_width, {no_offset, nullptr, 0}, sums,
                        panel_width);
  }
};

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
  template <class Input>
  static GradientGrid of(const WeightGradient<Input>& g) {
    const int64_t blocks = ceil_div(g.out, OuterProduct<Input>::block);
    const int64_t panels = ceil_div(g.in, panel_width);
    // Without any input there is still the bias's gradient, which goes with the first part.
    return {blocks, panels, 1, panels > 0 ? ceil_div(panels, panels_at_once) : 1};
  }
};

template <class Input>
static void weight_gradient_part(const WeightGradient<Input>& g, int64_t batch,
                                 const GradientGrid& grid, int64_t part,
                                 OuterProduct<Input>& product) {
  constexpr int blocks_at_once = OuterProduct<Input>::blocks_at_once;
  alignas(64) float sums[OuterProduct<Input>::block * panel_width];
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
    const int depth = copied_rows(batch - start);
    const Rows<Input> delta = rows_from(g.delta, start);
    product.copy_inputs({g.input.row(start) + first_column, g.input.stride}, depth, columns);
    for (int64_t group = blocks.first; group < end_block; group += blocks_at_once) {
      const int64_t next = limited(group + blocks_at_once);
      const int n = output(group), after = output(next);
      product.copy_deltas({delta.data + n, delta.stride}, depth, after - n);
      const int fetched = after / line_of<Input> * line_of<Input>;
      const int fetch_end = output(limited(next + blocks_at_once));
      Prefetcher<Input> fetch(delta.data + fetched, delta.stride, depth, fetch_end - fetched,
                              static_cast<int>(next - group) * panels.rows);
      for (int64_t block = group; block < next; ++block) {
        const int row = output(block), rows = output(block + 1) - row;
        for (int c = 0; c < columns; c += panel_width) {
          const int present = columns - c < panel_width ? columns - c : panel_width;
          prefetch_block(gradient, row, rows, c, present);
          fetch();
          product.multiply(row - n, rows, c, depth, sums);
          store_gradient(sums, rows, present, start > 0, gradient.row(row) + c, g.in);
        }
      }
    }
  }
}

template <class Input>
static void bias_gradient(const WeightGradient<Input>& g, int64_t batch) {
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

// What weight_gradients needs of every thread's memory.
template <class Input>
static int64_t weight_gradient_bytes(int64_t batch) {
  return bytes_of([&](Carver* memory) { OuterProduct<Input>().take(batch, memory); });
}

// All of a list's gradients, shared out among the calling threads, each with memory of its own.
template <class Input>
static void weight_gradients(const WeightGradient<Input>* list, int count, int64_t batch,
                             int threads, Carver memory) {
  GradientGrid grids[max_networks * max_layers];
  int64_t parts = 0;
  for (int g = 0; g < count; ++g) parts += (grids[g] = GradientGrid::of(list[g])).parts();
  // Outputs are cut as well where that gives every thread a few parts, none of them tiny.
  const int64_t cuts = ceil_div(4 * threads, parts > 0 ? parts : 1);
  parts = 0;
  for (int g = 0; g < count; ++g) {
    const int64_t most = ceil_div(grids[g].blocks, OuterProduct<Input>::blocks_at_once);
    grids[g].row_parts = cuts < most ? cuts : most;
    parts += grids[g].parts();
  }

  OuterProduct<Input> product;
  product.take(batch, &memory);
#pragma omp for schedule(dynamic, 1)
  for (int64_t item = 0; item < parts; ++item) {
    int g = 0;
    int64_t part = item;
    while (part >= grids[g].parts()) part -= grids[g++].parts();
    if (list[g].in > 0) weight_gradient_part(list[g], batch, grids[g], part, product);
    if (part == 0 && list[g].bias) bias_gradient(list[g], batch);
  }
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
