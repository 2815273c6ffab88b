// All steps of the ascent of a batch of actions on min(Q1, Q2) in one call.
//
// Per step and tile: both critics forward, keeping the activations' slopes; then back to the action
// through the critic that attains the row's minimum only (through both, half each, on a tie). No
// parameter gradient is ever formed. The state's part of each first layer is computed once.
#pragma once

#include "operand.h"
#include "team.h"

namespace diffcore {
namespace DIFFCORE_ISA {

template <class Operand>
static void carve_critic(const CriticParameters& p, Carver* memory, CriticPack* pack,
                         Packer packer) {
  const int last = p.layer_count - 1;
  pack->layer_count = p.layer_count;
  pack->activation = p.activation;
  pack->precision = Operand::precision;
  pack->state_input = pack_linear<Float32Operand>(p.layers[0], 0, p.state_dim, Direction::forward,
                                                  true, packer, memory);
  pack->action_input = pack_linear<Float32Operand>(p.layers[0], p.state_dim, p.action_dim,
                                                   Direction::forward, false, packer, memory);
  for (int l = 1; l <= last; ++l) {
    pack->forward[l] = pack_linear<Operand>(p.layers[l], 0, p.layers[l].in, Direction::forward,
                                            true, packer, memory);
  }
  pack->backward[0] = pack_linear<Operand>(p.layers[0], p.state_dim, p.action_dim,
                                           Direction::backward, false, packer, memory);
  for (int l = 1; l < last; ++l) {
    pack->backward[l] = pack_linear<Operand>(p.layers[l], 0, p.layers[l].in, Direction::backward,
                                             false, packer, memory);
  }
  const int width = p.layers[last].in;
  float* output_weight = memory->take<float>(4 * static_cast<int64_t>(padded(width)));
  pack->output_weight = output_weight;
  if (!memory->base || packer.rank != 0) return;
  convert_rows<Float32Operand>(p.layers[last].weight, width, 1, width,
                               {output_weight, padded(width)});
}

static void carve_twin_critic(const TwinCriticParameters& p, Carver* memory, TwinCriticPack* pack,
                              Packer packer) {
  for (int q = 0; q < 2; ++q) {
    with_operand(p.critics[q].precision, [&](auto operand) {
      carve_critic<decltype(operand)>(p.critics[q], memory, &pack->critics[q], packer);
    });
  }
}

static int64_t twin_critic_pack_bytes(const TwinCriticParameters& p) {
  TwinCriticPack pack;
  return bytes_of([&](Carver* memory) { carve_twin_critic(p, memory, &pack, Packer()); });
}

static TeamWork pack_twin_critic(const TwinCriticParameters& p, void* block, TwinCriticPack* pack) {
  return pack_by_team(p.critics[0].layers[0].threads, twin_critic_pack_bytes(p), 0, block, pack,
                      [&](Carver* memory, TwinCriticPack* pieces, Team* team, Carver) {
                        carve_twin_critic(p, memory, pieces, team->packer());
                      });
}

// Of all rows of the batch, what is kept from step to step.
struct AscentState {
  Rows<float> action, gradient, first_moment, second_moment;
  Rows<float> state_part[2];
  double* row_norms[2];  // squared; one set for even steps, one for odd

  static AscentState take(const ActionGradientCall& call, Carver* memory) {
    AscentState s;
    s.action = take_rows<float>(memory, call.batch, call.action_dim);
    s.gradient = take_rows<float>(memory, call.batch, call.action_dim);
    s.first_moment = take_rows<float>(memory, call.batch, call.action_dim);
    s.second_moment = take_rows<float>(memory, call.batch, call.action_dim);
    for (int q = 0; q < 2; ++q) {
      s.state_part[q] = take_rows<float>(memory, call.batch, call.critics[q]->state_input.out);
      s.row_norms[q] = memory->take<double>(8 * call.batch);
    }
    return s;
  }
};

template <class Operand>
struct CriticBuffers {
  using Input = typename Operand::Input;
  Rows<Input> first_hidden[2];
  Rows<Input> wide_hidden[2][2];     // the team's: of each critic two, written by turns
  Rows<float> slope[2][max_layers];  // of all but the first layer the team's
  Rows<float> value[2];
  Rows<float> gradient[2];
  int* rows_of[2];  // rows whose minimum this critic attains

