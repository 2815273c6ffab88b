// How a kernel's threads come together: a parallel region in which each has memory of its own, and the
// tiles of a batch that they share out.
#pragma once

#include "layers.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// Bytes that take(memory) cuts off.
template <class Take>
DIFFCORE_INLINE int64_t bytes_of(Take take) {
  Carver sizes{nullptr};
  take(&sizes);
  return sizes.used;
}

DIFFCORE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The tile memory of a region's threads. Each asks for its own, whose pages then lie near it; but no
// exception may leave a region, so what is missing is thrown behind it.
class ThreadMemory {
 public:
  explicit ThreadMemory(int64_t bytes) : bytes_(bytes) {}

  Carver ask() {
    char* const memory = thread_scratch_or_null(Scratch::tile, bytes_);
    if (!memory) __atomic_store_n(&complete_, false, __ATOMIC_RELAXED);
    return {memory};
  }
  // Large memory lies with its thread until that thread gives it back, which other calls may never reach.
  void give_back() const {
    if (bytes_ > large_scratch) release_scratch(Scratch::tile);
  }
  // Whether all have theirs. To be asked behind a barrier, to which each has come by way of ask(): then
  // all see the same.
  bool complete() const { return __atomic_load_n(&complete_, __ATOMIC_RELAXED); }
  void throw_unless_complete() const {
    if (!complete_) throw_out_of_memory();
  }

 private:
  const int64_t bytes_;
  bool complete_ = true;
};

// Runs body(memory) on `threads` threads, with `bytes` for each; or, where memory runs out, on none of
// them, and throws std::bad_alloc.
template <class Body>
static void run_threads(int threads, int64_t bytes, Body body) {
  ThreadMemory memory(bytes);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Carver own = memory.ask();
    if (threads > 1) {
#pragma omp barrier
    }
    if (memory.complete()) body(own);
    memory.give_back();
  }
  memory.throw_unless_complete();
}

// A batch cut into tiles, and how many of the threads find one.
struct Tiles {
  int64_t batch;
  int64_t count;
  int threads;
  int most_rows;

  Tiles(int64_t rows, int most_threads)
      : batch(rows),
        count(tile_count(rows, most_threads)),
        threads(count < most_threads ? static_cast<int>(count) : most_threads),
        most_rows(tile_span(rows, count, 0).rows) {}
  Span operator[](int64_t tile) const { return tile_span(batch, count, tile); }
};

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
