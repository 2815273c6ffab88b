// All steps of the ascent of a batch of actions on min(Q1, Q2) in one launch.
//
// The work of a step is shared out by critic and tile of rows: a block takes one critic's value and
// its gradient at the actions of a tile, keeping the activations' slopes for the way back, and
// publishes both. Then the whole grid meets. Now everybody can see which critic attains a row's
// minimum and takes the gradient of that one alone (of both, half each, on a tie), and every block
// sums the norm over the batch by itself, in the same order. The two blocks that share a tile each
// make the same update of its actions: nothing more has to be exchanged, and one meeting a step is
// enough, since values and gradients alternate between two places.
//
// Going back through one critic a row only would save nothing while tiles hold rows of both kinds:
// the weights, which are the limit, have to be read anyway; and to know which would take a second
// meeting.
//
// Weights are packed once a call, at the start of the launch, in both directions and in the
// precision that they are multiplied in; every step streams them from L2 through cp.async. No
// parameter gradient is ever formed. The state's part of each first layer is computed once.
//
// Budget: 256 threads, up to 255 registers (one block a multiprocessor), no spills; dynamic shared
// memory as `SharedLayout` says: 8 rows of width 256 in float32 take 128 KB, 32 rows 178 KB.
//
// Roofline, on an H100 at 1.7 GHz (132 multiprocessors; of each: 128 FFMA or about 1,000 bf16
// multiply-adds a clock; L2 64 B a clock, and 3,000 for all), three hidden layers of 256, action 6.
// An item is 133 k multiply-adds a row forward and as many back, and streams 2 * 131,072 weights a
// step, 1.05 MB in float32: 16,400 clocks. A meeting of the grid is taken as 3,000 clocks. 20
// steps:
//
//   batch 256   float32: 64 items of 8 rows, 16,600 clocks of FFMA; 64 * 1.05 MB from L2 are 22,400
//               and limit it: 0.30 ms. bf16: 32 items of 16 rows, the stream of one multiprocessor
//               limits it, 8,200 clocks: 0.13 ms.
//   batch 4096  float32: 256 items of 32 rows in two rounds, 133,000 clocks of FFMA: 1.6 ms. bf16:
//               256 items of 32 rows in two rounds, 44,700 clocks from L2: 0.56 ms.
//
// No GPU has measured it yet.
#include "activations.cuh"
#include "kernels.h"
#include "tile.cuh"

