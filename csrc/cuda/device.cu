// The devices that the kernels run on.
#include <cstdio>
#include <map>
#include <mutex>
#include <tuple>

#include "kernels.h"
#include "runtime.cuh"

namespace diffcore {
namespace cuda {

namespace {

// Compute capability 8.0: cp.async, and the tensor cores' tf32 and bf16.
constexpr int oldest_major = 8;

// Clusters: by the device's compute capability, and by that which code was compiled for. They
// aren't the same where the driver compiles older PTX, in which kernels can't be a cluster's.
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

// Answers about a device that stay the same, by what was asked: a plan asks at every call, and has
// to come to the same workspace as when that was measured. What couldn't be answered is asked
// again.
template <class Key, class Answer>
class Answers {
 public:
  template <class Ask>
  const char* get(const Key& key, Answer* answer, const Ask& ask) {
    const std::lock_guard<std::mutex> lock(one_at_a_time_);
    const auto found = answers_.find(key);
    if (found == answers_.end()) {
      const cudaError_t error = ask(answer);
      if (error != cudaSuccess) return error_text(error);
      answers_[key] = *answer;
    } else {
      *answer = found->second;
    }
    return nullptr;
  }

 private:
  std::mutex one_at_a_time_;
  std::map<Key, Answer> answers_;
};

cudaError_t describe(int index, Device* device) {
  int major = 0;
  cudaFuncAttributes kernels{};
  cudaError_t error = cudaSuccess;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = attributes_of_kernels(&kernels);
  device->clusters =
      major >= first_major_with_clusters && kernels.ptxVersion >= 10 * first_major_with_clusters;
  return error;
}

}  // namespace

const char* current_device(Device* device) {
  static auto& devices = *new Answers<int, Device>;  // for threads that outlive this module, too
  int index = 0;
  if (const char* error = error_text(cudaGetDevice(&index))) return error;
  return devices.get(index, device, [&](Device* answer) { return describe(index, answer); });
}

const char* clusters_at_once(const Launch& how, const void* kernel, int* count) {
  using Key = std::tuple<int, const void*, unsigned, size_t>;
  static auto& counts = *new Answers<Key, int>;
  int index = 0;
  if (const char* error = error_text(cudaGetDevice(&index))) return error;
  return counts.get({index, kernel, how.cluster, how.shared_bytes}, count, [&](int* answer) {
    // Of a cooperative launch too, whose blocks are the clusters that are counted.
    Launch alone = how;
    alone.cooperative = false;
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = launch_config(alone, attributes);
    const cudaError_t error = allow_shared_bytes(how, kernel);
    return error == cudaSuccess ? cudaOccupancyMaxActiveClusters(answer, kernel, &config) : error;
  });
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
