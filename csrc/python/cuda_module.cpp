// The Python face of the CUDA kernels: device addresses and sizes in, nothing checked. Shapes,
// types and devices are checked in diffcore/ops/<op>/__init__.py, and only there. Whoever calls has
// made the tensors' device the current one, by torch: that knows how to leave it without making a
// context on the one before, half a gigabyte where nobody needs it.
//
// The same file makes two modules: `_cuda` with what nvcc built, and for tests `_cuda_on_cpu` with
// the same kernels as ordinary C++ (DIFFCORE_CUDA_ON_CPU), whose addresses are the host's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/kernels.h"
#include "bindings.h"

namespace py = pybind11;
using namespace diffcore::cuda;
using diffcore::Address;
using diffcore::Layer;
using diffcore::pointer;
using diffcore::WithoutGil;

namespace {

LinearParameters linear_parameters(const Layer& layer) {
  const auto& [weight, bias, in, out] = layer;
  return {pointer<const float>(weight), pointer<const float>(bias), in, out};
}

// An exception says why a call could not be queued.
void check(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA kernels: ") + error);
}

// Of the workspace; an exception says why the device can't run the call.
template <class Call>
int64_t bytes_of(int64_t (*measure)(const Call&), const char* (*make)(const Call&, KernelPlan*),
                 const Call& call) {
  const int64_t bytes = measure(call);
  KernelPlan plan{};
  if (bytes < 0) check(make(call, &plan));
  return bytes;
}

DenoiserParameters denoiser_parameters(const std::vector<Layer>& layers, int action_dim,
                                       int state_dim, Activation activation, Precision precision,
                                       Address time_embedding, int steps) {
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
  return parameters;
}

ReverseDiffusionCall reverse_diffusion_shapes(const std::vector<Layer>& layers, int action_dim,
                                              int state_dim, Activation activation,
                                              Precision precision, int steps, int64_t batch) {
  ReverseDiffusionCall call{};
  call.denoiser =
      denoiser_parameters(layers, action_dim, state_dim, activation, precision, 0, steps);
  call.batch = batch;
  return call;
}

int64_t reverse_diffusion_bytes(const std::vector<Layer>& layers, int action_dim, int state_dim,
                                Activation activation, Precision precision, int steps,
                                int64_t batch) {
  return bytes_of(
      reverse_diffusion_workspace, plan_reverse_diffusion,
      reverse_diffusion_shapes(layers, action_dim, state_dim, activation, precision, steps, batch));
}

// A dictionary, or a text: why the device can't.
template <class Call>
py::object plan_of(const char* (*make)(const Call&, KernelPlan*), const Call& call) {
  KernelPlan plan{};
  if (const char* reason = make(call, &plan)) return py::str(reason);
  py::dict result;
  result["blocks_a_tile"] = plan.blocks_a_tile;
  result["rows_a_tile"] = plan.rows_a_tile;
  result["resident_layers"] = plan.resident_layers;
  result["shared_bytes"] = plan.shared_bytes;
  result["clocks"] = plan.clocks;
  return result;
}

py::object reverse_diffusion_plan(const std::vector<Layer>& layers, int action_dim, int state_dim,
                                  Precision precision, int steps, int64_t batch) {
  return plan_of(plan_reverse_diffusion,
                 reverse_diffusion_shapes(layers, action_dim, state_dim, Activation::identity,
                                          precision, steps, batch));
}

void launch_reverse_diffusion(const std::vector<Layer>& layers, int action_dim, int state_dim,
                              Activation activation, Precision precision, Address time_embedding,
                              int steps, Address coefficients, int64_t batch, Address state,
                              Address x_init, Address noise, uint64_t seed, Address seed_address,
                              float noise_scale, float clip, Address trajectory, Address actions,
                              Address workspace, int64_t workspace_bytes, Address stream) {
  const WithoutGil unlocked;
  ReverseDiffusionCall call{};
  call.denoiser = denoiser_parameters(layers, action_dim, state_dim, activation, precision,
                                      time_embedding, steps);
  call.batch = batch;
  call.state = pointer<const float>(state);
  call.x_init = pointer<const float>(x_init);
  call.noise = pointer<const float>(noise);
  call.coefficients = pointer<const float>(coefficients);
  call.seed = {seed, pointer<const int64_t>(seed_address)};
  call.noise_scale = noise_scale;
  call.clip = clip;
  call.trajectory = pointer<float>(trajectory);
  call.actions = pointer<float>(actions);
  call.workspace = pointer<void>(workspace);
  call.workspace_bytes = workspace_bytes;
  call.stream = pointer<void>(stream);
  check(reverse_diffusion(call));
}

void launch_reverse_step(int64_t count, Address x, Address eps, Address noise, Address x0_previous,
                         Address coefficients, const std::array<float, 7>& coefficient_values,
                         float noise_scale, float clip, Address next, Address x0, Address stream) {
  ReverseStepCall call{};
  call.count = count;
  call.x = pointer<const float>(x);
  call.eps = pointer<const float>(eps);
  call.noise = pointer<const float>(noise);
  call.x0_previous = pointer<const float>(x0_previous);
  call.coefficients = pointer<const float>(coefficients);
  std::copy(coefficient_values.begin(), coefficient_values.end(), call.coefficient_values);
  call.noise_scale = noise_scale;
  call.clip = clip;
  call.next = pointer<float>(next);
  call.x0 = pointer<float>(x0);
  call.stream = pointer<void>(stream);
  check(reverse_step(call));
}

CriticParameters critic_parameters(const std::vector<Layer>& layers, int action_dim, int state_dim,
                                   Activation activation, Precision precision) {
  CriticParameters parameters{};
  parameters.layer_count = static_cast<int>(layers.size());
  for (int l = 0; l < parameters.layer_count; ++l)
    parameters.layers[l] = linear_parameters(layers[l]);
  parameters.state_dim = state_dim;
  parameters.action_dim = action_dim;
  parameters.activation = activation;
  parameters.precision = precision;
  return parameters;
}

ActionGradientCall action_gradient_shapes(const std::vector<Layer>& first,
                                          const std::vector<Layer>& second, int action_dim,
                                          int state_dim, Activation activation, Precision precision,
                                          int64_t batch) {
  ActionGradientCall call{};
  call.critics[0] = critic_parameters(first, action_dim, state_dim, activation, precision);
  call.critics[1] = critic_parameters(second, action_dim, state_dim, activation, precision);
  call.batch = batch;
  return call;
}

int64_t action_gradient_bytes(const std::vector<Layer>& first, const std::vector<Layer>& second,
                              int action_dim, int state_dim, Activation activation,
                              Precision precision, int64_t batch) {
  return bytes_of(
      action_gradient_workspace, plan_action_gradient,
      action_gradient_shapes(first, second, action_dim, state_dim, activation, precision, batch));
}

py::object action_gradient_plan(const std::vector<Layer>& first, const std::vector<Layer>& second,
                                int action_dim, int state_dim, Precision precision, int steps,
                                int64_t batch) {
  ActionGradientCall call = action_gradient_shapes(first, second, action_dim, state_dim,
                                                   Activation::identity, precision, batch);
  call.steps = steps;
  return plan_of(plan_action_gradient, call);
}

void launch_action_gradient(const std::vector<Layer>& first, const std::vector<Layer>& second,
                            int action_dim, int state_dim, Activation activation,
                            Precision precision, int64_t batch, Address state, Address action,
                            Address improved, int steps, float lr, float eps, float max_norm,
                            NormClip norm_clip, ActionOptimizer optimizer, float low, float high,
                            Address workspace, int64_t workspace_bytes, Address stream) {
  const WithoutGil unlocked;
  ActionGradientCall call =
      action_gradient_shapes(first, second, action_dim, state_dim, activation, precision, batch);
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
  call.workspace = pointer<void>(workspace);
  call.workspace_bytes = workspace_bytes;
  call.stream = pointer<void>(stream);
  check(action_gradient(call));
}

void launch_rff_features(const Layer& omega, RffKind kind, float scale, int64_t batch, Address x,
                         Address y, Address slope, Address stream) {
  const WithoutGil unlocked;
  check(rff_features({linear_parameters(omega), batch, kind, scale, pointer<const float>(x),
                      pointer<float>(y), pointer<float>(slope), pointer<void>(stream)}));
}

RffBackwardCall rff_backward_call(const Layer& omega, RffKind kind, int64_t batch, Address x,
                                  Address saved, Address grad_y, Address grad_x, Address grad_omega,
                                  Address grad_bias, Address workspace, Address stream) {
  return {linear_parameters(omega),
          batch,
          kind,
          pointer<const float>(x),
          pointer<const float>(saved),
          pointer<const float>(grad_y),
          pointer<float>(grad_x),
          pointer<float>(grad_omega),
          pointer<float>(grad_bias),
          pointer<void>(workspace),
          pointer<void>(stream)};
}

int64_t rff_features_backward_bytes(const Layer& omega, RffKind kind, int64_t batch) {
  return rff_features_backward_workspace(
      rff_backward_call(omega, kind, batch, 0, 0, 0, 0, 0, 0, 0, 0));
}

void launch_rff_features_backward(const Layer& omega, RffKind kind, int64_t batch, Address x,
                                  Address saved, Address grad_y, Address grad_x, Address grad_omega,
                                  Address grad_bias, Address workspace, Address stream) {
  const WithoutGil unlocked;
  check(rff_features_backward(rff_backward_call(omega, kind, batch, x, saved, grad_y, grad_x,
                                                grad_omega, grad_bias, workspace, stream)));
}

// A text, or None; an exception where it couldn't be found out.
py::object why_unavailable() {
  const char* reason = nullptr;
  check(unavailable(&reason));
  return reason ? py::object(py::str(reason)) : py::none();
}

void define(py::module_& m) {
  diffcore::define_enumerations<Activation, RffKind, NormClip, ActionOptimizer>(m);
  py::enum_<Precision>(m, "Precision", py::module_local())
      .value("float32", Precision::float32)
      .value("tf32", Precision::tf32)
      .value("bfloat16", Precision::bfloat16)
      .value("float16", Precision::float16);
  m.attr("max_layers") = max_layers;
  m.attr("architectures") = DIFFCORE_CUDA_ARCHITECTURES;
  m.def("unavailable", &why_unavailable);
  m.def("reverse_diffusion_plan", &reverse_diffusion_plan);
  m.def("reverse_diffusion_workspace", &reverse_diffusion_bytes);
  m.def("reverse_diffusion", &launch_reverse_diffusion);
  m.def("reverse_step", &launch_reverse_step);
  m.def("action_gradient_plan", &action_gradient_plan);
  m.def("action_gradient_workspace", &action_gradient_bytes);
  m.def("action_gradient", &launch_action_gradient);
  m.def("rff_features", &launch_rff_features);
  m.def("rff_features_backward_workspace", &rff_features_backward_bytes);
  m.def("rff_features_backward", &launch_rff_features_backward);
}

}  // namespace

#ifdef DIFFCORE_CUDA_ON_CPU
PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "diffcore's CUDA kernels compiled for the CPU, for tests.";
  m.attr("on_cpu") = true;
  define(m);
}
#else
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Compiled CUDA kernels of diffcore. Use diffcore.ops instead.";
  m.attr("on_cpu") = false;
  define(m);
}
#endif
