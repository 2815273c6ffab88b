// The Python face of the CPU kernels: addresses, sizes and lists of parameters in, and hardly anything
// checked. What is wrong with an argument is said in diffcore/ops/<op>/__init__.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/dispatch.h"
#include "bindings.h"
#include "tensors.h"

namespace py = pybind11;
using namespace diffcore;

namespace {

// `threads` read and pack it.
LinearParameters linear_parameters(const Layer& layer, int threads) {
  const auto& [weight, bias, in, out] = layer;
  return {pointer<const float>(weight), pointer<const float>(bias), in, out, in, threads};
}

// Lists of layers have so many places.
void check_layer_count(size_t count, size_t least = 1) {
  if (count < least || count > max_layers)
    throw std::invalid_argument("networks of " + std::to_string(least) + " to " +
                                std::to_string(max_layers) + " layers are expected, got " +
                                std::to_string(count));
}

// A denoiser's layers are its time MLP's two, then the trunk's.
int trunk_layer_count(const Layers& layers, size_t least) {
  if (layers.size() < 2) throw std::invalid_argument("a time MLP of two layers is expected");
  check_layer_count(layers.size() - 2, least);
  return static_cast<int>(layers.size()) - 2;
}

// The threads of a call of which a team may run the only tile, if there is but one; and how long it took.
class TeamCall {
 public:
  TeamCall(int64_t batch, int wanted)
      : threads_(usable_threads(wanted)),
        team_(team_options(threads_, &work_)),
        small_(batch < least_shared_rows) {}
  TeamCall(const TeamCall&) = delete;  // team_ refers to work_

  int threads() const { return threads_; }
  const TeamOptions& team() const { return team_; }
  // Before a call of milliseconds it doesn't matter how the threads that packed were woken.
  int packing_threads() const { return small_ ? team_.threads : threads_; }
  TeamWork* packing_work() { return small_ ? &work_ : nullptr; }
  void end() const { team_ended(start_, work_); }

 private:
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  TeamWork work_;
  const int threads_;
  const TeamOptions team_;
  const bool small_;
};

void reverse_diffusion(const Layers& layers, int action_dim, int state_dim, Activation activation,
                       Precision precision, Address time_embedding, int steps, Address coefficients,
                       int64_t batch, Address state, Address x_init, Address noise, uint64_t seed,
                       float noise_scale, float clip, Address trajectory, Address actions,
                       int threads) {
  TeamCall run(batch, threads);
  const int packing = run.packing_threads();
  DenoiserParameters parameters{};
  parameters.trunk_layers = trunk_layer_count(layers, 2);
  parameters.time_hidden = linear_parameters(layers[0], packing);
  parameters.time_out = linear_parameters(layers[1], packing);
  for (int l = 0; l < parameters.trunk_layers; ++l)
    parameters.trunk[l] = linear_parameters(layers[l + 2], packing);
  parameters.action_dim = action_dim;
  parameters.state_dim = state_dim;
  parameters.activation = activation;
  parameters.precision = precision;
  parameters.time_embedding = pointer<const float>(time_embedding);
  parameters.steps = steps;
  const auto denoiser = packed_denoiser(parameters, run.packing_work());

  ReverseDiffusionCall call{};
  call.denoiser = &denoiser->pack;
  call.batch = batch;
  call.action_dim = action_dim;
  call.state_dim = state_dim;
  call.steps = steps;
  call.state = pointer<const float>(state);
  call.x_init = pointer<const float>(x_init);
  call.noise = pointer<const float>(noise);
  call.coefficients = pointer<const float>(coefficients);
  call.seed = seed;
  call.noise_scale = noise_scale;
  call.clip = clip;
  call.trajectory = pointer<float>(trajectory);
  call.actions = pointer<float>(actions);
  call.threads = run.threads();
  call.team = run.team();
  active_kernels().reverse_diffusion(call);
  run.end();
}

void reverse_step(int64_t count, Address x, Address eps, Address noise, Address x0_previous,
                  const std::array<float, 7>& coefficients, float noise_scale, float clip,
                  Address next, Address x0) {
  active_kernels().reverse_step({count, pointer<const float>(x), pointer<const float>(eps),
                                 pointer<const float>(noise), pointer<const float>(x0_previous),
                                 coefficients.data(), noise_scale, clip, pointer<float>(next),
                                 pointer<float>(x0)});
}

void action_gradient(const Layers& first, const Layers& second, int action_dim, int state_dim,
                     Activation activation, Precision precision, int64_t batch, Address state,
                     Address action, Address improved, int steps, float lr, float eps,
                     float max_norm, NormClip norm_clip, ActionOptimizer optimizer, float low,
                     float high, int threads) {
  TeamCall run(batch, threads);
  const int packing = run.packing_threads();
  TwinCriticParameters parameters{};
  for (int q = 0; q < 2; ++q) {
    const Layers& layers = q == 0 ? first : second;
    check_layer_count(layers.size(), 2);
    CriticParameters& critic = parameters.critics[q];
    critic.layer_count = static_cast<int>(layers.size());
    for (int l = 0; l < critic.layer_count; ++l)
      critic.layers[l] = linear_parameters(layers[l], packing);
    critic.state_dim = state_dim;
    critic.action_dim = action_dim;
    critic.activation = activation;
    critic.precision = precision;
  }
  const auto critics = packed_twin_critic(parameters, run.packing_work());

  ActionGradientCall call{};
  for (int q = 0; q < 2; ++q) call.critics[q] = &critics->pack.critics[q];
  call.batch = batch;
  call.action_dim = action_dim;
  call.state_dim = state_dim;
  call.state = pointer<const float>(state);
  call.action = pointer<const float>(action);
  call.improved = pointer<float>(improved);
  call.steps = steps;
  call.lr = lr;
  call.eps = eps;
  call.max_norm = max_norm;
  call.norm_clip = norm_clip;
  call.optimizer = optimizer;
  call.low = low;
  call.high = high;
  call.threads = run.threads();
  call.team = run.team();
  active_kernels().action_gradient(call);
  run.end();
}

// Networks of one shape, as [network 0's layers, network 1's layers, ...].
MlpParameters mlp_parameters(const Layer* layers, const std::vector<Activation>& activations,
                             Precision precision, int threads) {
  MlpParameters parameters{};
  parameters.precision = precision;
  parameters.layer_count = static_cast<int>(activations.size());
  for (int l = 0; l < parameters.layer_count; ++l) {
    parameters.layers[l] = linear_parameters(layers[l], threads);
    parameters.activations[l] = activations[l];
  }
  return parameters;
}

using PackedMlp = std::shared_ptr<const Packed<MlpPack>>;

// Which ways through a network will be taken.
struct Directions {
  bool forward, backward, backward_to_input;
};

std::vector<PackedMlp> packed_mlps(const Layers& layers, const std::vector<Activation>& activations,
                                   Precision precision, Directions directions, int threads) {
  // Memory is sized by the first network, and lists have places for so many. The callers check; this is
  // what keeps a mistake there from writing beside it.
  check_layer_count(activations.size());
  const size_t networks = layers.size() / activations.size();
  if (networks < 1 || networks > max_networks)
    throw std::invalid_argument("1 to " + std::to_string(max_networks) +
                                " networks of one shape are expected, got " +
                                std::to_string(networks));
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer &layer = layers[l], &alike = layers[l % activations.size()];
    if (layers.size() % activations.size() != 0 || std::get<2>(layer) != std::get<2>(alike) ||
        std::get<3>(layer) != std::get<3>(alike))
      throw std::invalid_argument(
          "networks of one shape, with an activation a layer, are expected");
  }
  std::vector<PackedMlp> packed;
  for (size_t first = 0; first < layers.size(); first += activations.size()) {
    MlpParameters parameters = mlp_parameters(&layers[first], activations, precision, threads);
    parameters.forward = directions.forward;
    parameters.backward = directions.backward;
    parameters.backward_to_input = directions.backward_to_input;
    packed.push_back(packed_mlp(parameters));
  }
  return packed;
}

