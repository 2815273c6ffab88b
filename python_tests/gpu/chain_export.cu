// The chain's launcher under a C name, for emulated.py.
#include "kernels.h"

using namespace diffcore::cuda;

// sizes: batch, state, action, time, hidden, trunk layers, steps; parameters: weight and bias of
// every layer, time MLP first. Returns nullptr or an error; with `actions` null the workspace's
// `bytes` are measured.
extern "C" __attribute__((visibility("default"))) const char* chain(
    const int* sizes, int precision, const float* const* parameters, const float* embedding,
    const float* coefficients, const float* state, const float* x_init, const float* noise,
    uint64_t seed, const int64_t* seed_address, float* trajectory, float* actions, void* workspace,
    int64_t* bytes) {
  const int batch = sizes[0], state_dim = sizes[1], action_dim = sizes[2], time_dim = sizes[3];
  const int hidden = sizes[4], layers = sizes[5];
  ReverseDiffusionCall call{};
  DenoiserParameters& d = call.denoiser;
  int next = 0;
  const auto layer = [&](int in, int out) {
    next += 2;
    return LinearParameters{parameters[next - 2], parameters[next - 1], in, out};
  };
  d.time_hidden = layer(time_dim, hidden);
  d.time_out = layer(hidden, time_dim);
  d.trunk_layers = layers;
  for (int l = 0; l < layers; ++l)
    d.trunk[l] = layer(l == 0 ? action_dim + time_dim + state_dim : hidden,
                       l == layers - 1 ? action_dim : hidden);
  d.action_dim = action_dim;
  d.state_dim = state_dim;
  d.activation = Activation::mish;
  d.precision = static_cast<Precision>(precision);
  d.time_embedding = embedding;
  d.steps = sizes[6];
  call.batch = batch;
  call.state = state;
  call.x_init = x_init;
  call.noise = noise;
  call.coefficients = coefficients;
  call.seed = {seed, seed_address};
  call.noise_scale = 1.0f;
  call.clip = 1.0f;
  call.trajectory = trajectory;
  call.actions = actions;
  call.workspace = workspace;
  call.workspace_bytes = *bytes;
  if (!actions) {
    *bytes = reverse_diffusion_workspace(call);
    return nullptr;
  }
  return reverse_diffusion(call);
}
