// Runs CUDA kernels on the CPU, so that tests execute the real sources where there is no GPU.
//
// Every CUDA thread is a fiber with a stack of its own, and one OS thread runs them by turns: a
// fiber goes on until it waits for others. What a kernel may rely on, and no more, is what it gets:
//
// - Barriers, shuffles and mma are meetings. Lanes run forwards or, with CUDA_ON_CPU_LANES=reverse,
//   backwards, so a missing barrier shows in one of the two orders.
// - Shared memory starts as NaN, is a block of its own on the heap (AddressSanitizer guards its
//   ends) and belongs to one block. Blocks of a cluster or of a cooperative grid run interleaved.
// - cp.async copies when its group is waited for: without the wait, nothing has arrived.
// - mma takes every operand from the lane and register in which PTX says it lies.
// - Threads that meet at different barriers, wait for ever, copy misaligned or leave a copy
//   unfinished end the process with a message.
//
// x86-64 and AArch64 with GCC or Clang. One kernel runs at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN 1
#endif
#endif
#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // one copy: blocks that run interleaved need dynamic shared memory
#define __grid_constant__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

// Where a kernel calls; the arguments' defaults are evaluated at the call.
#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

[[noreturn]] inline void fail(const char* what, const char* file, int line) {
  fprintf(stderr, "cuda_on_cpu: %s:%d: block (%u, %u, %u), thread (%u, %u, %u): %s\n", file, line,
          blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
  fflush(stderr);
  abort();
}

// A meeting of `expected` fibers, which is over when the last one has arrived.
struct Barrier {
  int expected = 0;
  int arrived = 0;
  unsigned generation = 0;
  const char* file = nullptr;  // where the first of this generation arrived
  int line = 0;

  unsigned arrive(const char* at_file, int at_line) {
    if (arrived == 0) {
      file = at_file;
      line = at_line;
    } else if (line != at_line || strcmp(file, at_file) != 0) {
      fprintf(stderr, "cuda_on_cpu: others wait at %s:%d\n", file, line);
      fail("threads of one barrier came to different places", at_file, at_line);
    }
    const unsigned before = generation;
    if (++arrived == expected) {
      arrived = 0;
      ++generation;
    }
    return before;
  }
};

// What the lanes named by a mask hand to each other. Values of one meeting stay until all lanes
// have come to the next but one.
struct Meeting {
  static constexpr int bytes = 64;
  unsigned mask = 0;
  Barrier barrier;
  alignas(16) char values[2][32][bytes];
};

struct Warp {
  std::vector<std::unique_ptr<Meeting>> meetings;  // one a mask
};

struct Block;

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

// An array that AddressSanitizer guards, aligned as kernels may expect, full of NaN.
struct SharedArray {
  char* data;
  size_t bytes;
  explicit SharedArray(size_t size)
      : data(static_cast<char*>(::operator new(size, std::align_val_t(128)))), bytes(size) {
    memset(data, 0xff, size);
  }
  ~SharedArray() { ::operator delete(data, std::align_val_t(128)); }
  SharedArray(const SharedArray&) = delete;
  SharedArray& operator=(const SharedArray&) = delete;
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  SharedArray dynamic_shared;
  Cluster* cluster = nullptr;
  int rank = 0;  // in the cluster
  explicit Block(size_t shared_bytes) : dynamic_shared(shared_bytes) {}
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  unsigned group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 thread;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  bool done = false;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0;  // the one that it waits to see the end of
  std::vector<Copy> copies;
  unsigned committed_groups = 0;
  unsigned cluster_generation = 0;  // between arrival and wait

  bool ready() const { return !done && (!waits_for || waits_for->generation != generation); }
};

#ifdef CUDA_ON_CPU_ASAN
constexpr size_t stack_bytes = 256 << 10;
#else
constexpr size_t stack_bytes = 64 << 10;
#endif
constexpr uint64_t stack_canary = 0x5bd1e995c0de51acu;

// Saves the registers that a function must preserve and the stack pointer, and loads another's.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
#if defined(__x86_64__)
__asm__(R"(
  .pushsection .text
  .weak cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
  .popsection
)");
// What the switch pops: six registers and the address to go to. At a function's entry the stack
// pointer is 8 below a multiple of 16, as if its caller had just pushed a return address.
inline void* first_frame(char* stack_end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_end) - 2;
  *top = reinterpret_cast<void*>(entry);
  std::fill(top - 6, top, nullptr);
  return top - 6;
}
#elif defined(__aarch64__)
__asm__(R"(
  .pushsection .text
  .weak cuda_on_cpu_switch
  .type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
  .popsection
)");
inline void* first_frame(char* stack_end, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(stack_end - 160);
  std::fill(frame, frame + 20, nullptr);
  frame[11] = reinterpret_cast<void*>(entry);  // x30, where the switch returns to
  return frame;
}
#else
#error "cuda_on_cpu.h has no context switch for this processor"
#endif

