#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/packs.h"

// What the bindings have in common: addresses, and checks of what comes from Python.

namespace slimvit {

// Addresses come as integers from tensors that the caller keeps alive; 0 is null.
using Address = std::uintptr_t;

template <typename U>
U* at(Address address) {
  return reinterpret_cast<U*>(address);
}

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

inline Dtype dtype_of(const std::string& name) {
  require(name == "float32" || name == "bfloat16",
          "dtype must be float32 or bfloat16, got '" + name + "'");
  return name == "float32" ? Dtype::float32 : Dtype::bfloat16;
}

inline std::string join(const std::vector<long>& sizes) {
  std::string text;
  for (long size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return text;
}

inline const char* kind_name(PackHead::Kind kind) {
  switch (kind) {
    case PackHead::Kind::block:
      return "block";
    case PackHead::Kind::embedding:
      return "embedding";
    case PackHead::Kind::head:
      return "head";
    case PackHead::Kind::chooser:
      return "chooser";
    case PackHead::Kind::selector:
      return "selector";
  }
  return "unknown";
}

template <class Pack>
const Pack* pack_at(Address address, std::int64_t bytes, PackHead::Kind kind) {
  const std::string name = std::string("the pack of the ") + kind_name(kind);
  require(address % kAlignment == 0, name + " must start at a multiple of 64 bytes");
  require(bytes >= static_cast<std::int64_t>(sizeof(Pack)), name + " is too short");
  const auto* pack = at<const Pack>(address);
  const PackHead& head = pack->head;
  require(head.magic == PackHead::kMagic && head.kind == kind,
          name + " is something else, or of another version: accelerate the model anew");
  require(head.bytes == bytes, name + " is cut off: it has " + std::to_string(bytes) +
                                   " bytes instead of " + std::to_string(head.bytes));
  for (Isa isa : offered())
    if (isa == head.isa) return pack;
  throw std::invalid_argument(name + " is for " + slimvit::name(head.isa) +
                              ", which this processor does not offer: accelerate the model anew");
}

// Each adds its functions to the module.
void bind_packing(pybind11::module_& m);
void bind_calls(pybind11::module_& m);

}  // namespace slimvit
