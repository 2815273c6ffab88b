// All steps of the ascent of a batch of actions on min(Q1, Q2) in one call.
//
// Per step and tile: both critics forward, keeping the activations' slopes; then back to the action
// through the critic that attains the row's minimum only (through both, half each, on a tie). No
// parameter gradient is ever formed. The state's part of each first layer is computed once.
#pragma once

#include "layers.h"

namespace diffcore {
namespace DIFFCORE_ISA {

template <class Operand>
static void carve_critic(const CriticParameters& p, Carver* memory, CriticPack* pack) {
  const int last = p.layer_count - 1;
  pack->layer_count = p.layer_count;
  pack->activation = p.activation;
  pack->precision = Operand::precision;
  pack->state_input =
      pack_linear<Float32Operand>(p.layers[0], 0, p.state_dim, Direction::forward, true, memory);
  pack->action_input = pack_linear<Float32Operand>(p.layers[0], p.state_dim, p.action_dim,
                                                   Direction::forward, false, memory);
  for (int l = 1; l <= last; ++l) {
    pack->forward[l] =
        pack_linear<Operand>(p.layers[l], 0, p.layers[l].in, Direction::forward, true, memory);
  }
  pack->backward[0] = pack_linear<Operand>(p.layers[0], p.state_dim, p.action_dim,
                                           Direction::backward, false, memory);
  for (int l = 1; l < last; ++l) {
    pack->backward[l] =
        pack_linear<Operand>(p.layers[l], 0, p.layers[l].in, Direction::backward, false, memory);
  }
  const int width = p.layers[last].in;
  float* output_weight = memory->take<float>(4 * static_cast<int64_t>(padded(width)));
  pack->output_weight = output_weight;
  if (!memory->base) return;
  copy_rows(p.layers[last].weight, width, 1, width, {output_weight, padded(width)});
}

static void carve_critic(const CriticParameters& p, Carver* memory, CriticPack* pack) {
  if (p.precision == Precision::bfloat16) {
    carve_critic<Bfloat16Operand>(p, memory, pack);
  } else {
    carve_critic<Float32Operand>(p, memory, pack);
  }
}

static int64_t critic_pack_bytes(const CriticParameters& p) {
  Carver memory{nullptr};
  CriticPack pack;
  carve_critic(p, &memory, &pack);
  return memory.used;
}

static void pack_critic(const CriticParameters& p, void* block, CriticPack* pack) {
  Carver memory{static_cast<char*>(block)};
  carve_critic(p, &memory, pack);
}

// What outlives a tile's turn: one set for the whole batch.
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
  Rows<Input> hidden[2];
  Rows<float> slope[2][max_layers];
  Rows<float> value[2];
  Rows<float> gradient;
  int* rows_of[2];  // rows whose minimum this critic attains