// The fibers that run interleaved, and whose turn it is.
struct Scheduler {
  std::vector<Fiber> fibers;
  int current = -1;  // the launching code itself is -1
  int direction = 1;
  int alive = 0;
  int64_t idle_turns = 0;  // turns taken by threads that poll, since anybody got on
  const std::function<void()>* kernel = nullptr;
  Barrier grid;  // of a cooperative launch
  void* main_stack_pointer = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};

inline Scheduler scheduler;

inline Fiber& self() { return scheduler.fibers[static_cast<size_t>(scheduler.current)]; }

inline void arrive_on_stack(void* fake_stack) {
#ifdef CUDA_ON_CPU_ASAN
  const void* from = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &from, &bytes);
  if (!scheduler.main_stack) {
    scheduler.main_stack = from;
    scheduler.main_stack_bytes = bytes;
  }
#else
  (void)fake_stack;
#endif
}

inline void switch_to(int next) {
  const int before = scheduler.current;
  void** save =
      before < 0 ? &scheduler.main_stack_pointer : &scheduler.fibers[before].stack_pointer;
  void** fake = before < 0 ? &scheduler.main_fake_stack : &scheduler.fibers[before].fake_stack;
  void* load = next < 0 ? scheduler.main_stack_pointer : scheduler.fibers[next].stack_pointer;
#ifdef CUDA_ON_CPU_ASAN
  const bool ends = before >= 0 && scheduler.fibers[before].done;
  __sanitizer_start_switch_fiber(ends ? nullptr : fake,
                                 next < 0 ? scheduler.main_stack : scheduler.fibers[next].stack,
                                 next < 0 ? scheduler.main_stack_bytes : stack_bytes);
#endif
  scheduler.current = next;
  if (next >= 0) {
    threadIdx = scheduler.fibers[next].thread;
    blockIdx = scheduler.fibers[next].block->index;
  }
  cuda_on_cpu_switch(save, load);
  arrive_on_stack(*fake);
}

// Gives the turn to the next fiber that can go on: of the same block while there is one, so that a
// block runs as far ahead of the others as it can.
inline void take_turns(const char* file, int line, bool leave_block = false) {
  const int count = static_cast<int>(scheduler.fibers.size());
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int blocks = count / threads, direction = scheduler.direction;
  const int block = scheduler.current / threads, thread = scheduler.current % threads;
  for (int b = leave_block ? 1 : 0; b < blocks + (leave_block ? 1 : 0); ++b) {
    const int first = (block + direction * b + blocks * 2) % blocks * threads;
    // In its own block a fiber itself is the last one asked, in others no order is more natural.
    for (int i = 1; i <= threads; ++i) {
      const int next = first + (thread + direction * i + 2 * threads) % threads;
      if (!scheduler.fibers[next].ready()) continue;
      if (next != scheduler.current) switch_to(next);
      return;
    }
  }
  for (const Fiber& f : scheduler.fibers) {
    if (f.done || !f.waits_for) continue;
    fprintf(stderr, "cuda_on_cpu: %d of %d threads came to the barrier at %s:%d\n",
            f.waits_for->arrived, f.waits_for->expected, f.waits_for->file, f.waits_for->line);
    break;
  }
  fail("deadlock: every thread waits for one that doesn't come", file, line);
}

inline void wait_for(const Barrier& barrier, unsigned generation, const char* file, int line) {
  Fiber& fiber = self();
  scheduler.idle_turns = 0;
  if (barrier.generation != generation) return;
  fiber.waits_for = &barrier;
  fiber.generation = generation;
  take_turns(file, line);
  fiber.waits_for = nullptr;
}

inline void meet(Barrier& barrier, const char* file, int line) {
  wait_for(barrier, barrier.arrive(file, line), file, line);
}

inline void meet_grid(const char* file, int line) {
  if (scheduler.grid.expected == 0) fail("the launch isn't cooperative", file, line);
  meet(scheduler.grid, file, line);
}

// Called in a loop that polls memory until another thread has written there.
inline void poll(CUDA_ON_CPU_SITE) {
  constexpr int64_t patience = 2'000'000;
  if (++scheduler.idle_turns > patience) fail("polls for ever", file, line);
  take_turns(file, line, true);
}

