// The module that the tests load in the place of slimvit._cuda: the same kernels, emulated.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "emulation.h"

namespace py = pybind11;

void bind_ops(py::module_& m);

namespace slimvit {
namespace {

struct Planted {
  float* out;
  int barrier;  // 0: none, 1: of the warp, 2: of the block
};

// Each thread writes a value, and reads its neighbour's.
void planted_kernel(Planted p) {
  Shared<unsigned char> memory = shared_memory();
  Shared<float> values = carve<float>(memory, 64);
  values[threadIdx.x] = float(threadIdx.x);
  if (p.barrier == 1) __syncwarp();
  if (p.barrier == 2) __syncthreads();
  p.out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

void planted(std::uintptr_t out, int barrier) {
  const Planted p{reinterpret_cast<float*>(out), barrier};
  launch("planted", planted_kernel, dim3(1), 64, 256, nullptr, p);
}

// Copies are started, and read with or without waiting for them.
void planted_copy_kernel(Planted p) {
  Shared<unsigned char> memory = shared_memory();
  Shared<float> values = carve<float>(memory, 128);
  copy16_async(values + 4 * threadIdx.x, p.out + 4 * threadIdx.x, true);
  close_copies();
  if (p.barrier > 0) wait_copies<0>();
  __syncthreads();
  p.out[threadIdx.x] = values[127 - threadIdx.x];
  if (p.barrier == 0) wait_copies<0>();
}

void planted_copy(std::uintptr_t out, int waits) {
  const Planted p{reinterpret_cast<float*>(out), waits};
  launch("planted_copy", planted_copy_kernel, dim3(1), 32, 512, nullptr, p);
}

enum Fault { read_then_written, beyond_the_end, never_written, waits_for_ever, lanes_part };

// Two warps that make one of these mistakes; `out` has a value for each thread.
void planted_fault_kernel(Planted p) {
  Shared<unsigned char> memory = shared_memory();
  Shared<float> values = carve<float>(memory, 64);
  const int thread = threadIdx.x;
  if (p.barrier != never_written) values[thread] = 1.0f;
  __syncthreads();
  p.out[thread] = values[p.barrier == beyond_the_end ? thread + 1 : (thread + 32) % 64];
  if (p.barrier == read_then_written) values[thread] = 2.0f;
  if (p.barrier == waits_for_ever && thread % 2 == 0) __syncthreads();
  if (p.barrier == waits_for_ever || p.barrier == lanes_part) {
    if (p.barrier == lanes_part && thread % 32 == 3) {
      float product[4] = {};
      const unsigned a[4] = {};
      multiply<Half>(product, a, 0, 0);
    } else {
      __shfl_xor_sync(~0u, 1.0f, 1);
    }
  }
}

void planted_fault(std::uintptr_t out, int fault) {
  const Planted p{reinterpret_cast<float*>(out), fault};
  launch("planted_fault", planted_fault_kernel, dim3(1), 64, 256, nullptr, p);
}

}  // namespace
}  // namespace slimvit

PYBIND11_MODULE(_cuda, m) {
  using namespace slimvit;
  m.doc() = "slimvit's CUDA kernels on a host: for tests.";
  m.attr("emulated") = true;
  m.def("why_not", [] { return std::optional<std::string>(); });
  m.def("architectures", [] { return "70 80"; });
  m.def(
      "emulate",
      [](int architecture, int shared_memory) {
        emulation::architecture = architecture;
        emulation::shared_limit = shared_memory;
      },
      py::arg("architecture"), py::arg("shared_memory"),
      "Which device to be: compute capability, bytes of shared memory a block.");
  m.def("capability", [] { return emulation::architecture; });
  m.def("planted", &planted, "A kernel whose barrier can be left out.");
  m.def("planted_copy", &planted_copy, "A kernel that may not wait for its copies.");
  m.def("planted_fault", &planted_fault, "A kernel with another mistake, by its number.");
  m.def("half", [](float x) { return to_float(from_float<Half>(x)); });
  m.def("bfloat16", [](float x) { return to_float(from_float<BFloat16>(x)); });
  bind_ops(m);
}
