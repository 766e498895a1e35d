#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "cuda/devices.h"

namespace py = pybind11;

void bind_ops(py::module_& m);

namespace {

std::optional<std::string> reason(std::string text) {
  if (text.empty()) return std::nullopt;
  return text;
}

py::list devices() {
  py::list found;
  for (const slimvit::Device& device : slimvit::devices()) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["memory"] = device.memory;
    found.append(entry);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "What slimvit compiles for CUDA devices.";
  m.def(
      "why_not", [] { return reason(slimvit::why_not()); },
      "Why no CUDA device can be used here; None where one can.");
  m.def("devices", &devices,
        "The devices: name, capability (major, minor) and memory in bytes; empty without any.");
  m.def(
      "probe", [](int device) { return reason(slimvit::probe(device)); }, py::arg("device"),
      "Run a one-thread kernel of this build: why it fails on that device, or None.");
  m.def(
      "driver",
      [] {
        const int version = slimvit::driver_version();
        return version == 0 ? std::optional<std::string>() : slimvit::dotted(version);
      },
      "The newest CUDA version that the installed driver serves; None without a driver.");
  m.def(
      "runtime", [] { return slimvit::dotted(slimvit::runtime_version()); },
      "The CUDA runtime version linked in.");
  m.def(
      "architectures", [] { return std::string(SLIMVIT_CUDA_ARCHITECTURES); },
      "What it was built for, as CMake writes it: 80-real is machine code, 90 also PTX.");
  bind_ops(m);
}
