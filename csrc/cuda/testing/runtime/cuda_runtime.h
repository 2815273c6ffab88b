// CUDA's runtime where there is none, for tests of what launchers ask of it (runtime.cuh,
// device.cu): it launches nothing, answers as it is told to, and counts its calls.
//
// As in the real one, the error of a call stays the thread's last error until somebody takes it.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#define __global__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
};

struct FakeRuntime {
  // What it answers.
  int driver = 13000;
  int multiprocessors = 132;
  int major = 9;      // of the compute capability
  int compiled = 90;  // for which compute capability a kernel's PTX was made
  int clusters = 15;  // that run at the same time
  std::string failing_call;
  cudaError_t failure = cudaSuccess;

  cudaError_t last_error = cudaSuccess;
  std::map<std::string, int> calls;

  cudaError_t ends(const char* call, cudaError_t result = cudaSuccess) {
    ++calls[call];
    if (failure != cudaSuccess && failing_call == call) result = failure;
    if (result != cudaSuccess) last_error = result;
    return result;
  }
};
inline FakeRuntime fake_runtime;

// -- errors ---------------------------------------------------------------------------------------

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake_runtime.last_error;
  fake_runtime.last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default: return "an error";
  }
}

// -- devices --------------------------------------------------------------------------------------

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake_runtime.driver;
  return fake_runtime.ends("cudaDriverGetVersion");
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return fake_runtime.ends("cudaRuntimeGetVersion");
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return fake_runtime.ends("cudaGetDevice");
}
inline cudaError_t cudaSetDevice(int) { return fake_runtime.ends("cudaSetDevice"); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = fake_runtime.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = fake_runtime.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
  }
  return fake_runtime.ends("cudaDeviceGetAttribute");
}

// -- kernels --------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

struct cudaFuncAttributes {
  int ptxVersion;
  int binaryVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {fake_runtime.compiled, 10 * fake_runtime.major};
  return fake_runtime.ends("cudaFuncGetAttributes");
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return fake_runtime.ends("cudaFuncSetAttribute");
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                                  const cudaLaunchConfig_t*) {
  *count = fake_runtime.clusters;
  return fake_runtime.ends("cudaOccupancyMaxActiveClusters");
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return fake_runtime.ends("cudaLaunchKernelExC",
                           config->gridDim.x == 0 ? cudaErrorInvalidConfiguration : cudaSuccess);
}
