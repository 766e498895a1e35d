#include <cuda_runtime_api.h>

#include <thread>

#include "cuda/devices.h"

namespace slimvit {

std::string dotted(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

namespace {

// Empty for success. Clears the runtime's last error, so that torch never meets it.
std::string message(cudaError_t status) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (status == cudaErrorInsufficientDriver && driver > 0) {
    return "the NVIDIA driver serves CUDA " + dotted(driver) + " and slimvit._cuda is built with " +
           dotted(runtime) + ": update the driver, or build slimvit with an older CUDA";
  }
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

// The architecture that this kernel was compiled for, times ten.
__global__ void write_architecture(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

cudaError_t launch_and_read(int& value) {
  int* out = nullptr;
  cudaError_t status = cudaMalloc(&out, sizeof(int));
  if (status != cudaSuccess) return status;
  write_architecture<<<1, 1>>>(out);
  status = cudaGetLastError();
  if (status == cudaSuccess) {
    status = cudaMemcpy(&value, out, sizeof(int), cudaMemcpyDeviceToHost);
  }
  cudaFree(out);
  return status;
}

// Of the current device. Code for architectures before sm_80 runs on later ones where the driver
// compiles it anew, but has no body for kernels that the host chooses there: see compiled_for.
std::string why_not_run(int device) {
  int value = 0, major = 0;
  std::string error = message(launch_and_read(value));
  if (error.empty()) {
    error = message(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  }
  if (error.empty() && value == 0) return "a kernel ran but did not write its output";
  if (error.empty() && major >= 8 && value < 800) return message(cudaErrorNoKernelImageForDevice);
  return error;
}

}  // namespace

std::string why_not() {
  int count = 0;
  const std::string error = message(cudaGetDeviceCount(&count));
  if (!error.empty() && driver_version() == 0) return "no NVIDIA driver is installed";
  if (!error.empty()) return error;
  return count > 0 ? "" : "no CUDA device is visible";
}

std::vector<Device> devices() {
  std::vector<Device> found;
  int count = 0;
  if (!message(cudaGetDeviceCount(&count)).empty()) return found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (!message(cudaGetDeviceProperties(&properties, index)).empty()) continue;
    found.push_back(
        {properties.name, properties.major, properties.minor, properties.totalGlobalMem});
  }
  return found;
}

// On a thread of its own, which has a current device of its own: to go back to the caller's would
// take memory of a device that nobody may use.
std::string probe(int device) {
  std::string error;
  std::thread([&] {
    error = message(cudaSetDevice(device));
    if (error.empty()) error = why_not_run(device);
  }).join();
  return error;
}

int driver_version() {
  int version = 0;
  message(cudaDriverGetVersion(&version));
  return version;
}

int runtime_version() {
  int version = 0;
  message(cudaRuntimeGetVersion(&version));
  return version;
}

}  // namespace slimvit
