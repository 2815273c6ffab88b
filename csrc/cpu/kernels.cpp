// All CPU kernels for one instruction set. CMake compiles this file once for each, with that set's
// flags, DIFFCORE_ISA as the namespace and DIFFCORE_ISA_<SET> defined.
#include "kernels.h"

#include "action_gradient.h"
#include "mlp.h"
#include "peak.h"
#include "reverse_diffusion.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// Four vectors of 16 words: every word changes its lane's state by a bijection, so a change of any
// single value always shows, and a change of several stays hidden only by a coincidence of 32-bit
// lanes.
static void fingerprint(const float* values, int64_t count, uint32_t state[64]) {
  int64_t i = 0;
  uint32_t local[64];
  memcpy(local, state, sizeof local);
  for (; i + 64 <= count; i += 64) {
    uint32_t words[64];
    memcpy(words, values + i, sizeof words);
    for (int l = 0; l < 64; ++l) local[l] = (local[l] ^ words[l]) * 0x9E3779B1u;
  }
  for (int l = 0; i < count; ++i, ++l) local[l] = (local[l] ^ as_bits(values[i])) * 0x9E3779B1u;
  // So that the same values in another arrangement of tensors differ.
  local[count & 63] = (local[count & 63] ^ static_cast<uint32_t>(count)) * 0x85EBCA77u;
  memcpy(state, local, sizeof local);
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
    critic_pack_bytes,
    pack_critic,
    action_gradient,
    normals,
    mlp_pack_bytes,
    pack_mlp,
    mlp_saved_width,
    mlp_forward,
    mlp_backward,
    fma_peak,
};

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
