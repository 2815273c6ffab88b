// All steps of the ascent of a batch of actions on min(Q1, Q2) in one launch.
//
// The work of a step is shared out by critic and tile of rows: a group of blocks (group.cuh) takes
// one critic's value and its gradient at the actions of a tile, keeping the activations' slopes for
// the way back, and publishes both. Then the whole grid meets. Now everybody can see which critic
// attains a row's minimum and takes the gradient of that one alone (of both, half each, on a tie),
// and every block sums the norm over the batch by itself, in the same order, from rows' norms that
// were published with the gradients. The blocks that share a tile each make the same update of
// their own copy of its actions: nothing more has to be exchanged, and one meeting a step is
// enough, since what is published alternates between two places.
//
// Going back through one critic a row only would save nothing while tiles hold rows of both kinds:
// the weights, which are the limit, have to be read anyway; and to know which would take a second
// meeting.
//
// Weights are packed once a call, at the start of the launch, in both directions and in the
// precision that they are multiplied in. A group keeps to one critic, whose slices stay in the
// blocks' shared memory for all steps, if they fit; else every step streams them from L2 through
// cp.async. No parameter gradient is ever formed. The state's part of each first layer is computed
// once.
//
// Budget: 256 threads, up to 255 registers (one block a multiprocessor), no spills; shared memory
// as the plan says, up to all of it.
//
// Roofline, on an H100 at 1.7 GHz: 132 multiprocessors, of each 128 FFMA a clock (100 are reckoned
// with) or, through mma.sync, some 800 bf16 multiply-adds; a wavefront of shared memory a clock; L2
// 64 bytes a clock, 3,000 for all together; 12 bytes a clock to other blocks of a cluster, of which
// 66 of 2, 31 of 4 or 15 of 8 run at once. Three hidden layers of 256, action 6: a step of one
// critic takes 133,000 multiply-adds a row forward and as many back, 266,000 FLOPs each way, and
// 1.05 MB of float32 weights. A meeting of the grid is taken as 3,000 clocks, one of a cluster as
// 800 and what its blocks send, of which a step has six: three hidden layers forward, the turn and
// two layers back. The norm over the batch takes two trips to L2 of 500, or what its rows take. 20
// steps:
//
//   batch 1     Every step needs all weights. From L2 into a multiprocessor for each critic they
//               take 16,400 clocks. Spread over 8 for each they stay there; of the tile's 8 rows
//               products take 4,600, limited by shared memory, exchanges 5,200, and with the grid's
//               meeting a step has 14,200 clocks: 0.17 ms. Latency limits it. In bf16 11,100
//               clocks, 0.13 ms.
//   batch 256   64 groups of 2 blocks, 8 rows each: products take 23,900 clocks, limited by the
//               layers from L2; with exchanges and meeting 36,400, 0.43 ms. 64 blocks alone would
//               take 41,900, limited by shared memory. 32 clusters of 4, with 16 rows each, are one
//               too many to run at once. In bf16 32 groups of 2 with 16 rows each: exchanges and
//               meeting are 9,800 of 19,700, 0.23 ms.
//   batch 4096  256 items of 32 rows for blocks alone, in two rounds. FFMA limits float32: 172,000
//               of 204,000 clocks, 2.4 ms. In bf16 weights from L2 take 46,000 and activations
//               20,500 of 78,700: 0.93 ms; the norm takes 3,900. Tiles of 64 rows would halve what
//               comes from L2, but spill.
//
// `estimate` below does this arithmetic for the call at hand, and the launcher takes the group and
// the rows for which it gives least. No GPU has measured it yet.
#include "activations.cuh"
#include "group.cuh"
#include "kernels.h"
#include "plan.cuh"

namespace diffcore {
namespace cuda {

namespace {

// -- what a call lays out -------------------------------------------------------------------------

// A critic's weights as they are multiplied: packed in the workspace, and slices of them in shared
// memory. Entries l of `forward` and `backward` are layers 1 .. count - 1 and 0 .. count - 2 in
// `Math`'s operands; what meets states and actions on the way forward is float32 in any precision:
// the layer is thin, and actions are what is refined. The last layer forward and the first one
// backward are thin too: every block of a group makes them as a whole.
struct PackedCritic {
  SlicedWeights state_input;   // [width, state_dim]
  SlicedWeights action_input;  // [width, action_dim]
  SlicedWeights forward[max_layers];
  SlicedWeights backward[max_layers];
};

struct Ascent {
  ActionGradientCall call;
  PackedCritic packed[2];
  GroupLayout group;
  int width;      // of the widest hidden layer, padded
  int depth;      // hidden layers of the deeper critic
  int64_t tiles;  // of rows; an item is a tile of one critic
  int groups;     // even, so that a group keeps to one critic; or a single one, which streams