// Addresses of [weight, bias, weight, bias, ...] as the kernels take them.
struct GradientAddresses {
  std::array<float*, max_networks * max_layers> weights;
  std::array<float*, max_networks * max_layers> biases;
  bool wanted;

  GradientAddresses(const std::vector<Address>& parameters, const Layers& layers)
      : wanted(!parameters.empty()) {
    if (layers.size() > weights.size() || (wanted && parameters.size() != 2 * layers.size()))
      throw std::invalid_argument("a gradient of every weight and bias, or none, is expected");
    for (size_t l = 0; l < parameters.size() / 2; ++l) {
      weights[l] = pointer<float>(parameters[2 * l]);
      biases[l] = pointer<float>(parameters[2 * l + 1]);
    }
  }
  float* const* weight_list() const { return wanted ? weights.data() : nullptr; }
  float* const* bias_list() const { return wanted ? biases.data() : nullptr; }
};

int mlp_saved_width(const Layers& layers, const std::vector<Activation>& activations,
                    Precision precision) {
  MlpPack shape{};
  shape.precision = precision;
  check_layer_count(activations.size());
  if (layers.size() < activations.size())
    throw std::invalid_argument("a layer for every activation is expected");
  shape.layer_count = static_cast<int>(activations.size());
  for (int l = 0; l < shape.layer_count; ++l) {
    shape.forward[l].in = std::get<2>(layers[l]);
    shape.forward[l].out = std::get<3>(layers[l]);
    shape.activations[l] = activations[l];
  }
  return active_kernels().mlp_saved_width(shape);
}

void mlp_forward(const Layers& layers, const std::vector<Activation>& activations,
                 Precision precision, int64_t batch, Address x, Address y, Address saved,
                 int threads) {
  threads = threads_for(batch, threads);
  const std::vector<PackedMlp> networks =
      packed_mlps(layers, activations, precision, {true, false, false}, threads);
  MlpCall call{};
  for (const auto& network : networks) call.networks[call.network_count++] = &network->pack;
  call.batch = batch;
  call.x = pointer<const float>(x);
  call.y = pointer<float>(y);
  call.saved = pointer<float>(saved);
  call.threads = threads;
  active_kernels().mlp_forward(call);
}

void mlp_backward(const Layers& layers, const std::vector<Activation>& activations,
                  Precision precision, int64_t batch, Address x, Address saved, Address grad_y,
                  Address grad_x, const std::vector<Address>& grad_parameters, int threads) {
  threads = threads_for(batch, threads);
  const std::vector<PackedMlp> networks =
      packed_mlps(layers, activations, precision, {false, true, grad_x != 0}, threads);
  const GradientAddresses gradients(grad_parameters, layers);
  MlpBackwardCall call{};
  for (const auto& network : networks) call.networks[call.network_count++] = &network->pack;
  call.batch = batch;
  call.x = pointer<const float>(x);
  call.saved = pointer<const float>(saved);
  call.grad_y = pointer<const float>(grad_y);
  call.grad_x = pointer<float>(grad_x);
  call.grad_weights = gradients.weight_list();
  call.grad_biases = gradients.bias_list();
  call.threads = threads;
  active_kernels().mlp_backward(call);
}

