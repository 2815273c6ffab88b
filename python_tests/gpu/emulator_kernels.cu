// Small kernels for test_cuda_emulator.py: each uses one thing that csrc/cuda/testing/cuda_on_cpu.h
// imitates, or breaks one rule.
#include "platform.cuh"
#include "tile.cuh"

using namespace diffcore::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

// -- mma, with the fragments filled by the formulas of the PTX ISA --------------------------------

// m16n8k16: a has eight numbers a lane, b four, d four.
template <class Pair, class Mma>
__device__ void multiply_by_fragments(const float* a, const float* b, float* d, Pair pair,
                                      Mma mma) {
  const int group = static_cast<int>(threadIdx.x) / 4, in_group = static_cast<int>(threadIdx.x) % 4;
  float a_numbers[8], b_numbers[4], sums[4] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
    a_numbers[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
    b_numbers[i] = b[row * 8 + group];
  }
  uint32_t a_registers[4], b_registers[2];
  for (int i = 0; i < 4; ++i) a_registers[i] = pair(a_numbers[2 * i], a_numbers[2 * i + 1]);
  for (int i = 0; i < 2; ++i) b_registers[i] = pair(b_numbers[2 * i], b_numbers[2 * i + 1]);
  mma(sums, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = sums[i];
}

// m16n8k8: a has four numbers a lane, b two, d four.
__device__ void multiply_tf32(const float* a, const float* b, float* d) {
  const int group = static_cast<int>(threadIdx.x) / 4, in_group = static_cast<int>(threadIdx.x) % 4;
  uint32_t a_registers[4], b_registers[2];
  float sums[4] = {};
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? group : group + 8;
    const int column = in_group + (i == 0 || i == 1 ? 0 : 4);
    a_registers[i] = tf32_bits(a[row * 8 + column]);
  }
  for (int i = 0; i < 2; ++i)
    b_registers[i] = tf32_bits(b[(in_group + (i == 0 ? 0 : 4)) * 8 + group]);
  mma_tf32(sums, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = sums[i];
}

struct MmaArguments {
  const float *a, *b;
  float* d;
};

__global__ void multiply_bf16_kernel(MmaArguments p) {
  multiply_by_fragments(
      p.a, p.b, p.d, [](float low, float high) { return bf16_pair(low, high); },
      [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b); });
}
__global__ void multiply_fp16_kernel(MmaArguments p) {
  multiply_by_fragments(
      p.a, p.b, p.d, [](float low, float high) { return fp16_pair(low, high); },
      [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_fp16(d, a, b); });
}
__global__ void multiply_tf32_kernel(MmaArguments p) { multiply_tf32(p.a, p.b, p.d); }

EXPORT void multiply(int precision, const float* a, const float* b, float* d) {
  const Launch how = {1, 32, 0, nullptr};
  const MmaArguments arguments = {a, b, d};
  switch (static_cast<Precision>(precision)) {
    case Precision::tf32: launch(how, multiply_tf32_kernel, arguments); break;
    case Precision::bfloat16: launch(how, multiply_bf16_kernel, arguments); break;
    default: launch(how, multiply_fp16_kernel, arguments); break;
  }
}

// -- conversions ----------------------------------------------------------------------------------

EXPORT void rounded(int precision, int count, const float* x, float* y) {
  for (int i = 0; i < count; ++i) {
    switch (static_cast<Precision>(precision)) {
      case Precision::tf32: y[i] = cuda_on_cpu::float_of_tf32(tf32_bits(x[i])); break;
      case Precision::bfloat16:
        y[i] = cuda_on_cpu::float_of_bf16(static_cast<uint16_t>(bf16_pair(0.0f, x[i]) >> 16));
        break;
      default:
        y[i] = cuda_on_cpu::float_of_fp16(static_cast<uint16_t>(fp16_pair(0.0f, x[i]) >> 16));
    }
  }
}

// -- shuffles -------------------------------------------------------------------------------------

struct Ints {
  int* out;  // [32]
};

// The upper 12 lanes are elsewhere: sums of the lower 20 in a tree of `down` and back by `xor`.
__global__ void shuffle_kernel(Ints p) {
  const int lane = static_cast<int>(threadIdx.x);
  constexpr unsigned lower = 0xfffff;
  if (lane < 20) {
    int sum = lane;
    for (int by = 16; by; by /= 2) {
      const int source = lane + by;
      const int other = __shfl_sync(lower, sum, source < 20 ? source : lane);
      if (source < 20) sum += other;
    }
    p.out[lane] = __shfl_sync(lower, sum, 0);
  } else {
    const int neighbour = __shfl_xor_sync(~lower, lane, 1);
    p.out[lane] = neighbour;
  }
}
EXPORT const char* launch_of_nothing() {
  return launch({0, 32, 0, nullptr}, shuffle_kernel, Ints{nullptr});
}
EXPORT void shuffle(int* out) { launch({1, 32, 0, nullptr}, shuffle_kernel, Ints{out}); }