  // Where things lie in a block's dynamic shared memory.
  int state_offset;  // [rows, state_stride], before the hidden activations come there
  int state_stride;
  int action_offset;  // [rows, action_stride]
  int action_stride;
  int sums_offset;    // one float a warp, and two
  int memory_offset;  // the warps' memory; for states, as much as the streams of weights take
  int bytes_a_warp;
  int state_bytes_a_warp;

  // In the workspace.
  float* state_part;  // [2, batch, width]
  float* slopes;      // [blocks, depth, rows, width]
  float* actions;     // [copies, batch, action_dim], one of every critic and rank; and so on
  float* first_moment;
  float* second_moment;
  float* values;         // [2 by step, 2, batch]
  float* gradients;      // [2 by step, 2, batch, action_dim]
  float* squared_norms;  // [2 by step, 2, batch], of the gradients' rows
};

// -- packing --------------------------------------------------------------------------------------

// By all threads of the grid.
template <class Math>
__device__ void pack_critics(const Ascent& plan) {
  const int thread = static_cast<int>(blockIdx.x) * block_threads + static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(gridDim.x) * block_threads;
  for (int c = 0; c < 2; ++c) {
    const CriticParameters& critic = plan.call.critics[c];
    const PackedCritic& packed = plan.packed[c];
    const LinearParameters& first = critic.layers[0];
    const float* of_action = first.weight + critic.state_dim;
    pack<Float32Math>(first.weight, first.out, first.in, critic.state_dim, 1, packed.state_input,
                      thread, threads);
    pack<Float32Math>(of_action, first.out, first.in, critic.action_dim, 1, packed.action_input,
                      thread, threads);
    pack<Math>(of_action, critic.action_dim, 1, first.out, first.in, packed.backward[0], thread,
               threads);
    for (int l = 1; l < critic.layer_count; ++l) {
      const LinearParameters& layer = critic.layers[l];
      pack<Math>(layer.weight, layer.out, layer.in, layer.in, 1, packed.forward[l], thread,
                 threads);
      if (l < critic.layer_count - 1)
        pack<Math>(layer.weight, layer.in, 1, layer.out, layer.in, packed.backward[l], thread,
                   threads);
    }
  }
}

// Copies the block's slices of a critic to where they stay, and waits for them.
template <class Operand>
__device__ void load_slices(const Ascent& plan, int critic, int rank, char* shared) {
  const PackedCritic& packed = plan.packed[critic];
  const int last = plan.call.critics[critic].layer_count - 1;
  load_slice<float>(packed.action_input, rank, shared);
  for (int l = 1; l <= last; ++l)
    load_slice<Operand>(packed.forward[l], l < last ? rank : 0, shared);
  for (int l = 0; l < last; ++l) load_slice<Operand>(packed.backward[l], l > 0 ? rank : 0, shared);
  commit_copies();
  wait_for_copies<0>();
}

// -- one critic on one tile -----------------------------------------------------------------------

// A tile of rows of one critic.
struct Item {
  int critic;
  int64_t first;  // row
  int rows;
};

template <int rows>
__device__ Item item_at(const Ascent& plan, int64_t index) {
  const int64_t first = index / 2 * rows, left = plan.call.batch - first;
  return {static_cast<int>(index % 2), first, static_cast<int>(left < rows ? left : rows)};
}

// from [row_count, columns] to shared memory as float32, the k of whoever reads it padded with
// zeros.
__device__ void stage_rows(const float* from, int row_count, int columns, float* to, int stride) {
  const int padded = round_up(columns, Float32Math::k_step);
  for (int i = static_cast<int>(threadIdx.x); i < row_count * padded; i += block_threads) {
    const int row = i / padded, column = i % padded;
    to[row * stride + column] =
        column < columns ? from[static_cast<int64_t>(row) * columns + column] : 0.0f;
  }
}

template <class Math, int rows>
class CriticPass {
 public:
  using Operand = typename Math::Operand;