  // With one carver for both they serve a thread that is alone, and takes one critic after the other.
  static CriticBuffers take(const ActionGradientCall& call, int rows, Carver* memory,
                            Carver* team_memory) {
    CriticBuffers b;
    int widest = 0;
    for (int q = 0; q < 2; ++q) {
      const CriticPack& critic = *call.critics[q];
      for (int l = 0; l < critic.layer_count - 1; ++l) {
        const int width = l == 0 ? critic.state_input.out : critic.forward[l].out;
        widest = width > widest ? width : widest;
        b.slope[q][l] = take_rows<float>(l == 0 ? memory : team_memory, rows, width);
      }
      b.value[q] = take_rows<float>(memory, rows, 1);
      b.gradient[q] = take_rows<float>(memory, rows, call.action_dim);
      b.rows_of[q] = memory->take<int>(4 * rows);
    }
    const bool alone = memory == team_memory;
    for (int q = 0; q < 2; ++q) {
      for (int turn = 0; turn < 2; ++turn) {
        b.wide_hidden[q][turn] =
            alone && q == 1 ? b.wide_hidden[0][turn] : take_rows<Input>(team_memory, rows, widest);
      }
      b.first_hidden[q] = alone ? b.wide_hidden[q][1] : take_rows<Input>(memory, rows, widest);
    }
    return b;
  }
  // What the wide layer reads that writes at this turn, and which every thread computes for itself. A
  // thread that is alone needs no buffer to itself: the one that isn't next will do.
  Rows<Input> before_wide(const Team& team, int q, int turn) const {
    return team.alone() ? wide_hidden[q][turn ^ 1] : first_hidden[q];
  }
};

// Critics [first, last), which have equally many layers, side by side: values, and slopes for the way
// back.
//
// The team's buffers are written by turns, forward and backward: when one is written again, a barrier
// lies behind every thread's last look at it. So it is with slopes: those that other threads computed
// are read before the way back's first barrier. Forward and backward together take an even number of
// turns: every step begins with the same.
template <class Operand>
static void critics_forward(const ActionGradientCall& call, int first, int last, Span span,
                            const AscentState& s, const CriticBuffers<Operand>& b, Team* team) {
  const auto function = activate_function<Operand>(call.critics[first]->activation);
  const int rows = span.rows;
  int turn = 0;
  Rows<typename Operand::Input> hidden[2];
  for (int q = first; q < last; ++q) {
    const CriticPack& critic = *call.critics[q];
    const Offset offset = {critic.action_input.bias, s.state_part[q].row(span.first),
                           s.state_part[q].stride};
    hidden[q] = b.before_wide(*team, q, turn);
    linear_activate<Float32Operand, Operand>(rows_from(s.action, span.first), rows,
                                             critic.action_input, offset, function, hidden[q],
                                             b.slope[q][0]);
  }
  const int layers = call.critics[first]->layer_count;
  for (int l = 1; l < layers - 1; ++l, turn ^= 1) {
    for (int q = first; q < last; ++q) {
      share_of_layer<Operand>(*team, hidden[q], rows, call.critics[q]->forward[l], function,
                              b.wide_hidden[q][turn], b.slope[q][l]);
      hidden[q] = b.wide_hidden[q][turn];
    }
    team->wait();
    for (int q = first; q < last; ++q)
      team->fetch(hidden[q], rows, call.critics[q]->forward[l].out);
  }
  for (int q = first; q < last; ++q) {
    const PackedLinear& output = call.critics[q]->forward[layers - 1];
    linear_store<Operand>(hidden[q], rows, output, bias_only(output), b.value[q]);
  }
}

// b.gradient[q][i] = d Q_q / d action of row rows_of[q][i], for critics [first, last).
template <class Operand>
static void critics_backward(const ActionGradientCall& call, int first, int last,
                             const int (&count)[2], const CriticBuffers<Operand>& b, Team* team) {
  const int last_hidden = call.critics[first]->layer_count - 2;
  int turn = last_hidden & 1;
  Rows<typename Operand::Input> delta[2];
  for (int q = first; q < last; ++q) {
    const CriticPack& critic = *call.critics[q];
    delta[q] = b.before_wide(*team, q, turn);
    const int width = padded(critic.forward[last_hidden + 1].in);
    for (int i = 0; i < count[q]; ++i) {
      const float* slope = b.slope[q][last_hidden].row(b.rows_of[q][i]);
      for (int n = 0; n < width; n += W)
        Operand::store_activation(delta[q].row(i) + n,
                                  load(critic.output_weight + n) * load(slope + n));
    }
  }
  for (int l = last_hidden; l >= 1; --l, turn ^= 1) {
    for (int q = first; q < last; ++q) {
      const PackedLinear& layer = call.critics[q]->backward[l];
      const Columns mine = team->template share<typename Operand::Input>(layer.out);
      const PackedLinear share = layer_columns<Operand>(layer, mine.first, mine.count);
      const auto out = columns_from(b.wide_hidden[q][turn], mine.first);
      const auto slope = columns_from(b.slope[q][l - 1], mine.first);
      const int* rows_of = b.rows_of[q];
      linear<Operand>(
          delta[q].data, delta[q].stride, count[q], share, bias_only(share),
          [&](int row, int block, int column, int columns, const float* sums, ptrdiff_t stride) {
            for (int i = 0; i < block; ++i)
              for (int n = 0; n < columns; n += W)
                Operand::store_activation(
                    out.row(row + i) + column + n,
                    load(sums + i * stride + n) * load(slope.row(rows_of[row + i]) + column + n));
          });
      delta[q] = b.wide_hidden[q][turn];
    }
    team->wait();
    for (int q = first; q < last; ++q)
      team->fetch(delta[q], count[q], call.critics[q]->backward[l].out);
  }
  for (int q = first; q < last; ++q) {
    const PackedLinear& input = call.critics[q]->backward[0];
    linear_store<Operand>(delta[q], count[q], input, bias_only(input), b.gradient[q]);
  }
}

// Gradient of -min(Q1, Q2) for the rows of a tile, and every row's squared norm.
template <class Operand>
static void descent_gradient(const ActionGradientCall& call, Span span, const AscentState& s,
                             const CriticBuffers<Operand>& b, double* row_norms, Team* team) {
  const int rows = span.rows, columns = call.action_dim;
  const int together = team->alone() ? 1 : 2;  // a team meets once for both critics
  for (int q = 0; q < 2; q += together) critics_forward(call, q, q + together, span, s, b, team);
  // Which critic a row goes through nobody can predict: it is written to both lists, and counted in its own.
  int count[2] = {0, 0};
  for (int i = 0; i < rows; ++i) {
    const float q1 = *b.value[0].row(i), q2 = *b.value[1].row(i);
    b.rows_of[0][count[0]] = i;
    b.rows_of[1][count[1]] = i;
    count[0] += !(q2 < q1);
    count[1] += !(q1 < q2);
    for (int n = 0; n < columns; n += W) store(s.gradient.row(span.first + i) + n, zero());
  }
  for (int q = 0; q < 2; q += together) critics_backward(call, q, q + together, count, b, team);
  for (int q = 0; q < 2; ++q) {
    for (int i = 0; i < count[q]; ++i) {
      const int row = b.rows_of[q][i];
      const float q1 = *b.value[0].row(row), q2 = *b.value[1].row(row);
      // A NaN reaches the action even where the slopes don't carry it (relu's is 0 or 1).
      const Vec share = broadcast(q1 < q2 || q2 < q1 ? 1.0f : q1 == q2 ? 0.5f : q1 + q2);
      float* g = s.gradient.row(span.first + row);
      for (int n = 0; n < columns; n += W)
        store(g + n, fnma(share, load(b.gradient[q].row(i) + n), load(g + n)));
    }
  }
  for (int i = 0; i < rows; ++i) {
    const float* g = s.gradient.row(span.first + i);
    double sum = 0.0;
    for (int n = 0; n < columns; ++n) sum += static_cast<double>(g[n]) * g[n];
    row_norms[span.first + i] = sum;
  }
}

// torch.nn.utils.clip_grad_norm_'s factor.
DIFFCORE_INLINE float clip_factor(double squared_norm, float max_norm) {
  const float factor = max_norm / (static_cast<float>(__builtin_sqrt(squared_norm)) + 1e-6f);
  return factor < 1.0f ? factor : factor != factor ? factor : 1.0f;
}

// The factor that the whole batch has in common, once all row norms are there: every thread sums them
// up in the same order.
DIFFCORE_INLINE float batch_factor(const ActionGradientCall& call, const double* row_norms) {
  if (call.norm_clip != NormClip::batch) return 1.0f;
  double sum = 0.0;
  for (int64_t row = 0; row < call.batch; ++row) sum += row_norms[row];
  return clip_factor(sum, call.max_norm);
}

// Bias corrections of Adam at a step, computed as torch does, in double.
struct AdamStep {
  float step_size;
  float root_correction;
};

class AdamSteps {
 public:
  explicit AdamSteps(float lr) : lr_(lr) {}
  AdamStep next() {
    power1_ *= 0.9;
    power2_ *= 0.999;
    return {static_cast<float>(lr_ / (1.0 - power1_)),
            static_cast<float>(__builtin_sqrt(1.0 - power2_))};
  }