void critic_loss(const Layers& layers, const std::vector<Activation>& activations,
                 Precision precision, int64_t batch, Address x, Address target, Address row_weight,
                 Address loss, Address q, Address grad_x,
                 const std::vector<Address>& grad_parameters, int threads) {
  threads = threads_for(batch, threads);
  const GradientAddresses gradients(grad_parameters, layers);
  const std::vector<PackedMlp> networks =
      packed_mlps(layers, activations, precision,
                  {true, gradients.wanted || grad_x != 0, grad_x != 0}, threads);
  CriticLossCall call{};
  for (const auto& network : networks) call.networks[call.network_count++] = &network->pack;
  call.batch = batch;
  call.x = pointer<const float>(x);
  call.target = pointer<const float>(target);
  call.row_weight = pointer<const float>(row_weight);
  call.loss = pointer<float>(loss);
  call.q = pointer<float>(q);
  call.grad_x = pointer<float>(grad_x);
  call.grad_weights = gradients.weight_list();
  call.grad_biases = gradients.bias_list();
  call.threads = threads;
  active_kernels().critic_loss(call);
}

void denoising_loss(const Layers& layers, Activation activation, Precision precision, int64_t batch,
                    int state_dim, int action_dim, bool per_row, Address weight, Address state,
                    Address action, Address noise, Address t, Address levels, Address embedding,
                    Address loss, Address grad_state, Address grad_action,
                    const std::vector<Address>& grad_parameters, int threads) {
  threads = threads_for(batch, threads);
  const GradientAddresses gradients(grad_parameters, layers);
  const bool backward = gradients.wanted || grad_state || grad_action;
  const auto trunk_layers = static_cast<size_t>(trunk_layer_count(layers, 1));
  const auto pack = [&](const Layer* first, size_t depth, bool backward_to_input) {
    std::vector<Activation> activations(depth, activation);
    activations.back() = Activation::identity;
    MlpParameters parameters = mlp_parameters(first, activations, precision, threads);
    parameters.forward = true;
    parameters.backward = backward;
    parameters.backward_to_input = backward_to_input;
    return packed_mlp(parameters);
  };
  const PackedMlp time_mlp = pack(&layers[0], 2, false);
  const PackedMlp trunk = pack(&layers[2], trunk_layers, true);

  DenoisingLossCall call{};
  call.time_mlp = &time_mlp->pack;
  call.trunk = &trunk->pack;
  call.batch = batch;
  call.state_dim = state_dim;
  call.action_dim = action_dim;
  call.time_dim = time_mlp->pack.forward[0].in;
  call.state = pointer<const float>(state);
  call.action = pointer<const float>(action);
  call.noise = pointer<const float>(noise);
  call.weight = pointer<const float>(weight);
  call.t = pointer<const int64_t>(t);
  call.levels = pointer<const float>(levels);
  call.embedding = pointer<const float>(embedding);
  call.per_row = per_row;
  call.loss = pointer<float>(loss);
  call.grad_state = pointer<float>(grad_state);
  call.grad_action = pointer<float>(grad_action);
  call.grad_weights = gradients.weight_list();
  call.grad_biases = gradients.bias_list();
  call.threads = threads;
  active_kernels().denoising_loss(call);
}

void rff_features(const Layer& omega, RffKind kind, float scale, int64_t batch, Address x,
                  Address y, Address slope, int threads) {
  threads = threads_for(batch, threads);
  const auto layer = packed_layer(linear_parameters(omega, threads), false);
  active_kernels().rff_features({&layer->pack, batch, kind, scale, pointer<const float>(x),
                                 pointer<float>(y), pointer<float>(slope), threads});
}

void rff_features_backward(const Layer& omega, RffKind kind, int64_t batch, Address x,
                           Address saved, Address grad_y, Address grad_x, Address grad_omega,
                           Address grad_bias, int threads) {
  threads = threads_for(batch, threads);
  const LinearParameters parameters = linear_parameters(omega, threads);
  const auto layer = grad_x ? packed_layer(parameters, true) : nullptr;
  active_kernels().rff_features_backward(
      {layer ? &layer->pack : nullptr, batch, parameters.in, parameters.out, kind,
       pointer<const float>(x), pointer<const float>(saved), pointer<const float>(grad_y),
       pointer<float>(grad_x), pointer<float>(grad_omega), pointer<float>(grad_bias), threads});
}

ScoreMatchingLossCall score_matching_call(int64_t batch, int features, int state_dim,
                                          int hidden_dim, Precision precision, Address psi,
                                          Address hidden, Address weight, Address bias,
                                          Address offset, Address score_weight, Address loss,
                                          Address grad_psi, Address grad_hidden,
                                          Address grad_weight, Address grad_bias, int threads) {
  ScoreMatchingLossCall call{};
  call.batch = batch;
  call.features = features;
  call.state_dim = state_dim;
  call.hidden_dim = hidden_dim;
  call.precision = precision;
  call.psi = pointer<const float>(psi);
  call.hidden = pointer<const float>(hidden);
  call.weight = pointer<const float>(weight);
  call.bias = pointer<const float>(bias);
  call.offset = pointer<const float>(offset);
  call.score_weight = pointer<const float>(score_weight);
  call.loss = pointer<float>(loss);
  call.grad_psi = pointer<float>(grad_psi);
  call.grad_hidden = pointer<float>(grad_hidden);
  call.grad_weight = pointer<float>(grad_weight);
  call.grad_bias = pointer<float>(grad_bias);
  call.threads = threads_for(batch, threads);
  return call;
}

void run_score_matching(const ScoreMatchingLossCall& call) {
  if (call.grad_weight) {  // hundreds of MiB with a long state, and fresh at every call
    prefer_huge_pages(call.grad_weight,
                      int64_t{4} * call.features * call.state_dim * call.hidden_dim);
  }
  active_kernels().score_matching_loss(call);
}

