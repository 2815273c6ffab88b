// The CPU primitive: a tile of rows through a linear layer, y = x W^T + b.
//
// The register tile is `rows x 2 vectors` of float accumulators, or half as many rows of two panels.
// Weights are packed in panels of two vectors of outputs, [panel][in][2 * width]; a last panel of at
// most `width` outputs has one vector, and there the sum over `in` runs in four interleaved parts,
// since one accumulator per row would leave the FMA units waiting. Where it has at most half as many
// outputs, a vector holds a group of successive weights of each. How a row's sum is associated thus
// depends on the layer's shape only, never on how many rows there are: results don't depend on the
// batch or the number of threads.
//
// Operands are float32, or bfloat16 in pairs along `in` with float accumulation. Where the CPU has no
// bfloat16 product, the same rounded values are multiplied in float. Where it multiplies whole tiles
// of them (AMX), a block has up to 32 rows, and the packed weights lie as those tiles want them.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace diffcore {
namespace DIFFCORE_ISA {

constexpr int W = Vec::width;
constexpr int panel_width = 2 * W;

DIFFCORE_INLINE int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
DIFFCORE_INLINE int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
DIFFCORE_INLINE int padded(int n) { return round_up(n, W); }
template <class T>
constexpr int line_of = 64 / static_cast<int>(sizeof(T));  // elements of a cache line
constexpr int line = line_of<float>;                       // floats
// Distance of two rows in an activation buffer: whole lines, at least a vector more than padded(n).
// The extra line keeps rows of a power-of-two width from falling into the same cache sets.
template <class T>
DIFFCORE_INLINE int buffer_stride(int n) {
  return round_up(n, line_of<T>) + line_of<T>;
}

struct Float32Operand {
  using Input = float;
  using Weight = float;
  static constexpr bool whole_tiles = false, groups = true;
  static constexpr Precision precision = Precision::float32;
  DIFFCORE_INLINE int depth(int in) { return in; }
  using Factor = Vec;  // of a product: an input in every lane, or weights
  DIFFCORE_INLINE Factor factor(Vec words) { return words; }
  DIFFCORE_INLINE Factor load_input(const Input* x, int k) { return broadcast(x[k]); }
  DIFFCORE_INLINE Factor load_weights(const Weight* p) { return load(p); }
  DIFFCORE_INLINE Vec multiply_add(Factor x, Factor w, Vec sum) { return fma(x, w, sum); }
  DIFFCORE_INLINE void store_activation(Input* p, Vec value) { store(p, value); }
  DIFFCORE_INLINE Weight weight(float first, float) { return first; }
};

struct Bfloat16Operand {
#if defined(DIFFCORE_AMX)
  static constexpr bool whole_tiles = true, groups = false;
#elif defined(DIFFCORE_NATIVE_BF16)
  static constexpr bool whole_tiles = false, groups = true;
#else
  static constexpr bool whole_tiles = false, groups = false;
#endif
  using Input = uint16_t;
  using Weight = uint32_t;
  static constexpr Precision precision = Precision::bfloat16;
  DIFFCORE_INLINE int depth(int in) { return (in + 1) / 2; }
  DIFFCORE_INLINE Weight weight(float first, float second) {
    return weight(to_bf16(first), to_bf16(second));
  }
  DIFFCORE_INLINE Weight weight(Input first, Input second) {
    return first | static_cast<uint32_t>(second) << 16;
  }
  DIFFCORE_INLINE void store_activation(Input* p, Vec value) { store(p, value); }
  // A vector of pairs.
  DIFFCORE_INLINE void store_weights(Weight* p, const float* first, const float* second) {
#if defined(DIFFCORE_NATIVE_BF16)
    const auto rounded = [](const float* values) {
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values)));
    };
    _mm512_storeu_si512(p, _mm512_or_si512(rounded(first), _mm512_slli_epi32(rounded(second), 16)));
#else
    for (int c = 0; c < Vec::width; ++c) p[c] = weight(first[c], second[c]);
#endif
  }
  DIFFCORE_INLINE void store_weights(Weight* p, const Input* first, const Input* second) {
    for (int c = 0; c < Vec::width; ++c) p[c] = weight(first[c], second[c]);
  }
#if defined(DIFFCORE_NATIVE_BF16)
  using Factor = __m512bh;
  DIFFCORE_INLINE Factor factor(Vec words) { return (__m512bh)words.v; }
  DIFFCORE_INLINE Factor load_input(const Input* x, int k) {
    int32_t pair;
    memcpy(&pair, x + 2 * k, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  DIFFCORE_INLINE Factor load_weights(const Weight* p) { return (__m512bh)_mm512_loadu_si512(p); }
  DIFFCORE_INLINE Vec multiply_add(Factor x, Factor w, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, w, x)};
  }
