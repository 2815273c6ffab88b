// The Python face of the CPU kernels: addresses and sizes in, nothing checked. Shapes, types and
// devices are checked in diffcore/ops/<op>/__init__.py, and only there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"

namespace py = pybind11;
using namespace diffcore;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (weight address, bias address, in, out)
using Layer = std::tuple<Address, Address, int, int>;

LinearParameters linear_parameters(const Layer& layer) {
  const auto& [weight, bias, in, out] = layer;
  return {pointer<const float>(weight), pointer<const float>(bias), in, out, in};
}

void reverse_diffusion(const std::vector<Layer>& layers, int action_dim, int state_dim,
                       Activation activation, Precision precision, Address time_embedding,
                       int steps, Address coefficients, int64_t batch, Address state,
                       Address x_init, Address noise, uint64_t seed, float noise_scale, float clip,
                       Address trajectory, Address actions, int threads) {
  const py::gil_scoped_release unlocked;
  DenoiserParameters parameters{};
  parameters.time_hidden = linear_parameters(layers[0]);
  parameters.time_out = linear_parameters(layers[1]);
  parameters.trunk_layers = static_cast<int>(layers.size()) - 2;
  for (int l = 0; l < parameters.trunk_layers; ++l)
    parameters.trunk[l] = linear_parameters(layers[l + 2]);
  parameters.action_dim = action_dim;
  parameters.state_dim = state_dim;
  parameters.activation = activation;
  parameters.precision = precision;
  parameters.time_embedding = pointer<const float>(time_embedding);
  parameters.steps = steps;
  const auto denoiser = packed_denoiser(parameters);

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
  call.threads = usable_threads(threads);
  active_kernels().reverse_diffusion(call);
}

void reverse_step(int64_t count, Address x, Address eps, Address noise, Address x0_previous,
                  const std::array<float, 7>& coefficients, float noise_scale, float clip,
                  Address next, Address x0) {
  active_kernels().reverse_step({count, pointer<const float>(x), pointer<const float>(eps),
                                 pointer<const float>(noise), pointer<const float>(x0_previous),
                                 coefficients.data(), noise_scale, clip, pointer<float>(next),
                                 pointer<float>(x0)});
}

void action_gradient(const std::vector<Layer>& first, const std::vector<Layer>& second,
                     int action_dim, int state_dim, Activation activation, Precision precision,
                     int64_t batch, Address state, Address action, Address improved, int steps,
                     float lr, float eps, float max_norm, NormClip norm_clip,
                     ActionOptimizer optimizer, float low, float high, int threads) {
  const py::gil_scoped_release unlocked;
  const auto pack = [&](const std::vector<Layer>& layers) {
    CriticParameters parameters{};
    parameters.layer_count = static_cast<int>(layers.size());
    for (int l = 0; l < parameters.layer_count; ++l)
      parameters.layers[l] = linear_parameters(layers[l]);
    parameters.state_dim = state_dim;
    parameters.action_dim = action_dim;
    parameters.activation = activation;
    parameters.precision = precision;
    return packed_critic(parameters);
  };
  const auto critic1 = pack(first), critic2 = pack(second);

  ActionGradientCall call{};
  call.critics[0] = &critic1->pack;
  call.critics[1] = &critic2->pack;
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
  call.threads = usable_threads(threads);
  active_kernels().action_gradient(call);
}

MlpParameters mlp_parameters(const std::vector<Layer>& layers,
                             const std::vector<Activation>& activations) {
  MlpParameters parameters{};
  parameters.layer_count = static_cast<int>(layers.size());
  for (int l = 0; l < parameters.layer_count; ++l) {
    parameters.layers[l] = linear_parameters(layers[l]);
    parameters.activations[l] = activations[l];
  }
  return parameters;
}

int mlp_saved_width(const std::vector<Layer>& layers, const std::vector<Activation>& activations) {
  MlpPack shape{};
  shape.layer_count = static_cast<int>(layers.size());
  for (int l = 0; l < shape.layer_count; ++l) {
    shape.forward[l].in = std::get<2>(layers[l]);
    shape.forward[l].out = std::get<3>(layers[l]);
    shape.activations[l] = activations[l];
  }
  return active_kernels().mlp_saved_width(shape);
}