  __device__ CriticPass(const Ascent& plan, const Item& item, char* shared,
                        Group<Math, rows>& group)
      : plan_(plan),
        critic_(plan.call.critics[item.critic]),
        packed_(plan.packed[item.critic]),
        item_(item),
        shared_(shared),
        group_(group),
        slopes_(plan.slopes + static_cast<int64_t>(blockIdx.x) * plan.depth * rows * plan.width) {}

  // What states and the bias make of the first layer, in float32: kept for all steps.
  __device__ void state_part(const float* states) const {
    const auto staged = reinterpret_cast<float*>(shared_ + plan_.state_offset);
    stage_rows(states, item_.rows, critic_.state_dim, staged, plan_.state_stride);
    __syncthreads();
    const Slice<float> slice = slice_of<float>(packed_.state_input, group_.rank(), shared_);
    linear<Float32Math, rows>(staged, plan_.state_stride, item_.rows, slice.weights, memory(),
                              plan_.state_bytes_a_warp, [&](int row, int column, float2 sum) {
                                const int at = slice.first + column;
                                const float2 bias = bias_of(critic_.layers[0], at);
                                *state_part_at(row, at) =
                                    make_float2(sum.x + bias.x, sum.y + bias.y);
                              });
    __syncthreads();
  }

  // The tile's values [rows] and, back through all layers, the gradients at its actions [rows,
  // action_dim]; and these rows' squared norms [rows], where a norm is limited.
  __device__ void run(const float* actions, float* values, float* gradients,
                      float* squared_norms) const {
    rest(first_layer(actions), values, gradients);
    __syncthreads();
    if (plan_.call.norm_clip == NormClip::none || group_.rank() != 0) return;
    for (int row = static_cast<int>(threadIdx.x); row < item_.rows; row += block_threads) {
      float sum = 0.0f;
      for (int column = 0; column < critic_.action_dim; ++column) {
        const float g = gradients[row * critic_.action_dim + column];
        sum = fmaf(g, g, sum);
      }
      squared_norms[row] = sum;
    }
  }

 private:
  // Thin, and in float32. Actions add their part to what states made.
  __device__ Operand* first_layer(const float* actions) const {
    const auto staged = reinterpret_cast<float*>(shared_ + plan_.action_offset);
    stage_rows(actions, item_.rows, critic_.action_dim, staged, plan_.action_stride);
    __syncthreads();
    const Slice<float> slice = slice_of<float>(packed_.action_input, group_.rank(), shared_);
    linear<Float32Math, rows>(staged, plan_.action_stride, item_.rows, slice.weights, memory(),
                              plan_.bytes_a_warp, [&](int row, int column, float2 sum) {
                                const int at = slice.first + column;
                                const float2 part = *state_part_at(row, at);
                                activate_pair(0, row, at,
                                              make_float2(sum.x + part.x, sum.y + part.y));
                              });
    return exchange(packed_.action_input.columns);
  }

  // One loop over all products and one call of `linear`: each is a thousand instructions.
  __device__ void rest(Operand* in, float* values, float* gradients) const {
    const int action_dim = critic_.action_dim, last = critic_.layer_count - 1;
    const LinearParameters& output = critic_.layers[last];
    const int stride = plan_.group.hidden_stride;
    const bool writes = group_.rank() == 0;
    for (int product = 1; product <= 2 * last; ++product) {
      const bool forward = product <= last, thin = product == last || product == 2 * last;
      const int l = forward ? product : 2 * last - product;
      const LinearParameters& layer = critic_.layers[l];
      const SlicedWeights& weights = forward ? packed_.forward[l] : packed_.backward[l];
      const Slice<Operand> slice = slice_of<Operand>(weights, thin ? 0 : group_.rank(), shared_);
      clear_padding(in, stride, forward ? layer.in : layer.out, weights.k);
      linear<Math, rows>(in, stride, item_.rows, slice.weights, memory(), plan_.bytes_a_warp,
                         [&](int row, int column, float2 sum) {
                           const int at = slice.first + column;
                           if (product < last) {
                             const float2 bias = bias_of(layer, at);
                             activate_pair(l, row, at, make_float2(sum.x + bias.x, sum.y + bias.y));
                           } else if (product == last) {
                             if (writes && at == 0) values[row] = sum.x + bias_of(output, 0).x;
                           } else if (l > 0) {
                             const float2 slope = *slope_at(l - 1, row, at);
                             group_.put(row, at, Math::pair(sum.x * slope.x, sum.y * slope.y));
                           } else if (writes) {
                             float* g = gradients + row * action_dim + at;
                             if (at < action_dim) g[0] = sum.x;
                             if (at + 1 < action_dim) g[1] = sum.y;
                           }
                         });
      if (product == last) turn_back(output, last - 1);
      if (product < 2 * last) in = exchange(thin ? round_up(output.in, 8) : weights.columns);
    }
  }