#else
  struct Factor {
    Vec first, second;
  };
  DIFFCORE_INLINE Factor factor(Vec pairs) {
    return {first_of_pairs(pairs), second_of_pairs(pairs)};
  }
  DIFFCORE_INLINE Factor load_input(const Input* x, int k) {
    uint32_t pair;
    memcpy(&pair, x + 2 * k, sizeof pair);
    return factor(broadcast_pair(pair));
  }
  DIFFCORE_INLINE Factor load_weights(const Weight* p) { return factor(load_pairs(p)); }
  DIFFCORE_INLINE Vec multiply_add(Factor x, Factor w, Vec sum) {
    return fma(x.first, w.first, fma(x.second, w.second, sum));
  }
#endif
};

// Values that a row of a panel covers: 1, or a pair.
template <class Operand>
constexpr int step_of = Operand::precision == Precision::bfloat16 ? 2 : 1;

// ---- packing -------------------------------------------------------------------------------

template <class Operand>
DIFFCORE_INLINE int64_t panel_bytes(int in, int out) {
  return static_cast<int64_t>(sizeof(typename Operand::Weight)) * Operand::depth(in) * padded(out);
}

// Block of memory handed out piece by piece, every piece 64-byte aligned. With a null base it only
// measures, so that one function both sizes and fills a pack.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t bytes) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (bytes + 63) / 64 * 64;
    return piece;
  }
};

typedef float Float4x __attribute__((vector_size(16)));
#if defined(__clang__)
#define DIFFCORE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // known to GCC before 12, too
typedef int32_t Index4x __attribute__((vector_size(16)));
#define DIFFCORE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index4x{__VA_ARGS__})
#endif

// to[k * to_stride + n] = from[n * from_stride + k] for a 4 x 4 block.
DIFFCORE_INLINE void transpose_4x4(const float* from, ptrdiff_t from_stride, float* to,
                                   ptrdiff_t to_stride) {
  Float4x a, b, c, d;
  memcpy(&a, from, 16);
  memcpy(&b, from + from_stride, 16);
  memcpy(&c, from + 2 * from_stride, 16);
  memcpy(&d, from + 3 * from_stride, 16);
  const Float4x ab0 = DIFFCORE_SHUFFLE(a, b, 0, 4, 1, 5);
  const Float4x ab1 = DIFFCORE_SHUFFLE(a, b, 2, 6, 3, 7);
  const Float4x cd0 = DIFFCORE_SHUFFLE(c, d, 0, 4, 1, 5);
  const Float4x cd1 = DIFFCORE_SHUFFLE(c, d, 2, 6, 3, 7);
  const Float4x r0 = DIFFCORE_SHUFFLE(ab0, cd0, 0, 1, 4, 5);
  const Float4x r1 = DIFFCORE_SHUFFLE(ab0, cd0, 2, 3, 6, 7);
  const Float4x r2 = DIFFCORE_SHUFFLE(ab1, cd1, 0, 1, 4, 5);
  const Float4x r3 = DIFFCORE_SHUFFLE(ab1, cd1, 2, 3, 6, 7);
  memcpy(to, &r0, 16);
  memcpy(to + to_stride, &r1, 16);
  memcpy(to + 2 * to_stride, &r2, 16);
  memcpy(to + 3 * to_stride, &r3, 16);
}

// The same with pairs: to[k * to_stride + n] = from[n * from_stride + 2 k] and the value behind it,
// for 4 rows of 4 pairs.
DIFFCORE_INLINE void transpose_4x4_pairs(const float* from, ptrdiff_t from_stride, uint32_t* to,
                                         ptrdiff_t to_stride) {
  alignas(16) uint16_t rounded[4][8];
  for (int n = 0; n < 4; ++n)
    for (int k = 0; k < 8; ++k) rounded[n][k] = to_bf16(from[n * from_stride + k]);
  // Pairs move as floats do: nothing is computed.
  transpose_4x4(reinterpret_cast<const float*>(rounded), 4, reinterpret_cast<float*>(to),
                to_stride);
}

// Successive weights of an output that lie side by side in a last panel of so many outputs; 1 where
// too few follow each other to pay for summing a vector's lanes.
template <class Operand>
DIFFCORE_INLINE int group_size(int in, int outputs) {
  const int depth = Operand::depth(in);
  int size = 1;
  while (Operand::groups && 2 * size * outputs <= W) size *= 2;
  return depth < 2 * size ? 1 : size;
}