__global__ void shuffle_groups_kernel(Ints p) {
  const int lane = static_cast<int>(threadIdx.x);
  p.out[lane] = __shfl_up_sync(all_lanes, lane, 3, 8);
  p.out[32 + lane] = __shfl_down_sync(all_lanes, lane, 3, 8);
  p.out[64 + lane] = __shfl_xor_sync(all_lanes, lane, 8, 8);
  p.out[96 + lane] = __shfl_sync(all_lanes, lane, 11, 8);
}
EXPORT void shuffle_groups(int* out) {
  launch({1, 32, 0, nullptr}, shuffle_groups_kernel, Ints{out});
}

// -- blocks that need each other ------------------------------------------------------------------

// Every block passes its number to the next one of its cluster.
__global__ void cluster_kernel(Ints p) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  arrive_at_cluster();
  wait_for_cluster();
  const int rank = rank_in_cluster();
  if (threadIdx.x == 0) store_in_cluster(shared, (rank + 1) % 4, static_cast<uint32_t>(blockIdx.x));
  arrive_at_cluster();
  wait_for_cluster();
  if (threadIdx.x == 5) p.out[blockIdx.x] = static_cast<int>(*reinterpret_cast<uint32_t*>(shared));
}
EXPORT void pass_on(int* out) { launch({8, 32, 16, nullptr, 4}, cluster_kernel, Ints{out}); }

// Blocks count up, one after another, as a software barrier would.
__global__ void cooperative_kernel(Ints p) {
  if (threadIdx.x != 0) return;
  unsigned* turn = reinterpret_cast<unsigned*>(p.out);
  const unsigned mine = gridDim.x - 1 - blockIdx.x;
  while (load_acquire(turn) != mine) poll();
  atomicAdd(turn, 1u);
}
EXPORT void take_turns(int* out) {
  launch({5, 32, 0, nullptr, 1, true}, cooperative_kernel, Ints{out});
}

// -- what a kernel must not do --------------------------------------------------------------------

__global__ void race_kernel(Ints p) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  int* numbers = reinterpret_cast<int*>(shared);
  const int lane = static_cast<int>(threadIdx.x);
  numbers[lane] = lane;  // and no barrier
  p.out[lane] = numbers[31 - lane];
}
EXPORT void race(int* out) { launch({1, 32, 128, nullptr}, race_kernel, Ints{out}); }

__global__ void early_kernel(Ints p) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  if (threadIdx.x != 0) return;
  copy_async_16(shared, p.out);
  commit_copies();
  p.out[4] = *reinterpret_cast<int*>(shared);  // before it has arrived
  wait_for_copies<0>();
  p.out[5] = *reinterpret_cast<int*>(shared);
}
EXPORT void read_early(int* out) { launch({1, 32, 16, nullptr}, early_kernel, Ints{out}); }

__global__ void order_kernel(Ints p) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  if (threadIdx.x != 0) return;
  int* numbers = reinterpret_cast<int*>(shared);
  copy_async_16(numbers, p.out);
  commit_copies();
  copy_async_16(numbers + 4, p.out + 4);
  commit_copies();
  wait_for_copies<1>();
  p.out[8] = numbers[0];
  p.out[9] = numbers[4];
  wait_for_copies<0>();
  p.out[10] = numbers[4];
}
EXPORT void copy_in_order(int* out) { launch({1, 32, 32, nullptr}, order_kernel, Ints{out}); }

__global__ void divergent_kernel(Ints) {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
EXPORT void divergent(int* out) { launch({1, 64, 0, nullptr}, divergent_kernel, Ints{out}); }

__global__ void deadlock_kernel(Ints) {
  if (threadIdx.x != 9) __syncthreads();
}
EXPORT void deadlock(int* out) { launch({1, 64, 0, nullptr}, deadlock_kernel, Ints{out}); }

__global__ void poll_kernel(Ints p) {
  while (load_acquire(reinterpret_cast<unsigned*>(p.out)) != 12345) poll();
}
EXPORT void poll_for_ever(int* out) { launch({1, 1, 0, nullptr}, poll_kernel, Ints{out}); }

__global__ void misaligned_kernel(Ints p) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  copy_async_16(shared + 4, p.out);
}
EXPORT void misaligned(int* out) { launch({1, 1, 32, nullptr}, misaligned_kernel, Ints{out}); }

