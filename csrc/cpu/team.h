// Threads that run one tile together: each computes a share of every wide layer's columns. And threads
// that pack weights together: each fills a share of the panels.
#pragma once

#include <omp.h>
#include <sched.h>

#include "parallel.h"

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
  Packer packer() const { return {rank_, size_}; }
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
    if (alone()) return;
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
  // Asks for rows of which the others wrote their columns before a wait: those lie in their caches, and
  // come together when they are asked for at once.
  template <class T>
  void fetch(Rows<T> r, int rows, int columns) const {
    if (!alone()) prefetch_block<For::reading>(r, 0, rows, 0, columns);
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

// out = f(x W^T + b), and where `slope` has memory slope = f'(...): this thread's columns of them.
template <class Operand>
DIFFCORE_INLINE void share_of_layer(const Team& team, Rows<typename Operand::Input> x, int rows,
                                    const PackedLinear& layer, ActivateFunction<Operand> function,
                                    Rows<typename Operand::Input> out, Rows<float> slope) {
  const Columns mine = team.share<typename Operand::Input>(layer.out);
  const PackedLinear share = layer_columns<Operand>(layer, mine.first, mine.count);
  linear_activate<Operand, Operand>(x, rows, share, bias_only(share), function,
                                    columns_from(out, mine.first), columns_from(slope, mine.first),
                                    team.alone() ? Reach::near : Reach::far);
}

// How many of a call's threads run a tile whose wide layers are those `count`: as many as have each
// their share's worth of a layer's weights to read.
template <class Operand>
static int team_size(const TeamOptions& team, const PackedLinear* layers, int count) {
  int64_t bytes = 0;
  for (int l = 0; l < count; ++l) bytes += panel_bytes<Operand>(layers[l].in, layers[l].out);
  int threads = team.threads;
  while (threads > 1 && bytes <= count * threads * team.share) --threads;
  return threads;
}

// Runs body(team, shared, own) by a team of up to `threads` threads, each with a carver of the same
// `shared_bytes` and one of `own_bytes` of its own; where memory runs out, as run_threads does. `work` is
// then as much at least as how they worked together.
template <class Body>
static void run_team(int threads, int64_t shared_bytes, int64_t own_bytes, TeamWork* work,
                     Body body) {
  const auto arrivals_bytes = static_cast<int64_t>(sizeof(Arrivals)) * threads;
  Carver shared{thread_scratch(Scratch::call, arrivals_bytes + shared_bytes)};
  auto* const arrivals = shared.take<Arrivals>(arrivals_bytes);
  memset(arrivals, 0, static_cast<size_t>(arrivals_bytes));
  ThreadMemory memory(own_bytes);
  bool late = false;
#pragma omp parallel num_threads(threads)
  {
    // OpenMP may grant fewer threads than it was asked for.
    Team team(arrivals, omp_get_num_threads(), omp_get_thread_num());
    const Carver own = memory.ask();
    team.wait();
    if (memory.complete()) body(&team, shared, own);
    memory.give_back();
    if (team.kept_waiting()) {
#pragma omp atomic write
      late = true;
    }
  }
  memory.throw_unless_complete();
  const TeamWork how = late ? TeamWork::late : TeamWork::in_time;
  if (*work < how) *work = how;
}

constexpr int64_t packed_by_a_thread = 64 * 1024;  // bytes that two pack sooner than one, each

// Fills a block of `bytes` with a pack, by up to `threads` threads: carve(memory, pack, team, own) is
// called by all of them, lays out the same pieces for each, and fills those that are its own, with the help
// of `own_bytes` of memory.
template <class Pack, class Carve>
static TeamWork pack_by_team(int threads, int64_t bytes, int64_t own_bytes, void* block, Pack* pack,
                             Carve carve) {
  TeamWork work = TeamWork::none;
  const int64_t most = bytes / packed_by_a_thread;
  if (most < threads) threads = static_cast<int>(most);
  const Carver whole{static_cast<char*>(block)};
  if (threads <= 1) {
    Team alone;
    Carver memory = whole;
    carve(&memory, pack, &alone, Carver{thread_scratch(Scratch::tile, own_bytes)});
    return work;
  }
  run_team(threads, 0, own_bytes, &work, [&](Team* team, Carver, Carver own) {
    Pack same;
    Carver memory = whole;
    carve(&memory, team->leads() ? pack : &same, team, own);
    team->wait();  // sees who is late
  });
  return work;
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
