#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (slimvit::Isa isa : slimvit::offered()) names.emplace_back(slimvit::name(isa));
  return names;
}

std::string chosen() { return slimvit::name(slimvit::chosen()); }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "What slimvit compiles for processors.";
  m.def("instruction_sets", &instruction_sets,
        "Instruction sets that this processor offers, slowest first.");
  m.def("chosen", &chosen,
        "The set that kernels use: the fastest, or the one that SLIMVIT_ISA names.\n\n"
        "Raises ValueError if SLIMVIT_ISA is unknown or not offered here.");
}
