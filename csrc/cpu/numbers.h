#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "cpu/isa.h"

namespace slimvit {

struct bf16 {
  std::uint16_t bits;
};

// Only files of one instruction set include what follows. Everything there has internal linkage:
// the linker must never take a function compiled for one processor as another's.
namespace {

// How many numbers one step of a matrix product takes from a row: see Avx512::dot.
template <typename T>
constexpr int kStep = sizeof(float) / sizeof(T);

SLIMVIT_INLINE int word(const bf16* p) {
  int bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bits;
}

SLIMVIT_INLINE float widen(float x) { return x; }
SLIMVIT_INLINE float widen(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

SLIMVIT_INLINE void narrow(float x, float& out) { out = x; }
SLIMVIT_INLINE void narrow(float x, bf16& out) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  if (x != x) {
    out.bits = 0x7fc0;
    return;
  }
  out.bits = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

SLIMVIT_INLINE float within(float x, float end) {  // NaN stays
  return x > end ? end : x < -end ? -end : x;
}

template <int N>
struct Int {
  static constexpr int value = N;
};

constexpr long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }
constexpr long least(long a, long b) { return a < b ? a : b; }
constexpr long most(long a, long b) { return a > b ? a : b; }

// The first of `n` items that worker `rank` of `size` takes, in units of `unit` items.
constexpr long share(long n, int rank, int size, long unit = 1) {
  return least(n, (n + unit - 1) / unit * rank / size * unit);
}

}  // namespace
}  // namespace slimvit