// Such a panel: panels[group of k][n][k within it].
template <class Operand>
void pack_groups(const float* weight, ptrdiff_t out_stride, ptrdiff_t in_stride, int in, int out,
                 int group, typename Operand::Weight* panel) {
  constexpr int step = step_of<Operand>;
  memset(panel, 0, sizeof *panel * W * ceil_div(Operand::depth(in), group));
  for (int n = 0; n < out; ++n) {
    const float* from = weight + n * out_stride;
    typename Operand::Weight* to = panel + n * group;
    for (int k = 0; k < in; to += W) {
      for (int within = 0; within < group && k < in; ++within, k += step) {
        const bool last_alone = k + 1 >= in;
        to[within] = Operand::weight(from[k * in_stride],
                                     step == 1 || last_alone ? 0.0f : from[(k + 1) * in_stride]);
      }
    }
  }
}

// Element (n, k) of the packed matrix is weight[n * out_stride + k * in_stride].
template <class Operand>
void pack_panels(const float* weight, ptrdiff_t out_stride, ptrdiff_t in_stride, int in, int out,
                 typename Operand::Weight* panels) {
  using Weight = typename Operand::Weight;
  constexpr int step = step_of<Operand>;
  for (int n = 0; n < out; n += panel_width) {
    const int columns = out - n > W ? panel_width : W;
    const int present = out - n < columns ? out - n : columns;
    const float* source = weight + n * out_stride;
    const int group = group_size<Operand>(in, present);
    if (group > 1)
      return pack_groups<Operand>(source, out_stride, in_stride, in, present, group, panels);
    int k = 0;
    if (in_stride == 1 && present == columns) {
      for (; k + 4 * step <= in; k += 4 * step) {
        for (int c = 0; c < columns; c += 4) {
          const float* from = source + c * out_stride + k;
          Weight* to = panels + k / step * columns + c;
          if constexpr (step == 1) {
            transpose_4x4(from, out_stride, to, columns);
          } else {
            transpose_4x4_pairs(from, out_stride, to, columns);
          }
        }
      }
    }
    for (; k < in; k += step) {
      Weight* row = panels + static_cast<ptrdiff_t>(k / step) * columns;
      const float* first = source + k * in_stride;
      const float* second = first + in_stride;
      const bool last_alone = k + 1 >= in;
      for (int c = 0; c < present; ++c) {
        row[c] = Operand::weight(first[c * out_stride],
                                 step == 1 || last_alone ? 0.0f : second[c * out_stride]);
      }
      for (int c = present; c < columns; ++c) row[c] = Weight(0);
    }
    panels += static_cast<ptrdiff_t>(Operand::depth(in)) * columns;
  }
}

// `columns` columns of `in` rows, panel by panel: panels[n][k][column]. The last panel's missing
// columns are zero.
template <class Operand, class Value>
void pack_columns(const Value* rows, ptrdiff_t stride, int in, int columns,
                  typename Operand::Weight* panels) {
  using Weight = typename Operand::Weight;
  const int depth = Operand::depth(in), whole = columns / panel_width;
  const ptrdiff_t panel_size = static_cast<ptrdiff_t>(depth) * panel_width;
  for (int k = 0; k < depth; ++k) {
    const Value* first = rows + k * step_of<Operand> * stride;
    const bool alone = step_of<Operand> * k + 1 == in;
    Weight* to = panels + static_cast<ptrdiff_t>(k) * panel_width;
    for (int n = 0; n < whole; ++n, first += panel_width, to += panel_size) {
      if constexpr (Operand::precision == Precision::float32) {
        memcpy(to, first, sizeof(float) * panel_width);
      } else if (alone) {
        for (int c = 0; c < panel_width; ++c) to[c] = Operand::weight(first[c], Value(0));
      } else {
        for (int c = 0; c < panel_width; c += W)
          Operand::store_weights(to + c, first + c, first + stride + c);
      }
    }
    const int present = columns % panel_width;
    if (present == 0) continue;
    for (int c = 0; c < panel_width; ++c) {
      const bool single = step_of<Operand> == 1 || alone;
      to[c] = c < present ? Operand::weight(first[c], single ? Value(0) : first[stride + c])
                          : Weight(0);
    }
  }
}

// A thread's place among those that pack the same weights.
struct Packer {
  int rank = 0;
  int count = 1;
};

// Packs columns [first, first + in) of the layer's weight, or, transposed, the way back through
// them: from gradients at the layer's `out` outputs to gradients at those `in` inputs. Of the panels
// each packer fills its share.
enum class Direction { forward, backward };

