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
DIFFCORE_INLINE void box_muller(const uint32_t (&a)[philox_lanes],
                                const uint32_t (&b)[philox_lanes], float (&first)[philox_lanes],
                                float (&second)[philox_lanes]) {
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

// Where a lane's four normals belong.
struct NormalsPosition {
  int block;
  int64_t row;
  int step;
  DIFFCORE_INLINE void advance(NormalsPosition* p, int blocks, int64_t rows) {
    if (++p->block < blocks) return;
    p->block = 0;
    if (++p->row < rows) return;
    p->row = 0;
    ++p->step;
  }
};

// Normals of `steps` steps from `first_step` on, for `rows` rows from `first_row` on:
// out[(step * rows + row) * out_stride + column].
static inline void fill_normals(uint64_t seed, uint32_t first_step, int steps, int64_t first_row,
                                int64_t rows, int columns, float* out, ptrdiff_t out_stride) {
  const int blocks = (columns + 3) / 4;
  NormalsPosition from = {0, 0, 0}, to = from;
  for (int64_t left = steps * rows * blocks; left > 0; left -= philox_lanes) {
    uint32_t c[4][philox_lanes];
    for (int l = 0; l < philox_lanes; ++l) {
      const uint64_t row = static_cast<uint64_t>(first_row + from.row);
      c[0][l] = static_cast<uint32_t>(from.block);
      c[1][l] = static_cast<uint32_t>(row);
      c[2][l] = first_step + static_cast<uint32_t>(from.step);
      c[3][l] = static_cast<uint32_t>(row >> 32);
      NormalsPosition::advance(&from, blocks, rows);
    }
    philox_rounds(seed, c);
    float z[4][philox_lanes];
    box_muller(c[0], c[1], z[0], z[1]);
    box_muller(c[2], c[3], z[2], z[3]);
    for (int l = 0; l < philox_lanes && l < left; ++l) {
      float* p = out + (to.step * rows + to.row) * out_stride + 4 * to.block;
      const int here = columns - 4 * to.block < 4 ? columns - 4 * to.block : 4;
      for (int i = 0; i < here; ++i) p[i] = z[i][l];
      NormalsPosition::advance(&to, blocks, rows);
    }
  }
}

static void normals(const NormalsCall& call) {
  fill_normals(call.seed, call.step, 1, call.first_row, call.rows, call.columns, call.out,
               call.columns);
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
