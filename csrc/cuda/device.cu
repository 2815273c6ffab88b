// The devices that the kernels run on.
#include <cstdio>

#include "kernels.h"
#include "runtime.cuh"

namespace diffcore {
namespace cuda {

namespace {

// Compute capability 8.0: cp.async, and the tensor cores' tf32 and bf16.
constexpr int oldest_major = 8;

// Clusters: by the device's compute capability, and by that which code was compiled for. They aren't
// the same where the driver compiles older PTX, in which kernels can't be a cluster's.
constexpr int first_major_with_clusters = 9;

// Texts of the calling thread, valid until its next call.
thread_local char text[256];

// Stands for all kernels, which are compiled for the same architectures.
__global__ void probe() {}

// Whether an error says what won't change while the process lives: no device, or none that has a
// kernel. Others, such as too little memory for a context, may pass.
bool is_for_good(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion: return true;
    default: return false;
  }
}

cudaError_t attributes_of_kernels(cudaFuncAttributes* attributes) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(probe));
}

}  // namespace

const char* current_device(Device* device) {
  int index = 0, major = 0;
  cudaFuncAttributes kernels{};
  cudaError_t error = cudaGetDevice(&index);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = attributes_of_kernels(&kernels);
  device->clusters =
      major >= first_major_with_clusters && kernels.ptxVersion >= 10 * first_major_with_clusters;
  return error_text(error);
}

const char* unavailable(const char** reason) {
  int driver = 0, runtime = 0, device = 0, major = 0, minor = 0, cooperative = 0;
  *reason = nullptr;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) {
    *reason = "no CUDA driver is installed";
    return nullptr;
  }
  if (error == cudaSuccess) error = cudaRuntimeGetVersion(&runtime);
  if (error == cudaSuccess && driver / 1000 < runtime / 1000) {
    snprintf(text, sizeof(text), "the driver knows CUDA %d.%d, the kernels were built with %d.%d",
             driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    *reason = text;
    return nullptr;
  }
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&cooperative, cudaDevAttrCooperativeLaunch);
  if (error == cudaSuccess && (major < oldest_major || !cooperative)) {
    snprintf(text, sizeof(text), "compute capability %d.%d, the kernels need %d.0 or newer", major,
             minor, oldest_major);
    *reason = text;
    return nullptr;
  }
  // Architectures that weren't built, and PTX that is too new for the driver.
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = attributes_of_kernels(&attributes);
  const char* failure = error_text(error);
  if (!is_for_good(error)) return failure;
  *reason = failure;
  return nullptr;
}

}  // namespace cuda
}  // namespace diffcore
