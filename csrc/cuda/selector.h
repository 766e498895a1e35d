// What the kernels that judge patches share: products of matrices that lie in shared memory.
#pragma once

#include "cuda/activation.h"
#include "cuda/mma.h"
#include "cuda/ops.h"

namespace slimvit {

constexpr int kSelectorThreads = 128;
constexpr int kSelectorHead = 128;  // channels at most

// Channels of a head that each patch is judged by on its own.
__host__ __device__ inline int local_of(int c) { return (c + 1) / 2; }
__host__ __device__ inline int sixteens(int size) { return (size + 15) / 16 * 16; }
__host__ __device__ inline int tiles_of(int patches) {
  return (patches + kSelectorRows - 1) / kSelectorRows;
}
// From one row to the next, so that rows start in different banks.
__host__ __device__ inline int stride_of(int columns) { return sixteens(columns) + 8; }

// A matrix, from a multiple of 16 bytes where its rows are such, goes into shared memory, with
// zeros up to sixteens of columns and up to `lines` rows.
template <class T>
__device__ void take_matrix(Shared<T> to, const T* from, int rows, int columns, int lines) {
  const int wide = sixteens(columns), stride = stride_of(columns);
  if (columns % 8 == 0) {
    for (int i = threadIdx.x; i < lines * (wide / 8); i += kSelectorThreads) {
      const int row = i / (wide / 8), column = i % (wide / 8) * 8;
      const bool live = row < rows && column < columns;
      const uint4 packed = live ? load16(from + row * columns + column) : uint4{0, 0, 0, 0};
      store16(to + row * stride + column, packed);
    }
    return;
  }
  for (int i = threadIdx.x; i < lines * wide; i += kSelectorThreads) {
    const int row = i / wide, column = i % wide;
    const bool live = row < rows && column < columns;
    to[row * stride + column] = live ? from[row * columns + column] : from_float<T>(0.0f);
  }
}

// out = a b of a tile of patches, by all warps; a barrier must come before it, and after it.
template <class M>
__device__ void product(Shared<float> out, Shared<typename M::T> a, Shared<typename M::T> b,
                        int inner, int columns) {
  const int a_stride = stride_of(inner), stride = stride_of(columns);
  const int across = sixteens(columns) / 16;
  for (int tile = threadIdx.x / 32; tile < kSelectorRows / 16 * across;
       tile += kSelectorThreads / 32) {
    const int row = tile / across * 16, column = tile % across * 16;
    typename M::C c;
    M::zero(c);
    for (int k = 0; k < inner; k += 16) {
      typename M::A left;
      typename M::RowsB right;
      M::load(left, a + row * a_stride + k, a_stride);
      M::load_rows(right, b + k * stride + column, stride);
      M::multiply_add(c, left, right);
    }
    M::store(out + row * stride + column, c, stride);
  }
}

// Bytes of shared memory of a matrix that is multiplied.
inline int bytes_of(int lines, int columns) {
  return ceil_div(lines * stride_of(columns) * 2, 32) * 32;
}

}  // namespace slimvit