void mlp_forward(const std::vector<Layer>& layers, const std::vector<Activation>& activations,
                 int64_t batch, Address x, Address y, Address saved, int threads) {
  const py::gil_scoped_release unlocked;
  const auto mlp = packed_mlp(mlp_parameters(layers, activations));
  active_kernels().mlp_forward({&mlp->pack, batch, pointer<const float>(x), pointer<float>(y),
                                pointer<float>(saved), usable_threads(threads)});
}

void mlp_backward(const std::vector<Layer>& layers, const std::vector<Activation>& activations,
                  int64_t batch, Address saved, Address grad_y, Address grad_x,
                  const std::vector<Address>& grad_parameters, int threads) {
  const py::gil_scoped_release unlocked;
  const auto mlp = packed_mlp(mlp_parameters(layers, activations));
  float* weights[max_layers];
  float* biases[max_layers];
  for (size_t l = 0; l < grad_parameters.size() / 2; ++l) {
    weights[l] = pointer<float>(grad_parameters[2 * l]);
    biases[l] = pointer<float>(grad_parameters[2 * l + 1]);
  }
  const bool wanted = !grad_parameters.empty();
  active_kernels().mlp_backward({&mlp->pack, batch, pointer<const float>(saved),
                                 pointer<const float>(grad_y), pointer<float>(grad_x),
                                 wanted ? weights : nullptr, wanted ? biases : nullptr,
                                 usable_threads(threads)});
}

void score_matching_loss(int64_t batch, int features, int state_dim, int hidden_dim,
                         Precision precision, Address psi, Address hidden, Address weight,
                         Address bias, Address offset, Address score_weight, Address loss,
                         Address grad_psi, Address grad_hidden, Address grad_weight,
                         Address grad_bias, int threads) {
  const py::gil_scoped_release unlocked;
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
  call.threads = usable_threads(threads);
  active_kernels().score_matching_loss(call);
}

void normals(uint64_t seed, uint32_t step, int64_t first_row, int64_t rows, int columns,
             Address out) {
  const py::gil_scoped_release unlocked;
  active_kernels().normals({seed, step, first_row, rows, columns, pointer<float>(out)});
}

void fingerprint(Address values, int64_t count) {
  const py::gil_scoped_release unlocked;
  uint32_t lanes[64] = {};
  active_kernels().fingerprint(pointer<const float>(values), count, lanes);
}

double fma_peak(int threads, double seconds) {
  const py::gil_scoped_release unlocked;
  return active_kernels().fma_peak(usable_threads(threads), seconds);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled CPU kernels of diffcore. Use diffcore.ops instead.";
  py::enum_<Activation>(m, "Activation")
      .value("identity", Activation::identity)
      .value("relu", Activation::relu)
      .value("elu", Activation::elu)
      .value("silu", Activation::silu)
      .value("tanh", Activation::tanh)
      .value("mish", Activation::mish)
      .value("gelu", Activation::gelu)
      .value("sin", Activation::sin)
      .value("cos", Activation::cos);
  py::enum_<Precision>(m, "Precision")
      .value("float32", Precision::float32)
      .value("bfloat16", Precision::bfloat16);
  py::enum_<NormClip>(m, "NormClip")
      .value("none", NormClip::none)
      .value("batch", NormClip::batch)
      .value("row", NormClip::row);
  py::enum_<ActionOptimizer>(m, "ActionOptimizer")
      .value("adam", ActionOptimizer::adam)
      .value("ascent", ActionOptimizer::ascent);
  m.attr("max_layers") = max_layers;
  m.def("isa", [] { return std::string(active_kernels().isa); });
  m.def("native_bf16", [] { return active_kernels().native_bf16; });
  m.def("available_isas", &available_isas);
  m.def("use_isa", &use_isa);
  m.def("packs_built", &packs_built);
  m.def("fingerprint", &fingerprint);  // what every call does to its weights, for benchmarks
  m.def("reverse_diffusion", &reverse_diffusion);
  m.def("reverse_step", &reverse_step);
  m.def("action_gradient", &action_gradient);
  m.def("normals", &normals);
  m.def("mlp_saved_width", &mlp_saved_width);
  m.def("mlp_forward", &mlp_forward);
  m.def("mlp_backward", &mlp_backward);
  m.def("score_matching_loss", &score_matching_loss);
  m.def("fma_peak", &fma_peak);
}
