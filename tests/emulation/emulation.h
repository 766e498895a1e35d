// CUDA for a host without a GPU: the kernels of csrc/cuda compile as plain C++ behind this header.
#pragma once

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "block.h"
#include "halves.h"
#include "shared.h"
#include "tensor_cores.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

namespace slimvit {

#define threadIdx (::slimvit::emulation::thread_index())
#define blockIdx (::slimvit::emulation::block_index())
#define blockDim (::slimvit::emulation::block_size())

inline void __syncthreads() { emulation::barrier(); }
inline int __syncthreads_count(bool holds) { return emulation::count(holds); }
inline void __syncwarp() { emulation::warp_barrier(); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(unsigned word) { return __builtin_ffs(int(word)); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fminf(float a, float b) { return std::fmin(a, b); }
inline float fmaf(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp2f(float x) { return std::exp2(x); }
using std::memcpy;

template <class T>
T __shfl_xor_sync(unsigned, T value, int far) {
  struct Lane {
    T value;
    int far;
    T answer;
  } mine{value, far, 0};
  emulation::together("shuffle", &mine, [](void* const* lanes) {
    for (int l = 0; l < 32; ++l) {
      Lane& lane = *static_cast<Lane*>(lanes[l]);
      lane.answer = static_cast<Lane*>(lanes[l ^ lane.far])->value;
    }
  });
  return mine.answer;
}

inline unsigned __ballot_sync(unsigned, bool flag) {
  struct Lane {
    bool flag;
    unsigned answer;
  } mine{flag, 0};
  emulation::together("ballot", &mine, [](void* const* lanes) {
    unsigned word = 0;
    for (int l = 0; l < 32; ++l) word |= unsigned(static_cast<Lane*>(lanes[l])->flag) << l;
    for (int l = 0; l < 32; ++l) static_cast<Lane*>(lanes[l])->answer = word;
  });
  return mine.answer;
}

inline int architecture() { return emulation::architecture; }
inline int shared_memory_limit() { return emulation::shared_limit; }

template <class P>
void launch(const char* name, void (*kernel)(P), dim3 grid, int threads, int shared, void*,
            const P& params) {
  if (shared > shared_memory_limit()) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(shared) +
                             " bytes of shared memory, more than the device has");
  }
  emulation::run(name, [&] { kernel(params); }, grid, threads, shared);
}

}  // namespace slimvit
