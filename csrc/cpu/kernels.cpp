// All CPU kernels for one instruction set. CMake compiles this file once for each, with that set's
// flags, DIFFCORE_ISA as the namespace and DIFFCORE_ISA_<SET> defined.
#include "kernels.h"

#include "action_gradient.h"
#include "adam.h"
#include "critic_loss.h"
#include "denoising_loss.h"
#include "mlp.h"
#include "peak.h"
#include "reverse_diffusion.h"
#include "rff_features.h"
#include "score_matching_loss.h"
#include "soft_value.h"
#include "squashed_gaussian.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// One round of the fingerprint, a bijection of the lane for any word and of the word for any lane: a
// change of a single value always shows. The rotation carries the top bits down, where the
// multiplication spreads them; without it two flipped signs could cancel.
template <class Lane>
DIFFCORE_INLINE void mix(Lane* lane, const Lane& word) {
  const Lane mixed = *lane ^ word;
  *lane = (mixed << 13 | mixed >> 19) * 0x9E3779B1u;
}

// 64 lanes, each over every 64th word: a change of several values stays hidden only where all the
// lanes that it touches come out the same by chance, 2^-32 each.
static void fingerprint(const float* values, int64_t count, uint32_t state[64]) {
  typedef uint32_t Lanes __attribute__((vector_size(4 * W)));  // an array would live in memory
  constexpr int vectors = 64 / W;
  int64_t i = 0;
  Lanes lanes[vectors];
  memcpy(lanes, state, sizeof lanes);
  for (; i + 64 <= count; i += 64) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      Lanes words;
      memcpy(&words, values + i + v * W, sizeof words);
      mix(&lanes[v], words);
    }
  }
  memcpy(state, lanes, sizeof lanes);
  for (int l = 0; i < count; ++i, ++l) mix(&state[l], as_bits(values[i]));
  // So that the same values in another arrangement of tensors differ.
  mix(&state[count & 63], static_cast<uint32_t>(count));
}

#if defined(DIFFCORE_NATIVE_BF16)
constexpr bool native_bf16 = true;
#else
constexpr bool native_bf16 = false;
#endif

#define DIFFCORE_STRING_(x) #x
#define DIFFCORE_STRING(x) DIFFCORE_STRING_(x)

extern const Kernels kernels;
const Kernels kernels = {
    DIFFCORE_STRING(DIFFCORE_ISA),
    native_bf16,
    fingerprint,
    denoiser_pack_bytes,
    pack_denoiser,
    reverse_diffusion,
    reverse_step,
    twin_critic_pack_bytes,
    pack_twin_critic,
    action_gradient,
    normals,
    mlp_pack_bytes,
    pack_mlp,
    mlp_saved_width,
    mlp_forward,
    mlp_backward,
    critic_loss,
    denoising_loss,
    squashed_gaussian,
    squashed_gaussian_backward,
    join_columns,
    last_columns,
    soft_value,
    layer_pack_bytes,
    pack_layer,
    rff_features,
    rff_features_backward,
    score_matching_loss,
    adam,
    sum_of_squares,
    fma_peak,
};

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
