// Runs kernels of the NEON build beside the baseline's on the same numbers, at awkward sizes, and
// prints where they differ by more than rounding. test_native_build.py builds it for AArch64 and runs
// it in QEMU.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"

namespace diffcore {
namespace neon { extern const Kernels kernels; }
namespace baseline { extern const Kernels kernels; }
}  // namespace diffcore

using namespace diffcore;
using Floats = std::vector<float>;

static int failures = 0;

static float uniform() {  // in [-1, 1)
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<float>(static_cast<int32_t>(state >> 32)) / 2147483648.0f;
}

static Floats random(int64_t count, float scale = 1.0f) {
  Floats values(static_cast<size_t>(count));
  for (float& v : values) v = scale * uniform();
  return values;
}

static void compare(const std::string& what, const Floats& ours, const Floats& expected,
                    double bound) {
  double difference = 0.0, size = 0.0;
  bool finite = true;
  for (size_t i = 0; i < expected.size(); ++i) {
    finite = finite && std::isfinite(ours[i]) && std::isfinite(expected[i]);
    difference = std::fmax(difference, std::fabs(ours[i] - expected[i]));
    size = std::fmax(size, std::fabs(expected[i]));
  }
  const bool good = finite && size > 0.0 && difference <= bound * size;
  if (!good) ++failures;
  std::printf("%s %s: %.1e of %.1e\n", good ? "ok  " : "FAIL", what.c_str(), difference, size);
}

// Each by its own size: a small gradient is no rounding error of a large one.
static void compare(const std::string& what, const std::vector<Floats>& ours,
                    const std::vector<Floats>& expected, double bound) {
  for (size_t i = 0; i < expected.size(); ++i)
    compare(what + ", result " + std::to_string(i), ours[i], expected[i], bound);
}

constexpr int state_dim = 5, action_dim = 3, hidden = 37, batch = 19, steps = 6, threads = 2;
constexpr int wide = 277;  // whose packs are large enough to be filled by a team

struct Layers {
  std::vector<Floats> weights, biases;
  std::vector<LinearParameters> parameters;

  explicit Layers(const std::vector<int>& widths) {
    for (size_t l = 0; l + 1 < widths.size(); ++l) {
      const int in = widths[l], out = widths[l + 1];
      weights.push_back(random(int64_t{in} * out, 1.5f / std::sqrt(static_cast<float>(in))));
      biases.push_back(random(out, 0.3f));
    }
    for (size_t l = 0; l + 1 < widths.size(); ++l)
      parameters.push_back(
          {weights[l].data(), biases[l].data(), widths[l], widths[l + 1], widths[l], threads});
  }
};

template <class Pack>
struct Packed {
  void* memory = nullptr;
  Pack pack;
  void* allocate(int64_t bytes) {
    return memory = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  }
  ~Packed() { std::free(memory); }
};

static std::string named(const char* op, Activation activation, Precision precision) {
  return std::string(op) + ", activation " + std::to_string(static_cast<int>(activation)) +
         (precision == Precision::bfloat16 ? ", bf16" : "");
}

// bfloat16 values on either side of a rounding are 2^-8 apart.
static double bound(Precision precision) { return precision == Precision::bfloat16 ? 3e-2 : 2e-5; }

