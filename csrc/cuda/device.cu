// The devices that the kernels run on.
#include <cstdio>

#include "kernels.h"
#include "runtime.cuh"

namespace diffcore {
namespace cuda {

namespace {

// Compute capability 8.0: cp.async, and the tensor cores' tf32 and bf16.
constexpr int oldest_major = 8;

// Texts of the calling thread, valid until its next call.
thread_local char text[256];

}  // namespace

const char* unavailable() {
  int driver = 0, runtime = 0, device = 0;
  if (const char* error = error_text(cudaDriverGetVersion(&driver))) return error;
  if (driver == 0) return "no CUDA driver is installed";
  if (const char* error = error_text(cudaRuntimeGetVersion(&runtime))) return error;
  if (driver / 1000 < runtime / 1000) {
    snprintf(text, sizeof(text), "the driver knows CUDA %d.%d, the kernels were built with %d.%d",
             driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    return text;
  }
  if (const char* error = error_text(cudaGetDevice(&device))) return error;
  int major = 0, minor = 0, cooperative = 0;
  cudaError_t error = cudaSuccess;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&cooperative, cudaDevAttrCooperativeLaunch);
  if (error != cudaSuccess) return error_text(error);
  if (major < oldest_major || !cooperative) {
    snprintf(text, sizeof(text), "compute capability %d.%d, the kernels need %d.0 or newer", major,
             minor, oldest_major);
    return text;
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace diffcore