void score_matching_loss(int64_t batch, int features, int state_dim, int hidden_dim,
                         Precision precision, Address psi, Address hidden, Address weight,
                         Address bias, Address offset, Address score_weight, Address loss,
                         Address grad_psi, Address grad_hidden, Address grad_weight,
                         Address grad_bias, int threads) {
  run_score_matching(score_matching_call(batch, features, state_dim, hidden_dim, precision, psi,
                                         hidden, weight, bias, offset, score_weight, loss, grad_psi,
                                         grad_hidden, grad_weight, grad_bias, threads));
}

// Floats for what one op's calls hand on, cut off piece by piece. Without any it only measures.
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(int64_t floats, Scratch slot = Scratch::between_calls)
      : base_(reinterpret_cast<Address>(
            thread_scratch(slot, floats * static_cast<int64_t>(sizeof(float))))) {}
  Address take(int64_t floats) {
    const Address first = base_ ? base_ + used_ * sizeof(float) : 0;
    used_ += padded(floats);
    return first;
  }
  int64_t used() const { return used_; }
  static int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  Address base_ = 0;
  int64_t used_ = 0;
};

// A sample of a policy: a network, and what soft actor-critic makes of its outputs. What is saved is
// first the network's, then the sample's.
void squashed_gaussian(const Layers& layers, const std::vector<Activation>& activations,
                       Precision precision, int64_t batch, int action_dim, float low, float high,
                       Address x, Address noise, Address action, Address log_prob, Address saved,
                       int threads) {
  const int64_t raw_floats = batch * 2 * action_dim;
  Workspace workspace(Workspace::padded(raw_floats));
  const Address raw = workspace.take(raw_floats);
  mlp_forward(layers, activations, precision, batch, x, raw, saved, threads);
  const int64_t width = saved ? mlp_saved_width(layers, activations, precision) : 0;
  active_kernels().squashed_gaussian({batch, action_dim, low, high, pointer<const float>(raw),
                                      pointer<const float>(noise), pointer<float>(action),
                                      pointer<float>(log_prob),
                                      saved ? pointer<float>(saved) + batch * width : nullptr});
}

void squashed_gaussian_backward(const Layers& layers, const std::vector<Activation>& activations,
                                Precision precision, int64_t batch, int action_dim, Address x,
                                Address action, Address saved, Address grad_action,
                                Address grad_log_prob, Address grad_x,
                                const std::vector<Address>& grad_parameters, int threads) {
  const int64_t raw_floats = batch * 2 * action_dim;
  Workspace workspace(Workspace::padded(raw_floats));
  const Address grad_raw = workspace.take(raw_floats);
  const int64_t width = mlp_saved_width(layers, activations, precision);
  active_kernels().squashed_gaussian_backward(
      {batch, action_dim, pointer<const float>(action), pointer<const float>(saved) + batch * width,
       pointer<const float>(grad_action), pointer<const float>(grad_log_prob),
       pointer<float>(grad_raw)});
  mlp_backward(layers, activations, precision, batch, x, saved, grad_raw, grad_x, grad_parameters,
               threads);
}

// The networks of soft_value, and what its calls hand on to each other.
struct SoftValueStages {
  const Layers &policy, &psi, &critics;
  const std::vector<Activation>&policy_kinds, &psi_kinds, &critic_kinds;
  Precision precision;
  int64_t batch;
  bool backward;

  int state_dim() const { return std::get<2>(policy.front()); }
  int action_dim() const { return std::get<3>(policy.back()) / 2; }
  int feature_dim() const { return std::get<3>(psi.back()); }
  int critic_count() const { return static_cast<int>(critics.size() / critic_kinds.size()); }
  int64_t saved(const Layers& layers, const std::vector<Activation>& kinds) const {
    return backward ? batch * mlp_saved_width(layers, kinds, precision) : 0;
  }
};

struct SoftValueBuffers {
  Address raw, action, input, features, q;
  Address policy_saved, sample_saved, psi_saved, critics_saved;
  Address grad_q, grad_log_prob, grad_features, grad_input, grad_action, grad_raw;

  SoftValueBuffers(const SoftValueStages& s, Workspace* workspace) {
    const int64_t actions = s.batch * s.action_dim(), inputs = s.batch * s.state_dim() + actions;
    const int64_t features_size = s.batch * s.feature_dim(), values = s.batch * s.critic_count();
    raw = workspace->take(2 * actions);
    action = workspace->take(actions);
    input = workspace->take(inputs);
    features = workspace->take(features_size);
    q = workspace->take(values);
    const auto keep = [&](int64_t floats) { return s.backward ? workspace->take(floats) : 0; };
    policy_saved = keep(s.saved(s.policy, s.policy_kinds));
    sample_saved = keep(2 * actions);
    psi_saved = keep(s.saved(s.psi, s.psi_kinds));
    critics_saved = keep(s.critic_count() * s.saved(s.critics, s.critic_kinds));
    grad_q = keep(values);
    grad_log_prob = keep(s.batch);
    grad_features = keep(features_size);
    grad_input = keep(inputs);
    grad_action = keep(actions);
    grad_raw = keep(2 * actions);
  }
};