__global__ void unfinished_kernel(Ints p) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  copy_async_16(shared, p.out);
  commit_copies();
}
EXPORT void unfinished(int* out) { launch({1, 1, 32, nullptr}, unfinished_kernel, Ints{out}); }

__global__ void foreign_lane_kernel(Ints p) {
  if (threadIdx.x < 8) p.out[0] = __shfl_sync(0xffu, 1, 9);
}
EXPORT void foreign_lane(int* out) { launch({1, 32, 0, nullptr}, foreign_lane_kernel, Ints{out}); }

__global__ void beyond_shared_kernel(Ints p) {
  DIFFCORE_DYNAMIC_SHARED(shared);
  p.out[0] = shared[64];
}
EXPORT void beyond_shared(int* out) {
  launch({1, 1, 64, nullptr}, beyond_shared_kernel, Ints{out});
}

// -- the tile -------------------------------------------------------------------------------------

struct LinearArguments {
  int row_count, k, columns;
  const float *x, *w;
  bool resident;
  void* packed;  // global memory for [columns, k], padded
  float* y;      // [row_count, columns padded to 8]
};

// y = x w^T by one block: packs w, then multiplies.
template <class Math, int rows>
__global__ void linear_kernel(LinearArguments p) {
  using Operand = typename Math::Operand;
  DIFFCORE_DYNAMIC_SHARED(shared);
  const int k = round_up(p.k, Math::k_step), columns = round_up(p.columns, 8);
  const int stride = operand_stride<Operand>(k);
  auto* x = reinterpret_cast<Operand*>(shared);
  auto* weights = x + rows * stride;
  auto* packed = static_cast<Operand*>(p.packed);
  const auto number = [&](const float* from, int count, int row, int column) {
    return row < count && column < p.k ? from[row * p.k + column] : 0.0f;
  };
  const auto pack = [&](const float* from, int count, int all, Operand* to, int to_stride) {
    for (int i = static_cast<int>(threadIdx.x); i < all * k / 2; i += block_threads) {
      const int row = i / (k / 2), column = i % (k / 2) * 2;
      *reinterpret_cast<typename Math::Pair*>(to + row * to_stride + column) =
          Math::pair(number(from, count, row, column), number(from, count, row, column + 1));
    }
  };
  pack(p.x, p.row_count, rows, x, stride);
  pack(p.w, p.columns, columns, packed, k);
  if (p.resident) pack(p.w, p.columns, columns, weights, stride);
  __syncthreads();
  const Weights<Operand> w = {p.resident ? weights : nullptr, packed, k, columns};
  char* memory = reinterpret_cast<char*>(p.resident ? weights + columns * stride : weights);
  linear<Math, rows>(x, stride, p.row_count, w, memory, warp_bytes<Math>(rows, !p.resident),
                     [&](int row, int column, float2 sum) {
                       p.y[row * columns + column] = sum.x;
                       p.y[row * columns + column + 1] = sum.y;
                     });
}

template <class Math, int rows>
void run_linear(const LinearArguments& p) {
  using Operand = typename Math::Operand;
  const int k = round_up(p.k, Math::k_step), columns = round_up(p.columns, 8);
  const int operands = (rows + (p.resident ? columns : 0)) * operand_stride<Operand>(k);
  const size_t bytes = static_cast<size_t>(operands) * sizeof(Operand) +
                       warps * static_cast<size_t>(warp_bytes<Math>(rows, !p.resident));
  launch({1, block_threads, bytes, nullptr}, linear_kernel<Math, rows>, p);
}

EXPORT void linear_layer(int precision, int rows, int row_count, int k, int columns, const float* x,
                         const float* w, int resident, void* packed, float* y) {
  const LinearArguments p = {row_count, k, columns, x, w, resident != 0, packed, y};
  switch (static_cast<Precision>(precision)) {
    case Precision::float32:
      if (rows == 4) return run_linear<Float32Math, 4>(p);
      return rows == 16 ? run_linear<Float32Math, 16>(p) : run_linear<Float32Math, 32>(p);
    case Precision::tf32:
      return rows == 16 ? run_linear<Tf32Math, 16>(p) : run_linear<Tf32Math, 32>(p);
    case Precision::bfloat16:
      return rows == 16 ? run_linear<Bfloat16Math, 16>(p) : run_linear<Bfloat16Math, 32>(p);
    case Precision::float16:
      return rows == 16 ? run_linear<Float16Math, 16>(p) : run_linear<Float16Math, 32>(p);
  }
}