  static CriticBuffers take(const ActionGradientCall& call, int rows, Carver* memory) {
    CriticBuffers b;
    int widest = 0;
    for (int q = 0; q < 2; ++q) {
      const CriticPack& critic = *call.critics[q];
      for (int l = 0; l < critic.layer_count - 1; ++l) {
        const int width = l == 0 ? critic.state_input.out : critic.forward[l].out;
        widest = width > widest ? width : widest;
        b.slope[q][l] = take_rows<float>(memory, rows, width);
      }
      b.value[q] = take_rows<float>(memory, rows, 1);
      b.rows_of[q] = memory->take<int>(4 * rows);
    }
    for (auto& h : b.hidden) h = take_rows<Input>(memory, rows, widest);
    b.gradient = take_rows<float>(memory, rows, call.action_dim);
    return b;
  }
};

template <class Operand>
static void critic_forward(const CriticPack& critic, Rows<float> action, Rows<float> state_part,
                           int rows, const CriticBuffers<Operand>& b, const Rows<float>* slope,
                           Rows<float> value) {
  const auto function = activate_function<Operand>(critic.activation);
  const Offset first = {critic.action_input.bias, state_part.data, state_part.stride};
  linear_activate<Float32Operand, Operand>(action, rows, critic.action_input, first, function,
                                           b.hidden[0], slope[0]);
  int current = 0;
  for (int l = 1; l < critic.layer_count - 1; ++l, current ^= 1) {
    linear_activate<Operand, Operand>(b.hidden[current], rows, critic.forward[l],
                                      bias_only(critic.forward[l]), function, b.hidden[current ^ 1],
                                      slope[l]);
  }
  const PackedLinear& last = critic.forward[critic.layer_count - 1];
  linear_store<Operand>(b.hidden[current], rows, last, bias_only(last), value);
}

// b.gradient[i] = d Q / d action of row rows_of[i].
template <class Operand>
static void critic_backward(const CriticPack& critic, const int* rows_of, int count,
                            const CriticBuffers<Operand>& b, const Rows<float>* slope) {
  const int last_hidden = critic.layer_count - 2;
  for (int i = 0; i < count; ++i) {
    const float* s = slope[last_hidden].row(rows_of[i]);
    const int width = padded(critic.forward[critic.layer_count - 1].in);
    for (int n = 0; n < width; n += W)
      Operand::store_activation(b.hidden[0].row(i) + n,
                                load(critic.output_weight + n) * load(s + n));
  }
  int current = 0;
  for (int l = last_hidden; l >= 1; --l, current ^= 1) {
    const PackedLinear& layer = critic.backward[l];
    linear<Operand>(
        b.hidden[current].data, b.hidden[current].stride, count, layer, bias_only(layer),
        [&](int row, int block, int column, int columns, const float* sums, ptrdiff_t stride) {
          for (int i = 0; i < block; ++i) {
            const float* s = slope[l - 1].row(rows_of[row + i]) + column;
            auto* out = b.hidden[current ^ 1].row(row + i) + column;
            for (int n = 0; n < columns; n += W)
              Operand::store_activation(out + n, load(sums + i * stride + n) * load(s + n));
          }
        });
  }
  linear_store<Operand>(b.hidden[current], count, critic.backward[0], bias_only(critic.backward[0]),
                        b.gradient);
}

// Gradient of -min(Q1, Q2) for the rows of a tile, and every row's squared norm.
template <class Operand>
static void descent_gradient(const ActionGradientCall& call, Span span, const AscentState& s,
                             const CriticBuffers<Operand>& b, double* row_norms) {
  const int rows = span.rows, columns = call.action_dim;
  const Rows<float> action = {s.action.row(span.first), s.action.stride};
  for (int q = 0; q < 2; ++q) {
    const Rows<float> part = {s.state_part[q].row(span.first), s.state_part[q].stride};
    critic_forward(*call.critics[q], action, part, rows, b, b.slope[q], b.value[q]);
  }
  int count[2] = {0, 0};
  for (int i = 0; i < rows; ++i) {
    const float q1 = *b.value[0].row(i), q2 = *b.value[1].row(i);
    if (!(q2 < q1)) b.rows_of[0][count[0]++] = i;
    if (!(q1 < q2)) b.rows_of[1][count[1]++] = i;
    memset(s.gradient.row(span.first + i), 0, sizeof(float) * static_cast<size_t>(padded(columns)));
  }
  for (int q = 0; q < 2; ++q) {
    critic_backward(*call.critics[q], b.rows_of[q], count[q], b, b.slope[q]);
    for (int i = 0; i < count[q]; ++i) {
      const int row = b.rows_of[q][i];
      const float q1 = *b.value[0].row(row), q2 = *b.value[1].row(row);
      // A NaN reaches the action even where the slopes don't carry it (relu's is 0 or 1).
      const float share = q1 < q2 || q2 < q1 ? 1.0f : q1 == q2 ? 0.5f : q1 + q2;
      float* g = s.gradient.row(span.first + row);
      for (int n = 0; n < columns; ++n) g[n] -= share * b.gradient.row(i)[n];
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

// Bias corrections of Adam at a step, computed as torch does, in double.
struct AdamStep {
  float step_size;
  float root_correction;
};

DIFFCORE_INLINE void update_actions(const ActionGradientCall& call, Span span, const AscentState& s,
                                    AdamStep adam, const double* row_norms, float batch_factor) {
  const Vec beta1 = broadcast(0.9f), beta2 = broadcast(0.999f);
  const Vec rest1 = broadcast(0.1f), rest2 = broadcast(0.001f);  // 1 - 0.9f isn't 0.1f
  const Vec low = broadcast(call.low), high = broadcast(call.high), eps = broadcast(call.eps);
  for (int64_t row = span.first; row < span.first + span.rows; ++row) {
    const Vec factor =
        broadcast(call.norm_clip == NormClip::row ? clip_factor(row_norms[row], call.max_norm)
                                                  : batch_factor);
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

template <class Operand>
static void action_gradient(const ActionGradientCall& call) {
  const int64_t tiles = tile_count(call.batch, call.threads);
  const int threads = tiles < call.threads ? static_cast<int>(tiles) : call.threads;
  const int most_rows = tile_span(call.batch, tiles, 0).rows;
  Carver sizes{nullptr};
  AscentState::take(call, &sizes);
  Carver call_memory{thread_scratch(Scratch::call, sizes.used)};
  const AscentState s = AscentState::take(call, &call_memory);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver tile_sizes{nullptr};
    CriticBuffers<Operand>::take(call, most_rows, &tile_sizes);
    Carver memory{thread_scratch(Scratch::tile, tile_sizes.used)};
    const auto buffers = CriticBuffers<Operand>::take(call, most_rows, &memory);

#pragma omp for schedule(static, 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Span span = tile_span(call.batch, tiles, tile);
      clear_rows({s.first_moment.row(span.first), s.first_moment.stride}, span.rows);
      clear_rows({s.second_moment.row(span.first), s.second_moment.stride}, span.rows);
      copy_rows(call.action + span.first * call.action_dim, call.action_dim, span.rows,
                call.action_dim, {s.action.row(span.first), s.action.stride});
      const Rows<float> state = {const_cast<float*>(call.state) + span.first * call.state_dim,
                                 call.state_dim};
      for (int q = 0; q < 2; ++q) {
        const PackedLinear& layer = call.critics[q]->state_input;
        linear_store<Float32Operand>(state, span.rows, layer, bias_only(layer),
                                     {s.state_part[q].row(span.first), s.state_part[q].stride});
      }
    }

    double power1 = 1.0, power2 = 1.0;
    for (int step = 0; step < call.steps; ++step) {
      double* row_norms = s.row_norms[step & 1];
      // The end of this loop is a barrier: after it all row norms are there. The next step writes
      // the other set, so a thread still summing this one is not disturbed.
#pragma omp for schedule(static, 1)
      for (int64_t tile = 0; tile < tiles; ++tile)
        descent_gradient(call, tile_span(call.batch, tiles, tile), s, buffers, row_norms);

      float batch_factor = 1.0f;
      if (call.norm_clip == NormClip::batch) {
        double sum = 0.0;  // by every thread, in the same order
        for (int64_t row = 0; row < call.batch; ++row) sum += row_norms[row];
        batch_factor = clip_factor(sum, call.max_norm);
      }
      power1 *= 0.9;
      power2 *= 0.999;
      const AdamStep adam = {static_cast<float>(call.lr / (1.0 - power1)),
                             static_cast<float>(__builtin_sqrt(1.0 - power2))};
#pragma omp for schedule(static, 1) nowait
      for (int64_t tile = 0; tile < tiles; ++tile)
        update_actions(call, tile_span(call.batch, tiles, tile), s, adam, row_norms, batch_factor);
    }

#pragma omp for schedule(static, 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Span span = tile_span(call.batch, tiles, tile);
      write_rows({s.action.row(span.first), s.action.stride}, span.rows, call.action_dim,
                 call.improved + span.first * call.action_dim);
    }
  }
}

static void action_gradient(const ActionGradientCall& call) {
  if (call.critics[0]->precision == Precision::bfloat16) {
    action_gradient<Bfloat16Operand>(call);
  } else {
    action_gradient<Float32Operand>(call);
  }
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
