#pragma once

#include "cpu/numbers.h"

// Four lanes in plain C++, with the names of Avx512, for any processor: compilers map the vector
// type to SSE, NEON or whatever there is.

namespace slimvit {
namespace {

struct Portable {
  static constexpr Isa kIsa = Isa::portable;
  static constexpr int kLanes = 4;
  static constexpr int kVecs = 2;
  static constexpr int kValueVecs = 2;
  static constexpr int rows(int) { return 4; }

  typedef float F __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));
  typedef std::uint32_t U __attribute__((vector_size(16)));

  static SLIMVIT_INLINE F zero() { return F{}; }
  static SLIMVIT_INLINE F set(float x) { return F{x, x, x, x}; }
  static SLIMVIT_INLINE F load(const float* p) { return read<F>(p); }
  static SLIMVIT_INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static SLIMVIT_INLINE F add(F a, F b) { return a + b; }
  static SLIMVIT_INLINE F sub(F a, F b) { return a - b; }
  static SLIMVIT_INLINE F mul(F a, F b) { return a * b; }
  static SLIMVIT_INLINE F div(F a, F b) { return a / b; }
  static SLIMVIT_INLINE F fma(F a, F b, F c) { return a * b + c; }
  static SLIMVIT_INLINE F sqrt(F x) {
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
  }
  static constexpr bool kLooksUp = false;  // see Avx512
  static constexpr bool kRefinesRoots = false;
  static SLIMVIT_INLINE F inverse_root(F x) { return set(1.0f) / sqrt(x); }
  static SLIMVIT_INLINE F min(F a, F b) { return a < b ? a : b; }
  static SLIMVIT_INLINE F max(F a, F b) { return a > b ? a : b; }
  static SLIMVIT_INLINE F above(F a, F b, F x, F y) { return a > b ? x : y; }
  static SLIMVIT_INLINE F round(F x) {  // |x| < 2^22; NaN stays
    const F magic = set(12582912.0f);   // 1.5 · 2^23: its last bit counts ones
    return (x + magic) - magic;
  }
  static SLIMVIT_INLINE F scale(F x, F n) {  // n an integer in [-126, 127]
    const F safe = n == n ? n : zero();      // a NaN is already in x
    const I exponent = __builtin_convertvector(safe, I) + 127;
    return x * reinterpret_cast<F>(exponent << 23);
  }
  static SLIMVIT_INLINE float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static SLIMVIT_INLINE float largest(F x) {
    const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
  }

  static SLIMVIT_INLINE F load(const bf16* p) {
    return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  static SLIMVIT_INLINE void store(bf16* p, F x) {
    for (int i = 0; i < kLanes; ++i) narrow(x[i], p[i]);
  }

  static SLIMVIT_INLINE F operand(const float* p) { return load(p); }
  static SLIMVIT_INLINE F broadcast(const float* p) { return set(*p); }
  static SLIMVIT_INLINE F dot(F sum, F a, F b) { return a * b + sum; }
  static SLIMVIT_INLINE U operand(const bf16* p) { return read<U>(p); }
  static SLIMVIT_INLINE U broadcast(const bf16* p) {
    const auto x = static_cast<std::uint32_t>(word(p));
    return U{x, x, x, x};
  }
  static SLIMVIT_INLINE F dot(F sum, U a, U b) {
    const auto even = [](U x) { return reinterpret_cast<F>(x << 16); };
    const auto odd = [](U x) { return reinterpret_cast<F>(x & 0xffff0000u); };
    return odd(a) * odd(b) + (even(a) * even(b) + sum);
  }

  static SLIMVIT_INLINE void interleave(const bf16* a, const bf16* b, bf16* out) {
    for (int i = 0; i < kLanes; ++i) {
      out[2 * i] = a[i];
      out[2 * i + 1] = b == nullptr ? bf16{0} : b[i];
    }
  }

  static SLIMVIT_INLINE void transpose(const char* in, long in_stride, int valid, char* out,
                                       long out_stride, long columns) {
    for (int i = 0; i < kLanes; ++i)
      for (long j = 0; j < columns; ++j) {
        std::uint32_t x = 0;
        if (i < valid) __builtin_memcpy(&x, in + i * in_stride + 4 * j, 4);
        __builtin_memcpy(out + j * out_stride + 4 * i, &x, 4);
      }
  }

 private:
  template <typename V>
  static SLIMVIT_INLINE V read(const void* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
};

}  // namespace
}  // namespace slimvit