// The soft value of states under a policy, on critics of psi(state, action), and where they are wanted
// the gradients of the policy's loss: of the policy alone.
void soft_value(const Layers& policy, const std::vector<Activation>& policy_kinds,
                const Layers& psi, const std::vector<Activation>& psi_kinds, const Layers& critics,
                const std::vector<Activation>& critic_kinds, Precision precision, int64_t batch,
                float low, float high, Address state, Address noise, Address temperature,
                Address loss, Address value, Address log_prob,
                const std::vector<Address>& grad_policy, int threads) {
  const bool backward = !grad_policy.empty();
  const SoftValueStages s{policy,       psi,       critics, policy_kinds, psi_kinds,
                          critic_kinds, precision, batch,   backward};
  Workspace size;
  SoftValueBuffers(s, &size);
  Workspace workspace(size.used());
  const SoftValueBuffers at(s, &workspace);
  const int S = s.state_dim(), A = s.action_dim();
  const Kernels& kernels = active_kernels();

  mlp_forward(policy, policy_kinds, precision, batch, state, at.raw, at.policy_saved, threads);
  kernels.squashed_gaussian({batch, A, low, high, pointer<const float>(at.raw),
                             pointer<const float>(noise), pointer<float>(at.action),
                             pointer<float>(log_prob), pointer<float>(at.sample_saved)});
  kernels.join_columns(pointer<const float>(state), S, pointer<const float>(at.action), A, batch,
                       pointer<float>(at.input));
  mlp_forward(psi, psi_kinds, precision, batch, at.input, at.features, at.psi_saved, threads);
  mlp_forward(critics, critic_kinds, precision, batch, at.features, at.q, at.critics_saved,
              threads);
  kernels.soft_value({batch, s.critic_count(), pointer<const float>(at.q),
                      pointer<const float>(log_prob), pointer<const float>(temperature),
                      pointer<float>(value), pointer<float>(loss), pointer<float>(at.grad_q),
                      pointer<float>(at.grad_log_prob)});
  if (!backward) return;

  mlp_backward(critics, critic_kinds, precision, batch, at.features, at.critics_saved, at.grad_q,
               at.grad_features, {}, threads);
  mlp_backward(psi, psi_kinds, precision, batch, at.input, at.psi_saved, at.grad_features,
               at.grad_input, {}, threads);
  kernels.last_columns(pointer<const float>(at.grad_input), S + A, A, batch,
                       pointer<float>(at.grad_action));
  kernels.squashed_gaussian_backward(
      {batch, A, pointer<const float>(at.action), pointer<const float>(at.sample_saved),
       pointer<const float>(at.grad_action), pointer<const float>(at.grad_log_prob),
       pointer<float>(at.grad_raw)});
  mlp_backward(policy, policy_kinds, precision, batch, state, at.policy_saved, at.grad_raw, 0,
               grad_policy, threads);
}

// The score matching loss of two MLPs: zeta's last layer goes into the loss, the others and psi's run
// before it, and behind it backwards where a gradient of theirs is wanted.
struct RepresentationStages {
  const Layers& psi;
  const std::vector<Activation>& psi_kinds;
  const Layers& zeta;
  const std::vector<Activation>& zeta_kinds;  // without the last layer's
  Precision precision;
  int64_t batch;
  int state_dim;
  Address x, perturbed, offset, score_weight, loss;
  int threads;
};

// A step takes the place of the last weight's gradient, and adds that one's squares to a norm.
void run_representation(const RepresentationStages& s, Address grad_x, Address grad_perturbed,
                        const std::vector<Address>& grad_psi, std::vector<Address> grad_zeta,
                        const AdamParameter* weight_step = nullptr,
                        double* weight_squared_norm = nullptr) {
  const auto [weight, bias, hidden_dim, outputs] = s.zeta.back();
  Layers zeta;
  zeta.assign(s.zeta.begin(), s.zeta.end() - 1);
  Address grad_weight = 0, grad_bias = 0;
  const bool wants_zeta = !grad_zeta.empty();
  if (wants_zeta) {
    grad_bias = grad_zeta.back();
    grad_zeta.pop_back();
    grad_weight = grad_zeta.back();
    grad_zeta.pop_back();
  }
  const bool through_psi = grad_x || !grad_psi.empty();
  const bool through_zeta = grad_perturbed || wants_zeta;

  const int64_t batch = s.batch;
  const int features = outputs / s.state_dim;
  const int64_t psi_floats = batch * features, hidden_floats = batch * hidden_dim;
  const int64_t psi_saved_floats =
      through_psi ? batch * mlp_saved_width(s.psi, s.psi_kinds, s.precision) : 0;
  const int64_t hidden_saved_floats =
      through_zeta ? batch * mlp_saved_width(zeta, s.zeta_kinds, s.precision) : 0;
  Workspace workspace(2 * (Workspace::padded(psi_floats) + Workspace::padded(hidden_floats)) +
                      Workspace::padded(psi_saved_floats) + Workspace::padded(hidden_saved_floats));
  const Address psi_out = workspace.take(psi_floats), hidden = workspace.take(hidden_floats);
  const Address psi_saved = through_psi ? workspace.take(psi_saved_floats) : 0;
  const Address hidden_saved = through_zeta ? workspace.take(hidden_saved_floats) : 0;
  const Address grad_psi_out = through_psi ? workspace.take(psi_floats) : 0;
  const Address grad_hidden = through_zeta ? workspace.take(hidden_floats) : 0;

  mlp_forward(s.psi, s.psi_kinds, s.precision, batch, s.x, psi_out, psi_saved, s.threads);
  mlp_forward(zeta, s.zeta_kinds, s.precision, batch, s.perturbed, hidden, hidden_saved, s.threads);
  ScoreMatchingLossCall call =
      score_matching_call(batch, features, s.state_dim, hidden_dim, s.precision, psi_out, hidden,
                          weight, bias, s.offset, s.score_weight, s.loss, grad_psi_out, grad_hidden,
                          grad_weight, grad_bias, s.threads);
  call.weight_step = weight_step;
  call.weight_squared_norm = weight_squared_norm;
  run_score_matching(call);
  if (through_psi)
    mlp_backward(s.psi, s.psi_kinds, s.precision, batch, s.x, psi_saved, grad_psi_out, grad_x,
                 grad_psi, s.threads);
  if (through_zeta)
    mlp_backward(zeta, s.zeta_kinds, s.precision, batch, s.perturbed, hidden_saved, grad_hidden,
                 grad_perturbed, grad_zeta, s.threads);
}