  // The gradient of the value at the sums of the last hidden layer, of which each block has a slice.
  __device__ void turn_back(const LinearParameters& output, int layer) const {
    const SlicedWeights& made_by = layer > 0 ? packed_.forward[layer] : packed_.action_input;
    const int begin = group_.rank() * made_by.slice, left = made_by.columns - begin;
    const int pairs = (left < made_by.slice ? left : made_by.slice) / 2;
    for (int p = static_cast<int>(threadIdx.x); p < item_.rows * pairs; p += block_threads) {
      const int row = p / pairs, column = begin + p % pairs * 2;
      const float2 slope = *slope_at(layer, row, column);
      const float w0 = column < output.in ? output.weight[column] : 0.0f;
      const float w1 = column + 1 < output.in ? output.weight[column + 1] : 0.0f;
      group_.put(row, column, Math::pair(w0 * slope.x, w1 * slope.y));
    }
  }

  __device__ void activate_pair(int layer, int row, int column, float2 sum) const {
    const ValueAndSlope a = value_and_slope(critic_.activation, sum.x);
    const ValueAndSlope b = value_and_slope(critic_.activation, sum.y);
    group_.put(row, column, Math::pair(a.value, b.value));
    *slope_at(layer, row, column) = make_float2(a.slope, b.slope);
  }

  // Waits for the group's columns of a layer, and returns where they lie.
  __device__ Operand* exchange(int columns) const {
    Operand* here = group_.exchanged();
    group_.arrive();
    group_.wait(item_.rows, columns);
    return here;
  }

  // Zeros from the columns that a layer has to those that the next one reads: wider layers may have
  // left something there.
  __device__ void clear_padding(Operand* hidden, int stride, int width, int k) const {
    const int written = round_up(width, 8), gap = k - written;
    if (gap <= 0) return;
    for (int i = static_cast<int>(threadIdx.x); i < item_.rows * gap; i += block_threads)
      hidden[i / gap * stride + written + i % gap] = 0;
    __syncthreads();
  }

  __device__ char* memory() const { return shared_ + plan_.memory_offset; }
  __device__ float2* slope_at(int layer, int row, int column) const {
    return reinterpret_cast<float2*>(
        slopes_ + (static_cast<int64_t>(layer) * rows + row) * plan_.width + column);
  }
  __device__ float2* state_part_at(int row, int column) const {
    const int64_t at = item_.critic * plan_.call.batch + item_.first + row;
    return reinterpret_cast<float2*>(plan_.state_part + at * plan_.width + column);
  }
  static __device__ float2 bias_of(const LinearParameters& layer, int column) {
    if (!layer.bias) return make_float2(0.0f, 0.0f);
    return make_float2(column < layer.out ? layer.bias[column] : 0.0f,
                       column + 1 < layer.out ? layer.bias[column + 1] : 0.0f);
  }

  const Ascent& plan_;
  const CriticParameters& critic_;
  const PackedCritic& packed_;
  const Item item_;
  char* const shared_;
  Group<Math, rows>& group_;
  float* const slopes_;
};

// -- the update -----------------------------------------------------------------------------------

// What both critics say of a row.
struct RowOfBoth {
  float q1, q2;
  float squared_norm1, squared_norm2;  // of the gradients
};

// What the blocks published in a step.
struct Published {
  const float* values;         // [2, batch]
  const float* gradients;      // [2, batch, action_dim]
  const float* squared_norms;  // [2, batch]
  int64_t batch;
  int action_dim;

  // The gradient of -min(Q1, Q2) at one number of the actions.
  __device__ float descent(int64_t row, int column) const {
    const float q1 = values[row], q2 = values[batch + row];
    // A NaN reaches the action even where the slopes don't carry it (relu's is 0 or 1).
    const float share = q1 < q2 || q2 < q1 ? 1.0f : q1 == q2 ? 0.5f : q1 + q2;
    float gradient = 0.0f;
    if (!(q2 < q1)) gradient -= share * gradients[row * action_dim + column];
    if (!(q1 < q2)) gradient -= share * gradients[(batch + row) * action_dim + column];
    return gradient;
  }

