// THE primitive of the chains: a tile of rows through a linear layer, by the eight warps of a
// block.
//
// A warp makes 32 columns of the result at a time, of all the tile's rows, walking along k in
// chunks of 32. Where a layer has fewer than eight times 32 columns, several warps share the
// columns and split k; their sums are added in order. Rows of the input lie in shared memory;
// weights lie there too ("resident"), or every warp streams its own from global memory through
// cp.async, so that warps wait for one another only between layers.
//
// What differs between precisions is a `Math`: FFMA in float32, or mma.sync on tensor cores, behind
// the same three functions. Both read weights as torch has them, [out, in]: mma's B by columns.
#pragma once

#include "kernels.h"
#include "platform.cuh"

namespace diffcore {
namespace cuda {

constexpr int warps = 8;
constexpr int block_threads = 32 * warps;
constexpr int tile_columns = 32;  // of the result, a warp at a time
constexpr int chunk = 32;         // of k

__host__ __device__ constexpr int round_up(int x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
__host__ __device__ constexpr int divide_up(int x, int by) { return (x + by - 1) / by; }

// Elements from one row in shared memory to the next: an odd number of 16-byte units, so that the
// same column of eight successive rows lies in eight different groups of banks.
template <class Operand>
__host__ __device__ constexpr int operand_stride(int k) {
  const int unit = 16 / static_cast<int>(sizeof(Operand));
  const int units = divide_up(k, unit);
  return (units | 1) * unit;
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

// The warp's sum of a number a lane, the same to all lanes.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(all_lanes, x, lanes);
  return x;
}

// Sums of a warp on their way to whoever finishes them, [rows, 32] in shared memory. A stride of 40
// keeps both Maths' stores free of bank conflicts.
constexpr int sums_stride = 40;

// -- float32 on the FFMA units --------------------------------------------------------------------

// A lane has rows r, r + 4, ... and columns c, c + 8, c + 16, c + 24, with r and c as row_of_lane
// and column_of_lane have them. So a step of four in k takes two wavefronts for each of its float4
// loads, four of weights and a fourth of the rows: with less than 32 rows as many clocks as FFMA,
// or more.
struct Float32Math {
  using Operand = float;
  using Pair = float2;
  static constexpr int k_step = 4;
  static constexpr int least_rows = 4;
  static constexpr int stages = 2;

  static __device__ __forceinline__ Pair pair(float a, float b) { return make_float2(a, b); }

  template <int rows>
  struct Sums {
    float at[rows / 4][4];
  };

  // sums += x w^T over `depth` of k, of the first `octets` times 8 columns.
  template <bool all_octets, int rows>
  static __device__ __forceinline__ void multiply(Sums<rows>& sums, const float* x, int x_stride,
                                                  const float* w, int w_stride, int depth,
                                                  int octets) {
    x += row_of_lane(lane_index()) * x_stride;
    w += column_of_lane(lane_index()) * w_stride;
#pragma unroll 2
    for (int k = 0; k < depth; k += 4) {
      float4 a[rows / 4], b[4];
#pragma unroll
      for (int i = 0; i < rows / 4; ++i)
        a[i] = *reinterpret_cast<const float4*>(x + 4 * i * x_stride + k);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (all_octets || j < octets)
          b[j] = *reinterpret_cast<const float4*>(w + 8 * j * w_stride + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!all_octets && j >= octets) continue;
#pragma unroll
        for (int i = 0; i < rows / 4; ++i) {
          float& s = sums.at[i][j];
          s = fmaf(a[i].x, b[j].x, s);
          s = fmaf(a[i].y, b[j].y, s);
          s = fmaf(a[i].z, b[j].z, s);
          s = fmaf(a[i].w, b[j].w, s);
        }
      }
    }
  }

  template <int rows>
  static __device__ __forceinline__ void store(const Sums<rows>& sums, float* out) {
    out += row_of_lane(lane_index()) * sums_stride + column_of_lane(lane_index());
#pragma unroll
    for (int i = 0; i < rows / 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[4 * i * sums_stride + 8 * j] = sums.at[i][j];
  }
};

// -- tensor cores ---------------------------------------------------------------------------------

// Fragments of mma.sync (PTX ISA, "Matrix Fragments for mma.m16n8k16", "... mma.m16n8k8"), for lane
// 4 g + t. Of a 16-bit type, a register is two neighbours in k:
//   A: a0 row g, k 2t;  a1 row g + 8, k 2t;  a2 row g, k 2t + 8;  a3 row g + 8, k 2t + 8
//   B: b0 column g, k 2t;  b1 column g, k 2t + 8
// of tf32 one number, with k t and t + 4 instead of 2t and 2t + 8:
//   A: a0 row g, k t;  a1 row g + 8, k t;  a2 row g, k t + 4;  a3 row g + 8, k t + 4
//   B: b0 column g, k t;  b1 column g, k t + 4
// so with k counted in 32-bit words both are the same loads. Of every type
//   D: d0, d1 row g, columns 2t, 2t + 1;  d2, d3 row g + 8, the same columns.
template <class Self, class Operand_>
struct TensorMath {
  using Operand = Operand_;
  static constexpr int k_step = 32 / sizeof(Operand);
  static constexpr int least_rows = 16;

  template <int rows>
  struct Sums {
    float at[rows / 16][4][4];
  };

  static __device__ __forceinline__ uint32_t word(const Operand* p, int words) {
    return reinterpret_cast<const uint32_t*>(p)[words];
  }

  template <bool all_octets, int rows>
  static __device__ __forceinline__ void multiply(Sums<rows>& sums, const Operand* x, int x_stride,
                                                  const Operand* w, int w_stride, int depth,
                                                  int octets) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    x += g * x_stride;
    w += g * w_stride;
#pragma unroll 2
    for (int k = 0; k < depth; k += k_step) {
      uint32_t b[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!all_octets && j >= octets) continue;
        b[j][0] = word(w + 8 * j * w_stride + k, t);
        b[j][1] = word(w + 8 * j * w_stride + k, t + 4);
      }
#pragma unroll
      for (int i = 0; i < rows / 16; ++i) {
        const Operand* upper = x + 16 * i * x_stride + k;
        const Operand* lower = upper + 8 * x_stride;
        const uint32_t a[4] = {word(upper, t), word(lower, t), word(upper, t + 4),
                               word(lower, t + 4)};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (all_octets || j < octets) Self::mma(sums.at[i][j], a, b[j]);
      }
    }
  }

