// What the ops build from the tile product: activations applied block by block, and how a batch is
// cut into tiles.
#pragma once

#include "activations.h"
#include "tile.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// out = f(sums) for a block, and where `slope` isn't null slope = f'(sums).
template <class Operand>
using ActivateFunction = void (*)(const float* sums, ptrdiff_t sums_stride, int rows, int columns,
                                  typename Operand::Input* out, ptrdiff_t out_stride, float* slope,
                                  ptrdiff_t slope_stride);

// f of vectors_at_once vectors side by side, `width` of a row. Where rows don't divide among them, the last
// one is taken more than once.
template <class Operand, Activation kind, bool with_slope, int width>
static void activate_side_by_side(const float* sums, ptrdiff_t sums_stride, int rows, int columns,
                                  typename Operand::Input* out, ptrdiff_t out_stride, float* slope,
                                  ptrdiff_t slope_stride) {
  using Function = ActivationFunction<kind, Operand::precision>;
  constexpr int height = vectors_at_once / width;
  for (int first = 0; first < rows; first += height) {
    ptrdiff_t row[height];
    for (int i = 0; i < height; ++i) row[i] = first + i < rows ? first + i : rows - 1;
    for (int n = 0; n < columns; n += width * W) {
      Vecs<vectors_at_once> z, s;
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j)
          z.part[i * width + j] = load(sums + row[i] * sums_stride + n + j * W);
      z = with_slope ? Function::value_and_slope(z, &s) : Function::value(z);
      for (int i = 0; i < height; ++i) {
        for (int j = 0; j < width; ++j) {
          Operand::store_activation(out + row[i] * out_stride + n + j * W, z.part[i * width + j]);
          if (with_slope) store(slope + row[i] * slope_stride + n + j * W, s.part[i * width + j]);
        }
      }
    }
  }
}

// A block is 1, 2 or a multiple of 4 vectors wide.
template <class Operand, Activation kind, bool with_slope>
DIFFCORE_INLINE ActivateFunction<Operand> side_by_side_function(int columns) {
  return columns == W       ? activate_side_by_side<Operand, kind, with_slope, 1>
         : columns == 2 * W ? activate_side_by_side<Operand, kind, with_slope, 2>
                            : activate_side_by_side<Operand, kind, with_slope, vectors_at_once>;
}

template <class Operand, Activation kind>
static void activate(const float* sums, ptrdiff_t sums_stride, int rows, int columns,
                     typename Operand::Input* out, ptrdiff_t out_stride, float* slope,
                     ptrdiff_t slope_stride) {
  using Function = ActivationFunction<kind, Operand::precision>;
  if constexpr (side_by_side<kind>) {
    const auto function = slope ? side_by_side_function<Operand, kind, true>(columns)
                                : side_by_side_function<Operand, kind, false>(columns);
    return function(sums, sums_stride, rows, columns, out, out_stride, slope, slope_stride);
  }
  for (int i = 0; i < rows; ++i) {
    const float* z = sums + i * sums_stride;
    for (int n = 0; n < columns; n += W) {
      if (slope) {
        Vec s;
        Operand::store_activation(out + i * out_stride + n,
                                  Function::value_and_slope(load(z + n), &s));
        store(slope + i * slope_stride + n, s);
      } else {
        Operand::store_activation(out + i * out_stride + n, Function::value(load(z + n)));
      }
    }
  }
}

template <class Operand>
DIFFCORE_INLINE ActivateFunction<Operand> activate_function(Activation kind) {
  switch (kind) {
    case Activation::identity: return activate<Operand, Activation::identity>;
    case Activation::relu: return activate<Operand, Activation::relu>;
    case Activation::elu: return activate<Operand, Activation::elu>;
    case Activation::silu: return activate<Operand, Activation::silu>;
    case Activation::tanh: return activate<Operand, Activation::tanh>;
    case Activation::mish: return activate<Operand, Activation::mish>;
    case Activation::gelu: return activate<Operand, Activation::gelu>;
    case Activation::sin: return activate<Operand, Activation::sin>;
    case Activation::cos: return activate<Operand, Activation::cos>;
  }
  return nullptr;
}