  __device__ RowOfBoth both(int64_t row) const {
    return {values[row], values[batch + row], squared_norms[row], squared_norms[batch + row]};
  }

  // The squared norm of a row of `descent`: number by number, where neither critic attains the
  // minimum alone.
  __device__ float squared_norm(const RowOfBoth& both, int64_t row) const {
    const bool first = both.q1 < both.q2, second = both.q2 < both.q1;
    if (first || second) return second ? both.squared_norm2 : both.squared_norm1;
    float sum = 0.0f;
    for (int column = 0; column < action_dim; ++column) {
      const float g = descent(row, column);
      sum = fmaf(g, g, sum);
    }
    return sum;
  }
};

// The block's sum of a number a thread, the same to all threads; `sums` has a float a warp.
__device__ float block_sum(float x, float* sums) {
  x = warp_sum(x);
  if (lane_index() == 0) sums[warp_index()] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < warps; ++w) sum += sums[w];
  __syncthreads();
  return sum;
}

// torch.nn.utils.clip_grad_norm_'s factor.
__device__ float clip_factor(float squared_norm, float max_norm) {
  const float factor = max_norm / (sqrtf(squared_norm) + 1e-6f);
  return factor < 1.0f ? factor : factor != factor ? factor : 1.0f;
}

constexpr int rows_at_once = 4;  // of a thread, whose numbers are on their way from L2 together

// Over the whole batch, by every block in the same order.
__device__ float batch_factor(const Published& p, float max_norm, float* sums) {
  float own = 0.0f;
  for (int64_t first = threadIdx.x; first < p.batch; first += rows_at_once * block_threads) {
    RowOfBoth rows[rows_at_once];
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const int64_t row = first + i * block_threads;
      rows[i] = p.both(row < p.batch ? row : first);
    }
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const int64_t row = first + i * block_threads;
      if (row < p.batch) own += p.squared_norm(rows[i], row);
    }
  }
  return clip_factor(block_sum(own, sums), max_norm);
}

__device__ float row_factor(const Published& p, int64_t row, float max_norm) {
  return clip_factor(p.squared_norm(p.both(row), row), max_norm);
}

// Which of [copies, batch] rows a block updates as its own.
__device__ int64_t own_rows(const Ascent& plan, const Item& item, int rank) {
  return (2 * rank + item.critic) * plan.call.batch + item.first;
}

__device__ void update_actions(const Ascent& plan, const Item& item, int rank, const Published& p,
                               float factor_of_batch, const float* adam) {
  const ActionGradientCall& call = plan.call;
  const int action_dim = p.action_dim;
  const float step_size = adam[0], root_correction = adam[1];
  for (int i = static_cast<int>(threadIdx.x); i < item.rows * action_dim; i += block_threads) {
    const int64_t row = item.first + i / action_dim;
    const int column = i % action_dim;
    const int64_t at = own_rows(plan, item, rank) * action_dim + i;
    const float factor =
        call.norm_clip == NormClip::row ? row_factor(p, row, call.max_norm) : factor_of_batch;
    const float g = p.descent(row, column) * factor;
    float a = plan.actions[at];
    if (call.optimizer == ActionOptimizer::adam) {
      const float m = fmaf(0.1f, g, 0.9f * plan.first_moment[at]);  // 1 - 0.9f isn't 0.1f
      const float v = fmaf(0.001f * g, g, 0.999f * plan.second_moment[at]);
      plan.first_moment[at] = m;
      plan.second_moment[at] = v;
      a = fmaf(-step_size, m / (sqrtf(v) / root_correction + call.eps), a);
    } else {
      a = fmaf(-call.lr, g, a);
    }
    a = a < call.low ? call.low : a;  // which, unlike fmaxf, keeps a NaN
    plan.actions[at] = a > call.high ? call.high : a;
  }
}

// The block's own copy of a tile's actions, and Adam's moments at 0.
__device__ void start(const Ascent& plan, const Item& item, int rank) {
  const int action_dim = plan.call.critics[0].action_dim;
  const int64_t from = item.first * action_dim;
  const int64_t to = own_rows(plan, item, rank) * action_dim;
  for (int i = static_cast<int>(threadIdx.x); i < item.rows * action_dim; i += block_threads) {
    plan.actions[to + i] = plan.call.action[from + i];
    plan.first_moment[to + i] = plan.second_moment[to + i] = 0.0f;
  }
}