 private:
  float lr_;
  double power1_ = 1.0, power2_ = 1.0;
};

DIFFCORE_INLINE void update_actions(const ActionGradientCall& call, Span span, const AscentState& s,
                                    AdamStep adam, const double* row_norms, float common_factor) {
  const Vec beta1 = broadcast(0.9f), beta2 = broadcast(0.999f);
  const Vec rest1 = broadcast(0.1f), rest2 = broadcast(0.001f);  // 1 - 0.9f isn't 0.1f
  const Vec low = broadcast(call.low), high = broadcast(call.high), eps = broadcast(call.eps);
  for (int64_t row = span.first; row < span.first + span.rows; ++row) {
    const Vec factor =
        broadcast(call.norm_clip == NormClip::row ? clip_factor(row_norms[row], call.max_norm)
                                                  : common_factor);
    for (int n = 0; n < call.action_dim; n += W) {
      const Vec g = load(s.gradient.row(row) + n) * factor;
      float* action = s.action.row(row) + n;
      Vec a = load(action);
      if (call.optimizer == ActionOptimizer::adam) {
        float *m = s.first_moment.row(row) + n, *v = s.second_moment.row(row) + n;
        const Vec m_new = fma(rest1, g, beta1 * load(m)),
                  v_new = fma(rest2 * g, g, beta2 * load(v));
        store(m, m_new);
        store(v, v_new);
        const Vec denominator = sqrt(v_new) / broadcast(adam.root_correction) + eps;
        a = fnma(broadcast(adam.step_size), m_new / denominator, a);
      } else {
        a = fnma(broadcast(call.lr), g, a);
      }
      store(action, clamp(a, low, high));
    }
  }
}

// What comes before the steps, for the rows of a tile.
static void begin_ascent(const ActionGradientCall& call, Span span, const AscentState& s) {
  clear_rows(rows_from(s.first_moment, span.first), span.rows);
  clear_rows(rows_from(s.second_moment, span.first), span.rows);
  convert_rows<Float32Operand>(call.action + span.first * call.action_dim, call.action_dim,
                               span.rows, call.action_dim, rows_from(s.action, span.first));
  const Rows<float> state = {const_cast<float*>(call.state) + span.first * call.state_dim,
                             call.state_dim};
  for (int q = 0; q < 2; ++q) {
    const PackedLinear& layer = call.critics[q]->state_input;
    linear_store<Float32Operand>(state, span.rows, layer, bias_only(layer),
                                 rows_from(s.state_part[q], span.first));
  }
}

static void end_ascent(const ActionGradientCall& call, Span span, const AscentState& s) {
  write_rows(rows_from(s.action, span.first), span.rows, call.action_dim,
             call.improved + span.first * call.action_dim);
}

// Every thread has the whole state to itself: all but the wide layers is thin, and done by each, with
// the same instructions on the same numbers.
template <class Operand>
static void ascend_by_team(const ActionGradientCall& call, int threads) {
  const Span all = {0, static_cast<int>(call.batch)};
  Carver own_sizes{nullptr}, team_sizes{nullptr};
  AscentState::take(call, &own_sizes);
  CriticBuffers<Operand>::take(call, all.rows, &own_sizes, &team_sizes);
  const auto ascend = [&](Team* team, Carver shared, Carver own) {
    const AscentState s = AscentState::take(call, &own);
    const auto buffers = CriticBuffers<Operand>::take(call, all.rows, &own, &shared);
    begin_ascent(call, all, s);
    AdamSteps adam(call.lr);
    for (int step = 0; step < call.steps; ++step) {
      double* row_norms = s.row_norms[0];
      descent_gradient(call, all, s, buffers, row_norms, team);
      update_actions(call, all, s, adam.next(), row_norms, batch_factor(call, row_norms));
    }
    if (team->leads()) end_ascent(call, all, s);
  };
  run_team(threads, team_sizes.used, own_sizes.used, call.team.work, ascend);
}

template <class Operand>
static void ascend_by_tiles(const ActionGradientCall& call) {
  const Tiles tiles(call.batch, call.threads);
  const auto take_state = [&](Carver* memory) { return AscentState::take(call, memory); };
  Carver call_memory{thread_scratch(Scratch::call, bytes_of(take_state))};
  const AscentState s = take_state(&call_memory);

  const auto take = [&](Carver* memory) {
    return CriticBuffers<Operand>::take(call, tiles.most_rows, memory, memory);
  };
  run_threads(tiles.threads, bytes_of(take), [&](Carver memory) {
    const auto buffers = take(&memory);
    Team alone;

#pragma omp for schedule(static, 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) begin_ascent(call, tiles[tile], s);

    AdamSteps adam(call.lr);
    for (int step = 0; step < call.steps; ++step) {
      double* row_norms = s.row_norms[step & 1];
      // The end of this loop is a barrier: after it all row norms are there. The next step writes
      // the other set, so a thread still summing this one is not disturbed.
#pragma omp for schedule(static, 1)
      for (int64_t tile = 0; tile < tiles.count; ++tile)
        descent_gradient(call, tiles[tile], s, buffers, row_norms, &alone);

      const float common_factor = batch_factor(call, row_norms);
      const AdamStep adam_step = adam.next();
#pragma omp for schedule(static, 1) nowait
      for (int64_t tile = 0; tile < tiles.count; ++tile)
        update_actions(call, tiles[tile], s, adam_step, row_norms, common_factor);
    }

#pragma omp for schedule(static, 1)
    for (int64_t tile = 0; tile < tiles.count; ++tile) end_ascent(call, tiles[tile], s);
  });
}

template <class Operand>
static void action_gradient(const ActionGradientCall& call) {
  const CriticPack &critic = *call.critics[0], &other = *call.critics[1];
  const bool one_tile = tile_count(call.batch, call.threads) == 1;
  const int team = one_tile && critic.layer_count == other.layer_count
                       ? team_size<Operand>(call.team, critic.forward + 1, critic.layer_count - 2)
                       : 1;
  if (team > 1) {
    ascend_by_team<Operand>(call, team);
  } else {
    ascend_by_tiles<Operand>(call);
  }
}

static void action_gradient(const ActionGradientCall& call) {
  with_operand(call.critics[0]->precision,
               [&](auto operand) { action_gradient<decltype(operand)>(call); });
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
