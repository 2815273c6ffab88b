// The whole reverse chain of a batch of actions: one launch that prepares, one that runs all steps.
//
// Preparing takes out of the loop what doesn't depend on x: the state's part of the first layer,
// once per row, and the time embedding's, once per step. It also pads the weights to what the tile
// reads and rounds them to the precision; so nothing outside has to know whether they changed.
//
// A group of 1, 2, 4 or 8 blocks takes a tile of rows through the whole chain (group.cuh). Every
// block holds x, and makes a slice of each layer's columns for all rows. The last layer is thin;
// every block makes all of it, and the solver's step, so the group meets only after hidden layers.
// Noise is drawn while waiting for the others.
//
// Roofline, on an H100 at 1.7 GHz: 132 multiprocessors, of each 128 FFMA a clock (100 are reckoned
// with) or, through mma.sync, some 400 tf32 and 800 bf16 multiply-adds; a wavefront of shared memory
// a clock; L2 64 bytes a clock, 3,000 for all together; 12 bytes a clock to other blocks of a
// cluster, of which 66 of 2, 31 of 4 or 15 of 8 run at once. A chain of K = 100 steps, hidden 256 x
// 3, state 17, action 6 has 134,000 multiply-adds (268,000 FLOPs) and 768 activations of some 30
// instructions per row and step, and 0.54 MB of float32 weights.
//
//   batch 1     Every step needs all weights. From L2 into one multiprocessor they take 8,400
//               clocks. Spread over the shared memory of 8, two layers take 640 wavefronts each,
//               for 4 rows, to which come two exchanges of 870 (a cluster's barrier and the way
//               there), thin layers, activations, sums: 4,500 clocks a step, 0.27 ms a chain in
//               float32. Latency and shared memory limit it. Up to 60 rows, in 15 clusters of 4
//               rows each, have more to send: 5,200.
//   batch 256   16 clusters of 4 with 16 rows each: two layers of 2,600 clocks of FFMA, three
//               exchanges of 1,800: 13,200 clocks a step, 0.78 ms. In bf16 multiplications take
//               little: 6,700, 0.39 ms. 16 clusters of 8 would take 10,700, but the last of them
//               would wait for another's chain. 64 blocks alone with 4 rows each, whose weights
//               pass through shared memory, would take 16,800.
//   batch 4096  128 blocks alone with 32 rows each. FFMA limits float32: 43,000 of 51,200 clocks a
//               step, 3.0 ms. In bf16 weights from L2 take 11,200 of 19,400 and activations 6,100,
//               1.1 ms; pairs of blocks that hold them would take two rounds of 11,600.
//
// Slices that stay win wherever tiles are few, and streams where every block has a tile of its own
// to multiply: `estimate` below does this arithmetic for the call at hand, and the launcher takes
// the group and the rows for which it gives least. No GPU has measured it yet.
//
// Budget: 256 threads, up to 255 registers (one block a multiprocessor), no spills; shared memory
// as the plan says, up to all of it. The launch that prepares: up to 64 registers (four blocks).
#include "group.cuh"
#include "kernels.h"
#include "philox.cuh"
#include "plan.cuh"
#include "platform.cuh"
#include "solver_step.cuh"
#include "tile.cuh"

namespace diffcore {
namespace cuda {

namespace {

constexpr int max_width = 1024;

// A layer as it was packed: weights of the Math's operands (of layer 0 floats) and bias [columns],
// both padded with zeros.
struct Layer : SlicedWeights {
  float* bias;
};

struct Chain {
  ReverseDiffusionCall call;
  Layer layers[max_layers];
  int layer_count;
  float* state_part;  // [batch, layers[0].columns]
  float* step_bias;   // [steps, layers[0].columns], the first layer's bias included
  GroupLayout group;
  int64_t tiles;
  int groups;
  bool share_first;  // the first layer too is made in slices