// A buffer of rows; `stride` is counted in elements.
template <class T>
struct Rows {
  T* data;
  ptrdiff_t stride;
  T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
DIFFCORE_INLINE Rows<T> take_rows(Carver* memory, int64_t rows, int columns) {
  const ptrdiff_t stride = buffer_stride<T>(columns);
  return {memory->take<T>(static_cast<int64_t>(sizeof(T)) * rows * stride), stride};
}

// Asks for a block's cache lines while the product before its use keeps the CPU busy: it has a few
// bytes of every row, a pattern in which no CPU sees what comes next. Lines for writing come without a
// copy left in another core's cache, on which the store would have to wait.
enum class For { reading, writing };

template <For use = For::writing, class T>
DIFFCORE_INLINE void prefetch_block(Rows<T> r, int row, int count, int column, int columns) {
  constexpr int write = use == For::writing, step = line_of<T>;
  if (!r.data) return;
  for (int i = 0; i < count; ++i) {
    const T* first = r.row(row + i) + column;
    for (int n = 0; n < columns; n += step) __builtin_prefetch(first + n, write);
    __builtin_prefetch(first + columns - 1, write);
  }
}

// Where a layer's rows lie. Far ones, of a whole batch or under other cores' eyes, are worth asking for ahead
// of a block; near ones are in this core's L1 or L2, and asking costs more time than it saves.
enum class Reach { near, far };

// Fetches a block of rows into L2, a few lines at every call, while products keep the CPU busy: for
// pieces of rows that are too short for the hardware to see a stream.
template <class T>
struct Prefetcher {
  const T* row;
  ptrdiff_t stride;
  int rows;
  int columns;
  int lines_per_call;
  int column = 0;

  Prefetcher(const T* first, ptrdiff_t row_stride, int row_count, int column_count, int calls)
      : row(first), stride(row_stride), rows(row_count), columns(column_count) {
    const int64_t lines = ceil_div(columns, line_of<T>) * rows;
    lines_per_call = static_cast<int>(ceil_div(lines, calls));
  }
  void operator()() {
    for (int i = 0; i < lines_per_call && rows > 0; ++i) {
      __builtin_prefetch(row + column, 0, 2);
      column += line_of<T>;
      if (column < columns) continue;
      column = 0;
      row += stride;
      --rows;
    }
  }
};

DIFFCORE_INLINE Offset bias_only(const PackedLinear& layer) { return {layer.bias, nullptr, 0}; }

// Of rows of odd width, whose last block was just written, clears the value behind the last: in bfloat16 the
// next product reads them as a pair. That value's weight is zero, but so were those that it came of, and
// zero times an infinite x has made it NaN, which would spread.
template <class Out>
DIFFCORE_INLINE void end_pairs(Rows<typename Out::Input> out, int row, int count, int column,
                               int columns, int width) {
  if (Out::precision == Precision::float32 || width % 2 == 0 || column + columns < width) return;
  for (int i = 0; i < count; ++i) out.row(row + i)[width] = 0;
}

// A layer's rows in `out`: `finish` makes them of the sums, which lie there already where it is float32, and
// else in memory of their own. Before a block's product `fetch` may ask for what is far.
template <class In, class Out, class Fetch, class Finish>
DIFFCORE_INLINE void linear_to(Rows<typename Out::Input> out, Rows<typename In::Input> x, int rows,
                               const PackedLinear& layer, Offset offset, Fetch fetch,
                               Finish finish) {
  const auto epilogue = [&](int row, int count, int column, int columns, const float* sums,
                            ptrdiff_t stride) {
    finish(row, count, column, columns, sums, stride);
    end_pairs<Out>(out, row, count, column, columns, layer.out);
  };
  if constexpr (Out::precision == Precision::float32) {
    linear_in<In>(
        [&](int row, int column, int) { return Place{out.row(row) + column, out.stride}; }, x.data,
        x.stride, rows, layer, offset, fetch, epilogue);
  } else {
    linear<In>(x.data, x.stride, rows, layer, offset, fetch, epilogue);
  }
}

// out = f(x W^T + offset), and where `slope` has memory slope = f'(...).
template <class In, class Out>
DIFFCORE_INLINE void linear_activate(Rows<typename In::Input> x, int rows,
                                     const PackedLinear& layer, Offset offset,
                                     ActivateFunction<Out> function, Rows<typename Out::Input> out,
                                     Rows<float> slope, Reach reach = Reach::near) {
  linear_to<In, Out>(
      out, x, rows, layer, offset,
      [&](int row, int count, int column, int columns) {
        if (reach == Reach::near) return;
        prefetch_block(out, row, count, column, columns);
        prefetch_block(slope, row, count, column, columns);
      },
      [&](int row, int count, int column, int columns, const float* sums, ptrdiff_t stride) {
        function(sums, stride, count, columns, out.row(row) + column, out.stride,
                 slope.data ? slope.row(row) + column : nullptr, slope.stride);
      });
}

// out = x W^T + offset.
template <class In, class Out = Float32Operand>
DIFFCORE_INLINE void linear_store(Rows<typename In::Input> x, int rows, const PackedLinear& layer,
                                  Offset offset, Rows<typename Out::Input> out) {
  linear_to<In, Out>(
      out, x, rows, layer, offset, [](int, int, int, int) {},
      [&](int row, int count, int column, int columns, const float* sums, ptrdiff_t stride) {
        if (Out::precision == Precision::float32) return;
        for (int i = 0; i < count; ++i)
          for (int n = 0; n < columns; n += W)
            Out::store_activation(out.row(row + i) + column + n, load(sums + i * stride + n));
      });
}

// out = (x W^T) * factor, element by element, both far; without a factor where it has no memory.
template <class In, class Out>
DIFFCORE_INLINE void linear_multiply(Rows<typename In::Input> x, int rows,
                                     const PackedLinear& layer, Rows<float> factor,
                                     Rows<typename Out::Input> out) {
  if (!factor.data) return linear_store<In, Out>(x, rows, layer, bias_only(layer), out);
  linear_to<In, Out>(
      out, x, rows, layer, bias_only(layer),
      [&](int row, int count, int column, int columns) {
        prefetch_block(out, row, count, column, columns);
        prefetch_block<For::reading>(factor, row, count, column, columns);
      },
      [&](int row, int count, int column, int columns, const float* sums, ptrdiff_t stride) {
        for (int i = 0; i < count; ++i)
          for (int n = 0; n < columns; n += W)
            Out::store_activation(
                out.row(row + i) + column + n,
                load(sums + i * stride + n) * load(factor.row(row + i) + column + n));
      });
}

template <class T>
DIFFCORE_INLINE Rows<T> rows_from(Rows<T> r, int64_t first) {
  return {r.data ? r.row(first) : nullptr, r.stride};
}
template <class T>
DIFFCORE_INLINE Rows<T> columns_from(Rows<T> r, int first) {
  return {r.data ? r.data + first : nullptr, r.stride};
}

DIFFCORE_INLINE void clear_rows(Rows<float> r, int64_t rows) {
  memset(r.data, 0, sizeof(float) * static_cast<size_t>(rows * r.stride));
}

// A vector of which the first `count` lanes lie at p: of the others loads make zeros, and nothing is stored.
DIFFCORE_INLINE Vec load_some(const float* p, int64_t count) {
  if (count >= W) return load(p);
  float lanes[W] = {};
  memcpy(lanes, p, sizeof(float) * static_cast<size_t>(count));
  return load(lanes);
}
DIFFCORE_INLINE void store_some(float* p, Vec value, int64_t count) {
  if (count >= W) return store(p, value);
  float lanes[W];
  store(lanes, value);
  memcpy(p, lanes, sizeof(float) * static_cast<size_t>(count));
}

// Rows as a product reads them: times `factor` where that has memory, of the operand's type, padded
// with zeros.
template <class Operand>
static void convert_rows(const float* from, ptrdiff_t from_stride, int64_t rows, int columns,
                         Rows<typename Operand::Input> to, Rows<float> factor = {nullptr, 0}) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = from + i * from_stride;
    const auto store_vector = [&](int n, Vec value) {
      if (factor.data) value = value * load(factor.row(i) + n);
      Operand::store_activation(to.row(i) + n, value);
    };
    int n = 0;
    for (; n + W <= columns; n += W) store_vector(n, load(row + n));
    if (n == columns) continue;
    store_vector(n, load_some(row + n, columns - n));
    end_pairs<Operand>(to, static_cast<int>(i), 1, n, W, columns);
  }
}