static void chain(Activation activation, Precision precision, int batch) {
  const int time_dim = 8;
  const Layers time({time_dim, 2 * time_dim, time_dim});
  const Layers trunk({action_dim + time_dim + state_dim, wide, wide, action_dim});
  const Floats embedding = random(steps * time_dim), state = random(batch * state_dim);
  Floats coefficients = random(steps * 7, 0.3f);
  DenoiserParameters p{};
  p.time_hidden = time.parameters[0];
  p.time_out = time.parameters[1];
  for (int l = 0; l < 3; ++l) p.trunk[l] = trunk.parameters[static_cast<size_t>(l)];
  p.trunk_layers = 3;
  p.action_dim = action_dim;
  p.state_dim = state_dim;
  p.activation = activation;
  p.precision = precision;
  p.time_embedding = embedding.data();
  p.steps = steps;
  const auto run = [&](const Kernels& kernels) {
    Packed<DenoiserPack> packed;
    kernels.pack_denoiser(p, packed.allocate(kernels.denoiser_pack_bytes(p)), &packed.pack);
    Floats actions(batch * action_dim);
    ReverseDiffusionCall call{};
    call.denoiser = &packed.pack;
    call.batch = batch;
    call.action_dim = action_dim;
    call.state_dim = state_dim;
    call.steps = steps;
    call.state = state.data();
    call.coefficients = coefficients.data();
    call.seed = 7;
    call.noise_scale = 1.0f;
    call.clip = 1.0f;
    call.actions = actions.data();
    call.threads = threads;
    TeamWork team_work = TeamWork::none;
    call.team = {threads, 1, &team_work};
    kernels.reverse_diffusion(call);
    return actions;
  };
  compare(named("reverse_diffusion", activation, precision), run(neon::kernels),
          run(baseline::kernels), bound(precision));
}

static void ascent(Activation activation, Precision precision, int batch) {
  const std::vector<int> widths = {state_dim + action_dim, wide, wide, 1};
  const Layers critics[2] = {Layers(widths), Layers(widths)};
  const Floats state = random(batch * state_dim), action = random(batch * action_dim, 0.5f);
  const auto run = [&](const Kernels& kernels) {
    TwinCriticParameters p{};
    Floats improved(batch * action_dim);
    ActionGradientCall call{};
    for (int q = 0; q < 2; ++q) {
      CriticParameters& critic = p.critics[q];
      critic.layer_count = 3;
      critic.state_dim = state_dim;
      critic.action_dim = action_dim;
      critic.activation = activation;
      critic.precision = precision;
      for (int l = 0; l < 3; ++l) critic.layers[l] = critics[q].parameters[static_cast<size_t>(l)];
    }
    Packed<TwinCriticPack> packed;
    void* memory = packed.allocate(kernels.twin_critic_pack_bytes(p));
    kernels.pack_twin_critic(p, memory, &packed.pack);
    for (int q = 0; q < 2; ++q) call.critics[q] = &packed.pack.critics[q];
    call.batch = batch;
    call.action_dim = action_dim;
    call.state_dim = state_dim;
    call.state = state.data();
    call.action = action.data();
    call.improved = improved.data();
    call.steps = steps;
    call.lr = 0.03f;
    call.eps = 1e-5f;
    call.max_norm = 0.3f;
    call.norm_clip = NormClip::batch;
    call.optimizer = ActionOptimizer::ascent;  // Adam would magnify rounding where gradients vanish
    call.low = -1.0f;
    call.high = 1.0f;
    call.threads = threads;
    TeamWork team_work = TeamWork::none;
    call.team = {threads, 1, &team_work};
    kernels.action_gradient(call);
    return improved;
  };
  compare(named("action_gradient", activation, precision), run(neon::kernels),
          run(baseline::kernels), bound(precision));
}

