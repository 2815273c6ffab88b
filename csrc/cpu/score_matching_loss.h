// Diff-SR's score matching loss with its gradients: zeta's last layer, [batch, features, state], is
// contracted with psi piece by piece and never exists.
//
// The loss is a scalar, so its gradients are computed with it and only scaled afterwards. With W_s
// the rows d * S + s of the weight, [features, hidden], and g_s the loss's slope at coordinate s of
// the score, one number a row:
//   Z_s = hidden W_s^T + b_s          score_s = sum_d psi Z_s       grad psi    = sum_s g_s Z_s
//   Y_s = psi W_s                                                   grad hidden = sum_s g_s Y_s
//   dW_s = (g_s psi)^T hidden         db_s = sum of g_s psi over the batch
// One phase a line, each a matrix product of the same size, with its own way to share the work:
// by rows, by columns of hidden, by weights. Where the weight is to be stepped, the last phase does that
// in place of handing dW_s out. Every element is summed by one thread in an order that
// depends on the sizes of its own sum alone, so neither threads nor (up to the 1 / batch in g) the
// other rows matter to a row.
//
// All three are block_sums on panels of two vectors, zero-padded. Rows that lie as they are needed,
// W_s in the first phase, aren't copied. In the first phase a vector's lanes are rows of the batch:
// what is one number a row (score, g) is then one vector, and no sum runs across lanes.
#pragma once

#include "adam.h"
#include "operand.h"
#include "weight_gradient.h"

namespace diffcore {
namespace DIFFCORE_ISA {

constexpr int score_rows = 128;   // rows that share a block of features' weights
constexpr int hidden_block = 4;   // panels of W_s that share a copy
constexpr int hidden_rows = 256;  // rows that use such a copy
constexpr int batch_depth = 256;  // rows summed before they join a weight's gradient
constexpr int longest_sum = 512;  // values summed before they join the total
constexpr int state_chunk = 16;   // coordinates summed before they join the total

// Features that share such rows, from L2: some register blocks of them.
template <class Operand>
constexpr int feature_share = Operand::whole_tiles ? 2 * amx_rows : 4 * max_tile_rows;

// ---- packing ---------------------------------------------------------------------------------

// Up to panel_width rows of `in` values, one a lane: panel[k][row]. Missing rows are zero.
template <class Operand>
static void pack_lanes(const float* rows, ptrdiff_t stride, int count, int in,
                       typename Operand::Weight* panel) {
  if (count > W) return pack_panels<Operand>(rows, stride, 1, in, count, panel);
  for (int k = 0; k < in; k += step_of<Operand>) {
    for (int c = 0; c < panel_width; ++c) {
      const float* value = rows + c * stride + k;
      *panel++ = c < count ? Operand::weight(value[0], k + 1 < in ? value[1] : 0.0f)
                           : typename Operand::Weight(0);
    }
  }
}

// ---- the product -----------------------------------------------------------------------------

// `count` rows cut into register blocks that are as even as they come.
template <class Operand>
struct RegisterBlocks {
  int64_t blocks;
  int count;
  explicit RegisterBlocks(int all) : blocks(block_count<Operand>(all, 2)), count(all) {}
  Span operator[](int64_t b) const { return tile_span(count, blocks, b); }
};

// A product keeps the multipliers busy and most of the rest of the CPU idle. So it may be given work on
// the side, of which it does a share, aside(), every so many steps of its sum.
constexpr int side_step = 16;
DIFFCORE_INLINE int shares_of(int depth) { return depth / side_step; }

// The shares of as many sums of that many steps, each cut into chunks: one at least.
DIFFCORE_INLINE int all_shares(int64_t sums, int depth, int64_t chunks) {
  const auto shares = static_cast<int>(sums * chunks) * shares_of(static_cast<int>(depth / chunks));
  return shares > 0 ? shares : 1;
}

struct NothingAside {};
template <class Aside>
constexpr bool any_work = true;
template <>
constexpr bool any_work<NothingAside> = false;

// Sums of a register block of rows and a panel, which `use` gets row by row while they are in registers:
// use(row, first vector, second), and use.finish() after the last.
template <class Operand, int rows, class Use, class Aside>
static inline __attribute__((noinline)) void use_sums(const typename Operand::Input* __restrict x,
                                                      ptrdiff_t x_stride, int depth,
                                                      const typename Operand::Weight* panel,
                                                      Use use, Aside& aside) {
  Vec sum[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) sum[i][0] = sum[i][1] = zero();
  const typename Operand::Weight* at[2] = {panel, panel + W};
  int k = 0;
  if constexpr (any_work<Aside>) {
    for (int share = shares_of(depth); share > 0; --share) {
      aside();
      for (int end = k + side_step; k < end; ++k, at[0] += panel_width, at[1] += panel_width)
        add_product<Operand>(x, x_stride, k, at, sum);
    }
  }
  for (; k < depth; ++k, at[0] += panel_width, at[1] += panel_width)
    add_product<Operand>(x, x_stride, k, at, sum);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) use(i, sum[i][0], sum[i][1]);
  use.finish();
}

template <class Operand, class Use, class Aside, int rows = max_tile_rows>
DIFFCORE_INLINE auto use_sums_function(int wanted) {
  if constexpr (rows == 1) {
    return use_sums<Operand, 1, Use, Aside>;
  } else {
    return wanted == rows ? use_sums<Operand, rows, Use, Aside>
                          : use_sums_function<Operand, Use, Aside, rows - 1>(wanted);
  }
}

template <class Operand, class Use, class Aside>
DIFFCORE_INLINE void product(BlockState<Operand>& state, const typename Operand::Input* x,
                             ptrdiff_t x_stride, int rows, const typename Operand::Weight* panel,
                             int depth, Use use, Aside& aside) {
  if constexpr (Operand::whole_tiles) {  // whose registers no other instruction reads
    alignas(64) float sums[block_rows<Operand>(2) * panel_width];
    if constexpr (any_work<Aside>)
      for (int share = shares_of(depth); share > 0; --share) aside();
    block_sums<Operand>(state, rows, 2, x, x_stride, depth, panel, panel_width,
                        {no_offset, nullptr, 0}, sums, panel_width);
    for (int i = 0; i < rows; ++i)
      use(i, load(sums + i * panel_width), load(sums + i * panel_width + W));
    use.finish();
  } else {
    use_sums_function<Operand, Use, Aside>(rows)(x, x_stride, depth, panel, use, aside);
  }
}

// A block of rows of weights that a later product reads. Rounded values are prepared ahead, line by line,
// from L3 or memory: short pieces of rows that lie far apart look random to the hardware.
template <class Operand>
struct RowsAhead;

template <>
struct RowsAhead<Float32Operand> {
  Rows<const float> from;
  RowsAhead(Rows<const float> rows, int, int, Rows<float>, int) : from(rows) {}
  Rows<const float> finish() const { return from; }
};
template <>
constexpr bool any_work<RowsAhead<Float32Operand>> = false;

template <>
struct RowsAhead<Bfloat16Operand> {
  Rows<const float> from;
  int rows;
  int columns;
  Rows<uint16_t> to;
  int lines_per_share;
  int row = 0;
  int column = 0;