void representation_loss(const Layers& psi, const std::vector<Activation>& psi_kinds,
                         const Layers& zeta, const std::vector<Activation>& zeta_kinds,
                         Precision precision, int64_t batch, int state_dim, Address x,
                         Address perturbed, Address offset, Address score_weight, Address loss,
                         Address grad_x, Address grad_perturbed,
                         const std::vector<Address>& grad_psi,
                         const std::vector<Address>& grad_zeta, int threads) {
  run_representation({psi, psi_kinds, zeta, zeta_kinds, precision, batch, state_dim, x, perturbed,
                      offset, score_weight, loss, threads},
                     grad_x, grad_perturbed, grad_psi, grad_zeta);
}

// As torch does: in double.
AdamScalars adam_scalars(double lr, double beta1, double beta2, double eps, double step) {
  AdamScalars s;
  s.exp_avg_weight = static_cast<float>(1.0 - beta1);
  s.exp_avg_sq_decay = static_cast<float>(beta2);
  s.exp_avg_sq_weight = static_cast<float>(1.0 - beta2);
  s.root_correction = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, step)));
  s.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  s.eps = static_cast<float>(eps);
  return s;
}

// Steps of Adam on that loss, one on each of `minibatches` that lie one after the other: of zeta's last
// weight, most of all parameters, inside the loss's kernel, of the others from gradients in scratch
// memory. `exp_avgs`, `exp_avg_sqs` and `counts`, of steps before these, are [weight, bias, ...] of
// psi, then of zeta. `loss` and `norm`, of the gradient, are one number a minibatch.
void representation_step(const Layers& psi, const std::vector<Activation>& psi_kinds,
                         const Layers& zeta, const std::vector<Activation>& zeta_kinds,
                         Precision precision, int minibatches, int64_t batch, int state_dim,
                         Address x, Address perturbed, Address offset, Address score_weight,
                         Address loss, Address norm, const std::vector<Floats>& exp_avgs,
                         const std::vector<Floats>& exp_avg_sqs, const std::vector<double>& counts,
                         double lr, double beta1, double beta2, double eps, int threads) {
  std::vector<AdamParameter> parameters;
  std::vector<int64_t> sizes;
  const size_t count = 2 * (psi.size() + zeta.size());
  if (exp_avgs.size() != count || exp_avg_sqs.size() != count || counts.size() != count)
    throw std::invalid_argument("a moment and a count for every parameter are expected");
  for (const Layers* network : {&psi, &zeta}) {
    if (!network->copies.empty())
      throw std::invalid_argument("parameters that a step changes must be contiguous");
    for (const auto& [weight, bias, in, out] : *network) {
      for (const auto& [value, size] :
           {std::pair(weight, int64_t{in} * out), std::pair(bias, int64_t{out})}) {
        const size_t p = parameters.size();
        if (exp_avgs[p].count != size || exp_avg_sqs[p].count != size)
          throw std::invalid_argument("moments of the parameters' sizes are expected");
        parameters.push_back(
            {pointer<float>(value), exp_avgs[p].values, exp_avg_sqs[p].values, AdamScalars{}});
        sizes.push_back(size);
      }
    }
  }
  const size_t last_weight = parameters.size() - 2;
  const auto take_gradients = [&](Workspace* memory) {
    std::vector<Address> gradients;
    for (size_t p = 0; p < sizes.size(); ++p)
      gradients.push_back(p == last_weight ? 0 : memory->take(sizes[p]));
    return gradients;
  };
  Workspace size;
  take_gradients(&size);
  Workspace memory(size.used(), Scratch::gradients);
  const std::vector<Address> gradients = take_gradients(&memory);
  const auto first_of_zeta = gradients.begin() + static_cast<ptrdiff_t>(2 * psi.size());

  std::vector<const float*> pointers;
  for (const Address gradient : gradients) pointers.push_back(pointer<const float>(gradient));
  // Memory can run out in the first step alone: the others find what that one took.
  const int psi_inputs = std::get<2>(psi.front()), zeta_inputs = std::get<2>(zeta.front());
  for (int n = 0; n < minibatches; ++n) {
    for (size_t p = 0; p < parameters.size(); ++p)
      parameters[p].scalars = adam_scalars(lr, beta1, beta2, eps, counts[p] + n + 1);
    const auto nth = [&](Address rows, int width) {
      return rows + sizeof(float) * static_cast<size_t>(n * batch * width);
    };
    double squared_norm = 0.0;
    run_representation(
        {psi, psi_kinds, zeta, zeta_kinds, precision, batch, state_dim, nth(x, psi_inputs),
         nth(perturbed, zeta_inputs), nth(offset, state_dim), nth(score_weight, 1),
         loss + sizeof(float) * static_cast<size_t>(n), threads},
        0, 0, {gradients.begin(), first_of_zeta}, {first_of_zeta, gradients.end()},
        &parameters[last_weight], &squared_norm);
    active_kernels().adam({parameters.data(), pointers.data(), sizes.data(),
                           static_cast<int>(parameters.size()), &squared_norm,
                           usable_threads(threads)});
    pointer<float>(norm)[n] = static_cast<float>(std::sqrt(squared_norm));
  }
}

// The Euclidean norm of all values together.
double norm(const std::vector<Floats>& tensors) {
  double squares = 0.0;
  for (const Floats& t : tensors) squares += active_kernels().sum_of_squares(t.values, t.count);
  return std::sqrt(squares);
}