inline void fiber_main() {
  arrive_on_stack(nullptr);
  (*scheduler.kernel)();
  Fiber& fiber = self();
  if (!fiber.copies.empty()) fail("a cp.async was never waited for", __FILE__, __LINE__);
  uint64_t canary;
  memcpy(&canary, fiber.stack, sizeof(canary));
  if (canary != stack_canary) fail("stack overflow", __FILE__, __LINE__);
  fiber.done = true;
  if (--scheduler.alive == 0) switch_to(-1);
  take_turns(__FILE__, __LINE__);
  __builtin_unreachable();
}

// Stacks are kept between launches.
inline char* stacks(size_t count) {
  static std::unique_ptr<char[]> memory;
  static size_t capacity = 0;
  if (count > capacity) {
    memory.reset(new char[count * stack_bytes]);
    capacity = count;
  }
  return memory.get();
}

inline void run_interleaved(const std::vector<std::unique_ptr<Block>>& blocks,
                            const std::function<void()>& kernel) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int count = threads * static_cast<int>(blocks.size());
  char* memory = stacks(static_cast<size_t>(count));
#ifdef CUDA_ON_CPU_ASAN
  // The fibers of the launch before ended in the middle of a function, whose frames stay marked.
  __asan_unpoison_memory_region(memory, static_cast<size_t>(count) * stack_bytes);
#endif
  scheduler.fibers.assign(static_cast<size_t>(count), Fiber{});
  for (int i = 0; i < count; ++i) {
    Fiber& f = scheduler.fibers[static_cast<size_t>(i)];
    const unsigned t = static_cast<unsigned>(i % threads);
    f.block = blocks[static_cast<size_t>(i / threads)].get();
    f.thread = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    f.block->warps.resize(static_cast<size_t>((threads + 31) / 32));
    f.block->barrier.expected = threads;
    f.warp = &f.block->warps[t / 32];
    f.lane = static_cast<int>(t % 32);
    f.stack = memory + static_cast<size_t>(i) * stack_bytes;
    memcpy(f.stack, &stack_canary, sizeof(stack_canary));
    const uintptr_t end = reinterpret_cast<uintptr_t>(f.stack + stack_bytes) & ~uintptr_t(15);
    f.stack_pointer = first_frame(reinterpret_cast<char*>(end), &fiber_main);
  }
  const char* lanes = getenv("CUDA_ON_CPU_LANES");
  const bool reverse = lanes && strcmp(lanes, "reverse") == 0;
  scheduler.direction = reverse ? -1 : 1;
  scheduler.alive = count;
  scheduler.idle_turns = 0;
  scheduler.kernel = &kernel;
  scheduler.main_stack = nullptr;
  switch_to(reverse ? count - 1 : 0);
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks along x that share a cluster
  bool cooperative = false;  // all blocks at the same time
};

inline void launch(const LaunchShape& shape, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  gridDim = shape.grid;
  blockDim = shape.block;
  const unsigned blocks = shape.grid.x * shape.grid.y * shape.grid.z;
  if (shape.grid.x % shape.cluster) fail("the grid isn't made of whole clusters", "launch", 0);
  const unsigned together = shape.cooperative ? blocks : shape.cluster;
  for (unsigned first = 0; first < blocks; first += together) {
    std::vector<std::unique_ptr<Block>> running;
    std::vector<Cluster> clusters(together / shape.cluster);
    for (unsigned i = 0; i < together; ++i) {
      running.push_back(std::make_unique<Block>(shape.shared_bytes));
      Block& block = *running.back();
      const unsigned at = first + i;
      block.index = dim3(at % shape.grid.x, at / shape.grid.x % shape.grid.y,
                         at / (shape.grid.x * shape.grid.y));
      block.cluster = &clusters[i / shape.cluster];
      block.rank = static_cast<int>(i % shape.cluster);
      block.cluster->blocks.push_back(&block);
      block.cluster->barrier.expected += static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    }
    scheduler.grid = Barrier{};
    if (shape.cooperative)
      scheduler.grid.expected = static_cast<int>(blocks * blockDim.x * blockDim.y * blockDim.z);
    run_interleaved(running, kernel);
  }
}