template <class Operand>
PackedLinear pack_linear(const LinearParameters& layer, int first, int in, Direction direction,
                         bool with_bias, Packer packer, Carver* memory) {
  using Weight = typename Operand::Weight;
  const bool forward = direction == Direction::forward;
  const int from = forward ? in : layer.out, to = forward ? layer.out : in;
  Weight* panels = memory->take<Weight>(panel_bytes<Operand>(from, to));
  float* bias = memory->take<float>(4 * static_cast<int64_t>(padded(to)));
  if (panels) {
    const float* weight = layer.weight + first;
    const ptrdiff_t out_stride = forward ? layer.row_stride : 1;
    const ptrdiff_t in_stride = forward ? 1 : layer.row_stride;
    const int64_t count = ceil_div(to, panel_width);
    const int begin = static_cast<int>(count * packer.rank / packer.count) * panel_width;
    int end = static_cast<int>(count * (packer.rank + 1) / packer.count) * panel_width;
    if (end > to) end = to;
    if (begin < end) {
      pack_panels<Operand>(weight + begin * out_stride, out_stride, in_stride, from, end - begin,
                           panels + static_cast<ptrdiff_t>(begin) * Operand::depth(from));
    }
    if (packer.rank == 0)
      for (int n = 0; n < padded(to); ++n) bias[n] = with_bias && n < to ? layer.bias[n] : 0.0f;
  }
  return {panels, bias, from, to};
}

// Columns [first, first + count) of a packed layer, as a layer: whole panels, but for the layer's end.
template <class Operand>
DIFFCORE_INLINE PackedLinear layer_columns(const PackedLinear& layer, int first, int count) {
  const auto* panels = static_cast<const typename Operand::Weight*>(layer.panels);
  const ptrdiff_t before = static_cast<ptrdiff_t>(first) * Operand::depth(layer.in);
  return {panels + before, layer.bias + first, layer.in, count};
}

// ---- the product ----------------------------------------------------------------------------

// What a layer is added to: the bias, and where `rows` isn't null one more row vector per row.
struct Offset {
  const float* bias;
  const float* rows;
  ptrdiff_t stride;
};

constexpr float no_offset[panel_width] = {};
constexpr int max_vectors = 8;
// A single row wants four panels at once, for enough independent sums. But two panels of long vectors
// are as much as L2 feeds, and from larger layers than of so many bytes they come sooner: Zen 5 fetches
// most lines of four such streams twice.
constexpr int64_t four_panels_at_once = 128 * 1024;

// Products that are summed by themselves before they join the total: few enough that rounding errors
// don't pile up along a row. A single sum of 1,024 has 2.3 times the error of eager PyTorch's. Layers of
// 5 to 8 outputs, which that sums in four parts, come here where vectors are short, and are one of
// narrow_sums where they are long.
constexpr int sum_chunk = W < 8 ? 64 : 256;

// How many of a sum's first products join the offset one by one: the first chunk's, which so needs no addition
// of its own. Where chunks are short most sums have several of them anyway.
constexpr int first_chunk = W < 8 ? 0 : sum_chunk;

// sum += product k of each row.
template <class Operand, int rows, int vectors>
DIFFCORE_INLINE void add_product(const typename Operand::Input* x, ptrdiff_t x_stride, int k,
                                 const typename Operand::Weight* const (&panel)[vectors],
                                 Vec (&sum)[rows][vectors]) {
  typename Operand::Factor w[vectors];
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) w[j] = Operand::load_weights(panel[j]);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    const typename Operand::Factor xi = Operand::load_input(x + i * x_stride, k);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = Operand::multiply_add(xi, w[j], sum[i][j]);
  }
}

// How many products a row's sums get at a time in the end, where the tile is large. Each row's stores then come
// between other rows' products; all at once Zen 5 does them while the multipliers wait, 46 of 814 clock ticks
// for a tile of 64 products. Of more than two vectors registers hold the weights of one product.
template <class Operand, int rows, int vectors>
constexpr int products_by_rows() {
  if (rows * vectors < 16 || sizeof(typename Operand::Factor) > sizeof(Vec)) return 0;
  return vectors > 2 && last_products > 0 ? 1 : last_products;
}

// Sums of products [first, end) of each row: begin(i, j) is where they start from, finish(i, j, sum) gets them.
// Moves the panels on behind them.
template <class Operand, int rows, int vectors, class Begin, class Finish>
DIFFCORE_INLINE void sum_products(const typename Operand::Input* x, ptrdiff_t x_stride, int first,
                                  int end, const typename Operand::Weight* (&panel)[vectors],
                                  ptrdiff_t panel_step, Begin begin, Finish finish) {
  Vec sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = begin(i, j);
  constexpr int by_rows = products_by_rows<Operand, rows, vectors>();
  const bool stepwise = end - first < by_rows;
  int k = first;
  for (const int last = stepwise ? end : end - by_rows; k < last; ++k) {
    add_product<Operand>(x, x_stride, k, panel, sum);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) panel[j] += panel_step;
  }
  if constexpr (by_rows > 0) {
    if (!stepwise) {
      typename Operand::Factor w[by_rows][vectors];
#pragma GCC unroll 4
      for (int c = 0; c < by_rows; ++c)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j)
          w[c][j] = Operand::load_weights(panel[j] + c * panel_step);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) panel[j] += by_rows * panel_step;
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < by_rows; ++c) {
          const typename Operand::Factor xi = Operand::load_input(x + i * x_stride, k + c);
#pragma GCC unroll 8
          for (int j = 0; j < vectors; ++j)
            sum[i][j] = Operand::multiply_add(xi, w[c][j], sum[i][j]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) finish(i, j, sum[i][j]);
        asm volatile("" ::: "memory");  // the compiler leaves the stores here
      }
      return;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) finish(i, j, sum[i][j]);
}

