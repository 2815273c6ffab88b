// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and standard
// normals from it by Box-Muller. The counter is (column / 4, row, step, row >> 32), the key the seed:
// any element can be drawn by itself, so noise depends neither on the batch split nor on threads.
#pragma once

#include "activations.h"

namespace diffcore {
namespace DIFFCORE_ISA {

constexpr int philox_lanes = 16;  // a multiple of every vector width

// Ten rounds on `philox_lanes` counters at once, in place.
DIFFCORE_INLINE void philox_rounds(uint64_t seed, uint32_t (&c)[4][philox_lanes]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < philox_lanes; ++l) {
      const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c[0][l];
      const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c[2][l];
      c[0][l] = static_cast<uint32_t>(p1 >> 32) ^ c[1][l] ^ key0;
      c[1][l] = static_cast<uint32_t>(p1);
      c[2][l] = static_cast<uint32_t>(p0 >> 32) ^ c[3][l] ^ key1;
      c[3][l] = static_cast<uint32_t>(p0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Two words give two normals: sqrt(-2 ln u1) (cos, sin)(2 pi u2), with u1 in (0, 1], u2 in [0, 1),
// both multiples of 2^-24.
DIFFCORE_INLINE void box_muller(const uint32_t (&a)[philox_lanes], const uint32_t (&b)[philox_lanes],
                                float (&first)[philox_lanes], float (&second)[philox_lanes]) {
  float u1[philox_lanes], u2[philox_lanes];
  for (int l = 0; l < philox_lanes; ++l) {
    u1[l] = static_cast<float>(static_cast<int32_t>(a[l] >> 8) + 1) * 0x1p-24f;
    u2[l] = static_cast<float>(static_cast<int32_t>(b[l] >> 8)) * 0x1p-24f;
  }
  for (int l = 0; l < philox_lanes; l += W) {
    Vec sine, cosine;
    sincos_of_turns(load(u2 + l), &sine, &cosine);
    const Vec radius = sqrt(zero() - (log(load(u1 + l)) + log(load(u1 + l))));
    store(first + l, radius * cosine);
    store(second + l, radius * sine);
  }
}

static inline void fill_normals(uint64_t seed, uint32_t step, int64_t first_row, int64_t rows,
                                int columns, float* out, ptrdiff_t out_stride) {
  const int blocks = (columns + 3) / 4;
  const int64_t total = rows * blocks;
  for (int64_t start = 0; start < total; start += philox_lanes) {
    const int lanes = total - start < philox_lanes ? static_cast<int>(total - start) : philox_lanes;
    uint32_t c[4][philox_lanes];
    int64_t row = start / blocks;
    int block = static_cast<int>(start % blocks);
    for (int l = 0; l < philox_lanes; ++l) {
      const uint64_t global_row = static_cast<uint64_t>(first_row + row);
      c[0][l] = static_cast<uint32_t>(block);
      c[1][l] = static_cast<uint32_t>(global_row);
      c[2][l] = step;
      c[3][l] = static_cast<uint32_t>(global_row >> 32);
      if (++block == blocks) {
        block = 0;
        ++row;
      }
    }
    philox_rounds(seed, c);
    float z[4][philox_lanes];
    box_muller(c[0], c[1], z[0], z[1]);
    box_muller(c[2], c[3], z[2], z[3]);
    row = start / blocks;
    block = static_cast<int>(start % blocks);
    for (int l = 0; l < lanes; ++l) {
      for (int i = 0; i < 4 && 4 * block + i < columns; ++i)
        out[row * out_stride + 4 * block + i] = z[i][l];
      if (++block == blocks) {
        block = 0;
        ++row;
      }
    }
  }
}

static void normals(const NormalsCall& call) {
  fill_normals(call.seed, call.step, call.first_row, call.rows, call.columns, call.out,
               call.columns);
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