  // In shared memory.
  int x_stride;
  int z_stride;
  int x_offset;
  int x0_offset;
  int z_offset;
  int step_bias_offset;  // of this step and the next
  int memory_offset;     // the warps' memory
  int bytes_a_warp;
};

// -- preparing ------------------------------------------------------------------------------------

// Which blocks of the preparing launch do what.
struct Preparation {
  Chain chain;
  int step_blocks;
  int state_blocks;
  int pack_blocks;
};

// y[n] = weight[n, first .. first + in) x + bias[n] for the warp's share of n; finish(n, y[n]) is
// called by one lane.
template <class Finish>
__device__ __forceinline__ void dense(const float* x, const float* weight, int row_stride, int in,
                                      const float* bias, int out, const Finish& finish) {
  for (int n = warp_index(); n < out; n += warps) {
    const float* row = weight + static_cast<int64_t>(n) * row_stride;
    float sum = 0.0f;
    for (int k = lane_index(); k < in; k += 32) sum = fmaf(row[k], x[k], sum);
    sum = warp_sum(sum);
    if (lane_index() == 0) finish(n, sum + bias[n]);
  }
}

// step_bias[step] = W_t time_mlp(embedding of the step) + b.
__device__ void prepare_step(const Chain& chain, int step, float* shared) {
  const DenoiserParameters& p = chain.call.denoiser;
  float* hidden = shared;
  float* time = shared + p.time_hidden.out;
  dense(p.time_embedding + static_cast<int64_t>(step) * p.time_hidden.in, p.time_hidden.weight,
        p.time_hidden.in, p.time_hidden.in, p.time_hidden.bias, p.time_hidden.out,
        [&](int n, float y) { hidden[n] = activate(p.activation, make_float2(y, 0.0f)).x; });
  __syncthreads();
  dense(hidden, p.time_out.weight, p.time_out.in, p.time_out.in, p.time_out.bias, p.time_out.out,
        [&](int n, float y) { time[n] = y; });
  __syncthreads();
  const LinearParameters& first = p.trunk[0];
  const int columns = chain.layers[0].columns;
  float* out = chain.step_bias + static_cast<int64_t>(step) * columns;
  dense(time, first.weight + p.action_dim, first.in, p.time_out.out, first.bias, first.out,
        [&](int n, float y) { out[n] = y; });
  for (int n = first.out + static_cast<int>(threadIdx.x); n < columns; n += block_threads)
    out[n] = 0.0f;
  __syncthreads();  // before another step overwrites `shared`
}

constexpr int state_rows = 8;  // that a warp's weights are used for

// state_part of rows from `first_row` on.
__device__ void prepare_state(const Chain& chain, int64_t first_row) {
  const DenoiserParameters& p = chain.call.denoiser;
  const LinearParameters& first = p.trunk[0];
  const int columns = chain.layers[0].columns;
  const int64_t left = chain.call.batch - first_row;
  const int rows = left < state_rows ? static_cast<int>(left) : state_rows;
  const float* state = chain.call.state + first_row * p.state_dim;
  for (int n = warp_index(); n < columns; n += warps) {
    float sums[state_rows] = {};
    if (n < first.out) {
      const float* weight =
          first.weight + static_cast<int64_t>(n) * first.in + p.action_dim + p.time_out.out;
      for (int k = lane_index(); k < p.state_dim; k += 32) {
        const float w = weight[k];
#pragma unroll
        for (int i = 0; i < state_rows; ++i)
          if (i < rows)
            sums[i] = fmaf(w, state[static_cast<int64_t>(i) * p.state_dim + k], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < state_rows; ++i) {
      const float sum = warp_sum(sums[i]);
      if (i < rows && lane_index() == 0) chain.state_part[(first_row + i) * columns + n] = sum;
    }
  }
}

template <class Math>
__device__ void pack_weights(const Chain& chain, int thread, int threads) {
  const DenoiserParameters& p = chain.call.denoiser;
  for (int l = 0; l < chain.layer_count; ++l) {
    const Layer& layer = chain.layers[l];
    const LinearParameters& from = p.trunk[l];
    if (l == 0) {
      pack<Float32Math>(from.weight, from.out, from.in, p.action_dim, 1, layer, thread, threads);
    } else {
      pack<Math>(from.weight, from.out, from.in, from.in, 1, layer, thread, threads);
    }
    for (int n = thread; n < layer.columns; n += threads)
      layer.bias[n] = n < from.out ? from.bias[n] : 0.0f;
  }
}

template <class Math>
__global__ void __launch_bounds__(block_threads, 4) prepare(const __grid_constant__ Preparation p) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  const Chain& chain = p.chain;
  int block = static_cast<int>(blockIdx.x);
  if (block < p.step_blocks) {
    for (int step = block; step < chain.call.denoiser.steps; step += p.step_blocks)
      prepare_step(chain, step, reinterpret_cast<float*>(shared));
    return;
  }
  block -= p.step_blocks;
  if (block < p.state_blocks) {
    for (int64_t row = static_cast<int64_t>(block) * state_rows; row < chain.call.batch;
         row += static_cast<int64_t>(p.state_blocks) * state_rows)
      prepare_state(chain, row);
    return;
  }
  block -= p.state_blocks;
  if (block == 0 && chain.group.counters)
    for (int g = static_cast<int>(threadIdx.x); g < chain.groups; g += block_threads)
      chain.group.counters[g] = 0;
  pack_weights<Math>(chain, block * block_threads + static_cast<int>(threadIdx.x),
                     p.pack_blocks * block_threads);
}

// -- the chain ------------------------------------------------------------------------------------

template <class Math, int rows>
class ChainTile {
 public:
  using Operand = typename Math::Operand;

  __device__ __forceinline__ ChainTile(const Chain& chain, char* shared, Group<Math, rows>& group)
      : chain_(chain),
        call_(chain.call),
        group_(group),
        shared_(shared),
        x_(reinterpret_cast<float*>(shared + chain.x_offset)),
        x0_(reinterpret_cast<float*>(shared + chain.x0_offset)),
        z_(reinterpret_cast<float*>(shared + chain.z_offset)),
        seed_(read_seed(chain.call.seed)) {}

  __device__ __forceinline__ void run(int64_t tile) {
    first_row_ = tile * rows;
    const int64_t left = call_.batch - first_row_;
    row_count_ = left < rows ? static_cast<int>(left) : rows;
    begin();
    __syncthreads();
    for (int step = 0; step < call_.denoiser.steps; ++step) {
      // Read now, so that they have arrived at the end of the step.
      const float* coefficients = call_.coefficients + step * table_columns;
      const SolverStep solver(coefficients, call_.noise_scale, call_.clip);
      const Operand* hidden = first_layer(step);
      for (int l = 1; l < chain_.layer_count - 1; ++l) hidden = hidden_layer(l, hidden);
      __syncthreads();  // z is there
      last_layer(step, hidden, solver);
      __syncthreads();
    }
  }

 private:
  // Where the chain starts, and what the first step needs.
  __device__ __forceinline__ void begin() {
    const int columns = call_.denoiser.action_dim;
    if (call_.x_init) {
      read_rows(call_.x_init, x_, chain_.x_stride);
    } else {
      draw(0, x_, chain_.x_stride);
    }
    for (int i = static_cast<int>(threadIdx.x); i < row_count_ * columns; i += block_threads)
      x0_[i / columns * chain_.x_stride + i % columns] = 0.0f;
    load_step_bias(0);
    if (!call_.trajectory || group_.rank() != 0) return;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < row_count_ * columns; i += block_threads)
      call_.trajectory[first_row_ * columns + i] = x_[i / columns * chain_.x_stride + i % columns];
  }

  // f(W_x x + what depends on the step + what depends on the state), in float32.
  __device__ __forceinline__ const Operand* first_layer(int step) {
    const Layer& layer = chain_.layers[0];
    const Slice<float> slice =
        slice_of<float>(layer, chain_.share_first ? group_.rank() : 0, shared_);
    const float* step_bias = step_bias_of(step) + slice.first;
    const float* state_part = chain_.state_part + first_row_ * layer.columns + slice.first;
    Operand* out = chain_.share_first ? group_.exchanged() : group_.hidden(2);
    linear<Float32Math, rows>(
        x_, chain_.x_stride, row_count_, slice.weights, memory(), chain_.bytes_a_warp,
        [&](int row, int column, float2 sum) {
          const float2 bias = *reinterpret_cast<const float2*>(step_bias + column);
          const float2 part = __ldg(reinterpret_cast<const float2*>(
              state_part + static_cast<int64_t>(row) * layer.columns + column));
          sum = activate(call_.denoiser.activation,
                         make_float2(sum.x + (bias.x + part.x), sum.y + (bias.y + part.y)));
          const typename Math::Pair pair = Math::pair(sum.x, sum.y);
          if (chain_.share_first) {
            group_.put(row, slice.first + column, pair);
          } else {
            *reinterpret_cast<typename Math::Pair*>(out + row * chain_.group.hidden_stride +
                                                    column) = pair;
          }
        });
    if (chain_.share_first) group_.arrive();
    prepare_noise(step);
    if (chain_.share_first) {
      group_.wait(row_count_, layer.columns);
    } else {
      __syncthreads();
    }
    return out;
  }

  __device__ __forceinline__ const Operand* hidden_layer(int l, const Operand* in) {
    const Layer& layer = chain_.layers[l];
    const Slice<Operand> slice = slice_of<Operand>(layer, group_.rank(), shared_);
    Operand* out = group_.exchanged();
    linear<Math, rows>(
        in, chain_.group.hidden_stride, row_count_, slice.weights, memory(), chain_.bytes_a_warp,
        [&](int row, int column, float2 sum) {
          const float2 bias =
              __ldg(reinterpret_cast<const float2*>(layer.bias + slice.first + column));
          sum = activate(call_.denoiser.activation, make_float2(sum.x + bias.x, sum.y + bias.y));
          group_.put(row, slice.first + column, Math::pair(sum.x, sum.y));
        });
    group_.arrive();
    group_.wait(row_count_, layer.columns);
    return out;
  }

  // eps, and x and x0 moved on by it.
  __device__ __forceinline__ void last_layer(int step, const Operand* in,
                                             const SolverStep& solver) {
    const Layer& layer = chain_.layers[chain_.layer_count - 1];
    const Slice<Operand> slice = slice_of<Operand>(layer, 0, shared_);
    const int columns = call_.denoiser.action_dim;
    const bool writes = group_.rank() == 0;
    const bool last = step + 1 == call_.denoiser.steps;
    float* trajectory = nullptr;
    if (call_.trajectory && writes)
      trajectory = call_.trajectory + ((step + 1) * call_.batch + first_row_) * columns;
    const auto move = [&](int row, int column, float eps) {
      float& x = x_[row * chain_.x_stride + column];
      float& x0 = x0_[row * chain_.x_stride + column];
      const float next = solver.next(x, eps, z_[row * chain_.z_stride + column], x0, &x0);
      x = next;
      if (trajectory) trajectory[row * columns + column] = next;
      if (last && writes) call_.actions[(first_row_ + row) * columns + column] = solver.clamp(next);
    };
    linear<Math, rows>(in, chain_.group.hidden_stride, row_count_, slice.weights, memory(),
                       chain_.bytes_a_warp, [&](int row, int column, float2 sum) {
                         const float2 bias = __ldg(
                             reinterpret_cast<const float2*>(layer.bias + slice.first + column));
                         if (column < columns) move(row, column, sum.x + bias.x);
                         if (column + 1 < columns) move(row, column + 1, sum.y + bias.y);
                       });
  }

  // The noise of this step and the bias of the next.
  __device__ __forceinline__ void prepare_noise(int step) {
    if (call_.noise) {
      const int64_t before = step * call_.batch * call_.denoiser.action_dim;
      read_rows(call_.noise + before, z_, chain_.z_stride);
    } else if (call_.noise_scale != 0.0f) {
      draw(static_cast<uint32_t>(step) + 1, z_, chain_.z_stride);
    }
    if (step + 1 < call_.denoiser.steps) load_step_bias(step + 1);
  }

  // The tile's rows of [batch, action_dim].
  __device__ __forceinline__ void read_rows(const float* from, float* to, int stride) {
    const int columns = call_.denoiser.action_dim;
    for (int i = static_cast<int>(threadIdx.x); i < row_count_ * columns; i += block_threads)
      to[i / columns * stride + i % columns] = from[first_row_ * columns + i];
  }

  __device__ __forceinline__ void draw(uint32_t step, float* to, int stride) {
    const int columns = call_.denoiser.action_dim, blocks = divide_up(columns, 4);
    for (int i = static_cast<int>(threadIdx.x); i < row_count_ * blocks; i += block_threads) {
      const int row = i / blocks, block = i % blocks;
      const float4 z = normals(seed_, static_cast<uint32_t>(block), first_row_ + row, step);
      float* out = to + row * stride + 4 * block;
      const int here = columns - 4 * block;
      out[0] = z.x;
      if (here > 1) out[1] = z.y;
      if (here > 2) out[2] = z.z;
      if (here > 3) out[3] = z.w;
    }
  }

  __device__ __forceinline__ float* step_bias_of(int step) const {
    return reinterpret_cast<float*>(shared_ + chain_.step_bias_offset) +
           step % 2 * chain_.layers[0].columns;
  }
  __device__ __forceinline__ void load_step_bias(int step) {
    const int columns = chain_.layers[0].columns;
    const float* from = chain_.step_bias + static_cast<int64_t>(step) * columns;
    for (int n = static_cast<int>(threadIdx.x); n < columns; n += block_threads)
      step_bias_of(step)[n] = __ldg(from + n);
  }

  __device__ __forceinline__ char* memory() const { return shared_ + chain_.memory_offset; }

  const Chain& chain_;
  const ReverseDiffusionCall& call_;
  Group<Math, rows>& group_;
  char* shared_;
  float* x_;
  float* x0_;
  float* z_;
  uint64_t seed_;
  int64_t first_row_ = 0;
  int row_count_ = 0;
};

template <class Math, int rows>
__global__ void __launch_bounds__(block_threads, 1)
    reverse_chain(const __grid_constant__ Chain chain) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  Group<Math, rows> group(chain.group, shared);
  for (int l = 0; l < chain.layer_count; ++l) {
    const bool last = l == chain.layer_count - 1;
    if (l == 0) {
      load_slice<float>(chain.layers[l], chain.share_first ? group.rank() : 0, shared);
    } else {
      load_slice<typename Math::Operand>(chain.layers[l], last ? 0 : group.rank(), shared);
    }
  }
  commit_copies();
  // Padding is read: it must be numbers, and of x, z and hidden activations zeros.
  for (int i = 4 * static_cast<int>(threadIdx.x); i < chain.memory_offset; i += 4 * block_threads)
    *reinterpret_cast<float*>(shared + i) = 0.0f;
  wait_for_copies<0>();
  group.start();