  RowsAhead(Rows<const float> from, int rows, int columns, Rows<uint16_t> to, int shares)
      : from(from),
        rows(rows),
        columns(columns),
        to(to),
        lines_per_share(static_cast<int>(ceil_div(rows * (columns / line), shares))) {}

  __attribute__((always_inline)) void operator()() {
    for (int i = 0; i < lines_per_share && row < rows; ++i) {
      const float* values = from.row(row) + column;
      __builtin_prefetch(values + from.stride, 0, 2);  // for when the next row's turn comes
      for (int v = 0; v < line; v += W)
        Bfloat16Operand::store_activation(to.row(row) + column + v, load(values + v));
      column += line;
      if (column + line <= columns) continue;
      column = 0;
      ++row;
    }
  }

  // Does what is left: rows, and what makes no whole line of each.
  Rows<const uint16_t> finish() {
    const int whole = columns / line * line;
    if (column > 0) {
      convert_rows<Bfloat16Operand>(from.row(row) + column, from.stride, 1, whole - column,
                                    {to.row(row) + column, to.stride});
      ++row;
    }
    convert_rows<Bfloat16Operand>(from.row(row), from.stride, rows - row, whole,
                                  rows_from(to, row));
    convert_rows<Bfloat16Operand>(from.data + whole, from.stride, rows, columns - whole,
                                  {to.data + whole, to.stride});
    return {to.data, to.stride};
  }
};

// Sums that are stored, or added to what is there.
struct StoreSums {
  float* to;
  ptrdiff_t stride;
  bool more;
  __attribute__((always_inline)) void operator()(int i, Vec first, Vec second) const {
    float* row = to + i * stride;
    store(row, more ? load(row) + first : first);
    store(row + W, more ? load(row + W) + second : second);
  }
  __attribute__((always_inline)) void finish() const {}
};

// Whether the weight's gradient is needed, to be given or to be used up.
DIFFCORE_INLINE bool of_weight(const ScoreMatchingLossCall& call) {
  return call.grad_weight || call.weight_step;
}

template <class Operand>
DIFFCORE_INLINE int64_t feature_shares(const ScoreMatchingLossCall& call) {
  return ceil_div(call.features, feature_share<Operand>);
}

// ---- what the phases share -------------------------------------------------------------------

template <class Operand>
struct ScoreMatching {
  using Input = typename Operand::Input;
  using Weight = typename Operand::Weight;
  int64_t row_panels;     // the batch in panels of lanes
  int hidden_panels;      // the columns of hidden in panels
  Weight* hidden_lanes;   // [row panel][hidden][lane]
  float* psi_lanes;       // [row panel][feature][lane]
  float* grad_psi_lanes;  // the same
  float* offset_lanes;    // [row panel][state][lane]
  float* score_weight;    // [row]
  float* slope;           // [state][row]: g, zero in padding rows
  double* row_loss;       // [row]
  Rows<Input> psi;
  Weight* hidden_columns;        // [hidden panel][row][column]
  double* weight_squared_norms;  // [item of the last phase]: of its piece of the weight's gradient

