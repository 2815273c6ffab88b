// What the dispatcher and the kernels of every instruction set agree on: plain structures and a
// table of functions. No inline functions here: this header is compiled with different flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace diffcore {

enum class Activation : int { identity, relu, elu, silu, tanh, mish, gelu, sin, cos };
enum class Precision : int { float32, bfloat16 };

constexpr int max_layers = 16;
constexpr int least_shared_rows = 8;  // with fewer a second thread isn't worth waking

// torch.nn.Linear: weight [out, in], rows `row_stride` apart, bias [out].
struct LinearParameters {
  const float* weight;
  const float* bias;
  int in;
  int out;
  int row_stride;
  int threads;  // that may read and pack it, and the rest of its network, together
};

// A weight matrix in the order in which the tile kernel reads it; see tile.h.
struct PackedLinear {
  const void* panels;
  const float* bias;  // padded to whole vectors
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

// The denoiser, ready to run: the first layer is split by input, and all that depends on the step
// alone is already summed up in `step_bias` [steps, stride].
struct DenoiserPack {
  PackedLinear action_input;
  PackedLinear state_input;
  PackedLinear trunk[max_layers];  // from the second layer on
  int trunk_layers;
  const float* step_bias;
  int64_t step_bias_stride;
  int steps;
  Activation activation;
  Precision precision;
};

// Whether threads worked together, and whether one of them kept another waiting.
enum class TeamWork : int { none, in_time, late };

// Threads that may run one tile together.
struct TeamOptions {
  int threads;    // how many at most,
  int64_t share;  // and the least bytes of a layer's weights for each of them
  TeamWork* work;
};

struct ReverseDiffusionCall {
  const DenoiserPack* denoiser;
  int64_t batch;
  int action_dim;
  int state_dim;
  int steps;
  const float* state;         // [batch, state_dim]
  const float* x_init;        // [batch, action_dim], or null: drawn
  const float* noise;         // [steps, batch, action_dim], or null: drawn
  const float* coefficients;  // [steps, 7]
  uint64_t seed;
  float noise_scale;
  float clip;
  float* trajectory;  // [steps + 1, batch, action_dim] or null: x before every step, and the last
  float* actions;     // [batch, action_dim]
  int threads;
  TeamOptions team;
};

// One step of a sampler on `count` numbers.
struct ReverseStepCall {
  int64_t count;
  const float* x;
  const float* eps;
  const float* noise;         // or null: none
  const float* x0_previous;   // or null: none
  const float* coefficients;  // [7]
  float noise_scale;
  float clip;
  float* next;
  float* x0;
};

// Philox 4x32-10 normals z[row, column] for rows first_row.. of one step; see philox.h.
struct NormalsCall {
  uint64_t seed;
  uint32_t step;
  int64_t first_row;
  int64_t rows;
  int columns;
  float* out;  // [rows, columns]
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

struct TwinCriticParameters {
  CriticParameters critics[2];
};

// A critic, ready for value and action gradient: the state's part of the first layer apart, and
// for the way back every inner weight matrix transposed (of layer 0 the action columns only).
struct CriticPack {
  PackedLinear action_input;
  PackedLinear state_input;
  PackedLinear forward[max_layers];   // layers 1 .. count - 1; entry 0 is unused
  PackedLinear backward[max_layers];  // layers 0 .. count - 2
  const float* output_weight;         // the last layer's only row, padded with zeros
  int layer_count;
  Activation activation;
  Precision precision;
};

struct TwinCriticPack {
  CriticPack critics[2];
};

enum class ActionOptimizer : int { adam, ascent };
enum class NormClip : int { none, batch, row };

struct ActionGradientCall {
  const CriticPack* critics[2];
  int64_t batch;
  int action_dim;
  int state_dim;
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
  int threads;
  TeamOptions team;
};

// An MLP: layer, activation, layer, activation, ... and which ways through it will be taken.
struct MlpParameters {
  LinearParameters layers[max_layers];
  Activation activations[max_layers];
  int layer_count;
  Precision precision;
  bool forward;
  bool backward;
  bool backward_to_input;
};

// Directions that weren't asked for have shapes only.
struct MlpPack {
  PackedLinear forward[max_layers];
  PackedLinear backward[max_layers];  // transposed
  Activation activations[max_layers];
  int layer_count;
  Precision precision;
};

constexpr int max_networks = 8;

// Networks of one shape on the same rows.
struct MlpCall {
  const MlpPack* networks[max_networks];
  int network_count;
  int64_t batch;
  const float* x;  // [batch, in]
  float* y;        // [networks, batch, out]
  float* saved;    // [networks, batch, mlp_saved_width()] for the backward pass, or null
  int threads;
};

struct MlpBackwardCall {
  const MlpPack* networks[max_networks];
  int network_count;
  int64_t batch;
  const float* x;              // as in the forward pass
  const float* saved;          // as the forward pass left it
  const float* grad_y;         // [networks, batch, out]
  float* grad_x;               // [batch, in] or null
  float* const* grad_weights;  // network by network, layer by layer; or null: not wanted
  float* const* grad_biases;
  int threads;
};

// The loss that trains critics of one shape on common targets, and its gradients where they are wanted.
struct CriticLossCall {
  const MlpPack* networks[max_networks];
  int network_count;
  int64_t batch;
  const float* x;              // [batch, in]
  const float* target;         // [batch, out]
  const float* row_weight;     // [batch] or null: rows that all weigh 1
  float* loss;                 // one number
  float* q;                    // [networks, batch, out]
  float* grad_x;               // [batch, in] or null
  float* const* grad_weights;  // network by network, layer by layer; or null: not wanted
  float* const* grad_biases;
  int threads;
};

// One call of the loss that trains a denoiser, and its gradients where they are wanted.
struct DenoisingLossCall {
  const MlpPack* time_mlp;
  const MlpPack* trunk;
  int64_t batch;
  int state_dim;
  int action_dim;
  int time_dim;
  const float* state;      // [batch, state_dim]
  const float* action;     // [batch, action_dim]
  const float* noise;      // [batch, action_dim]
  const float* weight;     // [batch] or null: rows that all weigh 1
  const int64_t* t;        // [batch]
  const float* levels;     // by t: sqrt(abar), sqrt(1 - abar)
  const float* embedding;  // by t: [time_dim]
  bool per_row;            // losses [batch] and the gradients of their sum, in place of their mean
  float* loss;
  float* grad_state;           // [batch, state_dim] or null
  float* grad_action;          // [batch, action_dim] or null
  float* const* grad_weights;  // time MLP's layers, then the trunk's; or null: not wanted
  float* const* grad_biases;
  int threads;
};

// Actions tanh(mean + std z) and their log densities; raw is [mean, log std before its tanh].
struct SquashedGaussianCall {
  int64_t batch;
  int action_dim;
  float low;  // the bounds of log std
  float high;
  const float* raw;    // [batch, 2 action_dim]
  const float* noise;  // [batch, action_dim]
  float* action;       // [batch, action_dim]
  float* log_prob;     // [batch]
  float* saved;        // [batch, 2 action_dim] for the backward pass, or null
};

struct SquashedGaussianBackwardCall {
  int64_t batch;
  int action_dim;
  const float* action;         // as the forward pass gave it
  const float* saved;          // as the forward pass left it
  const float* grad_action;    // [batch, action_dim] or null: zero
  const float* grad_log_prob;  // [batch] or null: zero
  float* grad_raw;             // [batch, 2 action_dim]
};

// The value of states, min_n q_n(s, a) - temperature log p(a), and the loss of the policy that drew the
// actions: its negative mean.
struct SoftValueCall {
  int64_t batch;
  int network_count;
  const float* q;            // [networks, batch]
  const float* log_prob;     // [batch]
  const float* temperature;  // one number
  float* value;              // [batch]
  float* loss;               // one number
  float* grad_q;             // [networks, batch] or null: no gradients wanted
  float* grad_log_prob;      // [batch]
};

enum class RffKind : int { sin, cos, cos_sin };

struct RffCall {
  const PackedLinear* layer;
  int64_t batch;
  RffKind kind;
  float scale;
  const float* x;  // [batch, in]
  float* y;        // [batch, features], of cos_sin twice as many
  float* slope;    // [batch, features] for the backward pass, or null; of cos_sin y will do
  int threads;
};

struct RffBackwardCall {
  const PackedLinear* layer;  // transposed; null without grad_x
  int64_t batch;
  int in;
  int features;
  RffKind kind;
  const float* x;       // [batch, in]
  const float* saved;   // slope, or of cos_sin y
  const float* grad_y;  // like y
  float* grad_x;        // [batch, in] or null
  float* grad_omega;    // [features, in] or null: neither this nor grad_bias
  float* grad_bias;     // [features] or null
  int threads;
};

// What a step of Adam is made with besides gradient and moments, at a parameter's t-th step.
struct AdamScalars {
  float exp_avg_weight;     // 1 - beta1
  float exp_avg_sq_decay;   // beta2
  float exp_avg_sq_weight;  // 1 - beta2
  float root_correction;    // sqrt(1 - beta2^t)
  float step_size;          // lr / (1 - beta1^t)
  float eps;
};

// A parameter and its moments, contiguous, which a step changes in place.
struct AdamParameter {
  float* value;
  float* exp_avg;
  float* exp_avg_sq;
  AdamScalars scalars;
};

struct AdamCall {
  const AdamParameter* parameters;
  const float* const* gradients;  // where null, the parameter stays as it is
  const int64_t* sizes;
  int count;
  double* squared_norm;  // of all these gradients together: added to what is there
  int threads;
};

// Diff-SR's loss, mean of |score_weight * psi^T zeta + offset|^2 over the batch, and its gradients.
// zeta [batch, features, state_dim] is weight, bias applied to hidden.
struct ScoreMatchingLossCall {
  int64_t batch;
  int features;
  int state_dim;
  int hidden_dim;
  Precision precision;
  const float* psi;           // [batch, features]
  const float* hidden;        // [batch, hidden_dim]
  const float* weight;        // [features * state_dim, hidden_dim]
  const float* bias;          // [features * state_dim]
  const float* offset;        // [batch, state_dim]
  const float* score_weight;  // [batch]
  float* loss;                // one number
  float* grad_psi;            // shaped like what they are the gradients of; null: not wanted
  float* grad_hidden;
  float* grad_weight;
  float* grad_bias;
  // Instead of giving the weight's gradient, step the weight, after its last use; or null.
  const AdamParameter* weight_step;
  double* weight_squared_norm;  // of the gradient of that step: added to what is there
  int threads;
};

// What an instruction set provides.
struct Kernels {
  const char* isa;
  bool native_bf16;
  void (*fingerprint)(const float* values, int64_t count, uint32_t state[64]);
  int64_t (*denoiser_pack_bytes)(const DenoiserParameters&);
  TeamWork (*pack_denoiser)(const DenoiserParameters&, void* block, DenoiserPack*);
  void (*reverse_diffusion)(const ReverseDiffusionCall&);
  void (*reverse_step)(const ReverseStepCall&);
  int64_t (*twin_critic_pack_bytes)(const TwinCriticParameters&);
  TeamWork (*pack_twin_critic)(const TwinCriticParameters&, void* block, TwinCriticPack*);
  void (*action_gradient)(const ActionGradientCall&);
  void (*normals)(const NormalsCall&);
  int64_t (*mlp_pack_bytes)(const MlpParameters&);
  void (*pack_mlp)(const MlpParameters&, void* block, MlpPack*);
  int (*mlp_saved_width)(const MlpPack&);
  void (*mlp_forward)(const MlpCall&);
  void (*mlp_backward)(const MlpBackwardCall&);
  void (*critic_loss)(const CriticLossCall&);
  void (*denoising_loss)(const DenoisingLossCall&);
  void (*squashed_gaussian)(const SquashedGaussianCall&);
  void (*squashed_gaussian_backward)(const SquashedGaussianBackwardCall&);
  void (*join_columns)(const float* a, int a_width, const float* b, int b_width, int64_t rows,
                       float* out);
  void (*last_columns)(const float* from, int width, int count, int64_t rows, float* out);
  void (*soft_value)(const SoftValueCall&);
  int64_t (*layer_pack_bytes)(const LinearParameters&, bool transposed);
  void (*pack_layer)(const LinearParameters&, bool transposed, void* block, PackedLinear*);
  void (*rff_features)(const RffCall&);
  void (*rff_features_backward)(const RffBackwardCall&);
  void (*score_matching_loss)(const ScoreMatchingLossCall&);
  void (*adam)(const AdamCall&);
  double (*sum_of_squares)(const float* values, int64_t count);
  double (*fma_peak)(int threads, double seconds);
};

// Memory of the calling thread that grows and stays, 64-byte aligned; valid until the thread asks for the
// same slot again or it is released, as slots with more than `large_scratch` are. A call keeps what all its
// threads share in one slot and every thread the buffers of its tile in another; the third is for what goes
// from call to call of an op that makes several, the last for gradients that such an op uses up itself.
enum class Scratch : int { call, tile, between_calls, gradients };
constexpr int scratch_slots = 4;
constexpr int64_t large_scratch = int64_t{64} << 20;
// Throws std::bad_alloc where there isn't any, or, for regions that no exception may leave, gives null.
char* thread_scratch(Scratch slot, int64_t bytes);
char* thread_scratch_or_null(Scratch slot, int64_t bytes);
void release_scratch(Scratch slot);
[[noreturn]] void throw_out_of_memory();

}  // namespace diffcore
