#include "halves.h"

#include <cmath>
#include <cstring>

namespace slimvit {

float to_float(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

float to_float(Half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  float result;
  if (exponent == 31) {
    result = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    result = std::ldexp(float(mantissa), -24);
  } else {
    result = std::ldexp(float(mantissa + 1024), exponent - 25);
  }
  return value.bits >> 15 ? -result : result;
}

template <>
BFloat16 from_float<BFloat16>(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return {0x7fff};
  return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
Half from_float<Half>(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {0x7fff};
  const float size = std::fabs(value);
  if (size == 0) return {sign};
  if (size >= 65520.0f) return {std::uint16_t(sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);  // size < 2 ** exponent
  // Ties to even, which is what nearbyint does; halves below 2 ** -14 are multiples of 2 ** -24.
  const int unit = exponent > -13 ? exponent - 11 : -24;
  const int count = int(std::nearbyint(std::ldexp(size, -unit)));
  if (unit == -24) return {std::uint16_t(sign | count)};
  return {std::uint16_t(sign | (((unit + 24) << 10) + count))};
}

}  // namespace slimvit
