// Random Fourier features, scale * f(x omega^T + bias) with f = sin, cos or both, and their
// gradients.
//
// One large product with sines after it: a block makes a 64 x 64 tile of the arguments and turns
// them into features in registers. Always in float32: an argument is a phase, whose absolute error
// is the feature's, and at 100 radians tf32 would be off by 0.05.
//
// Backward, the gradient at the arguments, d = grad_y * slope, is computed where it is loaded, and
// is an operand of two products: grad_x = d omega and grad_omega = d^T x, whose sums along the rows
// of d are grad_bias. Blocks of one launch share them out. Batches of more than 1024 rows are
// summed in pieces, which a second launch adds in order: the same bits at every call.
//
// Budget: 256 threads, up to 128 registers (two blocks a multiprocessor), no spills; 17,408 bytes
// of dynamic shared memory. The launch that adds pieces: up to 40 registers, no shared memory.
//
// Roofline, on an H100 at 1.7 GHz (132 multiprocessors of 128 FFMA a clock, 3.35 TB/s), batch 256,
// 256 -> 1024. Forward, 134 MFLOP: 64 tiles of 64 * 64 * 256 multiply-adds, one a multiprocessor,
// 8,200 clocks; shared memory is read in as many wavefronts, one a clock, and written in 1,000: 5.4
// us. A sine and cosine are some 40 instructions, 1,300 clocks a tile; memory, 2.3 MB, 0.7 us. So
// shared memory limits it, on half the device. Backward, 268 MFLOP and 4.7 MB: 64 tiles of
// grad_omega like those, and 16 of grad_x that sum over 1024, 36,900 clocks or 22 us. No GPU has
// measured it yet.
#include "gemm.cuh"
#include "kernels.h"
#include "sincos.cuh"

