// What every kernel starts from. Shared memory is reached through Shared<T> and the functions here
// alone: to the compiler for GPUs a plain pointer, to the emulation of the tests one that notices
// races.
#pragma once

#ifdef SLIMVIT_EMULATED
#include "emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace slimvit {

namespace wmma = nvcuda::wmma;

using Half = __half;
using BFloat16 = __nv_bfloat16;

template <class T>
using Shared = T*;

__device__ inline Shared<unsigned char> shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// The next `count` values of shared memory; `at` moves on, to a multiple of 32 bytes.
template <class T>
__device__ inline Shared<T> carve(Shared<unsigned char>& at, int count) {
  T* start = reinterpret_cast<T*>(at);
  at += (count * sizeof(T) + 31) / 32 * 32;
  return start;
}

__device__ inline float to_float(Half value) { return __half2float(value); }
__device__ inline float to_float(BFloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline Half from_float<Half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <class T>
__device__ inline uint4 load16(const T* at) {
  return *reinterpret_cast<const uint4*>(at);
}

template <class T>
__device__ inline void store16(T* at, uint4 value) {
  *reinterpret_cast<uint4*>(at) = value;
}

template <class T>
__device__ inline void store4(T* at, unsigned value) {
  *reinterpret_cast<unsigned*>(at) = value;
}

// 16 bytes from global to shared memory, zeros where not live; there after wait_copies<n>(), which
// leaves the n latest groups under way, and a barrier.
template <class T>
__device__ inline void copy16_async(T* to, const T* from, bool live) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(live ? 16 : 0));
#endif
}

__device__ inline void close_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}

template <int n>
__device__ inline void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// Four 8 x 8 matrices of two bytes a value, whose rows start where each lane says; lane l gets
// values 2 (l % 4) and the one after of row l / 4, or of column l / 4 where transposed.
template <bool transposed, class T>
__device__ inline void load_matrices(unsigned (&to)[4], const T* row) {
#if __CUDA_ARCH__ >= 750
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// c += a b, 16 x 8 by 16: a warp's share of each as PTX lays out mma.m16n8k16.
template <class T>
__device__ inline void multiply(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2 && std::is_same<T, Half>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

#ifdef __CUDACC_RTC__  // no host beside the device: launchers only say which kernels there are

inline int architecture() { return __CUDA_ARCH__ / 10; }
inline int shared_memory_limit() { return 48 << 10; }

template <class P>
void launch(const char*, void (*)(P), dim3, int, int, void*, const P&) {}

#else

inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // cleared, so that torch never meets it
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// Of the current device: compute capability such as 90, and the shared memory that one block may
// use.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}
inline int architecture() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
         attribute(cudaDevAttrComputeCapabilityMinor);
}
inline int shared_memory_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Runs a kernel on the current device; throws with the kernel's name where CUDA refuses it.
template <class P>
void launch(const char* name, void (*kernel)(P), dim3 grid, int threads, int shared, void* stream,
            const P& params) {
  if (shared > 48 << 10) {
    // All there is, and never less for a later launch: an earlier one may be in a graph by then.
    cudaFuncAttributes own{};
    check(cudaFuncGetAttributes(&own, kernel), name);
    const int rest = shared_memory_limit() - static_cast<int>(own.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               rest > shared ? rest : shared),
          name);
  }
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), name);
}

#endif

}  // namespace slimvit

#endif

namespace slimvit {

// 16 bytes as eight values.
template <class T>
__device__ inline void unpack(uint4 packed, float (&values)[8]) {
  T parts[8];
  memcpy(parts, &packed, 16);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = to_float(parts[i]);
}

template <class T>
__device__ inline uint4 pack(const float (&values)[8]) {
  T parts[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) parts[i] = from_float<T>(values[i]);
  uint4 packed;
  memcpy(&packed, parts, 16);
  return packed;
}

// Two values as the register of a matrix instruction holds them.
template <class T>
__device__ inline unsigned pack(float low, float high) {
  T parts[2] = {from_float<T>(low), from_float<T>(high)};
  unsigned packed;
  memcpy(&packed, parts, 4);
  return packed;
}

// The sum of all lanes' values, the same for each of them.
__device__ inline float over_warp(float value) {
  for (int far = 16; far > 0; far /= 2) value += __shfl_xor_sync(~0u, value, far);
  return value;
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace slimvit
