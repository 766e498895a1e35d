// How bindings take what Python gives: values by name, pointers as integers, 0 for null.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cuda/ops.h"

namespace py = pybind11;
using namespace slimvit;

using Address = std::uintptr_t;

template <class T = void>
const T* in(Address at) {
  return reinterpret_cast<const T*>(at);
}
template <class T = void>
T* out(Address at) {
  return reinterpret_cast<T*>(at);
}

inline Type type_of(const std::string& name) {
  if (name == "float16") return Type::half;
  if (name == "bfloat16") return Type::bfloat16;
  throw py::value_error("dtype must be float16 or bfloat16, got " + name);
}

// Values of a dict by name: a missing one is a KeyError that names it.
struct Given {
  const py::dict& dict;
  int number(const char* name) const { return dict[name].cast<int>(); }
  float real(const char* name) const { return dict[name].cast<float>(); }
  Address address(const char* name) const { return dict[name].cast<Address>(); }
  std::string text(const char* name) const { return dict[name].cast<std::string>(); }
  void* stream() const { return out(address("stream")); }
  Type type() const { return type_of(text("dtype")); }
};

// A launch waits while the device's queue is full; Python's other threads go on meanwhile.
template <class... Parameters, class... Values>
void launch(void (*kernel)(Parameters...), const Values&... values) {
  const py::gil_scoped_release released;
  kernel(values...);
}