namespace diffcore {
namespace cuda {

namespace {

// What has an element at(row, column), as an operand whose index is the row and whose k the column.
template <class Source>
struct ByRow : Source {
  static constexpr bool k_contiguous = true;
  __device__ float operator()(int64_t index, int64_t k) const { return this->at(index, k); }
};

// The same with index and k the other way round.
template <class Source>
struct ByColumn : Source {
  static constexpr bool k_contiguous = false;
  __device__ float operator()(int64_t index, int64_t k) const { return this->at(k, index); }
};

// Of [rows, columns] in memory; 0 outside.
struct Matrix {
  const float* values;
  int64_t rows;
  int64_t columns;
  __device__ float at(int64_t row, int64_t column) const {
    return row < rows && column < columns ? values[row * columns + column] : 0.0f;
  }
};

// The gradient at the arguments [batch, features]: grad_y times the slope; for the pair of cosine
// and sine, which are each other's slopes, g_sin y_cos - g_cos y_sin.
template <bool pair>
struct ArgumentGradient {
  const float* grad_y;
  const float* saved;
  int64_t batch;
  int64_t features;
  __device__ float at(int64_t row, int64_t feature) const {
    if (row >= batch || feature >= features) return 0.0f;
    if (!pair) return grad_y[row * features + feature] * saved[row * features + feature];
    const int64_t cosine = 2 * row * features + feature, sine = cosine + features;
    return grad_y[sine] * saved[cosine] - grad_y[cosine] * saved[sine];
  }
};

__global__ void __launch_bounds__(gemm::threads, 2) rff_forward(RffCall call) {
  DIFFCORE_DYNAMIC_SHARED(memory);
  const auto shared = reinterpret_cast<gemm::Shared*>(memory);
  const int64_t in = call.omega.in, features = call.omega.out;
  const int64_t tiles = gemm::tiles_of(features);
  const int64_t row_tile = blockIdx.x / tiles * gemm::tile;
  const int64_t column_tile = blockIdx.x % tiles * gemm::tile;
  float sums[gemm::square][gemm::square], unused[gemm::square];
  const ByRow<Matrix> x = {{call.x, call.batch, in}}, omega = {{call.omega.weight, features, in}};
  gemm::multiply(x, row_tile, omega, column_tile, 0, in, shared, sums, unused);

  const bool pair = call.kind == RffKind::cos_sin;
  const int64_t width = pair ? 2 * features : features;
  const int64_t column = column_tile + gemm::square * gemm::thread_column();
  const int64_t left = features - column;
#pragma unroll
  for (int i = 0; i < gemm::square; ++i) {
    const int64_t row = row_tile + gemm::square * gemm::thread_row() + i;
    if (row >= call.batch) break;
    float sine[gemm::square], cosine[gemm::square];
#pragma unroll
    for (int j = 0; j < gemm::square; ++j) {
      const float phase = call.omega.bias && j < left ? call.omega.bias[column + j] : 0.0f;
      sine_cosine(sums[i][j] + phase, &sine[j], &cosine[j]);
      sine[j] *= call.scale;
      cosine[j] *= call.scale;
    }
    float* y = call.y + row * width + column;
    float* slope = call.slope ? call.slope + row * features + column : nullptr;
    if (pair) {
      gemm::store(y, cosine, left);
      gemm::store(y + features, sine, left);
    } else if (call.kind == RffKind::sin) {
      gemm::store(y, sine, left);
      if (slope) gemm::store(slope, cosine, left);
    } else {
      gemm::store(y, cosine, left);
#pragma unroll
      for (int j = 0; j < gemm::square; ++j) sine[j] = -sine[j];
      if (slope) gemm::store(slope, sine, left);
    }
  }
}

// Rows of the batch that a block sums parameter gradients over. By the batch alone, whatever the
// device: so are the bits.
constexpr int64_t rows_of_piece = 1024;

int64_t pieces_of(int64_t batch) { return (batch + rows_of_piece - 1) / rows_of_piece; }

// What the blocks of a launch are for: first tiles of grad_x, then tiles of every piece's
// grad_omega.
struct BackwardPlan {
  RffBackwardCall call;
  int64_t x_blocks;
  int64_t omega_blocks;  // of one piece
  int64_t column_tiles;  // of grad_omega; one at least, which sums up grad_bias
  float* grad_omega;     // [pieces, features, in]
  float* grad_bias;      // [pieces, features], or null
};

template <bool pair>
__device__ __forceinline__ void grad_x_tile(const BackwardPlan& plan, gemm::Shared* shared) {
  const RffBackwardCall& call = plan.call;
  const int64_t in = call.omega.in, features = call.omega.out;
  const int64_t tiles = gemm::tiles_of(in);
  const int64_t row_tile = blockIdx.x / tiles * gemm::tile;
  const int64_t column_tile = blockIdx.x % tiles * gemm::tile;
  const ByRow<ArgumentGradient<pair>> d = {{call.grad_y, call.saved, call.batch, features}};
  const ByColumn<Matrix> omega = {{call.omega.weight, features, in}};
  float sums[gemm::square][gemm::square], unused[gemm::square];
  gemm::multiply(d, row_tile, omega, column_tile, 0, features, shared, sums, unused);
  const int64_t column = column_tile + gemm::square * gemm::thread_column();
#pragma unroll
  for (int i = 0; i < gemm::square; ++i) {
    const int64_t row = row_tile + gemm::square * gemm::thread_row() + i;
    if (row < call.batch) gemm::store(call.grad_x + row * in + column, sums[i], in - column);
  }
}

template <bool pair>
__device__ __forceinline__ void grad_omega_tile(const BackwardPlan& plan, gemm::Shared* shared) {
  const RffBackwardCall& call = plan.call;
  const int64_t in = call.omega.in, features = call.omega.out;
  const int64_t block = blockIdx.x - plan.x_blocks;
  const int64_t piece = block / plan.omega_blocks, rest = block % plan.omega_blocks;
  const int64_t tiles = plan.column_tiles;
  const int64_t feature_tile = rest / tiles * gemm::tile;
  const int64_t column_tile = rest % tiles * gemm::tile;
  const int64_t first = piece * rows_of_piece;
  const int64_t last = first + rows_of_piece < call.batch ? first + rows_of_piece : call.batch;
  const ByColumn<ArgumentGradient<pair>> d = {{call.grad_y, call.saved, call.batch, features}};
  const ByColumn<Matrix> x = {{call.x, call.batch, in}};
  float sums[gemm::square][gemm::square], row_sums[gemm::square];
  gemm::multiply(d, feature_tile, x, column_tile, first, last, shared, sums, row_sums);
  const int64_t column = column_tile + gemm::square * gemm::thread_column();
#pragma unroll
  for (int i = 0; i < gemm::square; ++i) {
    const int64_t feature = feature_tile + gemm::square * gemm::thread_row() + i;
    if (feature >= features) break;
    gemm::store(plan.grad_omega + (piece * features + feature) * in + column, sums[i], in - column);
    if (plan.grad_bias && column == 0) plan.grad_bias[piece * features + feature] = row_sums[i];
  }
}

template <bool pair>
__global__ void __launch_bounds__(gemm::threads, 2) rff_backward(BackwardPlan plan) {
  DIFFCORE_DYNAMIC_SHARED(memory);
  const auto shared = reinterpret_cast<gemm::Shared*>(memory);
  if (static_cast<int64_t>(blockIdx.x) < plan.x_blocks) {
    grad_x_tile<pair>(plan, shared);
  } else {
    grad_omega_tile<pair>(plan, shared);
  }
}

// Arrays [count, size] to be added up.
struct Pieces {
  const float* pieces;
  int64_t count;
  int64_t size;
  float* total;  // [size]
};

// total[i] = sum of pieces[p][i], in order.
__global__ void __launch_bounds__(256) rff_add_pieces(Pieces of) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= of.size) return;
  float sum = 0.0f;
  for (int64_t p = 0; p < of.count; ++p) sum += of.pieces[p * of.size + i];
  of.total[i] = sum;
}

const char* add_pieces(const Pieces& of, void* stream) {
  if (of.size == 0) return nullptr;
  const int64_t blocks = (of.size + 255) / 256;
  return launch({static_cast<unsigned>(blocks), 256, 0, stream}, rff_add_pieces, of);
}

Launch launch_of(int64_t blocks, void* stream) {
  return {static_cast<unsigned>(blocks), gemm::threads, sizeof(gemm::Shared), stream};
}

}  // namespace

