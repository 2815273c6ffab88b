// The whole reverse chain of a batch of actions in one call.
//
// A tile of rows runs through all steps before the next tile starts: x and the hidden activations
// stay in L1/L2, and only the weights are read again at every step. All that doesn't depend on x is
// taken out of the loop: the state's part of the first layer is computed once per row, the time
// embedding's part once per step (when the weights are packed).
//
// A batch too small for a tile a thread is one tile, and there the weights are all there is to read:
// a team of threads shares out every wide layer's columns, and each thread reads its part of the
// weights from its own L2. All the rest is thin, and done by every thread for itself: the same
// instructions on the same numbers, so that all threads agree on x without communicating.
#pragma once

#include "operand.h"
#include "philox.h"
#include "reverse_step.h"
#include "team.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// What a thread needs to run the time MLP while it packs.
struct TimeBuffers {
  Rows<float> hidden, out;

  static TimeBuffers take(const DenoiserParameters& p, Carver* memory) {
    TimeBuffers b;
    b.hidden = take_rows<float>(memory, max_tile, p.time_hidden.out);
    b.out = take_rows<float>(memory, max_tile, p.time_out.out);
    return b;
  }
};

// Pieces of a denoiser pack; with no memory behind the carver it only measures.
template <class Operand>
static void carve_denoiser(const DenoiserParameters& p, Carver* memory, DenoiserPack* pack,
                           Team* team, Carver own) {
  const Packer packer = team->packer();
  const LinearParameters& first = p.trunk[0];
  const int time_dim = p.time_out.out;
  pack->trunk_layers = p.trunk_layers;
  pack->steps = p.steps;
  pack->activation = p.activation;
  pack->precision = Operand::precision;
  // The input is [x, time embedding, state]; x and state meet float weights in either precision:
  // the layer is thin, and x is what the chain refines.
  pack->action_input = pack_linear<Float32Operand>(first, 0, p.action_dim, Direction::forward,
                                                   false, packer, memory);
  pack->state_input = pack_linear<Float32Operand>(first, p.action_dim + time_dim, p.state_dim,
                                                  Direction::forward, false, packer, memory);
  for (int l = 1; l < p.trunk_layers; ++l) {
    pack->trunk[l] = pack_linear<Operand>(p.trunk[l], 0, p.trunk[l].in, Direction::forward, true,
                                          packer, memory);
  }
  pack->step_bias_stride = padded(first.out);
  float* step_bias = memory->take<float>(4 * pack->step_bias_stride * p.steps);
  pack->step_bias = step_bias;

  // step_bias[i] = W_t time_mlp(embedding of step i) + b, max_tile steps at a time.
  const PackedLinear hidden = pack_linear<Float32Operand>(p.time_hidden, 0, p.time_hidden.in,
                                                          Direction::forward, true, packer, memory);
  const PackedLinear out = pack_linear<Float32Operand>(p.time_out, 0, p.time_out.in,
                                                       Direction::forward, true, packer, memory);
  const PackedLinear into_trunk = pack_linear<Float32Operand>(
      first, p.action_dim, time_dim, Direction::forward, true, packer, memory);
  if (!memory->base) return;
  team->wait();
  const TimeBuffers b = TimeBuffers::take(p, &own);
  const auto function = activate_function<Float32Operand>(p.activation);
  const int end = p.steps * (packer.rank + 1) / packer.count;
  for (int step = p.steps * packer.rank / packer.count; step < end; step += max_tile) {
    const int rows = end - step < max_tile ? end - step : max_tile;
    const int width = p.time_hidden.in;
    const Rows<float> embedding = {
        const_cast<float*>(p.time_embedding) + static_cast<ptrdiff_t>(step) * width, width};
    linear_activate<Float32Operand, Float32Operand>(embedding, rows, hidden, bias_only(hidden),
                                                    function, b.hidden, {nullptr, 0});
    linear_store<Float32Operand>(b.hidden, rows, out, bias_only(out), b.out);
    linear_store<Float32Operand>(
        b.out, rows, into_trunk, bias_only(into_trunk),
        {step_bias + step * pack->step_bias_stride, pack->step_bias_stride});
  }
}

static void carve_denoiser(const DenoiserParameters& p, Carver* memory, DenoiserPack* pack,
                           Team* team, Carver own) {
  with_operand(p.precision, [&](auto operand) {
    carve_denoiser<decltype(operand)>(p, memory, pack, team, own);
  });
}