  ChainTile<Math, rows> tile(chain, shared, group);
  for (int64_t t = group.index(); t < chain.tiles; t += chain.groups) tile.run(t);
}

// -- the plan -------------------------------------------------------------------------------------

// As plan.cuh asks for it.
struct ChainOp {
  using Call = ReverseDiffusionCall;
  using Arguments = Chain;
  static constexpr int fewest_rows = 4;
  static constexpr const char* does_not_fit =
      "the layers don't fit into this device's shared memory";

  template <class Math, int rows>
  static void (*kernel())(Chain) {
    return reverse_chain<Math, rows>;
  }

  static Precision precision(const ReverseDiffusionCall& call) { return call.denoiser.precision; }

  static const char* check(const ReverseDiffusionCall& call) {
    const DenoiserParameters& p = call.denoiser;
    if (p.trunk_layers < 2) return "a denoiser without hidden layers";
    if (p.trunk_layers > max_layers) return "more layers than the CUDA kernel takes";
    int widest = std::max({p.action_dim, p.time_hidden.out, p.time_out.out});
    for (int l = 0; l < p.trunk_layers - 1; ++l) widest = std::max(widest, p.trunk[l].out);
    return widest > max_width ? "a layer is wider than 1024, which the CUDA kernel doesn't take"
                              : nullptr;
  }

