// Where a row's time goes inside the chain and the action gradient, part by part, on one thread. From the
// repository's root, for an instruction set of csrc/cpu/simd.h with the flags that CMakeLists.txt gives it:
//
//   g++ -O3 -std=gnu++17 -fopenmp -fno-math-errno -w -Icsrc/cpu -mavx512f -mavx512bw -mavx512vl
//       -mavx512dq -mavx2 -mfma -mprfchw -mprefer-vector-width=512 -DDIFFCORE_ISA=avx512
//       -DDIFFCORE_ISA_AVX512 bench/kernel_parts.cpp -o kernel_parts && ./kernel_parts 64
//   (-mavx2 -mfma -DDIFFCORE_ISA=avx2 -DDIFFCORE_ISA_AVX2; -DDIFFCORE_ISA=baseline -DDIFFCORE_ISA_BASELINE)
//
// Arguments: the hidden width (64), the milliseconds for each part (100). A tick is what two multiply-adds of a
// vector take in a loop of nothing else, which on CPUs with two multipliers is a clock tick. Each part is
// repeated on the same rows, so that its memory is as near as it gets; the least of all repetitions counts.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "action_gradient.h"
#include "peak.h"
#include "reverse_diffusion.h"

using namespace diffcore;
using namespace diffcore::DIFFCORE_ISA;
using Operand = Float32Operand;

namespace {

constexpr int rows = max_tile, state_dim = 17, action_dim = 6;
double seconds_each;

template <class Part>
double least_seconds(Part part) {
  double least = 1e9;
  const double end = monotonic_seconds() + seconds_each;
  for (double now = 0.0; now < end;) {
    constexpr int calls = 20;
    const double start = monotonic_seconds();
    for (int i = 0; i < calls; ++i) {
      part();
      asm volatile("" ::: "memory");
    }
    now = monotonic_seconds();
    if ((now - start) / calls < least) least = (now - start) / calls;
  }
  return least;
}

// `products`: multiply-adds of numbers, for a row.
template <class Part>
void report(const char* name, double products, Part part) {
  volatile float sink;
  constexpr int iterations = 2000;
  const auto measure_tick = [&] {
    return least_seconds([&] { sink = multiply_adds(iterations); }) / iterations / max_tile_rows;
  };
  const double tick = measure_tick();
  const double ticks = least_seconds(part) / rows / tick;
  const double after = measure_tick();  // the clock may change on the way
  (void)sink;
  std::printf("%-44s %8.1f ticks a row, its products %8.1f%s\n", name, ticks, products / W / 2,
              after > 1.03 * tick || after < 0.97 * tick ? "  (the clock changed)" : "");
}

float* numbers(int64_t count, float scale) {
  auto* const values = static_cast<float*>(std::aligned_alloc(64, round_up(count, 16) * 4));
  for (int64_t i = 0; i < count; ++i) {
    values[i] = scale * (static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f);
  }
  return values;
}

Carver memory(int64_t bytes) {
  return {static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)))};
}

LinearParameters random_layer(int in, int out) {
  LinearParameters layer{};
  layer.weight = numbers(int64_t{in} * out, 2.0f / __builtin_sqrtf(static_cast<float>(in)));
  layer.bias = numbers(out, 0.1f);
  layer.row_stride = in;
  layer.in = in;
  layer.out = out;
  layer.threads = 1;
  return layer;
}

PackedLinear packed(const LinearParameters& layer) {
  const auto pack = [&](Carver* to) {
    return pack_linear<Operand>(layer, 0, layer.in, Direction::forward, true, Packer(), to);
  };
  Carver block = memory(bytes_of(pack));
  return pack(&block);
}

Rows<float> random_rows(int columns) {
  const ptrdiff_t stride = buffer_stride<float>(columns);
  return {numbers(rows * stride, 2.0f), stride};
}