  int64_t rows() const { return row_panels * panel_width; }  // padding included

  static ScoreMatching take(const ScoreMatchingLossCall& call, Carver* memory) {
    const int64_t panels = ceil_div(call.batch, panel_width), rows = panels * panel_width;
    ScoreMatching m;
    m.row_panels = panels;
    m.hidden_panels = static_cast<int>(ceil_div(call.hidden_dim, panel_width));
    m.hidden_lanes = memory->take<Weight>(4 * rows * Operand::depth(call.hidden_dim));
    m.psi_lanes = memory->take<float>(4 * rows * call.features);
    m.grad_psi_lanes = memory->take<float>(call.grad_psi ? 4 * rows * call.features : 0);
    m.offset_lanes = memory->take<float>(4 * rows * call.state_dim);
    m.score_weight = memory->take<float>(4 * rows);
    m.slope = memory->take<float>(4 * rows * call.state_dim);
    m.row_loss = memory->take<double>(8 * rows);
    m.psi = take_rows<Input>(memory, call.grad_hidden ? call.batch : 0, call.features);
    m.hidden_columns = memory->take<Weight>(
        of_weight(call) ? 4 * static_cast<int64_t>(m.hidden_panels) * panel_width *
                              Operand::depth(static_cast<int>(call.batch))
                        : 0);
    m.weight_squared_norms = memory->take<double>(
        call.weight_step ? 8 * feature_shares<Operand>(call) * call.state_dim : 0);
    return m;
  }

  void pack_row_panel(const ScoreMatchingLossCall& call, int64_t p) const {
    const int64_t first = p * panel_width, left = call.batch - first;
    const int count = left < panel_width ? static_cast<int>(left) : panel_width;
    const int depth = Operand::depth(call.hidden_dim);
    pack_lanes<Operand>(call.hidden + first * call.hidden_dim, call.hidden_dim, count,
                        call.hidden_dim, hidden_lanes + first * depth);
    pack_lanes<Float32Operand>(call.psi + first * call.features, call.features, count,
                               call.features, psi_lanes + first * call.features);
    pack_lanes<Float32Operand>(call.offset + first * call.state_dim, call.state_dim, count,
                               call.state_dim, offset_lanes + first * call.state_dim);
    for (int i = 0; i < panel_width; ++i)
      score_weight[first + i] = i < count ? call.score_weight[first + i] : 0.0f;
    if (call.grad_hidden) {
      convert_rows<Operand>(call.psi + first * call.features, call.features, count, call.features,
                            {psi.row(first), psi.stride});
    }
  }

  void pack_hidden_panel(const ScoreMatchingLossCall& call, int n) const {
    const int column = n * panel_width, left = call.hidden_dim - column;
    const int batch = static_cast<int>(call.batch);
    pack_columns<Operand>(call.hidden + column, call.hidden_dim, batch,
                          left < panel_width ? left : panel_width,
                          hidden_columns + static_cast<ptrdiff_t>(column) * Operand::depth(batch));
  }
};

// ---- score, loss and the gradient of psi -------------------------------------------------------

template <class Operand>
struct ScoreBuffers {
  float* zeta;   // [row panel][feature][lane]: Z_s of a tile
  float* score;  // [row panel][lane]
  float* part;   // [row panel][feature][lane]: psi's gradient by some coordinates
  Rows<typename Operand::Input> weight;  // of two register blocks