// Hands `value` to the lanes in `mask` and returns what they handed over, by lane.
template <class T>
const char (*meet_lanes(unsigned mask, const T& value, const char* file, int line))
    [Meeting::bytes] {
      static_assert(sizeof(T) <= Meeting::bytes);
      Fiber& fiber = self();
      if (!(mask >> fiber.lane & 1)) fail("a lane isn't in its own mask", file, line);
      Meeting* meeting = nullptr;
      for (const auto& m : fiber.warp->meetings)
        if (m->mask == mask) meeting = m.get();
      if (!meeting) {
        fiber.warp->meetings.push_back(std::make_unique<Meeting>());
        meeting = fiber.warp->meetings.back().get();
        meeting->mask = mask;
        meeting->barrier.expected = __builtin_popcount(mask);
      }
      auto& values = meeting->values[meeting->barrier.generation & 1];
      memcpy(values[fiber.lane], &value, sizeof(T));
      meet(meeting->barrier, file, line);
      return values;
    }

template <class T>
T from_lane(unsigned mask, T value, int source, const char* file, int line) {
  const auto* values = meet_lanes(mask, value, file, line);
  if (source < 0 || source > 31) return value;
  if (!(mask >> source & 1)) fail("a shuffle reads from a lane outside its mask", file, line);
  T result;
  memcpy(&result, values[source], sizeof(T));
  return result;
}

inline char* dynamic_shared() { return self().block->dynamic_shared.data; }

// The same place as `at` in the dynamic shared memory of the cluster's block `rank`.
inline void* in_block_of_cluster(void* at, int rank, const char* file, int line) {
  const Block& own = *self().block;
  const ptrdiff_t offset = static_cast<char*>(at) - own.dynamic_shared.data;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(own.dynamic_shared.bytes))
    fail("an address of another block, but not of dynamic shared memory", file, line);
  return own.cluster->blocks[static_cast<size_t>(rank)]->dynamic_shared.data + offset;
}

constexpr int first_with_clusters = 9;  // compute capability's major number

// What the launcher sees of the device: CUDA_ON_CPU_DEVICE="multiprocessors,shared bytes a
// block,compute capability major", an H100 without it. Two more numbers may follow: a group size,
// to have launchers plan no other, and how many clusters run at the same time.
struct Device {
  int multiprocessors = 132;
  int shared_bytes = 232448;
  int major = 9;
  int group_size = 0;  // any
  int clusters = 132;  // as many as there is room for

  // A cluster lies in one of the parts that a GPU is made of, of which in an H100 not all have the
  // same number of multiprocessors, nor are they the same in every H100: so 15 clusters of 8 run at
  // the same time in one, and 31 of 4. Other devices are one part here.
  int clusters_at_once(int size) const {
    int count = 0;
    if (multiprocessors == 132) {
      for (const int part : {18, 18, 18, 18, 16, 16, 16, 12}) count += part / size;
    } else {
      count = multiprocessors / size;
    }
    return std::min(count, clusters);
  }
};
inline Device device() {
  Device d;
  if (const char* text = getenv("CUDA_ON_CPU_DEVICE"))
    if (sscanf(text, "%d,%d,%d,%d,%d", &d.multiprocessors, &d.shared_bytes, &d.major, &d.group_size,
               &d.clusters) < 3)
      fail("CUDA_ON_CPU_DEVICE: expected three to five numbers", __FILE__, __LINE__);
  return d;
}

// -- numbers of 16 and 19 bits --------------------------------------------------------------------

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float float_of_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
inline uint16_t bf16_of(float x) {  // to nearest, ties to even
  if (x != x) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_of_fp16(uint16_t x) {
  const int exponent = x >> 10 & 31, mantissa = x & 1023;
  const float sign = x >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}
inline uint16_t fp16_of(float x) {
  if (x != x) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude == 0.0f) return sign;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = f 2^exponent, f in [0.5, 1)
  const int ulp = std::max(exponent - 11, -24);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -ulp)));
  // 2048 units carry into the exponent by themselves; at ulp -24 and under 1024 it is subnormal.
  return static_cast<uint16_t>(sign | (((ulp + 24) << 10) + units));
}

// tf32 has 10 bits of mantissa: cvt.rna rounds ties away from zero, mma looks at no further bits.
inline uint32_t tf32_of(float x) { return x != x ? 0x7fffffffu : (bits_of(x) + 0x1000) & ~0x1fffu; }
inline float float_of_tf32(uint32_t bits) { return float_of(bits & ~0x1fffu); }

// -- mma ------------------------------------------------------------------------------------------

// D = A B + D of a warp, A [16, k], B [k, 8], D [16, 8]; k is 16, of tf32 8.
//
// Lane 4 g + t holds rows g and g + 8 of A (its halves), column g of B, and of k the `pair` numbers
// from pair * t on, in the lower and in the upper half of k: 2 of 16 bits, 1 of tf32. Of D it holds
// in all shapes d[2 h + j] = D[g + 8 h, 2 t + j].
template <int pair>
struct LaneOfOperands {
  float a[2][2][pair];  // [half of the rows][half of k]
  float b[2][pair];     // [half of k]
};