  static bool lay_out(const ReverseDiffusionCall& call, const Device& device, int group_size,
                      int most_groups, Plan<Chain>* plan) {
    const DenoiserParameters& p = call.denoiser;
    const int rows = plan->rows;
    Chain& c = plan->arguments;
    c = Chain{};
    c.call = call;
    c.layer_count = p.trunk_layers;
    c.share_first = group_size == 1 || rows >= 16;
    c.tiles = (call.batch + rows - 1) / rows;
    c.groups = static_cast<int>(std::min<int64_t>(c.tiles, most_groups));
    if (c.groups == 0) return false;

    int widest = 0;
    for (int l = 0; l < c.layer_count; ++l) {
      Layer& layer = c.layers[l];
      const bool first = l == 0, last = l == c.layer_count - 1;
      const bool shared_out = !last && (!first || c.share_first);
      // A hidden layer has every column that the next one reads. In those that it left out could be
      // what a wider layer made of a row of another tile: NaN, by which zeros mustn't be multiplied.
      const int columns = last ? p.trunk[l].out : round_up(p.trunk[l].out, k_step_of(p.precision));
      static_cast<SlicedWeights&>(layer) =
          sliced(first ? Precision::float32 : p.precision, first ? p.action_dim : p.trunk[l].in,
                 columns, shared_out ? group_size : 1);
      if (!last) widest = std::max(widest, layer.columns);
      if (!first) widest = std::max(widest, layer.k);
    }

    int used = 0;
    c.x_stride = operand_stride<float>(round_up(p.action_dim, Float32Math::k_step));
    c.z_stride = round_up(p.action_dim, 4);
    c.x_offset = take_shared(&used, 4 * rows * c.x_stride);
    c.x0_offset = take_shared(&used, 4 * rows * c.x_stride);
    c.z_offset = take_shared(&used, 4 * rows * c.z_stride);
    c.step_bias_offset = take_shared(&used, 4 * 2 * c.layers[0].columns);
    c.group = group_layout(device, p.precision, group_size, rows, widest);
    c.group.hidden_offset = take_shared(&used, c.group.hidden_bytes * (c.share_first ? 2 : 3));
    c.memory_offset = used;

    // The thin layers stay first, then as many of the others as there is room for.
    const auto stay = [&](bool streams) {
      c.bytes_a_warp = bytes_for_warp(p.precision, rows, streams);
      used = c.memory_offset + warps * c.bytes_a_warp;
      int streamed = c.layer_count;
      for (int i = 0; i < c.layer_count; ++i) {
        const int l = i == 0 ? 0 : c.layer_count - i;  // first, last, then the inner ones
        const int bytes = slice_bytes(l == 0 ? Precision::float32 : p.precision, c.layers[l]);
        c.layers[l].shared_offset = -1;
        if (used + bytes > device.shared_bytes) continue;
        c.layers[l].shared_offset = take_shared(&used, bytes);
        --streamed;
      }
      return streamed == 0;
    };
    if (!stay(false)) stay(true);
    plan->launch = launch_of(c.group, c.groups, used, call.stream);
    return used <= device.shared_bytes;
  }

