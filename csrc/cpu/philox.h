// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and standard
// normals from it by Box-Muller. The counter is (column / 4, row, step, row >> 32), the key the seed:
// any element can be drawn by itself, so noise depends neither on the batch split nor on threads.
#pragma once

#include "activations.h"
#include "tile.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// Two of the widest vectors: a round's products take long to arrive, and two chains of them overlap.
constexpr int philox_lanes = 32;

// Ten rounds on `philox_lanes` counters at once, in place.
DIFFCORE_INLINE void philox_rounds(uint64_t seed, uint32_t (&c)[4][philox_lanes]) {
  // A product is twice as wide as what is multiplied, so every vector of counters is two: the even ones and
  // the odd ones, in the lower halves of 64-bit words. What gets into the upper halves nobody reads.
  constexpr int count = vectors_at_once;
  for (int first = 0; first < philox_lanes; first += count / 2 * W) {
    Words word[4][count];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < count; v += 2) {
        memcpy(&word[i][v], c[i] + first + v / 2 * W, sizeof(Words));
        word[i][v + 1] = word[i][v] >> 32;
      }
    const Words multiplier0 = Words{} + 0xD2511F53u, multiplier1 = Words{} + 0xCD9E8D57u;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) {
        const Words p0 = low_products(word[0][v], multiplier0);
        const Words p1 = low_products(word[2][v], multiplier1);
        word[0][v] = p1 >> 32 ^ word[1][v] ^ (Words{} + key0);
        word[1][v] = p1;
        word[2][v] = p0 >> 32 ^ word[3][v] ^ (Words{} + key1);
        word[3][v] = p0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < count; v += 2) {
        const Words both = (word[i][v] & 0xffffffffu) | word[i][v + 1] << 32;
        memcpy(c[i] + first + v / 2 * W, &both, sizeof both);
      }
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

// Writes columns [4 block, columns) of up to `philox_lanes` rows, four at most, from z[column][row].
DIFFCORE_INLINE void write_block(const float (&z)[4][philox_lanes], int rows, int columns,
                                 float* out, ptrdiff_t out_stride) {
  int row = 0;
  if (columns >= 4)
    for (; row + 4 <= rows; row += 4)
      transpose_4x4(z[0] + row, philox_lanes, out + row * out_stride, out_stride);
  for (; row < rows; ++row)
    for (int i = 0; i < 4 && i < columns; ++i) out[row * out_stride + i] = z[i][row];
}

// Normals of `steps` steps from `first_step` on, for `rows` rows from `first_row` on:
// out[(step * rows + row) * out_stride + column].
static inline void fill_normals(uint64_t seed, uint32_t first_step, int steps, int64_t first_row,
                                int64_t rows, int columns, float* out, ptrdiff_t out_stride) {
  for (int64_t start = 0, left = steps * rows; left > 0;
       start += philox_lanes, left -= philox_lanes) {
    // A lane has one row of one step, and draws its columns in blocks of four.
    uint64_t row[philox_lanes];
    uint32_t step[philox_lanes];
    for (int l = 0; l < philox_lanes; ++l) {
      const int64_t steps_before = steps == 1 ? 0 : (start + l) / rows;
      row[l] = static_cast<uint64_t>(first_row + start + l - steps_before * rows);
      step[l] = first_step + static_cast<uint32_t>(steps_before);
    }
    const int count = left < philox_lanes ? static_cast<int>(left) : philox_lanes;
    for (int column = 0; column < columns; column += 4) {
      uint32_t c[4][philox_lanes];
      for (int l = 0; l < philox_lanes; ++l) {
        c[0][l] = static_cast<uint32_t>(column / 4);
        c[1][l] = static_cast<uint32_t>(row[l]);
        c[2][l] = step[l];
        c[3][l] = static_cast<uint32_t>(row[l] >> 32);
      }
      philox_rounds(seed, c);
      float z[4][philox_lanes];
      box_muller(c[0], c[1], z[0], z[1]);
      if (columns - column > 2) box_muller(c[2], c[3], z[2], z[3]);
      write_block(z, count, columns - column, out + column, out_stride);
    }
    out += count * out_stride;
  }
}

static void normals(const NormalsCall& call) {
  fill_normals(call.seed, call.step, 1, call.first_row, call.rows, call.columns, call.out,
               call.columns);
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
