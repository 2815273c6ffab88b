// What launchers ask of CUDA's runtime, under C names, for test_cuda_runtime.py.
#include "kernels.h"
#include "runtime.cuh"

using namespace diffcore::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

void kernel(int) {}

}  // namespace

// From now on a call of the runtime ends in an error; in none with 0.
EXPORT void fail(const char* call, int error) {
  fake_runtime.failing_call = call;
  fake_runtime.failure = static_cast<cudaError_t>(error);
}
EXPORT int calls_of(const char* call) { return fake_runtime.calls[call]; }
EXPORT int last_error() { return fake_runtime.last_error; }
EXPORT void set_architectures(int major, int compiled) {
  fake_runtime.major = major;
  fake_runtime.compiled = compiled;
}
EXPORT void set_driver(int version) { fake_runtime.driver = version; }

EXPORT const char* launched(int blocks, int shared_bytes) {
  return launch({static_cast<unsigned>(blocks), 32, static_cast<size_t>(shared_bytes), nullptr},
                kernel, 0);
}
// What went wrong, or nullptr; why kernels can't run is in `reason`.
EXPORT const char* why_unavailable(const char** reason) { return unavailable(reason); }
EXPORT const char* clusters(int* count) {
  return clusters_at_once({8, 32, 100'000, nullptr, 8}, kernel, count);
}
// {multiprocessors, bytes of shared memory, whether groups are clusters}
EXPORT const char* device_of_launchers(int* out) {
  Device device{};
  const char* error = current_device(&device);
  out[0] = device.multiprocessors;
  out[1] = device.shared_bytes;
  out[2] = device.clusters;
  return error;
}
// A failure of somebody else, who doesn't look.
EXPORT const char* set_by_others() {
  cudaSetDevice(0);
  return nullptr;
}
