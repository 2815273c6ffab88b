// Blocks that take a tile of rows through layers together.
//
// Every block of a group of 1, 2, 4 or 8 makes a slice of each layer's columns for all rows. The
// slice's weights stay in its shared memory for the whole launch, if they fit, or else pass by on
// their way from L2. After a layer the blocks hand each other their columns: a block of a cluster
// (compute capability 9.0, and code for it) writes them into the others' shared memory; without
// clusters they go through L2 with a barrier in software, in a cooperative launch. Layers that are
// thin every block makes as a whole.
//
// plan.cuh is the launchers' part of it.
#pragma once

#include "tile.cuh"

namespace diffcore {
namespace cuda {

// How the blocks of a group hand each other their columns.
enum class Exchange : int { none, cluster, grid };

// A layer's weights as they were packed: [columns, k] of operands, both padded with zeros.
struct SlicedWeights {
  void* weight;
  int k;
  int columns;
  int slice;          // columns of a block, from rank * slice on
  int shared_offset;  // of the slice in shared memory, or -1: streamed
};

// packed [columns, k], with zeros where they are padded: weight(column, k), which is at
// from[column * column_stride + k * k_stride]. By so many threads, of which this is `thread`.
template <class Math>
__device__ void pack(const float* from, int columns, int64_t column_stride, int k, int64_t k_stride,
                     const SlicedWeights& to, int thread, int threads) {
  const int pairs = to.k / 2;
  const auto packed = static_cast<typename Math::Pair*>(to.weight);
  for (int p = thread; p < to.columns * pairs; p += threads) {
    const int column = p / pairs, at = p % pairs * 2;
    const float* w = from + column * column_stride + at * k_stride;
    packed[p] = Math::pair(column < columns && at < k ? w[0] : 0.0f,
                           column < columns && at + 1 < k ? w[k_stride] : 0.0f);
  }
}

// The block's columns of a layer: of those that every block makes, all.
template <class Operand>
struct Slice {
  Weights<Operand> weights;
  int first;
};

template <class Operand>
__device__ __forceinline__ Slice<Operand> slice_of(const SlicedWeights& layer, int rank,
                                                   char* shared) {
  const int begin = rank * layer.slice;
  const int first = begin < layer.columns ? begin : layer.columns;
  const int left = layer.columns - first;
  const int columns = left < layer.slice ? left : layer.slice;
  const auto* weight = static_cast<const Operand*>(layer.weight);
  const auto* resident = layer.shared_offset < 0
                             ? nullptr
                             : reinterpret_cast<const Operand*>(shared + layer.shared_offset);
  return {{resident, weight + static_cast<int64_t>(first) * layer.k, layer.k, columns}, first};
}

// Starts copying the block's slice of a layer to where it stays.
template <class Operand>
__device__ __forceinline__ void load_slice(const SlicedWeights& layer, int rank, char* shared) {
  if (layer.shared_offset < 0) return;
  const Slice<Operand> slice = slice_of<Operand>(layer, rank, shared);
  constexpr int unit = 16 / sizeof(Operand);
  const int units = layer.k / unit, stride = operand_stride<Operand>(layer.k);
  auto* to = reinterpret_cast<Operand*>(shared + layer.shared_offset);
  for (int i = static_cast<int>(threadIdx.x); i < slice.weights.columns * units; i += block_threads)
    copy_async_16(to + i / units * stride + i % units * unit,
                  slice.weights.in_global + static_cast<int64_t>(i) * unit);
}

// What a launch's groups have in common.
struct GroupLayout {
  int size;
  Exchange exchange;
  int hidden_stride;
  int hidden_offset;   // in shared memory: buffers of hidden_bytes, of which two are exchanged
  int hidden_bytes;    // [rows, hidden_stride]
  char* exchanged;     // Exchange::grid: of every group two such buffers
  unsigned* counters;  // Exchange::grid: of every group, how many blocks came to its barriers
};

template <class Math, int rows>
class Group {
 public:
  using Operand = typename Math::Operand;
  using Pair = typename Math::Pair;

