#include "cpu/bindings.h"

#include "cpu/run.h"
#include "cpu/stopwatch.h"

namespace py = pybind11;

namespace slimvit {
namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (Isa isa : offered()) names.emplace_back(name(isa));
  return names;
}

}  // namespace
}  // namespace slimvit

PYBIND11_MODULE(_cpu, m) {
  using namespace slimvit;
  m.doc() = "What slimvit compiles for processors. Arrays are passed as addresses.";
#ifdef SLIMVIT_SANITIZED
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  m.def("instruction_sets", &instruction_sets,
        "Instruction sets that this processor offers, slowest first.");
  m.def(
      "chosen", [] { return std::string(name(chosen())); },
      "The set that kernels use: the fastest, or the one that SLIMVIT_ISA names.\n\n"
      "Raises ValueError if SLIMVIT_ISA is unknown or not offered here.");
  m.def(
      "peak",
      [](const std::string& dtype) {
        const Isa isa = chosen();
        const Dtype of = dtype_of(dtype);
        const py::gil_scoped_release release;
        return measure_peak(isa, of);
      },
      py::arg("dtype"), "Measured peak of one thread, in floating-point operations per second.");
  m.def(
      "profile",
      [](bool on) {
        py::dict seconds;
        for (int i = 0; i < static_cast<int>(Phase::count); ++i)
          seconds[name(static_cast<Phase>(i))] = 1e-9 * take_time(static_cast<Phase>(i));
        __atomic_store_n(&profiling, on, __ATOMIC_RELAXED);
        return seconds;
      },
      py::arg("on"),
      "Start or stop measuring where time goes; returns the seconds of each part, summed over "
      "threads, since the last call. Waits of workers count in the parts they wait in, too.");
  m.def(
      "prefer_huge_pages",
      [](Address begin, std::int64_t bytes) { prefer_huge_pages(at<void>(begin), bytes); },
      py::arg("begin"), py::arg("bytes"),
      "Ask the system for huge pages where it has them: weights are read end to end for every "
      "image.");
  bind_packing(m);
  bind_calls(m);
}