static void mlp(Activation activation, Precision precision) {
  const Layers layers({state_dim, hidden, hidden, 3});
  const Floats x = random(batch * state_dim), grad_y = random(batch * 3);
  const auto run = [&](const Kernels& kernels) {
    MlpParameters p{};
    p.layer_count = 3;
    p.precision = precision;
    p.forward = p.backward = p.backward_to_input = true;
    for (int l = 0; l < 3; ++l) {
      p.layers[l] = layers.parameters[static_cast<size_t>(l)];
      p.activations[l] = l < 2 ? activation : Activation::identity;
    }
    Packed<MlpPack> packed;
    kernels.pack_mlp(p, packed.allocate(kernels.mlp_pack_bytes(p)), &packed.pack);
    Floats saved(static_cast<size_t>(batch * kernels.mlp_saved_width(packed.pack)));
    Floats y(batch * 3), grad_x(batch * state_dim);
    MlpCall forward{};
    forward.networks[0] = &packed.pack;
    forward.network_count = 1;
    forward.batch = batch;
    forward.x = x.data();
    forward.y = y.data();
    forward.saved = saved.data();
    forward.threads = threads;
    kernels.mlp_forward(forward);
    std::vector<Floats> gradients;
    std::vector<float*> weights, biases;
    for (int l = 0; l < 3; ++l) {
      gradients.emplace_back(layers.weights[static_cast<size_t>(l)].size());
      weights.push_back(gradients.back().data());
      gradients.emplace_back(layers.biases[static_cast<size_t>(l)].size());
      biases.push_back(gradients.back().data());
    }
    MlpBackwardCall backward{};
    backward.networks[0] = &packed.pack;
    backward.network_count = 1;
    backward.batch = batch;
    backward.x = x.data();
    backward.saved = saved.data();
    backward.grad_y = grad_y.data();
    backward.grad_x = grad_x.data();
    backward.grad_weights = weights.data();
    backward.grad_biases = biases.data();
    backward.threads = threads;
    kernels.mlp_backward(backward);
    gradients.insert(gradients.end(), {y, grad_x});
    return gradients;
  };
  compare(named("mlp", activation, precision), run(neon::kernels), run(baseline::kernels),
          bound(precision));
}

static void critic_loss(Activation activation, Precision precision) {
  const std::vector<int> widths = {state_dim, hidden, hidden, 1};
  const Layers critics[2] = {Layers(widths), Layers(widths)};
  const Floats x = random(batch * state_dim), target = random(batch);
  const auto run = [&](const Kernels& kernels) {
    Packed<MlpPack> packed[2];
    CriticLossCall call{};
    std::vector<Floats> gradients;
    std::vector<float*> weights, biases;
    for (const Layers& critic : critics) {
      MlpParameters p{};
      p.layer_count = 3;
      p.precision = precision;
      p.forward = p.backward = p.backward_to_input = true;
      for (int l = 0; l < 3; ++l) {
        p.layers[l] = critic.parameters[static_cast<size_t>(l)];
        p.activations[l] = l < 2 ? activation : Activation::identity;
        gradients.emplace_back(critic.weights[static_cast<size_t>(l)].size());
        weights.push_back(gradients.back().data());
        gradients.emplace_back(critic.biases[static_cast<size_t>(l)].size());
        biases.push_back(gradients.back().data());
      }
      Packed<MlpPack>& pack = packed[call.network_count];
      kernels.pack_mlp(p, pack.allocate(kernels.mlp_pack_bytes(p)), &pack.pack);
      call.networks[call.network_count++] = &pack.pack;
    }
    Floats loss(1), q(2 * batch), grad_x(batch * state_dim);
    call.batch = batch;
    call.x = x.data();
    call.target = target.data();
    call.loss = loss.data();
    call.q = q.data();
    call.grad_x = grad_x.data();
    call.grad_weights = weights.data();
    call.grad_biases = biases.data();
    call.threads = threads;
    kernels.critic_loss(call);
    gradients.insert(gradients.end(), {loss, q, grad_x});
    return gradients;
  };
  compare(named("critic_loss", activation, precision), run(neon::kernels), run(baseline::kernels),
          bound(precision));
}

static void squashed_gaussian() {
  constexpr int actions = batch * action_dim;
  const Floats raw = random(2 * actions, 4.0f), noise = random(actions, 2.0f);
  const Floats grad_action = random(actions), grad_log_prob = random(batch);
  const auto run = [&](const Kernels& kernels) {
    Floats results(actions + batch + 4 * actions);
    float *log_prob = &results[actions], *saved = log_prob + batch, *grad_raw = saved + 2 * actions;
    kernels.squashed_gaussian({batch, action_dim, -5.0f, 2.0f, raw.data(), noise.data(),
                               results.data(), log_prob, saved});
    kernels.squashed_gaussian_backward({batch, action_dim, results.data(), saved,
                                        grad_action.data(), grad_log_prob.data(), grad_raw});
    return results;
  };
  compare("squashed_gaussian", run(neon::kernels), run(baseline::kernels), 2e-6);
}