  static ScoreBuffers take(const ScoreMatchingLossCall& call, int64_t panels, Carver* memory) {
    ScoreBuffers b;
    b.zeta = memory->take<float>(4 * panels * panel_width * call.features);
    b.score = memory->take<float>(4 * panels * panel_width);
    b.part = memory->take<float>(call.grad_psi ? 4 * panels * panel_width * call.features : 0);
    const bool copies = Operand::precision == Precision::bfloat16;
    b.weight = take_rows<typename Operand::Input>(memory, copies ? 2 * block_rows<Operand>(2) : 0,
                                                  call.hidden_dim);
    return b;
  }
};

// Z_s of a block of features, and what they add to the score of a panel's rows.
struct ContractFeatures {
  float* zeta;  // [feature][lane]
  bool more;    // a long sum's first part is there already
  const float* bias;
  ptrdiff_t bias_stride;
  const float* psi;  // [feature][lane]
  float* score;      // [lane]
  // Two a vector, to hide the FMA's latency.
  Vec sum[2][2] = {{zero(), zero()}, {zero(), zero()}};

  __attribute__((always_inline)) void operator()(int d, Vec first, Vec second) {
    const Vec b = broadcast(bias[d * bias_stride]);
    const Vec z[2] = {first + b, second + b};
    for (int v = 0; v < 2; ++v) {
      float* to = zeta + d * panel_width + v * W;
      const Vec all = more ? load(to) + z[v] : z[v];
      store(to, all);
      sum[d % 2][v] = fma(load(psi + d * panel_width + v * W), all, sum[d % 2][v]);
    }
  }
  __attribute__((always_inline)) void finish() const {
    for (int v = 0; v < 2; ++v) store(score + v * W, load(score + v * W) + (sum[0][v] + sum[1][v]));
  }
};

template <class Operand>
static void score_tile(const ScoreMatchingLossCall& call, const ScoreMatching<Operand>& m,
                       Span panels, const ScoreBuffers<Operand>& b) {
  using Weight = typename Operand::Weight;
  const int D = call.features, S = call.state_dim, H = call.hidden_dim;
  const int depth = Operand::depth(H);
  const ptrdiff_t feature_stride = static_cast<ptrdiff_t>(S) * H;
  const RegisterBlocks<Operand> feature_blocks(D);
  const int64_t chunks = ceil_div(H, longest_sum);
  BlockState<Operand> products;
  const Vec scale = broadcast(static_cast<float>(2.0 / static_cast<double>(call.batch)));
  for (int i = 0; i < panels.rows * panel_width; ++i)
    m.row_loss[panels.first * panel_width + i] = 0.0;

  const int64_t all_blocks = feature_blocks.blocks * S;
  const int shares = all_shares(panels.rows, depth, chunks);
  const auto rows_ahead = [&](int64_t index) {
    const int64_t coordinate = index / feature_blocks.blocks;
    const Span features = feature_blocks[index % feature_blocks.blocks];
    const float* first = call.weight + features.first * feature_stride + coordinate * H;
    return RowsAhead<Operand>({first, feature_stride}, index < all_blocks ? features.rows : 0, H,
                              rows_from(b.weight, index % 2 * block_rows<Operand>(2)), shares);
  };
  auto ahead = rows_ahead(0);

  for (int s = 0; s < S; ++s) {
    for (int i = 0; i < panels.rows * panel_width; ++i) b.score[i] = 0.0f;
    // A block of features stays in L1 while the rows' panels pass by, from L2.
    for (int64_t block = 0; block < feature_blocks.blocks; ++block) {
      const Span features = feature_blocks[block];
      const int64_t d = features.first;
      const auto weight = ahead.finish();
      ahead = rows_ahead(s * feature_blocks.blocks + block + 1);
      for (int p = 0; p < panels.rows; ++p) {
        const int64_t first = (panels.first + p) * panel_width;
        float* zeta = b.zeta + (static_cast<ptrdiff_t>(p) * D + d) * panel_width;
        const Weight* lanes = m.hidden_lanes + first * depth;
        for (int64_t c = 0; c + 1 < chunks; ++c) {
          const Span part = tile_span(depth, chunks, c);
          product<Operand>(products, weight.data + part.first * step_of<Operand>, weight.stride,
                           features.rows, lanes + part.first * panel_width, part.rows,
                           StoreSums{zeta, panel_width, c > 0}, ahead);
        }
        const Span last = tile_span(depth, chunks, chunks - 1);
        product<Operand>(
            products, weight.data + last.first * step_of<Operand>, weight.stride, features.rows,
            lanes + last.first * panel_width, last.rows,
            ContractFeatures{zeta, chunks > 1, call.bias + d * S + s, S,
                             m.psi_lanes + first * D + d * panel_width, b.score + p * panel_width},
            ahead);
      }
    }
    for (int p = 0; p < panels.rows; ++p) {
      const int64_t first = (panels.first + p) * panel_width;
      const float* zeta = b.zeta + static_cast<ptrdiff_t>(p) * D * panel_width;
      float* grad_psi = m.grad_psi_lanes + first * D;
      float* part_sum = b.part + static_cast<ptrdiff_t>(p) * D * panel_width;
      const bool chunk_ends = (s + 1) % state_chunk == 0 || s + 1 == S;
      float* slope = m.slope + s * m.rows() + first;
      float residual[panel_width];
      for (int v = 0; v < panel_width; v += W) {
        const Vec w = load(m.score_weight + first + v);
        const Vec r = fma(w, load(b.score + p * panel_width + v),
                          load(m.offset_lanes + first * S + s * panel_width + v));
        store(residual + v, r);
        const Vec g = scale * r * w;
        store(slope + v, g);
        if (!call.grad_psi) continue;
        for (int d = 0; d < D; ++d) {
          const Vec z = load(zeta + d * panel_width + v);
          float *part = part_sum + d * panel_width + v, *total = grad_psi + d * panel_width + v;
          const Vec sum = s % state_chunk == 0 ? g * z : fma(g, z, load(part));
          store(part, sum);
          if (chunk_ends) store(total, s < state_chunk ? sum : load(total) + sum);
        }
      }
      for (int i = 0; i < panel_width; ++i)
        m.row_loss[first + i] += static_cast<double>(residual[i]) * residual[i];
    }
  }
  if (!call.grad_psi) return;
  for (int p = 0; p < panels.rows; ++p) {
    const int64_t first = (panels.first + p) * panel_width;
    const float* lanes = m.grad_psi_lanes + first * D;
    for (int64_t i = 0; i < panel_width && first + i < call.batch; ++i)
      for (int d = 0; d < D; ++d)
        call.grad_psi[(first + i) * D + d] = lanes[static_cast<ptrdiff_t>(d) * panel_width + i];
  }
}

// ---- the gradient of hidden --------------------------------------------------------------------

template <class Operand>
struct HiddenBuffers {
  typename Operand::Weight* weight;  // [panel][feature][column]
  float* part;                       // [panel][row][column]: the sum over some coordinates
  float* total;                      // the same: over all