// Sums of `rows` rows and `vectors` vectors of outputs, into `out`. Row k of a panel lies
// `panel_step` weights behind row k - 1: next to it in packed weights.
//
// The offset comes as three arguments. As a struct GCC would write it to the stack in pieces and copy it in
// larger ones; a load of several pieces waits until their stores have left the CPU, which here are queued
// behind the last tile's: 50 of 770 clock ticks on Zen 5.
template <class Operand, int rows, int vectors>
static inline __attribute__((noinline)) void tile_sums(
    const typename Operand::Input* __restrict x, ptrdiff_t x_stride, int depth,
    const typename Operand::Weight* __restrict panels, ptrdiff_t panel_step, const float* bias,
    const float* offset_rows, ptrdiff_t offset_stride, float* __restrict out,
    ptrdiff_t out_stride) {
  const typename Operand::Weight* panel[vectors];
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j)
    panel[j] = panels + static_cast<ptrdiff_t>(j / 2) * depth * panel_width + (j % 2) * W;
  sum_products<Operand, rows>(
      x, x_stride, 0, depth < first_chunk ? depth : first_chunk, panel, panel_step,
      [=](int i, int j) {
        const Vec start = load(bias + j * W);
        return offset_rows ? start + load(offset_rows + i * offset_stride + j * W) : start;
      },
      [=](int i, int j, Vec sum) { store(out + i * out_stride + j * W, sum); });
  for (int k = first_chunk; k < depth; k += sum_chunk) {
    sum_products<Operand, rows>(
        x, x_stride, k, depth - k < sum_chunk ? depth : k + sum_chunk, panel, panel_step,
        [](int, int) { return zero(); },
        [=](int i, int j, Vec sum) {
          float* const total = out + i * out_stride + j * W;
          store(total, load(total) + sum);
        });
  }
}