// -- the kernel -----------------------------------------------------------------------------------

template <class Math, int rows>
__global__ void __launch_bounds__(block_threads, 1) ascend(const __grid_constant__ Ascent plan) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  const ActionGradientCall& call = plan.call;
  const int action_dim = call.critics[0].action_dim;
  const int64_t items = 2 * plan.tiles, elements = call.batch * action_dim;
  const auto sums = reinterpret_cast<float*>(shared + plan.sums_offset);
  float* const adam = sums + warps;  // step size, and the correction of the root
  Group<Math, rows> group(plan.group, shared);
  const int rank = group.rank();

  pack_critics<Math>(plan);
  if (plan.group.counters && rank == 0 && threadIdx.x == 0) plan.group.counters[group.index()] = 0;
  wait_for_grid();
  for (int64_t i = group.index(); i < items; i += plan.groups) {
    const Item item = item_at<rows>(plan, i);
    start(plan, item, rank);
    CriticPass<Math, rows>(plan, item, shared, group)
        .state_part(call.state + item.first * call.critics[0].state_dim);
  }
  load_slices<typename Math::Operand>(plan, group.index() % 2, rank, shared);
  group.start();

  double power1 = 1.0, power2 = 1.0;
  for (int step = 0; step < call.steps; ++step) {
    float* values = plan.values + (step & 1) * 2 * call.batch;
    float* gradients = plan.gradients + (step & 1) * 2 * elements;
    float* squared_norms = plan.squared_norms + (step & 1) * 2 * call.batch;
    for (int64_t i = group.index(); i < items; i += plan.groups) {
      const Item item = item_at<rows>(plan, i);
      const int64_t row = item.critic * call.batch + item.first;
      CriticPass<Math, rows>(plan, item, shared, group)
          .run(plan.actions + own_rows(plan, item, rank) * action_dim, values + row,
               gradients + row * action_dim, squared_norms + row);
    }
    // Bias corrections of Adam, computed as torch does, in double, by one thread.
    if (threadIdx.x == 0) {
      power1 *= 0.9;
      power2 *= 0.999;
      adam[0] = static_cast<float>(call.lr / (1.0 - power1));
      adam[1] = static_cast<float>(sqrt(1.0 - power2));
    }
    wait_for_grid();
    const Published published = {values, gradients, squared_norms, call.batch, action_dim};
    const float factor =
        call.norm_clip == NormClip::batch ? batch_factor(published, call.max_norm, sums) : 1.0f;
    for (int64_t i = group.index(); i < items; i += plan.groups)
      update_actions(plan, item_at<rows>(plan, i), rank, published, factor, adam);
    __syncthreads();
  }

  if (rank != 0) return;
  for (int64_t i = group.index(); i < items; i += plan.groups) {
    const Item item = item_at<rows>(plan, i);
    if (item.critic != 0) continue;
    const float* from = plan.actions + own_rows(plan, item, rank) * action_dim;
    float* to = call.improved + item.first * action_dim;
    for (int e = static_cast<int>(threadIdx.x); e < item.rows * action_dim; e += block_threads)
      to[e] = from[e];
  }
}

// -- the plan -------------------------------------------------------------------------------------

// Beyond what any shared memory holds of a single row, and where sizes in bytes are still an int's.
constexpr int max_width = 8192;

int widest_hidden(const ActionGradientCall& call) {
  int widest = 0;
  for (const CriticParameters& critic : call.critics)
    for (int l = 0; l < critic.layer_count - 1; ++l)
      widest = std::max(widest, critic.layers[l].out);
  return widest;
}

