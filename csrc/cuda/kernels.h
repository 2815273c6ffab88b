// What the Python module and the CUDA kernels agree on: plain structures, and a host function an op
// that launches its kernels. No CUDA header is needed to include this one.
//
// Every pointer is a device address unless its comment says otherwise. A launcher checks nothing,
// allocates nothing, waits for nothing: it queues its work on `stream` of the device that is
// current and returns nullptr, or what went wrong. Memory that a call needs beside its inputs and
// results is `workspace`, of as many bytes as the op's `..._workspace` says, aligned to 256, in any
// state. How many those are depends on the plan, which is made again for the launch: so where there
// is one, the launcher checks `workspace_bytes` after all.
#pragma once

#include <cstdint>

namespace diffcore {
namespace cuda {

enum class Activation : int { identity, relu, elu, silu, tanh, mish, gelu, sin, cos };

// What hidden layers are multiplied in; sums, activations and everything else are float32. tf32,
// bfloat16 and float16 use tensor cores.
enum class Precision : int { float32, tf32, bfloat16, float16 };

constexpr int max_layers = 16;

// torch.nn.Linear: weight [out, in], contiguous, and bias [out] or null.
struct LinearParameters {
  const float* weight;
  const float* bias;
  int in;
  int out;
};

// eps(x, state, t): trunk([x, time_mlp(time_embedding(t)), state]).
struct DenoiserParameters {
  LinearParameters time_hidden;
  LinearParameters time_out;
  LinearParameters trunk[max_layers];
  int trunk_layers;
  int action_dim;
  int state_dim;
  Activation activation;
  Precision precision;
  const float* time_embedding;  // [steps, time_hidden.in], in the order of execution
  int steps;
};

// A key for Philox: the number that `address` points to, read by the kernel, so that nobody waits
// for it and a captured graph draws anew at every replay; without an address, `value`.
struct Seed {
  uint64_t value;
  const int64_t* address;
};

struct ReverseDiffusionCall {
  DenoiserParameters denoiser;
  int64_t batch;
  const float* state;         // [batch, state_dim]
  const float* x_init;        // [batch, action_dim], or null: drawn
  const float* noise;         // [steps, batch, action_dim], or null: drawn
  const float* coefficients;  // [steps, 7]
  Seed seed;
  float noise_scale;
  float clip;
  float* trajectory;  // [steps + 1, batch, action_dim] or null: x before every step, and the last
  float* actions;     // [batch, action_dim]
  void* workspace;
  int64_t workspace_bytes;
  void* stream;
};

// One step of a sampler on `count` numbers.
struct ReverseStepCall {
  int64_t count;
  const float* x;
  const float* eps;
  const float* noise;           // or null: none
  const float* x0_previous;     // or null: none
  const float* coefficients;    // [7], or null: the values below
  float coefficient_values[7];  // that were on the CPU anyway: no copy, nothing to wait for
  float noise_scale;
  float clip;
  float* next;
  float* x0;
  void* stream;
};

// A critic's parameters: an MLP from [state, action] to one value.
struct CriticParameters {
  LinearParameters layers[max_layers];
  int layer_count;
  int state_dim;
  int action_dim;
  Activation activation;
  Precision precision;
};

enum class ActionOptimizer : int { adam, ascent };
enum class NormClip : int { none, batch, row };

struct ActionGradientCall {
  CriticParameters critics[2];
  int64_t batch;
  const float* state;   // [batch, state_dim]
  const float* action;  // [batch, action_dim]
  float* improved;      // [batch, action_dim]
  int steps;
  float lr;
  float eps;
  float max_norm;
  NormClip norm_clip;
  ActionOptimizer optimizer;
  float low;
  float high;
  void* workspace;
  int64_t workspace_bytes;
  void* stream;
};

enum class RffKind : int { sin, cos, cos_sin };

struct RffCall {
  LinearParameters omega;  // weight [features, in], bias: the phases or null
  int64_t batch;
  RffKind kind;
  float scale;
  const float* x;  // [batch, in]
  float* y;        // [batch, features], of cos_sin twice as many
  float* slope;    // [batch, features] for the backward pass, or null; of cos_sin y will do
  void* stream;
};

struct RffBackwardCall {
  LinearParameters omega;
  int64_t batch;
  RffKind kind;
  const float* x;       // [batch, in]
  const float* saved;   // slope, or of cos_sin y
  const float* grad_y;  // like y
  float* grad_x;        // [batch, in] or null
  float* grad_omega;    // [features, in]; null: neither this nor grad_bias, or without columns
  float* grad_bias;     // [features] or null
  void* workspace;
  void* stream;
};

// Workspaces are measured in bytes, -1 if the current device can't run the call.
//
// How the current device would run a call of these shapes; or why it can't.
struct KernelPlan {
  int blocks_a_tile;  // of the action gradient: a tile of one critic
  int rows_a_tile;
  int resident_layers;  // whose weights stay in shared memory; of a critic's, in both directions
  int shared_bytes;     // a block
  double clocks;        // expected of all steps, by the arithmetic at the top of the op's file
};
const char* plan_reverse_diffusion(const ReverseDiffusionCall&, KernelPlan*);
int64_t reverse_diffusion_workspace(const ReverseDiffusionCall&);
const char* reverse_diffusion(const ReverseDiffusionCall&);
const char* reverse_step(const ReverseStepCall&);
const char* plan_action_gradient(const ActionGradientCall&, KernelPlan*);
int64_t action_gradient_workspace(const ActionGradientCall&);
const char* action_gradient(const ActionGradientCall&);
const char* rff_features(const RffCall&);
int64_t rff_features_backward_workspace(const RffBackwardCall&);
const char* rff_features_backward(const RffBackwardCall&);

// Why kernels can't run on the current device, now or later, or nullptr: in `reason`. Returns what
// went wrong if that couldn't be found out.
const char* unavailable(const char** reason);

}  // namespace cuda
}  // namespace diffcore