namespace diffcore {
namespace cuda {

namespace {

// -- what a call lays out -------------------------------------------------------------------------

// A critic's weights as they are multiplied, in the workspace. Entries l of `forward` and
// `backward` are layers 1 .. count - 1 and 0 .. count - 2 in `Math`'s operands; what meets states
// and actions on the way forward is float32 in any precision: the layer is thin, and actions are
// what is refined.
struct PackedCritic {
  float* state_input;   // [width, state_dim]
  float* action_input;  // [width, action_dim]
  void* forward[max_layers];
  void* backward[max_layers];
};

// Where things lie in a block's dynamic shared memory.
struct SharedLayout {
  int hidden_stride;  // elements
  int hidden;         // two buffers [rows, hidden_stride], before the first step one for states
  int hidden_bytes;   // of one of them
  int state_stride;
  int action_stride;
  int action;  // [rows, action_stride]
  int warps;   // what `linear` needs
  int warp_bytes;
  int sums;  // one float a warp, and two
  int total;
};

struct AscentPlan {
  ActionGradientCall call;
  PackedCritic packed[2];
  SharedLayout shared;
  int width;          // of the widest hidden layer, padded
  int64_t tiles;      // of rows; an item is a tile of one critic
  float* state_part;  // [2, batch, width]
  float* slopes;      // [blocks, layers - 1, rows, width]
  float* actions;     // [2, batch, action_dim], and so on
  float* first_moment;
  float* second_moment;
  float* values;     // [2 by step, 2, batch]
  float* gradients;  // [2 by step, 2, batch, action_dim]
  int64_t bytes;     // of the workspace
};

int widest_hidden(const ActionGradientCall& call) {
  int widest = 0;
  for (const CriticParameters& critic : call.critics)
    for (int l = 0; l < critic.layer_count - 1; ++l)
      widest = critic.layers[l].out > widest ? critic.layers[l].out : widest;
  return round_up(widest, 16);
}

// Takes pieces of the workspace, each on 256 bytes; without memory it only measures.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }
};

template <class Math>
int64_t packed_size(int columns, int k) {
  return static_cast<int64_t>(round_up(columns, 8)) * round_up(k, Math::k_step);
}

template <class Math>
SharedLayout shared_layout(const ActionGradientCall& call, int rows) {
  using Operand = typename Math::Operand;
  const int state_dim = call.critics[0].state_dim, action_dim = call.critics[0].action_dim;
  SharedLayout s{};
  s.hidden_stride = operand_stride<Operand>(round_up(widest_hidden(call), Math::k_step));
  s.hidden_bytes = rows * s.hidden_stride * static_cast<int>(sizeof(Operand));
  s.state_stride = operand_stride<float>(round_up(state_dim, Float32Math::k_step));
  s.action_stride = operand_stride<float>(round_up(action_dim, Float32Math::k_step));
  const int state_bytes = rows * s.state_stride * 4;
  s.action = round_up(2 * s.hidden_bytes > state_bytes ? 2 * s.hidden_bytes : state_bytes, 128);
  s.warps = round_up(s.action + rows * s.action_stride * 4, 128);
  s.warp_bytes = warp_bytes<Math>(rows, true);
  if (s.warp_bytes < warp_bytes<Float32Math>(rows, true))
    s.warp_bytes = warp_bytes<Float32Math>(rows, true);
  s.sums = s.warps + warps * s.warp_bytes;
  s.total = s.sums + (warps + 2) * 4;
  return s;
}

template <class Math>
AscentPlan plan_ascent(const ActionGradientCall& call, int rows, unsigned blocks) {
  using Operand = typename Math::Operand;
  AscentPlan plan{};
  Workspace memory{static_cast<char*>(call.workspace)};
  const int action_dim = call.critics[0].action_dim;
  plan.call = call;
  plan.shared = shared_layout<Math>(call, rows);
  plan.width = widest_hidden(call);
  plan.tiles = (call.batch + rows - 1) / rows;
  int layers = 0;
  for (int c = 0; c < 2; ++c) {
    const CriticParameters& critic = call.critics[c];
    PackedCritic& packed = plan.packed[c];
    const LinearParameters* l = critic.layers;
    const int count = critic.layer_count;
    packed.state_input = memory.take<float>(packed_size<Float32Math>(l[0].out, critic.state_dim));
    packed.action_input = memory.take<float>(packed_size<Float32Math>(l[0].out, action_dim));
    packed.backward[0] = memory.take<Operand>(packed_size<Math>(action_dim, l[0].out));
    for (int i = 1; i < count; ++i) {
      packed.forward[i] = memory.take<Operand>(packed_size<Math>(l[i].out, l[i].in));
      if (i < count - 1)
        packed.backward[i] = memory.take<Operand>(packed_size<Math>(l[i].in, l[i].out));
    }
    layers = count - 1 > layers ? count - 1 : layers;
  }
  const int64_t elements = call.batch * action_dim;
  plan.state_part = memory.take<float>(2 * call.batch * plan.width);
  plan.slopes = memory.take<float>(static_cast<int64_t>(blocks) * layers * rows * plan.width);
  plan.actions = memory.take<float>(2 * elements);
  plan.first_moment = memory.take<float>(2 * elements);
  plan.second_moment = memory.take<float>(2 * elements);
  plan.values = memory.take<float>(2 * 2 * call.batch);
  plan.gradients = memory.take<float>(2 * 2 * elements);
  plan.bytes = memory.used;
  return plan;
}

// -- packing --------------------------------------------------------------------------------------

// packed [columns, k] with zeros where they are padded: weight(column, k), which is at
// from[column * column_stride + k * k_stride]. By all threads of the grid.
template <class Math>
__device__ void pack(const float* from, int columns, int64_t column_stride, int k, int64_t k_stride,
                     void* to) {
  const int pairs = round_up(k, Math::k_step) / 2;
  const int count = round_up(columns, 8) * pairs;
  const auto packed = static_cast<typename Math::Pair*>(to);
  const int first = static_cast<int>(blockIdx.x) * block_threads + static_cast<int>(threadIdx.x);
  for (int p = first; p < count; p += static_cast<int>(gridDim.x) * block_threads) {
    const int column = p / pairs, at = p % pairs * 2;
    const float* w = from + column * column_stride + at * k_stride;
    packed[p] = Math::pair(column < columns && at < k ? w[0] : 0.0f,
                           column < columns && at + 1 < k ? w[k_stride] : 0.0f);
  }
}

template <class Math>
__device__ void pack_critics(const AscentPlan& plan) {
  for (int c = 0; c < 2; ++c) {
    const CriticParameters& critic = plan.call.critics[c];
    const PackedCritic& packed = plan.packed[c];
    const LinearParameters& first = critic.layers[0];
    const float* of_action = first.weight + critic.state_dim;
    pack<Float32Math>(first.weight, first.out, first.in, critic.state_dim, 1, packed.state_input);
    pack<Float32Math>(of_action, first.out, first.in, critic.action_dim, 1, packed.action_input);
    pack<Math>(of_action, critic.action_dim, 1, first.out, first.in, packed.backward[0]);
    for (int l = 1; l < critic.layer_count; ++l) {
      const LinearParameters& layer = critic.layers[l];
      pack<Math>(layer.weight, layer.out, layer.in, layer.in, 1, packed.forward[l]);
      if (l < critic.layer_count - 1)
        pack<Math>(layer.weight, layer.in, 1, layer.out, layer.in, packed.backward[l]);
    }
  }
}

template <class Math>
__device__ Weights<typename Math::Operand> streamed(const void* packed, int k, int columns) {
  return {nullptr, static_cast<const typename Math::Operand*>(packed), round_up(k, Math::k_step),
          round_up(columns, 8)};
}

// -- one critic on one tile -----------------------------------------------------------------------

// A tile of rows of one critic.
struct Item {
  int critic;
  int64_t first;  // row
  int rows;
};

template <int rows>
__device__ Item item_at(const AscentPlan& plan, int64_t index) {
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

// Zeros in columns of a hidden buffer that the next layer reads and the last one didn't write.
template <class Math>
__device__ void clear_padding(typename Math::Operand* hidden, int stride, int row_count,
                              int width) {
  const int written = round_up(width, 8), gap = round_up(width, Math::k_step) - written;
  for (int i = static_cast<int>(threadIdx.x); i < row_count * gap; i += block_threads)
    hidden[i / gap * stride + written + i % gap] = 0;
}

template <class Math, int rows>
class CriticPass {
 public:
  using Operand = typename Math::Operand;
  using Pair = typename Math::Pair;

  __device__ CriticPass(const AscentPlan& plan, const Item& item, char* memory)
      : plan_(plan),
        critic_(plan.call.critics[item.critic]),
        packed_(plan.packed[item.critic]),
        item_(item),
        memory_(memory),
        slopes_(plan.slopes +
                static_cast<int64_t>(blockIdx.x) * (critic_.layer_count - 1) * rows * plan.width) {}

  // The first layer, thin and in float32, on rows of states or of actions. What states make of it,
  // with the bias, is kept for all steps; actions add their part and are activated.
  __device__ void first_layer(bool of_states, const float* input) const {
    const SharedLayout& s = plan_.shared;
    const LinearParameters& layer = critic_.layers[0];
    const int width = of_states ? critic_.state_dim : critic_.action_dim;
    const int stride = of_states ? s.state_stride : s.action_stride;
    const auto staged = reinterpret_cast<float*>(memory_ + (of_states ? s.hidden : s.action));
    stage_rows(input, item_.rows, width, staged, stride);
    __syncthreads();
    const float* packed = of_states ? packed_.state_input : packed_.action_input;
    linear<Float32Math, rows>(staged, stride, item_.rows,
                              streamed<Float32Math>(packed, width, layer.out), memory_ + s.warps,
                              s.warp_bytes, [&](int row, int column, float2 sum) {
                                float2* part = state_part_at(row, column);
                                const float2 other = of_states ? bias_of(layer, column) : *part;
                                sum = make_float2(sum.x + other.x, sum.y + other.y);
                                if (of_states) {
                                  *part = sum;
                                } else {
                                  activate_pair(0, row, column, sum, 0);
                                }
                              });
    __syncthreads();
  }

  // All that comes after the first layer: the tile's values [rows] and, back through all layers,
  // the gradients at its actions [rows, action_dim]. One loop over all products and one call of
  // `linear`: each is a thousand instructions.
  __device__ void rest(float* values, float* gradients) const {
    const SharedLayout& s = plan_.shared;
    const int action_dim = critic_.action_dim, last = critic_.layer_count - 1;
    const LinearParameters& output = critic_.layers[last];
    int current = 0;
    for (int product = 1; product <= 2 * last; ++product, current ^= 1) {
      const bool forward = product <= last;
      const int l = forward ? product : 2 * last - product;
      const LinearParameters& layer = critic_.layers[l];
      const int k = forward ? layer.in : layer.out;
      const int columns = forward ? layer.out : l > 0 ? layer.in : action_dim;
      const int next = current ^ 1;
      clear_padding<Math>(hidden(current), s.hidden_stride, item_.rows, k);
      __syncthreads();
      linear<Math, rows>(
          hidden(current), s.hidden_stride, item_.rows,
          streamed<Math>(forward ? packed_.forward[l] : packed_.backward[l], k, columns),
          memory_ + s.warps, s.warp_bytes, [&](int row, int column, float2 sum) {
            if (product < last) {
              const float2 bias = bias_of(layer, column);
              activate_pair(l, row, column, make_float2(sum.x + bias.x, sum.y + bias.y), next);
            } else if (product == last) {
              if (column == 0) values[row] = sum.x + bias_of(output, 0).x;
            } else if (l > 0) {
              const float2 slope = *slope_at(l - 1, row, column);
              *hidden_pair(next, row, column) = Math::pair(sum.x * slope.x, sum.y * slope.y);
            } else {
              float* g = gradients + row * action_dim + column;
              if (column < action_dim) g[0] = sum.x;
              if (column + 1 < action_dim) g[1] = sum.y;
            }
          });
      if (product == last) turn_back(output, last - 1, next);
    }
    __syncthreads();
  }

 private:
  __device__ Operand* hidden(int which) const {
    return reinterpret_cast<Operand*>(memory_ + plan_.shared.hidden +
                                      which * plan_.shared.hidden_bytes);
  }
  __device__ Pair* hidden_pair(int which, int row, int column) const {
    return reinterpret_cast<Pair*>(hidden(which) + row * plan_.shared.hidden_stride + column);
  }
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

  // The gradient of the value at the sums of the last hidden layer.
  __device__ void turn_back(const LinearParameters& output, int layer, int to) const {
    const int pairs = round_up(output.in, 8) / 2;
    for (int p = static_cast<int>(threadIdx.x); p < item_.rows * pairs; p += block_threads) {
      const int row = p / pairs, column = p % pairs * 2;
      const float2 slope = *slope_at(layer, row, column);
      const float w0 = column < output.in ? output.weight[column] : 0.0f;
      const float w1 = column + 1 < output.in ? output.weight[column + 1] : 0.0f;
      *hidden_pair(to, row, column) = Math::pair(w0 * slope.x, w1 * slope.y);
    }
  }

  __device__ void activate_pair(int layer, int row, int column, float2 sum, int to) const {
    const ValueAndSlope a = value_and_slope(critic_.activation, sum.x);
    const ValueAndSlope b = value_and_slope(critic_.activation, sum.y);
    *hidden_pair(to, row, column) = Math::pair(a.value, b.value);
    *slope_at(layer, row, column) = make_float2(a.slope, b.slope);
  }

  const AscentPlan& plan_;
  const CriticParameters& critic_;
  const PackedCritic& packed_;
  const Item item_;
  char* const memory_;
  float* const slopes_;
};

// -- the update -----------------------------------------------------------------------------------

// What the blocks published in a step.
struct Published {
  const float* values;     // [2, batch]
  const float* gradients;  // [2, batch, action_dim]
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
};

// The block's sum of a number a thread, the same to all threads; `sums` has a float a warp.
__device__ float block_sum(float x, float* sums) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(all_lanes, x, lanes);
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

// Over the whole batch, by every block in the same order.
__device__ float batch_factor(const Published& p, float max_norm, float* sums) {
  const int64_t count = p.batch * p.action_dim;
  float own = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += block_threads) {
    const float g = p.descent(i / p.action_dim, static_cast<int>(i % p.action_dim));
    own = fmaf(g, g, own);
  }
  return clip_factor(block_sum(own, sums), max_norm);
}

__device__ float row_factor(const Published& p, int64_t row, float max_norm) {
  float sum = 0.0f;
  for (int column = 0; column < p.action_dim; ++column) {
    const float g = p.descent(row, column);
    sum = fmaf(g, g, sum);
  }
  return clip_factor(sum, max_norm);
}

__device__ void update_actions(const AscentPlan& plan, const Item& item, const Published& p,
                               float factor_of_batch, const float* adam) {
  const ActionGradientCall& call = plan.call;
  const int action_dim = p.action_dim;
  const float step_size = adam[0], root_correction = adam[1];
  for (int i = static_cast<int>(threadIdx.x); i < item.rows * action_dim; i += block_threads) {
    const int64_t row = item.first + i / action_dim;
    const int column = i % action_dim;
    const int64_t at = (item.critic * call.batch + row) * action_dim + column;
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
__device__ void start(const AscentPlan& plan, const Item& item) {
  const int action_dim = plan.call.critics[0].action_dim;
  const int64_t from = item.first * action_dim;
  const int64_t to = item.critic * plan.call.batch * action_dim + from;
  for (int i = static_cast<int>(threadIdx.x); i < item.rows * action_dim; i += block_threads) {
    plan.actions[to + i] = plan.call.action[from + i];
    plan.first_moment[to + i] = plan.second_moment[to + i] = 0.0f;
  }
}

// -- the kernel -----------------------------------------------------------------------------------

template <class Math, int rows>
__global__ void __launch_bounds__(block_threads, 1)
    ascend(const __grid_constant__ AscentPlan plan) {
  DIFFCORE_DYNAMIC_SHARED(memory);
  const ActionGradientCall& call = plan.call;
  const int action_dim = call.critics[0].action_dim;
  const int64_t items = 2 * plan.tiles, elements = call.batch * action_dim;
  const auto sums = reinterpret_cast<float*>(memory + plan.shared.sums);
  float* const adam = sums + warps;  // step size, and the correction of the root

  pack_critics<Math>(plan);
  wait_for_grid();
  double power1 = 1.0, power2 = 1.0;
  for (int step = -1; step < call.steps; ++step) {  // the first time round, what the steps share
    float* values = plan.values + (step & 1) * 2 * call.batch;
    float* gradients = plan.gradients + (step & 1) * 2 * elements;
    for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
      const Item item = item_at<rows>(plan, i);
      const CriticPass<Math, rows> pass(plan, item, memory);
      const int64_t row = item.critic * call.batch + item.first;
      if (step < 0) {
        start(plan, item);
        pass.first_layer(true, call.state + item.first * call.critics[0].state_dim);
      } else {
        pass.first_layer(false, plan.actions + row * action_dim);
        pass.rest(values + row, gradients + row * action_dim);
      }
    }
    if (step < 0) continue;
    // Bias corrections of Adam, computed as torch does, in double, by one thread.
    if (threadIdx.x == 0) {
      power1 *= 0.9;
      power2 *= 0.999;
      adam[0] = static_cast<float>(call.lr / (1.0 - power1));
      adam[1] = static_cast<float>(sqrt(1.0 - power2));
    }
    wait_for_grid();
    const Published published = {values, gradients, call.batch, action_dim};
    const float factor =
        call.norm_clip == NormClip::batch ? batch_factor(published, call.max_norm, sums) : 1.0f;
    for (int64_t i = blockIdx.x; i < items; i += gridDim.x)
      update_actions(plan, item_at<rows>(plan, i), published, factor, adam);
    __syncthreads();
  }

  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    const Item item = item_at<rows>(plan, i);
    if (item.critic != 0) continue;
    const int64_t first = item.first * action_dim;
    for (int e = static_cast<int>(threadIdx.x); e < item.rows * action_dim; e += block_threads)
      call.improved[first + e] = plan.actions[first + e];
  }
}

// -- the choice of a tile -------------------------------------------------------------------------

// What is launched for a call: few rows a tile while that keeps everybody busy, else many.
struct Choice {
  AscentPlan plan;
  Launch launch;
  void (*kernel)(AscentPlan);
};

template <class Math, int rows>
bool choose(const ActionGradientCall& call, const Device& device, Choice* choice) {
  const int shared_bytes = shared_layout<Math>(call, rows).total;
  if (shared_bytes > device.shared_bytes) return false;
  const int64_t items = 2 * ((call.batch + rows - 1) / rows);
  const auto blocks =
      static_cast<unsigned>(items < device.multiprocessors ? items : device.multiprocessors);
  choice->plan = plan_ascent<Math>(call, rows, blocks);
  choice->launch = {blocks, block_threads, static_cast<size_t>(shared_bytes), call.stream};
  choice->launch.cooperative = true;
  choice->kernel = ascend<Math, rows>;
  return items <= device.multiprocessors;
}

template <class Math, int few_rows, int many_rows>
bool choose(const ActionGradientCall& call, const Device& device, Choice* choice) {
  if (choose<Math, few_rows>(call, device, choice)) return true;
  choose<Math, many_rows>(call, device, choice);
  return choice->kernel != nullptr;
}

const char* choose(const ActionGradientCall& call, Choice* choice) {
  Device device{};
  if (const char* error = current_device(&device)) return error;
  bool fits = false;
  switch (call.critics[0].precision) {
    case Precision::float32: fits = choose<Float32Math, 8, 32>(call, device, choice); break;
    case Precision::tf32: fits = choose<Tf32Math, 16, 32>(call, device, choice); break;
    case Precision::bfloat16: fits = choose<Bfloat16Math, 16, 32>(call, device, choice); break;
    case Precision::float16: fits = choose<Float16Math, 16, 32>(call, device, choice); break;
  }
  return fits ? nullptr : "the critic's layers are too wide for shared memory";
}

}  // namespace

int64_t action_gradient_workspace(const ActionGradientCall& call) {
  Choice choice{};
  return choose(call, &choice) ? -1 : choice.plan.bytes;
}

const char* action_gradient(const ActionGradientCall& call) {
  Choice choice{};
  if (const char* error = choose(call, &choice)) return error;
  return launch(choice.launch, choice.kernel, choice.plan);
}

}  // namespace cuda
}  // namespace diffcore