  static HiddenBuffers take(const ScoreMatchingLossCall& call, Carver* memory) {
    HiddenBuffers b;
    b.weight = memory->take<typename Operand::Weight>(int64_t{4} * hidden_block * panel_width *
                                                      Operand::depth(call.features));
    b.part = memory->take<float>(4 * hidden_block * panel_width * hidden_rows);
    b.total = memory->take<float>(4 * hidden_block * panel_width * hidden_rows);
    return b;
  }
};

// Adds sums times one factor a row.
struct AddScaled {
  const float* factor;
  float* to;  // [row][column]
  __attribute__((always_inline)) void operator()(int i, Vec first, Vec second) const {
    const Vec f = broadcast(factor[i]);
    float* row = to + i * panel_width;
    store(row, fma(f, first, load(row)));
    store(row + W, fma(f, second, load(row + W)));
  }
  __attribute__((always_inline)) void finish() const {}
};

// Gradient of some rows at the columns of `panels`.
template <class Operand>
static void hidden_gradient(const ScoreMatchingLossCall& call, const ScoreMatching<Operand>& m,
                            Span rows, Span panels, const HiddenBuffers<Operand>& b) {
  const int D = call.features, S = call.state_dim, H = call.hidden_dim;
  const int depth = Operand::depth(D);
  const RegisterBlocks<Operand> row_blocks(rows.rows);
  const int64_t chunks = ceil_div(D, longest_sum);
  const int shares = all_shares(panels.rows * row_blocks.blocks, depth, chunks);
  BlockState<Operand> products;
  const int64_t column = panels.first * panel_width;
  const int left = static_cast<int>(H - column);
  const int columns = left < panels.rows * panel_width ? left : panels.rows * panel_width;
  const int values = panels.rows * panel_width * rows.rows;
  memset(b.part, 0, sizeof(float) * static_cast<size_t>(values));
  memset(b.total, 0, sizeof(float) * static_cast<size_t>(values));
  for (int s = 0; s < S; ++s) {
    pack_columns<Operand>(call.weight + static_cast<ptrdiff_t>(s) * H + column,
                          static_cast<ptrdiff_t>(S) * H, D, columns, b.weight);
    const float* slope = m.slope + s * m.rows() + rows.first;
    Prefetcher<float> fetch(call.weight + static_cast<ptrdiff_t>(s + 1) * H + column,
                            static_cast<ptrdiff_t>(S) * H, s + 1 < S ? D : 0, columns, shares);
    for (int n = 0; n < panels.rows; ++n) {
      for (int64_t block = 0; block < row_blocks.blocks; ++block) {
        const Span r = row_blocks[block];
        const AddScaled add = {
            slope + r.first,
            b.part + (static_cast<ptrdiff_t>(n) * rows.rows + r.first) * panel_width};
        for (int64_t c = 0; c < chunks; ++c) {
          const Span k = tile_span(depth, chunks, c);
          product<Operand>(products, m.psi.row(rows.first + r.first) + k.first * step_of<Operand>,
                           m.psi.stride, r.rows,
                           b.weight + (static_cast<ptrdiff_t>(n) * depth + k.first) * panel_width,
                           k.rows, add, fetch);
        }
      }
    }
    if ((s + 1) % state_chunk != 0 && s + 1 < S) continue;
    for (int i = 0; i < values; i += W) {
      store(b.total + i, load(b.total + i) + load(b.part + i));
      store(b.part + i, zero());
    }
  }
  for (int n = 0; n < columns; n += panel_width) {
    const int present = columns - n < panel_width ? columns - n : panel_width;
    const float* total = b.total + static_cast<ptrdiff_t>(n) * rows.rows;
    for (int i = 0; i < rows.rows; ++i)
      memcpy(call.grad_hidden + (rows.first + i) * H + column + n, total + i * panel_width,
             sizeof(float) * static_cast<size_t>(present));
  }
}

// ---- the gradients of weight and bias ----------------------------------------------------------

// g_s psi, transposed: [feature][row], and the bias's gradient, its sum over rows.
template <class Operand>
static void scale_features(const ScoreMatchingLossCall& call, const ScoreMatching<Operand>& m,
                           int s, Span features, Span rows, Rows<typename Operand::Input> scaled) {
  const float* slope = m.slope + s * m.rows() + rows.first;
  for (int i = 0; i < features.rows; ++i) {
    const int64_t d = features.first + i;
    Vec sum = zero();
    for (int n = 0; n < rows.rows; n += panel_width) {
      const float* psi = m.psi_lanes + (rows.first + n) * call.features + d * panel_width;
      for (int v = 0; v < panel_width; v += W) {
        const Vec p = load(slope + n + v) * load(psi + v);
        sum = sum + p;
        Operand::store_activation(scaled.row(i) + n + v, p);
      }
    }
    if (!call.grad_bias) continue;
    float lanes[W];
    store(lanes, sum);
    for (int half = W / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    float* to = call.grad_bias + d * call.state_dim + s;
    *to = rows.first == 0 ? lanes[0] : *to + lanes[0];
  }
}

// A register block of features and a panel of columns of the weight at one coordinate, and a product
// that makes some rows' part of its gradient.
template <class Operand>
struct WeightTile {
  int64_t index;    // in its item
  ptrdiff_t first;  // its first value in the weight
  int rows;
  int columns;
  const typename Operand::Input* scaled;
  ptrdiff_t scaled_stride;
  const typename Operand::Weight* hidden;
  int depth;
  bool more;  // a part is there already
  bool last;  // no other will follow
};

// Gradient of some features at coordinate s: sums over the batch, in chunks of rows so that rounding
// errors don't pile up along it. use(tile) gets the weight's, tile by tile and chunk by chunk.
template <class Operand, class Use>
DIFFCORE_INLINE void for_weight_tiles(const ScoreMatchingLossCall& call,
                                      const ScoreMatching<Operand>& m, int s, Span features,
                                      Use use) {
  const int H = call.hidden_dim, depth = Operand::depth(static_cast<int>(call.batch));
  const RegisterBlocks<Operand> blocks(features.rows);
  alignas(64) typename Operand::Input scaled_memory[block_rows<Operand>(2) * (batch_depth + line)];
  const Rows<typename Operand::Input> scaled = {scaled_memory, batch_depth + line};
  for (int64_t row = 0; row < call.batch; row += batch_depth) {
    const int64_t left = m.rows() - row;
    const Span rows = {row, left < batch_depth ? static_cast<int>(left) : batch_depth};
    const int64_t k = row / step_of<Operand>, whole = batch_depth / step_of<Operand>;
    const int part = static_cast<int>(depth - k < whole ? depth - k : whole);
    for (int64_t block = 0; block < blocks.blocks; ++block) {
      const Span d = {features.first + blocks[block].first, blocks[block].rows};
      scale_features(call, m, s, d, rows, scaled);
      if (!of_weight(call)) continue;
      for (int n = 0; n < m.hidden_panels; ++n) {
        const int column = n * panel_width;
        use(WeightTile<Operand>{
            block * m.hidden_panels + n, (d.first * call.state_dim + s) * H + column, d.rows,
            H - column < panel_width ? H - column : panel_width, scaled.data, scaled.stride,
            m.hidden_columns + (int64_t{n} * depth + k) * panel_width, part, row > 0,
            row + batch_depth >= call.batch});
      }
    }
  }
}

template <class Operand>
static void zeta_weight_gradient(const ScoreMatchingLossCall& call, const ScoreMatching<Operand>& m,
                                 int s, Span features) {
  const ptrdiff_t stride = static_cast<ptrdiff_t>(call.state_dim) * call.hidden_dim;
  BlockState<Operand> products;
  alignas(64) float sums[block_rows<Operand>(2) * panel_width];
  NothingAside nothing;
  for_weight_tiles(call, m, s, features, [&](const WeightTile<Operand>& t) {
    float* gradient = call.grad_weight + t.first;
    const bool whole = t.columns == panel_width;
    prefetch_block(Rows<float>{gradient, stride}, 0, t.rows, 0, t.columns);
    product<Operand>(
        products, t.scaled, t.scaled_stride, t.rows, t.hidden, t.depth,
        whole ? StoreSums{gradient, stride, t.more} : StoreSums{sums, panel_width, false}, nothing);
    if (!whole) store_gradient(sums, t.rows, t.columns, t.more, gradient, stride);
  });
}

// ---- the weight's step ---------------------------------------------------------------------------

// Adam's step on a tile of the weight whose gradient is complete, while the next tile's is made; and,
// as that will be stepped then, its lines are fetched now: from memory, a few bytes of every row. Beside
// a product neither the traffic nor the divisions and roots cost much.
struct StepAside {
  struct Tile {
    ptrdiff_t first = 0;
    int rows = 0;  // none: no tile
    int columns = 0;
    const float* gradient = nullptr;  // [row][panel_width]
  };

  const AdamParameter& weight;
  ptrdiff_t stride;
  double squared_norm = 0.0;
  Vec squares = zero();
  Tile stepped, fetched;
  int vector = 0, vectors = 0, vectors_per_share = 0;

  StepAside(const AdamParameter& parameter, ptrdiff_t row_stride)
      : weight(parameter), stride(row_stride) {}

  void begin(Tile to_step, Tile to_fetch, int shares) {
    stepped = to_step;
    fetched = to_fetch;
    vector = 0;
    vectors = 2 * (stepped.rows > fetched.rows ? stepped.rows : fetched.rows);
    vectors_per_share = shares > 0 ? static_cast<int>(ceil_div(vectors, shares)) : vectors;
  }

  __attribute__((always_inline)) void operator()() { work(vectors_per_share); }

  void finish() {
    work(vectors);
    squared_norm += sum_of_lanes(squares);
    squares = zero();
  }

  __attribute__((always_inline)) void work(int count) {
    const int end = vectors - vector < count ? vectors : vector + count;
    for (; vector < end; ++vector) {
      const int row = vector / 2, column = vector % 2 * W;
      if (row < fetched.rows && column < fetched.columns) {
        const ptrdiff_t at = fetched.first + row * stride + column;
        __builtin_prefetch(weight.value + at, 1);
        __builtin_prefetch(weight.exp_avg + at, 1);
        __builtin_prefetch(weight.exp_avg_sq + at, 1);
      }
      if (row < stepped.rows && column < stepped.columns) {
        const ptrdiff_t at = stepped.first + row * stride + column;
        const Vec g = load(stepped.gradient + row * panel_width + column);
        squares = fma(g, g, squares);
        float *value = weight.value + at, *exp_avg = weight.exp_avg + at,
              *exp_avg_sq = weight.exp_avg_sq + at;
        if (stepped.columns - column >= W) {
          adam_vector(weight.scalars, g, value, exp_avg, exp_avg_sq);
        } else {
          adam_lanes(weight.scalars, g, value, exp_avg, exp_avg_sq, stepped.columns - column);
        }
      }
    }
  }
};

// Tiles of an item whose sums are kept: all where they are made in parts, else this and the one before.
template <class Operand>
DIFFCORE_INLINE int64_t kept_tiles(const ScoreMatchingLossCall& call) {
  if (call.batch <= batch_depth) return 2;
  return RegisterBlocks<Operand>(feature_share<Operand>).blocks *
         ceil_div(call.hidden_dim, panel_width);
}

template <class Operand>
DIFFCORE_INLINE float* take_tiles(const ScoreMatchingLossCall& call, Carver* memory) {
  return memory->take<float>(
      call.weight_step ? 4 * kept_tiles<Operand>(call) * block_rows<Operand>(2) * panel_width : 0);
}

// zeta_weight_gradient, used up at once. Returns the sum of its squares.
template <class Operand>
static double zeta_weight_step(const ScoreMatchingLossCall& call, const ScoreMatching<Operand>& m,
                               int s, Span features, float* tiles) {
  BlockState<Operand> products;
  StepAside aside(*call.weight_step, static_cast<ptrdiff_t>(call.state_dim) * call.hidden_dim);
  StepAside::Tile before;
  const int64_t kept = kept_tiles<Operand>(call);
  for_weight_tiles(call, m, s, features, [&](const WeightTile<Operand>& t) {
    float* sums = tiles + t.index % kept * (block_rows<Operand>(2) * panel_width);
    const StepAside::Tile tile =
        t.last ? StepAside::Tile{t.first, t.rows, t.columns, sums} : StepAside::Tile{};
    aside.begin(before, tile, shares_of(t.depth));
    product<Operand>(products, t.scaled, t.scaled_stride, t.rows, t.hidden, t.depth,
                     StoreSums{sums, panel_width, t.more}, aside);
    aside.finish();
    before = tile;
  });
  aside.begin(before, {}, 0);
  aside.finish();
  return aside.squared_norm;
}

// ---- all of it -----------------------------------------------------------------------------------

template <class Operand>
static void score_matching_loss(const ScoreMatchingLossCall& call) {
  Carver sizes{nullptr};
  ScoreMatching<Operand>::take(call, &sizes);
  Carver call_memory{thread_scratch(Scratch::call, sizes.used)};
  const auto m = ScoreMatching<Operand>::take(call, &call_memory);

  const int64_t rounds = ceil_div(m.rows(), static_cast<int64_t>(call.threads) * score_rows);
  const int64_t wanted_tiles = rounds * call.threads;
  const int64_t tiles = wanted_tiles < m.row_panels ? wanted_tiles : m.row_panels;
  const int64_t row_groups = ceil_div(call.batch, hidden_rows);
  const int64_t wanted_blocks = ceil_div(m.hidden_panels, hidden_block);
  const int64_t even_blocks = ceil_div(wanted_blocks, call.threads) * call.threads;
  const int64_t hidden_blocks = even_blocks < m.hidden_panels ? even_blocks : m.hidden_panels;
  const int64_t shares = feature_shares<Operand>(call);

  const int64_t most_panels = tile_span(m.row_panels, tiles, 0).rows;
  const auto take_score = [&](Carver* memory) {
    return ScoreBuffers<Operand>::take(call, most_panels, memory);
  };
  const auto take_hidden = [&](Carver* memory) {
    return HiddenBuffers<Operand>::take(call, memory);
  };
  const auto take_step = [&](Carver* memory) { return take_tiles<Operand>(call, memory); };
  // One phase after the other has the same memory.
  const int64_t own_bytes =
      larger(bytes_of(take_score), larger(bytes_of(take_hidden), bytes_of(take_step)));

  run_threads(call.threads, own_bytes, [&](const Carver own) {
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < m.row_panels; ++p) m.pack_row_panel(call, p);
#pragma omp for schedule(static)
    for (int n = 0; n < (of_weight(call) ? m.hidden_panels : 0); ++n) m.pack_hidden_panel(call, n);

    Carver of_score = own;
    const auto score_buffers = take_score(&of_score);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile)
      score_tile(call, m, tile_span(m.row_panels, tiles, tile), score_buffers);

    if (call.grad_hidden) {
      Carver of_hidden = own;
      const auto buffers = take_hidden(&of_hidden);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t item = 0; item < row_groups * hidden_blocks; ++item)
        hidden_gradient(call, m, tile_span(call.batch, row_groups, item / hidden_blocks),
                        tile_span(m.hidden_panels, hidden_blocks, item % hidden_blocks), buffers);
    }

    if (call.weight_step) {
#pragma omp barrier  // the phase before still reads the weight
      Carver of_step = own;
      float* const tiles_of_weight = take_step(&of_step);
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < shares * call.state_dim; ++item)
        m.weight_squared_norms[item] = zeta_weight_step(
            call, m, static_cast<int>(item % call.state_dim),
            tile_span(call.features, shares, item / call.state_dim), tiles_of_weight);
    } else if (call.grad_weight || call.grad_bias) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < shares * call.state_dim; ++item)
        zeta_weight_gradient(call, m, static_cast<int>(item % call.state_dim),
                             tile_span(call.features, shares, item / call.state_dim));
    }
  });
  double sum = 0.0;
  for (int64_t i = 0; i < call.batch; ++i) sum += m.row_loss[i];
  *call.loss = static_cast<float>(sum / static_cast<double>(call.batch));
  if (!call.weight_step) return;
  for (int64_t item = 0; item < shares * call.state_dim; ++item)
    *call.weight_squared_norm += m.weight_squared_norms[item];
}

static void score_matching_loss(const ScoreMatchingLossCall& call) {
  with_operand(call.precision, [&](auto operand) { score_matching_loss<decltype(operand)>(call); });
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
