// What launchers ask of CUDA's runtime: to launch, and what the current device is like.
//
// Nothing but host code, so that tests compile it against a runtime whose calls fail as they wish
// (testing/runtime). Where the kernels themselves run on a CPU, there is none.
#pragma once

#include <cstdint>

#ifdef DIFFCORE_CUDA_ON_CPU
#include "testing/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

namespace diffcore {
namespace cuda {

// A launch's shape beyond grid and block.
struct Launch {
  unsigned grid;
  unsigned block;
  size_t shared_bytes;
  void* stream;
  unsigned cluster = 1;      // blocks that share a cluster
  bool cooperative = false;  // all blocks must run at the same time
};

// What a launcher asks about the current device.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block may have
  bool clusters;     // it can run them, and the kernels were compiled for them
};

#ifdef DIFFCORE_CUDA_ON_CPU

template <class Arguments>
const char* clusters_at_once(const Launch& how, void (*)(Arguments), int* count) {
  *count = cuda_on_cpu::device().clusters_at_once(static_cast<int>(how.cluster));
  return nullptr;
}

// Whether launchers shall think of groups of so many blocks: tests ask for those of one size.
inline bool may_group(int size) {
  const int only = cuda_on_cpu::device().group_size;
  return only == 0 || size == only;
}

template <class Arguments>
const char* launch(const Launch& how, void (*kernel)(Arguments), const Arguments& arguments) {
  if (how.grid == 0) return "invalid configuration argument";  // as CUDA says
  if (how.cluster > 1 && cuda_on_cpu::device().major < cuda_on_cpu::first_with_clusters)
    cuda_on_cpu::fail("clusters exist from compute capability 9.0 on", "launch", 0);
  int at_once = 0;
  clusters_at_once(how, kernel, &at_once);
  if (how.cluster > 1 && how.cooperative && static_cast<int>(how.grid / how.cluster) > at_once)
    cuda_on_cpu::fail("more clusters than run at the same time", "launch", 0);
  cuda_on_cpu::launch(
      {dim3(how.grid), dim3(how.block), how.shared_bytes, how.cluster, how.cooperative},
      [&] { kernel(arguments); });
  return nullptr;
}

inline const char* current_device(Device* device) {
  const cuda_on_cpu::Device d = cuda_on_cpu::device();
  *device = {d.multiprocessors, d.shared_bytes, d.major >= cuda_on_cpu::first_with_clusters};
  return nullptr;
}

#else  // CUDA

// What went wrong in a call, or nullptr. The runtime keeps the error until somebody asks for it, to
// whom it would seem to be that of a later call: so it is taken back here, where it is reported.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// A launch in the words of the runtime, which keeps pointing to `attributes`.
inline cudaLaunchConfig_t launch_config(const Launch& how, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid);
  config.blockDim = dim3(how.block);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = how.cluster;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (how.cooperative) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  return config;
}

// Lets a kernel have as much dynamic shared memory as a launch asks for: all that a block may have,
// since threads that each set what their own launch needs would lower it for each other.
inline cudaError_t allow_shared_bytes(const Launch& how, const void* kernel) {
  if (how.shared_bytes <= 48 << 10) return cudaSuccess;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  return error;
}

template <class Arguments>
const char* launch(const Launch& how, void (*kernel)(Arguments), const Arguments& arguments) {
  const auto function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = allow_shared_bytes(how, function);
  if (error != cudaSuccess) return error_text(error);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launch_config(how, attributes);
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return error_text(cudaLaunchKernelExC(&config, function, pointers));
}

// How many of a launch's clusters the device can run at the same time, as the driver said when it
// was first asked. A cluster's blocks are neighbours, so that a few multiprocessors may be left
// over.
const char* clusters_at_once(const Launch& how, const void* kernel, int* count);  // device.cu

template <class Arguments>
const char* clusters_at_once(const Launch& how, void (*kernel)(Arguments), int* count) {
  return clusters_at_once(how, reinterpret_cast<const void*>(kernel), count);
}

inline bool may_group(int) { return true; }

const char* current_device(Device* device);  // device.cu, which asks once for every device

#endif

}  // namespace cuda
}  // namespace diffcore
