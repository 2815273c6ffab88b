// What the kernels use beyond CUDA C++ itself: thin names for PTX instructions.
//
// Tests run the same sources on a CPU (DIFFCORE_CUDA_ON_CPU), which this header and runtime.cuh
// alone know: then testing/cuda_on_cpu.h plays the GPU, and these names are its.
#pragma once

#include <cstdint>

#include "runtime.cuh"
#ifndef DIFFCORE_CUDA_ON_CPU
#include <cooperative_groups.h>
#endif

namespace diffcore {
namespace cuda {

#ifdef DIFFCORE_CUDA_ON_CPU

#define DIFFCORE_DYNAMIC_SHARED(name) char* const name = cuda_on_cpu::dynamic_shared()

inline void copy_async_16(void* shared, const void* global, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::copy_later(shared, global, 16, file, line);
}
inline void commit_copies() { cuda_on_cpu::commit_copies(); }
template <int pending>
void wait_for_copies() {
  cuda_on_cpu::finish_copies(pending);
}

inline uint32_t bf16_pair(float low, float high) {
  return cuda_on_cpu::bf16_of(low) | static_cast<uint32_t>(cuda_on_cpu::bf16_of(high)) << 16;
}
inline uint32_t fp16_pair(float low, float high) {
  return cuda_on_cpu::fp16_of(low) | static_cast<uint32_t>(cuda_on_cpu::fp16_of(high)) << 16;
}
inline uint32_t tf32_bits(float x) { return cuda_on_cpu::tf32_of(x); }

inline float reciprocal(float x) { return 1.0f / x; }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma_m16n8k16(d, a, b, cuda_on_cpu::float_of_bf16, file, line);
}
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma_m16n8k16(d, a, b, cuda_on_cpu::float_of_fp16, file, line);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma_m16n8k8_tf32(d, a, b, file, line);
}

inline int rank_in_cluster() { return cuda_on_cpu::self().block->rank; }
inline void store_in_cluster(void* shared, int rank, uint32_t value, CUDA_ON_CPU_SITE) {
  memcpy(cuda_on_cpu::in_block_of_cluster(shared, rank, file, line), &value, sizeof(value));
}
inline void store_in_cluster(void* shared, int rank, float2 value, CUDA_ON_CPU_SITE) {
  memcpy(cuda_on_cpu::in_block_of_cluster(shared, rank, file, line), &value, sizeof(value));
}
inline void arrive_at_cluster(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::Fiber& fiber = cuda_on_cpu::self();
  fiber.cluster_generation = fiber.block->cluster->barrier.arrive(file, line);
}
inline void wait_for_cluster(CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Fiber& fiber = cuda_on_cpu::self();
  cuda_on_cpu::wait_for(fiber.block->cluster->barrier, fiber.cluster_generation, file, line);
}

inline void wait_for_grid(CUDA_ON_CPU_SITE) { cuda_on_cpu::meet_grid(file, line); }

inline unsigned load_acquire(const unsigned* at) { return *at; }
inline void poll(CUDA_ON_CPU_SITE) { cuda_on_cpu::poll(file, line); }

#else  // CUDA

#define DIFFCORE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

// 16 bytes on their way from global to shared memory, both aligned to 16, past L1 and the
// registers.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// Closes a group of the calling thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the newest `pending` of the calling thread's groups are on their way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Two floats rounded to nearest, `low` in the lower half of the word.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t fp16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// A float rounded to tf32's 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ uint32_t tf32_bits(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// 1 / x within 1 ulp for |x| in [2^-126, 2^126].
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// D = A B + D of a warp: A [16, 16] by rows, B [16, 8] by columns. Where a lane's registers lie in
// them: PTX ISA, "Matrix Fragments for mma.m16n8k16"; tile.cuh has it in words.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with A [16, 8], B [8, 8].
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Clusters exist from compute capability 9.0 on; no launcher makes one of code for less.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DIFFCORE_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define DIFFCORE_CLUSTER_ASM(...) __trap()
#endif

__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank = 0;
  DIFFCORE_CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Writes to the place in the shared memory of the cluster's block `rank` where `shared` is here.
__device__ __forceinline__ uint32_t address_in_cluster(void* shared, int rank) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  DIFFCORE_CLUSTER_ASM("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  return address;
}
__device__ __forceinline__ void store_in_cluster(void* shared, int rank, uint32_t value) {
  const uint32_t to = address_in_cluster(shared, rank);
  DIFFCORE_CLUSTER_ASM("st.shared::cluster.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void store_in_cluster(void* shared, int rank, float2 value) {
  const uint32_t to = address_in_cluster(shared, rank);
  DIFFCORE_CLUSTER_ASM("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(value.x),
                       "f"(value.y) : "memory");
}
// The cluster's barrier in two halves: what was written before the one is seen after the other.
__device__ __forceinline__ void arrive_at_cluster() {
  DIFFCORE_CLUSTER_ASM("barrier.cluster.arrive.release;" :: : "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  DIFFCORE_CLUSTER_ASM("barrier.cluster.wait.acquire;" :: : "memory");
}

// The barrier of all threads of a cooperative launch: what was written before is seen after.
__device__ __forceinline__ void wait_for_grid() { cooperative_groups::this_grid().sync(); }

__device__ __forceinline__ unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void poll() {}

#endif

constexpr unsigned all_lanes = 0xffffffffu;

// A warp's lanes as 4 rows of 8 columns, for lanes that each read 16 bytes of shared memory for
// their row of one operand and 16 for their column of another.
//
// By what is known of the hardware, which no manual says, such a load takes a wavefront, of which
// shared memory has one a clock, for 8 lanes at a time; but for 16, if of all lanes n and n ^ 1, or
// of all n and n ^ 2, read the same address. So the former share a column, and the latter a row:
// two wavefronts a load.
__host__ __device__ constexpr int row_of_lane(int lane) { return (lane & 1) | (lane >> 4 << 1); }
__host__ __device__ constexpr int column_of_lane(int lane) { return lane >> 1 & 7; }

constexpr bool loads_take_two_wavefronts() {
  unsigned seen = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (column_of_lane(lane) != column_of_lane(lane ^ 1)) return false;
    if (row_of_lane(lane) != row_of_lane(lane ^ 2)) return false;
    seen |= 1u << (8 * row_of_lane(lane) + column_of_lane(lane));
  }
  return seen == all_lanes;
}
static_assert(loads_take_two_wavefronts());

}  // namespace cuda
}  // namespace diffcore