void time_layers(int width) {
  const PackedLinear action_layer = packed(random_layer(action_dim, width)),
                     hidden_layer = packed(random_layer(width, width)),
                     output_layer = packed(random_layer(width, action_dim));
  const auto relu = activate_function<Operand>(Activation::relu),
             mish = activate_function<Operand>(Activation::mish);
  const Rows<float> x = random_rows(action_dim), state_part = random_rows(width),
                    in = random_rows(width), out = random_rows(width), slope = random_rows(width),
                    small = random_rows(action_dim), no_slope = {nullptr, 0};
  const Offset offset = {action_layer.bias, state_part.data, state_part.stride};
  const double thin = action_dim * width, wide = width * width;

  report("action layer, sums alone", thin,
         [&] { linear_store<Operand>(x, rows, action_layer, offset, out); });
  report("action layer, mish", thin, [&] {
    linear_activate<Operand, Operand>(x, rows, action_layer, offset, mish, out, no_slope);
  });
  report("action layer, mish and its slope", thin, [&] {
    linear_activate<Operand, Operand>(x, rows, action_layer, offset, mish, out, slope);
  });
  const Offset bias = bias_only(hidden_layer);
  report("hidden layer, sums alone", wide,
         [&] { linear_store<Operand>(in, rows, hidden_layer, bias, out); });
  report("hidden layer, relu", wide, [&] {
    linear_activate<Operand, Operand>(in, rows, hidden_layer, bias, relu, out, no_slope);
  });
  report("hidden layer, mish", wide, [&] {
    linear_activate<Operand, Operand>(in, rows, hidden_layer, bias, mish, out, no_slope);
  });
  report("hidden layer, mish and its slope", wide, [&] {
    linear_activate<Operand, Operand>(in, rows, hidden_layer, bias, mish, out, slope);
  });
  report("output layer", thin,
         [&] { linear_store<Operand>(in, rows, output_layer, bias_only(output_layer), small); });
  report("noise", 0.0,
         [&] { fill_normals(1, 2, 1, 0, rows, action_dim, small.data, small.stride); });
  clear_rows(small, rows);
  const auto block_by_block = [&](Rows<float> slopes) {
    for (int n = 0, columns; n < width; n += columns) {
      columns = width - n > W ? panel_width : W;
      mish(in.data + n, in.stride, rows, columns, out.data + n, out.stride,
           columns_from(slopes, n).data, slopes.stride);
    }
  };
  report("mish alone", 0.0, [&] { block_by_block(no_slope); });
  report("mish and its slope alone", 0.0, [&] { block_by_block(slope); });
}

void time_ascent(int width) {
  constexpr int layers = 4;
  TwinCriticParameters parameters{};
  for (CriticParameters& critic : parameters.critics) {
    critic.layer_count = layers;
    critic.activation = Activation::mish;
    critic.precision = Precision::float32;
    critic.state_dim = state_dim;
    critic.action_dim = action_dim;
    const int sizes[layers + 1] = {state_dim + action_dim, width, width, width, 1};
    for (int l = 0; l < layers; ++l) critic.layers[l] = random_layer(sizes[l], sizes[l + 1]);
  }
  TwinCriticPack pack;
  Carver pack_memory = memory(twin_critic_pack_bytes(parameters));
  carve_twin_critic(parameters, &pack_memory, &pack, Packer());

  ActionGradientCall call{};
  call.critics[0] = &pack.critics[0];
  call.critics[1] = &pack.critics[1];
  call.batch = rows;
  call.state_dim = state_dim;
  call.action_dim = action_dim;
  call.state = numbers(rows * state_dim, 2.0f);
  call.action = numbers(rows * action_dim, 2.0f);
  call.low = -1.0f;
  call.high = 1.0f;
  call.lr = 0.03f;
  call.eps = 1e-8f;
  call.max_norm = 1.0f;
  call.norm_clip = NormClip::batch;
  call.optimizer = ActionOptimizer::adam;
  call.threads = 1;
  const auto take_state = [&](Carver* m) { return AscentState::take(call, m); };
  const auto take = [&](Carver* m) { return CriticBuffers<Operand>::take(call, rows, m, m); };
  Carver state_memory = memory(bytes_of(take_state)), tile_memory = memory(bytes_of(take));
  const AscentState state = take_state(&state_memory);
  const auto buffers = take(&tile_memory);
  const Span all = {0, rows};
  Team alone;
  begin_ascent(call, all, state);

  const double critic = 2.0 * width * width + (action_dim + 1.0) * width;
  report("action gradient: all of a step but Adam's", 3.0 * critic,
         [&] { descent_gradient(call, all, state, buffers, state.row_norms[0], &alone); });
  report("action gradient: one critic forward", critic,
         [&] { critics_forward(call, 0, 1, all, state, buffers, &alone); });
  int half[2] = {rows / 2, 0};
  report("action gradient: half of the rows back", critic / 2,
         [&] { critics_backward(call, 0, 1, half, buffers, &alone); });
  AdamSteps adam(call.lr);
  report("action gradient: Adam's part", 0.0, [&] {
    const double* norms = state.row_norms[0];
    update_actions(call, all, state, adam.next(), norms, batch_factor(call, norms));
  });
}

}  // namespace

int main(int argc, char** argv) {
  const int width = argc > 1 ? std::atoi(argv[1]) : 64;
  seconds_each = 1e-3 * (argc > 2 ? std::atoi(argv[2]) : 100);
  if (width < 1 || width > 1024 || seconds_each <= 0.0) {
    std::fprintf(stderr, "usage: %s [hidden width, 1 to 1024] [milliseconds a part]\n", argv[0]);
    return 2;
  }
  std::printf("%d rows, hidden width %d\n", rows, width);
  time_layers(width);
  time_ascent(width);
}
