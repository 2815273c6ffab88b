// THE other primitive: a 64 x 64 tile of a matrix product, for ops that are one large product and
// not a chain of layers. Sums are float32 throughout.
//
// A block of 256 threads walks along k in steps of 16. The next step's operands are on their way
// from memory, in registers, while a thread multiplies this one's, from shared memory, into a 4 x 4
// square of the result. What an operand is, a matrix or something computed from several, is the
// caller's.
#pragma once

#include "platform.cuh"

namespace diffcore {
namespace cuda {
namespace gemm {

constexpr int tile = 64;   // of rows and of columns
constexpr int depth = 16;  // of k in a step
constexpr int threads = 256;
constexpr int square = 4;                      // a thread's rows and columns
constexpr int loads = tile * depth / threads;  // of an operand, by a thread, in a step
constexpr int stride = tile + 4;               // from one k to the next, on 16 bytes

// Two steps of both operands, k by k: index `i` at `place(i, k)`.
struct Shared {
  float a[2][depth][stride];
  float b[2][depth][stride];
};
static_assert(sizeof(Shared) == 17408, "the budget of rff_features.cu");

// The squares of a warp's threads, 4 by 8 of them: what they read of a step takes two wavefronts an
// operand, four for 16 FFMA a thread. A multiprocessor has both at the same rate.
__device__ __forceinline__ int thread_row() {
  const int t = static_cast<int>(threadIdx.x);
  return t / 64 * 4 + row_of_lane(t % 32);
}
__device__ __forceinline__ int thread_column() {
  const int t = static_cast<int>(threadIdx.x);
  return t / 32 % 2 * 8 + column_of_lane(t % 32);
}

// A thread's i-th element of an operand's step: along k first where that is how memory lies.
template <bool k_contiguous>
__host__ __device__ constexpr int element_k(int thread, int i) {
  return k_contiguous ? thread % depth : thread / tile + i * (threads / tile);
}
template <bool k_contiguous>
__host__ __device__ constexpr int element_index(int thread, int i) {
  return k_contiguous ? thread / depth + i * (threads / depth) : thread % tile;
}

// Squares are read as they lie, 16 bytes; from the middle of a step on their halves are exchanged.
// Or the eighth k would begin in the banks of the first, and a warp that writes all of two indices
// would meet itself in each.
__host__ __device__ constexpr int place(int index, int k) {
  return k < depth / 2 ? index : index ^ square / 2;
}

template <bool k_contiguous>
constexpr bool writes_take_one_wavefront() {
  for (int first = 0; first < threads; first += 32) {
    for (int i = 0; i < loads; ++i) {
      unsigned banks = 0;
      for (int thread = first; thread < first + 32; ++thread) {
        const int k = element_k<k_contiguous>(thread, i);
        banks |= 1u << (k * stride + place(element_index<k_contiguous>(thread, i), k)) % 32;
      }
      if (banks != all_lanes) return false;
    }
  }
  return true;
}
static_assert(writes_take_one_wavefront<true>() && writes_take_one_wavefront<false>());

template <class Operand>
__device__ __forceinline__ void fetch(const Operand& operand, int64_t first, int64_t k,
                                      float (&values)[loads]) {
  constexpr bool along_k = Operand::k_contiguous;
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < loads; ++i)
    values[i] = operand(first + element_index<along_k>(t, i), k + element_k<along_k>(t, i));
}

template <class Operand>
__device__ __forceinline__ void put(const float (&values)[loads], float (*step)[stride]) {
  constexpr bool along_k = Operand::k_contiguous;
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < loads; ++i) {
    const int k = element_k<along_k>(t, i);
    step[k][place(element_index<along_k>(t, i), k)] = values[i];
  }
}

// Four indices from the first of a square on. `k` is known to the compiler.
__device__ __forceinline__ void read_square(const float (&at_k)[stride], int first, int k,
                                            float (&values)[square]) {
  const float4 v = *reinterpret_cast<const float4*>(at_k + first);
  values[place(0, k)] = v.x;
  values[place(1, k)] = v.y;
  values[place(2, k)] = v.z;
  values[place(3, k)] = v.w;
}

// sums[i][j] = sum over k in [k_first, k_last) of a(row + i, k) b(column + j, k), for the thread's
// square at (row, column) of the tile; row_sums[i] = sum over k of a(row + i, k).
//
// An operand is a function of (index, k) that is 0 outside of the matrix; `k_contiguous` says which
// way memory lies. Sums of one step each are added to the total: rounding grows with the number of
// steps, not of products. Their order depends on k alone.
template <class A, class B>
__device__ __forceinline__ void multiply(const A& a, int64_t a_first, const B& b, int64_t b_first,
                                         int64_t k_first, int64_t k_last, Shared* shared,
                                         float (&sums)[square][square], float (&row_sums)[square]) {
  float a_next[loads], b_next[loads];
#pragma unroll
  for (int i = 0; i < square; ++i) {
    row_sums[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < square; ++j) sums[i][j] = 0.0f;
  }
  fetch(a, a_first, k_first, a_next);
  fetch(b, b_first, k_first, b_next);
  int current = 0;
  for (int64_t k = k_first; k < k_last; k += depth, current ^= 1) {
    put<A>(a_next, shared->a[current]);
    put<B>(b_next, shared->b[current]);
    // One barrier a step is enough: who writes this half again has passed the next step's barrier,
    // which all reach after they have read it.
    __syncthreads();
    if (k + depth < k_last) {
      fetch(a, a_first, k + depth, a_next);
      fetch(b, b_first, k + depth, b_next);
    }
    float step[square][square] = {}, step_rows[square] = {};
#pragma unroll
    for (int d = 0; d < depth; ++d) {
      float x[square], w[square];
      read_square(shared->a[current][d], square * thread_row(), d, x);
      read_square(shared->b[current][d], square * thread_column(), d, w);
#pragma unroll
      for (int i = 0; i < square; ++i) {
        step_rows[i] += x[i];
#pragma unroll
        for (int j = 0; j < square; ++j) step[i][j] = fmaf(x[i], w[j], step[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < square; ++i) {
      row_sums[i] += step_rows[i];
#pragma unroll
      for (int j = 0; j < square; ++j) sums[i][j] += step[i][j];
    }
  }
}

// The first `left` of a thread's four columns of a row.
__device__ __forceinline__ void store(float* p, const float (&values)[square], int64_t left) {
  if (left >= square && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    *reinterpret_cast<float4*>(p) = float4{values[0], values[1], values[2], values[3]};
    return;
  }
#pragma unroll
  for (int j = 0; j < square; ++j)
    if (j < left) p[j] = values[j];
}

__host__ __device__ constexpr int64_t tiles_of(int64_t size) { return (size + tile - 1) / tile; }

}  // namespace gemm
}  // namespace cuda
}  // namespace diffcore
