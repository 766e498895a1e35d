// float16 and bfloat16, rounded as CUDA rounds them.
#pragma once

#include <cstdint>

namespace slimvit {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
float to_float(Half value);
float to_float(BFloat16 value);
template <class T>
T from_float(float value);
template <>
Half from_float<Half>(float value);
template <>
BFloat16 from_float<BFloat16>(float value);

}  // namespace slimvit
