#include <cuda_runtime_api.h>

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

__global__ void write_one(int* out) { *out = 1; }

cudaError_t launch_and_read(int& value) {
  int* out = nullptr;
  cudaError_t status = cudaMalloc(&out, sizeof(int));
  if (status != cudaSuccess) return status;
  write_one<<<1, 1>>>(out);
  status = cudaGetLastError();
  if (status == cudaSuccess) {
    status = cudaMemcpy(&value, out, sizeof(int), cudaMemcpyDeviceToHost);
  }
  cudaFree(out);
  return status;
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

std::string probe(int device) {
  int before = 0;
  std::string error = message(cudaGetDevice(&before));
  if (error.empty()) error = message(cudaSetDevice(device));
  if (!error.empty()) return error;
  int value = 0;
  error = message(launch_and_read(value));
  if (error.empty() && value != 1) error = "a kernel ran but did not write its output";
  const std::string restored = message(cudaSetDevice(before));
  return error.empty() ? restored : error;
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
