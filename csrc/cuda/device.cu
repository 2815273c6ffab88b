// The devices that the kernels run on.
#include <cuda_runtime.h>

#include <cstdio>

#include "kernels.h"

namespace diffcore {
namespace cuda {

namespace {

constexpr int oldest_major =
    8;  // compute capability 8.0: cp.async and the tensor cores' tf32, bf16

// Texts of the calling thread, valid until its next call.
thread_local char text[256];

const char* message(cudaError_t error) { return error ? cudaGetErrorString(error) : nullptr; }

}  // namespace

const char* unavailable(int device) {
  int driver = 0, runtime = 0, count = 0;
  if (const char* error = message(cudaDriverGetVersion(&driver))) return error;
  if (driver == 0) return "no CUDA driver is installed";
  if (const char* error = message(cudaRuntimeGetVersion(&runtime))) return error;
  if (driver / 1000 < runtime / 1000) {
    snprintf(text, sizeof(text), "the driver knows CUDA %d.%d, the kernels were built with %d.%d",
             driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    return text;
  }
  if (const char* error = message(cudaGetDeviceCount(&count))) return error;
  if (device >= count) {
    snprintf(text, sizeof(text), "there is no CUDA device %d", device);
    return text;
  }
  int major = 0, minor = 0, cooperative = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  if (major < oldest_major || !cooperative) {
    snprintf(text, sizeof(text), "compute capability %d.%d, the kernels need %d.0 or newer", major,
             minor, oldest_major);
    return text;
  }
  return message(cudaGetLastError());
}

const char* use_device(int device, int* before) {
  if (const char* error = message(cudaGetDevice(before))) {
    const char* reason = unavailable(device);  // in more words
    return reason ? reason : error;
  }
  return *before == device ? nullptr : message(cudaSetDevice(device));
}

}  // namespace cuda
}  // namespace diffcore