static int64_t denoiser_pack_bytes(const DenoiserParameters& p) {
  DenoiserPack pack;
  Team alone;
  return bytes_of(
      [&](Carver* memory) { carve_denoiser(p, memory, &pack, &alone, Carver{nullptr}); });
}

static TeamWork pack_denoiser(const DenoiserParameters& p, void* block, DenoiserPack* pack) {
  const int64_t own_bytes = bytes_of([&](Carver* own) { TimeBuffers::take(p, own); });
  return pack_by_team(p.trunk[0].threads, denoiser_pack_bytes(p), own_bytes, block, pack,
                      [&](Carver* memory, DenoiserPack* pieces, Team* team, Carver own) {
                        carve_denoiser(p, memory, pieces, team, own);
                      });
}

// Steps whose noise is drawn at a time: as many as fill the generator's lanes when rows are few.
DIFFCORE_INLINE int noise_block_steps(int rows) {
  return rows >= philox_lanes ? 1 : philox_lanes / rows;
}

template <class Operand>
struct ChainBuffers {
  using Input = typename Operand::Input;
  Rows<float> x, x0, z, eps, state_part;
  Rows<Input> first_hidden;
  Rows<Input> wide_hidden[2];  // the team's

  static ChainBuffers take(const ReverseDiffusionCall& call, int rows, Carver* memory,
                           Carver* team_memory) {
    ChainBuffers b;
    b.x = take_rows<float>(memory, rows, call.action_dim);
    b.x0 = take_rows<float>(memory, rows, call.action_dim);
    // Tiles with fewer rows draw more steps at a time, but never more rows than the generator has
    // lanes.
    b.z = take_rows<float>(memory, rows > philox_lanes ? rows : philox_lanes, call.action_dim);
    b.eps = take_rows<float>(memory, rows, call.action_dim);
    b.state_part = take_rows<float>(memory, rows, call.denoiser->action_input.out);
    b.first_hidden = take_rows<Input>(memory, rows, call.denoiser->action_input.out);
    int widest = call.denoiser->action_input.out;
    for (int l = 1; l < call.denoiser->trunk_layers - 1; ++l)
      widest = call.denoiser->trunk[l].out > widest ? call.denoiser->trunk[l].out : widest;
    for (auto& h : b.wide_hidden) h = take_rows<Input>(team_memory, rows, widest);
    return b;
  }
};

// One step of the solver, for all rows of the tile: x and the running x0 are updated in place.
DIFFCORE_INLINE void solver_step(const SolverStep& step, int rows, int columns, Rows<float> x,
                                 Rows<float> x0, Rows<float> eps, Rows<float> z) {
  for (int i = 0; i < rows; ++i) {
    for (int n = 0; n < columns; n += W) {
      float *xn = x.row(i) + n, *x0n = x0.row(i) + n;
      Vec predicted;
      store(xn,
            step.next(load(xn), load(eps.row(i) + n), load(z.row(i) + n), load(x0n), &predicted));
      store(x0n, predicted);
    }
  }
}