// The widths of a critic's weights, and which slices stay in shared memory from `used` on: the thin
// ones first, then as many of the others as there is room for. Returns where shared memory ends.
int lay_out_critic(const CriticParameters& critic, int group_size, bool stay, int most, int used,
                   PackedCritic* packed) {
  const Precision precision = critic.precision;
  const int last = critic.layer_count - 1;
  const LinearParameters* layers = critic.layers;
  const auto keep = [&](Precision of, SlicedWeights* w) {
    const int bytes = slice_bytes(of, *w);
    if (!stay || used + bytes > most) return;
    w->shared_offset = used;
    used += bytes;
  };
  packed->state_input = sliced(Precision::float32, critic.state_dim, layers[0].out, group_size);
  packed->action_input = sliced(Precision::float32, critic.action_dim, layers[0].out, group_size);
  packed->forward[last] = sliced(precision, layers[last].in, layers[last].out, 1);
  packed->backward[0] = sliced(precision, layers[0].out, critic.action_dim, 1);
  keep(Precision::float32, &packed->action_input);
  keep(precision, &packed->forward[last]);
  keep(precision, &packed->backward[0]);
  for (int l = 1; l < last; ++l) {
    packed->forward[l] = sliced(precision, layers[l].in, layers[l].out, group_size);
    packed->backward[l] = sliced(precision, layers[l].out, layers[l].in, group_size);
    keep(precision, &packed->forward[l]);
    keep(precision, &packed->backward[l]);
  }
  return used;
}

bool all_stay(const PackedCritic& packed, int last) {
  if (packed.action_input.shared_offset < 0) return false;
  for (int l = 0; l < last; ++l)
    if (packed.forward[l + 1].shared_offset < 0 || packed.backward[l].shared_offset < 0)
      return false;
  return true;
}

// As plan.cuh asks for it.
struct AscentOp {
  using Call = ActionGradientCall;
  using Arguments = Ascent;
  static constexpr int fewest_rows = 8;
  static constexpr const char* does_not_fit = "the critic's layers are too wide for shared memory";

  template <class Math, int rows>
  static void (*kernel())(Ascent) {
    return ascend<Math, rows>;
  }

  static Precision precision(const ActionGradientCall& call) { return call.critics[0].precision; }

  static const char* check(const ActionGradientCall& call) {
    const CriticParameters& critic = call.critics[0];
    const int widest = std::max({critic.state_dim, critic.action_dim, widest_hidden(call)});
    return widest > max_width ? does_not_fit : nullptr;
  }

  static bool lay_out(const ActionGradientCall& call, const Device& device, int group_size,
                      int most_groups, Plan<Ascent>* plan) {
    const Precision precision = call.critics[0].precision;
    const int rows = plan->rows;
    Ascent& a = plan->arguments;
    a = Ascent{};
    a.call = call;
    a.width = round_up(widest_hidden(call), 16);
    a.depth = std::max(call.critics[0].layer_count, call.critics[1].layer_count) - 1;
    a.tiles = (call.batch + rows - 1) / rows;
    a.groups = static_cast<int>(std::min<int64_t>(2 * a.tiles, most_groups));
    if (a.groups > 1) a.groups -= a.groups % 2;
    if (a.groups == 0) return false;

    int used = 0;
    a.group = group_layout(device, precision, group_size, rows, a.width);
    a.state_stride =
        operand_stride<float>(round_up(call.critics[0].state_dim, Float32Math::k_step));
    a.action_stride =
        operand_stride<float>(round_up(call.critics[0].action_dim, Float32Math::k_step));
    a.group.hidden_offset = a.state_offset =
        take_shared(&used, std::max(2 * a.group.hidden_bytes, 4 * rows * a.state_stride));
    a.action_offset = take_shared(&used, 4 * rows * a.action_stride);
    a.sums_offset = take_shared(&used, 4 * (warps + 2));
    a.memory_offset = used;
    a.state_bytes_a_warp = bytes_for_warp(Precision::float32, rows, true);

    const auto lay_out_weights = [&](bool streams) {
      a.bytes_a_warp = bytes_for_warp(precision, rows, streams);
      const int begin = a.memory_offset + warps * a.bytes_a_warp;
      used = a.memory_offset + warps * a.state_bytes_a_warp;
      bool all = true;
      for (int c = 0; c < 2; ++c) {
        const int end = lay_out_critic(call.critics[c], group_size, a.groups % 2 == 0,
                                       device.shared_bytes, begin, &a.packed[c]);
        used = std::max(used, end);
        all = all && all_stay(a.packed[c], call.critics[c].layer_count - 1);
      }
      return all;
    };
    if (!lay_out_weights(false)) lay_out_weights(true);
    plan->launch = launch_of(a.group, a.groups, used, call.stream);
    plan->launch.cooperative = true;
    return used <= device.shared_bytes;
  }