static void rff(RffKind kind) {
  const int features = 29;
  const Layers layer({state_dim, features});
  const Floats x = random(batch * state_dim, 300.0f);  // arguments that need range reduction
  const auto run = [&](const Kernels& kernels) {
    Packed<PackedLinear> packed;
    void* memory = packed.allocate(kernels.layer_pack_bytes(layer.parameters[0], false));
    kernels.pack_layer(layer.parameters[0], false, memory, &packed.pack);
    Floats y(static_cast<size_t>(batch * features * (kind == RffKind::cos_sin ? 2 : 1)));
    RffCall call{};
    call.layer = &packed.pack;
    call.batch = batch;
    call.kind = kind;
    call.scale = 0.7f;
    call.x = x.data();
    call.y = y.data();
    call.threads = threads;
    kernels.rff_features(call);
    return y;
  };
  // The argument's own rounding, of up to 1e3, is all there is.
  compare("rff_features " + std::to_string(static_cast<int>(kind)), run(neon::kernels),
          run(baseline::kernels), 3e-4);
}

static void score_matching(Precision precision) {
  const int features = 23, width = 70;
  const Floats psi = random(batch * features), h = random(batch * width);
  const Floats weight = random(int64_t{features} * state_dim * width, 0.2f);
  const Floats bias = random(features * state_dim), offset = random(batch * state_dim);
  const Floats score_weight = random(batch);
  const auto run = [&](const Kernels& kernels) {
    Floats loss(1), grad_psi(psi.size()), grad_hidden(h.size()), grad_weight(weight.size());
    Floats grad_bias(bias.size());
    ScoreMatchingLossCall call{};
    call.batch = batch;
    call.features = features;
    call.state_dim = state_dim;
    call.hidden_dim = width;
    call.precision = precision;
    call.psi = psi.data();
    call.hidden = h.data();
    call.weight = weight.data();
    call.bias = bias.data();
    call.offset = offset.data();
    call.score_weight = score_weight.data();
    call.loss = loss.data();
    call.grad_psi = grad_psi.data();
    call.grad_hidden = grad_hidden.data();
    call.grad_weight = grad_weight.data();
    call.grad_bias = grad_bias.data();
    call.threads = threads;
    kernels.score_matching_loss(call);
    return std::vector<Floats>{loss, grad_psi, grad_hidden, grad_weight, grad_bias};
  };
  compare(named("score_matching_loss", Activation::identity, precision), run(neon::kernels),
          run(baseline::kernels), bound(precision));
}

static void normals() {
  const auto run = [](const Kernels& kernels) {
    Floats z(batch * 7);
    kernels.normals({11, 3, 5, batch, 7, z.data()});
    return z;
  };
  compare("normals", run(neon::kernels), run(baseline::kernels), 2e-6);
}

int main() {
  for (int a = 0; a <= static_cast<int>(Activation::cos); ++a) {
    const Activation activation = static_cast<Activation>(a);
    for (const Precision precision : {Precision::float32, Precision::bfloat16}) {
      chain(activation, precision, batch);
      ascent(activation, precision, batch);
      chain(activation, precision, 2);  // by a team
      ascent(activation, precision, 2);
      mlp(activation, precision);
      critic_loss(activation, precision);
    }
  }
  for (const RffKind kind : {RffKind::sin, RffKind::cos, RffKind::cos_sin}) rff(kind);
  for (const Precision precision : {Precision::float32, Precision::bfloat16})
    score_matching(precision);
  normals();
  squashed_gaussian();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