  template <int rows>
  static __device__ __forceinline__ void store(const Sums<rows>& sums, float* out) {
    out += lane_index() / 4 * sums_stride + 2 * (lane_index() % 4);
#pragma unroll
    for (int i = 0; i < rows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float (&d)[4] = sums.at[i][j];
        float* upper = out + 16 * i * sums_stride + 8 * j;
        *reinterpret_cast<float2*>(upper) = make_float2(d[0], d[1]);
        *reinterpret_cast<float2*>(upper + 8 * sums_stride) = make_float2(d[2], d[3]);
      }
    }
  }
};

struct Tf32Math : TensorMath<Tf32Math, float> {
  using Pair = float2;
  static constexpr int stages = 2;
  static __device__ __forceinline__ Pair pair(float a, float b) {
    return make_float2(__uint_as_float(tf32_bits(a)), __uint_as_float(tf32_bits(b)));
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};

struct Bfloat16Math : TensorMath<Bfloat16Math, uint16_t> {
  using Pair = uint32_t;
  static constexpr int stages = 4;
  static __device__ __forceinline__ Pair pair(float a, float b) { return bf16_pair(a, b); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};

struct Float16Math : TensorMath<Float16Math, uint16_t> {
  using Pair = uint32_t;
  static constexpr int stages = 4;
  static __device__ __forceinline__ Pair pair(float a, float b) { return fp16_pair(a, b); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_fp16(d, a, b);
  }
};

// -- a layer --------------------------------------------------------------------------------------

// Columns of a weight matrix that was packed for `Math`: in [columns, k], k padded with zeros to
// whole k_steps and columns to whole octets.
template <class Operand>
struct Weights {
  const Operand* in_shared;  // rows operand_stride(k) apart, or null: streamed
  const Operand* in_global;  // rows k apart
  int k;
  int columns;
};

// What one warp needs: the chunks on their way, or its sums when they have been used.
template <class Math>
__host__ __device__ constexpr int stage_elements() {
  return tile_columns * operand_stride<typename Math::Operand>(chunk);
}
template <class Math>
__host__ __device__ constexpr int warp_bytes(int rows, bool streams) {
  const int stages =
      Math::stages * stage_elements<Math>() * static_cast<int>(sizeof(typename Math::Operand));
  const int sums = rows * sums_stride * static_cast<int>(sizeof(float));
  return streams && stages > sums ? stages : sums;
}

// Starts copying columns [column, column + columns) of a chunk at k into a stage.
template <class Math>
__device__ __forceinline__ void start_chunk(const Weights<typename Math::Operand>& w, int column,
                                            int columns, int k, typename Math::Operand* stage) {
  using Operand = typename Math::Operand;
  constexpr int unit = 16 / sizeof(Operand), units = chunk / unit;
  const int part = lane_index() % units * unit;
  if (part >= w.k - k) return;
  for (int c = lane_index() / units; c < columns; c += 32 / units)
    copy_async_16(stage + c * operand_stride<Operand>(chunk) + part,
                  w.in_global + static_cast<int64_t>(column + c) * w.k + k + part);
}

// sums += x w^T for a warp's 32 columns from `column` on and chunks [first, last) of k.
template <class Math, int rows>
__device__ __forceinline__ void multiply_columns(typename Math::template Sums<rows>& sums,
                                                 const typename Math::Operand* x, int x_stride,
                                                 const Weights<typename Math::Operand>& w,
                                                 int column, int first, int last,
                                                 typename Math::Operand* stages) {
  using Operand = typename Math::Operand;
  const int left = w.columns - column;
  const int columns = left < tile_columns ? left : tile_columns;
  const bool streams = w.in_shared == nullptr;
  const int w_stride = operand_stride<Operand>(streams ? chunk : w.k);
  if (streams) {
#pragma unroll
    for (int s = 0; s < Math::stages - 1; ++s) {
      if (first + s < last)
        start_chunk<Math>(w, column, columns, (first + s) * chunk,
                          stages + s * stage_elements<Math>());
      commit_copies();
    }
  }
  int stage = 0;
  for (int c = first; c < last; ++c) {
    const int k = c * chunk;
    const Operand* here;
    if (streams) {
      // The chunk has arrived for every lane, and no lane reads the stage that is filled next.
      wait_for_copies<Math::stages - 2>();
      __syncwarp();
      const int ahead = c + Math::stages - 1;
      const int free = stage == 0 ? Math::stages - 1 : stage - 1;
      if (ahead < last)
        start_chunk<Math>(w, column, columns, ahead * chunk,
                          stages + free * stage_elements<Math>());
      commit_copies();
      here = stages + stage * stage_elements<Math>();
      stage = stage == Math::stages - 1 ? 0 : stage + 1;
    } else {
      here = w.in_shared + column * w_stride + k;
    }
    const int depth = w.k - k < chunk ? w.k - k : chunk;
    if (columns == tile_columns) {
      Math::template multiply<true>(sums, x + k, x_stride, here, w_stride, depth, 4);
    } else {
      Math::template multiply<false>(sums, x + k, x_stride, here, w_stride, depth, columns / 8);
    }
  }
  if (streams) wait_for_copies<0>();
}

// finish(row, column, {y[row, column], y[row, column + 1]}) for every row below `row_count` and
// every pair of columns, by some thread, with y = x w^T.
//
// All threads of the block call it together. x [rows, w.k] lies in shared memory, written before a
// barrier, and what `finish` writes can be read after the next one; so can `memory`, which has
// warp_bytes for every warp, be used again.
template <class Math, int rows, class Finish>
__device__ __forceinline__ void linear(const typename Math::Operand* x, int x_stride, int row_count,
                                       const Weights<typename Math::Operand>& w, char* memory,
                                       int bytes_a_warp, const Finish& finish) {
  const int chunks = divide_up(w.k, chunk), tiles = divide_up(w.columns, tile_columns);
  if (tiles == 0) return;
  int splits = 1;
  while (2 * splits * tiles <= warps && 2 * splits <= chunks) splits *= 2;

  // Either every warp finishes its own columns, 32 at a time, or the whole block finishes together
  // what its warps have summed up in parts.
  const bool alone = splits == 1;
  constexpr int pairs = tile_columns / 2;
  const int warp = warp_index();
  char* own = memory + warp * bytes_a_warp;
  // Whoever finishes keeps to one pair of columns and goes down the rows.
  const int first = alone ? lane_index() : static_cast<int>(threadIdx.x);
  const int pairs_a_row = alone ? pairs : tiles * pairs;
  const int rows_at_once = (alone ? 32 : block_threads) / pairs_a_row;
  const int column = first % pairs_a_row * 2;
  const int first_row = first / pairs_a_row;
  for (int base = alone ? warp : 0; base < tiles; base += alone ? warps : tiles) {
    const int tile = alone ? base : warp % tiles, split = alone ? 0 : warp / tiles;
    if (split < splits) {
      typename Math::template Sums<rows> sums = {};
      multiply_columns<Math, rows>(sums, x, x_stride, w, tile * tile_columns,
                                   chunks * split / splits, chunks * (split + 1) / splits,
                                   reinterpret_cast<typename Math::Operand*>(own));
      __syncwarp();  // the chunks have been read, where the sums go now
      Math::template store<rows>(sums, reinterpret_cast<float*>(own));
    }
    if (alone) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    if (first_row < rows_at_once && base * tile_columns + column < w.columns) {
      const char* from = (alone ? own : memory + column / tile_columns * bytes_a_warp) +
                         column % tile_columns * sizeof(float);
      for (int row = first_row; row < row_count; row += rows_at_once) {
        const char* part = from + row * sums_stride * static_cast<int>(sizeof(float));
        float2 sum = *reinterpret_cast<const float2*>(part);
        for (int s = 1; s < splits; ++s) {
          part += tiles * bytes_a_warp;
          const float2 more = *reinterpret_cast<const float2*>(part);
          sum.x += more.x;
          sum.y += more.y;
        }
        finish(row, base * tile_columns + column, sum);
      }
    }
    if (alone) __syncwarp();
  }
}

}  // namespace cuda
}  // namespace diffcore