  // By the figures at the top of this file.
  static double estimate(const Plan<Ascent>& plan) {
    const Ascent& a = plan.arguments;
    const double l2 = l2_rate(static_cast<int64_t>(a.groups) * a.group.size);
    // Products are of all the tile's rows, what follows them of those that there are.
    const int filled = static_cast<int>(std::min<int64_t>(a.call.batch, plan.rows));
    double longest = 0;
    for (int c = 0; c < 2; ++c) {
      const CriticParameters& critic = a.call.critics[c];
      const PackedCritic& packed = a.packed[c];
      const int last = critic.layer_count - 1;
      double clocks = 300;  // staging the actions, and the output's sums
      const auto add = [&](Precision precision, const SlicedWeights& w, bool exchanged) {
        clocks += product_clocks(precision, w, plan.rows, l2);
        if (exchanged)
          clocks +=
              activation_clocks(w, filled) + exchange_clocks(a.group, critic.precision, w, filled);
      };
      add(Precision::float32, packed.action_input, true);
      for (int l = 1; l <= last; ++l) add(critic.precision, packed.forward[l], l < last);
      const SlicedWeights& turned = last > 1 ? packed.forward[last - 1] : packed.action_input;
      clocks += exchange_clocks(a.group, critic.precision, turned, filled);
      for (int l = last - 1; l >= 0; --l) add(critic.precision, packed.backward[l], l > 0);
      longest = std::max(longest, clocks);
    }
    constexpr double grid_meeting = 3000, l2_trip = 500;
    const double rounds = static_cast<double>((2 * a.tiles + a.groups - 1) / a.groups);
    // The norm over the batch, as if it were always limited: rows' norms, of what a block has just
    // written, and then by every block four numbers a row.
    const int64_t rows_a_trip = rows_at_once * block_threads;
    const double trips = static_cast<double>((a.call.batch + rows_a_trip - 1) / rows_a_trip);
    const double norm = std::max(trips * l2_trip, 16.0 * static_cast<double>(a.call.batch) / l2);
    return rounds * (longest + l2_trip) + grid_meeting + norm;
  }

  static void place(Places* places, Plan<Ascent>* plan) {
    Ascent& a = plan->arguments;
    for (int c = 0; c < 2; ++c) {
      const CriticParameters& critic = a.call.critics[c];
      PackedCritic& packed = a.packed[c];
      const int last = critic.layer_count - 1;
      places->take_weight(Precision::float32, &packed.state_input);
      places->take_weight(Precision::float32, &packed.action_input);
      for (int l = 1; l <= last; ++l) places->take_weight(critic.precision, &packed.forward[l]);
      for (int l = 0; l < last; ++l) places->take_weight(critic.precision, &packed.backward[l]);
    }
    const int64_t batch = a.call.batch, elements = batch * a.call.critics[0].action_dim;
    const int64_t blocks = plan->launch.grid, copies = 2 * a.group.size;
    a.state_part = places->floats(2 * batch * a.width);
    a.slopes = places->floats(blocks * a.depth * plan->rows * a.width);
    a.actions = places->floats(copies * elements);
    a.first_moment = places->floats(copies * elements);
    a.second_moment = places->floats(copies * elements);
    a.values = places->floats(2 * 2 * batch);
    a.gradients = places->floats(2 * 2 * elements);
    a.squared_norms = places->floats(2 * 2 * batch);
    places->take_exchanged(a.groups, &a.group);
  }
};

}  // namespace

const char* plan_action_gradient(const ActionGradientCall& call, KernelPlan* result) {
  Plan<Ascent> plan{};
  if (const char* reason = make_plan<AscentOp>(call, &plan)) return reason;
  const Ascent& a = plan.arguments;
  *result = {a.group.size, plan.rows, 0, static_cast<int>(plan.launch.shared_bytes),
             plan.clocks * call.steps};
  const int last = call.critics[0].layer_count - 1;
  for (int l = 1; l <= last; ++l)
    result->resident_layers +=
        a.packed[0].forward[l].shared_offset >= 0 && a.packed[0].backward[l - 1].shared_offset >= 0;
  return nullptr;
}

int64_t action_gradient_workspace(const ActionGradientCall& call) {
  return workspace_bytes<AscentOp>(call);
}

const char* action_gradient(const ActionGradientCall& call) {
  Plan<Ascent> plan{};
  if (const char* error = make_plan_in_workspace<AscentOp>(call, &plan)) return error;
  return launch(plan.launch, plan.kernel, plan.arguments);
}

}  // namespace cuda
}  // namespace diffcore