const char* rff_features(const RffCall& call) {
  const int64_t blocks = gemm::tiles_of(call.batch) * gemm::tiles_of(call.omega.out);
  if (blocks == 0) return nullptr;
  return launch(launch_of(blocks, call.stream), rff_forward, call);
}

int64_t rff_features_backward_workspace(const RffBackwardCall& call) {
  const int64_t pieces = pieces_of(call.batch), features = call.omega.out;
  return pieces > 1 ? pieces * features * (call.omega.in + 1) * 4 : 0;
}

const char* rff_features_backward(const RffBackwardCall& call) {
  const int64_t in = call.omega.in, features = call.omega.out;
  const int64_t pieces = pieces_of(call.batch);
  BackwardPlan plan{};
  plan.call = call;
  plan.grad_omega = call.grad_omega;
  plan.grad_bias = call.grad_bias;
  if (pieces > 1) {
    plan.grad_omega = static_cast<float*>(call.workspace);
    plan.grad_bias = call.grad_bias ? plan.grad_omega + pieces * features * in : nullptr;
  }
  if (call.grad_x) plan.x_blocks = gemm::tiles_of(call.batch) * gemm::tiles_of(in);
  const bool parameters = call.grad_omega || call.grad_bias;
  plan.column_tiles = in > 0 ? gemm::tiles_of(in) : 1;
  if (parameters) plan.omega_blocks = gemm::tiles_of(features) * plan.column_tiles;
  const int64_t blocks = plan.x_blocks + pieces * plan.omega_blocks;
  if (blocks == 0) return nullptr;
  const Launch how = launch_of(blocks, call.stream);
  const bool pair = call.kind == RffKind::cos_sin;
  if (const char* error = launch(how, pair ? rff_backward<true> : rff_backward<false>, plan))
    return error;
  if (pieces == 1 || !parameters) return nullptr;
  const Pieces of_omega = {plan.grad_omega, pieces, features * in, call.grad_omega};
  if (const char* error = add_pieces(of_omega, call.stream)) return error;
  if (!call.grad_bias) return nullptr;
  return add_pieces({plan.grad_bias, pieces, features, call.grad_bias}, call.stream);
}

}  // namespace cuda
}  // namespace diffcore