void normals(uint64_t seed, uint32_t step, int64_t first_row, int64_t rows, int columns,
             Address out) {
  active_kernels().normals({seed, step, first_row, rows, columns, pointer<float>(out)});
}

// What a call does to its weights, for benchmarks: the seconds it takes. (address, count) of each.
double fingerprint(const std::vector<std::pair<Address, int64_t>>& places, int threads) {
  std::vector<Piece> pieces;
  for (const auto& [address, count] : places)
    pieces.push_back({pointer<const float>(address), count});
  const auto start = std::chrono::steady_clock::now();
  read_content(pieces, usable_threads(threads));
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double fma_peak(int threads, double seconds) {
  return active_kernels().fma_peak(usable_threads(threads), seconds);
}

// What an op's calls hand on lies in scratch memory: only at the end of all of them it may go.
struct ScratchRelease {
  ~ScratchRelease() { release_large_scratch(); }
};

// What a kernel runs under.
using Unlocked = py::call_guard<WithoutGil, ScratchRelease>;

// ---- whole calls, from an op's arguments to its result ------------------------------------------
//
// For most calls of a small network: the way to the kernel takes longer in Python than the kernel. Where
// that is for Python to go, the result is None if there is anything about an argument that takes a closer
// look, or True if there isn't but a gradient is wanted.

// The tensors of a call.
class PlainTensors {
 public:
  explicit PlainTensors(bool with_gradients) : with_gradients_(with_gradients) {}

  // Whether a kernel can read it: as it lies, or a copy of it that lives as long as this.
  bool look(py::handle tensor, TensorLook* look) {
    if (!look_at_float32_on_cpu(tensor, look) || is_negated(tensor.ptr())) return false;
    if (with_gradients_ && !wants_gradient) wants_gradient = requires_grad(tensor);
    if (look->contiguous) return true;
    copies_.push_back(tensor.attr("contiguous")());
    return look_at(copies_.back(), look);
  }

  // The same of rows: a vector or a matrix.
  bool look_at_rows(py::handle tensor, TensorLook* look) {
    return this->look(tensor, look) && look->last > 0 &&
           (look->dimensions == 1 || look->dimensions == 2);
  }

  bool wants_gradient = false;

 private:
  bool with_gradients_;
  std::vector<py::object> copies_;
};

Address address_of(const TensorLook& look) { return reinterpret_cast<Address>(look.data); }

// The shape of results of so many values for rows.
py::list result_shape(const TensorLook& rows, int64_t width) {
  py::list shape;
  if (rows.dimensions == 2) shape.append(rows.rows);
  shape.append(width);
  return shape;
}

// Networks of one shape, given layer by layer, and the rows that they are asked about.
class PlainMlps {
 public:
  PlainMlps(py::handle x, bool with_gradients) : tensors_(with_gradients), x_(x) {}

  // Whether x has rows, and these are activations for as many layers as kernels take.
  bool begin(const std::optional<py::tuple>& activations) {
    if (!activations || !tensors_.look_at_rows(x_, &rows_)) return false;
    for (py::handle name : *activations) {
      const auto activation = named(name, activation_names<Activation>);
      if (!activation) return false;
      activations_.push_back(*activation);
    }
    return !activations_.empty() && activations_.size() <= max_layers;
  }
  size_t depth() const { return activations_.size(); }

  // Whether these are the next layer.
  bool add(py::handle weight, py::handle bias) {
    const size_t number = layers_.size();
    const int64_t in = number % depth() == 0 ? rows_.last : std::get<3>(layers_.back());
    TensorLook w, b;
    if (!tensors_.look(weight, &w) || !tensors_.look(bias, &b) || w.dimensions != 2 ||
        b.dimensions != 1 || w.columns != in || b.rows != w.rows || w.rows == 0 ||
        (number >= depth() && std::get<3>(layers_[number % depth()]) != w.rows))
      return false;
    layers_.emplace_back(address_of(w), address_of(b), static_cast<int>(in),
                         static_cast<int>(w.rows));
    return true;
  }

  // Their values [..., out], of several one network after the other [networks, ..., out].
  py::object run(bool several, bool bfloat16, int threads) const {
    if (tensors_.wants_gradient) return py::bool_(true);
    py::list shape = result_shape(rows_, std::get<3>(layers_.back()));
    if (several) shape.insert(0, layers_.size() / depth());
    Address y;
    py::object result = empty_like(x_, shape, &y);
    if (rows_.count == 0) return result;
    const WithoutGil unlocked;
    const ScratchRelease release;
    mlp_forward(layers_, activations_, bfloat16 ? Precision::bfloat16 : Precision::float32,
                rows_.count / rows_.last, address_of(rows_), y, 0, threads);
    return result;
  }

 private:
  PlainTensors tensors_;
  py::handle x_;
  TensorLook rows_{};
  std::vector<Activation> activations_;
  Layers layers_;
};

py::object plain_mlp(py::handle x, py::handle weights, py::handle biases, py::handle activations,
                     bool bfloat16, bool with_gradients, int threads) {
  const auto w = items_of(weights), b = items_of(biases);
  PlainMlps mlp(x, with_gradients);
  if (!w || !b || !mlp.begin(items_of(activations)) || w->size() != mlp.depth() ||
      b->size() != mlp.depth())
    return py::none();
  for (size_t l = 0; l < mlp.depth(); ++l)
    if (!mlp.add(nth(*w, l), nth(*b, l))) return py::none();
  return mlp.run(false, bfloat16, threads);
}

py::object plain_mlp_ensemble(py::handle x, py::handle networks, py::handle activations,
                              bool bfloat16, bool with_gradients, int threads) {
  const auto list = items_of(networks);
  PlainMlps mlps(x, with_gradients);
  if (!list || list->size() < 1 || list->size() > max_networks ||
      !mlps.begin(items_of(activations)))
    return py::none();
  std::vector<py::tuple> alive;
  for (py::handle network : *list) {
    const auto parameters = items_of(network);
    if (!parameters || parameters->size() != 2 * mlps.depth()) return py::none();
    for (size_t p = 0; p < parameters->size(); p += 2)
      if (!mlps.add(nth(*parameters, p), nth(*parameters, p + 1))) return py::none();
    alive.push_back(*parameters);
  }
  return mlps.run(true, bfloat16, threads);
}

py::object plain_rff_features(py::handle x, py::handle omega, py::handle bias, py::handle kind_name,
                              float scale, bool with_gradients, int threads) {
  PlainTensors tensors(with_gradients);
  const auto kind = named(kind_name, rff_kind_names<RffKind>);
  TensorLook rows, weight, phases{};
  if (!kind || !tensors.look_at_rows(x, &rows) || !tensors.look(omega, &weight) ||
      weight.dimensions != 2 || weight.columns != rows.last || weight.rows == 0)
    return py::none();
  if (!bias.is_none() &&
      (!tensors.look(bias, &phases) || phases.dimensions != 1 || phases.rows != weight.rows))
    return py::none();
  if (tensors.wants_gradient) return py::bool_(true);
  Address y;
  py::object result = empty_like(
      x, result_shape(rows, *kind == RffKind::cos_sin ? 2 * weight.rows : weight.rows), &y);
  if (rows.count == 0) return result;
  const WithoutGil unlocked;
  const ScratchRelease release;
  rff_features({address_of(weight), address_of(phases), static_cast<int>(weight.columns),
                static_cast<int>(weight.rows)},
               *kind, scale, rows.count / rows.last, address_of(rows), y, 0, threads);
  return result;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled CPU kernels of diffcore. Use diffcore.ops instead.";
  define_enumerations<Activation, RffKind, NormClip, ActionOptimizer>(m);
  py::enum_<Precision>(m, "Precision", py::module_local())
      .value("float32", Precision::float32)
      .value("bfloat16", Precision::bfloat16);
  m.def("use_torch", &use_torch);
  m.def("inputs_fit", &inputs_fit);
  m.def("fits", &fits);
  m.def("lacks_memory", &lacks_memory);
  m.def("are_plain", &are_plain);
  m.def("are_float32_on_cpu", &are_float32_on_cpu);
  m.def("are_plain_float32_on_cpu", &are_plain_float32_on_cpu);
  m.def("layers_fit", &layers_fit);
  m.def("same_sizes", &same_sizes);
  m.def("sharing", &sharing);
  using Width = std::optional<int64_t>;
  m.def("linear_stack", [](const py::dict& modules, size_t count, Width in, Width out) {
    return linear_stack(modules, count, in, out, false);
  });
  m.def("mlp_stack", [](py::handle mlp, py::type type, Width in, Width out) {
    return mlp_stack(mlp, type, in, out, false);
  });
  m.def("mlp_stacks", &mlp_stacks);
  m.attr("max_layers") = max_layers;
  m.attr("max_networks") = max_networks;
  m.def("isa", [] { return std::string(active_kernels().isa); });
  m.def("native_bf16", [] { return active_kernels().native_bf16; });
  m.def("available_isas", &available_isas);
  m.def("use_isa", &use_isa);
  m.def("team_threads", [](int threads) {
    TeamWork work;
    return team_options(threads, &work).threads;
  });
  m.def("always_use_teams", &always_use_teams);
  m.def("teams_run", &teams_run);
  m.def("deny_tile_memory", &deny_tile_memory);
  m.def("packs_built", &packs_built);
  m.def("set_pack_budget", &set_pack_budget);
  m.def("fingerprint", &fingerprint, Unlocked());
  m.def("reverse_diffusion", &reverse_diffusion, Unlocked());
  m.def("reverse_step", &reverse_step, Unlocked());
  m.def("action_gradient", &action_gradient, Unlocked());
  m.def("normals", &normals, Unlocked());
  m.def("mlp_saved_width", &mlp_saved_width);
  m.def("mlp_saved_width", [](const std::vector<Layer>& shapes,  // where there are no tensors
                              const std::vector<Activation>& activations, Precision precision) {
    Layers layers;
    layers.assign(shapes.begin(), shapes.end());
    return mlp_saved_width(layers, activations, precision);
  });
  m.def("mlp_forward", &mlp_forward, Unlocked());
  m.def("plain_mlp", &plain_mlp);
  m.def("plain_mlp_ensemble", &plain_mlp_ensemble);
  m.def("mlp_backward", &mlp_backward, Unlocked());
  m.def("critic_loss", &critic_loss, Unlocked());
  m.def("denoising_loss", &denoising_loss, Unlocked());
  m.def("rff_features", &rff_features, Unlocked());
  m.def("plain_rff_features", &plain_rff_features);
  m.def("rff_features_backward", &rff_features_backward, Unlocked());
  m.def("score_matching_loss", &score_matching_loss, Unlocked());
  m.def("squashed_gaussian", &squashed_gaussian, Unlocked());
  m.def("squashed_gaussian_backward", &squashed_gaussian_backward, Unlocked());
  m.def("soft_value", &soft_value, Unlocked());
  m.def("representation_loss", &representation_loss, Unlocked());
  m.def("representation_step", &representation_step, Unlocked());
  m.def("norm", &norm, Unlocked());
  m.def("fma_peak", &fma_peak, Unlocked());
}