// The same for a panel of one vector: four interleaved partial sums a row.
template <class Operand, int rows>
static inline __attribute__((noinline)) void narrow_sums(
    const typename Operand::Input* __restrict x, ptrdiff_t x_stride, int depth,
    const typename Operand::Weight* __restrict panel, ptrdiff_t panel_step, const float* bias,
    const float* offset_rows, ptrdiff_t offset_stride, float* __restrict out,
    ptrdiff_t out_stride) {
  Vec part[4][rows][1];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    part[0][i][0] = load(bias);
    if (offset_rows) part[0][i][0] = part[0][i][0] + load(offset_rows + i * offset_stride);
#pragma GCC unroll 4
    for (int p = 1; p < 4; ++p) part[p][i][0] = zero();
  }
  int k = 0;
  for (; k + 4 <= depth; k += 4) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      const typename Operand::Weight* const row[1] = {panel + (k + p) * panel_step};
      add_product<Operand>(x, x_stride, k + p, row, part[p]);
    }
  }
  for (; k < depth; ++k) {
    const typename Operand::Weight* const row[1] = {panel + k * panel_step};
    add_product<Operand>(x, x_stride, k, row, part[0]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
    store(out + i * out_stride, (part[0][i][0] + part[1][i][0]) + (part[2][i][0] + part[3][i][0]));
}

// The same for a panel of groups.
template <class Operand, int rows, int group>
static inline __attribute__((noinline)) void grouped_sums(
    const typename Operand::Input* __restrict x, ptrdiff_t x_stride, int depth,
    const typename Operand::Weight* __restrict panel, ptrdiff_t, const float* bias,
    const float* offset_rows, ptrdiff_t offset_stride, float* __restrict out,
    ptrdiff_t out_stride) {
  constexpr int values = group * step_of<Operand>;
  Vec part[4][rows];
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p)
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) part[p][i] = zero();
  const int whole = depth / group;
  int k = 0;
  for (; k + 4 <= whole; k += 4) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p)
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
        part[p][i] = Operand::multiply_add(
            Operand::factor(repeat<group>(x + i * x_stride + (k + p) * values)),
            Operand::load_weights(panel + (k + p) * W), part[p][i]);
  }
  for (; k < whole; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
      part[0][i] =
          Operand::multiply_add(Operand::factor(repeat<group>(x + i * x_stride + k * values)),
                                Operand::load_weights(panel + k * W), part[0][i]);
  }
  if (const int rest = depth % group) {  // what lies behind the row is anything
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
      part[1][i] = Operand::multiply_add(
          Operand::factor(repeat_some<group>(x + i * x_stride + whole * values, rest)),
          Operand::load_weights(panel + whole * W), part[1][i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const Vec sum = (part[0][i] + part[1][i]) + (part[2][i] + part[3][i]);
    Vec start = load(bias);
    if (offset_rows) start = start + load(offset_rows + i * offset_stride);
    store(out + i * out_stride, start + sum_groups<group>(sum));
  }
}

template <class Operand>
using TileFunction = void (*)(const typename Operand::Input*, ptrdiff_t, int,
                              const typename Operand::Weight*, ptrdiff_t, const float*,
                              const float*, ptrdiff_t, float*, ptrdiff_t);

template <class Operand, int rows = max_tile_rows>
DIFFCORE_INLINE TileFunction<Operand> tile_function(int wanted) {
  if constexpr (rows == 1) {
    return tile_sums<Operand, 1, 2>;
  } else {
    return wanted == rows ? tile_sums<Operand, rows, 2> : tile_function<Operand, rows - 1>(wanted);
  }
}

// The most rows of a tile of four vectors. 6 by 4 are as many sums as 12 by 2 and read 10 vectors for 24 products,
// not 14. An Intel core that is left alone hides either behind the products; at times when 12 by 2 took 1.4 times as
// long, and products on registers alone no longer (a busy hyperthread beside it), 6 by 4 took 1.2 to 1.3 times.
template <class Operand>
constexpr int wide_rows = Operand::precision == Precision::float32 ? max_wide_rows : 3;

template <class Operand, int rows = wide_rows<Operand>>
DIFFCORE_INLINE TileFunction<Operand> wide_function(int wanted) {
  if constexpr (rows == 1) {
    return tile_sums<Operand, 1, 4>;
  } else {
    return wanted == rows ? tile_sums<Operand, rows, 4> : wide_function<Operand, rows - 1>(wanted);
  }
}

template <class Operand, int rows = max_narrow_rows>
DIFFCORE_INLINE TileFunction<Operand> narrow_function(int wanted) {
  if constexpr (rows == 1) {
    return narrow_sums<Operand, 1>;
  } else {
    return wanted == rows ? narrow_sums<Operand, rows> : narrow_function<Operand, rows - 1>(wanted);
  }
}

template <class Operand, int group, int rows = max_narrow_rows>
DIFFCORE_INLINE TileFunction<Operand> grouped_function(int wanted) {
  if constexpr (rows == 1) {
    return grouped_sums<Operand, 1, group>;
  } else {
    return wanted == rows ? grouped_sums<Operand, rows, group>
                          : grouped_function<Operand, group, rows - 1>(wanted);
  }
}

// For groups of that size, which is W at most.
template <class Operand, int group = W>
DIFFCORE_INLINE TileFunction<Operand> grouped_function_of(int size, int rows) {
  if constexpr (!Operand::groups || group == 1) {
    return nullptr;
  } else {
    return size == group ? grouped_function<Operand, group>(rows)
                         : grouped_function_of<Operand, group / 2>(size, rows);
  }
}

// sums[i][c] = sum over k of a[k][i] b[k][c], for `rows` columns of `a` and a panel `b`: the
// product of two matrices that lie row by row along the summed dimension, as a weight's gradient
// wants it.
// With `more` it is added to what `sums` holds.
template <int rows>
static inline __attribute__((noinline)) void outer_sums(const float* __restrict a,
                                                        ptrdiff_t a_stride,
                                                        const float* __restrict b, int depth,
                                                        float* __restrict sums, bool more) {
  Vec sum[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) sum[i][0] = sum[i][1] = zero();
  for (int k = 0; k < depth; ++k, a += a_stride, b += panel_width) {
    const Vec b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec ai = broadcast(a[i]);
      sum[i][0] = fma(ai, b0, sum[i][0]);
      sum[i][1] = fma(ai, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    float* to = sums + i * panel_width;
    store(to, more ? load(to) + sum[i][0] : sum[i][0]);
    store(to + W, more ? load(to + W) + sum[i][1] : sum[i][1]);
  }
}

using OuterFunction = void (*)(const float*, ptrdiff_t, const float*, int, float*, bool);

template <int rows = max_tile_rows>
DIFFCORE_INLINE OuterFunction outer_function(int wanted) {
  if constexpr (rows == 1) {
    return outer_sums<1>;
  } else {
    return wanted == rows ? outer_sums<rows> : outer_function<rows - 1>(wanted);
  }
}

// ---- blocks of rows ---------------------------------------------------------------------------

constexpr int amx_rows = 32;

// The most rows of one block_sums, for a panel of that many vectors.
template <class Operand>
DIFFCORE_INLINE constexpr int block_rows(int vectors) {
  return Operand::whole_tiles ? amx_rows : vectors == 1 ? max_narrow_rows : max_tile_rows;
}

// How many blocks `rows` rows make, as even as they come, so that no size leaves a sliver behind.
template <class Operand>
DIFFCORE_INLINE int block_count(int rows, int vectors) {
  return static_cast<int>(ceil_div(rows, block_rows<Operand>(vectors)));
}

#if defined(DIFFCORE_AMX)
// A tile is up to 16 rows of 64 bytes: 32 bfloat16 of `in` on the left, 16 pairs of `in` by 16 outputs
// on the right.
constexpr int amx_depth = 16;  // pairs

// The shapes of this thread's tile registers: 0 to 3 hold the sums, row by row, 4 and 5 the rows, 6
// and 7 the weights. Setting them takes some 200 clock ticks, so whoever calls block_sums in a loop keeps
// one of these outside; one at a time, since its end leaves the thread without any shape.
class AmxTiles {
 public:
  AmxTiles() = default;
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() {
    if (rows_) _tile_release();
  }
  void shape_for(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const int upper = rows < 16 ? rows : 16;
    Config config;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_weight = tile >= 6, is_lower = tile == 2 || tile == 3 || tile == 5;
      config.rows[tile] = static_cast<uint8_t>(is_weight  ? amx_depth
                                               : is_lower ? rows - upper
                                                          : upper);
      config.row_bytes[tile] = config.rows[tile] ? 64 : 0;
    }
    // GCC's intrinsic says that it reads 8 bytes of the 64: without this the others need not be there.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  int rows_ = 0;
};

// tile_sums and narrow_sums for up to amx_rows rows: two tiles high, `vectors` wide. Pairs that don't
// fill a tile are summed first, in vectors.
template <int vectors>
static __attribute__((noinline)) void amx_sums(AmxTiles& tiles, int rows, const uint16_t* x,
                                               ptrdiff_t x_stride, int depth, const uint32_t* panel,
                                               ptrdiff_t panel_step, const float* bias,
                                               const float* offset_rows, ptrdiff_t offset_stride,
                                               float* out, ptrdiff_t out_stride) {
  const int whole = depth / amx_depth * amx_depth;
  const float* start = bias;
  ptrdiff_t start_stride = 0;
  if (whole < depth || offset_rows) {
    constexpr int limit = vectors == 1 ? max_narrow_rows : max_tile_rows;
    for (int row = 0; row < rows; row += limit) {
      const int count = rows - row < limit ? rows - row : limit;
      const auto function = vectors == 1 ? narrow_function<Bfloat16Operand>(count)
                                         : tile_function<Bfloat16Operand>(count);
      function(x + row * x_stride + 2 * whole, x_stride, depth - whole, panel + whole * panel_step,
               panel_step, bias, offset_rows ? offset_rows + row * offset_stride : nullptr,
               offset_stride, out + row * out_stride, out_stride);
    }
    if (whole == 0) return;
    start = out;
    start_stride = out_stride;
  }

  // Tile instructions don't tell the compiler which memory they read.
  asm volatile("" ::: "memory");
  tiles.shape_for(rows);
  const bool lower = rows > 16;
  const ptrdiff_t x_bytes = 2 * x_stride, panel_bytes = 4 * panel_step;
  const ptrdiff_t start_bytes = 4 * start_stride, out_bytes = 4 * out_stride;
  const float* start_below = start + 16 * start_stride;
  _tile_loadd(0, start, start_bytes);
  if (vectors == 2) _tile_loadd(1, start + W, start_bytes);
  if (lower) {
    _tile_loadd(2, start_below, start_bytes);
    if (vectors == 2) _tile_loadd(3, start_below + W, start_bytes);
  }
  for (int k = 0; k < whole; k += amx_depth, panel += amx_depth * panel_step) {
    _tile_loadd(6, panel, panel_bytes);
    _tile_loadd(4, x + 2 * k, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (vectors == 2) {
      _tile_loadd(7, panel + W, panel_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (!lower) continue;
    _tile_loadd(5, x + 16 * x_stride + 2 * k, x_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if (vectors == 2) _tile_dpbf16ps(3, 5, 7);
  }
  float* below = out + 16 * out_stride;
  _tile_stored(0, out, out_bytes);
  if (vectors == 2) _tile_stored(1, out + W, out_bytes);
  if (lower) {
    _tile_stored(2, below, out_bytes);
    if (vectors == 2) _tile_stored(3, below + W, out_bytes);
  }
  asm volatile("" ::: "memory");
}
#endif

// What block_sums keeps from one block to the next.
template <class Operand>
struct BlockState {
#if defined(DIFFCORE_AMX)
  AmxTiles tiles;
#endif
};

// Sums of a block of rows and a panel of 1 or 2 vectors of outputs.
template <class Operand>
DIFFCORE_INLINE void block_sums(BlockState<Operand>& state, int rows, int vectors,
                                const typename Operand::Input* x, ptrdiff_t x_stride, int depth,
                                const typename Operand::Weight* panel, ptrdiff_t panel_step,
                                Offset offset, float* out, ptrdiff_t out_stride) {
#if defined(DIFFCORE_AMX)
  if constexpr (Operand::whole_tiles) {
    const auto function = vectors == 1 ? amx_sums<1> : amx_sums<2>;
    return function(state.tiles, rows, x, x_stride, depth, panel, panel_step, offset.bias,
                    offset.rows, offset.stride, out, out_stride);
  }
#endif
  (void)state;
  const auto function =
      vectors == 1 ? narrow_function<Operand>(rows) : tile_function<Operand>(rows);
  function(x, x_stride, depth, panel, panel_step, offset.bias, offset.rows, offset.stride, out,
           out_stride);
}

// Where a block's sums are written.
struct Place {
  float* sums;
  ptrdiff_t stride;
};

// y = x W^T + offset for `rows` rows, block by block. A block's sums are written to place_of(row, column,
// column_count). Before that prologue(row, row_count, column, column_count) may fetch what will be needed;
// afterwards comes epilogue(row, row_count, column, column_count, sums, sums_stride).
template <class Operand, class PlaceOf, class Prologue, class Epilogue>
DIFFCORE_INLINE void linear_in(PlaceOf place_of, const typename Operand::Input* x,
                               ptrdiff_t x_stride, int rows, const PackedLinear& layer,
                               Offset offset, Prologue prologue, Epilogue epilogue) {
  const int depth = Operand::depth(layer.in);
  const typename Operand::Weight* panels =
      static_cast<const typename Operand::Weight*>(layer.panels);
  const int columns = padded(layer.out);
  const bool four_at_once =
      W < 16 || panel_bytes<Operand>(layer.in, layer.out) <= four_panels_at_once;
  BlockState<Operand> state;
  for (int n = 0; n < columns;) {
    const int left = columns - n;
    int width = left > W ? panel_width : W;
    const int group = left > W ? 1 : group_size<Operand>(layer.in, layer.out - n);
    // With few rows, several panels at once: enough independent sums to hide the FMA's latency.
    if (Operand::whole_tiles) {
      // A tile has enough of them however few its rows.
    } else if (rows == 1 && left >= 4 * panel_width && four_at_once) {
      width = 4 * panel_width;
    } else if ((rows <= 3 || wide_rows<Operand> > 3) && left >= 2 * panel_width) {
      width = 2 * panel_width;
    }
    const int step = width < panel_width ? width : panel_width;
    const int blocks = width > panel_width ? static_cast<int>(ceil_div(rows, wide_rows<Operand>))
                                           : block_count<Operand>(rows, step / W);
    for (int b = 0, row = 0; b < blocks; ++b) {
      const int count = rows / blocks + (b < rows % blocks);
      const typename Operand::Input* from = x + row * x_stride;
      const Offset here = {offset.bias + n,
                           offset.rows ? offset.rows + row * offset.stride + n : nullptr,
                           offset.stride};
      const Place to = place_of(row, n, width);
      prologue(row, count, n, width);
      const auto function = group > 1                  ? grouped_function_of<Operand>(group, count)
                            : width == 4 * panel_width ? tile_sums<Operand, 1, 8>
                            : width == 2 * panel_width ? wide_function<Operand>(count)
                                                       : nullptr;
      if (function) {
        function(from, x_stride, depth, panels, step, here.bias, here.rows, here.stride, to.sums,
                 to.stride);
      } else {
        block_sums<Operand>(state, count, step / W, from, x_stride, depth, panels, step, here,
                            to.sums, to.stride);
      }
      epilogue(row, count, n, width, to.sums, to.stride);
      row += count;
    }
    panels += static_cast<ptrdiff_t>(depth) * width;
    n += width;
  }
}

// The same in memory of its own, which the next block's sums are written to as well.
template <class Operand, class Prologue, class Epilogue>
DIFFCORE_INLINE void linear(const typename Operand::Input* x, ptrdiff_t x_stride, int rows,
                            const PackedLinear& layer, Offset offset, Prologue prologue,
                            Epilogue epilogue) {
  alignas(64) float sums[block_rows<Operand>(2) * max_vectors * W];
  linear_in<Operand>([&](int, int, int columns) { return Place{sums, columns}; }, x, x_stride, rows,
                     layer, offset, prologue, epilogue);
}

template <class Operand, class Epilogue>
DIFFCORE_INLINE void linear(const typename Operand::Input* x, ptrdiff_t x_stride, int rows,
                            const PackedLinear& layer, Offset offset, Epilogue epilogue) {
  linear<Operand>(x, x_stride, rows, layer, offset, [](int, int, int, int) {}, epilogue);
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
