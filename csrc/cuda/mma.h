// Matrix products of one warp, 16 x 16 by 16, for two generations of tensor cores.
#pragma once

#include <type_traits>

#include "cuda/device.h"

namespace slimvit {

// sm_80 and newer: mma.sync on registers whose layout is known. C holds, of columns 0-7 and then of
// columns 8-15, rows l / 4 and l / 4 + 8, each two neighbours.
template <class Type>
struct Ampere {
  using T = Type;
  static constexpr bool asynchronous = true;

  struct A {
    unsigned r[4];
  };
  using ColumnsB = A;
  using RowsB = A;
  struct C {
    float x[8];
  };

  // [16][stride], 16 columns of it.
  static __device__ void load(A& a, Shared<T> at, int stride) {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(a.r, at + (lane % 16) * stride + lane / 16 * 8);
  }

  // b[k][n] = at[n * stride + k]: rows of a weight as columns.
  static __device__ void load_columns(ColumnsB& b, Shared<T> at, int stride) {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(b.r, at + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  }

  // b[k][n] = at[k * stride + n].
  static __device__ void load_rows(RowsB& b, Shared<T> at, int stride) {
    const int lane = threadIdx.x % 32;
    load_matrices<true>(b.r, at + (lane % 16) * stride + lane / 16 * 8);
  }

  static __device__ void zero(C& c) {
#pragma unroll
    for (float& x : c.x) x = 0;
  }

  static __device__ void multiply_add(C& c, const A& a, const A& b) {
    multiply<T>(c.x, a.r, b.r[0], b.r[1]);
    multiply<T>(c.x + 4, a.r, b.r[2], b.r[3]);
  }

  static __device__ int row(int i) { return threadIdx.x % 32 / 4 + i % 4 / 2 * 8; }
  static __device__ int column(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 4 * 8; }

  static __device__ void store(Shared<float> at, const C& c, int stride) {
#pragma unroll
    for (int i = 0; i < 8; ++i) at[row(i) * stride + column(i)] = c.x[i];
  }
};

// sm_70 and sm_75: wmma, which keeps the layout of its registers to itself.
struct Volta {
  using T = Half;
  static constexpr bool asynchronous = false;

  using A = wmma::fragment<wmma::matrix_a, 16, 16, 16, Half, wmma::row_major>;
  using ColumnsB = wmma::fragment<wmma::matrix_b, 16, 16, 16, Half, wmma::col_major>;
  using RowsB = wmma::fragment<wmma::matrix_b, 16, 16, 16, Half, wmma::row_major>;
  using C = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

  static __device__ void load(A& a, Shared<T> at, int stride) {
    wmma::load_matrix_sync(a, at, stride);
  }
  static __device__ void load_columns(ColumnsB& b, Shared<T> at, int stride) {
    wmma::load_matrix_sync(b, at, stride);
  }
  static __device__ void load_rows(RowsB& b, Shared<T> at, int stride) {
    wmma::load_matrix_sync(b, at, stride);
  }
  static __device__ void zero(C& c) { wmma::fill_fragment(c, 0.0f); }
  template <class B>
  static __device__ void multiply_add(C& c, const A& a, const B& b) {
    wmma::mma_sync(c, a, b, c);
  }
  static __device__ void store(Shared<float> at, const C& c, int stride) {
    wmma::store_matrix_sync(at, c, stride, wmma::mem_row_major);
  }
};

// Whether this pass of the compiler is for an architecture that runs kernels of M: the others hold
// an empty body.
template <class M>
__device__ constexpr bool compiled_for() {
#if defined(SLIMVIT_EMULATED) || !defined(__CUDA_ARCH__)
  return true;
#elif __CUDA_ARCH__ >= 800
  return M::asynchronous;
#else
  return !M::asynchronous;
#endif
}

}  // namespace slimvit