// The first `columns` of each row, side by side.
DIFFCORE_INLINE void write_rows(Rows<float> from, int64_t rows, int columns, float* to) {
  if (columns == 0) return;  // `to` is null then, which memcpy doesn't take even for no bytes
  for (int64_t i = 0; i < rows; ++i)
    memcpy(to + i * columns, from.row(i), sizeof(float) * static_cast<size_t>(columns));
}

// The same, or with `more` added to what lies there.
DIFFCORE_INLINE void add_rows(Rows<float> from, int64_t rows, int columns, bool more, float* to) {
  if (!more) return write_rows(from, rows, columns, to);
  for (int64_t i = 0; i < rows; ++i)
    for (int n = 0; n < columns; ++n) to[i * columns + n] += from.row(i)[n];
}

// Tiles of at most 64 rows, so that a tile's buffers share L2 with the weights, evenly filled and as
// many as keep all threads busy to the end; but of at least 4.
constexpr int max_tile = 64;
constexpr int min_tile = least_shared_rows / 2;

DIFFCORE_INLINE int64_t tile_count(int64_t batch, int threads) {
  if (batch < least_shared_rows) return 1;
  const int64_t per_round = static_cast<int64_t>(threads) * max_tile;
  const int64_t rounds = (batch + per_round - 1) / per_round;
  const int64_t tiles = rounds * threads;
  const int64_t most = batch / min_tile;
  return tiles < most ? tiles : most;
}

// Rows of tile `index` of `tiles`: shares that differ by at most one row.
struct Span {
  int64_t first;
  int rows;
};
DIFFCORE_INLINE Span tile_span(int64_t batch, int64_t tiles, int64_t index) {
  const int64_t share = batch / tiles, extra = batch % tiles;
  const int64_t first = index * share + (index < extra ? index : extra);
  return {first, static_cast<int>(share + (index < extra))};
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
