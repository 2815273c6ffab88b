// Threads that run one tile together: each computes a share of every wide layer's columns.
#pragma once

#include <sched.h>

#include "tile.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// How many barriers a thread has reached. CPUs fetch cache lines in pairs: no two counts share one.
struct Arrivals {
  int64_t count;
  char apart[3 * 64 - sizeof(int64_t)];
};

// Columns [first, first + count) of a layer.
struct Columns {
  int first;
  int count;
};

// A thread's place in its team, and its way of waiting for the others.
class Team {
 public:
  Team() = default;  // of one
  // `arrivals`, zeroed, has room for `size` threads that all take part.
  Team(Arrivals* arrivals, int size, int rank) : arrivals_(arrivals), size_(size), rank_(rank) {}

  bool alone() const { return size_ == 1; }
  bool leads() const { return rank_ == 0; }

  // This thread's share of a row of T: whole panels, and whole cache lines, so that no two threads write
  // to one.
  template <class T>
  Columns share(int columns) const {
    if (alone()) return {0, columns};
    constexpr int unit = panel_width > line_of<T> ? panel_width : line_of<T>;
    const int units = static_cast<int>(ceil_div(columns, unit));
    const int first = units * rank_ / size_ * unit, end = units * (rank_ + 1) / size_ * unit;
    return {first, (end < columns ? end : columns) - first};
  }

  // Returns when all have called it as often as this thread: then it may read what the others wrote
  // before they did. A thread's release store of its count orders its writes before it, the others'
  // acquire load of the count their reads behind it. Each count has one writer, and only grows: a
  // thread that is already past this barrier is seen as having reached it.
  void wait() {
    __atomic_store_n(&arrivals_[rank_].count, ++reached_, __ATOMIC_RELEASE);
    for (int other = 0; other < size_; ++other) {
      for (int spins = 0; __atomic_load_n(&arrivals_[other].count, __ATOMIC_ACQUIRE) < reached_;) {
        if (spins++ < patience_) {
          pause();
        } else {
          patience_ /= 2;
          sched_yield();
        }
      }
    }
  }
  // Whether it ever waited for a thread that must have been off its CPU.
  bool kept_waiting() const { return patience_ < patience; }

 private:
  // Spins, some 0.2 ms or more, before the CPU is offered to others, one of whom may be what this thread
  // waits for. Early offers would be taken by processes that have nothing to do with it, for
  // milliseconds. But where the team itself shares a CPU every wait is in vain, so patience wears off.
  static constexpr int patience = 20000;

  // The hint that a loop waits.
  DIFFCORE_INLINE void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Arrivals* arrivals_ = nullptr;
  int size_ = 1;
  int rank_ = 0;
  int64_t reached_ = 0;
  int patience_ = patience;
};

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