  // By the figures of an H100 at the top of this file.
  static double estimate(const Plan<Chain>& plan) {
    const Chain& c = plan.arguments;
    const double l2 = l2_rate(static_cast<int64_t>(c.groups) * c.group.size);
    // Products are of all the tile's rows, what follows them of those that there are.
    const int filled = static_cast<int>(std::min<int64_t>(c.call.batch, plan.rows));
    double clocks = 600;  // the solver's step and the last layer's sums
    for (int l = 0; l < c.layer_count; ++l) {
      const Layer& layer = c.layers[l];
      const bool first = l == 0, last = l == c.layer_count - 1;
      const Precision precision = first ? Precision::float32 : c.call.denoiser.precision;
      clocks += product_clocks(precision, layer, plan.rows, l2);
      if (!last) clocks += activation_clocks(layer, filled);
      if (!last && (!first || c.share_first))
        clocks += exchange_clocks(c.group, c.call.denoiser.precision, layer, filled);
    }
    const double rounds = static_cast<double>((c.tiles + c.groups - 1) / c.groups);
    return rounds * clocks;
  }

  static void place(Places* places, Plan<Chain>* plan) {
    Chain& c = plan->arguments;
    for (int l = 0; l < c.layer_count; ++l) {
      places->take_weight(l == 0 ? Precision::float32 : c.call.denoiser.precision, &c.layers[l]);
      c.layers[l].bias = places->floats(c.layers[l].columns);
    }
    const int64_t columns = c.layers[0].columns;
    c.state_part = places->floats(c.call.batch * columns);
    c.step_bias = places->floats(c.call.denoiser.steps * columns);
    places->take_exchanged(c.groups, &c.group);
  }
};

template <class Math>
const char* launch_prepare(const Chain& chain) {
  const DenoiserParameters& p = chain.call.denoiser;
  const int64_t tiles = (chain.call.batch + state_rows - 1) / state_rows;
  const Preparation preparation{chain, std::min(p.steps, 128),
                                static_cast<int>(std::min<int64_t>(tiles, 1024)), 128};
  const size_t shared = sizeof(float) * static_cast<size_t>(p.time_hidden.out + p.time_out.out);
  const int all = preparation.step_blocks + preparation.state_blocks + preparation.pack_blocks;
  return launch({static_cast<unsigned>(all), block_threads, shared, chain.call.stream},
                prepare<Math>, preparation);
}

}  // namespace

const char* plan_reverse_diffusion(const ReverseDiffusionCall& call, KernelPlan* result) {
  Plan<Chain> plan{};
  if (const char* reason = make_plan<ChainOp>(call, &plan)) return reason;
  const Chain& c = plan.arguments;
  *result = {c.group.size, plan.rows, 0, static_cast<int>(plan.launch.shared_bytes),
             plan.clocks * call.denoiser.steps};
  for (int l = 0; l < c.layer_count; ++l) result->resident_layers += c.layers[l].shared_offset >= 0;
  return nullptr;
}

int64_t reverse_diffusion_workspace(const ReverseDiffusionCall& call) {
  return workspace_bytes<ChainOp>(call);
}

const char* reverse_diffusion(const ReverseDiffusionCall& call) {
  if (call.batch == 0) return nullptr;
  Plan<Chain> plan{};
  if (const char* error = make_plan_in_workspace<ChainOp>(call, &plan)) return error;
  const char* error = by_precision(call.denoiser.precision, [&](auto math) {
    return launch_prepare<decltype(math)>(plan.arguments);
  });
  return error ? error : launch(plan.launch, plan.kernel, plan.arguments);
}

}  // namespace cuda
}  // namespace diffcore