  __device__ __forceinline__ explicit Group(const GroupLayout& layout, char* shared)
      : layout_(layout), shared_(shared) {
    const int block = static_cast<int>(blockIdx.x);
    index_ = block / layout.size;
    rank_ = block % layout.size;
  }

  __device__ __forceinline__ int index() const { return index_; }
  __device__ __forceinline__ int rank() const { return rank_; }

  // Hidden activations [rows, hidden_stride] in shared memory: 0 and 1 are exchanged by turns, what
  // comes after them belongs to this block alone.
  //
  // Turns make one barrier an exchange enough: whoever writes into the buffer of two exchanges ago
  // has passed the barrier of the last one, where all others came after they had read it.
  __device__ __forceinline__ Operand* hidden(int buffer) const {
    return reinterpret_cast<Operand*>(shared_ + layout_.hidden_offset +
                                      buffer * layout_.hidden_bytes);
  }
  __device__ __forceinline__ Operand* exchanged() const { return hidden(turn_); }

  // Writes two neighbouring columns of a row, to be read by the whole group after `wait`.
  __device__ __forceinline__ void put(int row, int column, Pair pair) const {
    const int at = row * layout_.hidden_stride + column;
    switch (layout_.exchange) {
      case Exchange::none: *reinterpret_cast<Pair*>(exchanged() + at) = pair; break;
      case Exchange::cluster:
        for (int r = 0; r < layout_.size; ++r) store_in_cluster(exchanged() + at, r, pair);
        break;
      case Exchange::grid: *reinterpret_cast<Pair*>(in_global() + at) = pair; break;
    }
  }

  // An exchange ends in two halves, as its barrier does: what a thread writes between them can be
  // read after the block's next barrier.
  __device__ __forceinline__ void arrive() {
    if (layout_.exchange == Exchange::cluster) arrive_at_cluster();
    if (layout_.exchange != Exchange::grid) return;
    __syncthreads();
    arrivals_ += static_cast<unsigned>(layout_.size);
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&layout_.counters[index_], 1u);
    }
  }
  // Then [row_count, columns] lies in `exchanged()` as it was before, and the turn passes on.
  __device__ __forceinline__ void wait(int row_count, int columns) {
    switch (layout_.exchange) {
      case Exchange::none: __syncthreads(); break;
      case Exchange::cluster: wait_for_cluster(); break;
      case Exchange::grid:
        if (threadIdx.x == 0) {
          while (load_acquire(&layout_.counters[index_]) < arrivals_) poll();
          __threadfence();
        }
        __syncthreads();
        fetch(row_count, columns);
        __syncthreads();
        break;
    }
    turn_ ^= 1;
  }

  // Before the first exchange: no block writes to another that hasn't started.
  __device__ __forceinline__ void start() {
    if (layout_.exchange == Exchange::cluster) {
      arrive_at_cluster();
      wait_for_cluster();
    } else {
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ Operand* in_global() const {
    return reinterpret_cast<Operand*>(
        layout_.exchanged + (static_cast<int64_t>(index_) * 2 + turn_) * layout_.hidden_bytes);
  }

  // From global memory, past L1, which may hold what lay there two exchanges ago.
  __device__ __forceinline__ void fetch(int row_count, int columns) const {
    constexpr int unit = 8 / sizeof(Operand);
    const int units = columns / unit;
    for (int i = static_cast<int>(threadIdx.x); i < row_count * units; i += block_threads) {
      const int at = i / units * layout_.hidden_stride + i % units * unit;
      *reinterpret_cast<float2*>(exchanged() + at) =
          __ldcg(reinterpret_cast<const float2*>(in_global() + at));
    }
  }

  const GroupLayout& layout_;
  char* shared_;
  int index_;
  int rank_;
  int turn_ = 0;
  unsigned arrivals_ = 0;
};

}  // namespace cuda
}  // namespace diffcore