template <int pair>
void multiply_fragments(float (&d)[4], const LaneOfOperands<pair>& mine, const char* file,
                        int line) {
  const auto* all = meet_lanes(0xffffffffu, mine, file, line);
  const int lane = self().lane;
  const auto operands = [&](int of) {
    return reinterpret_cast<const LaneOfOperands<pair>*>(all[of]);
  };
  for (int half = 0; half < 2; ++half) {
    for (int j = 0; j < 2; ++j) {
      const int row = lane / 4, column = 2 * (lane % 4) + j;  // of the half
      double sum = d[2 * half + j];
      for (int k_half = 0; k_half < 2; ++k_half) {
        for (int quarter = 0; quarter < 4; ++quarter) {
          const auto* a = operands(4 * row + quarter);
          const auto* b = operands(4 * column + quarter);
          for (int i = 0; i < pair; ++i)
            sum += static_cast<double>(a->a[half][k_half][i]) * b->b[k_half][i];
        }
      }
      d[2 * half + j] = static_cast<float>(sum);
    }
  }
}

template <class Decode>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Decode decode,
                  const char* file, int line) {
  LaneOfOperands<2> mine;
  for (int r = 0; r < 4; ++r)  // a0: upper rows, lower k; a1: lower rows; a2, a3: upper k
    for (int i = 0; i < 2; ++i)
      mine.a[r % 2][r / 2][i] = decode(static_cast<uint16_t>(a[r] >> 16 * i));
  for (int r = 0; r < 2; ++r)
    for (int i = 0; i < 2; ++i) mine.b[r][i] = decode(static_cast<uint16_t>(b[r] >> 16 * i));
  multiply_fragments(d, mine, file, line);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const char* file, int line) {
  LaneOfOperands<1> mine;
  for (int r = 0; r < 4; ++r) mine.a[r % 2][r / 2][0] = float_of_tf32(a[r]);
  for (int r = 0; r < 2; ++r) mine.b[r][0] = float_of_tf32(b[r]);
  multiply_fragments(d, mine, file, line);
}

// -- cp.async -------------------------------------------------------------------------------------

inline void copy_later(void* to, const void* from, int bytes, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("cp.async: an address isn't a multiple of the size", file, line);
  self().copies.push_back({to, from, bytes, self().committed_groups});
}

inline void commit_copies() { ++self().committed_groups; }

// Copies all but the newest `pending` groups.
inline void finish_copies(unsigned pending) {
  Fiber& fiber = self();
  size_t done = 0;
  for (; done < fiber.copies.size(); ++done) {
    const Copy& copy = fiber.copies[done];
    if (copy.group + pending >= fiber.committed_groups) break;
    memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace cuda_on_cpu

// -- CUDA's own names -----------------------------------------------------------------------------

inline void __syncthreads(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::meet(cuda_on_cpu::self().block->barrier, file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::meet_lanes(mask, 0, file, line);
}
inline void __threadfence() {}

// As on the GPU, sources stay within the lane's own group of `width`.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::self().lane;
  return cuda_on_cpu::from_lane(mask, value, lane / width * width + source % width, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::self().lane, source = lane ^ bits;
  return cuda_on_cpu::from_lane(mask, value, source / width > lane / width ? lane : source, file,
                                line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::self().lane, source = lane + static_cast<int>(by);
  return cuda_on_cpu::from_lane(mask, value, source / width == lane / width ? source : lane, file,
                                line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::self().lane, source = lane % width - static_cast<int>(by);
  return cuda_on_cpu::from_lane(mask, value, source < 0 ? lane : lane - static_cast<int>(by), file,
                                line);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, CUDA_ON_CPU_SITE) {
  const auto* values = cuda_on_cpu::meet_lanes(mask, predicate, file, line);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) result |= static_cast<unsigned>(values[lane][0] != 0) << lane;
  return result;
}
inline bool __any_sync(unsigned mask, bool predicate, CUDA_ON_CPU_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

// Only one thread runs at a time, and none is interrupted.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  cuda_on_cpu::scheduler.idle_turns = 0;
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float __uint_as_float(unsigned bits) { return cuda_on_cpu::float_of(bits); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_of(x); }
inline float __int_as_float(int bits) { return cuda_on_cpu::float_of(static_cast<uint32_t>(bits)); }
inline int __float_as_int(float x) { return static_cast<int>(cuda_on_cpu::bits_of(x)); }
