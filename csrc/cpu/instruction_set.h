#pragma once

#include "cpu/block_op.h"
#include "cpu/select_op.h"
#include "cpu/slim_vit.h"

#if defined(__aarch64__)
#define SLIMVIT_IN_REGISTER(x) "+w"(x)
#elif defined(__x86_64__)
#define SLIMVIT_IN_REGISTER(x) "+v"(x)
#else
#define SLIMVIT_IN_REGISTER(x) "+m"(x)  // vectors have no constraint that all others know
#endif

// Every kernel for one instruction set: the body of isa_*.cpp.

namespace slimvit {
namespace {

// Floating-point operations of `rounds` rounds of products that wait for neither memory nor each
// other: whoever times them learns the peak of this processor.
template <class S, typename T>
double peak(long rounds) {
  if constexpr (kMatrices<S, T>) return S::peak(rounds);
  constexpr int kRows = S::rows(S::kVecs), kVecs = S::kVecs;
  alignas(64) T a[2 * 8 * kStep<T>] = {}, b[4 * 16 * kStep<T>] = {};
  typename S::F acc[kRows][kVecs];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) acc[i][j] = S::zero();
  auto x = S::broadcast(a);
  auto y = S::operand(b);
  for (long r = 0; r < rounds; ++r) {
    asm volatile("" : SLIMVIT_IN_REGISTER(x), SLIMVIT_IN_REGISTER(y));  // unknown to the compiler
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[i][j] = S::dot(acc[i][j], x, y);
  }
  float rest = 0.0f;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) rest += S::sum(acc[i][j]);
  return 2.0 * kStep<T> * S::kLanes * kRows * kVecs * static_cast<double>(rounds) + rest;
}

template <class S, typename T>
constexpr auto finish_of() -> void (*)() {
  if constexpr (kMatrices<S, T>) return &S::finish;
  return [] {};
}

template <class S, typename T>
constexpr Kernels make_kernels() {
  return {&pack_block<S, T>,         &pack_embedding<S, T>, &pack_head<S, T>,
          &pack_chooser<S, T>,       &pack_selector<S, T>,  &block_memory<S, T>,
          &block_own_memory<S, T>,   &block<S, T>,          &network_memory<S, T>,
          &network_own_memory<S, T>, &network<S, T>,        &select_memory<S, T>,
          &select_own_memory<S, T>,  &select<S, T>,         &peak<S, T>,
          finish_of<S, T>()};
}

}  // namespace
}  // namespace slimvit

#define SLIMVIT_KERNELS(name, S)                           \
  namespace slimvit {                                      \
  extern const Kernels name##_float32, name##_bfloat16;    \
  const Kernels name##_float32 = make_kernels<S, float>(); \
  const Kernels name##_bfloat16 = make_kernels<S, bf16>(); \
  }