template <class Operand>
static void reverse_diffusion_tile(const ReverseDiffusionCall& call, Span span,
                                   const ChainBuffers<Operand>& b, Team* team) {
  const DenoiserPack& denoiser = *call.denoiser;
  const int rows = span.rows, columns = call.action_dim;
  const auto function = activate_function<Operand>(denoiser.activation);
  const int64_t actions_before = span.first * columns;

  const Rows<float> state = {const_cast<float*>(call.state) + span.first * call.state_dim,
                             call.state_dim};
  linear_store<Float32Operand>(state, rows, denoiser.state_input, bias_only(denoiser.state_input),
                               b.state_part);
  // Lanes past the last column keep zeros: they take part in the vector arithmetic.
  clear_rows(b.x, rows);
  clear_rows(b.x0, rows);
  const int noise_steps = noise_block_steps(rows);
  clear_rows(b.z, noise_steps * rows);
  if (call.x_init) {
    convert_rows<Float32Operand>(call.x_init + actions_before, columns, rows, columns, b.x);
  } else {
    fill_normals(call.seed, 0, 1, span.first, rows, columns, b.x.data, b.x.stride);
  }

  // The team's two buffers are written by turns, from step to step as well: when one is written
  // again, a barrier lies behind every thread's last look at it.
  int turn = 0;
  for (int step = 0; step < call.steps; ++step) {
    const float* c = call.coefficients + step * table_columns;
    const int64_t step_offset = step * call.batch * columns + actions_before;
    if (call.trajectory && team->leads())
      write_rows(b.x, rows, columns, call.trajectory + step_offset);
    const Offset first = {denoiser.step_bias + step * denoiser.step_bias_stride, b.state_part.data,
                          b.state_part.stride};
    // A thread that is alone needs no buffer to itself: the one that isn't next will do.
    auto hidden = team->alone() ? b.wide_hidden[turn ^ 1] : b.first_hidden;
    linear_activate<Float32Operand, Operand>(b.x, rows, denoiser.action_input, first, function,
                                             hidden, {nullptr, 0});
    for (int l = 1; l < denoiser.trunk_layers - 1; ++l, turn ^= 1) {
      const PackedLinear& layer = denoiser.trunk[l];
      share_of_layer<Operand>(*team, hidden, rows, layer, function, b.wide_hidden[turn],
                              {nullptr, 0});
      hidden = b.wide_hidden[turn];
      team->wait();
      team->fetch(hidden, rows, layer.out);
    }
    const PackedLinear& last = denoiser.trunk[denoiser.trunk_layers - 1];
    linear_store<Operand>(hidden, rows, last, bias_only(last), b.eps);

    Rows<float> z = b.z;
    if (call.noise) {
      convert_rows<Float32Operand>(call.noise + step_offset, columns, rows, columns, z);
    } else if (call.noise_scale != 0.0f) {
      if (step % noise_steps == 0) {
        const int left = call.steps - step;
        fill_normals(call.seed, static_cast<uint32_t>(step) + 1,
                     left < noise_steps ? left : noise_steps, span.first, rows, columns, z.data,
                     z.stride);
      }
      z.data = z.row((step % noise_steps) * rows);
    }
    solver_step(SolverStep(c, call.noise_scale, call.clip), rows, columns, b.x, b.x0, b.eps, z);
  }

  if (!team->leads()) return;
  if (call.trajectory) {
    write_rows(b.x, rows, columns,
               call.trajectory + call.steps * call.batch * columns + actions_before);
  }
  const Vec lower = broadcast(-call.clip), upper = broadcast(call.clip);
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < columns; n += W)
      store(b.x.row(i) + n, clamp(load(b.x.row(i) + n), lower, upper));
  write_rows(b.x, rows, columns, call.actions + actions_before);
}

template <class Operand>
static void run_by_team(const ReverseDiffusionCall& call, int threads) {
  const int rows = static_cast<int>(call.batch);
  Carver own_sizes{nullptr}, team_sizes{nullptr};
  ChainBuffers<Operand>::take(call, rows, &own_sizes, &team_sizes);
  run_team(threads, team_sizes.used, own_sizes.used, call.team.work,
           [&](Team* team, Carver shared, Carver own) {
             const auto buffers = ChainBuffers<Operand>::take(call, rows, &own, &shared);
             reverse_diffusion_tile(call, {0, rows}, buffers, team);
           });
}

template <class Operand>
static void run_by_tiles(const ReverseDiffusionCall& call) {
  const Tiles tiles(call.batch, call.threads);
  const auto take = [&](Carver* memory) {
    return ChainBuffers<Operand>::take(call, tiles.most_rows, memory, memory);
  };
  run_threads(tiles.threads, bytes_of(take), [&](Carver memory) {
    const auto buffers = take(&memory);
    Team alone;
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile)
      reverse_diffusion_tile(call, tiles[tile], buffers, &alone);
  });
}

template <class Operand>
static void reverse_diffusion(const ReverseDiffusionCall& call) {
  const DenoiserPack& denoiser = *call.denoiser;
  const bool one_tile = tile_count(call.batch, call.threads) == 1;
  const int team =
      one_tile ? team_size<Operand>(call.team, denoiser.trunk + 1, denoiser.trunk_layers - 2) : 1;
  if (team > 1) {
    run_by_team<Operand>(call, team);
  } else {
    run_by_tiles<Operand>(call);
  }
}

static void reverse_diffusion(const ReverseDiffusionCall& call) {
  with_operand(call.denoiser->precision,
               [&](auto operand) { reverse_diffusion<decltype(operand)>(call); });
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
